# The front door. `make demo` shows the main job; `make test` runs every test. Both install what is missing.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

.PHONY: help demo test test-kernel soak bench bench-inventory bench-tunnel lint audit docs deps deps-test build check-tree
help:
	@echo "make demo    three servers with their own CA in private namespaces: enrolled, meshed, rotated, revoked"
	@echo "make test    every test, lint and judge (what CI runs)"
	@echo "make test-kernel  the kernel's WireGuard, in a virtual machine with Debian's kernel"
	@echo "make soak    ten minutes of the tunnel against wireguard-go, with either side beginning"
	@echo "make bench   the figures, as ratios against a baseline of the same run"
	@echo "make lint    formatting, clippy, documentation, dependency arrows"
	@echo "make audit   advisories, licences and sources of the dependencies (ADVISORY_DB=DIR, cargo-deny)"

# What the demo needs beside Rust and a C compiler; installed with apt-get (and sudo when not root) if missing.
deps:
	@deploy/install-packages nft:nftables ip:iproute2 cmake:cmake

# What the tests need on top: real third-party programs to judge us, and one pinned Python environment.
deps-test: deps
	@deploy/install-packages ping:iputils-ping tcpdump:tcpdump nginx:nginx-light curl:curl openssl:openssl update-ca-certificates:ca-certificates \
		certtool:gnutls-bin strace:strace wg:wireguard-tools wireguard-go:wireguard-go faketime:faketime ethtool:ethtool python3:python3 \
		vfychain:libnss3-tools javac:openjdk-17-jdk-headless softhsm2-util:softhsm2 haproxy:haproxy pg_lsclusters:postgresql
	@tests/judges/install
	@tests/interop/install

build:
	cargo build --locked --release --bin meshd --bin meshctl

demo: deps build
	target/release/meshctl demo

test: deps-test
	@tests/run

lint: check-tree
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets --features failpoints -- -D warnings

docs:
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps --document-private-items

# The arrows between our crates, and that `core` and `ca` stay pure.
check-tree:
	@tests/check-tree

# `cert ls` among a million certificates, through the index as the controller uses it. Minutes: most of it fills the index.
bench-inventory:
	cargo test --locked --release -p mesh-controller --lib a_million_certificates -- --ignored --nocapture

# Known holes and licences, by deny.toml; offline, against a copy of the RustSec database.
audit:
	@ADVISORY_DB="$(ADVISORY_DB)" tests/audit

# Not in `make test`: without /dev/kvm the guest is emulated, and each way to rekey is waited for.
# MESH_GUEST_FLEET=yes adds whole nodes on the kernel's engine, MESH_GUEST_DEMO=yes the demo.
test-kernel: deps
	@deploy/install-packages ping:iputils-ping wg:wireguard-tools unshare:util-linux nsenter:util-linux python3:python3 \
		qemu-system-x86_64:qemu-system-x86 busybox:busybox cpio:cpio depmod:kmod
	@tests/kernel/run

.PHONY: bench-ocsp bench-revocation bench-retention
# Ninety days of 1,000 nodes that renew every 24 h, in virtual time: what the store takes on disk.
bench-retention:
	cargo test --locked --release -p mesh-controller --lib -- ninety_days --ignored --nocapture

# OCSP responses a second, client included; and the time of one revocation at 10^2, 10^4 and 10^6 revoked.
bench-ocsp:
	cargo test --locked --release -p mesh-controller --test controller -- ocsp::rate --ignored --nocapture

bench-revocation:
	cargo test --locked --release -p mesh-controller --lib -- revocation_is_flat --ignored --nocapture

# Ten minutes against wireguard-go with a request each 3 s, with either side beginning: none may stay unanswered.
soak: deps-test
	cargo test --locked -p mesh-tunnel --test netns -- soak_ --ignored --nocapture

bench: deps-test
	@deploy/install-packages iperf3:iperf3 cfssl:golang-cfssl
	tests/bench/run
	tests/bench/tunnel

# The tunnel alone, about a quarter of an hour; at its end one table of all its figures.
bench-tunnel: deps
	@deploy/install-packages ping:iputils-ping wg:wireguard-tools wireguard-go:wireguard-go ethtool:ethtool iperf3:iperf3 python3:python3
	tests/bench/tunnel
