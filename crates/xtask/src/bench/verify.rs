//! `cargo xtask bench verify`: speed of grading mathematical answers, and agreement with math-verify.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use pacs_verify::{Mode, grade_counted};
use serde_json::{Value, json};

use crate::process::{check, command, target};

/// Version of math-verify that the documented numbers refer to.
const MATH_VERIFY: &str = "math-verify[antlr4_13_2]==0.9.0";

/// Program that grades the pairs of a file, first once for the verdicts, then repeatedly for the time.
const MATH_VERIFY_SCRIPT: &str = include_str!("math_verify.py");

/// Pairs to grade, and how long.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  cargo xtask bench verify --input pairs.jsonl --seconds 10")]
pub(crate) struct Arguments {
    /// Pairs to grade: JSON lines with `gold` and `pred`; `kind` is `response` (a model's text) or `answer` (bare);
    /// `expected`, where given, is the right verdict.
    #[arg(long)]
    input: Option<PathBuf>,
    /// How long each of the two is timed, after one pass over the pairs.
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// A Python that has math-verify [default: one that is set up with pip below target/]
    #[arg(long)]
    python: Option<PathBuf>,
}

struct Pair {
    gold: String,
    response: String,
    expected: Option<bool>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let Some(input) = &arguments.input else {
        bail!("grade answers: pass `--input FILE`, JSON lines with `gold` and `pred` (see `--help`)");
    };
    if !(0.01..=600.0).contains(&arguments.seconds) {
        bail!("measure for {} seconds: `--seconds` must be between 0.01 and 600", arguments.seconds);
    }
    let input = std::path::absolute(input).with_context(|| format!("make {} absolute", input.display()))?;
    let pairs = load(&input)?;
    let (ours, verdicts) = measure(&pairs, Duration::from_secs_f64(arguments.seconds));
    println!("{ours}");
    let theirs = match python(arguments.python.as_deref()) {
        Ok(python) => compare(&python, &input, arguments.seconds)?,
        Err(error) => {
            println!("{}", json!({"grader": "math-verify", "skipped": format!("{error:#}")}));
            return Ok(());
        }
    };
    let mut timing = theirs.clone();
    timing.as_object_mut().context("read the timing of math-verify")?.remove("correct");
    println!("{timing}");
    println!("{}", agreement(&pairs, &verdicts, &theirs, &ours)?);
    Ok(())
}

fn load(input: &Path) -> Result<Vec<Pair>> {
    let text = fs::read_to_string(input).with_context(|| format!("read {}", input.display()))?;
    let mut pairs = Vec::new();
    for (line, row) in text.lines().enumerate() {
        let at = || format!("read line {} of {}", line + 1, input.display());
        let row: Value = serde_json::from_str(row).with_context(at)?;
        let (Some(gold), Some(pred)) = (row["gold"].as_str(), row["pred"].as_str()) else {
            bail!("{}: `gold` and `pred` must be strings", at());
        };
        // A bare answer is graded like a response that consists of it alone.
        let response = if row["kind"] == "answer" { format!("\\boxed{{{pred}}}") } else { pred.to_owned() };
        pairs.push(Pair { gold: gold.to_owned(), response, expected: row["expected"].as_bool() });
    }
    if pairs.is_empty() {
        bail!("find a pair in {}: it is empty", input.display());
    }
    Ok(pairs)
}

/// Grades on one thread for the given time, in whole passes over the pairs. Returns the report and the verdicts.
fn measure(pairs: &[Pair], time: Duration) -> (Value, Vec<bool>) {
    let grade = |pair: &Pair| grade_counted(&pair.response, &pair.gold, Mode::Lenient);
    let graded: Vec<_> = pairs.iter().map(grade).collect();
    let verdicts = graded.iter().map(|(verdict, _)| verdict.label == 1.0).collect();
    let steps = graded.iter().map(|(_, steps)| *steps).max();
    let mut micros = Vec::new();
    let started = Instant::now();
    while started.elapsed() < time {
        for pair in pairs {
            let started = Instant::now();
            std::hint::black_box(grade(std::hint::black_box(pair)));
            micros.push(started.elapsed().as_secs_f64() * 1e6);
        }
    }
    let per_second = micros.len() as f64 / started.elapsed().as_secs_f64();
    micros.sort_by(f64::total_cmp);
    let quantile = |q: f64| rounded(micros[((micros.len() - 1) as f64 * q) as usize]);
    let report = json!({
        "grader": "pacs-verify",
        "pairs": pairs.len(),
        "verdicts": micros.len(),
        "verdicts_per_second": per_second.round(),
        "p50_us": quantile(0.5),
        "p99_us": quantile(0.99),
        "max_us": quantile(1.0),
        "max_steps": steps,
    });
    (report, verdicts)
}

fn rounded(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

/// Finds a Python with math-verify: the given one, or one in a virtual environment of ours.
fn python(named: Option<&Path>) -> Result<PathBuf> {
    if let Some(named) = named {
        return std::path::absolute(named).with_context(|| format!("make {} absolute", named.display()));
    }
    let home = target().join("math-verify");
    let python = home.join("bin/python");
    if !home.join("complete").exists() {
        check("set up a Python environment", command("python3").args(["-m", "venv"]).arg(&home))?;
        let mut pip = command(&python);
        pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", MATH_VERIFY]);
        check("install math-verify", pip.stdout(Stdio::null()))?;
        fs::write(home.join("complete"), MATH_VERIFY).context("mark the Python environment as complete")?;
    }
    Ok(python)
}

fn compare(python: &Path, input: &Path, seconds: f64) -> Result<Value> {
    let mut script = command(python);
    script.args(["-c", MATH_VERIFY_SCRIPT]).arg(input).arg(seconds.to_string());
    let output = script.stderr(Stdio::inherit()).output().with_context(|| format!("start {}", python.display()))?;
    if !output.status.success() {
        bail!("grade with math-verify: {} ended with {}", python.display(), output.status);
    }
    let line = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(line.trim()).with_context(|| format!("read what math-verify printed: {line:.200}"))
}

fn agreement(pairs: &[Pair], ours: &[bool], theirs: &Value, timing: &Value) -> Result<Value> {
    let correct = theirs["correct"].as_array().context("read the verdicts of math-verify")?;
    let theirs_per_second = theirs["verdicts_per_second"].as_f64().context("read the speed of math-verify")?;
    let ours_per_second = timing["verdicts_per_second"].as_f64().unwrap_or_default();
    let (mut alike, mut known, mut ours_right, mut theirs_right) = (0, 0, 0, 0);
    for ((pair, ours), theirs) in pairs.iter().zip(ours).zip(correct) {
        let theirs = theirs.as_bool();
        alike += i32::from(theirs == Some(*ours));
        if let Some(expected) = pair.expected {
            known += 1;
            ours_right += i32::from(*ours == expected);
            theirs_right += i32::from(theirs == Some(expected));
        }
    }
    Ok(json!({
        "pairs": pairs.len(),
        "alike": alike,
        "with_expected": known,
        "pacs_verify_as_expected": ours_right,
        "math_verify_as_expected": theirs_right,
        "speed_ratio": (ours_per_second / theirs_per_second).round(),
    }))
}
