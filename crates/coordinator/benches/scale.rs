//! `cargo xtask bench scale`: what a cluster of many GPUs would do with one coordinator. The run's own state machine decides; the
//! time that everything takes comes from a cost model: the coordinator's costs are those that `cargo xtask bench fleet` prints,
//! those of the GPUs are assumptions. Prints one JSON line a cluster.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use clap::Parser;
use pacs_machine::{Event, GroupGrant, Machine, Options, Reply, TaskKind, TaskResult};
use pacs_types::{Generation, LeaseId, Outcome, Role, SampleId, WeightVersion, WorkerId, mix};
use serde_json::json;

#[derive(Clone, Parser)]
struct Arguments {
    /// Sizes of clusters, in GPUs.
    #[arg(long, value_delimiter = ',', default_values_t = [64, 1024, 16_384])]
    gpus: Vec<u32>,
    /// Steps of each.
    #[arg(long, default_value_t = 8)]
    steps: u64,
    /// Share of the GPUs that generate; the others train.
    #[arg(long, default_value_t = 0.2)]
    rollout_share: f64,
    /// Samples that a learner's GPU gets each step.
    #[arg(long, default_value_t = 32)]
    samples_a_learner: u32,
    /// How many versions old an answer's weights may be (`asynchrony.max_lag`).
    #[arg(long, default_value_t = 8)]
    lag: u32,
    /// Mean tokens of an answer; the longest have four times as many.
    #[arg(long, default_value_t = 2000.0)]
    tokens: f64,
    /// Assumed: tokens a second that a rollout GPU generates, and how many samples at once.
    #[arg(long, default_value_t = 20_000.0)]
    rollout_tokens: f64,
    #[arg(long, default_value_t = 256)]
    at_once: u32,
    /// Assumed: tokens a second that a learner's GPU trains on, exchanges included.
    #[arg(long, default_value_t = 4600.0)]
    learner_tokens: f64,
    /// Assumed: seconds from the end of a step until its weights are on the rollout GPUs.
    #[arg(long, default_value_t = 5.0)]
    weights_seconds: f64,
    /// Processors of the coordinator.
    #[arg(long, default_value_t = 2.0)]
    processors: f64,
    /// Measured: microseconds of a processor that a sample takes, its lease, verdict and batch included.
    #[arg(long)]
    sample_us: f64,
    /// Measured: microseconds of a processor that a heartbeat takes.
    #[arg(long)]
    heartbeat_us: f64,
    /// Megabytes a second that the coordinator's disk takes, and milliseconds of a sync.
    #[arg(long, default_value_t = 1000.0)]
    disk_mb: f64,
    #[arg(long, default_value_t = 0.3)]
    sync_ms: f64,
    /// Megabytes a second of the coordinator's network.
    #[arg(long, default_value_t = 3125.0)]
    network_mb: f64,
    /// Cargo passes it.
    #[arg(long, hide = true)]
    bench: bool,
}

const SAMPLES: u32 = 8;
/// Of a token: 4 bytes each for its id, its log-prob and its text.
const JOURNAL_BYTES: f64 = 12.0;
/// In from the rollout, its text out to the verifier, ids and log-probs out to a learner.
const NETWORK_BYTES: f64 = 12.0 + 4.0 + 8.0;

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    for gpus in &arguments.gpus {
        Cluster::new(&arguments, *gpus)?.run()?;
    }
    Ok(())
}

/// Something that takes one piece of work after the other.
#[derive(Default)]
struct Resource {
    free_at: f64,
    busy: f64,
}

impl Resource {
    /// When work that comes at `now` is done.
    fn take(&mut self, now: f64, seconds: f64) -> f64 {
        self.busy += seconds;
        self.free_at = self.free_at.max(now) + seconds;
        self.free_at
    }
}

/// What happens next; times are in nanoseconds, so that they are ordered.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Next {
    /// A worker has room for another sample.
    Free(usize),
    /// The answer to that has come.
    Leased(usize),
    /// A sample is generated.
    Generated { worker: usize, lease: LeaseId, sample: SampleId, version: u64 },
    /// A sample is in the journal; its verdict comes at once.
    Written,
    /// The learners are done with their task.
    Trained { task: u64, step: u64 },
    /// The weights of a version are with the rollout workers.
    Arrived(u64),
}

struct Cluster<'a> {
    arguments: &'a Arguments,
    gpus: u32,
    learners: u32,
    machine: Machine,
    now: f64,
    queue: BinaryHeap<Reverse<(u64, Next)>>,
    rollouts: Vec<WorkerId>,
    /// Samples that each has room for.
    room: Vec<u32>,
    verifier: WorkerId,
    learner: WorkerId,
    version: u64,
    /// When the weights of a step are with the workers.
    arrivals: BTreeMap<u64, f64>,
    processors: Resource,
    disk: Resource,
    network: Resource,
    waits: Vec<f64>,
    steps: Vec<f64>,
    is_training: bool,
    training: f64,
    request: u64,
}

impl<'a> Cluster<'a> {
    fn new(arguments: &'a Arguments, gpus: u32) -> Result<Self> {
        let rollouts = ((f64::from(gpus) * arguments.rollout_share).round() as u32).max(1);
        let learners = gpus - rollouts;
        let prompts = (learners * arguments.samples_a_learner / SAMPLES).max(1);
        let never = Duration::from_secs(1 << 30);
        let options = Options {
            samples_per_prompt: SAMPLES,
            prompts_per_step: prompts,
            slots: (arguments.lag + 1) * prompts,
            max_lag: arguments.lag,
            // One more than is played, so that nothing is saved.
            total_steps: arguments.steps + 1,
            heartbeat_timeout: never,
            group_timeout: never,
            task_timeout: never,
            stall_timeout: never,
            rollout_lease_timeout: never,
            verifier_lease_timeout: never,
            ..Options::small()
        };
        let mut machine = Machine::new(options, Duration::ZERO);
        let mut register = |role, name: String| {
            let event = Event::Register {
                role,
                name,
                host: "bench".into(),
                pid: 1,
                started: 0,
                collective_address: "bench:1".into(),
            };
            match machine.step(Duration::ZERO, event).answer {
                Ok(Reply::Registered(worker)) => Ok(worker),
                other => Err(anyhow!("register: {other:?}")),
            }
        };
        // All ranks are one here: what they exchange is part of the time of a step.
        let learner = register(Role::Learner, "learner-0".into())?;
        let verifier = register(Role::Verifier, "verifier-0".into())?;
        let rollouts: Result<Vec<_>> =
            (0..rollouts).map(|slot| register(Role::Rollout, format!("rollout-{slot}"))).collect();
        let rollouts = rollouts?;
        let room = vec![arguments.at_once; rollouts.len()];
        Ok(Self {
            arguments,
            gpus,
            learners,
            machine,
            now: 0.0,
            queue: BinaryHeap::new(),
            rollouts,
            room,
            verifier,
            learner,
            version: 0,
            arrivals: BTreeMap::new(),
            processors: Resource::default(),
            disk: Resource::default(),
            network: Resource::default(),
            waits: Vec::new(),
            steps: Vec::new(),
            is_training: false,
            training: 0.0,
            request: 0,
        })
    }

    fn step(&mut self, event: Event) -> Result<Reply> {
        let now = Duration::from_secs_f64(self.now);
        self.machine.step(now, event).answer.map_err(|refusal| anyhow!("{refusal}"))
    }

    fn at(&mut self, time: f64, next: Next) {
        self.queue.push(Reverse(((time * 1e9) as u64, next)));
    }

    /// Processor time that is left for samples when all members beat.
    fn capacity(&self) -> f64 {
        let members = f64::from(self.gpus);
        // As `interval_for` of the worker service has it with a timeout of 10 s; a worker waits for nine tenths of it on
        // average.
        let interval = 0.9 * (members / 2000.0).clamp(1.0, 2.5);
        let heartbeats = members / interval * self.arguments.heartbeat_us / 1e6;
        self.arguments.processors - heartbeats
    }

    fn run(mut self) -> Result<()> {
        if self.capacity() <= 0.0 {
            bail!("the heartbeats of {} GPUs alone take all processors", self.gpus);
        }
        let Reply::Joined(_) = self.step(Event::JoinGeneration { worker: self.learner })? else {
            bail!("no generation")
        };
        let order = self.next_task()?.context("the first task")?;
        self.complete(order.0, TaskResult::Prepared { weights: Some(WeightVersion(0)) })?;
        self.ask_all();
        while self.steps.len() < self.arguments.steps as usize {
            let Reverse((time, next)) = self.queue.pop().context("something happens always")?;
            self.now = time as f64 / 1e9;
            self.happen(next)?;
        }
        self.report();
        Ok(())
    }

    fn ask_all(&mut self) {
        let groups = self.machine.openings().groups;
        let mut asked = 0;
        for slot in 0..self.room.len() {
            if asked == groups {
                return;
            }
            while self.room[slot] >= SAMPLES && asked < groups {
                self.room[slot] -= SAMPLES;
                asked += 1;
                // What a lease costs is part of its samples' cost, and its wait is that for the processors and a sync.
                let began = self.now;
                let done = self.processors.take(began, 0.0).max(began) + self.arguments.sync_ms / 1e3;
                self.waits.push(done - began);
                self.at(done, Next::Leased(slot));
            }
        }
    }

    fn happen(&mut self, next: Next) -> Result<()> {
        match next {
            Next::Free(slot) => {
                self.room[slot] += 1;
                self.ask_all();
            }
            Next::Leased(slot) => self.lease(slot)?,
            Next::Generated { worker, lease, sample, version } => {
                let bytes = self.arguments.tokens;
                let capacity = self.capacity();
                let network = self.network.take(self.now, bytes * NETWORK_BYTES / 1e6 / self.arguments.network_mb);
                let computed = self.processors.take(network, self.arguments.sample_us / 1e6 / capacity);
                let written = self.disk.take(computed, bytes * JOURNAL_BYTES / 1e6 / self.arguments.disk_mb);
                let done = written + self.arguments.sync_ms / 1e3;
                let event = Event::SubmitSample {
                    worker: self.rollouts[worker],
                    lease,
                    sample,
                    version: WeightVersion(version),
                };
                self.step(event)?;
                self.at(done, Next::Written);
                self.at(done, Next::Free(worker));
            }
            Next::Written => self.verify()?,
            Next::Trained { task, step } => {
                let weights = Some(WeightVersion(step));
                self.is_training = false;
                self.complete(task, TaskResult::Trained { weights, skipped_updates: 0 })?;
                self.steps.push(self.now);
                let arrival = self.now + self.arguments.weights_seconds;
                self.arrivals.insert(step, arrival);
                self.at(arrival, Next::Arrived(step));
                self.train()?;
                self.ask_all();
            }
            Next::Arrived(version) => self.version = self.version.max(version),
        }
        Ok(())
    }

    fn lease(&mut self, slot: usize) -> Result<()> {
        self.request += 1;
        let event = Event::LeaseGroups { worker: self.rollouts[slot], free_samples: SAMPLES, request: self.request };
        let Reply::Groups(groups) = self.step(event)? else { bail!("no groups") };
        if groups.is_empty() {
            self.room[slot] += SAMPLES;
        }
        for GroupGrant { lease, group, samples, policy_step, .. } in groups {
            // A lease waits in its worker for the oldest weights that it allows.
            let begin = self.arrivals.get(&policy_step).map_or(self.now, |arrival| arrival.max(self.now));
            let version = self.version.max(policy_step);
            for wanted in samples {
                let sample = SampleId { group, index: wanted.index };
                // Exponential lengths, four times the mean at most; the samples of a worker share its GPU.
                let share = (mix((group.0 << 8) | u64::from(wanted.index)) >> 11) as f64 / (1u64 << 53) as f64;
                let tokens = (-self.arguments.tokens * (1.0 - share).ln()).clamp(1.0, 4.0 * self.arguments.tokens);
                let seconds = tokens * f64::from(self.arguments.at_once) / self.arguments.rollout_tokens;
                self.at(begin + seconds, Next::Generated { worker: slot, lease, sample, version });
            }
        }
        Ok(())
    }

    fn verify(&mut self) -> Result<()> {
        self.request += 1;
        let event = Event::LeaseSamples { worker: self.verifier, max_samples: 64, request: self.request };
        let Reply::Samples(samples) = self.step(event)? else { bail!("no samples") };
        for grant in samples {
            let label = f64::from(grant.sample.index % 2);
            let outcome = if label > 0.0 { Outcome::Correct } else { Outcome::Wrong };
            let (lease, sample) = (grant.lease, grant.sample);
            self.step(Event::SubmitVerdict {
                worker: self.verifier,
                lease,
                sample,
                outcome,
                label,
                reward: Some(label),
            })?;
        }
        self.train()
    }

    fn next_task(&mut self) -> Result<Option<(u64, TaskKind)>> {
        let generation = Generation(1);
        match self.step(Event::NextTask { worker: self.learner, generation })? {
            Reply::Task(order) => Ok(order.map(|order| (order.task, order.kind))),
            other => bail!("no task: {other:?}"),
        }
    }

    fn complete(&mut self, task: u64, result: TaskResult) -> Result<()> {
        let event = Event::CompleteTask { worker: self.learner, generation: Generation(1), task, result };
        self.step(event).map(drop)
    }

    /// Begins a step if there is a batch, and the learners are not at one.
    fn train(&mut self) -> Result<()> {
        if self.is_training || self.machine.openings().task.is_none() {
            return Ok(());
        }
        let Some((task, TaskKind::Train { step })) = self.next_task()? else { return Ok(()) };
        self.is_training = true;
        let tokens = f64::from(self.arguments.samples_a_learner) * self.arguments.tokens;
        let seconds = tokens / self.arguments.learner_tokens;
        self.training += seconds;
        self.at(self.now + seconds, Next::Trained { task, step });
        Ok(())
    }

    fn report(&mut self) {
        // The first step waits for the first answers, and is left out.
        let (first, last) = (self.steps[0], self.steps[self.steps.len() - 1]);
        let count = (self.steps.len() - 1).max(1) as f64;
        let step = (last - first) / count;
        let compute = self.training / self.steps.len() as f64;
        let samples = f64::from(self.learners * self.arguments.samples_a_learner) / step;
        // What still waits in line at the end was not done in this time.
        let of = |resource: &Resource| (resource.busy / last).min(1.0);
        let heartbeats = (self.arguments.processors - self.capacity()) / self.arguments.processors;
        let processors = heartbeats + of(&self.processors) * (1.0 - heartbeats);
        let (disk, network) = (of(&self.disk), of(&self.network));
        let generation = samples * self.arguments.tokens / (self.rollouts.len() as f64 * self.arguments.rollout_tokens);
        self.waits.sort_by(f64::total_cmp);
        let p99 = self.waits[(self.waits.len() - 1) * 99 / 100];
        let busy = [
            ("learners", compute / step),
            ("rollouts", generation),
            ("coordinator's processors", processors),
            ("coordinator's disk", disk),
            ("coordinator's network", network),
        ];
        let busiest = busy.iter().max_by(|a, b| a.1.total_cmp(&b.1)).map(|(name, _)| *name);
        println!(
            "{}",
            json!({"bench": "scale", "gpus": self.gpus, "rollouts": self.rollouts.len(), "learners": self.learners,
                "samples_a_step": self.learners * self.arguments.samples_a_learner, "step_seconds": step,
                "samples_per_second": samples, "learners_busy": compute / step, "rollouts_busy": generation,
                "processors_busy": processors, "disk_busy": disk, "network_busy": network,
                "lease_p99_ms": 1e3 * p99, "busiest": busiest})
        );
    }
}
