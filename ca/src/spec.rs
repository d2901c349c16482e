//! Profiles of an operator's own making: data from the policy file, taken only after a sample chain under it was linted.
//!
//! A custom profile is a kind of service certificate (`server`, `client` or `peer`) with narrower rules. It can never carry
//! the SPIFFE path of a node, controller or operator, nor WireGuard keys: its kind has no such variant.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::time::Duration;

use time::UtcDateTime;

use crate::hierarchy::{CaNaming, create_issuing_ca, create_root};
use crate::identity::{DnsName, Label, TrustDomain};
use crate::issue::{IssueError, Issuer, issue_leaf};
use crate::key::{KeyAlgorithm, KeyError, PublicKey};
use crate::keystore::{KeyId, KeyStoreError, MemoryKeyStore};
use crate::leaf::KeyIdentifier;
use crate::pointers::{HttpUrl, Pointers, PublishingPoints, UrlError};
use crate::private::LeafKey;
use crate::profile::{ExtraUsage, LEAF_LIFETIME_MAX, Profile};
use crate::serial::SerialNumber;
use crate::template::{LeafTemplate, NO_REV_AVAIL_LIFETIME_MAX, SubjectForm, TemplateError};

/// Most DNS rules of one profile.
pub const DNS_RULES_MAX: usize = 256;

/// Shortest lifetime of a profile: 5 minutes.
pub const SPEC_LIFETIME_MIN: Duration = Duration::from_secs(300);

/// Which of the built-in service profiles a custom one narrows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ServiceKind {
    Server,
    Client,
    Peer,
}

impl ServiceKind {
    /// The built-in profile: extended key usage and identity come from it.
    pub fn profile(self) -> Profile {
        match self {
            Self::Server => Profile::Server,
            Self::Client => Profile::Client,
            Self::Peer => Profile::Peer,
        }
    }
}

impl fmt::Display for ServiceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.profile().name())
    }
}

/// A family of key types that a profile allows. Written `ecdsa-p256`, `ecdsa-p384`, `ed25519`, `rsa`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KeyFamily {
    EcdsaP256,
    EcdsaP384,
    Ed25519,
    /// 2048 to 4096 bits.
    Rsa,
}

/// A text that names no family of key types.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown key type {0:?}; ecdsa-p256, ecdsa-p384, ed25519 and rsa are known")]
pub struct UnknownKeyFamily(pub String);

impl KeyFamily {
    /// Every family.
    pub const ALL: [Self; 4] = [Self::EcdsaP256, Self::EcdsaP384, Self::Ed25519, Self::Rsa];

    /// The family of a key.
    pub fn of(algorithm: KeyAlgorithm) -> Self {
        match algorithm {
            KeyAlgorithm::EcdsaP256 => Self::EcdsaP256,
            KeyAlgorithm::EcdsaP384 => Self::EcdsaP384,
            KeyAlgorithm::Ed25519 => Self::Ed25519,
            KeyAlgorithm::Rsa { .. } => Self::Rsa,
        }
    }

    /// Name in the policy file.
    pub fn name(self) -> &'static str {
        match self {
            Self::EcdsaP256 => "ecdsa-p256",
            Self::EcdsaP384 => "ecdsa-p384",
            Self::Ed25519 => "ed25519",
            Self::Rsa => "rsa",
        }
    }

    fn sample(self) -> KeyAlgorithm {
        match self {
            Self::EcdsaP256 => KeyAlgorithm::EcdsaP256,
            Self::EcdsaP384 => KeyAlgorithm::EcdsaP384,
            Self::Ed25519 => KeyAlgorithm::Ed25519,
            Self::Rsa => KeyAlgorithm::Rsa { bits: 2048 },
        }
    }
}

impl FromStr for KeyFamily {
    type Err = UnknownKeyFamily;
    fn from_str(text: &str) -> Result<Self, UnknownKeyFamily> {
        Self::ALL
            .into_iter()
            .find(|family| family.name() == text)
            .ok_or_else(|| UnknownKeyFamily(text.to_owned()))
    }
}

/// One rule that gives DNS names.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DnsRule {
    /// Exactly this name.
    Exact(DnsName),
    /// Every name below this one, at any depth; never the name itself.
    Below(DnsName),
    /// The node's own name, `NODE.DOMAIN`.
    OwnName,
    /// Every name below the node's own.
    BelowOwnName,
}

impl DnsRule {
    /// Whether the rule gives `name` to the node `owner`.
    pub fn gives(&self, name: &DnsName, owner: &NameOwner<'_>) -> bool {
        let below = |parent: &str| {
            name.as_str().strip_suffix(parent).is_some_and(|rest| rest.len() > 1 && rest.ends_with('.'))
        };
        match self {
            Self::Exact(exact) => name == exact,
            Self::Below(parent) => below(parent.as_str()),
            Self::OwnName => *name == owner.name(),
            Self::BelowOwnName => below(owner.name().as_str()),
        }
    }

    fn sample(&self, owner: &NameOwner<'_>) -> Option<DnsName> {
        match self {
            Self::Exact(name) => Some(name.clone()),
            Self::Below(parent) => DnsName::parse(&format!("a.{parent}")).ok(),
            Self::OwnName => Some(owner.name()),
            Self::BelowOwnName => DnsName::parse(&format!("a.{}", owner.name())).ok(),
        }
    }
}

impl fmt::Display for DnsRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(name) => write!(f, "exactly {name}"),
            Self::Below(parent) => write!(f, "names below {parent}"),
            Self::OwnName => f.write_str("the node's own name"),
            Self::BelowOwnName => f.write_str("names below the node's own"),
        }
    }
}

/// Which IP addresses a profile gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum IpRule {
    #[default]
    None,
    /// The node's own mesh addresses.
    OwnAddresses,
}

/// How a certificate of a profile says whether it was revoked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RevocationForm {
    /// Pointers as the mesh publishes them; each may be left out.
    Pointers { crl: bool, ocsp: bool },
    /// Not at all (RFC 9608): short-lived, no pointers.
    NoRevAvail,
}

/// For whom names are asked.
#[derive(Debug, Clone, Copy)]
pub struct NameOwner<'a> {
    pub domain: &'a TrustDomain,
    pub node: &'a Label,
    /// The node's own mesh addresses.
    pub addresses: &'a [IpAddr],
}

impl NameOwner<'_> {
    fn name(&self) -> DnsName {
        DnsName::within(self.node, self.domain)
    }
}

/// What a custom profile allows, as read from the policy file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProfileSpec {
    /// Not the name of a built-in profile.
    pub name: Label,
    pub kind: ServiceKind,
    /// Purposes beside TLS; kinds `server` and `client` only.
    pub extra_usages: Vec<ExtraUsage>,
    pub keys: BTreeSet<KeyFamily>,
    /// Validity without backdating when nobody asks for less.
    pub lifetime: Duration,
    /// Longest validity that may be asked for.
    pub lifetime_max: Duration,
    pub dns: Vec<DnsRule>,
    pub ips: IpRule,
    pub subject: SubjectForm,
    pub revocation: RevocationForm,
}

/// Why a custom profile is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    #[error("profile {0} is built in")]
    BuiltIn(Label),
    #[error("profile allows no key type")]
    NoKeys,
    #[error("lifetime of {} s is outside 300 s to 90 days", .0.as_secs())]
    Lifetime(Duration),
    #[error("usual lifetime is longer than the longest")]
    LifetimeOrder,
    #[error("profile without revocation may live 10 days at most, not {} s", .0.as_secs())]
    NoRevAvailLifetime(Duration),
    #[error("profile gives no name of the kind that {0} needs")]
    NoNames(ServiceKind),
    #[error("profile has {0} DNS rules, at most {DNS_RULES_MAX} are allowed")]
    TooManyRules(usize),
    #[error("rule {0} covers a whole top-level domain")]
    TopLevel(DnsRule),
    #[error("sample under the profile is refused before signing")]
    Template(#[source] TemplateError),
    #[error("sample certificate breaks a rule or was not issued")]
    Sample(#[source] IssueError),
    #[error("sample key cannot be drawn")]
    Key(#[source] KeyError),
    #[error("sample CA cannot be made")]
    SampleCa(#[source] KeyStoreError),
    #[error("addresses of the sample cannot be written")]
    Url(#[source] UrlError),
}

/// Why a request under a custom profile is refused. In every case nothing has been signed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestRefusal {
    #[error("profile {profile} does not allow keys of type {key}")]
    KeyType { profile: Label, key: KeyAlgorithm },
    #[error("no rule of profile {profile} gives {name}")]
    Name { profile: Label, name: DnsName },
    #[error("profile {profile} does not give address {ip}")]
    Ip { profile: Label, ip: IpAddr },
    #[error("profile {profile} allows {} s at most", .max.as_secs())]
    Lifetime { profile: Label, max: Duration },
    #[error("address for the certificate cannot be written")]
    Url(#[source] UrlError),
    #[error("template is refused")]
    Template(#[source] TemplateError),
}

/// A request that a custom profile is to grant.
#[derive(Debug, Clone)]
pub struct SpecRequest<'a> {
    pub owner: NameOwner<'a>,
    /// Name of the service, the last part of its SPIFFE ID.
    pub service: &'a Label,
    pub dns: Vec<DnsName>,
    pub ips: Vec<IpAddr>,
    /// `None` takes the profile's usual lifetime.
    pub lifetime: Option<Duration>,
    pub now: UtcDateTime,
    pub key: &'a PublicKey,
}

/// Where a certificate belongs: its issuing CA and, if the mesh publishes, addresses and shard.
#[derive(Debug, Clone, Copy)]
pub struct Placement<'a> {
    pub issuer: &'a KeyIdentifier,
    pub points: Option<&'a PublishingPoints>,
    pub shard: u16,
}

/// Which rule gave which name; for `--explain`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NameGrant {
    pub name: String,
    pub rule: String,
}

/// A custom profile whose sample was linted. Only [`accept`](ProfileSpec::accept) makes one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcceptedProfile {
    spec: ProfileSpec,
}

impl ProfileSpec {
    /// Checks the profile in itself, then issues and lints a sample under it for each key type and every DNS rule, with a CA
    /// that exists only in memory.
    ///
    /// Blocks: it draws keys; RSA takes up to some seconds.
    pub fn accept(
        self,
        domain: &TrustDomain,
        now: UtcDateTime,
        rng: &mut dyn FnMut(&mut [u8]),
    ) -> Result<AcceptedProfile, SpecError> {
        self.check()?;
        let accepted = AcceptedProfile { spec: self };
        accepted.issue_samples(domain, now, rng)?;
        Ok(accepted)
    }

    fn check(&self) -> Result<(), SpecError> {
        if Profile::from_str(self.name.as_str()).is_ok() {
            return Err(SpecError::BuiltIn(self.name.clone()));
        }
        if self.keys.is_empty() {
            return Err(SpecError::NoKeys);
        }
        for lifetime in [self.lifetime, self.lifetime_max] {
            if !(SPEC_LIFETIME_MIN..=LEAF_LIFETIME_MAX).contains(&lifetime) {
                return Err(SpecError::Lifetime(lifetime));
            }
        }
        if self.lifetime > self.lifetime_max {
            return Err(SpecError::LifetimeOrder);
        }
        if self.revocation == RevocationForm::NoRevAvail && self.lifetime_max > NO_REV_AVAIL_LIFETIME_MAX {
            return Err(SpecError::NoRevAvailLifetime(self.lifetime_max));
        }
        let ip_suffices = self.kind != ServiceKind::Client && self.ips == IpRule::OwnAddresses;
        if self.dns.is_empty() && !ip_suffices {
            return Err(SpecError::NoNames(self.kind));
        }
        if self.dns.len() > DNS_RULES_MAX {
            return Err(SpecError::TooManyRules(self.dns.len()));
        }
        let top_level =
            |rule: &&DnsRule| matches!(rule, DnsRule::Below(parent) if !parent.as_str().contains('.'));
        match self.dns.iter().find(top_level) {
            Some(rule) => Err(SpecError::TopLevel(rule.clone())),
            None => Ok(()),
        }
    }
}

impl AcceptedProfile {
    /// The data it was made from.
    pub fn spec(&self) -> &ProfileSpec {
        &self.spec
    }

    /// Which rule gives each name that is asked for.
    pub fn explain(&self, request: &SpecRequest<'_>) -> Result<Vec<NameGrant>, RequestRefusal> {
        let spec = &self.spec;
        let mut grants = Vec::new();
        for name in &request.dns {
            let rule = spec.dns.iter().find(|rule| rule.gives(name, &request.owner));
            let rule =
                rule.ok_or_else(|| RequestRefusal::Name { profile: spec.name.clone(), name: name.clone() })?;
            grants.push(NameGrant { name: name.to_string(), rule: rule.to_string() });
        }
        for ip in &request.ips {
            if spec.ips != IpRule::OwnAddresses || !request.owner.addresses.contains(ip) {
                return Err(RequestRefusal::Ip { profile: spec.name.clone(), ip: *ip });
            }
            grants.push(NameGrant { name: ip.to_string(), rule: "the node's own addresses".to_owned() });
        }
        Ok(grants)
    }

    /// The template of a certificate under this profile: names checked against its rules, key against its types, lifetime
    /// against its longest.
    pub fn template(
        &self,
        request: &SpecRequest<'_>,
        placement: Placement<'_>,
    ) -> Result<LeafTemplate, RequestRefusal> {
        let spec = &self.spec;
        let key = request.key.algorithm();
        if !spec.keys.contains(&KeyFamily::of(key)) {
            return Err(RequestRefusal::KeyType { profile: spec.name.clone(), key });
        }
        self.explain(request)?;
        let lifetime = request.lifetime.unwrap_or(spec.lifetime);
        if lifetime > spec.lifetime_max {
            return Err(RequestRefusal::Lifetime { profile: spec.name.clone(), max: spec.lifetime_max });
        }
        let (node, service) = (request.owner.node.clone(), request.service.clone());
        let mut template = LeafTemplate::service(
            spec.kind.profile(),
            node,
            service,
            request.dns.clone(),
            request.now,
            lifetime,
        );
        template.ips.clone_from(&request.ips);
        template.extra_usages.clone_from(&spec.extra_usages);
        template.subject = spec.subject;
        template.crl_shard = placement.shard;
        template.pointers = self.pointers(placement).map_err(RequestRefusal::Url)?;
        template.no_rev_avail = spec.revocation == RevocationForm::NoRevAvail;
        template.check().map_err(RequestRefusal::Template)?;
        Ok(template)
    }

    fn pointers(&self, placement: Placement<'_>) -> Result<Pointers, UrlError> {
        let Some(points) = placement.points else { return Ok(Pointers::default()) };
        let all = points.leaf(placement.issuer, placement.shard)?;
        Ok(match self.spec.revocation {
            RevocationForm::Pointers { crl, ocsp } => {
                Pointers { crl: all.crl.filter(|_| crl), ocsp: all.ocsp.filter(|_| ocsp), issuer: all.issuer }
            }
            RevocationForm::NoRevAvail => Pointers { crl: None, ocsp: None, issuer: all.issuer },
        })
    }

    fn issue_samples(
        &self,
        domain: &TrustDomain,
        now: UtcDateTime,
        rng: &mut dyn FnMut(&mut [u8]),
    ) -> Result<(), SpecError> {
        let mut store = MemoryKeyStore::new();
        let issuer = sample_issuer(&mut store, domain, now, rng)?;
        let url = HttpUrl::parse("http://pki.sample.invalid").map_err(SpecError::Url)?;
        let points = PublishingPoints::new(url, 1).map_err(SpecError::Url)?;
        let label = Label::parse("sample").expect("a plain word");
        let addresses = [IpAddr::from([100, 64, 0, 2]), IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, 2])];
        let owner = NameOwner { domain, node: &label, addresses: &addresses };
        let mut names: Vec<DnsName> = self.spec.dns.iter().filter_map(|rule| rule.sample(&owner)).collect();
        names.sort();
        names.dedup();
        names.truncate(crate::template::SANS_PER_CERT_MAX / 2);
        for family in &self.spec.keys {
            let key = LeafKey::generate_for(family.sample()).map_err(SpecError::Key)?;
            let request = SpecRequest {
                owner,
                service: &label,
                dns: names.clone(),
                ips: if self.spec.ips == IpRule::OwnAddresses { addresses.to_vec() } else { Vec::new() },
                lifetime: Some(self.spec.lifetime_max),
                now,
                key: key.public_key(),
            };
            let placement = Placement { issuer: issuer.key_identifier(), points: Some(&points), shard: 0 };
            let template = self.template(&request, placement).map_err(|refusal| match refusal {
                RequestRefusal::Template(error) => SpecError::Template(error),
                RequestRefusal::Url(error) => SpecError::Url(error),
                // Names, key and lifetime of the sample come from the rules themselves.
                _ => SpecError::NoNames(self.spec.kind),
            })?;
            issue_leaf(&issuer, &store, &key, &template, SerialNumber::random(rng))
                .map_err(SpecError::Sample)?;
        }
        Ok(())
    }
}

fn sample_issuer(
    store: &mut MemoryKeyStore,
    domain: &TrustDomain,
    now: UtcDateTime,
    rng: &mut dyn FnMut(&mut [u8]),
) -> Result<Issuer, SpecError> {
    let id = |text| KeyId::parse(text).map_err(SpecError::SampleCa);
    let (root_id, issuing_id) = (id("sample-root")?, id("sample-issuing")?);
    store.generate(root_id.clone()).map_err(SpecError::SampleCa)?;
    store.generate(issuing_id.clone()).map_err(SpecError::SampleCa)?;
    let naming = CaNaming { mesh: "sample", now };
    let root = create_root(store, &root_id, naming, rng).map_err(SpecError::Sample)?;
    let root = Issuer::new(&root.der, root_id, domain.clone(), store).map_err(SpecError::Sample)?;
    let issuing = create_issuing_ca(&root, store, &issuing_id, naming, rng).map_err(SpecError::Sample)?;
    Issuer::new(&issuing.der, issuing_id, domain.clone(), store).map_err(SpecError::Sample)
}
