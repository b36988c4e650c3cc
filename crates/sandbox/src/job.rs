//! What is run, and how it ended.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What a program, and each run of it, may take.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Address space of each process.
    pub memory_bytes: u64,
    /// Processor time of one case.
    pub cpu: Duration,
    /// Time of one case by the clock.
    pub wall: Duration,
    /// What a case may write to its standard streams together.
    pub output_bytes: u64,
    /// Size of a file that it writes.
    pub file_bytes: u64,
    /// File descriptors that a process may hold open.
    pub open_files: u64,
    /// Processes at once; at 1 no second one can be made.
    pub processes: u32,
    /// Threads besides the first, over all processes.
    pub threads: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            memory_bytes: 512 << 20,
            cpu: Duration::from_secs(10),
            wall: Duration::from_secs(10),
            output_bytes: 1 << 20,
            file_bytes: 16 << 20,
            open_files: 64,
            processes: 1,
            threads: 16,
        }
    }
}

/// Limits as the steward reads them.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct WrittenLimits {
    memory_bytes: u64,
    cpu_seconds: u64,
    wall_seconds: f64,
    output_bytes: u64,
    file_bytes: u64,
    open_files: u64,
    processes: u32,
    threads: u32,
}

/// Processes of the sandbox itself, which count as the program's own.
const OWN_PROCESSES: u32 = 8;

impl From<Limits> for WrittenLimits {
    fn from(limits: Limits) -> Self {
        Self {
            memory_bytes: limits.memory_bytes,
            // The limit of the system has whole seconds.
            cpu_seconds: limits.cpu.as_secs_f64().ceil().max(1.0) as u64,
            wall_seconds: limits.wall.as_secs_f64(),
            output_bytes: limits.output_bytes,
            file_bytes: limits.file_bytes,
            open_files: limits.open_files,
            processes: limits.processes,
            threads: limits.threads + OWN_PROCESSES,
        }
    }
}

/// A program, run once for each of its cases.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// The text of a Python program.
    pub source: String,
    /// For another language: absolute path of a program and its arguments, run instead of `source`. Empty for Python.
    pub command: Vec<String>,
    /// Files of the scratch folder, by name.
    pub files: BTreeMap<String, String>,
    /// What each run may take.
    pub limits: Limits,
}

impl Job {
    /// A Python program.
    #[must_use]
    pub fn python(source: impl Into<String>, limits: Limits) -> Self {
        Self { source: source.into(), command: Vec::new(), files: BTreeMap::new(), limits }
    }
}

/// One run of a program. It never holds what is expected of the run.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Case {
    /// A whole program that reads standard input.
    Stdin {
        /// What it reads.
        stdin: String,
    },
    /// An expression of Python that is evaluated after the program.
    Call {
        /// The expression that calls the program's function, in Python.
        call: String,
    },
    /// A function of the program, or a method of its class `Solution`.
    Function {
        /// Name of the function to call.
        function: String,
        /// Values of its arguments.
        arguments: Vec<serde_json::Value>,
    },
    /// Another command than that of the job, in the same scratch folder: a compiler, say.
    Command {
        /// Absolute path of a program and its arguments.
        command: Vec<String>,
    },
}

/// How one run ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Ended {
    /// How the program ended.
    pub outcome: Outcome,
    /// What it wrote to standard output.
    pub stdout: String,
    /// The end of what it wrote to standard error.
    pub stderr: String,
    /// What it says of itself: claims of an untrusted program.
    pub told: Vec<Told>,
    /// Processor time of the program and its threads.
    pub cpu: Duration,
    /// Time by the clock.
    pub wall: Duration,
    /// Most memory that was resident.
    pub peak_bytes: u64,
}

/// The end of a run, as the processes outside of the program saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// With this code.
    Exited(i32),
    /// By this signal.
    Signalled(i32),
    /// It was killed at a limit of time.
    OverTime,
    /// It was killed for what it wrote.
    OverOutput,
}

/// What the interpreter in the program's process says.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(tag = "kind", content = "text", rename_all = "snake_case")]
pub enum Told {
    /// The program is no Python.
    Compile(String),
    /// It raised an exception.
    Error(String),
    /// The exception of a call, after [`Told::Error`]: names of its classes, its arguments and its text. `warm.py` has the encoding.
    Raised(serde_json::Value),
    /// It asked for more memory than there is.
    Memory(String),
    /// The command cannot be executed.
    Exec(String),
    /// Value of the expression or call, as JSON with the kinds of Python: `warm.py` has the encoding.
    Value(serde_json::Value),
    /// The sandbox failed before the program began.
    Fault(String),
}

/// Signal of the system at the limit of processor time.
const SIGXCPU: i32 = 24;
const SIGKILL: i32 = 9;

/// What the steward writes after a run.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Written {
    pub(crate) ready: bool,
    told: String,
    code: Option<i32>,
    signal: Option<i32>,
    over: Option<Over>,
    stdout: String,
    stderr: String,
    cpu_seconds: f64,
    wall_seconds: f64,
    peak_bytes: u64,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Over {
    Time,
    Output,
}

impl Written {
    /// What the run came to; or, where the program never began, why.
    pub(crate) fn ended(self, limits: &Limits) -> Result<Ended, String> {
        // Lines that are none of ours are the program's, which may write anything.
        let told: Vec<Told> = self.told.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        // Whether the isolation stood is the steward's word, never the program's.
        if !self.ready {
            let why = told.into_iter().find_map(|told| match told {
                Told::Fault(why) => Some(why),
                _ => None,
            });
            return Err(why.unwrap_or_else(|| "the process ended before it was isolated".to_owned()));
        }
        // After isolation the program can write these lines itself, and must not be able to claim a fault of the sandbox: a fault is
        // retried, and a wrong answer is not.
        let told = told.into_iter().filter(|told| !matches!(told, Told::Fault(_))).collect();
        let seconds = |value: f64| Duration::try_from_secs_f64(value.max(0.0)).unwrap_or_default();
        let cpu = seconds(self.cpu_seconds);
        // What the steward did comes first: a program that it killed has a signal, too, and that would read as a crash.
        let outcome = match (self.over, self.signal, self.code) {
            (Some(Over::Time), ..) | (None, Some(SIGXCPU), _) => Outcome::OverTime,
            (Some(Over::Output), ..) => Outcome::OverOutput,
            // The kernel kills at the hard limit of processor time, one second after SIGXCPU, if the program ignores that.
            (None, Some(SIGKILL), _) if cpu >= limits.cpu => Outcome::OverTime,
            (None, Some(signal), _) => Outcome::Signalled(signal),
            (None, None, code) => Outcome::Exited(code.unwrap_or(-1)),
        };
        let wall = seconds(self.wall_seconds);
        let peak_bytes = self.peak_bytes;
        Ok(Ended { outcome, stdout: self.stdout, stderr: self.stderr, told, cpu, wall, peak_bytes })
    }
}
