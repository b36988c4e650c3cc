//! The keys of config.json, checked.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::experts::RawExperts;
use super::rope::RawRope;
use super::{LayerKind, ModelConfig};
use crate::{Activation, Architecture, LayerRotation, ShapeError, Windows};

#[derive(Deserialize)]
pub(super) struct RawConfig {
    model_type: String,
    vocab_size: i64,
    pub(super) hidden_size: i64,
    intermediate_size: i64,
    num_hidden_layers: usize,
    pub(super) num_attention_heads: i64,
    num_key_value_heads: Option<i64>,
    head_dim: Option<i64>,
    rms_norm_eps: Option<f64>,
    pub(super) max_position_embeddings: usize,
    pub(super) original_max_position_embeddings: Option<f64>,
    hidden_act: Option<String>,
    hidden_activation: Option<String>,
    pub(super) rope_theta: Option<f64>,
    pub(super) rope_local_base_freq: Option<f64>,
    pub(super) rope_scaling: Option<RawRope>,
    pub(super) rope_parameters: Option<Value>,
    pub(super) partial_rotary_factor: Option<f64>,
    tie_word_embeddings: Option<bool>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(default)]
    lm_head_bias: bool,
    #[serde(default)]
    use_sliding_window: bool,
    /// None: the key is not there; some none: it is null, which turns windows off.
    #[serde(default, deserialize_with = "said")]
    sliding_window: Option<Option<usize>>,
    max_window_layers: Option<usize>,
    sliding_window_pattern: Option<usize>,
    layer_types: Option<Vec<String>>,
    no_rope_layers: Option<Vec<u8>>,
    no_rope_layer_interval: Option<usize>,
    query_pre_attn_scalar: Option<f64>,
    #[serde(default, deserialize_with = "said")]
    attn_logit_softcapping: Option<Option<f64>>,
    #[serde(default, deserialize_with = "said")]
    final_logit_softcapping: Option<Option<f64>>,
    use_bidirectional_attention: Option<Value>,
    quantization_config: Option<Value>,
    num_experts: Option<i64>,
    num_local_experts: Option<i64>,
    num_experts_per_tok: Option<i64>,
    moe_intermediate_size: Option<i64>,
    norm_topk_prob: Option<bool>,
    decoder_sparse_step: Option<usize>,
    mlp_only_layers: Option<Vec<usize>>,
    router_aux_loss_coef: Option<f64>,
}

/// Tells a key that is null from one that is not there.
fn said<'de, T: Deserialize<'de>, D: serde::Deserializer<'de>>(value: D) -> Result<Option<Option<T>>, D::Error> {
    Option::deserialize(value).map(Some)
}

impl RawConfig {
    pub(super) fn resolve(self, path: &Path) -> Result<ModelConfig, ShapeError> {
        let Some(architecture) = Architecture::named(&self.model_type) else {
            return Err(ShapeError::Unsupported {
                path: path.to_owned(),
                feature: format!("model type `{}`", self.model_type),
                hint: Architecture::NAMES,
            });
        };
        self.check_supported(architecture, path)?;
        let defaults = &architecture.defaults;
        let heads = self.num_attention_heads;
        let head_dim = self.head_dim.or(defaults.head_dim).unwrap_or(self.hidden_size / heads.max(1));
        let rope = self.rope(architecture, head_dim, path)?;
        let layer_kinds = self.layer_kinds(architecture, path)?;
        let experts = architecture.experts.map(|defaults| self.experts().resolve(defaults, path)).transpose()?;
        let cap =
            |key: Option<Option<f64>>, default| if architecture.scales_queries { key.unwrap_or(default) } else { None };
        let config = ModelConfig {
            architecture,
            vocab_size: self.vocab_size,
            hidden: self.hidden_size,
            layers: self.num_hidden_layers,
            heads,
            kv_heads: self.num_key_value_heads.or(defaults.kv_heads).unwrap_or(heads),
            head_dim,
            ffn: self.intermediate_size,
            experts,
            rms_eps: self.rms_norm_eps.unwrap_or(defaults.rms_eps),
            rotary: rope.rotary,
            layer_kinds,
            query_scalar: architecture.scales_queries.then(|| self.query_pre_attn_scalar.unwrap_or(256.0)),
            score_cap: cap(self.attn_logit_softcapping, defaults.score_cap),
            logit_cap: cap(self.final_logit_softcapping, defaults.logit_cap),
            tie_embeddings: self.tie_word_embeddings.unwrap_or(defaults.tie_embeddings),
            end_tokens: Vec::new(),
            max_positions: rope.max_positions,
            estimates_values: false,
            lora: None,
        };
        check_sizes(&config, path)?;
        Ok(config)
    }

    fn check_supported(&self, architecture: &Architecture, path: &Path) -> Result<(), ShapeError> {
        let refuse = |feature: String, hint| Err(ShapeError::Unsupported { path: path.to_owned(), feature, hint });
        let (activation, names, hint) = match architecture.activation {
            Activation::Silu => (&self.hidden_act, &["silu", "swish"][..], "supported is silu"),
            // Such folders often have a second key, `hidden_act`, which transformers does not read.
            Activation::GeluTanh => {
                (&self.hidden_activation, &["gelu_pytorch_tanh"][..], "supported is gelu_pytorch_tanh")
            }
        };
        if let Some(activation) = activation.as_ref().filter(|name| !names.contains(&name.as_str())) {
            return refuse(format!("activation `{activation}`"), hint);
        }
        if self.attention_bias {
            return refuse("attention_bias".to_owned(), "biases are supported for qwen2 only");
        }
        if self.mlp_bias {
            return refuse("mlp_bias".to_owned(), "feed-forward layers have no biases here");
        }
        if self.lm_head_bias {
            return refuse("lm_head_bias".to_owned(), "the LM head has no bias here");
        }
        if self
            .use_bidirectional_attention
            .as_ref()
            .is_some_and(|value| !matches!(value, Value::Null | Value::Bool(false)))
        {
            return refuse("use_bidirectional_attention".to_owned(), "supported is causal attention");
        }
        if self.quantization_config.is_some() {
            return refuse("quantised weights".to_owned(), "train from the float checkpoint");
        }
        Ok(())
    }

    /// The keys of a mixture of experts.
    fn experts(&self) -> RawExperts<'_> {
        RawExperts {
            layers: self.num_hidden_layers,
            counts: [("num_experts", self.num_experts), ("num_local_experts", self.num_local_experts)],
            per_token: self.num_experts_per_tok,
            ffn: self.moe_intermediate_size,
            renormalises: self.norm_topk_prob,
            sparse_step: self.decoder_sparse_step,
            dense_layers: self.mlp_only_layers.as_deref().unwrap_or_default(),
            balance_weight: self.router_aux_loss_coef,
        }
    }

    /// How layers differ: one kind where they do not, one for each layer where they do.
    fn layer_kinds(&self, architecture: &Architecture, path: &Path) -> Result<Vec<LayerKind>, ShapeError> {
        let layers = self.num_hidden_layers;
        let windows = self.windows(architecture, path)?;
        let rotated = self.rotated_layers(architecture, path)?;
        let kind = |layer: usize| {
            let window = windows[layer];
            let rotary = match architecture.rotation {
                LayerRotation::WindowsApart { .. } if window.is_some() => Some(1),
                _ => rotated[layer].then_some(0),
            };
            // A window that holds the longest sequence hides nothing.
            LayerKind { window: window.filter(|window| *window < self.max_position_embeddings), rotary }
        };
        let mut kinds: Vec<LayerKind> = (0..layers).map(kind).collect();
        if kinds.windows(2).all(|pair| pair[0] == pair[1]) {
            kinds.truncate(1);
        }
        // A model without layers is refused by its sizes.
        Ok(if kinds.is_empty() { vec![LayerKind::PLAIN] } else { kinds })
    }

    /// The window of every layer.
    fn windows(&self, architecture: &Architecture, path: &Path) -> Result<Vec<Option<usize>>, ShapeError> {
        let layers = self.num_hidden_layers;
        let error = |detail: String| Err(ShapeError::config(path, detail));
        let window = self.sliding_window.unwrap_or(architecture.defaults.window);
        if window == Some(0) {
            return error("`sliding_window` is 0, not above 0".to_owned());
        }
        let named = self.sliding_layers(path)?;
        let any_named = named.as_ref().is_some_and(|named| named.contains(&true));
        let sliding = match architecture.windows {
            Windows::Absent => {
                if self.use_sliding_window || any_named {
                    return Err(ShapeError::Unsupported {
                        path: path.to_owned(),
                        feature: "sliding-window attention".to_owned(),
                        hint: "the layers of such a model see everything before them",
                    });
                }
                vec![false; layers]
            }
            Windows::Everywhere => {
                if window.is_some() && named.is_some_and(|named| named.contains(&false)) {
                    return error("`layer_types` has layers without a window; such a model has none".to_owned());
                }
                vec![window.is_some(); layers]
            }
            Windows::Switched if !self.use_sliding_window => {
                if any_named {
                    return error(
                        "`layer_types` has `sliding_attention`, and `use_sliding_window` is not true".to_owned(),
                    );
                }
                vec![false; layers]
            }
            Windows::Switched => match (named, self.max_window_layers) {
                (Some(named), _) => named,
                (None, Some(first)) if architecture.rotation == LayerRotation::Same => {
                    (0..layers).map(|layer| layer >= first).collect()
                }
                _ => {
                    return error(
                        "`use_sliding_window` is true, and no `layer_types` says for which layers".to_owned(),
                    );
                }
            },
            Windows::Alternating(default) => match (named, self.sliding_window_pattern.unwrap_or(default)) {
                (Some(named), _) => named,
                (None, 0) => return error("`sliding_window_pattern` is 0, not above 0".to_owned()),
                (None, pattern) => (0..layers).map(|layer| !(layer + 1).is_multiple_of(pattern)).collect(),
            },
        };
        if window.is_none() && sliding.contains(&true) {
            return error("`layer_types` has `sliding_attention`, and `sliding_window` is null".to_owned());
        }
        Ok(sliding.into_iter().map(|slides| window.filter(|_| slides)).collect())
    }

    /// Whether each layer has a window, where `layer_types` says so.
    fn sliding_layers(&self, path: &Path) -> Result<Option<Vec<bool>>, ShapeError> {
        let Some(types) = &self.layer_types else { return Ok(None) };
        let slides = |name: &String| match name.as_str() {
            "full_attention" => Ok(false),
            "sliding_attention" => Ok(true),
            other => Err(ShapeError::Unsupported {
                path: path.to_owned(),
                feature: format!("layers of type `{other}`"),
                hint: "supported are full_attention and sliding_attention",
            }),
        };
        let slides: Vec<bool> = types.iter().map(slides).collect::<Result<_, _>>()?;
        self.check_length("layer_types", slides.len(), path)?;
        Ok(Some(slides[..self.num_hidden_layers].to_vec()))
    }

    /// Whether each layer rotates queries and keys.
    fn rotated_layers(&self, architecture: &Architecture, path: &Path) -> Result<Vec<bool>, ShapeError> {
        let layers = self.num_hidden_layers;
        if architecture.rotation != LayerRotation::Skipping {
            return Ok(vec![true; layers]);
        }
        if let Some(named) = &self.no_rope_layers {
            self.check_length("no_rope_layers", named.len(), path)?;
            return Ok(named[..layers].iter().map(|rotates| *rotates != 0).collect());
        }
        match self.no_rope_layer_interval.unwrap_or(4) {
            0 => Err(ShapeError::config(path, "`no_rope_layer_interval` is 0, not above 0")),
            interval => Ok((0..layers).map(|layer| !(layer + 1).is_multiple_of(interval)).collect()),
        }
    }

    fn check_length(&self, key: &str, found: usize, path: &Path) -> Result<(), ShapeError> {
        let layers = self.num_hidden_layers;
        if found < layers {
            return Err(ShapeError::config(path, format!("`{key}` has {found} entries for {layers} layers")));
        }
        Ok(())
    }
}

/// Far above every published model, far below what overflows.
pub(super) const LARGEST: i64 = 1 << 24;

fn check_sizes(config: &ModelConfig, path: &Path) -> Result<(), ShapeError> {
    let sizes = [
        ("vocab_size", config.vocab_size),
        ("hidden_size", config.hidden),
        ("intermediate_size", config.ffn),
        ("num_hidden_layers", i64::try_from(config.layers).unwrap_or(i64::MAX)),
        ("num_attention_heads", config.heads),
        ("num_key_value_heads", config.kv_heads),
        ("head_dim", config.head_dim),
        ("max_position_embeddings", i64::try_from(config.max_positions).unwrap_or(i64::MAX)),
    ];
    if let Some((name, value)) = sizes.into_iter().find(|(_, value)| !(1..=LARGEST).contains(value)) {
        return Err(ShapeError::config(path, format!("`{name}` is {value}, not within 1..={LARGEST}")));
    }
    let (heads, kv_heads, head_dim) = (config.heads, config.kv_heads, config.head_dim);
    if heads % kv_heads != 0 {
        let detail = format!("num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}");
        return Err(ShapeError::config(path, detail));
    }
    if head_dim % 2 != 0 {
        return Err(ShapeError::config(path, format!("head_dim {head_dim} is odd; rotary embedding turns pairs")));
    }
    let numbers = [
        ("rms_norm_eps", Some(config.rms_eps)),
        ("query_pre_attn_scalar", config.query_scalar),
        ("attn_logit_softcapping", config.score_cap),
        ("final_logit_softcapping", config.logit_cap),
    ];
    for (name, value) in numbers.into_iter().filter_map(|(name, value)| Some((name, value?))) {
        if !(value.is_finite() && value > 0.0) {
            return Err(ShapeError::config(path, format!("`{name}` is {value}, not above 0")));
        }
    }
    Ok(())
}
