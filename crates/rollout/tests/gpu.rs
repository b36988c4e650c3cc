//! Generation on a GPU, against the plain forward in host memory. In a file of its own, since libtorch is asked for CUDA before
//! anything else.

#[path = "../../../tests/golden/models.rs"]
mod golden_models;

use pacs_model::{Model, ModelConfig, Parameters, score};
use pacs_rollout::{Engine, EngineOptions, GroupJob, SamplingOptions};
use pacs_spec::Kernels;
use pacs_torch::tch::{Device, Kind};
use pacs_types::{GroupId, NoiseKey, SampleId, WeightVersion};

/// Samples of groups of every size; returns how many passes were recorded.
fn check(name: &str, device: Device, cuda_graphs: bool) -> usize {
    let folder = golden_models::folder().join(name);
    let mut config = ModelConfig::read(&folder).expect("golden model");
    config.end_tokens.clear();
    let parameters = |device| Parameters::load(&folder, &config, Kind::Float, device).expect("golden model");
    let options =
        EngineOptions { rows: 40, prefill_tokens: 24, cache_tokens: 2_000, kernels: Kernels::Auto, cuda_graphs };
    let mut engine =
        Engine::new(config.clone(), parameters(device), WeightVersion(0), None, options).expect("there is room");
    let fits = device != Device::Cpu && config.beyond_gpu_kernels().is_none();
    assert_eq!(engine.has_device_kernels(), fits, "the kernels were not loaded; the log says why");
    let token = |number: u64| (pacs_types::mix(number) % config.vocab_size as u64) as u32;
    let prompts: Vec<Vec<u32>> =
        (0..7u64).map(|group| (0..=9 * group).map(|i| token(group << 8 | i)).collect()).collect();
    for (ticket, prompt) in (0..).zip(&prompts) {
        let key = |index| (index, NoiseKey::new(3, 0, SampleId { group: GroupId(ticket), index }));
        let options = SamplingOptions {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            max_new_tokens: 20 + 10 * ticket as u32,
            stop: Vec::new(),
        };
        let samples = (0..=2 * ticket as u32).map(key).collect();
        let prompt = prompt.clone();
        engine.submit(GroupJob { ticket, prompt, samples, options, records_routes: false }).expect("fits");
    }
    let mut finished = Vec::new();
    while !engine.is_idle() {
        finished.extend(engine.step().expect("generates"));
    }
    assert_eq!(finished.len(), 49);
    let host = parameters(Device::Cpu);
    let items = finished.iter().map(|f| (prompts[f.ticket as usize].clone(), f.sample.tokens.clone())).collect();
    let scores = score(&Model::new(&config, &host), items, 1.0, 1024).expect("scores");
    for (found, expected) in finished.iter().zip(&scores) {
        let far = found.sample.logprobs.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(far < 1e-3, "{name}: a log-prob of group {} is off by {far}", found.ticket);
    }
    let records = fits && cuda_graphs && config.beyond_graphs().is_none();
    assert!(engine.recorded_passes() > 0 || !records, "no pass was recorded; the log says why");
    engine.recorded_passes()
}

#[test]
fn log_probs_are_those_of_a_plain_forward() {
    let gpu = pacs_torch::init(true, 1);
    for name in &golden_models::names() {
        assert_eq!(check(name, Device::Cpu, true), 0, "a processor has no graphs");
        match &gpu {
            Ok(gpu) => {
                assert_eq!(check(name, *gpu, false), 0);
                check(name, *gpu, true);
            }
            Err(error) => eprintln!("skipped on a GPU: {error}"),
        }
    }
}
