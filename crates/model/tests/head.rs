//! The fused LM head against plain autograd.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::path::PathBuf;

use pacs_model::logprob::{answer_logprobs, head_backward};
use pacs_model::{Model, ModelConfig, Parameters};
use pacs_torch::tch::{Device, Kind, Tensor};
use proptest::prelude::*;

fn model(kind: Kind) -> Model {
    pacs_torch::tch::set_num_threads(1);
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/qwen2-untied");
    let config = ModelConfig::read(&dir).unwrap();
    Model::new(&config, &Parameters::load(&dir, &config, kind, Device::Cpu).unwrap(), true)
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
    let fused = head_backward(&model, &hidden, tokens, coefficients, *temperature, *chunk);

    let hidden = hidden.set_requires_grad(true);
    let rows: Vec<(i64, i64)> = tokens.iter().enumerate().map(|(row, &token)| (row as i64, token)).collect();
    let (logprobs, entropies) = answer_logprobs(&model, &hidden, &rows, *temperature, 1000);
    (&logprobs * Tensor::from_slice(coefficients)).sum(logprobs.kind()).backward();
    let found = [
        difference(&Tensor::from_slice(&fused.logprobs), &logprobs.detach()),
        difference(&Tensor::from_slice(&fused.entropies), &entropies.detach()),
        difference(&fused.dhidden, &hidden.grad()),
        difference(&fused.dweight, &model.head_weight().grad()),
    ];
    assert!(found.iter().all(|&difference| difference < tolerance), "{found:?} in {kind:?}");
    let expected_kind = if kind == Kind::Double { Kind::Double } else { Kind::Float };
    assert_eq!((fused.dhidden.kind(), fused.dweight.kind()), (kind, expected_kind));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

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
    let fused = head_backward(&model, &hidden, &[1, 2, 3], &[0.0; 3], 1.0, 2);
    assert_eq!(fused.logprobs.len(), 3);
    assert_eq!(fused.dweight, Tensor::zeros([416, 96], (Kind::Float, Device::Cpu)));
    assert_eq!(fused.dhidden, Tensor::zeros([3, 96], (Kind::Float, Device::Cpu)));
    let empty = head_backward(&model, &hidden.narrow(0, 0, 0), &[], &[], 1.0, 2);
    assert_eq!((empty.logprobs.len(), empty.dweight.size()), (0, vec![416, 96]));
}
