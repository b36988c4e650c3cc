use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::path::PathBuf;

use serde::Serialize;
use serde_json::Value;

use super::write_atomically;

/// A file of JSON lines, each with a `step`.
#[derive(Clone, Debug)]
pub(crate) struct Lines {
    path: PathBuf,
}

impl Lines {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// Appends a line; [`Self::sync`] makes it durable.
    pub(crate) fn append(&self, value: &impl Serialize) -> io::Result<()> {
        let mut line = serde_json::to_vec(value)?;
        line.push(b'\n');
        let mut file = File::options().create(true).append(true).open(&self.path)?;
        file.write_all(&line)
    }

    /// Makes all lines durable.
    pub(crate) fn sync(&self) -> io::Result<()> {
        match File::open(&self.path) {
            Ok(file) => file.sync_data(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Drops the lines of later steps, and what a crash has left half-written. `None` drops all.
    pub(crate) fn truncate(&self, last_step: Option<u64>) -> io::Result<()> {
        self.retain(|step| last_step.is_some_and(|last| step <= last))
    }

    /// Drops the lines of all other steps, and what a crash has left half-written.
    pub(crate) fn retain(&self, is_kept: impl Fn(u64) -> bool) -> io::Result<()> {
        if !self.path.exists() {
            return Ok(());
        }
        let kept: Vec<_> = self.read()?.into_iter().filter(|(step, _)| is_kept(*step)).collect();
        write_atomically(&self.path, |file| {
            kept.iter().try_for_each(|(_, line)| file.write_all(line.as_bytes()).and_then(|()| file.write_all(b"\n")))
        })
    }

    /// The steps of all lines.
    pub(crate) fn steps(&self) -> io::Result<Vec<u64>> {
        Ok(self.read()?.into_iter().map(|(step, _)| step).collect())
    }

    /// A number of every line that has it, with the line's step.
    pub(crate) fn numbers(&self, name: &str) -> io::Result<Vec<(u64, f64)>> {
        let number = |line: &str| serde_json::from_str::<Value>(line).ok().and_then(|value| value.get(name)?.as_f64());
        Ok(self.read()?.into_iter().filter_map(|(step, line)| Some((step, number(&line)?))).collect())
    }

    fn read(&self) -> io::Result<Vec<(u64, String)>> {
        let file = match fs::File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut lines = Vec::new();
        for line in BufReader::new(file).lines() {
            let line = line?;
            let step = serde_json::from_str::<Value>(&line).ok().and_then(|value| value.get("step")?.as_u64());
            lines.extend(step.map(|step| (step, line)));
        }
        Ok(lines)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn later_steps_and_torn_lines_are_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let lines = Lines::new(path.clone());
        lines.truncate(Some(3)).unwrap();
        for step in 1..=4 {
            lines.append(&json!({"step": step, "x": 0.5})).unwrap();
        }
        fs::write(&path, fs::read_to_string(&path).unwrap() + "{\"step\": 5, \"x").unwrap();
        assert_eq!(lines.steps().unwrap(), [1, 2, 3, 4]);
        assert_eq!(lines.numbers("x").unwrap(), [1, 2, 3, 4].map(|step| (step, 0.5)));
        assert_eq!(lines.numbers("y").unwrap(), []);
        lines.truncate(Some(2)).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"step\":1,\"x\":0.5}\n{\"step\":2,\"x\":0.5}\n");
        lines.retain(|step| step == 2).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"step\":2,\"x\":0.5}\n");
        lines.truncate(None).unwrap();
        assert_eq!(lines.steps().unwrap(), [0u64; 0]);
    }
}
