//! `pacs run` is killed repeatedly and started by the same command. It resumes from its journal, makes every step once, and ends
//! with the weights of an undisturbed run; so does a run whose folder was copied elsewhere.

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use pacs_tests::{Job, Run};

/// Enough steps that a machine ten times faster is still running when the last fault comes.
const STEPS: u64 = 24;
/// The same for adapters; checkpoints are made after every fifth step.
const ADAPTER_STEPS: u64 = 12;
const WORKERS: [&str; 3] = ["rollout-0", "verifier-0", "learner-0"];

fn job(max_lag: i64) -> Result<Job> {
    let job = Job::tiny()?.with("batch.steps", STEPS as i64).with("checkpoint.every_steps", 5);
    let job = job.with("evaluation.before", false).with("evaluation.after", false);
    Ok(job.with("asynchrony.max_lag", max_lag))
}

/// Kills the process with SIGKILL once at least `step` steps are done, in the given phase if possible.
fn kill_after(mut run: Run, step: u64, phase: Option<&str>) -> Result<()> {
    run.wait_until(&format!("step {step}"), |status| {
        let is_there = status["step"].as_u64() >= Some(step);
        // Polling may miss a short phase; then wait for it in a later step, three steps at most.
        is_there && (status["step"].as_u64() >= Some(step + 3) || phase.is_none_or(|phase| status["phase"] == phase))
    })?;
    run.signal(Signal::SIGKILL)?;
    let ended = run.wait()?;
    ensure!(ended.code.is_none(), "a signal was to end it, but it ended with {:?}", ended.code);
    Ok(())
}

#[test]
fn a_killed_run_resumes_from_its_journal_also_in_another_place() -> Result<()> {
    // With a curriculum the history of problems must survive the kills, too: other draws would end in other weights.
    let job = || Ok::<_, anyhow::Error>(job(0)?.with("data.difficulty_floor", 0.2).with("data.retire_after", 3));
    let undisturbed = job()?;
    undisturbed.start()?.wait()?.expect_code(0);
    let metrics = undisturbed.json_lines("metrics.jsonl")?;
    ensure!(metrics.iter().any(|line| line["skipped_draws"].as_u64() > Some(0)), "no draw was skipped: {metrics:?}");

    let mut disturbed = job()?;
    let mut run = disturbed.start()?;
    run.wait_until("step 2", |status| status["step"].as_u64() >= Some(2))?;
    // Lose the whole machine before the first checkpoint: kill the workers, too. The folder is copied elsewhere.
    let workers = WORKERS.map(|name| run.signal_worker(name, Signal::SIGCONT));
    run.signal(Signal::SIGKILL)?;
    for worker in workers {
        worker?.signal(Signal::SIGKILL)?;
    }
    run.wait()?;
    disturbed.move_run("elsewhere")?;
    for (step, phase) in [(1, None), (3, Some("sampling")), (7, Some("training"))] {
        kill_after(disturbed.start()?, step, phase)?;
    }
    let ended = disturbed.start()?.wait()?;
    ended.expect_code(0);
    assert!(ended.stdout.contains("from the journal"), "{}", ended.stdout);
    disturbed.check_every_step_once(STEPS)?;
    undisturbed.check_same_weights(&disturbed, STEPS)
}

#[test]
fn an_asynchronous_run_resumes_too() -> Result<()> {
    let job = job(1)?;
    for (step, phase) in [(1, Some("training")), (4, None)] {
        kill_after(job.start()?, step, phase)?;
    }
    job.start()?.wait()?.expect_code(0);
    job.check_every_step_once(STEPS)
}

/// Makes an evaluation that takes some seconds: forty problems, and a set with its own answer limit and temperature.
fn evaluation() -> Result<Job> {
    let job = Job::tiny()?.with("evaluation.samples_per_problem", 4).with("rollout.max_new_tokens", 24);
    let problems = job.path("problems.jsonl").display().to_string();
    let all = toml::Table::from_iter([("path".to_owned(), toml::Value::from(problems.clone()))]);
    let hot = [
        ("path", toml::Value::from(problems)),
        ("limit", 20.into()),
        ("temperature", 5.0.into()),
        ("top_p", 0.9.into()),
        ("max_new_tokens", 12.into()),
        ("samples_per_problem", 4.into()),
    ];
    let hot: toml::Table = hot.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    let sets = toml::Table::from_iter([("hot".to_owned(), toml::Value::Table(hot))]);
    // With the reference kernels a sample does not depend on its batch, to the last bit.
    let job = job.with("rollout.kernels", "reference").with("data.evaluation", toml::Value::Table(all));
    Ok(job.with("evaluation.sets", toml::Value::Table(sets)))
}

#[test]
fn an_evaluation_whose_processes_are_all_killed_keeps_its_samples_and_result() -> Result<()> {
    const SAMPLES: usize = 40 * 4 + 20 * 4;
    let undisturbed = evaluation()?;
    let ended = undisturbed.start_evaluation(&[])?.wait()?;
    ended.expect_code(0);
    assert!(ended.stdout.contains("## hot") && ended.stdout.contains("pass@k"), "{}", ended.stdout);

    let disturbed = evaluation()?;
    for groups in [5, 20] {
        let mut run = disturbed.start_evaluation(&[])?;
        run.wait_until(&format!("{groups} groups"), |status| {
            status["queues"]["groups_complete"].as_u64() >= Some(groups)
        })?;
        let workers = ["rollout-0", "verifier-0"].map(|name| run.signal_worker(name, Signal::SIGCONT));
        run.signal(Signal::SIGKILL)?;
        for worker in workers {
            worker?.signal(Signal::SIGKILL)?;
        }
        ensure!(run.wait()?.code.is_none(), "it was not killed");
    }
    // A graceful end keeps the samples, too.
    let mut run = disturbed.start_evaluation(&["--json"])?;
    run.wait_until("30 groups", |status| status["queues"]["groups_complete"].as_u64() >= Some(30))?;
    run.signal(Signal::SIGTERM)?;
    run.wait()?.expect_code(75);
    let ended = disturbed.start_evaluation(&[])?.wait()?;
    ended.expect_code(0);
    assert!(ended.stdout.contains("from the journal"), "{}", ended.stdout);

    let problems = |job: &Job| std::fs::read_to_string(job.run_path("evaluation_problems.jsonl"));
    assert_eq!(problems(&undisturbed)?, problems(&disturbed)?, "the same bits");
    let mut seen = std::collections::BTreeSet::new();
    let samples = disturbed.samples()?;
    ensure!(samples.len() == SAMPLES, "{} samples in place of {SAMPLES}", samples.len());
    for sample in samples {
        ensure!(seen.insert((sample.group, sample.sample)), "a sample is there twice: {sample:?}");
    }
    for file in ["report.md", "report.json", "pass_at_k.svg"] {
        ensure!(disturbed.run_path(file).exists(), "{file} is missing");
    }
    // The evaluation is finished, so the command prints the report and starts nothing.
    let again = disturbed.start_evaluation(&["--json"])?.wait()?;
    again.expect_code(0);
    let report: serde_json::Value = serde_json::from_str(&again.stdout)?;
    ensure!(report["sets"].as_array().is_some_and(|sets| sets.len() == 2), "{report}");
    ensure!(report["sets"][1]["settings"]["top_p"] == 0.9, "{report}");
    let other = disturbed.start_evaluation(&["--samples", "3"])?.wait()?;
    other.expect_code(78);
    assert!(other.stderr.contains("holds an evaluation of something else"), "{}", other.stderr);
    Ok(())
}

/// Adapters are all that is published, saved and restored; the base is read from the model's folder by every process.
#[test]
fn a_run_of_adapters_that_is_killed_ends_with_the_same_bits() -> Result<()> {
    let job = || -> Result<Job> {
        let lora = toml::Table::from_iter([("rank".to_owned(), toml::Value::from(4))]);
        // Reproducible kernels take their time, so that few steps suffice.
        let job = job(0)?.with("batch.steps", ADAPTER_STEPS as i64).with("model.lora", lora);
        let job = job.with("optimizer.learning_rate", 1e-2);
        Ok(job.with("resources.deterministic", true).with("rollout.kernels", "reference"))
    };
    let undisturbed = job()?;
    undisturbed.start()?.wait()?.expect_code(0);
    let disturbed = job()?;
    for (step, phase) in [(2, Some("training")), (6, Some("sampling"))] {
        kill_after(disturbed.start()?, step, phase)?;
    }
    disturbed.start()?.wait()?.expect_code(0);
    disturbed.check_every_step_once(ADAPTER_STEPS)?;
    undisturbed.check_same_bits(&disturbed, ADAPTER_STEPS)
}
