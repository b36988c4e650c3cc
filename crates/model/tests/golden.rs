//! Parity with the reference implementation on the checkpoints of `tests/golden/models`.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[path = "../../../tests/golden/models.rs"]
mod golden_models;

use std::collections::HashMap;
use std::path::PathBuf;
use std::rc::Rc;

use pacs_model::attention::{Packed, PackedRow, packed_positions};
use pacs_model::logprob::{Targets, answer_logprobs, head_backward};
use pacs_model::{
    Keep, Model, ModelConfig, NoHooks, Parameters, RecordedRoutes, Replay, RouteLog, RouteShape, Routing, score,
};
use pacs_torch::tch::{Device, Kind, Tensor, no_grad};
use pacs_torch::with_emulated_flash;

/// Logits and log-probabilities; see the fixtures' README.
const TOLERANCE: f64 = 1e-4;

struct Golden {
    dir: PathBuf,
    config: ModelConfig,
    parameters: Parameters,
    expected: HashMap<String, Tensor>,
    lengths: Vec<i64>,
}

impl Golden {
    fn load(name: &str) -> Self {
        // Tests run side by side and the models are tiny: more threads would only wait for each other.
        pacs_torch::tch::set_num_threads(1);
        let dir = golden_models::folder().join(name);
        let config = ModelConfig::read(&dir).unwrap();
        let parameters = Parameters::load(&dir, &config, Kind::Float, Device::Cpu).unwrap();
        let expected: HashMap<_, _> =
            Tensor::read_safetensors(dir.join("expected.safetensors")).unwrap().into_iter().collect();
        let lengths = Vec::try_from(&expected["lengths"]).unwrap();
        Self { dir, config, parameters, expected, lengths }
    }

    fn model(&self) -> Model {
        Model::new(&self.config, &self.parameters)
    }

    fn tokens(&self, sequence: usize) -> Tensor {
        self.expected["input_ids"].get(sequence as i64).narrow(0, 0, self.lengths[sequence])
    }

    fn expected(&self, name: &str, sequence: usize) -> Tensor {
        self.expected[name].get(sequence as i64).narrow(0, 0, self.lengths[sequence])
    }
}

/// Checks with padded blocks, and with one call for all sequences.
fn each_way(check: impl Fn()) {
    check();
    with_emulated_flash(check);
}

fn hidden(model: &Model, tokens: &Tensor) -> Tensor {
    let rows = [PackedRow { prompt_len: tokens.numel(), answer_lens: Vec::new() }];
    model.hidden(tokens, &Tensor::from_slice(&packed_positions(&rows)), &mut Packed::new(&rows, model))
}

fn difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    f64::try_from((a - b).abs().max()).unwrap()
}

/// Rows that predict and the tokens predicted, of one sequence.
fn targets(tokens: &Tensor) -> Vec<(i64, i64)> {
    let tokens: Vec<i64> = tokens.try_into().unwrap();
    tokens.iter().enumerate().skip(1).map(|(t, &token)| (t as i64 - 1, token)).collect()
}

#[test]
fn logits_logprobs_and_entropies() {
    for name in &golden_models::names() {
        let golden = Golden::load(name);
        let model = golden.model();
        for sequence in 0..3 {
            let tokens = golden.tokens(sequence);
            let hidden = no_grad(|| hidden(&model, &tokens));
            // The small folders have none: they would be most of the folder, and log-probs say the same.
            let has_logits = golden.expected.contains_key("logits");
            let logits =
                if has_logits { difference(&model.logits(&hidden), &golden.expected("logits", sequence)) } else { 0.0 };
            let (logprobs, _) = answer_logprobs(&model, &hidden, &targets(&tokens), 1.0, 32);
            let count = golden.lengths[sequence] - 1;
            let logprobs = difference(&logprobs, &golden.expected("logprobs", sequence).narrow(0, 1, count));
            let every: Vec<(i64, i64)> = (0..=count).map(|row| (row, 0)).collect();
            let (_, entropies) = answer_logprobs(&model, &hidden, &every, 1.0, 7);
            let entropies = difference(&entropies, &golden.expected("entropies", sequence));
            println!("{name} {sequence}: logits {logits:.1e}, logprobs {logprobs:.1e}, entropies {entropies:.1e}");
            assert!(logits < TOLERANCE && logprobs < TOLERANCE && entropies < TOLERANCE);
        }
    }
}

#[test]
fn greedy_tokens() {
    for name in &golden_models::names() {
        let golden = Golden::load(name);
        let model = golden.model();
        for sequence in 0..3 {
            let mut tokens = golden.tokens(sequence);
            let prompt = tokens.numel();
            for _ in 0..32 {
                let hidden = no_grad(|| hidden(&model, &tokens));
                let next = model.logits(&hidden.narrow(0, tokens.numel() as i64 - 1, 1)).argmax(-1, false);
                tokens = Tensor::cat(&[tokens, next], 0);
            }
            let generated = tokens.narrow(0, prompt as i64, 32);
            assert_eq!(generated, golden.expected["greedy_ids"].get(sequence as i64), "{name} {sequence}");
        }
    }
}

/// transformers computed the sequences of `phi3` with its first list of factors. Here that list is the second one, which begins after 16
/// tokens: it has to give the same numbers, for the sequence of 13 tokens and for the first 16 of the others, too.
#[test]
fn long_factors_rotate_all_sequences_of_a_job_that_has_longer_ones() {
    let golden = Golden::load("phi3");
    let mut value: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(golden.dir.join("config.json")).unwrap()).unwrap();
    let short = value["rope_scaling"]["short_factor"].take();
    value["rope_scaling"]["short_factor"] = serde_json::json!([7.0, 1.0, 5.0, 1.0, 3.0, 1.0]);
    value["rope_scaling"]["long_factor"] = short;
    value["original_max_position_embeddings"] = 16.into();
    // Otherwise it follows from the length of the first training: the root of 1 + ln(512 / 256) / ln 256.
    value["rope_scaling"]["attention_factor"] = 1.125_f64.sqrt().into();
    let config = ModelConfig::from_json(&value.to_string(), &golden.dir.join("config.json")).unwrap();
    let differences = |config: &ModelConfig| {
        let model = Model::new(config, &golden.parameters);
        [0, 1, 2].map(|sequence| {
            let tokens = golden.tokens(sequence);
            let hidden = no_grad(|| hidden(&model, &tokens));
            let (logprobs, _) = answer_logprobs(&model, &hidden, &targets(&tokens), 1.0, 32);
            difference(&logprobs, &golden.expected("logprobs", sequence).narrow(0, 1, golden.lengths[sequence] - 1))
        })
    };
    assert!(differences(&config).iter().all(|apart| *apart > 0.01), "the lists do not differ");
    let long = differences(&config.for_sequences(90));
    assert!(long.iter().all(|apart| *apart < TOLERANCE), "{long:?}");
}

/// The gradient of the mean negative log-likelihood over all three sequences, by Hugging Face name.
fn expected_gradients(golden: &Golden) -> HashMap<String, Tensor> {
    Tensor::read_safetensors(golden.dir.join("expected_grads.safetensors")).unwrap().into_iter().collect()
}

fn assert_gradients(golden: &Golden, gradient: &Parameters) {
    let expected = expected_gradients(golden);
    assert_eq!(expected.len(), gradient.layout.parameters().len());
    for (name, expected) in expected {
        let scale = f64::try_from(expected.abs().max()).unwrap();
        let found = difference(&gradient.view(&name), &expected);
        assert!(found <= 1e-5 + 1e-4 * scale, "{name}: {found:.1e} of {scale:.1e}");
    }
}

#[test]
fn gradients_equal_the_reference() {
    each_way(check_gradients);
}

fn check_gradients() {
    for name in &golden_models::names() {
        for keep in [Keep::All, Keep::Last(0), Keep::Last(1)] {
            let golden = Golden::load(name);
            let model = golden.model();
            let total = Parameters::zeros(&golden.config, Kind::Float, Device::Cpu);
            for sequence in 0..3 {
                let tokens = golden.tokens(sequence);
                let rows = [PackedRow { prompt_len: tokens.numel(), answer_lens: Vec::new() }];
                let positions = Tensor::from_slice(&packed_positions(&rows));
                let trace = model.forward(&tokens, &positions, Packed::new(&rows, &model), keep);
                let (rows, targets): (Vec<i64>, Vec<i64>) = targets(&tokens).into_iter().unzip();
                let rows = Tensor::from_slice(&rows);
                let coefficients = vec![-1.0 / 121.0; targets.len()];
                let targets = Targets {
                    tokens: &targets,
                    coefficients: &coefficients,
                    entropy_coefficients: &[],
                    temperature: 1.0,
                };
                let head = head_backward(&model, &trace.hidden().index_select(0, &rows), targets, 16, &total.flat);
                let by_hidden = trace.hidden().zeros_like().index_add(0, &rows, &head.by_hidden);
                model.backward(trace, &by_hidden, &total.flat);
            }
            assert_gradients(&golden, &total);
        }
    }
}

#[test]
fn packed_rows_equal_each_answer_alone() {
    each_way(check_packed_rows);
}

/// Rows with and without shared prompts.
fn mixed_rows() -> [PackedRow; 4] {
    [
        PackedRow { prompt_len: 9, answer_lens: vec![5, 1, 7, 5] },
        PackedRow { prompt_len: 6, answer_lens: vec![40] },
        PackedRow { prompt_len: 9, answer_lens: vec![3, 0, 50] },
        PackedRow { prompt_len: 4, answer_lens: vec![] },
    ]
}

fn made_up_tokens(rows: &[PackedRow]) -> Tensor {
    let count: usize = rows.iter().map(PackedRow::tokens).sum();
    Tensor::from_slice(&(0..count as i64).map(|i| (i * 37 + 11) % 300).collect::<Vec<_>>())
}

#[test]
fn gradients_of_packed_rows_are_the_same_in_one_call_as_in_blocks() {
    let rows = mixed_rows();
    let (tokens, positions) = (made_up_tokens(&rows), Tensor::from_slice(&packed_positions(&rows)));
    for name in &golden_models::names() {
        let golden = Golden::load(name);
        let model = golden.model();
        let gradient = || {
            let total = Parameters::zeros(&golden.config, Kind::Float, Device::Cpu);
            let trace = model.forward(&tokens, &positions, Packed::new(&rows, &model), Keep::Last(1));
            let by_hidden = trace.hidden().sin();
            model.backward(trace, &by_hidden, &total.flat);
            total.flat
        };
        let (blocks, flash) = (gradient(), with_emulated_flash(gradient));
        let scale = f64::try_from(blocks.abs().max()).unwrap();
        assert!(scale > 0.1 && difference(&blocks, &flash) < 1e-5 * scale.max(1.0), "{name}");
    }
}

fn check_packed_rows() {
    for name in &golden_models::names() {
        let golden = Golden::load(name);
        let model = golden.model();
        let rows = mixed_rows();
        let tokens = made_up_tokens(&rows);
        let count = tokens.numel();
        let packed = no_grad(|| {
            model.hidden(&tokens, &Tensor::from_slice(&packed_positions(&rows)), &mut Packed::new(&rows, &model))
        });
        let mut start = 0;
        for row in &rows {
            let (prompt_len, mut answer_start) = (row.prompt_len as i64, start + row.prompt_len as i64);
            let prompt = tokens.narrow(0, start, prompt_len);
            for &len in row.answer_lens.iter().chain(&[0]) {
                let answer = tokens.narrow(0, answer_start.min(count as i64 - len as i64), len as i64);
                let alone = no_grad(|| hidden(&model, &Tensor::cat(&[&prompt, &answer], 0)));
                let parts = [packed.narrow(0, start, prompt_len), packed.narrow(0, answer_start, len as i64)];
                assert!(difference(&alone, &Tensor::cat(&parts, 0)) < 1e-5, "{name}");
                answer_start += len as i64;
            }
            start += row.tokens() as i64;
        }
    }
}

/// Routes of an earlier pass hold in layers whose activations are kept and in those that the backward computes again.
#[test]
fn replayed_routes_are_those_of_every_computation_of_a_pass() {
    let golden = Golden::load("qwen3_moe");
    let (model, shape) = (golden.model(), RouteShape::of(&golden.config).unwrap());
    let rows = mixed_rows();
    let (tokens, positions) = (made_up_tokens(&rows), Tensor::from_slice(&packed_positions(&rows)));
    let count = tokens.numel();
    let mut log = RouteLog::new(shape);
    let mut recording = Routing::Record(&mut log);
    let mut attention = Packed::new(&rows, &model);
    let Ok(plain) =
        no_grad(|| model.hidden_with_hooks(&tokens, &positions, &mut attention, &mut recording, &mut NoHooks));
    assert!(plain.equal(&no_grad(|| model.hidden(&tokens, &positions, &mut Packed::new(&rows, &model)))));
    let mut own = Vec::new();
    log.append(0..count, &mut own);
    assert_eq!(shape.check(&own, count), Ok(()));

    let pass = |routes: Option<&[u8]>, keep: Keep| {
        let mut replay = routes.map(|bytes| Replay::new(Rc::new(RecordedRoutes::new(shape, bytes.to_vec()))));
        let gradients = model.zero_gradients();
        let (attention, mut routing) = (Packed::new(&rows, &model), Routing::replaying(replay.as_mut()));
        let Ok(trace) = model.forward_with_hooks(&tokens, &positions, attention, keep, &mut routing, &mut NoHooks);
        let hidden = trace.hidden().copy();
        model.backward(trace, &hidden.sin(), &gradients);
        let rerouted = replay.and_then(|replay| Some(replay.rerouted()?.sum(Kind::Int64).int64_value(&[])));
        (hidden, gradients, rerouted)
    };
    let keeps = [Keep::All, Keep::Last(0), Keep::Last(1)];
    for keep in keeps {
        let (hidden, gradients, nothing) = pass(None, keep);
        let (same_hidden, same_gradients, rerouted) = pass(Some(&own), keep);
        assert!(hidden.equal(&same_hidden) && gradients.equal(&same_gradients), "{keep:?}");
        assert_eq!((nothing, rerouted), (None, Some(0)), "{keep:?}");
    }
    // Two neighbours of eight experts are never the two before them.
    let others: Vec<u8> = own.iter().map(|expert| (expert + 1) % 8).collect();
    let (hidden, gradients, rerouted) = pass(Some(&others), Keep::All);
    assert!(difference(&hidden, &plain) > 1e-3, "the experts make no difference");
    assert!(rerouted >= Some(count as i64), "all of the first layer are others: {rerouted:?}");
    let scale = f64::try_from(gradients.abs().max()).unwrap();
    for keep in keeps {
        let (again, same_gradients, counted) = pass(Some(&others), keep);
        assert!(difference(&again, &hidden) < 1e-5, "{keep:?}");
        assert!(difference(&same_gradients, &gradients) < 1e-5 * scale.max(1.0), "{keep:?}");
        assert_eq!(counted, rerouted, "{keep:?}: what the backward computes again counts once");
    }
}

#[test]
fn scores_equal_the_reference() {
    let golden = Golden::load("llama3");
    let model = golden.model();
    let sequence: Vec<u32> =
        Vec::<i64>::try_from(golden.tokens(2)).unwrap().into_iter().map(|token| token as u32).collect();
    let expected: Vec<f32> = golden.expected("logprobs", 2).try_into().unwrap();
    let item = |prompt: usize, end: usize| (sequence[..prompt].to_vec(), sequence[prompt..end].to_vec());
    let spans = [(5, 20), (5, 90), (5, 5), (40, 90), (1, 90)];
    for budget in [1, 150, 10_000] {
        let scores = score(&model, spans.iter().map(|&(a, b)| item(a, b)).collect(), 1.0, budget).unwrap();
        for (scores, (start, end)) in scores.iter().zip(spans) {
            assert_eq!(scores.len(), end - start);
            assert!(scores.iter().zip(&expected[start..end]).all(|(a, b)| (a - b).abs() < 1e-4));
        }
    }
    let error = |prompt: &[u32], tokens: &[u32]| {
        score(&model, vec![item(1, 2), (prompt.to_vec(), tokens.to_vec())], 1.0, 100).unwrap_err().to_string()
    };
    assert_eq!(error(&[], &[1]), "item 1 has an empty prompt; put the begin-of-text token there");
    assert_eq!(error(&[1], &[384]), "item 1 holds token 384; the model's vocabulary ends at 383");
}

#[test]
fn updates_of_the_flat_buffer_are_seen() {
    let golden = Golden::load("qwen2-tied");
    let model = golden.model();
    let tokens = golden.tokens(0);
    let before = hidden(&model, &tokens);
    let _ = no_grad(|| golden.parameters.view("model.norm.weight").g_mul_scalar_(2.0));
    assert!(difference(&hidden(&model, &tokens), &(before * 2.0)) < TOLERANCE);
}
