//! How an interface with many peers behaves: memory, the cost of their timers, and all of them at once.
//!
//! ```text
//! scale PEERS             opens an interface with so many silent peers; prints memory and CPU
//! scale PEERS crowd       the same, then all of them shake hands with us at once, over loopback
//! ```
//!
//! Needs the rights to make an interface; `unshare -Urn` gives them. Prints one `name value` per line.

use std::env;
use std::error::Error;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::StaticSecret;
use mesh_tunnel::{PeerConfig, PrivateKey, PublicKey, Tunnel, TunnelBuilder};

type Fallible<T> = Result<T, Box<dyn Error>>;

/// How long the timers alone are watched.
const IDLE: Duration = Duration::from_secs(5);
/// A handshake that was not answered for so long is tried again: REKEY_TIMEOUT, WireGuard paper §6.1.
const RETRY: Duration = Duration::from_secs(5);
/// The peers begin within this time of each other, as ours do after a change of the network.
const SPREAD: Duration = Duration::from_millis(333);
/// Who is up says so again after this long, as a persistent keepalive does.
const KEEPALIVE: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> Fallible<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [peers] => hub(peers.parse()?, false),
        [peers, "crowd"] => hub(peers.parse()?, true),
        [peers, "come", server, port] => come(peers.parse()?, server.parse()?, port.parse()?),
        _ => Err("usage: scale PEERS [crowd]".into()),
    }
}

/// Keys that both programs know.
fn secret(peer: u32) -> [u8; 32] {
    let mut bytes = [7; 32];
    // Not at the ends: clamping (RFC 7748 §5) would make many the same.
    bytes[8..12].copy_from_slice(&peer.to_le_bytes());
    bytes
}

fn hub(peers: u32, crowd: bool) -> Fallible<()> {
    let status = Command::new("ip").args(["link", "set", "lo", "up"]).status()?;
    if !status.success() {
        return Err("cannot bring loopback up; try `unshare -Urn`".into());
    }
    let tunnel = TunnelBuilder::new("scale%d", PrivateKey::from_bytes([9; 32])).open()?;
    let start = Instant::now();
    for peer in 0..peers {
        let address = Ipv4Addr::from(0x0a00_0000 + peer);
        tunnel.set_peer(PeerConfig {
            allowed_ips: vec![ipnet::IpNet::from(std::net::IpAddr::from(address))],
            ..PeerConfig::new(PrivateKey::from_bytes(secret(peer)).public())
        })?;
    }
    println!("add_s {:.3}", start.elapsed().as_secs_f64());
    if tunnel.peers().len() != peers as usize {
        return Err("peers are missing".into());
    }
    let (before, start) = (cpu_seconds()?, Instant::now());
    thread::sleep(IDLE);
    println!("idle_cpu_percent {:.2}", 100.0 * (cpu_seconds()? - before) / start.elapsed().as_secs_f64());
    println!("rss_mib {:.1}", status_kib("VmRSS")? / 1024.0);
    if crowd {
        all_at_once(&*tunnel, peers)?;
    }
    println!("peak_mib {:.1}", status_kib("VmHWM")? / 1024.0);
    Ok(())
}

fn all_at_once(tunnel: &dyn Tunnel, peers: u32) -> Fallible<()> {
    let (server, port) = (tunnel.public_key().to_string(), tunnel.listen_port().to_string());
    let mut child =
        Command::new(env::current_exe()?).args([&peers.to_string(), "come", &server, &port]).spawn()?;
    let up = || tunnel.peers().iter().filter(|peer| peer.last_handshake.is_some()).count();
    let deadline = Instant::now() + PATIENCE;
    while up() == 0 && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(1));
    }
    let start = Instant::now();
    while up() < peers as usize && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(5));
    }
    println!("crowd_up {}", up());
    println!("crowd_s {:.3}", start.elapsed().as_secs_f64());
    println!("crowd_counters {:?}", tunnel.counters());
    child.kill()?;
    child.wait()?;
    Ok(())
}

struct Client {
    tunn: Tunn,
    up: bool,
    next: Instant,
}

/// The other side of all peers, in one process: each says hello until it is answered.
fn come(peers: u32, server: PublicKey, port: u16) -> Fallible<()> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    socket.set_nonblocking(true)?;
    let to: SocketAddr = (Ipv4Addr::LOCALHOST, port).into();
    let server = boringtun::x25519::PublicKey::from(server.0);
    let mut crowd: Vec<Client> = (0..peers)
        .map(|peer| Client {
            tunn: Tunn::new(StaticSecret::from(secret(peer)), server, None, None, peer, None),
            up: false,
            next: Instant::now() + SPREAD.mul_f64(rand::random_range(0.0..1.0)),
        })
        .collect();
    let (mut buffer, mut out) = ([0; 2048], [0; 2048]);
    loop {
        let mut idle = true;
        for peer in 0..crowd.len() {
            let client = &mut crowd[peer];
            if Instant::now() >= client.next {
                client.next = Instant::now() + if client.up { KEEPALIVE } else { RETRY };
                let message = match client.up {
                    true => client.tunn.encapsulate(&[], &mut out),
                    false => client.tunn.format_handshake_initiation(&mut out, true),
                };
                if let TunnResult::WriteToNetwork(message) = message {
                    // What is lost is tried again at its time.
                    let _ = socket.send_to(message, to);
                }
                idle = false;
            }
            while let Ok((length, _)) = socket.recv_from(&mut buffer) {
                idle = false;
                // Cookie replies have the receiver where responses have the sender.
                let at = if buffer[0] == 3 { 4 } else { 8 };
                let index =
                    u32::from_le_bytes([buffer[at], buffer[at + 1], buffer[at + 2], buffer[at + 3]]) >> 8;
                let Some(client) = crowd.get_mut(index as usize) else { continue };
                match client.tunn.decapsulate(None, &buffer[..length], &mut out) {
                    TunnResult::WriteToNetwork(keepalive) => {
                        (client.up, client.next) = (true, Instant::now() + KEEPALIVE);
                        let _ = socket.send_to(keepalive, to);
                    }
                    // A cookie: with it at once.
                    TunnResult::Done if !client.up => client.next = Instant::now(),
                    _ => {}
                }
            }
        }
        if idle {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// CPU time of this process so far, seconds.
fn cpu_seconds() -> Fallible<f64> {
    let mut all = 0_u64;
    for task in std::fs::read_dir("/proc/self/task")? {
        let used = std::fs::read_to_string(task?.path().join("schedstat"))?;
        all += used.split_whitespace().next().ok_or("no time in schedstat")?.parse::<u64>()?;
    }
    Ok(all as f64 / 1e9)
}

fn status_kib(field: &str) -> Fallible<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with(field)).ok_or("no such field")?;
    Ok(line.split_whitespace().nth(1).ok_or("no value")?.parse()?)
}
