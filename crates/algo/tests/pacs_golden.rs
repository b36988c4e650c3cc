//! The PACS objective against the reference vectors in `tests/golden/pacs_loss.json`.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::fs;
use std::path::Path;

use pacs_algo::{LabelWeights, PacsConfig, PacsStep, RewardMethod, ScoreEstimator, Sequence, pacs};
use serde_json::Value;

const RELATIVE: f64 = 1e-12;
/// Cancelled terms of order one may leave rounding below this.
const ABSOLUTE: f64 = 1e-15;
/// The two standardised scores of a pair are constant up to epsilon. Their derivative is a cancelled difference of
/// terms divided by the deviation, and the reference values themselves are this inaccurate.
const ABSOLUTE_STANDARDISED: f64 = 1e-14;

#[test]
fn every_case_matches() {
    let golden = golden();
    let cases = golden["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 98);
    let failures: Vec<String> = cases
        .iter()
        .flat_map(|case| {
            let input = &golden["inputs"][case["input"].as_str().unwrap()];
            differences(input, case).into_iter().map(|d| format!("{}: {d}", case["id"]))
        })
        .collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn closed_forms_hold_on_every_case() {
    let golden = golden();
    for case in golden["cases"].as_array().unwrap() {
        let (config, input) = (config(&case["config"]), &golden["inputs"][case["input"].as_str().unwrap()]);
        let sequences = sequences(input);
        let step = pacs(&config, &sequences).unwrap();
        if matches!(config.score, ScoreEstimator::Rloo | ScoreEstimator::DrGrpo) {
            for members in step_groups(&sequences) {
                assert_cancels(&members, &step.score, &case["id"]);
                assert_cancels(&members, &step.dloss_dproxy, &case["id"]);
            }
        }
        if case["input"] == "onpolicy4" && config.score == ScoreEstimator::Rloo {
            assert_on_policy(&config, &sequences, &step);
        }
    }
}

fn assert_cancels(members: &[usize], values: &[f64], id: &Value) {
    let scale = members.iter().map(|&i| values[i].abs()).fold(1.0, f64::max);
    let sum: f64 = members.iter().map(|&i| values[i]).sum();
    assert!(sum.abs() < 1e-12 * scale, "{id}: {sum}");
}

/// With every proxy 0, equal labels give no gradient, and without weights the step is REINFORCE with
/// a leave-one-out baseline.
fn assert_on_policy(config: &PacsConfig, sequences: &[Sequence], step: &PacsStep) {
    for members in step_groups(sequences) {
        let n = members.len() as f64;
        let positives = members.iter().filter(|&&i| sequences[i].label == 1.0).count() as f64;
        for &i in &members {
            let advantage = if sequences[i].label == 1.0 { n - positives } else { -positives } / (n - 1.0);
            if advantage == 0.0 {
                assert_eq!(step.dloss_dlogprob[i], 0.0, "exactly, so that the backward is skipped");
            } else if config.label_weights == LabelWeights::None {
                let measured = -(sequences.len() as f64) * step.dloss_dproxy[i];
                assert!((measured - advantage).abs() < 1e-12, "{measured} for {advantage}");
            }
        }
    }
}

fn golden() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/pacs_loss.json");
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn differences(input: &Value, case: &Value) -> Vec<String> {
    let (config, expect) = (config(&case["config"]), &case["expect"]);
    let step = pacs(&config, &sequences(input)).unwrap();
    let mut differences = Vec::new();
    let mut compare = |what: &str, measured: &[f64], expected: &Value| {
        let standardised = config.score == ScoreEstimator::Grpo && matches!(what, "dloss_dproxy" | "dloss_dlogprob");
        let absolute = if standardised { ABSOLUTE_STANDARDISED } else { ABSOLUTE };
        let expected = numbers(expected);
        assert_eq!(measured.len(), expected.len(), "{what}");
        for (i, (m, e)) in measured.iter().zip(&expected).enumerate() {
            if (m - e).abs() > RELATIVE * e.abs() + absolute {
                differences.push(format!("{what}[{i}] is {m}, not {e}"));
            }
        }
    };
    compare("loss", &[step.loss], &Value::Array(vec![expect["loss"].clone()]));
    compare("reward_proxy", &step.reward_proxy, &expect["reward_proxy"]);
    compare("score", &step.score, &expect["score"]);
    compare("weight", &step.weight, &expect["weight"]);
    compare("seq_loss", &step.sequence_loss, &expect["seq_loss"]);
    compare("dloss_dscore", &step.dloss_dscore, &expect["dloss_dscore"]);
    compare("dloss_dproxy", &step.dloss_dproxy, &expect["dloss_dproxy"]);
    for (i, mask) in input["mask"].as_array().unwrap().iter().enumerate() {
        let by_token: Vec<f64> = numbers(mask).iter().map(|m| m * step.dloss_dlogprob[i]).collect();
        compare("dloss_dlogprob", &by_token, &expect["dloss_dlogprob"][i]);
    }
    differences
}

fn sequences(input: &Value) -> Vec<Sequence> {
    let group_size = input["group_size"].as_u64().unwrap();
    let labels = numbers(&input["label"]);
    (0..labels.len())
        .map(|i| {
            let mask = numbers(&input["mask"][i]);
            let masked_sum = |values: &Value| numbers(values).iter().zip(&mask).map(|(v, m)| v * m).sum();
            Sequence {
                group: i as u64 / group_size,
                label: labels[i],
                new_logprob_sum: masked_sum(&input["new_logprob"][i]),
                old_logprob_sum: masked_sum(&input["old_logprob"][i]),
                tokens: mask.iter().filter(|&&m| m == 1.0).count() as u32,
                importance: 1.0,
            }
        })
        .collect()
}

fn step_groups(sequences: &[Sequence]) -> Vec<Vec<usize>> {
    let indices: Vec<usize> = (0..sequences.len()).collect();
    indices.chunk_by(|&a, &b| sequences[a].group == sequences[b].group).map(<[usize]>::to_vec).collect()
}

fn config(value: &Value) -> PacsConfig {
    PacsConfig {
        beta: value["beta"].as_f64().unwrap(),
        score: serde_json::from_value(value["estimator"].clone()).unwrap(),
        reward_method: match value["reward_method"].as_u64().unwrap() {
            1 => RewardMethod::LogRatio,
            2 => RewardMethod::MeanLogprob,
            other => panic!("reward method {other}"),
        },
        label_weights: serde_json::from_value(value["weight_mode"].clone()).unwrap(),
        actor_term: false,
        importance: None,
    }
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}
