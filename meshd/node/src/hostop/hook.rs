//! The reload hook: a command of root's that tells a service to read its pair again.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::AsyncReadExt as _;

use crate::limits::HOOK_OUTPUT_BYTES_MAX;

/// Why a hook counts as failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HookError {
    #[error("hook cannot be started: {0}")]
    Start(String),
    #[error("hook ended with {status}{}", output_suffix(.output))]
    Failed { status: String, output: String },
    #[error("hook did not end within {} s", .0.as_secs())]
    Timeout(Duration),
}

fn output_suffix(output: &str) -> String {
    if output.is_empty() { String::new() } else { format!(": {output}") }
}

/// Runs `command` with `/bin/sh -c`, in its own process group and with a small environment:
/// `PATH`, `MESH_PAIR` (the pair's name) and `MESH_PAIR_DIR`. After `limit` the whole group is killed.
pub(super) async fn run(command: &str, name: &str, folder: &Path, limit: Duration) -> Result<(), HookError> {
    let mut child = tokio::process::Command::new("/bin/sh")
        .args(["-c", command])
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("MESH_PAIR", name)
        .env("MESH_PAIR_DIR", folder)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| HookError::Start(error.to_string()))?;
    let group = child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw);
    let mut stderr = child.stderr.take().expect("stderr is piped above");
    let mut output = vec![0; HOOK_OUTPUT_BYTES_MAX];
    let mut length = 0;
    let mut open = true;
    let deadline = tokio::time::sleep(limit);
    tokio::pin!(deadline);
    loop {
        tokio::select! {
            status = child.wait() => {
                // What is left in the pipe belongs to children that may never close it.
                let read = tokio::time::timeout(Duration::from_millis(100), stderr.read(&mut output[length..]));
                if let (true, Ok(Ok(count))) = (open, read.await) {
                    length += count;
                }
                let status = status.map_err(|error| HookError::Start(error.to_string()))?;
                if status.success() {
                    return Ok(());
                }
                let text = String::from_utf8_lossy(&output[..length]);
                let output = text.split_whitespace().collect::<Vec<_>>().join(" ");
                return Err(HookError::Failed { status: status.to_string(), output });
            }
            // Past the limit the rest is read and thrown away, so that the hook does not block.
            read = async {
                let mut rest = [0; 512];
                match length < HOOK_OUTPUT_BYTES_MAX {
                    true => stderr.read(&mut output[length..]).await.map(|count| (count, true)),
                    false => stderr.read(&mut rest).await.map(|count| (count, false)),
                }
            }, if open => match read {
                Ok((0, _)) | Err(_) => open = false,
                Ok((count, kept)) => length += if kept { count } else { 0 },
            },
            () = &mut deadline => {
                if let Some(group) = group {
                    // Fails only if the group has just ended by itself.
                    let _ = killpg(group, Signal::SIGKILL);
                }
                let _ = child.wait().await;
                return Err(HookError::Timeout(limit));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn a_hook_sees_the_pair_and_nothing_of_the_daemon() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("env");
        let command = format!("env > {}", out.display());
        run(&command, "api.mesh.internal", Path::new("/etc/tls"), LIMIT).await.unwrap();
        let text = std::fs::read_to_string(out).unwrap();
        assert!(text.contains("MESH_PAIR=api.mesh.internal\n"), "{text}");
        assert!(text.contains("MESH_PAIR_DIR=/etc/tls\n"), "{text}");
        assert!(!text.contains("CARGO"), "{text}");
    }

    #[tokio::test]
    async fn a_failing_hook_tells_its_status_and_words() {
        let error = run("echo no such unit >&2; exit 3", "api", Path::new("/"), LIMIT).await.unwrap_err();
        assert_eq!(error.to_string(), "hook ended with exit status: 3: no such unit");
    }

    #[tokio::test]
    async fn a_hook_that_hangs_is_ended_with_its_children() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("held");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let command = format!("sleep 600 > {} & wait", fifo.display());
        // Reading ends when the last holder of the writing end is gone: the child of the hook.
        let reader = tokio::task::spawn_blocking(move || std::fs::read(fifo).unwrap());
        let error = run(&command, "api", Path::new("/"), Duration::from_secs(1)).await.unwrap_err();
        assert_eq!(error, HookError::Timeout(Duration::from_secs(1)));
        let held = tokio::time::timeout(LIMIT, reader).await.expect("the child was ended").unwrap();
        assert!(held.is_empty());
    }

    #[tokio::test]
    async fn endless_output_is_cut() {
        let error = run("head -c 1000000 /dev/zero >&2; exit 1", "a", Path::new("/"), LIMIT).await;
        let Err(HookError::Failed { output, .. }) = error else { panic!("{error:?}") };
        assert!(output.len() <= HOOK_OUTPUT_BYTES_MAX);
    }
}
