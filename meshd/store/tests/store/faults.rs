//! Crashes, full disks and failing system calls, on the real thing.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
    process::{Child, Command, Output, Stdio},
};

use mesh_store::{
    Append, AppendError, FileJournal, IndexOp, Journal, Store, StoreOptions, Table, catch_up,
    journal::FileOptions,
};

use crate::support::{append, contents, open, record};

const CHILD: &str = "MESH_STORE_CHILD";

/// A command that runs the ignored test `name` of this binary on `folder`.
fn child_arguments(name: &str) -> Vec<String> {
    let binary = std::env::current_exe().unwrap().into_os_string().into_string().unwrap();
    [&binary, name, "--exact", "--ignored", "--nocapture", "--test-threads=1"].map(str::to_owned).to_vec()
}

fn child_folder() -> Option<std::path::PathBuf> {
    std::env::var_os(CHILD).map(Into::into)
}

/// Lines that a child of ours printed.
fn said(output: &Output) -> Vec<String> {
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().filter_map(|line| line.split_once("say ").map(|(_, said)| said.to_owned())).collect()
}

fn say(text: impl std::fmt::Display) {
    // One write, past the harness's own buffering.
    std::io::stdout().lock().write_all(format!("\nsay {text}\n").as_bytes()).unwrap();
    std::io::stdout().flush().unwrap();
}

#[test]
#[ignore = "started by a_killed_writer_loses_nothing_acknowledged"]
fn writer() {
    let Some(folder) = child_folder() else { return };
    let mut journal = open(&folder);
    loop {
        let number = journal.head().seq + 1;
        append(&mut journal, &[record(number, 120), record(number + 1, 9)]);
        say(number + 1);
    }
}

fn start_writer(folder: &Path) -> Child {
    let arguments = child_arguments("faults::writer");
    Command::new(&arguments[0])
        .args(&arguments[1..])
        .env(CHILD, folder)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn a_killed_writer_loses_nothing_acknowledged() {
    let folder = tempfile::tempdir().unwrap();
    for round in 1..=25_u64 {
        let mut writer = start_writer(folder.path());
        let mut lines = BufReader::new(writer.stdout.take().unwrap()).lines();
        // Killed at another moment in every round; what it still says after that counts too.
        let mut acknowledged = 0;
        let mut heard = 0;
        while let Some(Ok(line)) = lines.next() {
            if let Some(seq) = line.strip_prefix("say ") {
                acknowledged = seq.parse().unwrap();
                heard += 1;
                if heard == round {
                    writer.kill().unwrap();
                }
            }
        }
        writer.wait().unwrap();
        assert!(heard >= round, "the writer died by itself");
        let records = contents(&open(folder.path()));
        assert!(records.len() as u64 >= acknowledged, "round {round}: {} of {acknowledged}", records.len());
        assert_eq!(records.len() % 2, 0, "round {round}: half a batch");
        for (stored, number) in records.iter().zip(1..) {
            assert_eq!(*stored, record(number, if number % 2 == 1 { 120 } else { 9 }));
        }
    }
}

fn strace() -> bool {
    let present = Command::new("strace").arg("-V").output().is_ok();
    if !present {
        eprintln!("skipped: strace is not installed");
    }
    present
}

fn trace(options: &[&str], test: &str, folder: &Path, log: &Path) -> Output {
    let output = Command::new("strace")
        .args(["-f", "-o"])
        .arg(log)
        .args(options)
        .args(child_arguments(test))
        .env(CHILD, folder)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output
}

#[test]
#[ignore = "started under strace by nothing_is_acknowledged_before_it_is_synced and those after it"]
fn four_appends() {
    let Some(folder) = child_folder() else { return };
    let mut journal = open(&folder);
    for number in 1..=4 {
        // The third begins a segment.
        match journal.append(&journal.head(), &[record(number, 400)]) {
            Ok(Append::Appended { head }) => say(format_args!("appended {}", head.seq)),
            Ok(Append::Unknown { .. }) => say("unknown"),
            Ok(other) => panic!("{other:?}"),
            Err(AppendError::Full { .. }) => say("full"),
            Err(AppendError::Broken) => say("broken"),
            Err(error) => panic!("{error}"),
        }
    }
    let records = contents(&journal);
    say(format_args!("reads {}", records.len()));
}

#[test]
fn nothing_is_acknowledged_before_it_is_synced() {
    if !strace() {
        return;
    }
    let (folder, log) = (tempfile::tempdir().unwrap(), tempfile::NamedTempFile::new().unwrap());
    let options = ["-y", "-e", "trace=pwrite64,fdatasync,fsync,rename,write"];
    let output = trace(&options, "faults::four_appends", folder.path(), log.path());
    let text = fs::read_to_string(log.path()).unwrap();
    assert_eq!(said(&output).len(), 5, "{text}");

    // Per open segment: whether its last frame is synced. Per folder: whether its names are.
    let (mut frames, mut unsynced, mut unsynced_names, mut acknowledged) = (0, false, false, 0);
    for line in text.lines() {
        let done = line.ends_with("= 0");
        if line.contains("pwrite64(") && line.contains("/segment-") {
            frames += 1;
            unsynced = true;
        } else if line.contains("fdatasync(") && line.contains("/segment-") && done {
            unsynced = false;
        } else if line.contains("rename(") && line.contains("/segment-") {
            unsynced_names = true;
        } else if line.contains("fsync(") && line.contains(&format!("<{}>", folder.path().display())) && done
        {
            unsynced_names = false;
        } else if line.contains("say appended") {
            acknowledged += 1;
            assert_eq!(frames, acknowledged, "{text}");
            assert!(!unsynced && !unsynced_names, "acknowledged before it was synced:\n{text}");
        }
    }
    assert_eq!((frames, acknowledged), (4, 4), "{text}");
    assert!(text.contains("rename("), "{text}");
}

#[test]
fn a_failed_sync_is_unknown_and_never_retried() {
    if !strace() {
        return;
    }
    let (folder, log) = (tempfile::tempdir().unwrap(), tempfile::NamedTempFile::new().unwrap());
    let inject = "inject=fdatasync:error=EIO:when=2";
    let output =
        trace(&["-e", "trace=fdatasync", "-e", inject], "faults::four_appends", folder.path(), log.path());
    assert_eq!(said(&output), ["appended 1", "unknown", "broken", "broken", "reads 1"]);
    let text = fs::read_to_string(log.path()).unwrap();
    assert_eq!(text.matches("fdatasync(").count(), 2, "{text}");
    // The next process decides by reading: here the frame is whole, so it is kept.
    assert_eq!(contents(&open(folder.path())).len(), 2);
}

#[test]
fn a_failed_write_is_undone_and_the_next_succeeds() {
    if !strace() {
        return;
    }
    for error in ["ENOSPC", "EDQUOT"] {
        let (folder, log) = (tempfile::tempdir().unwrap(), tempfile::NamedTempFile::new().unwrap());
        // The writes in turn: frame 1, head file, frame 2.
        let inject = format!("inject=pwrite64:error={error}:when=3");
        let options = ["-e", "trace=pwrite64", "-e", &inject];
        let output = trace(&options, "faults::four_appends", folder.path(), log.path());
        assert_eq!(said(&output), ["appended 1", "full", "appended 2", "appended 3", "reads 3"]);
        let kept = [1, 3, 4].map(|number| record(number, 400));
        assert_eq!(contents(&open(folder.path())), kept);
    }
}

#[test]
#[ignore = "started by what_a_failed_write_left_is_removed"]
fn half_a_write() {
    let Some(folder) = child_folder() else { return };
    let mut journal = open(&folder);
    append(&mut journal, &[record(1, 100)]);
    let segment = folder.join(&crate::support::segments(&folder)[0]);
    let used = fs::read(&segment).unwrap().iter().rposition(|byte| *byte != 0).unwrap() + 1;
    // An injected failure writes nothing at all; this is what a real one may leave.
    let file = fs::File::options().write(true).open(&segment).unwrap();
    file.write_all_at(&[0xf5; 99], used as u64).unwrap();
    let refused = journal.append(&journal.head(), &[record(2, 200)]);
    assert!(matches!(refused, Err(AppendError::Full { .. })), "{refused:?}");
    let left = fs::read(&segment).unwrap();
    assert!(left[used..].iter().all(|byte| *byte == 0), "the rest of a failed write stays on disk");
    append(&mut journal, &[record(2, 10)]);
    say(format_args!("reads {}", contents(&open(&folder)).len()));
}

#[test]
fn what_a_failed_write_left_is_removed() {
    if !strace() {
        return;
    }
    let (folder, log) = (tempfile::tempdir().unwrap(), tempfile::NamedTempFile::new().unwrap());
    // The writes in turn: frame 1, head file, ours, frame 2.
    let options = ["-e", "trace=pwrite64", "-e", "inject=pwrite64:error=ENOSPC:when=4"];
    let output = trace(&options, "faults::half_a_write", folder.path(), log.path());
    assert_eq!(said(&output), ["reads 2"]);
}

#[test]
fn a_disk_too_full_for_a_segment_refuses_the_append() {
    if !strace() {
        return;
    }
    let (folder, log) = (tempfile::tempdir().unwrap(), tempfile::NamedTempFile::new().unwrap());
    let inject = "inject=fallocate:error=ENOSPC:when=1..3";
    let output =
        trace(&["-e", "trace=fallocate", "-e", inject], "faults::four_appends", folder.path(), log.path());
    let said = said(&output);
    assert_eq!(said[0], "full");
    assert_eq!(
        said.last().unwrap(),
        &format!("reads {}", said.iter().filter(|line| line.starts_with("appended")).count())
    );
    assert!(said.iter().any(|line| line.starts_with("appended")), "{said:?}");
    open(folder.path());
}

#[test]
#[ignore = "started by a_full_disk_refuses_writes_and_heals_by_itself"]
fn fill_the_disk() {
    let Some(folder) = child_folder() else { return };
    let state = folder.join("state");
    let filler = folder.join("filler");
    let mut store = Store::open(&state, StoreOptions::default()).unwrap();
    let changes = |record: &mesh_store::StoredRecord| {
        vec![IndexOp::insert(Table::CertificateByOwner, record.seq.to_be_bytes(), record.op_id)]
    };
    append(&mut store.journal, &[record(1, 100)]);
    catch_up(&mut store.index, &*store.journal.reader(), changes).unwrap();
    // Someone else takes all but a little of the disk.
    let mut file = fs::File::create(&filler).unwrap();
    while file.write_all(&[1; 16 * 1024]).is_ok() {}
    let full = loop {
        let number = store.journal.head().seq + 1;
        match store.journal.append(&store.journal.head(), &[record(number, 16 * 1024)]) {
            Ok(Append::Appended { .. }) => {}
            Ok(other) => panic!("{other:?}"),
            Err(error) => break error,
        }
    };
    assert!(matches!(full, AppendError::Full { .. }), "{full}");
    let acknowledged = store.journal.head().seq;
    let expected: Vec<_> =
        (1..=acknowledged).map(|number| record(number, if number == 1 { 100 } else { 16 * 1024 })).collect();
    assert_eq!(contents(&store.journal), expected, "reads fail on a full disk");
    let again = store.journal.append(&store.journal.head(), &[record(acknowledged + 1, 16 * 1024)]);
    assert!(matches!(again, Err(AppendError::Full { .. })), "{again:?}");
    let _ = catch_up(&mut store.index, &*store.journal.reader(), changes);
    drop(store);
    let mut store = Store::open(&state, StoreOptions::default()).unwrap();
    assert_eq!(contents(&store.journal), expected, "a restart on a full disk lost something");
    let again = store.journal.append(&store.journal.head(), &[record(acknowledged + 1, 16 * 1024)]);
    assert!(matches!(again, Err(AppendError::Full { .. })), "{again:?}");
    // With room it goes on without help.
    drop(file);
    fs::remove_file(&filler).unwrap();
    append(&mut store.journal, &[record(acknowledged + 1, 16 * 1024)]);
    catch_up(&mut store.index, &*store.journal.reader(), changes).unwrap();
    assert_eq!(store.index.applied(), store.journal.head());
    drop(store);
    let store = Store::open(&state, StoreOptions::default()).unwrap();
    assert_eq!(contents(&store.journal).len() as u64, acknowledged + 1);
    say(format_args!("healed after {acknowledged}"));
}

/// Runs the ignored test `name` on a small file system of its own.
fn on_a_small_disk(name: &str) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    let script = "mount -t tmpfs -o size=8m,mode=0700 tmpfs \"$MESH_STORE_CHILD\" && exec \"$@\"";
    let root = fs::metadata("/proc/self").unwrap().uid() == 0;
    let output = Command::new("unshare")
        .args(if root { &["--mount"][..] } else { &["--mount", "--user", "--map-root-user"] })
        .args(["sh", "-c", script, "sh"])
        .args(child_arguments(name))
        .env(CHILD, folder.path())
        .output()
        .unwrap();
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{text}");
    said(&output)
}

#[test]
fn a_full_disk_refuses_writes_and_heals_by_itself() {
    let said = on_a_small_disk("faults::fill_the_disk");
    assert!(said[0].starts_with("healed after"), "{said:?}");
}

#[test]
#[ignore = "started by a_read_only_state_is_refused"]
fn open_read_only() {
    let Some(folder) = child_folder() else { return };
    let state = folder.join("state");
    let mut store = Store::open(&state, StoreOptions::default()).unwrap();
    append(&mut store.journal, &[record(1, 100)]);
    drop(store);
    assert!(Command::new("mount").args(["-o", "remount,ro"]).arg(&folder).status().unwrap().success());
    let before = crate::support::files(&folder);
    say(Store::open(&state, StoreOptions::default()).unwrap_err());
    assert_eq!(crate::support::files(&folder), before);
}

#[test]
fn a_read_only_state_is_refused() {
    let said = on_a_small_disk("faults::open_read_only");
    assert!(said[0].starts_with("state ") && said[0].ends_with("is read-only"), "{said:?}");
}

#[test]
fn a_segment_takes_its_room_when_it_is_made() {
    let folder = tempfile::tempdir().unwrap();
    let options = FileOptions { segment_bytes: 1 << 20, ..FileOptions::default() };
    let mut journal = FileJournal::open(folder.path(), options).unwrap();
    append(&mut journal, &[record(1, 10)]);
    let names = crate::support::segments(folder.path());
    let metadata = fs::metadata(folder.path().join(&names[0])).unwrap();
    assert!(metadata.blocks() * 512 >= 1 << 20, "{} blocks", metadata.blocks());
}

/// A journal may be far larger than memory should be.
#[test]
fn a_reader_starts_in_the_middle() {
    let folder = tempfile::tempdir().unwrap();
    let mut journal: FileJournal = open(folder.path());
    for number in 1..=1500 {
        append(&mut journal, &[record(number, 20)]);
    }
    drop(journal);
    let journal = open(folder.path());
    for from in [1, 2, 64, 65, 66, 700, 1499, 1500] {
        let found: Vec<_> = journal.read(from).take(2).map(|record| record.unwrap().seq).collect();
        assert_eq!(found, (from..=1500).take(2).collect::<Vec<_>>());
    }
}
