//! The controller's UDP port: tells nodes where their datagrams come from (STUN), and takes the relay's
//! frames. Nothing here answers with more than half as much again as it was sent.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_core::rate::Bucket;
use mesh_core::{relay, stun};
use mesh_runtime::{SharedClock, ShutdownToken};

use crate::config::StunListen;
use crate::error::StartupError;
use crate::limits::{STUN_BURST, STUN_PER_SECOND, STUN_SOURCES_MAX};
use crate::relay::RelayHub;
use crate::udp_port::UdpPort;

/// Largest datagram that is read, bytes; longer ones are cut, and then are no frames.
const DATAGRAM_BYTES_MAX: usize = relay::DATAGRAM_BYTES_MAX + relay::OVERHEAD_BYTES + 1;
/// How long reading pauses when the socket fails, so that an error that stays does not spin.
const ERROR_PAUSE: Duration = Duration::from_millis(50);

/// Opens the UDP port, on the number of the TLS port unless the configuration says otherwise. `None` if it is
/// off, or if that number was not asked for and is taken: then nodes do without.
///
/// # Errors
/// [`StartupError`] if the address was asked for and cannot be had.
pub(crate) async fn bind(wanted: StunListen, tls: SocketAddr) -> Result<Option<Arc<UdpPort>>, StartupError> {
    let address = match wanted {
        StunListen::Off => return Ok(None),
        StunListen::At(address) => address,
        StunListen::LikeTls => tls,
    };
    match UdpPort::bind(address).await {
        Ok(socket) => Ok(Some(Arc::new(socket))),
        Err(error) if wanted == StunListen::LikeTls => {
            tracing::warn!(%address, %error, "no UDP port: nodes behind NAT meet only by the relay over TLS");
            Ok(None)
        }
        Err(source) if source.kind() == std::io::ErrorKind::AddrInUse => {
            Err(StartupError::PortInUse { address })
        }
        Err(source) => Err(StartupError::Listen { address: address.to_string(), source }),
    }
}

/// Answers until `stop` is cancelled.
pub(crate) async fn serve(
    socket: Arc<UdpPort>,
    relay: Option<RelayHub>,
    clock: SharedClock,
    stop: ShutdownToken,
) {
    let mut sources = Sources::default();
    let mut datagram = vec![0; DATAGRAM_BYTES_MAX];
    loop {
        let received = tokio::select! {
            () = stop.cancelled() => return,
            received = socket.receive(&mut datagram) => received,
        };
        let (length, way) = match received {
            Ok(received) => received,
            // An ICMP error for something sent earlier, as a rule.
            Err(error) => {
                tracing::debug!(%error, "UDP socket");
                tokio::time::sleep(ERROR_PAUSE).await;
                continue;
            }
        };
        let bytes = &datagram[..length];
        if relay::session_of(bytes).is_some() {
            if let Some(relay) = &relay {
                relay.take_frame(bytes, way);
            }
        } else if let Ok(transaction) = stun::parse_request(bytes)
            && sources.admit(way.to.ip(), clock.now())
        {
            // If it cannot be sent now the node asks again.
            let _ = socket.try_send(&stun::binding_response(transaction, way.to), way);
        }
    }
}

/// How often each source is answered. IPv6 sources count by their /64, which is one subscriber.
#[derive(Debug, Default)]
struct Sources(HashMap<IpAddr, Bucket>);

impl Sources {
    fn admit(&mut self, source: IpAddr, now: Instant) -> bool {
        let source = subscriber(source);
        if self.0.len() >= STUN_SOURCES_MAX && !self.0.contains_key(&source) {
            self.0.retain(|_, bucket| !bucket.is_full(now));
            if self.0.len() >= STUN_SOURCES_MAX {
                // A flood from everywhere: those that are known go on.
                return false;
            }
        }
        self.0.entry(source).or_insert_with(|| Bucket::new(STUN_PER_SECOND, STUN_BURST, now)).take(1, now)
    }
}

fn subscriber(source: IpAddr) -> IpAddr {
    match source.to_canonical() {
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::stun::TransactionId;
    use mesh_runtime::SystemClock;
    use tokio::net::UdpSocket;

    use super::*;

    #[test]
    fn a_source_is_answered_so_often_and_no_more() {
        let (mut sources, now) = (Sources::default(), Instant::now());
        let source: IpAddr = "192.0.2.1".parse().unwrap();
        let answered = (0..1000).filter(|_| sources.admit(source, now)).count() as u64;
        assert_eq!(answered, STUN_BURST);
        assert!(sources.admit("192.0.2.2".parse().unwrap(), now), "others are not its victims");
        assert!(sources.admit(source, now + Duration::from_secs(1)));
    }

    #[test]
    fn one_ipv6_subscriber_is_one_source_and_a_flood_from_everywhere_takes_bounded_memory() {
        let (mut sources, now) = (Sources::default(), Instant::now());
        for host in 0..STUN_BURST {
            assert!(sources.admit(format!("2001:db8::{host:x}").parse().unwrap(), now));
        }
        assert!(!sources.admit("2001:db8::ffff".parse().unwrap(), now));
        for number in 0..(STUN_SOURCES_MAX as u32 + 500) {
            sources.admit(std::net::Ipv4Addr::from(number).into(), now);
        }
        assert_eq!(sources.0.len(), STUN_SOURCES_MAX);
        let later = now + Duration::from_secs(3600);
        assert!(sources.admit("198.51.100.1".parse().unwrap(), later), "the flood is over");
    }

    #[tokio::test]
    async fn binding_requests_are_answered_and_nothing_else_is() {
        let socket = bind(StunListen::At("127.0.0.1:0".parse().unwrap()), ([127, 0, 0, 1], 0).into()).await;
        let socket = socket.unwrap().unwrap();
        let (address, stop) = (socket.local_addr().unwrap(), ShutdownToken::new());
        let task = tokio::spawn(serve(socket, None, Arc::new(SystemClock), stop.clone()));
        let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let id = TransactionId([7; 12]);
        let mut indication = stun::binding_request(id);
        indication[1] = 0x11;
        // Only the last of these has an answer, so the first answer is its.
        for datagram in
            [&b""[..], &[0x80; 64], &[4, 0, 0, 0, 1, 2, 3, 4], &indication, &stun::binding_request(id)]
        {
            client.send_to(datagram, address).await.unwrap();
        }
        let mut buffer = [0; 1024];
        let (length, from) = client.recv_from(&mut buffer).await.unwrap();
        assert_eq!(from, address);
        assert!(length <= stun::RESPONSE_BYTES_MAX);
        assert_eq!(stun::parse_response(&buffer[..length], id), Ok(client.local_addr().unwrap()));
        assert!(client.try_recv_from(&mut buffer).is_err());
        stop.cancel();
        task.await.unwrap();
    }
}
