//! `pacs doctor`: checks whether this machine can take part in a run, and advises what to fix.
//!
//! Each check gives one [`Finding`]. `machine` checks the system, `folder` the run folder, `parts` programs, GPUs and
//! certificates, `network` ports, the coordinator, clocks and the ring between ranks.

mod folder;
mod machine;
mod network;
mod parts;
mod sandbox;

use std::fmt;

use anyhow::Context;
use pacs_runtime::Exit;
use serde::Serialize;

use crate::arguments::Doctor;
use crate::failure::Failure;
use crate::model_folder;
use crate::output;
use crate::plan::default_run_dir;

/// The result of one check.
#[derive(Debug, Serialize)]
pub(crate) struct Finding {
    /// Name of the check.
    check: &'static str,
    level: Level,
    /// The observed state, for people.
    found: String,
    /// What to do about it; empty at [`Level::Ok`].
    advice: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    /// Nothing to do.
    Ok,
    /// A run works, but slowly or at a risk.
    Warning,
    /// A run would fail.
    Failure,
}

impl Finding {
    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, level: Level::Ok, found: found.into(), advice: String::new() }
    }

    fn warning(check: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { check, level: Level::Warning, found: found.into(), advice: advice.into() }
    }

    fn failure(check: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { check, level: Level::Failure, found: found.into(), advice: advice.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = match self.level {
            Level::Ok => "ok     ",
            Level::Warning => "warning",
            Level::Failure => "FAILURE",
        };
        write!(f, "{mark}  {:<18}  {}", self.check, self.found)?;
        if self.advice.is_empty() { Ok(()) } else { write!(f, "\n{:29}{}", "", self.advice) }
    }
}

/// What the job needs; defaults where no job is given.
#[derive(Clone, Copy, Debug, Default)]
struct Needs {
    /// Number of parameters; `None` without a job or weights.
    parameters: Option<u64>,
    /// Number of parameters of adapters, where these are trained in place of the model.
    adapters: Option<u64>,
    /// `checkpoint.keep` of the job.
    keep: u64,
    gpu: bool,
}

impl Needs {
    /// Returns the bytes of one checkpoint: float32 weights and two moments of what is trained, and the exported model.
    fn checkpoint_bytes(&self) -> Option<u64> {
        self.parameters.map(|parameters| self.adapters.unwrap_or(parameters) * 12 + parameters * 4)
    }

    /// Returns the bytes of published weights: two versions, and one that is being written. Of adapters, and the model that rollout
    /// workers share and merge them into.
    fn published_bytes(&self) -> Option<u64> {
        self.parameters.map(|parameters| match self.adapters {
            None => parameters * 4 * 3,
            Some(adapters) => parameters * 4 + adapters * 4 * 3,
        })
    }
}

/// Number of parameters of the job's adapters; none without, or where the model cannot have them, which `pacs job check` says.
fn adapters(spec: &pacs_spec::JobSpec) -> Option<u64> {
    spec.model.lora.as_ref()?;
    let config = pacs_shape::ModelConfig::read(&spec.model.path).ok()?;
    spec.model.trained(&config).ok().map(|trained| trained.parameter_count() as u64)
}

pub(crate) fn run(arguments: &Doctor) -> Result<Exit, Failure> {
    let spec = match &arguments.job {
        Some(job) => Some(pacs_spec::read(job).map_err(|errors| Failure::config(errors).doing("read the job"))?),
        None => None,
    };
    let needs = spec.as_ref().map_or_else(Needs::default, |spec| Needs {
        parameters: model_folder::inspect(&spec.model.path).ok().map(|model| model.parameters),
        adapters: adapters(spec),
        keep: u64::from(spec.checkpoint.keep),
        gpu: spec.resources.device == pacs_spec::DeviceKind::Cuda,
    });
    let run_dir = arguments.run_dir.clone().or_else(|| spec.as_ref().map(default_run_dir));
    let mut findings = machine::look(needs);
    findings.push(sandbox::look(spec.as_ref())?);
    findings.extend(run_dir.iter().flat_map(|folder| folder::look(folder, needs)));
    findings.extend(parts::worker(arguments.worker_binary.as_deref(), needs.gpu));
    findings.extend(arguments.tls_dir.iter().map(|folder| parts::certificates(folder)));
    if let Some(coordinator) = &arguments.coordinator {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.context("start the runtime").map_err(Failure::bug)?;
        findings.extend(runtime.block_on(network::coordinator(coordinator, arguments.tls_dir.as_deref())));
    } else {
        findings.push(network::ports());
    }
    if arguments.bandwidth {
        findings.push(network::bandwidth(arguments.worker_binary.as_deref(), needs.gpu));
    }
    let worst = findings.iter().map(|finding| finding.level).max().unwrap_or(Level::Ok);
    if arguments.json {
        let text = serde_json::to_string_pretty(&findings).context("print findings").map_err(Failure::bug)?;
        output::json(text);
    } else {
        findings.iter().for_each(|finding| output::text(format_args!("{finding}\n")));
    }
    Ok(if worst == Level::Failure { Exit::Config } else { Exit::Done })
}

/// Formats bytes in GiB: `1.5 GiB`.
fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_say_what_to_do() {
        let text = Finding::warning("open files", "1024", "raise the limit").to_string();
        assert_eq!(text, "warning  open files          1024\n                             raise the limit");
        let json = serde_json::to_value(Finding::ok("clock", "fine")).expect("an object");
        assert_eq!(json, serde_json::json!({"check": "clock", "level": "ok", "found": "fine", "advice": ""}));
    }

    #[test]
    fn sizes_follow_from_the_model() {
        let needs = Needs { parameters: Some(500_000_000), keep: 2, ..Needs::default() };
        assert_eq!(needs.checkpoint_bytes(), Some(8_000_000_000));
        assert_eq!(gib(needs.published_bytes().expect("known")), "5.6 GiB");
        let adapters = Needs { adapters: Some(10_000_000), ..needs };
        assert_eq!(adapters.checkpoint_bytes(), Some(2_120_000_000));
        assert_eq!(gib(adapters.published_bytes().expect("known")), "2.0 GiB", "the model once, adapters three times");
    }
}
