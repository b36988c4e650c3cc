//! `pacs logs`: merges the log files of a run by time.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use pacs_runtime::{Exit, harmless_json};

use super::Looked;
use crate::client::block_on;
use crate::failure::Failure;
use crate::output;

/// Bytes read from the end of each file to find the newest lines.
const TAIL_BYTES: u64 = 4 << 20;
const MOST_LINE: u64 = 64 << 10;
/// Polling interval of `--follow`.
const LOOK_AGAIN: Duration = Duration::from_millis(300);

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pacs logs                                     the last lines of the run on this machine
  pacs logs runs/demo --role learner --follow
  pacs logs runs/demo --worker rollout-1 --lines 1000
  pacs logs runs/demo --trace 2ab36ad0          one group or step through all processes
  pacs logs runs/demo --text WARN

The logs of `pacs run`, which writes those of its workers into the run folder; workers of other machines write to their own standard
error. `pacs set log_level=debug` has every station of a group logged; a line's trace_id leads to the others.")]
pub(crate) struct Logs {
    /// The run: its folder, or for a live run also its coordinator (host:port), job, or the first digits of its id. Default: the live
    /// run of this machine.
    pub(crate) target: Option<String>,
    /// Only lines of processes of this role: coordinator, learner, rollout or verifier; may be given several times.
    #[arg(long, value_parser = ["coordinator", "learner", "rollout", "verifier"])]
    pub(crate) role: Vec<String>,
    /// Only lines of this process, as `pacs status` names it; may be given several times.
    #[arg(long, value_name = "NAME")]
    pub(crate) worker: Vec<String>,
    /// Only lines of the trace with this id, or whose id begins with it.
    #[arg(long, value_name = "ID")]
    pub(crate) trace: Option<String>,
    /// Only lines that contain this text.
    #[arg(long)]
    pub(crate) text: Option<String>,
    /// Show the newest N matching lines.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) lines: u32,
    /// Keep showing lines as they are written, until interrupted.
    #[arg(long)]
    pub(crate) follow: bool,
    /// Print each line as a JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// A log line and the process that wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Line {
    /// RFC 3339 time as written, which sorts as text; a line without one inherits that of the line before.
    time: String,
    process: String,
    text: String,
}

pub(crate) fn run(arguments: &Logs) -> Result<Exit, Failure> {
    let folder = block_on(async {
        let run = Looked::find(arguments.target.as_deref()).await?;
        run.folder().map(|folder| folder.join("logs"))
    })?;
    let read = |folder: &Path| format!("read the logs in `{}`", folder.display());
    let mut files = Files::default();
    let mut lines = files.read(&folder, arguments).with_context(|| read(&folder)).map_err(Failure::config)?;
    lines.sort_by(|a, b| a.time.cmp(&b.time));
    let skipped = lines.len().saturating_sub(arguments.lines as usize);
    let is_read = lines[skipped..].iter().all(|line| print(line, arguments.json));
    if !arguments.follow || !is_read {
        return Ok(Exit::Done);
    }
    loop {
        std::thread::sleep(LOOK_AGAIN);
        let mut lines = files.read(&folder, arguments).with_context(|| read(&folder)).map_err(Failure::config)?;
        lines.sort_by(|a, b| a.time.cmp(&b.time));
        if !lines.iter().all(|line| print(line, arguments.json)) {
            return Ok(Exit::Done);
        }
    }
}

/// Prints a line; returns false when the reader is gone.
fn print(line: &Line, json: bool) -> bool {
    match json {
        true => {
            let json = serde_json::json!({"process": line.process, "time": line.time, "line": line.text}).to_string();
            output::line_is_read(harmless_json(&json))
        }
        false => output::line_is_read(format_args!("{:<14} {}", line.process, line.text)),
    }
}

/// Read position of each file.
#[derive(Debug, Default)]
struct Files(BTreeMap<PathBuf, Place>);

#[derive(Debug, Default)]
struct Place {
    offset: u64,
    time: String,
}

impl Files {
    /// Reads matching lines written since the last call.
    fn read(&mut self, folder: &Path, arguments: &Logs) -> io::Result<Vec<Line>> {
        let mut lines = Vec::new();
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            let process = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(".log"));
            let Some(process) = process.filter(|process| wants_process(process, arguments)).map(str::to_owned) else {
                continue;
            };
            let read = self.0.entry(path.clone()).or_default();
            for text in read.new_lines(&path)? {
                let text = String::from_utf8_lossy(&text).trim_end().to_owned();
                if let Some(time) = time_of(&text) {
                    time.clone_into(&mut read.time);
                }
                if wants_line(&text, arguments) {
                    lines.push(Line { time: read.time.clone(), process: process.clone(), text });
                }
            }
        }
        Ok(lines)
    }
}

impl Place {
    fn new_lines(&mut self, path: &Path) -> io::Result<Vec<Vec<u8>>> {
        let mut file = File::open(path)?;
        let bytes = file.metadata()?.len();
        // The file is shorter than before: a restarted process began it anew, so read it from the start.
        if bytes < self.offset {
            self.offset = 0;
        }
        let is_cut = self.offset == 0 && bytes > TAIL_BYTES;
        if is_cut {
            self.offset = bytes - TAIL_BYTES;
        }
        file.seek(SeekFrom::Start(self.offset))?;
        let (mut reader, mut lines) = (BufReader::new(file), Vec::new());
        loop {
            let mut line = Vec::new();
            let read = reader.by_ref().take(MOST_LINE).read_until(b'\n', &mut line)? as u64;
            // An unfinished last line waits for the next call, unless it is so long that it is taken in parts.
            if line.last() != Some(&b'\n') && read < MOST_LINE {
                break;
            }
            self.offset += read;
            lines.push(line);
        }
        if is_cut && !lines.is_empty() {
            lines.remove(0);
        }
        Ok(lines)
    }
}

fn wants_process(process: &str, arguments: &Logs) -> bool {
    let is_of_role = |role: &String| process.split('-').next() == Some(role.as_str());
    (arguments.role.is_empty() || arguments.role.iter().any(is_of_role))
        && (arguments.worker.is_empty() || arguments.worker.iter().any(|worker| worker == process))
}

fn wants_line(line: &str, arguments: &Logs) -> bool {
    let of_trace = |trace: &String| {
        // The id stands in both log formats.
        let trace = trace.trim_start_matches("trace_id=");
        line.contains(&format!("trace_id={trace}")) || line.contains(&format!("\"trace_id\":\"{trace}"))
    };
    arguments.trace.as_ref().is_none_or(of_trace) && arguments.text.as_ref().is_none_or(|text| line.contains(text))
}

/// Finds the time at the beginning of a line, or in its JSON object.
fn time_of(line: &str) -> Option<&str> {
    let start = line.strip_prefix("{\"timestamp\":\"").unwrap_or(line);
    let time = start.split([' ', '"']).next()?;
    let is_time = time.len() >= 20 && time.ends_with('Z') && time.as_bytes().get(10) == Some(&b'T');
    is_time.then_some(time)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        logs: Logs,
    }

    fn read(files: &mut Files, folder: &Path, options: &str) -> Vec<(String, String)> {
        let words = ["logs"].into_iter().chain(options.split_whitespace());
        let mut lines = files.read(folder, &Command::parse_from(words).logs).expect("read");
        lines.sort_by(|a, b| a.time.cmp(&b.time));
        lines.into_iter().map(|line| (line.process, line.text)).collect()
    }

    fn append(folder: &Path, name: &str, text: &str) {
        let file = File::options().create(true).append(true).open(folder.join(name));
        file.expect("opened").write_all(text.as_bytes()).expect("written");
    }

    #[test]
    fn lines_of_all_processes_are_in_the_order_of_their_time() {
        let folder = tempfile::tempdir().expect("a folder");
        let folder = folder.path();
        append(
            folder,
            "coordinator.log",
            "2026-01-01T00:00:01.0Z  INFO one trace_id=2ab3\n2026-01-01T00:00:04.0Z  INFO four\n",
        );
        append(
            folder,
            "rollout-0.log",
            "2026-01-01T00:00:02.0Z  WARN two trace_id=2ab3\nat a line without time\n2026-01-",
        );
        append(folder, "learner-1.log", "{\"timestamp\":\"2026-01-01T00:00:03.0Z\",\"trace_id\":\"2ab3\"}\n");
        append(folder, "notes.txt", "no log\n");
        let names = |options: &str| -> Vec<String> {
            read(&mut Files::default(), folder, options).into_iter().map(|(process, _)| process).collect()
        };
        assert_eq!(names(""), ["coordinator", "rollout-0", "rollout-0", "learner-1", "coordinator"]);
        assert_eq!(names("--role learner --role rollout"), ["rollout-0", "rollout-0", "learner-1"]);
        assert_eq!(names("--worker learner-1"), ["learner-1"]);
        assert_eq!(names("--trace 2ab"), ["coordinator", "rollout-0", "learner-1"]);
        assert_eq!(names("--text WARN"), ["rollout-0"]);
    }

    #[test]
    fn what_is_added_is_read_once_and_a_file_that_begins_anew_from_its_beginning() {
        let folder = tempfile::tempdir().expect("a folder");
        let (folder, mut files) = (folder.path(), Files::default());
        append(folder, "w.log", "one\ntw");
        let texts =
            |files: &mut Files| -> Vec<String> { read(files, folder, "").into_iter().map(|(_, text)| text).collect() };
        assert_eq!(texts(&mut files), ["one"]);
        append(folder, "w.log", "o\nthree\n");
        assert_eq!(texts(&mut files), ["two", "three"]);
        assert!(texts(&mut files).is_empty());
        fs::write(folder.join("w.log"), "anew\n").expect("written");
        assert_eq!(texts(&mut files), ["anew"]);
        append(folder, "w.log", &("x".repeat(MOST_LINE as usize + 5) + "\nend\n"));
        assert_eq!(texts(&mut files).iter().map(String::len).collect::<Vec<_>>(), [MOST_LINE as usize, 5, 3]);
    }
}
