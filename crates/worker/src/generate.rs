//! `pacs-worker generate`: samples for prompts of a file, through the rollout engine.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use pacs_data::{PromptRow, read_prompts};
use pacs_model::{ModelConfig, Parameters};
use pacs_rollout::{Engine, EngineOptions, GroupJob, SamplingOptions, cache_tokens};
use pacs_runtime::Exit;
use pacs_spec::Kernels;
use pacs_text::Tokenizer;
use pacs_types::{FinishReason, GroupId, NoiseKey, Sample, SampleId, WeightVersion};
use serde::Serialize;
use serde_json::Value;

use crate::Failure;
use crate::compute::Compute;
use crate::prompting::Prompting;

/// Prompts, model and sampling settings.
#[derive(Debug, Args)]
#[command(
    after_help = "Input, a JSON object a line: {\"prompt\": \"…\"} is taken as it is; {\"messages\": [{\"role\": \"user\", \
                  \"content\": \"…\"}]} is written with the model's chat template; {\"question\": \"…\"} is one message of the \
                  user, with --suffix after it and --system before it. An `id` comes back with the samples.\n\n\
                  Output, a JSON object a sample, in the order of the input: row (line of the input), id, sample, \
                  prompt_tokens (how many), text, tokens, logprobs (of the policy at the temperature), sampled_logprobs (of \
                  the distribution after top-k, top-p and min-p), finish (stop or length).\n\n\
                  Examples:\n  pacs-worker generate --model models/smollm2-135m-instruct --input questions.jsonl --output \
                  samples.jsonl --n 8 --max-new-tokens 256\n  \
                  echo '{\"question\": \"What is 2 + 3?\"}' | pacs-worker generate --model models/smollm2-135m-instruct \
                  --temperature 0\n  \
                  pacs-worker generate --model models/m --input p.jsonl --top-p 0.95 --min-p 0.02 --stop '\\n\\n' --stop 'Q:'\n  \
                  pacs-worker generate --model models/m --input q.jsonl --chat-template chat.jinja \\\n      \
                  --template-variables '{\"enable_thinking\": false}'"
)]
pub(crate) struct Arguments {
    /// Hugging Face folder of the model, or OWNER/NAME of the hub.
    #[arg(long)]
    model: PathBuf,
    /// PEFT folder of an adapter of the model, which is merged into it.
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Prompts as JSON lines; `-` is standard input.
    #[arg(long, default_value = "-")]
    input: PathBuf,
    /// File for the samples, as JSON lines; `-` is standard output. An existing file is replaced.
    #[arg(long, default_value = "-")]
    output: PathBuf,
    /// Samples per prompt, 1 to 1024.
    #[arg(long, default_value_t = 1)]
    n: u32,
    /// Token limit of a sample.
    #[arg(long, default_value_t = 512, value_parser = crate::bounds::u32_to(crate::bounds::MOST_ITEMS))]
    max_new_tokens: u32,
    /// Sampling temperature, 0.01 to 10; 0 takes the most probable token, with log-probs at temperature 1.
    #[arg(long, default_value_t = 1.0)]
    temperature: f64,
    /// Nucleus: smallest set of tokens with this probability; 1 is off.
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    /// Sample from the k most probable tokens only; 0 is off.
    #[arg(long, default_value_t = 0)]
    top_k: u32,
    /// Sample only tokens with at least this share of the most probable token's probability; 0 is off.
    #[arg(long, default_value_t = 0.0)]
    min_p: f64,
    /// Seed of the noise; a sample is a function of the seed, its row in the input and its number.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// String that ends a sample, besides the model's end tokens; may be repeated. `\n` and `\t` stand
    /// for the characters.
    #[arg(long)]
    stop: Vec<String>,
    /// Text after every question.
    #[arg(long, default_value = "")]
    suffix: String,
    /// System message before every question; the chat template may bring its own.
    #[arg(long)]
    system: Option<String>,
    #[command(flatten)]
    prompting: Prompting,
    /// Samples that decode concurrently.
    #[arg(long, default_value_t = 64)]
    rows: usize,
    /// Tokens that the KV cache holds [default: what the rows could need, or what fits into 40 % of the memory]
    #[arg(long, value_parser = crate::bounds::usize_to(1 << 32))]
    cache_tokens: Option<usize>,
    /// Compute with libtorch's own operations, one sequence at a time: slow, but bit-identical whatever else runs.
    #[arg(long)]
    reference: bool,
    #[command(flatten)]
    compute: Compute,
}

/// One line of the output, a sample.
#[derive(Debug, Serialize)]
struct Line<'a> {
    row: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a Value>,
    sample: u32,
    prompt_tokens: usize,
    text: &'a str,
    tokens: &'a [u32],
    logprobs: &'a [f32],
    sampled_logprobs: &'a [f32],
    finish: &'static str,
}

pub(crate) fn run(mut arguments: Arguments) -> Result<Exit, Failure> {
    arguments.model = crate::hub::model(&arguments.model)?;
    generate(&arguments).map_err(Failure::config)?;
    Ok(Exit::Done)
}

fn generate(arguments: &Arguments) -> Result<()> {
    let options = sampling(arguments)?;
    let model = || format!("load model `{}`", arguments.model.display());
    let config = ModelConfig::read(&arguments.model).with_context(model)?;
    let rows = read_rows(arguments)?;
    let config = config.for_sequences(longest(arguments, &rows));
    check_lengths(arguments, &config, &rows)?;
    let mut out = Output::create(&arguments.output)?;
    if rows.is_empty() {
        return out.end();
    }
    let mut engine = engine(arguments, config, &rows)?;
    let mut progress = Progress::new(rows.len(), arguments.n);
    let mut submitted = 0;
    // Groups that were submitted and are not yet written.
    let mut groups: BTreeMap<usize, Vec<Option<Sample>>> = BTreeMap::new();
    let mut written = 0;
    while written < rows.len() {
        // A few waiting samples suffice to keep all rows busy.
        while submitted < rows.len() && engine.waiting() < arguments.n as usize {
            engine.submit(group(arguments, &options, submitted, &rows[submitted])).context("generate")?;
            groups.insert(submitted, vec![None; arguments.n as usize]);
            submitted += 1;
        }
        for finished in engine.step().context("generate")? {
            let place = usize::try_from(finished.ticket).context("read a ticket")?;
            if let Some(sample) = groups.get_mut(&place).and_then(|group| group.get_mut(finished.index as usize)) {
                progress.finished(&finished.sample);
                *sample = Some(finished.sample);
            }
        }
        while let Some(group) = groups.first_entry().filter(|group| group.get().iter().all(Option::is_some)) {
            let (place, samples) = group.remove_entry();
            out.write(&rows[place], &samples)?;
            written += 1;
        }
        progress.show(written, &engine, false);
    }
    progress.show(written, &engine, true);
    out.end()
}

fn sampling(arguments: &Arguments) -> Result<SamplingOptions> {
    let &Arguments { n, max_new_tokens, temperature, top_p, top_k, min_p, rows, .. } = arguments;
    let within = |name: &str, holds: bool, value: &dyn std::fmt::Display, expected: &str| {
        if holds { Ok(()) } else { bail!("generate: --{name} {value}: expected {expected}") }
    };
    within("n", (1..=1024).contains(&n), &n, "1 to 1024")?;
    within("max-new-tokens", max_new_tokens > 0, &max_new_tokens, "1 or more")?;
    let greedy = temperature == 0.0;
    within("temperature", greedy || (0.01..=10.0).contains(&temperature), &temperature, "0, or 0.01 to 10")?;
    within("top-p", top_p > 0.0 && top_p <= 1.0, &top_p, "above 0, at most 1")?;
    within("min-p", (0.0..1.0).contains(&min_p), &min_p, "0 to below 1")?;
    within("rows", (1..=65536).contains(&rows), &rows, "1 to 65536")?;
    if greedy && (top_k != 0 || top_p < 1.0 || min_p > 0.0) {
        bail!("generate: --top-k, --top-p and --min-p have no effect while --temperature is 0");
    }
    if greedy && n > 1 {
        bail!("generate: --n {n} samples are all the same while --temperature is 0");
    }
    let stop: Vec<String> = arguments.stop.iter().map(|stop| stop.replace("\\n", "\n").replace("\\t", "\t")).collect();
    if stop.len() > 64 || stop.iter().any(String::is_empty) {
        bail!("generate: expected at most 64 --stop strings, none empty");
    }
    let (temperature, top_k) = if greedy { (1.0, 1) } else { (temperature, top_k) };
    Ok(SamplingOptions { temperature, top_p, top_k, min_p, max_new_tokens, stop })
}

fn read_rows(arguments: &Arguments) -> Result<Vec<PromptRow>> {
    let prompting = &arguments.prompting;
    let prompter = prompting
        .prompter(&arguments.model, arguments.system.clone(), arguments.suffix.clone())
        .with_context(|| format!("load model `{}`", arguments.model.display()))?;
    let mut reader: Box<dyn BufRead> = if is_standard(&arguments.input) {
        Box::new(BufReader::new(std::io::stdin()))
    } else {
        pacs_data::open_text(&arguments.input)?
    };
    Ok(read_prompts(&mut reader, &arguments.input, &prompter)?)
}

fn is_standard(path: &Path) -> bool {
    path == Path::new("-")
}

/// Fails before any computation if a row cannot be finished.
fn check_lengths(arguments: &Arguments, config: &ModelConfig, rows: &[PromptRow]) -> Result<()> {
    let new = arguments.max_new_tokens as usize;
    let cache = arguments.cache_tokens.unwrap_or(usize::MAX);
    for row in rows {
        let prompt = row.prompt.tokens.len();
        let place = || format!("generate from `{}`:{}", arguments.input.display(), row.line);
        let (positions, longest) = (config.max_positions, prompt + new);
        if longest > positions {
            bail!("{}: {prompt} tokens and --max-new-tokens {new} exceed the model's {positions} positions", place());
        }
        if longest > cache {
            bail!("{}: {prompt} tokens and --max-new-tokens {new} exceed --cache-tokens {cache}", place());
        }
        if let Some(token) = row.prompt.tokens.iter().find(|token| i64::from(**token) >= config.vocab_size) {
            bail!("{}: the tokenizer gives token {token}, the model has {}", place(), config.vocab_size);
        }
    }
    Ok(())
}

/// Tokens of the longest prompt and answer.
fn longest(arguments: &Arguments, rows: &[PromptRow]) -> usize {
    rows.iter().map(|row| row.prompt.tokens.len()).max().unwrap_or(0) + arguments.max_new_tokens as usize
}

fn engine(arguments: &Arguments, config: ModelConfig, rows: &[PromptRow]) -> Result<Engine> {
    let model = || format!("load model `{}`", arguments.model.display());
    let (kind, device) = arguments.compute.start()?;
    let parameters = Parameters::load_with(&arguments.model, arguments.adapter.as_deref(), &config, kind, device)
        .with_context(model)?;
    let tokenizer = Arc::new(Tokenizer::read(&arguments.model).with_context(model)?);
    let longest = longest(arguments, rows);
    let most = arguments.rows.min(rows.len() * arguments.n as usize);
    let tokens = arguments.cache_tokens.unwrap_or_else(|| cache_tokens(&config, kind, device, false, [most, longest]));
    let options = EngineOptions {
        rows: arguments.rows,
        prefill_tokens: 2048,
        cache_tokens: tokens,
        kernels: if arguments.reference { Kernels::Reference } else { Kernels::Auto },
        cuda_graphs: true,
    };
    Engine::new(config, parameters, WeightVersion(0), Some(tokenizer), options).context("make room for generation")
}

fn group(arguments: &Arguments, options: &SamplingOptions, place: usize, row: &PromptRow) -> GroupJob {
    let group = GroupId(place as u64);
    let noise = |index| (index, NoiseKey::new(arguments.seed, 0, SampleId { group, index }));
    GroupJob {
        ticket: group.0,
        prompt: row.prompt.tokens.clone(),
        samples: (0..arguments.n).map(noise).collect(),
        options: options.clone(),
        records_routes: false,
    }
}

/// Destination of the samples.
struct Output {
    writer: BufWriter<Box<dyn Write>>,
    name: String,
}

impl Output {
    fn create(path: &Path) -> Result<Self> {
        if is_standard(path) {
            let writer = BufWriter::new(Box::new(std::io::stdout()) as Box<dyn Write>);
            return Ok(Self { writer, name: "standard output".to_owned() });
        }
        let name = format!("`{}`", path.display());
        let file = File::create(path).with_context(|| format!("write {name}"))?;
        Ok(Self { writer: BufWriter::new(Box::new(file)), name })
    }

    /// Writes and flushes the samples of a row, so that readers see them at once.
    fn write(&mut self, row: &PromptRow, samples: &[Option<Sample>]) -> Result<()> {
        for (number, sample) in (0..).zip(samples.iter().flatten()) {
            let line = Line {
                row: row.line,
                id: row.id.as_ref(),
                sample: number,
                prompt_tokens: row.prompt.tokens.len(),
                text: &sample.text,
                tokens: &sample.tokens,
                logprobs: &sample.logprobs,
                sampled_logprobs: sample.behaviour_logprobs(),
                finish: match sample.finish {
                    FinishReason::Stop => "stop",
                    FinishReason::Length => "length",
                },
            };
            let text = serde_json::to_string(&line).context("write a sample as JSON")?;
            writeln!(self.writer, "{}", pacs_runtime::harmless_json(&text))
                .with_context(|| format!("write {}", self.name))?;
        }
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        self.writer.flush().with_context(|| format!("write {}", self.name))
    }
}

/// Progress messages on standard error.
struct Progress {
    started: Instant,
    shown: Instant,
    prompts: usize,
    samples: usize,
    finished: usize,
    tokens: usize,
}

/// Shortest time between two progress messages.
const SHOWN_EVERY: Duration = Duration::from_secs(5);

impl Progress {
    fn new(prompts: usize, n: u32) -> Self {
        let now = Instant::now();
        Self { started: now, shown: now, prompts, samples: prompts * n as usize, finished: 0, tokens: 0 }
    }

    fn finished(&mut self, sample: &Sample) {
        self.finished += 1;
        self.tokens += sample.tokens.len();
    }

    fn show(&mut self, written: usize, engine: &Engine, last: bool) {
        if !last && self.shown.elapsed() < SHOWN_EVERY {
            return;
        }
        self.shown = Instant::now();
        let rate = engine.counts().generated_tokens as f64 / self.started.elapsed().as_secs_f64();
        eprintln!(
            "{written}/{} prompts written, {}/{} samples done, {} running, {:.0} tokens/s, {:.0} s",
            self.prompts,
            self.finished,
            self.samples,
            engine.running(),
            rate,
            self.started.elapsed().as_secs_f64()
        );
    }
}
