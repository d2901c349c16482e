//! Settings: defaults, file, drop-ins, environment, flags; the later layer wins.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use mesh_controller::{HsmPlace, StunListen};
use serde::{Deserialize, Deserializer, Serialize};
use toml::{Table, Value};

use crate::{
    cli::{ControllerRun, NodeRun},
    failure::Failure,
};

/// Larger configuration files are refused unread.
const CONFIG_BYTES_MAX: u64 = 1 << 20;
/// Drop-ins beyond this number are refused.
const DROP_INS_MAX: usize = 256;
/// Their values are not repeated in an error: somebody may have written a PIN into them.
const MAY_HOLD_A_SECRET: [&str; 1] = ["key_store"];
/// `IFNAMSIZ` of Linux, without its closing zero.
const INTERFACE_NAME_BYTES_MAX: usize = 15;
/// Smallest MTU of IPv6. RFC 8200 section 5.
const MTU_MIN: u16 = 1280;
/// RFC 1035 section 2.3.4, as text.
const HOST_NAME_BYTES_MAX: usize = 253;

#[derive(Debug, Deserialize)]
pub(crate) struct ControllerSettings {
    pub(crate) state_dir: PathBuf,
    pub(crate) listen: SocketAddr,
    pub(crate) socket: PathBuf,
    pub(crate) advertise: Vec<String>,
    pub(crate) passphrase_file: String,
    #[serde(deserialize_with = "key_store")]
    pub(crate) key_store: Option<HsmPlace>,
    pub(crate) pin_file: String,
    pub(crate) publish_listen: Vec<SocketAddr>,
    pub(crate) publish_url: String,
    pub(crate) crl_shards: u16,
    #[serde(deserialize_with = "stun_listen")]
    pub(crate) stun_listen: StunListen,
    #[serde(deserialize_with = "metrics_listen")]
    pub(crate) metrics_listen: Option<SocketAddr>,
    pub(crate) relay: bool,
    pub(crate) relay_bytes_per_second: u64,
    pub(crate) retention_days: u32,
    pub(crate) log_format: LogFormat,
}

#[derive(Debug, Deserialize)]
pub(crate) struct NodeSettings {
    pub(crate) state_dir: PathBuf,
    pub(crate) socket: PathBuf,
    #[serde(deserialize_with = "interface")]
    pub(crate) interface: String,
    #[serde(deserialize_with = "mtu")]
    pub(crate) mtu: u16,
    pub(crate) wg_port: u16,
    pub(crate) backend: Backend,
    pub(crate) token_file: String,
    pub(crate) name: String,
    pub(crate) certs_dir: PathBuf,
    #[serde(deserialize_with = "endpoints")]
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
retention_days = 30
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
            // toml says where in a line of its own; what it says of the value may name other keys.
            let is_culprit = |key: &str| text.lines().any(|line| line.trim() == format!("in `{key}`"));
            let culprit = self.values.iter().find(|(key, _)| is_culprit(key));
            match culprit {
                Some((key, (_, origin))) if MAY_HOLD_A_SECRET.contains(&key.as_str()) => {
                    Failure::config(format!("{key} in {origin} cannot be used"), error.message())
                }
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

/// Reads a text; toml adds the key to what `parse` says of a bad one.
fn read<'de, D: Deserializer<'de>, T>(
    from: D,
    parse: impl FnOnce(&str) -> Result<T, String>,
) -> Result<T, D::Error> {
    parse(&String::deserialize(from)?).map_err(serde::de::Error::custom)
}

fn key_store<'de, D: Deserializer<'de>>(from: D) -> Result<Option<HsmPlace>, D::Error> {
    read(from, |text| {
        let place = |uri: String| HsmPlace::parse(&uri).map_err(|problem| format!("the URI {problem}"));
        optional(text).map(place).transpose()
    })
}

fn stun_listen<'de, D: Deserializer<'de>>(from: D) -> Result<StunListen, D::Error> {
    read(from, |text| match text {
        "" => Ok(StunListen::LikeTls),
        "off" => Ok(StunListen::Off),
        address => address
            .parse()
            .map(StunListen::At)
            .map_err(|_| "it is `off` or ADDR:PORT, or empty for the address of `listen`".to_owned()),
    })
}

fn metrics_listen<'de, D: Deserializer<'de>>(from: D) -> Result<Option<SocketAddr>, D::Error> {
    read(from, |text| {
        let address = |text: String| text.parse::<SocketAddr>().ok().filter(|at| at.ip().is_loopback());
        match optional(text) {
            None => Ok(None),
            Some(text) => address(text)
                .map(Some)
                .ok_or_else(|| "it is ADDR:PORT with a loopback address, or empty for none".to_owned()),
        }
    })
}

/// What the kernel takes as the name of an interface (`dev_valid_name` in net/core/dev.c).
fn interface<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    read(from, |text| {
        let plain = !text.contains(|c: char| c == '/' || c == ':' || c == '%' || !c.is_ascii_graphic());
        if plain && (1..=INTERFACE_NAME_BYTES_MAX).contains(&text.len()) && text != "." && text != ".." {
            return Ok(text.to_owned());
        }
        Err(format!(
            "an interface has 1 to {INTERFACE_NAME_BYTES_MAX} visible ASCII characters, none of them `/`, `:` or `%`"
        ))
    })
}

fn mtu<'de, D: Deserializer<'de>>(from: D) -> Result<u16, D::Error> {
    let mtu = u16::deserialize(from)?;
    if mtu >= MTU_MIN {
        return Ok(mtu);
    }
    Err(serde::de::Error::custom(format!("IPv6 needs {MTU_MIN} bytes at least (RFC 8200 section 5)")))
}

/// Each is HOST:PORT or ADDRESS:PORT; whether a name exists shows when it is looked up.
fn endpoints<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    let endpoints = Vec::<String>::deserialize(from)?;
    match endpoints.iter().find(|endpoint| !is_endpoint(endpoint)) {
        None => Ok(endpoints),
        Some(bad) => Err(serde::de::Error::custom(format!("{bad:?} is not HOST:PORT or ADDRESS:PORT"))),
    }
}

fn is_endpoint(endpoint: &str) -> bool {
    let (host, port) = endpoint.rsplit_once(':').unwrap_or_default();
    let named = !host.is_empty() && !host.contains(':') && host.len() <= HOST_NAME_BYTES_MAX;
    port.parse::<u16>().is_ok_and(|port| port != 0) && (named || endpoint.parse::<SocketAddr>().is_ok())
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
    fn history_goes_back_thirty_days_unless_somebody_says_otherwise() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("controller.toml");
        for (text, environment, days, origin) in [
            ("", None, 30, "default"),
            ("retention_days = 0", None, 0, "controller.toml"),
            ("retention_days = 0", Some("400"), 400, "MESH_RETENTION_DAYS"),
        ] {
            fs::write(&file, text).unwrap();
            let variable =
                |name: &str| environment.filter(|_| name == "MESH_RETENTION_DAYS").map(String::from);
            let settings =
                Settings::layered(CONTROLLER_DEFAULTS, "", Some(file.clone()), &Table::new(), variable)
                    .unwrap();
            let parsed: ControllerSettings = settings.parse().unwrap();
            assert_eq!(parsed.retention_days, days, "{text}");
            let shown = settings.show(true);
            let line = shown.lines().find(|line| line.starts_with("retention_days")).unwrap();
            assert!(line.starts_with(&format!("retention_days = {days}")) && line.contains(origin), "{line}");
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
            ("interface = \"waytoolonginterface\"", "interface"),
            ("interface = \"mesh/0\"", "interface"),
            ("mtu = 576", "mtu"),
            ("endpoints = [\"192.0.2.1:1\", \"nowhere\"]", "endpoints"),
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
        for (text, part) in [
            ("stun_listen = \"on\"", "stun_listen = \"on\""),
            ("metrics_listen = \"0.0.0.0:9100\"", "metrics_listen = \"0.0.0.0:9100\""),
            ("key_store = \"pkcs11:pin-value=4711\"", "key_store in "),
        ] {
            fs::write(&file, text).unwrap();
            let settings =
                Settings::layered(CONTROLLER_DEFAULTS, "", Some(file.clone()), &Table::new(), |_| None);
            let failure = settings.unwrap().parse::<ControllerSettings>().unwrap_err();
            assert_eq!(failure.exit, 2, "{text}");
            assert!(failure.what.starts_with(part), "{text}: {failure}");
            assert!(!failure.to_string().contains("4711"), "a PIN is shown: {failure}");
        }
        let failure = node(&file.with_file_name("missing.toml"), "", &[]).unwrap_err();
        assert!(failure.what.contains("missing.toml"));
    }
}
