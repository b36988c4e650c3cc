//! Stuck workers: the status names them soon and the watchdog acts. If that does not help, the run ends with a sentence and an
//! exit code that no launcher restarts.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use pacs_tests::{Ended, Job, Run};
use serde_json::Value;

/// More steps than any machine makes before the worker is stopped.
const STEPS: i64 = 1_000_000;
/// Deadline for the status to name a stuck worker.
const NAMED_WITHIN: Duration = Duration::from_secs(30);
/// Deadline of every other wait; longer than all attempts of the watchdog on a busy machine.
const DEADLINE: Duration = Duration::from_secs(240);

/// Makes an endless job whose watchdog has the shortest times that a spec allows.
fn job(max_stalls: i64) -> Result<Job> {
    let job = Job::tiny()?.with("batch.steps", STEPS).with("checkpoint.every_steps", STEPS);
    let job = job.with("evaluation.before", false).with("evaluation.after", false).with("logging.samples", false);
    Ok(job.with("watchdog.stall_seconds", 30).with("watchdog.max_stalls", max_stalls))
}

/// Polls the status until `found` returns true; rarely, because each poll starts a process.
fn look_until(run: &mut Run, what: &str, found: impl Fn(&Value) -> bool) -> Result<Value> {
    let began = Instant::now();
    loop {
        if let Some(status) = run.status()?
            && found(&status)
        {
            return Ok(status);
        }
        ensure!(!run.has_ended()?, "the run ended before {what}");
        ensure!(began.elapsed() < DEADLINE, "no {what} within {} s: {:?}", DEADLINE.as_secs(), run.status()?);
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn step(status: &Value) -> u64 {
    status["step"].as_u64().unwrap_or(0)
}

fn count(status: &Value, counter: &str) -> u64 {
    status["counters"][counter].as_u64().unwrap_or(0)
}

/// Waits until the status reports a stall and what the run waits for.
fn named(run: &mut Run, words: &str) -> Result<Value> {
    look_until(run, "a sentence that names what is stuck", |status| {
        let sentence = status["waiting_for"].as_str().unwrap_or_default();
        sentence.contains(words) && sentence.contains("nothing has happened for")
    })
}

/// Checks that the watchdog ended the run, and that the error names what was stuck.
fn check_end(ended: &Ended, tries: u32, words: &str) {
    ended.expect_code(70);
    let said = format!("{}{}", ended.stdout, ended.stderr);
    let sentence = format!("after {tries} attempts to recover");
    let is_said = said.lines().any(|line| line.contains(&sentence) && line.contains(words));
    assert!(is_said, "`{sentence}` and `{words}` are not in one line of\n{said}");
}

#[test]
fn a_stalled_rollout_worker_is_named_and_ends_the_run() -> Result<()> {
    let job = job(1)?;
    let mut run = job.start()?;
    look_until(&mut run, "a step", |status| step(status) >= 1)?;
    // Stopped, not killed: its supervisor sees a live process and starts no other.
    run.signal_worker("rollout-0", Signal::SIGSTOP)?;
    let stopped = Instant::now();
    let status = named(&mut run, "rollout worker")?;
    assert!(stopped.elapsed() < NAMED_WITHIN, "named after {:?}: {status}", stopped.elapsed());
    look_until(&mut run, "an act of the watchdog", |status| count(status, "stalls") == 1)?;
    check_end(&run.wait()?, 1, "waits for a rollout worker, but none is registered");
    Ok(())
}

#[test]
fn a_stalled_verifier_is_named_and_resumes_where_it_was() -> Result<()> {
    let job = job(100)?;
    let mut run = job.start()?;
    look_until(&mut run, "a step", |status| step(status) >= 1)?;
    let verifier = run.signal_worker("verifier-0", Signal::SIGSTOP)?;
    let stopped = Instant::now();
    let status = named(&mut run, "verifier worker")?;
    assert!(stopped.elapsed() < NAMED_WITHIN, "named after {:?}: {status}", stopped.elapsed());
    let stuck = look_until(&mut run, "an act of the watchdog", |status| count(status, "stalls") >= 1)?;
    verifier.signal(Signal::SIGCONT)?;
    look_until(&mut run, "three more steps", |status| step(status) >= step(&stuck) + 3)?;
    run.signal(Signal::SIGTERM)?;
    run.wait()?.expect_code(75);
    Ok(())
}

#[test]
fn a_verifier_program_that_never_answers_is_restarted_and_then_ends_the_run() -> Result<()> {
    let job = job(2)?;
    // The program takes every task and never answers; its own timeout is longer than the watchdog's.
    let command = job.verifier_script(":")?;
    let job = job.with("verifier.kind", "exec").with("verifier.command", command).without_extraction();
    let job = job.with("verifier.timeout_seconds", 3600.0);
    let mut run = job.start()?;
    let waits = |status: &Value| status["queues"]["samples_verifying"].as_u64() > Some(0);
    look_until(&mut run, "samples at the verifier", waits)?;
    let handed_out = Instant::now();
    let status = named(&mut run, "verifier worker")?;
    assert!(handed_out.elapsed() < NAMED_WITHIN, "named after {:?}: {status}", handed_out.elapsed());
    // Reads a number about the verifier from the status.
    let of_verifier = |status: &Value, key: &str| {
        let workers = status["workers"].as_array().map(Vec::as_slice).unwrap_or_default();
        workers.iter().find(|worker| worker["name"] == "verifier-0").and_then(|worker| worker[key].as_u64())
    };
    assert!(of_verifier(&status, "leases") > Some(0), "{status}");
    let first = of_verifier(&status, "pid");
    // The first stall re-issues the verifier's work, the second restarts the verifier.
    look_until(&mut run, "loans that were ended", |status| count(status, "lapsed_leases") > 0)?;
    look_until(&mut run, "another verifier process", |status| {
        let pid = of_verifier(status, "pid");
        count(status, "stalls") == 2 && pid.is_some() && pid != first
    })?;
    check_end(&run.wait()?, 2, "step 1 waits for 1 verifier worker");
    Ok(())
}
