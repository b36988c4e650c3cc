//! `pacs-worker bench rollout`.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use pacs_rollout::{Engine, EngineLimits, GroupJob, SamplingOptions};
use pacs_text::Tokenizer;
use pacs_types::{GroupId, NoiseKey, SampleId, WeightVersion};
use serde_json::json;

use super::{median, print, shape};

/// The work: groups of samples from prompts of random tokens; answers do not end before their length.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  pacs-worker bench rollout --model models/smollm2-135m-instruct\n  \
                  pacs-worker bench rollout --model models/smollm2-135m-instruct --groups 1 --samples 1 --new-tokens 64\n  \
                  pacs-worker bench rollout --model models/smollm2-135m-instruct --long-tail --rows 32")]
pub(crate) struct Arguments {
    #[command(flatten)]
    shape: shape::Arguments,
    /// Groups, one prompt each.
    #[arg(long, default_value_t = 8)]
    groups: u64,
    /// Samples of a group.
    #[arg(long, default_value_t = 8)]
    samples: u32,
    /// Tokens of a prompt.
    #[arg(long, default_value_t = 32)]
    prompt_tokens: usize,
    /// Tokens of an answer.
    #[arg(long, default_value_t = 64)]
    new_tokens: u32,
    /// Samples that run at once; the others wait [default: all]
    #[arg(long)]
    rows: Option<usize>,
    /// Draw the lengths of groups' answers from a heavy-tailed distribution (Pareto, shape 1.5) with the mean of
    /// `--new-tokens`, at most eight times as long.
    #[arg(long)]
    long_tail: bool,
    /// Times that the whole work is done and measured, behind one that is not.
    #[arg(long, default_value_t = 3)]
    repeats: usize,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if arguments.groups == 0 || arguments.samples == 0 || arguments.prompt_tokens == 0 || arguments.new_tokens == 0 {
        bail!("measure: groups, samples, prompt tokens and new tokens must be above 0");
    }
    let mut subject = arguments.shape.subject()?;
    let described = subject.describe();
    subject.config.end_tokens.clear();
    let tokenizer = Tokenizer::read(&arguments.shape.model).context("measure")?;
    let vocabulary = subject.config.vocab_size as u64;
    let rows = arguments.rows.unwrap_or(arguments.groups as usize * arguments.samples as usize);
    let limits = EngineLimits { rows, prefill_tokens: 8192 };
    let mut engine = Engine::new(subject.config, subject.parameters, WeightVersion(0), Arc::new(tokenizer), limits);
    let lengths = lengths(arguments);
    let tokens: u64 = lengths.iter().map(|length| u64::from(*length) * u64::from(arguments.samples)).sum();
    let (mut seconds, mut steps) = (Vec::new(), 0);
    for repeat in 0..=arguments.repeats {
        for (group, length) in (0..).zip(&lengths) {
            engine.submit(job(arguments, group, *length, vocabulary)).context("measure")?;
        }
        let started = Instant::now();
        steps = 0;
        while !engine.is_idle() {
            engine.step().context("generate")?;
            steps += 1;
        }
        let elapsed = started.elapsed().as_secs_f64();
        if repeat > 0 {
            seconds.push(elapsed);
            print(&json!({"bench": "rollout", "repeat": repeat, "seconds": elapsed,
                          "tokens_per_second": tokens as f64 / elapsed}));
        }
    }
    let median = median(&seconds);
    print(&json!({
        "bench": "rollout", "model": described, "seconds": median, "new_tokens": tokens,
        "tokens_per_second": tokens as f64 / median, "steps": steps, "rows": rows,
        "work": {"groups": arguments.groups, "samples": arguments.samples, "prompt_tokens": arguments.prompt_tokens,
                 "answer_lengths": lengths},
    }));
    Ok(())
}

fn lengths(arguments: &Arguments) -> Vec<u32> {
    let mean = f64::from(arguments.new_tokens);
    if !arguments.long_tail {
        return vec![arguments.new_tokens; arguments.groups as usize];
    }
    // A Pareto variable of shape 1.5 has three times its least value as mean.
    let quantile = |i: u64| (pacs_types::mix(i) >> 11) as f64 / (1u64 << 53) as f64;
    let length = |i: u64| (mean / 3.0 * (1.0 - quantile(i)).powf(-1.0 / 1.5)).min(8.0 * mean).max(1.0);
    (0..arguments.groups).map(|i| length(i) as u32).collect()
}

fn job(arguments: &Arguments, group: u64, new_tokens: u32, vocabulary: u64) -> GroupJob {
    let prompt = (0..arguments.prompt_tokens as u64).map(|i| (pacs_types::mix(group << 32 | i) % vocabulary) as u32);
    let noise = |index| (index, NoiseKey::new(1, 0, SampleId { group: GroupId(group), index }));
    GroupJob {
        ticket: group,
        prompt: prompt.collect(),
        samples: (0..arguments.samples).map(noise).collect(),
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
