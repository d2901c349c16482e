//! What a leaf will say, decided before anything is signed.

use std::net::IpAddr;
use std::time::Duration;

use time::UtcDateTime;

use crate::identity::{DnsName, Identity, Label};
use crate::instant::{CLOCK_SKEW_ALLOWANCE, whole_seconds};
use crate::pointers::Pointers;
use crate::profile::{ExtraUsage, LEAF_LIFETIME_MAX, Profile};
use crate::wireguard::{self, WireguardKeysError};

/// Most subject alternative names in one certificate.
pub const SANS_PER_CERT_MAX: usize = 64;

/// Longest validity without backdating of a leaf whose revocation is never told: 10 days. RFC 9608 leaves "short" open;
/// the CA/Browser Forum's bound for short-lived certificates was this.
pub const NO_REV_AVAIL_LIFETIME_MAX: Duration = Duration::from_secs(10 * 24 * 3600);

/// What stands in a leaf's subject.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum SubjectForm {
    /// A common name that repeats the first DNS name, else the SPIFFE ID, if it has at most 64 characters; for programs
    /// that map it to a user (PostgreSQL, for example).
    #[default]
    CommonName,
    /// Nothing; the names are then critical (RFC 5280 §4.1.2.6).
    Empty,
}

/// Why a template asks for a certificate that its profile does not allow.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    #[error("profile {profile} does not carry identity {identity:?}")]
    Identity { profile: Profile, identity: Option<Identity> },
    #[error("profile {0} carries no DNS names or IP addresses")]
    HostNames(Profile),
    #[error("profile {0} needs a DNS name or an IP address")]
    NoHostName(Profile),
    #[error("profile {0} needs a DNS name")]
    NoDnsName(Profile),
    #[error("profile {0} carries no WireGuard keys")]
    WireguardKeys(Profile),
    #[error("WireGuard keys cannot be certified")]
    BadWireguardKeys(#[source] WireguardKeysError),
    #[error("template holds {0} names, at most {SANS_PER_CERT_MAX} are allowed")]
    TooManyNames(usize),
    #[error("template holds name {0} twice")]
    RepeatedName(String),
    #[error("address {0} cannot be certified")]
    Address(IpAddr),
    #[error("notAfter is not later than notBefore")]
    Validity,
    #[error("validity is {0} s, at most 90 days and the clock allowance are allowed")]
    TooLong(i64),
    #[error("certificate whose revocation is never told cannot point at a CRL or OCSP responder")]
    NoRevAvailPointers,
    #[error("certificate whose revocation is never told may live 10 days at most, not {0} s")]
    NoRevAvailTooLong(i64),
    #[error("profile {0} is always revocable")]
    AlwaysRevocable(Profile),
    #[error("profile {0} has no purposes beside TLS")]
    ExtraUsage(Profile),
    #[error("purpose {0} is asked for twice")]
    RepeatedUsage(ExtraUsage),
}

/// What a leaf will say. Policy is checked on this value, never on a CSR.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeafTemplate {
    pub profile: Profile,
    /// Written as the one SPIFFE ID; `None` for the profiles that carry none.
    pub identity: Option<Identity>,
    pub dns: Vec<DnsName>,
    pub ips: Vec<IpAddr>,
    /// Profile `node` only: one or two, newest first.
    pub wireguard_keys: Vec<[u8; 32]>,
    pub not_before: UtcDateTime,
    pub not_after: UtcDateTime,
    /// Where CRL, OCSP responder and issuer are published. Without a CRL address (a mesh that brings the CRL to every
    /// node's disk) the CRL names none either, and one covers all of the issuer's certificates.
    pub pointers: Pointers,
    /// The CRL this certificate belongs to, fixed at issuance (see [`PublishingPoints::shard_of`](crate::PublishingPoints)).
    pub crl_shard: u16,
    /// Says that nobody will tell of a revocation (RFC 9608): for leaves that live at most [`NO_REV_AVAIL_LIFETIME_MAX`].
    pub no_rev_avail: bool,
    /// Whether the subject repeats a name.
    pub subject: SubjectForm,
    /// Purposes beside TLS; profiles `server` and `client` only.
    pub extra_usages: Vec<ExtraUsage>,
}

impl LeafTemplate {
    /// A template without names, valid from `now` less [`CLOCK_SKEW_ALLOWANCE`] to `now` and `lifetime`, in shard 0.
    pub fn new(profile: Profile, identity: Option<Identity>, now: UtcDateTime, lifetime: Duration) -> Self {
        Self {
            profile,
            identity,
            dns: Vec::new(),
            ips: Vec::new(),
            wireguard_keys: Vec::new(),
            not_before: whole_seconds(now - CLOCK_SKEW_ALLOWANCE),
            not_after: whole_seconds(now + lifetime),
            pointers: Pointers::default(),
            crl_shard: 0,
            no_rev_avail: false,
            subject: SubjectForm::default(),
            extra_usages: Vec::new(),
        }
    }

    /// A service's template under `server`, `client` or `peer`. Only `peer` writes the SPIFFE ID
    /// `/service/NODE/NAME` (see [`Profile`]); the other two need the owner to be remembered by serial.
    pub fn service(
        profile: Profile,
        node: Label,
        name: Label,
        dns: Vec<DnsName>,
        now: UtcDateTime,
        lifetime: Duration,
    ) -> Self {
        let identity = profile.carries_identity().then_some(Identity::Service { node, name });
        Self { dns, ..Self::new(profile, identity, now, lifetime) }
    }

    /// Whether the profile allows all of this. Whether the *owner* may have these names is the caller's to decide.
    pub fn check(&self) -> Result<(), TemplateError> {
        self.check_identity()?;
        self.check_names()?;
        self.check_validity()?;
        self.check_revocability()?;
        self.check_usages()
    }

    fn check_revocability(&self) -> Result<(), TemplateError> {
        if !self.no_rev_avail {
            return Ok(());
        }
        if matches!(self.profile, Profile::Controller | Profile::Node | Profile::Operator) {
            return Err(TemplateError::AlwaysRevocable(self.profile));
        }
        if self.pointers.crl.is_some() || self.pointers.ocsp.is_some() {
            return Err(TemplateError::NoRevAvailPointers);
        }
        let span = self.not_after - self.not_before;
        if span > NO_REV_AVAIL_LIFETIME_MAX + CLOCK_SKEW_ALLOWANCE {
            return Err(TemplateError::NoRevAvailTooLong(span.whole_seconds()));
        }
        Ok(())
    }

    fn check_usages(&self) -> Result<(), TemplateError> {
        if !self.extra_usages.is_empty() && !matches!(self.profile, Profile::Server | Profile::Client) {
            return Err(TemplateError::ExtraUsage(self.profile));
        }
        match repeated(&self.extra_usages) {
            Some(usage) => Err(TemplateError::RepeatedUsage(*usage)),
            None => Ok(()),
        }
    }

    fn check_identity(&self) -> Result<(), TemplateError> {
        if !self.profile.permits(self.identity.as_ref()) {
            return Err(TemplateError::Identity { profile: self.profile, identity: self.identity.clone() });
        }
        if self.profile == Profile::Node {
            wireguard::check(&self.wireguard_keys).map_err(TemplateError::BadWireguardKeys)
        } else if self.wireguard_keys.is_empty() {
            Ok(())
        } else {
            Err(TemplateError::WireguardKeys(self.profile))
        }
    }

    fn check_names(&self) -> Result<(), TemplateError> {
        let count = self.dns.len() + self.ips.len() + usize::from(self.identity.is_some());
        if count > SANS_PER_CERT_MAX {
            return Err(TemplateError::TooManyNames(count));
        }
        match self.profile {
            Profile::Operator if count > 1 => return Err(TemplateError::HostNames(self.profile)),
            Profile::Node | Profile::Client if self.dns.is_empty() => {
                return Err(TemplateError::NoDnsName(self.profile));
            }
            Profile::Server | Profile::Peer if self.dns.is_empty() && self.ips.is_empty() => {
                return Err(TemplateError::NoHostName(self.profile));
            }
            _ => {}
        }
        if let Some(name) = repeated(&self.dns) {
            return Err(TemplateError::RepeatedName(name.to_string()));
        }
        if let Some(ip) = repeated(&self.ips) {
            return Err(TemplateError::RepeatedName(ip.to_string()));
        }
        let no_host = |ip: &&IpAddr| ip.is_unspecified() || ip.is_multicast();
        if let Some(ip) = self.ips.iter().find(no_host) {
            return Err(TemplateError::Address(*ip));
        }
        Ok(())
    }

    fn check_validity(&self) -> Result<(), TemplateError> {
        let span = self.not_after - self.not_before;
        if span <= time::Duration::ZERO {
            return Err(TemplateError::Validity);
        }
        if span > LEAF_LIFETIME_MAX + CLOCK_SKEW_ALLOWANCE {
            return Err(TemplateError::TooLong(span.whole_seconds()));
        }
        Ok(())
    }
}

fn repeated<T: Eq>(list: &[T]) -> Option<&T> {
    list.iter().enumerate().find(|(index, item)| list[..*index].contains(item)).map(|(_, item)| item)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pointers::HttpUrl;

    const NOW: UtcDateTime = time::macros::utc_datetime!(2026-11-22 12:00:00.5);

    fn label(text: &str) -> Label {
        Label::parse(text).unwrap()
    }

    fn node() -> LeafTemplate {
        let identity = Identity::Node { name: label("web-1") };
        LeafTemplate {
            dns: vec![DnsName::parse("web-1.mesh.internal").unwrap()],
            wireguard_keys: vec![[7; 32]],
            ..LeafTemplate::new(Profile::Node, Some(identity), NOW, Profile::Node.default_lifetime())
        }
    }

    fn service(profile: Profile) -> LeafTemplate {
        let dns = vec![DnsName::parse("shop.mesh.internal").unwrap()];
        LeafTemplate::service(profile, label("web-1"), label("shop"), dns, NOW, Duration::from_secs(3600))
    }

    #[test]
    fn a_plain_template_of_each_profile_passes() {
        let bare =
            |profile, identity| LeafTemplate::new(profile, Some(identity), NOW, Duration::from_secs(60));
        for template in [
            node(),
            service(Profile::Server),
            service(Profile::Client),
            service(Profile::Peer),
            bare(Profile::Controller, Identity::Controller { name: label("c1") }),
            bare(Profile::Operator, Identity::Operator { name: label("anna") }),
        ] {
            assert_eq!(template.check(), Ok(()), "{template:?}");
            assert_eq!(template.not_before.nanosecond(), 0);
        }
    }

    #[test]
    fn no_profile_takes_the_identity_of_another() {
        let identities = [
            None,
            Some(Identity::Controller { name: label("x") }),
            Some(Identity::Node { name: label("x") }),
            Some(Identity::Service { node: label("x"), name: label("y") }),
            Some(Identity::Operator { name: label("x") }),
        ];
        let mut allowed = 0;
        for profile in Profile::ALL {
            for identity in &identities {
                let template = LeafTemplate { profile, identity: identity.clone(), ..node() };
                let refused = matches!(template.check(), Err(TemplateError::Identity { .. }));
                assert_eq!(refused, !profile.permits(identity.as_ref()), "{profile} {identity:?}");
                allowed += usize::from(!refused);
            }
        }
        assert_eq!(allowed, 6);
    }

    #[test]
    fn what_a_profile_does_not_carry_is_refused() {
        type Change = fn(&mut LeafTemplate);
        let table: [(LeafTemplate, Change, TemplateError); 17] = [
            (node(), |t| t.dns.clear(), TemplateError::NoDnsName(Profile::Node)),
            (service(Profile::Client), |t| t.dns.clear(), TemplateError::NoDnsName(Profile::Client)),
            (service(Profile::Server), |t| t.dns.clear(), TemplateError::NoHostName(Profile::Server)),
            (service(Profile::Peer), |t| t.dns.clear(), TemplateError::NoHostName(Profile::Peer)),
            (
                service(Profile::Peer),
                |t| t.wireguard_keys.push([1; 32]),
                TemplateError::WireguardKeys(Profile::Peer),
            ),
            (
                node(),
                |t| t.wireguard_keys.clear(),
                TemplateError::BadWireguardKeys(WireguardKeysError::Count(0)),
            ),
            (
                node(),
                |t| t.dns.push(t.dns[0].clone()),
                TemplateError::RepeatedName("web-1.mesh.internal".into()),
            ),
            (
                node(),
                |t| t.ips = vec!["0.0.0.0".parse().unwrap()],
                TemplateError::Address("0.0.0.0".parse().unwrap()),
            ),
            (
                node(),
                |t| t.ips = vec!["ff02::1".parse().unwrap()],
                TemplateError::Address("ff02::1".parse().unwrap()),
            ),
            (node(), |t| t.not_after = t.not_before, TemplateError::Validity),
            (
                node(),
                |t| t.not_after += Duration::from_secs(100 * 365 * 86400),
                TemplateError::TooLong(100 * 365 * 86400 + 72 * 3600 + 900),
            ),
            (node(), |t| t.no_rev_avail = true, TemplateError::AlwaysRevocable(Profile::Node)),
            (
                service(Profile::Server),
                |t| {
                    t.no_rev_avail = true;
                    t.pointers.ocsp = Some(HttpUrl::parse("http://x/ocsp").unwrap());
                },
                TemplateError::NoRevAvailPointers,
            ),
            (
                service(Profile::Server),
                |t| {
                    t.no_rev_avail = true;
                    t.not_after = t.not_before + Duration::from_secs(11 * 86400);
                },
                TemplateError::NoRevAvailTooLong(11 * 86400),
            ),
            (
                service(Profile::Peer),
                |t| t.extra_usages.push(ExtraUsage::CodeSigning),
                TemplateError::ExtraUsage(Profile::Peer),
            ),
            (
                service(Profile::Server),
                |t| t.extra_usages = vec![ExtraUsage::IpsecIke; 2],
                TemplateError::RepeatedUsage(ExtraUsage::IpsecIke),
            ),
            (
                node(),
                |t| t.ips = (0..64).map(|i| IpAddr::from([10, 0, 0, i])).collect(),
                TemplateError::TooManyNames(66),
            ),
        ];
        for (mut template, change, verdict) in table {
            change(&mut template);
            assert_eq!(template.check(), Err(verdict));
        }
        let mut operator = service(Profile::Operator);
        operator.identity = Some(Identity::Operator { name: label("anna") });
        assert_eq!(operator.check(), Err(TemplateError::HostNames(Profile::Operator)));
    }
}
