use std::fmt;

use pacs_runtime::Exit;

/// How a command failed: what the user reads and what the shell sees.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) exit: Exit,
    error: anyhow::Error,
    hint: Option<String>,
}

impl Failure {
    /// An error that ends the process in this way.
    pub(crate) fn with_exit(exit: Exit, error: impl Into<anyhow::Error>) -> Self {
        Self { exit, error: error.into(), hint: None }
    }

    /// Something that the command line, the job spec or the files it names got wrong.
    pub(crate) fn config(error: impl Into<anyhow::Error>) -> Self {
        Self::with_exit(Exit::Config, error)
    }

    /// Something that may go better the next time.
    pub(crate) fn again(error: impl Into<anyhow::Error>) -> Self {
        Self::with_exit(Exit::Again, error)
    }

    /// Something that should not have happened.
    pub(crate) fn bug(error: impl Into<anyhow::Error>) -> Self {
        Self::with_exit(Exit::Bug, error)
    }

    /// Puts in front what failed, as a fragment behind "failed to".
    pub(crate) fn doing(mut self, what: impl fmt::Display + Send + Sync + 'static) -> Self {
        self.error = self.error.context(what);
        self
    }

    /// Adds what to do about it.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: failed to {}", pacs_runtime::chain(self.error.as_ref()))?;
        if let Some(hint) = &self.hint {
            write!(f, "\nhint: {hint}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[test]
    fn failures_read_as_a_chain_with_a_hint() {
        let failure = Failure::config(anyhow!("no such file")).doing("read model `m`").hint("give --model DIR");
        assert_eq!(failure.to_string(), "error: failed to read model `m`: no such file\nhint: give --model DIR");
        assert_eq!(failure.exit.code(), 78);
    }
}
