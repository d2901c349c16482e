//! Certificates and managed pairs in tables and JSON.

use mesh_proto::v1 as pb;
use serde_json::{Value, json};

use crate::{
    output::{Listing, Table, Tone, paint},
    text::{ago, fingerprint, left, now as clock, rfc3339, safe},
};

pub(super) fn certificates(certificates: &[pb::Certificate], now: i64, wide: bool) -> Listing {
    let header: &[&'static str] = if wide {
        &["NAME", "PROFILE", "OWNER", "SERIAL", "SPIFFE", "EXPIRES", "STATE"]
    } else {
        &["NAME", "PROFILE", "OWNER", "SERIAL", "EXPIRES", "STATE"]
    };
    let mut table = Table::new(header);
    for certificate in certificates {
        let (state, tone) = state(certificate, now);
        let (name, profile, owner) =
            (certificate.name.clone(), certificate.profile.clone(), certificate.owner.clone());
        let (serial, expires) = (hex::encode(&certificate.serial), left(certificate.not_after, now));
        if wide {
            table.toned_row(
                [name, profile, owner, serial, certificate.spiffe.clone(), expires, state],
                Some(tone),
            );
        } else {
            table.toned_row([name, profile, owner, serial, expires, state], Some(tone));
        }
    }
    Listing {
        kind: "CertificateList",
        items: certificates.iter().map(document).collect(),
        names: certificates.iter().map(|certificate| hex::encode(&certificate.serial)).collect(),
        table,
        empty: "no certificates match",
    }
}

fn state(certificate: &pb::Certificate, now: i64) -> (String, Tone) {
    if certificate.revoked_at != 0 {
        let reason =
            if certificate.reason.is_empty() { String::new() } else { format!(", {}", certificate.reason) };
        return (format!("revoked {}{reason}", ago(certificate.revoked_at, now)), Tone::Bad);
    }
    match (certificate.not_after <= now, certificate.refused_code.as_str()) {
        (true, _) => ("ended".to_owned(), Tone::Dim),
        (false, "") => ("ok".to_owned(), Tone::Good),
        (false, code) => (format!("ok, not renewed: {code}"), Tone::Warn),
    }
}

/// A certificate as JSON.
pub(crate) fn document(certificate: &pb::Certificate) -> Value {
    let state = match certificate.revoked_at {
        0 if certificate.not_after <= clock() => "ended",
        0 => "ok",
        _ => "revoked",
    };
    json!({
        "serial": hex::encode(&certificate.serial), "name": certificate.name, "names": certificate.names,
        "profile": certificate.profile, "spiffe": certificate.spiffe, "owner": certificate.owner, "state": state,
        "notBefore": rfc3339(certificate.not_before), "notAfter": rfc3339(certificate.not_after),
        "revokedAt": rfc3339(certificate.revoked_at), "reason": certificate.reason,
        "keySha256": hex::encode(&certificate.key_hash), "issuerKeyId": hex::encode(&certificate.issuer_key_id),
        "refusedCode": certificate.refused_code, "refusedWhy": certificate.refused_why,
    })
}

pub(super) fn describe(certificate: &pb::Certificate, now: i64) -> Vec<String> {
    let (state, tone) = state(certificate, now);
    let facts = [
        ("serial", hex::encode(&certificate.serial)),
        ("profile", certificate.profile.clone()),
        ("owner", certificate.owner.clone()),
        ("names", certificate.names.join(" ")),
        ("spiffe", certificate.spiffe.clone()),
        ("from", rfc3339(certificate.not_before).unwrap_or_default()),
        (
            "until",
            format!(
                "{} ({})",
                rfc3339(certificate.not_after).unwrap_or_default(),
                left(certificate.not_after, now)
            ),
        ),
        ("key", fingerprint(&certificate.key_hash)),
        (
            "policy",
            match certificate.refused_code.as_str() {
                "" => String::new(),
                code => format!("not renewed: {code}: {}", certificate.refused_why),
            },
        ),
    ];
    lines(&certificate.name, &paint(tone, &safe(&state)), &facts)
}

/// A heading and the facts that are not empty, aligned.
pub(super) fn lines(name: &str, state: &str, facts: &[(&str, String)]) -> Vec<String> {
    let mut lines = vec![format!("{}  {state}", safe(name)).trim_end().to_owned()];
    let present = facts.iter().filter(|(_, value)| !value.trim().is_empty());
    lines.extend(present.map(|(name, value)| format!("  {name:<9} {}", safe(value))));
    lines
}

pub(super) fn pairs(pairs: &[pb::ManagedPair], now: i64) -> Listing {
    let mut table = Table::new(&["NAME", "PROFILE", "FOLDER", "EXPIRES", "RENEWS", "STATE"]);
    for pair in pairs {
        let tone = match pair.state.as_str() {
            "ok" => Tone::Good,
            "stopped" => Tone::Warn,
            _ => Tone::Bad,
        };
        let problem = if pair.problem.is_empty() { String::new() } else { format!(": {}", pair.problem) };
        table.toned_row(
            [
                pair.name.clone(),
                pair.profile.clone(),
                pair.out.clone(),
                left(pair.not_after, now),
                left(pair.renews_at, now),
                format!("{}{problem}", pair.state),
            ],
            Some(tone),
        );
    }
    Listing {
        kind: "ManagedPairList",
        items: pairs.iter().map(pair_document).collect(),
        names: pairs.iter().map(|pair| pair.name.clone()).collect(),
        table,
        empty: "no pairs here; `meshctl cert issue NAME` makes one",
    }
}

/// A pair that a node keeps, as JSON.
pub(crate) fn pair_document(pair: &pb::ManagedPair) -> Value {
    json!({
        "name": pair.name, "names": pair.names, "out": pair.out, "profile": pair.profile, "serial": hex::encode(&pair.serial),
        "notAfter": rfc3339(pair.not_after), "renewsAt": rfc3339(pair.renews_at), "state": pair.state,
        "problem": pair.problem, "rotateKey": pair.rotate_key, "reload": pair.reload,
        "combined": pair.combined, "p12": pair.p12,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_800_000_000;

    #[test]
    fn certificates_and_pairs_read_like_the_contract() {
        let ok = pb::Certificate {
            serial: vec![0x1f; 16].into(),
            profile: "server".into(),
            name: "api.mesh.internal".into(),
            owner: "bravo".into(),
            not_after: NOW + 72 * 3600,
            ..pb::Certificate::default()
        };
        let revoked = pb::Certificate { revoked_at: NOW - 60, reason: "superseded".into(), ..ok.clone() };
        let text =
            |listing: &Listing| anstream::adapter::strip_str(&listing.table.lines().join("\n")).to_string();
        insta::assert_snapshot!(text(&certificates(&[ok, revoked], NOW, false)), @r"
        NAME               PROFILE  OWNER  SERIAL                            EXPIRES  STATE
        api.mesh.internal  server   bravo  1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f  72h      ok
        api.mesh.internal  server   bravo  1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f  72h      revoked 60s ago, superseded
        ");
        let pair = pb::ManagedPair {
            name: "api.mesh.internal".into(),
            out: "/etc/nginx/mesh".into(),
            profile: "server".into(),
            not_after: NOW + 72 * 3600,
            renews_at: NOW + 24 * 3600,
            state: "failing".into(),
            problem: "hook exited 1".into(),
            ..pb::ManagedPair::default()
        };
        insta::assert_snapshot!(text(&pairs(&[pair], NOW)), @r"
        NAME               PROFILE  FOLDER           EXPIRES  RENEWS  STATE
        api.mesh.internal  server   /etc/nginx/mesh  72h      24h     failing: hook exited 1
        ");
    }

    /// Golden: fields are only ever added.
    #[test]
    fn the_json_of_a_certificate_is_stable() {
        let certificate = pb::Certificate {
            serial: vec![0x1f; 16].into(),
            names: vec!["api.mesh.internal".into()],
            revoked_at: NOW,
            ..pb::Certificate::default()
        };
        assert_eq!(
            document(&certificate).to_string(),
            r#"{"serial":"1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f1f","name":"","names":["api.mesh.internal"],"profile":"","spiffe":"","owner":"","state":"revoked","notBefore":null,"notAfter":null,"revokedAt":"2027-01-15T08:00:00Z","reason":"","keySha256":"","issuerKeyId":"","refusedCode":"","refusedWhy":""}"#
        );
    }
}
