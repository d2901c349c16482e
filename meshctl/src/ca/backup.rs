//! `meshctl ca backup`: the whole controller in one encrypted file.

use std::{
    fs::{self, OpenOptions},
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use mesh_proto::v1::{self as pb, ErrorCode, ca_client::CaClient};
use serde_json::json;

use crate::{
    app::{App, client},
    error::{Exit, Failure, Result},
    secret,
    text::{rfc3339, safe},
};

#[derive(Debug, clap::Args)]
pub(crate) struct Backup {
    /// Write the backup to this file; it must not exist
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// File with the passphrase that will protect it; `-` is stdin
    #[arg(long, value_name = "FILE", env = "MESH_BACKUP_PASSPHRASE_FILE")]
    passphrase_file: PathBuf,
}

impl Backup {
    pub(crate) async fn run(self, app: &App) -> Result<Exit> {
        if self.out.symlink_metadata().is_ok() {
            return Err(Failure::usage(
                format!("{} exists already", self.out.display()),
                "name a file that does not exist: a backup is never overwritten",
            ));
        }
        let passphrase = secret::passphrase_file(&self.passphrase_file)?;
        let mut client = client!(CaClient<_>, app.controller().await?);
        let request = pb::BackupRequest { passphrase: passphrase.to_string() };
        let stream = app.ask(client.backup(request)).await?;
        // Under another name until it is whole: half a backup is none.
        let partial = partial(&self.out);
        let written = receive(app, &partial, stream).await;
        let done = match written.and_then(|done| {
            fs::rename(&partial, &self.out).map_err(|error| Failure::file("write", &self.out, &error))?;
            Ok(done)
        }) {
            Ok(done) => done,
            Err(failure) => {
                let _ = fs::remove_file(&partial);
                return Err(failure);
            }
        };
        let name = self.out.display().to_string();
        let lines = [
            format!(
                "backup of {} with records {} to {} in {name}: {} bytes, encrypted",
                safe(&done.domain),
                done.first_seq,
                done.seq,
                done.bytes
            ),
            "keep its passphrase apart from it; a key in a hardware token is not in it".to_owned(),
            "restore: meshd controller restore --state-dir DIR --from FILE --backup-passphrase-file F"
                .to_owned(),
        ];
        let body = json!({
            "path": name, "domain": done.domain, "firstSeq": done.first_seq, "seq": done.seq, "headHash": hex::encode(&done.head_hash),
            "takenAt": rfc3339(done.taken_at), "bytes": done.bytes,
        });
        app.out.action("Backup", true, body, &name, &lines);
        Ok(Exit::Done)
    }
}

fn partial(out: &Path) -> PathBuf {
    let mut name = out.as_os_str().to_owned();
    name.push(".partial");
    name.into()
}

/// Writes what comes, with the summary that comes last.
async fn receive(
    app: &App,
    path: &Path,
    mut stream: tonic::Streaming<pb::BackupPart>,
) -> Result<pb::BackupDone> {
    let failed = |error| Failure::file("write", path, &error);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(failed)?;
    let (mut bytes, mut done) = (0, None);
    while let Some(part) = app.ask(async { stream.message().await.map(tonic::Response::new) }).await? {
        match part.part {
            Some(pb::backup_part::Part::Data(data)) => {
                file.write_all(&data).map_err(failed)?;
                bytes += data.len() as u64;
            }
            Some(pb::backup_part::Part::Done(summary)) => done = Some(summary),
            None => {}
        }
    }
    file.sync_all().map_err(failed)?;
    done.filter(|done| done.bytes == bytes).ok_or_else(|| {
        Failure::new(ErrorCode::BackupRefused, "the backup was cut off")
            .why("the controller did not send all of it")
            .next("look at the controller's log, then take it again")
    })
}
