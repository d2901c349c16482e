//! What the controller tells: map and CRLs, in effect first, then on disk, then acknowledged.

use std::sync::Arc;

use mesh_proto::v1 as pb;

use super::Worker;
use crate::failpoint;
use crate::findings::Severity;
use crate::identity::Active;
use crate::network::{Belief, Receipt, Update};
use crate::pki::Trust;
use crate::roster::RosterError;

impl Worker {
    pub(super) async fn apply(&mut self, update: Update) -> Result<(), RosterError> {
        let applied = match update {
            Update::Full(full, active) => {
                // A whole map names everybody: whoever is not in it is gone, and so are its endpoints.
                let applied = self.roster.apply_full(full, &self.trust);
                if applied.is_ok() {
                    self.told.retain(|id, _| self.roster.has(*id));
                    self.follow_roots(&active);
                }
                applied
            }
            Update::Delta(delta) => self.roster.apply_delta(delta),
        };
        if let Err(error) = applied {
            self.findings.raise(
                "roster",
                Severity::Bad,
                "the controller's map",
                error.to_string(),
                "if this does not pass, compare the controller with its last backup",
            );
            return Err(error);
        }
        self.findings.clear("roster");
        match self.trust.add_issuers(self.roster.issuers()) {
            Ok(true) => self.roster.doubt(),
            Ok(false) => {}
            Err(error) => tracing::warn!(error = mesh_runtime::chain(&error), "issuing CA is left out"),
        }
        // Effect first, disk second: whoever must go is gone before anything else takes time. What is not on
        // disk is not acknowledged.
        self.reconcile().await;
        self.save_map();
        self.publish_receipt();
        let own = self.roster.own().clone();
        self.outlets.own.send_if_modified(|before| {
            let changed = *before != own;
            *before = own;
            changed
        });
        Ok(())
    }

    /// Trusts what the identity's bundle says, from the same moment on as the map that came with it: who was signed by
    /// a CA that has gone, and the CA itself, change together.
    fn follow_roots(&mut self, active: &Active) {
        let mut trust = match Trust::of(&active.identity) {
            Ok(trust) => trust,
            Err(error) => {
                let failure = crate::failure::Failure::new(
                    mesh_proto::v1::ErrorCode::StateCorrupt,
                    mesh_runtime::chain(&error),
                    "look at the controller's roots; the ones before stay in effect",
                );
                return self.findings.raise_failure("roots", "the pinned roots", &failure);
            }
        };
        for message in self.trust.crl_messages() {
            // CRLs of CAs that have gone are left behind.
            let _ = trust.take_crl(&message);
        }
        let before: Vec<[u8; 32]> = self.trust.anchors().root_key_hashes().collect();
        let now: Vec<[u8; 32]> = trust.anchors().root_key_hashes().collect();
        let crls_changed = trust.crl_haves() != self.trust.crl_haves();
        self.trust = trust;
        self.roster.doubt();
        if before != now || crls_changed {
            let belief = Belief { anchors: self.trust.anchors(), revocation: self.trust.revocation() };
            self.outlets.belief.send_replace(belief);
        }
        if crls_changed {
            let messages = self.trust.crl_messages();
            self.save_crls(&messages);
            self.outlets.crls.send_replace(Arc::new(messages));
        }
    }

    pub(super) async fn take_crls(&mut self, crls: &[pb::Crl]) {
        let mut changed = false;
        for message in crls {
            if failpoint::CRL_APPLY_DISABLED.is_set() && self.trust.revocation().is_some() {
                continue;
            }
            match self.trust.take_crl(message) {
                Ok(new) => changed |= new,
                Err(error) => {
                    tracing::warn!(
                        number = message.number,
                        error = mesh_runtime::chain(&error),
                        "CRL is left out"
                    );
                }
            }
        }
        if !changed {
            return;
        }
        let messages = self.trust.crl_messages();
        self.save_crls(&messages);
        self.roster.doubt();
        self.reconcile().await;
        // The map names the CRLs it was stored with, so that older ones put in their place are seen.
        if self.roster.cursor().is_some() {
            self.save_map();
        }
        self.publish_receipt();
        let belief = Belief { anchors: self.trust.anchors(), revocation: self.trust.revocation() };
        self.outlets.belief.send_replace(belief);
        self.outlets.crls.send_replace(Arc::new(messages));
    }

    fn save_map(&mut self) {
        let map = self.roster.to_full(self.trust.crl_haves());
        if let Err(error) = self.state.save_map(&map) {
            self.map_unsaved = true;
            self.findings.raise_failure("state/map", "the state folder", &error.into());
        } else {
            self.map_unsaved = false;
            self.saved_cursor = map.cursor;
            self.findings.clear("state/map");
        }
    }

    fn save_crls(&mut self, messages: &[pb::Crl]) {
        if let Err(error) = self.state.save_crls(messages) {
            self.crls_unsaved = true;
            self.findings.raise_failure("state/crls", "the state folder", &error.into());
        } else {
            self.crls_unsaved = false;
            self.saved_crls = self.trust.crl_haves();
            self.findings.clear("state/crls");
        }
    }

    /// Stores what could not be stored before.
    pub(super) fn save_again(&mut self) {
        if self.crls_unsaved {
            self.save_crls(&self.trust.crl_messages());
        }
        if self.map_unsaved {
            self.save_map();
        }
        self.publish_receipt();
    }

    pub(super) fn publish_receipt(&self) {
        let journal = |cursor: &pb::Cursor| (cursor.journal_id.clone(), cursor.incarnation);
        // A number of another journal would say something else.
        let saved = self
            .saved_cursor
            .as_ref()
            .filter(|saved| self.roster.cursor().is_some_and(|cursor| journal(cursor) == journal(saved)));
        let receipt = Receipt { seq: saved.map_or(0, |cursor| cursor.seq), crls: self.saved_crls.clone() };
        self.outlets.receipt.send_if_modified(|before| {
            let changed = *before != receipt;
            *before = receipt;
            changed
        });
    }
}
