//! The verifier of programs: runs the program of a response on the cases of its problem, in a sandbox, and compares here.
//!
//! The sandbox is given the program and inputs, one case at a time, and never what is expected: `run` compares texts and values in this
//! process, and `assertions` has assertions decided by a second program, ours, in a sandbox process that the first one never was in.

mod assertions;
mod end;
mod run;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pacs_sandbox::{Entry, Layer, Limits, Policy, Sandbox, SandboxError};
use pacs_spec::CodeSpec;
use pacs_types::{Outcome, Verdict};
use pacs_verify::{Program, Suite, extract_program};
use tokio::sync::Semaphore;

use self::end::End;
use crate::Task;
use crate::fault::Fault;
use crate::judge::Answer;

/// A pool of sandboxes, started when they are needed.
pub(crate) struct Code {
    spec: CodeSpec,
    entry: Option<Entry>,
    limit: Duration,
    sandboxes: Semaphore,
    /// Those that wait for work; at most as many as there are permits.
    idle: Mutex<Vec<Sandbox>>,
    /// A verdict is remembered under everything that it depends on besides its task.
    version: Arc<str>,
}

impl Code {
    pub(crate) fn new(spec: CodeSpec, entry: Option<Entry>, limit: Duration, concurrency: usize) -> Self {
        let version = format!("code {} {spec:?}", env!("CARGO_PKG_VERSION")).into();
        Self { spec, entry, limit, sandboxes: Semaphore::new(concurrency), idle: Mutex::default(), version }
    }

    /// Starts a sandbox, so that a machine that cannot have one says so before there is work.
    pub(crate) async fn prepare(&self) -> Result<(), Fault> {
        let sandbox = self.sandbox().await?;
        self.give_back(sandbox);
        Ok(())
    }

    /// Runs the program of a response. A sandbox that fails is dropped, with all that runs in it.
    pub(crate) async fn verify(&self, task: &Task) -> (Result<Answer, Fault>, Duration) {
        let suite = match Suite::parse(&task.gold) {
            Ok(suite) => suite,
            Err(problem) => return (Err(Fault::Reported(format!("the reference: {problem}"))), Duration::ZERO),
        };
        let program = match extract_program(&task.response) {
            Program::Found(program) => program,
            Program::CutOff => return (Ok(self.answer(without("the last block of code has no end"))), Duration::ZERO),
            Program::None => return (Ok(self.answer(without("no block of code"))), Duration::ZERO),
        };
        let _permit = self.sandboxes.acquire().await.expect("the semaphore is never closed");
        let mut sandbox = match self.sandbox().await {
            Ok(sandbox) => sandbox,
            Err(fault) => return (Err(fault), Duration::ZERO),
        };
        let started = Instant::now();
        let run = run::Run { spec: &self.spec, suite: &suite, limits: self.limits(), deadline: started + self.limit };
        let ended = run.of(&program, &mut sandbox).await;
        let elapsed = started.elapsed();
        match ended {
            Ok(end) => {
                self.give_back(sandbox);
                (Ok(self.answer(verdict(&end, &program))), elapsed)
            }
            Err(fault) => {
                if matches!(fault, Fault::Reported(_)) {
                    self.give_back(sandbox);
                }
                (Err(fault), elapsed)
            }
        }
    }

    fn answer(&self, verdict: Verdict) -> Answer {
        Answer { verdict, version: Arc::clone(&self.version) }
    }

    fn give_back(&self, sandbox: Sandbox) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(sandbox);
    }

    /// One that waits for work, or a new one.
    async fn sandbox(&self) -> Result<Sandbox, Fault> {
        loop {
            let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let Some(mut sandbox) = idle else { break };
            if !sandbox.has_ended() {
                return Ok(sandbox);
            }
            tracing::warn!("a sandbox ended while it had nothing to do");
        }
        let entry = self.entry.as_ref().ok_or_else(|| {
            Fault::Sandbox(SandboxError::Start("this program has no command that isolates itself".to_owned()))
        })?;
        let sandbox = Sandbox::start(entry, &policy(&self.spec)).await.map_err(Fault::Sandbox)?;
        let missing: Vec<&str> = sandbox.layers().missing().map(|(layer, _)| layer.name()).collect();
        tracing::info!(version = sandbox.version(), missing = missing.join(", "), "sandbox started");
        Ok(sandbox)
    }

    fn limits(&self) -> Limits {
        let case = Duration::try_from_secs_f64(self.spec.case_seconds).unwrap_or(Duration::MAX);
        Limits {
            memory_bytes: self.spec.memory_mib << 20,
            cpu: case,
            wall: case,
            output_bytes: self.spec.output_kib << 10,
            file_bytes: self.spec.scratch_mib << 20,
            processes: self.spec.processes,
            ..Limits::default()
        }
    }
}

/// What the sandbox of a spec is like.
pub(crate) fn policy(spec: &CodeSpec) -> Policy {
    let processes = u64::from(spec.processes);
    Policy {
        python: spec.python.clone(),
        paths: spec.paths.clone(),
        libraries: spec.libraries.clone(),
        scratch_bytes: spec.scratch_mib << 20,
        // The scratch folder counts, and so do the processes of the sandbox itself.
        tree_memory_bytes: (spec.memory_mib + spec.scratch_mib + 256) << 20,
        tree_processes: processes + 32,
        without: Vec::new(),
        // The spec has checked the names.
        allow_missing: spec.allow_missing.iter().filter_map(|name| Layer::named(name)).collect(),
    }
}

/// A response without a program needs no sandbox.
fn without(problem: &str) -> Verdict {
    let rule = format!("code: {problem}");
    Verdict { outcome: Outcome::Unparsable, label: 0.0, reward: 0.0, extracted: None, rule }
}

fn verdict(end: &End, program: &str) -> Verdict {
    let outcome = match end {
        End::Passed { .. } => Outcome::Correct,
        // There is no program to be run.
        End::Compile(_) => Outcome::Unparsable,
        _ => Outcome::Wrong,
    };
    let value = if outcome == Outcome::Correct { 1.0 } else { 0.0 };
    let extracted = Some(format!("{} lines of code", program.lines().count()));
    Verdict { outcome, label: value, reward: value, extracted, rule: format!("code: {end}") }
}
