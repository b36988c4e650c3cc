//! An objective that an external program computes, over JSON lines: one request per update, one reply.
//!
//! Only rank 0 asks, and broadcasts the reply. All ranks therefore apply the same update even if the program draws
//! random numbers or its sums depend on its machine. The program receives per-answer facts and log-prob sums, so
//! nothing of the model's size goes through a pipe.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};

use pacs_algo::{LogprobSums, ScalarStep, SequenceInfo};
use serde_json::{Value, json};

use crate::error::ExternalError;
use crate::settings::ExternalSettings;

/// Longest reply (bytes); a step has a few million sequences at most.
const MOST_ANSWER_BYTES: u64 = 256 << 20;

/// The external program, started at the first request.
#[derive(Debug)]
pub(super) struct External {
    settings: ExternalSettings,
    running: Option<Running>,
}

#[derive(Debug)]
struct Running {
    child: Child,
    questions: SyncSender<String>,
    answers: Receiver<Result<String, String>>,
}

impl External {
    pub(super) fn new(settings: ExternalSettings) -> Self {
        Self { settings, running: None }
    }

    /// Asks for the losses and coefficients of an update's answers.
    pub(super) fn ask(
        &mut self,
        (step, update): (u64, usize),
        infos: &[SequenceInfo],
        sums: &[LogprobSums],
    ) -> Result<ScalarStep, ExternalError> {
        let answered = self.exchange(question(step, update, infos, sums).to_string());
        if answered.is_err() {
            // A late reply would be mistaken for that of the next request.
            self.running = None;
        }
        let line = answered?;
        read(&line).map_err(|problem| ExternalError::Answer { program: self.program(), problem })
    }

    fn exchange(&mut self, question: String) -> Result<String, ExternalError> {
        let program = self.program();
        let timeout = self.settings.timeout;
        let running = match &mut self.running {
            Some(running) => running,
            none => none.insert(start(&self.settings.command, &program)?),
        };
        let ended = |problem: &str| ExternalError::Ended { program: program.clone(), problem: problem.to_owned() };
        running.questions.send(question).map_err(|_| ended("its pipes are closed"))?;
        match running.answers.recv_timeout(timeout) {
            Ok(Ok(line)) => Ok(line),
            Ok(Err(problem)) => Err(ended(&problem)),
            Err(RecvTimeoutError::Timeout) => Err(ExternalError::Silent { program, timeout }),
            Err(RecvTimeoutError::Disconnected) => Err(ended("its pipes are closed")),
        }
    }

    fn program(&self) -> String {
        self.settings.command.join(" ")
    }
}

impl Drop for Running {
    /// Kills the program, which closes its pipes and so ends the thread that talks to it.
    fn drop(&mut self) {
        if let Err(error) = self.child.kill() {
            tracing::debug!(%error, "the objective had ended before");
        }
        if let Err(error) = self.child.wait() {
            tracing::warn!(%error, "the objective was not waited for");
        }
    }
}

fn start(command: &[String], program: &str) -> Result<Running, ExternalError> {
    let failed = |error| ExternalError::Start { program: program.to_owned(), error };
    let (name, arguments) =
        command.split_first().ok_or_else(|| failed(std::io::Error::other("no program is named")))?;
    let mut child =
        Command::new(name).args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(failed)?;
    let pipes = child.stdin.take().zip(child.stdout.take());
    let (stdin, stdout) = pipes.expect("both were asked for");
    // At most one request is open. Pipes are read on a thread because a read has no timeout, and the trainer must
    // not block forever.
    let (questions, asked) = sync_channel(1);
    let (said, answers) = sync_channel(1);
    std::thread::Builder::new()
        .name("objective".into())
        .spawn(move || talk(stdin, BufReader::new(stdout), &asked, &said))
        .map_err(failed)?;
    Ok(Running { child, questions, answers })
}

fn talk(
    mut stdin: ChildStdin,
    mut stdout: BufReader<ChildStdout>,
    asked: &Receiver<String>,
    said: &SyncSender<Result<String, String>>,
) {
    while let Ok(question) = asked.recv() {
        let answer = writeln!(stdin, "{question}").and_then(|()| stdin.flush()).and_then(|()| {
            let mut line = String::new();
            (&mut stdout).take(MOST_ANSWER_BYTES).read_line(&mut line)?;
            Ok(line)
        });
        let answer = match answer {
            Ok(line) if line.is_empty() => Err("it has closed its output".to_owned()),
            Ok(line) => Ok(line),
            Err(error) => Err(error.to_string()),
        };
        let is_over = answer.is_err();
        if said.send(answer).is_err() || is_over {
            return;
        }
    }
}

fn question(step: u64, update: usize, infos: &[SequenceInfo], sums: &[LogprobSums]) -> Value {
    let answer = |(info, sums): (&SequenceInfo, &LogprobSums)| {
        json!({
            "group": info.group,
            "label": info.label,
            "reward": info.reward,
            "tokens": info.tokens,
            "truncated": info.truncated,
            "new": sums.new,
            "old": sums.old,
            "rollout": sums.rollout,
        })
    };
    let answers: Vec<Value> = infos.iter().zip(sums).map(answer).collect();
    json!({"step": step, "update": update, "answers": answers})
}

fn read(line: &str) -> Result<ScalarStep, String> {
    let answer: Value = serde_json::from_str(line).map_err(|error| format!("a line that is no JSON ({error})"))?;
    if let Some(error) = answer.get("error") {
        return Err(format!("with an error of its own: {error}"));
    }
    let numbers = |field: &str| -> Result<Vec<f64>, String> {
        let list = answer.get(field).and_then(Value::as_array).ok_or_else(|| format!("without a list `{field}`"))?;
        let number = |value: &Value| value.as_f64().ok_or_else(|| format!("with {value} among `{field}`"));
        list.iter().map(number).collect()
    };
    Ok(ScalarStep { loss: numbers("losses")?, dloss_dlogprob: numbers("coefficients")? })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const INFO: SequenceInfo =
        SequenceInfo { group: 3, label: 1.0, reward: 0.5, greedy_reward: None, tokens: 4, truncated: false };
    const SUMS: LogprobSums = LogprobSums { new: -2.0, old: -1.5, rollout: -1.25 };

    fn program(script: &str, timeout: Duration) -> External {
        External::new(ExternalSettings { command: ["sh", "-c", script].map(str::to_owned).to_vec(), timeout })
    }

    #[test]
    fn a_program_is_asked_once_an_update_and_lives_on() {
        let script = "n=0; while read line; do n=$((n + 1)); \
                      case \"$line\" in *'\"new\":-2.0'*'\"old\":-1.5'*'\"rollout\":-1.25'*) \
                      echo \"{\\\"losses\\\": [$n], \\\"coefficients\\\": [0.5]}\";; *) echo '{}';; esac; done";
        let mut external = program(script, Duration::from_secs(60));
        for n in 1..=3 {
            let step = external.ask((1, n), &[INFO], &[SUMS]).unwrap();
            assert_eq!(step, ScalarStep { loss: vec![n as f64], dloss_dlogprob: vec![0.5] });
        }
    }

    #[test]
    fn a_program_that_gives_no_objective_is_named_with_what_it_did() {
        let long = Duration::from_secs(60);
        for (script, timeout, expected) in [
            ("read line; exit 3", long, "it has closed its output"),
            ("read line; echo hello", long, "a line that is no JSON"),
            ("read line; echo '{\"losses\": [1]}'", long, "without a list `coefficients`"),
            ("read line; echo '{\"losses\": [null], \"coefficients\": [1]}'", long, "with null among `losses`"),
            ("read line; echo '{\"error\": \"label 0.5\"}'", long, "with an error of its own: \"label 0.5\""),
            ("read line; exec sleep 60", Duration::from_millis(50), "gave no answer within 50ms"),
        ] {
            let error = program(script, timeout).ask((1, 0), &[INFO], &[SUMS]).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains(script), "{error} does not say `{expected}`");
        }
        let command = vec!["/nothing/is/here".to_owned()];
        let error = External::new(ExternalSettings { command, timeout: long }).ask((1, 0), &[INFO], &[SUMS]);
        assert!(matches!(error, Err(ExternalError::Start { .. })), "{error:?}");
    }
}
