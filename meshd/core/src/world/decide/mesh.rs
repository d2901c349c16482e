//! Creation, the controller's certificate, policy, CRLs, denials.

use super::{At, Decided, Decision};
use crate::certificate::{CertificateRecord, Owner, PROFILE_CONTROLLER, PROFILE_OCSP};
use crate::change::Change;
use crate::command::{Command, Denial};
use crate::limits::{
    CAS_MAX, CRL_NUMBER_MAX, DENIAL_TEXT_CHARS_MAX, DENIALS_MAX, FLEET_BYTES_MAX, IPV4_POOL_PREFIX_MAX,
    POLICY_PROBLEMS_MAX,
};
use crate::names::{self, DnsName, NodeName};
use crate::policy::Policy;
use crate::refusal::Refusal;
use crate::world::{CrlState, Mesh, World};

impl World {
    pub(super) fn decide_create_mesh(&self, command: &Command) -> Decided {
        let Command::CreateMesh {
            mesh_id,
            journal_id,
            fleet,
            domain,
            controller_name,
            ipv4_pool,
            cas,
            starter_policy,
        } = command
        else {
            return Ok(Decision::AlreadyDone);
        };
        if let Some(mesh) = self.mesh() {
            let same = mesh.mesh_id == *mesh_id && mesh.journal_id == *journal_id;
            return if same { Ok(Decision::AlreadyDone) } else { Err(Refusal::MeshExists) };
        }
        let mesh = Mesh {
            mesh_id: *mesh_id,
            journal_id: *journal_id,
            fleet: fleet.clone(),
            domain: domain.clone(),
            controller_name: controller_name.clone(),
            ipv4_pool: ipv4_pool.trunc(),
            cas: cas.clone(),
        };
        check_mesh(&mesh)?;
        let policy = self
            .check_grants(&mesh, starter_policy)
            .map_err(|problems| Refusal::PolicyInvalid { problems })?;
        let policy = Change::PolicyApplied { toml: starter_policy.clone(), policy, version: 1 };
        Ok(Decision::Changes(vec![Change::MeshCreated { mesh }, policy]))
    }

    pub(super) fn decide_controller_certificate(
        &self,
        now: At<'_>,
        certificate: &CertificateRecord,
    ) -> Decided {
        self.check_certificate(now, certificate)?;
        let owner = Owner::Controller { name: now.mesh.controller_name.clone() };
        if certificate.owner != owner || certificate.profile != PROFILE_CONTROLLER {
            return Err(Refusal::CertificateMismatch { what: "it is not the controller's" });
        }
        self.check_key(certificate.key_hash, |user| *user == owner)?;
        Ok(Decision::Changes(vec![Change::ControllerCertified { certificate: certificate.clone() }]))
    }

    pub(super) fn decide_responder(&self, now: At<'_>, certificate: &CertificateRecord) -> Decided {
        self.check_certificate(now, certificate)?;
        let owner = Owner::Controller { name: now.mesh.controller_name.clone() };
        let bare = certificate.names.is_empty() && certificate.ips.is_empty();
        if certificate.owner != owner || certificate.profile != PROFILE_OCSP || !bare {
            return Err(Refusal::CertificateMismatch { what: "it is not an OCSP responder's" });
        }
        // Its key signs responses and nothing else.
        self.check_key(certificate.key_hash, |_| false)?;
        Ok(Decision::Changes(vec![Change::ResponderCertified { certificate: certificate.clone() }]))
    }

    pub(super) fn decide_policy(&self, toml: &str) -> Decided {
        if toml == self.policy_toml() {
            return Ok(Decision::AlreadyDone);
        }
        let policy = self.check_policy(toml).map_err(|problems| Refusal::PolicyInvalid { problems })?;
        let version = self.policy_version() + 1;
        Ok(Decision::Changes(vec![Change::PolicyApplied { toml: toml.to_owned(), policy, version }]))
    }

    /// Parses a policy and checks its grants against the names of this mesh.
    ///
    /// # Errors
    /// Every problem, one line each.
    pub fn check_policy(&self, toml: &str) -> Result<Policy, Vec<String>> {
        match self.mesh() {
            Some(mesh) => self.check_grants(mesh, toml),
            None => Policy::parse(toml),
        }
    }

    fn check_grants(&self, mesh: &Mesh, toml: &str) -> Result<Policy, Vec<String>> {
        let policy = Policy::parse(toml)?;
        let mut problems = Vec::new();
        for (index, grant) in policy.grant.iter().enumerate() {
            for name in &grant.names {
                problems.extend(
                    self.grant_problem(mesh, name).map(|why| format!("grant[{index}]: {name} {why}")),
                );
            }
        }
        for (profile, rules) in &policy.profile {
            for (index, rule) in rules.names.iter().enumerate() {
                for name in rule.taken() {
                    let why = self.grant_problem(mesh, name);
                    problems.extend(why.map(|why| format!("profile.{profile}.names[{index}]: {name} {why}")));
                }
            }
        }
        problems.truncate(POLICY_PROBLEMS_MAX);
        if problems.is_empty() { Ok(policy) } else { Err(problems) }
    }

    /// Why a name cannot be granted: a name has one owner.
    fn grant_problem(&self, mesh: &Mesh, name: &DnsName) -> Option<String> {
        if !name.is_within(&mesh.domain) {
            return Some(format!("is outside {}", mesh.domain));
        }
        let Some(label) = name.label_under(&mesh.domain) else {
            return Some("is the domain itself".to_owned());
        };
        if names::is_reserved(label) || label == mesh.controller_name {
            return Some("is reserved".to_owned());
        }
        let node = NodeName::try_from(label).ok().and_then(|name| self.node_by_name(&name))?;
        Some(format!("belongs to node {}", node.name))
    }

    pub(super) fn decide_crl(&self, command: &Command) -> Decided {
        let Command::RecordCrl { issuer_key_id, shard, number, covers_seq, digest, this_update, next_update } =
            command
        else {
            return Ok(Decision::AlreadyDone);
        };
        let crl = CrlState {
            issuer_key_id: issuer_key_id.clone(),
            shard: *shard,
            number: *number,
            covers_seq: *covers_seq,
            digest: *digest,
            this_update: *this_update,
            next_update: *next_update,
        };
        if self.authority(&crl.issuer_key_id).is_none() {
            return Err(Refusal::IssuerUnknown { issuer: crl.issuer_key_id });
        }
        if crl.shard != 0 && !self.has_shard(&crl.issuer_key_id, crl.shard) {
            return Err(Refusal::CrlMismatch { what: "its shard does not exist" });
        }
        let before = self.crl(&crl.issuer_key_id, crl.shard);
        if before == Some(&crl) {
            return Ok(Decision::AlreadyDone);
        }
        let last = before.map_or(0, |before| before.number);
        // Mostly the next; a restore, or a CA that was in use elsewhere, skips those that may be about.
        if crl.number <= last || crl.number > CRL_NUMBER_MAX {
            return Err(Refusal::CrlNumber { number: crl.number, last });
        }
        if crl.covers_seq > self.head_seq() {
            return Err(Refusal::CrlMismatch { what: "it covers records that do not exist" });
        }
        if before.is_some_and(|before| crl.covers_seq < before.covers_seq) {
            return Err(Refusal::CrlMismatch { what: "it covers less than the one before" });
        }
        if crl.this_update >= crl.next_update {
            return Err(Refusal::CrlMismatch { what: "nextUpdate is not after thisUpdate" });
        }
        Ok(Decision::Changes(vec![Change::CrlIssued { crl }]))
    }

    pub(super) fn decide_denials(&self, denials: &[Denial]) -> Decided {
        if denials.len() > DENIALS_MAX {
            return Err(Refusal::Limit { what: "denials in a record", max: DENIALS_MAX });
        }
        let cut = |text: &String| text.chars().take(DENIAL_TEXT_CHARS_MAX).collect();
        let denials = denials.iter().map(|denial| Denial {
            caller: cut(&denial.caller),
            action: cut(&denial.action),
            reason: cut(&denial.reason),
            ..denial.clone()
        });
        Ok(Decision::from_changes(denials.map(|denial| Change::Denied { denial }).collect()))
    }
}

fn check_mesh(mesh: &Mesh) -> Result<(), Refusal> {
    let invalid = |what| Err(Refusal::MeshInvalid { what });
    if mesh.fleet.is_empty() || mesh.fleet.len() > FLEET_BYTES_MAX || mesh.fleet.chars().any(char::is_control)
    {
        return invalid("the fleet's name is empty, too long or not printable");
    }
    let label = DnsName::try_from(mesh.controller_name.as_str());
    if !label.is_ok_and(|label| label.as_str() == mesh.controller_name && !mesh.controller_name.contains('.'))
    {
        return invalid("the controller's name is not one DNS label in lower case");
    }
    if mesh.ipv4_pool.prefix_len() > IPV4_POOL_PREFIX_MAX {
        return invalid("the IPv4 pool has no room for two nodes");
    }
    if mesh.cas.len() > CAS_MAX
        || !mesh.cas.iter().any(|ca| ca.is_root)
        || mesh.cas.iter().all(|ca| ca.is_root)
    {
        return invalid("it needs a root and an issuing authority");
    }
    Ok(())
}
