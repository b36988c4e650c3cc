//! A storm of signals on two runs at once: `pacs run` and the workers of every role are killed, stopped for a while, and asked to
//! end, at random moments. In the end both runs must have the weights of undisturbed ones.
//!
//! A short one is part of the tests; `cargo xtask storm --minutes 10` makes a long one. The seed is printed, and
//! `PACS_STORM_SEED` (`--seed`) takes it; it decides what is done, not what the machine is doing at that moment.

use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use pacs_tests::{Job, Run, RunProcess};

/// How long the storm lasts when `PACS_STORM_SECONDS` does not say.
const SECONDS: u64 = 10;

/// Steps of a job. The storm starts new jobs when it has outlived these.
const STEPS: u64 = 12;

/// Longest that a job may still take when the storm is over.
const CALM: Duration = Duration::from_secs(300);

/// Longest that a worker may still live when its run is over.
const LEAVE: Duration = Duration::from_secs(10);

/// Longest pause between two attacks, in milliseconds: a run must come to something in between.
const PAUSE: u64 = 3000;

/// Longest that a worker stands still, in milliseconds: longer than a coordinator waits for heartbeats. In a short storm it is
/// half of its length.
const STOPPED: u64 = 14_000;

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

fn job(name: &str, state: &Path) -> Result<Job> {
    let steps = i64::try_from(STEPS)?;
    let job = Job::tiny()?.named(name).listed_in(state).with("batch.steps", steps).with("checkpoint.every_steps", 5);
    // Samples are then the same to the last bit, whatever company they had: disturbed runs batch others together.
    let job = job.with("rollout.kernels", "reference");
    // Jobs that differ: what one makes must not come into the other.
    let job = job.with("rollout.max_new_tokens", if name == "first" { 10 } else { 14 });
    Ok(job.with("evaluation.before", false).with("evaluation.after", false))
}

/// A run in the storm.
struct Victim {
    job: Job,
    /// None: it is dead, and is started again after that moment.
    run: Option<Run>,
    again: Instant,
    /// Workers that stand still until then.
    stopped: Vec<(RunProcess, Instant)>,
    /// The same of `pacs run` itself.
    run_stopped: Option<Instant>,
    /// Longest that a worker stands still, in milliseconds.
    longest_stop: u64,
    done: bool,
}

impl Victim {
    fn new(name: &str, state: &Path, longest_stop: u64) -> Result<Self> {
        let (job, again, stopped) = (job(name, state)?, Instant::now(), Vec::new());
        Ok(Self { job, run: None, again, stopped, run_stopped: None, longest_stop, done: false })
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
        let has_ended = self.run.as_mut().map(|run| run.has_ended()).transpose()?;
        match has_ended {
            None if !self.done && self.again <= now => self.run = Some(self.job.start_at_any_port()?),
            Some(true) => {
                let ended = self.run.take().context("it was there")?.wait()?;
                match ended.code {
                    Some(0) => self.done = true,
                    // Killed, or asked to end.
                    None | Some(75) => {}
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
        let what = random.below(10);
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
            let until = Instant::now() + Duration::from_millis(random.below(self.longest_stop));
            self.stopped.push((worker.clone(), until));
        }
        Ok(format!("{signal} to {}", worker.name))
    }

    /// Continues all that stands still, and waits for the end of the job.
    fn calm(&mut self) -> Result<()> {
        self.stopped.iter_mut().for_each(|(_, until)| *until = Instant::now());
        self.run_stopped = self.run_stopped.map(|_| Instant::now());
        let began = Instant::now();
        // Also once for a run that has ended in the storm: workers may stand still that it has not known.
        self.tend()?;
        while !self.done {
            self.tend()?;
            if began.elapsed() > CALM {
                bail!("the run does not end after the storm; its logs: {:#?}", self.job.logs()?);
            }
            sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn check(&self, undisturbed: &Job) -> Result<()> {
        self.job.check_every_step_once(STEPS)?;
        self.job.check_no_panic()?;
        undisturbed.check_same_weights(&self.job, STEPS)?;
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
        Ok(())
    }
}

fn variable(name: &str) -> Result<Option<u64>> {
    let text = std::env::var(name).ok().filter(|text| !text.is_empty());
    text.map(|text| text.parse().with_context(|| format!("read {name}={text}"))).transpose()
}

#[test]
fn runs_survive_a_storm_of_signals() -> Result<()> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros();
    let seed = variable("PACS_STORM_SEED")?.unwrap_or(u64::try_from(now)?);
    let lasts = Duration::from_secs(variable("PACS_STORM_SECONDS")?.unwrap_or(SECONDS));
    println!("storm of {} s with seed {seed}", lasts.as_secs());
    let mut random = Random(seed);

    let state = tempfile::tempdir()?;
    let names = ["first", "second"];
    let undisturbed: Vec<Job> = names.map(|name| job(name, state.path())).into_iter().collect::<Result<_>>()?;
    let runs: Vec<Run> = undisturbed.iter().map(Job::start).collect::<Result<_>>()?;
    for run in runs {
        run.wait()?.expect_code(0);
    }

    let began = Instant::now();
    let longest_stop = u64::try_from(lasts.as_millis() / 2)?.clamp(1, STOPPED);
    let (mut rounds, mut attacks) = (0, 0);
    while began.elapsed() < lasts {
        rounds += 1;
        let mut victims: Vec<Victim> =
            names.map(|name| Victim::new(name, state.path(), longest_stop)).into_iter().collect::<Result<_>>()?;
        for victim in &mut victims {
            victim.tend()?;
            // Both have a port of their own before one dies: else the other might take that of the dead one.
            let run = victim.run.as_mut().context("it was started")?;
            run.wait_until("coordinator", |status| status["step"].is_u64())?;
        }
        let mut next = Instant::now();
        while began.elapsed() < lasts && !victims.iter().all(|victim| victim.done) {
            victims.iter_mut().try_for_each(Victim::tend)?;
            if Instant::now() >= next {
                next = Instant::now() + Duration::from_millis(500 + random.below(PAUSE));
                let chosen = usize::try_from(random.below(2))?;
                let did = victims[chosen].attack(&mut random)?;
                attacks += 1;
                println!("{:7.2} s  {}: {did}", began.elapsed().as_secs_f64(), names[chosen]);
            }
            sleep(Duration::from_millis(20));
        }
        for (victim, undisturbed) in victims.iter_mut().zip(&undisturbed) {
            victim.calm()?;
            victim.check(undisturbed)?;
        }
    }
    println!("{attacks} attacks on {rounds} pairs of runs; each ended with the weights of an undisturbed one");
    Ok(())
}
