//! Verifiers die, hang, garble their output and fail: none of that becomes a verdict.

use std::fs;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use pacs_tests::{Job, Run, program};
use serde_json::Value;

/// Shell text that judges by a checksum of the task and names it in the rule, so that verdicts are reproducible.
const BY_CHECKSUM: &str = r#"crc=$(printf '%s' "$task" | cksum); crc=${crc%% *}
    case $((crc % 2)) in 0) answer correct "crc $crc";; *) answer wrong "crc $crc";; esac"#;

fn without_evaluation(job: Job) -> Job {
    job.with("evaluation.before", false).with("evaluation.after", false)
}

/// Sums a metric over all steps.
fn total(job: &Job, metric: &str) -> Result<f64> {
    Ok(job.json_lines("metrics.jsonl")?.iter().filter_map(|line| line[metric].as_f64()).sum())
}

/// Parses the checksum that a verdict's rule names.
fn crc(rule: &str) -> Result<u32> {
    rule.strip_prefix("crc ").and_then(|crc| crc.parse().ok()).with_context(|| format!("rule `{rule}`"))
}

/// A `pacs verifier` process started by the test; dropping it kills the process.
struct Verifier {
    name: String,
    process: Child,
}

impl Verifier {
    fn start(folder: &str, name: &str) -> Result<Self> {
        let mut command = Command::new(program("pacs")?);
        command.args(["verifier", "--coordinator", folder, "--name", name, "--threads", "1", "--tls-dir"]);
        command.arg(format!("{folder}/certificates"));
        let process = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        Ok(Self { name: name.to_owned(), process })
    }

    /// Returns whether the verifier holds leases now.
    fn works(&self, status: &Value) -> bool {
        let workers = status["workers"].as_array().into_iter().flatten();
        workers.filter(|worker| worker["name"] == self.name).any(|worker| worker["leases"].as_u64() > Some(0))
    }
}

impl Drop for Verifier {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Kills two verifiers alternately while they hold samples, `most` times, and starts replacements. Returns the number of kills.
fn kill_verifiers(run: &mut Run, most: usize) -> Result<usize> {
    let status = run.wait_until("a folder", |status| status["run_dir"].is_string())?;
    let folder = status["run_dir"].as_str().context("a folder")?;
    let mut verifiers = [Verifier::start(folder, "elastic-0")?, Verifier::start(folder, "elastic-1")?];
    let mut killed = 0;
    while !run.has_ended()? {
        let Some(status) = run.status()? else { continue };
        let next = &mut verifiers[killed % 2];
        if killed < most && next.works(&status) {
            let name = next.name.clone();
            next.process.kill()?;
            *next = Verifier::start(folder, &name)?;
            killed += 1;
        }
    }
    Ok(killed)
}

#[test]
fn killed_verifiers_change_no_verdict() -> Result<()> {
    let job = || -> Result<Job> {
        let job = Job::tiny()?;
        // Slow enough to be killed while it holds samples.
        let command = job.verifier_script(&format!("sleep 0.03; {BY_CHECKSUM}"))?;
        Ok(job.with("verifier.kind", "exec").with("verifier.command", command).without_extraction())
    };
    let undisturbed = job()?;
    undisturbed.start()?.wait()?.expect_code(0);

    // These kills may hit the same sample repeatedly, so the limit is raised: the sample is not a poison pill.
    let disturbed = job()?.with("resources.verifiers", 0).with("groups.max_worker_losses", 100);
    let mut run = disturbed.start()?;
    let killed = kill_verifiers(&mut run, 12)?;
    run.wait()?.expect_code(0);
    assert!(killed >= 3, "verifiers were killed {killed} times only");

    let (expected, found) = (undisturbed.samples()?, disturbed.samples()?);
    // 3 steps × 8 groups × 8 samples, and 2 evaluations × 10 problems.
    assert_eq!((expected.len(), found.len()), (212, 212));
    for (expected, found) in expected.iter().zip(&found) {
        assert_eq!(expected, found);
        let label = if crc(&found.rule)? % 2 == 0 { 1.0 } else { 0.0 };
        assert_eq!((found.label, found.reward), (label, label), "{found:?}");
    }
    Ok(())
}

#[test]
fn a_verifier_that_fails_a_third_of_all_tasks_corrupts_no_label() -> Result<()> {
    let job = without_evaluation(Job::tiny()?);
    let fails = r#"crc=$(printf '%s' "$task" | cksum); crc=${crc%% *}
    case $((crc % 3)) in 0) answer failed "crc $crc";; 1) answer correct "crc $crc";; *) answer wrong "crc $crc";; esac"#;
    let command = job.verifier_script(fails)?;
    let job = job.with("verifier.kind", "exec").with("verifier.command", command).without_extraction();
    let job = job.with("verifier.max_attempts", 2).with("verifier.max_replacements", 8);
    let mut run = job.start()?;
    let counted = |status: &Value| status["verifiers"][0]["outcomes"]["failed"].as_u64() > Some(0);
    let status = run.wait_until("a failed verdict in the status", counted)?;
    assert!(status["verifiers"][0]["p99_seconds"].as_f64().is_some(), "{status:#}");
    run.wait()?.expect_code(0);

    let samples = job.samples()?;
    assert_eq!(samples.len(), 3 * 8 * 8);
    for sample in &samples {
        let expected = match crc(&sample.rule)? % 3 {
            1 => ("correct", 1.0),
            2 => ("wrong", 0.0),
            _ => panic!("a failed verification was trained on: {sample:?}"),
        };
        assert_eq!((sample.outcome.as_str(), sample.label), expected, "{sample:?}");
    }
    let (failed, replaced) = (total(&job, "failed_verdicts")?, total(&job, "replaced_samples")?);
    // About a third of the samples get no verdict, each after two attempts.
    assert!(replaced > 40.0 && failed >= 2.0 * replaced, "{failed} failed, {replaced} replaced");
    assert_eq!(total(&job, "verifier_label_failed")?, failed);
    Ok(())
}

#[test]
fn a_verifier_that_hangs_garbles_and_dies_is_replaced_and_its_samples_retried() -> Result<()> {
    let job = without_evaluation(Job::tiny()?);
    // Each fault happens once, to the first task that arrives.
    let faults = format!(
        r#"first() {{ mkdir "{0}/$1" 2>/dev/null; }}
    if first hang; then echo $$ > "{0}/hung"; sleep 1000; fi
    if first garbage; then echo nonsense; continue; fi
    if first death; then echo 'no memory left' >&2; exit 3; fi
    {BY_CHECKSUM}"#,
        job.path("").display()
    );
    let command = job.verifier_script(&faults)?;
    let job = job.with("verifier.kind", "exec").with("verifier.command", command).without_extraction();
    let job = job.with("verifier.timeout_seconds", 3.0).with("verifier.max_replacements", 0).with("batch.steps", 2);
    job.start()?.wait()?.expect_code(0);

    for metric in ["replaced_samples", "dropped_groups"] {
        assert_eq!(total(&job, metric)?, 0.0, "{metric}: every sample had its verdict in the end");
    }
    assert_eq!((total(&job, "verifier_label_timed_out")?, total(&job, "verifier_label_failed")?), (1.0, 2.0));
    let samples = job.samples()?;
    assert_eq!(samples.len(), 2 * 8 * 8);
    for sample in &samples {
        assert_eq!(sample.label, if crc(&sample.rule)? % 2 == 0 { 1.0 } else { 0.0 }, "{sample:?}");
    }
    let log = fs::read_to_string(job.run_path("logs/verifier-0.log"))?;
    for expected in [
        "no verdict within 3 s",
        "the answer of the verifier is not a verdict",
        "in `nonsense`",
        "`sh` ended with exit code 3; it wrote: no memory left",
    ] {
        assert!(log.contains(expected), "`{expected}` is not in the log:\n{log}");
    }
    let hung = fs::read_to_string(job.path("hung"))?;
    assert!(!fs::exists(format!("/proc/{}", hung.trim()))?, "process {hung} still hangs");
    Ok(())
}

#[test]
fn a_verifier_that_never_works_ends_the_run_with_a_reason() -> Result<()> {
    let job = without_evaluation(Job::tiny()?);
    let job =
        job.with("verifier.kind", "exec").with("verifier.command", vec!["/no/such/verifier"]).without_extraction();
    let job = job.with("verifier.max_attempts", 1).with("verifier.max_replacements", 0);
    let ended = job.start()?.wait()?;
    assert_ne!(ended.code, Some(0));
    assert!(ended.stderr.contains("verifi"), "{}", ended.stderr);
    let log = fs::read_to_string(job.run_path("logs/verifier-0.log"))?;
    assert!(log.contains("start `/no/such/verifier`: ") && log.contains("No such file"), "{log}");
    Ok(())
}
