//! One trace id joins the log lines of several processes.

use std::collections::BTreeSet;
use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use pacs_tests::{Job, program};

/// Returns the trace ids in log lines about groups.
fn traces(log: &str) -> BTreeSet<&str> {
    log.lines()
        .filter(|line| line.contains("group=") || line.contains("\"group\""))
        .flat_map(|line| line.split("trace_id=").skip(1).chain(line.split("\"trace_id\":\"").skip(1)))
        .filter_map(|rest| rest.get(..32))
        .filter(|id| id.bytes().all(|byte| byte.is_ascii_hexdigit()))
        .collect()
}

#[test]
fn one_identifier_stands_in_the_logs_of_all_that_work_on_a_group() -> Result<()> {
    for format in ["human", "json"] {
        let job = Job::tiny()?.with("batch.steps", 1).with("evaluation.before", false).with("evaluation.after", false);
        let mut command = Command::new(program("pacs")?);
        command.arg("run").arg(job.write_spec()?).arg("--run-dir").arg(job.path("run"));
        command.args(["--listen", "127.0.0.1:0", "--log-format", format]).env("PACS_LOG", "debug");
        let output = command.stdin(Stdio::null()).output().context("pacs run")?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let log = |name: &str| fs::read_to_string(job.run_path("logs").join(name)).context(name.to_owned());
        let (coordinator, rollout, verifier) = (log("coordinator.log")?, log("rollout-0.log")?, log("verifier-0.log")?);
        let common: Vec<&str> = traces(&coordinator)
            .intersection(&traces(&rollout))
            .filter(|id| traces(&verifier).contains(**id))
            .copied()
            .collect();
        // One step has 8 prompts.
        ensure!(common.len() >= 8, "{format}: {} traces in all three logs:\n{coordinator}", common.len());
    }
    Ok(())
}
