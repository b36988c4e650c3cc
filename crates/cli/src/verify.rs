//! `pacs verify`: grades rows of a file with the code that a run grades samples with.

mod rows;

use std::collections::VecDeque;
use std::io::{ErrorKind, Write, stdout};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use pacs_runtime::{Exit, LogFormat, harmless_json, init_logging};
use pacs_spec::{
    CodeSpec, CodeStop, ExecSandboxSpec, ExecSpec, Extraction, Form, JudgeKind, JudgeSpec, MathSpec, ServiceAddress,
};
use pacs_types::Outcome;
use pacs_verifier::{Judge, Judgement, Task};
use serde::Serialize;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use self::rows::{Row, RowId};
use crate::arguments::{AnswerForm, ExtractionMode, VerifyCode, VerifyCommand, VerifyGrpc, VerifyMath, VerifyText};
use crate::failure::Failure;
use crate::format::{count, seconds};
use crate::output;
use crate::verifier::{guard, threads};

/// Rows read ahead, and graded rows held back for output order, per concurrent verification.
const AHEAD: usize = 64;

/// Size in bytes at which buffered verdicts are written.
const WRITTEN_AT_ONCE: usize = 64 << 10;

/// Upper bound of `--timeout`, in seconds.
const MOST_SECONDS: f64 = 3600.0;

pub(crate) fn run(command: &VerifyCommand) -> Result<Exit, Failure> {
    init_logging(LogFormat::Human);
    let (input, by) = match command {
        VerifyCommand::Math(math) => (&math.input, JudgeKind::Math(spec_of(math))),
        VerifyCommand::Exact(VerifyText { input }) => (input, JudgeKind::Exact),
        VerifyCommand::Countdown(VerifyText { input }) => (input, JudgeKind::Countdown),
        VerifyCommand::Code(code) => (&code.input, JudgeKind::Code(code_of(code)?)),
        VerifyCommand::Exec(exec) => {
            let sandbox = exec.sandbox.then(|| ExecSandboxSpec {
                paths: exec.sandbox_path.clone(),
                allow_missing: exec.allow_missing.clone(),
                ..ExecSandboxSpec::default()
            });
            let environment = exec.pass_env.clone();
            let program = ExecSpec { environment, sandbox, ..ExecSpec::new(exec.command.clone()) };
            (&exec.input, JudgeKind::Exec(program))
        }
        VerifyCommand::Grpc(VerifyGrpc { input, address, ca, plain_text }) => {
            let service = ServiceAddress { address: address.clone(), ca: ca.clone(), plain_text: *plain_text };
            (input, JudgeKind::Grpc(service))
        }
    };
    if !(input.timeout > 0.0 && input.timeout <= MOST_SECONDS) {
        let error = anyhow!("--timeout {}: expected above 0, at most {MOST_SECONDS} seconds", input.timeout);
        return Err(Failure::with_exit(Exit::Usage, error).doing("read the command line"));
    }
    let spec = JudgeSpec { by, timeout: Duration::from_secs_f64(input.timeout) };
    let threads = threads(input.threads);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the runtime")
        .map_err(Failure::bug)?;
    let result = runtime.block_on(async {
        // Cache size 0: every row is to be verified.
        let judge = Judge::new(&spec, Some(&guard()), threads, 0);
        let judge = judge.map_err(|error| Failure::with_exit(error.exit(), error).doing("grade answers"))?;
        judge.prepare().await.map_err(|error| Failure::with_exit(error.exit(), error).doing("grade answers"))?;
        grade(&input.input, Arc::new(judge), threads).await
    });
    // In the background, because an overrunning verification or a blocked read of standard input cannot be interrupted.
    runtime.shutdown_background();
    result
}

fn spec_of(math: &VerifyMath) -> MathSpec {
    let extraction = match math.extraction {
        ExtractionMode::Lenient => Extraction::Lenient,
        ExtractionMode::Strict => Extraction::Strict,
        ExtractionMode::Number => Extraction::Number,
    };
    let form = match math.form {
        AnswerForm::Evaluated => Form::Evaluated,
        AnswerForm::Any => Form::Any,
    };
    MathSpec { extraction, form }
}

fn code_of(code: &VerifyCode) -> Result<CodeSpec, Failure> {
    if !(code.case_seconds > 0.0 && code.case_seconds <= MOST_SECONDS) {
        let error = anyhow!("--case-seconds {}: expected above 0, at most {MOST_SECONDS}", code.case_seconds);
        return Err(Failure::with_exit(Exit::Usage, error).doing("read the command line"));
    }
    Ok(CodeSpec {
        python: code.python.clone(),
        case_seconds: code.case_seconds,
        memory_mib: code.memory_mib,
        stop: if code.count { CodeStop::Count } else { CodeStop::FirstFailure },
        allow_missing: code.allow_missing.clone(),
        ..CodeSpec::default()
    })
}

/// One output line: the verdict of one row.
#[derive(Serialize)]
struct Graded {
    id: RowId,
    outcome: Outcome,
    /// 0 to 1; `None` when the outcome (failed, timed out) is inconclusive about the answer.
    label: Option<f64>,
    reward: Option<f64>,
    extracted: Option<String>,
    rule: String,
    elapsed_us: u64,
}

impl Graded {
    fn new(id: RowId, judgement: Judgement) -> Self {
        let Judgement { verdict, elapsed, .. } = judgement;
        let known = |value| verdict.outcome.is_conclusive().then_some(value);
        let (label, reward) = (known(verdict.label), known(verdict.reward));
        let elapsed_us = u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX);
        let (outcome, extracted, rule) = (verdict.outcome, verdict.extracted, verdict.rule);
        Self { id, outcome, label, reward, extracted, rule, elapsed_us }
    }
}

/// Grades rows on `threads` threads concurrently and writes verdicts in row order.
async fn grade(input: &Path, judge: Arc<Judge>, threads: usize) -> Result<Exit, Failure> {
    let started = Instant::now();
    let most = threads.saturating_mul(AHEAD);
    // Bounded, so that reading waits for grading.
    let (sender, mut rows) = mpsc::channel(most);
    let path = input.to_owned();
    // Ends with the input, at the first unreadable row, or when the receiver is dropped.
    tokio::task::spawn_blocking(move || rows::read(&path, |row| sender.blocking_send(row).is_ok()));
    let mut pending: VecDeque<JoinHandle<Graded>> = VecDeque::new();
    let mut out = Output::default();
    let mut ended = None;
    loop {
        tokio::select! {
            biased;
            Some(graded) = front(&mut pending) => {
                let graded = graded.context("grade a row").map_err(Failure::bug)?;
                pending.pop_front();
                if !out.write(&graded, pending.is_empty())? {
                    return Ok(Exit::Done);
                }
            }
            row = rows.recv(), if ended.is_none() && pending.len() < most => match row {
                Some(Ok(row)) => pending.push_back(tokio::spawn(one(Arc::clone(&judge), row))),
                Some(Err(failure)) => ended = Some(Err(failure)),
                None => ended = Some(Ok(Exit::Done)),
            },
            else => break,
        }
    }
    out.summarise(started.elapsed());
    ended.unwrap_or(Ok(Exit::Done))
}

/// Waits for the oldest row; `None` when nothing is pending.
async fn front(pending: &mut VecDeque<JoinHandle<Graded>>) -> Option<Result<Graded, tokio::task::JoinError>> {
    Some(pending.front_mut()?.await)
}

async fn one(judge: Arc<Judge>, row: Row) -> Graded {
    let Row { id, question, gold, pred } = row;
    let task = Task { question, response: pred, gold };
    Graded::new(id, judge.verify(Arc::new(task)).await)
}

/// Buffered standard output, with counts for the summary.
#[derive(Default)]
struct Output {
    buffer: Vec<u8>,
    /// Number of rows by outcome, in the order of `OUTCOMES`.
    outcomes: [u64; 5],
}

const OUTCOMES: [Outcome; 5] =
    [Outcome::Correct, Outcome::Wrong, Outcome::Unparsable, Outcome::Failed, Outcome::TimedOut];

impl Output {
    /// Adds a line, and flushes when the buffer is large enough or this is the last pending one. Returns false when the reader is
    /// gone.
    fn write(&mut self, graded: &Graded, is_last: bool) -> Result<bool, Failure> {
        let known = OUTCOMES.iter().position(|outcome| *outcome == graded.outcome);
        self.outcomes[known.expect("all outcomes are listed")] += 1;
        let line = serde_json::to_string(graded).context("write a verdict").map_err(Failure::bug)?;
        // Model text: control characters are escaped, which a JSON parser undoes and a terminal does not act on.
        self.buffer.extend_from_slice(harmless_json(&line).as_bytes());
        self.buffer.push(b'\n');
        if !is_last && self.buffer.len() < WRITTEN_AT_ONCE {
            return Ok(true);
        }
        let mut out = stdout().lock();
        let written = out.write_all(&self.buffer).and_then(|()| out.flush());
        self.buffer.clear();
        match written {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
            Err(error) => Err(Failure::again(error).doing("write the verdicts")),
        }
    }

    fn summarise(&self, elapsed: Duration) {
        let rows: u64 = self.outcomes.iter().sum();
        let rate = rows as f64 / elapsed.as_secs_f64().max(f64::MIN_POSITIVE);
        let counts: Vec<String> = OUTCOMES
            .iter()
            .zip(self.outcomes)
            .map(|(outcome, n)| format!("{} {}", count(n), outcome.name().replace('_', " ")))
            .collect();
        let (rows, took) = (count(rows), seconds(elapsed.as_secs_f64()));
        output::error(format_args!("{rows} rows in {took} ({rate:.0} a second): {}", counts.join(", ")));
    }
}
