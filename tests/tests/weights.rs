//! How weights get to rollout workers: over a link once a version, and kept when a registration is lost.

use std::fs;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use pacs_tests::{Cluster, Job, Worker, hosts};
use serde_json::Value;

const STEPS: u64 = 12;

#[test]
fn a_worker_on_another_host_receives_each_version_once() -> Result<()> {
    let Some([near, far]) = hosts()? else { return Ok(()) };
    let job = Job::tiny()?.with("batch.steps", STEPS as i64).with("batch.prompts_per_step", 4);
    let job = job.with("rollout.samples_per_prompt", 4).with("checkpoint.every_steps", 0);
    let mut cluster = Cluster::new(job.with("evaluation.before", false).with("evaluation.after", false))?;
    let spec = cluster.job.path("job.toml").display().to_string();
    let listen = format!("{}:0", near.address);
    cluster.start_on(&near, "coordinator", "pacs", &["coordinator", &spec, "--listen", &listen])?;
    for name in ["learner-0", "verifier-0"] {
        cluster.start_worker_on(&near, name)?;
    }
    cluster.start_worker_on(&far, "rollout-0")?;
    for process in ["coordinator", "learner-0", "verifier-0", "rollout-0"] {
        assert_eq!(cluster.code(process)?, Some(0), "{}", cluster.said(process));
    }
    cluster.job.check_every_step_once(STEPS)?;
    let model = 4.0 * cluster.job.exported(STEPS)?.len() as f64;
    let (received, sent) = far.link_bytes()?;
    // The weights that a run ends with need not be received, those before each step must be.
    let versions = (received as f64 / model, STEPS as f64);
    ensure!(versions.0 >= versions.1, "{received} bytes are less than {STEPS} models of {model} bytes");
    // Tokens, log-probs and text of the samples, and the prompts, are next to nothing here; they are within the five in a hundred.
    let most = 1.05 * (STEPS + 1) as f64 * model;
    let total = (received + sent) as f64;
    ensure!(total <= most, "{received} bytes came and {sent} went for {STEPS} steps of a model of {model} bytes");
    println!("{received} bytes came and {sent} went: {:.2} models in {STEPS} steps", total / model);
    ensure!(!cluster.said("rollout-0").contains("panicked"), "{}", cluster.said("rollout-0"));
    Ok(())
}

fn registrations(log: &str) -> usize {
    log.matches(" joined").count()
}

#[test]
fn a_worker_that_loses_its_registration_joins_again_and_works() -> Result<()> {
    let job = Job::tiny()?.with("batch.steps", 400).with("checkpoint.every_steps", 0);
    let job = job.with("evaluation.before", false).with("evaluation.after", false);
    let mut run = job.start()?;
    run.wait_until("two steps", |status| status["step"].as_u64() >= Some(2))?;
    let worker = run.signal_worker("rollout-0", Signal::SIGSTOP)?;
    let gone = |status: &Value| Worker::of(status, "rollout-0").is_none();
    let stood = run.wait_until("the loss of the worker", gone)?["step"].as_u64().context("a step")?;
    worker.signal(Signal::SIGCONT)?;
    let back = run.wait_until("steps made with the worker that is back", |status| {
        status["step"].as_u64() >= Some(stood + 3) && Worker::of(status, "rollout-0").is_some()
    })?;
    assert_eq!(Worker::of(&back, "rollout-0"), Some(worker), "the process that was stopped works again");
    run.signal(Signal::SIGTERM)?;
    run.wait()?.expect_code(75);
    let log = fs::read_to_string(job.run_path("logs/rollout-0.log"))?;
    ensure!(registrations(&log) == 2 && !log.contains("panicked"), "{log}");
    Ok(())
}
