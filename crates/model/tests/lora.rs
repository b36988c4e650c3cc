//! Adapters against PEFT, on the fixtures of `tests/golden/lora`: log-probs, gradients, folders in and out, and merging.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use pacs_model::attention::{Packed, PackedRow, packed_positions};
use pacs_model::logprob::{Targets, answer_logprobs, head_backward};
use pacs_model::{Keep, Lora, Model, ModelConfig, Parameters};
use pacs_torch::tch::{Device, Kind, Tensor, no_grad};
use pacs_torch::with_emulated_flash;

/// Name, rank, alpha, whether it is rank-stabilised, targets (none: all).
type Case = (&'static str, i64, f64, bool, &'static [&'static str]);

const CASES: [Case; 5] = [
    ("qwen2-tied", 3, 5.0, false, &[]),
    ("qwen3", 2, 4.0, false, &[]),
    ("llama3", 4, 6.0, true, &["q_proj", "v_proj", "down_proj"]),
    ("phi3", 2, 3.0, false, &[]),
    ("gemma3", 2, 4.0, false, &[]),
];
/// As in the test of whole models.
const TOLERANCE: f64 = 1e-4;

struct Golden {
    name: &'static str,
    config: ModelConfig,
    base: Parameters,
    adapters: Parameters,
    expected: HashMap<String, Tensor>,
    sequences: Vec<Tensor>,
}

fn folder(kind: &str, name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(kind).join(name)
}

fn tensors(path: &Path) -> HashMap<String, Tensor> {
    Tensor::read_safetensors(path).unwrap().into_iter().collect()
}

fn lora(&(_, rank, alpha, rslora, targets): &Case) -> Lora {
    Lora { rank, alpha, rslora, targets: targets.iter().map(|&target| target.to_owned()).collect() }
}

impl Golden {
    fn load(case: &Case) -> Self {
        // Tests run side by side and the models are tiny: more threads would only wait for each other.
        pacs_torch::tch::set_num_threads(1);
        let (name, dir) = (case.0, folder("models", case.0));
        let base_config = ModelConfig::read(&dir).unwrap();
        let config = base_config.with_lora(&lora(case)).unwrap();
        let base = Parameters::load(&dir, &base_config, Kind::Float, Device::Cpu).unwrap();
        let adapters = Parameters::load_adapters(&folder("lora", name), &config, Kind::Float, Device::Cpu).unwrap();
        let inputs = tensors(&dir.join("expected.safetensors"));
        let lengths: Vec<i64> = Vec::try_from(&inputs["lengths"]).unwrap();
        let cut = |(row, &length): (usize, &i64)| inputs["input_ids"].get(row as i64).narrow(0, 0, length);
        let sequences = lengths.iter().enumerate().map(cut).collect();
        let expected = tensors(&folder("lora", name).join("expected.safetensors"));
        Self { name, config, base, adapters, expected, sequences }
    }

    fn model(&self) -> Model {
        Model::adapted(&self.config, &self.base, &self.adapters)
    }

    fn merged(&self) -> Model {
        let merged = self.adapters.merged(&self.config, &self.base).unwrap();
        Model::new(&self.config.base(), &merged)
    }
}

fn difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max().double_value(&[])
}

fn row(tokens: &Tensor) -> ([PackedRow; 1], Tensor) {
    let rows = [PackedRow { prompt_len: tokens.numel(), answer_lens: Vec::new() }];
    let positions = Tensor::from_slice(&packed_positions(&rows));
    (rows, positions)
}

/// Rows that predict and the tokens predicted.
fn targets(tokens: &Tensor) -> Vec<(i64, i64)> {
    let tokens: Vec<i64> = tokens.try_into().unwrap();
    tokens.iter().enumerate().skip(1).map(|(t, &token)| (t as i64 - 1, token)).collect()
}

fn logprobs(model: &Model, tokens: &Tensor) -> Tensor {
    let (rows, positions) = row(tokens);
    let hidden = no_grad(|| model.hidden(tokens, &positions, &mut Packed::new(&rows, model)));
    answer_logprobs(model, &hidden, &targets(tokens), 1.0, 32).0
}

/// Gradient of the mean negative log-likelihood of all sequences.
fn gradient(golden: &Golden, keep: Keep) -> Parameters {
    let (model, total) = (golden.model(), Parameters::zeros(&golden.config, Kind::Float, Device::Cpu));
    let count: usize = golden.sequences.iter().map(|tokens| tokens.numel() - 1).sum();
    for tokens in &golden.sequences {
        let (rows, positions) = row(tokens);
        let trace = model.forward(tokens, &positions, Packed::new(&rows, &model), keep);
        let (rows, chosen): (Vec<i64>, Vec<i64>) = targets(tokens).into_iter().unzip();
        let rows = Tensor::from_slice(&rows);
        let coefficients = vec![-1.0 / count as f32; chosen.len()];
        let targets =
            Targets { tokens: &chosen, coefficients: &coefficients, entropy_coefficients: &[], temperature: 1.0 };
        let head = head_backward(&model, &trace.hidden().index_select(0, &rows), targets, 16, &total.flat);
        let by_hidden = trace.hidden().zeros_like().index_add(0, &rows, &head.by_hidden);
        model.backward(trace, &by_hidden, &total.flat);
    }
    total
}

#[test]
fn log_probs_equal_those_of_peft_merged_or_not() {
    for case in &CASES {
        let golden = Golden::load(case);
        let (model, merged, base) = (golden.model(), golden.merged(), Model::new(&golden.config.base(), &golden.base));
        for (place, tokens) in golden.sequences.iter().enumerate() {
            let expected = golden.expected["logprobs"].get(place as i64).narrow(0, 1, tokens.numel() as i64 - 1);
            let [found, merged, without] = [&model, &merged, &base].map(|model| logprobs(model, tokens));
            assert!(difference(&found, &expected) < TOLERANCE, "{} {place}", golden.name);
            assert!(difference(&merged, &expected) < TOLERANCE, "{} {place}, merged", golden.name);
            assert!(difference(&without, &expected) > 0.1, "{} {place}: the adapters change nothing", golden.name);
        }
    }
}

#[test]
fn gradients_equal_those_of_peft() {
    let check = || {
        for case in &CASES {
            let golden = Golden::load(case);
            for keep in [Keep::All, Keep::Last(0), Keep::Last(1)] {
                let found = gradient(&golden, keep);
                assert_eq!(found.layout.parameters().len(), golden.expected.len() - 1);
                for spec in found.layout.parameters() {
                    let expected = &golden.expected[&format!("grad.base_model.model.{}", spec.name)];
                    let scale = expected.abs().max().double_value(&[]);
                    let apart = difference(&found.view(&spec.name), expected);
                    assert!(apart <= 1e-5 + 1e-4 * scale, "{} {}: {apart:.1e} of {scale:.1e}", golden.name, spec.name);
                }
            }
        }
    };
    check();
    with_emulated_flash(check);
}

#[test]
fn fresh_adapters_change_nothing_and_are_the_same_everywhere() {
    let golden = Golden::load(&CASES[1]);
    let fresh = |seed| Parameters::fresh_adapters(&golden.config, Kind::Float, Device::Cpu, seed);
    let (first, again, other) = (fresh(5), fresh(5), fresh(6));
    assert!(first.flat.equal(&again.flat) && !first.flat.equal(&other.flat));
    let merged = first.merged(&golden.config, &golden.base).unwrap();
    assert!(merged.flat.equal(&golden.base.flat));
    for spec in first.layout.parameters() {
        let view = first.view(&spec.name);
        let largest = view.abs().max().double_value(&[]);
        let bound = 1.0 / (spec.shape[1] as f64).sqrt();
        match spec.name.contains("lora_A") {
            true => assert!(largest <= bound && largest > 0.8 * bound, "{}: {largest}", spec.name),
            false => assert_eq!(largest, 0.0, "{}", spec.name),
        }
    }
}

#[test]
fn merging_again_and_again_drifts_nowhere() {
    for kind in [Kind::Float, Kind::BFloat16] {
        let golden = Golden::load(&CASES[0]);
        let of_kind = |parameters: &Parameters| Parameters {
            layout: parameters.layout.clone(),
            flat: parameters.flat.to_kind(kind),
        };
        let (base, first) = (of_kind(&golden.base), of_kind(&golden.adapters));
        let untouched = base.flat.copy();
        let target = first.merged(&golden.config, &base).unwrap();
        let once = target.flat.copy();
        for seed in 1..20 {
            let other = Parameters::fresh_adapters(&golden.config, kind, Device::Cpu, seed);
            let _ = other.flat.shallow_clone().normal_(0.0, 0.3);
            other.merge_into(&golden.config, &base, &target).unwrap();
            assert!(!target.flat.equal(&once));
        }
        first.merge_into(&golden.config, &base, &target).unwrap();
        assert!(target.flat.equal(&once) && base.flat.equal(&untouched), "{kind:?}");
        let zero = Parameters::zeros(&golden.config, kind, Device::Cpu);
        zero.merge_into(&golden.config, &base, &target).unwrap();
        assert!(target.flat.equal(&base.flat), "{kind:?}: without adapters it is the base");
    }
}

/// An update that is far below the last bit of the weights moves some of them, so that on average it arrives.
#[test]
fn small_updates_arrive_in_bfloat16() {
    let golden = Golden::load(&CASES[0]);
    let base = Parameters { layout: golden.base.layout.clone(), flat: golden.base.flat.to_kind(Kind::BFloat16) };
    let small = Parameters { layout: golden.adapters.layout.clone(), flat: &golden.adapters.flat * 0.02 };
    let exact = small.merged(&golden.config, &golden.base).unwrap();
    let small = Parameters { layout: small.layout.clone(), flat: small.flat.to_kind(Kind::BFloat16) };
    let merged = small.merged(&golden.config, &base).unwrap();
    let name = "model.layers.0.mlp.gate_proj.weight";
    let wide = |parameters: &Parameters| parameters.view(name).to_kind(Kind::Double);
    let (wanted, found) = (wide(&exact) - wide(&golden.base), wide(&merged) - wide(&base));
    let along = ((&wanted * &found).sum(Kind::Double) / wanted.square().sum(Kind::Double)).double_value(&[]);
    assert!((0.8..1.2).contains(&along), "{along:.3} of the update arrives");
}

#[test]
fn a_folder_goes_out_as_it_came_in() {
    for case in &CASES {
        let golden = Golden::load(case);
        let out = tempfile::tempdir().unwrap();
        golden.adapters.save_adapters(&golden.config, golden.name, out.path(), Kind::Float).unwrap();
        let (found, given) = (out.path().join("adapter_model.safetensors"), folder("lora", golden.name));
        let (found, given) = (tensors(&found), tensors(&given.join("adapter_model.safetensors")));
        assert_eq!(found.len(), given.len());
        assert!(given.iter().all(|(name, tensor)| found[name].equal(tensor)), "{}", golden.name);
        let again = Parameters::load_adapters(out.path(), &golden.config, Kind::Float, Device::Cpu).unwrap();
        assert!(again.flat.equal(&golden.adapters.flat));
    }
}

#[test]
fn adapters_of_another_kind_are_refused_by_name() {
    let golden = Golden::load(&CASES[1]);
    let base = golden.config.base();
    let problem = |dir: &Path, lora: &Lora| {
        let config = base.with_lora(lora).unwrap();
        Parameters::load_adapters(dir, &config, Kind::Float, Device::Cpu).unwrap_err().to_string()
    };
    let (given, own) = (folder("lora", "qwen3"), lora(&CASES[1]));
    let found = problem(&given, &Lora { rank: 3, ..own.clone() });
    assert!(found.contains("rank 2") && found.contains("rank 3"), "{found}");
    let found = problem(&given, &Lora { targets: vec!["q_proj".to_owned()], ..own.clone() });
    assert!(found.contains("model.lora.targets") && found.contains("down_proj"), "{found}");
    let found = problem(Path::new("/nowhere"), &own);
    assert!(found.contains("/nowhere/adapter_config.json"), "{found}");

    let copy = |change: &dyn Fn(&Path)| {
        let dir = tempfile::tempdir().unwrap();
        for name in ["adapter_config.json", "adapter_model.safetensors"] {
            std::fs::copy(given.join(name), dir.path().join(name)).unwrap();
        }
        change(dir.path());
        problem(dir.path(), &own)
    };
    let with = |from: &'static str, to: &'static str| {
        copy(&|dir| {
            let path = dir.join("adapter_config.json");
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(text.contains(from));
            std::fs::write(&path, text.replace(from, to)).unwrap();
        })
    };
    for (from, to, words) in [
        ("\"use_dora\": false", "\"use_dora\": true", "`use_dora` = true is not supported"),
        ("\"peft_type\": \"LORA\"", "\"peft_type\": \"IA3\"", "only \"LORA\""),
        ("\"bias\": \"none\"", "\"bias\": \"all\"", "`bias` = \"all\" is not supported"),
        ("\"modules_to_save\": null", "\"modules_to_save\": [\"lm_head\"]", "`modules_to_save`"),
        ("\"init_lora_weights\": true", "\"init_lora_weights\": \"pissa\"", "\"pissa\""),
        ("\"rank_pattern\": {}", "\"rank_pattern\": {\"q_proj\": 4}", "`rank_pattern`"),
    ] {
        let found = with(from, to);
        assert!(found.contains(words), "{found}");
    }
    let half = copy(&|dir| {
        let path = dir.join("adapter_model.safetensors");
        let content = std::fs::read(&path).unwrap();
        std::fs::write(&path, &content[..content.len() / 2]).unwrap();
    });
    assert!(half.contains("truncated"), "{half}");
    let fewer = copy(&|dir| {
        let path = dir.join("adapter_model.safetensors");
        let mut all: Vec<(String, Tensor)> = Tensor::read_safetensors(&path).unwrap();
        all.retain(|(name, _)| !name.contains("layers.1.mlp.up_proj.lora_B"));
        Tensor::write_safetensors(&all, &path).unwrap();
    });
    assert!(fewer.contains("lacks") && fewer.contains("layers.1.mlp.up_proj.lora_B"), "{fewer}");
}
