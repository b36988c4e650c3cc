//! `pacs-worker score`: log-probs of given answers.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use pacs_model::{Model, ModelConfig, Parameters, score};
use pacs_runtime::Exit;
use pacs_torch::tch::{Device, Kind};
use serde::{Deserialize, Serialize};

use crate::Failure;

/// Answers to score, and the model.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  echo '{\"id\":\"a\",\"prompt_tokens\":[1,2,3],\"tokens\":[4,5]}' | pacs-worker score --model models/m --input -"
)]
pub(crate) struct Arguments {
    /// Hugging Face folder of the model, or OWNER/NAME of the hub.
    #[arg(long)]
    model: PathBuf,
    /// PEFT folder of an adapter of the model, which is merged into it.
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// JSON lines {"id", "prompt_tokens", "tokens"}; `-` is standard input.
    #[arg(long)]
    input: PathBuf,
    /// Temperature, which divides the logits.
    #[arg(long, default_value_t = 1.0, value_parser = crate::bounds::number_in(0.01, 100.0))]
    temperature: f64,
    /// Compute in bfloat16 instead of float32.
    #[arg(long)]
    bfloat16: bool,
    /// Threads of libtorch; 0: one per core.
    #[arg(long, default_value_t = 0, value_parser = crate::bounds::usize_to(crate::bounds::MOST_THREADS))]
    threads: usize,
    /// Token budget of one forward pass.
    #[arg(long, default_value_t = 16384, value_parser = crate::bounds::usize_to(crate::bounds::MOST_ITEMS))]
    batch_tokens: usize,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    id: serde_json::Value,
    prompt_tokens: Vec<u32>,
    tokens: Vec<u32>,
}

#[derive(Debug, Serialize)]
struct Scored {
    id: serde_json::Value,
    logprobs: Vec<f32>,
}

pub(crate) fn run(mut arguments: Arguments) -> Result<Exit, Failure> {
    arguments.model = crate::hub::model(&arguments.model)?;
    write_scores(&arguments).map_err(Failure::config)?;
    Ok(Exit::Done)
}

fn write_scores(arguments: &Arguments) -> anyhow::Result<()> {
    let device: Device = pacs_torch::init(false, arguments.threads).context("start libtorch")?;
    let model = || format!("load model `{}`", arguments.model.display());
    let config = ModelConfig::read(&arguments.model).with_context(model)?;
    let requests = read_requests(arguments)?;
    let longest = requests.iter().map(|request| request.prompt_tokens.len() + request.tokens.len()).max();
    let config = config.for_sequences(longest.unwrap_or(0));
    let kind = if arguments.bfloat16 { Kind::BFloat16 } else { Kind::Float };
    let parameters = Parameters::load_with(&arguments.model, arguments.adapter.as_deref(), &config, kind, device)
        .with_context(model)?;
    let model = Model::new(&config, &parameters);
    let mut out = BufWriter::new(std::io::stdout().lock());
    let (ids, items): (Vec<_>, Vec<_>) =
        requests.into_iter().map(|request| (request.id, (request.prompt_tokens, request.tokens))).unzip();
    let scored = score(&model, items, arguments.temperature, arguments.batch_tokens)
        .with_context(|| format!("score `{}`", arguments.input.display()))?;
    for (id, logprobs) in ids.into_iter().zip(scored) {
        serde_json::to_writer(&mut out, &Scored { id, logprobs }).context("write to standard output")?;
        writeln!(out).context("write to standard output")?;
    }
    out.flush().context("write to standard output")
}

fn read_requests(arguments: &Arguments) -> anyhow::Result<Vec<Request>> {
    let name = arguments.input.display().to_string();
    let reader: Box<dyn BufRead> = if name == "-" {
        Box::new(BufReader::new(std::io::stdin()))
    } else {
        Box::new(BufReader::new(File::open(&arguments.input).with_context(|| format!("read `{name}`"))?))
    };
    let mut requests = Vec::new();
    for (number, line) in reader.lines().enumerate() {
        let number = number + 1;
        let line = line.with_context(|| format!("read `{name}` line {number}"))?;
        if line.trim().is_empty() {
            continue;
        }
        let request: Request = serde_json::from_str(&line).with_context(|| format!("read `{name}` line {number}"))?;
        if request.prompt_tokens.is_empty() || request.tokens.is_empty() {
            bail!("read `{name}` line {number}: prompt_tokens and tokens must not be empty");
        }
        requests.push(request);
    }
    Ok(requests)
}
