//! Learners that leave. The run continues without one that does not come back, and admits it again when it does. One that
//! announces its leave is released after a checkpoint, and no step is recomputed.

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use pacs_tests::Job;

/// Many steps, so that the stopped learner is back before the last one on a fast machine, too.
const STEPS: i64 = 100;

#[test]
fn a_run_continues_with_the_remaining_ranks_and_grows_again() -> Result<()> {
    let job = Job::tiny()?.with("batch.steps", STEPS).with("checkpoint.every_steps", 2).with("resources.learners", 2);
    let job = job.with("resources.min_learners", 1).with("resources.learner_wait_seconds", 1);
    let job = job.with("resources.sharding", "shard_optimizer");
    let job = job.with("evaluation.before", false).with("evaluation.after", false);
    let mut run = job.start()?;
    let generation = |status: &serde_json::Value| status["generation"].as_u64().unwrap_or(0);
    let ranks = |status: &serde_json::Value| {
        let workers = status["workers"].as_array().map(Vec::as_slice).unwrap_or_default();
        workers.iter().filter(|worker| worker["rank"].as_u64().is_some()).count()
    };
    let started = run.wait_until("three steps", |status| status["step"].as_u64() >= Some(3) && ranks(status) == 2)?;
    // Stopped, not killed: its supervisor sees a live process and starts no other.
    let stopped = run.signal_worker("learner-1", Signal::SIGSTOP)?;
    let alone = run.wait_until("a step of one rank", |status| {
        generation(status) > generation(&started) && ranks(status) == 1 && status["phase"] == "training"
    })?;
    let step = alone["step"].as_u64().context("a step")?;
    stopped.signal(Signal::SIGCONT)?;
    let grown =
        run.wait_until("two ranks again", |status| generation(status) > generation(&alone) && ranks(status) == 2);
    let grown = grown?;
    assert!(grown["step"].as_u64() >= Some(step), "a step was lost: {grown}");
    assert_eq!(grown["counters"]["lost_generations"], 1, "growing is no loss");
    run.wait()?.expect_code(0);

    let steps: Vec<i64> = job.json_lines("metrics.jsonl")?.iter().filter_map(|line| line["step"].as_i64()).collect();
    assert_eq!(steps, (1..=STEPS).collect::<Vec<_>>());
    assert!(job.run_path(&format!("checkpoints/step-{STEPS:06}/model/model.safetensors")).exists());
    Ok(())
}

#[test]
fn a_learner_that_is_asked_to_end_leaves_when_its_step_is_saved() -> Result<()> {
    let job = Job::tiny()?.with("batch.steps", 40).with("checkpoint.every_steps", 40);
    let job = job.with("resources.learners", 2).with("evaluation.before", false).with("evaluation.after", false);
    let mut run = job.start()?;
    let generation = |status: &serde_json::Value| status["generation"].as_u64().unwrap_or(0);
    for asked in 1..=2 {
        let name = "learner-1";
        run.wait_until("some steps", |status| {
            let has_rank = |worker: &serde_json::Value| worker["name"] == name && worker["rank"].as_u64().is_some();
            let workers = status["workers"].as_array().map(Vec::as_slice).unwrap_or_default();
            generation(status) == asked && status["step"].as_u64() >= Some(5 * asked) && workers.iter().any(has_rank)
        })?;
        // An undisturbed run would have ended within the learner's grace of half a minute.
        run.signal_worker(name, Signal::SIGTERM)?;
    }
    let after = run.wait_until("a generation with its successor", |status| generation(status) == 3)?;
    assert_eq!(after["counters"]["lost_generations"].as_u64().unwrap_or(0), 0, "{after}");
    run.wait()?.expect_code(0);
    job.check_every_step_once(40)
}
