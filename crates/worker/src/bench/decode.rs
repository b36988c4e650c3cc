//! `pacs-worker bench decode` and `pacs-worker bench prefill`: single passes, compared with the limit
//! of memory bandwidth.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use pacs_model::ModelConfig;
use pacs_rollout::Engine;
use pacs_torch::tch::{Device, Kind, Tensor};
use serde_json::json;

use super::work::{self, PREFILL_TOKENS};
use super::{median, print, shape};

/// Decode steps: one token for every sample of a batch.
#[derive(Debug, Args)]
#[command(
    after_help = "A step reads all weights and the keys and values of all samples once: at the bandwidth of the memory \
                  that takes `floor_ms`.\n\nExamples:\n  pacs-worker bench decode --model models/smollm2-135m-instruct\n  \
                  pacs-worker bench decode --shape qwen2.5-0.5b --batch 1,8 --context 512 --steps 8"
)]
pub(crate) struct DecodeArguments {
    #[command(flatten)]
    shape: shape::Arguments,
    /// Samples that decode concurrently.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 8, 64], value_parser = crate::bounds::usize_to(crate::bounds::MOST_ITEMS))]
    batch: Vec<usize>,
    /// Tokens of each sample in the cache, each with a prompt of its own.
    #[arg(long, value_delimiter = ',', default_values_t = [128], value_parser = crate::bounds::usize_to(crate::bounds::MOST_ITEMS))]
    context: Vec<usize>,
    /// Let all samples share one prompt, which the cache holds once.
    #[arg(long)]
    shared_prompt: bool,
    /// Steps to measure, after two warm-up steps.
    #[arg(long, default_value_t = 32, value_parser = crate::bounds::u32_to(crate::bounds::MOST_ITEMS))]
    steps: u32,
    /// Launch every kernel separately, to see what CUDA graphs save.
    #[arg(long)]
    no_cuda_graphs: bool,
    /// Memory bandwidth in GB/s [default: measured by reading a large buffer]
    #[arg(long, value_parser = crate::bounds::number_in(0.001, 1000000.0))]
    bandwidth: Option<f64>,
}

/// Prefill passes over prompts.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  pacs-worker bench prefill --model models/smollm2-135m-instruct\n  \
                  pacs-worker bench prefill --shape qwen2.5-0.5b --batch 1 --context 2048,8192")]
pub(crate) struct PrefillArguments {
    #[command(flatten)]
    shape: shape::Arguments,
    /// Prompts per pass.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 8], value_parser = crate::bounds::usize_to(crate::bounds::MOST_ITEMS))]
    batch: Vec<usize>,
    /// Tokens per prompt.
    #[arg(long, value_delimiter = ',', default_values_t = [128, 512], value_parser = crate::bounds::usize_to(crate::bounds::MOST_ITEMS))]
    context: Vec<usize>,
    /// Repetitions to measure, after one warm-up.
    #[arg(long, default_value_t = 3, value_parser = crate::bounds::usize_to(crate::bounds::MOST_TIMES))]
    repeats: usize,
}

/// Decode steps before the measurement.
const WARM_STEPS: u32 = 2;

pub(crate) fn decode(arguments: &DecodeArguments) -> Result<()> {
    let above_zero = arguments.steps > 0 && arguments.bandwidth.is_none_or(|bandwidth| bandwidth > 0.0);
    check(&arguments.batch, &arguments.context, above_zero)?;
    let subject = arguments.shape.subject()?;
    let (described, config, kind) = (subject.describe(), subject.config.clone(), subject.kind);
    let weight_bytes = weight_bytes(&config, kind);
    let bandwidth = arguments.bandwidth.map_or_else(|| bandwidth(subject.device), |bandwidth| bandwidth * 1e9);
    let (context, rows) = (largest(&arguments.context), largest(&arguments.batch));
    // The first samples decode while the prompts of the last ones are computed.
    let passes = |batch: usize, context: usize| {
        if arguments.shared_prompt { 0 } else { (batch * context).div_ceil(PREFILL_TOKENS) as u32 }
    };
    let new_tokens = |batch, context| passes(batch, context) + arguments.steps + WARM_STEPS + 1;
    let longest = context + new_tokens(rows, context) as usize;
    let mut engine = work::engine(subject, rows, longest, !arguments.no_cuda_graphs)?;
    for &context in &arguments.context {
        for &batch in &arguments.batch {
            let groups = if arguments.shared_prompt { 1 } else { batch };
            for number in 0..groups {
                let new_tokens = new_tokens(batch, context);
                let group = work::group(&config, number as u64, (batch / groups) as u32, context, new_tokens);
                engine.submit(group).context("measure")?;
            }
            let seconds = steps(&mut engine, batch, arguments.steps)?;
            let step = median(&seconds);
            // The context grows during the measurement, and has grown by more for the first samples.
            let grown = f64::from(passes(batch, context)) / 2.0 + f64::from(WARM_STEPS);
            let held = context as f64 + grown + f64::from(arguments.steps) / 2.0;
            let kv_bytes = batch as f64 * held * kv_bytes_per_token(&config, kind);
            let bytes = weight_bytes + kv_bytes;
            print(&json!({
                "bench": "decode", "model": described, "batch": batch, "context": held,
                "shared_prompt": arguments.shared_prompt, "ms_per_step": step * 1e3,
                "tokens_per_second": batch as f64 / step, "weight_bytes": weight_bytes, "kv_bytes": kv_bytes,
                "bytes_per_second": bytes / step, "memory_bytes_per_second": bandwidth,
                "floor_ms": bytes / bandwidth * 1e3, "times_the_floor": step / (bytes / bandwidth),
                "device_kernels": engine.has_device_kernels(), "cuda_graphs": engine.recorded_passes(),
            }));
        }
    }
    Ok(())
}

/// Seconds of each step in which all of `batch` samples decode; runs until all have ended.
fn steps(engine: &mut Engine, batch: usize, wanted: u32) -> Result<Vec<f64>> {
    let mut seconds = Vec::new();
    let mut warm = 0;
    while !engine.is_idle() {
        let (before, started) = (engine.counts(), Instant::now());
        engine.step().context("generate")?;
        let elapsed = started.elapsed().as_secs_f64();
        let after = engine.counts();
        let decoded = after.generated_tokens - before.generated_tokens == batch as u64;
        // A step that completes a prompt computes more than one token per sample.
        if decoded && after.prompt_tokens == before.prompt_tokens {
            warm += 1;
            if warm > WARM_STEPS && seconds.len() < wanted as usize {
                seconds.push(elapsed);
            }
        }
    }
    if seconds.is_empty() {
        bail!("measure: the samples never decoded all at once; take fewer, or more --steps");
    }
    Ok(seconds)
}

pub(crate) fn prefill(arguments: &PrefillArguments) -> Result<()> {
    check(&arguments.batch, &arguments.context, arguments.repeats > 0)?;
    let subject = arguments.shape.subject()?;
    let (described, config, kind) = (subject.describe(), subject.config.clone(), subject.kind);
    let (longest, rows) = (largest(&arguments.context) + 1, largest(&arguments.batch));
    let mut engine = work::engine(subject, rows, longest, false)?;
    // Every weight but the embedding's is multiplied with every token, and the head's with one token per prompt.
    let table = (config.vocab_size * config.hidden) as f64;
    let heads = if config.tie_embeddings { 1.0 } else { 2.0 };
    let multiplied = config.parameter_count() as f64 - heads * table;
    for &context in &arguments.context {
        for &batch in &arguments.batch {
            let mut seconds = Vec::new();
            for repeat in 0..=arguments.repeats {
                for number in 0..batch {
                    engine.submit(work::group(&config, number as u64, 1, context, 1)).context("measure")?;
                }
                let run = work::run(&mut engine)?;
                if repeat > 0 {
                    seconds.push(run.seconds);
                }
            }
            let (seconds, tokens) = (median(&seconds), (batch * context) as f64);
            let passes = tokens / PREFILL_TOKENS as f64;
            let bytes = weight_bytes(&config, kind) * passes.ceil() + tokens * kv_bytes_per_token(&config, kind);
            print(&json!({
                "bench": "prefill", "model": described, "batch": batch, "context": context, "ms": seconds * 1e3,
                "tokens_per_second": tokens / seconds, "bytes_per_second": bytes / seconds,
                // Attention is left out, which grows with the square of the context.
                "flops_per_second": 2.0 * (multiplied * tokens + table * batch as f64) / seconds,
            }));
        }
    }
    Ok(())
}

fn largest(values: &[usize]) -> usize {
    values.iter().max().copied().unwrap_or(0)
}

fn check(batch: &[usize], context: &[usize], rest: bool) -> Result<()> {
    if batch.is_empty() || context.is_empty() || batch.contains(&0) || context.contains(&0) || !rest {
        bail!("measure: batches, contexts, steps, repeats and bandwidth must be above 0");
    }
    Ok(())
}

/// Bytes of weights that a step reads: all but an embedding that is not also the head.
fn weight_bytes(config: &ModelConfig, kind: Kind) -> f64 {
    let unread = if config.tie_embeddings { 0 } else { config.vocab_size * config.hidden };
    (config.parameter_count() - unread as usize) as f64 * kind.elt_size_in_bytes() as f64
}

fn kv_bytes_per_token(config: &ModelConfig, kind: Kind) -> f64 {
    (2 * config.layers * (config.kv_heads * config.head_dim) as usize * kind.elt_size_in_bytes()) as f64
}

/// Memory bandwidth of summing a large buffer (bytes/s), the best of five tries.
fn bandwidth(device: Device) -> f64 {
    const ELEMENTS: i64 = 1 << 27;
    let buffer = Tensor::ones([ELEMENTS], (Kind::Float, device));
    let once = || {
        let started = Instant::now();
        // Reading the result waits for the device.
        let sum = buffer.sum(Kind::Float).double_value(&[]);
        assert!(sum > 0.0, "ones add up to more than nothing");
        started.elapsed().as_secs_f64()
    };
    let best = (0..5).map(|_| once()).fold(f64::INFINITY, f64::min);
    (ELEMENTS as usize * Kind::Float.elt_size_in_bytes()) as f64 / best
}
