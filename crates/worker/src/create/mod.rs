//! `pacs-worker create`: a small random model, for tasks that need no knowledge of a language.

mod tokenizer;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use pacs_model::{ModelConfig, Parameters};
use pacs_runtime::Exit;
use pacs_torch::tch::{Device, Kind};
use serde_json::{Value, json};

use crate::Failure;

/// Size of the model, and its folder.
#[derive(Debug, Args)]
#[command(
    long_about = "Makes a model of random weights with a tokenizer of single characters.\n\nThe folder is a Hugging Face one \
                  (llama architecture, tied embeddings, no chat template). The tokenizer has the printable characters of ASCII \
                  and the words in which the built-in tasks ask, so that prompts are short. Such a model knows nothing: `sft` \
                  gives it a pass rate from which rewards give signal.",
    after_help = "Example, from nothing to a model that is right about one time in seven:\n  \
                  pacs-worker create models/blank\n  \
                  pacs-worker sft --model models/blank --job deploy/studies/jobs/addition.toml --out models/addition \\\n      \
                  --learning-rate 1e-3 --batch 64 --updates 2000 --eval-every 20 --until-probability 0.15"
)]
pub(crate) struct Arguments {
    /// Folder to write; must not exist, or be empty.
    out: PathBuf,
    /// Number of transformer layers.
    #[arg(long, default_value_t = 4)]
    layers: u32,
    /// Width of the residual stream.
    #[arg(long, default_value_t = 192)]
    hidden: u32,
    /// Attention heads; each is `hidden / heads` wide, an even number.
    #[arg(long, default_value_t = 6)]
    heads: u32,
    /// Width of the feed-forward layers.
    #[arg(long, default_value_t = 512)]
    ffn: u32,
    /// Longest sequence, prompt and answer together.
    #[arg(long, default_value_t = 256)]
    positions: u32,
    /// Seed of the weights.
    #[arg(long, default_value_t = 1)]
    seed: u32,
}

pub(crate) fn run(arguments: &Arguments) -> Result<Exit, Failure> {
    create(arguments).with_context(|| format!("create `{}`", arguments.out.display())).map_err(Failure::config)?;
    Ok(Exit::Done)
}

fn create(arguments: &Arguments) -> Result<()> {
    let Arguments { out, hidden, heads, .. } = arguments;
    if fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some()) {
        bail!("it is not empty; remove it or name another folder");
    }
    ensure!(*heads > 0 && hidden.is_multiple_of(*heads), "`--hidden` {hidden} is not a multiple of `--heads` {heads}");
    let shape = shape(arguments);
    // Checked before anything is written, so that invalid sizes leave no files.
    let config = ModelConfig::from_json(&shape.to_string(), &out.join("config.json"))?;
    pacs_torch::init(false, 1).context("start libtorch")?;
    let parameters = Parameters::random(&config, Kind::Float, Device::Cpu, i64::from(arguments.seed));
    fs::create_dir_all(out)?;
    let write = |name: &str, content: &Value| {
        fs::write(out.join(name), format!("{content:#}\n")).with_context(|| format!("write `{name}`"))
    };
    write("tokenizer.json", &tokenizer::file())?;
    write("generation_config.json", &json!({"eos_token_id": tokenizer::END}))?;
    write("config.json", &shape)?;
    parameters.save_hf(out, out, Kind::Float)?;
    println!("{} parameters written to {}", config.parameter_count(), out.display());
    Ok(())
}

fn shape(arguments: &Arguments) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokenizer::size(),
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.ffn,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.heads,
        "num_key_value_heads": arguments.heads,
        "max_position_embeddings": arguments.positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": true,
        "eos_token_id": tokenizer::END,
        "pad_token_id": tokenizer::UNKNOWN,
        "torch_dtype": "float32",
    })
}
