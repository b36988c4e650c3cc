//! `resources.deterministic`: the weights are a function of the batch alone, to the last bit.

use std::collections::BTreeMap;

use pacs_algo::{Objective, PolicyConfig, dr_grpo, grpo, ppo};
use pacs_learner::{SampleSignal, TrainerSettings};
use pacs_shape::{Division, Sharding};
use pacs_spec::OptimizerSpec;
use pacs_torch::tch::{self, Kind, Tensor};

use crate::support::{
    GROUP_SIZE, GROUPS, PACS, assert_close, descent, golden, on_ranks, settings, share, trainer, units, weights,
    whole_batch,
};

const STEPS: u64 = 2;
const MINI_BATCHES: usize = 2;

/// What training ends with.
struct Trained {
    weights: Tensor,
    /// Score and coefficient of every answer of every step, by step and position, as bits.
    signals: BTreeMap<(u64, usize), (Option<u32>, u32)>,
}

/// Result of some steps with `threads` threads per rank. Checks that all ranks hold the same weights and report the
/// same norm, and that each answer is reported once.
fn train(model: &str, kind: Kind, (ranks, threads): (usize, i32), settings: &TrainerSettings) -> Trained {
    let trained = on_ranks(ranks, |rank, collective| {
        let division = Division { rank, ranks, ..settings.division };
        let settings = TrainerSettings { division, deterministic: true, ..settings.clone() };
        let mut trainer = trainer(&golden(model), settings, kind);
        tch::set_num_threads(threads);
        let (mut norm, mut signals) = (f64::NAN, Vec::new());
        for step in 1..=STEPS {
            let report =
                trainer.train(&units(whole_batch(step, MINI_BATCHES), step, rank, ranks), collective).expect("trains");
            norm = report.metrics["grad_norm"];
            signals.extend(report.signals.into_iter().map(|signal| (step, signal)));
        }
        (weights(&mut trainer, collective), norm, signals)
    });
    assert!(trained[0].1 > 0.0 && trained.iter().all(|(_, norm, _)| *norm == trained[0].1));
    assert!(trained.iter().all(|(weights, ..)| weights.equal(&trained[0].0)), "the ranks hold different weights");
    let mut all = BTreeMap::new();
    for (step, signal) in trained.iter().flat_map(|(.., signals)| signals) {
        let SampleSignal { position, score, coefficient } = *signal;
        let before = all.insert((*step, position), (score.map(f32::to_bits), coefficient.to_bits()));
        assert_eq!(before, None, "answer {position} of step {step} is reported twice");
    }
    let answers = GROUPS as usize * GROUP_SIZE;
    assert!(all.keys().copied().eq((1..=STEPS).flat_map(|step| (0..answers).map(move |position| (step, position)))));
    Trained { weights: trained.into_iter().next().expect("there is a rank").0, signals: all }
}

fn assert_same(found: &Trained, expected: &Trained, what: &str) {
    let apart = found.signals.iter().find(|(place, signal)| expected.signals.get(*place) != Some(*signal));
    assert_eq!(apart, None, "{what}: another score or coefficient");
    let (found, expected) = (&found.weights, &expected.weights);
    let different = found.not_equal_tensor(expected).sum(Kind::Int64).int64_value(&[]);
    let (found, expected) = (found.to_kind(Kind::Float), expected.to_kind(Kind::Float));
    let apart = (found - expected).abs().max().double_value(&[]);
    assert_eq!(different, 0, "{what}: {different} weights differ, by up to {apart}");
}

/// Models, shardings, ranks and passes: any three of them occur together in each of their combinations, in a third of the runs that all
/// four would take.
#[test]
fn ranks_passes_threads_and_divisions_give_one_weight() {
    // One unit per pass with little memory, small packs, everything at once.
    const PASSES: [(usize, Option<u64>); 3] = [(1, Some(0)), (60, None), (100_000, Some(0))];
    let models = [
        ("qwen2-tied", Kind::Float),
        ("qwen3", Kind::BFloat16),
        ("qwen3_moe", Kind::Float),
        ("llama3", Kind::Float),
        ("gemma3", Kind::Float),
    ];
    for (m, (model, kind)) in models.into_iter().enumerate() {
        let expected = train(model, kind, (1, 1), &settings());
        for (s, sharding) in
            [Sharding::Replicated, Sharding::ShardOptimizer, Sharding::ShardAll].into_iter().enumerate()
        {
            for (r, (ranks, threads)) in [(1, 2), (2, 1), (3, 3), (4, 2)].into_iter().enumerate() {
                let (micro_batch_tokens, memory_bytes) = PASSES[(m + s + r) % 3];
                let division = Division::alone(sharding);
                let settings = TrainerSettings { division, micro_batch_tokens, memory_bytes, ..settings() };
                let found = train(model, kind, (ranks, threads), &settings);
                let layout = format!("{ranks} ranks of {threads} threads, {micro_batch_tokens} tokens");
                assert_same(&found, &expected, &format!("{model}, {kind:?}, {sharding:?}, {layout}"));
            }
        }
    }
}

#[test]
fn every_way_of_training_does() {
    let optimizer = OptimizerSpec { max_grad_norm: 1e-3, ..OptimizerSpec::default() };
    let with = |objective| TrainerSettings { objective, ..descent() };
    let cases = [
        ("a clipped gradient", TrainerSettings { optimizer, ..settings() }),
        ("a reference of two steps", TrainerSettings { reference_reset_steps: 2, ..with(Objective::Pacs(PACS)) }),
        ("entropies", with(Objective::Policy(PolicyConfig { entropy: 0.5, ..grpo() }))),
        ("a value model", TrainerSettings { critic_learning_rate: 0.05, ..with(Objective::Policy(ppo())) }),
    ];
    for (name, settings) in cases {
        let expected = train("qwen2-untied", Kind::Float, (1, 1), &settings);
        for (ranks, sharding, tokens) in [(2, Sharding::ShardOptimizer, 1), (4, Sharding::Replicated, 70)] {
            let division = Division::alone(sharding);
            let settings = TrainerSettings { division, micro_batch_tokens: tokens, ..settings.clone() };
            let found = train("qwen2-untied", Kind::Float, (ranks, 2), &settings);
            assert_same(&found, &expected, &format!("{name}, {ranks} ranks, {sharding:?}"));
        }
    }
}

#[test]
fn the_update_is_that_of_floats_up_to_rounding() {
    for model in ["qwen2-tied", "qwen2-untied", "qwen3", "qwen3_moe", "llama3", "olmo2", "phi3", "gemma2", "gemma3"] {
        let floats = on_ranks(1, |rank, collective| {
            let mut trainer = trainer(&golden(model), descent(), Kind::Float);
            for step in 1..=STEPS {
                trainer.train(&share(whole_batch(step, MINI_BATCHES), rank, 1), collective).expect("trains");
            }
            weights(&mut trainer, collective)
        });
        assert_close(&train(model, Kind::Float, (1, 2), &descent()).weights, &floats[0], 1e-5, model);
    }
}

#[test]
fn a_batch_without_units_and_a_gradient_without_end_are_refused() {
    let mut lone = pacs_collective::HostCollective::alone();
    let settings = TrainerSettings { deterministic: true, ..descent() };
    let mut trainer = trainer(&golden("llama3"), settings, Kind::Float);
    let problem = trainer.train(&whole_batch(1, 1), &mut lone).expect_err("it has no units").to_string();
    assert!(problem.contains("has no unit, and `resources.deterministic` is on"), "{problem}");

    // Integer sums would wrap around unnoticed.
    let mut batch = units(whole_batch(1, MINI_BATCHES), 1, 0, 1);
    batch.index.iter_mut().for_each(|entry| entry.reward = if entry.label > 0.5 { 1e12 } else { -1e12 });
    let settings = TrainerSettings { objective: Objective::Policy(dr_grpo(12.0)), deterministic: true, ..descent() };
    let mut trainer = crate::support::trainer(&golden("llama3"), settings, Kind::Float);
    let before = weights(&mut trainer, &mut lone);
    let report = trainer.train(&batch, &mut lone).expect("trains");
    assert_eq!(report.skipped_updates, MINI_BATCHES as u32);
    assert!(weights(&mut trainer, &mut lone).equal(&before));
}
