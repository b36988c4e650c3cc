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

/// From nothing to a model that gets a tenth right: by the commands that a study's models are made with.
#[test]
fn a_model_made_of_nothing_is_started_cold_from_a_job() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (blank, out, job) = (folder.path().join("blank"), folder.path().join("out"), folder.path().join("job.toml"));
    let sizes = ["--layers", "2", "--hidden", "64", "--heads", "4", "--ffn", "128", "--positions", "32"];
    let created = worker(&[&["create", text(&blank)][..], &sizes].concat());
    assert!(created.status.success(), "{}", String::from_utf8_lossy(&created.stderr));
    let config = ModelConfig::read(&blank).expect("a folder that loads");
    assert_eq!((config.layers, config.end_tokens.as_slice()), (2, &[1][..]));
    let generator = "task = 'reverse', length = 2, held_out = 50";
    let spec = format!(
        "name = 'a'\nmodel.path = '{}'\ndata.prompt_suffix = ''\nrollout.max_new_tokens = 4\nverifier.kind = 'exact'\n\
         data.train.generator = {{ {generator} }}\ndata.evaluation.generator = {{ {generator}, part = 'held_out' }}\n",
        out.display()
    );
    fs::write(&job, spec).expect("written");
    let more = [
        "--batch",
        "64",
        "--updates",
        "400",
        "--learning-rate",
        "3e-3",
        "--eval-every",
        "10",
        "--until-probability",
        "0.1",
        "--precision",
        "float32",
        "--threads",
        "1",
    ];
    let start = ["sft", "--model", text(&blank), "--job", text(&job), "--out", text(&out)];
    let printed = lines(&worker(&[&start[..], &more].concat()));
    let measured: Vec<f64> = printed
        .iter()
        .filter(|line| line["event"] == "evaluation")
        .filter_map(|line| line["answer_probability"].as_f64())
        .collect();
    let (last, before) = measured.split_last().expect("measured");
    assert!(*last >= 0.1 && before.iter().all(|share| *share < 0.1), "it ends as soon as it may: {measured:?}");
    assert!(measured[0] < 1e-3, "nothing is known before: {measured:?}");
    assert_eq!(
        printed.iter().filter(|line| line["event"] == "data").count(),
        2,
        "the job's problems and held-out ones"
    );

    let both = failure(&worker(&[&start[..], &["--data", text(&job)]].concat()));
    assert!(both.contains("cannot be used with"), "{both}");
    let full = failure(&worker(&["create", text(&blank)]));
    assert!(full.contains("it is not empty"), "{full}");
}

#[test]
fn bad_rows_are_refused_by_line() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (data, out, model) = (folder.path().join("data.jsonl"), folder.path().join("out"), golden("qwen3"));
    fs::write(&data, "{\"prompt\": \"a\", \"response\": \"b\"}\n\n{\"prompt\": \"a\"}\n").expect("written");
    let refused = failure(&worker(&["sft", "--model", text(&model), "--data", text(&data), "--out", text(&out)]));
    assert!(refused.contains("data.jsonl") && refused.contains("line 3"), "{refused}");
    assert!(!out.exists(), "nothing is written before the data is read");

    fs::write(&data, "{\"prompt\": \"a\", \"response\": \"b\"}\n").expect("written");
    let options = ["--data", text(&data), "--out", text(&out), "--max-tokens", "1"];
    let refused = failure(&worker(&[&["sft", "--model", text(&model)][..], &options].concat()));
    assert!(refused.contains("are longer than 1 tokens") && refused.contains("`--max-tokens` (1)"), "{refused}");
}
