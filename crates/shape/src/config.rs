//! What distinguishes one model from another.

mod experts;
mod keys;
mod rope;
#[cfg(test)]
mod tests;

use std::fs;
use std::path::Path;

use serde::Deserialize;

use crate::end_tokens::{self, EndToken};
use crate::{Architecture, HeadNorms, Lora, ParameterLayout, ParameterSpec, ShapeError};

/// What distinguishes one model from another; sizes as libtorch counts them.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// What its layers compute.
    pub architecture: &'static Architecture,
    /// Rows of the embedding; may exceed the tokenizer's vocabulary.
    pub vocab_size: i64,
    /// Width of the residual stream.
    pub hidden: i64,
    /// Number of transformer layers (`num_hidden_layers`).
    pub layers: usize,
    /// Number of query heads of a layer (`num_attention_heads`).
    pub heads: i64,
    /// Key and value heads; each serves `heads / kv_heads` query heads.
    pub kv_heads: i64,
    /// Width of a head; `heads * head_dim` may differ from `hidden`.
    pub head_dim: i64,
    /// Width of the feed-forward layer, of the layers that are dense.
    pub ffn: i64,
    /// Experts of the other layers; none: all layers are dense.
    pub experts: Option<Experts>,
    /// Added to the mean square in every norm.
    pub rms_eps: f64,
    /// Rotary embeddings that layers choose from ([`LayerKind::rotary`]).
    pub rotary: Vec<Rotary>,
    /// How layers differ; layer `i` is of kind `i` modulo their number. Not empty.
    pub layer_kinds: Vec<LayerKind>,
    /// Scores are divided by the root of this number; none: of the width of a head.
    pub query_scalar: Option<f64>,
    /// Scores `s` become `cap tanh(s / cap)` before the softmax.
    pub score_cap: Option<f64>,
    /// The same of logits.
    pub logit_cap: Option<f64>,
    /// The LM head is the embedding.
    pub tie_embeddings: bool,
    /// Tokens that end an answer: all that any file of the folder names ([`EndToken`]).
    pub end_tokens: Vec<u32>,
    /// Longest sequence that the model was made for; with a longrope, for the factors in use.
    pub max_positions: usize,
    /// The model estimates values: it has a head of one row, `value_head.weight` `[1, D]`, and no LM head. No folder says
    /// so; see [`ModelConfig::of_values`].
    pub estimates_values: bool,
    /// Adapters, which are all that is trained; see [`ModelConfig::with_lora`]. No folder of a model says so.
    pub lora: Option<Lora>,
}

/// The mixtures of experts of a model: a router sends every token to a few of many small feed-forward blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Experts {
    /// Experts of a layer (`num_experts`).
    pub count: i64,
    /// How many of them compute a token (`num_experts_per_tok`).
    pub per_token: i64,
    /// Width of an expert (`moe_intermediate_size`).
    pub ffn: i64,
    /// The weights of a token's experts are divided by their sum (`norm_topk_prob`).
    pub renormalises: bool,
    /// Layers without experts, from 0 (`mlp_only_layers`, `decoder_sparse_step`).
    pub dense_layers: Vec<usize>,
}

/// How the attention of one layer differs from that of others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerKind {
    /// Tokens that a token sees, itself included; fewer than [`ModelConfig::most_positions`]. None: all before it.
    pub window: Option<usize>,
    /// Index into [`ModelConfig::rotary`]; none: queries and keys are not rotated.
    pub rotary: Option<usize>,
}

impl LayerKind {
    /// Sees everything before, and rotates as [`ModelConfig::rotary`] says first.
    pub const PLAIN: Self = Self { window: None, rotary: Some(0) };
}

/// A rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct Rotary {
    /// Base of the frequencies.
    pub theta: f64,
    /// Share of a head's elements, from the first on, that are rotated; above 0, at most 1.
    pub share: f64,
    /// How frequencies are stretched for long contexts.
    pub scaling: RopeScaling,
}

impl Rotary {
    /// All elements, not stretched.
    #[must_use]
    pub fn plain(theta: f64) -> Self {
        Self { theta, share: 1.0, scaling: RopeScaling::None }
    }

    /// How many elements of a head are rotated.
    #[must_use]
    pub fn width(&self, head_dim: i64) -> i64 {
        (head_dim as f64 * self.share) as i64
    }
}

/// How rotary frequencies are stretched for long contexts.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All frequencies are divided by the same factor.
    Linear {
        /// Divisor of the frequencies.
        factor: f64,
    },
    /// By wavelength, as Llama 3.1 does: long waves by `factor`, short ones not, those between by interpolation.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Waves longer than `original_max_positions / low_freq_factor` are stretched fully.
        low_freq_factor: f64,
        /// Waves shorter than `original_max_positions / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context of the first training.
        original_max_positions: f64,
    },
    /// Each frequency by its own factor. Checkpoints have a second list of factors for sequences beyond the context of the first
    /// training; [`ModelConfig::for_sequences`] chooses one of them.
    LongRope {
        /// Divisors of the frequencies, one each.
        factors: Vec<f64>,
        /// Cosines and sines are multiplied by it, with either list.
        magnitude: f64,
        /// The second list, while `factors` is the first.
        beyond: Option<LongFactors>,
    },
}

/// How longer sequences than those of the first training are rotated.
#[derive(Clone, Debug, PartialEq)]
pub struct LongFactors {
    /// Divisors of the frequencies, one each.
    pub factors: Vec<f64>,
    /// Where positions end with these factors.
    pub max_positions: usize,
}

impl ModelConfig {
    /// Reads `config.json` of a Hugging Face folder, and what ends an answer from all of its files.
    ///
    /// # Errors
    /// When a file is missing or malformed, or asks for an architecture or option that is not computed here.
    pub fn read(dir: &Path) -> Result<Self, ShapeError> {
        let mut config = Self::from_json(&end_tokens::config_text(dir)?, &dir.join("config.json"))?;
        config.end_tokens = EndToken::of_folder(dir)?.into_iter().map(|token| token.id).collect();
        Ok(config)
    }

    /// Reads a file like `config.json` alone, whatever its name.
    ///
    /// # Errors
    /// As [`ModelConfig::read`].
    pub fn read_file(path: &Path) -> Result<Self, ShapeError> {
        Self::from_json(&read(path)?, path)
    }

    /// Reads the text of a config.json; `path` is what errors name.
    pub fn from_json(text: &str, path: &Path) -> Result<Self, ShapeError> {
        let mut config = parse::<keys::RawConfig>(text, path)?.resolve(path)?;
        config.end_tokens = end_tokens::of_config(text, path)?;
        Ok(config)
    }

    /// The model as it computes sequences of up to `longest` tokens: where the first list of a longrope ends before that, all of them are
    /// rotated by the second one.
    ///
    /// transformers chooses anew in each forward pass, by its longest sequence. A cached key would then have another rotation than the
    /// keys that follow it as soon as its sequence outgrows the first list, and what a sample was drawn from would not be what is
    /// trained. One choice for all sequences is also that of vLLM, which goes by `max_model_len` (vllm-project/vllm#27431).
    #[must_use]
    pub fn for_sequences(mut self, longest: usize) -> Self {
        if longest <= self.max_positions {
            return self;
        }
        for rotary in &mut self.rotary {
            if let RopeScaling::LongRope { factors, beyond, .. } = &mut rotary.scaling
                && let Some(long) = beyond.take()
            {
                *factors = long.factors;
                self.max_positions = long.max_positions;
            }
        }
        self
    }

    /// Positions with the factors that reach farthest ([`ModelConfig::for_sequences`]).
    #[must_use]
    pub fn most_positions(&self) -> usize {
        let beyond = self.rotary.iter().filter_map(|rotary| match &rotary.scaling {
            RopeScaling::LongRope { beyond, .. } => beyond.as_ref(),
            RopeScaling::None | RopeScaling::Linear { .. } | RopeScaling::Llama3 { .. } => None,
        });
        beyond.map(|long| long.max_positions).fold(self.max_positions, usize::max)
    }

    /// A value model with the trunk of this model.
    #[must_use]
    pub fn of_values(&self) -> Self {
        Self { estimates_values: true, ..self.clone() }
    }

    /// Number of parameters, tied ones counted once; those of the adapters alone where there are any.
    #[must_use]
    pub fn parameter_count(&self) -> usize {
        ParameterLayout::new(self).parameters().iter().map(|spec| spec.numel()).sum()
    }

    /// Number of parameters that compute a token: all but those of the experts that it is not sent to. Without experts as
    /// [`ModelConfig::parameter_count`].
    #[must_use]
    pub fn active_parameter_count(&self) -> usize {
        let layout = ParameterLayout::new(self);
        let (of_experts, others): (Vec<_>, Vec<_>) = layout.parameters().iter().partition(|spec| spec.is_of_expert());
        let count = |specs: Vec<&ParameterSpec>| specs.into_iter().map(ParameterSpec::numel).sum::<usize>();
        let Some(experts) = &self.experts else { return count(others) };
        // All experts are alike.
        count(others) + count(of_experts) / experts.count as usize * experts.per_token as usize
    }

    /// The experts of a layer; none where it is dense.
    #[must_use]
    pub fn experts_of(&self, layer: usize) -> Option<&Experts> {
        self.experts.as_ref().filter(|experts| !experts.dense_layers.contains(&layer))
    }

    /// How the attention of a layer differs from that of others.
    ///
    /// # Panics
    /// When there is no kind of layer.
    #[must_use]
    pub fn layer_kind(&self, layer: usize) -> LayerKind {
        self.layer_kinds[layer % self.layer_kinds.len()]
    }

    /// What queries are multiplied with, so that scores divided by the root of the width of a head are scaled as
    /// [`ModelConfig::query_scalar`] says.
    #[must_use]
    pub fn query_factor(&self) -> f64 {
        self.query_scalar.map_or(1.0, |scalar| (self.head_dim as f64 / scalar).sqrt())
    }

    /// Whether some layer's queries and keys are rotated in part only.
    #[must_use]
    pub fn rotates_partly(&self) -> bool {
        self.rotary.iter().any(|rotary| rotary.share < 1.0)
    }

    /// What keeps the kernels of a GPU from computing the model; none where they can. Such a model is computed by tensor
    /// operations there.
    #[must_use]
    pub fn beyond_gpu_kernels(&self) -> Option<&'static str> {
        let Architecture { norms_add_one, head_norms, activation, .. } = self.architecture;
        if self.layer_kinds.iter().any(|kind| kind.window.is_some_and(|window| window < self.max_positions)) {
            Some("attention within a window")
        } else if *head_norms == HeadNorms::Width {
            Some("norms over all heads")
        } else if self.rotates_partly() {
            Some("a rotation of part of each head")
        } else if *norms_add_one {
            Some("norms that multiply by 1 + w")
        } else if *activation != crate::Activation::Silu {
            Some("gates with another activation than SiLU")
        } else if self.score_cap.is_some() || self.logit_cap.is_some() {
            Some("caps of scores or logits")
        } else if self.query_factor() != 1.0 {
            Some("scores that are not divided by the root of the width of a head")
        } else {
            None
        }
    }

    /// What the kernels of a GPU leave to tensor operations where they compute all else ([`ModelConfig::beyond_gpu_kernels`]).
    #[must_use]
    pub fn beside_gpu_kernels(&self) -> Option<&'static str> {
        self.experts.is_some().then_some("experts")
    }

    /// What keeps passes of generation from being recorded as CUDA graphs; none where they can be.
    #[must_use]
    pub fn beyond_graphs(&self) -> Option<&'static str> {
        // A graph repeats launches of fixed sizes.
        self.experts.is_some().then_some("experts, whose products have as many rows as tokens are sent to them")
    }

    /// What the fused kernels of a CPU leave to tensor operations.
    #[must_use]
    pub fn beyond_cpu_kernels(&self) -> Vec<&'static str> {
        let parts = [
            (self.experts.is_some(), "routes to experts and the sums of their outputs"),
            (self.architecture.activation != crate::Activation::Silu, "gates with another activation than SiLU"),
            (self.rotates_partly(), "a rotation of part of each head"),
            (self.score_cap.is_some(), "attention with capped scores"),
        ];
        parts.into_iter().filter(|(applies, _)| *applies).map(|(_, part)| part).collect()
    }
}

pub(crate) fn read(path: &Path) -> Result<String, ShapeError> {
    fs::read_to_string(path).map_err(|error| ShapeError::Io { path: path.to_owned(), error })
}

pub(crate) fn read_if_there(path: &Path) -> Result<Option<String>, ShapeError> {
    if path.exists() { read(path).map(Some) } else { Ok(None) }
}

/// Editors of some systems put a byte order mark before the text.
pub(crate) fn parse<T: for<'de> Deserialize<'de>>(text: &str, path: &Path) -> Result<T, ShapeError> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if text.starts_with("version https://git-lfs.github.com/") {
        let detail = "it is a pointer of Git LFS and not the file itself; fetch it with `git lfs pull`";
        return Err(ShapeError::config(path, detail));
    }
    serde_json::from_str(text).map_err(|error| ShapeError::config(path, error.to_string()))
}
