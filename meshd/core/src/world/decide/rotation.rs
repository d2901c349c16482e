//! Changes of authorities: started, taken a step further, taken back; roots taken offline.

use std::collections::BTreeSet;
use std::time::Duration;

use super::{At, Decided, Decision};
use crate::authority::{Authority, Bundle, Cross, Phase, Rotation, RotationKind, Standing};
use crate::certificate::CaRecord;
use crate::change::Change;
use crate::command::{Actor, Command, CommandKind};
use crate::ids::{KeyId, NodeId};
use crate::limits::{AUTHORITIES_MAX, CERTIFICATE_BYTES_MAX, NODES_MAX};
use crate::refusal::Refusal;
use crate::world::World;
use crate::world::trust::bundle_of;

/// How long a root's CRL must last when its key leaves: 300 days. It is made for a year.
const SEALED_CRL_MIN: Duration = Duration::from_secs(300 * 86_400);

impl World {
    pub(super) fn decide_start_rotation(&self, now: At<'_>, command: &Command) -> Decided {
        let Command::StartRotation { issuing, root, crosses, auto } = command else {
            return Ok(Decision::AlreadyDone);
        };
        if let Some(rotation) = self.rotation() {
            return Err(Refusal::RotationRunning { to: rotation.to.clone() });
        }
        let (from, from_root) = self.active_pair()?;
        let invalid = |what| Err(Refusal::AuthorityInvalid { what });
        let new: Vec<&CaRecord> = root.iter().chain([issuing]).collect();
        if self.authorities().len() + new.len() > AUTHORITIES_MAX {
            return Err(Refusal::Limit { what: "authorities", max: AUTHORITIES_MAX });
        }
        if issuing.is_root || root.as_ref().is_some_and(|root| !root.is_root || root.sealed) {
            return invalid("root and issuing authority are mixed up");
        }
        for ca in &new {
            if ca.der.is_empty() || ca.der.len() > CERTIFICATE_BYTES_MAX || ca.key_id.0.is_empty() {
                return invalid("its certificate is empty or too long");
            }
            if self.authority(&ca.key_id).is_some() {
                return invalid("its key was used by an authority before");
            }
        }
        let to_root = root.as_ref().map_or(&from_root, |root| &root.key_id).clone();
        if to_root == issuing.key_id {
            return invalid("root and issuing authority have one key");
        }
        if root.is_some() && !follows(crosses, &from_root, &to_root) {
            return invalid("the new root is not signed by the one before, or not the one before by it");
        }
        if root.is_none() && !crosses.is_empty() {
            return invalid("it brings a root's signature without a root");
        }
        let added: Vec<Authority> = new
            .iter()
            .map(|ca| Authority {
                key_id: ca.key_id.clone(),
                der: ca.der.clone(),
                is_root: ca.is_root,
                root: to_root.clone(),
                standing: Standing::Announced,
                exported: false,
                sealed: ca.sealed,
            })
            .collect();
        let all = self.authorities().iter().chain(&added);
        let bundle = bundle_of(self.bundle_version() + 1, &from, all, |authority| authority.standing);
        let rotation = Rotation {
            kind: if root.is_some() { RotationKind::Root } else { RotationKind::Issuing },
            phase: Phase::Trust,
            from,
            to: issuing.key_id.clone(),
            from_root,
            to_root,
            auto: *auto,
            aborted: false,
            started_at: now.at,
            phase_at: now.at,
            version: bundle.version,
        };
        let mut changes: Vec<Change> =
            added.into_iter().map(|authority| Change::AuthorityAdded { authority }).collect();
        changes.extend(crosses.iter().map(|cross| Change::RootCrossSigned { cross: cross.clone() }));
        changes.push(Change::RotationChanged { rotation: Some(rotation) });
        changes.push(Change::BundleIssued { bundle });
        Ok(Decision::Changes(changes))
    }

    pub(super) fn decide_advance_rotation(&self, now: At<'_>, actor: &Actor, version: u64) -> Decided {
        let rotation = self.rotation().ok_or(Refusal::RotationNone)?;
        if *actor == Actor::Controller && !rotation.auto {
            return Err(self.denied(actor, CommandKind::AdvanceRotation));
        }
        if version != rotation.version {
            return Err(Refusal::RotationMoved { asked: version, now: rotation.version });
        }
        let waiting = self.rotation_waits_for(now.at).unwrap_or_default();
        if !waiting.is_over() {
            return Err(Refusal::RotationWaits {
                nodes: waiting.nodes.len(),
                leaves: waiting.leaves.len(),
                crls: waiting.crls.len(),
            });
        }
        self.check_trust(now.at).map_err(|gap| Refusal::TrustGap { gap })?;
        let (standings, next) = match rotation.phase {
            Phase::Trust => {
                let issue = Rotation { phase: Phase::Issue, phase_at: now.at, ..rotation.clone() };
                (issuing_standings(rotation), Some(issue))
            }
            Phase::Issue => (self.ended_standings(rotation), None),
        };
        self.change_standings(now, &rotation.to, standings, next)
    }

    pub(super) fn decide_abort_rotation(&self, now: At<'_>, version: u64) -> Decided {
        let rotation = self.rotation().ok_or(Refusal::RotationNone)?;
        if version != rotation.version {
            return Err(Refusal::RotationMoved { asked: version, now: rotation.version });
        }
        match rotation.phase {
            // Nothing was issued under the new authority: it may go at once.
            Phase::Trust => {
                let mut standings = vec![(rotation.to.clone(), Standing::Withdrawn)];
                if rotation.kind == RotationKind::Root {
                    standings.push((rotation.to_root.clone(), Standing::Withdrawn));
                }
                self.change_standings(now, &rotation.from, standings, None)
            }
            Phase::Issue if rotation.aborted => Err(Refusal::RotationAborted),
            // Leaves of both authorities are in use: the same way back, renewing under the old one.
            Phase::Issue => {
                let back = Rotation {
                    from: rotation.to.clone(),
                    to: rotation.from.clone(),
                    from_root: rotation.to_root.clone(),
                    to_root: rotation.from_root.clone(),
                    aborted: true,
                    phase_at: now.at,
                    ..rotation.clone()
                };
                let standings = issuing_standings(&back);
                let to = back.to.clone();
                self.change_standings(now, &to, standings, Some(back))
            }
        }
    }

    pub(super) fn decide_acknowledge_bundle(&self, version: u64, nodes: &BTreeSet<NodeId>) -> Decided {
        if nodes.len() > NODES_MAX {
            return Err(Refusal::Limit { what: "nodes in a record", max: NODES_MAX });
        }
        if version > self.bundle_version() {
            return Err(Refusal::RotationMoved { asked: version, now: self.bundle_version() });
        }
        let newer = |id: &&NodeId| self.node(**id).is_some_and(|node| node.bundle < version);
        let nodes: BTreeSet<NodeId> = nodes.iter().filter(newer).copied().collect();
        if nodes.is_empty() {
            return Ok(Decision::AlreadyDone);
        }
        Ok(Decision::Changes(vec![Change::BundleAcknowledged { version, nodes }]))
    }

    pub(super) fn decide_export_root(&self, key_id: &KeyId) -> Decided {
        let root = self.root_here(key_id)?;
        if root.sealed {
            return Err(Refusal::RootSealed { root: key_id.clone() });
        }
        Ok(Decision::Changes(vec![Change::RootExported { key_id: key_id.clone() }]))
    }

    pub(super) fn decide_seal_root(&self, now: At<'_>, key_id: &KeyId) -> Decided {
        let root = self.root_here(key_id)?;
        if root.sealed {
            return Ok(Decision::AlreadyDone);
        }
        if let Some(rotation) = self.rotation() {
            return Err(Refusal::RotationRunning { to: rotation.to.clone() });
        }
        if !root.exported {
            return Err(Refusal::RootNotExported { root: key_id.clone() });
        }
        let lasts = self.crl(key_id, 0).map_or(Duration::ZERO, |crl| crl.next_update.since(now.at));
        if lasts < SEALED_CRL_MIN {
            return Err(Refusal::CrlMismatch {
                what: "the root's CRL would end too soon after its key has left",
            });
        }
        Ok(Decision::Changes(vec![Change::RootSealed { key_id: key_id.clone() }]))
    }

    /// A trusted root.
    fn root_here(&self, key_id: &KeyId) -> Result<&Authority, Refusal> {
        self.authority(key_id)
            .filter(|authority| authority.is_root && authority.standing.is_trusted())
            .ok_or_else(|| Refusal::IssuerUnknown { issuer: key_id.clone() })
    }

    fn active_pair(&self) -> Result<(KeyId, KeyId), Refusal> {
        let active = self.active_issuer().ok_or(Refusal::MeshMissing)?;
        Ok((active.key_id.clone(), active.root.clone()))
    }

    /// Who goes when `rotation` ends, and how it is remembered.
    fn ended_standings(&self, rotation: &Rotation) -> Vec<(KeyId, Standing)> {
        let end = if rotation.aborted { Standing::Withdrawn } else { Standing::Retired };
        let issuers = self
            .trusted_authorities()
            .filter(|authority| !authority.is_root && self.leaves_with(rotation, &authority.key_id));
        let mut standings: Vec<_> = issuers.map(|issuer| (issuer.key_id.clone(), end)).collect();
        if rotation.kind == RotationKind::Root {
            standings.push((rotation.from_root.clone(), end));
        }
        standings
    }

    /// The changes that give authorities their new standings, if every leaf in use verifies afterwards.
    fn change_standings(
        &self,
        now: At<'_>,
        issuer: &KeyId,
        standings: Vec<(KeyId, Standing)>,
        next: Option<Rotation>,
    ) -> Decided {
        let bundle = self.next_bundle(issuer, &standings);
        self.check_next(now, &bundle)?;
        let next = next.map(|rotation| Rotation { version: bundle.version, ..rotation });
        let mut changes: Vec<Change> = standings
            .into_iter()
            .map(|(key_id, standing)| Change::AuthorityStanding { key_id, standing })
            .collect();
        changes.push(Change::RotationChanged { rotation: next });
        changes.push(Change::BundleIssued { bundle });
        Ok(Decision::Changes(changes))
    }

    /// What is in use must verify with the next bundle, and what is issued next with those in use.
    fn check_next(&self, now: At<'_>, next: &Bundle) -> Result<(), Refusal> {
        if !next.vouches_for(&next.issuer) {
            return Err(Refusal::AuthorityInvalid { what: "the issuing authority is below no trusted root" });
        }
        if let Some(leaf) = self.leaves_in_use(now.at).find(|leaf| !next.vouches_for(&leaf.issuer_key_id)) {
            return Err(Refusal::LeafInUse { serial: leaf.serial, issuer: leaf.issuer_key_id.clone() });
        }
        let blind = self.nodes().filter(|node| node.is_live(now.at)).find(|node| {
            let held = self.state.bundles.range(node.holds_from()..).map(|(_, bundle)| bundle);
            held.into_iter().any(|bundle| !bundle.vouches_for(&next.issuer))
        });
        match blind {
            Some(node) => Err(Refusal::NodeBlind { node: node.name.clone(), issuer: next.issuer.clone() }),
            None => Ok(()),
        }
    }
}

fn issuing_standings(rotation: &Rotation) -> Vec<(KeyId, Standing)> {
    let mut standings =
        vec![(rotation.to.clone(), Standing::Active), (rotation.from.clone(), Standing::Retiring)];
    if rotation.kind == RotationKind::Root {
        standings.push((rotation.to_root.clone(), Standing::Active));
        standings.push((rotation.from_root.clone(), Standing::Retiring));
    }
    standings
}

/// Each of both roots vouches for the other: the way there, and the way back.
fn follows(crosses: &[Cross], from: &KeyId, to: &KeyId) -> bool {
    let has = |root: &KeyId, by: &KeyId| {
        crosses.iter().any(|cross| {
            cross.root == *root
                && cross.by == *by
                && !cross.der.is_empty()
                && cross.der.len() <= CERTIFICATE_BYTES_MAX
        })
    };
    crosses.len() == 2 && has(to, from) && has(from, to)
}
