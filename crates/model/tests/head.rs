//! The fused LM head against plain autograd.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::path::PathBuf;

use pacs_model::logprob::{Targets, answer_logprobs, head_backward};
use pacs_model::{Model, ModelConfig, Parameters};
use pacs_torch::tch::{Device, Kind, Tensor};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

fn model(kind: Kind) -> Model {
    pacs_torch::tch::set_num_threads(1);
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/qwen2-untied");
    let config = ModelConfig::read(&dir).unwrap();
    Model::new(&config, &Parameters::load(&dir, &config, kind, Device::Cpu).unwrap())
}

#[derive(Clone, Debug)]
struct Case {
    seed: i64,
    tokens: Vec<i64>,
    coefficients: Vec<f32>,
    /// None, or one a token.
    entropy_coefficients: Vec<f32>,
    temperature: f64,
    chunk: usize,
}

fn cases() -> impl Strategy<Value = Case> {
    let coefficient = || prop_oneof![Just(0.0f32), -2.0f32..2.0];
    let position = (0i64..416, coefficient(), coefficient());
    let positions = prop::collection::vec(position, 1..40);
    (any::<u32>(), positions, any::<bool>(), 0.3f64..2.0, 1usize..20).prop_map(
        |(seed, positions, by_entropy, temperature, chunk)| {
            let tokens = positions.iter().map(|position| position.0).collect();
            let coefficients = positions.iter().map(|position| position.1).collect();
            let entropy_coefficients = positions.iter().filter(|_| by_entropy).map(|position| position.2).collect();
            Case { seed: i64::from(seed), tokens, coefficients, entropy_coefficients, temperature, chunk }
        },
    )
}

/// Largest difference relative to the largest expected value, which counts as one at least.
fn difference(found: &Tensor, expected: &Tensor) -> f64 {
    let largest = f64::try_from(expected.abs().max()).unwrap().max(1.0);
    f64::try_from((found.to_kind(Kind::Double) - expected.to_kind(Kind::Double)).abs().max()).unwrap() / largest
}

fn check(kind: Kind, case: &Case, tolerance: f64) {
    let model = model(kind);
    let Case { seed, tokens, coefficients, entropy_coefficients, temperature, chunk } = case;
    pacs_torch::tch::manual_seed(*seed);
    let hidden = Tensor::randn([tokens.len() as i64, 96], (Kind::Double, Device::Cpu)).to_kind(kind);
    let gradients = model.zero_gradients();
    let targets = Targets { tokens, coefficients, entropy_coefficients, temperature: *temperature };
    let fused = head_backward(&model, &hidden, targets, *chunk, &gradients);

    let (hidden, weight) = (hidden.set_requires_grad(true), model.head_weight().copy().set_requires_grad(true));
    let all = (hidden.matmul(&weight.tr()).to_kind(Kind::Double) / *temperature).log_softmax(-1, Kind::Double);
    let logprobs = all.gather(1, &Tensor::from_slice(tokens).unsqueeze(1), false).squeeze_dim(1);
    let entropies = -(&all * all.exp()).sum_dim_intlist(-1, false, Kind::Double);
    let by_entropy =
        if entropy_coefficients.is_empty() { vec![0.0; tokens.len()] } else { entropy_coefficients.clone() };
    let loss = &logprobs * Tensor::from_slice(coefficients) + &entropies * Tensor::from_slice(&by_entropy);
    loss.sum(Kind::Double).backward();
    let (scored, scored_entropies) = {
        let rows: Vec<(i64, i64)> = tokens.iter().enumerate().map(|(row, &token)| (row as i64, token)).collect();
        answer_logprobs(&model, &hidden.detach(), &rows, *temperature, 1000)
    };
    let head = model.layout().head();
    let slot = gradients.narrow(0, head.offset as i64, head.numel() as i64).view(&head.shape[..]);
    let found = [
        difference(&scored, &logprobs.detach()),
        difference(&scored_entropies, &entropies.detach()),
        difference(&Tensor::from_slice(&fused.logprobs), &logprobs.detach()),
        difference(&Tensor::from_slice(&fused.entropies), &entropies.detach()),
        difference(&fused.by_hidden, &hidden.grad()),
        difference(&slot, &weight.grad()),
    ];
    assert!(found.iter().all(|&difference| difference < tolerance), "{found:?} in {kind:?}");
    let rest = gradients.abs().sum(Kind::Double) - slot.abs().sum(Kind::Double);
    assert!(rest.double_value(&[]).abs() < 1e-9 * slot.numel() as f64, "gradients outside the head");
    assert_eq!(fused.by_hidden.kind(), kind);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, rng_seed: RngSeed::Fixed(1), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn equals_autograd(case in cases()) {
        // Log-probabilities come back as float32.
        check(Kind::Double, &case, 1e-6);
        check(Kind::Float, &case, 1e-5);
        check(Kind::BFloat16, &case, 2e-2);
    }
}

#[test]
fn a_batch_without_signal_has_a_zero_gradient() {
    let model = model(Kind::Float);
    let hidden = Tensor::randn([3, 96], (Kind::Float, Device::Cpu));
    let gradients = model.zero_gradients();
    let run = |hidden: &Tensor, tokens: &[i64]| {
        let none = vec![0.0; tokens.len()];
        let targets = Targets { tokens, coefficients: &none, entropy_coefficients: &none, temperature: 1.0 };
        head_backward(&model, hidden, targets, 2, &gradients)
    };
    let fused = run(&hidden, &[1, 2, 3]);
    assert_eq!(fused.logprobs.len(), 3);
    assert_eq!(fused.by_hidden, Tensor::zeros([3, 96], (Kind::Float, Device::Cpu)));
    assert_eq!(run(&hidden.narrow(0, 0, 0), &[]).logprobs.len(), 0);
    assert!(gradients.equal(&model.zero_gradients()));
}

#[test]
fn the_value_head_equals_autograd() {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/qwen2-untied");
    let config = ModelConfig::read(&dir).unwrap();
    for (kind, tolerance) in [(Kind::Double, 1e-6), (Kind::Float, 1e-5), (Kind::BFloat16, 2e-2)] {
        let policy = Parameters::load(&dir, &config, kind, Device::Cpu).unwrap();
        let parameters = Parameters::of_values(&config, &policy);
        let shared = "model.layers.0.mlp.up_proj.weight";
        assert_eq!(parameters.view(shared), policy.view(shared));
        assert!(parameters.layout.find("lm_head.weight").is_none(), "a value model has no other head");
        let model = Model::new(&config, &parameters);
        pacs_torch::tch::manual_seed(4);
        let hidden = Tensor::randn([5, 96], (Kind::Double, Device::Cpu)).to_kind(kind);
        assert_eq!(pacs_model::values(&model, &hidden), [0.0; 5], "a new head says nothing");

        let mut head = parameters.view("value_head.weight");
        let _ = head.normal_(0.0, 1.0);
        let by_value = [0.5, -1.0, 0.0, 2.0, 0.25];
        let gradients = model.zero_gradients();
        let by_hidden = pacs_model::values_backward(&model, &hidden, &by_value, &gradients);
        let exact = hidden.to_kind(Kind::Double).set_requires_grad(true);
        let weight = head.to_kind(Kind::Double).copy().set_requires_grad(true);
        let values = exact.matmul(&weight.tr()).squeeze_dim(1);
        (&values * Tensor::from_slice(&by_value)).sum(Kind::Double).backward();
        let spec = parameters.layout.head();
        let slot = gradients.narrow(0, spec.offset as i64, spec.numel() as i64).view(&spec.shape[..]);
        let found = [
            difference(&Tensor::from_slice(&pacs_model::values(&model, &hidden)), &values.detach()),
            difference(&by_hidden, &exact.grad()),
            difference(&slot, &weight.grad()),
        ];
        assert!(found.iter().all(|&difference| difference < tolerance), "{found:?} in {kind:?}");
    }
}
