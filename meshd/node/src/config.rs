//! What a node is told when it starts.

use std::path::PathBuf;

pub use mesh_tunnel::Backend;

/// Everything `meshd node run` takes. The caller has parsed it before anything is opened.
#[derive(Debug, Clone)]
pub struct RunConfig {
    /// Identity, keys, last map, CRLs and managed pairs. Created with mode 0700; refused if others may enter.
    pub state_dir: PathBuf,
    /// Unix socket of the `Local` service.
    pub socket: PathBuf,
    /// Name of the overlay interface, 1 to 15 bytes.
    pub interface: String,
    /// Largest packet inside the overlay, bytes.
    pub mtu: u16,
    /// UDP port of WireGuard, both families; 0 takes any that is free.
    pub wg_port: u16,
    /// Whose WireGuard carries the overlay.
    pub backend: Backend,
    /// Join token to enroll with when there is no identity yet; `None` waits for `meshctl enroll`.
    pub token_file: Option<PathBuf>,
    /// Name to ask for at enrollment; `None` takes the host name.
    pub name: Option<String>,
    /// Folder of declared pairs, `*.toml`; only root's files are read. May be missing.
    pub certs_dir: PathBuf,
    /// Underlay addresses an administrator vouches for, `HOST:PORT` each, tried before all others by peers. Names
    /// are looked up every 60 s, and when a peer falls silent.
    pub endpoints: Vec<String>,
}

impl Default for RunConfig {
    fn default() -> Self {
        Self {
            state_dir: "/var/lib/meshd/node".into(),
            socket: "/run/meshd/node.sock".into(),
            interface: "mesh0".into(),
            mtu: 1420,
            wg_port: 51820,
            backend: Backend::Auto,
            token_file: None,
            name: None,
            certs_dir: "/etc/meshd/certs.d".into(),
            endpoints: Vec::new(),
        }
    }
}
