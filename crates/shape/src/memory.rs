//! How much memory training takes on one rank, by arithmetic: nothing is allocated to find out.
// Legend: `T` tokens of a pass, `D` width, `F` feed-forward width, `N` query heads, `K` key and value heads, `H` head,
// `V` vocabulary.

use serde::Serialize;

use crate::{Division, ModelConfig, ParameterLayout, Sharding};

/// Scored positions whose logits exist at once: few enough to keep a vocabulary of 150,000 below a gigabyte.
pub const HEAD_CHUNK: usize = 512;
/// Layers whose weights are in place at a time where they are divided among ranks: one is computed with while the next
/// one arrives.
pub const WINDOWS: usize = 2;

/// Share of a rank's memory that a plan leaves free: for the allocator's gaps, libraries, and what is not planned.
pub const HEAD_ROOM: f64 = 0.08;

/// Pages of libtorch and its libraries that a first training step touches, on a CPU (measured).
const LIBRARIES: u64 = 96 << 20;

/// What decides how much memory training takes.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainingSetup {
    /// The model.
    pub config: ModelConfig,
    /// Bytes of a weight: 4 when the model computes in float32, 2 in bfloat16.
    pub weight_bytes: u64,
    /// What of the state is this rank's.
    pub division: Division,
    /// Layers whose weights are in place at a time where they are divided.
    pub windows: usize,
    /// A second set of weights is set aside.
    pub holds_reference: bool,
    /// Checkpoints are written from a copy of the state in this memory.
    pub copies_state: bool,
    /// Scored positions whose logits exist at once.
    pub head_chunk: usize,
    /// The kernels for host memory are used, which make no float32 copies of the logits.
    pub has_kernels: bool,
}

/// What goes through the model at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PassShape {
    /// Tokens.
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
    /// The pass of `tokens` tokens that takes most: groups of `samples` answers of `answer` tokens behind prompts of
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

/// Bytes of memory on one rank, by what holds them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// Weights that the model computes with.
    pub weights: u64,
    /// Weights of the reference policy.
    pub reference: u64,
    /// Gradients.
    pub gradients: u64,
    /// Master weights and moments.
    pub optimizer: u64,
    /// The copy of the state that a checkpoint is written from.
    pub copy: u64,
    /// What the forward keeps for the backward.
    pub activations: u64,
    /// Logits and what is derived from them, or what a layer's backward works with: they are never there together. On a
    /// CPU also what libraries take for themselves.
    pub workspace: u64,
    /// Layers whose activations are kept; the others are computed again.
    pub kept_layers: usize,
    /// All layers.
    pub layers: usize,
}

impl MemoryPlan {
    /// Everything together.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.state() + self.activations + self.workspace
    }

    /// What is there between passes, too.
    #[must_use]
    pub fn state(&self) -> u64 {
        self.weights + self.reference + self.gradients + self.optimizer + self.copy
    }
}

impl TrainingSetup {
    /// The plan of a pass that keeps the activations of `kept_layers` layers.
    #[must_use]
    pub fn plan(&self, pass: &PassShape, kept_layers: usize) -> MemoryPlan {
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
        // Master weights and moments, whatever the model computes with, and the reference.
        let copied = 12 + if self.holds_reference { self.weight_bytes } else { 0 };
        MemoryPlan {
            weights: held * self.weight_bytes,
            reference: if self.holds_reference { set_aside * self.weight_bytes } else { 0 },
            gradients: held * 4,
            optimizer: own * (8 + master_bytes),
            copy: if self.copies_state { own * copied } else { 0 },
            activations: self.activations(pass, kept_layers),
            workspace: self.head_workspace(pass).max(self.layer_workspace(pass)) + self.overhead(pass, kept_layers),
            kept_layers,
            layers: config.layers,
        }
    }

    /// The plan that keeps the activations of as many layers as fit into `bytes` with some head-room; of none when
    /// nothing fits anyway.
    #[must_use]
    pub fn fit(&self, pass: &PassShape, bytes: u64) -> MemoryPlan {
        let usable = bytes - (bytes as f64 * HEAD_ROOM) as u64;
        // What a layer takes does not depend on the others, but for the one that is computed again.
        let (none, all) = (self.plan(pass, 0), self.plan(pass, self.config.layers));
        if all.total() <= usable {
            return all;
        }
        let each = (self.plan(pass, 1).total() - none.total()).max(1);
        let kept = usable.saturating_sub(none.total()) / each;
        self.plan(pass, (kept as usize).min(self.config.layers.saturating_sub(1)))
    }

    fn activations(&self, pass: &PassShape, kept_layers: usize) -> u64 {
        let (d, layers) = (self.config.hidden as u64, self.config.layers);
        let stream = pass.tokens * d * self.weight_bytes;
        let recomputed = (layers - kept_layers) as u64;
        let kept = self.layer(pass) * kept_layers as u64;
        let again = if recomputed > 0 { self.layer(pass) } else { 0 };
        // The residual stream in front of the last norm and behind it, and the angles of the rotation.
        let ends = 2 * stream + 4 * pass.tokens * self.config.head_dim as u64;
        kept + recomputed * stream + again + ends
    }

    /// What a layer keeps.
    fn layer(&self, pass: &PassShape) -> u64 {
        let ModelConfig { hidden, ffn, qk_norm, .. } = self.config;
        let Heads { queries, keys, .. } = self.heads();
        let turned = if qk_norm { queries + keys } else { 0 };
        let elements = 2 * hidden as u64 + queries + 2 * keys + turned + 2 * ffn as u64;
        pass.tokens * elements * self.weight_bytes + self.attention(pass)
    }

    /// What attention keeps beside its input.
    fn attention(&self, pass: &PassShape) -> u64 {
        let Heads { queries, keys, count } = self.heads();
        let rows = |[q, k]: [u64; 2]| q * queries + 2 * k * keys;
        let plain = 4 * (rows(pass.plain_rows) + count * pass.plain_scores);
        let fused =
            self.weight_bytes * (rows(pass.fused_rows) + pass.fused_rows[0] * queries) + 4 * count * pass.fused_rows[0];
        plain + fused + pass.tokens * queries * self.weight_bytes
    }

    /// What the process takes beside: in host memory the code of the libraries that are used, their scratch memory, and
    /// gaps between activations of different sizes. A GPU's allocator has the head-room for that.
    fn overhead(&self, pass: &PassShape, kept_layers: usize) -> u64 {
        if self.has_kernels { LIBRARIES + self.activations(pass, kept_layers) / 16 } else { 0 }
    }

    /// Logits of a chunk, and the gradients by hidden states and head.
    fn head_workspace(&self, pass: &PassShape) -> u64 {
        let (d, v, b) = (self.config.hidden as u64, self.config.vocab_size as u64, self.weight_bytes);
        let chunk = pass.scored.min(self.head_chunk as u64);
        let logits = if self.has_kernels { b } else { 2 * b + 8 };
        chunk * v * logits + v * d * b + pass.scored * d * (2 * b + 4) + pass.tokens * d * (4 + b)
    }

    /// What the backward of one layer works with.
    fn layer_workspace(&self, pass: &PassShape) -> u64 {
        let (d, f, b) = (self.config.hidden as u64, self.config.ffn as u64, self.weight_bytes);
        let wide = if self.has_kernels { 0 } else { 4 * f * 4 };
        pass.tokens * ((2 * f + 4 * d) * b + wide) + 2 * f * d * b + self.attention(pass)
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
    use crate::RopeScaling;

    fn qwen_7b() -> ModelConfig {
        ModelConfig {
            vocab_size: 152_064,
            hidden: 3584,
            layers: 28,
            heads: 28,
            kv_heads: 4,
            head_dim: 128,
            ffn: 18_944,
            rms_eps: 1e-6,
            rope_theta: 1e6,
            rope_scaling: RopeScaling::None,
            tie_embeddings: false,
            qkv_bias: true,
            qk_norm: false,
            estimates_values: false,
            end_tokens: vec![],
            max_positions: 32_768,
        }
    }

    fn setup(sharding: Sharding, ranks: usize) -> TrainingSetup {
        TrainingSetup {
            config: qwen_7b(),
            weight_bytes: 2,
            division: Division { sharding, rank: 0, ranks },
            windows: 2,
            holds_reference: false,
            copies_state: false,
            head_chunk: 512,
            has_kernels: false,
        }
    }

    const GIB: f64 = 1_073_741_824.0;

    #[test]
    fn state_of_7b_parameters_is_what_arithmetic_says() {
        let pass = PassShape::largest(16_384, 1024, 8192, 8);
        let gib = |plan: MemoryPlan| [plan.weights, plan.gradients, plan.optimizer].map(|bytes| bytes as f64 / GIB);
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
    fn the_copy_for_a_checkpoint_is_that_of_what_a_rank_writes() {
        let pass = PassShape::largest(16_384, 1024, 8192, 8);
        let copying = TrainingSetup { copies_state: true, ..setup(Sharding::ShardAll, 8) };
        let plan = copying.plan(&pass, 28);
        assert_eq!(plan.copy, plan.optimizer, "master weights and moments");
        assert_eq!(plan.total(), setup(Sharding::ShardAll, 8).plan(&pass, 28).total() + plan.copy);
        let with_reference = TrainingSetup { holds_reference: true, ..copying }.plan(&pass, 28);
        assert_eq!(with_reference.copy, plan.copy + with_reference.reference);
    }

    #[test]
    fn a_plan_keeps_as_many_layers_as_fit() {
        let (setup, pass) = (setup(Sharding::ShardAll, 8), PassShape::largest(16_384, 1024, 8192, 8));
        let bytes = 80 << 30;
        let plan = setup.fit(&pass, bytes);
        let usable = (bytes as f64 * (1.0 - HEAD_ROOM)) as u64;
        assert!(plan.total() <= usable && (1..28).contains(&plan.kept_layers), "{plan:?}");
        assert!(setup.plan(&pass, plan.kept_layers + 1).total() > usable);
        assert_eq!(setup.fit(&pass, 1 << 30).kept_layers, 0, "too little memory for anything");
        assert_eq!(setup.fit(&pass, u64::MAX).kept_layers, 28);
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
