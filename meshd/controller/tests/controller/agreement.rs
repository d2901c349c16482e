//! `ca` knows no mesh and `core` no X.509, so some words stand in both. Here they must mean the same.

use mesh_ca::{DnsName, Label, RevocationReason};
use mesh_core::{NodeName, Reason};

#[test]
fn reasons_have_the_same_names_and_codes() {
    assert_eq!(RevocationReason::ALL.len(), Reason::ALL.len());
    for reason in Reason::ALL {
        let ours: RevocationReason = reason.as_str().parse().unwrap();
        assert_eq!((ours.name(), ours.code()), (reason.as_str(), reason.code()));
    }
}

/// What `core` lets into the mesh can stand in a certificate. It may refuse more, such as names in Punycode.
#[test]
fn names_that_the_mesh_takes_can_be_certified() {
    let long = "a".repeat(63);
    let too_long = "a".repeat(64);
    let full = [long.as_str(); 4].join(".");
    let table = [
        "web-1",
        "a",
        "0",
        "xn--bcher-kva",
        "web_1",
        "-web",
        "web-",
        "WEB",
        "a..b",
        "",
        ".",
        "a.",
        "*.b",
        "a.*",
        "ü.b",
        "1.2.3.4",
        "a.1",
        "a b",
        "a\0b",
        "a,b",
        "web-1.mesh.internal",
        &long,
        &too_long,
        &full,
        "ab--cd",
        "a.ab--cd",
    ];
    for text in table {
        if let Ok(name) = NodeName::try_from(text) {
            assert!(Label::parse(name.as_str()).is_ok(), "{text:?} is a node's name and no label");
        }
        // `core` folds case; what it made of the text is what is certified.
        if let Ok(name) = mesh_core::DnsName::try_from(text) {
            assert!(DnsName::parse(name.as_str()).is_ok(), "{text:?} is a host name in core alone");
        }
    }
}
