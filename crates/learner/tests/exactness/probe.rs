//! The probe of a step: what it holds, and that training does not notice it.

use pacs_collective::{Collective, HostCollective};
use pacs_learner::{TrainBatch, Trainer, TrainerSettings};
use pacs_model::{Model, ModelConfig, Parameters, score};
use pacs_shape::{Division, Sharding};
use pacs_spec::OptimizerSpec;
use pacs_torch::tch::{Kind, Tensor};
use pacs_weights::Probe;

use crate::support::{descent, golden, on_ranks, share, trainer, weights, whole_batch};

const MODEL: &str = "qwen2-tied";
const STEPS: u64 = 2;

/// Settings whose steps are large enough to be seen in every log-prob.
fn with_probe() -> TrainerSettings {
    let descent = descent();
    let optimizer = OptimizerSpec { learning_rate: 1.0, ..descent.optimizer.clone() };
    TrainerSettings { probe: true, optimizer, ..descent }
}

/// One rank's share of a step of two updates.
fn batch(step: u64, rank: usize, ranks: usize, deterministic: bool) -> TrainBatch {
    let mut batch = whole_batch(step, 2);
    if !deterministic {
        return share(batch, rank, ranks);
    }
    batch.cut_into_units();
    for entry in &mut batch.index {
        entry.rank = entry.unit.expect("it was cut") % ranks;
    }
    let index = &batch.index;
    batch.sequences.retain(|sequence| index[sequence.position].rank == rank);
    batch
}

/// The weights after the last step, and the probe of each step. Checks that all ranks have the same.
fn train(ranks: usize, settings: &TrainerSettings) -> (Tensor, Vec<Option<Probe>>) {
    let trained = on_ranks(ranks, |rank, collective| {
        let division = Division { rank, ranks, ..settings.division };
        let mut trainer = trainer(&golden(MODEL), TrainerSettings { division, ..settings.clone() }, Kind::Float);
        let mut probes = Vec::new();
        for step in 1..=STEPS {
            let before = parameters(&mut trainer, collective);
            let batch = batch(step, rank, ranks, settings.deterministic);
            let probe = trainer.train(&batch, collective).expect("trains").probe;
            let after = parameters(&mut trainer, collective);
            if let Some(probe) = &probe {
                check(step, probe, [&before, &after]);
            }
            probes.push(probe);
        }
        (weights(&mut trainer, collective), probes)
    });
    for (weights, probes) in &trained[1..] {
        assert!(weights.equal(&trained[0].0), "the ranks hold different weights");
        assert_eq!(*probes, trained[0].1, "the ranks have different probes");
    }
    trained.into_iter().next().expect("there is a rank")
}

/// A copy of all weights.
fn parameters(trainer: &mut Trainer, collective: &mut dyn Collective) -> Parameters {
    let whole = trainer.weights(collective, true).expect("all ranks are there").expect("they are wanted");
    Parameters { layout: whole.layout.clone(), flat: whole.flat.copy() }
}

/// Checks that a probe is the step's first sequence with eight answer tokens, scored at temperature 1 whatever the step samples at.
fn check(step: u64, probe: &Probe, [before, after]: [&Parameters; 2]) {
    let whole = whole_batch(step, 2);
    let chosen = whole.sequences.iter().find(|sequence| sequence.tokens.len() >= 8).expect("there is a long answer");
    let prompt = whole.prompts[&whole.index[chosen.position].group].clone();
    assert_eq!((probe.answer_from(), probe.previous().0), (prompt.len(), step - 1));
    assert_eq!(probe.tokens(), [&prompt[..], &chosen.tokens].concat());
    let config = ModelConfig::read(&golden(MODEL)).expect("a golden model");
    for (parameters, found) in [(before, probe.previous_logprobs()), (after, probe.logprobs())] {
        let items = vec![(prompt.clone(), chosen.tokens.clone())];
        let expected = score(&Model::new(&config, parameters), items, 1.0, 10_000).expect("tokens of the model");
        for (found, expected) in found.iter().zip(&expected[0]) {
            assert!((found - expected).abs() < 2e-5, "step {step}: {found}, and {expected} is expected");
        }
    }
    let moved = probe.logprobs().iter().zip(probe.previous_logprobs()).any(|(now, before)| (now - before).abs() > 1e-4);
    assert!(moved, "both are scores of the same weights");
}

#[test]
fn the_weights_have_the_same_bits_with_and_without_a_probe() {
    for sharding in [Sharding::Replicated, Sharding::ShardOptimizer, Sharding::ShardAll] {
        for ranks in [1, 2] {
            let settings = TrainerSettings { division: Division::alone(sharding), ..with_probe() };
            let (probed, probes) = train(ranks, &settings);
            assert!(probes.iter().all(Option::is_some), "{sharding:?}, {ranks} ranks");
            let (plain, none) = train(ranks, &TrainerSettings { probe: false, ..settings });
            assert!(probed.equal(&plain), "{sharding:?}, {ranks} ranks: the weights have changed");
            assert_eq!(none, [None, None]);
        }
    }
}

#[test]
fn a_deterministic_run_has_one_probe_for_any_number_of_ranks() {
    let settings = TrainerSettings { deterministic: true, ..with_probe() };
    let (weights, probes) = train(1, &settings);
    for (ranks, sharding) in [(2, Sharding::Replicated), (3, Sharding::ShardAll)] {
        let settings = TrainerSettings { division: Division::alone(sharding), ..settings.clone() };
        let (other_weights, other_probes) = train(ranks, &settings);
        assert!(weights.equal(&other_weights), "{ranks} ranks, {sharding:?}");
        assert_eq!(probes, other_probes, "{ranks} ranks, {sharding:?}");
    }
}

/// Cuts the answer of a sequence.
fn shorten(batch: &mut TrainBatch, place: usize, most: usize) {
    let sequence = &mut batch.sequences[place];
    sequence.tokens.truncate(most);
    sequence.rollout_logprobs.truncate(most);
    sequence.sampled_logprobs.truncate(most);
    batch.index[sequence.position].answer_tokens = sequence.tokens.len() as u32;
}

#[test]
fn long_answers_are_preferred_and_long_sequences_are_not_probed() {
    let probe_of = |batch: &TrainBatch| {
        let mut trainer = trainer(&golden(MODEL), with_probe(), Kind::Float);
        trainer.train(batch, &mut HostCollective::alone()).expect("trains").probe
    };
    let tokens = |batch: &TrainBatch, place: usize| {
        let sequence = &batch.sequences[place];
        [&batch.prompts[&batch.index[sequence.position].group][..], &sequence.tokens].concat()
    };
    let mut batch = whole_batch(1, 2);
    assert!(batch.sequences[0].tokens.len() >= 8 && batch.sequences[1].tokens.len() >= 8);
    assert_eq!(probe_of(&batch).expect("it fits").tokens(), tokens(&batch, 0));
    shorten(&mut batch, 0, 7);
    assert_eq!(probe_of(&batch).expect("it fits").tokens(), tokens(&batch, 1));
    for place in 1..batch.sequences.len() {
        shorten(&mut batch, place, 7);
    }
    assert_eq!(probe_of(&batch).expect("it fits").tokens(), tokens(&batch, 0), "a short answer is better than none");
    batch.prompts.values_mut().for_each(|prompt| prompt.resize(Probe::MOST_TOKENS, 7));
    assert_eq!(probe_of(&batch), None);
}
