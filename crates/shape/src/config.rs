use std::fs;
use std::path::Path;

use serde::Deserialize;

use crate::end_tokens::{self, EndToken};
use crate::{ParameterLayout, ShapeError};

/// What distinguishes one model from another; sizes as libtorch counts them.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Rows of the embedding; may exceed the tokenizer's vocabulary.
    pub vocab_size: i64,
    /// Width of the residual stream.
    pub hidden: i64,
    /// Transformer layers.
    pub layers: usize,
    /// Query heads.
    pub heads: i64,
    /// Key and value heads; each serves `heads / kv_heads` query heads.
    pub kv_heads: i64,
    /// Width of a head; `heads * head_dim` may differ from `hidden`.
    pub head_dim: i64,
    /// Width of the feed-forward layer.
    pub ffn: i64,
    /// Added to the mean square in every norm.
    pub rms_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How rotary frequencies are stretched for long contexts.
    pub rope_scaling: RopeScaling,
    /// The LM head is the embedding.
    pub tie_embeddings: bool,
    /// Query, key and value projections have biases (Qwen2).
    pub qkv_bias: bool,
    /// Queries and keys are normed per head (Qwen3).
    pub qk_norm: bool,
    /// Tokens that end an answer: all that any file of the folder names ([`EndToken`]).
    pub end_tokens: Vec<u32>,
    /// Longest sequence that the model was made for.
    pub max_positions: usize,
    /// The model estimates values: it has a head of one row, `value_head.weight` `[1, D]`, and no LM head. No folder says
    /// so; see [`ModelConfig::of_values`].
    pub estimates_values: bool,
}

/// How rotary frequencies are stretched for long contexts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
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
        let mut config = parse::<RawConfig>(text, path)?.resolve(path)?;
        config.end_tokens = end_tokens::of_config(text, path)?;
        Ok(config)
    }

    /// A value model with the trunk of this model.
    #[must_use]
    pub fn of_values(&self) -> Self {
        Self { estimates_values: true, ..self.clone() }
    }

    /// Number of parameters, tied ones counted once.
    #[must_use]
    pub fn parameter_count(&self) -> usize {
        ParameterLayout::new(self).parameters().iter().map(|spec| spec.numel()).sum()
    }
}

#[derive(Deserialize)]
struct RawConfig {
    model_type: String,
    vocab_size: i64,
    hidden_size: i64,
    intermediate_size: i64,
    num_hidden_layers: usize,
    num_attention_heads: i64,
    num_key_value_heads: Option<i64>,
    head_dim: Option<i64>,
    rms_norm_eps: Option<f64>,
    max_position_embeddings: usize,
    hidden_act: Option<String>,
    rope_theta: Option<f64>,
    rope_scaling: Option<RawRope>,
    rope_parameters: Option<RawRope>,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(default)]
    use_sliding_window: bool,
    layer_types: Option<Vec<String>>,
    quantization_config: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct RawRope {
    rope_type: Option<String>,
    /// The older name; writers that serve old readers and new ones write both.
    #[serde(rename = "type")]
    older_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    partial_rotary_factor: Option<f64>,
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

impl RawConfig {
    fn resolve(self, path: &Path) -> Result<ModelConfig, ShapeError> {
        self.check_supported(path)?;
        let heads = self.num_attention_heads;
        // Qwen3 defaults to 128, whatever its width.
        let derived_head_dim = if self.model_type == "qwen3" { 128 } else { self.hidden_size / heads.max(1) };
        let config = ModelConfig {
            vocab_size: self.vocab_size,
            hidden: self.hidden_size,
            layers: self.num_hidden_layers,
            heads,
            kv_heads: self.num_key_value_heads.unwrap_or(heads),
            head_dim: self.head_dim.unwrap_or(derived_head_dim),
            ffn: self.intermediate_size,
            rms_eps: self.rms_norm_eps.unwrap_or(1e-6),
            rope_theta: self.rope().and_then(|rope| rope.rope_theta).or(self.rope_theta).unwrap_or(10_000.0),
            rope_scaling: self.rope_scaling(path)?,
            tie_embeddings: self.tie_word_embeddings,
            qkv_bias: self.model_type == "qwen2",
            qk_norm: self.model_type == "qwen3",
            end_tokens: Vec::new(),
            max_positions: self.max_position_embeddings,
            estimates_values: false,
        };
        check_sizes(&config, path)?;
        Ok(config)
    }

    fn rope(&self) -> Option<&RawRope> {
        self.rope_parameters.as_ref().or(self.rope_scaling.as_ref())
    }

    fn check_supported(&self, path: &Path) -> Result<(), ShapeError> {
        let refuse = |feature: String, hint| Err(ShapeError::Unsupported { path: path.to_owned(), feature, hint });
        if !["llama", "qwen2", "qwen3"].contains(&self.model_type.as_str()) {
            return refuse(format!("model type `{}`", self.model_type), "supported are llama, qwen2 and qwen3");
        }
        if let Some(activation) = self.hidden_act.as_ref().filter(|name| !["silu", "swish"].contains(&name.as_str())) {
            return refuse(format!("activation `{activation}`"), "supported is silu");
        }
        if self.attention_bias {
            return refuse("attention_bias".to_owned(), "biases are supported for qwen2 only");
        }
        if self.mlp_bias {
            return refuse("mlp_bias".to_owned(), "feed-forward layers have no biases here");
        }
        let sliding = |types: &Vec<String>| types.iter().any(|name| name != "full_attention");
        if self.use_sliding_window || self.layer_types.as_ref().is_some_and(sliding) {
            return refuse("sliding-window attention".to_owned(), "supported is full attention");
        }
        if self.quantization_config.is_some() {
            return refuse("quantised weights".to_owned(), "train from the float checkpoint");
        }
        if self.rope().and_then(|rope| rope.partial_rotary_factor).is_some_and(|factor| factor != 1.0) {
            return refuse("partial rotary embedding".to_owned(), "supported is partial_rotary_factor 1");
        }
        Ok(())
    }

    fn rope_scaling(&self, path: &Path) -> Result<RopeScaling, ShapeError> {
        let Some(rope) = self.rope() else { return Ok(RopeScaling::None) };
        let need = |name: &str, value: Option<f64>| match value {
            Some(value) if value.is_finite() && value > 0.0 => Ok(value),
            Some(value) => Err(ShapeError::config(path, format!("rope scaling: `{name}` is {value}, not above 0"))),
            None => Err(ShapeError::config(path, format!("rope scaling of type llama3 lacks `{name}`"))),
        };
        let kind = match (rope.rope_type.as_deref(), rope.older_type.as_deref()) {
            (Some(new), Some(old)) if new != old => {
                let detail =
                    format!("rope scaling: `rope_type` is `{new}` and `type` is `{old}`; expected one of them");
                return Err(ShapeError::config(path, detail));
            }
            (new, old) => new.or(old),
        };
        match kind {
            None | Some("default") => Ok(RopeScaling::None),
            Some("llama3") => {
                let original = need("original_max_position_embeddings", rope.original_max_position_embeddings)?;
                let low_freq_factor = need("low_freq_factor", rope.low_freq_factor)?;
                let high_freq_factor = need("high_freq_factor", rope.high_freq_factor)?;
                if low_freq_factor >= high_freq_factor {
                    let detail = "rope scaling: `low_freq_factor` is not below `high_freq_factor`";
                    return Err(ShapeError::config(path, detail));
                }
                let factor = need("factor", rope.factor)?;
                Ok(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions: original })
            }
            Some(other) => Err(ShapeError::Unsupported {
                path: path.to_owned(),
                feature: format!("rope scaling of type `{other}`"),
                hint: "supported are default and llama3",
            }),
        }
    }
}

fn check_sizes(config: &ModelConfig, path: &Path) -> Result<(), ShapeError> {
    // Far above every published model, far below what overflows.
    const LARGEST: i64 = 1 << 24;
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
    for (name, value) in [("rms_norm_eps", config.rms_eps), ("rope_theta", config.rope_theta)] {
        if !(value.is_finite() && value > 0.0) {
            return Err(ShapeError::config(path, format!("`{name}` is {value}, not above 0")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn read(change: impl FnOnce(&mut Value)) -> Result<ModelConfig, ShapeError> {
        let mut value = json!({
            "model_type": "llama", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 512, "rope_theta": 5000.0, "eos_token_id": 7, "rope_scaling": null
        });
        change(&mut value);
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), value.to_string()).unwrap();
        ModelConfig::read(dir.path())
    }

    #[test]
    fn older_and_newer_keys_say_the_same() {
        let older = read(|_| ()).unwrap();
        let newer = read(|value| {
            value.as_object_mut().unwrap().remove("rope_theta");
            value["rope_parameters"] = json!({"rope_theta": 5000.0, "rope_type": "default"});
        });
        assert_eq!(older, newer.unwrap());
        assert_eq!((older.rope_theta, older.head_dim, older.end_tokens), (5000.0, 16, vec![7]));
    }

    #[test]
    fn llama3_scaling_under_both_keys() {
        let scaling = json!({
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64, "rope_type": "llama3", "rope_theta": 5000.0
        });
        let older = read(|value| value["rope_scaling"] = scaling.clone()).unwrap();
        let newer = read(|value| value["rope_parameters"] = scaling).unwrap();
        assert_eq!(older, newer);
        assert!(matches!(older.rope_scaling, RopeScaling::Llama3 { factor: 8.0, original_max_positions: 64.0, .. }));
    }

    #[test]
    fn rope_scaling_may_have_both_names() {
        let scaling = json!({
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            "rope_type": "llama3", "type": "llama3"
        });
        let both = read(|value| value["rope_scaling"] = scaling.clone()).unwrap();
        let one = read(|value| {
            value["rope_scaling"] = scaling.clone();
            value["rope_scaling"].as_object_mut().unwrap().remove("rope_type");
        });
        assert_eq!(both, one.unwrap());
        assert!(matches!(both.rope_scaling, RopeScaling::Llama3 { factor: 8.0, .. }));
        let other = read(|value| {
            value["rope_scaling"] = scaling.clone();
            value["rope_scaling"]["type"] = json!("linear");
        });
        assert!(other.unwrap_err().to_string().contains("`rope_type` is `llama3` and `type` is `linear`"));
    }

    #[test]
    fn the_case_of_both_rope_names_is_read() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/cases/rope-both");
        let config = ModelConfig::read(&dir).unwrap();
        assert!(matches!(config.rope_scaling, RopeScaling::Llama3 { factor: 8.0, original_max_positions: 64.0, .. }));
    }

    #[test]
    fn a_byte_order_mark_is_no_part_of_the_text() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/llama3");
        let text = fs::read_to_string(dir.join("config.json")).unwrap();
        let path = Path::new("config.json");
        let marked = ModelConfig::from_json(&format!("\u{feff}{text}"), path).unwrap();
        assert_eq!(marked, ModelConfig::from_json(&text, path).unwrap());
        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n";
        let error = ModelConfig::from_json(pointer, path).unwrap_err().to_string();
        assert!(error.contains("Git LFS"), "{error}");
    }

    #[test]
    fn refusals_name_file_and_field() {
        let cases: [(&str, Value, &str); 9] = [
            ("model_type", json!("gemma3"), "model type `gemma3`"),
            ("hidden_act", json!("gelu"), "activation `gelu`"),
            ("attention_bias", json!(true), "attention_bias"),
            ("use_sliding_window", json!(true), "sliding-window"),
            ("rope_scaling", json!({"type": "yarn", "factor": 4.0}), "`yarn`"),
            ("rope_scaling", json!({"type": "llama3", "factor": 4.0}), "lacks `original_max_position_embeddings`"),
            ("num_key_value_heads", json!(3), "not a multiple"),
            ("vocab_size", json!(0), "`vocab_size` is 0"),
            ("hidden_size", json!("wide"), "invalid type"),
        ];
        for (field, value, expected) in cases {
            let error = read(|config| config[field] = value).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains("config.json"), "{field}: {error}");
        }
    }

    #[test]
    fn tokens_of_the_generation_settings_come_first() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/llama3");
        assert_eq!(ModelConfig::read(&dir).unwrap().end_tokens, [379, 382]);
    }
}
