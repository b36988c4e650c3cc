//! config.json and generation_config.json from GGUF metadata.

use serde_json::{Value, json};

use super::ImportError;
use super::gguf::{Gguf, float, integer, string};

/// Architectures that are imported, with the names of their classes. GGUF calls them as `model_type` does, and so begin their keys.
const ARCHITECTURES: [(&str, &str); 3] =
    [("llama", "LlamaForCausalLM"), ("qwen2", "Qwen2ForCausalLM"), ("qwen3", "Qwen3ForCausalLM")];

/// The architecture of a file, if it is imported.
pub(crate) fn architecture(gguf: &Gguf) -> Result<&'static str, ImportError> {
    let named = gguf.required("general.architecture", string)?;
    let known = ARCHITECTURES.iter().map(|(name, _)| *name).find(|name| *name == named);
    known.ok_or_else(|| unsupported(gguf, format!("a model of architecture `{named}`")))
}

/// The configuration of the Hugging Face class.
pub(crate) fn config(gguf: &Gguf) -> Result<Value, ImportError> {
    let family = architecture(gguf)?;
    check_features(gguf, family)?;
    let class = ARCHITECTURES.iter().find(|(name, _)| *name == family).map(|(_, class)| *class);
    let number = |key: &str| gguf.required(&format!("{family}.{key}"), integer);
    let optional = |key: &str| gguf.optional(&format!("{family}.{key}"), integer);
    let (hidden, heads) = (number("embedding_length")?, number("attention.head_count")?);
    if heads == 0 || hidden == 0 {
        return Err(gguf.metadata_error(&format!("{family}.attention.head_count"), "or the embedding length is zero"));
    }
    let head_dim = match optional("attention.key_length")? {
        Some(length) => length,
        None => hidden / heads,
    };
    if optional("rope.dimension_count")?.is_some_and(|turned| turned != head_dim) {
        return Err(unsupported(gguf, "a rotary embedding of part of each head".to_owned()));
    }
    let mut config = json!({
        "architectures": [class],
        "attention_bias": false,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length")?,
        "max_position_embeddings": number("context_length")?,
        "mlp_bias": false,
        "model_type": family,
        "num_attention_heads": heads,
        "num_hidden_layers": number("block_count")?,
        "num_key_value_heads": optional("attention.head_count_kv")?.unwrap_or(heads),
        "rms_norm_eps": gguf.required(&format!("{family}.attention.layer_norm_rms_epsilon"), float)?,
        "rope_scaling": null,
        "rope_theta": gguf.optional(&format!("{family}.rope.freq_base"), float)?.unwrap_or(10_000.0),
        "tie_word_embeddings": !gguf.has_tensor("output.weight"),
        "torch_dtype": "bfloat16",
        "use_cache": true,
        "vocab_size": vocab_size(gguf)?,
    });
    copy_token_ids(gguf, &mut config)?;
    Ok(config)
}

/// Begin, end and padding tokens, as generation reads them.
pub(crate) fn generation_config(gguf: &Gguf) -> Result<Value, ImportError> {
    let mut config = json!({ "do_sample": true });
    copy_token_ids(gguf, &mut config)?;
    Ok(config)
}

fn vocab_size(gguf: &Gguf) -> Result<i64, ImportError> {
    if !gguf.has_tensor("token_embd.weight") {
        return Err(gguf.tensor_error("token_embd.weight", "is missing".to_owned()));
    }
    Ok(gguf.shape("token_embd.weight")[0])
}

fn copy_token_ids(gguf: &Gguf, config: &mut Value) -> Result<(), ImportError> {
    for (name, key) in [("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")] {
        if let Some(id) = gguf.optional(&format!("tokenizer.ggml.{key}_token_id"), integer)? {
            config[name] = id.into();
        }
    }
    // Some chat models end their turns with a token that is not the end of text.
    if let Some(turn) = gguf.optional("tokenizer.ggml.eot_token_id", integer)?
        && config["eos_token_id"] != turn
    {
        config["eos_token_id"] = match config["eos_token_id"].as_u64() {
            Some(end) => json!([end, turn]),
            None => turn.into(),
        };
    }
    Ok(())
}

fn check_features(gguf: &Gguf, family: &str) -> Result<(), ImportError> {
    if gguf.optional(&format!("{family}.expert_count"), integer)?.is_some_and(|experts| experts > 0) {
        return Err(unsupported(gguf, "a mixture of experts".to_owned()));
    }
    let scaling = gguf.optional(&format!("{family}.rope.scaling.type"), string)?;
    if scaling.is_some_and(|kind| kind != "none") || gguf.has_tensor("rope_freqs.weight") {
        return Err(unsupported(gguf, "a model with rope scaling".to_owned()));
    }
    Ok(())
}

fn unsupported(gguf: &Gguf, feature: String) -> ImportError {
    let hint = "imported are dense models of the llama, qwen2 and qwen3 families without rope scaling; use the Hugging Face folder instead";
    ImportError::UnsupportedArchitecture { file: gguf.path(), feature, hint }
}
