//! The engine on real TUN devices and real sockets, in namespaces that each test makes for itself.
//!
//! Needs no root: every test runs itself again under `unshare -Urnm`. A machine that does not allow
//! that fails the tests; it does not skip them.

#[macro_use]
mod lab;

mod backend;
mod basic;
mod congestion;
mod detour;
mod fragments;
mod hostile;
mod interop;
mod kernel;
mod lifecycle;
mod paths;
mod queues;
mod rotation;
mod sessions;
mod underlay;
