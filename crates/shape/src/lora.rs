//! Low-rank adapters (LoRA, Hu et al. 2021): which matrices have one, and under which names.
//!
//! A matrix `W` of an adapted model acts as `W + scale B A`, where `A` is `[rank, in]` and `B` `[out, rank]`. `W` and all other
//! parameters of the model are frozen, so the adapters alone are what is trained, sharded, saved and published.

use std::fmt;

use crate::{Architecture, ModelConfig, ShapeError};

/// The adapters of a model: settings as PEFT has them.
#[derive(Clone, Debug, PartialEq)]
pub struct Lora {
    /// Rows of `A` and columns of `B`.
    pub rank: i64,
    /// Numerator of [`Lora::scale`].
    pub alpha: f64,
    /// The scale is divided by the root of the rank instead of the rank (rank-stabilised LoRA, Kalajdzievski 2023).
    pub rslora: bool,
    /// Names of the adapted modules of a layer, as in `q_proj`, in the order of the model; empty stands for all.
    pub targets: Vec<String>,
}

impl Lora {
    /// What the product of the two matrices is multiplied with.
    #[must_use]
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.rslora { rank.sqrt() } else { rank }
    }

    /// Whether the module of this name, as in `q_proj`, has an adapter.
    #[must_use]
    pub fn adapts(&self, module: &str) -> bool {
        self.targets.is_empty() || self.targets.iter().any(|target| target == module)
    }
}

impl fmt::Display for Lora {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stabilised = if self.rslora { ", rslora" } else { "" };
        let targets = if self.targets.is_empty() { "all linear layers".to_owned() } else { self.targets.join(" ") };
        write!(f, "rank {}, alpha {}{stabilised}, on {targets}", self.rank, self.alpha)
    }
}

/// A linear module of a layer, which may have an adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearModule {
    /// Name within a layer, as in `self_attn.q_proj`.
    pub path: String,
    /// Rows of its matrix.
    pub rows: i64,
    /// Columns of its matrix.
    pub columns: i64,
}

impl LinearModule {
    /// Last part of its name, as in `q_proj`, by which [`Lora::targets`] has it.
    #[must_use]
    pub fn name(&self) -> &str {
        self.path.rsplit('.').next().unwrap_or(&self.path)
    }

    /// Name within a layer of one of the two matrices of its adapter: `A` or `B`.
    #[must_use]
    pub fn adapter(&self, matrix: char) -> String {
        format!("{}.lora_{matrix}.weight", self.path)
    }
}

impl ModelConfig {
    /// The linear modules of a layer without experts, those that are multiplied together in one group: projections of queries, keys and values,
    /// that of the output, gates and ups, and the one back down.
    #[must_use]
    pub fn linear_modules(&self) -> [Vec<LinearModule>; 4] {
        let (d, n, k, h) = (self.hidden, self.heads, self.kv_heads, self.head_dim);
        let architecture: &Architecture = self.architecture;
        let module = |block: &str, name: &str, rows: i64, columns: i64| LinearModule {
            path: format!("{block}.{name}"),
            rows,
            columns,
        };
        let group = |block: &str, names: &[&str], rows: &[i64]| -> Vec<LinearModule> {
            let rows = if names.len() == 1 { vec![rows.iter().sum()] } else { rows.to_vec() };
            names.iter().zip(rows).map(|(name, rows)| module(block, name, rows, d)).collect()
        };
        [
            group("self_attn", architecture.qkv_names(), &[n * h, k * h, k * h]),
            vec![module("self_attn", "o_proj", d, n * h)],
            group("mlp", architecture.gate_up_names(), &[self.ffn, self.ffn]),
            vec![module("mlp", "down_proj", d, self.ffn)],
        ]
    }

    /// The same model with adapters: its layout is that of the adapters, and [`ModelConfig::base`] that of what they adapt.
    ///
    /// Of a mixture of experts only the attention can be adapted.
    ///
    /// # Errors
    /// When a target is no linear module of this architecture, or the rank is larger than a matrix that has an adapter.
    pub fn with_lora(&self, lora: &Lora) -> Result<Self, ShapeError> {
        let [qkv, o, gate_up, down] = self.linear_modules();
        let (attention, blocks) = (qkv.into_iter().chain(o), gate_up.into_iter().chain(down));
        let (modules, frozen): (Vec<LinearModule>, Vec<LinearModule>) = match &self.experts {
            None => (attention.chain(blocks).collect(), Vec::new()),
            Some(_) => (attention.collect(), blocks.collect()),
        };
        let refused = |detail: String| Err(ShapeError::Lora { detail });
        for target in &lora.targets {
            if frozen.iter().any(|module| module.name() == target) {
                let names: Vec<&str> = modules.iter().map(LinearModule::name).collect();
                return refused(format!(
                    "`{target}` of `model.lora.targets` belongs to the experts of this model, which have no adapters here; its \
                     attention has {}",
                    names.join(", ")
                ));
            }
            if !modules.iter().any(|module| module.name() == target) {
                let names: Vec<&str> = modules.iter().map(LinearModule::name).collect();
                return refused(format!(
                    "`{target}` of `model.lora.targets` is no linear layer of this model, which has {}",
                    names.join(", ")
                ));
            }
        }
        let adapted: Vec<&LinearModule> = modules.iter().filter(|module| lora.adapts(module.name())).collect();
        if let Some(module) = adapted.iter().find(|module| module.rows.min(module.columns) < lora.rank) {
            let LinearModule { path, rows, columns } = module;
            return refused(format!(
                "`model.lora.rank` = {} is more than the matrix of `{path}`, {rows} x {columns}, has",
                lora.rank
            ));
        }
        let targets = adapted.iter().map(|module| module.name().to_owned()).collect();
        Ok(Self { lora: Some(Lora { targets, ..lora.clone() }), ..self.clone() })
    }

    /// The model without its adapters.
    #[must_use]
    pub fn base(&self) -> Self {
        Self { lora: None, ..self.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ParameterLayout;
    use std::path::Path;

    fn golden(name: &str) -> ModelConfig {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models").join(name);
        ModelConfig::read(&dir).unwrap()
    }

    fn lora(targets: &[&str]) -> Lora {
        let targets = targets.iter().map(|&target| target.to_owned()).collect();
        Lora { rank: 4, alpha: 8.0, rslora: false, targets }
    }

    #[test]
    fn the_scale_is_that_of_peft() {
        let plain = Lora { rank: 16, alpha: 32.0, ..lora(&[]) };
        assert_eq!(plain.scale(), 2.0);
        assert_eq!(Lora { rslora: true, ..plain }.scale(), 8.0);
    }

    #[test]
    fn adapters_have_a_layout_of_their_own_and_know_their_base() {
        let config = golden("qwen2-tied");
        let adapted = config.with_lora(&lora(&[])).unwrap();
        assert_eq!(adapted.base(), config);
        // Rows and columns of each matrix, times the rank.
        let expected: i64 =
            config.linear_modules().iter().flatten().map(|module| 4 * (module.rows + module.columns)).sum();
        assert_eq!(adapted.parameter_count() as i64, expected * config.layers as i64);
        let layout = ParameterLayout::new(&adapted);
        let names: Vec<&str> =
            layout.parameters().iter().filter_map(|spec| spec.name.strip_prefix("model.layers.0.")).collect();
        assert_eq!(names.len(), 14);
        assert_eq!(
            names[..7],
            [
                "self_attn.q_proj.lora_A.weight",
                "self_attn.k_proj.lora_A.weight",
                "self_attn.v_proj.lora_A.weight",
                "self_attn.q_proj.lora_B.weight",
                "self_attn.k_proj.lora_B.weight",
                "self_attn.v_proj.lora_B.weight",
                "self_attn.o_proj.lora_A.weight",
            ]
        );
        assert!(layout.parameters().iter().all(|spec| spec.decay), "adapters are matrices");
    }

    #[test]
    fn buckets_of_adapters_are_those_of_the_layers() {
        for name in ["qwen3", "phi3", "gemma3", "olmo2"] {
            let adapted = golden(name).with_lora(&lora(&[])).unwrap();
            for ranks in 1..=3 {
                let layout = ParameterLayout::divided(&adapted, ranks);
                let buckets = layout.buckets();
                assert_eq!(buckets.len(), adapted.layers + 2);
                assert_eq!((buckets[0].room, buckets[adapted.layers + 1].room), (0, 0), "{name}");
                assert!(buckets.iter().all(|bucket| bucket.room % (64 * ranks) == 0));
                let windowed = ParameterLayout::windowed(&adapted, ranks, 2);
                assert_eq!(windowed.total(), 2 * buckets[1].room);
            }
        }
    }

    #[test]
    fn some_targets_and_fused_ones() {
        let some = golden("llama3").with_lora(&lora(&["v_proj", "q_proj"])).unwrap();
        assert_eq!(some.lora.as_ref().unwrap().targets, ["q_proj", "v_proj"], "in the order of the model");
        let names: Vec<String> =
            ParameterLayout::new(&some).parameters().iter().map(|spec| spec.name.clone()).collect();
        assert_eq!(names.len(), 4 * some.layers);
        let fused = golden("phi3").with_lora(&lora(&[])).unwrap();
        assert_eq!(fused.lora.unwrap().targets, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]);
    }

    #[test]
    fn a_value_model_has_adapters_and_a_head() {
        let values = golden("qwen3").with_lora(&lora(&[])).unwrap().of_values();
        let layout = ParameterLayout::new(&values);
        assert_eq!(layout.head().shape, [1, values.hidden]);
        assert_eq!(layout.buckets().last().unwrap().numel, values.hidden as usize);
    }

    #[test]
    fn what_no_matrix_of_the_model_can_have_is_refused() {
        let problem = |name: &str, lora: &Lora| golden(name).with_lora(lora).unwrap_err().to_string();
        let found = problem("phi3", &lora(&["q_proj"]));
        assert!(found.contains("`q_proj`") && found.contains("qkv_proj, o_proj, gate_up_proj, down_proj"), "{found}");
        let found = problem("qwen3_moe", &lora(&["q_proj", "up_proj"]));
        assert!(found.contains("`up_proj`") && found.contains("q_proj, k_proj, v_proj, o_proj"), "{found}");
        let attention = golden("qwen3_moe").with_lora(&lora(&[])).unwrap().lora.unwrap().targets;
        assert_eq!(attention, ["q_proj", "k_proj", "v_proj", "o_proj"], "all that can be adapted");
        let found = problem("qwen3", &Lora { rank: 500, ..lora(&[]) });
        assert!(found.contains("`model.lora.rank` = 500") && found.contains("self_attn.q_proj"), "{found}");
    }
}
