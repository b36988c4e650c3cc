//! Carries out the machine's effects, and holds the payloads that the machine only counts.

mod apply;
mod batch;
mod bounded;
mod clock;
mod content;
mod disk;
mod distribution;
mod door;
mod findings;
mod fit;
mod measure;
mod pieces;
mod poison;
mod recover;
mod share;
mod signals;
mod status;
mod store;
mod summary;
mod verifications;
mod waiters;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pacs_data::{Problem, Problems};
use pacs_machine::{
    Command, Counter, Counters, Effect, End, Event, LogLevel, Machine, Openings, Refusal, RefusalKind, Reply, Step,
    StopMode, evaluation_problem,
};
use pacs_protocol::{WireError, v1};
use pacs_runtime::NO_ROOM_KEY;
use pacs_shape::Flops;
use pacs_spec::JobSpec;
use pacs_types::{GroupId, Purpose, WorkerId};
use tokio::sync::{broadcast, watch};
use tonic::Status;
use tonic::metadata::MetadataValue;

pub(crate) use self::batch::{Batch, Sharing};
pub(crate) use self::bounded::bounded;
pub(crate) use self::clock::{PhaseClock, SaveClock};
pub(crate) use self::disk::follow;
pub(crate) use self::door::{Door, known_versions};
pub(crate) use self::findings::RULES;
use self::findings::Recent;
use self::measure::MeasuringTold;
pub(crate) use self::pieces::{Pieces, Received};
pub(crate) use self::poison::Poisoned;
pub(crate) use self::signals::{Signal, Signals};
pub(crate) use self::store::{ContentError, KeptSample, Store};
pub(crate) use self::summary::unix_time;
pub(crate) use self::verifications::{Verification, Verifications};
pub(crate) use self::waiters::Wait;
use self::waiters::{Line, Waiters};
use crate::journal::{Audit, DurableUpTo, Frame, Journal, NotDurable};
use crate::progress::{EvaluationSummary, Progress, RunEnd, StepSummary};
use crate::records::{Checkpoints, RankFile, Room, RunFolder};

/// Upper bound on the time that a call may wait for work.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// Steps over which the estimate of the remaining time is averaged.
const RECENT_STEPS: usize = 10;

/// The driver under its lock, shared by services and tasks.
#[derive(Clone, Debug)]
pub(crate) struct Shared {
    driver: Arc<Mutex<Driver>>,
    waiters: Waiters,
    door: Arc<Door>,
    /// The end of the run, to be set when a panic has poisoned the driver.
    end: watch::Sender<Option<RunEnd>>,
}

impl Shared {
    pub(crate) fn new(driver: Driver) -> Self {
        let (waiters, door, end) = (driver.waiters.clone(), Arc::clone(&driver.door), driver.end.clone());
        Self { driver: Arc::new(Mutex::new(driver)), waiters, door, end }
    }

    /// The limits that the job sets for submissions.
    pub(crate) fn door(&self) -> &Door {
        &self.door
    }

    /// Locks the driver; after a panic under the lock, ends the run of this process instead.
    pub(crate) fn lock(&self) -> Result<MutexGuard<'_, Driver>, Poisoned> {
        poison::enter(&self.driver).inspect_err(|poisoned| {
            self.end.send_if_modified(|end| {
                let is_first = end.is_none();
                if is_first {
                    tracing::error!("{poisoned}");
                    *end = Some(RunEnd::Panicked { reason: poisoned.to_string() });
                }
                is_first
            });
        })
    }

    /// Locks the driver even after a panic, only to close its files and threads.
    pub(crate) fn lock_to_close(&self) -> MutexGuard<'_, Driver> {
        self.driver.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls the driver once. Returns the result when everything that it relies on is durable.
    pub(crate) async fn call<T>(&self, call: impl FnOnce(&mut Driver) -> Result<T, Status>) -> Result<T, Status> {
        let (result, durable) = {
            let mut driver = self.lock()?;
            // Before the machine sees the event, so that a refused call has no effect.
            driver.must_have_room()?;
            let result = call(&mut driver);
            // A refusal waits for the disk, too: it may be based on records that are not durable yet.
            (result, driver.durable())
        };
        on_disk(durable).await?;
        result
    }

    /// Calls the driver repeatedly, whenever what the call waits for may have arrived, until it returns a value or
    /// `wait_ms` have passed. Returns the result when everything that it relies on is durable.
    ///
    /// The call runs under the driver's lock, so it should return little; the answer is built outside.
    pub(crate) async fn poll<T>(
        &self,
        wait: Wait,
        wait_ms: u32,
        mut attempt: impl FnMut(&mut Driver) -> Result<Option<T>, Status>,
    ) -> Result<Option<T>, Status> {
        let longest = Duration::from_millis(u64::from(wait_ms)).min(LONGEST_WAIT);
        let deadline = tokio::time::Instant::now() + longest;
        let has_more = |driver: &Driver| driver.has_more(wait.line());
        let attempt = |driver: &mut Driver| {
            driver.must_have_room()?;
            Ok::<_, Status>(attempt(driver)?.map(|found| (found, driver.durable())))
        };
        let enter = || self.lock().map_err(Status::from);
        let found = self.waiters.poll(wait, deadline, enter, has_more, attempt).await?;
        let Some((found, durable)) = found else { return Ok(None) };
        on_disk(durable).await?;
        Ok(Some(found))
    }

    fn downgrade(&self) -> WeakShared {
        let (driver, waiters, door) = (Arc::downgrade(&self.driver), self.waiters.clone(), Arc::clone(&self.door));
        WeakShared { driver, waiters, door, end: self.end.clone() }
    }
}

async fn on_disk(durable: DurableUpTo) -> Result<(), Status> {
    durable.wait().await.map_err(|error| match error {
        NotDurable::Full => no_room("for what has happened"),
        NotDurable::Failed(problem) => Status::unavailable(problem),
    })
}

/// The answer to a call that a full disk cannot record. The call has no effect, so that nothing accumulates in memory;
/// callers retry for as long as they get this answer.
fn no_room(wanted: &str) -> Status {
    let mut status = Status::unavailable(format!("the run waits for room on its disk {wanted}"));
    status.metadata_mut().insert(NO_ROOM_KEY, MetadataValue::from_static("1"));
    status
}

/// The driver, for tasks that must not keep it alive.
#[derive(Clone, Debug)]
struct WeakShared {
    driver: std::sync::Weak<Mutex<Driver>>,
    waiters: Waiters,
    door: Arc<Door>,
    end: watch::Sender<Option<RunEnd>>,
}

impl WeakShared {
    fn upgrade(&self) -> Option<Shared> {
        let (waiters, door) = (self.waiters.clone(), Arc::clone(&self.door));
        Some(Shared { driver: self.driver.upgrade()?, waiters, door, end: self.end.clone() })
    }
}

/// The machine, the payloads it decides about, and the handles for its effects.
#[derive(Debug)]
pub(crate) struct Driver {
    pub(crate) machine: Machine,
    pub(crate) spec: Arc<JobSpec>,
    pub(crate) job_toml: String,
    pub(crate) run_dir: PathBuf,
    pub(crate) heartbeat_interval: Duration,
    pub(crate) problems: Arc<Problems>,
    /// Limits that the job sets for submissions.
    pub(crate) door: Arc<Door>,
    /// Cost model of training on a sequence.
    pub(crate) cost: Flops,
    pub(crate) started: Instant,
    /// Machine time when this process started.
    pub(crate) time_before: Duration,
    /// Total time for which the run has waited for disk space; it does not count for workers.
    pub(crate) stood_still: Duration,
    /// Start of the current wait for disk space; `None` while there is space.
    pub(crate) still_since: Option<Instant>,
    pub(crate) told_still: Option<Instant>,
    pub(crate) room: Room,
    /// Bytes that a checkpoint takes, as far as known.
    pub(crate) save_bytes: u64,
    pub(crate) journal: Journal,

    /// Samples and verdicts of the groups in flight, including those of the batch in training.
    pub(crate) store: Store,
    /// The batch in training; `None` outside of that phase.
    pub(crate) batch: Option<Batch>,
    /// Newest weights that all ranks have reached, and that leases name.
    pub(crate) weights: Option<v1::WeightsRef>,
    /// Assigns the sources from which hosts fetch those weights.
    pub(crate) distribution: pacs_weights::Distribution,
    /// Newest weights that rank 0 has published, which other ranks may not have reached.
    pub(crate) published: Option<v1::WeightsRef>,
    /// Report of rank 0 on the current step, without its signals.
    pub(crate) trained: Option<v1::TrainResult>,
    /// What the ranks that have reported say of their samples of the current step.
    pub(crate) signals: Signals,
    /// Files that ranks have reported for the checkpoint in flight.
    pub(crate) saved: BTreeMap<u32, Vec<RankFile>>,
    pub(crate) learner_names: Vec<String>,
    /// Lag of the batch in training: versions between its oldest token and the weights.
    pub(crate) lag: u64,
    /// Whether records of the journal are being replayed.
    pub(crate) replaying: bool,
    /// Names of workers that were drained.
    pub(crate) drained: BTreeSet<String>,
    pub(crate) verifications: Verifications,
    /// Servers that rollout workers drive, as their last heartbeats described them; not journaled.
    pub(crate) servers: HashMap<WorkerId, Vec<v1::EngineServer>>,
    /// The machine's counters when the current step began.
    pub(crate) counted: Counters,

    pub(crate) clock: PhaseClock,
    pub(crate) saves: SaveClock,
    pub(crate) recent_steps: VecDeque<f64>,
    pub(crate) newest_step: Option<StepSummary>,
    /// What the findings of the status are made from.
    pub(crate) recent: Recent,
    /// What watchers were told about the evaluation in progress.
    pub(crate) told_measuring: Option<MeasuringTold>,
    /// The newest result of each evaluation set.
    pub(crate) measured: BTreeMap<String, EvaluationSummary>,
    /// When watchers were last told what the run waits for.
    pub(crate) told_waiting: Option<Instant>,
    /// Whether watchers were told of the current stall.
    pub(crate) told_stall: bool,

    /// Paths of the checkpoints; the run folder's thread does all file access.
    pub(crate) checkpoints: Checkpoints,
    pub(crate) run_folder: RunFolder,

    pub(crate) progress: broadcast::Sender<Progress>,
    pub(crate) end: watch::Sender<Option<RunEnd>>,
    waiters: Waiters,
}

/// The parts that a driver is built from.
pub(crate) struct Parts {
    pub(crate) machine: Machine,
    pub(crate) spec: JobSpec,
    pub(crate) run_dir: PathBuf,
    pub(crate) heartbeat_interval: Duration,
    pub(crate) problems: Problems,
    pub(crate) door: Door,
    pub(crate) cost: Flops,
    pub(crate) save_bytes: u64,
    pub(crate) room: Room,
    pub(crate) checkpoints: Checkpoints,
    pub(crate) run_folder: RunFolder,
    pub(crate) progress: broadcast::Sender<Progress>,
    pub(crate) started: Instant,
    pub(crate) journal: Journal,
}

impl Driver {
    pub(crate) fn new(parts: Parts) -> Self {
        Self {
            counted: parts.machine.position().counters.clone(),
            job_toml: parts.spec.resolved_toml(),
            spec: Arc::new(parts.spec),
            run_dir: parts.run_dir,
            heartbeat_interval: parts.heartbeat_interval,
            problems: Arc::new(parts.problems),
            door: Arc::new(parts.door),
            cost: parts.cost,
            started: parts.started,
            time_before: parts.machine.now(),
            stood_still: Duration::ZERO,
            still_since: None,
            told_still: None,
            room: parts.room,
            save_bytes: parts.save_bytes,
            machine: parts.machine,
            journal: parts.journal,
            store: Store::default(),
            batch: None,
            weights: None,
            distribution: pacs_weights::Distribution::default(),
            published: None,
            trained: None,
            signals: Signals::default(),
            saved: BTreeMap::new(),
            learner_names: Vec::new(),
            lag: 0,
            replaying: false,
            drained: BTreeSet::new(),
            verifications: Verifications::default(),
            servers: HashMap::new(),
            clock: PhaseClock::new(Instant::now()),
            saves: SaveClock::default(),
            recent_steps: VecDeque::with_capacity(RECENT_STEPS),
            newest_step: None,
            recent: Recent::default(),
            told_measuring: None,
            measured: BTreeMap::new(),
            told_waiting: None,
            told_stall: false,
            checkpoints: parts.checkpoints,
            run_folder: parts.run_folder,
            progress: parts.progress,
            end: watch::Sender::new(None),
            waiters: Waiters::default(),
        }
    }

    /// Starts the run. A job that is complete already ends here.
    pub(crate) fn begin(&mut self) {
        self.apply_log_level();
        // A job that only evaluates is in that phase before its first event.
        self.clock.enter(self.machine.phase(), Instant::now());
        self.keep_snapshot();
        // A stopped or failed run continues; only a finished one ends.
        if let Some(end) = self.machine.ended().filter(|end| **end == End::Finished).cloned() {
            self.finish(&end);
        }
    }

    pub(crate) fn now(&self) -> Duration {
        let until = self.still_since.unwrap_or_else(Instant::now);
        self.time_before + until.duration_since(self.started).saturating_sub(self.stood_still)
    }

    /// Applies an event to the machine; returns its answer and the effects that are still to be carried out.
    pub(crate) fn ask(&mut self, event: Event) -> Result<(Reply, Vec<Effect>), Status> {
        self.ask_with(event, None, None)
    }

    /// The same with the event's content: a message that is stored with the record, or a sample or verdict that is
    /// stored if it counts.
    pub(crate) fn ask_with(
        &mut self,
        event: Event,
        payload: Option<Vec<u8>>,
        frame: Option<Frame>,
    ) -> Result<(Reply, Vec<Effect>), Status> {
        let (now, before) = (self.now(), self.machine.openings());
        let Step { record, answer, effects } = self.machine.step(now, event);
        // The content of a repeat is in the journal already, and that of a stale submission is not wanted.
        let frame = frame.filter(|_| answer == Ok(Reply::Accepted { fresh: true }));
        if let Some(record) = record {
            self.journal.append(&record, payload, frame);
        }
        // The woken calls run once the driver is unlocked, and thus after the effects of this step.
        self.wake_for(before);
        match answer {
            Ok(reply) => Ok((reply, effects)),
            Err(refusal) => {
                self.apply(effects);
                Err(status(&refusal))
            }
        }
    }

    /// A handle that waits until everything recorded so far is durable.
    pub(crate) fn durable(&self) -> DurableUpTo {
        self.journal.durable()
    }

    /// Applies an event and carries out its effects.
    pub(crate) fn call(&mut self, event: Event) -> Result<Reply, Status> {
        let (reply, effects) = self.ask(event)?;
        self.apply(effects);
        Ok(reply)
    }

    /// Applies an event without a caller.
    pub(crate) fn tell(&mut self, event: Event) {
        if let Err(refusal) = self.call(event) {
            tracing::debug!(%refusal, "an event was refused");
        }
    }

    /// Applies an operator's command, and records it in the audit table.
    pub(crate) fn operate(&mut self, who: &str, command: Command) -> Result<(), Status> {
        let at = self::summary::unix_time() as u64;
        let what = format!("{command:?}");
        tracing::info!(who, what, "an operator acts");
        let sets_level = matches!(command, Command::SetLogLevel(_));
        self.call(Event::Operator { who: who.to_owned(), at, command })?;
        if sets_level {
            self.apply_log_level();
        }
        self.journal.audit(Audit { at, who: who.to_owned(), what });
        if let Some(action) = self.machine.newest_action() {
            self.tell_progress(Progress::Operated { who: action.who.clone(), what: action.what.clone() });
        }
        Ok(())
    }

    /// Applies the log level that an operator has set to this process.
    fn apply_log_level(&self) {
        let level = match self.machine.position().log_level {
            None => return,
            Some(LogLevel::Error) => tracing::Level::ERROR,
            Some(LogLevel::Warn) => tracing::Level::WARN,
            Some(LogLevel::Info) => tracing::Level::INFO,
            Some(LogLevel::Debug) => tracing::Level::DEBUG,
            Some(LogLevel::Trace) => tracing::Level::TRACE,
        };
        if !pacs_runtime::set_log_level(level) {
            tracing::debug!(%level, "this process has no log of its own to set the level of");
        }
    }

    /// Asks the run to stop in the given mode.
    pub(crate) fn request_stop(&mut self, mode: StopMode) {
        if let Err(refusal) = self.operate("this process", Command::Stop(mode)) {
            tracing::debug!(%refusal, "the stop was refused");
        }
    }

    pub(crate) fn has_no_workers(&self) -> bool {
        self.machine.is_alone()
    }

    /// Increments of all counters since the last call.
    pub(crate) fn take_counted(&mut self) -> Counters {
        let counters = &self.machine.position().counters;
        let before = |counter: &Counter| self.counted.get(counter).copied().unwrap_or(0);
        let since = |(counter, count): (&Counter, &u64)| (*counter, count.saturating_sub(before(counter)));
        let since = counters.iter().map(since).collect();
        self.counted = counters.clone();
        since
    }

    /// The problem of a group.
    pub(crate) fn problem(&self, group: GroupId) -> &Problem {
        problem_of(&self.problems, group)
    }

    /// Checks that a sample has the routes of its prompt and its answer. Of a group that is not sampled the machine takes none anyway, and
    /// looking up its prompt would be work that any number in a call could ask for.
    pub(crate) fn check_route_count(&self, group: GroupId, bytes: usize, answer: usize) -> Result<(), WireError> {
        let is_checked = purpose_of(group) == Purpose::Train && self.machine.samples_group(group);
        match is_checked && self.door.route_bytes() > 0 {
            true => self.door.route_count(bytes, self.problem(group).prompt_tokens.len(), answer),
            false => Ok(()),
        }
    }

    /// Wakes all calls that wait for something of this kind.
    pub(crate) fn notify(&self, wait: Wait) {
        self.waiters.notify(wait.line());
    }

    /// Wakes as many calls as there is new work since `before`.
    fn wake_for(&self, before: Openings) {
        let now = self.machine.openings();
        for (line, new) in [
            (Line::Groups, now.groups.saturating_sub(before.groups)),
            (Line::Samples, now.samples.saturating_sub(before.samples)),
        ] {
            if new > 0 {
                self.waiters.offer(line, new);
            }
        }
        if now.generation != before.generation {
            self.notify(Wait::Generation);
        }
        if (now.generation, now.task) != (before.generation, before.task) {
            self.notify(Wait::Task);
        }
        if now.alone && !before.alone {
            self.notify(Wait::Goodbye);
        }
    }

    /// Offers again the work that no waiting call has taken, because conditions may have changed.
    fn offer_again(&self) {
        let now = self.machine.openings();
        for (line, left) in [(Line::Groups, now.groups), (Line::Samples, now.samples)] {
            if left > 0 {
                self.waiters.offer(line, left);
            }
        }
    }

    /// Wakes the waiting call of one worker, because its leases have changed and with them what it may be granted.
    pub(crate) fn wake_own(&self, worker: WorkerId) {
        self.waiters.wake_worker(worker);
    }

    /// Whether a line has work left for further calls.
    fn has_more(&self, line: Line) -> bool {
        match line {
            Line::Groups => self.machine.openings().groups > 0,
            Line::Samples => self.machine.openings().samples > 0,
            // A change wakes all waiting calls of these lines at once.
            Line::Generation | Line::Task | Line::Weights | Line::Goodbye => false,
        }
    }

    pub(crate) fn tell_progress(&self, progress: Progress) {
        // An error means that nobody is watching.
        let _ = self.progress.send(progress);
    }

    pub(crate) fn note(&self, text: impl Into<String>) {
        let text = text.into();
        tracing::info!("{text}");
        self.tell_progress(Progress::Note { text });
    }
}

/// The problem of a group, for callers that hold the problems but not the driver.
pub(crate) fn problem_of(problems: &Problems, group: GroupId) -> &Problem {
    match evaluation_problem(group) {
        Some(number) => {
            let (set, position) =
                problems.measured(number).expect("groups that are measured are those of the sets' problems");
            &set.problems[position]
        }
        None => problems.train_at(group.0),
    }
}

/// What a group is sampled for.
pub(crate) fn purpose_of(group: GroupId) -> Purpose {
    if evaluation_problem(group).is_some() { Purpose::Evaluate } else { Purpose::Train }
}

fn status(refusal: &Refusal) -> Status {
    let message = refusal.to_string();
    match refusal.kind() {
        RefusalKind::NotFound => Status::not_found(message),
        // Callers retry on `UNAVAILABLE`, so the process ends when its heartbeat says so: in
        // order, and without a restart.
        RefusalKind::Replaced => Status::unavailable(message),
        RefusalKind::Taken => Status::already_exists(message),
        RefusalKind::Stale => Status::failed_precondition(message),
        RefusalKind::Invalid => Status::invalid_argument(message),
    }
}
