use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use pacs_order::History;
use pacs_types::{Generation, GroupId, LeaseId, Role, SampleId, WeightVersion, WorkerId};
use serde::{Deserialize, Serialize};

use crate::draw::Order;
use crate::handlers::Names;
use crate::operate::Action;
use crate::pending_checkpoint::PendingCheckpoint;
use crate::phase::{Evaluation, Phase, PhaseKind, Team};
use crate::pool::{Judgement, Pool, evaluation_problem, present};
use crate::roster::Roster;
use crate::trial::Trials;
use crate::worker::{Process, Worker};
use crate::worker_loss::Losses;
use crate::{Answer, Counter, Effect, End, Event, Options, Record, Refusal, Reply, Snapshot, Step, StopMode};

/// The coordinator's state machine: everything that a run has decided so far.
///
/// The caller passes the time, as the duration since any fixed point. It never goes backwards.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    pub(crate) options: Options,
    pub(crate) now: Duration,
    /// Last call of `overdue`, which shows whether the coordinator itself stood still.
    pub(crate) ticked: Duration,
    /// Effects of the event in progress.
    #[serde(skip)]
    pub(crate) effects: Vec<Effect>,
    /// Answer to the event in progress; `None` until one is given.
    #[serde(skip)]
    answer: Option<Answer>,
    /// The event in progress changed no durable state and is not journaled.
    #[serde(skip)]
    pub(crate) unchanged: bool,
    #[serde(skip)]
    pub(crate) order: Order,

    pub(crate) workers: Roster,
    pub(crate) names: Names,
    pub(crate) losses: Losses,
    /// Removed workers whose next heartbeat tells them to restart, because they made no progress.
    pub(crate) restarting: BTreeSet<WorkerId>,
    pub(crate) newest_id: u64,
    pub(crate) newest_generation: Generation,

    pub(crate) phase: Phase,
    pub(crate) phase_since: Duration,
    pub(crate) team: Option<Team>,
    /// Version that rank 0 of the current generation published last; `None` before that.
    pub(crate) weights: Option<WeightVersion>,
    /// Why the last generation ended; learners are told.
    pub(crate) regroup_reason: String,
    pub(crate) lost_generations: u32,
    /// Generations lost while saving since the last committed checkpoint. Counted apart from `lost_generations`, which
    /// the recomputed steps between two saves reset.
    pub(crate) lost_saves: u32,
    /// Consecutive failures of the final checkpoint, that of the last step or of a stop.
    #[serde(default)]
    pub(crate) failed_last_saves: u32,
    /// Time of the last progress; see `watchdog.rs`.
    pub(crate) progressed: Duration,
    /// Consecutive stalls without progress.
    pub(crate) stalls: u32,

    /// Training groups in flight, except those of the batch in training.
    pub(crate) pool: Pool,
    /// The search for a group that makes training fail.
    pub(crate) trials: Trials,
    /// Step up to which groups may exceed the lag bound, because a trial held some back.
    pub(crate) crowded_until: u64,
    /// Groups that were given up since the last step.
    pub(crate) failed_groups: usize,
    /// Uniform groups that were refilled since the last step.
    pub(crate) refills: u32,

    pub(crate) paused: bool,
    pub(crate) stop: Option<StopMode>,
    pub(crate) checkpoint_wanted: bool,
    /// The last operator actions, newest at the end.
    pub(crate) actions: VecDeque<Action>,

    /// Progress of the job between steps: what a checkpoint stores.
    pub(crate) position: Snapshot,
    /// Position that a lost generation goes back to: the last committed checkpoint, or the start of the job.
    pub(crate) restart: Snapshot,
    /// Whether `restart` is a checkpoint, not the model of the job spec.
    pub(crate) restart_is_checkpoint: bool,
    /// Whether the last checkpoint holds the exported model.
    pub(crate) exported: bool,
    /// The checkpoint in flight; at most one.
    pub(crate) writing: Option<PendingCheckpoint>,
    /// Step at which a save was last tried, so that a failed one is not tried again in that step.
    pub(crate) save_tried: Option<u64>,
    /// Steps whose evaluation is done, as far as the job can pass them again.
    pub(crate) evaluated: BTreeSet<u64>,
    /// The evaluation of the current version that runs concurrently with the next step; see `evaluation.rs`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) concurrent: Option<Evaluation>,
    /// A stopped evaluation that the next process continues; only in a job that evaluates and nothing else.
    #[serde(default)]
    pub(crate) unfinished: Option<Evaluation>,
}

/// A sample whose content the driver must have on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Present {
    /// Group and index of the sample.
    pub sample: SampleId,
    /// The lease that it was submitted under.
    pub lease: LeaseId,
    /// The lease that its verdict was submitted under; `None` while it has no verdict.
    pub verdict: Option<LeaseId>,
}

impl Machine {
    /// A new run that waits for its workers.
    #[must_use]
    pub fn new(mut options: Options, now: Duration) -> Self {
        if options.curriculum.is_none() {
            // It would be outdated by the time a curriculum is switched on again.
            options.start.history = History::default();
        }
        // Removed from the options, because every snapshot contains them.
        let evaluated = std::mem::take(&mut options.evaluated);
        let mut machine = Self {
            now,
            ticked: now,
            effects: Vec::new(),
            answer: None,
            unchanged: false,
            order: Order::default(),
            workers: Roster::default(),
            names: Names::default(),
            losses: Losses::default(),
            restarting: BTreeSet::new(),
            newest_id: options.ids_above,
            newest_generation: Generation(options.generations_above),
            phase: Phase::Assembling,
            phase_since: now,
            team: None,
            weights: None,
            regroup_reason: String::new(),
            lost_generations: 0,
            lost_saves: 0,
            failed_last_saves: 0,
            progressed: now,
            stalls: 0,
            pool: Pool::default(),
            trials: Trials::default(),
            crowded_until: 0,
            failed_groups: 0,
            refills: 0,
            paused: false,
            stop: None,
            checkpoint_wanted: false,
            actions: VecDeque::new(),
            position: options.start.clone(),
            restart: options.start.clone(),
            restart_is_checkpoint: options.start.step > 0,
            exported: options.exported,
            writing: None,
            save_tried: None,
            evaluated,
            concurrent: None,
            unfinished: None,
            options,
        };
        machine.take_own_weights();
        machine.advance();
        machine.effects.clear();
        machine
    }

    /// Sets the weights of a job without training: rollout workers load the model folder, and no learner publishes it.
    pub(crate) fn take_own_weights(&mut self) {
        if self.options.evaluation_only {
            self.weights = Some(self.policy_version());
        }
    }

    /// Applies one event.
    pub fn step(&mut self, now: Duration, event: Event) -> Step {
        self.now = self.now.max(now);
        let record = Record { now: self.now, event: event.clone() };
        self.unchanged = false;
        self.apply(event);
        let record = (!std::mem::take(&mut self.unchanged)).then_some(record);
        let answer = self.answer.take().unwrap_or(Ok(Reply::Done));
        Step { record, answer, effects: std::mem::take(&mut self.effects) }
    }

    /// Continues a machine that was restored from its records at `now`. Downtime does not
    /// count against worker liveness.
    pub fn resume(&mut self, now: Duration) {
        self.now = self.now.max(now);
        self.ticked = self.now;
        self.progressed = self.now;
        let now = self.now;
        self.workers.values_mut().for_each(|worker| worker.heard = now);
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Register { role, name, host, pid, started, collective_address } => {
                self.register(role, name, Process { host, pid, started }, collective_address);
            }
            Event::Heartbeat { worker, activity } => self.heartbeat(worker, activity),
            Event::Ending { worker } => self.ending(worker),
            Event::Leave { worker, error } => self.leave(worker, error),
            Event::LeaseGroups { worker, free_samples, request } => {
                self.lease_groups(worker, free_samples, request);
            }
            Event::SubmitSample { worker, lease, sample, version } => {
                self.submit_sample(worker, lease, sample, version);
            }
            Event::LeaseSamples { worker, max_samples, request } => {
                self.lease_samples(worker, max_samples, request);
            }
            Event::SubmitVerdict { worker, lease, sample, outcome, label, reward } => {
                self.submit_verdict(worker, lease, sample, Judgement { outcome, label, reward });
            }
            Event::JoinGeneration { worker } => self.join_generation(worker),
            Event::NextTask { worker, generation } => self.next_task(worker, generation),
            Event::CompleteTask { worker, generation, task, result } => {
                self.complete_task(worker, generation, task, result);
            }
            Event::CheckpointCommitted { step } => self.checkpoint_committed(step),
            Event::CheckpointFailed { step, reason } => self.checkpoint_failed(step, &reason),
            Event::Operator { who, at, command } => self.operate(who, at, command),
            Event::SampleGone { sample } => self.sample_gone(sample),
            Event::Reopened => self.reopen(),
            Event::Resumed => self.resumed(),
            // Deadlines that were found before the run ended no longer matter.
            Event::WorkerSilent { .. }
            | Event::LeasesLapsed { .. }
            | Event::AccusationsDue { .. }
            | Event::GroupOverdue { .. }
            | Event::Stalled
            | Event::TaskOverdue { .. }
            | Event::CheckpointOverdue { .. }
            | Event::LearnersMissing
                if self.is_ended() =>
            {
                self.unchanged = true;
            }
            Event::WorkerSilent { worker } => self.worker_silent(worker),
            Event::LeasesLapsed { groups, samples } => self.lapse(&groups, &samples),
            Event::AccusationsDue { groups, samples } => self.accusations_due(&groups, &samples),
            Event::GroupOverdue { group } => self.group_overdue(group),
            Event::Stalled => self.stalled(),
            Event::TaskOverdue { task } => self.task_overdue(task),
            Event::CheckpointOverdue { task } => self.checkpoint_overdue(task),
            Event::LearnersMissing => self.learners_missing(),
        }
    }

    /// Samples whose content the run still needs.
    pub fn present(&self) -> impl Iterator<Item = Present> {
        let evaluated = self.measured().map(|evaluation| evaluation.pool.present());
        let trained = self.phase.training().map(|training| present(&training.groups));
        let here = self.pool.present().chain(evaluated.into_iter().flatten()).chain(trained.into_iter().flatten());
        here.map(|(sample, lease, verdict)| Present { sample, lease, verdict })
    }

    /// Whether the evaluation after this step is done. For steps before the current one this holds, if one was due and
    /// no stop has abandoned it.
    #[must_use]
    pub fn has_evaluated(&self, step: u64) -> bool {
        step < self.position.step || self.evaluated.contains(&step)
    }

    /// Marks the evaluation at the current step as done. Forgets those of steps that the job cannot pass again, which
    /// are all before the newest checkpoint and the one in flight, so that a snapshot does not grow with the steps.
    pub(crate) fn note_evaluated(&mut self) {
        let writing = self.writing.as_ref().map(|writing| writing.snapshot.step);
        let (step, restart) = (self.position.step, self.restart.step);
        self.evaluated.insert(step);
        self.evaluated.retain(|evaluated| [Some(step), Some(restart), writing].contains(&Some(*evaluated)));
    }

    /// What the learners do now, or how the run ended.
    #[must_use]
    pub fn phase(&self) -> PhaseKind {
        self.phase.kind()
    }

    /// Judged samples and all samples of the evaluation in progress, in whatever phase; `None` outside of one.
    #[must_use]
    pub fn measuring(&self) -> Option<(u64, u64)> {
        self.evaluation().map(|evaluation| evaluation.pool.judged_samples())
    }

    /// The step in training, or finished and held for the concurrent evaluation; the groups of its batch, and those
    /// left out of it.
    #[must_use]
    pub fn training(&self) -> Option<(u64, Vec<GroupId>, Vec<GroupId>)> {
        let training = self.phase.training()?;
        let groups = training.groups.keys().filter(|group| !training.left_out.contains(group)).copied().collect();
        Some((self.position.step + 1, groups, training.left_out.clone()))
    }

    /// The checkpoint to commit, whether it holds the exported model, and the save task;
    /// `None` while ranks still write.
    #[must_use]
    pub fn committing(&self) -> Option<(&Snapshot, bool, u64)> {
        let writing = self.writing.as_ref().filter(|writing| writing.is_written())?;
        Some((&writing.snapshot, writing.model, writing.task))
    }

    /// The step that ranks are capturing or writing a checkpoint of, and the save task.
    #[must_use]
    pub fn saving(&self) -> Option<(u64, u64)> {
        let writing = self.writing.as_ref().filter(|writing| !writing.is_written())?;
        Some((writing.snapshot.step, writing.task))
    }

    /// Step of the newest committed checkpoint; `None` if the job would restart from the model of the job spec.
    #[must_use]
    pub fn newest_checkpoint(&self) -> Option<u64> {
        self.restart_is_checkpoint.then_some(self.restart.step)
    }

    /// Name, host and process id of each member.
    pub fn members(&self) -> impl Iterator<Item = (&str, &str, u32)> {
        self.workers.values().map(|worker| (worker.name.as_str(), worker.process.host.as_str(), worker.process.pid))
    }

    /// Names of the learners by rank; empty while there is no generation.
    #[must_use]
    pub fn learner_names(&self) -> Vec<String> {
        let ranks = self.team.as_ref().map(|team| team.ranks.as_slice()).unwrap_or_default();
        ranks.iter().map(|worker| self.worker_name(*worker)).collect()
    }

    /// The options that the machine was created with, including later changes by operators.
    #[must_use]
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Time of the newest event.
    #[must_use]
    pub fn now(&self) -> Duration {
        self.now
    }

    /// Number of training groups in flight, including those of the batch in training.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.pool.len() + self.phase.training().map_or(0, |training| training.groups.len())
    }

    /// Training groups that were drawn and are neither trained on nor given up yet.
    #[must_use]
    pub fn groups_in_flight(&self) -> BTreeSet<GroupId> {
        let trained = self.phase.training().map(|training| training.groups.keys().copied());
        self.pool.group_ids().chain(trained.into_iter().flatten()).collect()
    }

    /// Whether a group is being sampled, for training or for an evaluation.
    #[must_use]
    pub fn samples_group(&self, group: GroupId) -> bool {
        self.pools().any(|pool| pool.contains(group))
    }

    /// A copy without the state that is not journaled because nobody relies on it: heartbeat times and activities. Two
    /// machines that applied the same records have equal copies.
    #[must_use]
    pub fn recorded(&self) -> Self {
        let mut machine = self.clone();
        (machine.now, machine.ticked, machine.progressed) = Default::default();
        for worker in machine.workers.values_mut() {
            (worker.heard, worker.active_since) = Default::default();
            worker.activity.clear();
        }
        machine
    }

    /// The pool that holds this group: that of the evaluation or that of training.
    pub(crate) fn pool_of(&mut self, group: GroupId) -> Option<&mut Pool> {
        match evaluation_problem(group) {
            Some(_) => self.measured_mut().map(|evaluation| &mut evaluation.pool),
            None => Some(&mut self.pool),
        }
    }

    /// The evaluation in progress, or the unfinished one that the run continues.
    fn measured(&self) -> Option<&Evaluation> {
        self.evaluation().or(self.unfinished.as_ref())
    }

    fn measured_mut(&mut self) -> Option<&mut Evaluation> {
        self.phase.evaluation_mut().or(self.concurrent.as_mut()).or(self.unfinished.as_mut())
    }

    /// All pools of groups in flight: that of an evaluation first, then that of training.
    pub(crate) fn pools(&self) -> impl Iterator<Item = &Pool> {
        let evaluated = self.measured().map(|evaluation| &evaluation.pool);
        evaluated.into_iter().chain([&self.pool])
    }

    pub(crate) fn pools_mut(&mut self) -> impl Iterator<Item = &mut Pool> {
        let evaluated = self.phase.evaluation_mut().or(self.concurrent.as_mut()).or(self.unfinished.as_mut());
        evaluated.map(|evaluation| &mut evaluation.pool).into_iter().chain([&mut self.pool])
    }

    pub(crate) fn is_ended(&self) -> bool {
        matches!(self.phase, Phase::Ended(_))
    }

    /// Whether a stop was requested that has not taken effect yet.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.stop.is_some() && self.ended().is_none()
    }

    /// How the run ended; `None` while it continues.
    #[must_use]
    pub fn ended(&self) -> Option<&End> {
        if let Phase::Ended(end) = &self.phase { Some(end) } else { None }
    }

    /// Whether an operator has paused the run.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// Whether the run has no members.
    #[must_use]
    pub fn is_alone(&self) -> bool {
        self.workers.is_empty()
    }

    /// A learner's rank in the current generation; `None` for workers outside of it.
    #[must_use]
    pub fn rank(&self, worker: WorkerId) -> Option<u32> {
        self.team.as_ref()?.rank(worker)
    }

    /// Progress of the job between steps.
    #[must_use]
    pub fn position(&self) -> &Snapshot {
        &self.position
    }

    pub(crate) fn reply(&mut self, reply: Reply) {
        debug_assert!(self.answer.is_none(), "{:?} was answered before {reply:?}", self.answer);
        self.answer = Some(Ok(reply));
    }

    /// Answers the caller with a refusal. Only refusals that change a counter are journaled.
    pub(crate) fn refuse(&mut self, refusal: Refusal) {
        // These two change a counter.
        self.unchanged = !matches!(refusal, Refusal::StaleLease { .. } | Refusal::WrongVersion { .. });
        debug_assert!(self.answer.is_none(), "{:?} was answered before {refusal:?}", self.answer);
        self.answer = Some(Err(refusal));
    }

    pub(crate) fn count(&mut self, counter: Counter, by: u64) {
        if by > 0 {
            *self.position.counters.entry(counter).or_default() += by;
        }
    }

    pub(crate) fn enter(&mut self, phase: Phase) {
        self.effects.push(Effect::Phase(phase.kind()));
        self.phase = phase;
        self.phase_since = self.now;
    }

    pub(crate) fn next_id(&mut self) -> u64 {
        self.newest_id += 1;
        self.newest_id
    }

    /// The member with this id, or a refusal if it has another role or is unknown.
    pub(crate) fn member(&self, worker: WorkerId, wanted: Role) -> Result<&Worker, Refusal> {
        let Some(member) = self.workers.get(worker) else {
            return Err(match self.names.is_replaced(worker) {
                true => Refusal::Replaced(worker),
                false => Refusal::UnknownWorker(worker),
            });
        };
        if member.role != wanted {
            return Err(Refusal::WrongRole { worker, role: member.role, wanted });
        }
        Ok(member)
    }

    /// Silence after which a member is removed and its name is free.
    #[must_use]
    pub fn heartbeat_timeout(&self) -> Duration {
        self.options.heartbeat_timeout
    }

    /// Number of members of a role.
    #[must_use]
    pub fn member_count(&self, role: Role) -> usize {
        self.workers.count(role)
    }

    /// Role of a member; `None` for an unknown id.
    #[must_use]
    pub fn worker_role(&self, worker: WorkerId) -> Option<Role> {
        self.workers.get(worker).map(|member| member.role)
    }

    /// Version of the newest weights that samples may come from: the number of steps done.
    #[must_use]
    pub fn newest_version(&self) -> WeightVersion {
        self.policy_version()
    }

    /// Name of a member; its id in words if it is not one.
    #[must_use]
    pub fn worker_name(&self, worker: WorkerId) -> String {
        self.workers.get(worker).map_or_else(|| worker.to_string(), |member| member.name.clone())
    }
}
