//! Groups of random tokens for the engine, and how long it takes over them.

use std::time::Instant;

use anyhow::{Context, Result};
use pacs_model::ModelConfig;
use pacs_rollout::{Engine, EngineOptions, GroupJob, SamplingOptions};
use pacs_spec::Kernels;
use pacs_types::{GroupId, NoiseKey, SampleId, WeightVersion};

use super::shape::Subject;

/// Tokens of prompts in one pass, as in a rollout worker.
pub(crate) const PREFILL_TOKENS: usize = 2048;

/// An engine that runs `rows` samples of at most `longest` tokens, prompt included, none of which shares its prompt; its
/// samples do not end before their length. On a GPU passes that decode are CUDA graphs where that is wanted.
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

/// A group with a prompt of random tokens; the same for the same number.
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
    }
}

/// What a run through the engine took.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Run {
    pub(crate) seconds: f64,
    pub(crate) tokens: u64,
    pub(crate) steps: u64,
    /// Until no sample waited any more: from then on rows run empty.
    pub(crate) seconds_full: f64,
    pub(crate) tokens_full: u64,
    pub(crate) preemptions: u64,
}

/// Runs everything that was submitted to its end.
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
