//! Training as on GPUs, run on a CPU: emulated GPU kernels, one attention call per pass, and exchanges in
//! emulated device memory.

use std::sync::Arc;

use crate::support::{PACS, assert_close, descent, golden, on_rings, share, trainer, weights, whole_batch};
use pacs_algo::{Objective, PolicyConfig, grpo, ppo};
use pacs_learner::TrainerSettings;
use pacs_model::{ModelConfig, kernel_shape};
use pacs_shape::{Division, Sharding};
use pacs_torch::tch::{Kind, Tensor};
use pacs_torch::{DeviceKernels, KernelError, with_emulated_flash};

const RANKS: usize = 2;

/// Emulated kernels of a model; `None` without a compiler for them.
fn kernels(model: &str, kind: Kind) -> Option<Arc<DeviceKernels>> {
    let config = ModelConfig::read(&golden(model)).expect("golden model");
    match DeviceKernels::emulated(kernel_shape(&config, kind)) {
        Ok(kernels) => Some(Arc::new(kernels)),
        Err(KernelError::NoCompiler { problems }) => {
            eprintln!("skipped: no C++ compiler ({problems}); CXX names one");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Weights after a step of two updates, in host memory or as on GPUs.
fn train(model: &str, settings: &TrainerSettings, kind: Kind, kernels: Option<&Arc<DeviceKernels>>) -> Tensor {
    let trained = on_rings(RANKS, |rank, ring| {
        let division = Division { rank, ranks: RANKS, ..settings.division };
        let mut trainer = trainer(&golden(model), TrainerSettings { division, ..settings.clone() }, kind);
        let batch = share(whole_batch(1, 2), rank, RANKS);
        let Some(kernels) = kernels else {
            let mut ring = ring;
            trainer.train(&batch, &mut ring).expect("trains");
            return weights(&mut trainer, &mut ring);
        };
        let mut devices = ring.with_emulated_device();
        trainer.use_device_kernels(Arc::clone(kernels));
        with_emulated_flash(|| trainer.train(&batch, &mut devices)).expect("trains");
        weights(&mut trainer, &mut devices)
    });
    trained.into_iter().next().expect("there is a rank")
}

/// Objectives that exercise every path of the kernels: log-probs alone, entropies, and values.
fn objectives() -> [Objective; 3] {
    let ppo = PolicyConfig { entropy: 0.1, ..ppo() };
    [Objective::Pacs(PACS), Objective::Policy(PolicyConfig { entropy: 0.5, ..grpo() }), Objective::Policy(ppo)]
}

#[test]
fn the_weights_are_those_of_host_memory() {
    let [pacs, grpo, ppo] = objectives();
    for (model, sharding, memory_bytes, objective) in [
        ("qwen3", Sharding::Replicated, None, pacs),
        ("llama3", Sharding::ShardAll, Some(0), grpo),
        ("qwen2-tied", Sharding::ShardOptimizer, None, ppo),
        ("qwen3_moe", Sharding::ShardAll, None, Objective::Pacs(PACS)),
    ] {
        let Some(kernels) = kernels(model, Kind::Float) else { return };
        let division = Division::alone(sharding);
        let settings = TrainerSettings { objective, division, memory_bytes, micro_batch_tokens: 60, ..descent() };
        let host = train(model, &settings, Kind::Float, None);
        let device = train(model, &settings, Kind::Float, Some(&kernels));
        assert_close(&device, &host, 1e-5, &format!("{model}, {sharding:?}, {memory_bytes:?}"));
    }
}

#[test]
fn so_they_are_in_bfloat16_up_to_its_rounding() {
    let model = "qwen2-untied";
    let Some(kernels) = kernels(model, Kind::BFloat16) else { return };
    let settings = TrainerSettings { micro_batch_tokens: 60, ..descent() };
    let before = weights(
        &mut trainer(&golden(model), settings.clone(), Kind::BFloat16),
        &mut pacs_collective::HostCollective::alone(),
    );
    let change =
        |kernels| train(model, &settings, Kind::BFloat16, kernels).to_kind(Kind::Float) - before.to_kind(Kind::Float);
    let (host, device) = (change(None), change(Some(&kernels)));
    let norm = |x: &Tensor| x.norm().double_value(&[]);
    let (change, difference) = (norm(&host), norm(&(&device - &host)));
    assert!(change > 1e-2 && difference < 0.2 * change, "{difference} of {change}");
}
