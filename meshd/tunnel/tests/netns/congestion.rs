//! ECN crosses the tunnel both ways (RFC 6040), as with the kernel's WireGuard.

use std::net::UdpSocket;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use std::io::IoSliceMut;
use std::os::fd::AsRawFd;

use crate::lab::{connected, run};

const NOT_ECT: u32 = 0;
const ECT1: u32 = 1;
const ECT0: u32 = 2;
const CE: u8 = 3;

fn tos_of_next(socket: &UdpSocket) -> u8 {
    let mut bytes = [0; 64];
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let mut space = nix::cmsg_space!(u8, i32);
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::empty()).unwrap();
    let tos = message.cmsgs().unwrap().find_map(|control| match control {
        ControlMessageOwned::Ipv4Tos(tos) => Some(tos),
        ControlMessageOwned::Ipv6TClass(class) => Some(class as u8),
        _ => None,
    });
    tos.expect("the type of service was asked for")
}

netns_tests! {
    fn ecn_goes_out_with_the_datagram_and_congestion_comes_back_in() {
        let (a, b) = connected();
        // What b's link marks, all of its datagrams have met congestion.
        let marking = "add table inet t; add chain inet t c { type filter hook prerouting priority mangle; }; \
            add rule inet t c meta l4proto udp iifname veth0 ip ecn ect0 ip ecn set ce; \
            add rule inet t c meta l4proto udp iifname veth0 ip ecn ect1 ip ecn set ce";
        for (round, inner, outer) in [(0, a.inner4, "4"), (1, a.inner6, "6")] {
            let to_address = if round == 0 { b.inner4 } else { b.inner6 };
            let (from, to) = (a.namespace.udp((inner, 0).into()), b.namespace.udp((to_address, 0).into()));
            let (sender, receiver) = (socket2::SockRef::from(&from), socket2::SockRef::from(&to));
            receiver.set_recv_tos_v4(true).unwrap();
            if outer == "6" {
                receiver.set_recv_tclass_v6(true).unwrap();
            }
            for (marked, congested) in [(false, [0, 1, 2]), (true, [0, CE, CE])] {
                if marked {
                    b.namespace.run(|| run("nft", &[marking]));
                }
                for (ecn, expected) in [NOT_ECT, ECT1, ECT0].into_iter().zip(congested) {
                    if outer == "6" {
                        sender.set_tclass_v6(ecn | 0xb8).unwrap();
                    } else {
                        sender.set_tos_v4(ecn | 0xb8).unwrap();
                    }
                    from.send_to(b"x", to.local_addr().unwrap()).unwrap();
                    assert_eq!(tos_of_next(&to), 0xb8 | expected, "ECN {ecn}, marked {marked}, inner IPv{outer}");
                }
            }
            b.namespace.run(|| run("nft", &["delete table inet t"]));
        }
        let counters = b.tunnel.counters();
        assert_eq!((counters.rx_invalid, counters.rx_wrong_source), (0, 0), "{counters:?}");
    }
}
