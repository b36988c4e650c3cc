//! `[model.lora]`: training adapters in place of the model.

use std::path::PathBuf;

use pacs_shape::{Lora, ModelConfig, ShapeError};
use serde::{Deserialize, Serialize};

use crate::ModelSpec;

/// Low-rank adapters that are trained in place of the model, whose own weights stay as they are: a matrix `W` acts as
/// `W + scale B A`. With this table, even an empty one, `optimizer.learning_rate` has another default. No dropout. Embedding, head,
/// norms and biases are frozen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraSpec {
    /// Rank of the adapters: rows of `A`, columns of `B`. Default 16, 1 to 512, and no more than a matrix that has one.
    pub rank: u32,
    /// Numerator of the scale, which is `alpha / rank`. Default 32, above 0, at most 4096.
    pub alpha: f64,
    /// Scale by `alpha / sqrt(rank)` instead, so that the size of an update does not depend on the rank. Default false.
    pub rslora: bool,
    /// Linear layers that have an adapter, as in `["q_proj", "v_proj"]`; the names are those of the model's tensors (`qkv_proj` and
    /// `gate_up_proj` in Phi-3). Default: all linear layers of the trunk.
    pub targets: Option<Vec<String>>,
    /// Folder of an adapter to start from, as PEFT writes it: `adapter_config.json` and `adapter_model.safetensors`. Rank, alpha,
    /// `rslora` and targets have to be those of the job. Default: `A` uniform as PEFT has it (Kaiming, a = sqrt(5)), from `seed`, and
    /// `B` zero, so that training starts with the model as it is.
    pub path: Option<PathBuf>,
}

/// Default of `optimizer.learning_rate` with adapters: ten times that of full training. `B` starts at zero and an adapter moves a
/// matrix by a product of two small ones, so the same step of AdamW changes the model far less; the ratio of ten is what Schulman et
/// al. ("LoRA Without Regret", 2025) found over models, ranks and both supervised and reinforcement learning.
pub const LORA_LEARNING_RATE: f64 = 1e-5;

impl Default for LoraSpec {
    fn default() -> Self {
        Self { rank: 16, alpha: 32.0, rslora: false, targets: None, path: None }
    }
}

impl LoraSpec {
    /// The settings as the model's layout takes them.
    #[must_use]
    pub fn adapters(&self) -> Lora {
        let targets = self.targets.clone().unwrap_or_default();
        Lora { rank: i64::from(self.rank), alpha: self.alpha, rslora: self.rslora, targets }
    }
}

impl ModelSpec {
    /// The configuration of what is trained: the model's own, or that of its adapters.
    ///
    /// # Errors
    /// When the model cannot have these adapters.
    pub fn trained(&self, config: &ModelConfig) -> Result<ModelConfig, ShapeError> {
        match &self.lora {
            None => Ok(config.clone()),
            Some(lora) => config.with_lora(&lora.adapters()),
        }
    }
}
