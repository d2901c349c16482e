//! The text of table `inet meshd`: who may speak to this host over the overlay.
//!
//! Pure text from the peers; `hostop` hands it to `nft`. The table outlives the daemon, as the
//! unreachable routes do: with meshd gone nothing with a mesh address leaves or enters in clear.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};

/// Our table. No other is ever read or written.
pub(crate) const TABLE: &str = "inet meshd";
/// Its name within its family.
pub(crate) const TABLE_NAME: &str = "meshd";

/// What the table says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Firewall {
    pub(crate) interface: String,
    pub(crate) ipv4_pool: Ipv4Net,
    pub(crate) ipv6_prefix: Ipv6Net,
    /// All peers: they may be answered and may send ICMP.
    pub(crate) peers: BTreeSet<(Ipv4Addr, Ipv6Addr)>,
    /// Peers that a rule lets in: they may open connections.
    pub(crate) inbound: BTreeSet<(Ipv4Addr, Ipv6Addr)>,
}

impl Firewall {
    /// One transaction for `nft -f -`: the table appears, or changes from its old to its new form, as a
    /// whole. Naming it before deleting it makes the delete succeed when there is none.
    pub(crate) fn ruleset(&self) -> String {
        let Self { interface, ipv4_pool, ipv6_prefix, .. } = self;
        let mut text = format!("table {TABLE}\ndelete table {TABLE}\ntable {TABLE} {{\n");
        write_sets(&mut text, "peers", &self.peers);
        write_sets(&mut text, "inbound", &self.inbound);
        // ICMP and ICMPv6 by number: their names are in /etc/protocols, which small systems lack.
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            r#"	chain input {{
		type filter hook input priority filter; policy accept;
		iifname != {{ "{interface}", "lo" }} ip saddr {ipv4_pool} drop
		iifname != {{ "{interface}", "lo" }} ip6 saddr {ipv6_prefix} drop
		iifname "{interface}" jump overlay
	}}
	chain forward {{
		type filter hook forward priority filter; policy accept;
		iifname != "{interface}" ip saddr {ipv4_pool} drop
		iifname != "{interface}" ip6 saddr {ipv6_prefix} drop
		oifname != "{interface}" ip daddr {ipv4_pool} drop
		oifname != "{interface}" ip6 daddr {ipv6_prefix} drop
		iifname "{interface}" jump overlay
	}}
	chain output {{
		type filter hook output priority filter; policy accept;
		oifname != {{ "{interface}", "lo" }} ip daddr {ipv4_pool} drop
		oifname != {{ "{interface}", "lo" }} ip6 daddr {ipv6_prefix} drop
	}}
	chain overlay {{
		meta nfproto ipv4 ip saddr != @peers4 drop
		meta nfproto ipv6 ip6 saddr != @peers6 drop
		ct state established,related accept
		meta l4proto {{ 1, 58 }} accept
		ip saddr @inbound4 accept
		ip6 saddr @inbound6 accept
		drop
	}}
}}
"#
        );
        text
    }

    /// The transaction that takes the table away; for `leave` only.
    pub(crate) fn removal() -> String {
        format!("table {TABLE}\ndelete table {TABLE}\n")
    }
}

fn write_sets(text: &mut String, name: &str, members: &BTreeSet<(Ipv4Addr, Ipv6Addr)>) {
    let (four, six): (Vec<_>, Vec<_>) =
        members.iter().map(|(four, six)| (four.to_string(), six.to_string())).unzip();
    for (suffix, kind, elements) in [("4", "ipv4_addr", four), ("6", "ipv6_addr", six)] {
        let elements = match elements.is_empty() {
            true => String::new(),
            false => format!("\t\telements = {{ {} }}\n", elements.join(", ")),
        };
        let _ = write!(text, "\tset {name}{suffix} {{\n\t\ttype {kind}\n{elements}\t}}\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(host: u8) -> (Ipv4Addr, Ipv6Addr) {
        (Ipv4Addr::new(100, 64, 0, host), format!("fd5e:1:2::{host}").parse().unwrap())
    }

    fn firewall() -> Firewall {
        Firewall {
            interface: "mesh0".into(),
            ipv4_pool: "100.64.0.0/10".parse().unwrap(),
            ipv6_prefix: "fd5e:1:2::/48".parse().unwrap(),
            peers: [address(2), address(3)].into(),
            inbound: [address(2)].into(),
        }
    }

    #[test]
    fn the_ruleset_reads_as_meant() {
        insta::assert_snapshot!(firewall().ruleset());
    }

    #[test]
    fn without_peers_everything_from_the_overlay_is_dropped() {
        let empty = Firewall { peers: BTreeSet::new(), inbound: BTreeSet::new(), ..firewall() };
        let text = empty.ruleset();
        assert!(!text.contains("elements"), "{text}");
        assert!(text.contains("ip saddr != @peers4 drop"), "{text}");
    }

    /// Judged by nft itself, in a network namespace of its own. Left out, and said, where namespaces are denied.
    #[test]
    fn nft_takes_every_form_and_the_table_is_replaced_as_a_whole() {
        let empty = Firewall { peers: BTreeSet::new(), inbound: BTreeSet::new(), ..firewall() };
        let script = [firewall().ruleset(), empty.ruleset(), firewall().ruleset()]
            .map(|text| format!("nft -c -f - <<'E' && nft -f - <<'E'\n{text}E\n{text}E\n"))
            .join("test $? = 0 || exit 9\n");
        let foreign = "nft add table inet theirs || exit 77\n";
        let removal = format!("nft list tables; nft -f - <<'E'\n{}E\nnft list tables\n", Firewall::removal());
        let output = std::process::Command::new("unshare")
            .args(["-Urn", "sh", "-c", &format!("{foreign}{script}{removal}")])
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .output();
        let output = match output {
            Ok(output) if output.status.code() != Some(77) && output.status.code() != Some(127) => output,
            _ => return eprintln!("left out: no nft, or no namespaces here"),
        };
        let said = String::from_utf8_lossy(&output.stderr);
        if said.contains("unshare failed") || said.contains("Operation not permitted") {
            return eprintln!("left out: {said}");
        }
        assert!(output.status.success(), "{said}");
        let tables = String::from_utf8_lossy(&output.stdout);
        let tables: Vec<&str> = tables.lines().collect();
        assert_eq!(tables, ["table inet theirs", "table inet meshd", "table inet theirs"]);
    }
}
