"""Judges a folder of `ca/examples/chain.rs`, or of `tests/e2e/judged.rs`, with OpenSSL, GnuTLS, NSS, pyca, Go, the JDK and
pkilint.

Each judgement is one line. What must be refused (a revoked leaf, a changed leaf, a leaf used for what it is not, a missing
CRL) is judged as well: a judge that cannot say no proves nothing. Exits 1 if any judgement differs from what is expected.
"""

import base64
import concurrent.futures
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.x509 import verification

# What a leaf of each file may do, and a name a client would look for.
SERVER, CLIENT = "server", "client"
LEAVES = {
    "leaf-controller.pem": ({SERVER, CLIENT}, "controller.mesh.internal"),
    "leaf-node.pem": ({SERVER, CLIENT}, "web-1.mesh.internal"),
    "leaf-server.pem": ({SERVER}, "shop.mesh.internal"),
    "leaf-client.pem": ({CLIENT}, "shop.mesh.internal"),
    "leaf-peer.pem": ({SERVER, CLIENT}, "shop.mesh.internal"),
    "leaf-operator.pem": ({SERVER, CLIENT}, None),
    "leaf-long.pem": ({SERVER}, "a" * 60 + ".mesh.internal"),
}
# Keys of servers that NSS takes, see `judge_nss`.
NSS_SERVER_KEYS = ("ecdsa-p256", "ecdsa-p384")
# Leaves of `profiles/`: six built-in profiles and four custom ones, four types of key, good and revoked.
PROFILES = (6 + 4) * 4 * 2
OPENSSL_PURPOSE = {SERVER: "sslserver", CLIENT: "sslclient"}
NSS_USAGE = {SERVER: "1", CLIENT: "0"}
GNUTLS_PURPOSE = {SERVER: "1.3.6.1.5.5.7.3.1", CLIENT: "1.3.6.1.5.5.7.3.2"}
# pkilint takes every URI without a dotted host of a web scheme for wrong; SPIFFE IDs are what the SVID rules ask for.
ACCEPTED = re.compile(r'^pkix\.invalid_uri_syntax: Invalid URI syntax: "spiffe://mesh\.internal/[a-z0-9/-]+"$')

folder = pathlib.Path(sys.argv[1]).resolve()
scratch_folder = tempfile.TemporaryDirectory(prefix="judges-")
scratch = pathlib.Path(scratch_folder.name)
root, issuing = folder / "root.pem", folder / "issuing.pem"
root_crl = folder / "root.crl.pem"
judgements = []


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60)
    return done.returncode == 0, (done.stdout + done.stderr).strip()


def joined(name, *parts):
    path = scratch / name
    path.write_text("".join(part.read_text() for part in parts))
    return path


def expect(what, accepted, detail, expected=True):
    """Notes whether a judge said what it had to."""
    right = accepted == expected
    judgements.append(right)
    print(f"{'ok  ' if right else 'FAIL'} {what}: {'accepted' if accepted else 'refused'}")
    if not right:
        print(f"     expected the opposite; the judge said:\n{detail}")


def openssl(what, leaf, crls, use=None, host=None, expected=True):
    command = ["openssl", "verify", "-x509_strict", "-crl_check_all", "-CAfile", root, "-untrusted", issuing]
    command += ["-CRLfile", crls] if crls else []
    command += ["-purpose", OPENSSL_PURPOSE[use]] if use else []
    command += ["-verify_hostname", host] if host else []
    expect(f"openssl  {what}", *run(*command, leaf), expected)


def gnutls(what, leaf, crls, use=None, host=None, expected=True):
    chain = joined("chain.pem", leaf, issuing)
    command = ["certtool", "--verify", "--verify-profile", "medium", "--load-ca-certificate", root, "--infile", chain]
    command += ["--load-crl", crls] if crls else []
    command += ["--verify-purpose", GNUTLS_PURPOSE[use]] if use else []
    command += ["--verify-hostname", host] if host else []
    expect(f"gnutls   {what}", *run(*command), expected)


def pyca(what, leaf, crl, use, host=None, expected=True):
    """pyca checks chains but no CRLs; those are checked by hand here, by signature and serial. It takes no Ed25519 CAs, which the
    Web's CAs do not have: each of these refusals is expected, so that a change of it shows."""
    load = lambda path: x509.load_pem_x509_certificate(path.read_bytes())
    try:
        certificate, issuer = load(leaf), load(issuing)
        expected = expected and not isinstance(issuer.public_key(), ed25519.Ed25519PublicKey)
        builder = verification.PolicyBuilder().store(verification.Store([load(root)]))
        if use == CLIENT:
            builder.build_client_verifier().verify(certificate, [issuer])
        else:
            builder.build_server_verifier(x509.DNSName(host)).verify(certificate, [issuer])
        revocations = x509.load_pem_x509_crl(crl.read_bytes())
        if not revocations.is_signature_valid(issuer.public_key()) or revocations.issuer != issuer.subject:
            raise ValueError("CRL is not by the issuing CA")
        if revocations.get_revoked_certificate_by_serial_number(certificate.serial_number):
            raise ValueError("revoked")
        accepted, detail = True, ""
    except (verification.VerificationError, ValueError, x509.DuplicateExtension) as error:
        accepted, detail = False, str(error)
    expect(f"pyca     {what}", accepted, detail, expected)


def pkilint(job):
    what, command, expected = job
    tool = pathlib.Path(sys.executable).parent / command[0]
    arguments = [*command[1:], "-s", "NOTICE", "-f", "JSON"]
    files = [part for part in arguments if isinstance(part, pathlib.Path)]
    options = [part for part in arguments if not isinstance(part, pathlib.Path)]
    _, output = run(tool, *options, *files)
    try:
        results = json.loads(output)["results"]
    except (ValueError, KeyError):
        # The tool failed: that is neither a yes nor a no, so it must not pass for what is expected.
        return what, not expected, output, expected
    findings = [
        f"{finding['code']}: {finding.get('message') or ''}".strip()
        for result in results
        for finding in result["finding_descriptions"]
    ]
    foreign = [finding for finding in findings if not ACCEPTED.match(finding)]
    return what, not foreign, "\n".join(foreign), expected


def changed(name, path, old, new):
    """A copy of a PEM file with some bytes of its DER replaced, so that its signature no longer fits."""
    label, body = re.search(r"-----BEGIN ([A-Z0-9 ]+)-----\n(.*?)-----END", path.read_text(), re.S).groups()
    der = base64.b64decode(body)
    assert len(old) == len(new) and old in der, f"{path} does not hold what is to be changed"
    text = base64.encodebytes(der.replace(old, new)).decode()
    copy = scratch / name
    copy.write_text(f"-----BEGIN {label}-----\n{text}-----END {label}-----\n")
    return copy


def judge_chains():
    issuing_crl = folder / "issuing-revoked.crl.pem"
    crls = joined("crls.pem", issuing_crl, root_crl)
    empty = joined("empty-crls.pem", folder / "issuing.crl.pem", root_crl)
    for name, (uses, host) in LEAVES.items():
        leaf = folder / name
        openssl(f"{name}, empty CRLs", leaf, empty)
        for use in (SERVER, CLIENT):
            name_to_check = host if use == SERVER else None
            may = use in uses
            openssl(f"{name} as {use}", leaf, crls, use, name_to_check, may)
            gnutls(f"{name} as {use}", leaf, crls, use, name_to_check, may)
            if use == CLIENT or host:
                pyca(f"{name} as {use}", leaf, issuing_crl, use, host, may)
        openssl(f"{name} under another name", leaf, crls, host="evil.mesh.internal", expected=False)
    peer = folder / "leaf-peer.pem"
    openssl("leaf-peer.pem without any CRL", peer, None, expected=False)
    openssl("leaf-peer.pem without the root's CRL", peer, issuing_crl, expected=False)

    revoked = folder / "leaf-revoked.pem"
    openssl("leaf-revoked.pem before its revocation", revoked, empty)
    openssl("leaf-revoked.pem", revoked, crls, expected=False)
    gnutls("leaf-revoked.pem", revoked, crls, expected=False)
    pyca("leaf-revoked.pem", revoked, issuing_crl, CLIENT, expected=False)

    addressed = joined("addressed.pem", folder / "addressed/issuing.crl.pem", root_crl)
    for leaf, good in ((folder / "addressed/leaf-peer.pem", True), (folder / "addressed/leaf-revoked.pem", False)):
        openssl(f"addressed/{leaf.name}", leaf, addressed, expected=good)
        gnutls(f"addressed/{leaf.name}", leaf, addressed, expected=good)
        pyca(f"addressed/{leaf.name}", leaf, folder / "addressed/issuing.crl.pem", CLIENT, expected=good)


def judge_profiles():
    """A leaf under each profile, for every type of key: good for what its kind says, and for that alone; none if revoked."""
    crl = folder / "issuing-revoked.crl.pem"
    crls = joined("profile-crls.pem", crl, root_crl)
    leaves = sorted((folder / "profiles").iterdir())
    expect("profiles, each with every type of key, good and revoked", len(leaves) == PROFILES, str(leaves))
    nss = []
    for leaf in leaves:
        uses, profile, key = leaf.stem.split("-", 2)
        live, what = not key.endswith("-revoked"), f"profiles/{leaf.name}"
        for use in (SERVER, CLIENT):
            meant = uses in (use, "both")
            if not (live or meant):
                continue
            may = live and meant
            host = "shop.mesh.internal" if use == SERVER and profile != "operator" else None
            openssl(f"{what} as {use}", leaf, crls, use, host, may)
            gnutls(f"{what} as {use}", leaf, crls, use, host, may)
            if use == CLIENT or host:
                pyca(f"{what} as {use}", leaf, crl, use, host, may)
            # See `judge_nss`: of servers NSS takes ECDSA keys only.
            nss.append((leaf, NSS_USAGE[use], may and (use == CLIENT or key in NSS_SERVER_KEYS)))
        if live and profile != "operator":
            openssl(f"{what} under another name", leaf, crls, host="evil.mesh.internal", expected=False)
    judge_nss("profiles", root, issuing, [(root_crl, True), (crl, True)], nss)


def judge_changed():
    """Proof that the judges look at the signature and at the rules."""
    crl = folder / "issuing-revoked.crl.pem"
    crls = joined("crls.pem", crl, root_crl)
    leaf = changed("changed.pem", folder / "leaf-peer.pem", b"shop", b"sh*p")
    openssl("a changed leaf", leaf, crls, expected=False)
    gnutls("a changed leaf", leaf, crls, expected=False)
    pyca("a changed leaf", leaf, crl, CLIENT, expected=False)
    # cRLNumber becomes an extension nobody knows.
    unnumbered = changed("changed.crl.pem", crl, b"\x55\x1d\x14", b"\x55\x1d\x63")
    openssl("a changed CRL", folder / "leaf-peer.pem", joined("changed-crls.pem", unnumbered, root_crl), expected=False)
    return [
        ("a changed leaf", ["lint_pkix_cert", "lint", leaf], False),
        ("a changed CRL", ["lint_crl", "lint", "-t", "CRL", "-p", "PKIX", unnumbered], False),
    ]


def lint_jobs():
    # One type of key: the rest of a leaf does not depend on it.
    profiles = sorted(folder.glob("profiles/*-ecdsa-p256.pem"))
    certificates = [root, issuing, *profiles, *sorted(folder.glob("leaf-*.pem")), *sorted(folder.glob("addressed/leaf-*.pem"))]
    for path in certificates:
        yield str(path.relative_to(folder)), ["lint_pkix_cert", "lint", path], True
    pair = "lint_pkix_signer_signee_cert_chain"
    yield "root.pem signs issuing.pem", [pair, "lint", root, issuing], True
    for name in LEAVES:
        yield f"issuing.pem signs {name}", [pair, "lint", issuing, folder / name], True
    for path in [*sorted(folder.glob("issuing*.crl.pem")), *sorted(folder.glob("addressed/*.crl.pem"))]:
        yield str(path.relative_to(folder)), ["lint_crl", "lint", "-t", "CRL", "-p", "PKIX", path], True
    yield "root.crl.pem", ["lint_crl", "lint", "-t", "ARL", "-p", "PKIX", root_crl], True


def by_lines(judge, output):
    """Verdicts of a program that prints `folder<TAB>what<TAB>verdict`; what must be refused is `revoked`."""
    lines = [line.split("\t") for line in output.splitlines() if line.count("\t") == 2]
    for place, what, verdict in lines:
        kind = pathlib.Path(place).name
        live = not what.endswith("revoked")
        expect(f"{judge:8} {kind} {what}", verdict == "accepted", verdict, live)
        if not live and "revoked" not in verdict.lower():
            expect(f"{judge:8} {kind} {what}, and says so", False, verdict)
    return len(lines)


def judge_jdk(kinds):
    done, output = run("java", folder_of_judges / "Judge.java", *kinds, folder / "profiles")
    if by_lines("jdk", output) != 3 * len(kinds) + PROFILES or not done:
        expect("jdk      judged every kind", False, output)


def judge_go(kinds):
    go = pathlib.Path(sys.executable).parent / "go"
    environment = {**os.environ, "GOCACHE": str(scratch / "go"), "GOPATH": str(scratch / "gopath"), "GO111MODULE": "off", "CGO_ENABLED": "0"}
    command = [str(go), "run", str(folder_of_judges / "judge.go"), *map(str, kinds), str(folder / "profiles")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    if by_lines("go", done.stdout) != 2 * len(kinds) + PROFILES or done.returncode:
        expect("go       judged every kind", False, done.stdout + done.stderr)


def judge_nss(name, root, issuing, crls, leaves):
    """NSS's own verifier. It knows neither Ed25519 CAs or servers nor issuing distribution points, and asks RSA servers for
    keyEncipherment, which no leaf here has: each of these refusals is expected, so that a change of it shows."""
    database = scratch / f"nss-{name}"
    database.mkdir()
    run("certutil", "-N", "-d", f"sql:{database}", "--empty-password")
    for nick, trust, path in (("root", "CT,C,C", root), ("issuing", ",,", issuing)):
        run("certutil", "-A", "-d", f"sql:{database}", "-n", nick, "-t", trust, "-i", path)
    for path, taken in crls:
        der = database / "crl.der"
        run("openssl", "crl", "-in", path, "-outform", "DER", "-out", der)
        expect(f"nss      {name} takes {path.name}", *run("crlutil", "-I", "-d", f"sql:{database}", "-i", der, "-B"), taken)
    for leaf, usage, good in leaves:
        accepted, detail = run("vfychain", "-d", f"sql:{database}", "-u", usage, "-a", leaf)
        expect(f"nss      {name} {leaf.name} usage {usage}", accepted, detail, good)


def judge_nss_kind(kind):
    known = not kind.name.startswith("ed25519")
    server = known and kind.name.endswith(NSS_SERVER_KEYS)
    leaves = [(kind / "good.pem", "1", server), (kind / "good.pem", "0", known)]
    crls = [(kind / "issuing.crl.pem", False)]
    judge_nss(kind.name, kind / "root.pem", kind / "issuing.pem", crls, leaves)


def judge_ocsp(kind):
    chain = joined(f"chain-{kind.name}.pem", kind / "issuing.pem", kind / "root.pem")
    for leaf in ("good", "revoked"):
        response = kind / f"{leaf}.ocsp.der"
        command = ["openssl", "ocsp", "-respin", response, "-issuer", kind / "issuing.pem", "-cert", kind / f"{leaf}.pem"]
        done, detail = run(*command, "-CAfile", kind / "root.pem", "-verify_other", chain, "-no_nonce")
        said = f"{leaf}.pem: {leaf}" in detail and "Response verify OK" in detail
        reason = leaf == "good" or "Reason: keyCompromise" in detail
        expect(f"openssl  {kind.name} OCSP says {leaf}", done and said and reason, detail)
        command = ["ocsptool", "--response-info", "--load-response", response, "--inder"]
        _, detail = run(*command)
        said = f"Certificate Status: {leaf}" in detail
        expect(f"gnutls   {kind.name} OCSP says {leaf}", said, detail)
        command = ["ocsptool", "--verify-response", "--load-response", response, "--load-signer", kind / "responder.pem"]
        accepted, detail = run(*command)
        expect(f"gnutls   {kind.name} OCSP signature, {leaf}", accepted, detail)
    crossed = ["openssl", "ocsp", "-respin", kind / "good.ocsp.der", "-issuer", kind / "issuing.pem", "-cert", kind / "revoked.pem"]
    _, detail = run(*crossed, "-CAfile", kind / "root.pem", "-verify_other", chain, "-no_nonce")
    expect(f"openssl  {kind.name} OCSP of another certificate", "revoked.pem: good" in detail, detail, False)


def judge_kind(kind):
    """Every judge with command-line programs on one combination of key types."""
    crls = joined(f"crls-{kind.name}.pem", kind / "issuing.crl.pem", kind / "root.crl.pem")
    for leaf in ("good", "revoked"):
        strict = ["openssl", "verify", "-x509_strict", "-crl_check_all", "-extended_crl", "-CAfile", kind / "root.pem"]
        strict += ["-untrusted", kind / "issuing.pem", "-CRLfile", crls, "-purpose", "sslserver"]
        expect(f"openssl  {kind.name} {leaf}", *run(*strict, "-verify_hostname", "shop.mesh.internal", kind / f"{leaf}.pem"), leaf == "good")
        chain = joined(f"{kind.name}-{leaf}.pem", kind / f"{leaf}.pem", kind / "issuing.pem")
        command = ["certtool", "--verify", "--verify-profile", "medium", "--load-ca-certificate", kind / "root.pem"]
        expect(f"gnutls   {kind.name} {leaf}", *run(*command, "--infile", chain, "--load-crl", crls), leaf == "good")
    opened, detail = run("openssl", "pkcs12", "-in", kind / "good.p12", "-passin", "pass:judges", "-nodes")
    expect(f"openssl  {kind.name} PKCS #12", opened and detail.count("BEGIN CERTIFICATE") == 2, detail)
    judge_ocsp(kind)
    judge_nss_kind(kind)


def kind_lints(kinds):
    for kind in kinds:
        for name in ("root", "issuing", "good", "responder"):
            yield f"{kind.name}/{name}.pem", ["lint_pkix_cert", "lint", kind / f"{name}.pem"], True
        yield f"{kind.name} shard", ["lint_crl", "lint", "-t", "CRL", "-p", "PKIX", kind / "issuing.crl.pem"], True
        yield f"{kind.name} root", ["lint_crl", "lint", "-t", "ARL", "-p", "PKIX", kind / "root.crl.pem"], True
        yield f"{kind.name} OCSP", ["lint_ocsp_response", "lint", kind / "good.ocsp.der"], True


def judge_fleet(leaves):
    """What a running controller issued: `fleet.json` names each leaf, what it may do, and whether it is revoked."""
    issuing_crl = folder / "issuing.crl.pem"
    crls = joined("crls.pem", issuing_crl, root_crl)
    for name, fact in leaves.items():
        leaf, host, live = folder / name, fact["host"], not fact["revoked"]
        for use in (SERVER, CLIENT):
            name_to_check = host if use == SERVER else None
            may = live and use in fact["uses"]
            openssl(f"{name} as {use}", leaf, crls, use, name_to_check, may)
            gnutls(f"{name} as {use}", leaf, crls, use, name_to_check, may)
            if use == CLIENT or host:
                pyca(f"{name} as {use}", leaf, issuing_crl, use, host, may)
        if host:
            openssl(f"{name} under another name", leaf, crls, host="evil.mesh.internal", expected=False)
        yield name, ["lint_pkix_cert", "lint", leaf], True
        yield f"issuing.pem signs {name}", ["lint_pkix_signer_signee_cert_chain", "lint", issuing, leaf], True
    for path in (root, issuing):
        yield path.name, ["lint_pkix_cert", "lint", path], True
    yield "root.pem signs issuing.pem", ["lint_pkix_signer_signee_cert_chain", "lint", root, issuing], True
    yield "issuing.crl.pem", ["lint_crl", "lint", "-t", "CRL", "-p", "PKIX", issuing_crl], True
    yield "root.crl.pem", ["lint_crl", "lint", "-t", "ARL", "-p", "PKIX", root_crl], True


folder_of_judges = pathlib.Path(__file__).resolve().parent
if (folder / "fleet.json").is_file():
    jobs = list(judge_fleet(json.loads((folder / "fleet.json").read_text())))
else:
    kinds = sorted((folder / "kinds").iterdir())
    judge_chains()
    judge_profiles()
    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(judge_kind, kinds))
    judge_nss(
        "plain CRLs", root, issuing, [(root_crl, True), (folder / "issuing-revoked.crl.pem", True)],
        [(folder / "leaf-peer.pem", "1", True), (folder / "leaf-peer.pem", "0", True), (folder / "leaf-revoked.pem", "1", False)],
    )
    judge_jdk(kinds)
    judge_go(kinds)
    openssl("short.pem, noRevAvail", folder / "short.pem", joined("crls.pem", folder / "issuing.crl.pem", root_crl))
    # pkilint takes a second to start: two combinations show most key types, and the issuing tests lint the rest.
    linted = [kind for kind in kinds if kind.name in ("ecdsa-p384-rsa-2048", "ed25519-ecdsa-p384")]
    jobs = [*judge_changed(), *lint_jobs(), *kind_lints(linted)]
with concurrent.futures.ThreadPoolExecutor(max_workers=4) as pool:
    for what, accepted, detail, expected in pool.map(pkilint, jobs):
        expect(f"pkilint  {what}", accepted, detail, expected)
wrong = judgements.count(False)
print(f"{len(judgements)} judgements, {wrong} wrong")
sys.exit(wrong > 0)
