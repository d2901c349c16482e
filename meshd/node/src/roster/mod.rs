//! Who the peers are: the map as the controller tells it, and what of it the chains vouch for.
//! Performs no I/O.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};
use mesh_proto::v1 as pb;
use sha2::{Digest as _, Sha256};
use time::UtcDateTime;

use crate::limits::PEERS_PER_MAP_MAX;
use crate::pki::{NodeLeaf, Trust, TrustError};
use crate::state::Floor;

/// Maps smaller than this may shrink as they like.
const SHRINK_MATTERS_FROM: usize = 4;

/// Another node as this one sees it. All but the direction and the tags come from its certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Peer {
    pub(crate) leaf: NodeLeaf,
    /// May open connections to us.
    pub(crate) inbound: bool,
    /// We may open connections to it.
    pub(crate) outbound: bool,
    pub(crate) tags: Vec<String>,
}

impl Peer {
    /// The key to speak to.
    pub(crate) fn wireguard_key(&self) -> [u8; 32] {
        self.leaf.wireguard_keys[0]
    }
}

/// Why a whole map was not taken. Nothing has changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RosterError {
    #[error("map has no cursor")]
    NoCursor,
    #[error("map ends at {found}, {floor} was seen already")]
    Rollback { found: u64, floor: u64 },
    #[error("changes start from another map than the one that is here")]
    OtherBase,
    #[error("map has {0} peers, {PEERS_PER_MAP_MAX} is the limit")]
    TooManyPeers(usize),
}

/// Why one record is left out; the others stand.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RecordError {
    #[error(transparent)]
    Trust(TrustError),
    #[error("record {0} holds the certificate of another node")]
    OtherNode(u32),
    #[error("address {0} is outside the mesh")]
    OutsideMesh(std::net::IpAddr),
    #[error("it claims what is ours")]
    Ours,
    #[error("it claims what {0} has")]
    Duplicate(String),
}

/// Where this node stands in the mesh; what no peer may claim.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) node_id: u32,
    pub(crate) name: String,
    pub(crate) ipv4: Ipv4Addr,
    pub(crate) ipv6: Ipv6Addr,
    pub(crate) ipv4_pool: Ipv4Net,
    pub(crate) ipv6_prefix: Ipv6Net,
    pub(crate) wireguard_keys: Vec<[u8; 32]>,
}

/// What the roster comes to at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Evaluation {
    pub(crate) peers: BTreeMap<u32, Peer>,
    pub(crate) refused: BTreeMap<u32, RecordError>,
    /// When the next lease ends, controller time.
    pub(crate) next_end: Option<UtcDateTime>,
}

/// The map as told, verified leaves beside it.
#[derive(Debug, Default)]
pub(crate) struct Roster {
    cursor: Option<pb::Cursor>,
    own: pb::Own,
    issuers: Vec<bytes::Bytes>,
    records: BTreeMap<u32, pb::Peer>,
    floor: Floor,
    /// Records that a whole map lacked unasked, and that stay; see [`apply_full`](Self::apply_full).
    held: BTreeSet<u32>,
    /// By SHA-256 of the leaf. Emptied when issuers or CRLs change.
    verified: HashMap<[u8; 32], NodeLeaf>,
}

impl Roster {
    /// Starts empty, above `floor`.
    pub(crate) fn new(floor: Floor) -> Self {
        Self { floor, ..Self::default() }
    }

    pub(crate) fn cursor(&self) -> Option<&pb::Cursor> {
        self.cursor.as_ref()
    }

    pub(crate) fn own(&self) -> &pb::Own {
        &self.own
    }

    /// Whether the map has an entry for this node.
    pub(crate) fn has(&self, id: u32) -> bool {
        self.records.contains_key(&id)
    }

    pub(crate) fn seq(&self) -> u64 {
        self.cursor.as_ref().map_or(0, |cursor| cursor.seq)
    }

    pub(crate) fn issuers(&self) -> impl Iterator<Item = &[u8]> {
        self.issuers.iter().map(|der| der.as_ref())
    }

    /// Forgets which leaves were verified: issuers or CRLs have changed.
    pub(crate) fn doubt(&mut self) {
        self.verified.clear();
    }

    /// Replaces everything, but for peers that are held.
    ///
    /// A map that lacks more than half the peers though nothing says why is more likely a controller that lost
    /// its memory than a fleet that did. Everything in it takes effect; the peers that it lacks are **held**: they
    /// stay as they are. Held peers go as soon as something says why: their certificate is on a CRL, its lease
    /// ends (72 h, and nobody renews what the controller does not know), changes name them as removed, or a
    /// map comes with another policy or other tags of ours. So no revocation waits for the controller's map.
    ///
    /// # Errors
    /// [`RosterError::Rollback`] for a map older than one seen in the same incarnation.
    pub(crate) fn apply_full(&mut self, full: pb::Full, trust: &Trust) -> Result<(), RosterError> {
        let cursor = full.cursor.clone().ok_or(RosterError::NoCursor)?;
        if self.floor.is_above(&cursor) {
            return Err(RosterError::Rollback { found: cursor.seq, floor: self.floor.seq });
        }
        if full.peers.len() > PEERS_PER_MAP_MAX {
            return Err(RosterError::TooManyPeers(full.peers.len()));
        }
        let own = full.own.clone().unwrap_or_default();
        let mut records: BTreeMap<u32, pb::Peer> =
            readable(full.read_peers()).map(|peer| (peer.node_id, peer)).collect();
        self.held = self.missing_unasked(&own, &records, trust);
        for id in &self.held {
            records.extend(self.records.remove_entry(id));
        }
        self.floor = Floor::of(&cursor);
        self.cursor = Some(cursor);
        self.own = own;
        self.issuers = full.issuers;
        self.records = records;
        self.forget_unused();
        Ok(())
    }

    /// The peers that stay though the last whole map lacked them.
    pub(crate) fn held(&self) -> &BTreeSet<u32> {
        &self.held
    }

    /// Applies changes since the cursor that is here. Absent `own` and empty lists mean unchanged.
    ///
    /// # Errors
    /// [`RosterError::OtherBase`] if they start elsewhere: the whole map is needed.
    pub(crate) fn apply_delta(&mut self, delta: pb::Delta) -> Result<(), RosterError> {
        let cursor = delta.cursor.clone().ok_or(RosterError::NoCursor)?;
        if self.cursor.is_none() || delta.from != self.cursor {
            return Err(RosterError::OtherBase);
        }
        if self.floor.is_above(&cursor) {
            return Err(RosterError::Rollback { found: cursor.seq, floor: self.floor.seq });
        }
        let count = self.records.len() + delta.upserts.len();
        if count > PEERS_PER_MAP_MAX + delta.removes.len() {
            return Err(RosterError::TooManyPeers(count));
        }
        for id in &delta.removes {
            self.records.remove(id);
            self.held.remove(id);
        }
        for peer in readable(delta.read_upserts()) {
            self.held.remove(&peer.node_id);
            self.records.insert(peer.node_id, peer);
        }
        for issuer in delta.issuers {
            if !self.issuers.contains(&issuer) {
                self.issuers.push(issuer);
            }
        }
        if let Some(own) = delta.own {
            if self.asks_for_less(&own) {
                let held = std::mem::take(&mut self.held);
                self.records.retain(|id, _| !held.contains(id));
            }
            self.own = own;
        }
        self.floor = Floor::of(&cursor);
        self.cursor = Some(cursor);
        self.forget_unused();
        Ok(())
    }

    /// The map in the form that is stored.
    pub(crate) fn to_full(&self, crls: Vec<pb::CrlHave>) -> pb::Full {
        pb::Full {
            cursor: self.cursor.clone(),
            own: Some(self.own.clone()),
            issuers: self.issuers.clone(),
            peers: self.records.values().map(pb::Peer::to_entry).collect(),
            crls,
            // What is trusted stands with the identity.
            trust: None,
        }
    }

    /// Which peers the chains vouch for at `now` (controller time). One bad record does not touch the others.
    pub(crate) fn evaluate(&mut self, trust: &Trust, place: &Place, now: UtcDateTime) -> Evaluation {
        let mut result = Evaluation::default();
        let mut claims: HashMap<Claim, u32> = HashMap::new();
        let mut let_go = Vec::new();
        // What the map says goes before what is held against it.
        let (held, told): (Vec<_>, Vec<_>) = self.records.iter().partition(|(id, _)| self.held.contains(*id));
        for (&id, record) in told.into_iter().chain(held) {
            let checked = verified_leaf(&mut self.verified, record, trust, now)
                .and_then(|leaf| check_place(id, &leaf, place).map(|()| leaf));
            let leaf = match checked {
                Ok(leaf) => leaf,
                // Revoked or past its end: now there is a reason why the map lacks it.
                Err(_) if self.held.contains(&id) => {
                    let_go.push(id);
                    continue;
                }
                Err(error) => {
                    result.refused.insert(id, error);
                    continue;
                }
            };
            let taken = claims_of(&leaf).find_map(|claim| claims.get(&claim).copied());
            if taken.is_some() && self.held.contains(&id) {
                let_go.push(id);
                continue;
            }
            if let Some(other) = taken {
                let name = result.peers.get(&other).map_or_else(String::new, |peer| peer.leaf.name.clone());
                result.refused.insert(id, RecordError::Duplicate(name));
                continue;
            }
            claims.extend(claims_of(&leaf).map(|claim| (claim, id)));
            result.next_end =
                Some(result.next_end.map_or(leaf.chain_not_after, |end| end.min(leaf.chain_not_after)));
            let peer =
                Peer { leaf, inbound: record.inbound, outbound: record.outbound, tags: record.tags.clone() };
            result.peers.insert(id, peer);
        }
        for id in let_go {
            self.held.remove(&id);
            self.records.remove(&id);
        }
        result
    }

    /// Whether `own` differs in what decides whom we see.
    fn asks_for_less(&self, own: &pb::Own) -> bool {
        own.policy_version != self.own.policy_version || own.tags != self.own.tags
    }

    /// The peers that `records` lack for no reason we know, if they are too many to be believed gone. What was
    /// held before stays so, however few they are.
    fn missing_unasked(
        &self,
        own: &pb::Own,
        records: &BTreeMap<u32, pb::Peer>,
        trust: &Trust,
    ) -> BTreeSet<u32> {
        if self.asks_for_less(own) {
            return BTreeSet::new();
        }
        let missing = self.records.iter().filter(|(id, record)| {
            let leaf = self.verified.get(&hash(&record.leaf));
            // Never verified means it was no peer; a revoked one is missing for good reason.
            !records.contains_key(id) && leaf.is_some_and(|leaf| !trust.is_revoked(&leaf.serial))
        });
        let missing: BTreeSet<u32> = missing.map(|(id, _)| *id).collect();
        let known = self.records.len();
        let suddenly = missing.difference(&self.held).count();
        if known >= SHRINK_MATTERS_FROM && suddenly * 2 > known - self.held.len() {
            return missing;
        }
        missing.intersection(&self.held).copied().collect()
    }

    fn forget_unused(&mut self) {
        let used: BTreeSet<[u8; 32]> = self.records.values().map(|record| hash(&record.leaf)).collect();
        self.verified.retain(|leaf, _| used.contains(leaf));
    }
}

/// The entries that can be read; one that cannot is left out, and said.
fn readable(
    entries: impl Iterator<Item = Result<pb::Peer, prost::DecodeError>>,
) -> impl Iterator<Item = pb::Peer> {
    entries.filter_map(|entry| {
        entry.inspect_err(|error| tracing::warn!(%error, "an entry of the map cannot be read: left out")).ok()
    })
}

/// What only one peer may have.
#[derive(PartialEq, Eq, Hash)]
enum Claim {
    Name(String),
    Ipv4(Ipv4Addr),
    Ipv6(Ipv6Addr),
    Key([u8; 32]),
}

fn claims_of(leaf: &NodeLeaf) -> impl Iterator<Item = Claim> + '_ {
    [Claim::Name(leaf.name.clone()), Claim::Ipv4(leaf.ipv4), Claim::Ipv6(leaf.ipv6)]
        .into_iter()
        .chain(leaf.wireguard_keys.iter().map(|key| Claim::Key(*key)))
}

fn verified_leaf(
    cache: &mut HashMap<[u8; 32], NodeLeaf>,
    record: &pb::Peer,
    trust: &Trust,
    now: UtcDateTime,
) -> Result<NodeLeaf, RecordError> {
    let key = hash(&record.leaf);
    if let Some(leaf) = cache.get(&key).filter(|leaf| leaf.not_before <= now && now <= leaf.chain_not_after) {
        return Ok(leaf.clone());
    }
    // Past its end the full check says why; only good news is kept.
    let leaf = trust.judge_node(&record.leaf, now).map_err(RecordError::Trust)?;
    cache.insert(key, leaf.clone());
    Ok(leaf)
}

fn check_place(id: u32, leaf: &NodeLeaf, place: &Place) -> Result<(), RecordError> {
    if !place.ipv4_pool.contains(&leaf.ipv4) {
        return Err(RecordError::OutsideMesh(leaf.ipv4.into()));
    }
    if !place.ipv6_prefix.contains(&leaf.ipv6) {
        return Err(RecordError::OutsideMesh(leaf.ipv6.into()));
    }
    // The host part of the IPv6 address is the node's id (design §3), so that a record cannot carry
    // another node's certificate: removing one id would leave the other's peer.
    let host = u128::from(leaf.ipv6) & (u128::MAX >> place.ipv6_prefix.prefix_len());
    if host != u128::from(id) {
        return Err(RecordError::OtherNode(id));
    }
    let ours = id == place.node_id
        || leaf.name == place.name
        || leaf.ipv4 == place.ipv4
        || leaf.ipv6 == place.ipv6
        || leaf.wireguard_keys.iter().any(|key| place.wireguard_keys.contains(key));
    if ours { Err(RecordError::Ours) } else { Ok(()) }
}

fn hash(leaf: &[u8]) -> [u8; 32] {
    Sha256::digest(leaf).into()
}

#[cfg(test)]
mod tests;
