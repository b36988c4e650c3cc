//! Scores and coefficients of answers, as the ranks report them.

use std::collections::BTreeMap;

use pacs_algo::{Objective, PacsConfig, PolicyConfig, RewardMethod, ValueConfig, dapo, disco, grpo, ppo, real};
use pacs_learner::{SampleSignal, TrainerSettings};
use pacs_shape::Division;
use pacs_torch::tch::Kind;

use crate::support::{GROUP_SIZE, GROUPS, PACS, descent, golden, on_ranks, share, trainer, whole_batch};

const ANSWERS: usize = GROUPS as usize * GROUP_SIZE;

/// Settings that move far enough in a step for scores to differ from 0.
fn with(objective: Objective) -> TrainerSettings {
    TrainerSettings { objective, critic_learning_rate: 0.05, ..descent() }
}

/// What all ranks report of step `steps`, by position. Checks that each answer is reported by its own rank and once.
fn reported(ranks: usize, mini_batches: usize, steps: u64, settings: &TrainerSettings) -> Vec<SampleSignal> {
    let reports = on_ranks(ranks, |rank, collective| {
        let division = Division { rank, ranks, ..settings.division };
        let mut trainer = trainer(&golden("qwen2-tied"), TrainerSettings { division, ..settings.clone() }, Kind::Float);
        let mut signals = Vec::new();
        for step in 1..=steps {
            let batch = share(whole_batch(step, mini_batches), rank, ranks);
            signals = trainer.train(&batch, collective).expect("trains").signals;
            let positions = signals.iter().map(|signal| signal.position);
            assert!(positions.clone().is_sorted(), "in the order of the index");
            assert!(positions.into_iter().all(|position| batch.index[position].rank == rank), "its own answers");
        }
        signals
    });
    let mut all = BTreeMap::new();
    for signal in reports.into_iter().flatten() {
        assert_eq!(all.insert(signal.position, signal), None, "an answer is reported twice");
    }
    all.into_values().collect()
}

#[test]
fn every_answer_is_reported_once_and_alike_on_any_number_of_ranks() {
    let mean_logprob = PacsConfig { reward_method: RewardMethod::MeanLogprob, ..PACS };
    for (name, objective) in [
        ("pacs", Objective::Pacs(PACS)),
        ("pacs of mean log-probs", Objective::Pacs(mean_logprob)),
        ("real", Objective::Real(real())),
        ("disco", Objective::Disco(disco())),
        ("grpo", Objective::Policy(grpo())),
        ("dapo, which masks what was cut off", Objective::Policy(dapo())),
        ("ppo", Objective::Policy(ppo())),
    ] {
        let settings = with(objective);
        let alone = reported(1, 2, 2, &settings);
        assert!(alone.iter().map(|signal| signal.position).eq(0..ANSWERS), "{name}: {} answers", alone.len());
        let far = |of: fn(&SampleSignal) -> f32| alone.iter().any(|signal| of(signal).abs() > 1e-3);
        assert!(
            far(|signal| signal.score.expect("the objective has one")) && far(|signal| signal.coefficient),
            "{name}"
        );
        for ranks in [2, 3] {
            let several = reported(ranks, 2, 2, &settings);
            assert_eq!(several.len(), ANSWERS, "{name}, {ranks} ranks");
            for (one, other) in alone.iter().zip(&several) {
                let close = |a: f32, b: f32| (a - b).abs() <= 1e-3 * (0.01 + a.abs());
                let same = one.score.zip(other.score).is_some_and(|(a, b)| close(a, b));
                assert!(same && close(one.coefficient, other.coefficient), "{name}, {ranks} ranks: {one:?}, {other:?}");
            }
        }
    }
}

/// The second update of a step sees scores that the first has moved; those of a group are centred, and so are its
/// coefficients.
#[test]
fn scores_are_those_of_the_update_that_trained_the_answer() {
    let signals = reported(1, 2, 1, &with(Objective::Pacs(PACS)));
    let batch = whole_batch(1, 2);
    for (group, members) in (0..GROUPS).zip(signals.chunks(GROUP_SIZE)) {
        let score = |signal: &SampleSignal| signal.score.expect("PACS has scores");
        let mixed = batch.index.iter().filter(|entry| entry.group == group).map(|entry| entry.label);
        let right: f64 = mixed.sum();
        match batch.index[members[0].position].mini_batch {
            // On policy every score is 0, and a group of equal labels has no gradient.
            0 => {
                assert!(members.iter().all(|signal| score(signal) == 0.0), "{members:?}");
                let has_gradient = right > 0.0 && right < GROUP_SIZE as f64;
                for signal in members {
                    let up = batch.index[signal.position].label > 0.5;
                    let pushed = if up { signal.coefficient > 0.0 } else { signal.coefficient < 0.0 };
                    assert_eq!(pushed, has_gradient, "{signal:?}");
                    assert!(has_gradient || signal.coefficient.to_bits() == 0, "{signal:?}");
                }
            }
            _ => assert!(members.iter().any(|signal| score(signal).abs() > 1e-4), "{members:?}"),
        }
        let sum = |of: &dyn Fn(&SampleSignal) -> f32| members.iter().map(of).sum::<f32>().abs();
        assert!(sum(&score) < 1e-4 && sum(&|signal| signal.coefficient) < 1e-5, "{members:?}");
    }
}

#[test]
fn answers_without_a_gradient_are_reported_and_steps_without_an_update_report_nothing() {
    let signals = reported(2, 1, 2, &with(Objective::Policy(dapo())));
    let batch = whole_batch(2, 1);
    assert_eq!(signals.len(), ANSWERS);
    let masked = signals.iter().filter(|signal| batch.index[signal.position].truncated);
    let masked: Vec<_> = masked.collect();
    assert!(!masked.is_empty() && masked.iter().all(|signal| signal.coefficient == 0.0), "{masked:?}");
    assert!(masked.iter().any(|signal| signal.score.is_some_and(|score| score != 0.0)), "its advantage is known");

    let value = ppo().value.map(|value| ValueConfig { warmup_steps: 1, ..value });
    let settings = with(Objective::Policy(PolicyConfig { value, ..ppo() }));
    assert_eq!(reported(2, 1, 1, &settings), [], "the first step trains the value model alone");
    assert_eq!(reported(2, 1, 2, &settings).len(), ANSWERS);
}
