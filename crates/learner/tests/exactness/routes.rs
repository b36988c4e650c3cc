//! Router replay: the recorded experts compute a token on every rank, in every pass, and each time that it is computed.

use std::collections::BTreeMap;

use pacs_algo::{KlKind, KlPenalty, KlPlace, Objective, PolicyConfig, grpo, ppo};
use pacs_collective::HostCollective;
use pacs_learner::{TrainBatch, TrainerSettings};
use pacs_model::attention::{Packed, PackedRow, packed_positions};
use pacs_model::{Model, ModelConfig, NoHooks, Parameters, RouteLog, RouteShape, Routing};
use pacs_shape::{Division, Sharding};
use pacs_torch::tch::{self, Device, Kind, Tensor, no_grad};
use pacs_types::mix;

use crate::support::{assert_close, descent, golden, on_ranks, share, trainer, units, weights, whole_batch};

const MODEL: &str = "qwen3_moe";
const STEPS: u64 = 2;
const MINI_BATCHES: usize = 2;

fn config() -> ModelConfig {
    ModelConfig::read(&golden(MODEL)).expect("a golden model")
}

fn shape() -> RouteShape {
    RouteShape::of(&config()).expect("a mixture of experts")
}

fn replaying(settings: TrainerSettings) -> TrainerSettings {
    TrainerSettings { router_replay: true, ..settings }
}

/// Two of eight experts for each token and layer, chosen without a router.
fn made_up(key: u64, tokens: usize) -> Vec<u8> {
    let (shape, mut bytes) = (shape(), Vec::new());
    for token in 0..tokens as u64 {
        for layer in 0..shape.mixtures() as u64 {
            let number = mix(mix(key) ^ mix(token << 8 | layer));
            let (first, further) = (number % 8, 1 + number / 8 % 7);
            shape.write(&[first, (first + further) % 8].map(|expert| expert as i64), &mut bytes);
        }
    }
    bytes
}

/// A step whose routes are made up.
fn routed(step: u64) -> TrainBatch {
    let mut batch = whole_batch(step, MINI_BATCHES);
    for (group, tokens) in &batch.prompts {
        batch.prompt_routes.insert(*group, made_up(step << 32 | *group, tokens.len()));
    }
    for sequence in &mut batch.sequences {
        sequence.routes = made_up(step << 40 | sequence.position as u64, sequence.tokens.len() - 1);
    }
    batch
}

/// A step of one update with the routes that the golden model chooses for one sequence at a time.
fn with_own_routes() -> TrainBatch {
    let (config, shape) = (config(), shape());
    let parameters = Parameters::load(&golden(MODEL), &config, Kind::Float, Device::Cpu).expect("a golden model");
    let model = Model::new(&config, &parameters);
    let mut batch = whole_batch(1, 1);
    for sequence in &mut batch.sequences {
        let group = batch.index[sequence.position].group;
        let prompt = &batch.prompts[&group];
        let inputs = prompt.iter().chain(&sequence.tokens[..sequence.tokens.len() - 1]);
        let tokens = Tensor::from_slice(&inputs.map(|token| i64::from(*token)).collect::<Vec<_>>());
        let rows = [PackedRow { prompt_len: tokens.numel(), answer_lens: Vec::new() }];
        let (positions, mut log) = (Tensor::from_slice(&packed_positions(&rows)), RouteLog::new(shape));
        let (mut attention, mut routing) = (Packed::new(&rows, &model), Routing::Record(&mut log));
        let Ok(_) =
            no_grad(|| model.hidden_with_hooks(&tokens, &positions, &mut attention, &mut routing, &mut NoHooks));
        let mut of_prompt = Vec::new();
        log.append(0..prompt.len(), &mut of_prompt);
        batch.prompt_routes.entry(group).or_insert(of_prompt);
        log.append(prompt.len()..tokens.numel(), &mut sequence.routes);
    }
    batch
}

/// Weights and metrics after [`STEPS`] steps of made-up routes. Checks that all ranks agree on both.
fn train(ranks: usize, settings: &TrainerSettings) -> (Tensor, f64) {
    let trained = on_ranks(ranks, |rank, collective| {
        let division = Division { rank, ranks, ..settings.division };
        let mut trainer = trainer(&golden(MODEL), TrainerSettings { division, ..settings.clone() }, Kind::Float);
        let mut mismatch = f64::NAN;
        for step in 1..=STEPS {
            let batch = match settings.deterministic {
                false => share(routed(step), rank, ranks),
                true => units(routed(step), step, rank, ranks),
            };
            let metrics = trainer.train(&batch, collective).expect("trains").metrics;
            mismatch = metrics.get("router_mismatch").copied().unwrap_or(f64::NAN);
        }
        (weights(&mut trainer, collective), mismatch)
    });
    let (first, mismatch) = &trained[0];
    for (weights, other) in &trained {
        assert!(weights.equal(first), "the ranks hold different weights");
        assert_eq!(other.to_bits(), mismatch.to_bits(), "the ranks report different metrics");
    }
    (first.shallow_clone(), *mismatch)
}

/// Objectives with one forward of each answer, with several, and with a reference that is never reset.
fn cases() -> [(&'static str, TrainerSettings); 3] {
    let kl = Some(KlPenalty { coefficient: 0.1, kind: KlKind::K3, place: KlPlace::Loss });
    let penalised = Objective::Policy(PolicyConfig { kl, ..grpo() });
    let valued = Objective::Policy(ppo());
    [
        ("pacs", replaying(descent())),
        ("a penalty", replaying(TrainerSettings { objective: penalised, reference_reset_steps: 0, ..descent() })),
        ("values", replaying(TrainerSettings { objective: valued, critic_learning_rate: 0.05, ..descent() })),
    ]
}

#[test]
fn every_division_and_pass_replays_the_same_routes() {
    for (name, settings) in cases() {
        let (reference, mismatch) = train(1, &settings);
        // Made-up pairs are seldom the most probable one of 28.
        assert!((0.8..=1.0).contains(&mismatch), "{name}: {mismatch}");
        let (own, none) = train(1, &TrainerSettings { router_replay: false, ..settings.clone() });
        assert!((&own - &reference).abs().max().double_value(&[]) > 5e-5, "{name}: routes change nothing");
        assert!(none.is_nan(), "{name}: nothing is replayed, and nothing is said");
        for (ranks, sharding, micro_batch_tokens, memory_bytes) in [
            (1, Sharding::Replicated, 40, Some(0)),
            (2, Sharding::ShardOptimizer, 1, None),
            (3, Sharding::Replicated, 100_000, Some(0)),
            (4, Sharding::ShardAll, 40, Some(0)),
        ] {
            // A value model starts from whole weights.
            let sharding = if name == "values" { Sharding::ShardOptimizer } else { sharding };
            let division = Division::alone(sharding);
            let settings = TrainerSettings { division, micro_batch_tokens, memory_bytes, ..settings.clone() };
            let what = format!("{name}, {ranks} ranks, {sharding:?}, {micro_batch_tokens} tokens, {memory_bytes:?}");
            assert_close(&train(ranks, &settings).0, &reference, 1e-5, &what);
        }
    }
}

#[test]
fn a_deterministic_update_has_the_same_bits_with_replayed_routes() {
    for (name, settings) in cases() {
        let settings = TrainerSettings { deterministic: true, ..settings };
        let (reference, mismatch) = train(1, &settings);
        assert!(mismatch > 0.8, "{name}: {mismatch}");
        for (ranks, micro_batch_tokens, memory_bytes) in [(1, 1, Some(0)), (2, 100_000, None), (3, 60, Some(0))] {
            let settings = TrainerSettings { micro_batch_tokens, memory_bytes, ..settings.clone() };
            assert!(train(ranks, &settings).0.equal(&reference), "{name}, {ranks} ranks, {micro_batch_tokens} tokens");
        }
    }
}

/// One step on one rank, without its weights where it is refused.
fn step(batch: &TrainBatch, settings: TrainerSettings) -> Result<(Tensor, BTreeMap<String, f64>), String> {
    let mut lone = HostCollective::alone();
    let mut trainer = trainer(&golden(MODEL), settings, Kind::Float);
    let report = trainer.train(batch, &mut lone).map_err(|error| error.to_string())?;
    Ok((weights(&mut trainer, &mut lone), report.metrics))
}

#[test]
fn routes_that_the_learner_would_choose_itself_change_no_bit() {
    tch::set_num_threads(1);
    let mut batch = with_own_routes();
    for deterministic in [false, true] {
        if deterministic {
            batch.cut_into_units();
        }
        for (name, settings) in cases() {
            let settings = TrainerSettings { deterministic, ..settings };
            let (replayed, metrics) = step(&batch, settings.clone()).expect("trains");
            let (own, _) = step(&batch, TrainerSettings { router_replay: false, ..settings }).expect("trains");
            assert_eq!(metrics["router_mismatch"], 0.0, "{name}, deterministic: {deterministic}");
            assert!(replayed.equal(&own), "{name}, deterministic: {deterministic}");
        }
    }
}

#[test]
fn routes_that_are_missing_or_name_no_expert_are_refused() {
    let settings = || replaying(descent());
    let refused = |change: fn(&mut TrainBatch)| {
        let mut batch = routed(1);
        change(&mut batch);
        step(&batch, settings()).expect_err("must be refused")
    };
    assert!(step(&routed(1), settings()).is_ok());
    let missing = step(&whole_batch(1, 1), settings()).expect_err("has no routes");
    assert!(missing.starts_with("batch of step 1: the routes of the prompt of group"), "{missing}");
    assert!(missing.contains("take 0 bytes"), "{missing}");
    let beyond = refused(|batch| *batch.prompt_routes.get_mut(&3).and_then(|routes| routes.last_mut()).unwrap() = 8);
    assert_eq!(beyond, "batch of step 1: the routes of the prompt of group 3 name expert 8, and a layer has 8");
    let place = |batch: &TrainBatch| batch.sequences.iter().position(|sequence| sequence.tokens.len() > 1).unwrap();
    let outside = refused(|batch| {
        let sequence = batch.sequences.iter_mut().find(|sequence| sequence.tokens.len() > 1).unwrap();
        sequence.routes[0] = 255;
    });
    let position = place(&routed(1));
    assert_eq!(
        outside,
        format!("batch of step 1: the routes of sequence {position} name expert 255, and a layer has 8")
    );
    let short = refused(|batch| {
        let sequence = batch.sequences.iter_mut().find(|sequence| sequence.tokens.len() > 1).unwrap();
        sequence.routes.pop();
    });
    assert!(short.contains(&format!("the routes of sequence {position} take ")), "{short}");
}
