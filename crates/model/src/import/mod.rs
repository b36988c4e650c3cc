//! GGUF files of the llama, qwen2 and qwen3 families become Hugging Face folders.
//!
//! Tensors are dequantised; the rows of query and key projections, which GGUF stores for rotary embedding of adjacent
//! pairs where the model is a Llama, go back to the order of the rotate-half kind. The tokenizer is rebuilt from the file's metadata.

mod error;
mod folder;
mod gguf;
mod tensors;
mod tokenizer;

use std::fs;
use std::path::{Path, PathBuf};

use pacs_torch::tch::{Device, Kind};

pub use error::ImportError;

use crate::save::{WEIGHTS, sync_folder, write_file, write_tensors};
use crate::{ModelConfig, ModelError, Parameters};

/// What an import has written.
#[derive(Clone, Debug)]
pub struct ImportReport {
    /// The Hugging Face folder that was written.
    pub folder: PathBuf,
    /// The model as its new config.json says.
    pub config: ModelConfig,
    /// Number of parameters, tied ones counted once.
    pub parameters: usize,
    /// Quantisations found, with the number of tensors of each, most frequent first: `[("Q4_1", 210), …]`.
    pub quantisations: Vec<(String, usize)>,
    /// The file brought a chat template.
    pub chat_template: bool,
}

/// Writes the model in `gguf` as a Hugging Face folder, weights in bfloat16.
///
/// Files are written under temporary names and renamed, `config.json` last: a folder that loads is whole.
///
/// # Errors
/// When the file is no GGUF, is damaged, or holds an architecture, quantisation or tokenizer that is not supported;
/// when the folder cannot be written.
pub fn import_gguf(gguf: &Path, out_dir: &Path) -> Result<ImportReport, ImportError> {
    let mut source = gguf::Gguf::open(gguf)?;
    let text = folder::config(&source)?;
    let tokenizer = tokenizer::tokenizer(&source)?;
    let tokenizer_config = tokenizer::tokenizer_config(&source)?;
    let generation_config = folder::generation_config(&source)?;

    fs::create_dir_all(out_dir).map_err(ModelError::io("create", out_dir))?;
    let config = ModelConfig::from_json(&text.to_string(), &out_dir.join("config.json")).map_err(ModelError::from)?;
    let parameters = Parameters::zeros(&config, Kind::BFloat16, Device::Cpu);
    let quantisations = tensors::fill(&parameters, &config, &mut source)?;
    write_tensors(&parameters, &out_dir.join(WEIGHTS), Kind::BFloat16, str::to_owned)?;
    write_file(&out_dir.join("tokenizer.json"), tokenizer.to_string().as_bytes())?;
    write_file(&out_dir.join("tokenizer_config.json"), pretty(&tokenizer_config).as_bytes())?;
    write_file(&out_dir.join("generation_config.json"), pretty(&generation_config).as_bytes())?;
    write_file(&out_dir.join("config.json"), pretty(&text).as_bytes())?;
    sync_folder(out_dir)?;
    Ok(ImportReport {
        folder: out_dir.to_owned(),
        parameters: config.parameter_count(),
        config: ModelConfig::read(out_dir).map_err(ModelError::from)?,
        quantisations,
        chat_template: tokenizer_config.get("chat_template").is_some(),
    })
}

fn pretty(value: &serde_json::Value) -> String {
    format!("{value:#}\n")
}
