//! The firewall table, through `nft`.

use std::path::PathBuf;
use std::process::Stdio;

use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{Host, HostError};
use crate::firewall::TABLE;
use crate::limits::{PROGRAM_TIMEOUT, TABLE_BYTES_MAX};

/// Where `nft` is looked for besides `PATH`: daemons are often started without the `sbin` folders.
const SBIN: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/bin"];

/// Table `inet meshd` as it stands in the kernel: everything in it, and the handles that the kernel gave
/// when it was made. Two that are equal are the same table, unchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TableMark([u8; 32]);

impl Host {
    pub(crate) fn has_nft(&self) -> bool {
        self.nft.is_some()
    }

    /// What stands in the kernel as our table; `None` if it is not there.
    pub(crate) async fn table_mark(&self) -> Result<Option<TableMark>, HostError> {
        let nft = self.nft.as_ref().ok_or(HostError::NftMissing)?;
        let run = async {
            let mut child = tokio::process::Command::new(nft)
                .args(["-j", "list", "table"])
                .args(TABLE.split(' '))
                // The answer to a table that is not there is known by its words.
                .env("LC_ALL", "C")
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .kill_on_drop(true)
                .spawn()?;
            let stdout = child.stdout.take().expect("stdout is piped above");
            let stderr = child.stderr.take().expect("stderr is piped above");
            let (mut text, mut said) = (Vec::new(), Vec::new());
            let (mut stdout, mut stderr) = (stdout.take(TABLE_BYTES_MAX + 1), stderr.take(4096));
            tokio::try_join!(stdout.read_to_end(&mut text), stderr.read_to_end(&mut said))?;
            // One that still writes is ended here.
            drop((stdout, stderr));
            Ok((child.wait().await?, text, said))
        };
        let (status, text, said) = tokio::time::timeout(PROGRAM_TIMEOUT, run)
            .await
            .map_err(|_| HostError::NftTimeout)?
            .map_err(|source| HostError::NftRun { source })?;
        if text.len() as u64 > TABLE_BYTES_MAX {
            return Err(HostError::NftLong);
        }
        if status.success() {
            return Ok(Some(TableMark(Sha256::digest(&text).into())));
        }
        let said = String::from_utf8_lossy(&said);
        match said.contains("No such file or directory") {
            true => Ok(None),
            false => {
                Err(HostError::NftRefused { output: said.lines().take(4).collect::<Vec<_>>().join(" | ") })
            }
        }
    }

    pub(super) async fn apply_nft(&self, text: &str) -> Result<(), HostError> {
        let nft = self.nft.as_ref().ok_or(HostError::NftMissing)?;
        // Judged first: a refusal then names its line and nothing has changed.
        for arguments in [["-c", "-f", "-"].as_slice(), &["-f", "-"]] {
            let run = async {
                let mut child = tokio::process::Command::new(nft)
                    .args(arguments)
                    .stdin(Stdio::piped())
                    .stdout(Stdio::null())
                    .stderr(Stdio::piped())
                    .kill_on_drop(true)
                    .spawn()?;
                let mut stdin = child.stdin.take().expect("stdin is piped above");
                stdin.write_all(text.as_bytes()).await?;
                drop(stdin);
                child.wait_with_output().await
            };
            let output = tokio::time::timeout(PROGRAM_TIMEOUT, run)
                .await
                .map_err(|_| HostError::NftTimeout)?
                .map_err(|source| HostError::NftRun { source })?;
            if !output.status.success() {
                let text = String::from_utf8_lossy(&output.stderr);
                let output = text.lines().take(4).collect::<Vec<_>>().join(" | ");
                return Err(HostError::NftRefused { output });
            }
        }
        Ok(())
    }
}

pub(super) fn find_nft() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(SBIN.iter().map(PathBuf::from))
        .map(|folder| folder.join("nft"))
        .find(|candidate| candidate.is_file())
}
