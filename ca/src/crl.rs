//! Certificate revocation lists: made, and read back.
//!
//! Without an address one CRL covers all certificates of its issuer. With addresses an issuer has one CRL per shard: the
//! address in a shard's certificates and in its CRL's issuingDistributionPoint are the same bytes (RFC 5280 §5.2.5), the
//! extension is critical, and the CRL may be limited to user or CA certificates, never to both. Delta, indirect and
//! reason-partitioned CRLs are neither made nor taken; rustls refuses all three.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use time::UtcDateTime;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::{
    DistributionPointName, GeneralName, IssuingDistributionPoint, ParsedExtension,
};
use x509_parser::prelude::FromDer as _;
use x509_parser::revocation_list::CertificateRevocationList;

use crate::instant::{CLOCK_SKEW_ALLOWANCE, from_asn1, to_offset, whole_seconds};
use crate::issue::{Issuer, signing_error};
use crate::keystore::{KeyStore, KeyStoreError};
use crate::leaf::{KeyIdentifier, parse_certificate, read_extensions};
use crate::lint::{Finding, lint_parsed_crl};
use crate::pointers::HttpUrl;
use crate::reason::RevocationReason;
use crate::serial::SerialNumber;

/// Largest CRL, in bytes of DER: about 100 000 entries.
pub const CRL_BYTES_MAX: usize = 4 * 1024 * 1024;

/// nextUpdate of an issuing CA's CRL after its making: 7 days. It is made anew far earlier.
pub const CRL_LIFETIME: Duration = Duration::from_secs(7 * 24 * 3600);

/// nextUpdate of the root's CRL after its making: 365 days, as the root's key may be offline.
pub const ROOT_CRL_LIFETIME: Duration = Duration::from_secs(365 * 24 * 3600);

/// Why a CRL is not made or not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CrlError {
    #[error("nextUpdate is not later than thisUpdate")]
    Updates,
    #[error("CRL is limited to some certificates but names no address")]
    ScopeWithoutAddress,
    #[error("serial {0} is listed twice")]
    Repeated(SerialNumber),
    #[error("key store failed")]
    KeyStore(#[source] KeyStoreError),
    #[error("CRL cannot be encoded: {0}")]
    Encode(String),
    #[error("CRL breaks a rule: {0}")]
    Lint(Finding),
    #[error("CRL is {0} bytes long, at most {CRL_BYTES_MAX} are allowed")]
    TooLarge(usize),
    #[error("CRL is malformed")]
    Malformed,
    #[error("CRL's issuer is not a CA that may sign CRLs")]
    NotCrlIssuer,
    #[error("CRL is not by this issuer")]
    OtherIssuer,
    #[error("CRL's signature does not verify")]
    Signature,
    #[error("CRL has no number, or one past 64 bits")]
    Number,
    #[error("CRL has no nextUpdate")]
    NoNextUpdate,
    #[error("CRL has extension {0}, which is not taken")]
    Extension(String),
}

/// One revoked certificate of a CRL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RevokedEntry {
    pub serial: SerialNumber,
    pub revoked_at: UtcDateTime,
    pub reason: RevocationReason,
}

/// What a CRL is to say.
#[derive(Debug, Clone)]
pub struct CrlPlan<'a> {
    /// Strictly rising per issuer and shard, also across a restore (RFC 5280 §5.2.3).
    pub number: u64,
    pub this_update: UtcDateTime,
    pub next_update: UtcDateTime,
    /// An entry stays until one CRL after its certificate's expiry (RFC 5280 §3.3).
    pub entries: &'a [RevokedEntry],
    /// The address in the certificates' CRL distribution point, if they have one.
    pub url: Option<&'a HttpUrl>,
    /// Which certificates it covers; other than all of them only with an address.
    pub scope: CrlScope,
}

/// Which of its issuer's certificates a CRL covers, besides those of its address (RFC 5280 §5.2.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CrlScope {
    /// All.
    #[default]
    All,
    /// onlyContainsUserCerts: leaves.
    UserCerts,
    /// onlyContainsCACerts: CAs.
    CaCerts,
}

/// Whether a revoked certificate still stands in a CRL made at `this_update`: it leaves only after it was listed in one
/// CRL made after its expiry (RFC 5280 §3.3). `previous` is thisUpdate of the CRL before of the same shard, as recorded.
pub fn stays_listed(not_after: UtcDateTime, previous: Option<UtcDateTime>) -> bool {
    previous.is_none_or(|previous| previous <= not_after)
}

impl<'a> CrlPlan<'a> {
    /// A CRL made `now`: thisUpdate less [`CLOCK_SKEW_ALLOWANCE`], nextUpdate after `lifetime`, no address.
    pub fn new(number: u64, now: UtcDateTime, lifetime: Duration, entries: &'a [RevokedEntry]) -> Self {
        Self {
            number,
            this_update: whole_seconds(now - CLOCK_SKEW_ALLOWANCE),
            next_update: whole_seconds(now + lifetime),
            entries,
            url: None,
            scope: CrlScope::All,
        }
    }
}

/// Signs a CRL and reads it back with two parsers; the result is DER.
///
/// Entries are written in the order of their serials. Blocks while the key store signs.
pub fn build_crl(issuer: &Issuer, store: &dyn KeyStore, plan: &CrlPlan<'_>) -> Result<Vec<u8>, CrlError> {
    if plan.next_update <= plan.this_update {
        return Err(CrlError::Updates);
    }
    if plan.url.is_none() && plan.scope != CrlScope::All {
        return Err(CrlError::ScopeWithoutAddress);
    }
    let params = rcgen::CertificateRevocationListParams {
        this_update: to_offset(plan.this_update),
        next_update: to_offset(plan.next_update),
        crl_number: rcgen::SerialNumber::from(plan.number),
        issuing_distribution_point: plan.url.map(|url| rcgen::CrlIssuingDistributionPoint {
            distribution_point: rcgen::CrlDistributionPoint { uris: vec![url.as_str().to_owned()] },
            scope: match plan.scope {
                CrlScope::All => None,
                CrlScope::UserCerts => Some(rcgen::CrlScope::UserCertsOnly),
                CrlScope::CaCerts => Some(rcgen::CrlScope::CaCertsOnly),
            },
        }),
        revoked_certs: revoked_params(plan.entries)?,
        // rcgen takes the CRL's AKI from here, not from the issuer's certificate.
        key_identifier_method: rcgen::KeyIdMethod::PreSpecified(issuer.key_identifier().as_bytes().to_vec()),
    };
    let signer = issuer.signer(store);
    let encode = |error: rcgen::Error| CrlError::Encode(error.to_string());
    let der = issuer
        .to_rcgen(&signer)
        .and_then(|rcgen_issuer| params.signed_by(&rcgen_issuer))
        .map(|crl| crl.der().to_vec())
        .map_err(|error| match signing_error(&signer, &error) {
            crate::issue::IssueError::KeyStore(failure) => CrlError::KeyStore(failure),
            _ => encode(error),
        })?;
    // Both checks read one parse of a list that may be long.
    let signed_by = parse_certificate(issuer.certificate_der()).ok_or(CrlError::NotCrlIssuer)?;
    let parsed = parse(&der)?;
    let read = Crl::read_verified(&der, &parsed, &signed_by)?;
    let as_planned = read.number == plan.number
        && read.len() == plan.entries.len()
        && read.url.as_ref() == plan.url
        && read.scope == plan.scope;
    if !as_planned {
        return Err(CrlError::Encode("CRL does not read back as it was written".to_owned()));
    }
    match lint_parsed_crl(&parsed, &signed_by).into_iter().next() {
        Some(finding) => Err(CrlError::Lint(finding)),
        None => Ok(der),
    }
}

fn revoked_params(entries: &[RevokedEntry]) -> Result<Vec<rcgen::RevokedCertParams>, CrlError> {
    let mut by_serial = BTreeMap::new();
    for entry in entries {
        if by_serial.insert(entry.serial, entry).is_some() {
            return Err(CrlError::Repeated(entry.serial));
        }
    }
    let write = |entry: &RevokedEntry| rcgen::RevokedCertParams {
        serial_number: rcgen::SerialNumber::from_slice(entry.serial.as_bytes()),
        revocation_time: to_offset(entry.revoked_at),
        reason_code: Some(entry.reason.to_rcgen()),
        invalidity_date: None,
    };
    Ok(by_serial.into_values().map(write).collect())
}

/// A CRL whose signature has been verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Crl {
    number: u64,
    this_update: UtcDateTime,
    next_update: UtcDateTime,
    issuer_key_id: KeyIdentifier,
    url: Option<HttpUrl>,
    scope: CrlScope,
    revoked: BTreeMap<SerialNumber, RevokedEntry>,
    /// Serials that are none of ours: of certificates that a CA issued elsewhere.
    foreign: BTreeSet<Vec<u8>>,
}

impl Crl {
    /// Reads a CRL signed by the CA of `issuer_der`. Says nothing about its age: compare
    /// [`next_update`](Self::next_update) with the time.
    ///
    /// # Errors
    /// [`CrlError::TooLarge`] past [`CRL_BYTES_MAX`], before anything is read; [`CrlError::OtherIssuer`] if issuer name
    /// or key identifier differ; [`CrlError::Extension`] for delta, indirect, and partitioned CRLs.
    pub fn parse_verified(der: &[u8], issuer_der: &[u8]) -> Result<Self, CrlError> {
        let crl = parse(der)?;
        let issuer = parse_certificate(issuer_der).ok_or(CrlError::NotCrlIssuer)?;
        Self::read_verified(der, &crl, &issuer)
    }

    /// What `crl`, the parsed `der`, says if `issuer` signed it.
    fn read_verified(
        der: &[u8],
        crl: &CertificateRevocationList<'_>,
        issuer: &X509Certificate<'_>,
    ) -> Result<Self, CrlError> {
        let issuer_extensions = read_extensions(issuer).map_err(|_| CrlError::NotCrlIssuer)?;
        if !issuer_extensions.is_ca || !issuer_extensions.crl_sign {
            return Err(CrlError::NotCrlIssuer);
        }
        if crl.issuer().as_raw() != issuer.subject().as_raw() {
            return Err(CrlError::OtherIssuer);
        }
        crl.verify_signature(issuer.public_key()).map_err(|_| CrlError::Signature)?;
        // The second opinion: what rustls makes of it.
        webpki::BorrowedCertRevocationList::from_der(der).map_err(|_| CrlError::Malformed)?;
        let (issuer_key_id, url, scope) = check_extensions(crl)?;
        if Some(&issuer_key_id) != issuer_extensions.subject_key_id.as_ref() {
            return Err(CrlError::OtherIssuer);
        }
        let number =
            crl.crl_number().and_then(|number| u64::try_from(number).ok()).ok_or(CrlError::Number)?;
        let this_update = from_asn1(crl.last_update());
        let next_update = crl.next_update().map(from_asn1).ok_or(CrlError::NoNextUpdate)?;
        if next_update <= this_update {
            return Err(CrlError::Updates);
        }
        let (revoked, foreign) = read_entries(crl)?;
        Ok(Self { number, this_update, next_update, issuer_key_id, url, scope, revoked, foreign })
    }

    /// cRLNumber.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// thisUpdate.
    pub fn this_update(&self) -> UtcDateTime {
        self.this_update
    }

    /// nextUpdate: from then on strict verifiers refuse everything of this issuer.
    pub fn next_update(&self) -> UtcDateTime {
        self.next_update
    }

    /// authorityKeyIdentifier, equal to the issuer's subjectKeyIdentifier.
    pub fn issuer_key_id(&self) -> &KeyIdentifier {
        &self.issuer_key_id
    }

    /// Address of the issuing distribution point. With one, the CRL speaks only for certificates that name the same.
    pub fn url(&self) -> Option<&HttpUrl> {
        self.url.as_ref()
    }

    /// Which certificates it covers.
    pub fn scope(&self) -> CrlScope {
        self.scope
    }

    /// Whether the certificate with this serial, of this CRL's issuer, is revoked. `false` says something only of a
    /// certificate that the CRL covers.
    pub fn contains(&self, serial: &SerialNumber) -> bool {
        self.revoked.contains_key(serial)
    }

    /// The same for any serial, the octets of a DER integer's value: a CA's that was imported.
    pub fn contains_raw(&self, serial: &[u8]) -> bool {
        match SerialNumber::from_slice(serial) {
            Ok(serial) => self.contains(&serial),
            Err(_) => self.foreign.contains(serial),
        }
    }

    /// The entries by serial, but for serials that are none of ours.
    pub fn entries(&self) -> impl Iterator<Item = &RevokedEntry> {
        self.revoked.values()
    }

    /// How many certificates are listed.
    pub fn len(&self) -> usize {
        self.revoked.len() + self.foreign.len()
    }

    /// Whether nothing is revoked.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn parse(der: &[u8]) -> Result<CertificateRevocationList<'_>, CrlError> {
    if der.len() > CRL_BYTES_MAX {
        return Err(CrlError::TooLarge(der.len()));
    }
    match CertificateRevocationList::from_der(der) {
        Ok(([], crl)) => Ok(crl),
        _ => Err(CrlError::Malformed),
    }
}

/// Refuses what would change the meaning of a CRL; returns the authority key identifier.
/// Key identifier, address and scope.
fn check_extensions(
    crl: &CertificateRevocationList<'_>,
) -> Result<(KeyIdentifier, Option<HttpUrl>, CrlScope), CrlError> {
    let (mut key_id, mut url, mut scope) = (None, None, CrlScope::All);
    for (index, extension) in crl.extensions().iter().enumerate() {
        let refuse = || CrlError::Extension(extension.oid.to_id_string());
        if crl.extensions()[..index].iter().any(|other| other.oid == extension.oid) {
            return Err(refuse());
        }
        match extension.parsed_extension() {
            ParsedExtension::AuthorityKeyIdentifier(id) => {
                key_id = id.key_identifier.as_ref().map(|id| KeyIdentifier::new(id.0));
            }
            ParsedExtension::CRLNumber(_) => {}
            ParsedExtension::IssuingDistributionPoint(point) => {
                (url, scope) = read_point(point).ok_or_else(refuse)?;
            }
            _ => return Err(refuse()),
        }
    }
    Ok((key_id.ok_or(CrlError::OtherIssuer)?, url, scope))
}

/// `None` for the forms that are not taken: indirect, by reason, for attribute certificates, without one plain address.
fn read_point(point: &IssuingDistributionPoint<'_>) -> Option<(Option<HttpUrl>, CrlScope)> {
    if point.only_contains_attribute_certs || point.indirect_crl || point.only_some_reasons.is_some() {
        return None;
    }
    let scope = match (point.only_contains_user_certs, point.only_contains_ca_certs) {
        (false, false) => CrlScope::All,
        (true, false) => CrlScope::UserCerts,
        (false, true) => CrlScope::CaCerts,
        (true, true) => return None,
    };
    match &point.distribution_point {
        Some(DistributionPointName::FullName(names)) => match names.as_slice() {
            [GeneralName::URI(url)] => Some((Some(HttpUrl::parse(url).ok()?), scope)),
            _ => None,
        },
        _ => None,
    }
}

/// Entries with a serial of ours, and other serials.
type Entries = (BTreeMap<SerialNumber, RevokedEntry>, BTreeSet<Vec<u8>>);

fn read_entries(crl: &CertificateRevocationList<'_>) -> Result<Entries, CrlError> {
    let (mut revoked, mut foreign) = (BTreeMap::new(), BTreeSet::new());
    for entry in crl.iter_revoked_certificates() {
        let Ok(serial) = SerialNumber::from_slice(entry.raw_serial()) else {
            foreign.insert(entry.raw_serial().to_vec());
            continue;
        };
        let reason = match entry.reason_code() {
            None => RevocationReason::Unspecified,
            Some((_, code)) => RevocationReason::from_code(code.0)
                .ok_or_else(|| CrlError::Extension("2.5.29.21".to_owned()))?,
        };
        let entry = RevokedEntry { serial, revoked_at: from_asn1(entry.revocation_date), reason };
        if revoked.insert(serial, entry).is_some() {
            return Err(CrlError::Repeated(serial));
        }
    }
    Ok((revoked, foreign))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_leaves_after_one_crl_made_past_its_expiry() {
        let end = time::macros::utc_datetime!(2026-11-22 12:00);
        let second = Duration::from_secs(1);
        assert!(stays_listed(end, None));
        assert!(stays_listed(end, Some(end - second)));
        assert!(stays_listed(end, Some(end)));
        assert!(!stays_listed(end, Some(end + second)));
    }
}
