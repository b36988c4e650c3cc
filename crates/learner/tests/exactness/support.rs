//! A step whose tokens and labels are functions of their position, and ranks to train it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use pacs_algo::{Objective, PacsConfig, balance};
use pacs_collective::{Collective, GroupConfig, HostCollective, HostListener};
use pacs_learner::{IndexEntry, SequenceTokens, TrainBatch, Trainer, TrainerSettings};
use pacs_shape::{Division, Sharding};
use pacs_spec::{OldLogprobs, OptimizerSpec};
use pacs_torch::tch::{self, Device, Kind, Tensor};
use pacs_types::{Generation, mix};

pub(crate) const GROUPS: u64 = 6;
pub(crate) const GROUP_SIZE: usize = 4;

pub(crate) const PACS: PacsConfig = PacsConfig::paper();

pub(crate) fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models").join(name)
}

pub(crate) fn settings() -> TrainerSettings {
    TrainerSettings {
        objective: Objective::Pacs(PACS),
        reference_reset_steps: 1,
        reset_optimizer: false,
        critic_learning_rate: 2e-5,
        external: None,
        // Twenty times the paper's. Adam divides by the gradient's own magnitude, so rounding in a gradient near zero
        // becomes a difference proportional to the learning rate.
        optimizer: OptimizerSpec { learning_rate: 2e-5, ..OptimizerSpec::default() },
        temperature: 0.9,
        longest_sequence: 64,
        micro_batch_tokens: 100_000,
        updates: 100,
        old_logprobs: OldLogprobs::Learner,
        division: Division::alone(Sharding::Replicated),
        deterministic: false,
        memory_bytes: None,
        saves_in_background: false,
        peak_flops: None,
        lora: None,
        router_replay: false,
        probe: false,
    }
}

/// With this epsilon AdamW is gradient descent, which does not amplify rounding in gradients near zero.
pub(crate) fn descent() -> TrainerSettings {
    let optimizer = OptimizerSpec { learning_rate: 0.05, epsilon: 1.0, weight_decay: 0.0, ..OptimizerSpec::default() };
    TrainerSettings { optimizer, ..settings() }
}

/// A trainer for the calling thread, which computes alone: tests and their ranks run side by side, and a team of threads for each
/// operation of so small a model takes ten times as long.
pub(crate) fn trainer(folder: &Path, settings: TrainerSettings, kind: Kind) -> Trainer {
    tch::set_num_threads(1);
    Trainer::load(folder, settings, kind, Device::Cpu).expect("a model")
}

/// All sequences of a step: lengths, tokens and labels are functions of their position. Some groups have equal labels.
pub(crate) fn whole_batch(step: u64, mini_batches: usize) -> TrainBatch {
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
                rollout_logprobs: vec![-5.7; length as usize],
                // Some sequences look as if a sampling filter had cut something off.
                version: step - 1,
                sampled_logprobs: if member % 3 == 1 { vec![-5.5; length as usize] } else { Vec::new() },
                routes: Vec::new(),
            });
            index.push(IndexEntry {
                group,
                sample: member as u32,
                mini_batch: group as usize * mini_batches / GROUPS as usize,
                rank: 0,
                label,
                reward: label,
                answer_tokens: length as u32,
                truncated: length > 10,
                unit: None,
            });
        }
    }
    TrainBatch { step, index, prompts, prompt_routes: HashMap::new(), sequences }
}

/// One rank's share, dealt out sequence by sequence, so that groups are split between ranks.
pub(crate) fn share(mut batch: TrainBatch, rank: usize, ranks: usize) -> TrainBatch {
    let costs: Vec<u64> = batch.index.iter().map(|entry| u64::from(entry.answer_tokens)).collect();
    for (entry, rank) in batch.index.iter_mut().zip(balance(&costs, ranks)) {
        entry.rank = rank;
    }
    let index = &batch.index;
    batch.sequences.retain(|sequence| index[sequence.position].rank == rank);
    batch
}

/// One rank's share of a batch whose units hold parts of groups, dealt out unit by unit, so that prompts stand on several ranks.
pub(crate) fn units(mut batch: TrainBatch, step: u64, rank: usize, ranks: usize) -> TrainBatch {
    for (position, entry) in batch.index.iter_mut().enumerate() {
        let unit = position / 3;
        (entry.unit, entry.rank) = (Some(unit), (5 * unit + step as usize) % ranks);
    }
    let index = &batch.index;
    batch.sequences.retain(|sequence| index[sequence.position].rank == rank);
    batch
}

/// Runs every rank of a world on a thread of its own, and returns the results by rank.
pub(crate) fn on_ranks<T: Send>(ranks: usize, run: impl Fn(usize, &mut dyn Collective) -> T + Sync) -> Vec<T> {
    on_rings(ranks, |rank, mut ring| run(rank, &mut ring))
}

/// As [`on_ranks`], with each rank owning its ring.
pub(crate) fn on_rings<T: Send>(ranks: usize, run: impl Fn(usize, HostCollective) -> T + Sync) -> Vec<T> {
    let listeners: Vec<_> =
        (0..ranks).map(|_| Arc::new(HostListener::bind("127.0.0.1:0").expect("a free port"))).collect();
    let addresses: Vec<String> = listeners.iter().map(|listener| listener.address().to_string()).collect();
    let rank = |(rank, listener): (usize, Arc<HostListener>)| {
        let (addresses, timeout) = (addresses.clone(), Duration::from_secs(60));
        let config = GroupConfig { job: "test".into(), generation: Generation(1), rank, addresses, timeout };
        run(rank, HostCollective::connect(&listener, config).expect("all ranks are there"))
    };
    std::thread::scope(|scope| {
        let rank = &rank;
        let threads: Vec<_> =
            listeners.into_iter().enumerate().map(|member| scope.spawn(move || rank(member))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no rank panics")).collect()
    })
}

/// A copy of all weights.
pub(crate) fn weights(trainer: &mut Trainer, collective: &mut dyn Collective) -> Tensor {
    trainer.weights(collective, true).expect("all ranks are there").expect("they are wanted").flat.copy()
}

pub(crate) fn assert_close(a: &Tensor, b: &Tensor, tolerance: f64, what: &str) {
    let difference = (a.to_kind(Kind::Float) - b.to_kind(Kind::Float)).abs().max().double_value(&[]);
    assert!(difference <= tolerance, "{what}: weights differ by {difference}");
}
