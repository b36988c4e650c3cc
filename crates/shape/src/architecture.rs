//! What distinguishes the families of models, one constant each.
//!
//! To add a family: write its constant, add it to [`Architecture::ALL`], and make a golden folder for it
//! (`docs/MODELS.md`). Nothing else names a family; layout, forward, backward, cache and memory plan read these fields.

/// What the layers of a family compute, and what its config.json leaves out. Sizes are the model's ([`crate::ModelConfig`]).
#[derive(Debug, PartialEq)]
pub struct Architecture {
    /// `model_type` of config.json.
    pub model_type: &'static str,
    /// Where the norms of a layer are.
    pub norms: BlockNorms,
    /// Norms multiply by `1 + w` rather than by `w`.
    pub norms_add_one: bool,
    /// How queries and keys are normed before they are rotated.
    pub head_norms: HeadNorms,
    /// Query, key and value projections have biases.
    pub qkv_bias: bool,
    /// Checkpoints hold query, key and value projections as one matrix, and gates and ups as another.
    pub fused_projections: bool,
    /// Activation of the gates.
    pub activation: Activation,
    /// Feed-forward blocks are mixtures of experts; sizes that config.json leaves out. None: they are dense.
    pub experts: Option<ExpertDefaults>,
    /// Embeddings are multiplied by the square root of the width.
    pub scales_embedding: bool,
    /// Which layers attend within a window.
    pub windows: Windows,
    /// Which layers rotate queries and keys, and how.
    pub rotation: LayerRotation,
    /// `partial_rotary_factor` may be below 1.
    pub partial_rotation: bool,
    /// Scores are divided by the root of `query_pre_attn_scalar` rather than of the width of a head, and scores and logits may
    /// be capped.
    pub scales_queries: bool,
    /// Values of keys that config.json does not have.
    pub defaults: Defaults,
}

/// Names of the norms of a layer; none where there is no norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockNorms {
    /// Of the input of attention.
    pub before_attention: Option<&'static str>,
    /// Of what attention adds to the residual stream.
    pub after_attention: Option<&'static str>,
    /// Of the input of the feed-forward block.
    pub before_ffn: Option<&'static str>,
    /// Of what the feed-forward block adds to the residual stream.
    pub after_ffn: Option<&'static str>,
}

/// Norms of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadNorms {
    /// Queries and keys are not normed.
    Absent,
    /// Every head by itself; the heads share one weight.
    EachHead,
    /// All heads together.
    Width,
}

/// Activation of the feed-forward block: `activation(gate) * up`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// GELU by its approximation with a hyperbolic tangent.
    GeluTanh,
}

/// Sizes of a mixture of experts that config.json does not have, as transformers fills them in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertDefaults {
    /// Experts of a layer (`num_experts`).
    pub count: i64,
    /// Experts that a token is sent to (`num_experts_per_tok`).
    pub per_token: i64,
    /// Inner width of one expert (`moe_intermediate_size`).
    pub ffn: i64,
}

/// Which layers attend within a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Windows {
    /// No layer; a config.json that asks for windows is refused.
    Absent,
    /// All layers, where `sliding_window` is a number.
    Everywhere,
    /// Those that `layer_types` names while `use_sliding_window` is true; without `layer_types` those from `max_window_layers` on.
    Switched,
    /// Those that `layer_types` names; without it all but every n-th (`sliding_window_pattern`, or this number).
    Alternating(usize),
}

/// Which layers rotate queries and keys.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LayerRotation {
    /// All, in the same way.
    Same,
    /// All but those for which `no_rope_layers` is 0; without it all but every `no_rope_layer_interval`-th.
    Skipping,
    /// All; those with a window by a base of their own (`rope_local_base_freq`, or this one) and without scaling.
    WindowsApart {
        /// Base where config.json does not say one.
        base: f64,
    },
}

/// Values of keys that config.json does not have, as transformers fills them in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Defaults {
    /// Used where config.json lacks `rms_norm_eps`.
    pub rms_eps: f64,
    /// Used where config.json lacks `rope_theta`.
    pub rope_theta: f64,
    /// Used where config.json lacks `tie_word_embeddings`.
    pub tie_embeddings: bool,
    /// `head_dim`; none: width by heads.
    pub head_dim: Option<i64>,
    /// `num_key_value_heads`; none: all heads.
    pub kv_heads: Option<i64>,
    /// Used where config.json lacks `sliding_window`.
    pub window: Option<usize>,
    /// Used where config.json lacks `attn_logit_softcapping`.
    pub score_cap: Option<f64>,
    /// Used where config.json lacks `final_logit_softcapping`.
    pub logit_cap: Option<f64>,
}

/// Norms before both blocks, the most common arrangement.
const BEFORE: BlockNorms = BlockNorms {
    before_attention: Some("input_layernorm.weight"),
    after_attention: None,
    before_ffn: Some("post_attention_layernorm.weight"),
    after_ffn: None,
};

const LLAMA: Architecture = Architecture {
    model_type: "llama",
    norms: BEFORE,
    norms_add_one: false,
    head_norms: HeadNorms::Absent,
    qkv_bias: false,
    fused_projections: false,
    activation: Activation::Silu,
    experts: None,
    scales_embedding: false,
    windows: Windows::Absent,
    rotation: LayerRotation::Same,
    partial_rotation: false,
    scales_queries: false,
    defaults: Defaults {
        rms_eps: 1e-6,
        rope_theta: 10_000.0,
        tie_embeddings: false,
        head_dim: None,
        kv_heads: None,
        window: None,
        score_cap: None,
        logit_cap: None,
    },
};

const QWEN2: Architecture = Architecture {
    model_type: "qwen2",
    qkv_bias: true,
    windows: Windows::Switched,
    defaults: Defaults { window: Some(4096), ..LLAMA.defaults },
    ..LLAMA
};

const QWEN3: Architecture = Architecture {
    model_type: "qwen3",
    qkv_bias: false,
    head_norms: HeadNorms::EachHead,
    // Whatever its width.
    defaults: Defaults { head_dim: Some(128), ..QWEN2.defaults },
    ..QWEN2
};

const QWEN3_MOE: Architecture = Architecture {
    model_type: "qwen3_moe",
    experts: Some(ExpertDefaults { count: 128, per_token: 8, ffn: 768 }),
    // There is one switch for all layers, which no published model uses.
    windows: Windows::Absent,
    // Width by heads, unlike those of the dense models.
    defaults: Defaults { kv_heads: Some(4), ..LLAMA.defaults },
    ..QWEN3
};

const MISTRAL: Architecture = Architecture {
    model_type: "mistral",
    windows: Windows::Everywhere,
    defaults: Defaults { kv_heads: Some(8), window: Some(4096), ..LLAMA.defaults },
    ..LLAMA
};

const SMOLLM3: Architecture = Architecture {
    model_type: "smollm3",
    windows: Windows::Switched,
    rotation: LayerRotation::Skipping,
    defaults: Defaults { rope_theta: 2_000_000.0, tie_embeddings: true, kv_heads: Some(4), ..LLAMA.defaults },
    ..LLAMA
};

const OLMO2: Architecture = Architecture {
    model_type: "olmo2",
    norms: BlockNorms {
        before_attention: None,
        after_attention: Some("post_attention_layernorm.weight"),
        before_ffn: None,
        after_ffn: Some("post_feedforward_layernorm.weight"),
    },
    head_norms: HeadNorms::Width,
    defaults: Defaults { rms_eps: 1e-5, ..LLAMA.defaults },
    ..LLAMA
};

const PHI3: Architecture = Architecture {
    model_type: "phi3",
    fused_projections: true,
    windows: Windows::Everywhere,
    partial_rotation: true,
    defaults: Defaults { rms_eps: 1e-5, ..LLAMA.defaults },
    ..LLAMA
};

const GEMMA3: Architecture = Architecture {
    model_type: "gemma3_text",
    norms: BlockNorms {
        before_attention: Some("input_layernorm.weight"),
        after_attention: Some("post_attention_layernorm.weight"),
        before_ffn: Some("pre_feedforward_layernorm.weight"),
        after_ffn: Some("post_feedforward_layernorm.weight"),
    },
    norms_add_one: true,
    head_norms: HeadNorms::EachHead,
    activation: Activation::GeluTanh,
    scales_embedding: true,
    windows: Windows::Alternating(6),
    rotation: LayerRotation::WindowsApart { base: 10_000.0 },
    scales_queries: true,
    defaults: Defaults {
        rope_theta: 1_000_000.0,
        tie_embeddings: true,
        head_dim: Some(256),
        kv_heads: Some(4),
        window: Some(4096),
        ..LLAMA.defaults
    },
    ..LLAMA
};

const GEMMA2: Architecture = Architecture {
    model_type: "gemma2",
    head_norms: HeadNorms::Absent,
    windows: Windows::Alternating(2),
    rotation: LayerRotation::Same,
    defaults: Defaults { rope_theta: 10_000.0, score_cap: Some(50.0), logit_cap: Some(30.0), ..GEMMA3.defaults },
    ..GEMMA3
};

impl Architecture {
    /// Every family that is computed.
    pub const ALL: [&'static Self; 10] =
        [&LLAMA, &QWEN2, &QWEN3, &QWEN3_MOE, &MISTRAL, &SMOLLM3, &OLMO2, &PHI3, &GEMMA2, &GEMMA3];

    /// What [`Architecture::ALL`] holds, for error messages.
    pub(crate) const NAMES: &'static str =
        "supported are llama, qwen2, qwen3, qwen3_moe, mistral, smollm3, olmo2, phi3, gemma2 and gemma3_text";

    /// The family of a `model_type`.
    #[must_use]
    pub fn named(model_type: &str) -> Option<&'static Self> {
        Self::ALL.into_iter().find(|architecture| architecture.model_type == model_type)
    }

    /// Suffixes of the weights of query, key and value projections, in the order in which they are stacked.
    pub(crate) fn qkv_names(&self) -> &'static [&'static str] {
        if self.fused_projections { &["qkv_proj"] } else { &["q_proj", "k_proj", "v_proj"] }
    }

    /// The same of gates and ups.
    pub(crate) fn gate_up_names(&self) -> &'static [&'static str] {
        if self.fused_projections { &["gate_up_proj"] } else { &["gate_proj", "up_proj"] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_found_by_their_names_and_named_in_errors() {
        for architecture in Architecture::ALL {
            assert_eq!(Architecture::named(architecture.model_type), Some(architecture));
            assert!(Architecture::NAMES.contains(architecture.model_type), "{}", architecture.model_type);
        }
        assert_eq!(Architecture::named("gemma3"), None);
    }
}
