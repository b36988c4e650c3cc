use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::atomic::sync_folder;

/// Bytes that the search from the end reads first; doubled while a line is longer.
const BLOCK: u64 = 4096;

/// A JSON Lines file in which every line has a `step`, in ascending order.
///
/// Because of the order, all lines after a step begin at one offset, so the file is truncated instead of rewritten.
#[derive(Debug)]
pub(crate) struct Lines {
    path: PathBuf,
    /// `None` before the first line: a run without evaluations has no file for them.
    file: Option<File>,
    /// Bytes of complete lines.
    bytes: u64,
    last: Option<u64>,
}

impl Lines {
    /// Opens the file if it exists, and truncates a line that a crash has torn.
    pub(crate) fn open(path: PathBuf) -> io::Result<Self> {
        let mut lines = Self { path, file: None, bytes: 0, last: None };
        match File::options().read(true).append(true).open(&lines.path) {
            Ok(file) => {
                lines.bytes = file.metadata()?.len();
                lines.file = Some(file);
                lines.truncate(Some(u64::MAX))?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        Ok(lines)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Step of the last line; `None` if there is no line.
    pub(crate) fn last_step(&self) -> Option<u64> {
        self.last
    }

    /// Appends a line; [`Self::sync`] makes it durable. A line that does not fit on the disk leaves no partial line.
    pub(crate) fn append(&mut self, step: u64, line: &[u8]) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            none => {
                let file = File::options().create(true).read(true).append(true).open(&self.path)?;
                // The file name has to be durable before anything relies on the content.
                self.path.parent().map_or(Ok(()), sync_folder)?;
                none.insert(file)
            }
        };
        if let Err(error) = file.write_all(line) {
            file.set_len(self.bytes)?;
            return Err(error);
        }
        self.bytes += line.len() as u64;
        self.last = Some(step);
        Ok(())
    }

    /// Makes all lines durable.
    pub(crate) fn sync(&self) -> io::Result<()> {
        self.file.as_ref().map_or(Ok(()), File::sync_data)
    }

    /// Durably removes the lines of later steps, because a repeated step must not appear
    /// twice. `None` removes all lines.
    pub(crate) fn truncate(&mut self, last_step: Option<u64>) -> io::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let (mut end, mut last) = (self.bytes, None);
        match last_step {
            None => end = 0,
            Some(last_step) => {
                while let Some((start, line)) = line_before(file, end)? {
                    last = step_of(&line).filter(|step| *step <= last_step);
                    if last.is_some() {
                        break;
                    }
                    end = start;
                }
            }
        }
        if end != self.bytes {
            file.set_len(end)?;
            file.sync_all()?;
        }
        (self.bytes, self.last) = (end, last);
        Ok(())
    }

    /// A number from each line that has it and belongs to the unnamed set, with the line's step. Reads the whole file.
    pub(crate) fn numbers(&self, name: &str) -> io::Result<Vec<(u64, f64)>> {
        let file = match fs::File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut numbers = Vec::new();
        for line in BufReader::new(file).lines() {
            let value = serde_json::from_str::<Value>(&line?).unwrap_or_default();
            if value.get("set").is_some() {
                continue;
            }
            let step = value.get("step").and_then(Value::as_u64);
            numbers.extend(step.zip(value.get(name).and_then(Value::as_f64)));
        }
        Ok(numbers)
    }
}

#[derive(Deserialize)]
struct Step {
    step: u64,
}

/// The step of a line; `None` if the line is torn or malformed.
fn step_of(line: &[u8]) -> Option<u64> {
    serde_json::from_slice(line.strip_suffix(b"\n")?).ok().map(|Step { step }| step)
}

/// The line that ends at `end`, and its offset; the last line may lack its newline.
fn line_before(file: &File, end: u64) -> io::Result<Option<(u64, Vec<u8>)>> {
    // The byte before `end` is the line's own newline.
    let Some(inner) = end.checked_sub(1) else { return Ok(None) };
    let mut block = BLOCK;
    loop {
        let from = end.saturating_sub(block);
        let mut bytes = vec![0; usize::try_from(end - from).unwrap_or(usize::MAX)];
        file.read_exact_at(&mut bytes, from)?;
        let searched = usize::try_from(inner - from).unwrap_or(usize::MAX);
        match bytes[..searched].iter().rposition(|byte| *byte == b'\n') {
            Some(newline) => return Ok(Some((from + newline as u64 + 1, bytes.split_off(newline + 1)))),
            None if from == 0 => return Ok(Some((0, bytes))),
            None => block *= 2,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::test_runner::{Config, RngSeed};
    use serde_json::json;

    use super::*;

    fn line(step: u64, padding: usize) -> Vec<u8> {
        format!("{}\n", json!({"step": step, "x": 0.5, "padding": "p".repeat(padding)})).into_bytes()
    }

    fn written(path: &Path) -> Vec<u8> {
        fs::read(path).unwrap_or_default()
    }

    #[test]
    fn later_steps_and_torn_lines_are_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut lines = Lines::open(path.clone()).unwrap();
        lines.truncate(Some(3)).unwrap();
        assert!(!path.exists(), "a file of no lines is none");
        for step in 1..=4 {
            lines.append(step, &line(step, 0)).unwrap();
        }
        fs::write(&path, [written(&path), b"{\"step\": 5, \"x".to_vec()].concat()).unwrap();
        let mut lines = Lines::open(path.clone()).unwrap();
        assert_eq!(lines.last_step(), Some(4));
        assert_eq!(lines.numbers("x").unwrap(), [1, 2, 3, 4].map(|step| (step, 0.5)));
        assert_eq!(lines.numbers("y").unwrap(), []);
        lines.truncate(Some(2)).unwrap();
        assert_eq!(written(&path), [line(1, 0), line(2, 0)].concat());
        lines.truncate(None).unwrap();
        assert_eq!((written(&path).len(), lines.last_step()), (0, None));
        lines.append(1, &line(1, 0)).unwrap();
        assert_eq!(written(&path), line(1, 0), "what is appended after a cut begins where it was cut");
    }

    #[test]
    fn blocks_that_a_power_failure_left_empty_are_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        fs::write(&path, [line(1, 0), vec![0; 10_000], b"\n".to_vec()].concat()).unwrap();
        assert_eq!(Lines::open(path.clone()).unwrap().last_step(), Some(1));
        assert_eq!(written(&path), line(1, 0));
    }

    proptest! {
        #![proptest_config(Config { cases: 200, rng_seed: RngSeed::Fixed(1), ..Config::default() })]

        /// Truncating from the end keeps what a reader of the whole file would keep, for lines of any length and a torn
        /// write at any place. The same holds for opening the file again.
        #[test]
        fn a_cut_keeps_the_steps_up_to_it(
            steps in prop::collection::btree_map(0u64..60, 0usize..9000, 0..20),
            torn in prop::option::of((0usize..9000, 0usize..9100)),
            cuts in prop::collection::vec(prop::option::of(0u64..60), 1..4),
        ) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("lines.jsonl");
            let mut kept: Vec<(u64, Vec<u8>)> = steps.iter().map(|(step, size)| (*step, line(*step, *size))).collect();
            let mut content = kept.iter().flat_map(|(_, line)| line.clone()).collect::<Vec<u8>>();
            if let Some((size, length)) = torn {
                let whole = line(99, size);
                content.extend(&whole[..length.min(whole.len() - 1)]);
            }
            fs::write(&path, content).unwrap();
            let mut lines = Lines::open(path.clone()).unwrap();
            for cut in cuts {
                prop_assert_eq!(lines.last_step(), kept.last().map(|(step, _)| *step));
                lines.truncate(cut).unwrap();
                kept.retain(|(step, _)| cut.is_some_and(|cut| *step <= cut));
                let expected = kept.iter().flat_map(|(_, line)| line.clone()).collect::<Vec<u8>>();
                prop_assert_eq!(&written(&path), &expected);
                let again = Lines::open(path.clone()).unwrap();
                prop_assert_eq!((again.last_step(), again.bytes), (lines.last_step(), lines.bytes));
            }
        }
    }
}
