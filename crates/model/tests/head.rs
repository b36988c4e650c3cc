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
    temperature: f64,
    chunk: usize,
}

fn cases() -> impl Strategy<Value = Case> {
    let position = (0i64..416, prop_oneof![Just(0.0f32), -2.0f32..2.0]);
    (any::<u32>(), prop::collection::vec(position, 1..40), 0.3f64..2.0, 1usize..20).prop_map(
        |(seed, positions, temperature, chunk)| {
            let (tokens, coefficients) = positions.into_iter().unzip();
            Case { seed: i64::from(seed), tokens, coefficients, temperature, chunk }
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
    let Case { seed, tokens, coefficients, temperature, chunk } = case;
    pacs_torch::tch::manual_seed(*seed);
    let hidden = Tensor::randn([tokens.len() as i64, 96], (Kind::Double, Device::Cpu)).to_kind(kind);
    let gradients = model.zero_gradients();
    let targets = Targets { tokens, coefficients, temperature: *temperature };
    let fused = head_backward(&model, &hidden, targets, *chunk, &gradients);

    let (hidden, weight) = (hidden.set_requires_grad(true), model.head_weight().copy().set_requires_grad(true));
    let all = (hidden.matmul(&weight.tr()).to_kind(Kind::Double) / *temperature).log_softmax(-1, Kind::Double);
    let logprobs = all.gather(1, &Tensor::from_slice(tokens).unsqueeze(1), false).squeeze_dim(1);
    let entropies = -(&all * all.exp()).sum_dim_intlist(-1, false, Kind::Double);
    (&logprobs * Tensor::from_slice(coefficients)).sum(Kind::Double).backward();
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
fn nothing_to_learn_is_a_zero_gradient() {
    let model = model(Kind::Float);
    let hidden = Tensor::randn([3, 96], (Kind::Float, Device::Cpu));
    let gradients = model.zero_gradients();
    let run = |hidden: &Tensor, tokens: &[i64]| {
        let targets = Targets { tokens, coefficients: &vec![0.0; tokens.len()], temperature: 1.0 };
        head_backward(&model, hidden, targets, 2, &gradients)
    };
    let fused = run(&hidden, &[1, 2, 3]);
    assert_eq!(fused.logprobs.len(), 3);
    assert_eq!(fused.by_hidden, Tensor::zeros([3, 96], (Kind::Float, Device::Cpu)));
    assert_eq!(run(&hidden.narrow(0, 0, 0), &[]).logprobs.len(), 0);
    assert!(gradients.equal(&model.zero_gradients()));
}
