//! Properties that the PACS objective must have for any input.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::BTreeMap;

use pacs_algo::{LabelWeights, PacsConfig, PacsStep, RewardMethod, ScoreEstimator, Sequence, pacs};
use proptest::prelude::*;

proptest! {
    #[test]
    fn order_does_not_change_a_bit((sequences, order) in batch_and_order(), config in config()) {
        let shuffled: Vec<Sequence> = order.iter().map(|&i| sequences[i]).collect();
        let (plain, moved) = (pacs(&config, &sequences).unwrap(), pacs(&config, &shuffled).unwrap());
        prop_assert_eq!(plain.loss.to_bits(), moved.loss.to_bits());
        for (at, &from) in order.iter().enumerate() {
            for (a, b) in vectors(&plain).iter().zip(vectors(&moved)) {
                prop_assert_eq!(a[from].to_bits(), b[at].to_bits());
            }
        }
    }

    #[test]
    fn a_batch_may_be_split_at_group_boundaries(sequences in batch(), config in config(), boundary in 0u64..5) {
        let whole = pacs(&config, &sequences).unwrap();
        let n = sequences.len() as f64;
        let mut loss = 0.0;
        for part in [true, false] {
            let indices: Vec<usize> =
                (0..sequences.len()).filter(|&i| (sequences[i].group < boundary) == part).collect();
            if indices.is_empty() {
                continue;
            }
            let picked: Vec<Sequence> = indices.iter().map(|&i| sequences[i]).collect();
            let share = picked.len() as f64 / n;
            let step = pacs(&config, &picked).unwrap();
            loss += share * step.loss;
            for (at, &i) in indices.iter().enumerate() {
                prop_assert!(close(share * step.dloss_dlogprob[at], whole.dloss_dlogprob[i]));
            }
        }
        prop_assert!(close(loss, whole.loss));
    }

    #[test]
    fn baselines_cancel_within_a_group(sequences in batch(), config in config()) {
        prop_assume!(matches!(config.score, ScoreEstimator::Rloo | ScoreEstimator::DrGrpo));
        let step = pacs(&config, &sequences).unwrap();
        for values in [&step.score, &step.dloss_dproxy] {
            let mut sums: BTreeMap<u64, f64> = BTreeMap::new();
            for (sequence, value) in sequences.iter().zip(values) {
                *sums.entry(sequence.group).or_default() += value;
            }
            prop_assert!(sums.values().all(|sum| sum.abs() < 1e-9), "{:?}", sums);
        }
    }

    #[test]
    fn on_policy_the_step_is_leave_one_out_reinforce(sequences in batch()) {
        let config = PacsConfig { label_weights: LabelWeights::None, ..PacsConfig::paper() };
        let sequences: Vec<Sequence> = sequences
            .into_iter()
            .map(|s| Sequence { old_logprob_sum: s.new_logprob_sum, label: s.label.round(), ..s })
            .collect();
        let step = pacs(&config, &sequences).unwrap();
        for (i, sequence) in sequences.iter().enumerate() {
            let group: Vec<f64> = sequences.iter().filter(|s| s.group == sequence.group).map(|s| s.label).collect();
            let (n, positives) = (group.len() as f64, group.iter().sum::<f64>());
            let advantage = sequence.label - (positives - sequence.label) / (n - 1.0);
            let measured = -(sequences.len() as f64) * step.dloss_dlogprob[i];
            prop_assert!((measured - advantage).abs() < 1e-12);
            if positives == 0.0 || positives == n {
                prop_assert_eq!(step.dloss_dlogprob[i], 0.0);
            }
        }
    }

    #[test]
    fn a_higher_label_never_gets_a_lower_push(
        members in prop::collection::vec((0.0..=1.0f64, prop::sample::select(vec![-1.5, 0.0, 0.0, 0.7])), 2..10),
        config in config(),
    ) {
        let sequence = |&(label, log_ratio): &(f64, f64)| Sequence {
            group: 0,
            label,
            new_logprob_sum: -4.0 + log_ratio,
            old_logprob_sum: -4.0,
            tokens: 3,
            importance: 1.0,
        };
        let sequences: Vec<Sequence> = members.iter().map(sequence).collect();
        let step = pacs(&config, &sequences).unwrap();
        for (i, a) in sequences.iter().enumerate() {
            for (j, b) in sequences.iter().enumerate() {
                if a.label > b.label && a.new_logprob_sum == b.new_logprob_sum {
                    let (a, b) = (step.dloss_dlogprob[i], step.dloss_dlogprob[j]);
                    prop_assert!(a <= b + 1e-12 * (1.0 + b.abs()), "{a} is above {b}: {members:?}");
                }
            }
        }
    }

    #[test]
    fn derivatives_match_finite_differences(
        sequences in batch(),
        config in config(),
        at in any::<prop::sample::Index>(),
    ) {
        // The standardised score is too curved for finite differences where a group's proxies nearly coincide.
        prop_assume!(config.score != ScoreEstimator::Grpo);
        let i = at.index(sequences.len());
        let loss_at = |shift: f64| {
            let mut moved = sequences.clone();
            moved[i].new_logprob_sum += shift;
            pacs(&config, &moved).unwrap().loss
        };
        let shift = 1e-5;
        let slope = (loss_at(shift) - loss_at(-shift)) / (2.0 * shift);
        let step = pacs(&config, &sequences).unwrap();
        prop_assert!((slope - step.dloss_dlogprob[i]).abs() < 1e-7, "{slope} for {}", step.dloss_dlogprob[i]);
    }
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-12 * b.abs() + 1e-15
}

fn vectors(step: &PacsStep) -> [&Vec<f64>; 7] {
    let PacsStep { loss: _, reward_proxy, score, weight, sequence_loss, dloss_dscore, dloss_dproxy, dloss_dlogprob } =
        step;
    [reward_proxy, score, weight, sequence_loss, dloss_dscore, dloss_dproxy, dloss_dlogprob]
}

fn config() -> impl Strategy<Value = PacsConfig> {
    let score = prop::sample::select(vec![
        ScoreEstimator::Rloo,
        ScoreEstimator::Grpo,
        ScoreEstimator::DrGrpo,
        ScoreEstimator::Naive,
    ]);
    let reward_method = prop::sample::select(vec![RewardMethod::LogRatio, RewardMethod::MeanLogprob]);
    let label_weights = prop::sample::select(vec![
        LabelWeights::None,
        LabelWeights::Question,
        LabelWeights::OnlyPositive,
        LabelWeights::OnlyNegative,
    ]);
    (0.1..3.0f64, score, reward_method, label_weights).prop_map(|(beta, score, reward_method, label_weights)| {
        PacsConfig { beta, score, reward_method, label_weights, actor_term: false, importance: None }
    })
}

/// One to five groups of two to six members, each group contiguous.
fn batch() -> impl Strategy<Value = Vec<Sequence>> {
    let member = (prop::sample::select(vec![0.0, 0.0, 1.0, 1.0, 0.5, 0.1]), -20.0..-0.1f64, -2.0..2.0f64, 1u32..50);
    prop::collection::vec(prop::collection::vec(member, 2..7), 1..6).prop_map(|groups| {
        let members = groups.iter().enumerate().flat_map(|(group, members)| members.iter().map(move |m| (group, m)));
        members
            .map(|(group, &(label, new_logprob_sum, log_ratio, tokens))| Sequence {
                group: group as u64,
                label,
                new_logprob_sum,
                old_logprob_sum: new_logprob_sum - log_ratio,
                tokens,
                importance: 1.0,
            })
            .collect()
    })
}

fn batch_and_order() -> impl Strategy<Value = (Vec<Sequence>, Vec<usize>)> {
    batch().prop_flat_map(|sequences| {
        let order: Vec<usize> = (0..sequences.len()).collect();
        (Just(sequences), Just(order).prop_shuffle())
    })
}
