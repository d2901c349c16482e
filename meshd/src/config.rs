//! Settings: defaults, file, drop-ins, environment, flags; the later layer wins.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::{
    cli::{ControllerRun, NodeRun},
    failure::Failure,
};

/// Larger configuration files are refused unread.
const CONFIG_BYTES_MAX: u64 = 1 << 20;
/// Drop-ins beyond this number are refused.
const DROP_INS_MAX: usize = 256;

#[derive(Debug, Deserialize)]
pub(crate) struct ControllerSettings {
    pub(crate) state_dir: PathBuf,
    pub(crate) listen: SocketAddr,
    pub(crate) socket: PathBuf,
    pub(crate) advertise: Vec<String>,
    pub(crate) passphrase_file: String,
    pub(crate) key_store: String,
    pub(crate) pin_file: String,
    pub(crate) publish_listen: Vec<SocketAddr>,
    pub(crate) publish_url: String,
    pub(crate) crl_shards: u16,
    pub(crate) stun_listen: String,
    pub(crate) metrics_listen: String,
    pub(crate) relay: bool,
    pub(crate) relay_bytes_per_second: u64,
    pub(crate) retention_days: u32,
    pub(crate) log_format: LogFormat,
}

#[derive(Debug, Deserialize)]
pub(crate) struct NodeSettings {
    pub(crate) state_dir: PathBuf,
    pub(crate) socket: PathBuf,
    pub(crate) interface: String,
    pub(crate) mtu: u16,
    pub(crate) wg_port: u16,
    pub(crate) backend: Backend,
    pub(crate) token_file: String,
    pub(crate) name: String,
    pub(crate) certs_dir: PathBuf,
    pub(crate) endpoints: Vec<String>,
    pub(crate) log_format: LogFormat,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Backend {
    Auto,
    Kernel,
    Userspace,
}

/// Every key has a default; an empty string or list stands for "not set".
const CONTROLLER_DEFAULTS: &str = r#"
state_dir = "/var/lib/meshd/controller"
listen = "0.0.0.0:7443"
socket = "/run/meshd/controller.sock"
advertise = []
passphrase_file = ""
key_store = ""
pin_file = ""
publish_listen = []
publish_url = ""
crl_shards = 4
stun_listen = ""
metrics_listen = ""
relay = true
relay_bytes_per_second = 4194304
retention_days = 0
log_format = "text"
"#;

const NODE_DEFAULTS: &str = r#"
state_dir = "/var/lib/meshd/node"
socket = "/run/meshd/node.sock"
interface = "mesh0"
mtu = 1420
wg_port = 51820
backend = "auto"
token_file = ""
name = ""
certs_dir = "/etc/meshd/certs.d"
endpoints = []
log_format = "text"
"#;

/// The settings of a role with the place each one comes from.
#[derive(Debug)]
pub(crate) struct Settings {
    values: BTreeMap<String, (Value, String)>,
}

impl Settings {
    pub(crate) fn controller(flags: &ControllerRun) -> Result<Self, Failure> {
        let file = flags.config.clone();
        Self::layered(CONTROLLER_DEFAULTS, "/etc/meshd/controller.toml", file, &table_of(flags), environment)
    }

    pub(crate) fn node(flags: &NodeRun) -> Result<Self, Failure> {
        let file = flags.config.clone();
        Self::layered(NODE_DEFAULTS, "/etc/meshd/node.toml", file, &table_of(flags), environment)
    }

    fn layered(
        defaults: &str,
        default_file: &str,
        file: Option<PathBuf>,
        flags: &Table,
        environment: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, Failure> {
        let defaults: Table = defaults.parse().expect("the defaults in this file are TOML");
        let values = defaults.into_iter().map(|(key, value)| (key, (value, "default".to_owned()))).collect();
        let mut settings = Self { values };
        let must_exist = file.is_some();
        let file = file.unwrap_or_else(|| default_file.into());
        if must_exist || file.exists() {
            settings.lay_file(&file)?;
        }
        for drop_in in drop_ins(&file)? {
            settings.lay_file(&drop_in)?;
        }
        settings.lay_environment(environment)?;
        for (key, value) in flags {
            settings.lay(key, value.clone(), &format!("--{}", key.replace('_', "-")))?;
        }
        Ok(settings)
    }

    fn lay_file(&mut self, path: &Path) -> Result<(), Failure> {
        let origin = path.display().to_string();
        let cannot = |why: String| Failure::config(format!("cannot read {origin}"), why);
        let size = fs::metadata(path).map_err(|error| cannot(error.to_string()))?.len();
        if size > CONFIG_BYTES_MAX {
            return Err(cannot(format!("it has {size} bytes, more than {CONFIG_BYTES_MAX}")));
        }
        let text = fs::read_to_string(path).map_err(|error| cannot(error.to_string()))?;
        let table: Table = text.parse().map_err(|error: toml::de::Error| cannot(error.to_string()))?;
        table.into_iter().try_for_each(|(key, value)| self.lay(&key, value, &origin))
    }

    fn lay_environment(&mut self, environment: impl Fn(&str) -> Option<String>) -> Result<(), Failure> {
        let keys: Vec<String> = self.values.keys().cloned().collect();
        for key in keys {
            let variable = format!("MESH_{}", key.to_uppercase());
            let Some(text) = environment(&variable) else { continue };
            let value = match self.values[&key].0 {
                Value::Integer(_) => text.parse().map(Value::Integer).map_err(|_| {
                    Failure::config(format!("{variable} is not a number"), format!("it says {text:?}"))
                })?,
                Value::Boolean(_) => text.parse().map(Value::Boolean).map_err(|_| {
                    Failure::config(
                        format!("{variable} is neither true nor false"),
                        format!("it says {text:?}"),
                    )
                })?,
                Value::Array(_) => {
                    let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
                    Value::Array(items.map(Value::from).collect())
                }
                _ => Value::String(text),
            };
            self.lay(&key, value, &variable)?;
        }
        Ok(())
    }

    fn lay(&mut self, key: &str, value: Value, origin: &str) -> Result<(), Failure> {
        let known: Vec<&str> = self.values.keys().map(String::as_str).collect();
        let unknown = || {
            Failure::config(
                format!("unknown key {key:?} in {origin}"),
                format!("the keys are {}", known.join(", ")),
            )
        };
        let Some((before, _)) = self.values.get(key) else { return Err(unknown()) };
        if !before.same_type(&value) {
            let why = format!("it is of type {}, not {}", value.type_str(), before.type_str());
            return Err(Failure::config(format!("{key} in {origin} cannot be used"), why));
        }
        self.values.insert(key.to_owned(), (value, origin.to_owned()));
        Ok(())
    }

    /// Turns the values into what the role takes.
    ///
    /// # Errors
    /// E0113 names the key, its value and where it comes from.
    pub(crate) fn parse<'de, T: Deserialize<'de>>(&self) -> Result<T, Failure> {
        let table: Table = self.values.iter().map(|(key, (value, _))| (key.clone(), value.clone())).collect();
        Value::Table(table).try_into().map_err(|error: toml::de::Error| {
            let text = error.to_string();
            let culprit = self.values.iter().find(|(key, _)| text.contains(&format!("`{key}`")));
            match culprit {
                Some((key, (value, origin))) => {
                    Failure::config(format!("{key} = {value} in {origin} cannot be used"), error.message())
                }
                None => Failure::config("the settings cannot be used", text),
            }
        })
    }

    /// The settings as TOML, one a line.
    pub(crate) fn show(&self, origin: bool) -> String {
        let mut text = String::new();
        for (key, (value, from)) in &self.values {
            let comment = if origin { format!("  # {from}") } else { String::new() };
            writeln!(text, "{key} = {value}{comment}").expect("writing to a string cannot fail");
        }
        text
    }
}

/// An unset setting is an empty string in the table.
pub(crate) fn optional(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

fn environment(variable: &str) -> Option<String> {
    std::env::var(variable).ok()
}

fn table_of(flags: &impl Serialize) -> Table {
    Table::try_from(flags).expect("flags are strings, numbers and lists")
}

/// `FILE.d/*.toml` in the order of their names; `/etc/meshd/node.toml` has `/etc/meshd/node.d`.
fn drop_ins(file: &Path) -> Result<Vec<PathBuf>, Failure> {
    let folder = file.with_extension("d");
    let Ok(entries) = fs::read_dir(&folder) else { return Ok(Vec::new()) };
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
        .take(DROP_INS_MAX + 1)
        .collect();
    if files.len() > DROP_INS_MAX {
        let why = format!("it holds more than {DROP_INS_MAX} files");
        return Err(Failure::config(format!("cannot read {}", folder.display()), why));
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(file: &Path, flags: &str, environment: &[(&str, &str)]) -> Result<Settings, Failure> {
        let flags: Table = flags.parse().unwrap();
        let environment: BTreeMap<_, _> = environment.iter().copied().collect();
        Settings::layered(NODE_DEFAULTS, "/nonexistent/node.toml", Some(file.into()), &flags, |name| {
            environment.get(name).map(|value| (*value).to_owned())
        })
    }

    #[test]
    fn the_later_layer_wins_and_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("node.toml");
        fs::write(&file, "wg_port = 1\nmtu = 1300\ninterface = \"a\"\nname = \"web-1\"\n").unwrap();
        fs::create_dir(folder.path().join("node.d")).unwrap();
        fs::write(folder.path().join("node.d/10-mtu.toml"), "mtu = 1280\nwg_port = 2\ninterface = \"b\"")
            .unwrap();
        let environment =
            [("MESH_WG_PORT", "3"), ("MESH_INTERFACE", "c"), ("MESH_ENDPOINTS", "192.0.2.1:1, [::1]:2")];
        let settings = node(&file, "interface = \"d\"", &environment).unwrap();
        let parsed: NodeSettings = settings.parse().unwrap();
        assert_eq!((parsed.mtu, parsed.wg_port, parsed.interface.as_str()), (1280, 3, "d"));
        assert_eq!((parsed.name.as_str(), parsed.endpoints.len()), ("web-1", 2));
        let shown = settings.show(true);
        for part in
            ["interface = \"d\"  # --interface", "wg_port = 3  # MESH_WG_PORT", "10-mtu.toml", "# default"]
        {
            assert!(shown.contains(part), "{part} in {shown}");
        }
    }

    #[test]
    fn what_cannot_be_used_is_named_with_its_origin() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("node.toml");
        for (text, part) in [
            ("wgport = 1", "unknown key \"wgport\""),
            ("wg_port = \"x\"", "wg_port"),
            ("wg_port = 70000", "wg_port"),
            ("backend = \"hardware\"", "backend"),
            ("not toml", "cannot read"),
        ] {
            fs::write(&file, text).unwrap();
            let failure =
                node(&file, "", &[]).and_then(|settings| settings.parse::<NodeSettings>()).unwrap_err();
            assert_eq!(
                (failure.code, failure.exit),
                (mesh_controller::ErrorCode::ConfigInvalid, 2),
                "{text}"
            );
            assert!(failure.what.contains(part), "{text}: {failure}");
        }
        let failure = node(&file.with_file_name("missing.toml"), "", &[]).unwrap_err();
        assert!(failure.what.contains("missing.toml"));
    }
}
