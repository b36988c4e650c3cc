//! What training will take of a learner's memory.

use std::fmt;

use pacs_shape::{MemoryPlan, ModelConfig, PassShape, Sharding};
use pacs_spec::JobSpec;
use serde_json::{Value, json};

use crate::format::{bytes, count};

/// The memory plan of one learner rank.
pub(crate) struct LearnerMemory {
    plan: MemoryPlan,
    /// The same with every layer computed again.
    least: MemoryPlan,
    pass: PassShape,
    limit: Option<u64>,
    ranks: u32,
    sharding: Sharding,
}

impl LearnerMemory {
    /// Plans for prompts of `prompt_tokens` tokens.
    pub(crate) fn of(spec: &JobSpec, config: ModelConfig, prompt_tokens: usize) -> Self {
        let setup = spec.training_setup(config, multiplies_bf16());
        let (pass, limit) = (spec.largest_pass(prompt_tokens), spec.learner_memory());
        Self {
            plan: setup.fit(&pass, limit.unwrap_or(u64::MAX)),
            least: setup.plan(&pass, 0),
            pass,
            limit,
            ranks: spec.resources.learners,
            sharding: spec.resources.sharding,
        }
    }

    /// Why it cannot work.
    pub(crate) fn problem(&self) -> Option<String> {
        let limit = self.limit.filter(|limit| self.plan.total() > *limit)?;
        let remedy = match self.sharding {
            Sharding::Replicated => "divide the state (`resources.sharding`), take more learners,",
            Sharding::ShardOptimizer => "divide all of it (`resources.sharding = \"shard_all\"`), take more learners,",
            Sharding::ShardAll => "take more learners,",
        };
        Some(format!(
            "a learner rank takes at least {}, `resources.learner_memory_gib` allows {}: {remedy} or lower \
             `batch.micro_batch_tokens`",
            bytes(self.plan.total()),
            bytes(limit),
        ))
    }

    pub(crate) fn json(&self) -> Value {
        json!({
            "plan": self.plan, "total": self.plan.total(), "least": self.least.total(), "limit": self.limit,
            "pass": self.pass, "sharding": self.sharding, "ranks": self.ranks,
        })
    }
}

impl fmt::Display for LearnerMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { plan, least, pass, limit, ranks, sharding } = self;
        let sharding = match sharding {
            Sharding::Replicated => "replicated",
            Sharding::ShardOptimizer => "shard_optimizer",
            Sharding::ShardAll => "shard_all",
        };
        write!(f, "memory      {}", bytes(plan.total()))?;
        if let Some(limit) = limit {
            write!(f, " of {}", bytes(*limit))?;
        }
        let whom = if *ranks == 1 { "the learner".to_owned() } else { format!("each of {ranks} learners") };
        writeln!(f, " on {whom} ({sharding})")?;
        writeln!(
            f,
            "            weights {}, reference {}, gradients {}, optimizer {}, copy for checkpoints {}",
            bytes(plan.weights),
            bytes(plan.reference),
            bytes(plan.gradients),
            bytes(plan.optimizer),
            bytes(plan.copy)
        )?;
        writeln!(
            f,
            "            a pass of {} tokens: activations {} ({} of {} layers kept), workspace {}; {} with none kept{}",
            count(pass.tokens),
            bytes(plan.activations),
            plan.kept_layers,
            plan.layers,
            bytes(plan.workspace),
            bytes(least.total()),
            limit.map_or(String::new(), |limit| {
                format!("; head-room {}", bytes(limit.saturating_sub(plan.total())))
            }),
        )
    }
}

/// What `model.precision = "auto"` goes by on the CPU of this machine.
fn multiplies_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    false
}
