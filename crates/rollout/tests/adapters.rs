//! Versions that are adapters: merged into the engine's weights from an untouched base, and refused where they do not belong.

use std::path::{Path, PathBuf};

use pacs_model::{Lora, Model, ModelConfig, Parameters, score};
use pacs_rollout::{Base, Engine, EngineOptions, Finished, GroupJob, MappedWeights, SamplingOptions, WeightsError};
use pacs_spec::Kernels;
use pacs_torch::bytes;
use pacs_torch::tch::{Device, Kind, Tensor};
use pacs_types::{GroupId, NoiseKey, SampleId, WeightVersion};
use pacs_weights::{Adapted, Fetched, HostStore, Received, Transport, VersionId, WeightKind};

const NAME: &str = "qwen2-tied";

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models").join(name)
}

fn lora(rank: i64) -> Lora {
    Lora { rank, alpha: 8.0, rslora: false, targets: Vec::new() }
}

/// The model's configuration without end tokens, and that of adapters.
fn configs(rank: i64) -> (ModelConfig, ModelConfig) {
    pacs_torch::tch::set_num_threads(1);
    let mut config = ModelConfig::read(&golden(NAME)).expect("golden model");
    config.end_tokens.clear();
    let adapted = config.with_lora(&lora(rank)).expect("small");
    (config, adapted)
}

fn model(config: &ModelConfig, kind: Kind) -> Parameters {
    Parameters::load(&golden(NAME), config, kind, Device::Cpu).expect("golden model")
}

fn adapters(config: &ModelConfig, kind: Kind, seed: u64) -> Parameters {
    let zeros = Parameters::zeros(config, Kind::Float, Device::Cpu);
    // A function of the seed alone: tests run side by side and share libtorch's generator.
    let places = Tensor::arange(zeros.flat.numel() as i64, (Kind::Float, Device::Cpu));
    let flat = (places * (seed as f64 + 0.7)).sin() * 0.1;
    Parameters { layout: zeros.layout, flat: flat.to_kind(kind) }
}

fn weight_kind(kind: Kind) -> WeightKind {
    if kind == Kind::Float { WeightKind::Float32 } else { WeightKind::Bfloat16 }
}

/// Publishes as a learner with this base does.
fn published(content: &[u8], kind: Kind, adapted: Option<&Adapted>, version: u64) -> Received {
    let place = tempfile::tempdir().expect("a temporary folder");
    let store = HostStore::open_in("run", &[place.path().to_owned()]).expect("a store");
    let id = VersionId::new(1, version);
    let whole = match adapted {
        Some(adapted) => store.publish_adapters(id, weight_kind(kind), adapted, content),
        None => store.publish(id, weight_kind(kind), content),
    };
    Received { whole: whole.expect("room"), transport: Transport::Shared, fetched: Fetched::default() }
}

/// What a learner publishes: adapters of `config` over `base`.
fn version(config: &ModelConfig, base: &Parameters, adapters: &Parameters, version: u64) -> Received {
    let (kind, settings) = (base.flat.kind(), config.lora.as_ref().expect("adapters").to_string());
    let adapted = Adapted::of(weight_kind(kind), bytes(&base.flat).expect("host"), settings);
    published(bytes(&adapters.flat).expect("host"), kind, Some(&adapted), version)
}

fn base(config: &ModelConfig, parameters: Parameters) -> Base {
    Base::new(config, parameters, NAME).expect("host memory")
}

fn engine(config: &ModelConfig, parameters: Parameters) -> Engine {
    let options =
        EngineOptions { rows: 4, prefill_tokens: 64, cache_tokens: 4000, kernels: Kernels::Auto, cuda_graphs: false };
    Engine::new(config.clone(), parameters, WeightVersion(0), None, options).expect("there is room")
}

fn generate(engine: &mut Engine, ticket: u64) -> Finished {
    let options =
        SamplingOptions { temperature: 1.0, top_p: 1.0, top_k: 0, min_p: 0.0, max_new_tokens: 24, stop: Vec::new() };
    let key = NoiseKey::new(1, 0, SampleId { group: GroupId(1), index: 0 });
    let (prompt, samples) = (vec![5, 6, 7, 8], vec![(0, key)]);
    engine.submit(GroupJob { ticket, prompt, samples, options, records_routes: false }).expect("fits");
    let mut finished = Vec::new();
    while finished.is_empty() {
        finished.extend(engine.step().expect("generates"));
    }
    finished.remove(0)
}

/// The largest difference between the engine's log-probs and those of a model that does not merge, as a learner's.
fn mismatch(model: &Model, finished: &Finished) -> f32 {
    let item = (vec![5, 6, 7, 8], finished.sample.tokens.clone());
    let scores = score(model, vec![item], 1.0, 1000).expect("scores").remove(0);
    scores.iter().zip(&finished.sample.logprobs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn the_engine_generates_as_the_learner_scores_in_every_version() {
    for (kind, tolerance) in [(Kind::Float, 1e-4), (Kind::BFloat16, 0.3)] {
        let (config, adapted) = configs(4);
        let whole = model(&config, kind);
        let mut engine = engine(&config, model(&config, kind));
        let mut samples = Vec::new();
        for number in 1..=3 {
            let trained = adapters(&adapted, kind, number);
            let received = version(&adapted, &whole, &trained, number);
            let mapped = MappedWeights::map_adapters(&received, base(&adapted, model(&config, kind))).expect("its own");
            assert!(mapped.replace(&mut engine).expect("merges").is_none());
            let finished = generate(&mut engine, number);
            assert_eq!(finished.sample.version.0, number);
            let apart = mismatch(&Model::adapted(&adapted, &whole, &trained), &finished);
            let without = mismatch(&Model::new(&config, &whole), &finished);
            assert!(
                apart < tolerance && without > 2.0 * apart,
                "{kind:?}, version {number}: {apart}, {without} without"
            );
            samples.push(finished.sample.tokens);
        }
        // Back to the first adapters: the same bits as when they came first.
        let received = version(&adapted, &whole, &adapters(&adapted, kind, 1), 4);
        let mapped = MappedWeights::map_adapters(&received, base(&adapted, model(&config, kind))).expect("its own");
        mapped.replace(&mut engine).expect("merges");
        assert_eq!(generate(&mut engine, 4).sample.tokens, samples[0]);
    }
}

#[test]
fn what_does_not_belong_to_this_base_is_refused_by_name() {
    let (config, adapted) = configs(4);
    let whole = model(&config, Kind::Float);
    let trained = adapters(&adapted, Kind::Float, 1);
    let own = || base(&adapted, model(&config, Kind::Float));
    let refused = |received: &Received| MappedWeights::map_adapters(received, own()).expect_err("refused");

    let other = Parameters { layout: whole.layout.clone(), flat: &whole.flat + 1e-6 };
    let error = refused(&version(&adapted, &other, &trained, 1));
    assert!(matches!(error, WeightsError::OtherBase { .. }), "{error}");
    assert!(error.to_string().contains("qwen2-tied"), "{error}");

    let (_, wider) = configs(8);
    let error = refused(&version(&wider, &whole, &adapters(&wider, Kind::Float, 1), 1));
    assert!(matches!(error, WeightsError::OtherAdapters { .. }), "{error}");
    assert!(error.to_string().contains("rank 8") && error.to_string().contains("rank 4"), "{error}");

    let settings = adapted.lora.as_ref().expect("adapters").to_string();
    let adapted_of = Adapted::of(WeightKind::Float32, bytes(&whole.flat).expect("host"), settings);
    let content = bytes(&trained.flat).expect("host");
    let half = published(&content[..content.len() / 2], Kind::Float, Some(&adapted_of), 1);
    let error = refused(&half);
    assert!(matches!(error, WeightsError::OtherModel { .. }), "{error}");

    let error = refused(&published(bytes(&whole.flat).expect("host"), Kind::Float, None, 1));
    assert!(error.to_string().contains("a whole model was published"), "{error}");
    let error = MappedWeights::map(&version(&adapted, &whole, &trained, 1), &config).expect_err("adapters");
    assert!(matches!(error, WeightsError::OtherContent { .. }), "{error}");
}

#[test]
fn the_base_is_read_and_never_written() {
    let (config, adapted) = configs(4);
    let whole = model(&config, Kind::Float);
    let shared = Parameters { layout: whole.layout.clone(), flat: whole.flat.shallow_clone() };
    let before: Tensor = whole.flat.copy();
    let received = version(&adapted, &whole, &adapters(&adapted, Kind::Float, 2), 1);
    let mapped = MappedWeights::map_adapters(&received, base(&adapted, shared)).expect("its own");
    let mut engine = engine(&config, model(&config, Kind::Float));
    mapped.replace(&mut engine).expect("merges");
    assert!(before.equal(&whole.flat) && !engine.parameters_mut(WeightVersion(2)).flat.equal(&whole.flat));
}
