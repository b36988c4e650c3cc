//! `pacs-worker bench save`.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use pacs_collective::HostCollective;
use pacs_learner::{Trainer, TrainerSettings};
use serde_json::json;

use super::{median, print, train};

/// Checkpoints of a training state: how long capturing it and writing it during training takes, what that costs the
/// step, and how long a save in the foreground and a resumption take.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  \
                  pacs-worker bench save --model models/smollm2-135m-instruct --folder runs --steps 3")]
pub(crate) struct Arguments {
    #[command(flatten)]
    work: train::Arguments,
    /// Folder on the disk to measure. What is written there is removed.
    #[arg(long)]
    folder: PathBuf,
    /// Steps between checkpoints, for the share of time that training stalls.
    #[arg(long, default_value_t = 20, value_parser = crate::bounds::u64_to(crate::bounds::MOST_TIMES))]
    every: u64,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let work = &arguments.work;
    train::check(work)?;
    if work.ranks != 1 {
        bail!("measure saves on {} ranks: one rank at a time is measured", work.ranks);
    }
    let subject = work.shape.subject()?;
    let (described, vocabulary) = (subject.describe(), subject.config.vocab_size as u32);
    // The memory plan then includes the captured copy.
    let settings = TrainerSettings { saves_in_background: true, ..train::settings(work, 0)? };
    let mut trainer = train::trainer(&subject.config, subject.parameters, settings)?;
    let folder = Scratch::new(&arguments.folder)?;
    let (mut step, mut memory) = (0, json!(null));
    let mut train_one = |trainer: &mut Trainer| -> Result<f64> {
        step += 1;
        let batch = train::batch(work, vocabulary, step, 0);
        let started = Instant::now();
        let report = trainer.train(&batch, &mut HostCollective::alone()).context("train")?;
        let number = |name: &str| report.metrics.get(name);
        memory = json!({"used_bytes": number("memory_used_bytes"), "planned_bytes": number("memory_planned_bytes")});
        Ok(started.elapsed().as_secs_f64())
    };
    // Warm-up: the first step touches memory that later ones reuse.
    train_one(&mut trainer)?;

    let (mut plain, mut beside, mut captures, mut writes, mut bytes) = (vec![], vec![], vec![], vec![], 0);
    for _ in 0..work.steps {
        plain.push(train_one(&mut trainer)?);
        let started = Instant::now();
        let captured = trainer.capture();
        captures.push(started.elapsed().as_secs_f64());
        bytes = captured.bytes();
        let (trained, written) = std::thread::scope(|scope| {
            let path = folder.0.as_path();
            let writer = scope.spawn(move || {
                let started = Instant::now();
                captured.write(path, &AtomicBool::new(false)).map(|_| started.elapsed().as_secs_f64())
            });
            let trained = train_one(&mut trainer);
            (trained, writer.join())
        });
        beside.push(trained?);
        let written = written.map_err(|_| anyhow::anyhow!("write: the thread panicked"))?;
        writes.push(written.context("write the captured state")?);
    }
    let started = Instant::now();
    trainer.save(&folder.0, true, None, &mut HostCollective::alone()).context("save in the foreground")?;
    let foreground = started.elapsed().as_secs_f64();
    let started = Instant::now();
    trainer.restore(&folder.0).context("resume")?;
    let resume = started.elapsed().as_secs_f64();

    let (step, beside, capture) = (median(&plain), median(&beside), median(&captures));
    let between = arguments.every as f64 * step;
    print(&json!({
        "bench": "save", "model": described, "state_bytes": bytes, "memory": memory, "step_seconds": step,
        "capture_seconds": capture, "write_seconds": median(&writes), "step_seconds_beside_writing": beside,
        "foreground_seconds": foreground, "resume_seconds": resume, "steps_between": arguments.every,
        "stall_share": capture / (between + capture),
        "stall_share_foreground": foreground / (between + foreground),
        // The slowdown of the step during the write is part of the checkpoint's cost.
        "cost_share": (capture + (beside - step).max(0.0)) / (between + capture),
    }));
    Ok(())
}

/// A temporary folder, removed on drop.
struct Scratch(PathBuf);

impl Scratch {
    fn new(parent: &Path) -> Result<Self> {
        let path = parent.join(format!("pacs-bench-save-{}", std::process::id()));
        fs::create_dir_all(&path).with_context(|| format!("create folder `{}`", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::warn!("`{}` was not removed: {error}", self.0.display());
        }
    }
}
