//! `pacs-worker sft`: learns, prints what it does, and leaves a folder that loads.

mod support;

use std::fs;

use pacs_model::{ModelConfig, Parameters};
use pacs_torch::tch::{Device, Kind};
use support::{failure, golden, lines, text, worker};

#[test]
fn a_model_from_scratch_learns_and_can_be_tuned_on() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (data, out, tuned) = (folder.path().join("data.jsonl"), folder.path().join("out"), folder.path().join("tuned"));
    let rows: String =
        (0..12).map(|i| format!("{{\"question\": \"{i} + 1?\", \"answer\": \"{}\"}}\n", i + 1)).collect();
    fs::write(&data, rows).expect("written");
    let model = golden("qwen2-tied");
    let shape = model.join("config.json");
    let scratch = [
        "sft",
        "--shape",
        text(&shape),
        "--tokenizer",
        text(&model),
        "--data",
        text(&data),
        "--eval",
        text(&data),
        "--out",
        text(&out),
        "--learning-rate",
        "5e-3",
        "--updates",
        "100",
        "--batch",
        "12",
        "--precision",
        "float32",
        "--threads",
        "1",
        "--weight-decay",
        "0",
        "--eval-every",
        "50",
        "--warmup-updates",
        "10",
    ];
    let printed = lines(&worker(&scratch));
    let of = |event: &str| printed.iter().filter(|line| line["event"] == event).collect::<Vec<_>>();
    assert_eq!(of("data")[0]["rows"], 12);
    let losses: Vec<f64> = of("evaluation").iter().map(|line| line["loss"].as_f64().expect("a number")).collect();
    assert_eq!(losses.len(), 3, "before, in between, after");
    // How far 100 updates get differs a little among processors, whose products add up in another order.
    assert!(losses[0] > 5.0 && losses[2] < 0.4, "{losses:?}");
    assert_eq!(of("update").len(), 10);
    assert_eq!(of("update")[9]["epoch"], 100.0);

    let config = ModelConfig::read(&out).expect("a folder that loads");
    Parameters::load(&out, &config, Kind::Float, Device::Cpu).expect("a folder that loads");
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        assert_eq!(fs::read(out.join(name)).expect("copied"), fs::read(model.join(name)).expect("golden"));
    }

    let further = lines(&worker(&[
        "sft",
        "--model",
        text(&out),
        "--data",
        text(&data),
        "--eval",
        text(&data),
        "--out",
        text(&tuned),
        "--epochs",
        "1",
        "--batch",
        "5",
        "--precision",
        "float32",
        "--threads",
        "1",
    ]));
    let before = further.iter().find(|line| line["event"] == "evaluation").expect("measured before");
    assert!(
        (before["loss"].as_f64().expect("a number") - losses[2]).abs() < 1e-5,
        "the saved weights are the trained ones"
    );
    let last = further.iter().rfind(|line| line["event"] == "update").expect("an update");
    assert_eq!((&last["update"], &last["epoch"]), (&3.into(), &1.0.into()), "12 rows are two fives and a two");

    let again = failure(&worker(&["sft", "--model", text(&out), "--data", text(&data), "--out", text(&tuned)]));
    assert!(again.contains("is not empty; remove it"), "{again}");
}

#[test]
fn bad_rows_are_refused_by_line() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (data, out, model) = (folder.path().join("data.jsonl"), folder.path().join("out"), golden("qwen3"));
    fs::write(&data, "{\"prompt\": \"a\", \"response\": \"b\"}\n\n{\"prompt\": \"a\"}\n").expect("written");
    let refused = failure(&worker(&["sft", "--model", text(&model), "--data", text(&data), "--out", text(&out)]));
    assert!(refused.contains("data.jsonl") && refused.contains("line 3"), "{refused}");
    assert!(!out.exists(), "nothing is written before the data is read");
}
