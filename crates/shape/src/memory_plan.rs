//! How much memory training takes on one rank, by arithmetic: nothing is allocated to find out.
// Legend: `T` tokens of a pass, `D` width, `F` feed-forward width, `E` experts, `N` query heads, `K` key and value heads,
// `H` head, `V` vocabulary.

use serde::Serialize;

use crate::{Activation, Architecture, Division, Experts, HeadNorms, ModelConfig, ParameterLayout, Sharding};

/// Scored positions whose logits exist at once in host memory: few enough to keep a vocabulary of 150,000 below a gigabyte.
const HOST_HEAD_CHUNK: usize = 512;
/// The same on a GPU. The gradient of the head is read and written once a chunk, which for few positions takes longer than to
/// multiply them.
const DEVICE_HEAD_CHUNK: usize = 4096;

/// Scored positions whose logits exist at once, in host memory or on a GPU.
#[must_use]
pub const fn head_chunk(in_host_memory: bool) -> usize {
    if in_host_memory { HOST_HEAD_CHUNK } else { DEVICE_HEAD_CHUNK }
}

/// Layers whose weights are in place at a time where they are divided among ranks: one is computed with while the next
/// one arrives.
pub const WINDOWS: usize = 2;

/// Share of a rank's memory that a plan leaves free: for the allocator's gaps, libraries, and what is not planned.
pub const HEAD_ROOM: f64 = 0.08;

/// Pages of libtorch and its libraries that a first training step touches, on a CPU (measured).
const LIBRARIES: u64 = 96 << 20;

/// Where the copy of the state is that checkpoints are written from while training continues.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StateCopy {
    /// There is none: training stands still while they are written.
    #[default]
    Absent,
    /// In the memory that the plan is about.
    Here,
    /// In host memory, next to a GPU whose memory the plan is about.
    InHostMemory,
}

/// What decides how much memory training takes.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainingSetup {
    /// The model whose parameters and activations are counted.
    pub config: ModelConfig,
    /// Bytes of a weight: 4 when the model computes in float32, 2 in bfloat16.
    pub weight_bytes: u64,
    /// What of the state is this rank's.
    pub division: Division,
    /// Layers whose weights are in place at a time where they are divided.
    pub windows: usize,
    /// A second set of weights is set aside.
    pub holds_reference: bool,
    /// A value model is trained beside the policy: its trunk once more, or adapters of its own, with a state of its own.
    pub trains_values: bool,
    /// The copy of the state that checkpoints are written from.
    pub copy: StateCopy,
    /// Scored positions whose logits exist at once.
    pub head_chunk: usize,
    /// The fused kernels compute, those of host memory or those of a GPU, which make no float32 copies.
    pub has_kernels: bool,
    /// It is host memory that is taken.
    pub in_host_memory: bool,
    /// Gradients are summed as integers of 64 bits.
    pub exact_sums: bool,
}

/// What goes through the model at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PassShape {
    /// Tokens that the pass computes, those of prompts included.
    pub tokens: u64,
    /// Tokens of answers, whose log-probs are taken.
    pub scored: u64,
    /// Rows of queries and of keys in attention that keeps its scores.
    pub plain_rows: [u64; 2],
    /// The scores that it keeps: queries times keys, summed over sequences.
    pub plain_scores: u64,
    /// Rows of queries and of keys in fused attention, padding included.
    pub fused_rows: [u64; 2],
}

impl PassShape {
    /// The pass of `tokens` tokens that takes most: groups of `samples` answers of `answer` tokens after prompts of
    /// `prompt` tokens. A single sequence may be longer than `tokens`.
    #[must_use]
    pub fn largest(tokens: u64, prompt: u64, answer: u64, samples: u64) -> Self {
        let tokens = tokens.max(prompt + answer);
        let group = prompt + samples * answer;
        let (groups, rest) = (tokens / group, tokens % group);
        let partial = if rest > prompt { (rest - prompt).div_ceil(answer.max(1)) } else { 0 };
        let answers = groups * samples + partial;
        let prompts = groups + u64::from(partial > 0);
        let scored = (tokens - (prompts * prompt).min(tokens)).max(1);
        // Few sequences of a job are as long as they may be, but those are the ones to plan for.
        let keys = prompts * prompt + answers * prompt + scored;
        Self { tokens, scored, plain_rows: [0, 0], plain_scores: 0, fused_rows: [tokens, keys.max(tokens)] }
    }
}

/// Bytes of memory on one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// The model that is trained for its answers.
    pub policy: ModelPlan,
    /// The model that estimates their returns, where the objective has one.
    pub value_model: Option<ModelPlan>,
}

/// Bytes of memory that one model takes on one rank, by what holds them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ModelPlan {
    /// Frozen weights that adapters adapt; 0 without adapters, and of a value model, which shares the policy's.
    pub base: u64,
    /// Weights that the model computes with and that are trained.
    pub weights: u64,
    /// Weights of the reference policy.
    pub reference: u64,
    /// Gradients of all weights of this rank, in float32 or as integers of 64 bits.
    pub gradients: u64,
    /// Master weights and moments.
    pub optimizer: u64,
    /// The copy of the state that a checkpoint is written from, where it is in the same memory.
    pub copy: u64,
    /// The same where it is in the host's memory and all else is on a GPU; no part of any sum.
    pub host_copy: u64,
    /// What the forward keeps for the backward.
    pub activations: u64,
    /// Logits and what is derived from them, or what a layer's backward works with: they are never there together. On a
    /// CPU also what libraries take for themselves.
    pub workspace: u64,
    /// Layers whose activations are kept; the others are computed again.
    pub kept_layers: usize,
    /// Layers of the model, for the share that `kept_layers` is.
    pub layers: usize,
}

impl MemoryPlan {
    /// The most that is there at one time. Policy and value model are trained one after the other, so it holds the
    /// states of both and the larger of their passes.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.state() + self.models().map(|model| model.pass()).max().unwrap_or(0)
    }

    /// What is there between passes, too.
    #[must_use]
    pub fn state(&self) -> u64 {
        self.models().map(|model| model.state()).sum()
    }

    /// The copy of the state in host memory next to a GPU.
    #[must_use]
    pub fn host_copy(&self) -> u64 {
        self.models().map(|model| model.host_copy).sum()
    }

    fn models(&self) -> impl Iterator<Item = &ModelPlan> {
        [&self.policy].into_iter().chain(&self.value_model)
    }
}

impl ModelPlan {
    /// What is there between passes, too.
    #[must_use]
    pub fn state(&self) -> u64 {
        self.base + self.weights + self.reference + self.gradients + self.optimizer + self.copy
    }

    /// What a forward and backward takes besides the state.
    #[must_use]
    pub fn pass(&self) -> u64 {
        self.activations + self.workspace
    }
}

impl TrainingSetup {
    /// The plan of a pass that keeps the activations of `kept_layers` layers of each model.
    #[must_use]
    pub fn plan(&self, pass: &PassShape, kept_layers: usize) -> MemoryPlan {
        MemoryPlan {
            policy: self.model(pass, kept_layers),
            value_model: self.value_model().map(|values| values.model(pass, kept_layers)),
        }
    }

    /// The plan that keeps the activations of as many layers of each model as fit into `bytes` with some head-room; of
    /// none when nothing fits anyway.
    #[must_use]
    pub fn fit(&self, pass: &PassShape, bytes: u64) -> MemoryPlan {
        let usable = bytes - (bytes as f64 * HEAD_ROOM) as u64;
        // The states of both models are always there, their passes never at the same time.
        let room = usable.saturating_sub(self.plan(pass, 0).state());
        MemoryPlan {
            policy: self.fitting(pass, room),
            value_model: self.value_model().map(|values| values.fitting(pass, room)),
        }
    }

    /// The setup of the value model alone.
    fn value_model(&self) -> Option<Self> {
        let config = self.trains_values.then(|| self.config.of_values())?;
        Some(Self { config, holds_reference: false, trains_values: false, ..self.clone() })
    }

    /// The plan of the policy whose pass takes no more than `room`.
    fn fitting(&self, pass: &PassShape, room: u64) -> ModelPlan {
        let fits = |kept: &usize| self.activations(pass, *kept) + self.workspace(pass, *kept) <= room;
        let kept = (0..=self.config.layers).rev().find(fits).unwrap_or(0);
        self.model(pass, kept)
    }

    fn model(&self, pass: &PassShape, kept_layers: usize) -> ModelPlan {
        let config = &self.config;
        let parts = self.division.parts();
        let divided = ParameterLayout::divided(config, parts).total() as u64;
        let own = divided / parts as u64;
        let held = match self.division.sharding {
            Sharding::ShardAll => own + ParameterLayout::windowed(config, parts, self.windows).total() as u64,
            Sharding::Replicated | Sharding::ShardOptimizer => divided,
        };
        let set_aside = if self.division.sharding == Sharding::ShardAll { own } else { divided };
        let master_bytes = if self.weight_bytes == 4 { 0 } else { 4 };
        let kept_layers = kept_layers.min(config.layers);
        // Master weights and moments, whatever the model computes with, and the reference. Replicated state is written by
        // the first rank alone.
        let writes = parts > 1 || self.division.rank == 0;
        let written = if writes { own * (12 + if self.holds_reference { self.weight_bytes } else { 0 }) } else { 0 };
        let frozen = config.lora.is_some() && !config.estimates_values;
        let base = if frozen { ParameterLayout::new(&config.base()).total() as u64 } else { 0 };
        ModelPlan {
            base: base * self.weight_bytes,
            weights: held * self.weight_bytes,
            reference: if self.holds_reference { set_aside * self.weight_bytes } else { 0 },
            gradients: held * if self.exact_sums { 8 } else { 4 },
            optimizer: own * (8 + master_bytes),
            copy: if self.copy == StateCopy::Here { written } else { 0 },
            host_copy: if self.copy == StateCopy::InHostMemory { written } else { 0 },
            activations: self.activations(pass, kept_layers),
            workspace: self.workspace(pass, kept_layers),
            kept_layers,
            layers: config.layers,
        }
    }

    fn workspace(&self, pass: &PassShape, kept_layers: usize) -> u64 {
        self.head_workspace(pass).max(self.layer_workspace(pass)) + self.overhead(pass, kept_layers)
    }

    fn activations(&self, pass: &PassShape, kept_layers: usize) -> u64 {
        let (d, layers) = (self.config.hidden as u64, self.config.layers);
        let stream = pass.tokens * d * self.weight_bytes;
        let recomputed = layers - kept_layers;
        // The last layers are kept, those before them computed again one by one.
        let kept: u64 = (recomputed..layers).map(|layer| self.layer(layer, pass)).sum();
        let again = (0..recomputed).map(|layer| self.layer(layer, pass)).max().unwrap_or(0);
        // The residual stream before and after the last norm, and the angles of the rotation.
        let ends = 2 * stream + 4 * pass.tokens * self.config.head_dim as u64;
        kept + recomputed as u64 * stream + again + ends
    }

    /// What a layer keeps.
    fn layer(&self, layer: usize, pass: &PassShape) -> u64 {
        let ModelConfig { hidden, ffn, architecture, .. } = self.config;
        let Architecture { norms, head_norms, .. } = architecture;
        let Heads { queries, keys, .. } = self.heads();
        // Rotated queries and keys, where the projections are kept as well.
        let copies = *head_norms != HeadNorms::Absent || self.config.rotates_partly();
        let turned = if copies { queries + keys } else { 0 };
        let normed_outputs = [norms.after_attention, norms.after_ffn].iter().flatten().count() as u64;
        let (gates_ups, routes) = match self.config.experts_of(layer) {
            None => (2 * ffn as u64, 0),
            Some(experts) => {
                let (count, chosen) = (experts.count as u64, experts.per_token as u64);
                // Probabilities in float32, and of each chosen expert its weight and four indices.
                (chosen * 2 * experts.ffn as u64, 4 * count + chosen * (4 + 4 * 8))
            }
        };
        let elements = (2 + normed_outputs) * hidden as u64 + queries + 2 * keys + turned + gates_ups;
        pass.tokens * (elements * self.weight_bytes + routes) + self.attention(pass)
    }

    /// What attention keeps besides its input.
    fn attention(&self, pass: &PassShape) -> u64 {
        let Heads { queries, keys, count } = self.heads();
        let rows = |[q, k]: [u64; 2]| q * queries + 2 * k * keys;
        // Capped scores are kept twice more, for the backward of the cap.
        let kept_scores = if self.config.score_cap.is_some() { 3 } else { 1 };
        let plain = 4 * (rows(pass.plain_rows) + kept_scores * count * pass.plain_scores);
        let fused =
            self.weight_bytes * (rows(pass.fused_rows) + pass.fused_rows[0] * queries) + 4 * count * pass.fused_rows[0];
        plain + fused + pass.tokens * queries * self.weight_bytes
    }

    /// What the process takes in addition: in host memory the code of the libraries that are used, their scratch memory, and
    /// gaps between activations of different sizes. A GPU's allocator has the head-room for that.
    fn overhead(&self, pass: &PassShape, kept_layers: usize) -> u64 {
        if self.in_host_memory { LIBRARIES + self.activations(pass, kept_layers) / 16 } else { 0 }
    }

    /// Logits of a chunk, and the gradients by hidden states and head.
    fn head_workspace(&self, pass: &PassShape) -> u64 {
        let (d, v, b) = (self.config.hidden as u64, self.config.vocab_size as u64, self.weight_bytes);
        if self.config.estimates_values {
            // One row, multiplied in float32: hidden states and their gradients, converted where they are not.
            let converted = if b == 4 { 0 } else { 8 };
            return pass.scored * d * (2 * b + converted) + pass.tokens * d * (4 + b);
        }
        let chunk = pass.scored.min(self.head_chunk as u64);
        // On a GPU logits are float32, and the gradient by the head is added up where it is.
        let adds_in_place = !self.in_host_memory && b == 2;
        // The slope of the cap is kept as well.
        let capped = match (self.config.logit_cap, adds_in_place) {
            (None, _) => 0,
            (Some(_), true) => 8,
            (Some(_), false) => 2 * b,
        };
        let logits = capped
            + match (self.has_kernels, adds_in_place) {
                (true, true) => 4 + b,
                (true, false) => b,
                (false, _) => 2 * b + 8,
            };
        let by_head = if adds_in_place || self.config.lora.is_some() { 0 } else { v * d * b };
        chunk * v * logits + by_head + pass.scored * d * (2 * b + 4) + pass.tokens * d * (4 + b)
    }

    /// What the backward of one layer works with, of the layer that takes most.
    fn layer_workspace(&self, pass: &PassShape) -> u64 {
        let of_blocks = (0..self.config.layers).map(|layer| match self.config.experts_of(layer) {
            None => self.dense_workspace(pass),
            Some(experts) => self.experts_workspace(experts, pass),
        });
        of_blocks.max().unwrap_or(0) + self.attention(pass)
    }

    /// That of a dense feed-forward block.
    fn dense_workspace(&self, pass: &PassShape) -> u64 {
        let (d, f, b) = (self.config.hidden as u64, self.config.ffn as u64, self.weight_bytes);
        // The gradient of a matrix before it is added; of adapters, what they add to gates and ups, and inputs of low rank.
        let by_weight = match &self.config.lora {
            None => 2 * f * d * b,
            Some(lora) => pass.tokens * (f + 4 * lora.rank as u64) * b,
        };
        pass.tokens * ((2 * f + 4 * d) * b + self.gate_workspace(f)) + by_weight
    }

    /// That of a mixture of experts, in which a token has a row for each expert that it is sent to.
    fn experts_workspace(&self, experts: &Experts, pass: &PassShape) -> u64 {
        let (d, f, b) = (self.config.hidden as u64, experts.ffn as u64, self.weight_bytes);
        let (count, rows) = (experts.count as u64, pass.tokens * experts.per_token as u64);
        // Gradients by the output, by what experts pass on and its product with it, which is summed in float32.
        let wide = if b == 4 { 4 * f } else { 3 * 4 * f };
        let of_rows = rows * ((d + 3 * f) * b + wide.max(self.gate_workspace(f)));
        // The sum over the rows of a token, and gradients by the scores of all experts.
        let of_tokens = pass.tokens * (4 * d * b + 2 * 4 * d + 3 * 4 * count);
        of_rows + of_tokens + 2 * f * d * b
    }

    /// Float32 copies of a gate of width `f`, for each row.
    fn gate_workspace(&self, f: u64) -> u64 {
        // There are fused kernels for SiLU alone.
        let fused = self.has_kernels && self.config.architecture.activation == Activation::Silu;
        if fused { 0 } else { 4 * f * 4 }
    }

    fn heads(&self) -> Heads {
        let ModelConfig { heads, kv_heads, head_dim, .. } = self.config;
        Heads { queries: (heads * head_dim) as u64, keys: (kv_heads * head_dim) as u64, count: heads as u64 }
    }
}

/// Elements of a token's queries and keys, and the number of query heads.
struct Heads {
    queries: u64,
    keys: u64,
    count: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden_models;

    fn qwen_7b() -> ModelConfig {
        ModelConfig {
            vocab_size: 152_064,
            hidden: 3584,
            layers: 28,
            heads: 28,
            kv_heads: 4,
            head_dim: 128,
            ffn: 18_944,
            ..ModelConfig::read(&golden_models::folder().join("qwen2-untied")).unwrap()
        }
    }

    fn setup(sharding: Sharding, ranks: usize) -> TrainingSetup {
        TrainingSetup {
            config: qwen_7b(),
            weight_bytes: 2,
            division: Division { sharding, rank: 0, ranks },
            windows: 2,
            holds_reference: false,
            trains_values: false,
            copy: StateCopy::Absent,
            head_chunk: 512,
            has_kernels: false,
            in_host_memory: false,
            exact_sums: false,
        }
    }

    const GIB: f64 = 1_073_741_824.0;

    #[test]
    fn state_of_7b_parameters_is_what_arithmetic_says() {
        let pass = PassShape::largest(16_384, 1024, 8192, 8);
        let gib = |MemoryPlan { policy, .. }: MemoryPlan| {
            [policy.weights, policy.gradients, policy.optimizer].map(|bytes| bytes as f64 / GIB)
        };
        // 7.616 billion parameters: 2 bytes of weights, 4 of gradients, 12 of master weights and moments.
        let [weights, gradients, optimizer] = gib(setup(Sharding::Replicated, 8).plan(&pass, 28));
        assert!((weights - 14.19).abs() < 0.01 && (gradients - 28.37).abs() < 0.01 && (optimizer - 85.11).abs() < 0.01);
        let [weights, _, optimizer] = gib(setup(Sharding::ShardOptimizer, 8).plan(&pass, 28));
        assert!((weights - 14.19).abs() < 0.01 && (optimizer - 10.64).abs() < 0.01);
        let [weights, gradients, optimizer] = gib(setup(Sharding::ShardAll, 8).plan(&pass, 28));
        // An eighth, and embedding, head and two layers in place.
        assert!((weights - (14.19 / 8.0 + 2.03 + 0.87)).abs() < 0.02, "{weights}");
        assert!((gradients / weights - 2.0).abs() < 1e-9 && (optimizer - 10.64).abs() < 0.01);
    }

    #[test]
    fn adapters_leave_the_base_alone() {
        let lora = crate::Lora { rank: 16, alpha: 32.0, rslora: false, targets: vec![] };
        let pass = PassShape::largest(16_384, 1024, 8192, 8);
        let full = TrainingSetup { holds_reference: true, ..setup(Sharding::Replicated, 1) };
        let adapted = TrainingSetup { config: full.config.with_lora(&lora).unwrap(), ..full.clone() };
        let (full, plan) = (full.plan(&pass, 28).policy, adapted.plan(&pass, 28).policy);
        assert_eq!(plan.base, full.weights, "all of the model, once");
        // 40.4 million parameters: PEFT counts as many.
        let adapters = 40_370_176;
        assert_eq!(adapted.config.parameter_count() as u64, adapters);
        assert_eq!((plan.weights, plan.reference), (2 * adapters, 2 * adapters));
        assert_eq!((plan.gradients, plan.optimizer), (4 * adapters, 12 * adapters));
        assert_eq!(plan.activations, full.activations);
        let values = TrainingSetup { trains_values: true, ..adapted }.plan(&pass, 28).value_model.expect("one");
        assert_eq!((values.base, values.reference), (0, 0), "the base is shared");
        assert!(values.weights.abs_diff(plan.weights) < 1 << 14);
    }

    #[test]
    fn the_copy_for_a_checkpoint_is_that_of_what_a_rank_writes() {
        let pass = PassShape::largest(16_384, 1024, 8192, 8);
        let sharded = setup(Sharding::ShardAll, 8);
        let copying = TrainingSetup { copy: StateCopy::Here, ..sharded.clone() };
        let plan = copying.plan(&pass, 28);
        assert_eq!(plan.policy.copy, plan.policy.optimizer, "master weights and moments");
        assert_eq!(plan.total(), sharded.plan(&pass, 28).total() + plan.policy.copy);
        let with_reference = TrainingSetup { holds_reference: true, ..copying }.plan(&pass, 28).policy;
        assert_eq!(with_reference.copy, plan.policy.copy + with_reference.reference);
        // Next to a GPU it takes nothing of the GPU, and is printed all the same.
        let beside = TrainingSetup { copy: StateCopy::InHostMemory, ..sharded.clone() }.plan(&pass, 28);
        assert_eq!((beside.total(), beside.host_copy()), (sharded.plan(&pass, 28).total(), plan.policy.copy));
        // Only the first rank writes replicated state.
        let replicated = TrainingSetup { copy: StateCopy::Here, ..setup(Sharding::Replicated, 8) };
        let second = TrainingSetup { division: Division { rank: 1, ..replicated.division }, ..replicated.clone() };
        assert_eq!(replicated.plan(&pass, 0).policy.copy, replicated.plan(&pass, 0).policy.optimizer);
        assert_eq!(second.plan(&pass, 0).policy.copy, 0);
    }

    #[test]
    fn a_value_model_has_a_state_of_its_own_and_shares_the_room_of_passes() {
        let pass = PassShape::largest(16_384, 1024, 8192, 8);
        let alone =
            TrainingSetup { copy: StateCopy::Here, holds_reference: true, ..setup(Sharding::ShardOptimizer, 8) };
        let both = TrainingSetup { trains_values: true, ..alone.clone() };
        let (policy, plan) = (alone.plan(&pass, 28).policy, both.plan(&pass, 28));
        let values = plan.value_model.expect("one is trained");
        assert_eq!((plan.policy, values.reference), (policy, 0), "values are never compared with a reference");
        // The same but for the head of 152,064 rows, of which one is left.
        let head = (152_064 - 1) * 3584;
        let close = |bytes: u64, expected: u64| bytes.abs_diff(expected) < 1 << 20;
        assert!(
            close(values.weights, policy.weights - 2 * head) && close(values.gradients, policy.gradients - 4 * head)
        );
        assert!(close(values.optimizer, policy.optimizer - 12 * head / 8) && close(values.copy, values.optimizer));
        assert!(values.activations == policy.activations && values.workspace <= policy.workspace);
        assert_eq!(plan.total(), plan.policy.state() + values.state() + policy.pass().max(values.pass()));
        // What the value model holds is missing where activations are kept, for both models.
        let bytes = 200 << 30;
        let (fewer, more) = (both.fit(&pass, bytes), alone.fit(&pass, bytes).policy.kept_layers);
        let kept = [Some(fewer.policy), fewer.value_model].map(|model| model.expect("both").kept_layers);
        assert!(kept.iter().all(|kept| (1..28).contains(kept) && *kept < more), "{kept:?} of {more}");
        assert!(kept[1] >= kept[0], "without logits there is room for no fewer layers");
        assert!(fewer.total() <= (bytes as f64 * (1.0 - HEAD_ROOM)) as u64);
    }

    #[test]
    fn a_plan_keeps_as_many_layers_as_fit() {
        let (setup, pass) = (setup(Sharding::ShardAll, 8), PassShape::largest(16_384, 1024, 8192, 8));
        let bytes = 80 << 30;
        let plan = setup.fit(&pass, bytes);
        let usable = (bytes as f64 * (1.0 - HEAD_ROOM)) as u64;
        let kept = plan.policy.kept_layers;
        assert!(plan.total() <= usable && (1..28).contains(&kept), "{plan:?}");
        assert!(setup.plan(&pass, kept + 1).total() > usable);
        assert_eq!(setup.fit(&pass, 1 << 30).policy.kept_layers, 0, "too little memory for anything");
        assert_eq!(setup.fit(&pass, u64::MAX).policy.kept_layers, 28);
    }

    #[test]
    fn experts_are_planned_by_what_tokens_are_sent_to() {
        let dense = ModelConfig { architecture: Architecture::named("qwen3_moe").unwrap(), ..qwen_7b() };
        let experts = Experts { count: 64, per_token: 8, ffn: 18_944 / 8, renormalises: true, dense_layers: vec![0] };
        let mixture = ModelConfig { experts: Some(experts), ..dense.clone() };
        let pass = PassShape::largest(16_384, 1024, 8192, 8);
        let plan = |config: &ModelConfig, kept: usize| {
            let setup = TrainingSetup { config: config.clone(), has_kernels: true, ..setup(Sharding::ShardAll, 8) };
            setup.plan(&pass, kept).policy
        };
        let (sparse, whole) = (plan(&mixture, 28), plan(&dense, 28));
        // Eight experts that are together as wide as the dense block keep what it keeps, and their routes.
        let routes = 27 * 16_384 * (4 * 64 + 8 * 36);
        assert_eq!(sparse.activations, whole.activations + routes);
        assert!(sparse.workspace > whole.workspace, "a token has a row for each of its experts");
        assert!(sparse.weights > 3 * whole.weights, "all experts have weights");
        // The first layer is the dense one, which keeps less, and is the last to be kept.
        let [none, most] = [0, 27].map(|kept| plan(&mixture, kept).activations);
        assert_eq!(most, sparse.activations + 16_384 * 3584 * 2, "its input in addition");
        assert!(none < most);
    }

    #[test]
    fn the_largest_pass_holds_the_longest_sequence_and_shares_prompts() {
        let long = PassShape::largest(1000, 1024, 8192, 8);
        assert_eq!((long.tokens, long.scored), (9216, 8192));
        let short = PassShape::largest(16_384, 26, 24, 8);
        assert_eq!(short.tokens, 16_384);
        assert!(short.scored > 14_000 && short.fused_rows[1] > short.tokens);
    }
}
