//! Bad input of any kind gives one clear error, and an exit code that says whether a retry can help.

#[path = "../fuzz/src/data_file.rs"]
#[allow(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod data_file;
#[path = "../fuzz/src/job_spec.rs"]
mod job_spec;
#[path = "../fuzz/src/model_folder.rs"]
#[allow(clippy::unwrap_used, reason = "a panic is how a test fails")]
mod model_folder;
#[path = "../fuzz/src/mutate.rs"]
mod mutate;

use std::fs;
use std::net::TcpListener;

use anyhow::{Context, Result};
use pacs_tests::{Ended, Job, root};

/// Checks that the error is on standard error exactly once, and not on standard output.
fn assert_one_error(ended: &Ended, code: i32, parts: &[&str]) {
    ended.expect_code(code);
    assert_eq!(ended.stderr.matches("error:").count(), 1, "{}", ended.stderr);
    for part in parts {
        assert!(ended.stderr.contains(part), "`{part}` is not in: {}", ended.stderr);
    }
}

#[test]
fn a_wrong_model_path() -> Result<()> {
    let job = Job::tiny()?.with("model.path", "no/such/model");
    assert_one_error(&job.start()?.wait()?, 78, &["no/such/model"]);
    Ok(())
}

#[test]
fn an_unknown_key() -> Result<()> {
    let job = Job::tiny()?.with("rollout.temprature", 1.0);
    assert_one_error(&job.start()?.wait()?, 78, &["rollout.temprature", "temperature"]);
    Ok(())
}

#[test]
fn several_wrong_values_are_reported_together() -> Result<()> {
    let job = Job::tiny()?.with("rollout.temperature", -1.0).with("batch.mini_batches", 3);
    assert_one_error(&job.start()?.wait()?, 78, &["rollout.temperature", "batch.mini_batches"]);
    Ok(())
}

#[test]
fn a_bad_row_of_problems() -> Result<()> {
    let job = Job::tiny()?;
    job.write_problems(|i| {
        if i == 16 { r#"{"question": "torn"#.into() } else { format!(r#"{{"question": "{i}", "answer": "1"}}"#) }
    })?;
    assert_one_error(&job.start()?.wait()?, 78, &["problems.jsonl", "17"]);
    Ok(())
}

#[test]
fn a_hostile_chat_template_is_one_error() -> Result<()> {
    let double = "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}";
    let job = Job::tiny()?.with("model.chat_template", double);
    assert_one_error(&job.start()?.wait()?, 78, &["chat template", "512 MiB of memory"]);
    // By the program that links libtorch, too.
    let (template, rows) = (job.path("chat.jinja"), job.path("rows.jsonl"));
    fs::write(&template, double)?;
    fs::write(&rows, "{\"question\": \"1 + 1\"}\n")?;
    let mut generate = job.command("pacs-worker")?;
    generate.arg("generate").arg("--model").arg(root().join("tests/golden/models/qwen3"));
    let generated = generate.arg("--input").arg(&rows).arg("--chat-template").arg(&template).output()?;
    let said = String::from_utf8_lossy(&generated.stderr);
    assert!(!generated.status.success() && said.contains("512 MiB of memory"), "{said}");
    Ok(())
}

#[test]
fn a_corrupt_model_file() -> Result<()> {
    let job = Job::tiny()?;
    let model = job.path("model");
    fs::create_dir(&model)?;
    for entry in fs::read_dir(root().join("tests/golden/models/qwen2-tied"))? {
        let entry = entry?;
        fs::copy(entry.path(), model.join(entry.file_name()))?;
    }
    let weights = model.join("model.safetensors");
    let bytes = fs::read(&weights)?;
    fs::write(&weights, &bytes[..bytes.len() - 1000])?;
    let job = job.with("model.path", model.to_str().context("a readable path")?);
    assert_one_error(&job.start()?.wait()?, 78, &["model.safetensors"]);
    Ok(())
}

#[test]
fn a_port_in_use() -> Result<()> {
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let address = taken.local_addr()?.to_string();
    let job = Job::tiny()?;
    let ended = job.start_with(&["--listen", &address])?.wait()?;
    assert_ne!(ended.code, Some(0));
    assert_one_error(&ended, ended.code.context("it ends by itself")?, &[&address, "in use"]);
    Ok(())
}

#[test]
fn two_runs_in_one_folder() -> Result<()> {
    let job = Job::tiny()?.with("batch.steps", 100);
    let mut first = job.start()?;
    first.wait_until("a phase", |status| status["phase"].is_string())?;
    let second = job.start()?.wait()?;
    assert_ne!(second.code, Some(0));
    assert_eq!(second.stderr.matches("error:").count(), 1, "{}", second.stderr);
    Ok(())
}

/// Runs a bounded number of inputs of each target in `tests/fuzz`: none may panic or hang.
#[test]
fn any_job_spec_is_read_or_refused() {
    mutate::each(&job_spec::examples(), 3000, job_spec::check);
}

#[test]
fn any_file_of_problems_is_read_or_refused() {
    mutate::each(&data_file::examples(), 600, data_file::check);
}

#[test]
fn any_model_folder_is_read_or_refused() {
    mutate::each(&model_folder::examples(), 600, model_folder::check);
}
