use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pacs_types::{Generation, Role, WeightVersion, WorkerId};

use crate::phase::{Phase, Team};
use crate::worker::Worker;
use crate::{Effect, End, Event, Options, Refusal, Reply, Snapshot};

/// Everything that a run has decided so far.
///
/// Time is an argument: a duration since any fixed point, never going backwards.
#[derive(Clone, Debug)]
pub struct Machine {
    pub(crate) options: Options,
    pub(crate) now: Duration,
    /// When time was looked at last.
    pub(crate) ticked: Duration,
    pub(crate) effects: Vec<Effect>,

    pub(crate) workers: BTreeMap<WorkerId, Worker>,
    /// Workers whose slot another process took: they are told to leave rather than to register again.
    pub(crate) replaced: BTreeSet<WorkerId>,
    pub(crate) newest_id: u64,
    pub(crate) newest_generation: Generation,

    pub(crate) phase: Phase,
    pub(crate) phase_since: Duration,
    pub(crate) team: Option<Team>,
    /// Version that rank 0 of the current generation published last.
    pub(crate) weights: Option<WeightVersion>,
    /// Why the last generation ended.
    pub(crate) regroup_reason: String,
    pub(crate) lost_generations: u32,
    pub(crate) stop_requested: bool,

    /// Where the job stands, between steps.
    pub(crate) position: Snapshot,
    /// Where a lost generation goes back to: the last committed checkpoint, or the start.
    pub(crate) restart: Snapshot,
    /// `restart` is a checkpoint (and not the model of the job spec).
    pub(crate) restart_is_checkpoint: bool,
    /// The last checkpoint holds the exported model.
    pub(crate) exported: bool,
    /// Step at which a save was tried last.
    pub(crate) save_tried: Option<u64>,
    pub(crate) evaluated: BTreeSet<u64>,
}

impl Machine {
    /// A run that waits for its workers.
    #[must_use]
    pub fn new(options: Options, now: Duration) -> Self {
        let mut machine = Self {
            now,
            ticked: now,
            effects: Vec::new(),
            workers: BTreeMap::new(),
            replaced: BTreeSet::new(),
            newest_id: options.ids_above,
            newest_generation: Generation(options.generations_above),
            phase: Phase::Assembling,
            phase_since: now,
            team: None,
            weights: None,
            regroup_reason: String::new(),
            lost_generations: 0,
            stop_requested: false,
            position: options.start.clone(),
            restart: options.start.clone(),
            restart_is_checkpoint: options.start.step > 0,
            exported: options.exported,
            save_tried: None,
            evaluated: options.evaluated.clone(),
            options,
        };
        machine.advance();
        machine.effects.clear();
        machine
    }

    /// Takes in one event and says what has to be done, in order.
    pub fn step(&mut self, now: Duration, event: Event) -> Vec<Effect> {
        self.now = self.now.max(now);
        match event {
            Event::Register { role, name, host, pid, collective_address } => {
                self.register(role, name, host, pid, collective_address);
            }
            Event::Heartbeat { worker, activity } => self.heartbeat(worker, activity),
            Event::Leave { worker, error } => self.leave(worker, error),
            Event::LeaseGroups { worker, free_samples } => self.lease_groups(worker, free_samples),
            Event::SubmitSample { worker, lease, sample, version } => {
                self.submit_sample(worker, lease, sample, version);
            }
            Event::LeaseSamples { worker, max_samples } => self.lease_samples(worker, max_samples),
            Event::SubmitVerdict { worker, lease, sample, outcome, label } => {
                self.submit_verdict(worker, lease, sample, outcome, label);
            }
            Event::JoinGeneration { worker } => self.join_generation(worker),
            Event::NextTask { worker, generation } => self.next_task(worker, generation),
            Event::CompleteTask { worker, generation, task, result } => {
                self.complete_task(worker, generation, task, result);
            }
            Event::CheckpointCommitted { step } => self.checkpoint_committed(step),
            Event::CheckpointFailed { step, reason } => self.checkpoint_failed(step, &reason),
            Event::StopRequested => self.request_stop(),
            Event::Tick => self.tick(),
        }
        std::mem::take(&mut self.effects)
    }

    pub(crate) fn is_ended(&self) -> bool {
        matches!(self.phase, Phase::Ended(_))
    }

    /// How the run ended, if it did.
    #[must_use]
    pub fn ended(&self) -> Option<&End> {
        match &self.phase {
            Phase::Ended(end) => Some(end),
            _ => None,
        }
    }

    /// Whether no worker is a member.
    #[must_use]
    pub fn is_alone(&self) -> bool {
        self.workers.is_empty()
    }

    /// A learner's rank in the current generation.
    #[must_use]
    pub fn rank(&self, worker: WorkerId) -> Option<u32> {
        self.team.as_ref()?.rank(worker)
    }

    /// Where the job stands, between steps.
    #[must_use]
    pub fn position(&self) -> &Snapshot {
        &self.position
    }

    pub(crate) fn reply(&mut self, reply: Reply) {
        self.effects.push(Effect::Reply(reply));
    }

    pub(crate) fn refuse(&mut self, refusal: Refusal) {
        self.effects.push(Effect::Refuse(refusal));
    }

    pub(crate) fn count(&mut self, name: &str, by: u64) {
        *self.position.counters.entry(name.to_owned()).or_default() += by;
    }

    pub(crate) fn enter(&mut self, phase: Phase) {
        self.effects.push(Effect::Phase(phase.name()));
        self.phase = phase;
        self.phase_since = self.now;
    }

    pub(crate) fn next_id(&mut self) -> u64 {
        self.newest_id += 1;
        self.newest_id
    }

    /// The member with this id, if it has this role.
    pub(crate) fn member(&self, worker: WorkerId, wanted: Role) -> Result<&Worker, Refusal> {
        let member = self.workers.get(&worker).ok_or(Refusal::UnknownWorker(worker))?;
        if member.role != wanted {
            return Err(Refusal::WrongRole { worker, role: member.role, wanted });
        }
        Ok(member)
    }

    pub(crate) fn count_role(&self, role: Role) -> usize {
        self.workers.values().filter(|worker| worker.role == role).count()
    }

    /// What a member does.
    #[must_use]
    pub fn worker_role(&self, worker: WorkerId) -> Option<Role> {
        self.workers.get(&worker).map(|member| member.role)
    }

    /// Name of a worker's slot; of one that is not a member, its number.
    #[must_use]
    pub fn worker_name(&self, worker: WorkerId) -> String {
        self.workers.get(&worker).map_or_else(|| worker.to_string(), |member| member.name.clone())
    }
}
