//! What a managed pair shall be.

use std::path::{Path, PathBuf};

use mesh_ca::{DnsName, KeyAlgorithm};
use mesh_core::ProfileName;
use mesh_proto::v1 as pb;
use mesh_proto::v1::ErrorCode;
use nix::unistd::{Gid, Group, Uid, User};
use serde::{Deserialize, Serialize};

use crate::failure::Failure;
use crate::hostop::Access;
use crate::limits::{HOOK_CHARS_MAX, NAMES_PER_PAIR_MAX};

const MODE_DEFAULT: u32 = 0o600;

/// Who asked for a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Origin {
    /// `meshctl cert issue`.
    Socket,
    /// A file in `certs.d`.
    Declared,
}

/// A pair as it was asked for; every field has been checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Definition {
    /// DNS names and IP addresses; the first is the pair's name.
    pub(crate) names: Vec<String>,
    pub(crate) out: PathBuf,
    pub(crate) profile: String,
    /// 0: the profile's default.
    pub(crate) ttl_secs: u32,
    /// As written in a request; empty: ECDSA P-256.
    #[serde(default)]
    pub(crate) key_type: String,
    pub(crate) owner: Option<String>,
    /// Permissions of the key.
    pub(crate) mode: u32,
    pub(crate) reload: Option<String>,
    pub(crate) rotate_key: bool,
    /// Key and chain in one file too, as HAProxy reads them.
    #[serde(default)]
    pub(crate) combined: bool,
    /// Key and chain as PKCS #12 too, under the passphrase in this file. It is read whenever the pair is renewed and
    /// never kept.
    #[serde(default)]
    pub(crate) p12_passphrase_file: Option<PathBuf>,
    pub(crate) origin: Origin,
}

impl Definition {
    /// Takes a request from the socket; `uid` is the caller's, `own_certs` the daemon's folder for pairs.
    ///
    /// # Errors
    /// [`ErrorCode::Denied`] for a hook that does not come from root; [`ErrorCode::Usage`] and
    /// [`ErrorCode::NameInvalid`] for what cannot be meant.
    pub(crate) fn from_request(
        request: pb::LocalIssueRequest,
        uid: u32,
        own_certs: &Path,
    ) -> Result<Self, Failure> {
        let given = |text: String| Some(text).filter(|text| !text.is_empty());
        let reload = given(request.reload);
        if reload.is_some() && uid != 0 {
            return Err(Failure::new(
                ErrorCode::Denied,
                "a reload hook runs as the daemon, so only root may set one",
                "run the command as root, or leave --reload out",
            ));
        }
        let definition = Self {
            names: request.names,
            out: request.out.into(),
            profile: given(request.profile).unwrap_or_else(|| "server".to_owned()),
            ttl_secs: request.ttl_secs,
            key_type: request.key_type,
            owner: given(request.owner),
            mode: if request.mode == 0 { MODE_DEFAULT } else { request.mode },
            reload,
            rotate_key: request.rotate_key,
            combined: request.combined,
            p12_passphrase_file: given(request.p12_passphrase_file).map(PathBuf::from),
            origin: Origin::Socket,
        };
        definition.checked(own_certs)
    }

    /// Checks all fields, and puts a pair without a folder of its own into the daemon's.
    pub(super) fn checked(mut self, own_certs: &Path) -> Result<Self, Failure> {
        if self.names.is_empty() || self.names.len() > NAMES_PER_PAIR_MAX {
            return Err(usage(format!(
                "a pair has 1 to {NAMES_PER_PAIR_MAX} names, not {}",
                self.names.len()
            )));
        }
        for name in &self.names {
            check_name(name)?;
        }
        if !is_profile(&self.profile) {
            return Err(usage(format!("{:?} is no profile of a pair", self.profile)));
        }
        if !self.key_type.is_empty() && parse_key_type(&self.key_type).is_none() {
            let known = KeyAlgorithm::GENERATED.map(|known| known.to_string()).join(", ");
            return Err(usage(format!("{:?} is no key type; known are {known}", self.key_type)));
        }
        if self.mode & !0o777 != 0 || self.mode & 0o007 != 0 || self.mode & 0o400 == 0 {
            return Err(usage(format!("mode {:04o} is none for a key: use 0600 or 0640", self.mode)));
        }
        if self.reload.as_ref().is_some_and(|reload| reload.len() > HOOK_CHARS_MAX) {
            return Err(usage(format!("a reload hook has at most {HOOK_CHARS_MAX} characters")));
        }
        if let Some(path) = self.p12_passphrase_file.as_ref().filter(|path| !path.is_absolute()) {
            return Err(usage(format!("{} is not an absolute path", path.display())));
        }
        if self.out.as_os_str().is_empty() {
            if self.owner.is_some() || self.mode != MODE_DEFAULT {
                return Err(usage("the daemon's own folder is closed to others: give --out too".to_owned()));
            }
            self.out = own_certs.join(self.name().replace(['/', ':'], "_"));
        }
        if !self.out.is_absolute() {
            return Err(usage(format!("{} is not an absolute path", self.out.display())));
        }
        self.access()?;
        Ok(self)
    }

    /// The pair's name: its first.
    pub(crate) fn name(&self) -> &str {
        &self.names[0]
    }

    /// The type of its key.
    pub(super) fn key_algorithm(&self) -> KeyAlgorithm {
        parse_key_type(&self.key_type).unwrap_or_default()
    }

    /// Who may read the key, as numbers of this host.
    pub(super) fn access(&self) -> Result<Access, Failure> {
        let (uid, gid) = match &self.owner {
            None => (None, None),
            Some(owner) => parse_owner(owner)?,
        };
        Ok(Access { key_mode: self.mode, uid, gid })
    }
}

/// The three that are built in, and what the policy may call one; whether it has one of that name, the controller knows.
pub(super) fn is_profile(text: &str) -> bool {
    let custom = || ProfileName::try_from(text).is_ok_and(|name| name.as_str() == text);
    ["server", "client", "peer"].contains(&text) || custom()
}

fn parse_key_type(text: &str) -> Option<KeyAlgorithm> {
    KeyAlgorithm::GENERATED.into_iter().find(|known| known.to_string() == text)
}

fn parse_owner(owner: &str) -> Result<(Option<Uid>, Option<Gid>), Failure> {
    let unknown = |what: &str, name: &str| usage(format!("there is no {what} {name:?} on this host"));
    let (user, group) = owner.split_once(':').unwrap_or((owner, ""));
    let uid = match user {
        "" => None,
        user => Some(match user.parse::<u32>() {
            Ok(number) => Uid::from_raw(number),
            Err(_) => User::from_name(user).ok().flatten().ok_or_else(|| unknown("user", user))?.uid,
        }),
    };
    let gid = match group {
        "" => None,
        group => Some(match group.parse::<u32>() {
            Ok(number) => Gid::from_raw(number),
            Err(_) => Group::from_name(group).ok().flatten().ok_or_else(|| unknown("group", group))?.gid,
        }),
    };
    Ok((uid, gid))
}

fn check_name(name: &str) -> Result<(), Failure> {
    if name.parse::<std::net::IpAddr>().is_ok() {
        return Ok(());
    }
    DnsName::parse(name).map(drop).map_err(|error| {
        let code = match error {
            mesh_ca::NameError::Wildcard => ErrorCode::NameWildcard,
            _ => ErrorCode::NameInvalid,
        };
        Failure::new(
            code,
            format!("{name:?} cannot stand in a certificate: {error}"),
            "give whole host names in lower case, or IP addresses",
        )
    })
}

fn usage(why: String) -> Failure {
    Failure::new(ErrorCode::Usage, why, "see `meshctl cert issue --help`")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(change: impl FnOnce(&mut pb::LocalIssueRequest)) -> pb::LocalIssueRequest {
        let mut request = pb::LocalIssueRequest {
            names: vec!["api.mesh.internal".into()],
            out: "/etc/tls".into(),
            ..Default::default()
        };
        change(&mut request);
        request
    }

    #[test]
    fn requests_are_completed_or_refused() {
        let own = Path::new("/var/lib/meshd/node/certs");
        let plain = Definition::from_request(request(|_| {}), 1000, own).unwrap();
        assert_eq!((plain.mode, plain.profile.as_str()), (0o600, "server"));
        let ours = Definition::from_request(request(|r| r.out.clear()), 0, own).unwrap();
        assert_eq!(ours.out, own.join("api.mesh.internal"));
        type Change = fn(&mut pb::LocalIssueRequest);
        let table: [(Change, ErrorCode); 12] = [
            (|r| r.names.clear(), ErrorCode::Usage),
            (|r| r.names = vec!["a.b".into(); 33], ErrorCode::Usage),
            (|r| r.names = vec!["*.mesh.internal".into()], ErrorCode::NameWildcard),
            (|r| r.names = vec!["API.mesh.internal".into()], ErrorCode::NameInvalid),
            (|r| r.profile = "node".into(), ErrorCode::Usage),
            (|r| r.profile = "Data base".into(), ErrorCode::Usage),
            (|r| r.key_type = "rsa-1024".into(), ErrorCode::Usage),
            (|r| r.mode = 0o644, ErrorCode::Usage),
            (|r| r.out = "tls".into(), ErrorCode::Usage),
            (|r| r.p12_passphrase_file = "passphrase".into(), ErrorCode::Usage),
            (|r| r.owner = "nobody-of-that-name".into(), ErrorCode::Usage),
            (|r| r.reload = "systemctl reload nginx".into(), ErrorCode::Denied),
        ];
        for (index, (change, code)) in table.into_iter().enumerate() {
            let failure = Definition::from_request(request(change), 1000, own).unwrap_err();
            assert_eq!(failure.code, code, "row {index}: {failure}");
        }
        let custom = request(|r| (r.profile, r.key_type) = ("database".into(), "ed25519".into()));
        let custom = Definition::from_request(custom, 0, own).unwrap();
        assert_eq!(custom.key_algorithm(), KeyAlgorithm::Ed25519);
        assert_eq!(plain.key_algorithm(), KeyAlgorithm::EcdsaP256);
        let root = request(|r| r.reload = "true".into());
        assert!(Definition::from_request(root, 0, own).is_ok(), "root may set a hook");
    }
}
