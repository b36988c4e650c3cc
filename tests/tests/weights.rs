//! Distribution of weights to rollout workers: each version crosses a link once, and survives a lost registration.

use std::fs;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use pacs_tests::{Cluster, Host, Job, Worker, hosts};
use serde_json::Value;

const STEPS: u64 = 20;

#[test]
fn a_worker_on_another_host_receives_each_version_once() -> Result<()> {
    let Some(links) = run_on(2, "stream")? else { return Ok(()) };
    // The only rollout worker needs the weights of every step; the final version may not arrive before the end.
    ensure!(links[1].0 >= STEPS as f64, "{links:?}");
    Ok(())
}

#[test]
fn hosts_relay_what_they_receive() -> Result<()> {
    let Some(links) = run_on(4, "stream")? else { return Ok(()) };
    let sent = links[0].1;
    // With a tree the learner sends two copies of a version, without it three. Its other traffic is negligible.
    let most = (2.0 + 0.2) * (STEPS + 1) as f64;
    ensure!(sent <= most, "the learner's host sent {sent:.2} models: {links:?}");
    Ok(())
}

#[test]
fn hosts_that_take_part_in_a_broadcast_cost_the_learner_one_copy() -> Result<()> {
    let Some(links) = run_on(4, "host")? else { return Ok(()) };
    let sent = links[0].1;
    // More than one copy, because hosts that are late for a broadcast fetch instead, as do hosts that start one by one at first.
    let most = 1.6 * (STEPS + 1) as f64;
    ensure!(sent <= most, "the learner's host sent {sent:.2} models: {links:?}");
    Ok(())
}

/// Runs a job with one host per rollout worker and one for all other roles. Returns the traffic in and out of each host, in units
/// of the model's size. Checks that each rollout worker received every version once at most, plus a little.
fn run_on(count: u8, transport: &str) -> Result<Option<Vec<(f64, f64)>>> {
    let Some(hosts) = hosts(count)? else { return Ok(None) };
    let rollouts = i64::from(count) - 1;
    let job = Job::tiny()?.with("batch.steps", STEPS as i64).with("batch.prompts_per_step", 4);
    let job = job.with("rollout.samples_per_prompt", 4).with("checkpoint.every_steps", 0);
    let job = job.with("resources.rollouts", rollouts).with("evaluation.before", false);
    let mut cluster = Cluster::new(job.with("evaluation.after", false))?;
    cluster.set_variable("PACS_WEIGHTS_TRANSPORT", transport);
    let spec = cluster.job.path("job.toml").display().to_string();
    let listen = format!("{}:0", hosts[0].address);
    cluster.start_on(&hosts[0], "coordinator", "pacs", &["coordinator", &spec, "--listen", &listen])?;
    let mut processes = vec!["coordinator".to_owned()];
    for name in ["learner-0", "verifier-0"] {
        cluster.start_worker_on(&hosts[0], name)?;
        processes.push(name.to_owned());
    }
    for (number, host) in hosts[1..].iter().enumerate() {
        let name = format!("rollout-{number}");
        cluster.start_worker_on(host, &name)?;
        processes.push(name);
    }
    for process in processes {
        assert_eq!(cluster.code(&process)?, Some(0), "{}", cluster.said(&process));
        ensure!(!cluster.said(&process).contains("panicked"), "{}", cluster.said(&process));
    }
    cluster.job.check_every_step_once(STEPS)?;
    let model = 4.0 * cluster.job.exported(STEPS)?.len() as f64;
    let models = |host: &Host| host.link_bytes().map(|(came, went)| (came as f64 / model, went as f64 / model));
    let links: Vec<(f64, f64)> = hosts.iter().map(models).collect::<Result<_>>()?;
    println!("models of {model} bytes over each link in {STEPS} steps, in and out: {links:.2?}");
    for (came, _) in &links[1..] {
        // The 5 % allow for prompts and replies to calls.
        ensure!(*came <= 1.05 * (STEPS + 1) as f64, "{links:?}");
    }
    Ok(Some(links))
}

/// Over a link so slow that a version takes seconds, one end is killed in mid-transfer.
#[test]
fn neither_end_of_a_transfer_leaves_half_a_version_when_it_is_killed() -> Result<()> {
    const STEPS: u64 = 8;
    let Some(hosts) = hosts(2)? else { return Ok(()) };
    if let Err(error) = hosts[0].slow_down(400) {
        eprintln!("SKIPPED: no link can be slowed down here: {error:#}");
        return Ok(());
    }
    let job = || -> Result<Job> {
        let job = Job::tiny()?.with("batch.steps", STEPS as i64).with("checkpoint.every_steps", 2);
        let job = job.with("evaluation.before", false).with("evaluation.after", false);
        // The reference kernels give samples the same bits whatever the batch.
        Ok(job.with("rollout.kernels", "reference"))
    };
    let undisturbed = job()?;
    undisturbed.start()?.wait()?.expect_code(0);

    let mut cluster = Cluster::new(job()?)?;
    let spec = cluster.job.path("job.toml").display().to_string();
    let listen = format!("{}:0", hosts[0].address);
    cluster.start_on(&hosts[0], "coordinator", "pacs", &["coordinator", &spec, "--listen", &listen])?;
    cluster.start_worker_on(&hosts[0], "learner-0")?;
    cluster.start_worker_on(&hosts[0], "verifier-0")?;
    cluster.start_worker_on(&hosts[1], "rollout-0")?;
    for victim in ["rollout-0", "learner-0", "rollout-0", "learner-0"] {
        let steps = cluster.steps();
        cluster.wait_for("version on its way", |cluster| {
            cluster.weights_on_host_of("rollout-0").iter().any(|file| file.ends_with(".part"))
        })?;
        cluster.kill_worker(victim)?;
        cluster.wait_for("step after the kill", |cluster| cluster.steps() > steps)?;
        let files = cluster.weights_on_host_of("rollout-0");
        // The version in use, the one before (slower hosts may still fetch it), and the next one.
        let halves = files.iter().filter(|file| file.ends_with(".part")).count();
        ensure!(files.len() <= 3 && halves <= 1, "superseded or half versions are left: {files:?}");
    }
    for process in ["coordinator", "learner-0", "verifier-0", "rollout-0"] {
        assert_eq!(cluster.code(process)?, Some(0), "{}", cluster.said(process));
        ensure!(!cluster.said(process).contains("panicked"), "{}", cluster.said(process));
    }
    cluster.job.check_every_step_once(STEPS)?;
    undisturbed.check_same_weights(&cluster.job, STEPS)
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
    ensure!(log.contains("joining again") && !log.contains("panicked"), "{log}");
    Ok(())
}
