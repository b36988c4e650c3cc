//! Chaos: `pacs run` and the workers of every role are killed, stopped for a while, and asked to end, their network is cut, their
//! disk is full for a while, at random moments, in two runs at once. In the end the audit: every step made once, every sample
//! trained on once, no process, no weights and no half file left, and the bits of an undisturbed run where the mode promises them.
//!
//! Networks and disks of their own take root; without it the other faults are left, and that is said.
//!
//! A short one is part of the tests; `cargo xtask chaos --minutes 10` makes a long one, over all modes. The seed is printed, and
//! `PACS_CHAOS_SEED` (`--seed`) takes it; it decides what is done, not what the machine is doing at that moment.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use pacs_tests::{Host, Job, Run, RunProcess};

/// How long it lasts when `PACS_CHAOS_SECONDS` does not say.
const SECONDS: u64 = 10;

/// Steps of a job. New jobs are started when these are done.
const STEPS: u64 = 12;

/// Prompts of a step, and samples of a prompt, of the tiny job.
const PROMPTS: usize = 8;
const SAMPLES: usize = 8;

/// Longest that a job may still take when all faults are over.
const CALM: Duration = Duration::from_secs(300);

/// Longest that a worker may still live when its run is over.
const LEAVE: Duration = Duration::from_secs(10);

/// Longest pause between two attacks, in milliseconds: a run must come to something in between.
const PAUSE: u64 = 3000;

/// Shortest time from the end of a run to its next start, as supervisors have it.
const AGAIN: Duration = Duration::from_millis(500);

/// Longest that a worker stands still, in milliseconds: longer than a coordinator waits for heartbeats. In short chaos it is
/// half of its length.
const STOPPED: u64 = 14_000;

/// Size of a run's disk, which holds all of a tiny run several times.
const DISK_MEGABYTES: u32 = 96;

/// Room that is left on a full disk at most: sometimes for a few records, or the half of something.
const LEFT: u64 = 256 << 10;

/// SplitMix64: few lines, and the same numbers everywhere.
struct Random(u64);

impl Random {
    /// A number below `bound`.
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }

    fn one_of<'a, T>(&mut self, all: &'a [T]) -> Option<&'a T> {
        let count = u64::try_from(all.len()).ok().filter(|count| *count > 0)?;
        all.get(usize::try_from(self.below(count)).ok()?)
    }
}

/// How a job is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Mode {
    name: &'static str,
    rollouts: i64,
    learners: i64,
    sharding: &'static str,
    max_lag: i64,
}

/// The first two are those of the short test. All with `max_lag = 0` promise the bits of an undisturbed run with as many learners.
const MODES: [Mode; 6] = [
    Mode { name: "synchronous", rollouts: 1, learners: 1, sharding: "replicated", max_lag: 0 },
    Mode { name: "two-rollouts", rollouts: 2, learners: 1, sharding: "replicated", max_lag: 0 },
    Mode { name: "two-learners", rollouts: 1, learners: 2, sharding: "replicated", max_lag: 0 },
    Mode { name: "four-learners", rollouts: 1, learners: 4, sharding: "shard_all", max_lag: 0 },
    Mode { name: "asynchronous", rollouts: 1, learners: 1, sharding: "replicated", max_lag: 1 },
    Mode { name: "far-ahead", rollouts: 2, learners: 2, sharding: "shard_optimizer", max_lag: 2 },
];

impl Mode {
    fn job(self, slot: usize, state: &Path) -> Result<Job> {
        let steps = i64::try_from(STEPS)?;
        let job = Job::tiny()?.named(self.name).listed_in(state).with("batch.steps", steps);
        let job =
            job.with("checkpoint.every_steps", 5).with("evaluation.before", false).with("evaluation.after", false);
        let job = job.with("resources.rollouts", self.rollouts).with("resources.learners", self.learners);
        let job = job.with("resources.sharding", self.sharding).with("asynchrony.max_lag", self.max_lag);
        // Samples are then the same to the last bit, whatever company they had: disturbed runs batch others together.
        let job = job.with("rollout.kernels", "reference");
        // Jobs of one round differ, so that what one makes shows when it comes into the other.
        Ok(job.with("rollout.max_new_tokens", if slot == 0 { 10 } else { 14 }))
    }

    fn promises_bits(self) -> bool {
        self.max_lag == 0
    }
}

/// Finished runs that nothing has disturbed, made when they are first compared with.
struct Undisturbed<'a> {
    state: &'a Path,
    runs: BTreeMap<(Mode, usize), Job>,
}

impl Undisturbed<'_> {
    fn run(&mut self, mode: Mode, slot: usize) -> Result<&Job> {
        match self.runs.entry((mode, slot)) {
            Entry::Occupied(entry) => Ok(entry.into_mut()),
            Entry::Vacant(entry) => {
                let job = mode.job(slot, self.state)?;
                job.start()?.wait()?.expect_code(0);
                Ok(entry.insert(job))
            }
        }
    }
}

/// A run that is disturbed.
struct Victim {
    job: Job,
    /// None: it is dead, and is started again after that moment.
    run: Option<Run>,
    again: Instant,
    /// Workers that stand still until then.
    stopped: Vec<(RunProcess, Instant)>,
    /// The same of `pacs run` itself.
    run_stopped: Option<Instant>,
    /// Its network is cut until then.
    cut: Option<Instant>,
    /// Its disk is full until then.
    full: Option<Instant>,
    /// Longest that a worker stands still, in milliseconds.
    longest_stop: u64,
    done: bool,
}

impl Victim {
    fn new(job: Job, longest_stop: u64) -> Result<Self> {
        let (again, stopped) = (Instant::now(), Vec::new());
        let job = job.on_own_network()?.on_small_disk(DISK_MEGABYTES)?;
        let (run_stopped, cut, full) = (None, None, None);
        Ok(Self { job, run: None, again, stopped, run_stopped, cut, full, longest_stop, done: false })
    }

    /// Starts again what is due, and takes note of what has ended.
    fn tend(&mut self) -> Result<()> {
        let now = Instant::now();
        self.stopped.retain(|(worker, until)| {
            let is_due = *until <= now;
            if is_due {
                // It may have been killed by its supervisor meanwhile.
                let _ = worker.signal(Signal::SIGCONT);
            }
            !is_due
        });
        if self.run_stopped.is_some_and(|until| until <= now) {
            self.run_stopped = None;
            self.run.iter().for_each(|run| drop(run.signal(Signal::SIGCONT)));
        }
        if self.cut.is_some_and(|until| until <= now) {
            self.cut = None;
            self.job.host().map_or(Ok(()), Host::mend)?;
        }
        if self.full.is_some_and(|until| until <= now) {
            self.full = None;
            self.job.clear_disk()?;
        }
        let has_ended = self.run.as_mut().map(|run| run.has_ended()).transpose()?;
        match has_ended {
            None if !self.done && self.again <= now => self.run = Some(self.job.start_at_any_port()?),
            Some(true) => {
                let ended = self.run.take().context("it was there")?.wait()?;
                match ended.code {
                    Some(0) => self.done = true,
                    // Killed, or asked to end, or started while its disk was full.
                    None | Some(75) => self.again = self.again.max(now + AGAIN),
                    Some(code) => bail!("the run ended with {code}:\n{}\n{}", ended.stdout, ended.stderr),
                }
            }
            None | Some(false) => {}
        }
        Ok(())
    }

    /// Does something to the run; what, for the log.
    fn attack(&mut self, random: &mut Random) -> Result<String> {
        let workers = self.job.workers().unwrap_or_default();
        let what = random.below(13);
        let until = Instant::now() + Duration::from_millis(random.below(self.longest_stop));
        match (what, self.job.host()) {
            (10, Some(host)) => {
                host.cut()?;
                self.cut = Some(until);
                return Ok("its network is cut".to_owned());
            }
            (11, Some(host)) => {
                host.break_connections()?;
                return Ok("all its connections are broken".to_owned());
            }
            // Nothing is there to be filled before it has begun.
            (12, _) if self.job.run_path("run_id").exists() => {
                let left = random.below(LEFT);
                if self.job.fill_disk(left)? {
                    self.full = Some(until);
                    return Ok(format!("its disk is full but for {left} bytes"));
                }
            }
            _ => {}
        }
        if what < 4 {
            let signal = match what {
                0 | 1 => Signal::SIGKILL,
                2 => Signal::SIGTERM,
                _ => Signal::SIGSTOP,
            };
            if signal == Signal::SIGSTOP {
                self.run_stopped = Some(Instant::now() + Duration::from_millis(random.below(PAUSE)));
            }
            self.again = Instant::now() + Duration::from_millis(random.below(PAUSE));
            let Some(run) = &self.run else { return Ok("pacs run is dead already".to_owned()) };
            // It may have ended by itself in this moment.
            let _ = run.signal(signal);
            return Ok(format!("{signal} to pacs run"));
        }
        let Some(worker) = random.one_of(&workers) else { return Ok("no worker lives".to_owned()) };
        let signal = match what {
            4..7 => Signal::SIGKILL,
            7 => Signal::SIGTERM,
            _ => Signal::SIGSTOP,
        };
        let _ = worker.signal(signal);
        if signal == Signal::SIGSTOP {
            self.stopped.push((worker.clone(), until));
        }
        Ok(format!("{signal} to {}", worker.name))
    }

    /// Continues all that stands still, and waits for the end of the job.
    fn calm(&mut self) -> Result<()> {
        self.stopped.iter_mut().for_each(|(_, until)| *until = Instant::now());
        for until in [&mut self.run_stopped, &mut self.cut, &mut self.full] {
            *until = until.map(|_| Instant::now());
        }
        let began = Instant::now();
        // Also once for a run that has ended meanwhile: workers may stand still that it has not known.
        self.tend()?;
        while !self.done {
            self.tend()?;
            if began.elapsed() > CALM {
                bail!("the run does not end when all faults are over; its logs: {:#?}", self.job.logs()?);
            }
            sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn check(&self, undisturbed: Option<&Job>) -> Result<()> {
        self.job.check_every_step_once(STEPS)?;
        self.job.check_every_sample_once(STEPS, PROMPTS, SAMPLES)?;
        self.job.check_no_panic()?;
        self.job.check_no_half_file()?;
        undisturbed.map_or(Ok(()), |undisturbed| undisturbed.check_same_bits(&self.job, STEPS))?;
        for (name, log) in self.job.logs()? {
            let stranger = log.lines().find(|line| line.contains("was refused: this is run"));
            ensure!(stranger.is_none(), "{name}: {}", stranger.unwrap_or_default());
        }
        // One that was started at the moment of a kill is still about to hear that its name is taken.
        let began = Instant::now();
        while !self.job.workers()?.is_empty() {
            ensure!(began.elapsed() < LEAVE, "workers of a run that is over: {:?}", self.job.workers()?);
            sleep(Duration::from_millis(20));
        }
        let run_id = self.job.run_id()?;
        let left = [PathBuf::from("/dev/shm"), std::env::temp_dir()].into_iter().flat_map(std::fs::read_dir).flatten();
        let left: Vec<_> =
            left.flatten().filter(|entry| entry.file_name().to_string_lossy().contains(&run_id)).collect();
        ensure!(left.is_empty(), "weights of a run that is over: {left:?}");
        Ok(())
    }
}

fn variable(name: &str) -> Result<Option<u64>> {
    let text = std::env::var(name).ok().filter(|text| !text.is_empty());
    text.map(|text| text.parse().with_context(|| format!("read {name}={text}"))).transpose()
}

#[test]
fn runs_survive_chaos() -> Result<()> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros();
    let seed = variable("PACS_CHAOS_SEED")?.unwrap_or(u64::try_from(now)?);
    let told = variable("PACS_CHAOS_SECONDS")?;
    let lasts = Duration::from_secs(told.unwrap_or(SECONDS));
    let modes = if told.is_some() { &MODES[..] } else { &MODES[..2] };
    println!("chaos for {} s with seed {seed}", lasts.as_secs());
    let mut random = Random(seed);
    let state = tempfile::tempdir()?;
    let mut undisturbed = Undisturbed { state: state.path(), runs: BTreeMap::new() };
    let longest_stop = u64::try_from(lasts.as_millis() / 2)?.clamp(1, STOPPED);
    let (mut disturbed, mut rounds, mut attacks) = (Duration::ZERO, 0, 0);
    while disturbed < lasts {
        rounds += 1;
        let chosen = [0, 1].map(|_| random.one_of(modes).copied());
        let chosen: Vec<Mode> = chosen.into_iter().collect::<Option<_>>().context("modes")?;
        println!("{:7.2} s  round {rounds}: {} and {}", disturbed.as_secs_f64(), chosen[0].name, chosen[1].name);
        for (slot, mode) in chosen.iter().enumerate().filter(|(_, mode)| mode.promises_bits()) {
            undisturbed.run(*mode, slot)?;
        }
        let began = Instant::now();
        attacks += disturb(&chosen, &mut undisturbed, &mut random, lasts - disturbed, longest_stop)?;
        disturbed += began.elapsed();
    }
    println!(
        "{attacks} attacks on {rounds} pairs of runs: every step and sample once, and the bits of undisturbed runs"
    );
    Ok(())
}

/// Disturbs two runs until both are done, or for so long; then checks both. How many attacks there were.
fn disturb(
    modes: &[Mode],
    undisturbed: &mut Undisturbed<'_>,
    random: &mut Random,
    lasts: Duration,
    longest_stop: u64,
) -> Result<u64> {
    let began = Instant::now();
    let state = undisturbed.state;
    let jobs = modes.iter().enumerate().map(|(slot, mode)| Victim::new(mode.job(slot, state)?, longest_stop));
    let mut victims: Vec<Victim> = jobs.collect::<Result<_>>()?;
    for victim in &mut victims {
        victim.tend()?;
        // Both have a port of their own before one dies: else the other might take that of the dead one.
        let run = victim.run.as_mut().context("it was started")?;
        run.wait_until("coordinator", |status| status["step"].is_u64())?;
    }
    let (mut next, mut attacks) = (Instant::now(), 0);
    while began.elapsed() < lasts && !victims.iter().all(|victim| victim.done) {
        victims.iter_mut().try_for_each(Victim::tend)?;
        if Instant::now() >= next {
            next = Instant::now() + Duration::from_millis(500 + random.below(PAUSE));
            let chosen = usize::try_from(random.below(2))?;
            let did = victims[chosen].attack(random)?;
            attacks += 1;
            println!(
                "{:7.2} s  {} ({}): {did}",
                began.elapsed().as_secs_f64(),
                ["first", "second"][chosen],
                modes[chosen].name
            );
        }
        sleep(Duration::from_millis(20));
    }
    for (slot, (victim, mode)) in victims.iter_mut().zip(modes).enumerate() {
        victim.calm()?;
        let undisturbed = if mode.promises_bits() { Some(undisturbed.run(*mode, slot)?) } else { None };
        victim.check(undisturbed).with_context(|| format!("audit the {} run", mode.name))?;
    }
    Ok(attacks)
}
