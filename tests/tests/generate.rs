//! `pacs-worker generate` and the generation benchmarks, through their command line.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result};
use pacs_tests::{program, root};
use serde_json::{Value, json};

fn worker(arguments: &[&str], input: &str) -> Result<Output> {
    let mut command = Command::new(program("pacs-worker")?);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().context("start pacs-worker")?;
    let mut stdin = child.stdin.take().context("piped")?;
    let input = input.to_owned();
    // Write from a thread, and ignore errors: the program may end before it has read all input.
    let writing = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output().context("wait for pacs-worker")?;
    let _ = writing.join();
    Ok(output)
}

fn model() -> String {
    root().join("tests/golden/models/qwen3").display().to_string()
}

fn generate(options: &[&str], input: &str) -> Result<Output> {
    let model = model();
    let fixed = ["generate", "--model", &model, "--precision", "float32", "--threads", "1", "--max-new-tokens", "12"];
    worker(&[&fixed[..], options].concat(), input)
}

fn lines(output: &Output) -> Result<Vec<Value>> {
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let text = std::str::from_utf8(&output.stdout)?;
    text.lines().map(|line| serde_json::from_str(line).with_context(|| line.to_owned())).collect()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().map(|list| list.iter().filter_map(Value::as_f64).collect()).unwrap_or_default()
}

const PROMPTS: &str = "{\"prompt\": \"1 + 1 =\", \"id\": \"a\"}\n\n{\"question\": \"What is 2 + 3?\"}\n\
                       {\"messages\": [{\"role\": \"user\", \"content\": \"What is 2 + 3? Think.\"}]}\n";

#[test]
fn samples_come_in_order_with_both_log_probs() -> Result<()> {
    let cut = ["--n", "3", "--top-p", "0.8", "--top-k", "30", "--min-p", "0.01", "--suffix", " Think.", "--rows", "4"];
    let found = lines(&generate(&cut, PROMPTS)?)?;
    let places: Vec<(Option<u64>, Option<u64>)> =
        found.iter().map(|line| (line["row"].as_u64(), line["sample"].as_u64())).collect();
    let expected: Vec<(Option<u64>, Option<u64>)> =
        [1, 3, 4].into_iter().flat_map(|row| (0..3).map(move |sample| (Some(row), Some(sample)))).collect();
    assert_eq!(places, expected);
    assert_eq!((&found[0]["id"], found[3].get("id")), (&json!("a"), None));
    assert_eq!(found[3]["prompt_tokens"], found[6]["prompt_tokens"], "a question is a message of the user");
    for line in &found {
        let (plain, sampled) = (numbers(&line["logprobs"]), numbers(&line["sampled_logprobs"]));
        let tokens = line["tokens"].as_array().context("tokens")?.len();
        assert!(tokens >= 1 && (plain.len(), sampled.len()) == (tokens, tokens), "{line}");
        assert!(plain.iter().zip(&sampled).all(|(plain, sampled)| plain <= sampled && *sampled <= 0.0), "{line}");
        assert!(line["finish"] == "length" || tokens < 12 || line["finish"] == "stop");
        assert!(line["text"].is_string());
    }
    // The same seed gives the same samples in other batches and on the reference path.
    let other = [&cut[..cut.len() - 1], &["1", "--reference"]].concat();
    let again = lines(&generate(&other, PROMPTS)?)?;
    for (line, again) in found.iter().zip(&again) {
        assert_eq!(line["tokens"], again["tokens"]);
    }
    Ok(())
}

#[test]
fn the_most_probable_token_has_a_log_prob_at_temperature_one() -> Result<()> {
    let found = lines(&generate(&["--temperature", "0"], PROMPTS)?)?;
    assert_eq!(found.len(), 3);
    for line in &found {
        // At temperature 0 only one token can be drawn, so its sampling log-prob is 0.
        assert!(numbers(&line["sampled_logprobs"]).iter().all(|logprob| *logprob == 0.0), "{line}");
        assert!(numbers(&line["logprobs"]).iter().all(|logprob| *logprob < 0.0), "{line}");
    }
    let free = lines(&generate(&["--n", "2"], PROMPTS)?)?;
    assert!(free.iter().all(|line| line["logprobs"] == line["sampled_logprobs"]), "nothing was cut off");
    Ok(())
}

#[test]
fn wrong_input_is_one_error_with_its_row() -> Result<()> {
    for (options, input, words) in [
        (&[][..], "{\"prompt\": \"a\"}\n{\"text\": \"b\"}\n", &["`-`:2", "`prompt`, `messages` or `question`"][..]),
        (&[], "{\"prompt\": ", &["`-`:1", "not a JSON object"]),
        (&["--top-p", "0"], PROMPTS, &["--top-p 0", "above 0"]),
        (&["--temperature", "0", "--top-k", "5"], PROMPTS, &["--top-k", "no effect"]),
        (&["--cache-tokens", "13"], PROMPTS, &["`-`:1", "exceed --cache-tokens 13"]),
        (&["--input", "no/such/file.jsonl"], "", &["no/such/file.jsonl"]),
        (&["--output", "no/such/file.jsonl"], PROMPTS, &["no/such/file.jsonl"]),
    ] {
        let output = generate(options, input)?;
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(78), "{options:?}: {error}");
        assert!(words.iter().all(|word| error.contains(word)) && error.trim().lines().count() == 1, "{error}");
        assert!(output.stdout.is_empty());
    }
    Ok(())
}

#[test]
fn benchmarks_print_json_lines() -> Result<()> {
    let model = model();
    let bench = |what: &str, options: &[&str]| {
        lines(&worker(
            &[&["bench", what, "--model", &model, "--random-weights", "--threads", "1"][..], options].concat(),
            "",
        )?)
    };
    let decode = bench("decode", &["--batch", "1,3", "--context", "20,70", "--steps", "4", "--bandwidth", "10"])?;
    assert_eq!(decode.len(), 4);
    for line in &decode {
        for key in ["ms_per_step", "tokens_per_second", "bytes_per_second", "floor_ms", "times_the_floor"] {
            assert!(line[key].as_f64().is_some_and(|value| value > 0.0), "{key} in {line}");
        }
    }
    assert!(decode[3]["kv_bytes"].as_f64() > decode[0]["kv_bytes"].as_f64());
    let prefill = bench("prefill", &["--batch", "2", "--context", "50", "--repeats", "1"])?;
    assert!(prefill.len() == 1 && prefill[0]["tokens_per_second"].as_f64().is_some_and(|rate| rate > 0.0));
    let options =
        ["--long-tail", "--groups", "16", "--samples", "2", "--rows", "4", "--new-tokens", "9", "--repeats", "1"];
    let rollout = bench("rollout", &options)?;
    let ratio = rollout.last().and_then(|line| line["heavy_tail_over_uniform"].as_f64());
    assert!(ratio.is_some_and(|ratio| ratio > 0.0), "{rollout:?}");
    Ok(())
}
