//! What a certificate says once its chain is verified.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use time::UtcDateTime;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::FromDer as _;

use crate::extension::NO_REV_AVAIL;
use crate::identity::{DnsName, Identity, NameError, TrustDomain};
use crate::instant::from_asn1;
use crate::key::{KeyError, PublicKey};
use crate::profile::{ExtraUsage, Profile};
use crate::serial::{SerialError, SerialNumber};
use crate::wireguard::{self, WIREGUARD_KEYS_OID_DER, WireguardKeysError};

/// Why a certificate cannot be read as a leaf of this mesh.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClassifyError {
    #[error("certificate is malformed")]
    Malformed,
    #[error("certificate has extension {0} twice, or one that cannot be read")]
    Extension(String),
    #[error("certificate is a CA's")]
    IsCa,
    #[error("certificate's serial is none of ours")]
    Serial(#[source] SerialError),
    #[error("certificate's key is not taken")]
    Key(#[source] KeyError),
    #[error("certificate has a name that is no DNS name, IP address or URI")]
    NameType,
    #[error("certificate has a DNS name that is malformed")]
    Dns(#[source] NameError),
    #[error("certificate has {0} URI names, at most one is allowed")]
    Uris(usize),
    #[error("certificate's URI is no identity of this mesh")]
    Uri(#[source] NameError),
    #[error("certificate's WireGuard keys cannot be read")]
    WireguardKeys(#[source] WireguardKeysError),
    #[error("certificate names no issuer key")]
    NoIssuerKey,
    #[error("certificate fits no profile")]
    NoProfile,
}

/// A subjectKeyIdentifier, which is also the authorityKeyIdentifier of all that its holder signs. Written in
/// lower-case hex.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyIdentifier(Vec<u8>);

impl KeyIdentifier {
    /// The octets, 20 for every CA made here (RFC 7093 §2 method 1).
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    pub(crate) fn new(bytes: &[u8]) -> Self {
        Self(bytes.to_vec())
    }
}

impl fmt::Display for KeyIdentifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(&self.0))
    }
}

impl fmt::Debug for KeyIdentifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyIdentifier({self})")
    }
}

/// A leaf whose chain has been verified: everything here is vouched for by a pinned root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedLeaf {
    pub profile: Profile,
    /// `None` for the profiles `server` and `client`, which carry none.
    pub identity: Option<Identity>,
    /// Unique together with `issuer_key_id`.
    pub serial: SerialNumber,
    pub issuer_key_id: KeyIdentifier,
    pub dns: Vec<DnsName>,
    pub ips: Vec<IpAddr>,
    /// Newest first; empty unless the profile is `node`.
    pub wireguard_keys: Vec<[u8; 32]>,
    pub not_before: UtcDateTime,
    pub not_after: UtcDateTime,
    /// SHA-256 of the DER SubjectPublicKeyInfo.
    pub key_hash: [u8; 32],
    /// Nobody tells of its revocation, and it says so (RFC 9608); service profiles only.
    pub no_rev_avail: bool,
    /// The earliest notAfter of leaf, intermediates and root: the end of the lease.
    pub chain_not_after: UtcDateTime,
}

/// Profile and identity of a leaf of `domain`. Reads, verifies nothing: use it on what
/// [`verify_chain`](crate::verify_chain) accepted, or on one's own certificate.
pub fn classify(
    certificate_der: &[u8],
    domain: &TrustDomain,
) -> Result<(Profile, Option<Identity>), ClassifyError> {
    let leaf = read_leaf(certificate_der, domain)?;
    Ok((leaf.profile, leaf.identity))
}

pub(crate) fn parse_certificate(der: &[u8]) -> Option<X509Certificate<'_>> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Some(certificate),
        _ => None,
    }
}

pub(crate) fn ip_from_octets(octets: &[u8]) -> Option<IpAddr> {
    match octets.len() {
        4 => <[u8; 4]>::try_from(octets).ok().map(|o| Ipv4Addr::from(o).into()),
        16 => <[u8; 16]>::try_from(octets).ok().map(|o| Ipv6Addr::from(o).into()),
        _ => None,
    }
}

/// The extensions of a certificate that matter here, each at most once.
#[derive(Default)]
pub(crate) struct Extensions {
    pub(crate) is_ca: bool,
    pub(crate) path_len: Option<u32>,
    pub(crate) server_auth: bool,
    pub(crate) client_auth: bool,
    /// Some [`ExtraUsage`].
    pub(crate) extra_purposes: bool,
    pub(crate) ocsp_signing: bool,
    /// Any purpose besides TLS and [`ExtraUsage`].
    pub(crate) other_purposes: bool,
    pub(crate) key_cert_sign: bool,
    pub(crate) crl_sign: bool,
    pub(crate) digital_signature: bool,
    pub(crate) subject_key_id: Option<KeyIdentifier>,
    pub(crate) authority_key_id: Option<KeyIdentifier>,
    pub(crate) dns: Vec<String>,
    pub(crate) ips: Vec<IpAddr>,
    pub(crate) uris: Vec<String>,
    pub(crate) wireguard_keys: Vec<[u8; 32]>,
    pub(crate) no_rev_avail: bool,
}

pub(crate) fn read_extensions(certificate: &X509Certificate<'_>) -> Result<Extensions, ClassifyError> {
    let mut found = Extensions::default();
    let all = certificate.extensions();
    for (index, extension) in all.iter().enumerate() {
        let oid = || extension.oid.to_id_string();
        let is = |oid: &[u8]| extension.oid.as_bytes() == oid;
        if all[..index].iter().any(|other| other.oid == extension.oid) {
            return Err(ClassifyError::Extension(oid()));
        }
        match extension.parsed_extension() {
            ParsedExtension::ParseError { .. } => return Err(ClassifyError::Extension(oid())),
            ParsedExtension::BasicConstraints(constraints) => {
                found.is_ca = constraints.ca;
                found.path_len = constraints.path_len_constraint;
            }
            ParsedExtension::KeyUsage(usage) => {
                found.key_cert_sign = usage.key_cert_sign();
                found.crl_sign = usage.crl_sign();
                found.digital_signature = usage.digital_signature();
            }
            ParsedExtension::ExtendedKeyUsage(usage) => {
                found.server_auth = usage.server_auth;
                found.client_auth = usage.client_auth;
                found.extra_purposes =
                    usage.code_signing || usage.email_protection || usage.other.iter().any(is_extra);
                found.other_purposes = usage.any
                    || usage.time_stamping
                    || usage.ocsp_signing
                    || !usage.other.iter().all(is_extra);
                found.ocsp_signing = usage.ocsp_signing;
            }
            ParsedExtension::SubjectKeyIdentifier(id) => {
                found.subject_key_id = Some(KeyIdentifier::new(id.0))
            }
            ParsedExtension::AuthorityKeyIdentifier(id) => {
                found.authority_key_id = id.key_identifier.as_ref().map(|id| KeyIdentifier::new(id.0));
            }
            ParsedExtension::SubjectAlternativeName(san) => {
                san.general_names.iter().try_for_each(|name| read_name(name, &mut found))?;
            }
            _ if is(NO_REV_AVAIL) => found.no_rev_avail = true,
            _ if is(WIREGUARD_KEYS_OID_DER) => {
                found.wireguard_keys =
                    wireguard::decode(extension.value).map_err(ClassifyError::WireguardKeys)?;
            }
            _ => {}
        }
    }
    Ok(found)
}

fn is_extra(oid: &x509_parser::der_parser::oid::Oid<'_>) -> bool {
    let text = oid.to_id_string();
    ExtraUsage::ALL.into_iter().any(|usage| {
        let arcs: Vec<String> = usage.oid().iter().map(u64::to_string).collect();
        arcs.join(".") == text
    })
}

fn read_name(name: &GeneralName<'_>, found: &mut Extensions) -> Result<(), ClassifyError> {
    match name {
        GeneralName::DNSName(text) => found.dns.push((*text).to_owned()),
        GeneralName::URI(text) => found.uris.push((*text).to_owned()),
        GeneralName::IPAddress(octets) => {
            found.ips.push(ip_from_octets(octets).ok_or(ClassifyError::NameType)?);
        }
        _ => return Err(ClassifyError::NameType),
    }
    Ok(())
}

/// The one profile that writes exactly this.
fn profile_of(extensions: &Extensions, identity: Option<&Identity>) -> Option<Profile> {
    Profile::ALL.into_iter().find(|profile| {
        profile.permits(identity)
            && profile.server_auth() == extensions.server_auth
            && profile.client_auth() == extensions.client_auth
            && !extensions.other_purposes
            && (!extensions.extra_purposes || matches!(profile, Profile::Server | Profile::Client))
            && (*profile == Profile::Node) != extensions.wireguard_keys.is_empty()
            && (!extensions.no_rev_avail
                || matches!(profile, Profile::Server | Profile::Client | Profile::Peer))
            && (profile.permits_host_names() || (extensions.dns.is_empty() && extensions.ips.is_empty()))
    })
}

/// Reads a leaf as if its chain were verified; `chain_not_after` is the leaf's own notAfter.
pub(crate) fn read_leaf(der: &[u8], domain: &TrustDomain) -> Result<VerifiedLeaf, ClassifyError> {
    let certificate = parse_certificate(der).ok_or(ClassifyError::Malformed)?;
    leaf_of(&certificate, &read_extensions(&certificate)?, None, domain)
}

/// As [`read_leaf`], of what was read already; the certificate's own key is read again unless it is `key`.
pub(crate) fn leaf_of(
    certificate: &X509Certificate<'_>,
    extensions: &Extensions,
    key: Option<&PublicKey>,
    domain: &TrustDomain,
) -> Result<VerifiedLeaf, ClassifyError> {
    if extensions.is_ca || extensions.key_cert_sign || extensions.crl_sign {
        return Err(ClassifyError::IsCa);
    }
    let identity = match extensions.uris.as_slice() {
        [] => None,
        [uri] => Some(Identity::parse(domain, uri).map_err(ClassifyError::Uri)?),
        more => return Err(ClassifyError::Uris(more.len())),
    };
    let profile = profile_of(extensions, identity.as_ref()).ok_or(ClassifyError::NoProfile)?;
    let dns: Result<Vec<_>, _> = extensions.dns.iter().map(|name| DnsName::parse(name)).collect();
    let spki = certificate.public_key().raw;
    let key_hash = match key.filter(|key| key.spki_der() == spki) {
        Some(key) => key.key_hash(),
        None => PublicKey::from_spki_der(spki).map_err(ClassifyError::Key)?.key_hash(),
    };
    let not_after = from_asn1(certificate.validity().not_after);
    Ok(VerifiedLeaf {
        profile,
        identity,
        serial: SerialNumber::from_slice(certificate.raw_serial()).map_err(ClassifyError::Serial)?,
        issuer_key_id: extensions.authority_key_id.clone().ok_or(ClassifyError::NoIssuerKey)?,
        dns: dns.map_err(ClassifyError::Dns)?,
        ips: extensions.ips.clone(),
        wireguard_keys: extensions.wireguard_keys.clone(),
        not_before: from_asn1(certificate.validity().not_before),
        not_after,
        key_hash,
        no_rev_avail: extensions.no_rev_avail,
        chain_not_after: not_after,
    })
}
