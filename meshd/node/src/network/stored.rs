//! What a start without a controller begins with.

use std::collections::BTreeMap;

use mesh_proto::v1 as pb;

use crate::failure::Failure;
use crate::findings::{Findings, Severity};
use crate::pki::Trust;
use crate::roster::Roster;
use crate::state::StateDir;

/// CRLs and map from disk. What cannot be believed is left out and said; the controller will send it anew.
pub(super) fn stored_roster(
    state: &StateDir,
    trust: &mut Trust,
    findings: &Findings,
) -> Result<Roster, Failure> {
    let mut roster = Roster::new(state.floor()?);
    let map = match state.map() {
        Ok(map) => map,
        Err(error) => {
            findings.raise_failure("state/map", "the stored map", &error.into());
            None
        }
    };
    if let Some(map) = &map
        && let Err(error) = trust.add_issuers(map.issuers.iter().map(|der| der.as_ref()))
    {
        tracing::warn!(error = mesh_runtime::chain(&error), "stored issuing CA is left out");
    }
    match state.crls() {
        Ok(crls) => {
            for message in &crls {
                if let Err(error) = trust.take_crl(message) {
                    tracing::warn!(error = mesh_runtime::chain(&error), "stored CRL is left out");
                }
            }
        }
        Err(error) => findings.raise_failure("state/crls", "the stored CRLs", &error.into()),
    }
    if let Some(map) = map {
        let cut = trust.lacks(&map.crls);
        match roster.apply_full(map, trust) {
            // A CRL older than the one the map was stored with: somebody put it there.
            Ok(()) if cut => {
                findings.raise(
                    "state/crls-old",
                    Severity::Bad,
                    "the stored CRLs",
                    "they are older than those stored with the map; the map waits for the controller",
                    "look at who can write the state folder",
                );
                return Ok(Roster::new(state.floor()?));
            }
            Ok(()) => {}
            Err(error) => findings.raise(
                "state/map-old",
                Severity::Bad,
                "the stored map",
                format!("it is left out: {error}"),
                "look at who can write the state folder; the controller will send a new one",
            ),
        }
    }
    Ok(roster)
}

pub(super) fn stored_endpoints(state: &StateDir) -> BTreeMap<u32, Vec<pb::Endpoint>> {
    match state.endpoints() {
        Ok(hints) => hints.peers.into_iter().map(|peer| (peer.node_id, peer.endpoints)).collect(),
        Err(error) => {
            tracing::warn!(error = mesh_runtime::chain(&error), "stored endpoints are left out");
            BTreeMap::new()
        }
    }
}
