//! Router replay from end to end: the engine's samples, as messages carry them, are trained on by the experts that computed them.

mod support;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use pacs_collective::HostCollective;
use pacs_learner::{IndexEntry, SequenceTokens, TrainBatch, Trainer, TrainerSettings};
use pacs_model::{ModelConfig, Parameters, RouteShape};
use pacs_protocol::v1;
use pacs_rollout::{Engine, EngineOptions, GroupJob, SamplingOptions};
use pacs_spec::Kernels;
use pacs_text::Tokenizer;
use pacs_torch::tch::{self, Device, Kind, Tensor};
use pacs_types::{FinishReason, GroupId, NoiseKey, Sample, SampleId, WeightVersion};
use support::{golden, text};

const PROMPTS: [&[u32]; 3] = [&[5, 17, 200, 41, 8], &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], &[77, 12, 140]];
const SAMPLES: u32 = 4;

/// A batch of the groups of [`PROMPTS`], as the engine generates them and the wire carries them.
fn generated() -> TrainBatch {
    let folder = golden("qwen3_moe");
    let config = ModelConfig::read(&folder).expect("a golden model");
    let parameters = Parameters::load(&folder, &config, Kind::Float, Device::Cpu).expect("a golden model");
    let tokenizer = Arc::new(Tokenizer::read(&folder).expect("a golden tokenizer"));
    let options =
        EngineOptions { rows: 5, prefill_tokens: 8, cache_tokens: 4_000, kernels: Kernels::Auto, cuda_graphs: false };
    let mut engine =
        Engine::new(config.clone(), parameters, WeightVersion(0), Some(tokenizer), options).expect("there is room");
    for (ticket, prompt) in (0..).zip(PROMPTS) {
        let key = |index| (index, NoiseKey::new(1, 0, SampleId { group: GroupId(ticket), index }));
        let options = SamplingOptions {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            max_new_tokens: 12,
            stop: Vec::new(),
        };
        let samples = (0..SAMPLES).map(key).collect();
        engine
            .submit(GroupJob { ticket, prompt: prompt.to_vec(), samples, options, records_routes: true })
            .expect("it fits");
    }
    let mut finished = Vec::new();
    while !engine.is_idle() {
        finished.extend(engine.step().expect("generates"));
    }
    finished.sort_by_key(|finished| (finished.ticket, finished.index));

    let token_bytes = RouteShape::of(&config).expect("a mixture of experts").token_bytes();
    let mut batch = TrainBatch {
        step: 1,
        index: Vec::new(),
        prompts: (0..).zip(PROMPTS.map(<[u32]>::to_vec)).collect(),
        prompt_routes: HashMap::new(),
        sequences: Vec::new(),
    };
    for finished in finished {
        let sample = Sample::try_from(v1::Sample::from(finished.sample)).expect("well-formed");
        let Sample { tokens, logprobs, mut routes, finish, version, .. } = sample;
        let of_answer = routes.split_off(token_bytes * PROMPTS[finished.ticket as usize].len());
        batch.prompt_routes.entry(finished.ticket).or_insert(routes);
        batch.index.push(IndexEntry {
            group: finished.ticket,
            sample: finished.index,
            mini_batch: 0,
            rank: 0,
            label: f64::from(finished.index % 2),
            reward: f64::from(finished.index % 2),
            answer_tokens: tokens.len() as u32,
            truncated: finish == FinishReason::Length,
            unit: None,
        });
        batch.sequences.push(SequenceTokens {
            position: batch.sequences.len(),
            tokens,
            rollout_logprobs: logprobs,
            sampled_logprobs: Vec::new(),
            version: version.0,
            routes: of_answer,
        });
    }
    assert_eq!(batch.sequences.len(), PROMPTS.len() * SAMPLES as usize);
    batch
}

/// Weights and metrics after a step.
fn train(batch: &TrainBatch, replays: bool) -> (Tensor, BTreeMap<String, f64>) {
    let job = format!(
        "name = 'routes'\n[model]\npath = {:?}\nprecision = 'float32'\n[data.train]\npath = 'unread.jsonl'\n[evaluation]\n\
         before = false\nafter = false\nevery_steps = 0\n[rollout]\nmax_new_tokens = 12\nsamples_per_prompt = {SAMPLES}\n\
         router_replay = {replays}\n[batch]\nprompts_per_step = 3\nmini_batches = 1\n[optimizer]\nlearning_rate = 0.05\n\
         epsilon = 1.0\nweight_decay = 0.0\n",
        text(&golden("qwen3_moe"))
    );
    let spec = pacs_spec::parse(&job, Path::new("routes.toml")).unwrap_or_else(|errors| panic!("{errors}"));
    let mut collective = HostCollective::alone();
    let settings = TrainerSettings::new(&spec, 0, 1);
    let mut trainer = Trainer::load(&spec.model.path, settings, Kind::Float, Device::Cpu).expect("a golden model");
    let metrics = trainer.train(batch, &mut collective).expect("trains").metrics;
    let weights = trainer.weights(&mut collective, true).expect("it is alone").expect("they are wanted");
    (weights.flat.copy(), metrics)
}

#[test]
fn a_learner_replays_what_the_engine_has_recorded() {
    // Operations of so small a model are slower on several threads, and the bits of both trainings are compared.
    tch::set_num_threads(1);
    let mut batch = generated();
    let (replayed, metrics) = train(&batch, true);
    assert_eq!(metrics["router_mismatch"], 0.0, "float32 on one processor");
    assert!(metrics["logprob_mismatch_max"] < 1e-4, "{metrics:?}");
    let (own, without) = train(&batch, false);
    assert!(replayed.equal(&own), "the learner's own experts are the same ones");
    assert!(!without.contains_key("router_mismatch"), "{without:?}");

    // Had the engine chosen others, the learner would compute with those.
    let routes =
        batch.sequences.iter_mut().map(|sequence| &mut sequence.routes).chain(batch.prompt_routes.values_mut());
    routes.flatten().for_each(|expert| *expert = (*expert + 1) % 8);
    let (others, metrics) = train(&batch, true);
    assert!(metrics["router_mismatch"] > 0.5, "{metrics:?}");
    assert!(metrics["logprob_mismatch_mean"] > 1e-3, "{metrics:?}");
    assert!(!others.equal(&own));
}
