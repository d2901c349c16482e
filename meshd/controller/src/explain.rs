//! `cert issue --dry-run --explain`: which rule allows or refuses each part of a request. The same judgement as the writer's.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use mesh_ca::KeyAlgorithm;
use mesh_core::profile::ServiceKind;
use mesh_core::world::{About, Asker, Verdict, Wish};
use mesh_core::{DnsName, NodeName, Refusal, World};
use mesh_proto::v1 as pb;

use crate::auth::Caller;
use crate::limits::{CERTIFICATE_TTL_MIN, NAMES_PER_CERTIFICATE_MAX};
use crate::parts::Parts;
use crate::profiles::key_type;
use crate::status::Problem;

impl Parts {
    /// What policy says to a request; nothing is issued or recorded.
    pub(crate) fn explain(
        &self,
        caller: &Caller,
        request: &pb::ExplainRequest,
    ) -> Result<pb::ExplainResponse, Problem> {
        if request.names.len() > NAMES_PER_CERTIFICATE_MAX {
            return Err(Problem::too_large("list of names", NAMES_PER_CERTIFICATE_MAX));
        }
        let Some(pair_name) = request.names.first().map(|name| name.to_ascii_lowercase()) else {
            return Err(Problem::usage("a certificate needs a name"));
        };
        let key = match request.key_type.as_str() {
            "" => KeyAlgorithm::default(),
            text => text
                .parse::<KeyAlgorithm>()
                .map_err(|_| Problem::usage("this is no key type, such as ecdsa-p256 or rsa-2048"))?,
        };
        let lifetime = match Duration::from_secs(request.ttl_secs.into()) {
            Duration::ZERO => None,
            asked if asked < CERTIFICATE_TTL_MIN || asked > mesh_ca::LEAF_LIFETIME_MAX => {
                return Err(Problem::usage("a certificate lives at least 60 s and at most 90 days"));
            }
            asked => Some(asked),
        };
        let profile = if request.profile.is_empty() { "server" } else { request.profile.as_str() };
        let names: Vec<Asked> = request.names.iter().map(|text| Asked::read(text)).collect();
        let (dns, ips) = good(&names);
        let wish = Wish {
            profile,
            names: &dns,
            ips: &ips,
            pair_name: &pair_name,
            lifetime,
            key: Some(key_type(key)),
        };
        let mut verdicts = self.directory.read(|world| {
            let asker = asker(world, caller, &request.node)?;
            Ok::<_, Problem>(world.judge_wish(asker, &wish).into_iter().map(message).collect::<Vec<_>>())
        })?;
        verdicts.extend(self.unwritable(&wish));
        verdicts.extend(names.into_iter().filter_map(Asked::refused));
        Ok(pb::ExplainResponse { allowed: verdicts.iter().all(|verdict| verdict.allowed), verdicts })
    }
}

impl Parts {
    /// What no certificate of the kind can say, whoever asks: refused when the template is made.
    fn unwritable(&self, wish: &Wish<'_>) -> Option<pb::explain_response::Verdict> {
        let is_client = self.directory.read(|world| {
            let kind = world.profile(wish.profile).map_or(wish.profile, |(_, custom)| custom.kind.as_str());
            kind == ServiceKind::Client.as_str()
        });
        let refused = |about: &str, subject: String, why: String| {
            let next = "ask for a profile and names that fit each other";
            refusal(about, subject, Problem::new(pb::ErrorCode::CertificateInvalid, why, next))
        };
        let mut seen = BTreeSet::new();
        let texts =
            wish.names.iter().map(ToString::to_string).chain(wish.ips.iter().map(ToString::to_string));
        if let Some(twice) = texts.into_iter().find(|text| !seen.insert(text.clone())) {
            let why = format!("{twice} is asked for twice");
            return Some(refused("name", twice, why));
        }
        let nameless = is_client && wish.names.is_empty();
        nameless.then(|| {
            let why = format!("profile {} needs a DNS name", wish.profile);
            refused("profile", mesh_core::change::escape(wish.profile), why)
        })
    }
}

/// A node asks for itself; an operator for any node, or for a machine that is none.
fn asker(world: &World, caller: &Caller, node: &str) -> Result<Asker, Problem> {
    match caller {
        Caller::Node { id, name, .. } if node.is_empty() || node == name => Ok(Asker::Node(*id)),
        Caller::Node { .. } => {
            Err(Problem::denied(&caller.describe(), "Certificates/Explain for another node"))
        }
        _ if node.is_empty() => Ok(Asker::Detached),
        _ => {
            let known = NodeName::try_from(node).ok().and_then(|name| world.node_by_name(&name));
            known
                .map(|node| Asker::Node(node.id))
                .ok_or_else(|| Problem::node_not_found(&mesh_core::change::escape(node)))
        }
    }
}

/// One name of a request.
enum Asked {
    Dns(DnsName),
    Ip(IpAddr),
    Bad { text: String, source: mesh_core::NameError },
}

impl Asked {
    fn read(text: &str) -> Self {
        if let Ok(ip) = text.parse::<IpAddr>() {
            return Self::Ip(ip.to_canonical());
        }
        DnsName::try_from(text)
            .map_or_else(|source| Self::Bad { text: mesh_core::change::escape(text), source }, Self::Dns)
    }

    fn refused(self) -> Option<pb::explain_response::Verdict> {
        let Self::Bad { text, source } = self else { return None };
        let problem = Problem::from(Refusal::NameInvalid { name: text.clone(), source: source.clone() });
        let why = format!("{}: {source}", problem.why);
        Some(refusal("name", text, Problem { why, ..problem }))
    }
}

fn good(names: &[Asked]) -> (Vec<DnsName>, Vec<IpAddr>) {
    let dns = names.iter().filter_map(|name| match name {
        Asked::Dns(name) => Some(name.clone()),
        _ => None,
    });
    let ips = names.iter().filter_map(|name| match name {
        Asked::Ip(ip) => Some(*ip),
        _ => None,
    });
    (dns.collect(), ips.collect())
}

fn message(verdict: Verdict) -> pb::explain_response::Verdict {
    let (about, subject) = match verdict.about {
        About::Profile(name) => ("profile", mesh_core::change::escape(&name)),
        About::Key(key) => ("key", key.to_string()),
        About::Lifetime(lifetime) => ("lifetime", format!("{}s", lifetime.as_secs())),
        About::Service(name) => ("service", name),
        About::Name(name) => ("name", name.to_string()),
        About::Address(ip) => ("address", ip.to_string()),
    };
    match verdict.outcome {
        Ok(rule) => pb::explain_response::Verdict {
            about: about.to_owned(),
            subject,
            allowed: true,
            rule: rule.to_string(),
            ..Default::default()
        },
        Err(why) => refusal(about, subject, why.into()),
    }
}

fn refusal(about: &str, subject: String, problem: Problem) -> pb::explain_response::Verdict {
    pb::explain_response::Verdict {
        about: about.to_owned(),
        subject,
        allowed: false,
        rule: String::new(),
        code: problem.code.into(),
        why: problem.why,
        next: problem.next,
    }
}
