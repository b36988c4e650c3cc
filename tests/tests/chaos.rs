//! Chaos test: faults at random moments in two runs at once. `pacs run` and workers of every role are killed, stopped for a while
//! or asked to end; a run's network is cut; its disk fills up. Then the audit: every step made once, every sample trained on once,
//! no process, weights or partial file left, and the bits of an undisturbed run in the modes that promise them.
//!
//! Network namespaces and small disks need root. Without it those faults are skipped, and the test says so.
//!
//! A short test is part of the suite; `cargo xtask chaos --minutes 10` makes a long one over all modes. The seed is printed and can
//! be set with `PACS_CHAOS_SEED` (`--seed`). It fixes the choice of faults, not their timing relative to the run.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use pacs_tests::{Host, Job, Run, RunProcess};

/// Duration of the faults without `PACS_CHAOS_SECONDS`.
const SECONDS: u64 = 10;

/// Steps of a job; new jobs are started when both are done.
const STEPS: u64 = 12;

/// Prompts per step and samples per prompt of the tiny job.
const PROMPTS: usize = 8;
const SAMPLES: usize = 8;

/// Deadline for a job to finish after the last fault.
const CALM: Duration = Duration::from_secs(300);

/// Deadline for workers to leave after their run is over.
const LEAVE: Duration = Duration::from_secs(10);

/// Longest pause between two faults in milliseconds, so that a run can make progress in between.
const PAUSE: u64 = 3000;

/// Shortest time from the end of a run to its next start, like the back-off of a supervisor.
const AGAIN: Duration = Duration::from_millis(500);

/// Longest stop of a worker in milliseconds, longer than a coordinator waits for heartbeats. A short test uses half of its
/// duration.
const STOPPED: u64 = 14_000;

/// Size of a run's disk in MiB, several times what a tiny run needs.
const DISK_MEGABYTES: u32 = 96;

/// Most bytes left free on a full disk: room for a few records, or for part of a file.
const LEFT: u64 = 256 << 10;

/// SplitMix64 generator: a few lines, and the same numbers on every machine.
struct Random(u64);

impl Random {
    /// Returns a number below `bound`.
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

/// A configuration of workers and asynchrony in which jobs are disturbed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Mode {
    name: &'static str,
    rollouts: i64,
    learners: i64,
    sharding: &'static str,
    max_lag: i64,
}

/// The short test uses the first two. Modes with `max_lag = 0` promise the bits of an undisturbed run with as many learners.
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
        // Faults change which samples are batched together. The reference kernels give the same bits whatever the batch.
        let job = job.with("rollout.kernels", "reference");
        // The two jobs of a round differ, so that data of one would be noticed in the other.
        Ok(job.with("rollout.max_new_tokens", if slot == 0 { 10 } else { 14 }))
    }

    fn promises_bits(self) -> bool {
        self.max_lag == 0
    }
}

/// Undisturbed runs to compare with, made on first use.
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

/// A run under attack, with the state of its faults.
struct Victim {
    job: Job,
    /// `None` while the run is dead; it is started again at `again`.
    run: Option<Run>,
    again: Instant,
    /// Stopped workers, and when each is continued.
    stopped: Vec<(RunProcess, Instant)>,
    /// When a stopped `pacs run` is continued.
    run_stopped: Option<Instant>,
    /// When a cut network is restored.
    cut: Option<Instant>,
    /// When a full disk is cleared.
    full: Option<Instant>,
    /// Longest stop of a worker, in milliseconds.
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

    /// Ends faults that are due, restarts a dead run that is due, and notes how a run ended.
    fn tend(&mut self) -> Result<()> {
        let now = Instant::now();
        self.stopped.retain(|(worker, until)| {
            let is_due = *until <= now;
            if is_due {
                // Its supervisor may have killed the worker meanwhile.
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
                    // Killed, asked to end, or started on a full disk.
                    None | Some(75) => self.again = self.again.max(now + AGAIN),
                    Some(code) => bail!("the run ended with {code}:\n{}\n{}", ended.stdout, ended.stderr),
                }
            }
            None | Some(false) => {}
        }
        Ok(())
    }

    /// Applies a random fault and describes it for the log.
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
            // Before the run has begun there is no disk to fill.
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
            // The run may have ended at this moment, so a failure is ignored.
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

    /// Ends all faults and waits for the job to finish.
    fn calm(&mut self) -> Result<()> {
        self.stopped.iter_mut().for_each(|(_, until)| *until = Instant::now());
        for until in [&mut self.run_stopped, &mut self.cut, &mut self.full] {
            *until = until.map(|_| Instant::now());
        }
        let began = Instant::now();
        // At least once, also for a finished run: workers that it did not know may still be stopped.
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
        // The victims of a round share the machine, and neither may have met workers of the other.
        for (name, log) in self.job.logs()? {
            let stranger = log.lines().find(|line| line.contains("was refused: this is run"));
            ensure!(stranger.is_none(), "{name}: {}", stranger.unwrap_or_default());
        }
        // A worker started at the moment of a kill has yet to learn that its name is taken.
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
    let survived = survive(state.path(), modes, lasts, &mut random);
    if survived.is_err() {
        // Faults hit at other moments when a seed is repeated, so the logs of this time are the best evidence.
        println!("the run folders are kept in {}", state.keep().display());
    }
    survived
}

/// Attacks pairs of runs below `state`, one pair after the other, for as long as that takes.
fn survive(state: &Path, modes: &[Mode], lasts: Duration, random: &mut Random) -> Result<()> {
    let mut undisturbed = Undisturbed { state, runs: BTreeMap::new() };
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
        attacks += disturb(&chosen, &mut undisturbed, random, lasts - disturbed, longest_stop)?;
        disturbed += began.elapsed();
    }
    println!(
        "{attacks} attacks on {rounds} pairs of runs: every step and sample once, and the bits of undisturbed runs"
    );
    Ok(())
}

/// Attacks two runs until both are done or the time is over, audits both, and returns the number of attacks.
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
        // Wait until both have a port: otherwise one could take the port of the other while that one is dead.
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
