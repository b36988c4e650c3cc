//! `pacs job check --preflight` with real programs.

use std::process::{Command, Output};

use anyhow::{Context, Result};
use pacs_tests::{Job, program};
use serde_json::Value;

fn preflight(job: &Job, options: &[&str]) -> Result<(Output, Value)> {
    let spec = job.write_spec()?;
    let mut command = Command::new(program("pacs")?);
    command.args(["job", "check", "--preflight", "--json"]).args(options).arg(spec).current_dir(job.path("."));
    let output = command.output().context("run pacs job check")?;
    let json = serde_json::from_slice(&output.stdout).with_context(|| format!("{output:?}"))?;
    Ok((output, json))
}

fn parts(json: &Value) -> Vec<&str> {
    json["preflight"].as_array().into_iter().flatten().filter_map(|trial| trial["part"].as_str()).collect()
}

#[test]
fn a_job_that_works_is_tried_to_its_end_and_leaves_nothing() -> Result<()> {
    let job = Job::tiny()?.with("resources.learners", 2);
    let (output, json) = preflight(&job, &[])?;
    assert_eq!(output.status.code(), Some(0), "{json:#}");
    assert_eq!(parts(&json), ["data", "verifier label", "tiny step"]);
    assert_eq!(json["problem"], Value::Null);
    let found = json["preflight"][2]["found"].as_str().context("what was seen")?;
    assert!(found.contains("trained and saved") && found.contains("tokens/s"), "{found}");
    assert!(std::fs::read_dir(job.path("runs"))?.next().is_none(), "the trial's folder is still there");
    Ok(())
}

#[test]
fn a_verifier_that_does_not_start_is_found_before_anything_is_generated() -> Result<()> {
    let job = Job::tiny()?.with("verifier.kind", "exec").without_extraction();
    let job = job.with("verifier.command", toml::Value::Array(vec!["/no/such/verifier".into()]));
    let (output, json) = preflight(&job, &[])?;
    assert_eq!(output.status.code(), Some(78), "{json:#}");
    assert_eq!(parts(&json), ["data", "verifier label"]);
    let problem = &json["preflight"][1]["problem"];
    assert!(problem["said"].as_str().is_some_and(|said| said.contains("/no/such/verifier")), "{problem}");
    assert!(problem["otherwise"].as_str().is_some_and(|cost| cost.contains("64 samples")), "{problem}");
    Ok(())
}

#[test]
fn a_step_that_takes_too_long_is_ended() -> Result<()> {
    let (output, json) = preflight(&Job::tiny()?, &["--preflight-timeout", "0"])?;
    assert_eq!(output.status.code(), Some(78), "{json:#}");
    let problem = json["problem"].as_str().context("a problem")?;
    assert!(problem.starts_with("tiny step: the tiny run did not end within"), "{problem}");
    Ok(())
}
