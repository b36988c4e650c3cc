//! The update is exact: it does not depend on ranks, passes, or where a group's members sit, and equals autograd.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use pacs_algo::{LabelWeights, PacsConfig, RewardMethod, ScoreEstimator, balance};
use pacs_collective::{GroupConfig, HostCollective, HostListener};
use pacs_learner::{IndexEntry, SequenceTokens, TrainBatch, Trainer, TrainerSettings};
use pacs_spec::OptimizerSpec;
use pacs_torch::tch::{Device, Kind, Tensor};
use pacs_types::{Generation, mix};

const GROUPS: u64 = 6;
const GROUP_SIZE: usize = 4;
const STEPS: u64 = 5;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models").join(name)
}

fn settings() -> TrainerSettings {
    TrainerSettings {
        objective: PacsConfig {
            beta: 1.0,
            score: ScoreEstimator::Rloo,
            reward_method: RewardMethod::LogRatio,
            label_weights: LabelWeights::Question,
        },
        reference_reset_steps: 1,
        reset_optimizer: false,
        // Twenty times the paper's. Adam divides by the gradient's own size, so rounding in a gradient that is almost
        // zero becomes a difference in proportion to the learning rate.
        optimizer: OptimizerSpec { learning_rate: 2e-5, ..OptimizerSpec::default() },
        temperature: 0.9,
        micro_batch_tokens: 100_000,
    }
}

fn trainer(model: &str, settings: TrainerSettings) -> Trainer {
    Trainer::load(&golden(model), settings, Kind::Float, Device::Cpu).expect("golden model")
}

/// All sequences of a step: lengths, tokens and labels are functions of their place. Some groups have one label only.
fn whole_batch(step: u64, mini_batches: usize) -> TrainBatch {
    let number = |parts: [u64; 3]| mix(parts.iter().fold(step, |key, part| mix(key ^ part)));
    let token = |parts| (number(parts) % 300) as u32;
    let (mut index, mut sequences, mut prompts) = (Vec::new(), Vec::new(), HashMap::new());
    for group in 0..GROUPS {
        let prompt_len = 3 + number([group, 0, 1]) % 9;
        prompts.insert(group, (0..prompt_len).map(|i| token([group, i, 2])).collect());
        for member in 0..GROUP_SIZE as u64 {
            let length = 1 + number([group, member, 3]) % 12;
            let label = if group == 0 { 0.0 } else { (number([group, member, 4]) % 2) as f64 };
            sequences.push(SequenceTokens {
                position: index.len(),
                tokens: (0..length).map(|i| token([group * 100 + member, i, 5])).collect(),
                rollout_logprobs: vec![-1.0; length as usize],
            });
            index.push(IndexEntry {
                group,
                mini_batch: group as usize * mini_batches / GROUPS as usize,
                rank: 0,
                label,
                answer_tokens: length as u32,
            });
        }
    }
    TrainBatch { step, index, prompts, sequences }
}

/// The share of one rank, dealt out sequence by sequence so that groups are split between ranks.
fn share(mut batch: TrainBatch, rank: usize, ranks: usize) -> TrainBatch {
    let costs: Vec<u64> = batch.index.iter().map(|entry| u64::from(entry.answer_tokens)).collect();
    for (entry, rank) in batch.index.iter_mut().zip(balance(&costs, ranks)) {
        entry.rank = rank;
    }
    let index = &batch.index;
    batch.sequences.retain(|sequence| index[sequence.position].rank == rank);
    batch
}

fn alone() -> HostCollective {
    group_of(1).into_iter().next().expect("a world of one").1()
}

type Connect = Box<dyn FnOnce() -> HostCollective + Send>;

fn group_of(ranks: usize) -> Vec<(usize, Connect)> {
    let listeners: Vec<_> =
        (0..ranks).map(|_| Arc::new(HostListener::bind("127.0.0.1:0").expect("a free port"))).collect();
    let addresses: Vec<String> = listeners.iter().map(|listener| listener.address().to_string()).collect();
    let connect = |(rank, listener): (usize, Arc<HostListener>)| {
        let addresses = addresses.clone();
        let connect = move || {
            let timeout = Duration::from_secs(60);
            let config = GroupConfig { job: "test".into(), generation: Generation(1), rank, addresses, timeout };
            HostCollective::connect(&listener, config).expect("all ranks are there")
        };
        (rank, Box::new(connect) as Connect)
    };
    listeners.into_iter().enumerate().map(connect).collect()
}

/// Weights after [`STEPS`] steps on `ranks` ranks; checks that all ranks end with the same bits.
fn train(model: &str, ranks: usize, mini_batches: usize, settings: &TrainerSettings) -> Tensor {
    let run = |(rank, connect): (usize, Connect)| {
        let mut collective = connect();
        let mut trainer = trainer(model, settings.clone());
        for step in 1..=STEPS {
            let batch = share(whole_batch(step, mini_batches), rank, ranks);
            trainer.train(&batch, &mut collective).expect("trains");
        }
        trainer.parameters().flat.copy()
    };
    let weights: Vec<Tensor> = std::thread::scope(|scope| {
        let threads: Vec<_> = group_of(ranks).into_iter().map(|rank| scope.spawn(move || run(rank))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no rank panics")).collect()
    });
    for other in &weights[1..] {
        assert!(weights[0].equal(other), "the ranks hold different weights");
    }
    weights[0].shallow_clone()
}

fn assert_close(a: &Tensor, b: &Tensor, tolerance: f64, what: &str) {
    let difference = (a - b).abs().max().double_value(&[]);
    assert!(difference <= tolerance, "{what}: weights differ by {difference}");
}

#[test]
fn more_ranks_give_the_same_weights_as_one() {
    for mini_batches in [1, 3] {
        let reference = train("qwen3", 1, mini_batches, &settings());
        assert!((&reference - &trainer("qwen3", settings()).parameters().flat).abs().max().double_value(&[]) > 5e-5);
        for ranks in [2, 3, 4] {
            let weights = train("qwen3", ranks, mini_batches, &settings());
            assert_close(&weights, &reference, 1e-5, &format!("{ranks} ranks, {mini_batches} mini-batches"));
        }
    }
}

#[test]
fn smaller_passes_give_the_same_weights() {
    for model in ["qwen2-untied", "llama3"] {
        let reference = train(model, 1, 2, &settings());
        let small = TrainerSettings { micro_batch_tokens: 30, ..settings() };
        assert_close(&train(model, 1, 2, &small), &reference, 1e-5, model);
    }
}

#[test]
fn a_reference_that_lives_for_several_steps_counts() {
    let long = TrainerSettings { reference_reset_steps: 3, ..settings() };
    let reference = train("qwen3", 1, 2, &long);
    assert_close(&train("qwen3", 2, 2, &long), &reference, 1e-5, "two ranks");
    let short = train("qwen3", 1, 2, &settings());
    assert!((&short - &reference).abs().max().double_value(&[]) > 1e-6, "the reset period changes nothing");
}

#[test]
fn the_first_update_equals_plain_sequences() {
    let batch = whole_batch(1, 1);
    let mut ours = trainer("qwen2-tied", settings());
    ours.settings_mut().optimizer.max_grad_norm = 0.0;
    let report = ours.train(&batch, &mut alone()).expect("trains");
    let reference = trainer("qwen2-tied", settings());
    let norm = plain::gradient_norm(&golden("qwen2-tied"), reference.parameters(), &batch, settings().temperature);
    let seen = report.metrics["grad_norm"];
    assert!((seen / norm - 1.0).abs() < 1e-4, "gradient norm {seen}, plain sequences say {norm}");
    assert!((report.metrics["loss"] - std::f64::consts::LN_2).abs() < 1e-9, "on policy every score is zero");
}

/// The same loss written out with autograd, one sequence at a time, nothing shared and nothing packed.
mod plain {
    use super::*;
    use pacs_model::attention::{Packed, PackedRow, packed_positions};
    use pacs_model::logprob::{Targets, head_backward};
    use pacs_model::{Keep, Model, ModelConfig, Parameters};

    /// Norm of the gradient of PACS (RLOO, question weights, beta 1) at old = new.
    pub(super) fn gradient_norm(folder: &Path, parameters: &Parameters, batch: &TrainBatch, temperature: f64) -> f64 {
        let config = ModelConfig::read(folder).expect("golden model");
        let model = Model::new(&config, parameters);
        let ratios = Tensor::zeros([batch.index.len() as i64], (Kind::Double, Device::Cpu)).set_requires_grad(true);
        let mut losses = Vec::new();
        for group in 0..GROUPS {
            let members: Vec<usize> = (0..batch.index.len()).filter(|i| batch.index[*i].group == group).collect();
            let positive = members.iter().filter(|i| batch.index[**i].label > 0.5).count();
            for i in &members {
                let others: Tensor = members.iter().filter(|j| *j != i).map(|j| ratios.get(*j as i64)).sum();
                let score = ratios.get(*i as i64) - others / (GROUP_SIZE as f64 - 1.0);
                let label = batch.index[*i].label;
                let same = if label > 0.5 { positive } else { GROUP_SIZE - positive };
                let mixed = positive != 0 && positive != GROUP_SIZE;
                let weight = if mixed { GROUP_SIZE as f64 / (2.0 * same as f64) } else { 1.0 };
                let sign = if label > 0.5 { 1.0 } else { -1.0 };
                losses.push((score * sign).log_sigmoid() * -weight);
            }
        }
        (Tensor::stack(&losses, 0).sum(Kind::Double) / losses.len() as f64).backward();
        let coefficients = Vec::<f64>::try_from(ratios.grad()).expect("a vector");
        let gradients = model.zero_gradients();
        for (sequence, coefficient) in batch.sequences.iter().zip(coefficients) {
            let prompt = &batch.prompts[&batch.index[sequence.position].group];
            add_gradient(&model, prompt, &sequence.tokens, coefficient as f32, temperature, &gradients);
        }
        gradients.square().sum(Kind::Double).sqrt().double_value(&[])
    }

    /// Adds the gradient of one answer's log-prob, times `coefficient`.
    fn add_gradient(
        model: &Model,
        prompt: &[u32],
        answer: &[u32],
        coefficient: f32,
        temperature: f64,
        gradients: &Tensor,
    ) {
        let tokens: Vec<i64> = prompt.iter().chain(answer).map(|token| i64::from(*token)).collect();
        let rows = [PackedRow { prompt_len: tokens.len(), answer_lens: Vec::new() }];
        let positions = Tensor::from_slice(&packed_positions(&rows));
        let trace = model.forward(&Tensor::from_slice(&tokens), &positions, Packed::new(&rows, model), Keep::All);
        let (start, length) = (prompt.len() as i64 - 1, answer.len() as i64);
        let coefficients = vec![coefficient; answer.len()];
        let targets = Targets { tokens: &tokens[prompt.len()..], coefficients: &coefficients, temperature };
        let head = head_backward(model, &trace.hidden().narrow(0, start, length), targets, 7, gradients);
        let by_hidden = trace.hidden().zeros_like();
        by_hidden.narrow(0, start, length).copy_(&head.by_hidden);
        model.backward(trace, &by_hidden, gradients);
    }
}

#[test]
fn a_restored_trainer_goes_on_bit_for_bit() {
    for kind in [Kind::Float, Kind::BFloat16] {
        restores_bit_for_bit(kind);
    }
}

fn restores_bit_for_bit(kind: Kind) {
    let long = TrainerSettings { reference_reset_steps: 2, ..settings() };
    let load = || Trainer::load(&golden("qwen3"), long.clone(), kind, Device::Cpu).expect("golden model");
    let mut collective = alone();
    let mut whole = load();
    let folder = tempfile::tempdir().expect("a temporary folder");
    for step in 1..=STEPS {
        whole.train(&whole_batch(step, 2), &mut collective).expect("trains");
        if step == 3 {
            let files = whole.save(folder.path(), true, None).expect("saves");
            assert_eq!(files.len(), 1);
        }
    }
    let mut resumed = load();
    resumed.restore(folder.path()).expect("restores");
    for step in 4..=STEPS {
        resumed.train(&whole_batch(step, 2), &mut collective).expect("trains");
    }
    assert!(whole.parameters().flat.equal(&resumed.parameters().flat), "the resumed {kind:?} weights differ");
}

#[test]
fn a_truncated_state_is_refused_by_name() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut trainer = trainer("qwen3", settings());
    trainer.save(folder.path(), true, None).expect("saves");
    let path = folder.path().join("training-state.safetensors");
    let bytes = std::fs::read(&path).expect("just written");
    std::fs::write(&path, &bytes[..bytes.len() / 2]).expect("writes");
    let error = trainer.restore(folder.path()).expect_err("half a file").to_string();
    assert!(error.contains("training-state.safetensors"), "{error}");
}

#[test]
fn a_gradient_that_is_not_finite_is_skipped_and_counted() {
    let mut trainer = trainer("qwen3", settings());
    let before = trainer.parameters().flat.copy();
    // A huge scale overflows the float32 gradient.
    trainer.settings_mut().objective.beta = 1e45;
    let report = trainer.train(&whole_batch(1, 1), &mut alone()).expect("trains");
    assert_eq!(report.skipped_updates, 1);
    assert!(trainer.parameters().flat.equal(&before), "a skipped update changed the weights");
}
