//! `pacs-worker bench train`.

use std::collections::HashMap;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use clap::builder::PossibleValuesParser;
use pacs_collective::Collective;
use pacs_learner::{IndexEntry, SequenceTokens, TrainBatch, Trainer, TrainerSettings};
use pacs_model::{ModelConfig, Parameters};
use pacs_runtime::{peak_resident_bytes, resident_bytes};
use pacs_spec::{JobSpec, ObjectiveKind};
use serde_json::json;

use super::ranks::on_ranks;
use super::{median, print, shape};

/// A training step on groups of samples with random tokens; half of the labels are 1.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  pacs-worker bench train --model models/smollm2-135m-instruct\n  \
                  pacs-worker bench train --model models/smollm2-135m-instruct --ranks 2 --threads 1 --sharding shard_all\n  \
                  pacs-worker bench train --model Qwen2.5-1.5B --random-weights --device cuda --groups 8 --samples 8 \\\n      \
                  --prompt-tokens 128 --answer-tokens 256 --micro-batch-tokens 16384")]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(super) shape: shape::Arguments,
    /// Groups per step.
    #[arg(long, default_value_t = 8, value_parser = crate::bounds::usize_to(crate::bounds::MOST_ITEMS))]
    groups: usize,
    /// Samples per group, an even number.
    #[arg(long, default_value_t = 8, value_parser = crate::bounds::usize_to(65_536))]
    samples: usize,
    /// Tokens per prompt.
    #[arg(long, default_value_t = 26, value_parser = crate::bounds::usize_to(crate::bounds::MOST_ITEMS))]
    prompt_tokens: usize,
    /// Mean tokens per answer; lengths are spread evenly from half of this to half as much again.
    #[arg(long, default_value_t = 16, value_parser = crate::bounds::usize_to(crate::bounds::MOST_ITEMS))]
    answer_tokens: usize,
    /// Token budget of one forward and backward pass.
    #[arg(long, default_value_t = 16384, value_parser = crate::bounds::usize_to(crate::bounds::MOST_ITEMS))]
    micro_batch_tokens: usize,
    /// Memory for training in GiB; layers that do not fit are recomputed (0: no limit).
    #[arg(long, default_value_t = 0.0, value_parser = crate::bounds::number_in(0.0, 1048576.0))]
    memory_gib: f64,
    /// Steps to measure, after one warm-up step.
    #[arg(long, default_value_t = 5, value_parser = crate::bounds::u64_to(crate::bounds::MOST_TIMES))]
    pub(super) steps: u64,
    /// Learner ranks, each a thread of this process with its own copy of the model and `--threads` compute threads;
    /// they exchange over TCP. Groups are dealt out in turn, so there must be at least as many.
    #[arg(long, default_value_t = 1, value_parser = crate::bounds::usize_to(4096))]
    pub(super) ranks: usize,
    /// Sharding of the training state over ranks.
    #[arg(long, default_value = "replicated", value_parser = ["replicated", "shard_optimizer", "shard_all"])]
    sharding: String,
    /// Make the weights a function of the batch alone, to the last bit (`resources.deterministic`).
    #[arg(long)]
    deterministic: bool,
    /// Objective with its published settings; by default that of a job without one.
    #[arg(long, default_value = ObjectiveKind::default().name(),
          value_parser = PossibleValuesParser::new(ObjectiveKind::ALL.map(ObjectiveKind::name)))]
    objective: String,
    /// Train adapters (LoRA) of this rank on all linear layers in place of the model.
    #[arg(long, value_name = "RANK", value_parser = crate::bounds::u32_to(512))]
    lora: Option<u32>,
}

/// Fails if the work makes no step.
pub(super) fn check(arguments: &Arguments) -> Result<()> {
    if arguments.samples < 2 || !arguments.samples.is_multiple_of(2) || arguments.groups == 0 {
        bail!("measure {} groups of {}: samples must be even, and both above 0", arguments.groups, arguments.samples);
    }
    if arguments.prompt_tokens == 0 || arguments.answer_tokens < 2 || arguments.steps == 0 {
        bail!("measure: prompts need 1 token, answers 2, and there must be a step");
    }
    if !(1..=arguments.groups.min(64)).contains(&arguments.ranks) {
        let most = arguments.groups.min(64);
        bail!("measure on {} ranks: from 1 to {most} are possible, for every rank takes a group", arguments.ranks);
    }
    Ok(())
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    check(arguments)?;
    let before = resident_bytes();
    let subject = arguments.shape.subject()?;
    let described = subject.describe();
    let vocabulary = subject.config.vocab_size as u32;
    let Parameters { layout, flat } = subject.parameters;
    let mut copies: Vec<Parameters> =
        (1..arguments.ranks).map(|_| Parameters { layout: layout.clone(), flat: flat.copy() }).collect();
    copies.push(Parameters { layout, flat });
    let config = &subject.config;
    let measured = on_ranks(copies, |rank, parameters, collective| {
        let mut trainer = trainer(config, parameters, settings(arguments, rank)?)?;
        let (mut seconds, mut planned) = (Vec::new(), 0.0);
        for step in 1..=arguments.steps + 1 {
            let batch = batch(arguments, vocabulary, step, rank);
            collective.barrier().context("wait for the other ranks")?;
            let started = Instant::now();
            let report = trainer.train(&batch, collective).context("train")?;
            let elapsed = started.elapsed().as_secs_f64();
            planned = report.metrics.get("memory_planned_bytes").copied().unwrap_or(planned);
            if step == 1 {
                continue;
            }
            seconds.push(elapsed);
            if rank == 0 {
                print(&json!({"bench": "train", "step": step - 1, "seconds": elapsed, "metrics": report.metrics}));
            }
        }
        Ok((seconds, planned))
    })?;
    // Every rank takes as long as the slowest.
    let seconds = &measured[0].0;
    // All ranks are threads of this process, so they share its peak.
    let used = peak_resident_bytes().saturating_sub(before);
    let planned: f64 = measured.iter().map(|(_, planned)| planned).sum();
    let lengths = answer_lengths(arguments);
    let answers: usize = lengths.iter().sum();
    let unshared = answers + lengths.len() * arguments.prompt_tokens;
    let computed = answers + arguments.groups * arguments.prompt_tokens - lengths.len();
    let median = median(seconds);
    print(&json!({
        "bench": "train", "model": described, "ranks": arguments.ranks, "sharding": arguments.sharding,
        "deterministic": arguments.deterministic,
        "objective": arguments.objective, "lora_rank": arguments.lora, "seconds": median,
        "host_memory": {"used_bytes": used, "planned_bytes": planned},
        "sequence_tokens": unshared, "sequence_tokens_per_second": unshared as f64 / median,
        "computed_tokens": computed, "computed_tokens_per_second": computed as f64 / median,
        "work": {"groups": arguments.groups, "samples": arguments.samples, "prompt_tokens": arguments.prompt_tokens,
                 "answer_lengths": lengths},
    }));
    Ok(())
}

/// A trainer of the model, or of adapters over it.
pub(super) fn trainer(config: &ModelConfig, parameters: Parameters, settings: TrainerSettings) -> Result<Trainer> {
    match settings.lora {
        None => Ok(Trainer::new(config.clone(), parameters, settings)),
        Some(_) => Trainer::adapted(config, parameters, settings).context("add adapters"),
    }
}

/// Settings of a default job, with the pass size and the ranks of the arguments.
///
/// The paths in the job are never read.
pub(super) fn settings(arguments: &Arguments, rank: usize) -> Result<TrainerSettings> {
    let Arguments { ranks, sharding, objective, deterministic, .. } = arguments;
    let lora = arguments.lora.map(|rank| format!("lora.rank = {rank}\n")).unwrap_or_default();
    let text = format!(
        "name = \"bench\"\n[model]\npath = \"-\"\n{lora}[data.train]\npath = \"none.jsonl\"\n[evaluation]\nevery_steps = 0\n\
         before = false\nafter = false\n[objective]\nkind = \"{objective}\"\n[resources]\nlearners = {ranks}\nsharding = \"{sharding}\"\n\
         deterministic = {deterministic}\n"
    );
    let spec: JobSpec = pacs_spec::parse(&text, Path::new("bench")).context("make the job of a measurement")?;
    let memory_bytes = (arguments.memory_gib > 0.0).then_some((arguments.memory_gib * 1_073_741_824.0) as u64);
    let micro_batch_tokens = arguments.micro_batch_tokens;
    let settings = TrainerSettings::new(&spec, rank, *ranks);
    // Memory is planned for training alone, without a checkpoint's copy.
    Ok(TrainerSettings { micro_batch_tokens, memory_bytes, saves_in_background: false, ..settings })
}

fn answer_lengths(arguments: &Arguments) -> Vec<usize> {
    let (count, mean) = (arguments.groups * arguments.samples, arguments.answer_tokens);
    // Multiplication by an odd constant shuffles the steps of the spread.
    (0..count).map(|i| (mean / 2 + (i * 7919 % count) * mean / count.max(1)).max(1)).collect()
}

/// One rank's share of a step: the groups that are dealt to it.
pub(super) fn batch(arguments: &Arguments, vocabulary: u32, step: u64, rank: usize) -> TrainBatch {
    let token =
        |a: u64, b: usize| (pacs_types::mix(step ^ (a << 20) ^ (b as u64) << 40) % u64::from(vocabulary)) as u32;
    let lengths = answer_lengths(arguments);
    let group = |position: usize| (position / arguments.samples) as u64;
    let index = lengths.iter().enumerate().map(|(position, length)| IndexEntry {
        group: group(position),
        sample: (position % arguments.samples) as u32,
        mini_batch: 0,
        rank: group(position) as usize % arguments.ranks,
        label: (position % 2) as f64,
        reward: (position % 2) as f64,
        answer_tokens: *length as u32,
        truncated: false,
        unit: None,
    });
    let sequences = lengths.iter().enumerate().map(|(position, length)| SequenceTokens {
        position,
        tokens: (0..*length).map(|place| token(position as u64 + 1_000, place)).collect(),
        rollout_logprobs: vec![0.0; *length],
        sampled_logprobs: Vec::new(),
        version: step.saturating_sub(1),
        routes: Vec::new(),
    });
    let prompts: HashMap<u64, Vec<u32>> = (0..arguments.groups as u64)
        .map(|group| (group, (0..arguments.prompt_tokens).map(|place| token(group, place)).collect()))
        .collect();
    let (index, sequences) = (index.collect(), sequences.collect());
    let mut batch = TrainBatch { step, index, prompts, prompt_routes: HashMap::new(), sequences };
    if arguments.deterministic {
        batch.cut_into_units();
        for entry in &mut batch.index {
            entry.rank = entry.unit.unwrap_or(0) % arguments.ranks;
        }
    }
    let TrainBatch { index, sequences, .. } = &mut batch;
    sequences.retain(|sequence| index[sequence.position].rank == rank);
    batch
}
