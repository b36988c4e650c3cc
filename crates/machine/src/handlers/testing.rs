//! A machine with one worker of each role, for the tests of the event handlers.

use std::time::Duration;

use pacs_types::{Generation, GroupId, Outcome, Role, SampleId, WeightVersion, WorkerId};

use crate::{
    Answer, Command, Directive, Effect, Event, GroupGrant, Machine, Options, Record, Refusal, Reply, SampleGrant, Step,
    StopMode, TaskKind, TaskOrder, TaskResult,
};

pub(crate) struct Run {
    pub(crate) machine: Machine,
    pub(crate) now: Duration,
    pub(crate) rollout: WorkerId,
    pub(crate) verifier: WorkerId,
    pub(crate) learners: Vec<WorkerId>,
    /// Records that were journaled.
    pub(crate) records: Vec<Record>,
    /// Number of processes started so far.
    processes: u32,
}

pub(crate) fn options() -> Options {
    Options::small()
}

pub(crate) fn registration(role: Role, name: &str, host: &str, pid: u32, started: u64) -> Event {
    let collective_address = format!("{name}:1");
    Event::Register { role, name: name.to_owned(), host: host.to_owned(), pid, started, collective_address }
}

pub(crate) fn operator(command: Command) -> Event {
    Event::Operator { who: "test".to_owned(), at: 0, command }
}

pub(crate) fn stop(mode: StopMode) -> Event {
    operator(Command::Stop(mode))
}

/// The step that begins with these effects, and its groups.
pub(crate) fn trained(effects: &[Effect]) -> Option<(u64, Vec<GroupId>)> {
    effects.iter().find_map(|effect| match effect {
        Effect::Train { step, groups, .. } => Some((*step, groups.clone())),
        _ => None,
    })
}

impl Run {
    /// The directive that answers a worker's heartbeat.
    pub(crate) fn told(&mut self, worker: WorkerId) -> Directive {
        match self.call(Event::Heartbeat { worker, activity: String::new() }) {
            Ok(Reply::Directive(directive)) => directive,
            other => panic!("{other:?}"),
        }
    }

    /// A run without members.
    pub(crate) fn new(options: Options) -> Self {
        let now = Duration::from_secs(1000);
        let machine = Machine::new(options, now);
        let nobody = WorkerId(0);
        Self {
            machine,
            now,
            rollout: nobody,
            verifier: nobody,
            learners: Vec::new(),
            records: Vec::new(),
            processes: 0,
        }
    }

    /// A run whose members have joined and whose learners have to prepare.
    pub(crate) fn preparing(options: Options) -> Self {
        let learners = options.learners;
        let mut run = Self::new(options);
        run.rollout = run.register(Role::Rollout, "rollout-0").0;
        run.verifier = run.register(Role::Verifier, "verifier-0").0;
        for rank in 0..learners {
            let worker = run.register(Role::Learner, &format!("learner-{rank}")).0;
            run.learners.push(worker);
            run.step(Event::JoinGeneration { worker });
        }
        run
    }

    /// A run whose first batch is being sampled.
    pub(crate) fn sampling(options: Options) -> Self {
        let mut run = Self::preparing(options);
        run.prepare();
        run
    }

    /// Applies an event and journals it.
    pub(crate) fn whole_step(&mut self, event: Event) -> Step {
        let step = self.machine.step(self.now, event);
        self.records.extend(step.record.clone());
        step
    }

    pub(crate) fn step(&mut self, event: Event) -> Vec<Effect> {
        self.whole_step(event).effects
    }

    pub(crate) fn call(&mut self, event: Event) -> Answer {
        self.whole_step(event).answer
    }

    /// Applies the events that are due now.
    pub(crate) fn tick(&mut self) -> Vec<Effect> {
        let due = self.machine.overdue(self.now);
        due.into_iter().flat_map(|event| self.step(event)).collect()
    }

    pub(crate) fn command(&mut self, command: Command) -> Result<Reply, Refusal> {
        self.call(operator(command))
    }

    /// All workers register again, as after a restart of all of them.
    pub(crate) fn join_again(&mut self) {
        self.rollout = self.register(Role::Rollout, "rollout-0").0;
        self.verifier = self.register(Role::Verifier, "verifier-0").0;
        for rank in 0..self.learners.len() {
            let worker = self.register(Role::Learner, &format!("learner-{rank}")).0;
            self.learners[rank] = worker;
            self.step(Event::JoinGeneration { worker });
        }
    }

    pub(crate) fn pass(&mut self, time: Duration) {
        self.now += time;
        self.tick();
    }

    pub(crate) fn everybody_beats(&mut self) {
        for worker in [self.rollout, self.verifier].into_iter().chain(self.learners.clone()) {
            self.call(Event::Heartbeat { worker, activity: String::new() }).unwrap();
        }
    }

    /// All members send heartbeats, and each must be told to continue.
    pub(crate) fn beat_if_members(&mut self) {
        let members: Vec<WorkerId> = self.machine.status(self.now).workers.iter().map(|worker| worker.id).collect();
        for worker in members {
            self.step(Event::Heartbeat { worker, activity: String::new() });
        }
    }

    /// Registers a new process of a supervisor that has seen the end of the one before.
    pub(crate) fn register(&mut self, role: Role, name: &str) -> (WorkerId, Vec<Effect>) {
        self.processes += 1;
        let step = self.whole_step(registration(role, name, "host", self.processes, u64::from(self.processes)));
        let Ok(Reply::Registered(worker)) = step.answer else { panic!("{step:?}") };
        (worker, step.effects)
    }

    pub(crate) fn groups(&mut self, worker: WorkerId, free_samples: u32) -> Vec<GroupGrant> {
        match self.call(Event::LeaseGroups { worker, free_samples, request: 0 }) {
            Ok(Reply::Groups(groups)) => groups,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn samples(&mut self) -> Vec<SampleGrant> {
        let worker = self.verifier;
        match self.call(Event::LeaseSamples { worker, max_samples: 1000, request: 0 }) {
            Ok(Reply::Samples(samples)) => samples,
            other => panic!("{other:?}"),
        }
    }

    /// Generates every waiting group.
    pub(crate) fn generate_all(&mut self) {
        let grants = self.groups(self.rollout, 10_000);
        self.hand_in(grants);
    }

    /// Generates the leased groups.
    pub(crate) fn hand_in(&mut self, grants: Vec<GroupGrant>) {
        let version = WeightVersion(self.machine.position().step);
        for grant in grants {
            for wanted in grant.samples {
                let sample = SampleId { group: grant.group, index: wanted.index };
                let (worker, lease) = (self.rollout, grant.lease);
                self.call(Event::SubmitSample { worker, lease, sample, version }).unwrap();
            }
        }
    }

    /// Judges every waiting sample until there are none.
    pub(crate) fn verify_all(&mut self, outcome: impl Fn(SampleId) -> Outcome) -> Vec<Effect> {
        let mut effects = Vec::new();
        loop {
            let grants = self.samples();
            if grants.is_empty() {
                return effects;
            }
            for SampleGrant { lease, sample } in grants {
                let outcome = outcome(sample);
                let label = f64::from(u8::from(outcome == Outcome::Correct));
                let worker = self.verifier;
                effects.extend(self.step(Event::SubmitVerdict {
                    worker,
                    lease,
                    sample,
                    outcome,
                    label,
                    reward: Some(label),
                }));
            }
        }
    }

    pub(crate) fn task_of(&mut self, rank: usize) -> u64 {
        let (worker, generation) = (self.learners[rank], self.machine.status(self.now).generation);
        match self.call(Event::NextTask { worker, generation }) {
            Ok(Reply::Task(Some(TaskOrder { task, .. }))) => task,
            other => panic!("{other:?}"),
        }
    }

    fn complete(&mut self, skipped_updates: u32) -> Vec<Effect> {
        let generation: Generation = self.machine.status(self.now).generation;
        let mut effects = Vec::new();
        for worker in self.learners.clone() {
            let Ok(Reply::Task(Some(order))) = self.call(Event::NextTask { worker, generation }) else { panic!() };
            let version = |step| Some(WeightVersion(step));
            let result = match order.kind {
                TaskKind::Prepare => TaskResult::Prepared { weights: version(self.machine.position().step) },
                TaskKind::Train { step } => TaskResult::Trained { weights: version(step), skipped_updates },
                TaskKind::Save { .. } => TaskResult::Saved,
                TaskKind::Regroup { .. } => panic!("regroup"),
            };
            effects.extend(self.step(Event::CompleteTask { worker, generation, task: order.task, result }));
        }
        effects
    }

    pub(crate) fn prepare(&mut self) -> Vec<Effect> {
        self.complete(0)
    }

    pub(crate) fn train(&mut self) -> Vec<Effect> {
        self.complete(0)
    }

    pub(crate) fn train_skipping(&mut self, skipped_updates: u32) -> Vec<Effect> {
        self.complete(skipped_updates)
    }

    pub(crate) fn save(&mut self) -> Vec<Effect> {
        self.complete(0)
    }

    /// Generates, judges and trains one step.
    pub(crate) fn full_step(&mut self) {
        self.generate_all();
        self.verify_all(|sample| if sample.index == 0 { Outcome::Correct } else { Outcome::Wrong });
        self.train();
    }
}
