//! One program on its cases.

use std::time::Instant;

use pacs_sandbox::{Case, Ended, Job, Limits, Outcome, Running, Sandbox, Told};
use pacs_spec::{CodeSpec, CodeStop};
use pacs_verify::{Suite, SuiteCase, same_output, same_value};

use super::assertions::{self, Claim, Plan, Plans, Reply, Ruling};
use super::end::{End, Why};
use crate::fault::Fault;

/// Runs of the referee for one answer. Each but the first follows calls that depend on what earlier ones returned.
const MOST_ROUNDS: usize = 64;

/// Bytes of answers to the calls of all replayed tests together: the referee holds them in memory.
const MOST_REPLY_BYTES: usize = 16 << 20;

/// How a program is run.
pub(super) struct Run<'a> {
    pub(super) spec: &'a CodeSpec,
    pub(super) suite: &'a Suite,
    pub(super) limits: Limits,
    /// When all cases together have taken too long.
    pub(super) deadline: Instant,
}

/// What came of one case, or the end of all of them.
enum Step {
    Passed,
    Failed(Why),
    Compile(String),
}

impl Run<'_> {
    pub(super) async fn of(&self, program: &str, sandbox: &mut Sandbox) -> Result<End, Fault> {
        let cases = &self.suite.cases[..self.suite.cases.len().min(self.spec.max_cases as usize)];
        let assertions: Vec<(usize, &str)> = cases
            .iter()
            .enumerate()
            .filter_map(|(index, case)| match case {
                SuiteCase::Assert(text) => Some((index, text.as_str())),
                _ => None,
            })
            .collect();
        if !self.spec.command.is_empty() && cases.iter().any(|case| !matches!(case, SuiteCase::Stdin { .. })) {
            return Err(Fault::Reported(
                "the reference has cases for Python, and the verifier runs another language".to_owned(),
            ));
        }
        // Assertions are split into the calls, which the program's process makes, and the comparison, which it does not: a program
        // that could see `==` could make everything equal.
        let plans = match assertions.is_empty() {
            true => Plans::default(),
            false => assertions::plan(sandbox, self.limits, &self.suite.setup, &assertions).await?,
        };
        let mut claims = Vec::new();
        let end = {
            // One process for all cases: starting an interpreter costs more than most cases do.
            let mut running = sandbox.begin(&self.job(program)).await?;
            let end = self.cases(cases, &plans, &mut running, &mut claims).await;
            finished(end, running).await?
        };
        // What the program returned for assertions is judged when its processes have ended.
        match assertions.is_empty() {
            true => Ok(end),
            false => self.judged(end, cases, claims, program, sandbox).await,
        }
    }

    fn job(&self, program: &str) -> Job {
        let CodeSpec { command, file, .. } = self.spec;
        match command.is_empty() {
            true => Job::python(format!("{}{program}", self.suite.setup), self.limits),
            false => Job {
                source: String::new(),
                command: command.clone(),
                files: [(file.clone(), program.to_owned())].into(),
                limits: self.limits,
            },
        }
    }

    async fn cases(
        &self,
        cases: &[SuiteCase],
        plans: &Plans,
        running: &mut Running<'_>,
        claims: &mut Vec<(usize, Claim)>,
    ) -> Result<End, Fault> {
        if !self.spec.compile.is_empty() {
            let ended = running.run(&Case::Command { command: self.spec.compile.clone() }).await?;
            if let Some(Told::Exec(problem)) = ended.told.first() {
                return Err(Fault::Reported(format!("the compiler cannot be started: {problem}")));
            }
            if ended.outcome != Outcome::Exited(0) {
                let problem = if ended.stderr.is_empty() { format!("{:?}", ended.outcome) } else { ended.stderr };
                return Ok(End::Compile(problem));
            }
        }
        let mut first = None;
        let mut passed = 0;
        for (index, case) in cases.iter().enumerate() {
            // The limit of all cases is the verification's own. Without it, many cases just below their limits would outlast the lease.
            let step = match Instant::now() >= self.deadline {
                true => Step::Failed(Why::TimedOut),
                false => self.case(index, case, plans, running, claims).await?,
            };
            match step {
                Step::Passed => passed += 1,
                Step::Compile(problem) => return Ok(End::Compile(problem)),
                Step::Failed(why) => {
                    first.get_or_insert((index + 1, why));
                    if self.spec.stop == CodeStop::FirstFailure {
                        break;
                    }
                }
            }
        }
        Ok(self.end(cases.len(), first, passed))
    }

    fn end(&self, cases: usize, first: Option<(usize, Why)>, passed: usize) -> End {
        match first {
            None => End::Passed { cases },
            Some((case, why)) => {
                let passed = (self.spec.stop == CodeStop::Count).then_some(passed);
                End::Failed { case, cases, passed, why }
            }
        }
    }

    async fn case(
        &self,
        index: usize,
        case: &SuiteCase,
        plans: &Plans,
        running: &mut Running<'_>,
        claims: &mut Vec<(usize, Claim)>,
    ) -> Result<Step, Fault> {
        match case {
            SuiteCase::Stdin { input, output } => {
                let ended = running.run(&Case::Stdin { stdin: input.clone() }).await?;
                Ok(match failure(&ended)? {
                    Some(step) => step,
                    None if same_output(output, &ended.stdout, self.spec.float_tolerance) => Step::Passed,
                    None => Step::Failed(Why::Wrong { expected: output.clone(), got: ended.stdout }),
                })
            }
            SuiteCase::Function { name, arguments, expected } => {
                let call = Case::Function { function: name.clone(), arguments: arguments.clone() };
                let ended = running.run(&call).await?;
                if let Some(step) = failure(&ended)? {
                    return Ok(step);
                }
                Ok(match value(&ended) {
                    Some(got) if same_value(expected, &got, self.spec.float_tolerance) => Step::Passed,
                    Some(got) => Step::Failed(Why::Wrong { expected: expected.to_string(), got: got.to_string() }),
                    None => Step::Failed(Why::Runtime("it ended without a value".to_owned())),
                })
            }
            SuiteCase::Assert(_) => match plans.of(index) {
                Some(Plan::Split(calls)) => {
                    let mut values = Vec::new();
                    for call in calls {
                        let ended = running.run(&Case::Call { call: call.clone() }).await?;
                        if let Some(step) = failure(&ended)? {
                            return Ok(step);
                        }
                        match value(&ended) {
                            Some(value) => values.push(value),
                            None => return Ok(Step::Failed(Why::Runtime("it ended without a value".to_owned()))),
                        }
                    }
                    claims.push((index, Claim::Values(values)));
                    // Whether it passed is decided later; it did not fail yet.
                    Ok(Step::Passed)
                }
                Some(Plan::Replay(calls)) => {
                    let step = self.replies(index, calls, Vec::new(), running, claims).await?;
                    Ok(step.unwrap_or(Step::Passed))
                }
                None => Err(Fault::Garbage { problem: "the referee left an assertion out".to_owned() }),
            },
        }
    }

    /// Has the program answer calls of a replayed test, and adds the claim with all answers. Returns how the case ended where the answers
    /// cannot change it.
    async fn replies(
        &self,
        index: usize,
        calls: &[String],
        mut replies: Vec<Reply>,
        running: &mut Running<'_>,
        claims: &mut Vec<(usize, Claim)>,
    ) -> Result<Option<Step>, Fault> {
        let mut bytes = replies.iter().map(Reply::bytes).sum::<usize>() + claims.iter().map(reply_bytes).sum::<usize>();
        for call in calls {
            if Instant::now() >= self.deadline {
                return Ok(Some(Step::Failed(Why::TimedOut)));
            }
            let ended = running.run(&Case::Call { call: call.clone() }).await?;
            let raised = ended.told.iter().rev().find_map(|told| match told {
                Told::Raised(exception) if ended.outcome == Outcome::Exited(1) => Some(exception.clone()),
                _ => None,
            });
            let reply = match (failure(&ended)?, value(&ended), raised) {
                (Some(Step::Failed(why @ Why::Runtime(_))), _, Some(raised)) => Reply::raised(call, raised, why),
                (Some(Step::Failed(why)), ..) => Reply::ended(call, why),
                (Some(step), ..) => return Ok(Some(step)),
                (None, Some(value), _) => Reply::value(call, value),
                (None, None, _) => Reply::ended(call, Why::Runtime("it ended without a value".to_owned())),
            };
            bytes = bytes.saturating_add(reply.bytes());
            let reply = match bytes > MOST_REPLY_BYTES {
                true => Reply::ended(call, Why::TooMuchOutput),
                false => reply,
            };
            let is_last = reply.has_ended();
            replies.push(reply);
            if is_last {
                // The test ends there, unless the call was a guess; then it asks for the others again.
                break;
            }
        }
        claims.push((index, Claim::Replies(replies)));
        Ok(None)
    }

    /// Has the program answer the calls of tests that are still open. Returns the end of all cases if it does not even compile.
    async fn asked(
        &self,
        open: Vec<(usize, Vec<String>, Vec<Reply>)>,
        running: &mut Running<'_>,
        claims: &mut Vec<(usize, Claim)>,
        failed: &mut Vec<(usize, Why)>,
    ) -> Result<Option<End>, Fault> {
        for (index, calls, replies) in open {
            match self.replies(index, &calls, replies, running, claims).await? {
                None | Some(Step::Passed) => {}
                Some(Step::Failed(why)) => failed.push((index, why)),
                Some(Step::Compile(problem)) => return Ok(Some(End::Compile(problem))),
            }
        }
        Ok(None)
    }

    /// Has the referee decide the assertions whose calls were answered, and the program answer the calls that follow from that.
    async fn judged(
        &self,
        end: End,
        cases: &[SuiteCase],
        mut claims: Vec<(usize, Claim)>,
        program: &str,
        sandbox: &mut Sandbox,
    ) -> Result<End, Fault> {
        let (count, mut earliest, mut passed) = match end {
            End::Failed { case, cases, passed, why } => (cases, Some((case, why)), passed.unwrap_or(0)),
            End::Passed { cases } => (cases, None, cases),
            compile @ End::Compile(_) => return Ok(compile),
        };
        let mut rounds = 0;
        while !claims.is_empty() {
            let texts: Vec<(&str, &Claim)> = claims
                .iter()
                .filter_map(|(index, claim)| match &cases[*index] {
                    SuiteCase::Assert(text) => Some((text.as_str(), claim)),
                    _ => None,
                })
                .collect();
            let rulings = assertions::judge(sandbox, self.limits, &self.suite.setup, &texts).await?;
            rounds += 1;
            let mut failed = Vec::new();
            let mut open = Vec::new();
            for ((index, claim), ruling) in claims.drain(..).zip(rulings) {
                match (ruling, claim) {
                    (Ruling::Holds, _) => {}
                    (Ruling::Asks(calls), Claim::Replies(replies)) if rounds < MOST_ROUNDS => {
                        open.push((index, calls, replies));
                    }
                    (Ruling::Asks(_), _) => {
                        let got = format!("calls that depend on each other {MOST_ROUNDS} times over");
                        failed.push((index, Why::Wrong { expected: "fewer".to_owned(), got }));
                    }
                    (Ruling::Fails(why), _) => failed.push((index, why)),
                }
            }
            if !open.is_empty() {
                let mut running = sandbox.begin(&self.job(program)).await?;
                let asked = self.asked(open, &mut running, &mut claims, &mut failed).await;
                if let Some(compile) = finished(asked, running).await? {
                    return Ok(compile);
                }
            }
            passed = passed.saturating_sub(failed.len());
            for (index, why) in failed {
                if earliest.as_ref().is_none_or(|(case, _)| index + 1 < *case) {
                    earliest = Some((index + 1, why));
                }
            }
            if let (CodeStop::FirstFailure, Some((case, _))) = (self.spec.stop, &earliest) {
                claims.retain(|(index, _)| index + 1 < *case);
            }
        }
        Ok(self.end(count, earliest, passed))
    }
}

/// Ends a job before its result is looked at: a sandbox whose verifier reports a fault is used again, and would take the next job for a
/// case of this one.
async fn finished<T>(result: Result<T, Fault>, running: Running<'_>) -> Result<T, Fault> {
    if !matches!(result, Err(Fault::Sandbox(_))) {
        running.end().await?;
    }
    result
}

fn reply_bytes((_, claim): &(usize, Claim)) -> usize {
    match claim {
        Claim::Values(_) => 0,
        Claim::Replies(replies) => replies.iter().map(Reply::bytes).sum(),
    }
}

/// Why a run is no output to compare, if it is none.
fn failure(ended: &Ended) -> Result<Option<Step>, Fault> {
    let memory = || ended.told.iter().any(|told| matches!(told, Told::Memory(_)));
    let said = || {
        ended.told.iter().find_map(|told| match told {
            Told::Error(problem) => Some(problem.clone()),
            _ => None,
        })
    };
    for told in &ended.told {
        match told {
            Told::Compile(problem) => return Ok(Some(Step::Compile(problem.clone()))),
            // The command is the job's, not the program's.
            Told::Exec(problem) => return Err(Fault::Reported(format!("the command cannot be started: {problem}"))),
            _ => {}
        }
    }
    // How the process ended is the sandbox's observation and comes first; what the program says of it only explains an exit code.
    Ok(match ended.outcome {
        Outcome::OverTime => Some(Step::Failed(Why::TimedOut)),
        Outcome::OverOutput => Some(Step::Failed(Why::TooMuchOutput)),
        _ if memory() => Some(Step::Failed(Why::OutOfMemory)),
        Outcome::Signalled(signal) => Some(Step::Failed(Why::Runtime(format!("ended by signal {signal}")))),
        Outcome::Exited(0) => None,
        Outcome::Exited(code) => {
            let last = ended.stderr.trim().lines().last().unwrap_or_default();
            let plain = if last.is_empty() { format!("exit code {code}") } else { format!("exit code {code}: {last}") };
            Some(Step::Failed(Why::Runtime(said().unwrap_or(plain))))
        }
    })
}

/// The value that the program claims to have returned.
fn value(ended: &Ended) -> Option<serde_json::Value> {
    // The program can write such lines itself. The last one is what the interpreter writes after the call, unless the program lies,
    // which a comparison with the expected value does not reward.
    ended.told.iter().rev().find_map(|told| match told {
        Told::Value(value) => Some(value.clone()),
        _ => None,
    })
}
