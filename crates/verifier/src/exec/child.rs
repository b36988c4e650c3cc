use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use pacs_spec::ExecSpec;
use pacs_types::Verdict;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{ChildStdin, ChildStdout, Command};
use tokio::time::Instant;

use super::environment;
use super::guard::{self, Entry};
use super::stderr::{LineBudget, Stderr};
use crate::Task;
use crate::fault::Fault;
use crate::opinion::Opinion;

/// How long a child may take to say that it is ready: interpreters load their libraries meanwhile.
const START_LIMIT: Duration = Duration::from_secs(60);

/// How long a child whose output has ended may take to end itself, so that its exit status can be told.
const END_LIMIT: Duration = Duration::from_secs(1);

/// Longest line that a child may write, in bytes.
const MOST_LINE: u64 = 1 << 20;

/// How much of a line that is no verdict is shown.
const SHOWN: usize = 200;

/// How long a guard may take to end its program; then all of them are ended from here.
const GUARD_LIMIT: Duration = Duration::from_secs(15);

/// How often a guard is looked at that was told to end.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// A child process that is ready for tasks. Dropping it kills it with all that it has started.
pub(super) struct Child {
    program: String,
    process: tokio::process::Child,
    /// The process, and its group.
    group: Pid,
    /// There is a guard between this process and the program.
    is_guarded: bool,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    stderr: Stderr,
    version: Arc<str>,
    asked: u64,
}

/// The first line that a child writes.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Hello {
    /// Version of the protocol.
    pacs_verifier: u64,
    /// Version of the verifier.
    version: String,
}

/// One line to the child.
#[derive(Serialize)]
struct Request<'a> {
    id: u64,
    question: &'a str,
    response: &'a str,
    gold: &'a str,
}

/// One line from the child: [`Opinion`] with the number of the request.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Reply {
    id: u64,
    outcome: pacs_types::Outcome,
    label: Option<f64>,
    reward: Option<f64>,
    extracted: Option<String>,
    rule: Option<String>,
}

/// The version of the protocol that this program speaks.
const PROTOCOL: u64 = 1;

impl Child {
    /// Starts the command and waits for its first line.
    pub(super) async fn start(spec: &ExecSpec, guard: Option<&Entry>, log: &Arc<LineBudget>) -> Result<Self, Fault> {
        let program = spec.command[0].clone();
        let failed = |problem: String| Fault::Start { program: spec.command[0].clone(), problem };
        let mut command = match guard {
            Some(guard) => Command::from(guard.command(spec)),
            None if spec.sandbox.is_some() => {
                return Err(failed("this process cannot be its guard, which a sandbox needs".to_owned()));
            }
            None => {
                let mut command = Command::new(&program);
                command.args(&spec.command[1..]);
                command
            }
        };
        let spawned = command
            .env_clear()
            .envs(environment::of(&spec.environment, std::env::vars_os()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // A group of its own, so that what the child starts dies with it, and a terminal's Ctrl-C does not reach it.
            .process_group(0)
            // A guard has to end the others first.
            .kill_on_drop(guard.is_none())
            .spawn();
        let mut process = spawned.map_err(|error| failed(error.to_string()))?;
        let id =
            process.id().and_then(|id| i32::try_from(id).ok()).expect("a process that was not waited for has an id");
        let stdin = process.stdin.take().expect("piped above");
        let stdout = BufReader::new(process.stdout.take().expect("piped above"));
        let stderr = Stderr::read(process.stderr.take().expect("piped above"), program.clone(), Arc::clone(log));
        let group = Pid::from_raw(id);
        let is_guarded = guard.is_some();
        let mut child =
            Self { program, process, group, is_guarded, stdin, stdout, stderr, version: "".into(), asked: 0 };
        let hello = match tokio::time::timeout(START_LIMIT, child.line()).await {
            Ok(Ok(line)) => serde_json::from_slice::<Hello>(&line).map_err(|error| {
                let expected = "its first line has to be {\"pacs_verifier\": 1, \"version\": \"…\"}";
                failed(format!("{expected}, not `{}` ({error})", shown(&line)))
            })?,
            Ok(Err(fault)) => return Err(failed(child.end(fault).await.to_string())),
            Err(_) => return Err(failed(format!("it is not ready after {} s", START_LIMIT.as_secs()))),
        };
        if hello.pacs_verifier != PROTOCOL {
            return Err(failed(format!("it speaks protocol {}, expected {PROTOCOL}", hello.pacs_verifier)));
        }
        tracing::info!(program = child.program, pid = id, version = hello.version, "verifier process started");
        child.version = hello.version.into();
        Ok(child)
    }

    /// What the verifier calls itself.
    pub(super) fn version(&self) -> Arc<str> {
        Arc::clone(&self.version)
    }

    /// Whether the process has ended by itself.
    pub(super) fn has_ended(&mut self) -> bool {
        !matches!(self.process.try_wait(), Ok(None))
    }

    /// Gives the child a task and waits for its verdict. After a fault other than [`Fault::Reported`] nobody knows
    /// what the child would write next: it has to go.
    pub(super) async fn ask(&mut self, task: &Task) -> Result<Verdict, Fault> {
        self.asked += 1;
        let Task { question, response, gold } = task;
        let request = Request { id: self.asked, question, response, gold };
        let mut line = serde_json::to_vec(&request).expect("texts and a number are JSON");
        line.push(b'\n');
        let written = match self.stdin.write_all(&line).await {
            Ok(()) => self.stdin.flush().await,
            Err(error) => Err(error),
        };
        // A child that does not read has ended or will: what it wrote last says why.
        if let Err(error) = written {
            return Err(self.ended(format!("does not read its input: {error}")));
        }
        let line = self.line().await?;
        let reply: Reply = serde_json::from_slice(&line)
            .map_err(|error| Fault::Garbage { problem: format!("{error} in `{}`", shown(&line)) })?;
        if reply.id != self.asked {
            let problem = format!("it answers request {}, the request is {}", reply.id, self.asked);
            return Err(Fault::Garbage { problem });
        }
        let Reply { outcome, label, reward, extracted, rule, .. } = reply;
        Opinion { outcome, label, reward, extracted, rule }.verdict("exec")
    }

    /// The next line of the child's output, without its end.
    async fn line(&mut self) -> Result<Vec<u8>, Fault> {
        let mut line = Vec::new();
        match (&mut self.stdout).take(MOST_LINE).read_until(b'\n', &mut line).await {
            Ok(_) if line.ends_with(b"\n") => {
                line.pop();
                Ok(line)
            }
            Ok(bytes) if bytes as u64 >= MOST_LINE => {
                Err(Fault::Garbage { problem: format!("a line has more than {MOST_LINE} bytes: `{}`", shown(&line)) })
            }
            Ok(_) => Err(self.ended("ended its output".to_owned())),
            Err(error) => Err(self.ended(format!("cannot be read: {error}"))),
        }
    }

    fn ended(&self, how: String) -> Fault {
        Fault::Ended { program: self.program.clone(), how, stderr: String::new() }
    }

    /// Ends the child after a fault, and adds to the fault how it ended and what it wrote, if that is the fault.
    pub(super) async fn end(mut self, fault: Fault) -> Fault {
        let Fault::Ended { program, how, .. } = fault else { return fault };
        let status = tokio::time::timeout(END_LIMIT, self.process.wait()).await;
        let how = match status {
            Ok(Ok(status)) => describe(status),
            Ok(Err(_)) | Err(_) => how,
        };
        self.kill();
        let stderr = self.stderr.last_lines(END_LIMIT).await;
        Fault::Ended { program, how, stderr }
    }

    fn kill(&self) {
        if self.is_guarded {
            return self.end_guard();
        }
        match killpg(self.group, Signal::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => tracing::warn!(program = self.program, "a verifier process was not killed: {error}"),
        }
    }

    /// Has the guard end the program. One that does not, because the program has stopped it, say, is ended with all of them.
    fn end_guard(&self) {
        let guard = self.group.as_raw();
        let program = self.program.clone();
        let Some(began) = guard::began(guard) else { return };
        let _ = kill(self.group, Signal::SIGTERM);
        // Without a runtime this process is about to end, which the guard notices, too.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        // Ends with the guard, or at its limit.
        runtime.spawn(async move {
            let told = Instant::now();
            while guard::began(guard) == Some(began) {
                if told.elapsed() > GUARD_LIMIT {
                    tracing::warn!(program, "a verifier process does not end; it is killed with its descendants");
                    guard::kill_tree(guard);
                    let _ = kill(Pid::from_raw(guard), Signal::SIGKILL);
                    return;
                }
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        });
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
    }
}

fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with exit code {code}"),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => "ended".to_owned(),
    }
}

fn shown(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(line);
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.into_owned(),
    }
}
