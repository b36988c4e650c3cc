//! The model to measure, and its device.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use pacs_model::{Architecture, LayerKind, ModelConfig, Parameters, Rotary};
use pacs_text::Tokenizer;
use pacs_torch::tch::{Device, Kind};

use crate::compute::Compute;

/// Model and device of a measurement.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Hugging Face folder of the model.
    #[arg(long, required_unless_present = "shape")]
    model: Option<PathBuf>,
    /// Read only config.json of the folder; weights are random, and need not exist.
    #[arg(long)]
    random_weights: bool,
    /// Use random weights with the layout of a known model, without a folder.
    #[arg(long, value_enum, conflicts_with = "model")]
    shape: Option<Shape>,
    #[command(flatten)]
    compute: Compute,
}

/// Layouts of known models.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Shape {
    /// SmolLM2-135M.
    #[value(name = "smollm2-135m")]
    Smollm2,
    /// Qwen2.5-0.5B.
    #[value(name = "qwen2.5-0.5b")]
    Qwen05,
    /// Qwen2.5-1.5B.
    #[value(name = "qwen2.5-1.5b")]
    Qwen15,
    /// Qwen2.5-7B.
    #[value(name = "qwen2.5-7b")]
    Qwen7,
}

impl Shape {
    fn config(self) -> ModelConfig {
        let named = |family| Architecture::named(family).expect("a family of the table");
        let qwen = ModelConfig {
            architecture: named("qwen2"),
            vocab_size: 151_936,
            hidden: 896,
            layers: 24,
            heads: 14,
            kv_heads: 2,
            head_dim: 64,
            ffn: 4864,
            experts: None,
            rms_eps: 1e-6,
            rotary: vec![Rotary::plain(1e6)],
            layer_kinds: vec![LayerKind::PLAIN],
            query_scalar: None,
            score_cap: None,
            logit_cap: None,
            tie_embeddings: true,
            estimates_values: false,
            lora: None,
            end_tokens: Vec::new(),
            max_positions: 32_768,
        };
        match self {
            Self::Smollm2 => ModelConfig {
                architecture: named("llama"),
                vocab_size: 49_152,
                hidden: 576,
                layers: 30,
                heads: 9,
                kv_heads: 3,
                ffn: 1536,
                rms_eps: 1e-5,
                rotary: vec![Rotary::plain(1e5)],
                max_positions: 8192,
                ..qwen
            },
            Self::Qwen05 => qwen,
            Self::Qwen15 => ModelConfig { hidden: 1536, layers: 28, heads: 12, head_dim: 128, ffn: 8960, ..qwen },
            Self::Qwen7 => ModelConfig {
                vocab_size: 152_064,
                hidden: 3584,
                layers: 28,
                heads: 28,
                kv_heads: 4,
                head_dim: 128,
                ffn: 18_944,
                tie_embeddings: false,
                ..qwen
            },
        }
    }
}

/// A model ready to be measured.
pub(crate) struct Subject {
    pub(crate) config: ModelConfig,
    pub(crate) parameters: Parameters,
    /// Tokenizer of the folder; `None` without one.
    pub(crate) tokenizer: Option<Arc<Tokenizer>>,
    pub(crate) kind: Kind,
    pub(crate) device: Device,
}

impl Arguments {
    pub(crate) fn subject(&self) -> Result<Subject> {
        let (kind, device) = self.compute.start()?;
        if let Some(shape) = self.shape {
            let config = shape.config();
            let parameters = Parameters::random(&config, kind, device, 1);
            return Ok(Subject { config, parameters, tokenizer: None, kind, device });
        }
        let Some(model) = &self.model else { bail!("measure: name a --model or a --shape") };
        let name = || format!("load model `{}`", model.display());
        let config = ModelConfig::read(model).with_context(name)?;
        let parameters = if self.random_weights {
            Parameters::random(&config, kind, device, 1)
        } else {
            Parameters::load(model, &config, kind, device).with_context(name)?
        };
        let has_tokenizer = model.join("tokenizer.json").exists();
        let tokenizer = if has_tokenizer { Some(Arc::new(Tokenizer::read(model).with_context(name)?)) } else { None };
        Ok(Subject { config, parameters, tokenizer, kind, device })
    }
}

impl Subject {
    /// Describes the model and the machine, for every line of output.
    pub(crate) fn describe(&self) -> serde_json::Value {
        serde_json::json!({
            "parameters": self.config.parameter_count(),
            "precision": format!("{:?}", self.kind),
            "device": format!("{:?}", self.device),
            "threads": pacs_torch::tch::get_num_threads(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_have_the_published_sizes() {
        for (shape, millions) in
            [(Shape::Smollm2, 134.5), (Shape::Qwen05, 494.0), (Shape::Qwen15, 1543.7), (Shape::Qwen7, 7615.6)]
        {
            let found = shape.config().parameter_count() as f64 / 1e6;
            assert!((found - millions).abs() < 0.1, "{shape:?} has {found} million parameters");
        }
    }
}
