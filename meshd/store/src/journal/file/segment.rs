use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use crate::disk;

const PREFIX: &str = "segment-";
/// When a whole segment does not fit on the disk, space is taken in these steps.
const STEP_BYTES: u64 = 64 * 1024;

/// One file of the journal, named by the number of its first record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) first_seq: u64,
    pub(crate) path: PathBuf,
}

impl Segment {
    /// The segment of that first record, whether it exists or not.
    pub(crate) fn at(folder: &Path, first_seq: u64) -> Self {
        Self { first_seq, path: folder.join(format!("{PREFIX}{first_seq:020}")) }
    }

    /// The segments in a folder, in order, and the names that are no part of a journal.
    pub(crate) fn list(folder: &Path) -> io::Result<(Vec<Self>, Vec<String>)> {
        let (mut segments, mut strays) = (Vec::new(), Vec::new());
        for entry in fs::read_dir(folder)? {
            let name = entry?.file_name();
            let name = name.to_string_lossy();
            match number(&name, PREFIX) {
                Some(first_seq) => segments.push(Self::at(folder, first_seq)),
                None if name == super::head::FILE || name == super::base::FILE => {}
                None if crate::snapshot::is_snapshot(&name) => {}
                None => strays.push(name.into_owned()),
            }
        }
        segments.sort_by_key(|segment| segment.first_seq);
        strays.sort();
        Ok((segments, strays))
    }

    /// Makes the file with room for `bytes`, or for `least` if the disk does not hold more. Durable on
    /// return. Returns the file and its room.
    pub(crate) fn create(&self, bytes: u64, least: u64) -> io::Result<(File, u64)> {
        let temporary = self.path.with_extension("new");
        let made = disk::create_file(&temporary).and_then(|file| {
            let room = reserve(&file, 0, bytes, least)?;
            file.sync_all()?;
            fs::rename(&temporary, &self.path)?;
            disk::sync_folder(self.path.parent().expect("a segment lies in a folder"))?;
            Ok((file, room))
        });
        if made.is_err() {
            // Room that is not used may be what the next attempt needs.
            let _ = fs::remove_file(&temporary);
        }
        made
    }
}

/// Makes room in `file` up to `bytes`, or at least `least`, so that a full disk shows now and not when
/// the data is synced. Returns the room there is; on failure it is `present` as before.
pub(crate) fn reserve(file: &File, present: u64, bytes: u64, least: u64) -> io::Result<u64> {
    let modest = least.next_multiple_of(STEP_BYTES).min(bytes);
    let mut outcome = Ok(present);
    for wanted in [bytes.max(least), modest.max(least), least] {
        outcome = allocate(file, present, wanted);
        match &outcome {
            Err(error) if disk::is_full(error) => file.set_len(present)?,
            _ => break,
        }
    }
    outcome
}

fn allocate(file: &File, present: u64, wanted: u64) -> io::Result<u64> {
    if wanted <= present {
        return Ok(present);
    }
    let too_large = |_| io::Error::from(io::ErrorKind::FileTooLarge);
    let (start, length) = (i64::try_from(present).map_err(too_large)?, i64::try_from(wanted - present));
    nix::fcntl::posix_fallocate(file, start, length.map_err(too_large)?)?;
    Ok(wanted)
}

pub(crate) fn is_segment(name: &str) -> bool {
    number(name, PREFIX).is_some()
}

/// The number in a name of `prefix` and twenty digits.
pub(crate) fn number(name: &str, prefix: &str) -> Option<u64> {
    let digits = name.strip_prefix(prefix)?;
    (digits.len() == 20 && digits.bytes().all(|byte| byte.is_ascii_digit())).then(|| digits.parse().ok())?
}
