//! The memory plan of a learner rank, as `pacs job check` prints it.

use std::fmt;

use pacs_shape::{MemoryPlan, ModelConfig, ModelPlan, PassShape, Sharding};
use pacs_spec::JobSpec;
use serde_json::{Value, json};

use crate::format::{bytes, count};

/// What one learner rank is predicted to use.
pub(crate) struct LearnerMemory {
    plan: MemoryPlan,
    /// The plan with every layer recomputed: the least that training takes.
    least: MemoryPlan,
    pass: PassShape,
    limit: Option<u64>,
    ranks: u32,
    sharding: Sharding,
    deterministic: bool,
}

impl LearnerMemory {
    /// Plans for prompts of at most `prompt_tokens` tokens.
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
            deterministic: spec.resources.deterministic,
        }
    }

    /// Returns why the job does not fit even with every layer recomputed, and what to change; `None` when it fits.
    pub(crate) fn problem(&self) -> Option<String> {
        let limit = self.limit.filter(|limit| self.plan.total() > *limit)?;
        let remedy = match self.sharding {
            Sharding::Replicated => "divide the state (`resources.sharding`), take more learners,",
            // `ppo` does not support `shard_all`, so more sharding is no advice here.
            Sharding::ShardOptimizer if self.plan.value_model.is_some() => "take more learners,",
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
            "plan": self.plan, "total": self.plan.total(), "host_copy": self.plan.host_copy(), "least": self.least.total(), "limit": self.limit,
            "pass": self.pass, "sharding": self.sharding, "ranks": self.ranks,
            "deterministic": self.deterministic,
        })
    }
}

impl fmt::Display for LearnerMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { plan, least, limit, ranks, sharding, .. } = self;
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
        let state = |model: &ModelPlan| {
            let [gradients, optimizer, copy] = [model.gradients, model.optimizer, model.copy].map(bytes);
            format!("gradients {gradients}, optimizer {optimizer}, copy for checkpoints {copy}")
        };
        let MemoryPlan { policy, value_model } = plan;
        let [weights, reference] = [policy.weights, policy.reference].map(bytes);
        if policy.base > 0 {
            writeln!(
                f,
                "            frozen model {}, of policy and reference; besides it, for the adapters alone:",
                bytes(policy.base)
            )?;
        }
        writeln!(f, "            weights {weights}, reference {reference}, {}", state(policy))?;
        if let Some(values) = value_model {
            writeln!(f, "            value model: weights {}, {}", bytes(values.weights), state(values))?;
        }
        let pass = |model: &ModelPlan| {
            let [activations, workspace] = [model.activations, model.workspace].map(bytes);
            let (kept, layers) = (model.kept_layers, model.layers);
            format!("activations {activations} ({kept} of {layers} layers kept), workspace {workspace}")
        };
        write!(f, "            a pass of {} tokens: {}", count(self.pass.tokens), pass(policy))?;
        if let Some(values) = value_model {
            write!(f, "; or of the value model: {}", pass(values))?;
        }
        write!(f, "; {} with none kept", bytes(least.total()))?;
        if let Some(limit) = limit {
            write!(f, "; head-room {}", bytes(limit.saturating_sub(plan.total())))?;
        }
        writeln!(f)?;
        if self.deterministic {
            let more = |model: &ModelPlan| model.gradients / 2;
            let price = more(policy) + value_model.as_ref().map_or(0, more);
            writeln!(
                f,
                "            deterministic: gradients as 64-bit integers take {} more, ranks exchange twice the bytes, and a \
                 step takes longer (docs/PERFORMANCE.md)",
                bytes(price)
            )?;
        }
        if plan.host_copy() > 0 {
            writeln!(f, "            next to it, in host memory: copy for checkpoints {}", bytes(plan.host_copy()))?;
        }
        Ok(())
    }
}

/// Returns whether this CPU has bfloat16 products, by which `model.precision = "auto"` decides.
fn multiplies_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn plan(objective: &str, resources: &str) -> LearnerMemory {
        let text = format!(
            "name = 'm'\nmodel.path = 'm'\ndata.train.path = 'x.jsonl'\nevaluation = {{ before = false, after = false, \
             every_steps = 0 }}\nobjective.kind = '{objective}'\nmodel.precision = 'float32'\nresources = {{ {resources} }}\n"
        );
        let spec = pacs_spec::parse(&text, Path::new("m.toml")).expect("a job");
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/qwen2-untied");
        LearnerMemory::of(&spec, ModelConfig::read(&model).expect("golden model"), 100)
    }

    #[test]
    fn what_deterministic_costs_is_shown() {
        let (floats, integers) = (plan("pacs", "learners = 1"), plan("pacs", "learners = 1, deterministic = true"));
        assert_eq!(integers.plan.policy.gradients, 2 * floats.plan.policy.gradients);
        let price = bytes(floats.plan.policy.gradients);
        let line = format!("\n            deterministic: gradients as 64-bit integers take {price} more, ");
        assert!(integers.to_string().contains(&line), "{integers}");
        assert!(!floats.to_string().contains("deterministic"));
    }

    #[test]
    fn a_value_model_is_shown_and_counted() {
        let (pacs, ppo) = (plan("pacs", "learners = 1"), plan("ppo", "learners = 1"));
        let [without, with] = [&pacs, &ppo].map(ToString::to_string);
        assert!(!without.contains("value model") && !without.contains("host memory"), "{without}");
        assert!(
            with.contains("\n            value model: weights ") && with.contains("; or of the value model: "),
            "{with}"
        );
        let values = ppo.plan.value_model.expect("there is one");
        assert!(ppo.plan.total() >= pacs.plan.total() + values.state(), "its state comes on top of the policy's");
    }

    #[test]
    fn the_host_copy_of_a_gpu_is_reported_and_not_counted() {
        let here = plan("ppo", "learners = 1");
        let beside = plan("ppo", "learners = 1, device = 'cuda'");
        assert!(beside.to_string().contains("next to it, in host memory: copy for checkpoints "), "{beside}");
        let copies = here.plan.policy.copy + here.plan.value_model.map_or(0, |values| values.copy);
        assert_eq!((beside.plan.host_copy(), beside.plan.policy.copy), (copies, 0));
    }

    #[test]
    fn what_is_refused_with_a_value_model_is_not_advised() {
        let problem = |objective, sharding| {
            let resources = format!("learners = 2, learner_memory_gib = 0.001, sharding = '{sharding}'");
            plan(objective, &resources).problem().expect("it takes more")
        };
        assert!(problem("pacs", "shard_optimizer").contains("shard_all"));
        assert!(!problem("ppo", "shard_optimizer").contains("shard_all"));
        assert!(problem("ppo", "replicated").contains("divide the state"));
    }
}
