//! Carries out the machine's effects, and keeps the payloads that the machine only counts.

mod apply;
mod batch;
mod bounded;
mod clock;
mod content;
mod disk;
mod distribution;
mod door;
mod fit;
mod measure;
mod pieces;
mod poison;
mod recover;
mod share;
mod status;
mod store;
mod summary;
mod verifications;
mod waiters;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pacs_data::{Problem, Problems};
use pacs_machine::{
    Command, Counter, Counters, Effect, End, Event, LogLevel, Machine, Openings, Refusal, RefusalKind, Reply, Step,
    StopMode, evaluation_problem,
};
use pacs_protocol::v1;
use pacs_runtime::NO_ROOM_KEY;
use pacs_shape::Flops;
use pacs_spec::JobSpec;
use pacs_types::{GroupId, WorkerId};
use tokio::sync::{broadcast, watch};
use tonic::Status;
use tonic::metadata::MetadataValue;

pub(crate) use self::batch::{Batch, Sharing};
pub(crate) use self::bounded::bounded;
pub(crate) use self::clock::{PhaseClock, SaveClock};
pub(crate) use self::disk::follow;
pub(crate) use self::door::{Door, known_versions};
use self::measure::MeasuringTold;
pub(crate) use self::pieces::{Pieces, Received};
pub(crate) use self::poison::Poisoned;
pub(crate) use self::store::{ContentError, KeptSample, Store};
pub(crate) use self::summary::unix_time;
pub(crate) use self::verifications::{Verification, Verifications};
pub(crate) use self::waiters::Wait;
use self::waiters::{Line, Waiters};
use crate::journal::{Audit, DurableUpTo, Frame, Journal, NotDurable};
use crate::progress::{EvaluationSummary, Progress, RunEnd, StepSummary};
use crate::records::{Checkpoints, RankFile, Room, RunFolder};

/// Longest time that a call may wait for work, whatever it asks for.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// Steps whose duration the estimate of the remaining time is made of.
const RECENT_STEPS: usize = 10;

/// The driver, for those who share it.
#[derive(Clone, Debug)]
pub(crate) struct Shared {
    driver: Arc<Mutex<Driver>>,
    waiters: Waiters,
    door: Arc<Door>,
    /// The driver's, to be told when nobody can enter the driver any more.
    end: watch::Sender<Option<RunEnd>>,
}

impl Shared {
    pub(crate) fn new(driver: Driver) -> Self {
        let (waiters, door, end) = (driver.waiters.clone(), Arc::clone(&driver.door), driver.end.clone());
        Self { driver: Arc::new(Mutex::new(driver)), waiters, door, end }
    }

    /// What the job allows of what workers hand in.
    pub(crate) fn door(&self) -> &Door {
        &self.door
    }

    /// The driver, unless somebody has panicked in it; then the run of this process ends.
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

    /// The driver, also when somebody has panicked in it: to close what it has open, and for nothing else.
    pub(crate) fn lock_to_close(&self) -> MutexGuard<'_, Driver> {
        self.driver.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something with the driver. What comes of it is given out when everything that it relies on is durable.
    pub(crate) async fn call<T>(&self, call: impl FnOnce(&mut Driver) -> Result<T, Status>) -> Result<T, Status> {
        let (result, durable) = {
            let mut driver = self.lock()?;
            driver.must_have_room()?;
            let result = call(&mut driver);
            (result, driver.durable())
        };
        on_disk(durable).await?;
        result
    }

    /// Tries, and again whenever there may be what the call waits for, until there is something or `wait_ms` have passed.
    /// What is found is given out when everything that it relies on is durable.
    ///
    /// The attempt holds the driver: it returns what is small, and the answer is built from that outside.
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

/// The answer to a call whose record the disk cannot take. It is as if the call had not been made yet, so that nothing piles
/// up in memory; callers wait for as long as they hear it.
fn no_room(wanted: &str) -> Status {
    let mut status = Status::unavailable(format!("the run waits for room on its disk {wanted}"));
    status.metadata_mut().insert(NO_ROOM_KEY, MetadataValue::from_static("1"));
    status
}

/// The driver, for what must not keep it alive.
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

/// The machine with everything that it decides about.
#[derive(Debug)]
pub(crate) struct Driver {
    pub(crate) machine: Machine,
    pub(crate) spec: Arc<JobSpec>,
    pub(crate) job_toml: String,
    pub(crate) run_dir: PathBuf,
    pub(crate) heartbeat_interval: Duration,
    pub(crate) problems: Arc<Problems>,
    /// What the job allows of what workers hand in.
    pub(crate) door: Arc<Door>,
    /// What training on a sequence costs.
    pub(crate) cost: Flops,
    pub(crate) started: Instant,
    /// The machine's time when this process started.
    pub(crate) time_before: Duration,
    /// For how long the run has waited for room since, which is no time of its workers.
    pub(crate) stood_still: Duration,
    /// It waits now, since then; and when watchers were told.
    pub(crate) still_since: Option<Instant>,
    pub(crate) told_still: Option<Instant>,
    pub(crate) room: Room,
    /// Bytes that a checkpoint takes, as far as it is known.
    pub(crate) save_bytes: u64,
    pub(crate) journal: Journal,

    /// Samples and verdicts of the groups in flight, those of the batch in training included.
    pub(crate) store: Store,
    /// The batch in training.
    pub(crate) batch: Option<Batch>,
    /// Newest weights that all ranks have reached: what is lent is generated with them.
    pub(crate) weights: Option<v1::WeightsRef>,
    /// Who fetches them from whom.
    pub(crate) distribution: pacs_weights::Distribution,
    /// What rank 0 has published; the other ranks may not be there yet.
    pub(crate) published: Option<v1::WeightsRef>,
    /// What rank 0 reported of the step.
    pub(crate) trained: Option<v1::TrainResult>,
    /// What ranks reported of the checkpoint being written.
    pub(crate) saved: BTreeMap<u32, Vec<RankFile>>,
    pub(crate) learner_names: Vec<String>,
    /// How many versions behind its weights the oldest token of the batch in training is.
    pub(crate) lag: u64,
    /// The records of the journal are being taken in again.
    pub(crate) replaying: bool,
    /// Workers that were drained.
    pub(crate) drained: BTreeSet<String>,
    pub(crate) verifications: Verifications,
    /// The machine's counts when the step began.
    pub(crate) counted: Counters,

    pub(crate) clock: PhaseClock,
    pub(crate) saves: SaveClock,
    pub(crate) recent_steps: VecDeque<f64>,
    pub(crate) newest_step: Option<StepSummary>,
    /// When watchers heard of a measurement's progress last, and since when how many of its samples have been judged here.
    pub(crate) told_measuring: Option<MeasuringTold>,
    /// The newest measurement of each set.
    pub(crate) measured: BTreeMap<String, EvaluationSummary>,
    /// The wait that watchers were told of last, and when.
    pub(crate) told_waiting: Option<Instant>,
    /// They know of the stall that is going on.
    pub(crate) told_stall: bool,

    /// Where checkpoints are; nothing of it is touched here.
    pub(crate) checkpoints: Checkpoints,
    pub(crate) run_folder: RunFolder,

    pub(crate) progress: broadcast::Sender<Progress>,
    pub(crate) end: watch::Sender<Option<RunEnd>>,
    waiters: Waiters,
}

/// What a new driver is made of.
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
            saved: BTreeMap::new(),
            learner_names: Vec::new(),
            lag: 0,
            replaying: false,
            drained: BTreeSet::new(),
            verifications: Verifications::default(),
            clock: PhaseClock::new(Instant::now()),
            saves: SaveClock::default(),
            recent_steps: VecDeque::with_capacity(RECENT_STEPS),
            newest_step: None,
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

    /// Begins: a job that is complete already ends where it starts.
    pub(crate) fn begin(&mut self) {
        self.apply_log_level();
        // A job that only evaluates is in that phase before its first event.
        self.clock.enter(self.machine.phase(), Instant::now());
        self.keep_snapshot();
        // A run that was stopped, or failed, goes on.
        if let Some(end) = self.machine.ended().filter(|end| **end == End::Finished).cloned() {
            self.finish(&end);
        }
    }

    pub(crate) fn now(&self) -> Duration {
        let until = self.still_since.unwrap_or_else(Instant::now);
        self.time_before + until.duration_since(self.started).saturating_sub(self.stood_still)
    }

    /// Gives the machine an event; returns its answer and the effects that are still to be applied.
    pub(crate) fn ask(&mut self, event: Event) -> Result<(Reply, Vec<Effect>), Status> {
        self.ask_with(event, None, None)
    }

    /// The same with what belongs to the event: a message that is kept with its record, or a sample or verdict that is
    /// kept if it counts.
    pub(crate) fn ask_with(
        &mut self,
        event: Event,
        payload: Option<Vec<u8>>,
        frame: Option<Frame>,
    ) -> Result<(Reply, Vec<Effect>), Status> {
        let (now, before) = (self.now(), self.machine.openings());
        let Step { record, answer, effects } = self.machine.step(now, event);
        let frame = frame.filter(|_| answer == Ok(Reply::Accepted { fresh: true }));
        if let Some(record) = record {
            self.journal.append(&record, payload, frame);
        }
        // They try when the driver is free again: when the effects of this step are applied.
        self.wake_for(before);
        match answer {
            Ok(reply) => Ok((reply, effects)),
            Err(refusal) => {
                self.apply(effects);
                Err(status(&refusal))
            }
        }
    }

    /// To wait until everything that others may see is durable.
    pub(crate) fn durable(&self) -> DurableUpTo {
        self.journal.durable()
    }

    /// Gives the machine an event and applies the effects.
    pub(crate) fn call(&mut self, event: Event) -> Result<Reply, Status> {
        let (reply, effects) = self.ask(event)?;
        self.apply(effects);
        Ok(reply)
    }

    /// Gives the machine an event that nobody waits for an answer to.
    pub(crate) fn tell(&mut self, event: Event) {
        if let Err(refusal) = self.call(event) {
            tracing::debug!(%refusal, "an event was refused");
        }
    }

    /// Carries out what somebody wants of the run, and writes it down.
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
        Ok(())
    }

    /// Logs in this process what an operator has set.
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

    /// Asks the run to save and end at the next safe point.
    pub(crate) fn request_stop(&mut self, mode: StopMode) {
        if let Err(refusal) = self.operate("this process", Command::Stop(mode)) {
            tracing::debug!(%refusal, "the stop was refused");
        }
    }

    pub(crate) fn has_no_workers(&self) -> bool {
        self.machine.is_alone()
    }

    /// How often each thing was counted since this was asked last.
    pub(crate) fn take_counted(&mut self) -> Counters {
        let counters = &self.machine.position().counters;
        let before = |counter: &Counter| self.counted.get(counter).copied().unwrap_or(0);
        let since = |(counter, count): (&Counter, &u64)| (*counter, count.saturating_sub(before(counter)));
        let since = counters.iter().map(since).collect();
        self.counted = counters.clone();
        since
    }

    /// The problem that a group is about.
    pub(crate) fn problem(&self, group: GroupId) -> &Problem {
        problem_of(&self.problems, group)
    }

    /// Wakes all calls that wait for something of a kind.
    pub(crate) fn notify(&self, wait: Wait) {
        self.waiters.notify(wait.line());
    }

    /// Wakes as many calls as there is something new for since `before`.
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

    /// Offers the work again that nobody who waits has taken: one of them may be able to by now.
    fn offer_again(&self) {
        let now = self.machine.openings();
        for (line, left) in [(Line::Groups, now.groups), (Line::Samples, now.samples)] {
            if left > 0 {
                self.waiters.offer(line, left);
            }
        }
    }

    /// Lets a worker's own call try again: what it holds has changed, and with it what it may be given.
    pub(crate) fn wake_own(&self, worker: WorkerId) {
        self.waiters.wake_worker(worker);
    }

    /// Whether there is work left for others who stand in a line.
    fn has_more(&self, line: Line) -> bool {
        match line {
            Line::Groups => self.machine.openings().groups > 0,
            Line::Samples => self.machine.openings().samples > 0,
            // A change has woken all of them.
            Line::Generation | Line::Task | Line::Weights | Line::Goodbye => false,
        }
    }

    pub(crate) fn tell_progress(&self, progress: Progress) {
        // Nobody may be watching.
        let _ = self.progress.send(progress);
    }

    pub(crate) fn note(&self, text: impl Into<String>) {
        let text = text.into();
        tracing::info!("{text}");
        self.tell_progress(Progress::Note { text });
    }
}

/// The problem that a group is about, for those who hold the problems and not the driver.
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

fn status(refusal: &Refusal) -> Status {
    let message = refusal.to_string();
    match refusal.kind() {
        RefusalKind::NotFound => Status::not_found(message),
        // Every caller tries this again, so that it ends as its heartbeats tell it: in order, and not to be started again.
        RefusalKind::Replaced => Status::unavailable(message),
        RefusalKind::Taken => Status::already_exists(message),
        RefusalKind::Stale => Status::failed_precondition(message),
        RefusalKind::Invalid => Status::invalid_argument(message),
    }
}
