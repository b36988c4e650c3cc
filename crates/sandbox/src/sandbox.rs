//! The side of the worker: one process tree with a warm interpreter, and the job that runs in it.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command};
use tokio::time::timeout;

use crate::cgroup::Group;
use crate::init::Order;
use crate::job::{Outcome, Written, WrittenLimits};
use crate::{Case, Ended, Job, Layers, Policy, SandboxError, Told};

/// How long a sandbox may take to say that it is ready.
const START_LIMIT: Duration = Duration::from_secs(30);

/// How long the steward may take beyond what the program may: the machine may be busy.
const GRACE: Duration = Duration::from_secs(20);

/// How long a sandbox whose output has ended may take to end itself.
const END_LIMIT: Duration = Duration::from_secs(1);

/// Longest answer, in bytes, beyond the output in it.
const MOST_OVERHEAD: u64 = 1 << 20;

/// Bytes that one byte of output may become in an answer: `\u0000` for a zero.
const ESCAPED: u64 = 6;

/// End of standard error that is shown, in bytes.
const SHOWN: usize = 500;

/// How a program becomes [`run_init`](crate::run_init): its path and the arguments before the order.
#[derive(Clone, Debug)]
pub struct Entry {
    program: PathBuf,
    arguments: Vec<OsString>,
}

impl Entry {
    /// This program, with these arguments before the order.
    #[must_use]
    pub fn own(arguments: &[&str]) -> Self {
        // The file that runs, even where another one has taken its place.
        Self::new(PathBuf::from("/proc/self/exe"), arguments)
    }

    /// An entry through another program, with arguments before the order.
    #[must_use]
    pub fn new(program: PathBuf, arguments: &[&str]) -> Self {
        Self { program, arguments: arguments.iter().map(OsString::from).collect() }
    }
}

/// A process tree with a warm interpreter, for one job at a time. Dropping it kills all of it.
pub struct Sandbox {
    process: Child,
    /// The process, and its group.
    leader: Pid,
    stdin: ChildStdin,
    stdout: ChildStdout,
    stderr: ChildStderr,
    group: Option<Group>,
    layers: Layers,
    version: String,
}

/// The first frame.
#[derive(Deserialize)]
struct Hello {
    layers: Layers,
    version: String,
}

/// Any later one but the answer to a case.
#[derive(Deserialize)]
#[serde(untagged)]
enum Frame {
    Fault { fault: String },
    Bye { bye: bool },
    Written(Box<Written>),
}

#[derive(Serialize)]
struct WrittenJob<'a> {
    source: &'a str,
    command: &'a [String],
    files: &'a std::collections::BTreeMap<String, String>,
    limits: WrittenLimits,
}

impl Sandbox {
    /// Starts a sandbox, and waits until its interpreter is warm.
    ///
    /// # Errors
    /// [`SandboxError::Missing`] when layers do not hold that `policy` does not allow to miss, and [`SandboxError::Start`] when it does
    /// not start at all.
    pub async fn start(entry: &Entry, policy: &Policy) -> Result<Self, SandboxError> {
        let sandbox = Self::probe(entry, policy).await?;
        let refused = sandbox.layers.refused(&policy.allow_missing);
        if refused.is_empty() { Ok(sandbox) } else { Err(SandboxError::Missing(refused)) }
    }

    /// Starts a sandbox whatever layers hold: to show them, not to run untrusted programs.
    ///
    /// # Errors
    /// [`SandboxError::Start`] when it does not start at all.
    pub async fn probe(entry: &Entry, policy: &Policy) -> Result<Self, SandboxError> {
        let start = |error: String| SandboxError::Start(error);
        let group = Group::new(policy);
        let told = Order {
            policy: policy.clone(),
            group: group.as_ref().map(|group| group.path().to_owned()).map_err(Clone::clone),
        };
        let order = serde_json::to_string(&told).expect("texts and numbers are JSON");
        let mut process = Command::new(&entry.program)
            .args(&entry.arguments)
            .arg(order)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // A group of its own, so that a terminal's Ctrl-C does not reach it and all can be killed at once.
            .process_group(0)
            .spawn()
            .map_err(|error| start(format!("`{}`: {error}", entry.program.display())))?;
        let id =
            process.id().and_then(|id| i32::try_from(id).ok()).expect("a process that was not waited for has an id");
        let stdin = process.stdin.take().expect("piped above");
        let stdout = process.stdout.take().expect("piped above");
        let stderr = process.stderr.take().expect("piped above");
        let mut sandbox = Self {
            process,
            leader: Pid::from_raw(id),
            stdin,
            stdout,
            stderr,
            group: group.ok(),
            layers: Layers(std::collections::BTreeMap::new()),
            version: String::new(),
        };
        let hello = match timeout(START_LIMIT, sandbox.read(MOST_OVERHEAD)).await {
            Ok(Ok(frame)) => frame,
            Ok(Err(problem)) => return Err(start(sandbox.last_words(problem).await)),
            Err(_) => return Err(start(format!("it is not ready after {} s", START_LIMIT.as_secs()))),
        };
        let Hello { layers, version } =
            serde_json::from_slice(&hello).map_err(|error| start(format!("its first frame is none: {error}")))?;
        (sandbox.layers, sandbox.version) = (layers, version);
        Ok(sandbox)
    }

    /// Which layers hold.
    #[must_use]
    pub fn layers(&self) -> &Layers {
        &self.layers
    }

    /// The interpreter and its version.
    #[must_use]
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Whether the process has ended by itself.
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.process.try_wait(), Ok(None))
    }

    /// Gives the sandbox a job. After an error it has to be dropped.
    ///
    /// # Errors
    /// [`SandboxError::Ended`] when the sandbox is gone.
    pub async fn begin(&mut self, job: &Job) -> Result<Running<'_>, SandboxError> {
        let Job { source, command, files, limits } = job;
        let written = WrittenJob { source, command, files, limits: (*limits).into() };
        self.send(&serde_json::to_vec(&written).expect("texts and numbers are JSON")).await?;
        Ok(Running { limits: *limits, sandbox: self })
    }

    async fn send(&mut self, text: &[u8]) -> Result<(), SandboxError> {
        let length =
            u32::try_from(text.len()).map_err(|_| SandboxError::Failed("a job has more than 4 GiB".to_owned()))?;
        let mut frame = Vec::with_capacity(4 + text.len());
        frame.extend_from_slice(&length.to_be_bytes());
        frame.extend_from_slice(text);
        let sent = timeout(GRACE, async {
            self.stdin.write_all(&frame).await?;
            self.stdin.flush().await
        });
        match sent.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(SandboxError::Ended(self.last_words(error.to_string()).await)),
            Err(_) => Err(SandboxError::Late(GRACE)),
        }
    }

    async fn read(&mut self, most: u64) -> Result<Vec<u8>, String> {
        let mut length = [0; 4];
        self.stdout.read_exact(&mut length).await.map_err(|error| error.to_string())?;
        let length = u64::from(u32::from_be_bytes(length));
        if length > most {
            return Err(format!("a frame has {length} bytes, expected at most {most}"));
        }
        let mut text = vec![0; usize::try_from(length).expect("bounded above")];
        self.stdout.read_exact(&mut text).await.map_err(|error| error.to_string())?;
        Ok(text)
    }

    /// What the process wrote to standard error and how it ended, or else the problem itself.
    async fn last_words(&mut self, problem: String) -> String {
        let mut text = Vec::new();
        // Ends with the processes that hold it.
        let _ = timeout(END_LIMIT, (&mut self.stderr).take(1 << 20).read_to_end(&mut text)).await;
        let text = String::from_utf8_lossy(&text);
        let text = text.trim();
        let text = &text[text.ceil_char_boundary(text.len().saturating_sub(SHOWN))..];
        let status = timeout(END_LIMIT, self.process.wait()).await.ok().and_then(Result::ok);
        match (text.is_empty(), status) {
            (false, _) => text.to_owned(),
            (true, Some(status)) => described(status),
            (true, None) => problem,
        }
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // The interpreter is process 1 of its namespace: the kernel ends with it whatever it has started. The parent is in the group,
        // too, and where there is no namespace all of the trusted side.
        match killpg(self.leader, Signal::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => tracing::warn!("a sandbox was not killed: {error}"),
        }
    }
}

/// A job in a sandbox, before its end.
pub struct Running<'a> {
    sandbox: &'a mut Sandbox,
    limits: crate::Limits,
}

impl Running<'_> {
    /// Runs the program once. After an error the sandbox has to be dropped.
    ///
    /// # Errors
    /// When the sandbox, not the program, has failed.
    pub async fn run(&mut self, case: &Case) -> Result<Ended, SandboxError> {
        let kills = self.sandbox.group.as_ref().map(Group::kills);
        self.sandbox.send(&serde_json::to_vec(case).expect("texts and values are JSON")).await?;
        let most = self.limits.output_bytes.saturating_mul(3 * ESCAPED).saturating_add(MOST_OVERHEAD);
        let limit = self.limits.wall + GRACE;
        let frame = match timeout(limit, self.sandbox.read(most)).await {
            Ok(Ok(frame)) => frame,
            Ok(Err(problem)) => return Err(SandboxError::Ended(self.sandbox.last_words(problem).await)),
            Err(_) => return Err(SandboxError::Late(limit)),
        };
        match serde_json::from_slice(&frame) {
            Ok(Frame::Written(written)) => {
                let mut ended = written.ended(&self.limits).map_err(SandboxError::Failed)?;
                let killed = self.sandbox.group.as_ref().map(Group::kills) > kills;
                if killed && matches!(ended.outcome, Outcome::Signalled(_)) {
                    ended.told.push(Told::Memory("the control group has no more".to_owned()));
                }
                Ok(ended)
            }
            Ok(Frame::Fault { fault }) => Err(SandboxError::Failed(fault)),
            Ok(Frame::Bye { .. }) => Err(SandboxError::Failed("it ends before the job does".to_owned())),
            Err(error) => Err(SandboxError::Failed(format!("its answer is none: {error}"))),
        }
    }

    /// Ends the job. The sandbox has its next interpreter forked already when this returns, or forks it meanwhile.
    ///
    /// # Errors
    /// When the sandbox has failed; what the cases said holds.
    pub async fn end(self) -> Result<(), SandboxError> {
        self.sandbox.send(br#"{"end": true}"#).await?;
        match timeout(GRACE, self.sandbox.read(MOST_OVERHEAD)).await {
            Ok(Ok(frame)) => match serde_json::from_slice(&frame) {
                Ok(Frame::Bye { bye: true }) => Ok(()),
                _ => Err(SandboxError::Failed(String::from_utf8_lossy(&frame).into_owned())),
            },
            Ok(Err(problem)) => Err(SandboxError::Ended(self.sandbox.last_words(problem).await)),
            Err(_) => Err(SandboxError::Late(GRACE)),
        }
    }
}

fn described(status: ExitStatus) -> String {
    format!("it ended: {status}")
}
