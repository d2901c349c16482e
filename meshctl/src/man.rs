//! `meshctl man`: a manual page for every command, from the same tree as `--help`.

use std::path::{Path, PathBuf};

use serde_json::json;

use crate::{
    app::App,
    cli::Cli,
    error::{Exit, Failure, Result},
    output::count,
};

#[derive(Debug, clap::Args)]
pub(crate) struct Man {
    /// Folder for the pages; made if it is not there
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

impl Man {
    pub(crate) fn run(&self, app: &App) -> Result<Exit> {
        let failed = |error| Failure::file("write", &self.out, &error);
        std::fs::create_dir_all(&self.out).map_err(failed)?;
        let pages = write(&self.out).map_err(failed)?;
        let line = format!("{} in {}", count(pages, "manual page"), self.out.display());
        app.out.action("ManualPages", true, json!({ "pages": pages }), "meshctl", &[line]);
        Ok(Exit::Done)
    }
}

/// Writes `meshctl.1`, `meshctl-cert.1`, `meshctl-cert-issue.1`, …; returns how many.
fn write(folder: &Path) -> std::io::Result<usize> {
    clap_mangen::generate_to(Cli::command_with_exit_codes(), folder)?;
    std::fs::read_dir(folder)?.try_fold(0, |pages, entry| {
        Ok(pages + usize::from(entry?.path().extension().is_some_and(|extension| extension == "1")))
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn every_command_has_a_page_and_every_page_the_exit_codes() {
        let folder = tempfile::tempdir().unwrap();
        let pages = write(folder.path()).unwrap();
        assert!(pages > 40, "{pages} pages");
        for name in ["meshctl", "meshctl-cert-issue", "meshctl-node-revoke", "meshctl-explain"] {
            assert!(folder.path().join(format!("{name}.1")).is_file(), "{name}");
        }
        assert!(!folder.path().join("meshctl-man.1").exists(), "hidden commands have none");
        for entry in fs::read_dir(folder.path()).unwrap() {
            let path = entry.unwrap().path();
            let page = fs::read_to_string(&path).unwrap();
            for line in ["2  usage", "5  unreachable, try again", "7  conflict"] {
                assert!(page.contains(line), "{}: {line}", path.display());
            }
        }
    }
}
