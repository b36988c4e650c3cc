//! `pacs-worker replay`: training on recorded groups, without rollouts, verifiers or coordinator.

mod archive;
mod recorded;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::Args;
use pacs_collective::HostCollective;
use pacs_learner::{Trainer, TrainerSettings, exported};
use pacs_model::ModelConfig;
use pacs_runtime::Exit;
use pacs_spec::{DeviceKind, JobSpec, Precision};
use pacs_torch::tch::Kind;
use serde_json::json;

use crate::Failure;
use recorded::{RecordedGroup, RecordedStep};

/// Job to replay, and its recorded groups.
#[derive(Debug, Args)]
#[command(
    long_about = "Trains on recorded groups, without rollouts, verifiers or coordinator.\n\nRows of a groups file are JSON \
                  lines {\"group\", \"prompt_tokens\", \"tokens\", \"logprobs\", \"label\", \"reward\"} and, if wanted, \
                  \"truncated\"; consecutive rows of one group number are a group. Steps are taken in the order of the \
                  file, `batch.prompts_per_step` groups each, as the job splits them into mini-batches. The metrics of \
                  every step are printed as JSON lines; the result is a Hugging Face folder.",
    after_help = "Examples:\n  pacs-worker replay --job job.toml --groups groups.jsonl --out replayed\n  \
                  pacs-worker replay --job deploy/jobs/demo.toml --archive runs/demo --steps 3 --out replayed"
)]
pub(crate) struct Arguments {
    /// Job spec, for objective, optimizer, batch sizes, model, precision and device.
    #[arg(long)]
    job: PathBuf,
    /// File of recorded groups, as JSON lines.
    #[arg(long, required_unless_present = "archive", conflicts_with = "archive")]
    groups: Option<PathBuf>,
    /// Run folder whose archived steps are replayed.
    #[arg(long)]
    archive: Option<PathBuf>,
    /// Hugging Face folder, or OWNER/NAME of the hub, to start from, instead of the job's model.
    #[arg(long)]
    model: Option<PathBuf>,
    /// Folder of the resulting model; must not exist, or be empty.
    #[arg(long)]
    out: PathBuf,
    /// Stop after this many steps [default: `batch.steps` of the job]
    #[arg(long, value_parser = crate::bounds::u64_to(crate::bounds::MOST_TIMES))]
    steps: Option<u64>,
    /// Threads of libtorch; 0: one per core.
    #[arg(long, default_value_t = 0, value_parser = crate::bounds::usize_to(crate::bounds::MOST_THREADS))]
    threads: usize,
}

pub(crate) fn run(arguments: &Arguments) -> Result<Exit, Failure> {
    let failed = |error: anyhow::Error| Failure::config(error.context("replay"));
    let out = &arguments.out;
    if std::fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(failed(anyhow!("`{}` is not empty; remove it or name another `--out`", out.display())));
    }
    let spec = pacs_spec::read(&arguments.job).map_err(|errors| failed(errors.into()))?;
    let model = arguments.model.as_ref().unwrap_or(&spec.model.path);
    let model = crate::hub::model_of_run(model, arguments.archive.as_deref())?;
    replay(arguments, &spec, &model).map_err(failed)?;
    Ok(Exit::Done)
}

fn replay(arguments: &Arguments, spec: &JobSpec, model: &Path) -> Result<()> {
    let out = &arguments.out;
    let vocabulary = ModelConfig::read(model)?.vocab_size;
    let steps = steps(arguments, spec)?;
    let device =
        pacs_torch::init(spec.resources.device == DeviceKind::Cuda, arguments.threads).context("start libtorch")?;
    let kind = match spec.model.precision {
        Precision::Float32 => Kind::Float,
        Precision::Bfloat16 => Kind::BFloat16,
        Precision::Auto if pacs_torch::multiplies_bf16(device) => Kind::BFloat16,
        Precision::Auto => Kind::Float,
    };
    let mut settings = TrainerSettings::new(spec, 0, 1);
    if settings.router_replay {
        // An archive would be many times as large with them.
        tracing::warn!(
            "recorded groups hold no routes: routers choose the experts, and the weights are not those of the run"
        );
        settings.router_replay = false;
    }
    let mut trainer = Trainer::load(model, settings, kind, device)?;
    let mut collective = HostCollective::alone();
    let most = arguments.steps.unwrap_or(spec.batch.steps);
    let (mut done, mut skipped) = (0, 0);
    for step in steps.take(usize::try_from(most).unwrap_or(usize::MAX)) {
        let step = step?;
        step.check(vocabulary)?;
        let number = step.number;
        let batch =
            step.batch(spec.batch.mini_batches as usize, spec.rollout.max_new_tokens, spec.resources.deterministic);
        let report = trainer.train(&batch, &mut collective).map_err(|error| anyhow!("train step {number}: {error}"))?;
        println!("{}", json!({"event": "step", "step": number, "metrics": report.metrics}));
        skipped += report.skipped_updates;
        ensure!(
            skipped <= spec.optimizer.max_skipped_updates,
            "{skipped} updates had a gradient that is not finite, more than `optimizer.max_skipped_updates`"
        );
        done += 1;
    }
    ensure!(done > 0, "there is not one whole step of {} groups", spec.batch.prompts_per_step);
    trainer.export(&exported(spec, model)?, out, &out.join("adapter"), &mut collective)?;
    println!("{}", json!({"event": "saved", "path": out, "steps": done, "precision": format!("{kind:?}")}));
    Ok(())
}

/// Reads the recorded steps in order.
fn steps(arguments: &Arguments, spec: &JobSpec) -> Result<Box<dyn Iterator<Item = Result<RecordedStep>>>> {
    match (&arguments.groups, &arguments.archive) {
        (Some(path), _) => Ok(Box::new(of_groups(path, spec.batch.prompts_per_step as usize)?)),
        (None, Some(run_dir)) => Ok(Box::new(archive::steps(run_dir, arguments.model.is_some())?)),
        (None, None) => bail!("name what to replay: `--groups FILE.jsonl` or `--archive RUN_DIR`"),
    }
}

/// Reads steps of `size` groups each. An incomplete step at the end is reported and not trained on.
fn of_groups(path: &Path, size: usize) -> Result<impl Iterator<Item = Result<RecordedStep>> + use<>> {
    let mut groups = recorded::read(path)?;
    let path = path.to_owned();
    Ok((1..).map_while(move |number| {
        let step: Result<Vec<RecordedGroup>> = groups.by_ref().take(size).collect();
        match step {
            Err(error) => Some(Err(error)),
            Ok(groups) if groups.len() == size => Some(Ok(RecordedStep { number, groups })),
            Ok(groups) => {
                if !groups.is_empty() {
                    let left = groups.len();
                    tracing::warn!(path = %path.display(), left, "the last groups are not a complete step and are left out");
                }
                None
            }
        }
    }))
}
