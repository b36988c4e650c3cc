use std::collections::HashMap;
use std::ops::Range;

use crate::{Architecture, Experts, HeadNorms, Lora, ModelConfig};

/// Leaves start at multiples of this many elements, so that vector loads and network chunks stay aligned.
const ALIGNMENT: usize = 64;

/// One parameter under its Hugging Face name, and its place in the flat buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParameterSpec {
    /// Hugging Face name.
    pub name: String,
    /// Shape as checkpoints store it.
    pub shape: Vec<i64>,
    /// First element in the flat buffer.
    pub offset: usize,
    /// Weight decay is customary for it: a matrix, not a norm or a bias.
    pub decay: bool,
}

impl ParameterSpec {
    /// Number of elements.
    #[must_use]
    pub fn numel(&self) -> usize {
        numel(&self.shape)
    }

    /// Whether it belongs to one expert of a mixture.
    #[must_use]
    pub fn is_of_expert(&self) -> bool {
        self.name.contains(OF_EXPERT)
    }

    /// Where files keep it that stack the experts of a layer; none where it belongs to no expert.
    #[must_use]
    pub fn stacked(&self, experts: &Experts) -> Option<StackedPart> {
        let (layer, rest) = self.name.split_once(OF_EXPERT)?;
        let (expert, matrix) = rest.strip_suffix(".weight")?.split_once('.')?;
        let expert: usize = expert.parse().ok()?;
        let [rows, columns] = self.shape[..] else { return None };
        let (stack, parts, part) = match matrix {
            "gate_proj" => ("gate_up_proj", 2, 0),
            "up_proj" => ("gate_up_proj", 2, 1),
            _ => ("down_proj", 1, 0),
        };
        Some(StackedPart {
            name: format!("{layer}{OF_EXPERT}{stack}"),
            shape: vec![experts.count, parts as i64 * rows, columns],
            first: (expert * parts + part) * self.numel(),
        })
    }
}

/// A part of a tensor that holds the experts of a layer as transformers 5 computes with them: `gate_up_proj` `[E, 2 F, D]`,
/// gates first, and `down_proj` `[E, D, F]`. It writes such files on request (`save_original_format=False`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StackedPart {
    /// Name of the whole tensor.
    pub name: String,
    /// Shape of the whole tensor.
    pub shape: Vec<i64>,
    /// First element of the part, which is contiguous.
    pub first: usize,
}

/// Parameters that are multiplied together, contiguous in the flat buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeafSpec {
    /// Fused shape, for example `[(N + 2K) H, D]` of query, key and value projections.
    pub shape: Vec<i64>,
    /// First element in the flat buffer.
    pub offset: usize,
}

impl LeafSpec {
    /// Number of elements.
    #[must_use]
    pub fn numel(&self) -> usize {
        numel(&self.shape)
    }
}

/// Parameters that the forward uses one after the other: what is gathered, computed with and reduced as a whole.
///
/// Bucket 0 is the embedding, bucket `1 + i` is layer `i`, the last one is the final norm and, where it is not the
/// embedding, the LM head. Those of adapters are the same, so the first and mostly the last one are empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// First element in the flat buffer.
    pub offset: usize,
    /// Elements of its leaves and of the padding between them; the same in every layout of a model.
    pub numel: usize,
    /// Elements up to the next bucket, a multiple of the number of ranks that share it.
    pub room: usize,
}

impl Bucket {
    /// Its place in the flat buffer, padding at its end included.
    #[must_use]
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.room
    }
}

/// Where every parameter lies in the flat buffer, in the order in which the forward uses them.
///
/// Of a configuration with adapters ([`ModelConfig::with_lora`]) it is the layout of the adapters alone.
#[derive(Clone, Debug)]
pub struct ParameterLayout {
    parameters: Vec<ParameterSpec>,
    leaves: Vec<LeafSpec>,
    buckets: Vec<Bucket>,
    /// Parameter name to (index of the parameter, index of its leaf).
    by_name: HashMap<String, (usize, usize)>,
    total: usize,
    head: &'static str,
}

impl ParameterLayout {
    /// The layout of a model, as it is published and saved.
    #[must_use]
    pub fn new(config: &ModelConfig) -> Self {
        Self::divided(config, 1)
    }

    /// A layout whose every bucket divides into `ranks` equal parts, each a multiple of 64 elements.
    #[must_use]
    pub fn divided(config: &ModelConfig, ranks: usize) -> Self {
        Self::build(config, ranks, None)
    }

    /// As [`ParameterLayout::divided`], but layers take turns in `windows` places: for a model that holds the parameters
    /// of so many layers at a time.
    ///
    /// # Panics
    /// When there is no window.
    #[must_use]
    pub fn windowed(config: &ModelConfig, ranks: usize, windows: usize) -> Self {
        assert!(windows > 0, "a layer needs a place");
        Self::build(config, ranks, Some(windows))
    }

    fn build(config: &ModelConfig, ranks: usize, windows: Option<usize>) -> Self {
        let head = Head::of(config);
        let mut layout = Self {
            parameters: Vec::new(),
            leaves: Vec::new(),
            buckets: Vec::new(),
            by_name: HashMap::new(),
            total: 0,
            head: head.name(),
        };
        let multiple = ALIGNMENT * ranks.max(1);
        let d = config.hidden;
        // Windows have room for the largest layer: dense layers and those with experts may take turns.
        let windows = windows.map(|windows| (windows, largest_layer(config, ranks)));
        if config.lora.is_none() {
            layout.push(&[(EMBEDDING.to_owned(), vec![config.vocab_size, d])]);
        }
        layout.close_bucket(0, multiple);
        let first = layout.total;
        for index in 0..config.layers {
            if let Some((windows, room)) = windows {
                layout.total = first + index % windows * room;
            }
            let start = layout.total;
            match &config.lora {
                None => layout.push_layer(config, index),
                Some(lora) => layout.push_adapters(config, lora, index),
            }
            layout.close_bucket(start, multiple);
        }
        if let Some((windows, room)) = windows {
            layout.total = first + windows.min(config.layers) * room;
        }
        let start = layout.total;
        if config.lora.is_none() {
            layout.push(&[(FINAL_NORM.to_owned(), vec![d])]);
        }
        match head {
            Head::Own if config.lora.is_some() => {}
            Head::Embedding => {}
            Head::Own => layout.push(&[(LM_HEAD.to_owned(), vec![config.vocab_size, d])]),
            Head::Values => layout.push(&[(VALUE_HEAD.to_owned(), vec![1, d])]),
        }
        layout.close_bucket(start, multiple);
        layout
    }

    /// Appends the parameters of a layer, in the order in which the forward uses them.
    fn push_layer(&mut self, config: &ModelConfig, index: usize) {
        let Architecture { norms, head_norms, .. } = config.architecture;
        let (d, n, k, h) = (config.hidden, config.heads, config.kv_heads, config.head_dim);
        let name = |suffix: &str| layer_parameter(index, suffix);
        let single = |suffix: &str, shape: &[i64]| [(name(suffix), shape.to_vec())];
        // The rows of matrices that are multiplied together, under the names that checkpoints have for them.
        let stacked = |block: &str, names: &[&str], kind: &str, rows: &[i64], columns: Option<i64>| {
            let rows = if names.len() == 1 { vec![rows.iter().sum()] } else { rows.to_vec() };
            let part = |(part, rows): (&&str, i64)| {
                (name(&format!("{block}.{part}.{kind}")), [rows].into_iter().chain(columns).collect::<Vec<i64>>())
            };
            names.iter().zip(rows).map(part).collect::<Vec<_>>()
        };
        if let Some(norm) = norms.before_attention {
            self.push(&single(norm, &[d]));
        }
        let (names, rows) = (config.architecture.qkv_names(), [n * h, k * h, k * h]);
        self.push(&stacked("self_attn", names, "weight", &rows, Some(d)));
        if config.architecture.qkv_bias {
            self.push(&stacked("self_attn", names, "bias", &rows, None));
        }
        let widths = match head_norms {
            HeadNorms::Absent => None,
            HeadNorms::EachHead => Some([h, h]),
            HeadNorms::Width => Some([n * h, k * h]),
        };
        if let Some([queries, keys]) = widths {
            self.push(&single("self_attn.q_norm.weight", &[queries]));
            self.push(&single("self_attn.k_norm.weight", &[keys]));
        }
        self.push(&single("self_attn.o_proj.weight", &[d, n * h]));
        for norm in [norms.after_attention, norms.before_ffn].into_iter().flatten() {
            self.push(&single(norm, &[d]));
        }
        match config.experts_of(index) {
            Some(experts) => self.push_experts(experts, d, index),
            None => {
                let (names, rows) = (config.architecture.gate_up_names(), [config.ffn, config.ffn]);
                self.push(&stacked("mlp", names, "weight", &rows, Some(d)));
                self.push(&single("mlp.down_proj.weight", &[d, config.ffn]));
            }
        }
        if let Some(norm) = norms.after_ffn {
            self.push(&single(norm, &[d]));
        }
    }

    /// Appends the router of a layer, gates and ups of all its experts, expert by expert, and the ways back down.
    fn push_experts(&mut self, experts: &Experts, d: i64, index: usize) {
        let f = experts.ffn;
        let part = |expert, matrix, shape: [i64; 2]| {
            (layer_parameter(index, &expert_parameter(expert, matrix)), shape.to_vec())
        };
        self.push(&[(layer_parameter(index, ROUTER), vec![experts.count, d])]);
        let gates_ups = |expert| [part(expert, "gate_proj", [f, d]), part(expert, "up_proj", [f, d])];
        self.push(&(0..experts.count).flat_map(gates_ups).collect::<Vec<_>>());
        self.push(&(0..experts.count).map(|expert| part(expert, "down_proj", [d, f])).collect::<Vec<_>>());
    }

    /// Appends the adapters of a layer. The `A` of modules that are multiplied together are one leaf, since they are multiplied
    /// with the same input.
    fn push_adapters(&mut self, config: &ModelConfig, lora: &Lora, index: usize) {
        let name = |suffix: &str| layer_parameter(index, suffix);
        for group in config.linear_modules() {
            let adapted: Vec<_> = group.iter().filter(|module| lora.adapts(module.name())).collect();
            if adapted.is_empty() {
                continue;
            }
            let down = adapted.iter().map(|module| (name(&module.adapter('A')), vec![lora.rank, module.columns]));
            self.push(&down.collect::<Vec<_>>());
            for module in adapted {
                self.push(&[(name(&module.adapter('B')), vec![module.rows, lora.rank])]);
            }
        }
    }

    /// Ends the bucket that began at `offset`.
    fn close_bucket(&mut self, offset: usize, multiple: usize) {
        let numel = self.total - offset;
        let room = numel.next_multiple_of(multiple);
        self.buckets.push(Bucket { offset, numel, room });
        self.total = offset + room;
    }

    /// Every parameter, by offset.
    #[must_use]
    pub fn parameters(&self) -> &[ParameterSpec] {
        &self.parameters
    }

    /// Every leaf, by offset; each parameter lies in exactly one.
    #[must_use]
    pub fn leaves(&self) -> &[LeafSpec] {
        &self.leaves
    }

    /// Every bucket, in the order in which the forward uses them.
    #[must_use]
    pub fn buckets(&self) -> &[Bucket] {
        &self.buckets
    }

    /// Elements of the flat buffer, padding included; a multiple of 64.
    #[must_use]
    pub fn total(&self) -> usize {
        self.total
    }

    /// The parameter with a Hugging Face name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<&ParameterSpec> {
        self.by_name.get(name).map(|&(parameter, _)| &self.parameters[parameter])
    }

    /// The parameter that the head multiplies with: the embedding when tied, the one row of a value model. The head's
    /// gradient belongs here.
    ///
    /// # Panics
    /// When the layout is that of a policy's adapters, whose head is frozen.
    #[must_use]
    pub fn head(&self) -> &ParameterSpec {
        self.find(self.head).expect("every layout but that of adapters has its head")
    }

    /// Index of the leaf that the parameter with a Hugging Face name lies in.
    #[must_use]
    pub fn leaf_of(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).map(|&(_, leaf)| leaf)
    }

    /// Appends one leaf; its parts are stacked along their first dimension.
    fn push(&mut self, parts: &[(String, Vec<i64>)]) {
        let leaf_offset = self.total;
        let leaf = self.leaves.len();
        let mut offset = leaf_offset;
        for (name, shape) in parts {
            self.by_name.insert(name.clone(), (self.parameters.len(), leaf));
            let spec = ParameterSpec { name: name.clone(), shape: shape.clone(), offset, decay: shape.len() > 1 };
            offset += spec.numel();
            self.parameters.push(spec);
        }
        let mut shape = parts[0].1.clone();
        shape[0] = parts.iter().map(|(_, shape)| shape[0]).sum();
        self.leaves.push(LeafSpec { shape, offset: leaf_offset });
        self.total = offset.next_multiple_of(ALIGNMENT);
    }
}

/// What the hidden states are multiplied with in the end.
#[derive(Clone, Copy, Debug)]
enum Head {
    /// The embedding, tied.
    Embedding,
    /// A matrix of its own.
    Own,
    /// One row, for a value model.
    Values,
}

impl Head {
    fn of(config: &ModelConfig) -> Self {
        match (config.estimates_values, config.tie_embeddings) {
            (true, _) => Self::Values,
            (false, true) => Self::Embedding,
            (false, false) => Self::Own,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Embedding => EMBEDDING,
            Self::Own => LM_HEAD,
            Self::Values => VALUE_HEAD,
        }
    }
}

/// Name of the embedding.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// Name of the norm in front of the LM head.
pub const FINAL_NORM: &str = "model.norm.weight";
/// Name of the LM head where it is not the embedding.
pub const LM_HEAD: &str = "lm_head.weight";
/// Name of the head of a value model.
const VALUE_HEAD: &str = "value_head.weight";

/// Name of the router of a layer with experts, within the layer.
pub const ROUTER: &str = "mlp.gate.weight";
/// What stands before the number of an expert in the names of its parameters.
const OF_EXPERT: &str = ".mlp.experts.";

/// Name of a matrix of an expert, within its layer.
#[must_use]
pub fn expert_parameter(expert: i64, matrix: &str) -> String {
    format!("mlp.experts.{expert}.{matrix}.weight")
}

/// Room of the largest layer, in a layout that divides into `ranks` parts.
fn largest_layer(config: &ModelConfig, ranks: usize) -> usize {
    let divided = ParameterLayout::divided(config, ranks);
    divided.buckets[1..=config.layers].iter().map(|bucket| bucket.room).max().unwrap_or(0)
}

/// Name of a parameter of a layer.
#[must_use]
pub fn layer_parameter(layer: usize, suffix: &str) -> String {
    format!("model.layers.{layer}.{suffix}")
}

fn numel(shape: &[i64]) -> usize {
    let elements: i64 = shape.iter().product();
    usize::try_from(elements).expect("configured sizes are positive")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden_models;

    fn golden(name: &str) -> ModelConfig {
        ModelConfig::read(&golden_models::folder().join(name)).unwrap()
    }

    #[test]
    fn every_parameter_lies_in_exactly_one_leaf() {
        for name in golden_models::names() {
            let layout = ParameterLayout::new(&golden(&name));
            let mut end = 0;
            for leaf in layout.leaves() {
                assert!(leaf.offset >= end && leaf.offset % ALIGNMENT == 0);
                end = leaf.offset + leaf.numel();
                let inside = |spec: &&ParameterSpec| spec.offset >= leaf.offset && spec.offset < end;
                let covered: usize = layout.parameters().iter().filter(inside).map(ParameterSpec::numel).sum();
                assert_eq!(covered, leaf.numel());
            }
            assert_eq!(layout.total(), end.next_multiple_of(ALIGNMENT));
            assert!(layout.parameters().is_sorted_by_key(|spec| spec.offset));
        }
    }

    #[test]
    fn buckets_follow_each_other_and_divide() {
        for name in golden_models::names() {
            let config = golden(&name);
            let whole = ParameterLayout::new(&config);
            for ranks in 1..=5 {
                let layout = ParameterLayout::divided(&config, ranks);
                assert_eq!(layout.buckets().len(), config.layers + 2);
                let mut end = 0;
                for (bucket, canonical) in layout.buckets().iter().zip(whole.buckets()) {
                    assert_eq!((bucket.offset, bucket.numel), (end, canonical.numel));
                    assert!(bucket.room >= bucket.numel && bucket.room % (ALIGNMENT * ranks) == 0);
                    end += bucket.room;
                }
                assert_eq!(layout.total(), end);
            }
            assert!(whole.buckets().iter().all(|bucket| bucket.room == bucket.numel));
        }
    }

    #[test]
    fn layers_take_turns_in_windows() {
        let config = ModelConfig { layers: 5, ..golden("qwen2-untied") };
        let divided = ParameterLayout::divided(&config, 3);
        let windowed = ParameterLayout::windowed(&config, 3, 2);
        let offsets: Vec<usize> = windowed.buckets().iter().map(|bucket| bucket.offset).collect();
        let [embedding, layer] = [0, 1].map(|index| divided.buckets()[index].room);
        let (first, second, last) = (embedding, embedding + layer, embedding + 2 * layer);
        assert_eq!(offsets, [0, first, second, first, second, first, last]);
        assert_eq!(windowed.total(), last + divided.buckets()[6].room);
        for (a, b) in divided.parameters().iter().zip(windowed.parameters()) {
            let within = |layout: &ParameterLayout, spec: &ParameterSpec| {
                let bucket = layout.buckets().iter().rev().find(|bucket| bucket.range().contains(&spec.offset));
                spec.offset - bucket.unwrap().offset
            };
            assert_eq!((&a.name, within(&divided, a)), (&b.name, within(&windowed, b)));
        }
    }

    #[test]
    fn counts_of_the_fixtures() {
        // As transformers counted them.
        let summary = std::fs::read_to_string(golden_models::folder().join("summary.json")).unwrap();
        let summary: serde_json::Value = serde_json::from_str(&summary).unwrap();
        for name in golden_models::names() {
            let expected = summary[&name]["params"].as_u64().unwrap();
            assert_eq!(golden(&name).parameter_count() as u64, expected, "{name}");
        }
    }

    #[test]
    fn projections_are_fused_and_stay_visible() {
        let layout = ParameterLayout::new(&golden("qwen3"));
        let [q, k, v] = ["q", "k", "v"]
            .map(|part| layout.find(&layer_parameter(1, &format!("self_attn.{part}_proj.weight"))).unwrap());
        assert_eq!((q.offset + q.numel(), k.offset + k.numel()), (k.offset, v.offset));
        let leaf = &layout.leaves()[layout.leaf_of(&q.name).unwrap()];
        assert_eq!((leaf.offset, &leaf.shape[..]), (q.offset, &[(4 + 2 * 2) * 32, 64][..]));
        assert_eq!(layout.head().name, EMBEDDING);
    }

    #[test]
    fn windows_have_room_for_dense_layers_and_for_experts() {
        let config = golden("qwen3_moe");
        let divided = ParameterLayout::divided(&config, 3);
        let windowed = ParameterLayout::windowed(&config, 3, 2);
        let layers = &divided.buckets()[1..4];
        assert!(layers[1].room < layers[0].room && layers[0].room == layers[2].room, "the second layer is dense");
        let offsets: Vec<usize> = windowed.buckets().iter().map(|bucket| bucket.offset).collect();
        let (first, room) = (divided.buckets()[0].room, layers[0].room);
        assert_eq!(offsets, [0, first, first + room, first, first + 2 * room]);
        // The dense layer is the first, and those with experts come into its window.
        let mut turned = config.clone();
        turned.experts.as_mut().unwrap().dense_layers = vec![0];
        let windowed = ParameterLayout::windowed(&turned, 3, 2);
        let ends: Vec<usize> = windowed.buckets()[1..4].iter().map(|bucket| bucket.range().end).collect();
        assert!(ends[2] == windowed.buckets()[2].offset && ends[0] < ends[2], "{ends:?}");
    }

    #[test]
    fn experts_lie_one_after_the_other() {
        let (config, layout) = (golden("qwen3_moe"), ParameterLayout::new(&golden("qwen3_moe")));
        let experts = config.experts.as_ref().unwrap();
        let of = |expert, matrix| layout.find(&layer_parameter(2, &expert_parameter(expert, matrix))).unwrap();
        let gates_ups = &layout.leaves()[layout.leaf_of(&of(0, "gate_proj").name).unwrap()];
        assert_eq!(gates_ups.shape, [8 * 2 * 24, 32]);
        for expert in 0..experts.count {
            let (gate, up, down) = (of(expert, "gate_proj"), of(expert, "up_proj"), of(expert, "down_proj"));
            assert_eq!(gate.offset, gates_ups.offset + expert as usize * 2 * 24 * 32);
            assert_eq!(
                (up.offset, &up.shape[..], &down.shape[..]),
                (gate.offset + 24 * 32, &[24, 32][..], &[32, 24][..])
            );
            // And in the same order in files that stack them.
            let stacked = up.stacked(experts).unwrap();
            assert_eq!(stacked.name, "model.layers.2.mlp.experts.gate_up_proj");
            assert_eq!((&stacked.shape[..], stacked.first), (&[8, 48, 32][..], up.offset - gates_ups.offset));
            let stacked = down.stacked(experts).unwrap();
            assert_eq!(stacked.name, "model.layers.2.mlp.experts.down_proj");
            assert_eq!((&stacked.shape[..], stacked.first), (&[8, 32, 24][..], expert as usize * 32 * 24));
        }
        let router = layout.find(&layer_parameter(2, ROUTER)).unwrap();
        assert_eq!((&router.shape[..], router.is_of_expert(), router.stacked(experts)), (&[8, 32][..], false, None));
        assert!(layout.find(&layer_parameter(1, ROUTER)).is_none(), "the second layer is dense");
        // Two of eight experts of 3 * 24 * 32 weights in two layers.
        assert_eq!(config.active_parameter_count(), 79_936 - 2 * 6 * 3 * 24 * 32);
    }

    #[test]
    fn fused_projections_are_one_parameter() {
        let layout = ParameterLayout::new(&golden("phi3"));
        let names = layout.parameters().iter().filter_map(|spec| spec.name.strip_prefix("model.layers.1."));
        assert_eq!(
            names.collect::<Vec<_>>(),
            [
                "input_layernorm.weight",
                "self_attn.qkv_proj.weight",
                "self_attn.o_proj.weight",
                "post_attention_layernorm.weight",
                "mlp.gate_up_proj.weight",
                "mlp.down_proj.weight"
            ]
        );
        assert_eq!(
            layout.find(&layer_parameter(1, "self_attn.qkv_proj.weight")).unwrap().shape,
            [(4 + 2 * 2) * 16, 64]
        );
    }
}
