use std::fs;
use std::path::Path;

use pacs_machine::{Options, Snapshot as Position};

use super::*;
use crate::journal::Journal;
use crate::records::one_question;

const SPEC: &str = "name = 'test'";

/// A run folder and its journal, opened as a coordinator does.
struct Open {
    journal: Journal,
    folder: RunFolder,
    done: mpsc::Receiver<Done>,
    /// Step of the snapshot that an earlier coordinator has left.
    snapshot: Option<u64>,
}

fn open(run_dir: &Path, fault: Duration) -> Open {
    let epoch = Epoch::take(run_dir).unwrap();
    let (journal, recovered, _) = Journal::open(run_dir, SPEC, &epoch, &Room::of(run_dir)).unwrap();
    let files = Files {
        checkpoints: Checkpoints::open(run_dir).unwrap(),
        metrics: Lines::open(run_dir.join("metrics.jsonl")).unwrap(),
        evaluations: Lines::open(run_dir.join("evaluations.jsonl")).unwrap(),
        problems: Lines::open(run_dir.join("evaluation_problems.jsonl")).unwrap(),
        archive: Some(Archive::open(run_dir).unwrap()),
    };
    let (folder, done) =
        RunFolder::start(files, (2, 0), epoch, journal.snapshots(), Room::of(run_dir), Fault(fault)).unwrap();
    Open { journal, folder, done, snapshot: recovered.map(|recovered| recovered.machine.position().step) }
}

/// Uses a memory file system if there is one, because the order is tested and not the disk.
fn folder() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap()
}

fn machine(step: u64) -> Machine {
    Machine::new(Options { start: Position { step, ..Position::default() }, ..Options::small() }, Duration::ZERO)
}

fn line(to: LinesOf, step: u64) -> Job {
    let line = format!("{{\"step\":{step},\"pass_at_1\":0.5}}\n").into_bytes();
    Job::Append { to, step, line, score: (to == LinesOf::Evaluations).then_some(0.5) }
}

fn archive(step: u64) -> Job {
    Job::Archive(Round { step, purpose: Purpose::Train, samples: Vec::new(), problems: one_question() })
}

fn keep(journal: &mut Journal, step: u64) -> Job {
    Job::Keep { seq: journal.begin_snapshot(), machine: Box::new(machine(step)), extras: Vec::new() }
}

fn manifest(step: u64) -> Box<Manifest> {
    let text = "name = 'test'\nmodel.path = 'm'\ndata.train.path = 'x.jsonl'\n\
                evaluation = { before = false, after = false, every_steps = 0 }\n";
    let spec = pacs_spec::parse(text, Path::new("test")).unwrap();
    Box::new(Manifest::new(Position { step, ..Position::default() }, false, &spec, Default::default()))
}

fn commit(open: &mut Open, step: u64) -> Job {
    Job::Commit { manifest: manifest(step), save: step, asked: open.journal.durable() }
}

/// Waits for the result that `wanted` accepts.
fn until(done: &mut mpsc::Receiver<Done>, mut wanted: impl FnMut(&Done) -> bool) -> Done {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match done.try_recv() {
            Ok(done) if wanted(&done) => return done,
            Ok(_) => {}
            Err(mpsc::error::TryRecvError::Empty) => std::thread::sleep(Duration::from_millis(1)),
            Err(mpsc::error::TryRecvError::Disconnected) => panic!("the thread has ended"),
        }
        assert!(Instant::now() < deadline, "it does not happen");
    }
}

fn hand_over(open: &mut Open, job: Job) {
    open.folder.hand_over(job).unwrap();
}

/// Content of a folder: step of the last line, archived steps, last checkpoint.
fn found(run_dir: &Path) -> (Option<u64>, Vec<u64>, Option<u64>) {
    let lines = Lines::open(run_dir.join("metrics.jsonl")).unwrap();
    let names = fs::read_dir(run_dir.join("samples")).unwrap().map(|entry| entry.unwrap().file_name());
    let names = names.filter_map(|name| name.into_string().ok());
    let step = |name: String| name.strip_prefix("step-")?.strip_suffix(".parquet")?.parse().ok();
    let mut archived: Vec<u64> = names.filter_map(step).collect();
    archived.sort_unstable();
    let checkpoints = Checkpoints::open(run_dir).unwrap().steps().unwrap();
    (lines.last_step(), archived, checkpoints.last().copied())
}

#[test]
fn a_crash_between_any_two_jobs_leaves_nothing_superseded() {
    const STEPS: u64 = 4;
    // Each step is archived, written, snapshotted and saved. Step 3 is undone before it is made again.
    for survived in 0..=5 * STEPS as usize {
        let run_dir = folder();
        let mut open = open(run_dir.path(), Duration::ZERO);
        let mut jobs = Vec::new();
        for step in 1..=STEPS {
            let save = step;
            jobs.push(archive(step));
            jobs.push(line(LinesOf::Metrics, step));
            if step == 3 {
                jobs.push(Job::Truncate { steps: Some(2), evaluations: Some(2) });
                jobs.push(archive(step));
                jobs.push(line(LinesOf::Metrics, step));
            }
            let kept = keep(&mut open.journal, step);
            jobs.extend([kept, Job::Create { step, save, bytes: 0 }, commit(&mut open, step)]);
        }
        jobs.into_iter().take(survived).for_each(|job| hand_over(&mut open, job));
        // Jobs before this point are done, and none after it.
        open.folder.close().unwrap().join().unwrap();
        drop(open);

        let (line, archived, checkpoint) = found(run_dir.path());
        let again = self::open(run_dir.path(), Duration::ZERO);
        let steps = line.unwrap_or(0);
        assert!(archived.len() as u64 >= steps, "{survived}: samples of {archived:?} and lines up to {line:?}");
        assert!(
            again.snapshot.unwrap_or(0) <= steps,
            "{survived}: a snapshot of {:?}, lines up to {line:?}",
            again.snapshot
        );
        assert!(checkpoint.unwrap_or(0) <= steps, "{survived}: a checkpoint of {checkpoint:?}, lines up to {line:?}");
        assert_eq!(again.folder.has(LinesOf::Metrics, steps), line.is_some());
        assert!(!again.folder.has(LinesOf::Metrics, steps + 1));
    }
}

#[test]
fn a_dropped_queue_finishes_the_current_job_and_no_other() {
    let run_dir = folder();
    let mut open = open(run_dir.path(), Duration::from_millis(20));
    for step in 1..=50 {
        hand_over(&mut open, archive(step));
        hand_over(&mut open, line(LinesOf::Metrics, step));
    }
    until(&mut open.done, |done| *done == Done::Written);
    drop(open);
    let (line, archived, _) = found(run_dir.path());
    assert!(line.unwrap_or(0) < 50, "{line:?}");
    assert!(archived.len() as u64 - line.unwrap_or(0) <= 1, "{line:?} {archived:?}");
}

#[test]
fn a_slow_removal_delays_no_commit() {
    let run_dir = folder();
    let abandoned = run_dir.path().join("checkpoints/.unfinished-000001-7");
    fs::create_dir_all(&abandoned).unwrap();
    (0..20_000).for_each(|file| drop(fs::File::create(abandoned.join(file.to_string())).unwrap()));
    let mut open = open(run_dir.path(), Duration::ZERO);
    hand_over(&mut open, Job::Create { step: 1, save: 1, bytes: 0 });
    let job = commit(&mut open, 1);
    hand_over(&mut open, job);
    assert!(!open.folder.has_folder(1, 1));
    let created = until(&mut open.done, |_| true);
    assert_eq!(created, Done::Created { step: 1, save: 1 });
    open.folder.note(&created);
    assert!(open.folder.has_folder(1, 1) && !abandoned.exists());
    let committed = until(&mut open.done, |_| true);
    assert!(matches!(committed, Done::Committed { step: 1, .. }), "{committed:?}");
    let checkpoints = Checkpoints::open(run_dir.path()).unwrap();
    assert_eq!(checkpoints.discarded().unwrap().len(), 1, "it is still being removed");
    // The next sweeper removes the rest, in case this one ends before.
    drop(open);
    let open = self::open(run_dir.path(), Duration::ZERO);
    let deadline = Instant::now() + Duration::from_secs(60);
    while !checkpoints.discarded().unwrap().is_empty() {
        assert!(Instant::now() < deadline, "leftovers stay");
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(open);
}

#[test]
fn a_queue_that_is_full_refuses_and_takes_nothing_more() {
    let run_dir = folder();
    let mut open = open(run_dir.path(), Duration::from_millis(300));
    let refused = (1..=2 * QUEUE as u64).find_map(|step| open.folder.hand_over(line(LinesOf::Metrics, step)).err());
    let refused = refused.expect("the disk is slower than this loop");
    assert!(refused.contains("jobs late"), "{refused}");
    // Jobs after a gap are not done: the journal replays all of them.
    hand_over(&mut open, line(LinesOf::Metrics, 9999));
    open.folder.abandon().unwrap().join().unwrap();
    drop(open);
    assert!(found(run_dir.path()).0 < Some(9999));
}

#[test]
fn a_fenced_coordinator_writes_nothing_more() {
    let run_dir = folder();
    let mut open = open(run_dir.path(), Duration::ZERO);
    hand_over(&mut open, line(LinesOf::Metrics, 1));
    hand_over(&mut open, archive(2));
    until(&mut open.done, |done| *done == Done::Written);
    let _theirs = Epoch::take(run_dir.path()).unwrap();
    for job in [line(LinesOf::Metrics, 2), Job::Truncate { steps: None, evaluations: None }] {
        // The thread may have ended meanwhile.
        let _ = open.folder.hand_over(job);
    }
    let failed = until(&mut open.done, |_| true);
    let Done::Failed { reason } = failed else { panic!("{failed:?}") };
    assert!(reason.contains("another coordinator has taken over this run folder"), "{reason}");
    drop(open);
    assert_eq!(found(run_dir.path()).0, Some(1));
}

#[test]
fn unwritable_lines_end_the_thread_and_unwritable_samples_do_not() {
    let run_dir = folder();
    let mut open = open(run_dir.path(), Duration::ZERO);
    fs::remove_dir_all(run_dir.path().join("samples")).unwrap();
    fs::create_dir(run_dir.path().join("metrics.jsonl")).unwrap();
    hand_over(&mut open, archive(1));
    let done = until(&mut open.done, |_| true);
    assert!(matches!(done, Done::Unarchived { step: 1, .. }), "{done:?}");
    hand_over(&mut open, line(LinesOf::Metrics, 1));
    let seq = keep(&mut open.journal, 1);
    let _ = open.folder.hand_over(seq);
    let done = until(&mut open.done, |_| true);
    assert!(matches!(&done, Done::Failed { reason } if reason.contains("metrics.jsonl")), "{done:?}");
    drop(open);
    fs::remove_dir(run_dir.path().join("metrics.jsonl")).unwrap();
    fs::create_dir(run_dir.path().join("samples")).unwrap();
    assert_eq!(self::open(run_dir.path(), Duration::ZERO).snapshot, None, "no snapshot comes before its lines");
}

#[test]
fn the_best_steps_are_known_without_reading_the_file() {
    let run_dir = folder();
    let mut open = open(run_dir.path(), Duration::ZERO);
    let scored = |step, score| {
        let line = format!("{{\"step\":{step},\"pass_at_1\":{score}}}\n").into_bytes();
        Job::Append { to: LinesOf::Evaluations, step, line, score: Some(score) }
    };
    for (step, score) in [(1, 0.9), (2, 0.1), (3, 0.5), (4, 0.2)] {
        hand_over(&mut open, Job::Create { step, save: step, bytes: 0 });
        hand_over(&mut open, scored(step, score));
        let job = commit(&mut open, step);
        hand_over(&mut open, job);
        until(&mut open.done, |done| matches!(done, Done::Committed { .. }));
        if step == 2 {
            // The same with the scores that are read at the start.
            drop(open);
            open = reopened_with_best(run_dir.path());
        }
    }
    drop(open);
    // From the second half on one newest checkpoint is kept, and the best one.
    assert_eq!(Checkpoints::open(run_dir.path()).unwrap().steps().unwrap(), [1, 4]);
}

fn reopened_with_best(run_dir: &Path) -> Open {
    let epoch = Epoch::take(run_dir).unwrap();
    let (journal, ..) = Journal::open(run_dir, SPEC, &epoch, &Room::of(run_dir)).unwrap();
    let files = Files {
        checkpoints: Checkpoints::open(run_dir).unwrap(),
        metrics: Lines::open(run_dir.join("metrics.jsonl")).unwrap(),
        evaluations: Lines::open(run_dir.join("evaluations.jsonl")).unwrap(),
        problems: Lines::open(run_dir.join("evaluation_problems.jsonl")).unwrap(),
        archive: None,
    };
    assert_eq!(scores(&files).unwrap(), [(1, 0.9), (2, 0.1)]);
    let (folder, done) =
        RunFolder::start(files, (1, 1), epoch, journal.snapshots(), Room::of(run_dir), Fault::default()).unwrap();
    Open { journal, folder, done, snapshot: None }
}
