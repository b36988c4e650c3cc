//! Carries out the machine's effects, and keeps the payloads that the machine only counts.

mod apply;
mod batch;
mod clock;
mod distribution;
mod recover;
mod share;
mod status;
mod store;
mod summary;
mod verifications;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pacs_data::{Problem, Problems};
use pacs_machine::{
    Command, Counters, Effect, End, Event, LogLevel, Machine, Refusal, RefusalKind, Reply, StopMode, evaluation_problem,
};
use pacs_protocol::v1;
use pacs_shape::Flops;
use pacs_spec::JobSpec;
use pacs_types::GroupId;
use tokio::sync::{broadcast, watch};
use tonic::Status;

pub(crate) use self::batch::{Batch, Sharing};
pub(crate) use self::clock::{PhaseClock, SaveClock};
pub(crate) use self::store::Store;
pub(crate) use self::verifications::{Verification, Verifications};
use crate::journal::{Audit, DurableUpTo, Frame, Journal};
use crate::progress::{Progress, RunEnd, StepSummary};
use crate::records::{Archive, Checkpoints, Lines, RankFile};

/// Longest time that a call may wait for work, whatever it asks for.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// Steps whose duration the estimate of the remaining time is made of.
const RECENT_STEPS: usize = 10;

/// The driver, for those who share it.
#[derive(Clone, Debug)]
pub(crate) struct Shared {
    driver: Arc<Mutex<Driver>>,
    /// Counts changes that a waiting call may be interested in.
    changed: Arc<watch::Sender<u64>>,
}

impl Shared {
    pub(crate) fn new(mut driver: Driver) -> Self {
        let changed = Arc::new(watch::Sender::new(0));
        driver.changed = Some(Arc::clone(&changed));
        let shared = Self { driver: Arc::new(Mutex::new(driver)), changed };
        shared.lock().shared = Some(shared.downgrade());
        shared
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Driver> {
        // A panic in one call must not take the run down; the machine changes only by completed steps.
        self.driver.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something with the driver. What comes of it is given out when everything that it relies on is durable.
    pub(crate) async fn call<T>(&self, call: impl FnOnce(&mut Driver) -> Result<T, Status>) -> Result<T, Status> {
        let (result, durable) = {
            let mut driver = self.lock();
            let result = call(&mut driver);
            (result, driver.durable())
        };
        on_disk(durable).await?;
        result
    }

    /// Tries again after every change, until there is something or `wait_ms` have passed. What is found is given out
    /// when everything that it relies on is durable.
    pub(crate) async fn poll<T>(
        &self,
        wait_ms: u32,
        mut attempt: impl FnMut(&mut Driver) -> Result<Option<T>, Status>,
    ) -> Result<Option<T>, Status> {
        let wait = Duration::from_millis(u64::from(wait_ms)).min(LONGEST_WAIT);
        let deadline = tokio::time::Instant::now() + wait;
        let mut changed = self.changed.subscribe();
        loop {
            // Before the attempt, so that a change during it is not missed.
            changed.borrow_and_update();
            let (found, durable) = {
                let mut driver = self.lock();
                let found = attempt(&mut driver)?;
                (found, driver.durable())
            };
            if found.is_some() {
                on_disk(durable).await?;
                return Ok(found);
            }
            if !matches!(tokio::time::timeout_at(deadline, changed.changed()).await, Ok(Ok(()))) {
                return Ok(None);
            }
        }
    }

    fn downgrade(&self) -> WeakShared {
        WeakShared { driver: Arc::downgrade(&self.driver), changed: Arc::downgrade(&self.changed) }
    }
}

async fn on_disk(durable: DurableUpTo) -> Result<(), Status> {
    durable.wait().await.map_err(Status::unavailable)
}

/// The driver, for what must not keep it alive.
#[derive(Clone, Debug)]
struct WeakShared {
    driver: std::sync::Weak<Mutex<Driver>>,
    changed: std::sync::Weak<watch::Sender<u64>>,
}

impl WeakShared {
    fn upgrade(&self) -> Option<Shared> {
        Some(Shared { driver: self.driver.upgrade()?, changed: self.changed.upgrade()? })
    }
}

/// The machine with everything that it decides about.
#[derive(Debug)]
pub(crate) struct Driver {
    pub(crate) machine: Machine,
    pub(crate) spec: JobSpec,
    pub(crate) job_toml: String,
    pub(crate) run_dir: PathBuf,
    pub(crate) heartbeat_interval: Duration,
    pub(crate) problems: Problems,
    /// What training on a sequence costs.
    pub(crate) cost: Flops,
    pub(crate) started: Instant,
    /// The machine's time when this process started.
    pub(crate) time_before: Duration,
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
    /// The wait that watchers were told of last, and when.
    pub(crate) told_waiting: Option<Instant>,
    /// They know of the stall that is going on.
    pub(crate) told_stall: bool,

    pub(crate) checkpoints: Checkpoints,
    pub(crate) metrics: Lines,
    pub(crate) evaluations: Lines,
    pub(crate) archive: Option<Archive>,

    pub(crate) progress: broadcast::Sender<Progress>,
    pub(crate) end: watch::Sender<Option<RunEnd>>,
    pub(crate) changed: Option<Arc<watch::Sender<u64>>>,
    shared: Option<WeakShared>,
}

/// What a new driver is made of.
pub(crate) struct Parts {
    pub(crate) machine: Machine,
    pub(crate) spec: JobSpec,
    pub(crate) run_dir: PathBuf,
    pub(crate) heartbeat_interval: Duration,
    pub(crate) problems: Problems,
    pub(crate) cost: Flops,
    pub(crate) checkpoints: Checkpoints,
    pub(crate) metrics: Lines,
    pub(crate) evaluations: Lines,
    pub(crate) archive: Option<Archive>,
    pub(crate) progress: broadcast::Sender<Progress>,
    pub(crate) started: Instant,
    pub(crate) journal: Journal,
}

impl Driver {
    pub(crate) fn new(parts: Parts) -> Self {
        Self {
            counted: parts.machine.position().counters.clone(),
            job_toml: parts.spec.resolved_toml(),
            spec: parts.spec,
            run_dir: parts.run_dir,
            heartbeat_interval: parts.heartbeat_interval,
            problems: parts.problems,
            cost: parts.cost,
            started: parts.started,
            time_before: parts.machine.now(),
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
            told_waiting: None,
            told_stall: false,
            checkpoints: parts.checkpoints,
            metrics: parts.metrics,
            evaluations: parts.evaluations,
            archive: parts.archive,
            progress: parts.progress,
            end: watch::Sender::new(None),
            changed: None,
            shared: None,
        }
    }

    /// Begins: a job that is complete already ends where it starts.
    pub(crate) fn begin(&mut self) {
        self.apply_log_level();
        self.keep_snapshot();
        // A run that was stopped, or failed, goes on.
        if let Some(end) = self.machine.ended().filter(|end| **end == End::Finished).cloned() {
            self.finish(&end);
        }
    }

    pub(crate) fn now(&self) -> Duration {
        self.time_before + self.started.elapsed()
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
        let now = self.now();
        let mut effects = self.machine.step(now, event);
        let counts = |effect: &Effect| *effect == Effect::Reply(Reply::Accepted { fresh: true });
        let frame = frame.filter(|_| effects.iter().take(2).any(counts));
        if matches!(effects.first(), Some(Effect::Persist(_)))
            && let Effect::Persist(record) = effects.remove(0)
        {
            self.journal.append(&record, payload, frame);
        }
        let has_answer = matches!(effects.first(), Some(Effect::Reply(_) | Effect::Refuse(_)));
        let answer = has_answer.then(|| effects.remove(0));
        match answer {
            Some(Effect::Refuse(refusal)) => {
                self.apply(effects);
                Err(status(&refusal))
            }
            Some(Effect::Reply(reply)) => Ok((reply, effects)),
            _ => Ok((Reply::Done, effects)),
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
        self.notify();
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
        let before = |name: &String| self.counted.get(name).copied().unwrap_or(0);
        let since = counters.iter().map(|(name, count)| (name.clone(), count.saturating_sub(before(name)))).collect();
        self.counted = counters.clone();
        since
    }

    /// The problem that a group is about.
    pub(crate) fn problem(&self, group: GroupId) -> &Problem {
        match evaluation_problem(group) {
            Some(index) => &self.problems.evaluation[usize::try_from(index).unwrap_or(usize::MAX)],
            None => self.problems.train_at(group.0),
        }
    }

    /// Wakes the calls that wait.
    pub(crate) fn notify(&self) {
        if let Some(changed) = &self.changed {
            changed.send_modify(|count| *count += 1);
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

fn status(refusal: &Refusal) -> Status {
    let message = refusal.to_string();
    match refusal.kind() {
        RefusalKind::NotFound => Status::not_found(message),
        RefusalKind::Stale => Status::failed_precondition(message),
        RefusalKind::Invalid => Status::invalid_argument(message),
    }
}
