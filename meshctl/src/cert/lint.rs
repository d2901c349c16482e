//! What is wrong with any certificate, whoever issued it: rules of RFC 5280 and of today's clients.

use x509_parser::{
    extensions::ParsedExtension,
    oid_registry::OID_PKCS1_RSAENCRYPTION,
    prelude::{FromDer as _, X509Certificate, X509Version},
    public_key::PublicKey,
};

/// Octets of a serial number, the sign's included (RFC 5280 §4.1.2.2).
const SERIAL_BYTES_MAX: usize = 20;
/// Octets of a serial number that can hold 64 random bits (CA/Browser Forum Baseline Requirements §7.1).
const SERIAL_BYTES_MIN: usize = 8;
/// Bits of an RSA key (NIST SP 800-131A).
const RSA_BITS_MIN: usize = 2048;

/// RSA with MD5, RSA with SHA-1 (RFC 8017 §A.2.4), ECDSA with SHA-1 (RFC 3279 §2.2.3).
const BROKEN_SIGNATURES: [&str; 3] = ["1.2.840.113549.1.1.4", "1.2.840.113549.1.1.5", "1.2.840.10045.4.1"];

/// Every rule that the certificate breaks, as a sentence; none of them is a judgement of its chain.
pub(super) fn findings(der: &[u8]) -> Vec<String> {
    let Ok((rest, certificate)) = X509Certificate::from_der(der) else {
        return vec!["it is not a certificate".to_owned()];
    };
    let mut found = Vec::new();
    let mut note = |broken: bool, what: &str| {
        if broken {
            found.push(what.to_owned());
        }
    };
    note(!rest.is_empty(), "bytes follow the certificate");
    note(certificate.version() != X509Version::V3, "it is not version 3 (RFC 5280 §4.1.2.1)");
    let serial = certificate.raw_serial();
    note(
        serial.len() > SERIAL_BYTES_MAX || serial.first().is_none_or(|octet| octet & 0x80 != 0),
        "its serial number is not positive, or longer than 20 octets (RFC 5280 §4.1.2.2)",
    );
    note(serial.len() < SERIAL_BYTES_MIN, "its serial number has fewer than 64 random bits");
    note(
        certificate.signature_algorithm != certificate.tbs_certificate.signature,
        "inner and outer signature algorithm differ (RFC 5280 §4.1.1.2)",
    );
    let algorithm = certificate.signature_algorithm.algorithm.to_id_string();
    note(BROKEN_SIGNATURES.contains(&algorithm.as_str()), "it is signed with a broken hash (MD5 or SHA-1)");
    let validity = certificate.validity();
    note(validity.not_after <= validity.not_before, "its validity is empty");
    let key = certificate.public_key();
    if key.algorithm.algorithm == OID_PKCS1_RSAENCRYPTION {
        let bits = match key.parsed() {
            Ok(PublicKey::RSA(rsa)) => rsa.key_size(),
            _ => 0,
        };
        note(bits < RSA_BITS_MIN, "its RSA key has fewer than 2048 bits");
    }
    note(
        certificate.tbs_certificate.extensions_map().is_err(),
        "an extension is there twice (RFC 5280 §4.2)",
    );
    note(
        certificate.extensions().iter().any(|extension| {
            extension.critical
                && matches!(extension.parsed_extension(), ParsedExtension::UnsupportedExtension { .. })
        }),
        "it has a critical extension that clients do not know",
    );
    note(
        certificate
            .extensions()
            .iter()
            .any(|e| matches!(e.parsed_extension(), ParsedExtension::ParseError { .. })),
        "an extension cannot be read",
    );
    let has = |wanted: fn(&ParsedExtension<'_>) -> bool| {
        certificate.extensions().iter().any(|extension| wanted(extension.parsed_extension()))
    };
    let self_issued = certificate.issuer().as_raw() == certificate.subject().as_raw();
    note(
        !self_issued && !has(|e| matches!(e, ParsedExtension::AuthorityKeyIdentifier(_))),
        "it has no authority key identifier (RFC 5280 §4.2.1.1)",
    );
    let usage = certificate.key_usage().ok().flatten();
    if certificate.is_ca() {
        note(
            !has(|e| matches!(e, ParsedExtension::SubjectKeyIdentifier(_))),
            "a CA without subject key identifier (RFC 5280 §4.2.1.2)",
        );
        note(
            usage.is_none_or(|usage| !usage.value.key_cert_sign()),
            "a CA whose key usage does not allow to sign certificates (RFC 5280 §4.2.1.3)",
        );
        note(certificate.subject().iter().next().is_none(), "a CA without a subject (RFC 5280 §4.1.2.6)");
        return found;
    }
    note(
        usage.is_some_and(|usage| usage.value.key_cert_sign()),
        "it is no CA and its key usage allows to sign certificates (RFC 5280 §4.2.1.9)",
    );
    note(
        !has(|e| matches!(e, ParsedExtension::SubjectAlternativeName(_))),
        "it has no subject alternative name: clients look nowhere else (RFC 9525 §6.1)",
    );
    note(
        !has(|e| matches!(e, ParsedExtension::ExtendedKeyUsage(_))),
        "it does not say what it is for (extended key usage)",
    );
    note(
        certificate.extended_key_usage().ok().flatten().is_some_and(|usage| usage.value.any),
        "it is for every purpose (anyExtendedKeyUsage)",
    );
    found
}

#[cfg(test)]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
        SerialNumber,
    };

    use super::*;

    fn signed(change: impl FnOnce(&mut CertificateParams)) -> Vec<u8> {
        let mut params = CertificateParams::new(vec!["api.mesh.internal".to_owned()]).unwrap();
        params.serial_number = Some(SerialNumber::from_slice(&[0x41; 16]));
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        change(&mut params);
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
    }

    #[test]
    fn a_good_leaf_has_no_findings_and_each_broken_rule_one() {
        assert_eq!(findings(&signed(|_| {})), Vec::<String>::new());
        let says = |der: Vec<u8>, what: &str| {
            let found = findings(&der);
            assert!(found.len() == 1 && found[0].contains(what), "{what}: {found:?}");
        };
        says(signed(|p| p.serial_number = Some(SerialNumber::from_slice(&[1, 2]))), "64 random bits");
        says(signed(|p| p.serial_number = Some(SerialNumber::from_slice(&[1; 30]))), "20 octets");
        says(signed(|p| p.extended_key_usages.clear()), "what it is for");
        says(signed(|p| p.extended_key_usages.push(ExtendedKeyUsagePurpose::Any)), "every purpose");
        says(signed(|p| p.subject_alt_names.clear()), "alternative name");
        says(signed(|p| p.key_usages = vec![KeyUsagePurpose::KeyCertSign]), "no CA");
        says(signed(|p| p.not_after = p.not_before), "empty");
        says(
            signed(|p| {
                p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
                p.key_usages = vec![KeyUsagePurpose::CrlSign];
            }),
            "does not allow to sign",
        );
        says(b"no certificate".to_vec(), "not a certificate");
    }
}
