use std::time::Duration;

use pacs_machine::{Command, Event, Options, StopMode};
use pacs_types::{LeaseId, Role, SampleId};

use std::path::PathBuf;

use super::*;

const SPEC: &str = "name = 'test'";

fn record(seconds: u64, name: &str) -> Record {
    let event = Event::Register {
        role: Role::Rollout,
        name: name.into(),
        host: "host".into(),
        pid: 7,
        started: 0,
        collective_address: String::new(),
    };
    Record { now: Duration::from_secs(seconds), event }
}

fn key(group: u64, index: u32, lease: u64) -> FrameKey {
    FrameKey::Sample(SampleId { group: GroupId(group), index }, LeaseId(lease))
}

fn frame(key: FrameKey, bytes: usize) -> Option<Frame> {
    Some(Frame::new(key, vec![key.sample().index as u8; bytes]))
}

fn open(folder: &Path) -> (Journal, Option<Recovered>, Vec<String>) {
    Journal::open(folder, SPEC, &Epoch::take(folder).unwrap(), &Room::of(folder)).unwrap()
}

/// Replaces all records so far by a snapshot.
fn keep(journal: &mut Journal, live: &[u64]) {
    let seq = journal.begin_snapshot();
    journal.snapshots().put(seq, snapshot(live));
}

fn snapshot(live: &[u64]) -> Snapshot {
    Snapshot {
        machine: serde_json::to_string(&Machine::new(Options::small(), Duration::ZERO)).unwrap(),
        extras: vec![("weights".into(), vec![1, 2, 3])],
        live: live.iter().copied().map(GroupId).collect(),
    }
}

fn segments(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<_> = std::fs::read_dir(folder.join("journal"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "seg"))
        .collect();
    found.sort();
    found
}

#[tokio::test]
async fn what_was_written_is_read_back_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let (mut journal, recovered, notes) = open(folder.path());
    assert!(recovered.is_none() && notes.is_empty(), "{notes:?}");
    keep(&mut journal, &[]);
    for i in 0..100u64 {
        let payload = (i % 2 == 0).then(|| vec![i as u8]);
        journal.append(&record(i, &format!("rollout-{i}")), payload, frame(key(i, i as u32, 1), 10 + i as usize));
    }
    journal.durable().wait().await.unwrap();
    drop(journal);

    let (mut journal, recovered, notes) = open(folder.path());
    assert!(notes.is_empty(), "{notes:?}");
    let recovered = recovered.expect("it was written");
    assert_eq!(recovered.machine, Machine::new(Options::small(), Duration::ZERO));
    assert_eq!(recovered.extras, [("weights".to_owned(), vec![1, 2, 3])]);
    assert_eq!((recovered.records.len(), recovered.frames.len()), (100, 100));
    for (i, (found, payload)) in (0u64..).zip(&recovered.records) {
        assert_eq!((found, payload.is_some()), (&record(i, &format!("rollout-{i}")), i % 2 == 0));
        assert_eq!(recovered.frames.get(key(i, i as u32, 1)).unwrap(), vec![i as u8; 10 + i as usize]);
    }
    // It continues after what is there, and a snapshot replaces everything before it.
    journal.append(&record(200, "a"), None, None);
    keep(&mut journal, &[]);
    journal.append(&record(201, "b"), None, None);
    drop(journal);
    let recovered = open(folder.path()).1.unwrap();
    let names: Vec<_> = recovered.records.iter().map(|(record, _)| record.now.as_secs()).collect();
    assert_eq!((names, recovered.frames.len()), (vec![201], 0));
}

#[test]
fn a_torn_tail_is_cut_off_and_damage_before_it_costs_one_frame() {
    let folder = tempfile::tempdir().unwrap();
    let (mut journal, ..) = open(folder.path());
    keep(&mut journal, &[]);
    for i in 0..4u32 {
        journal.append(&record(1, "a"), None, frame(key(1, i, 1), 100));
    }
    drop(journal);
    let [path] = &segments(folder.path())[..] else { panic!("one segment") };
    let mut bytes = std::fs::read(path).unwrap();
    let whole = bytes.len();
    bytes[whole / 4 + 60] ^= 1;
    bytes.truncate(whole - 30);
    std::fs::write(path, &bytes).unwrap();

    let (_, recovered, notes) = open(folder.path());
    let frames = recovered.unwrap().frames;
    let there: Vec<bool> = (0..4).map(|i| frames.get(key(1, i, 1)).is_some()).collect();
    assert_eq!(there, [true, false, true, false]);
    assert!(notes.iter().any(|note| note.contains("1 frames are damaged")), "{notes:?}");
    assert!(notes.iter().any(|note| note.contains("a torn frame at byte")), "{notes:?}");
    assert_eq!(std::fs::metadata(path).unwrap().len() as usize, whole / 4 * 3);
    assert!(open(folder.path()).2.iter().all(|note| !note.contains("torn")), "it is cut once");
}

#[test]
fn segments_go_with_their_groups() {
    let folder = tempfile::tempdir().unwrap();
    let (mut journal, ..) = open(folder.path());
    keep(&mut journal, &[]);
    journal.append(&record(1, "a"), None, frame(key(1, 0, 1), 100));
    keep(&mut journal, &[1]);
    drop(journal);
    assert_eq!(segments(folder.path()).len(), 1, "its group is in flight");
    let (mut journal, ..) = open(folder.path());
    journal.append(&record(2, "a"), None, frame(key(2, 0, 1), 100));
    keep(&mut journal, &[2]);
    drop(journal);
    let (_, recovered, _) = open(folder.path());
    let frames = recovered.unwrap().frames;
    assert_eq!((frames.get(key(1, 0, 1)), frames.len()), (None, 1));
}

#[test]
fn a_foreign_or_damaged_database_is_set_aside() {
    let folder = tempfile::tempdir().unwrap();
    let (mut journal, ..) = open(folder.path());
    keep(&mut journal, &[]);
    journal.append(&record(1, "a"), None, None);
    drop(journal);
    let epoch = Epoch::take(folder.path()).unwrap();
    let (journal, recovered, notes) =
        Journal::open(folder.path(), "name = 'other'", &epoch, &Room::of(folder.path())).unwrap();
    assert!(recovered.is_none() && notes[0].contains("the job spec has changed"), "{notes:?}");
    drop(journal);
    std::fs::write(folder.path().join("journal/journal.db"), "not a database, and longer than its header would be")
        .unwrap();
    let (_, recovered, notes) = open(folder.path());
    assert!(recovered.is_none() && notes[0].contains("moved aside"), "{notes:?}");
    assert!(folder.path().join("journal-aside").exists());
}

#[test]
fn operators_stay_in_the_audit() {
    let folder = tempfile::tempdir().unwrap();
    let (mut journal, ..) = open(folder.path());
    keep(&mut journal, &[]);
    let event = Event::Operator { who: "me".into(), at: 5, command: Command::Stop(StopMode::AfterStep) };
    journal.append(&Record { now: Duration::ZERO, event: event.clone() }, None, None);
    journal.audit(Audit { at: 5, who: "me".into(), what: "stop".into() });
    drop(journal);
    assert_eq!(open(folder.path()).1.unwrap().records[0].0.event, event);
    let connection = rusqlite::Connection::open(folder.path().join("journal/journal.db")).unwrap();
    let row = connection.query_row("SELECT at, who, what FROM audit", [], |row| {
        Ok((row.get::<_, i64>(0)?, row.get::<_, String>(1)?, row.get::<_, String>(2)?))
    });
    assert_eq!(row.unwrap(), (5, "me".to_owned(), "stop".to_owned()));
}

#[tokio::test]
async fn a_late_snapshot_keeps_the_records_after_it_and_their_samples() {
    let folder = tempfile::tempdir().unwrap();
    let (mut journal, ..) = open(folder.path());
    keep(&mut journal, &[]);
    journal.append(&record(1, "a"), None, frame(key(1, 0, 1), 100));
    journal.durable().wait().await.unwrap();
    let seq = journal.begin_snapshot();
    journal.append(&record(2, "b"), None, frame(key(2, 0, 1), 100));
    journal.durable().wait().await.unwrap();
    // The snapshot does not know of group 2, which is on disk already.
    journal.snapshots().put(seq, snapshot(&[]));
    journal.append(&record(3, "c"), None, None);
    journal.durable().wait().await.unwrap();
    drop(journal);
    let recovered = open(folder.path()).1.unwrap();
    let seconds: Vec<_> = recovered.records.iter().map(|(record, _)| record.now.as_secs()).collect();
    assert_eq!(seconds, [2, 3]);
    assert!(recovered.frames.get(key(2, 0, 1)).is_some());
}

#[tokio::test]
async fn of_two_openers_the_first_writes_nothing_more() {
    let folder = tempfile::tempdir().unwrap();
    let (mut first, ..) = open(folder.path());
    keep(&mut first, &[]);
    first.append(&record(1, "a"), None, None);
    first.durable().wait().await.unwrap();
    // Where locks work, a second coordinator cannot even read.
    let refused =
        Journal::open(folder.path(), SPEC, &Epoch::take(folder.path()).unwrap(), &Room::of(folder.path())).unwrap_err();
    assert_eq!((refused.exit(), refused.is_damage()), (pacs_runtime::Exit::Again, false), "{refused}");
    // It has taken the epoch nevertheless, as it would where locks are lost.
    first.append(&record(2, "b"), None, frame(key(1, 0, 1), 100));
    let NotDurable::Failed(problem) = first.durable().wait().await.unwrap_err() else {
        panic!("it is no matter of room")
    };
    assert!(problem.starts_with("another coordinator has taken over this run folder"), "{problem}");
    assert_eq!(first.failure().as_deref(), Some(problem.as_str()));
    drop(first);
    let recovered = open(folder.path()).1.unwrap();
    assert_eq!((recovered.records.len(), recovered.frames.len()), (1, 0));
}

#[test]
fn a_thread_waits_for_the_disk_without_a_runtime() {
    let folder = tempfile::tempdir().unwrap();
    let (mut journal, ..) = open(folder.path());
    keep(&mut journal, &[]);
    for i in 0..50 {
        journal.append(&record(i, "a"), None, frame(key(1, i as u32, 1), 1000));
        journal.durable().wait_blocking().unwrap();
    }
    let durable = journal.durable();
    journal.append(&record(60, "a"), None, None);
    let later = journal.durable();
    drop(journal);
    durable.wait_blocking().unwrap();
    later.wait_blocking().unwrap();
}
