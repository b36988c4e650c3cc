//! Two different jobs run on one machine with the default port, and each is killed and restarted by the same command.
//!
//! `PACS_KILLS=10 cargo test --release -p pacs-tests --test two_runs -- --nocapture` is the long version.

use std::path::Path;
use std::thread;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use pacs_tests::{Job, Run};

/// Kills of each run without `PACS_KILLS`.
const KILLS: u64 = 3;

/// Steps between two kills.
const STEPS: u64 = 4;

fn job(name: &str, seed: i64, steps: u64, state: &Path) -> Result<Job> {
    let job = Job::tiny()?.named(name).listed_in(state).with("batch.steps", i64::try_from(steps)?);
    let job = job.with("checkpoint.every_steps", 5).with("optimizer.learning_rate", 1e-5);
    let job = job.with("rollout.max_new_tokens", 8 + seed);
    Ok(job.with("evaluation.before", false).with("evaluation.after", false))
}

/// Kills and restarts the run `kills` times, lets it finish, and returns the address it listened on each time.
fn storm(job: &Job, mut run: Run, kills: u64) -> Result<Vec<String>> {
    let mut addresses = Vec::new();
    for kill in 0..kills {
        let step = STEPS * kill + 1;
        run.wait_until(&format!("step {step}"), |status| status["step"].as_u64() >= Some(step))?;
        addresses.push(address(job)?);
        run.signal(Signal::SIGKILL)?;
        run.wait()?;
        run = job.start_at_any_port()?;
    }
    let ended = run.wait()?;
    ensure!(ended.code == Some(0), "it ended with {:?}:\n{}\n{}", ended.code, ended.stdout, ended.stderr);
    addresses.push(address(job)?);
    Ok(addresses)
}

fn address(job: &Job) -> Result<String> {
    let record: serde_json::Value = serde_json::from_slice(&std::fs::read(job.run_path("coordinator.json"))?)?;
    Ok(record["address"].as_str().context("an address")?.to_owned())
}

#[test]
fn two_jobs_at_once_are_killed_and_both_end_well() -> Result<()> {
    let kills = std::env::var("PACS_KILLS").ok().map_or(Ok(KILLS), |kills| kills.parse())?;
    let steps = STEPS * kills + 2;
    let state = tempfile::tempdir()?;
    let jobs = [job("first", 1, steps, state.path())?, job("second", 2, steps, state.path())?];
    let mut runs = Vec::new();
    for job in &jobs {
        let mut run = job.start_at_any_port()?;
        // Wait until both have a port: otherwise one could take the port of the other while that one is dead.
        run.wait_until("coordinator", |status| status["step"].is_u64())?;
        runs.push(run);
    }
    let addresses: Vec<Vec<String>> = thread::scope(|scope| {
        let pairs = jobs.iter().zip(runs);
        let threads: Vec<_> = pairs.map(|(job, run)| scope.spawn(move || storm(job, run, kills))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a test that panics fails")).collect::<Result<_>>()
    })?;
    println!("each was killed {kills} times; they listened at {addresses:?}");
    ensure!(
        !addresses[0].iter().any(|address| addresses[1].contains(address)),
        "they shared an address: {addresses:?}"
    );
    for job in &jobs {
        job.check_every_step_once(steps)?;
        job.check_no_panic()?;
        for (name, log) in job.logs()? {
            let stranger =
                log.lines().find(|line| line.contains("was refused: this is run") || line.contains("was replaced"));
            ensure!(stranger.is_none(), "{name}: {}", stranger.unwrap_or_default());
        }
        ensure!(job.workers()?.is_empty(), "workers of a run that is over: {:?}", job.workers()?);
    }
    Ok(())
}
