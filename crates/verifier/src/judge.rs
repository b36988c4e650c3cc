use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pacs_spec::{JudgeKind, JudgeSpec, MathSpec};
use pacs_types::Verdict;

use crate::VerifierError;
use crate::cache::Cache;
use crate::code::Code;
use crate::exec::{Entry, Exec};
use crate::fault::Fault;
use crate::grpc::Service;
use crate::rule::Rule;

/// What is to be judged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// The question as the data set has it; empty where it is not known.
    pub question: String,
    /// The whole answer, without special tokens.
    pub response: String,
    /// The reference answer.
    pub gold: String,
}

/// What became of one task.
#[derive(Clone, Debug, PartialEq)]
pub struct Judgement {
    /// What the verifier says; a failure is an inconclusive verdict whose rule says what went wrong.
    pub verdict: Verdict,
    /// Time of the verification itself, without waiting for a thread, child or start; zero when it was remembered.
    pub elapsed: Duration,
    /// The verdict was remembered.
    pub cached: bool,
}

/// The command of a guard's program that isolates its process for a sandbox: `pacs_sandbox::run_init`.
pub const SANDBOX_COMMAND: &str = "sandbox-init";

/// One verifier of any kind: judges tasks one by one or many at once, and remembers what it said.
pub struct Judge {
    by: By,
    cache: Cache,
    /// The version that spoke last; unknown until a verifier of the user's own has said it.
    version: Mutex<Option<Arc<str>>>,
}

enum By {
    /// A rule of this program.
    Rule(Rule),
    Code(Code),
    Exec(Exec),
    Service(Service),
}

impl Judge {
    /// A judge that runs at most `concurrency` verifications at once (threads, children, calls; 0 counts as 1) and
    /// remembers at most `cache_entries` verdicts. Nothing is started or called before the first task. Programs are started by way
    /// of `guard`; without one they have neither limits nor anybody who ends what they leave, and a sandbox cannot be started at all.
    ///
    /// Must be called within a runtime.
    ///
    /// # Errors
    /// [`VerifierError::Address`] when a service's address is none, or the authorities for it cannot be read.
    pub fn new(
        spec: &JudgeSpec,
        guard: Option<&Entry>,
        concurrency: usize,
        cache_entries: usize,
    ) -> Result<Self, VerifierError> {
        let limit = spec.timeout;
        let concurrency = concurrency.max(1);
        let (by, version) = match &spec.by {
            JudgeKind::Math(math) => (By::Rule(Rule::math(*math, limit, concurrency)), Some(math_version(*math))),
            JudgeKind::Exact => {
                let grade = |task: &Task| pacs_verify::grade_text(&task.response, &task.gold);
                (By::Rule(Rule::new(grade, limit, concurrency)), Some(version("exact")))
            }
            JudgeKind::Countdown => {
                let grade = |task: &Task| pacs_verify::grade_countdown(&task.response, &task.gold);
                (By::Rule(Rule::new(grade, limit, concurrency)), Some(version("countdown")))
            }
            JudgeKind::Code(code) => {
                let entry = guard.map(|_| pacs_sandbox::Entry::own(&[SANDBOX_COMMAND]));
                (By::Code(Code::new(code.clone(), entry, limit, concurrency)), None)
            }
            JudgeKind::Exec(exec) => (By::Exec(Exec::new(exec.clone(), guard.cloned(), limit, concurrency)), None),
            JudgeKind::Grpc(service) => (By::Service(Service::new(service, limit, concurrency)?), None),
        };
        Ok(Self { by, cache: Cache::new(cache_entries), version: Mutex::new(version.map(Arc::from)) })
    }

    /// Tries what the judge needs of the machine, as far as it can be tried without a task: a sandbox for programs.
    ///
    /// # Errors
    /// [`VerifierError::Sandbox`] when there is none, or one without a layer that has to hold.
    pub async fn prepare(&self) -> Result<(), VerifierError> {
        match &self.by {
            By::Code(code) => code.prepare().await.map_err(|fault| VerifierError::Sandbox(fault.to_string())),
            By::Rule(_) | By::Exec(_) | By::Service(_) => Ok(()),
        }
    }

    /// Judges one task. Never fails: what goes wrong is in the verdict.
    ///
    /// Dropping the future ends the verification; a child process that works on it is killed.
    pub async fn verify(&self, task: Arc<Task>) -> Judgement {
        if let Some(verdict) = self.version().and_then(|version| self.cache.get(self.cache.key(&version, &task))) {
            return Judgement { verdict, elapsed: Duration::ZERO, cached: true };
        }
        let (judgement, version) = match &self.by {
            By::Rule(rule) => (rule.verify(Arc::clone(&task)).await, self.version()),
            By::Code(code) => self.heard(code.verify(&task).await),
            By::Exec(exec) => self.heard(exec.verify(&task).await),
            By::Service(service) => self.heard(service.verify(&task).await),
        };
        if let Some(version) = version {
            self.cache.insert(self.cache.key(&version, &task), &judgement.verdict);
        }
        judgement
    }

    /// What a verifier of the user's own said, and the version that said it.
    fn heard(&self, (answer, elapsed): (Result<Answer, Fault>, Duration)) -> (Judgement, Option<Arc<str>>) {
        let (verdict, version) = match answer {
            Ok(Answer { verdict, version }) => (verdict, Some(version)),
            Err(fault) => (fault.into(), None),
        };
        if version.is_some() {
            (*self.version.lock().unwrap_or_else(PoisonError::into_inner)).clone_from(&version);
        }
        (Judgement { verdict, elapsed, cached: false }, version)
    }

    fn version(&self) -> Option<Arc<str>> {
        self.version.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The answer of a verifier of the user's own.
pub(crate) struct Answer {
    pub(crate) verdict: Verdict,
    pub(crate) version: Arc<str>,
}

fn math_version(MathSpec { extraction, form }: MathSpec) -> String {
    format!("{} {extraction:?} {form:?}", version("math"))
}

/// A verdict is remembered under the rule that spoke it and its version.
fn version(rule: &str) -> String {
    format!("{rule} {}", env!("CARGO_PKG_VERSION"))
}
