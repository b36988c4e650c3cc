//! Sharding of weights, gradients and optimizer state changes nothing but where they are.

use crate::support::{
    assert_close, descent, golden, on_ranks, on_rings, settings, share, trainer, weights, whole_batch,
};
use pacs_algo::{Clip, KlKind, KlPenalty, KlPlace, Objective, PolicyConfig, grpo, ppo};
use pacs_collective::HostCollective;
use pacs_learner::TrainerSettings;
use pacs_shape::{Division, Sharding};
use pacs_spec::{OldLogprobs, WeightDecayOn};
use pacs_torch::tch::{Kind, Tensor};

const SHARDINGS: [Sharding; 3] = [Sharding::Replicated, Sharding::ShardOptimizer, Sharding::ShardAll];

/// Weights after two steps.
fn train(model: &str, ranks: usize, settings: &TrainerSettings) -> Tensor {
    train_for(2, model, ranks, settings)
}

/// Weights after some steps with as many updates each. Checks that all ranks agree.
fn train_for(steps: u64, model: &str, ranks: usize, settings: &TrainerSettings) -> Tensor {
    let trained = on_ranks(ranks, |rank, collective| {
        let division = Division { rank, ranks, ..settings.division };
        let mut trainer = trainer(&golden(model), TrainerSettings { division, ..settings.clone() }, Kind::Float);
        for step in 1..=steps {
            trainer.train(&share(whole_batch(step, steps as usize), rank, ranks), collective).expect("trains");
        }
        weights(&mut trainer, collective)
    });
    trained.iter().for_each(|weights| assert!(weights.equal(&trained[0]), "the ranks hold different weights"));
    trained.into_iter().next().expect("there is a rank")
}

fn divided(sharding: Sharding, settings: &TrainerSettings) -> TrainerSettings {
    TrainerSettings { division: Division::alone(sharding), ..settings.clone() }
}

/// Models, shardings, ranks, passes and memory: any three of them occur together in each of their combinations, in a sixth of the runs
/// that all five would take.
#[test]
fn every_division_gives_the_same_weights_packed_or_not_kept_or_recomputed() {
    // One sequence per pass, small packs, everything at once; some ranks have no pass while others have several.
    const PASSES: [usize; 3] = [1, 40, 100_000];
    const MEMORY: [Option<u64>; 2] = [None, Some(0)];
    let models = ["qwen2-tied", "qwen2-untied", "qwen3", "qwen3_moe", "llama3", "phi3", "gemma3"];
    for (m, model) in models.into_iter().enumerate() {
        let plain = descent();
        let reference = train(model, 1, &plain);
        for (s, sharding) in SHARDINGS.into_iter().enumerate() {
            for ranks in 1..=4 {
                let turn = m + s + ranks - 1;
                let (micro_batch_tokens, memory_bytes) = (PASSES[turn % 3], MEMORY[(turn / 3 + s) % 2]);
                let settings = TrainerSettings { micro_batch_tokens, memory_bytes, ..divided(sharding, &plain) };
                let what = format!("{model}, {sharding:?}, {ranks} ranks, {micro_batch_tokens}, {memory_bytes:?}");
                assert_close(&train(model, ranks, &settings), &reference, 1e-5, &what);
            }
        }
    }
}

#[test]
fn what_is_exchanged_in_the_memory_of_devices_is_what_goes_over_the_host() {
    for sharding in SHARDINGS {
        for memory_bytes in [None, Some(0)] {
            let settings = TrainerSettings { micro_batch_tokens: 40, memory_bytes, ..divided(sharding, &descent()) };
            let emulated = on_rings(3, |rank, ring| {
                let mut collective = ring.with_emulated_device();
                let division = Division { rank, ranks: 3, ..settings.division };
                let mut trainer =
                    trainer(&golden("qwen3"), TrainerSettings { division, ..settings.clone() }, Kind::Float);
                for step in 1..=2 {
                    trainer.train(&share(whole_batch(step, 2), rank, 3), &mut collective).expect("trains");
                }
                assert!(collective.emulated_operations() > 0, "nothing was exchanged in the memory of a device");
                weights(&mut trainer, &mut collective)
            });
            let over_host = train("qwen3", 3, &settings);
            assert!(emulated.iter().all(|weights| weights.equal(&over_host)), "{sharding:?}, {memory_bytes:?}");
        }
    }
}

#[test]
fn a_value_model_is_divided_as_the_policy_is() {
    let settings = TrainerSettings { objective: Objective::Policy(ppo()), critic_learning_rate: 0.05, ..descent() };
    let reference = train("qwen3", 1, &settings);
    for ranks in 1..=3 {
        for memory_bytes in [None, Some(0)] {
            let settings = TrainerSettings { memory_bytes, ..divided(Sharding::ShardOptimizer, &settings) };
            let weights = train("qwen3", ranks, &settings);
            assert_close(&weights, &reference, 1e-5, &format!("{ranks} ranks, {memory_bytes:?}"));
        }
    }
}

#[test]
fn divisions_agree_on_objectives_that_take_other_passes() {
    let clip = Clip { low: 0.02, high: 0.02, dual: Some(1.5) };
    let kl = Some(KlPenalty { coefficient: 0.1, kind: KlKind::K3, place: KlPlace::Loss });
    let grpo = Objective::Policy(PolicyConfig { clip, kl, ..grpo() });
    let cases = [
        ("a KL penalty", TrainerSettings { objective: grpo, reference_reset_steps: 0, ..descent() }),
        ("a reference of two steps", TrainerSettings { reference_reset_steps: 2, ..descent() }),
        ("log-probs of the rollout engine", TrainerSettings { old_logprobs: OldLogprobs::Rollout, ..descent() }),
    ];
    for (name, settings) in cases {
        let reference = train("qwen3", 1, &settings);
        for sharding in SHARDINGS {
            for micro_batch_tokens in [40, 100_000] {
                let settings = TrainerSettings { micro_batch_tokens, ..divided(sharding, &settings) };
                assert_close(&train("qwen3", 3, &settings), &reference, 1e-5, &format!("{name}, {sharding:?}"));
            }
        }
    }
}

#[test]
fn weights_that_are_rounded_do_not_depend_on_the_number_of_ranks() {
    let run = |ranks: usize, sharding: Sharding| {
        on_ranks(ranks, |rank, collective| {
            let division = Division { sharding, rank, ranks };
            let settings = TrainerSettings { division, ..settings() };
            // The gradients are the same for every number of ranks, because rank 0 computes the whole batch.
            let mut trainer = trainer(&golden("qwen3"), settings, Kind::BFloat16);
            let mut batch = whole_batch(1, 1);
            batch.sequences.retain(|_| rank == 0);
            trainer.train(&batch, collective).expect("trains");
            weights(&mut trainer, collective)
        })
        .remove(0)
    };
    let reference = run(1, Sharding::Replicated);
    for sharding in SHARDINGS {
        assert!(run(3, sharding).equal(&reference), "{sharding:?}");
    }
}

#[test]
fn norms_and_biases_are_spared_by_the_decay_of_matrices() {
    let run = |weight_decay_on, weight_decay| {
        let mut settings = descent();
        settings.optimizer.weight_decay_on = weight_decay_on;
        settings.optimizer.weight_decay = weight_decay;
        [1, 3].map(|ranks| train_for(1, "qwen2-tied", ranks, &divided(Sharding::ShardAll, &settings)))
    };
    let [alone, three] = run(WeightDecayOn::Matrices, 1.0);
    assert_close(&alone, &three, 1e-5, "three ranks");
    let [all, _] = run(WeightDecayOn::All, 1.0);
    let [none, _] = run(WeightDecayOn::All, 0.0);
    let layout =
        pacs_shape::ParameterLayout::new(&pacs_shape::ModelConfig::read(&golden("qwen2-tied")).expect("golden"));
    for spec in layout.parameters() {
        let of = |flat: &Tensor| flat.narrow(0, spec.offset as i64, spec.numel() as i64);
        let same = |other: &Tensor| of(&alone).allclose(&of(other), 0.0, 2e-6, false);
        assert!(same(if spec.decay { &all } else { &none }), "{}", spec.name);
    }
}

#[test]
fn any_number_of_ranks_resumes_from_a_checkpoint_of_any_other() {
    let settings = TrainerSettings { reference_reset_steps: 3, ..descent() };
    let worlds =
        [(Sharding::Replicated, 2), (Sharding::ShardOptimizer, 3), (Sharding::ShardAll, 4), (Sharding::ShardAll, 1)];
    for kind in [Kind::Float, Kind::BFloat16] {
        for (saved_by, writers) in worlds {
            let folder = tempfile::tempdir().expect("a temporary folder");
            let path = folder.path();
            let whole = on_ranks(writers, |rank, collective| {
                let division = Division { sharding: saved_by, rank, ranks: writers };
                let settings = TrainerSettings { division, ..settings.clone() };
                let mut trainer = trainer(&golden("qwen2-untied"), settings, kind);
                trainer.train(&share(whole_batch(1, 2), rank, writers), collective).expect("trains");
                let files = trainer.save(path, true, None, collective).expect("saves");
                assert_eq!(files.len(), usize::from(rank == 0 || saved_by != Sharding::Replicated));
                let saved = weights(&mut trainer, collective);
                trainer.train(&share(whole_batch(2, 2), rank, writers), collective).expect("trains");
                (saved, weights(&mut trainer, collective))
            });
            for (resumed_by, readers) in worlds {
                let resumed = on_ranks(readers, |rank, collective| {
                    let division = Division { sharding: resumed_by, rank, ranks: readers };
                    let settings = TrainerSettings { division, ..settings.clone() };
                    let mut trainer = trainer(&golden("qwen2-untied"), settings, kind);
                    trainer.restore(path).expect("restores");
                    let restored = weights(&mut trainer, collective);
                    trainer.train(&share(whole_batch(2, 2), rank, readers), collective).expect("trains");
                    (restored, weights(&mut trainer, collective))
                });
                let what = format!("{kind:?}: {resumed_by:?} {readers} after {saved_by:?} {writers}");
                assert!(resumed[0].0.equal(&whole[0].0), "{what}: the restored weights differ");
                if (saved_by, writers) == (resumed_by, readers) {
                    assert!(resumed[0].1.equal(&whole[0].1), "{what}: does not resume bit for bit");
                }
                let tolerance = if kind == Kind::Float { 1e-5 } else { 2e-2 };
                assert_close(&resumed[0].1, &whole[0].1, tolerance, &what);
            }
        }
    }
}

#[test]
fn a_part_that_is_missing_is_said() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path();
    on_ranks(3, |rank, collective| {
        let division = Division { sharding: Sharding::ShardAll, rank, ranks: 3 };
        let mut trainer = trainer(&golden("qwen3"), TrainerSettings { division, ..settings() }, Kind::Float);
        trainer.save(path, true, None, collective).expect("saves");
    });
    std::fs::remove_file(path.join("training-state-1-of-3.safetensors")).expect("it was written");
    let mut alone = trainer(&golden("qwen3"), settings(), Kind::Float);
    let error = alone.restore(path).expect_err("a part is missing").to_string();
    assert!(error.contains("hold") && error.contains("the model has"), "{error}");
    let mut collective = HostCollective::alone();
    assert!(alone.train(&whole_batch(1, 1), &mut collective).is_ok(), "nothing was taken over");
}

/// The same on a model of realistic size, if it is present.
#[test]
fn every_division_gives_the_same_weights_on_smollm2() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/smollm2-135m-instruct");
    if !folder.exists() {
        println!("SKIPPED: {} is not there (cargo xtask demo fetches it)", folder.display());
        return;
    }
    let run = |sharding, ranks: usize, memory_bytes| {
        let mut trained = on_ranks(ranks, |rank, collective| {
            let division = Division { sharding, rank, ranks };
            let settings = TrainerSettings { division, memory_bytes, ..descent() };
            let mut trainer = trainer(&folder, settings, Kind::Float);
            trainer.train(&share(whole_batch(1, 1), rank, ranks), collective).expect("trains");
            (rank == 0).then(|| weights(&mut trainer, collective)).or_else(|| {
                trainer.weights(collective, false).expect("all ranks are there");
                None
            })
        });
        trained.remove(0).expect("rank 0 has the weights")
    };
    let reference = run(Sharding::Replicated, 1, None);
    for (sharding, ranks, memory_bytes) in
        [(Sharding::Replicated, 2, Some(0)), (Sharding::ShardOptimizer, 3, None), (Sharding::ShardAll, 4, Some(0))]
    {
        let what = format!("{sharding:?}, {ranks} ranks");
        assert_close(&run(sharding, ranks, memory_bytes), &reference, 1e-5, &what);
    }
}
