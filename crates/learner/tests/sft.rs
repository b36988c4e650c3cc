//! Supervised fine-tuning: its gradient is that of the plain mean for any packing, and it learns.

use std::path::{Path, PathBuf};

use pacs_learner::{FineTuner, FineTunerSettings, Text};
use pacs_model::{ModelConfig, Parameters};
use pacs_spec::OptimizerSpec;
use pacs_torch::tch::{Device, Kind, Tensor};
use pacs_types::mix;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models").join(name)
}

/// One thread: small models gain nothing from more.
fn settings(learning_rate: f64, micro_batch_tokens: usize) -> FineTunerSettings {
    pacs_torch::tch::set_num_threads(1);
    let optimizer = OptimizerSpec { learning_rate, weight_decay: 0.0, ..OptimizerSpec::default() };
    FineTunerSettings { optimizer, updates: 80, micro_batch_tokens }
}

fn tuner(model: &str, kind: Kind, settings: FineTunerSettings) -> FineTuner {
    let config = ModelConfig::read(&golden(model)).expect("golden model");
    let parameters = Parameters::load(&golden(model), &config, kind, Device::Cpu).expect("golden model");
    FineTuner::new(&config, parameters, settings)
}

/// Texts of several turns, every second one learnt; one text has nothing to learn.
fn texts() -> Vec<Text> {
    let number = |a: u64, b: u64| mix(a << 32 ^ b);
    let mut texts = Vec::new();
    for i in 0..7 {
        let mut text = Text::default();
        for turn in 0..4 {
            let length = 1 + number(i, turn) % 6;
            let tokens: Vec<u32> = (0..length).map(|at| (number(i * 10 + turn, at) % 300) as u32).collect();
            text.extend(&tokens, turn % 2 == 1 && i != 3);
        }
        texts.push(text);
    }
    texts
}

#[test]
fn the_gradient_is_the_slope_of_the_loss_whatever_the_packing() {
    let texts = texts();
    let texts: Vec<&Text> = texts.iter().collect();
    let mut whole = tuner("qwen3", Kind::Double, settings(1e-3, 100_000));
    let loss = whole.accumulate(&texts);
    assert_eq!(loss.targets, texts.iter().map(|text| text.targets()).sum::<usize>());
    // Log-probs are float32, so the slope is accurate to about six digits.
    pacs_torch::tch::manual_seed(3);
    let direction = Tensor::randn(whole.gradients().size(), (Kind::Double, Device::Cpu));
    let expected = (whole.gradients() * &direction).sum(Kind::Double).double_value(&[]);
    let shifted = |distance: f64| {
        let tuner = tuner("qwen3", Kind::Double, settings(1e-3, 100_000));
        let _ = tuner.parameters().flat.shallow_clone().g_add_(&(&direction * distance));
        tuner.evaluate(&texts).mean()
    };
    let distance = 1e-4;
    let slope = (shifted(distance) - shifted(-distance)) / (2.0 * distance);
    assert!((slope / expected - 1.0).abs() < 1e-2, "the loss has slope {slope}, its gradient says {expected}");

    for tokens in [1, 40] {
        let mut parts = tuner("qwen3", Kind::Double, settings(1e-3, tokens));
        assert!((parts.accumulate(&texts).mean() - loss.mean()).abs() < 1e-6);
        let difference = (parts.gradients() - whole.gradients()).abs().max().double_value(&[]);
        // Coefficients and log-probs are float32.
        assert!(difference < 1e-9, "gradients of passes of {tokens} tokens differ by {difference}");
    }
}

#[test]
fn the_loss_is_that_of_scoring() {
    let texts = texts();
    let texts: Vec<&Text> = texts.iter().collect();
    let tuner = tuner("qwen2-untied", Kind::Float, settings(1e-3, 50));
    let config = ModelConfig::read(&golden("qwen2-untied")).expect("golden model");
    let model = pacs_model::Model::new(&config, tuner.parameters());
    let mut sum = 0.0;
    for text in &texts {
        let (first, rest) = text.tokens.split_at(1);
        let scores = pacs_model::score(&model, vec![(first.to_vec(), rest.to_vec())], 1.0, 1).expect("known tokens");
        let learnt = scores[0].iter().zip(&text.learnt[1..]).filter(|(_, learnt)| **learnt);
        sum -= learnt.map(|(logprob, _)| f64::from(*logprob)).sum::<f64>();
    }
    let loss = tuner.evaluate(&texts);
    assert!((loss.sum / sum - 1.0).abs() < 1e-5, "{} against {sum}", loss.sum);
}

#[test]
fn an_untrained_model_learns_a_small_set_by_heart() {
    let texts = texts();
    let texts: Vec<&Text> = texts.iter().collect();
    let config = ModelConfig::read(&golden("qwen3")).expect("golden model");
    for kind in [Kind::Float, Kind::BFloat16] {
        let parameters = Parameters::random(&config, kind, Device::Cpu, 7);
        let mut tuner = FineTuner::new(&config, parameters, settings(5e-3, 64));
        let before = tuner.evaluate(&texts).mean();
        // An untrained model is near the uniform distribution over 384 tokens.
        assert!((before - 384f64.ln()).abs() < 0.5, "{before}");
        for _ in 0..80 {
            let report = tuner.update(&texts).expect("trains");
            assert!(!report.skipped);
        }
        let after = tuner.evaluate(&texts).mean();
        assert!(after < 0.1, "{kind:?}: the loss is {after} after training, {before} before");
    }
}

#[test]
fn a_gradient_that_is_not_finite_changes_nothing() {
    let texts = texts();
    let texts: Vec<&Text> = texts.iter().collect();
    let mut tuner = tuner("qwen3", Kind::Float, settings(1e-3, 1000));
    let _ = tuner.parameters().flat.shallow_clone().narrow(0, 0, 64).fill_(f64::INFINITY);
    let before = tuner.parameters().flat.copy();
    assert!(tuner.update(&texts).expect("an answer").skipped);
    assert!(tuner.parameters().flat.equal(&before));
}
