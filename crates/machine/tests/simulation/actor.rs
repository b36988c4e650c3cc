//! Simulated worker processes: they send requests, retry those without an answer, and die.

use std::collections::BTreeMap;

use pacs_machine::{
    Answer, Directive, Event, FailureKind, GroupGrant, Membership, Refusal, Reply, SampleGrant, TaskKind, TaskOrder,
    TaskResult,
};
use pacs_types::{GroupId, Outcome, Role, SampleId, WeightVersion, WorkerId};
use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// Ticks after which an unanswered request is sent again.
const PATIENCE: u32 = 12;
/// Error that a process with a full disk reports.
pub(crate) const CANNOT_WRITE: &str = "no space left on device";

/// A slot and the process that occupies it.
#[derive(Debug)]
pub(crate) struct Actor {
    pub(crate) role: Role,
    pub(crate) name: String,
    /// Ticks until a dead process is restarted.
    pub(crate) dead_for: u32,
    /// Number of starts so far.
    pub(crate) process: u64,
    /// Whether it only sends heartbeats and does no work.
    pub(crate) stuck: bool,
    /// Ticks of grace that remain after it was asked to end; `None` if it was not asked.
    pub(crate) ending: Option<u32>,
    /// Whether a supervisor restarts it, which sees the end of each process before it starts the next.
    pub(crate) supervised: bool,
    /// Whether it is not restarted: it was told to leave for another process of its name, or
    /// found out that there is one.
    pub(crate) retired: bool,
    /// Ticks for which the process stands still.
    pub(crate) frozen_for: u32,
    pub(crate) was_frozen: bool,
    /// Tick since which its registration has been refused, because another process holds its name.
    pub(crate) refused_since: Option<u32>,
    /// Consecutive ticks since then during which no such process existed.
    pub(crate) alone_for: u32,
    /// Number of the actor, from which its process ids are derived.
    number: u32,
    id: Option<WorkerId>,
    /// Unanswered requests by number, with the tick at which each was last sent.
    open: BTreeMap<u64, (Event, u32)>,
    requests: u64,
    groups: Vec<GroupGrant>,
    samples: Vec<SampleGrant>,
    /// Newest weight version that it knows.
    weights: u64,
    /// The version that was announced last, which a rewound job lowers.
    announced: u64,
    membership: Option<Membership>,
    /// Learners: weight version of the state in memory.
    state: Option<u64>,
    /// Learners: the current task and the ticks that it still takes.
    task: Option<(TaskOrder, u32)>,
    /// Learners: the background save and the ticks that it still takes.
    writing: Option<(TaskOrder, u32)>,
    /// Learners: how often it has failed at [`Temper::stumbles_at`].
    stumbled: u32,
}

/// Fault rates and poison pills of a world.
#[derive(Debug)]
pub(crate) struct Temper {
    /// Probability that a verification fails.
    pub(crate) failing: f64,
    /// Probability that a learner's task fails.
    pub(crate) breaking: f64,
    /// A step at which each learner fails twice, so that a search for the group at fault begins although there is none.
    pub(crate) stumbles_at: Option<u64>,
    /// Probability that a sample names a version that its lease does not allow.
    pub(crate) wrong_version: f64,
    /// Groups that kill their rollout workers.
    pub(crate) deadly: Vec<GroupId>,
    /// A sample position whose answers kill their verifiers.
    pub(crate) poison: Option<SampleId>,
    /// One group in this many is slow to generate.
    pub(crate) slow_one_in: u64,
    /// Whether all answers of a group are right or wrong alike.
    pub(crate) uniform: bool,
}

impl Actor {
    pub(crate) fn new(role: Role, slot: u32, number: u32) -> Self {
        Self {
            role,
            name: format!("{role}-{slot}"),
            supervised: true,
            retired: false,
            frozen_for: 0,
            was_frozen: false,
            refused_since: None,
            alone_for: 0,
            number,
            dead_for: 0,
            process: 0,
            stuck: false,
            ending: None,
            id: None,
            open: BTreeMap::new(),
            requests: 0,
            groups: Vec::new(),
            samples: Vec::new(),
            weights: 0,
            announced: 0,
            membership: None,
            state: None,
            task: None,
            writing: None,
            stumbled: 0,
        }
    }

    /// Another process with the same name, which no supervisor vouches for.
    pub(crate) fn twin(&self, number: u32, starts_in: u32) -> Self {
        let twin = Self::new(self.role, 0, number);
        Self { name: self.name.clone(), supervised: false, dead_for: starts_in, ..twin }
    }

    pub(crate) fn id(&self) -> Option<WorkerId> {
        self.id
    }

    /// Whether the process is running, in any state.
    pub(crate) fn exists(&self) -> bool {
        self.dead_for == 0 && !self.retired
    }

    /// Ends the process; the next one starts after `dead_for` ticks.
    pub(crate) fn die(&mut self, dead_for: u32) {
        self.process += 1;
        self.dead_for = dead_for;
        self.stuck = false;
        self.ending = None;
        (self.frozen_for, self.was_frozen) = (0, false);
        (self.refused_since, self.alone_for) = (None, 0);
        self.forget();
    }

    fn forget(&mut self) {
        self.id = None;
        self.open.clear();
        self.groups.clear();
        self.samples.clear();
        self.membership = None;
        self.state = None;
        self.task = None;
        self.writing = None;
    }

    /// Whether it holds a group or a sample that kills it.
    pub(crate) fn is_doomed(&self, temper: &Temper) -> bool {
        self.groups.iter().any(|grant| temper.deadly.contains(&grant.group))
            || self.samples.iter().any(|grant| temper.poison == Some(grant.sample))
    }

    /// Works for one tick; returns the messages that it sends, with their request numbers.
    pub(crate) fn act(&mut self, tick: u32, rng: &mut ChaCha8Rng, temper: &Temper) -> Vec<(u64, Event)> {
        let mut sent = self.send_again(tick);
        let Some(worker) = self.id else {
            if self.open.is_empty() {
                let (role, name) = (self.role, self.name.clone());
                let collective_address = format!("{name}:1");
                let started = if self.supervised { 1 + self.process } else { 0 };
                let pid = 10_000 * self.number + self.process as u32;
                let event = Event::Register { role, name, host: "host".into(), pid, started, collective_address };
                sent.push(self.ask(tick, event));
            }
            return sent;
        };
        if !self.has_open(|event| matches!(event, Event::Heartbeat { .. } | Event::Ending { .. })) {
            if self.ending.is_some() {
                sent.push(self.ask(tick, Event::Ending { worker }));
            }
            sent.push(self.ask(tick, Event::Heartbeat { worker, activity: "works".into() }));
        }
        if self.stuck || rng.random_bool(0.3) {
            return sent;
        }
        match self.role {
            Role::Rollout => self.generate(worker, tick, rng, temper, &mut sent),
            Role::Verifier => self.verify(worker, tick, rng, temper, &mut sent),
            Role::Learner => self.learn(worker, tick, rng, temper, &mut sent),
        }
        sent
    }

    fn send_again(&mut self, tick: u32) -> Vec<(u64, Event)> {
        let late = self.open.iter_mut().filter(|(_, (_, at))| *at + PATIENCE <= tick);
        late.map(|(number, (event, at))| {
            *at = tick;
            (*number, event.clone())
        })
        .collect()
    }

    fn ask(&mut self, tick: u32, event: Event) -> (u64, Event) {
        self.requests += 1;
        self.open.insert(self.requests, (event.clone(), tick));
        (self.requests, event)
    }

    fn has_open(&self, is: impl Fn(&Event) -> bool) -> bool {
        self.open.values().any(|(event, _)| is(event))
    }

    fn generate(
        &mut self,
        worker: WorkerId,
        tick: u32,
        rng: &mut ChaCha8Rng,
        temper: &Temper,
        sent: &mut Vec<(u64, Event)>,
    ) {
        let free_samples = rng.random_range(0..10);
        if free_samples > 0 && !self.has_open(|event| matches!(event, Event::LeaseGroups { .. })) {
            sent.push(self.ask(tick, Event::LeaseGroups { worker, free_samples, request: self.requests + 1 }));
        }
        for _ in 0..rng.random_range(0..4) {
            if self.groups.is_empty() {
                return;
            }
            let pick = rng.random_range(0..self.groups.len());
            let slow = self.groups[pick].group.0.is_multiple_of(temper.slow_one_in) && rng.random_bool(0.8);
            if slow {
                continue;
            }
            let Some(sample) = self.groups[pick].samples.pop() else {
                self.groups.swap_remove(pick);
                continue;
            };
            let grant = &self.groups[pick];
            let sample = SampleId { group: grant.group, index: sample.index };
            // New weights arrive while it samples: some samples start with those of the lease, some with newer ones.
            let newest = self.weights.max(grant.policy_step);
            let mut version = WeightVersion(rng.random_range(grant.policy_step..=newest));
            // Nothing here knows that an evaluation wants one version: the coordinator must not announce the next one.
            if pacs_machine::evaluation_problem(grant.group).is_some() {
                version = WeightVersion(self.announced.max(grant.policy_step));
            }
            if rng.random_bool(temper.wrong_version) {
                version = WeightVersion(version.0 + 50);
            }
            let lease = grant.lease;
            sent.push(self.ask(tick, Event::SubmitSample { worker, lease, sample, version }));
        }
    }

    fn verify(
        &mut self,
        worker: WorkerId,
        tick: u32,
        rng: &mut ChaCha8Rng,
        temper: &Temper,
        sent: &mut Vec<(u64, Event)>,
    ) {
        let max_samples = rng.random_range(0..6);
        if max_samples > 0 && !self.has_open(|event| matches!(event, Event::LeaseSamples { .. })) {
            sent.push(self.ask(tick, Event::LeaseSamples { worker, max_samples, request: self.requests + 1 }));
        }
        for _ in 0..rng.random_range(0..4) {
            let Some(SampleGrant { lease, sample }) = self.samples.pop() else { return };
            let right = if temper.uniform { sample.group.0.is_multiple_of(2) } else { rng.random_bool(0.5) };
            let outcome = match rng.random_bool(temper.failing) {
                true => Outcome::Failed,
                false if right => Outcome::Correct,
                false => Outcome::Wrong,
            };
            let label = f64::from(u8::from(outcome == Outcome::Correct));
            // A graded reward that differs from the label, also between answers with the same label.
            let reward = Some(label + f64::from(sample.index % 2) / 4.0);
            sent.push(self.ask(tick, Event::SubmitVerdict { worker, lease, sample, outcome, label, reward }));
        }
    }

    fn learn(
        &mut self,
        worker: WorkerId,
        tick: u32,
        rng: &mut ChaCha8Rng,
        temper: &Temper,
        sent: &mut Vec<(u64, Event)>,
    ) {
        self.write(worker, tick, rng, temper, sent);
        // Apart from the background save, a learner does one thing at a time.
        let is_beside = |result: &TaskResult| match result {
            TaskResult::Saved => true,
            TaskResult::Failed { kind, .. } => *kind == FailureKind::Write,
            _ => false,
        };
        if self.has_open(|event| match event {
            Event::Heartbeat { .. } | Event::Ending { .. } => false,
            Event::CompleteTask { result, .. } => !is_beside(result),
            _ => true,
        }) {
            return;
        }
        let Some(generation) = self.membership.as_ref().map(|membership| membership.generation) else {
            sent.push(self.ask(tick, Event::JoinGeneration { worker }));
            return;
        };
        match self.task.take() {
            None => sent.push(self.ask(tick, Event::NextTask { worker, generation })),
            Some((order, left)) if left > 0 => self.task = Some((order, left - 1)),
            Some((order, _)) => {
                let failure = rng.random_bool(temper.breaking).then(|| match order.kind {
                    TaskKind::Save { .. } if rng.random_bool(0.5) => FailureKind::Write,
                    _ => FailureKind::Generation,
                });
                let stumbles = self.stumbled < 2
                    && matches!(order.kind, TaskKind::Train { step } if Some(step) == temper.stumbles_at);
                self.stumbled += u32::from(stumbles);
                let failure = failure.or(stumbles.then_some(FailureKind::Generation));
                let result = self.finish(&order.kind, failure);
                let task = order.task;
                if result == TaskResult::Captured {
                    self.writing = Some((order, rng.random_range(0..30)));
                }
                sent.push(self.ask(tick, Event::CompleteTask { worker, generation, task, result }));
            }
        }
    }

    /// Continues to write a captured state, sometimes for longer than the machine waits.
    fn write(
        &mut self,
        worker: WorkerId,
        tick: u32,
        rng: &mut ChaCha8Rng,
        temper: &Temper,
        sent: &mut Vec<(u64, Event)>,
    ) {
        let (Some(membership), Some((order, left))) = (&self.membership, &mut self.writing) else { return };
        if rng.random_bool(temper.breaking / 4.0) {
            *left = 400;
        }
        if *left > 0 {
            *left -= 1;
            return;
        }
        let (generation, task) = (membership.generation, order.task);
        let result = match rng.random_bool(2.0 * temper.breaking) {
            true => TaskResult::Failed { message: CANNOT_WRITE.into(), kind: FailureKind::Write },
            false => TaskResult::Saved,
        };
        self.writing = None;
        sent.push(self.ask(tick, Event::CompleteTask { worker, generation, task, result }));
    }

    fn finish(&mut self, kind: &TaskKind, failure: Option<FailureKind>) -> TaskResult {
        if let Some(kind) = failure {
            let message = if kind == FailureKind::Write { CANNOT_WRITE } else { "peer lost" };
            return TaskResult::Failed { message: message.into(), kind };
        }
        let rank = self.membership.as_ref().expect("a task belongs to a generation").rank;
        let weights = |version| (rank == 0).then_some(WeightVersion(version));
        match kind {
            TaskKind::Prepare => {
                let step = self.membership.as_ref().expect("a task belongs to a generation").step;
                self.state = Some(step);
                TaskResult::Prepared { weights: weights(step) }
            }
            TaskKind::Train { step } => {
                assert_eq!(self.state, Some(step - 1), "{} is to make step {step} on top of another one", self.name);
                self.state = Some(*step);
                TaskResult::Trained { weights: weights(*step), skipped_updates: 0 }
            }
            TaskKind::Save { step, background, .. } => {
                assert_eq!(self.state, Some(*step), "{} is to save another step", self.name);
                // A rank without a share of the state has nothing to write and reports `Saved` at once.
                if *background && rank < 2 { TaskResult::Captured } else { TaskResult::Saved }
            }
            TaskKind::Regroup { .. } => unreachable!("it is not worked on"),
        }
    }

    /// Handles an answer. Returns whether the process was told to end.
    pub(crate) fn hear(&mut self, tick: u32, request: u64, answer: Answer, rng: &mut ChaCha8Rng) -> bool {
        let Some((event, _)) = self.open.remove(&request) else { return false };
        match answer {
            Ok(Reply::Registered(id)) => (self.id, self.refused_since, self.alone_for) = (Some(id), None, 0),
            // It registers again later.
            Err(Refusal::NameTaken { .. }) => drop(self.refused_since.get_or_insert(tick)),
            // Its next heartbeat tells it to leave.
            Err(Refusal::Replaced(_)) => {}
            Ok(Reply::Directive(Directive::Continue)) | Ok(Reply::Accepted { .. } | Reply::Done) => {}
            Ok(Reply::Directive(Directive::Register)) | Err(Refusal::UnknownWorker(_)) => self.forget(),
            Ok(Reply::Directive(
                Directive::Leave | Directive::LeaveForNow | Directive::Restart | Directive::Replaced,
            )) => return true,
            Ok(Reply::Groups(groups)) => {
                let newest = groups.iter().map(|grant| grant.policy_step).max();
                self.weights = newest.map_or(self.weights, |newest| newest.max(self.weights));
                self.announced = newest.unwrap_or(self.announced);
                self.groups.extend(groups);
            }
            Ok(Reply::Samples(samples)) => self.samples.extend(samples),
            Ok(Reply::Joined(membership)) => self.membership = membership,
            Ok(Reply::Task(None)) => {}
            Ok(Reply::Task(Some(order))) => match order.kind {
                TaskKind::Regroup { .. } => self.leave_generation(),
                _ => self.task = Some((order, rng.random_range(0..6))),
            },
            Err(Refusal::StaleLease { .. } | Refusal::WrongVersion { .. }) => {
                // The rest of the group is not wanted, either.
                if let Event::SubmitSample { lease, .. } = event {
                    self.groups.retain(|grant| grant.lease != lease);
                }
            }
            // A late answer about an earlier generation does not concern the current one.
            Err(Refusal::StaleGeneration { asked, .. }) => {
                if self.membership.as_ref().is_some_and(|membership| membership.generation == asked) {
                    self.leave_generation();
                }
            }
            Err(other) => panic!("{event:?} was refused: {other}"),
        }
        false
    }

    fn leave_generation(&mut self) {
        self.membership = None;
        self.state = None;
        self.task = None;
        self.writing = None;
    }
}
