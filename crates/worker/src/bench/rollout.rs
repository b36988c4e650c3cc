//! `pacs-worker bench rollout`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use pacs_model::ModelConfig;
use pacs_rollout::Engine;
use pacs_vllm::{Client, Drawing, Limits};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::work::{self, Run};
use super::{median, print, shape};

/// Longest time of one request to a server.
const SERVER_DEADLINE: Duration = Duration::from_secs(3600);

/// Groups of samples from prompts of random tokens; answers never end before their length.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  pacs-worker bench rollout --model models/smollm2-135m-instruct\n  \
                  pacs-worker bench rollout --model models/smollm2-135m-instruct --groups 1 --samples 1 --new-tokens 64\n  \
                  pacs-worker bench rollout --shape smollm2-135m --long-tail --groups 64 --rows 64")]
pub(crate) struct Arguments {
    #[command(flatten)]
    shape: shape::Arguments,
    /// Number of groups, one prompt each.
    #[arg(long, default_value_t = 8, value_parser = crate::bounds::u64_to(crate::bounds::MOST_ITEMS))]
    groups: u64,
    /// Samples per group.
    #[arg(long, default_value_t = 8, value_parser = crate::bounds::u32_to(65_536))]
    samples: u32,
    /// Tokens per prompt.
    #[arg(long, default_value_t = 32, value_parser = crate::bounds::usize_to(crate::bounds::MOST_ITEMS))]
    prompt_tokens: usize,
    /// Tokens per answer.
    #[arg(long, default_value_t = 64, value_parser = crate::bounds::u32_to(crate::bounds::MOST_ITEMS))]
    new_tokens: u32,
    /// Samples that decode concurrently; the others wait [default: all; with `--long-tail` an eighth]
    #[arg(long, value_parser = crate::bounds::usize_to(crate::bounds::MOST_ITEMS))]
    rows: Option<usize>,
    /// Measure twice: with answers of one length, and with a heavy-tailed distribution of lengths (Pareto, shape 1.5)
    /// of the same mean, at most eight times as long. Compares tokens per second until no sample is waiting.
    #[arg(long)]
    long_tail: bool,
    /// Launch every kernel separately, to see what CUDA graphs save.
    #[arg(long)]
    no_cuda_graphs: bool,
    /// Give a vLLM server the same work, http://HOST:PORT (docs/ENGINES.md). It serves the same model with
    /// --enable-scale-out, and room for as many sequences.
    #[arg(long, value_name = "URL", conflicts_with = "long_tail")]
    vllm: Option<String>,
    /// Repetitions of the whole work, after one warm-up.
    #[arg(long, default_value_t = 3, value_parser = crate::bounds::usize_to(crate::bounds::MOST_TIMES))]
    repeats: usize,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if arguments.groups == 0 || arguments.samples == 0 || arguments.prompt_tokens == 0 || arguments.new_tokens == 0 {
        bail!("measure: groups, samples, prompt tokens and new tokens must be above 0");
    }
    if arguments.repeats == 0 || arguments.rows == Some(0) {
        bail!("measure: repeats and rows must be above 0");
    }
    let all = arguments.groups as usize * arguments.samples as usize;
    let rows = arguments.rows.unwrap_or(if arguments.long_tail { all.div_ceil(8) } else { all });
    if arguments.long_tail && rows >= all {
        bail!("measure the long tail: {all} samples do not wait for {rows} rows; take fewer rows or more groups");
    }
    let subject = arguments.shape.subject()?;
    let (described, config) = (subject.describe(), subject.config.clone());
    let uniform = vec![arguments.new_tokens; arguments.groups as usize];
    let heavy = heavy_tail(arguments);
    let lengths = if arguments.long_tail {
        vec![("uniform", uniform), ("heavy_tail", heavy)]
    } else {
        vec![("uniform", uniform)]
    };
    let longest = lengths.iter().flat_map(|(_, lengths)| lengths).max().copied().unwrap_or(0) as usize;
    let mut engine = work::engine(subject, rows, arguments.prompt_tokens + longest, !arguments.no_cuda_graphs)?;
    let mut full = Vec::new();
    for (name, lengths) in &lengths {
        let runs = measure(arguments, &mut engine, &config, name, lengths)?;
        let middle = |value: fn(&Run) -> f64| median(&runs.iter().map(value).collect::<Vec<_>>());
        let (seconds, last) = (middle(|run| run.seconds), runs[runs.len() - 1]);
        full.push(middle(|run| run.tokens_full as f64 / run.seconds_full));
        let mut line = json!({
            "bench": "rollout", "engine": "native", "model": described, "lengths": name, "seconds": seconds, "new_tokens": last.tokens,
            "tokens_per_second": last.tokens as f64 / seconds, "steps": last.steps, "rows": rows,
            "preemptions": last.preemptions, "cuda_graphs": engine.recorded_passes(),
            "work": {"groups": arguments.groups, "samples": arguments.samples,
                     "prompt_tokens": arguments.prompt_tokens, "answer_lengths": lengths},
        });
        if arguments.long_tail {
            line["tokens_per_second_while_samples_wait"] = json!(full[full.len() - 1]);
        }
        print(&line);
    }
    if let Some(url) = &arguments.vllm {
        // The native engine's threads must not take the server's cores.
        drop(engine);
        let (server, seconds, tokens) = measure_server(arguments, url, &config, rows)?;
        print(&json!({
            "bench": "rollout", "engine": "vllm", "server": server, "seconds": seconds, "new_tokens": tokens,
            "tokens_per_second": tokens as f64 / seconds, "rows": rows, "native_over_vllm": full[0] / (tokens as f64 / seconds),
        }));
    }
    if let [uniform, heavy] = full[..] {
        print(&json!({"bench": "rollout", "heavy_tail_over_uniform": heavy / uniform, "target": "0.9 or more"}));
    }
    Ok(())
}

/// Runs the work once as a warm-up, then as often as requested.
fn measure(
    arguments: &Arguments,
    engine: &mut Engine,
    config: &ModelConfig,
    name: &str,
    lengths: &[u32],
) -> Result<Vec<Run>> {
    let mut runs = Vec::new();
    for repeat in 0..=arguments.repeats {
        for (number, length) in (0..).zip(lengths) {
            let group = work::group(config, number, arguments.samples, arguments.prompt_tokens, *length);
            engine.submit(group).context("measure")?;
        }
        let run = work::run(engine)?;
        if repeat > 0 {
            let line: Value = json!({"bench": "rollout", "lengths": name, "repeat": repeat, "seconds": run.seconds,
                                     "tokens_per_second": run.tokens as f64 / run.seconds});
            print(&line);
            runs.push(run);
        }
    }
    Ok(runs)
}

/// Has a server do the work, with as many requests at once as the native engine has rows; returns its version, median seconds and
/// tokens.
fn measure_server(arguments: &Arguments, url: &str, config: &ModelConfig, rows: usize) -> Result<(String, f64, usize)> {
    let authority = pacs_spec::endpoint_authority(url).with_context(|| format!("`{url}` is not http://HOST:PORT"))?;
    let limits = Limits { request: SERVER_DEADLINE, update: SERVER_DEADLINE, ..Limits::default() };
    let client = Client::new(authority, None, limits);
    let runtime = tokio::runtime::Runtime::new().context("start a runtime")?;
    runtime.block_on(async {
        let server = client.facts().await.with_context(|| format!("server {url}"))?.version;
        let (mut seconds, mut tokens) = (Vec::new(), 0);
        for repeat in 0..=arguments.repeats {
            let places = Arc::new(Semaphore::new(rows));
            let (mut requests, started) = (JoinSet::new(), Instant::now());
            for number in 0..arguments.groups {
                let group =
                    work::group(config, number, arguments.samples, arguments.prompt_tokens, arguments.new_tokens);
                let prompt: Arc<[u32]> = group.prompt.into();
                for (_, noise) in group.samples {
                    let (client, places, prompt) = (client.clone(), Arc::clone(&places), Arc::clone(&prompt));
                    let max_new_tokens = arguments.new_tokens;
                    requests.spawn(async move {
                        let _place = places.acquire().await;
                        let seed = noise.bits() >> 1;
                        let (end_tokens, stop) = (&[][..], &[][..]);
                        let drawing = Drawing {
                            temperature: 1.0,
                            top_p: 1.0,
                            top_k: 0,
                            min_p: 0.0,
                            seed,
                            max_new_tokens,
                            end_tokens,
                            stop,
                        };
                        // Another salt each time: the work is to be done, not remembered.
                        client.count_tokens(&prompt, &drawing, &format!("bench-{repeat}")).await
                    });
                }
            }
            tokens = 0;
            while let Some(counted) = requests.join_next().await {
                tokens += counted.context("a request panicked")?.with_context(|| format!("server {url}"))?;
            }
            let took = started.elapsed().as_secs_f64();
            if repeat > 0 {
                print(&json!({"bench": "rollout", "engine": "vllm", "repeat": repeat, "seconds": took,
                              "tokens_per_second": tokens as f64 / took}));
                seconds.push(took);
            }
        }
        Ok((server, median(&seconds), tokens))
    })
}

/// Answer length of each group: a Pareto variable of shape 1.5, whose mean is three times its minimum.
fn heavy_tail(arguments: &Arguments) -> Vec<u32> {
    let mean = f64::from(arguments.new_tokens);
    let quantile = |i: u64| (pacs_types::mix(i) >> 11) as f64 / (1u64 << 53) as f64;
    let length = |i: u64| (mean / 3.0 * (1.0 - quantile(i)).powf(-1.0 / 1.5)).min(8.0 * mean).max(1.0);
    (0..arguments.groups).map(|i| length(i) as u32).collect()
}
