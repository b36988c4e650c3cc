//! Whole runs with the real programs on a tiny model: training, several learners, resuming, lost workers, status, studies.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pacs_tests::{Job, TrainedSample};
use serde_json::Value;

fn steps(metrics: &[Value]) -> Vec<u64> {
    metrics.iter().filter_map(|line| line["step"].as_u64()).collect()
}

#[test]
fn a_run_trains_evaluates_archives_and_exports() -> Result<()> {
    let job = Job::tiny()?;
    let ended = job.start()?.wait()?;
    ended.expect_code(0);
    let metrics = job.json_lines("metrics.jsonl")?;
    assert_eq!(steps(&metrics), [1, 2, 3]);
    for line in &metrics {
        let mismatch = line["logprob_mismatch_max"].as_f64().context("a mismatch in every step")?;
        assert!(mismatch < 1e-4, "rollout and learner differ by {mismatch} in float32: {line}");
        assert!(line["entropy"].as_f64().is_some_and(|entropy| entropy > 0.0), "{line}");
    }
    let trained: f64 = metrics.iter().filter_map(|line| line["trained_sequences"].as_f64()).sum();
    assert!(trained > 0.0, "no sample hit its answer by chance: nothing was trained");
    let evaluations = job.json_lines("evaluations.jsonl")?;
    assert_eq!(steps(&evaluations), [0, 3]);
    for file in ["samples/step-000001.parquet", "samples/step-000003.parquet", "samples/eval-000000.parquet"] {
        assert!(job.run_path(file).exists(), "{file} is missing");
    }
    let model = job.run_path("checkpoints/step-000003/model");
    for file in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        assert!(model.join(file).exists(), "the exported model has no {file}");
    }
    assert!(ended.stdout.contains("pass@1"), "{}", ended.stdout);
    Ok(())
}

#[test]
fn more_learners_give_the_same_model() -> Result<()> {
    let export = |learners: i64, sharding: &str| -> Result<Vec<f32>> {
        let job = Job::tiny()?.with("batch.steps", 5).with("evaluation.before", false).with("evaluation.after", false);
        let job = job.with("resources.learners", learners).with("resources.sharding", sharding);
        job.start()?.wait()?.expect_code(0);
        job.exported(5)
    };
    let one = export(1, "replicated")?;
    for (learners, sharding) in [(2, "replicated"), (3, "shard_optimizer"), (2, "shard_all")] {
        let several = export(learners, sharding)?;
        assert_eq!(one.len(), several.len());
        let difference = one.iter().zip(&several).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(difference < 1e-5, "weights of {learners} learners ({sharding}) differ by {difference}");
    }
    Ok(())
}

/// Steps have several units, so that every rank gets some.
#[test]
fn a_deterministic_run_has_the_bits_of_one_learner_with_any_number_of_them() -> Result<()> {
    let export = |learners: i64, sharding: &str, tokens: i64| -> Result<(Vec<u32>, Vec<TrainedSample>)> {
        let job = Job::tiny()?.with("batch.prompts_per_step", 32).with("batch.steps", 2);
        let job = job.with("resources.deterministic", true);
        let job =
            job.with("evaluation.before", false).with("evaluation.after", false).with("rollout.kernels", "reference");
        let job = job.with("batch.micro_batch_tokens", tokens);
        let job = job.with("resources.learners", learners).with("resources.sharding", sharding);
        job.start()?.wait()?.expect_code(0);
        Ok((job.exported(2)?.into_iter().map(f32::to_bits).collect(), job.trained_samples()?))
    };
    let (one, made_of_samples) = export(1, "replicated", 16_384)?;
    assert!(
        made_of_samples.iter().any(|sample| sample.score.is_some_and(|score| score != 0.0)),
        "no score was archived"
    );
    for (learners, sharding, tokens) in [(2, "replicated", 700), (4, "shard_optimizer", 16_384), (2, "shard_all", 100)]
    {
        let (several, samples) = export(learners, sharding, tokens)?;
        assert!(samples == made_of_samples, "{learners} learners ({sharding}, {tokens} tokens): other scores");
        let different = one.iter().zip(&several).filter(|(one, several)| one != several).count();
        assert_eq!((one.len(), different), (several.len(), 0), "{learners} learners ({sharding}, {tokens} tokens)");
    }
    Ok(())
}

#[test]
fn an_interrupted_run_saves_and_resumes() -> Result<()> {
    let job = Job::tiny()?.with("batch.steps", 30);
    // What `pacs runs` shows of runs that are over.
    let ending = || anyhow::Ok(std::fs::read_to_string(job.run_path("ending"))?.trim().to_owned());
    let mut last = 0;
    for signal in [Signal::SIGINT, Signal::SIGUSR1] {
        let mut run = job.start()?;
        run.wait_until("a step", |status| status["step"].as_u64() > Some(last))?;
        run.signal(signal)?;
        run.wait()?.expect_code(75);
        assert_eq!(ending()?, "stopped");
        let done = steps(&job.json_lines("metrics.jsonl")?);
        let before = last;
        last = *done.last().context("a step was done")?;
        assert!((before + 1..30).contains(&last), "steps {done:?}");
        assert!(job.run_path(&format!("checkpoints/step-{last:06}")).exists(), "no checkpoint of step {last}");
    }
    job.start()?.wait()?.expect_code(0);
    assert_eq!(ending()?, "finished");
    assert_eq!(steps(&job.json_lines("metrics.jsonl")?), (1..=30).collect::<Vec<_>>());
    Ok(())
}

fn survives_the_loss_of(worker: &str) -> Result<()> {
    let job = Job::tiny()?.with("batch.steps", 12);
    let mut run = job.start()?;
    run.wait_until("step 2", |status| status["step"].as_u64() >= Some(2))?;
    run.kill_worker(worker)?;
    run.wait()?.expect_code(0);
    assert_eq!(steps(&job.json_lines("metrics.jsonl")?), (1..=12).collect::<Vec<_>>());
    Ok(())
}

#[test]
fn a_killed_rollout_worker_is_replaced() -> Result<()> {
    survives_the_loss_of("rollout-0")
}

#[test]
fn a_killed_verifier_is_replaced() -> Result<()> {
    survives_the_loss_of("verifier-0")
}

#[test]
fn a_killed_learner_is_replaced() -> Result<()> {
    survives_the_loss_of("learner-0")
}

#[test]
fn the_status_names_roles_queues_and_what_is_waited_for() -> Result<()> {
    let job = Job::tiny()?.with("batch.steps", 12);
    let mut run = job.start()?;
    let status = run.wait_until("step 1", |status| status["step"].as_u64() >= Some(1))?;
    let names: Vec<&str> =
        status["workers"].as_array().context("workers")?.iter().filter_map(|worker| worker["name"].as_str()).collect();
    for name in ["rollout-0", "verifier-0", "learner-0"] {
        assert!(names.contains(&name), "{names:?}");
    }
    assert!(status["queues"].is_object() && status["phase"].is_string() && status["metrics"].is_object(), "{status}");
    run.wait()?.expect_code(0);
    Ok(())
}

/// An interrupted study keeps finished runs, resumes the others, and reports on all of them.
#[test]
fn a_study_resumes_and_reports() -> Result<()> {
    let job = Job::tiny()?.with("checkpoint.every_steps", 0);
    job.write_spec()?;
    let file = job.path("study.toml");
    let study = "name = 'small'\nseeds = [1, 2]\nreference = 'pacs'\ntasks.tiny.job = 'job.toml'\nkeep = 'models'\n\
                 [methods.pacs]\n[methods.grpo]\nset = { 'objective.kind' = 'grpo' }\n";
    std::fs::write(&file, study)?;
    let out = job.path("out");
    let record = |id: &str| out.join(format!("data/tiny/{id}.json"));
    let command = |what: &str| -> Result<Command> {
        let mut command = job.command("pacs")?;
        command.args(["study", what]).arg(&file).arg("--out").arg(&out);
        Ok(command)
    };

    let mut first = command("run")?.args(["--parallel", "1"]).stdout(Stdio::null()).spawn()?;
    let deadline = Instant::now() + Duration::from_secs(300);
    while !record("grpo/seed-1").exists() {
        ensure!(Instant::now() < deadline && first.try_wait()?.is_none(), "no run was finished");
        std::thread::sleep(Duration::from_millis(50));
    }
    kill(Pid::from_raw(i32::try_from(first.id())?), Signal::SIGTERM)?;
    assert_eq!(first.wait()?.code(), Some(75));
    let kept = std::fs::read(record("grpo/seed-1"))?;
    assert!(!record("pacs/seed-2").exists(), "the last of four runs was finished after the first");

    let output = command("run")?.args(["--parallel", "2"]).output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(said.contains("4 of 4 runs finished"), "{said}");
    assert_eq!(std::fs::read(record("grpo/seed-1"))?, kept, "what is finished is not made again");
    assert!(
        out.join("models/tiny/pacs/seed-2/model.safetensors").exists() && !out.join("runs/tiny/pacs/seed-2").exists()
    );
    let report = std::fs::read_to_string(out.join("report.md"))?;
    for part in ["4 of 4 runs are finished", "| grpo", "minus pacs", "plots/tiny-pass-at-1.svg"] {
        assert!(report.contains(part), "{part} is missing: {report}");
    }
    // The report must be reproducible from the kept numbers alone.
    std::fs::remove_file(out.join("report.md"))?;
    assert!(command("report")?.status()?.success());
    assert_eq!(std::fs::read_to_string(out.join("report.md"))?, report);

    let changed = study.replace("[methods.pacs]\n", "[methods.pacs]\nset = { 'objective.beta' = 2.0 }\n");
    std::fs::write(&file, changed)?;
    let refused = command("report")?.output()?;
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(78), "{said}");
    assert!(said.contains("differs from the study's in objective.beta"), "{said}");
    Ok(())
}
