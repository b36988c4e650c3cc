//! GGUF tensors into parameters.

use std::collections::{BTreeMap, HashSet};

use pacs_torch::tch::Tensor;

use super::ImportError;
use super::folder::architecture;
use super::gguf::Gguf;
use crate::{ModelConfig, Parameters};
use pacs_shape::{EMBEDDING, FINAL_NORM, LM_HEAD};

/// Fills every parameter; returns the quantisations found, most frequent first.
pub(crate) fn fill(
    parameters: &Parameters,
    config: &ModelConfig,
    gguf: &mut Gguf,
) -> Result<Vec<(String, usize)>, ImportError> {
    // llama.cpp turns adjacent pairs for Llama alone; rows of the others are in the order of the rotate-half kind already.
    let (family, mut used) = (architecture(gguf)?, HashSet::new());
    for spec in parameters.layout.parameters() {
        let name = gguf_name(&spec.name);
        if !gguf.has_tensor(&name) {
            return Err(gguf.tensor_error(&name, "is missing".to_owned()));
        }
        let shape = gguf.shape(&name);
        if shape != spec.shape {
            return Err(gguf.tensor_error(&name, format!("has shape {shape:?}, not {:?}", spec.shape)));
        }
        let tensor = Tensor::from_slice(&gguf.read(&name)?).view(spec.shape.as_slice());
        let is_turned = spec.name.contains("q_proj") || spec.name.contains("k_proj");
        let tensor = if is_turned && family == "llama" { rotate_half_rows(&tensor, config.head_dim) } else { tensor };
        parameters.view(&spec.name).f_copy_(&tensor)?;
        used.insert(name);
    }
    let mut counts = BTreeMap::new();
    for (name, info) in gguf.tensors() {
        if !used.contains(name) {
            return Err(gguf.tensor_error(name, format!("is not part of the {family} architecture")));
        }
        *counts.entry(format!("{:?}", info.ggml_dtype)).or_insert(0) += 1;
    }
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_by_key(|&(_, count)| std::cmp::Reverse(count));
    Ok(counts)
}

/// Rows of adjacent rotary pairs, back to the order in which row `i` of a head turns with row `i + H / 2`.
///
/// `weight`: `[heads H, D]`, pairs in rows `2 i` and `2 i + 1` of each head.
fn rotate_half_rows(weight: &Tensor, head_dim: i64) -> Tensor {
    let (rows, columns) = weight.size2().expect("a projection is a matrix");
    weight.view([rows / head_dim, head_dim / 2, 2, columns]).transpose(1, 2).reshape([rows, columns])
}

fn gguf_name(name: &str) -> String {
    match name {
        EMBEDDING => return "token_embd.weight".to_owned(),
        FINAL_NORM => return "output_norm.weight".to_owned(),
        LM_HEAD => return "output.weight".to_owned(),
        _ => (),
    }
    const PARTS: [(&str, &str); 11] = [
        ("input_layernorm", "attn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    let named = PARTS.iter().fold(name.to_owned(), |name, (ours, theirs)| name.replace(ours, theirs));
    named.replace("model.layers.", "blk.")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(gguf_name("model.layers.12.self_attn.q_proj.weight"), "blk.12.attn_q.weight");
        assert_eq!(gguf_name("model.layers.0.post_attention_layernorm.weight"), "blk.0.ffn_norm.weight");
        assert_eq!(gguf_name("model.layers.0.self_attn.k_proj.bias"), "blk.0.attn_k.bias");
        assert_eq!(gguf_name("model.layers.0.self_attn.q_norm.weight"), "blk.0.attn_q_norm.weight");
        assert_eq!(gguf_name("lm_head.weight"), "output.weight");
    }

    #[test]
    fn adjacent_pairs_become_halves() {
        // Two heads of four rows: pairs (0, 1) and (2, 3) of each head.
        let rows = Tensor::from_slice(&[0i64, 1, 2, 3, 10, 11, 12, 13]).view([8, 1]);
        let expected = Tensor::from_slice(&[0i64, 2, 1, 3, 10, 12, 11, 13]).view([8, 1]);
        assert_eq!(rotate_half_rows(&rows, 4), expected);
    }
}
