//! Which peer an inner address belongs to: longest prefix, both families.

use std::collections::HashSet;
use std::net::IpAddr;

use ip_network_table::IpNetworkTable;
use ipnet::IpNet;

/// A routing table from inner prefixes to owners. Every prefix has at most one owner; prefixes may nest.
pub(crate) struct AllowedIps<T> {
    table: IpNetworkTable<T>,
}

impl<T: Clone + PartialEq> AllowedIps<T> {
    pub(crate) fn new() -> Self {
        Self { table: IpNetworkTable::new() }
    }

    /// The owner of the longest prefix that contains `address`.
    pub(crate) fn owner_of(&self, address: IpAddr) -> Option<&T> {
        self.table.longest_match(address).map(|(_, owner)| owner)
    }

    /// The first of `prefixes` that somebody other than `owner` has, and who.
    pub(crate) fn conflict<'a>(&'a self, prefixes: &[IpNet], owner: Option<&T>) -> Option<(IpNet, &'a T)> {
        prefixes.iter().find_map(|prefix| {
            let holder = self.table.exact_match(network(prefix))?;
            (Some(holder) != owner).then(|| (prefix.trunc(), holder))
        })
    }

    /// Moves `owner` from `old` to `new` prefixes. Call only when [`conflict`](Self::conflict) found none.
    pub(crate) fn replace(&mut self, old: &[IpNet], new: &[IpNet], owner: &T) {
        let kept: HashSet<IpNet> = new.iter().map(IpNet::trunc).collect();
        for prefix in old.iter().filter(|prefix| !kept.contains(&prefix.trunc())) {
            self.table.remove(network(prefix));
        }
        for prefix in kept {
            self.table.insert(network(&prefix), owner.clone());
        }
    }
}

fn network(prefix: &IpNet) -> ip_network::IpNetwork {
    match prefix.trunc() {
        IpNet::V4(net) => ip_network::Ipv4Network::new(net.network(), net.prefix_len())
            .expect("a truncated prefix has no host bits")
            .into(),
        IpNet::V6(net) => ip_network::Ipv6Network::new(net.network(), net.prefix_len())
            .expect("a truncated prefix has no host bits")
            .into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;
    use std::net::{Ipv4Addr, Ipv6Addr};

    /// The same table as a list that is searched from end to end.
    #[derive(Default)]
    struct PlainScan(Vec<(IpNet, u8)>);

    impl PlainScan {
        fn owner_of(&self, address: IpAddr) -> Option<u8> {
            let matching = self.0.iter().filter(|(prefix, _)| prefix.contains(&address));
            matching.max_by_key(|(prefix, _)| prefix.prefix_len()).map(|(_, owner)| *owner)
        }
    }

    // Few distinct bits, so that prefixes nest, collide and are probed.
    fn any_address() -> impl Strategy<Value = IpAddr> {
        let sparse = |bits: u32| (bits & 0x8000_4003) | 0x0a00_0000;
        prop_oneof![
            any::<u32>().prop_map(move |bits| Ipv4Addr::from(sparse(bits)).into()),
            any::<u32>().prop_map(move |bits| {
                let bits = u128::from(sparse(bits));
                Ipv6Addr::from(bits << 96 | bits << 32 | bits).into()
            }),
        ]
    }

    fn any_prefix() -> impl Strategy<Value = IpNet> {
        (any_address(), any::<u8>()).prop_map(|(address, length)| {
            let bits = if address.is_ipv4() { 32 } else { 128 };
            IpNet::new(address, length % (bits + 1)).unwrap()
        })
    }

    proptest! {
        /// Whatever owners claim, the table agrees with a plain scan over what was accepted.
        #[test]
        fn lookups_match_a_plain_scan(
            steps in vec((0..4_u8, vec(any_prefix(), 0..6)), 0..32),
            probes in vec(any_address(), 32),
        ) {
            let (mut table, mut scan) = (AllowedIps::new(), PlainScan::default());
            let mut held: [Vec<IpNet>; 4] = Default::default();
            for (owner, prefixes) in steps {
                let claimed = |prefix: &IpNet| scan.0.iter().any(|(p, o)| *p == prefix.trunc() && *o != owner);
                let refused = prefixes.iter().any(claimed);
                prop_assert_eq!(table.conflict(&prefixes, Some(&owner)).is_some(), refused);
                if !refused {
                    table.replace(&held[owner as usize], &prefixes, &owner);
                    scan.0.retain(|(_, o)| *o != owner);
                    scan.0.extend(prefixes.iter().map(|prefix| (prefix.trunc(), owner)));
                    held[owner as usize] = prefixes;
                }
                for probe in &probes {
                    prop_assert_eq!(table.owner_of(*probe).copied(), scan.owner_of(*probe), "{}", probe);
                }
            }
        }
    }

    #[test]
    fn a_nested_prefix_takes_its_addresses_from_the_outer_one() {
        let mut table = AllowedIps::new();
        table.replace(&[], &["10.0.0.0/8".parse().unwrap(), "::/0".parse().unwrap()], &'a');
        table.replace(&[], &["10.1.0.0/16".parse().unwrap(), "fd00::/8".parse().unwrap()], &'b');
        for (address, owner) in [("10.1.2.3", 'b'), ("10.2.0.0", 'a'), ("fd12::1", 'b'), ("2001:db8::", 'a')]
        {
            assert_eq!(table.owner_of(address.parse().unwrap()), Some(&owner), "{address}");
        }
        assert_eq!(table.owner_of("192.0.2.1".parse().unwrap()), None);
        table.replace(&["10.1.0.0/16".parse().unwrap()], &[], &'b');
        assert_eq!(table.owner_of("10.1.2.3".parse().unwrap()), Some(&'a'));
    }
}
