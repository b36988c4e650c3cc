//! Assertions of Python: which calls are the program's, and whether they hold for what it returned. Both are decided by `referee.py`, in
//! the sandbox, because assertions come with the data.

use std::collections::HashMap;
use std::time::Duration;

use pacs_sandbox::{Case, Job, Limits, Outcome, Sandbox};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::end::Why;
use crate::fault::Fault;

const REFEREE: &str = include_str!("referee.py");

/// How long the referee may take: assertions are comparisons.
const REFEREE_LIMIT: Duration = Duration::from_secs(20);

#[derive(Serialize)]
struct Order<'a> {
    setup: &'a str,
    assertions: Vec<Entry<'a>>,
}

#[derive(Serialize)]
struct Entry<'a> {
    text: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    values: Option<&'a [Value]>,
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
    Judged {
        passed: bool,
        got: String,
        #[serde(default)]
        expected: Option<String>,
    },
}

/// The program's calls of each assertion, by the number of its case.
#[derive(Default)]
pub(super) struct Splits(HashMap<usize, Vec<String>>);

impl Splits {
    pub(super) fn calls(&self, case: usize) -> &[String] {
        self.0.get(&case).map_or(&[], Vec::as_slice)
    }
}

/// Finds the calls of the program in assertions.
pub(super) async fn split(
    sandbox: &mut Sandbox,
    limits: Limits,
    setup: &str,
    assertions: &[(usize, &str)],
) -> Result<Splits, Fault> {
    let entries = assertions.iter().map(|&(_, text)| Entry { text, values: None }).collect();
    let answers = ask(sandbox, limits, &Order { setup, assertions: entries }).await?;
    let mut splits = HashMap::new();
    for ((index, _), answer) in assertions.iter().zip(answers) {
        match answer {
            Answer::Split { calls } => drop(splits.insert(*index, calls)),
            Answer::Unsupported { unsupported } => {
                return Err(Fault::Reported(format!("the reference: assertion {}: {unsupported}", index + 1)));
            }
            Answer::Judged { .. } => {
                return Err(Fault::Garbage { problem: "the referee judged, asked to split".to_owned() });
            }
        }
    }
    Ok(Splits(splits))
}

/// Says of each assertion whether it holds for the values of its calls.
pub(super) async fn judge(
    sandbox: &mut Sandbox,
    limits: Limits,
    setup: &str,
    claims: &[(&str, &[Value])],
) -> Result<Vec<Result<(), Why>>, Fault> {
    let entries = claims.iter().map(|&(text, values)| Entry { text, values: Some(values) }).collect();
    let answers = ask(sandbox, limits, &Order { setup, assertions: entries }).await?;
    let judged = answers.into_iter().zip(claims).map(|(answer, (text, _))| match answer {
        Answer::Judged { passed: true, .. } => Ok(()),
        Answer::Judged { got, expected, .. } => {
            Err(Why::Wrong { expected: expected.unwrap_or_else(|| (*text).to_owned()), got })
        }
        Answer::Unsupported { unsupported } => Err(Why::Wrong { expected: (*text).to_owned(), got: unsupported }),
        Answer::Split { .. } => Err(Why::Wrong { expected: (*text).to_owned(), got: String::new() }),
    });
    Ok(judged.collect())
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
