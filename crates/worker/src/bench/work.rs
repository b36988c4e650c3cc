//! Groups of random tokens for the engine, and timing of a run through it.

use std::time::Instant;

use anyhow::{Context, Result};
use pacs_model::ModelConfig;
use pacs_rollout::{Engine, EngineOptions, GroupJob, SamplingOptions};
use pacs_spec::Kernels;
use pacs_types::{GroupId, NoiseKey, SampleId, WeightVersion};

use super::shape::Subject;

/// Prompt tokens per pass, as in a rollout worker.
pub(crate) const PREFILL_TOKENS: usize = 2048;

/// Creates an engine for `rows` samples of at most `longest` tokens each, prompt included and not shared. Samples never
/// end before their length. With `cuda_graphs`, decode passes on a GPU are CUDA graphs.
pub(crate) fn engine(subject: Subject, rows: usize, longest: usize, cuda_graphs: bool) -> Result<Engine> {
    let Subject { mut config, parameters, tokenizer, .. } = subject;
    config.end_tokens.clear();
    let options = EngineOptions {
        rows,
        prefill_tokens: PREFILL_TOKENS,
        cache_tokens: rows * (longest + 2 * pacs_torch::BLOCK_TOKENS),
        kernels: Kernels::Auto,
        cuda_graphs,
    };
    Engine::new(config, parameters, WeightVersion(0), tokenizer, options).context("measure")
}

/// Creates a group with a prompt of random tokens, which depend on `number` alone.
pub(crate) fn group(
    config: &ModelConfig,
    number: u64,
    samples: u32,
    prompt_tokens: usize,
    new_tokens: u32,
) -> GroupJob {
    let vocabulary = config.vocab_size as u64;
    let prompt = (0..prompt_tokens as u64).map(|i| (pacs_types::mix(number << 32 | i) % vocabulary) as u32);
    let noise = |index| (index, NoiseKey::new(1, 0, SampleId { group: GroupId(number), index }));
    GroupJob {
        ticket: number,
        prompt: prompt.collect(),
        samples: (0..samples).map(noise).collect(),
        options: SamplingOptions {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            max_new_tokens: new_tokens,
            stop: Vec::new(),
        },
        records_routes: false,
    }
}

/// Time and counts of one run through the engine.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Run {
    pub(crate) seconds: f64,
    pub(crate) tokens: u64,
    pub(crate) steps: u64,
    /// Seconds until no sample was waiting; from then on rows run empty.
    pub(crate) seconds_full: f64,
    pub(crate) tokens_full: u64,
    pub(crate) preemptions: u64,
}

/// Runs the engine until all submitted groups have ended.
pub(crate) fn run(engine: &mut Engine) -> Result<Run> {
    let (before, started) = (engine.counts(), Instant::now());
    let mut run = Run::default();
    while !engine.is_idle() {
        let waited = engine.waiting() > 0;
        engine.step().context("generate")?;
        run.steps += 1;
        if waited {
            run.seconds_full = started.elapsed().as_secs_f64();
            run.tokens_full = engine.counts().generated_tokens - before.generated_tokens;
        }
    }
    run.seconds = started.elapsed().as_secs_f64();
    run.tokens = engine.counts().generated_tokens - before.generated_tokens;
    run.preemptions = engine.counts().preemptions - before.preemptions;
    Ok(run)
}
