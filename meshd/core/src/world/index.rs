//! Look-ups derived from the state; rebuilt when a snapshot is read.

use std::borrow::{Borrow, Cow};
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use super::{CertificateState, Node, State};
use crate::certificate::{Owner, PROFILE_OCSP, Revocation};
use crate::ids::{KeyHash, KeyId, NodeId, OperationId, Serial, WgKey};
use crate::names::{DnsName, NodeName};
use crate::time::UtcTime;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Index {
    pub(super) node_by_name: BTreeMap<NodeName, NodeId>,
    /// Every key that a node ever vouched for.
    pub(super) node_by_wireguard: BTreeMap<WgKey, NodeId>,
    pub(super) node_by_ipv4: BTreeMap<Ipv4Addr, NodeId>,
    /// By the TLS key with which the node asked for entry.
    pub(super) node_by_enrollment_key: BTreeMap<KeyHash, NodeId>,
    pub(super) serials_by_key: BTreeMap<KeyHash, BTreeSet<Serial>>,
    /// Whom a key speaks for by certificates that are not revoked, and by how many: one key may have hundreds.
    pub(super) users_by_key: BTreeMap<KeyHash, BTreeMap<Owner, usize>>,
    pub(super) serials_by_node: BTreeMap<NodeId, BTreeSet<Serial>>,
    /// By host name, address and name of the pair.
    pub(super) serials_by_name: BTreeMap<String, BTreeSet<Serial>>,
    /// By the label directly under the domain.
    pub(super) serials_by_label: BTreeMap<String, BTreeSet<Serial>>,
    /// Revoked certificates by issuer and shard, with all that their CRL says and decides by: a list is made by one walk.
    pub(super) revoked: BTreeMap<KeyId, BTreeMap<u16, BTreeMap<Serial, Listed>>>,
    /// How many certificates each shard has.
    pub(super) shard_sizes: BTreeMap<KeyId, BTreeMap<u16, usize>>,
    /// How many certificates each issuer has, those of OCSP delegates not counted: they only answer for others.
    pub(super) issued: BTreeMap<KeyId, usize>,
    pub(super) ends: BTreeSet<(UtcTime, Serial)>,
    pub(super) operations: BTreeSet<(UtcTime, OperationId)>,
}

/// A revoked certificate as its CRL needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Listed {
    pub(super) revoked: Revocation,
    pub(super) not_after: UtcTime,
}

impl Index {
    pub(super) fn of(state: &State) -> Self {
        let mut index = Self::default();
        let domain = state.mesh.as_ref().map(|mesh| &mesh.domain);
        state.nodes.values().for_each(|node| index.add_node(node));
        state.certificates.values().for_each(|certificate| index.add_certificate(certificate, domain));
        index.operations = state.operations.iter().map(|(id, operation)| (operation.at, *id)).collect();
        index
    }

    pub(super) fn add_node(&mut self, node: &Node) {
        self.node_by_name.insert(node.name.clone(), node.id);
        self.node_by_enrollment_key.insert(node.enrollment.key_hash, node.id);
        self.node_by_wireguard.extend(node.vouched.iter().map(|key| (*key, node.id)));
        self.node_by_ipv4.extend(node.ipv4.map(|address| (address, node.id)));
    }

    pub(super) fn remove_node(&mut self, node: &Node) {
        self.node_by_name.remove(&node.name);
        self.node_by_enrollment_key.remove(&node.enrollment.key_hash);
        for key in &node.vouched {
            self.node_by_wireguard.remove(key);
        }
        if let Some(address) = node.ipv4 {
            self.node_by_ipv4.remove(&address);
        }
    }

    pub(super) fn add_certificate(&mut self, certificate: &CertificateState, domain: Option<&DnsName>) {
        let serial = certificate.serial;
        self.serials_by_key.entry(certificate.key_hash).or_default().insert(serial);
        if let Some(node) = certificate.owner.node() {
            self.serials_by_node.entry(node).or_default().insert(serial);
        }
        for name in names_of(certificate) {
            under(&mut self.serials_by_name, &*name).insert(serial);
        }
        for label in labels_of(certificate, domain) {
            under(&mut self.serials_by_label, label).insert(serial);
        }
        self.ends.insert((certificate.not_after, serial));
        let sizes = under(&mut self.shard_sizes, &certificate.issuer_key_id);
        *sizes.entry(certificate.shard).or_default() += 1;
        if certificate.profile != PROFILE_OCSP {
            *under(&mut self.issued, &certificate.issuer_key_id) += 1;
        }
        match certificate.revoked {
            Some(revoked) => self.add_revoked(certificate, revoked),
            None => {
                let users = self.users_by_key.entry(certificate.key_hash).or_default();
                *under(users, &certificate.owner) += 1;
            }
        }
    }

    /// A certificate that was not revoked speaks for its key no more.
    pub(super) fn release_key(&mut self, certificate: &CertificateState) {
        let Some(users) = self.users_by_key.get_mut(&certificate.key_hash) else { return };
        if let Some(count) = users.get_mut(&certificate.owner) {
            *count -= 1;
            if *count == 0 {
                users.remove(&certificate.owner);
            }
        }
        if users.is_empty() {
            self.users_by_key.remove(&certificate.key_hash);
        }
    }

    pub(super) fn add_revoked(&mut self, certificate: &CertificateState, revoked: Revocation) {
        let shards = under(&mut self.revoked, &certificate.issuer_key_id);
        let listed = Listed { revoked, not_after: certificate.not_after };
        shards.entry(certificate.shard).or_default().insert(certificate.serial, listed);
    }

    pub(super) fn remove_certificate(&mut self, certificate: &CertificateState, domain: Option<&DnsName>) {
        let serial = &certificate.serial;
        remove_from(&mut self.serials_by_key, &certificate.key_hash, serial);
        if let Some(node) = certificate.owner.node() {
            remove_from(&mut self.serials_by_node, &node, serial);
        }
        for name in names_of(certificate) {
            remove_from(&mut self.serials_by_name, &*name, serial);
        }
        for label in labels_of(certificate, domain) {
            remove_from(&mut self.serials_by_label, label, serial);
        }
        self.ends.remove(&(certificate.not_after, *serial));
        if certificate.revoked.is_none() {
            self.release_key(certificate);
        }
        if let Some(shards) = self.revoked.get_mut(&certificate.issuer_key_id) {
            if let Some(listed) = shards.get_mut(&certificate.shard) {
                listed.remove(serial);
                if listed.is_empty() {
                    shards.remove(&certificate.shard);
                }
            }
            if shards.is_empty() {
                self.revoked.remove(&certificate.issuer_key_id);
            }
        }
        if let Some(sizes) = self.shard_sizes.get_mut(&certificate.issuer_key_id)
            && let Some(size) = sizes.get_mut(&certificate.shard)
        {
            *size -= 1;
            if *size == 0 {
                sizes.remove(&certificate.shard);
            }
            if sizes.is_empty() {
                self.shard_sizes.remove(&certificate.issuer_key_id);
            }
        }
        if certificate.profile != PROFILE_OCSP
            && let Some(issued) = self.issued.get_mut(&certificate.issuer_key_id)
        {
            *issued -= 1;
            if *issued == 0 {
                self.issued.remove(&certificate.issuer_key_id);
            }
        }
    }
}

fn names_of(certificate: &CertificateState) -> impl Iterator<Item = Cow<'_, str>> {
    let names = certificate.names.iter().map(|name| name.as_str().into());
    let ips = certificate.ips.iter().map(|ip| ip.to_string().into());
    let pair = &certificate.pair_name;
    let is_new = !pair.is_empty() && certificate.names.iter().all(|name| name.as_str() != pair);
    names.chain(ips).chain(is_new.then(|| pair.as_str().into()))
}

fn labels_of<'a>(
    certificate: &'a CertificateState,
    domain: Option<&'a DnsName>,
) -> impl Iterator<Item = &'a str> {
    certificate.names.iter().filter_map(move |name| name.label_under(domain?))
}

/// What is under `key`, an empty one if nothing was. A key of its own is made only for that: most certificates join
/// others of the same name, owner and issuer.
fn under<'a, K, Q, V>(map: &'a mut BTreeMap<K, V>, key: &Q) -> &'a mut V
where
    K: Ord + Borrow<Q>,
    Q: Ord + ToOwned<Owned = K> + ?Sized,
    V: Default,
{
    if !map.contains_key(key) {
        map.insert(key.to_owned(), V::default());
    }
    map.get_mut(key).expect("it is there, or was just put there")
}

fn remove_from<K, Q>(map: &mut BTreeMap<K, BTreeSet<Serial>>, key: &Q, serial: &Serial)
where
    K: Ord + Borrow<Q>,
    Q: Ord + ?Sized,
{
    if let Some(set) = map.get_mut(key) {
        set.remove(serial);
        if set.is_empty() {
            map.remove(key);
        }
    }
}
