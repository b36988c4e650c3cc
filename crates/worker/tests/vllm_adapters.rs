//! Versions of adapters as vLLM servers are given them: the folder holds the model that a learner exports with its adapters merged in.

use std::fs;
use std::path::{Path, PathBuf};

use pacs_engine::RolloutEngine;
use pacs_model::{Export, Lora, ModelConfig, Parameters};
use pacs_spec::JobSpec;
use pacs_torch::bytes;
use pacs_torch::tch::{Device, Kind, Tensor};
use pacs_vllm::{VllmEngine, VllmOptions};
use pacs_weights::{Adapted, Fetched, HostStore, Received, Transport, VersionId, WeightKind};
use safetensors::{Dtype, SafeTensors};

/// Dense, fused projections, norms around each block, a mixture of experts, and several weight files.
const MODELS: [&str; 5] = ["qwen2-tied", "phi3", "gemma3", "qwen3_moe", "qwen2-untied"];
/// Share of bfloat16 weights that may be a step apart: float32 sums differ by about 2^-24 of their size, a step of bfloat16 is 2^-8 of it.
const MOST_STEPS: f64 = 1e-3;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models").join(name)
}

fn lora() -> Lora {
    Lora { rank: 5, alpha: 8.0, rslora: true, targets: Vec::new() }
}

fn job(model: &Path, weights: &Path) -> JobSpec {
    let text = format!(
        "name = 'a'\nmodel.path = {:?}\nmodel.lora = {{ rank = 5, alpha = 8.0, rslora = true }}\ndata.train.path = 't.jsonl'\n\
         data.evaluation.path = 'e.jsonl'\nrollout.engine = 'vllm'\nrollout.vllm.endpoints = ['http://127.0.0.1:9']\n\
         rollout.vllm.weights_dir = {:?}\n",
        model.display().to_string(),
        weights.display().to_string(),
    );
    pacs_spec::parse(&text, Path::new("a.toml")).unwrap_or_else(|errors| panic!("{errors}"))
}

/// Adapters that differ everywhere, in the kind in which they are published.
fn adapters(config: &ModelConfig, kind: Kind) -> Parameters {
    let zeros = Parameters::zeros(config, Kind::Float, Device::Cpu);
    let places = Tensor::arange(zeros.flat.numel() as i64, (Kind::Float, Device::Cpu));
    Parameters { layout: zeros.layout, flat: ((places * 0.7).sin() * 0.1).to_kind(kind) }
}

fn numbers(dtype: Dtype, data: &[u8]) -> Vec<f32> {
    match dtype {
        Dtype::F32 => data.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
        Dtype::BF16 => {
            data.as_chunks::<2>().0.iter().map(|[low, high]| f32::from_le_bytes([0, 0, *low, *high])).collect()
        }
        other => panic!("weights of {other:?}"),
    }
}

#[tokio::test]
async fn servers_are_given_the_model_that_a_learner_exports() {
    pacs_torch::tch::set_num_threads(1);
    for name in MODELS {
        for (kind, of) in [(Kind::Float, WeightKind::Float32), (Kind::BFloat16, WeightKind::Bfloat16)] {
            let place = tempfile::tempdir().expect("a folder");
            let model = golden(name);
            let config = ModelConfig::read(&model).expect("a golden model");
            let adapted = config.with_lora(&lora()).expect("small");
            let base = Parameters::load(&model, &config, kind, Device::Cpu).expect("a golden model");
            let adapters = adapters(&adapted, kind);

            let export = Export::new(&model, None, &serde_json::Map::new()).expect("a folder");
            let exported = place.path().join("exported");
            adapters.export_merged(&adapted, &base, &export, &exported).expect("written");

            let store_dir = place.path().join("store");
            fs::create_dir(&store_dir).expect("room");
            let store = HostStore::open_in("run", &[store_dir]).expect("a store");
            let settings = adapted.lora.as_ref().expect("adapters").to_string();
            let belongs = Adapted::of(of, bytes(&base.flat).expect("host memory"), settings);
            let content = bytes(&adapters.flat).expect("host memory");
            let whole = store.publish_adapters(VersionId::new(1, 3), of, &belongs, content).expect("room");
            let received = Received { whole, transport: Transport::Shared, fetched: Fetched::default() };
            let weights = place.path().join("weights");
            let spec = job(&model, &weights);
            let engine = VllmEngine::start(&spec, &"0".repeat(32), "rollout-0", &VllmOptions::default());
            let (attached, _outputs) = engine.as_ref().expect("an engine").attach();
            // The folder is there as long as this.
            let _prepared = attached.prepare(&received, None).unwrap_or_else(|problem| panic!("{name}: {problem:?}"));

            let mut folders =
                fs::read_dir(weights.join(format!("pacs-vllm-{}-rollout-0", "0".repeat(16)))).expect("a folder");
            let given = folders.next().expect("a version").expect("an entry").path();
            assert!(given.join("config.json").exists());
            compare(&format!("{name}, {kind:?}"), &given, &exported);
        }
    }
}

/// Compares the weights of two folders: equal to the bit where no adapter is, and next to it elsewhere.
fn compare(what: &str, given: &Path, exported: &Path) {
    let [given, exported] =
        [given, exported].map(|folder| fs::read(folder.join("model.safetensors")).expect("weights"));
    let [given, exported] = [&given, &exported].map(|bytes| SafeTensors::deserialize(bytes).expect("safetensors"));
    assert_eq!(given.len(), exported.len(), "{what}");
    let (mut weights, mut steps) = (0, 0);
    for (name, expected) in exported.tensors() {
        let found = given.tensor(&name).unwrap_or_else(|error| panic!("{what}, {name}: {error}"));
        assert_eq!((found.dtype(), found.shape()), (expected.dtype(), expected.shape()), "{what}, {name}");
        let dtype = found.dtype();
        let (found, expected) = (numbers(dtype, found.data()), numbers(dtype, expected.data()));
        for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
            weights += 1;
            let apart = (found - expected).abs();
            // The last bits of a sum, or a step of bfloat16.
            let most = expected.abs().max(0.1) * if dtype == Dtype::F32 { 1e-6 } else { 1.0 / 128.0 };
            assert!(apart <= most, "{what}, {name} at {index}: {found} and {expected}");
            steps += usize::from(dtype == Dtype::BF16 && apart > 0.0);
        }
    }
    let share = steps as f64 / weights as f64;
    println!("{what}: {steps} of {weights} weights are a step apart");
    assert!(share <= MOST_STEPS, "{what}: {share} of the weights are a step apart");
}
