//! `meshctl ping`: reach a node step by step.

use std::time::Duration;

use mesh_proto::v1::{self as pb, ErrorCode, local_client::LocalClient};
use serde_json::json;

use crate::{
    app::{App, client},
    client::NODE,
    error::{Exit, Failure, Result},
    output::{Format, Tone, paint},
    text::{Span, rtt, safe},
};

/// The layer whose answers count: a packet through the tunnel and back.
const OVERLAY: &str = "overlay";

#[derive(Debug, clap::Args)]
pub(crate) struct Ping {
    /// The node's name
    node: String,
    /// How many packets
    #[arg(long, short, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    count: u32,
    /// How long to wait for each answer
    #[arg(long, short = 'W', default_value = "1s", value_name = "TIME")]
    wait: Span,
}

impl Ping {
    pub(crate) async fn run(self, app: &App) -> Result<Exit> {
        let timeout_ms = u32::try_from(self.wait.0.as_millis()).unwrap_or(u32::MAX);
        let request = pb::PingRequest { node: self.node.clone(), count: self.count, timeout_ms };
        let mut node = client!(LocalClient<_>, app.node().await?);
        let replies = self.replies(app, &mut node, request).await?;
        let answered = replies.iter().any(|reply| reply.layer == OVERLAY && reply.ok);
        if app.out.is_json() {
            let items: Vec<_> = replies
                .iter()
                .map(|reply| {
                    json!({
                        "layer": reply.layer, "ok": reply.ok, "rttMicros": reply.rtt_us, "address": reply.address,
                        "detail": reply.detail, "next": reply.next,
                    })
                })
                .collect();
            app.out.document("Ping", &json!({ "node": self.node, "reachable": answered, "replies": items }));
        }
        if answered {
            return Ok(Exit::Done);
        }
        let failure = Failure::new(ErrorCode::PeerUnreachable, format!("{} does not answer", self.node))
            .why(reason(&replies))
            .next(next(&replies));
        if app.out.is_json() {
            failure.print(None);
            return Ok(failure.exit);
        }
        Err(failure)
    }

    async fn replies(
        &self,
        app: &App,
        node: &mut LocalClient<tonic::transport::Channel>,
        request: pb::PingRequest,
    ) -> Result<Vec<pb::PingReply>> {
        // Underlay, handshake, and as many packets as were asked for.
        let limit = self.wait.0 * (self.count + 4) + Duration::from_secs(5);
        let work = async {
            let mut stream = node.ping(request).await?.into_inner();
            let mut replies = Vec::new();
            while let Some(reply) = stream.message().await? {
                if matches!(app.out.format, Format::Table | Format::Wide) {
                    app.out.line(&line(&reply));
                }
                replies.push(reply);
            }
            Ok::<_, tonic::Status>(replies)
        };
        match tokio::time::timeout(app.places.timeout.unwrap_or(limit), work).await {
            Ok(replies) => replies.map_err(|status| Failure::from_status(&status, NODE)),
            Err(_) => Err(Failure::new(ErrorCode::TimedOut, "the local node did not finish the ping")
                .next("see its log")),
        }
    }
}

/// `overlay    0.9ms      100.64.0.2`
fn line(reply: &pb::PingReply) -> String {
    let result = if reply.ok {
        paint(Tone::Good, if reply.rtt_us == 0 { "ok".to_owned() } else { rtt(reply.rtt_us) }.as_str())
    } else {
        paint(Tone::Bad, "no reply")
    };
    let width = 10 + result.len() - anstream::adapter::strip_str(&result).to_string().len();
    format!("{:<10} {result:<width$} {}  {}", safe(&reply.layer), safe(&reply.address), safe(&reply.detail))
        .trim_end()
        .to_owned()
}

/// The lowest layer that failed.
fn reason(replies: &[pb::PingReply]) -> String {
    match replies.iter().find(|reply| !reply.ok) {
        Some(reply) if reply.detail.is_empty() => format!("no reply on the {} layer", safe(&reply.layer)),
        Some(reply) => format!("{}: {}", safe(&reply.layer), safe(&reply.detail)),
        None => "nothing came back".to_owned(),
    }
}

/// What to do about it.
fn next(replies: &[pb::PingReply]) -> String {
    match replies.iter().find(|reply| !reply.ok && !reply.next.is_empty()) {
        Some(reply) => safe(&reply.next).into_owned(),
        None => {
            "`meshctl status` shows its path and lease, `meshctl doctor` looks for causes here".to_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(layer: &str, ok: bool, rtt_us: u32, detail: &str) -> pb::PingReply {
        pb::PingReply {
            layer: layer.into(),
            ok,
            rtt_us,
            detail: detail.into(),
            address: "100.64.0.2".into(),
            next: String::new(),
        }
    }

    #[test]
    fn each_layer_has_a_line_and_the_lowest_failure_is_the_reason() {
        let plain = |reply: &pb::PingReply| anstream::adapter::strip_str(&line(reply)).to_string();
        assert_eq!(plain(&reply("overlay", true, 912, "")), "overlay    0.9ms      100.64.0.2");
        assert_eq!(
            plain(&reply("handshake", true, 0, "41s ago")),
            "handshake  ok         100.64.0.2  41s ago"
        );
        let replies = [
            reply("underlay", true, 1, ""),
            reply("handshake", false, 0, "timed out"),
            reply("overlay", false, 0, ""),
        ];
        assert_eq!(plain(&replies[2]), "overlay    no reply   100.64.0.2");
        assert_eq!(reason(&replies), "handshake: timed out");
        assert_eq!(reason(&replies[2..]), "no reply on the overlay layer");
        assert!(next(&replies).contains("meshctl doctor"));
        let told = pb::PingReply { next: "open UDP port 51820".into(), ..replies[1].clone() };
        assert_eq!(next(&[replies[0].clone(), told]), "open UDP port 51820");
    }
}
