use std::sync::Arc;

use mesh_core::world::CrlState;
use mesh_core::{Authority, Command, UtcTime, World};
use mesh_proto::v1 as pb;
use tonic::{Request, Response, Status};

use crate::auth::Caller;
use crate::authority::{CaFacts, CaRole};
use crate::config::Unlock;
use crate::parts::Parts;
use crate::state::room_taken;
use crate::status::Problem;

/// A node's clock that differs by more than this is a finding.
const CLOCK_OFFSET_FINDING_SECS: u64 = 60;
/// Parts of a CA's life, in per cent, at whose beginning it is a finding, and a graver one.
const CA_LIFE_LEFT: [(u32, &str); 3] = [(5, "bad"), (20, "warn"), (50, "warn")];
/// An offline root's CRL that ends sooner than this is a finding: 60 days.
const OFFLINE_CRL_ENDS_SOON: std::time::Duration = std::time::Duration::from_secs(60 * 24 * 3600);

#[derive(Debug)]
pub(crate) struct FleetService(pub(crate) Arc<Parts>);

#[tonic::async_trait]
impl pb::fleet_server::Fleet for FleetService {
    async fn status(&self, _: Request<pb::Empty>) -> Result<Response<pb::FleetStatus>, Status> {
        let store = Arc::clone(&self.0);
        // Looking at the disk must not keep a worker from its streams.
        let store = self.0.issuing.on_pool(move || store.store_info()).await?;
        Ok(Response::new(pb::FleetStatus { store: Some(store), ..self.0.fleet_status() }))
    }

    async fn confirm_clock(
        &self,
        request: Request<pb::ConfirmClockRequest>,
    ) -> Result<Response<pb::ActionResponse>, Status> {
        let caller = Caller::from_extensions(request.extensions())?;
        let operation = super::operation(&request.into_inner().operation_id)?;
        let committed = self.0.submit(&caller, operation, Command::ConfirmClock).await?;
        let detail = match committed.changed() {
            true => format!("the clock counts again; it is {}", self.0.utc()),
            false => "the clock was not held".to_owned(),
        };
        Ok(Response::new(pb::ActionResponse { changed: committed.changed(), detail, incomplete: false }))
    }
}

impl Parts {
    /// What is on disk. Blocks.
    fn store_info(&self) -> Result<pb::StoreInfo, Problem> {
        let reader = self.archive.reader();
        let first_seq = reader.base().seq + 1;
        let oldest = reader.record(first_seq);
        let oldest = oldest.map_err(|error| Problem::internal_error("cannot read the journal", &error))?;
        Ok(pb::StoreInfo {
            bytes: room_taken(self.state.root(), 0),
            first_seq,
            oldest: oldest.map_or(0, |record| record.time_secs),
            retention_secs: self.retention.map_or(0, |retention| retention.as_secs()),
        })
    }

    fn fleet_status(&self) -> pb::FleetStatus {
        let (now, nodes) = (self.utc(), self.nodes());
        let authority = self.issuing.authority();
        let issuer = authority.issuer_key_id(CaRole::Issuing);
        let findings = self.findings(&nodes, now);
        // Nodes that are healthy now: those that are already expired do not shorten what the others have.
        let survives_until = nodes
            .iter()
            .filter(|node| matches!(node.state.as_str(), "ok" | "late" | "offline"))
            .map(|node| node.not_after)
            .min()
            .unwrap_or(0);
        self.directory.read(|world| {
            let newest = |crl: &&CrlState| (crl.this_update, crl.number);
            let crl = world.crls().filter(|crl| crl.issuer_key_id == issuer).max_by_key(newest);
            pb::FleetStatus {
                fleet: world.fleet().unwrap_or_default().to_owned(),
                trust_domain: authority.domain().to_string(),
                root_not_after: UtcTime::from(authority.root_not_after()).unix(),
                issuing_not_after: UtcTime::from(authority.issuing_not_after()).unix(),
                crl_number: crl.map_or(0, |crl| crl.number),
                crl_this_update: crl.map_or(0, |crl| crl.this_update.unix()),
                survives_until,
                nodes,
                findings,
                controller: self.controller_name.clone(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                head_seq: world.head_seq(),
                controller_time: now.unix(),
                crl_signed_at: crl.map_or(0, |crl| signed_at(crl.this_update)),
                store: None,
            }
        })
    }

    fn findings(&self, nodes: &[pb::Node], now: UtcTime) -> Vec<pb::Finding> {
        let mut findings = Vec::new();
        if self.unlock == Unlock::None {
            findings.push(finding(
                &self.controller_name,
                "the CA's keys are not sealed: whoever reads the disk is the CA",
                "make a new mesh with --unlock passphrase when this one matters",
            ));
        }
        if self.directory.read(|world| world.clock_held()) {
            findings.push(finding(
                &self.controller_name,
                "the clock jumped; time-dependent changes wait",
                "check the controller's clock, then `meshctl clock confirm`",
            ));
        }
        self.directory.read(|world| {
            for known in [world.active_root(), world.active_issuer()].into_iter().flatten() {
                findings.extend(self.ca_finding(world, known, now));
            }
        });
        for node in nodes {
            self.node_findings(node, &mut findings);
        }
        findings
    }

    /// That a CA in use has little of its life left, or, if its key is offline, its CRL.
    fn ca_finding(&self, world: &World, known: &Authority, now: UtcTime) -> Option<pb::Finding> {
        let facts = CaFacts::read(&known.der)?;
        let (kind, next) = match known.is_root {
            true => ("root", "meshctl ca rotate start --root"),
            false => ("issuing CA", "meshctl ca rotate start"),
        };
        let (start, end) = (UtcTime::from(facts.not_before), UtcTime::from(facts.not_after));
        if let Some((left, severity)) = life_left(start, end, now) {
            let what = format!("the {kind} has less than {left} % of its life left: it ends at {end}");
            let severity = severity.to_owned();
            return Some(pb::Finding { severity, ..finding(&self.controller_name, &what, next) });
        }
        let crl = world.crl(&known.key_id, 0).filter(|_| known.sealed)?;
        (crl.next_update.since(now) < OFFLINE_CRL_ENDS_SOON).then(|| {
            finding(
                &self.controller_name,
                &format!("the offline root's CRL ends at {}", crl.next_update),
                "meshctl ca rotate start --request-out FILE, then sign it where the root's key is: the answer holds a new CRL",
            )
        })
    }

    fn node_findings(&self, node: &pb::Node, findings: &mut Vec<pb::Finding>) {
        let on_node = format!("on {}: meshctl doctor", node.name);
        match node.state.as_str() {
            "late" => findings.push(finding(&node.name, "certificate renews late", &on_node)),
            "expired" => findings.push(finding(
                &node.name,
                "certificate has expired",
                "start meshd on the node: it resumes by itself within 30 days",
            )),
            "pending" => findings.push(finding(
                &node.name,
                "waits for approval",
                &format!("meshctl node approve {}", node.name),
            )),
            _ => {}
        }
        for own in &node.findings {
            findings.push(finding(&node.name, own, &on_node));
        }
        let presence = self.presence.of(mesh_core::NodeId(node.id));
        if presence.is_doubled() {
            findings.push(finding(
                &node.name,
                "two machines use this node's key in turn",
                &format!(
                    "if {} was copied, revoke it and enroll each machine with a token of its own",
                    node.name
                ),
            ));
        }
        if presence.forked {
            findings.push(finding(
                &node.name,
                "it has seen records that are not in this journal",
                "was an older copy of the controller's state started? then see `meshctl audit verify`",
            ));
        }
        let offset = presence.clock_offset_secs;
        if presence.connected && offset.unsigned_abs() > CLOCK_OFFSET_FINDING_SECS {
            let direction = if offset > 0 { "ahead" } else { "behind" };
            findings.push(finding(
                &node.name,
                &format!("clock is {} s {direction}", offset.unsigned_abs()),
                "set the node's clock, e.g. by NTP",
            ));
        }
    }
}

/// When a CRL was signed: its thisUpdate is backdated.
pub(crate) fn signed_at(this_update: UtcTime) -> i64 {
    (this_update + mesh_ca::CLOCK_SKEW_ALLOWANCE).unix()
}

/// What is left at `now` of a life from `start` to `end`, and its part of the whole.
pub(crate) fn remaining_life(start: UtcTime, end: UtcTime, now: UtcTime) -> (std::time::Duration, f64) {
    let (life, left) = (end.since(start), end.since(now));
    (left, left.as_secs_f64() / life.as_secs_f64().max(1.0))
}

/// The smallest of the marks that a life from `start` to `end` has fallen below at `now`.
fn life_left(start: UtcTime, end: UtcTime, now: UtcTime) -> Option<(u32, &'static str)> {
    let (life, left) = (end.since(start).as_secs(), end.since(now).as_secs());
    CA_LIFE_LEFT.into_iter().find(|(mark, _)| left * 100 < life * u64::from(*mark))
}

fn finding(subject: &str, what: &str, next: &str) -> pb::Finding {
    pb::Finding {
        subject: subject.to_owned(),
        what: what.to_owned(),
        next: next.to_owned(),
        severity: "warn".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ca_is_a_finding_at_half_a_fifth_and_a_twentieth_of_its_life() {
        let at = |percent_left: i64| UtcTime(1_000_000 - percent_left * 10_000);
        let left = |now| life_left(UtcTime(0), UtcTime(1_000_000), now).map(|(mark, _)| mark);
        for (percent, mark) in [
            (100, None),
            (50, None),
            (49, Some(50)),
            (20, Some(50)),
            (19, Some(20)),
            (5, Some(20)),
            (4, Some(5)),
            (0, Some(5)),
        ] {
            assert_eq!(left(at(percent)), mark, "{percent} % left");
        }
        assert_eq!(left(UtcTime(2_000_000)), Some(5), "past its end");
        assert_eq!(life_left(UtcTime(0), UtcTime(100), UtcTime(99)), Some((5, "bad")));
    }
}
