//! Settings of a spec, through to losses and derivatives, against plain PyTorch: `tests/golden/objectives.json`, which
//! `tests/peers/vectors.py` writes.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::BTreeSet;
use std::path::Path;

use pacs_algo::{Answer, SequenceInfo, TokenData};
use pacs_spec::ObjectiveSpec;
use serde_json::Value;

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

#[test]
fn losses_and_derivatives_are_those_of_plain_pytorch() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/objectives.json");
    let golden: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let length = golden["max_new_tokens"].as_u64().unwrap() as u32;
    let rows = golden["answers"].as_array().unwrap();
    let tokens: Vec<[Vec<f64>; 3]> =
        rows.iter().map(|row| [&row["new"], &row["old"], &row["rollout"]].map(numbers)).collect();
    let answer = |(row, [new, old, rollout]): (&Value, &'_ [Vec<f64>; 3])| -> (SequenceInfo, [Vec<f64>; 3]) {
        let info = SequenceInfo {
            group: row["group"].as_u64().unwrap(),
            label: row["label"].as_f64().unwrap(),
            reward: row["reward"].as_f64().unwrap(),
            greedy_reward: None,
            tokens: new.len() as u32,
            truncated: false,
        };
        (info, [new.clone(), old.clone(), rollout.clone()])
    };
    let made: Vec<(SequenceInfo, [Vec<f64>; 3])> = rows.iter().zip(&tokens).map(answer).collect();
    let answers: Vec<Answer<'_>> = made
        .iter()
        .map(|(info, [new, old, rollout])| Answer {
            info: *info,
            tokens: TokenData { new, old, rollout: Some(rollout), ..TokenData::default() },
        })
        .collect();
    let mut kinds = BTreeSet::new();
    for case in golden["cases"].as_array().unwrap() {
        let spec: ObjectiveSpec = serde_json::from_value(case["objective"].clone()).unwrap();
        kinds.insert(spec.kind.name());
        let step = spec.filled().objective(length).evaluate(&answers).unwrap();
        let near = |a: f64, b: f64| (a - b).abs() <= 1e-9 * b.abs() + 1e-12;
        let loss = case["expect"]["loss"].as_f64().unwrap();
        assert!(near(step.loss, loss), "{}: the loss is {}, not {loss}", case["objective"], step.loss);
        let expected = case["expect"]["dloss_dlogprob"].as_array().unwrap();
        for (i, (sequence, expected)) in step.sequences.iter().zip(expected).enumerate() {
            for (a, b) in sequence.dloss_dlogprob.iter().zip(numbers(expected)) {
                assert!(near(*a, b), "{}: answer {i} has {a}, not {b}", case["objective"]);
            }
        }
    }
    for kind in ["weighted_rloo", "maxrl", "cispo", "dppo", "real", "disco", "pacs"] {
        assert!(kinds.contains(kind), "{kind} has no vector");
    }
}
