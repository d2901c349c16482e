//! Authorities, bundles and rotations, read from World.

use std::collections::BTreeMap;

use super::{Node, NodeState, World};
use crate::authority::{Authority, Bundle, Cross, Gap, Rotation, Standing, Waiting, find_gap};
use crate::certificate::Owner;
use crate::ids::{KeyId, NodeId, Serial};
use crate::time::UtcTime;
use crate::world::CertificateState;

impl World {
    /// Every authority there ever was, in the order of their coming.
    pub fn authorities(&self) -> &[Authority] {
        &self.state.authorities
    }

    pub fn authority(&self, key_id: &KeyId) -> Option<&Authority> {
        self.state.authorities.iter().find(|authority| authority.key_id == *key_id)
    }

    /// Those that nodes trust now.
    pub fn trusted_authorities(&self) -> impl Iterator<Item = &Authority> {
        self.state.authorities.iter().filter(|authority| authority.standing.is_trusted())
    }

    /// Whether an authority still answers for what it issued, by CRL and OCSP: it is trusted, or certificates that it
    /// issued are remembered, because they have not ended or are not on a last CRL yet; of a root, if an authority
    /// below it answers.
    pub fn answers(&self, authority: &Authority) -> bool {
        let has_issued = |issuer: &Authority| self.index.issued.contains_key(&issuer.key_id);
        authority.standing.is_trusted()
            || match authority.is_root {
                false => has_issued(authority),
                true => {
                    let below = |issuer: &&Authority| !issuer.is_root && issuer.root == authority.key_id;
                    self.state.authorities.iter().filter(below).any(has_issued)
                }
            }
    }

    /// Those that [answer](Self::answers), in the order of their coming.
    pub fn answering_authorities(&self) -> impl Iterator<Item = &Authority> {
        self.state.authorities.iter().filter(|authority| self.answers(authority))
    }

    /// Whether nodes trust `issuer` now.
    pub fn is_trusted(&self, issuer: &KeyId) -> bool {
        self.authority(issuer).is_some_and(|authority| authority.standing.is_trusted())
    }

    /// The authority that issues leaves.
    pub fn active_issuer(&self) -> Option<&Authority> {
        self.authority(&self.bundle()?.issuer)
    }

    /// The root above [`active_issuer`](Self::active_issuer): what join tokens pin.
    pub fn active_root(&self) -> Option<&Authority> {
        self.authority(&self.active_issuer()?.root)
    }

    /// What nodes are to trust now; `None` before the first record.
    pub fn bundle(&self) -> Option<&Bundle> {
        self.state.bundles.last_key_value().map(|(_, bundle)| bundle)
    }

    /// 0 before the first record.
    pub fn bundle_version(&self) -> u64 {
        self.bundle().map_or(0, |bundle| bundle.version)
    }

    /// The rotation under way.
    pub fn rotation(&self) -> Option<&Rotation> {
        self.state.rotation.as_ref()
    }

    /// The signed history of the active root: certificates that lead to it from roots before, nearest first.
    /// Whoever pins any of these can follow.
    pub fn lineage(&self) -> Vec<&Cross> {
        self.active_root().map(|active| self.lineage_of(&active.key_id)).unwrap_or_default()
    }

    /// The signed history of every trusted root, the active one's first: whoever pins any of their predecessors, or one of
    /// them, can follow to all.
    pub fn history(&self) -> Vec<&Cross> {
        let mut found = self.lineage();
        for root in self.trusted_authorities().filter(|authority| authority.is_root) {
            for cross in self.lineage_of(&root.key_id) {
                if !found.contains(&cross) {
                    found.push(cross);
                }
            }
        }
        found
    }

    fn lineage_of<'a>(&'a self, root: &'a KeyId) -> Vec<&'a Cross> {
        let mut found: Vec<&Cross> = Vec::new();
        let mut reached = vec![root];
        let mut next = 0;
        while let Some(root) = reached.get(next).copied() {
            next += 1;
            // Newest first: after an abort the way back is shorter than the way there.
            for cross in self.state.crosses.iter().rev().filter(|cross| cross.root == *root) {
                if !reached.contains(&&cross.by) {
                    reached.push(&cross.by);
                    found.push(cross);
                }
            }
        }
        found
    }

    /// What the rotation's next step waits for at `at`; `None` without a rotation.
    pub fn rotation_waits_for(&self, at: UtcTime) -> Option<Waiting> {
        let rotation = self.rotation()?;
        let mut waiting = Waiting::default();
        for node in self.nodes().filter(|node| node.state == NodeState::Active) {
            if !node.is_live(at) {
                waiting.away.push(node.id);
            } else if node.bundle < rotation.version {
                waiting.nodes.push(node.id);
            }
        }
        match rotation.phase {
            crate::authority::Phase::Trust => {
                let new = [&rotation.to, &rotation.to_root];
                waiting.crls = new
                    .into_iter()
                    .filter(|issuer| {
                        self.crl_shards(issuer).into_iter().any(|shard| self.crl(issuer, shard).is_none())
                    })
                    .cloned()
                    .collect();
                waiting.crls.dedup();
            }
            crate::authority::Phase::Issue => {
                let leaving = |leaf: &&CertificateState| self.leaves_with(rotation, &leaf.issuer_key_id);
                waiting.leaves = self.leaves_in_use(at).filter(leaving).map(|leaf| leaf.serial).collect();
            }
        }
        Some(waiting)
    }

    /// Whether an issuing authority goes when `rotation` ends.
    pub(super) fn leaves_with(&self, rotation: &Rotation, issuer: &KeyId) -> bool {
        *issuer == rotation.from
            || (rotation.from_root != rotation.to_root
                && self.authority(issuer).is_some_and(|issuer| issuer.root == rotation.from_root))
    }

    /// Leaves that somebody may show at `at`: live ones, less those that a newer one of the same holder has
    /// replaced for certain.
    pub fn leaves_in_use(&self, at: UtcTime) -> impl Iterator<Item = &CertificateState> {
        let mut newest: BTreeMap<(NodeId, &str), u64> = BTreeMap::new();
        for leaf in self.certificates().filter(|leaf| leaf.is_live(at)) {
            if let Owner::Service { node, .. } = &leaf.owner {
                let seq = newest.entry((*node, leaf.pair_name.as_str())).or_default();
                *seq = (*seq).max(leaf.issued_seq);
            }
        }
        self.certificates().filter(move |leaf| leaf.is_live(at)).filter(move |leaf| match &leaf.owner {
            Owner::Controller { .. } => self.controller_serial() == Some(leaf.serial),
            Owner::Node(id) => self.node(*id).is_some_and(|node| node.may_show(&leaf.serial)),
            Owner::Service { node, .. } => {
                newest.get(&(*node, leaf.pair_name.as_str())) == Some(&leaf.issued_seq)
            }
            Owner::Operator(name) => {
                self.operator(name).is_some_and(|operator| operator.serial == Some(leaf.serial))
            }
            Owner::Detached { .. } => true,
        })
    }

    /// Whether every leaf in use at `at` verifies under every bundle that a live node may use.
    ///
    /// # Errors
    /// The first leaf that would not.
    pub fn check_trust(&self, at: UtcTime) -> Result<(), Gap> {
        let issuers: BTreeMap<KeyId, Serial> =
            self.leaves_in_use(at).map(|leaf| (leaf.issuer_key_id.clone(), leaf.serial)).collect();
        let mut holders: Vec<(u64, NodeId)> =
            self.nodes().filter(|node| node.is_live(at)).map(|node| (node.holds_from(), node.id)).collect();
        holders.sort_unstable();
        // A node may have taken up anything from what it acknowledged to the newest.
        let in_use = self.state.bundles.values().filter_map(|bundle| {
            let (_, holder) = holders.first().filter(|(has, _)| *has <= bundle.version)?;
            Some((bundle, *holder))
        });
        match find_gap(&issuers, in_use) {
            Some(gap) => Err(gap),
            None => Ok(()),
        }
    }

    /// Bundles that a node with a live identity may use at `at`; the newest is among them.
    pub fn bundles_in_use(&self, at: UtcTime) -> impl Iterator<Item = &Bundle> {
        let held = self.nodes().filter(|node| node.is_live(at)).map(Node::holds_from).min();
        let oldest = held.unwrap_or(u64::MAX).min(self.bundle_version());
        self.state.bundles.range(oldest..).map(|(_, bundle)| bundle)
    }

    /// The bundle that follows once authorities have other standings.
    pub(super) fn next_bundle(&self, issuer: &KeyId, standings: &[(KeyId, Standing)]) -> Bundle {
        let standing = |authority: &Authority| {
            let changed = standings.iter().find(|(key_id, _)| *key_id == authority.key_id);
            changed.map_or(authority.standing, |(_, standing)| *standing)
        };
        bundle_of(self.bundle_version() + 1, issuer, &self.state.authorities, standing)
    }
}

/// What `authorities` come to with these standings.
pub(super) fn bundle_of<'a>(
    version: u64,
    issuer: &KeyId,
    authorities: impl IntoIterator<Item = &'a Authority>,
    standing: impl Fn(&Authority) -> Standing,
) -> Bundle {
    let mut bundle =
        Bundle { version, roots: Default::default(), issuers: Default::default(), issuer: issuer.clone() };
    for authority in authorities.into_iter().filter(|authority| standing(authority).is_trusted()) {
        if authority.is_root {
            bundle.roots.insert(authority.key_id.clone());
        } else {
            bundle.issuers.insert(authority.key_id.clone(), authority.root.clone());
        }
    }
    bundle
}

impl Node {
    /// Whether it has an identity that holds at `at`.
    pub fn is_live(&self, at: UtcTime) -> bool {
        self.state == NodeState::Active
            && self.current.as_ref().is_some_and(|identity| at < identity.not_after)
    }

    /// The oldest bundle that it may use.
    pub fn holds_from(&self) -> u64 {
        self.bundle.max(self.given)
    }

    /// The identity before the current one counts as long as the current one may not have arrived.
    fn may_show(&self, serial: &Serial) -> bool {
        self.state == NodeState::Active
            && (self.current.as_ref().is_some_and(|identity| identity.serial == *serial)
                || (!self.proved && self.previous == Some(*serial)))
    }
}
