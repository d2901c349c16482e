//! The rules every certificate and CRL made here must keep, checked on the finished DER.
//!
//! Most of them cannot be broken by the code that writes certificates; that is the point. A change of a library's
//! defaults or of our own code that breaks one is caught before anything leaves the process.

use std::net::IpAddr;

use time::UtcDateTime;
use x509_parser::asn1_rs::Tag;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::{DistributionPointName, GeneralName, ParsedExtension, X509Extension};
use x509_parser::prelude::FromDer as _;
use x509_parser::revocation_list::CertificateRevocationList;
use x509_parser::time::ASN1Time;
use x509_parser::x509::{AlgorithmIdentifier, X509Version};

use crate::extension::{
    ACCESS_CA_ISSUERS, ACCESS_OCSP, AUTHORITY_INFO_ACCESS, AUTHORITY_KEY_ID, BASIC_CONSTRAINTS,
    CRL_DISTRIBUTION_POINTS, EXTENDED_KEY_USAGE, KEY_USAGE, NO_REV_AVAIL, OCSP_NO_CHECK, SUBJECT_ALT_NAME,
    SUBJECT_KEY_ID,
};
use crate::identity::{DnsName, TrustDomain};
use crate::instant::CLOCK_SKEW_ALLOWANCE;
use crate::key::{KeyAlgorithm, PublicKey};
use crate::leaf::{Extensions, KeyIdentifier, leaf_of, parse_certificate, read_extensions};
use crate::ocsp::OCSP_RESPONDER_LIFETIME;
use crate::pointers::HttpUrl;
use crate::profile::LEAF_LIFETIME_MAX;
use crate::serial::SerialNumber;
use crate::template::{NO_REV_AVAIL_LIFETIME_MAX, SANS_PER_CERT_MAX};

/// Largest certificate, in bytes of DER.
pub const CERT_BYTES_MAX: usize = 10_000;

/// Extensions a leaf may have; the last is the list of WireGuard keys.
const LEAF_EXTENSIONS: [&[u8]; 10] = [
    SUBJECT_KEY_ID,
    KEY_USAGE,
    SUBJECT_ALT_NAME,
    BASIC_CONSTRAINTS,
    CRL_DISTRIBUTION_POINTS,
    AUTHORITY_KEY_ID,
    EXTENDED_KEY_USAGE,
    AUTHORITY_INFO_ACCESS,
    NO_REV_AVAIL,
    crate::wireguard::WIREGUARD_KEYS_OID_DER,
];

/// Extensions a CA may have.
const CA_EXTENSIONS: [&[u8]; 6] = [
    SUBJECT_KEY_ID,
    KEY_USAGE,
    BASIC_CONSTRAINTS,
    CRL_DISTRIBUTION_POINTS,
    AUTHORITY_KEY_ID,
    AUTHORITY_INFO_ACCESS,
];

/// A broken rule. Sections are RFC 5280's unless said.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Finding {
    #[error("cannot be read (re-parse)")]
    Unreadable,
    #[error("is larger than {CERT_BYTES_MAX} bytes")]
    TooLarge,
    #[error("is not version 3 (§4.1.2.1)")]
    Version,
    #[error("serial is not 16 octets with 126 random bits (§4.1.2.2)")]
    Serial,
    #[error("inner and outer signature algorithm differ, or are not the one of the issuer's key (§4.1.1.2)")]
    SignatureAlgorithm,
    #[error("issuer is empty or differs from the issuer's subject (§4.1.2.4)")]
    IssuerName,
    #[error("time is not UTCTime to 2049 and GeneralizedTime after (§4.1.2.5)")]
    TimeForm,
    #[error("validity is empty or longer than allowed (§4.1.2.5)")]
    Validity,
    #[error("validity reaches beyond the issuer's")]
    BeyondIssuer,
    #[error("key is weak or not canonical (§4.1.2.7)")]
    Key,
    #[error("an extension is there twice (§4.2), or cannot be read")]
    Extensions,
    #[error("extension {0} does not belong here")]
    ForeignExtension(String),
    #[error("extension {0} has the wrong criticality")]
    Criticality(String),
    #[error("authority key identifier is not the issuer's subject key identifier alone (§4.2.1.1)")]
    AuthorityKeyId,
    #[error("subject key identifier is missing (§4.2.1.2)")]
    SubjectKeyId,
    #[error("basic constraints are not those of its kind (§4.2.1.9)")]
    BasicConstraints,
    #[error("key usage is not that of its kind (§4.2.1.3)")]
    KeyUsage,
    #[error("extended key usage is empty or foreign (§4.2.1.12)")]
    ExtendedKeyUsage,
    #[error("has no subject alternative name, too many, or one of a foreign type (§4.2.1.6)")]
    Names,
    #[error("a DNS name is not lower-case A-labels")]
    DnsName,
    #[error("common name repeats no subject alternative name or is longer than 64 characters")]
    CommonName,
    #[error("subject is empty and the subject alternative name not critical, or the reverse (§4.1.2.6)")]
    EmptySubject,
    #[error("fits no profile")]
    Profile,
    #[error("CRL address is not one plain http URL (§4.2.1.13)")]
    CrlAddress,
    #[error("authority information access is not plain http, each method once (§4.2.2.1)")]
    Pointers,
    #[error("noRevAvail beside a CRL or OCSP address, on a long-lived certificate, or malformed (RFC 9608)")]
    NoRevAvail,
    #[error("CRL's issuing distribution point is malformed or limits its scope more than once (§5.2.5)")]
    DistributionPoint,
    #[error("OCSP response is about more or less than one certificate")]
    OcspSingle,
    #[error("OCSP response's times are missing, out of order, or past its signer's (RFC 6960 §4.2.2.1)")]
    OcspTimes,
    #[error("OCSP response is not by a delegate that the issuer itself certified (RFC 6960 §4.2.2.2)")]
    OcspDelegate,
    #[error("OCSP response's signature or CertID does not hold")]
    OcspSignature,
    #[error("OCSP response knows a serial that this authority does not issue (RFC 6960 §2.2)")]
    OcspForeignSerial,
    #[error("OCSP responder's certificate has no ocsp-nocheck (RFC 6960 §4.2.2.2.1)")]
    NoCheck,
    #[error("CRL is not version 2 with nextUpdate and number (§5.1.2)")]
    CrlFields,
    #[error("CRL has an empty list of revoked certificates (§5.1.2.6)")]
    EmptyList,
    #[error("CRL writes reason 0 or 7 or lists a foreign serial (§5.3.1)")]
    CrlEntry,
}

/// What the rules ask of an issuer. Read once, as it is asked for every certificate.
#[derive(Debug, Clone)]
pub(crate) struct IssuerFacts {
    der: Vec<u8>,
    /// DER of its name; `None` if it is empty.
    subject: Option<Vec<u8>>,
    serial: Vec<u8>,
    validity: (ASN1Time, ASN1Time),
    spki: Vec<u8>,
    /// `None` for a key that is not taken.
    key: Option<KeyAlgorithm>,
    subject_key_id: Option<KeyIdentifier>,
}

impl IssuerFacts {
    /// Reads a CA's certificate; `None` if it cannot be read.
    pub(crate) fn read(der: &[u8]) -> Option<Self> {
        let certificate = parse_certificate(der)?;
        let subject = certificate.subject();
        Some(Self {
            der: der.to_vec(),
            subject: subject.iter().next().map(|_| subject.as_raw().to_vec()),
            serial: certificate.raw_serial().to_vec(),
            validity: (certificate.validity().not_before, certificate.validity().not_after),
            spki: certificate.public_key().raw.to_vec(),
            key: PublicKey::from_spki_der(certificate.public_key().raw).ok().map(|key| key.algorithm()),
            subject_key_id: read_extensions(&certificate).ok()?.subject_key_id,
        })
    }
}

/// Checks a leaf against all rules for what `issuer_der` signs in `domain`; empty if it keeps them.
pub fn lint_leaf(der: &[u8], issuer_der: &[u8], domain: &TrustDomain) -> Vec<Finding> {
    match (parse_certificate(der), IssuerFacts::read(issuer_der)) {
        (Some(certificate), Some(issuer)) => {
            let key = PublicKey::from_spki_der(certificate.public_key().raw).ok();
            lint_parsed_leaf((der, &certificate), key.as_ref(), &issuer, domain)
        }
        _ => vec![Finding::Unreadable],
    }
}

/// As [`lint_leaf`], with what the caller has read already: `key` is the certificate's, if it may be certified.
pub(crate) fn lint_parsed_leaf(
    (der, certificate): (&[u8], &X509Certificate<'_>),
    key: Option<&PublicKey>,
    issuer: &IssuerFacts,
    domain: &TrustDomain,
) -> Vec<Finding> {
    let (extensions, mut findings) = lint_common((der, certificate), key, issuer, &LEAF_EXTENSIONS);
    let fits = |extensions: &Extensions| leaf_of(certificate, extensions, key, domain).is_ok();
    let fits = extensions.as_ref().is_some_and(fits);
    let extensions = extensions.unwrap_or_default();
    let mut require = |kept: bool, finding| {
        if !kept {
            findings.push(finding)
        }
    };
    require(certificate.raw_serial() != issuer.serial, Finding::Serial);
    let span = certificate.validity().not_after.timestamp() - certificate.validity().not_before.timestamp();
    let longest = (LEAF_LIFETIME_MAX + CLOCK_SKEW_ALLOWANCE).as_secs();
    require(u64::try_from(span).is_ok_and(|span| span <= longest), Finding::Validity);
    // DER leaves out the default cA FALSE, so the sequence is empty.
    require(
        raw(certificate, BASIC_CONSTRAINTS).is_some_and(|e| e.value == [0x30, 0]),
        Finding::BasicConstraints,
    );
    // BIT STRING with digitalSignature alone, trailing zero bits trimmed.
    require(raw(certificate, KEY_USAGE).is_some_and(|e| e.value == [3, 2, 7, 0x80]), Finding::KeyUsage);
    let purposes = (extensions.server_auth || extensions.client_auth) && !extensions.other_purposes;
    require(purposes, Finding::ExtendedKeyUsage);
    let names = extensions.dns.len() + extensions.ips.len() + extensions.uris.len();
    require((1..=SANS_PER_CERT_MAX).contains(&names), Finding::Names);
    require(extensions.dns.iter().all(|name| DnsName::parse(name).is_ok()), Finding::DnsName);
    let empty_subject = certificate.subject().iter().next().is_none();
    let san_critical = raw(certificate, SUBJECT_ALT_NAME).is_some_and(|e| e.critical);
    require(empty_subject == san_critical, Finding::EmptySubject);
    require(common_name_repeats_a_name(certificate, &extensions), Finding::CommonName);
    require(fits, Finding::Profile);
    require(crl_address_is_plain(certificate), Finding::CrlAddress);
    require(pointers_are_plain(certificate), Finding::Pointers);
    if let Some(extension) = raw(certificate, NO_REV_AVAIL) {
        let span = u64::try_from(span).unwrap_or(u64::MAX);
        let short = span <= (NO_REV_AVAIL_LIFETIME_MAX + CLOCK_SKEW_ALLOWANCE).as_secs();
        let silent = raw(certificate, CRL_DISTRIBUTION_POINTS).is_none() && ocsp_pointers(certificate) == 0;
        require(extension.value == [5, 0] && short && silent, Finding::NoRevAvail);
    }
    findings
}

/// What a CA certificate is for; each has its own path length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CaKind {
    Root,
    Issuing,
    /// A root signed by another root.
    CrossRoot,
}

/// Checks a root or an issuing CA's certificate; for a root `issuer_der` is the certificate itself.
pub fn lint_ca(der: &[u8], issuer_der: &[u8]) -> Vec<Finding> {
    lint_ca_as(if der == issuer_der { CaKind::Root } else { CaKind::Issuing }, der, issuer_der)
}

pub(crate) fn lint_ca_as(kind: CaKind, der: &[u8], issuer_der: &[u8]) -> Vec<Finding> {
    let Some((certificate, extensions, mut findings)) = lint_read(der, issuer_der, &CA_EXTENSIONS) else {
        return vec![Finding::Unreadable];
    };
    let mut require = |kept: bool, finding| {
        if !kept {
            findings.push(finding)
        }
    };
    require(certificate.subject().iter().next().is_some(), Finding::EmptySubject);
    let path_len = match kind {
        CaKind::Root => None,
        CaKind::Issuing => Some(0),
        CaKind::CrossRoot => Some(1),
    };
    require(crl_address_is_plain(&certificate), Finding::CrlAddress);
    require(pointers_are_plain(&certificate), Finding::Pointers);
    require(extensions.is_ca && extensions.path_len == path_len, Finding::BasicConstraints);
    // keyCertSign and cRLSign alone.
    require(raw(&certificate, KEY_USAGE).is_some_and(|e| e.value == [3, 2, 1, 0x06]), Finding::KeyUsage);
    findings
}

/// Extensions a responder's certificate has.
const RESPONDER_EXTENSIONS: [&[u8]; 6] =
    [SUBJECT_KEY_ID, KEY_USAGE, BASIC_CONSTRAINTS, AUTHORITY_KEY_ID, EXTENDED_KEY_USAGE, OCSP_NO_CHECK];

/// Checks the certificate of an OCSP responder that `issuer_der` signed.
pub fn lint_ocsp_responder(der: &[u8], issuer_der: &[u8]) -> Vec<Finding> {
    let Some((certificate, extensions, mut findings)) = lint_read(der, issuer_der, &RESPONDER_EXTENSIONS)
    else {
        return vec![Finding::Unreadable];
    };
    let mut require = |kept: bool, finding| {
        if !kept {
            findings.push(finding)
        }
    };
    let span = certificate.validity().not_after.timestamp() - certificate.validity().not_before.timestamp();
    let longest = (OCSP_RESPONDER_LIFETIME + CLOCK_SKEW_ALLOWANCE).as_secs();
    require(u64::try_from(span).is_ok_and(|span| span <= longest), Finding::Validity);
    require(
        raw(&certificate, BASIC_CONSTRAINTS).is_some_and(|e| e.value == [0x30, 0]),
        Finding::BasicConstraints,
    );
    require(raw(&certificate, KEY_USAGE).is_some_and(|e| e.value == [3, 2, 7, 0x80]), Finding::KeyUsage);
    // SEQUENCE { id-kp-OCSPSigning } and nothing else.
    let signing = [0x30, 10, 6, 8, 0x2b, 6, 1, 5, 5, 7, 3, 9];
    let only_signing = raw(&certificate, EXTENDED_KEY_USAGE).is_some_and(|e| e.value == signing);
    require(extensions.ocsp_signing && only_signing, Finding::ExtendedKeyUsage);
    require(raw(&certificate, OCSP_NO_CHECK).is_some_and(|e| e.value == [5, 0]), Finding::NoCheck);
    require(certificate.subject().iter().next().is_some(), Finding::EmptySubject);
    findings
}

/// Reads both certificates and checks the rules that leaves and CAs share; `None` if one cannot be read at all.
fn lint_read<'a>(
    der: &'a [u8],
    issuer_der: &[u8],
    allowed: &[&[u8]],
) -> Option<(X509Certificate<'a>, Extensions, Vec<Finding>)> {
    let (certificate, issuer) = (parse_certificate(der)?, IssuerFacts::read(issuer_der)?);
    let key = PublicKey::from_spki_der(certificate.public_key().raw).ok();
    let (extensions, findings) = lint_common((der, &certificate), key.as_ref(), &issuer, allowed);
    Some((certificate, extensions.unwrap_or_default(), findings))
}

/// The rules that leaves and CAs share, and the extensions, unless they break one.
fn lint_common(
    (der, certificate): (&[u8], &X509Certificate<'_>),
    key: Option<&PublicKey>,
    issuer: &IssuerFacts,
    allowed: &[&[u8]],
) -> (Option<Extensions>, Vec<Finding>) {
    let root = der == issuer.der;
    let mut findings = Vec::new();
    let extensions = read_extensions(certificate).ok();
    let mut require = |kept: bool, finding| {
        if !kept {
            findings.push(finding)
        }
    };
    require(extensions.is_some(), Finding::Extensions);
    require(der.len() <= CERT_BYTES_MAX, Finding::TooLarge);
    require(certificate.version() == X509Version::V3, Finding::Version);
    require(SerialNumber::from_slice(certificate.raw_serial()).is_ok(), Finding::Serial);
    let algorithm = &certificate.signature_algorithm;
    let same = *algorithm == certificate.tbs_certificate.signature;
    require(same && signed_as_its_key_signs(algorithm, issuer.key), Finding::SignatureAlgorithm);
    require(issuer.subject.as_deref() == Some(certificate.issuer().as_raw()), Finding::IssuerName);
    let (validity, bounds) = (certificate.validity(), issuer.validity);
    require([validity.not_before, validity.not_after].iter().all(time_form), Finding::TimeForm);
    require(validity.not_before < validity.not_after, Finding::Validity);
    let within = validity.not_before >= bounds.0 && validity.not_after <= bounds.1;
    require(within, Finding::BeyondIssuer);
    require(key.is_some_and(|key| key.spki_der() == certificate.public_key().raw), Finding::Key);
    require(root || certificate.public_key().raw != issuer.spki, Finding::Key);
    let subject_key_id = extensions.as_ref().and_then(|extensions| extensions.subject_key_id.as_ref());
    require(subject_key_id.is_some(), Finding::SubjectKeyId);
    require(root || authority_is(certificate, issuer.subject_key_id.as_ref()), Finding::AuthorityKeyId);
    for extension in certificate.extensions() {
        let oid = extension.oid.as_bytes();
        // Whether subjectAltName is critical hangs on the subject.
        let critical = oid == KEY_USAGE || oid == BASIC_CONSTRAINTS;
        if extension.critical != critical && oid != SUBJECT_ALT_NAME {
            findings.push(Finding::Criticality(extension.oid.to_id_string()));
        }
        if !allowed.contains(&oid) {
            findings.push(Finding::ForeignExtension(extension.oid.to_id_string()));
        }
    }
    (extensions, findings)
}

/// Whether the algorithm is the one that the issuer's key signs with, parameters included (RFC 5758 §3.2, RFC 8410 §3,
/// RFC 4055 §5).
fn signed_as_its_key_signs(algorithm: &AlgorithmIdentifier<'_>, key: Option<KeyAlgorithm>) -> bool {
    let Some(key) = key else { return false };
    let (oid, null) = key.signature_oid();
    let parameters = match &algorithm.parameters {
        None => !null,
        Some(parameters) => null && parameters.tag() == Tag::Null && parameters.data.is_empty(),
    };
    let arcs = algorithm.algorithm.iter();
    arcs.is_some_and(|arcs| arcs.map(Some).eq(oid.split('.').map(|arc| arc.parse().ok()))) && parameters
}

fn raw<'a, 'c>(certificate: &'c X509Certificate<'a>, oid: &[u8]) -> Option<&'c X509Extension<'a>> {
    certificate.extensions().iter().find(|extension| extension.oid.as_bytes() == oid)
}

fn time_form(time: &ASN1Time) -> bool {
    time.is_utctime() == (time.to_datetime().year() < 2050)
}

/// The key identifier form only, never issuer and serial.
fn authority_is(certificate: &X509Certificate<'_>, issuer: Option<&KeyIdentifier>) -> bool {
    certificate.extensions().iter().any(|extension| match extension.parsed_extension() {
        ParsedExtension::AuthorityKeyIdentifier(id) => {
            id.authority_cert_issuer.is_none()
                && id.authority_cert_serial.is_none()
                && id.key_identifier.as_ref().map(|id| KeyIdentifier::new(id.0)).as_ref() == issuer
        }
        _ => false,
    })
}

fn common_name_repeats_a_name(certificate: &X509Certificate<'_>, extensions: &Extensions) -> bool {
    let repeats = |name: &str| {
        name.len() <= 64
            && (extensions.dns.iter().chain(&extensions.uris).any(|san| san == name)
                || name.parse::<IpAddr>().is_ok_and(|ip| extensions.ips.contains(&ip)))
    };
    certificate.subject().iter_common_name().all(|name| name.as_str().is_ok_and(repeats))
}

/// authorityInfoAccess: at most one OCSP responder and one issuer, both plain `http`.
fn pointers_are_plain(certificate: &X509Certificate<'_>) -> bool {
    certificate.extensions().iter().all(|extension| match extension.parsed_extension() {
        ParsedExtension::AuthorityInfoAccess(access) => {
            let methods: Vec<_> = access.accessdescs.iter().map(|d| d.access_method.as_bytes()).collect();
            let known = methods.iter().all(|method| [ACCESS_OCSP, ACCESS_CA_ISSUERS].contains(method));
            let once = methods.iter().enumerate().all(|(index, m)| !methods[..index].contains(m));
            let plain = access
                .accessdescs
                .iter()
                .all(|d| matches!(d.access_location, GeneralName::URI(url) if HttpUrl::parse(url).is_ok()));
            !methods.is_empty() && known && once && plain
        }
        _ => extension.oid.as_bytes() != AUTHORITY_INFO_ACCESS,
    })
}

fn ocsp_pointers(certificate: &X509Certificate<'_>) -> usize {
    let count = |extension: &X509Extension<'_>| match extension.parsed_extension() {
        ParsedExtension::AuthorityInfoAccess(access) => {
            access.accessdescs.iter().filter(|d| d.access_method.as_bytes() == ACCESS_OCSP).count()
        }
        _ => 0,
    };
    certificate.extensions().iter().map(count).sum()
}

fn crl_address_is_plain(certificate: &X509Certificate<'_>) -> bool {
    let plain = |name: &GeneralName<'_>| matches!(name, GeneralName::URI(url) if HttpUrl::parse(url).is_ok());
    certificate.extensions().iter().all(|extension| match extension.parsed_extension() {
        ParsedExtension::CRLDistributionPoints(points) => match points.as_slice() {
            [point] => {
                let full_name = matches!(
                    &point.distribution_point,
                    Some(DistributionPointName::FullName(names)) if names.len() == 1 && names.iter().all(plain)
                );
                full_name && point.reasons.is_none() && point.crl_issuer.is_none()
            }
            _ => false,
        },
        _ => true,
    })
}

/// Checks a CRL that `issuer_der` signed; empty if it keeps all rules.
pub fn lint_crl(der: &[u8], issuer_der: &[u8]) -> Vec<Finding> {
    match (CertificateRevocationList::from_der(der), parse_certificate(issuer_der)) {
        (Ok(([], crl)), Some(issuer)) => lint_parsed_crl(&crl, &issuer),
        _ => vec![Finding::Unreadable],
    }
}

/// As [`lint_crl`], of what has been parsed already.
pub(crate) fn lint_parsed_crl(
    crl: &CertificateRevocationList<'_>,
    issuer: &X509Certificate<'_>,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut require = |kept: bool, finding| {
        if !kept {
            findings.push(finding)
        }
    };
    let fields = crl.version() == Some(X509Version::V2) && crl.crl_number().is_some();
    require(fields && crl.next_update().is_some(), Finding::CrlFields);
    let algorithm = &crl.signature_algorithm;
    let same = *algorithm == crl.tbs_cert_list.signature;
    let key = PublicKey::from_spki_der(issuer.public_key().raw).ok().map(|key| key.algorithm());
    require(same && signed_as_its_key_signs(algorithm, key), Finding::SignatureAlgorithm);
    require(crl.issuer().as_raw() == issuer.subject().as_raw(), Finding::IssuerName);
    let times = [Some(crl.last_update()), crl.next_update()];
    require(times.iter().flatten().all(time_form), Finding::TimeForm);
    require(crl.next_update().is_some_and(|next| next > crl.last_update()), Finding::Validity);
    // An empty SEQUENCE OF would stand between nextUpdate and the extensions; the parser does not tell it from absence.
    require(!has_empty_list(crl.as_raw()), Finding::EmptyList);
    let issuer_key_id = read_extensions(issuer).ok().and_then(|extensions| extensions.subject_key_id);
    let authority = crl.extensions().iter().any(|extension| match extension.parsed_extension() {
        ParsedExtension::AuthorityKeyIdentifier(id) => {
            id.key_identifier.as_ref().map(|id| KeyIdentifier::new(id.0)) == issuer_key_id
        }
        _ => false,
    });
    require(authority, Finding::AuthorityKeyId);
    for extension in crl.extensions() {
        let oid = extension.oid.to_id_string();
        // Only issuingDistributionPoint is critical (§5.2.5).
        require(extension.critical == (oid == "2.5.29.28"), Finding::Criticality(oid));
    }
    require(idp_is_plain(crl.extensions()), Finding::DistributionPoint);
    let now_or_before =
        |at: UtcDateTime| crl.next_update().is_some_and(|next| at <= crate::instant::from_asn1(next));
    for entry in crl.iter_revoked_certificates() {
        let reason =
            entry.reason_code().is_none_or(|(critical, code)| !critical && !matches!(code.0, 0 | 7 | 8));
        let serial = SerialNumber::from_slice(entry.raw_serial()).is_ok();
        let dated = now_or_before(crate::instant::from_asn1(entry.revocation_date));
        require(reason && serial && dated, Finding::CrlEntry);
    }
    findings
}

/// issuingDistributionPoint: one plain address, at most one flag of scope, FALSE never written (DER), none of the forms
/// that rustls refuses (indirect, by reason).
fn idp_is_plain(extensions: &[X509Extension<'_>]) -> bool {
    extensions.iter().all(|extension| match extension.parsed_extension() {
        ParsedExtension::IssuingDistributionPoint(point) => {
            let flags = [point.only_contains_user_certs, point.only_contains_ca_certs];
            let refused = point.only_contains_attribute_certs
                || point.indirect_crl
                || point.only_some_reasons.is_some();
            let address = match &point.distribution_point {
                Some(DistributionPointName::FullName(names)) => {
                    matches!(names.as_slice(), [GeneralName::URI(url)] if HttpUrl::parse(url).is_ok())
                }
                _ => false,
            };
            // A FALSE that is written reads `8x 01 00`; the address is ASCII and cannot hold it.
            let no_false = !extension.value.windows(3).any(|w| w[0] & 0xf0 == 0x80 && w[1..] == [1, 0]);
            address && !refused && no_false && flags.iter().filter(|flag| **flag).count() <= 1
        }
        _ => extension.oid.to_id_string() != "2.5.29.28",
    })
}

/// Whether tbsCertList holds an empty `revokedCertificates`: the fields before it are version, signature, issuer and the
/// two times, each one element long.
fn has_empty_list(der: &[u8]) -> bool {
    use der::{Decode as _, Reader as _};
    let walk = || -> der::Result<bool> {
        der::SliceReader::new(der)?.sequence(|outer| {
            let found = outer.sequence(|tbs| {
                for _ in 0..5 {
                    der::AnyRef::decode(tbs)?;
                }
                let next = if tbs.is_finished() { None } else { Some(der::AnyRef::decode(tbs)?) };
                while !tbs.is_finished() {
                    der::AnyRef::decode(tbs)?;
                }
                Ok(next.is_some_and(|next| {
                    use der::Tagged as _;
                    next.tag() == der::Tag::Sequence && next.value().is_empty()
                }))
            })?;
            while !outer.is_finished() {
                der::AnyRef::decode(outer)?;
            }
            Ok(found)
        })
    };
    walk().unwrap_or(true)
}
