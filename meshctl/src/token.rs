//! `meshctl token`: what new nodes join with.

use mesh_proto::v1::{self as pb, tokens_client::TokensClient};
use serde_json::{Value, json};

use crate::{
    app::{App, client, operation_id},
    cli::List,
    error::{Exit, Failure, Result},
    output::{Listing, Table, Tone},
    text::{Span, ago, left, now, rfc3339},
};

const TOKEN_ID_BYTES: usize = 8;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Create a token and print it, alone, on stdout
    Create(Create),
    /// List tokens
    Ls(List),
    /// Make a token worthless
    Revoke(Revoke),
}

#[derive(Debug, clap::Args)]
pub(crate) struct Create {
    /// Tag that nodes joining with it get; may be repeated
    #[arg(long = "tag", value_name = "TAG")]
    tags: Vec<String>,
    /// The only name a node may join under
    #[arg(long)]
    name: Option<String>,
    /// How many nodes may join with it
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    uses: u32,
    /// How long it is good for
    #[arg(long, default_value = "1h", value_name = "TIME")]
    ttl: Span,
    /// Nodes wait until an operator runs `meshctl node approve`
    #[arg(long)]
    require_approval: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Revoke {
    /// Its id, as `meshctl token ls` shows it
    id: String,
}

impl Command {
    pub(crate) async fn run(self, app: &App) -> Result<Exit> {
        match self {
            Self::Create(create) => create.run(app).await,
            Self::Ls(list) => app.watch(&list.watch, || list_tokens(app)).await,
            Self::Revoke(revoke) => revoke.run(app).await,
        }
    }
}

impl Create {
    async fn run(self, app: &App) -> Result<Exit> {
        let request = pb::CreateTokenRequest {
            tags: self.tags,
            name: self.name.unwrap_or_default(),
            uses: self.uses,
            ttl_secs: self.ttl.seconds(),
            require_approval: self.require_approval,
            operation_id: operation_id(),
        };
        let answer = app.ask(client!(TokensClient<_>, app.controller().await?).create(request)).await?;
        let info = answer.info.unwrap_or_default();
        if app.out.is_json() {
            let mut body = document(&info);
            body["token"] = Value::String(answer.token);
            body["changed"] = Value::Bool(true);
            app.out.document("Token", &body);
            return Ok(Exit::Done);
        }
        // The token alone, so that it can be piped.
        app.out.line(&answer.token);
        app.out.note(&format!(
            "token {} for {}, expires in {}; use it with `meshctl enroll` on the new node",
            hex::encode(&info.id),
            crate::output::count(info.uses as usize, "node"),
            left(info.expires_at, now()),
        ));
        Ok(Exit::Done)
    }
}

async fn list_tokens(app: &App) -> Result<Exit> {
    let tokens = app.ask(client!(TokensClient<_>, app.controller().await?).list(pb::Empty {})).await?.tokens;
    app.out.listing(&listing(&tokens, now()));
    Ok(Exit::Done)
}

fn listing(tokens: &[pb::Token], now: i64) -> Listing {
    let mut table = Table::new(&["ID", "NAME", "TAGS", "USED", "CREATED", "EXPIRES", "BY", "STATE"]);
    for token in tokens {
        let tone = if token.state == "open" { Tone::Good } else { Tone::Dim };
        let approval = if token.require_approval { ", approval" } else { "" };
        table.toned_row(
            [
                hex::encode(&token.id),
                token.name.clone(),
                token.tags.join(","),
                format!("{}/{}", token.used, token.uses),
                ago(token.created_at, now),
                left(token.expires_at, now),
                token.created_by.clone(),
                format!("{}{approval}", token.state),
            ],
            Some(tone),
        );
    }
    Listing {
        kind: "TokenList",
        items: tokens.iter().map(document).collect(),
        names: tokens.iter().map(|token| hex::encode(&token.id)).collect(),
        table,
        empty: "no tokens; `meshctl token create` makes one",
    }
}

fn document(token: &pb::Token) -> Value {
    json!({
        "id": hex::encode(&token.id), "name": token.name, "tags": token.tags, "uses": token.uses, "used": token.used,
        "createdAt": rfc3339(token.created_at), "expiresAt": rfc3339(token.expires_at), "createdBy": token.created_by,
        "requireApproval": token.require_approval, "state": token.state,
    })
}

impl Revoke {
    async fn run(self, app: &App) -> Result<Exit> {
        let id = hex::decode(&self.id).ok().filter(|id| id.len() == TOKEN_ID_BYTES).ok_or_else(|| {
            Failure::usage(
                "this is not the id of a token",
                "take it from the first column of `meshctl token ls`; it has 16 hexadecimal digits",
            )
        })?;
        let request = pb::RevokeTokenRequest { id: id.into(), operation_id: operation_id() };
        let answer = app.ask(client!(TokensClient<_>, app.controller().await?).revoke(request)).await?;
        let line = if answer.changed { "revoked" } else { "was revoked already" };
        app.out.action(
            "TokenRevocation",
            answer.changed,
            json!({ "id": self.id, "detail": answer.detail }),
            &self.id,
            &[format!("token {} {line}", self.id)],
        );
        Ok(Exit::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_listed_with_ids_and_never_with_secrets() {
        let token = pb::Token {
            id: vec![0xab; 8].into(),
            tags: vec!["web".into(), "db".into()],
            uses: 3,
            used: 1,
            created_at: 1_800_000_000,
            expires_at: 1_800_003_600,
            state: "open".into(),
            created_by: "operator alice".into(),
            ..pb::Token::default()
        };
        let listing = listing(&[token], 1_800_000_100);
        assert_eq!(listing.names, ["abababababababab"]);
        let lines = anstream::adapter::strip_str(&listing.table.lines().join("\n")).to_string();
        assert_eq!(
            lines,
            "ID                NAME  TAGS    USED  CREATED  EXPIRES  BY              STATE\n\
             abababababababab  -     web,db  1/3   100s ago  58m      operator alice  open"
                .replace("CREATED  ", "CREATED   ")
        );
        assert_eq!(
            listing.items[0].to_string(),
            r#"{"id":"abababababababab","name":"","tags":["web","db"],"uses":3,"used":1,"createdAt":"2027-01-15T08:00:00Z","expiresAt":"2027-01-15T09:00:00Z","createdBy":"operator alice","requireApproval":false,"state":"open"}"#
        );
    }
}
