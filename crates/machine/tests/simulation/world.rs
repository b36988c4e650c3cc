//! One seeded world: clock, network, disk, processes, operators.

use std::collections::BTreeMap;
use std::time::Duration;

use pacs_machine::{
    Answer, Command, Contrast, Directive, Effect, End, EvaluationPlan, EvaluationSetPlan, Event, Machine, Options,
    Reply, Snapshot, Staleness, StopMode, UniformBy, UniformGroups,
};
use pacs_order::{Curriculum, DrawPlan, SetShare};
use pacs_types::{GroupId, Role, SampleId};
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::actor::{Actor, CANNOT_WRITE, Temper};
use crate::promises::members;
use crate::reference::Reference;
use crate::server::{Caller, Output, Server};

/// Tick at which faults end, so that the run can finish.
const FAULTY_TICKS: u32 = 500;
const MOST_TICKS: u32 = 20_000;
/// Longest time for which a name may be refused while no live process holds it.
const MOST_REFUSED: u32 = 250;
const TICK: Duration = Duration::from_millis(200);

enum Message {
    /// From a worker to the coordinator.
    Request(Caller, Event),
    /// From the coordinator to a worker.
    Answer(Caller, Answer),
    /// From the coordinator's disk to the coordinator.
    Disk(Event),
}

pub(crate) struct World {
    rng: ChaCha8Rng,
    /// Random numbers of faults that were added later, so that earlier seeds replay unchanged.
    more: ChaCha8Rng,
    /// Random numbers for processes that share a name, stand still, or are lost together.
    fleet: ChaCha8Rng,
    now: Duration,
    tick: u32,
    server: Server,
    /// Ticks until the coordinator is restarted.
    down_for: u32,
    /// Number of tries of the final checkpoint for which the disk stays full.
    full_for: u32,
    actors: Vec<Actor>,
    temper: Temper,
    /// Messages in transit, with their tick of arrival.
    network: Vec<(u32, Message)>,
    /// The newest checkpoint, and whether it contains the model.
    committed: Option<(Snapshot, bool)>,
    reference: Reference,
    starts: u64,
    drained: Vec<String>,
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        Self::with(seed, |_| {})
    }

    /// A job that only evaluates, with an unnamed and a named set and without learners.
    pub(crate) fn measuring(seed: u64) -> Self {
        Self::with(seed, |options| {
            options.evaluation.problems = options.evaluation.problems.max(2);
            options.evaluation.before = true;
            let plan = EvaluationPlan { problems: 3, samples_per_problem: 3, ..options.evaluation };
            options.evaluation_sets = vec![EvaluationSetPlan { first: 1 << 24, plan }];
            options.evaluation_only = true;
        })
    }

    fn with(seed: u64, change: impl FnOnce(&mut Options)) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut options = options(&mut rng);
        options.curriculum = curriculum(seed);
        change(&mut options);
        let learners = if options.evaluation_only { 0 } else { options.learners };
        let mut actors = Vec::new();
        let counts = [(Role::Rollout, rng.random_range(1..=3)), (Role::Verifier, rng.random_range(1..=3))];
        for (role, count) in counts.into_iter().chain([(Role::Learner, learners)]) {
            for slot in 0..count {
                actors.push(Actor::new(role, slot, actors.len() as u32));
            }
        }
        let deadly = if rng.random_bool(0.15) { vec![GroupId(rng.random_range(0..8))] } else { Vec::new() };
        // A separate stream, so that its draws leave the rest of the seed's run unchanged.
        let mut more = ChaCha8Rng::seed_from_u64(seed);
        more.set_stream(1);
        let mut fleet = ChaCha8Rng::seed_from_u64(seed);
        fleet.set_stream(3);
        for actor in &mut actors {
            actor.supervised = fleet.random_bool(0.8);
        }
        let mut stumbles = ChaCha8Rng::seed_from_u64(seed);
        stumbles.set_stream(4);
        let (group, index) = (GroupId(more.random_range(0..8)), more.random_range(0..options.samples_per_prompt));
        let temper = Temper {
            poison: more.random_bool(0.15).then_some(SampleId { group, index }),
            failing: 0.05,
            breaking: 0.01,
            stumbles_at: stumbles.random_bool(0.2).then(|| stumbles.random_range(1..=options.total_steps)),
            wrong_version: 0.005,
            deadly,
            slow_one_in: rng.random_range(2..12),
            uniform: rng.random_bool(0.3),
        };
        let mut server = Server::new(options, Duration::ZERO);
        server.suspicious = seed.is_multiple_of(16);
        Self {
            server,
            rng,
            more,
            fleet,
            now: Duration::ZERO,
            tick: 0,
            down_for: 0,
            full_for: 0,
            actors,
            temper,
            network: Vec::new(),
            committed: None,
            reference: Reference::default(),
            starts: 0,
            drained: Vec::new(),
        }
    }

    /// Runs the job to its end; returns how often each kind of event happened.
    pub(crate) fn run(mut self) -> BTreeMap<String, u64> {
        while self.reference.ended != Some(End::Finished) {
            assert!(self.tick < MOST_TICKS, "does not finish: {:#?}", self.server.machine.status(self.now));
            self.tick += 1;
            self.now += TICK;
            if self.tick >= FAULTY_TICKS {
                self.calm_down();
            }
            self.deliver();
            self.fleet_acts();
            self.workers_act();
            self.coordinator_acts();
            match &self.reference.ended {
                // A world with this many faults may lose so many groups; the operator starts the run again.
                Some(End::Failed { reason }) if reason.contains("groups of one step were dropped") => {
                    self.reference.count("failed_and_started_again");
                    self.start_again();
                }
                // The disk has no room for the final checkpoint; the operator makes room and
                // resumes from the one before it.
                Some(End::Failed { reason }) if reason.contains(CANNOT_WRITE) => {
                    self.reference.count("full_disks_at_the_end");
                    self.start_again();
                }
                Some(End::Failed { reason }) => panic!("the run failed: {reason}"),
                // The operator repeats the command.
                Some(End::Stopped) => self.start_again(),
                Some(End::Finished) | None => {}
            }
        }
        let options = self.server.machine.options();
        if options.evaluation_only {
            assert_eq!(self.server.machine.position().step, 0);
            assert!(self.reference.evaluated.contains(&0) && self.committed.is_none());
        } else {
            assert_eq!(self.server.machine.position().step, options.total_steps);
            assert!(matches!(self.committed, Some((_, true))), "the model was not exported");
            self.reference.evaluations(options);
            self.reference.batches(options, &self.server.machine.position().counters);
        }
        let mut counts = self.reference.counts;
        let counters = self.server.machine.status(self.now).counters;
        counts.extend(counters.into_iter().map(|(counter, count)| (counter.name().to_owned(), count)));
        counts
    }

    /// Decides whether a fault happens now; there are none after `FAULTY_TICKS`, so that the run can finish.
    fn fault(&mut self, probability: f64) -> bool {
        self.tick < FAULTY_TICKS && self.rng.random_bool(probability)
    }

    fn calm_down(&mut self) {
        (self.temper.failing, self.temper.breaking, self.temper.wrong_version) = (0.0, 0.0, 0.0);
        // The operator ends the pause, also when a crash has restored it.
        if self.down_for == 0 && self.server.machine.is_paused() {
            self.operate(Command::Resume);
        }
    }

    fn deliver(&mut self) {
        let tick = self.tick;
        let (mut due, later): (Vec<_>, Vec<_>) = self.network.drain(..).partition(|(at, _)| *at <= tick);
        self.network = later;
        due.shuffle(&mut self.rng);
        for (_, message) in due {
            match message {
                Message::Request(caller, event) if self.down_for == 0 => {
                    self.server.step(self.now, event, Some(caller));
                }
                Message::Disk(event) if self.down_for == 0 => self.server.step(self.now, event, None),
                Message::Answer(caller, answer) => self.answered(caller, answer),
                Message::Request(..) | Message::Disk(_) => {}
            }
            if self.fault(0.0005) {
                self.crash();
            }
        }
    }

    fn answered(&mut self, caller: Caller, answer: Answer) {
        let actor = &mut self.actors[caller.actor];
        if actor.process != caller.process || !actor.exists() {
            return;
        }
        if actor.frozen_for > 0 {
            // The answer stays in the socket until the process continues.
            let again = self.tick + actor.frozen_for + 1;
            return self.network.push((again, Message::Answer(caller, answer)));
        }
        // A process that has left for another one of its name is not restarted.
        let retires = answer == Ok(Reply::Directive(Directive::Replaced));
        if retires && actor.was_frozen {
            self.reference.count("half_dead_told_to_leave");
        }
        if actor.ending.is_some() && answer == Ok(Reply::Directive(Directive::LeaveForNow)) {
            self.reference.count("left_before_their_grace_was_over");
        }
        if actor.hear(self.tick, caller.request, answer, &mut self.rng) {
            actor.retired = retires;
            self.end(caller.actor);
        }
    }

    /// Faults that supervisors do not see: processes that stand still, share a name, or are lost with their host.
    fn fleet_acts(&mut self) {
        for index in 0..self.actors.len() {
            if let Some(since) = self.actors[index].refused_since {
                let name = self.actors[index].name.clone();
                let is_held =
                    |(other, holder): (usize, &Actor)| other != index && holder.name == name && holder.exists();
                if self.actors.iter().enumerate().any(is_held) {
                    self.actors[index].alone_for = 0;
                    if self.tick > since + MOST_REFUSED {
                        self.reference.count("two_with_one_name");
                        self.actors[index].die(0);
                        self.actors[index].retired = true;
                    }
                } else {
                    self.actors[index].alone_for += 1;
                    assert!(self.actors[index].alone_for < MOST_REFUSED, "{name} is kept from its only process");
                }
            }
            if self.tick >= FAULTY_TICKS || !self.actors[index].exists() {
                continue;
            }
            let frozen = self.fleet.random_bool(0.0006);
            if frozen {
                self.reference.count("frozen_processes");
                self.actors[index].frozen_for = self.fleet.random_range(5..80);
                self.actors[index].was_frozen = true;
            }
            if self.actors.len() < 20 && self.fleet.random_bool(if frozen { 0.5 } else { 0.0004 }) {
                self.reference.count("twins");
                let starts_in = self.fleet.random_range(1..50);
                self.actors.push(self.actors[index].twin(self.actors.len() as u32, starts_in));
            }
        }
        // Somebody eventually refills a slot that has no process left.
        for index in 0..self.actors.len() {
            let name = self.actors[index].name.clone();
            let lives = |actor: &Actor| actor.name == name && !actor.retired;
            if !self.actors.iter().any(lives) {
                self.actors[index].die(5);
                self.actors[index].retired = false;
            }
        }
        if self.tick < FAULTY_TICKS && self.fleet.random_bool(0.002) {
            self.reference.count("mass_preemptions");
            let role = if self.fleet.random() { Role::Rollout } else { Role::Verifier };
            for actor in self.actors.iter_mut().filter(|actor| actor.role == role && actor.exists()) {
                actor.die(self.fleet.random_range(1..40));
            }
        }
    }

    /// Ends a process in order; another one is started.
    fn end(&mut self, index: usize) {
        let worker = self.actors[index].id();
        let dead_for = self.rng.random_range(5..40);
        self.actors[index].die(dead_for);
        if let Some(worker) = worker {
            self.goodbye(worker, None);
        }
    }

    fn goodbye(&mut self, worker: pacs_types::WorkerId, error: Option<String>) {
        let caller = Caller { actor: 0, process: u64::MAX, request: 0 };
        self.network.push((self.tick + 1, Message::Request(caller, Event::Leave { worker, error })));
    }

    fn workers_act(&mut self) {
        let mut order: Vec<usize> = (0..self.actors.len()).collect();
        order.shuffle(&mut self.rng);
        for index in order {
            if self.actors[index].dead_for > 0 {
                self.actors[index].dead_for -= 1;
                continue;
            }
            if self.actors[index].retired {
                continue;
            }
            if self.actors[index].frozen_for > 0 {
                self.actors[index].frozen_for -= 1;
                continue;
            }
            let doomed = self.actors[index].is_doomed(&self.temper) && self.rng.random_bool(0.3);
            if doomed || self.fault(0.006) {
                self.kill(index);
                continue;
            }
            if self.tick < FAULTY_TICKS && self.more.random_bool(0.0005) {
                self.reference.count("stuck_workers");
                self.actors[index].stuck = true;
            }
            match &mut self.actors[index].ending {
                Some(0) => {
                    self.reference.count("graces_that_were_over");
                    self.end(index);
                    continue;
                }
                Some(left) => *left -= 1,
                None if self.tick < FAULTY_TICKS && self.more.random_bool(0.001) => {
                    self.reference.count("ending_workers");
                    self.actors[index].ending = Some(self.more.random_range(5..80));
                }
                None => {}
            }
            let sent = self.actors[index].act(self.tick, &mut self.rng, &self.temper);
            for (request, event) in sent {
                let caller = Caller { actor: index, process: self.actors[index].process, request };
                self.send(Message::Request(caller, event.clone()));
                if self.fault(0.05) {
                    self.reference.count("repeated_requests");
                    let late = self.tick + self.rng.random_range(1..=60);
                    self.network.push((late, Message::Request(caller, event)));
                }
            }
        }
    }

    /// Puts a message on the network, which may lose it.
    fn send(&mut self, message: Message) {
        if self.fault(0.03) {
            return self.reference.count("lost_messages");
        }
        let slow = self.fault(0.02);
        let arrives = self.tick + if slow { self.rng.random_range(5..=30) } else { self.rng.random_range(1..=3) };
        self.network.push((arrives, message));
    }

    fn kill(&mut self, index: usize) {
        let worker = self.actors[index].id();
        if let Some(worker) = worker
            && self.rng.random_bool(0.3)
        {
            // Learners die silently, because repeated errors in preparation would end the run, as they should.
            let is_learner = self.actors[index].role == Role::Learner;
            let error = (self.rng.random_bool(0.5) && !is_learner).then(|| "crash".to_owned());
            self.goodbye(worker, error);
        }
        let dead_for = self.rng.random_range(1..40);
        self.actors[index].die(dead_for);
    }

    fn coordinator_acts(&mut self) {
        if self.down_for > 0 {
            self.down_for -= 1;
            if self.down_for == 0 {
                self.come_back();
            }
            return;
        }
        self.server.tick(self.now);
        if self.fault(0.004) {
            return self.crash();
        }
        if self.fault(0.01) {
            self.operator_acts();
        }
        // A slow disk delays the answers by a tick.
        if !self.fault(0.3) {
            self.sync();
            if self.rng.random_bool(0.02) {
                self.server.compact();
            }
        }
        if self.fault(0.0004) {
            self.lose_journal();
        }
    }

    fn sync(&mut self) {
        let options = self.server.machine.options().clone();
        for output in self.server.sync() {
            match output {
                Output::Answer { caller, event, answer } => {
                    self.reference.answer(&event, &answer, &options);
                    if let (Some(caller), Ok(Reply::Registered(id))) = (caller, &answer) {
                        self.reference.registered(*id, (caller.actor, caller.process));
                    }
                    if let Some(caller) = caller.filter(|caller| caller.process != u64::MAX) {
                        self.send(Message::Answer(caller, answer));
                    }
                }
                Output::Effect(effect) => {
                    self.reference.effect(&effect, &options, self.committed.as_ref());
                    if let Effect::WorkerLost { worker, why, .. } = &effect {
                        let actors = &self.actors;
                        let exists = |(actor, process): (usize, u64)| {
                            let actor: &Actor = &actors[actor];
                            actor.process == process && actor.exists()
                        };
                        self.reference.lost(*worker, why, exists);
                    }
                    self.carry_out(effect);
                }
            }
        }
        self.reference.conservation(&self.server.machine);
        if self.tick.is_multiple_of(8) {
            members(&self.server.machine);
        }
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::CommitCheckpoint { snapshot, model, .. } => self.commit(snapshot, model),
            Effect::Drained { name } => self.drained.push(name),
            _ => {}
        }
    }

    fn commit(&mut self, snapshot: Snapshot, model: bool) {
        let step = snapshot.step;
        let arrives = self.tick + self.rng.random_range(1..=5);
        let is_full = match model {
            true => {
                if self.full_for == 0 && self.tick < FAULTY_TICKS && self.more.random_bool(0.1) {
                    self.full_for = self.more.random_range(1..=8);
                }
                self.full_for > 0
            }
            false => self.fault(0.1),
        };
        // A commit that an earlier process made durable without reporting it is found again.
        let is_there = self.committed.as_ref().is_some_and(|(there, whole)| there.step == step && *whole == model);
        if model {
            self.full_for = self.full_for.saturating_sub(1);
        }
        if is_full && !is_there {
            let reason = CANNOT_WRITE.to_owned();
            return self.network.push((arrives, Message::Disk(Event::CheckpointFailed { step, reason })));
        }
        // The checkpoint is durable from here on, even if the machine dies before it hears of it.
        self.committed = Some((snapshot, model));
        self.network.push((arrives, Message::Disk(Event::CheckpointCommitted { step })));
    }

    /// The coordinator dies and loses what was not synced.
    fn crash(&mut self) {
        self.reference.count("coordinator_crashes");
        if self.reference.made > self.committed.as_ref().map_or(0, |(snapshot, _)| snapshot.step) {
            self.reference.count("coordinator_crashes_between_checkpoints");
        }
        if self.server.crash(self.now) {
            self.reference.count("coordinator_crashes_with_unsynced_records");
        }
        self.network.retain(|(_, message)| !matches!(message, Message::Disk(_)));
        // Shorter than the workers' heartbeat timeout, or much longer.
        self.down_for = if self.rng.random_bool(0.7) { self.rng.random_range(1..10) } else { 60 };
    }

    /// What a new coordinator process does with the state that it finds.
    fn come_back(&mut self) {
        self.server.machine.resume(self.now);
        self.server.step(self.now, Event::Resumed, None);
        if self.server.machine.ended().is_some_and(|end| *end != End::Finished) {
            self.server.step(self.now, Event::Reopened, None);
        }
        if let Some((snapshot, model, _)) = self.server.machine.committing() {
            let (snapshot, model) = (snapshot.clone(), model);
            self.commit(snapshot, model);
        }
        // A damaged disk: the content of a sample cannot be read.
        if self.fault(0.2) {
            let present: Vec<_> = self.server.machine.present().collect();
            if let Some(gone) = present.choose(&mut self.rng) {
                self.server.step(self.now, Event::SampleGone { sample: gone.sample }, None);
            }
        }
    }

    /// Loses the run folder except for its checkpoints: a new machine resumes from the newest one.
    fn lose_journal(&mut self) {
        self.reference.count("journals_lost");
        self.starts += 1;
        let (start, exported) = self.committed.clone().unwrap_or_default();
        self.reference.start_over(&start);
        let options = Options {
            evaluated: self.reference.evaluated.clone(),
            start,
            exported,
            ids_above: self.starts * 1_000_000,
            generations_above: self.starts * 1000,
            ..self.server.machine.options().clone()
        };
        self.network.retain(|(_, message)| !matches!(message, Message::Disk(_)));
        self.server.replace(Machine::new(options, self.now));
        self.reference.ended = self.server.machine.ended().cloned();
    }

    fn operator_acts(&mut self) {
        let options = self.server.machine.options().clone();
        let command = match self.rng.random_range(0..8) {
            0 if !self.server.machine.is_paused() => Command::Pause,
            0..3 if self.server.machine.is_paused() => Command::Resume,
            3 => Command::Checkpoint,
            4 => {
                let workers: Vec<_> = self.actors.iter().filter(|actor| actor.role != Role::Learner).collect();
                let mut worker = workers.choose(&mut self.rng).expect("there are workers").name.clone();
                self.reference.count("drains");
                let learners: Vec<_> = self.actors.iter().filter(|actor| actor.role == Role::Learner).collect();
                if let Some(learner) = learners.choose(&mut self.more).filter(|_| self.more.random_bool(0.3)) {
                    worker = learner.name.clone();
                }
                Command::Drain { worker }
            }
            5 => {
                let (per_step, lag) = (options.prompts_per_step, options.max_lag);
                Command::SetSlots(self.rng.random_range(per_step..=per_step * (lag + 1)))
            }
            6 => {
                self.reference.count("stops");
                let modes = [StopMode::Save, StopMode::AfterStep, StopMode::Now];
                Command::Stop(*modes.choose(&mut self.rng).expect("three"))
            }
            _ => Command::SetLearningRate(1e-5),
        };
        self.operate(command);
    }

    fn operate(&mut self, command: Command) {
        let event = Event::Operator { who: "operator".into(), at: u64::from(self.tick), command };
        self.server.step(self.now, event, None);
    }

    /// Repeats the operator's command, which also restarts stuck processes.
    fn start_again(&mut self) {
        self.reference.ended = None;
        self.full_for = 0;
        for actor in self.actors.iter_mut().filter(|actor| actor.stuck) {
            actor.die(5);
        }
        if self.down_for == 0 {
            self.server.step(self.now, Event::Reopened, None);
        }
    }
}

fn options(rng: &mut ChaCha8Rng) -> Options {
    let (samples_per_prompt, prompts_per_step) = (rng.random_range(1..=4), rng.random_range(1..=6));
    let max_lag = if rng.random_bool(0.4) { 0 } else { rng.random_range(1..=3) };
    let staleness = [Staleness::Wait, Staleness::Wait, Staleness::Evict, Staleness::Accept];
    let uniform = [UniformGroups::Keep, UniformGroups::Drop, UniformGroups::Refill];
    let learners = rng.random_range(1..=3);
    Options {
        learners,
        min_learners: rng.random_range(1..=learners),
        learner_wait: Duration::from_secs(rng.random_range(1..10)),
        samples_per_prompt,
        prompts_per_step,
        total_steps: rng.random_range(1..=8),
        max_lag,
        slots: rng.random_range(prompts_per_step..=prompts_per_step * (max_lag + 1)),
        staleness: *staleness.choose(rng).expect("not empty"),
        uniform_groups: *uniform.choose(rng).expect("not empty"),
        // Derived from a value that is drawn already, so that earlier seeds replay unchanged.
        uniform_by: if samples_per_prompt == 3 { UniformBy::Rewards } else { UniformBy::Labels },
        max_refills: rng.random_range(0..=6),
        min_batch_groups: rng.random_range(1..=prompts_per_step),
        contrast: Contrast::None,
        curriculum: None,
        evaluation: EvaluationPlan {
            problems: rng.random_range(0..=5),
            samples_per_problem: rng.random_range(1..=2),
            every_steps: rng.random_range(0..=3),
            before: rng.random(),
            after: rng.random(),
        },
        evaluation_sets: Vec::new(),
        evaluation_only: false,
        checkpoint_every_steps: rng.random_range(0..=3),
        background_saves: rng.random_bool(0.7),
        checkpoint_timeout: Duration::from_secs(30),
        max_attempts: rng.random_range(1..=3),
        max_replacements: rng.random_range(0..=2),
        group_timeout: Duration::from_secs(rng.random_range(30..90)),
        max_group_attempts: rng.random_range(1..=3),
        max_worker_losses: rng.random_range(1..=4),
        max_skipped_updates: 1000,
        task_timeout: Duration::from_secs(30),
        // Shorter than the group timeout, so that the holder of a group is restarted before the group is given up.
        stall_timeout: Duration::from_secs(14),
        max_stalls: 1000,
        max_lost_generations: 1000,
        max_lost_saves: 1000,
        heartbeat_timeout: Duration::from_secs(4),
        rollout_lease_timeout: Duration::from_secs(20),
        verifier_lease_timeout: Duration::from_secs(10),
        ids_above: 0,
        generations_above: 0,
        start: Snapshot::default(),
        exported: false,
        evaluated: Default::default(),
    }
}

/// The curriculum, in a quarter of the seeds. Seeds that found bugs before it existed have none.
fn curriculum(seed: u64) -> Option<Curriculum> {
    if !matches!(seed % 8, 2 | 4) {
        return None;
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(2);
    // Few problems, so that a run has many epochs.
    let set = |rng: &mut ChaCha8Rng| SetShare { weight: rng.random_range(0.2..3.0), problems: rng.random_range(1..=6) };
    let sets = (0..rng.random_range(1..=3)).map(|_| set(&mut rng)).collect();
    let plan = DrawPlan { seed, shuffle: rng.random(), sets };
    let retire_after = rng.random_bool(0.7).then(|| rng.random_range(1..=2));
    let difficulty_floor = (retire_after.is_none() || rng.random()).then(|| rng.random_range(0.01..0.9));
    let least_left = rng.random_range(0..4);
    Some(Curriculum { plan, retire_after, difficulty_floor, least_left })
}
