use std::fmt;
use std::path::{Path, PathBuf};

/// Everything that is wrong with one job spec.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecErrors {
    /// Where the text came from.
    pub origin: PathBuf,
    /// The problems, by line; those without a line last.
    pub problems: Vec<Problem>,
}

/// One thing that is wrong with a job spec.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Dotted path of the value; empty when the text as a whole cannot be read.
    pub path: String,
    /// The value as the spec has it; absent when that is missing or beside the point.
    pub value: Option<String>,
    /// What is wrong with it and what would be right.
    pub message: String,
    /// Line of the text, from 1.
    pub line: Option<usize>,
}

impl Problem {
    pub(crate) fn new(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self { path: path.into(), value: None, message: message.into(), line: None }
    }

    pub(crate) fn with_value(mut self, value: impl fmt::Display) -> Self {
        self.value = Some(value.to_string());
        self
    }
}

impl SpecErrors {
    pub(crate) fn new(origin: &Path, mut problems: Vec<Problem>) -> Self {
        problems.sort_by_key(|problem| problem.line.unwrap_or(usize::MAX));
        Self { origin: origin.to_owned(), problems }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(line) = self.line {
            write!(f, "line {line}: ")?;
        }
        if !self.path.is_empty() {
            f.write_str(&self.path)?;
            if let Some(value) = &self.value {
                write!(f, " = {value}")?;
            }
            f.write_str(": ")?;
        }
        f.write_str(&self.message)
    }
}

impl fmt::Display for SpecErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.problems.len();
        let noun = if count == 1 { "problem" } else { "problems" };
        write!(f, "{count} {noun} in job spec `{}`", self.origin.display())?;
        for problem in &self.problems {
            write!(f, "\n  {problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for SpecErrors {}
