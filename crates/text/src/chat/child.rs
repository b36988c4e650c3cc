//! Chat templates rendered by a process of its own.
//!
//! A template is untrusted code. Fuel bounds its instructions, but one instruction may double a text, compare
//! lists that hold each other 2⁶⁰ times, panic, or nest values too deep for the stack that drops them, and the parser computes
//! constants before there is any fuel. No hook of the template library sees all of that, so the bound is the kernel's: a child process
//! whose memory and processor time are limited, and whose end is an error of the template. It lives as long as its
//! template, for one exchange takes some tens of microseconds and a start some milliseconds.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use nix::sys::resource::{Resource, UsageWho, getrlimit, getrusage, setrlimit};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use super::jinja::{Jinja, MOST_RENDERED};
use crate::Day;

/// Bytes that the child may take above what it has when it starts: eight times the longest text that it may return.
const MEMORY: u64 = 512 << 20;

/// Processor time of one rendering. Fuel is used up after about one second.
const PROCESSOR_SECONDS: u64 = 5;

/// Longest wait for an answer. The child is ended by its processor time first, unless the machine is very busy.
const PATIENCE: Duration = Duration::from_secs(120);

/// Longest request: conversations come from files of the user.
const MOST_ASKED: usize = 1 << 30;

/// First argument of a program that is to render.
const ARGUMENT: &str = "render-chat-templates";

/// The program of this process, also when its file was replaced.
const THIS: &str = "/proc/self/exe";

/// How this program is started as a renderer, once it has declared that it can be.
static ENTRY: OnceLock<Vec<OsString>> = OnceLock::new();

/// First thing in `main` of a program that reads model folders: renders for another process if that is what this one was started
/// for, and then says how to end. Otherwise all templates of this process are rendered by such children from now on.
///
/// Where no program has called this, as in unit tests and the fuzzer, templates are rendered within the process, with fuel as
/// their only bound.
#[must_use]
pub fn enter_renderer() -> Option<ExitCode> {
    if std::env::args_os().nth(1).is_some_and(|argument| argument == ARGUMENT) {
        return Some(serve_templates());
    }
    render_apart(&[ARGUMENT]);
    None
}

/// Has all templates of this process rendered by children that are started as this program with `arguments`, and then call
/// [`serve_templates`]. Only the first call counts.
pub fn render_apart(arguments: &[&str]) {
    ENTRY.get_or_init(|| arguments.iter().map(OsString::from).collect());
}

/// Renders for the process at the other end of standard input, a socket, until that is closed.
#[must_use]
pub fn serve_templates() -> ExitCode {
    match limit_memory().and_then(|()| serve()) {
        Ok(()) => ExitCode::SUCCESS,
        // Its standard error is not read; the parent sees the socket closed.
        Err(_) => ExitCode::FAILURE,
    }
}

fn limit_memory() -> io::Result<()> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let data = status.lines().find_map(|line| line.strip_prefix("VmData:")?.trim().strip_suffix(" kB")?.parse().ok());
    let data: u64 = data.ok_or_else(|| io::Error::other("/proc/self/status has no VmData"))?;
    let limit = (data << 10) + MEMORY;
    // Not RLIMIT_AS, which counts reserved address space as well: libraries reserve a lot of it.
    setrlimit(Resource::RLIMIT_DATA, limit, limit)?;
    // A template that is ended leaves no image of its memory.
    Ok(setrlimit(Resource::RLIMIT_CORE, 0, 0)?)
}

/// Allows the next rendering its processor time; the kernel ends the process after that.
fn limit_processor_time() -> io::Result<()> {
    let used = getrusage(UsageWho::RUSAGE_SELF)?;
    let used = used.user_time().tv_sec() + used.system_time().tv_sec();
    let (_, hard) = getrlimit(Resource::RLIMIT_CPU)?;
    // Both were rounded down.
    let soft = u64::try_from(used).unwrap_or(0) + 2 + PROCESSOR_SECONDS;
    Ok(setrlimit(Resource::RLIMIT_CPU, soft.min(hard), hard)?)
}

fn serve() -> io::Result<()> {
    let mut socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut template = None;
    while let Some((kind, bytes)) = receive(&mut socket, MOST_ASKED)? {
        limit_processor_time()?;
        let answer = match kind {
            Kind::Template => {
                let Template { source, day } = serde_json::from_slice(&bytes)?;
                let day = day.parse().map_err(io::Error::other)?;
                template = None;
                Jinja::compile(&source, day).map(|compiled| {
                    template = Some(compiled);
                    String::new()
                })
            }
            Kind::Context => {
                let template = template.as_ref().ok_or_else(|| io::Error::other("no template"))?;
                template.render(&serde_json::from_slice(&bytes)?)
            }
            Kind::Text | Kind::Error => return Err(io::ErrorKind::InvalidData.into()),
        };
        match &answer {
            Ok(text) => send(&mut socket, Kind::Text, text.as_bytes())?,
            Err(error) => send(&mut socket, Kind::Error, beginning(error).as_bytes())?,
        }
    }
    Ok(())
}

/// What anybody will read of an error: those of the template library quote values.
fn beginning(error: &str) -> &str {
    const MOST: usize = 4096;
    &error[..error.floor_char_boundary(MOST)]
}

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A [`Template`] to compile.
    Template,
    /// JSON to render with.
    Context,
    /// A rendered text, or nothing of a template that was compiled.
    Text,
    /// Why there is none.
    Error,
}

#[derive(Serialize, Deserialize)]
struct Template {
    source: String,
    day: String,
}

/// A message: its kind, its length as eight bytes, itself.
fn send(socket: &mut UnixStream, kind: Kind, bytes: &[u8]) -> io::Result<()> {
    let mut head = [0; 9];
    head[0] = kind as u8;
    head[1..].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
    socket.write_all(&head)?;
    socket.write_all(bytes)
}

/// The next message; `None` when the other end is closed.
fn receive(socket: &mut UnixStream, most: usize) -> io::Result<Option<(Kind, Vec<u8>)>> {
    let mut head = [0; 9];
    match socket.read_exact(&mut head) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    let kinds = [Kind::Template, Kind::Context, Kind::Text, Kind::Error];
    let kind = kinds.get(usize::from(head[0])).ok_or(io::ErrorKind::InvalidData)?;
    let length = u64::from_le_bytes(std::array::from_fn(|place| head[place + 1]));
    let length = usize::try_from(length).ok().filter(|length| *length <= most).ok_or(io::ErrorKind::InvalidData)?;
    let mut bytes = vec![0; length];
    socket.read_exact(&mut bytes)?;
    Ok(Some((*kind, bytes)))
}

/// A template in a child of its own.
#[derive(Debug)]
pub(super) struct ChildRenderer {
    template: Vec<u8>,
    entry: &'static [OsString],
    /// Taken while it renders: what fails in the middle is not used again.
    child: Mutex<Option<Renderer>>,
}

impl ChildRenderer {
    /// Compiles a template in a child; `None` where this program cannot be one ([`render_apart`]).
    pub(super) fn compile(source: &str, day: Day) -> Option<Result<Self, String>> {
        let entry = ENTRY.get()?;
        let template = Template { source: source.to_owned(), day: day.to_string() };
        let template = serde_json::to_vec(&template).expect("texts are JSON");
        let apart = Self { template, entry, child: Mutex::new(None) };
        Some(apart.start().map(|child| Self { child: Mutex::new(Some(child)), ..apart }))
    }

    fn start(&self) -> Result<Renderer, String> {
        let (child, compiled) = tried(&self.template, Kind::Template, || {
            Renderer::start(self.entry).map_err(|error| format!("start a process to render it: {error}"))
        })?;
        compiled.map(|_| child)
    }

    pub(super) fn render(&self, context: &serde_json::Value) -> Result<String, String> {
        let context = serde_json::to_vec(context).map_err(|error| error.to_string())?;
        let child = || self.child.lock().unwrap_or_else(PoisonError::into_inner);
        let (rendered_by, rendered) = tried(&context, Kind::Context, || {
            let waiting = child().take();
            waiting.map_or_else(|| self.start(), Ok)
        })?;
        *child() = Some(rendered_by);
        rendered
    }
}

/// Asks a child, and another one when that was told to end: a signal that was meant for all processes of a job, say.
fn tried(
    message: &[u8],
    kind: Kind,
    child: impl Fn() -> Result<Renderer, String>,
) -> Result<(Renderer, Result<String, String>), String> {
    const TRIES: u32 = 3;
    let mut tries = 1..;
    loop {
        let mut child = child()?;
        match child.ask(kind, message) {
            Ok(answer) => return Ok((child, answer)),
            Err(error) => match child.why(&error) {
                (true, _) if tries.next() < Some(TRIES) => {}
                (_, why) => return Err(why),
            },
        }
    }
}

/// A child that renders; dropped, it ends.
#[derive(Debug)]
struct Renderer {
    child: Child,
    socket: UnixStream,
}

impl Renderer {
    fn start(entry: &[OsString]) -> io::Result<Self> {
        let (socket, other) = UnixStream::pair()?;
        let mut command = Command::new(THIS);
        // Nothing of the environment is its business but where the libraries are.
        command.env_clear().envs(std::env::var_os("LD_LIBRARY_PATH").map(|path| ("LD_LIBRARY_PATH", path)));
        // A group of its own: Ctrl-C at a terminal is meant for the program, which ends it.
        command.args(entry).process_group(0).current_dir("/");
        let child =
            command.stdin(Stdio::from(OwnedFd::from(other))).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let renderer = Self { child, socket };
        renderer.socket.set_read_timeout(Some(PATIENCE))?;
        renderer.socket.set_write_timeout(Some(PATIENCE))?;
        Ok(renderer)
    }

    fn ask(&mut self, kind: Kind, bytes: &[u8]) -> io::Result<Result<String, String>> {
        send(&mut self.socket, kind, bytes)?;
        let (kind, bytes) = receive(&mut self.socket, MOST_RENDERED)?.ok_or(io::ErrorKind::UnexpectedEof)?;
        let text = String::from_utf8(bytes).map_err(io::Error::other)?;
        match kind {
            Kind::Text => Ok(Ok(text)),
            Kind::Error => Ok(Err(text)),
            Kind::Template | Kind::Context => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// Why there was no answer, and whether that has nothing to do with the template.
    fn why(mut self, error: &io::Error) -> (bool, String) {
        use io::ErrorKind::{BrokenPipe, ConnectionReset, TimedOut, UnexpectedEof, WouldBlock};
        let ended = match error.kind() {
            // The socket closes when the process ends.
            BrokenPipe | ConnectionReset | UnexpectedEof => self.child.wait(),
            WouldBlock | TimedOut => return (false, format!("it takes more than {} s", PATIENCE.as_secs())),
            _ => return (false, format!("the process that renders it gave an invalid answer: {error}")),
        };
        match ended {
            Ok(status) => (is_asked_to_end(status), described(status)),
            Err(error) => (false, format!("the process that renders it is gone: {error}")),
        }
    }
}

impl Drop for Renderer {
    fn drop(&mut self) {
        // It may be in the middle of a rendering. Both fail when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn is_asked_to_end(status: ExitStatus) -> bool {
    let asked = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGUSR1];
    asked.iter().any(|signal| status.signal() == Some(*signal as i32))
}

fn described(status: ExitStatus) -> String {
    /// What a program of this language exits with after a panic.
    const PANICKED: i32 = 101;
    let signal = status.signal().and_then(|signal| Signal::try_from(signal).ok());
    match signal {
        None if status.code() == Some(PANICKED) => "the template library panics at it".to_owned(),
        Some(Signal::SIGXCPU) => format!("it takes more than {PROCESSOR_SECONDS} s of processor time"),
        Some(Signal::SIGABRT | Signal::SIGSEGV | Signal::SIGBUS) => {
            format!("it takes more than {} MiB of memory, or nests values too deep", MEMORY >> 20)
        }
        Some(Signal::SIGKILL) => "the process that renders it was killed, perhaps for lack of memory".to_owned(),
        _ => format!("the process that renders it ended: {status}"),
    }
}
