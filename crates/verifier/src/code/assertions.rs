//! Tests in Python, assertions above all: which calls they make to the program, and whether they hold for what it returned. Both are
//! decided by the referee, a program of ours in the sandbox, because tests come with the data.

use std::collections::HashMap;
use std::time::Duration;

use pacs_sandbox::{Case, Job, Limits, Outcome, Sandbox};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::end::Why;
use crate::fault::Fault;

/// The program, of parts that use names of each other.
const REFEREE: &str = concat!(
    include_str!("referee/program.py"),
    "\n\n",
    include_str!("referee/split.py"),
    "\n\n",
    include_str!("referee/main.py"),
);

/// Its part that replays tests. It comes with the order, because compiling it for each answer would cost more than most assertions do.
const REPLAY: &str = concat!(
    include_str!("referee/requests.py"),
    "\n\n",
    include_str!("referee/run.py"),
    "\n\n",
    include_str!("referee/pytest.py"),
);

/// How long the referee may take: assertions are comparisons.
const REFEREE_LIMIT: Duration = Duration::from_secs(20);

#[derive(Serialize)]
struct Order<'a> {
    setup: &'a str,
    replay: &'static str,
    assertions: Vec<Entry<'a>>,
}

impl<'a> Order<'a> {
    fn new(setup: &'a str, assertions: Vec<Entry<'a>>) -> Self {
        Self { setup, replay: REPLAY, assertions }
    }
}

#[derive(Serialize)]
struct Entry<'a> {
    text: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    values: Option<&'a [Value]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    answers: Option<&'a [Reply]>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Answer {
    Unsupported {
        unsupported: String,
    },
    Split {
        calls: Vec<String>,
    },
    Asks {
        pending: Vec<String>,
    },
    Ended {
        ended: usize,
    },
    Judged {
        passed: bool,
        got: String,
        #[serde(default)]
        expected: Option<String>,
    },
}

/// How the calls of an assertion are found.
pub(super) enum Plan {
    /// These are all of them; their values take their places.
    Split(Vec<String>),
    /// These come first. What they return decides which follow, and the referee runs the test again with it.
    Replay(Vec<String>),
}

/// The plans of assertions, by the number of the case.
#[derive(Default)]
pub(super) struct Plans(HashMap<usize, Plan>);

impl Plans {
    pub(super) fn of(&self, case: usize) -> Option<&Plan> {
        self.0.get(&case)
    }
}

/// What the program answered to one call of a test that is replayed.
#[derive(Serialize)]
pub(super) struct Reply {
    call: String,
    #[serde(flatten)]
    said: Said,
    /// What the case fails by if this reply ends the test.
    #[serde(skip)]
    why: Option<Why>,
}

#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum Said {
    Value(Value),
    Raised(Value),
    Ended(bool),
}

impl Reply {
    pub(super) fn value(call: &str, value: Value) -> Self {
        Self { call: call.to_owned(), said: Said::Value(value), why: None }
    }

    /// The call raised an exception, which the test may expect.
    pub(super) fn raised(call: &str, exception: Value, why: Why) -> Self {
        Self { call: call.to_owned(), said: Said::Raised(exception), why: Some(why) }
    }

    /// The call ended in a way that no test can expect.
    pub(super) fn ended(call: &str, why: Why) -> Self {
        Self { call: call.to_owned(), said: Said::Ended(true), why: Some(why) }
    }

    pub(super) fn has_ended(&self) -> bool {
        matches!(self.said, Said::Ended(_))
    }

    /// What it takes in the referee's input, about.
    pub(super) fn bytes(&self) -> usize {
        let said = match &self.said {
            Said::Value(value) | Said::Raised(value) => value.to_string().len(),
            Said::Ended(_) => 0,
        };
        self.call.len() + said
    }
}

/// What the program claims about an assertion.
pub(super) enum Claim {
    /// The values of all calls, in order.
    Values(Vec<Value>),
    /// The answers so far.
    Replies(Vec<Reply>),
}

/// What the referee says of a claim.
pub(super) enum Ruling {
    Holds,
    Fails(Why),
    /// The test makes further calls.
    Asks(Vec<String>),
}

/// Finds the calls of the program in assertions.
pub(super) async fn plan(
    sandbox: &mut Sandbox,
    limits: Limits,
    setup: &str,
    assertions: &[(usize, &str)],
) -> Result<Plans, Fault> {
    let entries = assertions.iter().map(|&(_, text)| Entry { text, values: None, answers: None }).collect();
    let answers = ask(sandbox, limits, &Order::new(setup, entries)).await?;
    let mut plans = HashMap::new();
    for ((index, _), answer) in assertions.iter().zip(answers) {
        let plan = match answer {
            Answer::Split { calls } => Plan::Split(calls),
            Answer::Asks { pending } => Plan::Replay(pending),
            Answer::Unsupported { unsupported } => {
                return Err(Fault::Reported(format!("the reference: assertion {}: {unsupported}", index + 1)));
            }
            Answer::Ended { .. } | Answer::Judged { .. } => {
                return Err(Fault::Garbage { problem: "the referee judged, asked for calls".to_owned() });
            }
        };
        plans.insert(*index, plan);
    }
    Ok(Plans(plans))
}

/// Says of each assertion whether it holds for what the program claims.
pub(super) async fn judge(
    sandbox: &mut Sandbox,
    limits: Limits,
    setup: &str,
    claims: &[(&str, &Claim)],
) -> Result<Vec<Ruling>, Fault> {
    let entries = claims.iter().map(|&(text, claim)| entry(text, claim)).collect();
    let answers = ask(sandbox, limits, &Order::new(setup, entries)).await?;
    Ok(answers.into_iter().zip(claims).map(|(answer, (text, claim))| ruling(answer, text, claim)).collect())
}

fn entry<'a>(text: &'a str, claim: &'a Claim) -> Entry<'a> {
    match claim {
        Claim::Values(values) => Entry { text, values: Some(values), answers: None },
        Claim::Replies(replies) => Entry { text, values: None, answers: Some(replies) },
    }
}

fn ruling(answer: Answer, text: &str, claim: &Claim) -> Ruling {
    let wrong = |got: String| Ruling::Fails(Why::Wrong { expected: text.to_owned(), got });
    match (answer, claim) {
        (Answer::Judged { passed: true, .. }, _) => Ruling::Holds,
        (Answer::Judged { got, expected, .. }, _) => {
            Ruling::Fails(Why::Wrong { expected: expected.unwrap_or_else(|| text.to_owned()), got })
        }
        (Answer::Asks { pending }, Claim::Replies(_)) => Ruling::Asks(pending),
        (Answer::Ended { ended }, Claim::Replies(replies)) => {
            let why = replies.get(ended).and_then(|reply| reply.why.clone());
            Ruling::Fails(why.unwrap_or_else(|| Why::Runtime("it ended without a value".to_owned())))
        }
        // What the program returned led there: without it, `plan` has refused the reference.
        (Answer::Unsupported { unsupported }, _) => wrong(unsupported),
        (Answer::Split { .. } | Answer::Asks { .. } | Answer::Ended { .. }, _) => wrong(String::new()),
    }
}

async fn ask(sandbox: &mut Sandbox, limits: Limits, order: &Order<'_>) -> Result<Vec<Answer>, Fault> {
    let limits = Limits {
        wall: REFEREE_LIMIT,
        cpu: REFEREE_LIMIT,
        memory_bytes: limits.memory_bytes.max(512 << 20),
        output_bytes: 4 << 20,
        processes: 1,
        ..limits
    };
    let stdin = serde_json::to_string(order).expect("texts and values are JSON");
    let mut running = sandbox.begin(&Job::python(REFEREE, limits)).await?;
    let ended = running.run(&Case::Stdin { stdin }).await?;
    running.end().await?;
    let failed = |what: String| Fault::Reported(format!("the assertions cannot be decided: {what}"));
    if ended.outcome != Outcome::Exited(0) {
        return Err(failed(format!("{:?} {:?}", ended.outcome, ended.told)));
    }
    let answers: Vec<Answer> = serde_json::from_str(&ended.stdout).map_err(|error| failed(error.to_string()))?;
    match answers.len() == order.assertions.len() {
        true => Ok(answers),
        false => Err(failed(format!("{} answers to {} assertions", answers.len(), order.assertions.len()))),
    }
}

#[cfg(test)]
mod tests;
