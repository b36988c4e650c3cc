use std::fmt;

use pacs_runtime::Exit;

/// A failed command: the message and hint for the user, and the exit code for the shell.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) exit: Exit,
    error: anyhow::Error,
    hint: Option<String>,
}

impl Failure {
    /// Makes a failure that ends the process with `exit`.
    pub(crate) fn with_exit(exit: Exit, error: impl Into<anyhow::Error>) -> Self {
        Self { exit, error: error.into(), hint: None }
    }

    /// Makes a failure of configuration (exit code 78): the command line, the job spec or a file it names is wrong. If the
    /// machine lacks something for now, such as room on the disk, the failure is a transient one (75).
    pub(crate) fn config(error: impl Into<anyhow::Error>) -> Self {
        let error = error.into();
        Self::with_exit(Exit::of_config(error.as_ref()), error)
    }

    /// Makes a transient failure (exit code 75): the same command may succeed later.
    pub(crate) fn again(error: impl Into<anyhow::Error>) -> Self {
        Self::with_exit(Exit::Again, error)
    }

    /// Makes a failure of the program itself (exit code 70).
    pub(crate) fn bug(error: impl Into<anyhow::Error>) -> Self {
        Self::with_exit(Exit::Bug, error)
    }

    /// Adds what failed as context; `what` completes the phrase "failed to …".
    pub(crate) fn doing(mut self, what: impl fmt::Display + Send + Sync + 'static) -> Self {
        self.error = self.error.context(what);
        self
    }

    /// What failed, without the hint.
    pub(crate) fn reason(&self) -> String {
        pacs_runtime::chain(self.error.as_ref())
    }

    /// Adds a hint at what the user can do.
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

    #[test]
    fn a_full_disk_is_transient() {
        let full = anyhow::Error::from(std::io::Error::from_raw_os_error(28)).context("make certificates");
        assert_eq!(Failure::config(full).exit.code(), 75);
    }
}
