//! Pairs declared in `certs.d/*.toml`. Only what belongs to root and nobody else may write counts: a
//! declaration can name a hook, and hooks run as the daemon.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use serde::Deserialize;

use super::definition::{Definition, Origin};
use crate::failure::Failure;
use crate::limits::{DECLARATION_BYTES_MAX, PAIRS_MAX};

/// One file: `[[pair]]` tables.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    pair: Vec<Pair>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Pair {
    names: Vec<String>,
    #[serde(default)]
    out: PathBuf,
    profile: Option<String>,
    /// `72h`, `30d`, `90m`, `45s`.
    ttl: Option<String>,
    key_type: Option<String>,
    owner: Option<String>,
    /// Octal text: `"0640"`.
    mode: Option<String>,
    reload: Option<String>,
    #[serde(default)]
    rotate_key: bool,
    #[serde(default)]
    combined: bool,
    p12_passphrase_file: Option<PathBuf>,
}

/// What a look into the folder found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Declared {
    pub(super) pairs: BTreeMap<String, Definition>,
    /// Files that do not count, and why.
    pub(super) problems: BTreeMap<PathBuf, String>,
}

/// Reads all `*.toml` of `folder`; a missing folder declares nothing.
pub(super) fn read(folder: &Path, own_certs: &Path) -> Declared {
    let mut declared = Declared::default();
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return declared,
        Err(error) => {
            declared.problems.insert(folder.to_owned(), error.to_string());
            return declared;
        }
    };
    if let Err(problem) = std::fs::metadata(folder).map_err(|e| e.to_string()).and_then(|m| check_rights(&m))
    {
        declared.problems.insert(folder.to_owned(), problem);
        return declared;
    }
    let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    paths.sort();
    for path in paths {
        match read_file(&path, own_certs) {
            Ok(definitions) => {
                for definition in definitions {
                    let name = definition.name().to_owned();
                    if declared.pairs.len() == PAIRS_MAX || declared.pairs.contains_key(&name) {
                        let problem =
                            format!("{name} is declared twice, or there are over {PAIRS_MAX} pairs");
                        declared.problems.insert(path.clone(), problem);
                        continue;
                    }
                    declared.pairs.insert(name, definition);
                }
            }
            Err(problem) => {
                declared.problems.insert(path, problem);
            }
        }
    }
    declared
}

fn read_file(path: &Path, own_certs: &Path) -> Result<Vec<Definition>, String> {
    let file = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).bits())
        .open(path)
        .map_err(|error| error.to_string())?;
    let metadata = file.metadata().map_err(|error| error.to_string())?;
    if !metadata.is_file() {
        return Err("not a plain file".to_owned());
    }
    check_rights(&metadata)?;
    if metadata.len() > DECLARATION_BYTES_MAX {
        return Err(format!("larger than {DECLARATION_BYTES_MAX} bytes"));
    }
    let mut text = String::new();
    file.take(DECLARATION_BYTES_MAX).read_to_string(&mut text).map_err(|error| error.to_string())?;
    parse(&text, own_certs)
}

fn check_rights(metadata: &std::fs::Metadata) -> Result<(), String> {
    if metadata.uid() != 0 {
        return Err(format!("belongs to uid {}, not to root", metadata.uid()));
    }
    if metadata.mode() & 0o022 != 0 {
        return Err(format!("mode {:04o}: others than root may write it", metadata.mode() & 0o7777));
    }
    Ok(())
}

fn parse(text: &str, own_certs: &Path) -> Result<Vec<Definition>, String> {
    let file: File = toml::from_str(text).map_err(|error| error.message().to_owned())?;
    file.pair.into_iter().map(|pair| definition(pair, own_certs).map_err(|failure| failure.why)).collect()
}

fn definition(pair: Pair, own_certs: &Path) -> Result<Definition, Failure> {
    let invalid =
        |why: String| Failure::new(mesh_proto::v1::ErrorCode::ConfigInvalid, why, "correct the file");
    let ttl_secs = match &pair.ttl {
        None => 0,
        Some(text) => mesh_core::time::seconds(text)
            .ok_or_else(|| invalid(format!("{text:?} is no duration like 72h")))?,
    };
    let mode = match &pair.mode {
        None => 0o600,
        Some(text) => u32::from_str_radix(text.trim_start_matches("0o"), 8)
            .map_err(|_| invalid(format!("{text:?} is no mode like \"0640\"")))?,
    };
    Definition {
        names: pair.names,
        out: pair.out,
        profile: pair.profile.unwrap_or_else(|| "server".to_owned()),
        ttl_secs,
        key_type: pair.key_type.unwrap_or_default(),
        owner: pair.owner,
        mode,
        reload: pair.reload,
        rotate_key: pair.rotate_key,
        combined: pair.combined,
        p12_passphrase_file: pair.p12_passphrase_file,
        origin: Origin::Declared,
    }
    .checked(own_certs)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const OWN: &str = "/var/lib/meshd/node/certs";

    #[test]
    fn a_declaration_reads_as_meant_and_a_misspelt_key_is_refused() {
        let text = r#"
            [[pair]]
            names = ["api.mesh.internal", "100.64.0.1"]
            out = "/etc/nginx/tls"
            ttl = "72h"
            mode = "0640"
            reload = "systemctl reload nginx"
            rotate_key = true
            combined = true
            p12_passphrase_file = "/etc/tomcat/passphrase"
        "#;
        let pairs = parse(text, Path::new(OWN)).unwrap();
        assert_eq!(pairs.len(), 1);
        assert_eq!((pairs[0].ttl_secs, pairs[0].mode), (259_200, 0o640));
        assert!(pairs[0].rotate_key && pairs[0].combined && pairs[0].origin == Origin::Declared);
        assert_eq!(pairs[0].p12_passphrase_file.as_deref(), Some(Path::new("/etc/tomcat/passphrase")));
        for bad in [
            "[[pair]]\nnames = []",
            "[[pair]]\nnames = [\"a.b\"]\nrelaod = \"x\"",
            "[[pair]]\nnames = [\"a.b\"]\nttl = \"3 days\"",
            "[[pair]]\nnames = [\"a.b\"]\nout = \"/x\"\np12_passphrase_file = \"relative\"",
            "pair = 3",
        ] {
            assert!(parse(bad, Path::new(OWN)).is_err(), "{bad}");
        }
    }

    proptest::proptest! {
        /// Whatever stands in a file, it is refused, or every pair in it is one that can be written and issued.
        #[test]
        fn any_text_is_a_good_declaration_or_none(
            text in "\\PC{0,80}|(\\[\\[pair\\]\\]\nnames = \\[\"[a-z*.:/0-9-]{0,12}\"\\]\n\
                ((out|profile|ttl|owner|mode|reload|x) = (\"(/tmp/x|\\.\\./x|server|node|[0-9]{1,12}[smhd]?|0:0|0[0-7]{1,5}|\\PC{0,9})\"|7|true)\n){0,4}){0,3}",
        ) {
            for pair in parse(&text, Path::new(OWN)).unwrap_or_default() {
                proptest::prop_assert!(pair.out.is_absolute(), "{text}");
                proptest::prop_assert!(crate::certs::definition::is_profile(&pair.profile), "{text}");
                proptest::prop_assert!(pair.mode & 0o007 == 0 && pair.mode & 0o400 != 0, "{text}");
                proptest::prop_assert!(pair.origin == Origin::Declared);
                for name in &pair.names {
                    let address = name.parse::<std::net::IpAddr>().is_ok();
                    proptest::prop_assert!(address || mesh_ca::DnsName::parse(name).is_ok(), "{name:?}");
                }
            }
        }
    }

    #[test]
    fn only_what_root_alone_may_write_counts() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let chmod = |path: &Path, mode| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap()
        };
        chmod(folder.path(), 0o755);
        let write = |name: &str, mode| {
            let path = folder.path().join(name);
            std::fs::write(&path, format!("[[pair]]\nnames = [\"{name}\"]\nout = \"/x\"")).unwrap();
            chmod(&path, mode);
            path
        };
        write("good.toml", 0o644);
        let open = write("open.toml", 0o666);
        std::os::unix::fs::symlink(folder.path().join("good.toml"), folder.path().join("link.toml")).unwrap();
        write("ignored.conf", 0o644);
        let declared = read(folder.path(), Path::new(OWN));
        assert_eq!(declared.pairs.keys().collect::<Vec<_>>(), ["good.toml"]);
        assert_eq!(declared.problems.len(), 2);
        assert!(declared.problems[&open].contains("others than root"));
        chmod(folder.path(), 0o777);
        assert!(read(folder.path(), Path::new(OWN)).pairs.is_empty());
        assert_eq!(read(&folder.path().join("missing"), Path::new(OWN)), Declared::default());
    }
}
