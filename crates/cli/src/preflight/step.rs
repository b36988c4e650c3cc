//! The preflight's training step: a tiny run with the job's model, programs, devices and settings.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pacs_spec::JobSpec;
use serde_json::Value;

use super::{Problem, Trial, first_samples};
use crate::arguments::Check;
use crate::failure::Failure;
use crate::format::{bytes, duration, plural, seconds};
use crate::plan::default_run_dir;

/// Answer limit of the tiny step, in tokens.
const TOKENS: u32 = 16;

/// Grace of the tiny run after it was told to end.
const GOODBYE: Duration = Duration::from_secs(30);

/// Runs the step in a temporary folder next to the job's run folder, so on the same file system.
///
/// # Errors
/// When the folder cannot be written or the program cannot be started.
pub(super) fn try_it(spec: &JobSpec, arguments: &Check) -> Result<Trial, Failure> {
    let began = Instant::now();
    let tiny = tiny(spec);
    let folder = Folder::create(&default_run_dir(spec))?;
    let file = folder.0.join("job.toml");
    fs::write(&file, tiny.resolved_toml()).context("write the tiny job").map_err(Failure::config)?;
    let run_dir = folder.0.join("run");
    let mut command = Command::new(std::env::current_exe().context("find this program").map_err(Failure::bug)?);
    command.arg("run").arg(&file).arg("--run-dir").arg(&run_dir).args(["--listen", "127.0.0.1:0"]);
    if let Some(worker) = &arguments.worker_binary {
        command.arg("--worker-binary").arg(worker);
    }
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
    let child = child.context("start a tiny run").map_err(Failure::bug)?;
    let limit = Duration::from_secs(arguments.preflight_timeout);
    let found = match ended(child, limit).context("follow the tiny run").map_err(Failure::bug)? {
        (Some(status), _) if status.success() => Ok(seen(&run_dir, spec)),
        (Some(_), said) => Err(said.trim().strip_prefix("error: ").unwrap_or(said.trim()).to_owned()),
        (None, _) => Err(format!("the tiny run did not end within {} (--preflight-timeout)", duration(limit))),
    };
    Ok(Trial::new("tiny step", began, found.map_err(|said| Problem { said, otherwise: otherwise(spec) })))
}

fn otherwise(spec: &JobSpec) -> String {
    let workers = spec.resources.rollouts + spec.resources.learners + spec.resources.verifiers;
    let workers = plural(u64::from(workers), "worker", "workers");
    format!("a run would have held {workers} for it, and first generated {}", first_samples(spec))
}

/// Reduces the job to its first step, with as few and as short samples as its other settings allow.
fn tiny(spec: &JobSpec) -> JobSpec {
    let mut tiny = spec.clone();
    let samples = tiny.rollout.samples_per_prompt.max(1);
    // Enough prompts that every rank has a sample of every mini-batch.
    let prompts = tiny.batch.mini_batches.saturating_mul(tiny.resources.learners.div_ceil(samples).max(1));
    tiny.batch.prompts_per_step = prompts.min(spec.batch.prompts_per_step);
    tiny.batch.steps = 1;
    tiny.rollout.max_new_tokens = tiny.rollout.max_new_tokens.min(TOKENS);
    tiny.reward.overlong_tokens = tiny.reward.overlong_tokens.min(tiny.rollout.max_new_tokens);
    tiny.asynchrony.slots = None;
    tiny.groups.max_refills = tiny.groups.max_refills.map(|most| most.min(1));
    tiny.objective.critic_warmup_steps = tiny.objective.critic_warmup_steps.map(|_| 0);
    (tiny.evaluation.before, tiny.evaluation.after, tiny.evaluation.every_steps) = (false, false, 0);
    tiny.evaluation.sets.clear();
    (tiny.checkpoint.every_steps, tiny.checkpoint.keep_best) = (0, 0);
    tiny
}

/// Extrapolates from the tiny step to the job's own steps.
fn seen(run_dir: &Path, spec: &JobSpec) -> String {
    let metrics = fs::read_to_string(run_dir.join("metrics.jsonl")).unwrap_or_default();
    let metrics: Value =
        metrics.lines().next_back().and_then(|line| serde_json::from_str(line).ok()).unwrap_or_default();
    let number = |name: &str| metrics[name].as_f64();
    let mut found = vec!["generated, graded, trained and saved".to_owned()];
    if let Some(rate) = number("tokens_per_second").filter(|rate| *rate > 0.0) {
        let most = u64::from(spec.batch.prompts_per_step)
            * u64::from(spec.rollout.samples_per_prompt)
            * u64::from(spec.rollout.max_new_tokens);
        // An upper bound: so few samples do not fill the machine.
        let longest = seconds(most as f64 / rate);
        found.push(format!(
            "{rate:.0} tokens/s for so few samples, at which a step would generate for {longest} at most"
        ));
    }
    if let Some(used) = number("memory_used_bytes") {
        found.push(format!("{} of memory on a learner", bytes(used as u64)));
    }
    found.join("; ")
}

/// Waits for the end of the run; the status is `None` when it was ended at the deadline. Also returns its standard error.
fn ended(mut child: Child, limit: Duration) -> std::io::Result<(Option<ExitStatus>, String)> {
    let mut errors = child.stderr.take();
    // The thread ends when the child closes its pipe.
    let reader = std::thread::spawn(move || {
        let mut said = String::new();
        // A read error only loses text: the exit code decides.
        let _ = errors.as_mut().map(|pipe| pipe.read_to_string(&mut said));
        said
    });
    let status = match wait(&mut child, limit)? {
        Some(status) => Some(status),
        None => {
            // The first signal means save and leave, the second leave at once, with the workers.
            for _ in 0..2 {
                let _ = kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM);
                std::thread::sleep(Duration::from_millis(500));
            }
            if wait(&mut child, GOODBYE)?.is_none() {
                child.kill()?;
                child.wait()?;
            }
            None
        }
    };
    Ok((status, reader.join().unwrap_or_default()))
}

fn wait(child: &mut Child, limit: Duration) -> std::io::Result<Option<ExitStatus>> {
    let began = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if began.elapsed() >= limit {
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A folder that is removed on drop, on the file system that the run will use.
struct Folder(PathBuf);

impl Folder {
    fn create(run_dir: &Path) -> Result<Self, Failure> {
        let path = run_dir.with_extension(format!("preflight-{}", std::process::id()));
        fs::create_dir_all(&path)
            .with_context(|| format!("create folder `{}`", path.display()))
            .map_err(Failure::config)?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::warn!("remove `{}`: {error}", self.0.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tiny_step_of_every_job_is_valid() {
        let minimal = "name = 'x'\nmodel.path = 'm'\ndata.train.path = 't.jsonl'\ndata.evaluation.path = 'e.jsonl'\n";
        for more in [
            "",
            "resources.learners = 24\nrollout.samples_per_prompt = 2\nbatch.mini_batches = 1",
            "objective.kind = 'ppo'\nobjective.critic_warmup_steps = 3\nevaluation.every_steps = 5\ncheckpoint.keep_best = 2",
            "asynchrony = { max_lag = 2, slots = 1024 }\ngroups = { uniform = 'refill', max_refills = 900 }",
            "reward.overlong_tokens = 1000",
        ] {
            let text = format!("{minimal}{more}");
            let spec = pacs_spec::parse(&text, Path::new("job.toml")).unwrap_or_else(|errors| panic!("{errors}"));
            let tiny = tiny(&spec);
            tiny.validate(Path::new("tiny.toml")).unwrap_or_else(|errors| panic!("{more}: {errors}"));
            let samples = tiny.batch.prompts_per_step * tiny.rollout.samples_per_prompt;
            assert!(samples >= tiny.resources.learners * tiny.batch.mini_batches, "{more}: a rank has nothing to do");
            assert!(tiny.batch.prompts_per_step <= 12 * tiny.batch.mini_batches, "{more}: not tiny");
            assert_eq!((tiny.batch.steps, tiny.rollout.max_new_tokens), (1, TOKENS));
        }
    }
}
