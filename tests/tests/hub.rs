//! The real programs with models and data sets of a hub: a server of this test that speaks its interface.

#[path = "../../crates/hub/tests/support/mod.rs"]
mod support;

use std::fs;
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use pacs_tests::{Job, root};
use serde_json::Value;

use support::HubServer;

const MODEL: &str = "models/o/tiny";
const DATA: &str = "datasets/o/sums";

/// A hub with the tiny model, and problems in two files.
fn hub() -> Result<HubServer> {
    let server = HubServer::start();
    server.commit(
        MODEL,
        &files_of_model("")?.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect::<Vec<_>>(),
    );
    server.commit(
        DATA,
        &[
            ("README.md", b"# sums"),
            ("data/train-00000-of-00002.jsonl", &rows(0..20)),
            ("data/train-00001-of-00002.jsonl", &rows(20..40)),
        ],
    );
    server.require_token("hf_write");
    Ok(server)
}

fn files_of_model(readme: &str) -> Result<Vec<(String, Vec<u8>)>> {
    let mut files = vec![("README.md".to_owned(), readme.as_bytes().to_vec())];
    for entry in fs::read_dir(root().join("tests/golden/models/qwen2-tied"))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        // Cases of other tests are no part of the model.
        if !name.ends_with("_cases.json") {
            files.push((name, fs::read(entry.path())?));
        }
    }
    Ok(files)
}

fn rows(range: std::ops::Range<usize>) -> Vec<u8> {
    let row = |i: usize| format!("{{\"prompt\": \"Question {i}?\", \"target\": {}}}\n", i % 10);
    range.map(row).collect::<String>().into_bytes()
}

/// A job that names the hub's.
fn job() -> Result<Job> {
    let mut train = toml::Table::new();
    train.insert("path".to_owned(), "hf://datasets/o/sums/train".into());
    let mut evaluation = train.clone();
    evaluation.insert("limit".to_owned(), 10.into());
    Ok(Job::tiny()?.with("model.path", "o/tiny").with("data.train", train).with("data.evaluation", evaluation))
}

/// A program that sees the server, and a cache in the job's folder.
fn program(job: &Job, server: &HubServer, name: &str, arguments: &[&str]) -> Result<Command> {
    let mut command = job.command(name)?;
    for variable in
        ["HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"]
    {
        command.env_remove(variable);
    }
    command.env("HF_ENDPOINT", server.endpoint()).env("HF_HOME", job.path("hf")).args(arguments);
    Ok(command)
}

fn output(mut command: Command, code: i32) -> Result<(String, String)> {
    let Output { status, stdout, stderr } = command.output().context("start it")?;
    let (stdout, stderr) =
        (String::from_utf8_lossy(&stdout).into_owned(), String::from_utf8_lossy(&stderr).into_owned());
    ensure!(status.code() == Some(code), "{command:?} ended with {status}\n{stdout}\n{stderr}");
    Ok((stdout, stderr))
}

#[test]
fn a_run_resumes_with_the_commits_that_it_began_with() -> Result<()> {
    let (server, job) = (hub()?, job()?);
    let spec = job.write_spec()?.display().to_string();
    let run_dir = job.path("run").display().to_string();
    let run = |steps: &'static str| {
        let arguments = ["run", &spec, "--run-dir", &run_dir, "--steps", steps, "--listen", "127.0.0.1:0"];
        output(program(&job, &server, "pacs", &arguments)?, 0)
    };
    let (said, notes) = run("1")?;
    ensure!(said.contains("o/tiny of the hub, commit"), "{said}");
    ensure!(said.contains("questions from `prompt`, answers from `target`"), "{said}");
    ensure!(notes.contains("data `hf://datasets/o/sums/train` of the hub"), "{notes}");
    let pins = fs::read_to_string(job.run_path("hub.json"))?;

    // The branches move on, to a model that is none and problems that are others.
    let broken: [(&str, &[u8]); 2] = [("config.json", b"{}"), ("model.safetensors", b"")];
    server.commit(MODEL, &broken);
    server.commit(DATA, &[("train.jsonl", &rows(0..5))]);
    server.seen();
    let (said, _) = run("2")?;
    ensure!(said.contains("resumed from step 1"), "{said}");
    ensure!(server.seen().is_empty(), "a run that has begun asks for nothing");
    ensure!(fs::read_to_string(job.run_path("hub.json"))? == pins);
    // A replay of its archive starts from the model that the run started from.
    let replayed = job.path("replayed").display().to_string();
    let replay =
        ["replay", "--job", &spec, "--archive", &run_dir, "--steps", "1", "--threads", "1", "--out", &replayed];
    let (said, _) = output(program(&job, &server, "pacs-worker", &replay)?, 0)?;
    ensure!(said.contains("\"saved\"") && server.seen().is_empty(), "{said}");

    let checkpoint = job.run_path("checkpoints/step-000002").display().to_string();
    let push = ["push", &checkpoint, "me/mine", "--private", "--json"];
    let (_, refused) = output(program(&job, &server, "pacs", &push)?, 78)?;
    ensure!(refused.contains("HF_TOKEN"), "{refused}");
    let mut command = program(&job, &server, "pacs", &push)?;
    command.env("HF_TOKEN", "hf_write");
    let pushed: Value = serde_json::from_str(&output(command, 0)?.0)?;
    let repo = server.repo("models/me/mine").context("it was made")?;
    let (commit, files) = repo.commits.last().context("a commit")?;
    ensure!(pushed["commit"] == commit.as_str() && repo.private, "{pushed}");
    let weights = fs::read(job.run_path("checkpoints/step-000002/model/model.safetensors"))?;
    ensure!(files.get("model.safetensors") == Some(&weights) && files.contains_key("tokenizer.json"));

    // The trained model is a model of the hub like any other.
    fs::write(job.path("q.jsonl"), "{\"question\": \"1 + 1?\"}\n")?;
    let question = job.path("q.jsonl").display().to_string();
    let generate = ["generate", "--model", "me/mine", "--input", &question, "--max-new-tokens", "4", "--threads", "1"];
    let mut command = program(&job, &server, "pacs-worker", &generate)?;
    command.env("HF_TOKEN", "hf_write");
    let sample: Value = serde_json::from_str(output(command, 0)?.0.trim())?;
    ensure!(sample["tokens"].as_array().is_some_and(|tokens| !tokens.is_empty()), "{sample}");
    job.check_no_panic()
}

#[test]
fn names_of_the_hub_are_looked_at_and_fetched_before_a_run() -> Result<()> {
    let (server, job) = (hub()?, job()?);
    let spec = job.write_spec()?.display().to_string();
    let pacs = |arguments: &[&str], code: i32| output(program(&job, &server, "pacs", arguments)?, code);
    // A plan takes no weights.
    let (plan, _) = pacs(&["job", "check", &spec], 0)?;
    ensure!(plan.contains("tiny"), "{plan}");
    ensure!(!server.seen().iter().any(|seen| seen.line.contains("model.safetensors")), "a check fetches no weights");
    let (found, _) = pacs(&["model", "check", "o/tiny", "--json"], 0)?;
    let found: Value = serde_json::from_str(&found)?;
    ensure!(found["architecture"] == "qwen2" && found["parameters"].is_null(), "{found}");
    let (found, _) = pacs(&["data", "check", "hf://datasets/o/sums/train", "--json"], 0)?;
    let found: Value = serde_json::from_str(&found)?;
    ensure!(found["train"]["rows"] == 40, "{found}");

    let (paths, _) = pacs(&["fetch", &spec], 0)?;
    let paths: Vec<&str> = paths.lines().collect();
    ensure!(paths.len() == 3 && paths[1].ends_with("data/train-*.jsonl"), "{paths:?}");
    server.seen();
    let mut offline = program(&job, &server, "pacs", &["job", "check", &spec, "--json"])?;
    offline.env("HF_HUB_OFFLINE", "1");
    let plan: Value = serde_json::from_str(&output(offline, 0)?.0)?;
    ensure!(plan["model"]["parameters"] == 154_432 && plan["data"]["train"]["rows"] == 40, "{plan}");
    ensure!(server.seen().is_empty(), "offline is offline");
    Ok(())
}

#[test]
fn fine_tuning_on_a_job_finds_its_model_and_its_problems() -> Result<()> {
    let (server, job) = (hub()?, job()?);
    let spec = job.write_spec()?.display().to_string();
    let tune = |out: &str, more: &[&str], offline: bool, code: i32| -> Result<(String, String)> {
        let out = job.path(out).display().to_string();
        let fixed =
            ["sft", "--job", &spec, "--out", &out, "--updates", "1", "--threads", "1", "--precision", "float32"];
        let mut command = program(&job, &server, "pacs-worker", &[&fixed, more].concat())?;
        if offline {
            command.env("HF_HUB_OFFLINE", "1");
        }
        output(command, code)
    };
    let (_, errors) = tune("none", &[], true, 78)?;
    ensure!(errors.contains("find model `o/tiny`") && errors.contains("pacs fetch"), "{errors}");

    // Another model takes the place of the job's, which is then not fetched.
    let other = root().join("tests/golden/models/qwen2-tied").display().to_string();
    tune("other", &["--model", &other], false, 0)?;
    let asked: Vec<String> = server.seen().into_iter().map(|seen| seen.line).collect();
    ensure!(asked.iter().any(|line| line.contains("o/sums")), "{asked:?}");
    ensure!(!asked.iter().any(|line| line.contains("o/tiny")), "{asked:?}");

    let (said, notes) = tune("tuned", &[], false, 0)?;
    ensure!(notes.contains("model `o/tiny` of the hub: commit"), "{notes}");
    ensure!(notes.contains("data `hf://datasets/o/sums/train` of the hub: commit"), "{notes}");
    let events: Vec<Value> = said.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let rows: Vec<_> = events.iter().filter(|event| event["event"] == "data").map(|event| &event["rows"]).collect();
    ensure!(rows == [40, 10], "training problems and held-out ones: {said}");
    let weights = |folder: &str| fs::read(job.path(folder).join("model.safetensors"));
    ensure!(weights("tuned")? == weights("other")?, "the hub's model is the one in the repository");

    // By now the cache has all of it.
    server.seen();
    tune("again", &[], true, 0)?;
    ensure!(server.seen().is_empty(), "offline is offline");
    Ok(())
}

#[test]
fn an_unavailable_file_is_one_error_that_says_what_to_do() -> Result<()> {
    let (server, job) = (hub()?, job()?);
    let spec = job.write_spec()?.display().to_string();
    let run_dir = job.path("run").display().to_string();
    for (options, offline, said) in [
        (&["--model", "o/none"][..], false, &["`o/none`, which is no folder here", "HF_TOKEN"][..]),
        (&["--dataset", "hf://datasets/o/sums/test"], false, &["nothing for `test`", "data/train-*.jsonl"]),
        (&["--dataset", "hf://o/sums"], false, &["expected `hf://datasets/"]),
        (&[], true, &["HF_HUB_OFFLINE is set", "pacs fetch"]),
    ] {
        let arguments = [&["run", spec.as_str(), "--run-dir", &run_dir], options].concat();
        let mut command = program(&job, &server, "pacs", &arguments)?;
        if offline {
            command.env("HF_HUB_OFFLINE", "1");
        }
        let (_, errors) = output(command, 78)?;
        ensure!(errors.matches("error:").count() == 1, "{errors}");
        for part in said {
            ensure!(errors.contains(part), "`{part}` is not in: {errors}");
        }
    }
    // A folder of that name wins, and that is said.
    let folder = job.path("o/tiny");
    fs::create_dir_all(&folder)?;
    for (name, bytes) in files_of_model("")? {
        fs::write(folder.join(name), bytes)?;
    }
    let mut command = program(&job, &server, "pacs", &["model", "check", "o/tiny"])?;
    server.seen();
    command.current_dir(job.path(""));
    let (found, notes) = output(command, 0)?;
    ensure!(found.contains("154 432 parameters") && notes.contains("is the folder of that name"), "{found}{notes}");
    ensure!(server.seen().is_empty());
    Ok(())
}
