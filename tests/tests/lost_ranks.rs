//! Learner ranks are killed or stopped at many points of a step: the run ends with the weights of an undisturbed one.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use pacs_tests::{Job, Worker};
use serde_json::Value;

/// Many more steps than faults, because polling may miss a short phase, which is then awaited in the next step.
const STEPS: u64 = 40;
/// Steps after which a phase that polling keeps missing is skipped, and the fault strikes in any phase.
const STEPS_TO_MEET: u64 = 4;

fn job() -> Result<Job> {
    let job =
        Job::tiny()?.with("batch.steps", STEPS as i64).with("checkpoint.every_steps", 1).with("resources.learners", 2);
    Ok(job.with("evaluation.before", false).with("evaluation.after", false))
}

fn lost_generations(status: &Value) -> u64 {
    status["counters"]["lost_generations"].as_u64().unwrap_or(0)
}

/// A fault: after which step, in which phase, which rank dies, and how many milliseconds into the phase.
type Fault = (u64, &'static str, u32, u64);

#[test]
fn a_rank_that_dies_at_any_time_does_not_change_the_weights() -> Result<()> {
    survives(
        "replicated",
        &[
            // A checkpoint is written in the background meanwhile: ranks die with its state captured, half written, or synced.
            (1, "saving", 0, 0),
            (2, "sampling", 1, 0),
            (3, "training", 0, 0),
            (4, "training", 1, 0),
            (5, "training", 0, 30),
            (6, "training", 1, 60),
            (7, "committing", 1, 0),
            (7, "preparing", 1, 0),
        ],
    )
}

#[test]
fn a_rank_that_dies_while_writing_a_checkpoint_harms_no_other_state() -> Result<()> {
    // The checkpoint of the step before is written in the background meanwhile, and either rank has written part of it.
    let faults = [(1, "sampling", 0, 0), (2, "sampling", 1, 3), (3, "saving", 0, 0), (4, "training", 1, 10)];
    for sharding in ["shard_optimizer", "shard_all"] {
        survives(sharding, &faults)?;
    }
    Ok(())
}

fn survives(sharding: &str, faults: &[Fault]) -> Result<()> {
    let job = || Ok::<_, anyhow::Error>(job()?.with("resources.sharding", sharding));
    let undisturbed = job()?;
    undisturbed.start()?.wait()?.expect_code(0);

    let disturbed = job()?;
    let mut run = disturbed.start()?;
    let mut killed = Vec::new();
    for (lost, (step, phase, rank, delay)) in (0..).zip(faults.iter().copied()) {
        let name = format!("learner-{rank}");
        // The status may still list a rank that just died, and a zombie accepts signals, so skip the ones already killed.
        let alive = |status: &Value| Worker::of(status, &name).filter(|worker| !killed.contains(worker));
        let status = run.wait_until(&format!("{phase} of {name} after step {step}"), |status| {
            let (made, now) = (status["step"].as_u64().unwrap_or(0), status["phase"].as_str());
            let at = made >= step && lost_generations(status) >= lost;
            // While a generation is assembling there is none to lose.
            let met = now == Some(phase) || (made >= step + STEPS_TO_MEET && now != Some("assembling"));
            at && met && alive(status).is_some()
        })?;
        // Not a wait for anything: this chooses the moment within the phase.
        std::thread::sleep(Duration::from_millis(delay));
        let worker = alive(&status).context("the worker was there")?;
        worker.signal(Signal::SIGKILL)?;
        killed.push(worker);
        run.wait_until("the loss of the generation", |status| lost_generations(status) > lost)?;
    }
    run.wait()?.expect_code(0);

    disturbed.check_every_step_once(STEPS)?;
    undisturbed.check_same_weights(&disturbed, STEPS)
}

/// Two failures of one step start the search for a group at fault. It finds nobody, so every batch has to be what it would
/// have been.
#[test]
fn a_learner_that_dies_twice_in_a_step_changes_no_weights() -> Result<()> {
    const MOST_KILLS: usize = 20;
    let job = || -> Result<Job> {
        let job = job()?.with("resources.learners", 1).with("checkpoint.every_steps", 5);
        // Trials change which samples are generated together. The reference kernels give the same bits whatever the batch.
        Ok(job.with("rollout.kernels", "reference"))
    };
    let undisturbed = job()?;
    undisturbed.start()?.wait()?.expect_code(0);

    let disturbed = job()?;
    let mut run = disturbed.start()?;
    let mut killed: Vec<Worker> = Vec::new();
    // Not a step after a checkpoint: undoing others with it would be easy to overlook.
    let mut target = 7;
    // There are no logs yet when the run has just been started.
    let searches =
        |job: &Job| job.logs().is_ok_and(|logs| logs.values().any(|log| log.contains("training fails by one of")));
    while !searches(&disturbed) {
        ensure!(killed.len() < MOST_KILLS, "{MOST_KILLS} kills and no search: {:#?}", disturbed.logs()?);
        let alive = |status: &Value| Worker::of(status, "learner-0").filter(|worker| !killed.contains(worker));
        let status = run.wait_until("a step in training", |status| {
            let has_come = status["step"].as_u64() >= Some(target) && lost_generations(status) >= killed.len() as u64;
            has_come && status["phase"] == "training" && alive(status).is_some()
        })?;
        // A training step that polling has missed is left alone: the same one has to fail twice.
        target = status["step"].as_u64().context("a step")?;
        let worker = alive(&status).context("the worker was there")?;
        worker.signal(Signal::SIGKILL)?;
        killed.push(worker);
        run.wait_until("the loss of the generation", |status| lost_generations(status) >= killed.len() as u64)?;
    }
    run.wait()?.expect_code(0);

    disturbed.check_every_step_once(STEPS)?;
    undisturbed.check_same_weights(&disturbed, STEPS)
}

#[test]
fn a_suspended_rank_is_excluded_and_refused_when_it_returns() -> Result<()> {
    let undisturbed = job()?;
    undisturbed.start()?.wait()?.expect_code(0);

    let disturbed = job()?;
    let mut run = disturbed.start()?;
    run.wait_until("training", |status| status["step"].as_u64() >= Some(2) && status["phase"] == "training")?;
    let stopped = run.signal_worker("learner-1", Signal::SIGSTOP)?;
    // The stopped rank misses heartbeats, and the other rank learns of it in the middle of its step.
    run.wait_until("the loss", |status| lost_generations(status) >= 1)?;
    run.wait_until("the other rank to wait for a group", |status| {
        let workers = status["workers"].as_array().map(Vec::as_slice).unwrap_or_default();
        let other = workers.iter().find(|worker| worker["name"] == "learner-0");
        other.is_some_and(|worker| worker["activity"].as_str() == Some("waiting for the learner group"))
    })?;
    stopped.signal(Signal::SIGCONT)?;
    run.wait()?.expect_code(0);
    disturbed.check_every_step_once(STEPS)?;
    undisturbed.check_same_weights(&disturbed, STEPS)
}
