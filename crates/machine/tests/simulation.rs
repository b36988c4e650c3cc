//! Seeded runs of the whole machine: simulated workers that are slow, die, come back, lose answers and send things
//! twice or late, checked after every event against a reference that knows only what a batch must be.
//!
//! A failure names its seed; `PACS_SEED=<seed> cargo test -p pacs-machine --test simulation` replays it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pacs_machine::{
    Directive, Effect, End, EvaluationPlan, Event, GroupGrant, Machine, Options, Reply, SampleGrant, Snapshot,
    TaskKind, TaskOrder, TaskResult, evaluation_problem,
};
use pacs_types::{Generation, GroupId, LeaseId, Outcome, Role, SampleId, WeightVersion, WorkerId};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const SEEDS: u64 = 400;
const FAULTY_TICKS: u32 = 600;
const MOST_TICKS: u32 = 20_000;
const TICK: Duration = Duration::from_millis(200);

#[test]
fn runs_finish_and_never_break_an_invariant() {
    let seeds = match std::env::var("PACS_SEED") {
        Ok(seed) => vec![seed.parse().expect("PACS_SEED is a number")],
        Err(_) => (0..SEEDS).collect(),
    };
    let mut seen = BTreeMap::new();
    for seed in seeds {
        let run = std::panic::catch_unwind(|| World::new(seed).run());
        let counters = run.unwrap_or_else(|_| panic!("seed {seed} failed; replay it with PACS_SEED={seed}"));
        for (name, count) in counters {
            *seen.entry(name).or_insert(0) += count;
        }
    }
    // Faults that never happen prove nothing.
    for name in [
        "lapsed_leases",
        "lost_generations",
        "failed_verdicts",
        "replaced_samples",
        "dropped_groups",
        "stale_submissions",
    ] {
        assert!(seen.get(name).is_some_and(|count| *count > 0), "{name} never happened: {seen:?}");
    }
}

/// What a batch must be, told independently of the machine.
#[derive(Default)]
struct Reference {
    generated: BTreeSet<SampleId>,
    judged: BTreeSet<SampleId>,
    /// Samples that were given up, by place.
    replaced: BTreeMap<SampleId, u32>,
    /// What each loan asks for.
    wanted: BTreeMap<(LeaseId, SampleId), u32>,
    /// Training groups by the step that they were trained in (0: dropped in the step being made).
    used: BTreeMap<GroupId, u64>,
    dropped: BTreeSet<GroupId>,
    batch: Vec<GroupId>,
    generation: Generation,
    version: Option<u64>,
    ended: Option<End>,
}

struct Actor {
    role: Role,
    name: String,
    id: Option<WorkerId>,
    /// Ticks until a dead process is started again.
    dead_for: u32,
    groups: Vec<GroupGrant>,
    samples: Vec<SampleGrant>,
    generation: Option<Generation>,
    task: Option<TaskOrder>,
}

struct World {
    rng: ChaCha8Rng,
    now: Duration,
    tick: u32,
    machine: Machine,
    options: Options,
    actors: Vec<Actor>,
    /// Messages on the way, with the tick at which they arrive.
    network: Vec<(u32, Event)>,
    committed: Option<(Snapshot, bool)>,
    reference: Reference,
    restarts: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let learners = rng.random_range(1..=3);
        let options = Options {
            learners,
            samples_per_prompt: rng.random_range(1..=4),
            prompts_per_step: rng.random_range(1..=6),
            total_steps: rng.random_range(1..=8),
            evaluation: EvaluationPlan {
                problems: rng.random_range(0..=5),
                samples_per_problem: rng.random_range(1..=2),
                every_steps: rng.random_range(0..=3),
                before: rng.random(),
                after: rng.random(),
            },
            checkpoint_every_steps: rng.random_range(0..=3),
            max_attempts: rng.random_range(1..=3),
            max_replacements: rng.random_range(0..=2),
            max_skipped_updates: 1000,
            max_lost_generations: 1000,
            heartbeat_timeout: Duration::from_secs(3),
            rollout_lease_timeout: Duration::from_secs(20),
            verifier_lease_timeout: Duration::from_secs(10),
            ids_above: 0,
            generations_above: 0,
            start: Snapshot::default(),
            exported: false,
            evaluated: BTreeSet::new(),
        };
        let mut actors = Vec::new();
        let counts = [(Role::Rollout, rng.random_range(1..=3)), (Role::Verifier, rng.random_range(1..=3))];
        for (role, count) in counts.into_iter().chain([(Role::Learner, learners)]) {
            for slot in 0..count {
                actors.push(Actor {
                    role,
                    name: format!("{role}-{slot}"),
                    id: None,
                    dead_for: 0,
                    groups: Vec::new(),
                    samples: Vec::new(),
                    generation: None,
                    task: None,
                });
            }
        }
        Self {
            machine: Machine::new(options.clone(), Duration::ZERO),
            rng,
            now: Duration::ZERO,
            tick: 0,
            options,
            actors,
            network: Vec::new(),
            committed: None,
            reference: Reference::default(),
            restarts: 0,
        }
    }

    fn run(mut self) -> BTreeMap<String, u64> {
        while self.reference.ended.is_none() {
            assert!(self.tick < MOST_TICKS, "does not finish: {:#?}", self.machine.status(self.now));
            self.tick += 1;
            self.now += TICK;
            self.deliver();
            let mut order: Vec<usize> = (0..self.actors.len()).collect();
            order.shuffle(&mut self.rng);
            for actor in order {
                self.act(actor);
            }
            self.step(Event::Tick);
            if self.fault(0.002) {
                self.restart_coordinator();
            }
        }
        assert_eq!(self.reference.ended, Some(End::Finished));
        assert_eq!(self.machine.position().step, self.options.total_steps);
        assert!(matches!(self.committed, Some((_, true))), "the model was not exported");
        self.machine.status(self.now).counters
    }

    /// Whether a fault of this probability happens now; later there are none, so that the run can finish.
    fn fault(&mut self, probability: f64) -> bool {
        self.tick < FAULTY_TICKS && self.rng.random_bool(probability)
    }

    fn send(&mut self, event: Event) {
        let arrives = self.tick + self.rng.random_range(1..=4);
        if self.fault(0.1) {
            let late = self.tick + self.rng.random_range(1..=60);
            self.network.push((late, event.clone()));
        }
        self.network.push((arrives, event));
    }

    fn deliver(&mut self) {
        let tick = self.tick;
        let (mut due, later): (Vec<_>, Vec<_>) = self.network.drain(..).partition(|(at, _)| *at <= tick);
        self.network = later;
        due.shuffle(&mut self.rng);
        for (_, event) in due {
            self.step(event);
        }
    }

    fn restart_coordinator(&mut self) {
        self.restarts += 1;
        let (start, exported) = self.committed.clone().unwrap_or_default();
        let evaluated = self.options.evaluated.iter().copied().filter(|step| *step <= start.step).collect();
        self.rewind(start.step);
        self.reference.generation = Generation(self.restarts * 1000);
        self.network
            .retain(|(_, event)| !matches!(event, Event::CheckpointCommitted { .. } | Event::CheckpointFailed { .. }));
        let options = Options {
            start,
            exported,
            evaluated,
            ids_above: self.restarts * 1_000_000,
            generations_above: self.restarts * 1000,
            ..self.options.clone()
        };
        self.options = options.clone();
        self.machine = Machine::new(options, self.now);
        self.reference.ended = self.machine.ended().cloned();
    }

    fn rewind(&mut self, step: u64) {
        let reference = &mut self.reference;
        reference.generated.clear();
        reference.judged.clear();
        reference.replaced.clear();
        reference.dropped.clear();
        reference.batch.clear();
        reference.version = None;
        reference.used.retain(|_, used| *used <= step);
    }

    fn act(&mut self, index: usize) {
        if self.actors[index].dead_for > 0 {
            self.actors[index].dead_for -= 1;
            return;
        }
        if self.fault(0.01) {
            return self.kill(index);
        }
        let Some(worker) = self.actors[index].id else { return self.register(index) };
        match self.step(Event::Heartbeat { worker, activity: "works".into() }) {
            Some(Reply::Directive(Directive::Continue)) => {}
            Some(Reply::Directive(_)) => return self.actors[index].forget(),
            other => panic!("{other:?}"),
        }
        if self.rng.random_bool(0.3) {
            return;
        }
        match self.actors[index].role {
            Role::Rollout => self.generate(index, worker),
            Role::Verifier => self.verify(index, worker),
            Role::Learner => self.learn(index, worker),
        }
    }

    fn kill(&mut self, index: usize) {
        if let Some(worker) = self.actors[index].id
            && self.rng.random_bool(0.3)
        {
            let preparing = self.machine.status(self.now).phase == "preparing";
            let error = (self.rng.random_bool(0.5) && !preparing).then(|| "crash".to_owned());
            self.step(Event::Leave { worker, error });
        }
        self.actors[index].forget();
        self.actors[index].dead_for = self.rng.random_range(0..40);
    }

    fn register(&mut self, index: usize) {
        let Actor { role, name, .. } = &self.actors[index];
        let (role, name) = (*role, name.clone());
        let event =
            Event::Register { role, collective_address: format!("{name}:1"), name, host: "host".into(), pid: 1 };
        match self.step(event) {
            Some(Reply::Registered(id)) => self.actors[index].id = Some(id),
            other => panic!("{other:?}"),
        }
    }

    fn generate(&mut self, index: usize, worker: WorkerId) {
        let free_samples = self.rng.random_range(0..10);
        let reply = self.step(Event::LeaseGroups { worker, free_samples });
        if let Some(Reply::Groups(groups)) = reply {
            self.note_wanted(&groups);
            if !self.fault(0.02) {
                self.actors[index].groups.extend(groups);
            }
        }
        for _ in 0..self.rng.random_range(0..4) {
            let held = &mut self.actors[index].groups;
            if held.is_empty() {
                return;
            }
            let pick = self.rng.random_range(0..held.len());
            let Some(sample) = held[pick].samples.pop() else {
                held.swap_remove(pick);
                continue;
            };
            let sample = SampleId { group: held[pick].group, index: sample.index };
            let (lease, mut version) = (held[pick].lease, WeightVersion(held[pick].policy_step));
            if self.fault(0.01) {
                version = version.next();
            }
            self.send(Event::SubmitSample { worker, lease, sample, version });
        }
    }

    fn verify(&mut self, index: usize, worker: WorkerId) {
        let max_samples = self.rng.random_range(0..6);
        let reply = self.step(Event::LeaseSamples { worker, max_samples });
        if let Some(Reply::Samples(samples)) = reply
            && !self.fault(0.02)
        {
            self.actors[index].samples.extend(samples);
        }
        for _ in 0..self.rng.random_range(0..4) {
            let Some(SampleGrant { lease, sample }) = self.actors[index].samples.pop() else { return };
            let outcome = match self.rng.random_range(0..10) {
                0..4 => Outcome::Correct,
                4..8 => Outcome::Wrong,
                _ if self.fault(0.3) => Outcome::Failed,
                _ => Outcome::Unparsable,
            };
            let label = f64::from(u8::from(outcome == Outcome::Correct));
            self.send(Event::SubmitVerdict { worker, lease, sample, outcome, label });
        }
    }

    fn learn(&mut self, index: usize, worker: WorkerId) {
        let Some(generation) = self.actors[index].generation else {
            if let Some(Reply::Joined(Some(group))) = self.step(Event::JoinGeneration { worker }) {
                assert_eq!(group.addresses.len(), self.options.learners as usize);
                self.actors[index].generation = Some(group.generation);
            }
            return;
        };
        let Some(Reply::Task(Some(order))) = self.step(Event::NextTask { worker, generation }) else { return };
        let result = match order.kind {
            TaskKind::Regroup { .. } => {
                self.actors[index].generation = None;
                return;
            }
            _ if self.fault(0.02) => TaskResult::Failed { message: "peer lost".into(), permanent: false },
            TaskKind::Prepare => TaskResult::Prepared { weights: Some(WeightVersion(self.machine.position().step)) },
            TaskKind::Train { step } => TaskResult::Trained { weights: Some(WeightVersion(step)), skipped_updates: 0 },
            TaskKind::Save { .. } => TaskResult::Saved,
        };
        self.send(Event::CompleteTask { worker, generation, task: order.task, result });
    }

    fn step(&mut self, event: Event) -> Option<Reply> {
        let effects = self.machine.step(self.now, event.clone());
        let mut answer = None;
        for (position, effect) in effects.into_iter().enumerate() {
            match effect {
                Effect::Reply(reply) => {
                    assert_eq!(position, 0, "an answer comes first");
                    self.note_accepted(&event, &reply);
                    answer = Some(reply);
                }
                Effect::Refuse(_) => assert_eq!(position, 0, "a refusal comes first"),
                effect => self.check(effect),
            }
        }
        answer
    }

    fn note_wanted(&mut self, groups: &[GroupGrant]) {
        for grant in groups {
            assert!(!grant.samples.is_empty(), "{} was lent with nothing to do", grant.group);
            for wanted in &grant.samples {
                let sample = SampleId { group: grant.group, index: wanted.index };
                assert!(!self.reference.generated.contains(&sample), "{sample} is there and was lent");
                self.reference.wanted.insert((grant.lease, sample), wanted.attempt);
            }
        }
    }

    fn note_accepted(&mut self, event: &Event, reply: &Reply) {
        if *reply != (Reply::Accepted { fresh: true }) {
            return;
        }
        match event {
            Event::SubmitSample { lease, sample, version, .. } => {
                assert_eq!(version.0, self.machine.position().step, "a sample of other weights was accepted");
                let (attempt, replaced) = (self.reference.wanted[&(*lease, *sample)], &self.reference.replaced);
                assert_eq!(attempt, replaced.get(sample).copied().unwrap_or(0), "{sample} was given up before");
                assert!(self.reference.generated.insert(*sample), "{sample} was accepted twice");
            }
            Event::SubmitVerdict { sample, outcome, .. } => {
                assert!(outcome.is_conclusive(), "a failed verification was taken as a verdict");
                assert!(self.reference.generated.contains(sample), "{sample} was judged before it was generated");
                assert!(self.reference.judged.insert(*sample), "{sample} was judged twice");
            }
            _ => {}
        }
    }

    fn check_complete(&mut self, groups: &[GroupId], samples: u32) {
        for group in groups {
            for index in 0..samples {
                let sample = SampleId { group: *group, index };
                assert!(self.reference.judged.remove(&sample), "{sample} has no verdict");
                assert!(self.reference.generated.remove(&sample), "{sample} was never generated");
            }
        }
    }

    fn check(&mut self, effect: Effect) {
        match effect {
            Effect::Train { step, groups, ranks } => {
                assert_eq!(ranks, self.options.learners);
                assert_eq!(groups.len(), self.options.prompts_per_step as usize);
                assert!(groups.is_sorted() && groups.iter().all(|group| evaluation_problem(*group).is_none()));
                self.check_complete(&groups, self.options.samples_per_prompt);
                assert!(self.reference.judged.is_empty() && self.reference.generated.is_empty());
                for group in &groups {
                    let earlier = self.reference.used.insert(*group, step);
                    assert_eq!(earlier, None, "{group} is trained on twice");
                }
                self.reference.batch = groups;
            }
            Effect::StepDone { step } => {
                assert!(self.reference.batch.iter().all(|group| self.reference.used[group] == step));
                for group in std::mem::take(&mut self.reference.dropped) {
                    self.reference.used.insert(group, step);
                }
                let used: Vec<u64> = self.reference.used.keys().map(|group| group.0).collect();
                assert!(used.iter().copied().eq(0..used.len() as u64), "a prompt was lost: {used:?}");
                assert_eq!(self.reference.version.replace(step), Some(step - 1), "versions go up by one");
            }
            Effect::Evaluated { step, groups, excluded } => {
                assert_eq!(groups.len() + excluded as usize, self.options.evaluation.problems as usize);
                self.check_complete(&groups, self.options.evaluation.samples_per_problem);
                assert!(self.options.evaluated.insert(step), "step {step} was measured twice");
            }
            Effect::ReplaceSample(sample) => {
                assert!(evaluation_problem(sample.group).is_none(), "an evaluation measures the first samples");
                assert!(self.reference.generated.remove(&sample), "{sample} was never generated");
                assert!(!self.reference.judged.contains(&sample), "{sample} has a verdict");
                let replaced = self.reference.replaced.entry(sample).or_default();
                *replaced += 1;
                assert!(*replaced <= self.options.max_replacements, "{sample} was replaced {replaced} times");
            }
            Effect::DropGroup(group) => {
                self.reference.generated.retain(|sample| sample.group != group);
                self.reference.judged.retain(|sample| sample.group != group);
                if evaluation_problem(group).is_none() {
                    self.reference.dropped.insert(group);
                }
            }
            Effect::GenerationFormed { generation, names } => {
                assert!(generation > self.reference.generation, "generations go up");
                assert_eq!(names.len(), self.options.learners as usize);
                self.reference.generation = generation;
            }
            Effect::Prepared { step } => self.reference.version = Some(step),
            Effect::Rewound { step } => {
                self.options.evaluated.retain(|evaluated| *evaluated <= step);
                assert_eq!(step, self.committed.as_ref().map_or(0, |(snapshot, _)| snapshot.step));
                self.rewind(step);
            }
            Effect::CommitCheckpoint { snapshot, model } => self.commit(snapshot, model),
            Effect::CreateCheckpoint { .. } | Effect::Phase(_) | Effect::Note(_) | Effect::WorkerLost { .. } => {}
            Effect::Abandoned => panic!("nobody asked the run to stop"),
            Effect::Ended(end) => assert_eq!(self.reference.ended.replace(end), None, "a run ends once"),
            Effect::Reply(_) | Effect::Refuse(_) => unreachable!("answers are handled by the caller"),
        }
    }

    fn commit(&mut self, snapshot: Snapshot, model: bool) {
        let step = snapshot.step;
        let arrives = self.tick + self.rng.random_range(1..=5);
        if !model && self.fault(0.1) {
            let reason = "disk full".to_owned();
            return self.network.push((arrives, Event::CheckpointFailed { step, reason }));
        }
        // Durable from here on, whether or not the machine lives to hear of it.
        self.committed = Some((snapshot, model));
        self.network.push((arrives, Event::CheckpointCommitted { step }));
    }
}

impl Actor {
    fn forget(&mut self) {
        self.id = None;
        self.groups.clear();
        self.samples.clear();
        self.generation = None;
        self.task = None;
    }
}
