//! Adapters are trained as exactly as whole models: the update does not depend on ranks, passes, sharding or kept layers, equals
//! gradient descent on what autograd would see, and resumes to the last bit.

use pacs_algo::{KlKind, KlPenalty, KlPlace, Objective, PolicyConfig, grpo, ppo};
use pacs_collective::HostCollective;
use pacs_learner::{LoraSettings, TrainerSettings};
use pacs_model::{Export, ModelConfig, Parameters};
use pacs_shape::{Division, Lora, Sharding};
use pacs_torch::tch::{Device, Kind, Tensor};

use crate::support::{PACS, assert_close, descent, golden, on_ranks, settings, share, trainer, weights, whole_batch};

const SHARDINGS: [Sharding; 3] = [Sharding::Replicated, Sharding::ShardOptimizer, Sharding::ShardAll];

fn lora() -> Option<LoraSettings> {
    let adapters = Lora { rank: 3, alpha: 6.0, rslora: false, targets: Vec::new() };
    Some(LoraSettings { adapters, path: None, seed: 3 })
}

fn adapted(settings: TrainerSettings) -> TrainerSettings {
    TrainerSettings { lora: lora(), ..settings }
}

/// Adapters after some steps with as many updates each. Checks that all ranks agree, and that the base is untouched.
fn train(model: &str, kind: Kind, steps: u64, ranks: usize, settings: &TrainerSettings) -> Tensor {
    let trained = on_ranks(ranks, |rank, collective| {
        let division = Division { rank, ranks, ..settings.division };
        let mut trainer = trainer(&golden(model), TrainerSettings { division, ..settings.clone() }, kind);
        let base = trainer.base().expect("adapters have a base").1.flat.copy();
        for step in 1..=steps {
            let mut batch = whole_batch(step, steps as usize);
            if settings.deterministic {
                for (position, entry) in batch.index.iter_mut().enumerate() {
                    let unit = position / 3;
                    (entry.unit, entry.rank) = (Some(unit), (5 * unit + step as usize) % ranks);
                }
                let index = &batch.index;
                batch.sequences.retain(|sequence| index[sequence.position].rank == rank);
            } else {
                batch = share(batch, rank, ranks);
            }
            trainer.train(&batch, collective).expect("trains");
        }
        assert!(base.equal(&trainer.base().expect("a base").1.flat), "the base has moved");
        weights(&mut trainer, collective)
    });
    trained.iter().for_each(|weights| assert!(weights.equal(&trained[0]), "the ranks hold different adapters"));
    trained.into_iter().next().expect("there is a rank")
}

/// Models, shardings, ranks and passes: any three of them occur together in each of their combinations, in a third of the runs that all
/// four would take.
#[test]
fn every_division_gives_the_same_adapters_packed_or_not_kept_or_recomputed() {
    const PASSES: [(usize, Option<u64>); 3] = [(1, Some(0)), (40, None), (100_000, Some(0))];
    for (m, model) in ["qwen2-tied", "qwen3", "qwen3_moe", "phi3", "gemma3"].into_iter().enumerate() {
        let plain = adapted(descent());
        let reference = train(model, Kind::Float, 2, 1, &plain);
        let start = weights(&mut trainer(&golden(model), plain.clone(), Kind::Float), &mut HostCollective::alone());
        assert!((&reference - &start).abs().max().double_value(&[]) > 1e-4, "{model}: nothing was trained");
        for (s, sharding) in SHARDINGS.into_iter().enumerate() {
            for ranks in 1..=3 {
                let (micro_batch_tokens, memory_bytes) = PASSES[(m + s + ranks) % 3];
                let division = Division::alone(sharding);
                let settings = TrainerSettings { micro_batch_tokens, memory_bytes, division, ..plain.clone() };
                let what = format!("{model}, {sharding:?}, {ranks} ranks, {micro_batch_tokens}, {memory_bytes:?}");
                assert_close(&train(model, Kind::Float, 2, ranks, &settings), &reference, 1e-5, &what);
            }
        }
    }
}

/// The objectives that need a reference, a value model, or several updates of one reference.
fn objectives() -> Vec<(&'static str, TrainerSettings)> {
    let kl = Some(KlPenalty { coefficient: 0.1, kind: KlKind::K3, place: KlPlace::Loss });
    let policy = |config| TrainerSettings {
        objective: Objective::Policy(config),
        reference_reset_steps: 0,
        critic_learning_rate: 0.05,
        ..descent()
    };
    vec![
        ("pacs", TrainerSettings { objective: Objective::Pacs(PACS), ..descent() }),
        ("pacs with an older reference", TrainerSettings { reference_reset_steps: 2, ..descent() }),
        ("grpo with a penalty", policy(PolicyConfig { kl, ..grpo() })),
        ("ppo", policy(ppo())),
    ]
}

#[test]
fn every_objective_trains_adapters_alike_on_any_number_of_ranks() {
    let mut results: Vec<Tensor> = Vec::new();
    for (name, settings) in objectives() {
        let settings = adapted(settings);
        let reference = train("qwen3", Kind::Float, 3, 1, &settings);
        for sharding in [Sharding::Replicated, Sharding::ShardOptimizer] {
            let divided = TrainerSettings { division: Division::alone(sharding), ..settings.clone() };
            let found = train("qwen3", Kind::Float, 3, 3, &divided);
            assert_close(&found, &reference, 1e-5, &format!("{name}, {sharding:?}"));
        }
        assert!(results.iter().all(|other| !other.equal(&reference)), "{name} trains as another does");
        results.push(reference);
    }
}

#[test]
fn deterministic_updates_have_the_same_bits_on_any_number_of_ranks() {
    for (model, kind) in [("qwen2-tied", Kind::Float), ("qwen3", Kind::BFloat16)] {
        let settings = TrainerSettings { deterministic: true, ..adapted(settings()) };
        let expected = train(model, kind, 2, 1, &settings);
        for sharding in SHARDINGS {
            for (ranks, micro_batch_tokens, memory_bytes) in [(2, 60, None), (3, 1, Some(0)), (4, 100_000, None)] {
                let division = Division::alone(sharding);
                let settings = TrainerSettings { division, micro_batch_tokens, memory_bytes, ..settings.clone() };
                let found = train(model, kind, 2, ranks, &settings);
                assert!(found.equal(&expected), "{model}, {kind:?}, {sharding:?}, {ranks} ranks");
            }
        }
    }
}

#[test]
fn the_gradient_is_that_of_the_merged_model_by_the_chain_rule() {
    // With such an epsilon and no clipping the first update is descent along the gradient, for adapters as for the whole model: the
    // update of B from zero is that of W times A^T and the scale.
    let mut settings = descent();
    settings.optimizer.max_grad_norm = 0.0;
    (settings.optimizer.learning_rate, settings.optimizer.epsilon) = (200.0, 1e4);
    let mut whole = trainer(&golden("qwen2-tied"), settings.clone(), Kind::Float);
    let mut adapters = trainer(&golden("qwen2-tied"), adapted(settings), Kind::Float);
    let alone = &mut HostCollective::alone();
    let before = weights(&mut whole, alone);
    let batch = whole_batch(1, 1);
    let a = adapters.weights(alone, true).expect("alone").expect("wanted");
    let a = a.view("model.layers.0.self_attn.v_proj.lora_A.weight").copy();
    whole.train(&batch, alone).expect("trains");
    adapters.train(&batch, alone).expect("trains");
    let layout = whole.weights(alone, true).expect("alone").expect("wanted").layout;
    let spec = layout.find("model.layers.0.self_attn.v_proj.weight").expect("a parameter");
    let part = |flat: &Tensor| flat.narrow(0, spec.offset as i64, spec.numel() as i64).view(&spec.shape[..]);
    let moved = part(&weights(&mut whole, alone)) - part(&before);
    let found = adapters.weights(alone, true).expect("alone").expect("wanted");
    let found = found.view("model.layers.0.self_attn.v_proj.lora_B.weight");
    let expected = moved.matmul(&a.tr()) * 2.0;
    let scale = expected.abs().max().double_value(&[]);
    let apart = (&found - &expected).abs().max().double_value(&[]);
    assert!(scale > 1e-3 && apart < 2e-3 * scale, "{apart:.2e} of {scale:.2e}");
}

#[test]
fn a_restored_trainer_continues_to_the_last_bit() {
    for (sharding, kind) in [(Sharding::Replicated, Kind::Float), (Sharding::ShardAll, Kind::BFloat16)] {
        let settings = TrainerSettings { reference_reset_steps: 2, ..adapted(settings()) };
        let settings = TrainerSettings { division: Division::alone(sharding), ..settings };
        let straight = train("qwen3", kind, 4, 2, &settings);
        let folder = tempfile::tempdir().expect("a folder");
        let resumed = on_ranks(2, |rank, collective| {
            let division = Division { rank, ranks: 2, ..settings.division };
            let settings = TrainerSettings { division, ..settings.clone() };
            let batch = |step| share(whole_batch(step, 4), rank, 2);
            let mut first = trainer(&golden("qwen3"), settings.clone(), kind);
            for step in 1..=3 {
                first.train(&batch(step), collective).expect("trains");
            }
            first.save(folder.path(), true, None, collective).expect("saves");
            collective.barrier().expect("all ranks have written");
            drop(first);
            let mut second = trainer(&golden("qwen3"), settings, kind);
            second.restore(folder.path()).expect("restores");
            second.train(&batch(4), collective).expect("trains");
            weights(&mut second, collective)
        });
        assert!(resumed.iter().all(|weights| weights.equal(&straight)), "{sharding:?}, {kind:?}");
        let bytes: u64 = std::fs::read_dir(folder.path())
            .expect("a folder")
            .map(|entry| entry.expect("an entry").metadata().expect("a file").len())
            .sum();
        assert!(bytes < 20 * straight.numel() as u64, "a checkpoint of {bytes} bytes holds more than adapters");
    }
}

#[test]
fn an_export_is_the_adapter_alone_and_merged_and_can_be_started_from() {
    let (folder, alone) = (tempfile::tempdir().expect("a folder"), &mut HostCollective::alone());
    let mut first = trainer(&golden("phi3"), adapted(descent()), Kind::Float);
    first.train(&whole_batch(1, 1), alone).expect("trains");
    let export = Export::new(&golden("phi3"), None, &serde_json::Map::new()).expect("a golden model");
    let files = first.save(folder.path(), false, Some(&export), alone).expect("saves");
    let names: Vec<&str> = files.iter().map(|file| file.path.as_str()).collect();
    for name in ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "model/model.safetensors"] {
        assert!(names.contains(&name), "{name} is not among {names:?}");
    }
    let trained = first.weights(alone, true).expect("alone").expect("wanted");
    let (config, base) = first.base().expect("adapters");
    let merged = trained.merged(config, base).expect("merges");
    let exported = Parameters::load(&folder.path().join("model"), &config.base(), Kind::Float, Device::Cpu);
    assert!(exported.expect("a model").flat.equal(&merged.flat) && !merged.flat.equal(&base.flat));

    let path = Some(folder.path().join("adapter"));
    let from = TrainerSettings { lora: lora().map(|lora| LoraSettings { path, ..lora }), ..descent() };
    let mut second = trainer(&golden("phi3"), from, Kind::Float);
    assert!(weights(&mut second, alone).equal(&trained.flat));
}

#[test]
fn a_checkpoint_over_another_base_is_refused() {
    let (folder, other, alone) =
        (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"), &mut HostCollective::alone());
    let mut first = trainer(&golden("qwen3"), adapted(descent()), Kind::Float);
    first.train(&whole_batch(1, 1), alone).expect("trains");
    first.save(folder.path(), true, None, alone).expect("saves");
    let config = ModelConfig::read(&golden("qwen3")).expect("golden model");
    let changed = Parameters::load(&golden("qwen3"), &config, Kind::Float, Device::Cpu).expect("golden model");
    let _ = changed.flat.shallow_clone().g_mul_scalar_(1.001);
    changed.save_hf(&golden("qwen3"), other.path(), Kind::Float).expect("written");
    let mut second = trainer(other.path(), adapted(descent()), Kind::Float);
    let error = second.restore(folder.path()).expect_err("another base").to_string();
    assert!(error.contains("belong to a base with the digest"), "{error}");
}
