//! `pacs verify` and `pacs data check`, through their command line.

use std::fs;
use std::io::Write;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result};
use pacs_tests::{Job, program};
use serde_json::Value;

fn pacs(arguments: &[&str], input: &str) -> Result<Output> {
    let mut command = Command::new(program("pacs")?);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().context("start pacs")?;
    let mut stdin = child.stdin.take().context("piped")?;
    let input = input.to_owned();
    // Write from a thread, and ignore errors: the program may end before it has read all input.
    let writing = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output().context("wait for pacs")?;
    let _ = writing.join();
    Ok(output)
}

fn lines(output: &Output) -> Result<Vec<Value>> {
    let text = std::str::from_utf8(&output.stdout)?;
    text.lines().map(|line| serde_json::from_str(line).with_context(|| line.to_owned())).collect()
}

fn rows(count: usize) -> String {
    let row =
        |i: usize| format!("{{\"id\": \"r{i}\", \"gold\": \"{}\", \"pred\": \"so \\\\boxed{{{i}}}\"}}\n", i / 2 * 2);
    (0..count).map(row).collect()
}

#[test]
fn verdicts_come_in_the_order_of_the_rows() -> Result<()> {
    let output = pacs(&["verify", "math", "--input", "-", "--threads", "3"], &rows(3000))?;
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let verdicts = lines(&output)?;
    assert_eq!(verdicts.len(), 3000);
    for (i, verdict) in verdicts.iter().enumerate() {
        let right = i % 2 == 0;
        assert_eq!(verdict["id"], format!("r{i}"));
        assert_eq!(verdict["outcome"], if right { "correct" } else { "wrong" }, "{verdict}");
        assert_eq!(verdict["label"], f64::from(u8::from(right)));
        let keys: Vec<_> = verdict.as_object().context("an object")?.keys().map(String::as_str).collect();
        assert_eq!(keys, ["id", "outcome", "label", "reward", "extracted", "rule", "elapsed_us"]);
    }
    let summary = String::from_utf8(output.stderr)?;
    assert!(summary.contains("3 000 rows in") && summary.contains("1 500 correct, 1 500 wrong"), "{summary}");
    Ok(())
}

#[test]
fn answers_that_are_no_mathematics_have_rules_of_their_own() -> Result<()> {
    let outcomes = |kind: &str, rows: &[(&str, &str)]| -> Result<Vec<String>> {
        let row = |(gold, pred): &(&str, &str)| format!("{}\n", serde_json::json!({"gold": gold, "pred": pred}));
        let output = pacs(&["verify", kind, "--input", "-"], &rows.iter().map(row).collect::<String>())?;
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(lines(&output)?.iter().map(|verdict| verdict["outcome"].as_str().unwrap_or_default().to_owned()).collect())
    };
    assert_eq!(
        outcomes("exact", &[("tac", "So:\ntac"), ("tac", "tac."), ("tac", "")])?,
        ["correct", "wrong", "unparsable"]
    );
    let gold = "44 from all of 19, 5, 5";
    let rows = [(gold, "5 * 5 + 19 = 44"), (gold, "44"), (gold, "x"), ("44", "44")];
    assert_eq!(outcomes("countdown", &rows)?, ["correct", "wrong", "unparsable", "failed"]);
    Ok(())
}

#[test]
fn a_bad_row_is_named_with_its_line() -> Result<()> {
    let job = Job::tiny()?;
    let file = job.path("rows.jsonl");
    fs::write(&file, format!("{}{{\"gold\": \"1\"\n{}", rows(2), rows(5)))?;
    let output = pacs(&["verify", "math", "--input", &file.display().to_string()], "")?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(78), "{error}");
    assert!(error.contains("rows.jsonl`, line 3: EOF while parsing"), "{error}");
    assert_eq!(lines(&output)?.len(), 2, "the rows before it are graded");
    Ok(())
}

#[test]
fn a_program_that_fails_gives_no_label() -> Result<()> {
    let job = Job::tiny()?;
    let each = r#"case "$task" in *boxed{1}*) echo garbage;; *boxed{2}*) sleep 1000;; *) answer correct script;; esac"#;
    let script = job.verifier_script(each)?;
    let arguments = ["verify", "exec", "--input", "-", "--timeout", "3", "--", &script[0], &script[1]];
    let output = pacs(&arguments, &rows(4))?;
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let verdicts = lines(&output)?;
    let outcomes: Vec<_> = verdicts.iter().map(|verdict| verdict["outcome"].as_str().unwrap_or_default()).collect();
    assert_eq!(outcomes, ["correct", "failed", "timed_out", "correct"]);
    assert_eq!((&verdicts[1]["label"], &verdicts[2]["reward"]), (&Value::Null, &Value::Null));
    assert_eq!((&verdicts[0]["label"], &verdicts[0]["rule"]), (&1.0.into(), &"script".into()));
    assert!(verdicts[1]["rule"].as_str().is_some_and(|rule| rule.contains("`garbage`")), "{}", verdicts[1]);
    Ok(())
}

#[test]
fn data_check_names_rows_and_says_so_in_its_exit_code() -> Result<()> {
    let job = Job::tiny()?;
    let (train, test) = (job.path("train.jsonl"), job.path("test.jsonl"));
    fs::write(
        &train,
        "{\"question\": \"1 + 1?\", \"answer\": \"2\"}\n{\"question\": \"2 + 2?\", \"answer\": \"(4, \"}\n",
    )?;
    fs::write(&test, "{\"question\": \"1 +  1\", \"answer\": \"2\"}\n")?;
    let (train, test) = (train.display().to_string(), test.display().to_string());
    let model = pacs_tests::root().join("tests/golden/models/qwen2-tied").display().to_string();
    let output = pacs(&["data", "check", &train, "--evaluation", &test, "--model", &model, "--json"], "")?;
    assert_eq!(output.status.code(), Some(78), "{}", String::from_utf8_lossy(&output.stderr));
    let found: Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(found["train"]["unreadable_answers"]["count"], 1);
    let first = found["train"]["unreadable_answers"]["first"][0].as_str().context("a place")?;
    assert!(first.contains("train.jsonl:2: "), "{first}");
    assert_eq!((&found["overlap"]["count"], &found["train"]["rows"]), (&1.into(), &2.into()));
    assert!(found["train"]["prompt_tokens"]["longest"].as_u64() > Some(0), "{found:#}");

    let clean = pacs(&["data", "check", &train, "--any-answer"], "")?;
    assert_eq!(clean.status.code(), Some(0), "{}", String::from_utf8_lossy(&clean.stderr));
    assert!(String::from_utf8_lossy(&clean.stdout).contains("2 rows"));
    Ok(())
}
