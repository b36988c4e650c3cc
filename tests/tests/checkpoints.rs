//! Checkpoints under faults: a full disk, a damaged file, a changed spec, another number of ranks.

use std::fs;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use pacs_tests::Job;

/// File-size limit that the tiny model's weights fit, and its training state of three times the size does not.
const FULL_AT: u64 = 1_000_000;

fn steps(job: &Job) -> Result<Vec<u64>> {
    Ok(job.json_lines("metrics.jsonl")?.iter().filter_map(|line| line["step"].as_u64()).collect())
}

fn job(steps: i64) -> Result<Job> {
    let job = Job::tiny()?.with("checkpoint.every_steps", 1).with("batch.steps", steps);
    Ok(job.with("evaluation.before", false).with("evaluation.after", false))
}

#[test]
fn a_full_disk_loses_nothing_and_is_reported() -> Result<()> {
    let job = job(2)?;
    job.start()?.wait()?.expect_code(0);
    let state = job.run_path("checkpoints/step-000002/training-state.safetensors");
    let before = fs::read(&state).context("read the checkpoint")?;
    assert!(before.len() as u64 > FULL_AT, "the training state has {} bytes", before.len());

    let job = job.with("batch.steps", 4);
    let ended = job.start_with_full_disk(FULL_AT)?.wait()?;
    assert!(![Some(0), Some(2)].contains(&ended.code), "the last checkpoint could not be written: {ended:?}");
    let said = format!("{}{}", ended.stdout, ended.stderr);
    for words in ["the checkpoint of step 3 could not be saved, the run continues without it", "File too large"] {
        assert!(said.contains(words), "`{words}` is not in\n{said}");
    }
    // The journal is on the same disk, so either failure may come first.
    let ends = ["the checkpoint of step 4 could not be saved", "the journal cannot be written"];
    assert!(ends.iter().any(|words| said.contains(words)), "{said}");
    assert!(fs::read(&state)? == before, "the old checkpoint is as it was");

    job.start()?.wait()?.expect_code(0);
    assert_eq!(steps(&job)?, [1, 2, 3, 4]);
    assert!(job.run_path("checkpoints/step-000004/model/model.safetensors").exists());
    Ok(())
}

#[test]
fn a_run_waits_for_room_on_a_full_disk_and_resumes_by_itself() -> Result<()> {
    const STEPS: u64 = 40;
    let job = job(STEPS as i64)?.on_small_disk(64)?;
    let mut run = job.start()?;
    run.wait_until("a step", |status| status["step"].as_u64() >= Some(1))?;
    if !job.fill_disk(0)? {
        return Ok(());
    }
    let waits = |status: &serde_json::Value| {
        status["waiting_for"].as_str().is_some_and(|sentence| sentence.starts_with("waits for room on the disk of"))
    };
    let status = run.wait_until("that the disk is full", waits)?;
    let sentence = status["waiting_for"].as_str().unwrap_or_default();
    let run_dir = job.run_path("").display().to_string();
    for words in [run_dir.trim_end_matches('/'), "it does not take", "are free"] {
        assert!(sentence.contains(words), "`{words}` is not in `{sentence}`");
    }
    job.clear_disk()?;
    let ended = run.wait()?;
    ended.expect_code(0);
    assert!(ended.stdout.contains("there is room on the disk again"), "{}", ended.stdout);
    job.check_every_step_once(STEPS)?;
    job.check_no_panic()?;
    job.check_no_half_file()
}

#[test]
fn a_journal_that_a_full_disk_does_not_let_open_waits_for_the_next_start() -> Result<()> {
    const STEPS: u64 = 12;
    let job = job(STEPS as i64)?.with("checkpoint.every_steps", STEPS as i64);
    let mut run = job.start()?;
    run.wait_until("a step", |status| status["step"].as_u64() >= Some(1))?;
    run.signal(Signal::SIGKILL)?;
    run.wait()?;

    // Too little for another page of the journal's database.
    let ended = job.start_with_full_disk(4096)?.wait()?;
    ended.expect_code(75);
    assert!(ended.stderr.contains("journal"), "{ended:?}");
    assert!(!job.run_path("journal-aside").exists(), "a journal that is whole was set aside");

    let ended = job.start()?.wait()?;
    ended.expect_code(0);
    assert!(ended.stdout.contains("from the journal"), "{}", ended.stdout);
    job.check_every_step_once(STEPS)
}

#[test]
fn an_impossible_journal_is_not_retried() -> Result<()> {
    let job = job(2)?;
    fs::create_dir(job.run_path(""))?;
    fs::write(job.run_path("journal"), "a file in the place of a folder")?;
    let ended = job.start()?.wait()?;
    ended.expect_code(78);
    assert!(ended.stderr.contains("journal"), "{ended:?}");
    Ok(())
}

#[test]
fn a_damaged_checkpoint_is_named_and_the_one_before_it_used_with_more_ranks() -> Result<()> {
    let job = job(3)?;
    job.start()?.wait()?.expect_code(0);
    let state = job.run_path("checkpoints/step-000003/training-state.safetensors");
    let mut bytes = fs::read(&state).context("read the checkpoint")?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&state, bytes).context("damage the checkpoint")?;

    let job = job.with("batch.steps", 4).with("resources.learners", 2);
    let ended = job.start()?.wait()?;
    ended.expect_code(0);
    let said = format!("{}{}", ended.stdout, ended.stderr);
    assert!(said.contains("step-000003/training-state.safetensors` is damaged"), "{said}");
    assert!(said.contains("resumed from step 2 of 4"), "{said}");
    assert!(job.run_path("checkpoints/damaged-000003").exists(), "it is set aside, not removed");
    assert_eq!(steps(&job)?, [1, 2, 3, 4]);
    Ok(())
}

#[test]
fn a_changed_spec_is_refused_field_by_field() -> Result<()> {
    let job = job(2)?;
    job.start()?.wait()?.expect_code(0);
    let job = job.with("rollout.samples_per_prompt", 4).with("batch.steps", 3);
    let ended = job.start()?.wait()?;
    ended.expect_code(78);
    assert!(ended.stderr.contains("rollout.samples_per_prompt: was 8, is 4"), "{}", ended.stderr);
    assert!(!ended.stderr.contains("batch.steps: was"), "what may change is no reason: {}", ended.stderr);
    Ok(())
}

#[test]
fn a_resumed_run_is_the_uninterrupted_one_bit_for_bit() -> Result<()> {
    for sharding in ["replicated", "shard_optimizer", "shard_all"] {
        // With the reference kernels samples do not depend on what else was in their pass.
        let ranks = |steps| {
            let job = job(steps)?.with("resources.learners", 2).with("rollout.kernels", "reference");
            Ok::<_, anyhow::Error>(job.with("resources.sharding", sharding))
        };
        let whole = ranks(4)?;
        whole.start()?.wait()?.expect_code(0);
        let halves = ranks(2)?;
        halves.start()?.wait()?.expect_code(0);
        let halves = halves.with("batch.steps", 4);
        halves.start()?.wait()?.expect_code(0);
        let model = |job: &Job| fs::read(job.run_path("checkpoints/step-000004/model/model.safetensors"));
        assert!(model(&whole)? == model(&halves)?, "{sharding}");
        // Intermediate checkpoints are written in the background, and their cost is in the metrics.
        let metrics = whole.json_lines("metrics.jsonl")?;
        assert!(metrics.iter().all(|line| line["checkpoint_stall_seconds"].as_f64().is_some()), "{metrics:?}");
        let written =
            |line: &serde_json::Value| line["checkpoint_write_seconds"].as_f64().is_some_and(|took| took > 0.0);
        assert!(metrics.iter().any(written), "{metrics:?}");
    }
    Ok(())
}

#[test]
fn the_best_checkpoints_stay() -> Result<()> {
    let job = job(6)?.with("checkpoint.keep", 1).with("checkpoint.keep_best", 1).with("evaluation.every_steps", 1);
    job.start()?.wait()?.expect_code(0);
    let evaluations = job.json_lines("evaluations.jsonl")?;
    let score = |step: u64| evaluations.iter().find(|line| line["step"] == step).and_then(|l| l["pass_at_1"].as_f64());
    let kept: Vec<u64> = (1..=6).filter(|step| job.run_path(&format!("checkpoints/step-{step:06}")).exists()).collect();
    // The last step is left out, because its evaluation comes after its checkpoint.
    let best = (1..6).max_by(|a, b| score(*a).unwrap_or(0.0).total_cmp(&score(*b).unwrap_or(0.0))).context("steps")?;
    assert!(kept.contains(&6) && kept.contains(&best), "kept {kept:?}, the best is {best}: {evaluations:?}");
    assert!(kept.len() <= 2, "{kept:?}");
    Ok(())
}
