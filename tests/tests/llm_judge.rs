//! The judge of `deploy/verifiers` against a stub of its endpoint.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use pacs_tests::root;
use serde_json::{Value, json};

/// Answers each call with the next of `answers`, a status and a text; notes what it was asked.
fn endpoint(answers: Vec<(u16, String)>) -> Result<(String, Arc<Mutex<Vec<String>>>)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("http://{}/v1", listener.local_addr()?);
    let asked = Arc::new(Mutex::new(Vec::new()));
    let notes = Arc::clone(&asked);
    // Ends with the last answer; the process of the test ends it otherwise.
    std::thread::spawn(move || {
        for (status, text) in answers {
            let Ok((stream, _)) = listener.accept() else { return };
            let Ok(request) = serve(stream, status, &text) else { return };
            notes.lock().expect("nobody panics with it").push(request);
        }
    });
    Ok((url, asked))
}

fn serve(stream: TcpStream, status: u16, text: &str) -> Result<String> {
    let mut reader = BufReader::new(stream);
    let (mut head, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse()?;
        }
        if line.trim().is_empty() {
            break;
        }
        head.push_str(&line);
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let mut stream = reader.into_inner();
    write!(stream, "HTTP/1.1 {status} X\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{text}", text.len())?;
    Ok(head + &String::from_utf8(body)?)
}

fn said(text: &str) -> (u16, String) {
    let usage = json!({"total_tokens": 100});
    (200, json!({"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage}).to_string())
}

/// Gives the judge tasks, one by one, and returns its answers.
fn judge(url: &str, options: &[&str], responses: &[&str]) -> Result<Vec<Value>> {
    let mut process = Command::new("python3")
        .arg(root().join("deploy/verifiers/llm_judge.py"))
        .args(["--url", url, "--model", "stub", "--retries", "2"])
        .args(options)
        .env("OPENAI_API_KEY", "sesame")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut stdin = process.stdin.take().context("piped")?;
    let mut lines = BufReader::new(process.stdout.take().context("piped")?).lines();
    let mut next = || -> Result<Value> { Ok(serde_json::from_str(&lines.next().context("a line")??)?) };
    let hello = next()?;
    assert_eq!(hello["pacs_verifier"], 1);
    let mut answers = Vec::new();
    for (id, response) in responses.iter().enumerate() {
        let task = json!({"id": id, "question": "6 * 7?", "gold": "42", "response": response});
        writeln!(stdin, "{task}")?;
        let answer = next()?;
        assert_eq!(answer["id"], id);
        answers.push(answer);
    }
    drop(stdin);
    assert!(process.wait()?.success());
    Ok(answers)
}

#[test]
fn verdicts_are_read_and_remembered() -> Result<()> {
    let (url, asked) = endpoint(vec![
        said(r#"I think so. {"verdict": "correct", "score": 0.9, "reason": "same number"}"#),
        said(r#"<think>{"verdict": "correct"}</think>{"verdict": "wrong", "reason": "41"}"#),
    ])?;
    let answers = judge(&url, &[], &["It is 42.", "It is 41.", "It is 42."])?;
    assert_eq!((&answers[0]["outcome"], &answers[0]["reward"]), (&json!("correct"), &json!(0.9)));
    assert_eq!(answers[0]["rule"], "judge: same number");
    assert_eq!((&answers[1]["outcome"], &answers[1]["reward"]), (&json!("wrong"), &json!(0.0)));
    assert_eq!(answers[2]["outcome"], "correct");
    let asked = asked.lock().expect("nobody panics with it");
    assert_eq!(asked.len(), 2, "the third was remembered");
    assert!(asked[0].starts_with("POST /v1/chat/completions") && asked[0].contains("It is 42."), "{}", asked[0]);
    assert!(asked[0].to_ascii_lowercase().contains("authorization: bearer sesame"));
    Ok(())
}

#[test]
fn errors_are_failures_and_never_wrong_answers() -> Result<()> {
    let (url, _) = endpoint(vec![
        (503, "busy".into()),
        said(r#"{"verdict": "correct"}"#),
        said("no object at all"),
        said(r#"{"verdict": "perhaps"}"#),
        said(r#"{"verdict": "correct", "score": 7}"#),
        (401, "no such key".into()),
        (200, "garbage".into()),
        (200, "{}".into()),
        (429, "slow down".into()),
    ])?;
    let answers = judge(&url, &[], &["a", "b", "c", "d", "e", "f"])?;
    let rule = |index: usize| answers[index]["rule"].as_str().unwrap_or_default().to_owned();
    assert_eq!(answers[0]["outcome"], "correct", "tried again after 503: {}", answers[0]);
    for answer in &answers[1..] {
        assert_eq!(answer["outcome"], "failed", "{answer}");
    }
    assert!(rule(1).contains("gave no verdict") && rule(2).contains("gave no verdict"));
    assert!(rule(3).contains("score 7"));
    assert!(rule(4).contains("status 401: no such key"));
    assert!(rule(5).contains("status 429"), "{}", rule(5));
    Ok(())
}

#[test]
fn a_budget_is_kept() -> Result<()> {
    let (url, asked) = endpoint(vec![said(r#"{"verdict": "correct"}"#); 3])?;
    let answers = judge(&url, &["--budget-calls", "2"], &["a", "b", "c", "a"])?;
    let outcomes: Vec<_> = answers.iter().map(|answer| answer["outcome"].clone()).collect();
    assert_eq!(outcomes, ["correct", "correct", "failed", "correct"], "what is remembered costs nothing");
    assert!(answers[2]["rule"].as_str().is_some_and(|rule| rule.contains("the budget of 2 calls is spent")));
    assert_eq!(asked.lock().expect("nobody panics with it").len(), 2);
    let (url, _) = endpoint(vec![said(r#"{"verdict": "wrong", "score": 0.3}"#); 3])?;
    let answers = judge(&url, &["--budget-tokens", "150", "--label", "score"], &["a", "b", "c"])?;
    assert_eq!((&answers[0]["outcome"], &answers[0]["label"]), (&json!("wrong"), &json!(0.3)));
    assert_eq!(answers[2]["outcome"], "failed", "100 tokens each");
    Ok(())
}
