//! The score and the coefficient of each trained sample reach the archive and those who read it.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use pacs_algo::{Answer, Objective, ObjectiveStep, SequenceInfo, SequenceOutcome, TokenData};
use pacs_tests::{Job, TrainedSample};

/// Evaluates the objective of the run on the archived samples of a step that was one on-policy update. The log-probs of
/// the rollout engine are then those of the learner, up to rounding.
fn evaluate(objective: &Objective, samples: &[TrainedSample]) -> Result<ObjectiveStep> {
    let logprobs: Vec<Vec<f64>> =
        samples.iter().map(|sample| sample.logprobs.iter().map(|logprob| f64::from(*logprob)).collect()).collect();
    let answers = samples.iter().zip(&logprobs).map(|(sample, logprobs)| {
        let info = SequenceInfo {
            group: u64::try_from(sample.group)?,
            label: sample.label,
            reward: sample.reward,
            greedy_reward: None,
            tokens: u32::try_from(logprobs.len())?,
            truncated: sample.truncated,
        };
        Ok(Answer { info, tokens: TokenData { new: logprobs, old: logprobs, ..TokenData::default() } })
    });
    let answers: Vec<Answer<'_>> = answers.collect::<Result<_>>()?;
    objective.evaluate(&answers).context("evaluate the objective")
}

/// Compares a number of each sample with the expected ones, to within `tolerance` of the largest of these.
fn check(
    kind: &str,
    what: &str,
    samples: &[TrainedSample],
    of: impl Fn(&TrainedSample) -> Option<f32>,
    expected: Vec<f64>,
    tolerance: f64,
) -> Result<()> {
    let largest = expected.iter().fold(0.0, |largest: f64, value| largest.max(value.abs()));
    ensure!(largest > 0.0, "{kind}: every {what} is 0");
    for (sample, expected) in samples.iter().zip(expected) {
        let seen = of(sample).with_context(|| format!("{kind}: no {what}: {sample:?}"))?;
        let apart = (f64::from(seen) - expected).abs();
        ensure!(apart <= tolerance * largest, "{kind}: the {what} is {seen}, not {expected}: {sample:?}");
    }
    Ok(())
}

/// Runs two steps of one update each, and compares what is archived with what the objective says of the archived
/// samples.
fn archives(objective: toml::Table, tolerance: f64) -> Result<()> {
    let kind = objective["kind"].as_str().context("a kind")?.to_owned();
    let job = Job::tiny()?.with("batch.steps", 2).with("batch.mini_batches", 1);
    let job = job.with("evaluation.before", false).with("evaluation.after", false).with("resources.learners", 2);
    let job = job.with_section("objective", objective);
    job.start()?.wait()?.expect_code(0);
    let spec = fs::read_to_string(job.run_path("job.toml")).context("read the job spec")?;
    let spec = pacs_spec::parse(&spec, Path::new("job.toml"))?;
    let objective = spec.objective.filled().objective(spec.rollout.max_new_tokens);
    let samples = job.trained_samples()?;
    ensure!(samples.len() == 2 * 8 * 8, "{} samples", samples.len());
    let mut pushed = [0, 0];
    for of_step in samples.chunk_by(|a, b| a.step == b.step) {
        let expected = evaluate(&objective, of_step)?.sequences;
        let score = |of: &SequenceOutcome| of.score.unwrap_or(f64::NAN);
        check(&kind, "score", of_step, |sample| sample.score, expected.iter().map(score).collect(), tolerance)?;
        let coefficient = |of: &SequenceOutcome| of.coefficient();
        let coefficients: Vec<f64> = expected.iter().map(coefficient).collect();
        coefficients.iter().filter(|it| **it != 0.0).for_each(|it| pushed[usize::from(*it > 0.0)] += 1);
        check(&kind, "coefficient", of_step, |sample| sample.coefficient, coefficients, tolerance)?;
    }
    ensure!(pushed.iter().all(|count| *count > 0), "{kind}: {pushed:?} samples are pushed down and up");
    shows(&job, &samples)
}

/// Checks that `pacs samples` and `pacs report` show what the archive holds.
fn shows(job: &Job, samples: &[TrainedSample]) -> Result<()> {
    let pacs = |arguments: &[&str]| -> Result<String> {
        let output = job.command("pacs")?.args(arguments).output().context("start pacs")?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    };
    let run = job.run_path("").display().to_string();
    let listed: serde_json::Value =
        serde_json::from_str(&pacs(&["samples", &run, "--set", "train", "--limit", "1000", "--json"])?)?;
    let listed = listed["samples"].as_array().context("a list of samples")?;
    ensure!(listed.len() == samples.len(), "{} of {} samples are listed", listed.len(), samples.len());
    for sample in samples {
        let found = listed.iter().find(|it| it["group"] == sample.group && it["index"] == sample.sample);
        let found = found.with_context(|| format!("{sample:?} is not listed"))?;
        for (name, value) in [("score", sample.score), ("coefficient", sample.coefficient)] {
            let (shown, value) = (found[name].as_f64().context("a number")?, f64::from(value.context("archived")?));
            ensure!((shown - value).abs() <= 1e-6 * value.abs(), "{name} is shown as {shown}, not {value}");
        }
    }
    let one = &samples[0];
    let text = pacs(&["samples", &run, "--sample", &format!("{}.{}", one.group, one.sample)])?;
    ensure!(text.contains("  score ") && text.contains("  coefficient "), "{text}");
    let report = job.path("report.html").display().to_string();
    pacs(&["report", &run, "--output", &report])?;
    let report = fs::read_to_string(report)?;
    ensure!(report.contains("· score ") && report.contains("· coefficient "), "the report shows neither");
    Ok(())
}

/// The mean log-prob as reward proxy gives scores that are not zero on policy.
#[test]
fn scores_and_coefficients_of_pacs_are_those_of_its_formula() -> Result<()> {
    let objective = toml::toml! {
        kind = "pacs"
        reward_method = "mean_logprob"
    };
    archives(objective, 1e-3)
}

#[test]
fn scores_and_coefficients_of_grpo_are_those_of_its_formula() -> Result<()> {
    archives(toml::toml! { kind = "grpo" }, 1e-5)
}
