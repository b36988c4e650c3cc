use std::fmt;

/// Longest part of an output or message that is shown, in bytes.
const SHOWN: usize = 160;

/// What became of a program on its cases.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// All cases passed.
    Passed {
        /// How many there are.
        cases: usize,
    },
    /// The program cannot be compiled.
    Compile(String),
    /// A case did not pass.
    Failed {
        /// Number of the first one that did not, from 1.
        case: usize,
        /// Cases that there are.
        cases: usize,
        /// How many passed, where all were run.
        passed: Option<usize>,
        /// Why the first case that failed did not pass.
        why: Why,
    },
}

/// Why a case did not pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    /// Something else came out.
    Wrong {
        expected: String,
        got: String,
    },
    /// It ended by an exception, a signal or an exit code other than 0.
    Runtime(String),
    TimedOut,
    OutOfMemory,
    TooMuchOutput,
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Passed { cases: 1 } => f.write_str("the case passed"),
            Self::Passed { cases } => write!(f, "all {cases} cases passed"),
            Self::Compile(problem) => write!(f, "compile error: {}", shown(problem)),
            Self::Failed { case, cases, passed, why } => {
                write!(f, "{why}, case {case} of {cases}")?;
                if let Some(passed) = passed {
                    write!(f, "; {passed} passed")?;
                }
                match why {
                    Why::Wrong { expected, got } => write!(f, ": expected {}, got {}", shown(expected), shown(got)),
                    Why::Runtime(problem) => write!(f, ": {}", shown(problem)),
                    Why::TimedOut | Why::OutOfMemory | Why::TooMuchOutput => Ok(()),
                }
            }
        }
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Wrong { .. } => "wrong",
            Self::Runtime(_) => "runtime error",
            Self::TimedOut => "timed out",
            Self::OutOfMemory => "out of memory",
            Self::TooMuchOutput => "too much output",
        })
    }
}

/// A text of a program in quotes, without what a terminal would act on, and not more of it than anybody would read.
fn shown(text: &str) -> String {
    let end = text.floor_char_boundary(SHOWN);
    let more = if end < text.len() { "…" } else { "" };
    format!("{:?}{more}", &text[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_told_in_a_line() {
        let failed = |why| End::Failed { case: 2, cases: 5, passed: None, why };
        let wrong = Why::Wrong { expected: "3".into(), got: format!("\u{1b}[31m\n{}", "x".repeat(300)) };
        let text = failed(wrong).to_string();
        assert!(text.starts_with("wrong, case 2 of 5: expected \"3\", got \"\\u{1b}[31m\\nxxx"), "{text}");
        assert!(text.len() < 300 && text.ends_with('…'), "{text}");
        assert_eq!(failed(Why::TimedOut).to_string(), "timed out, case 2 of 5");
        let counted = End::Failed { case: 2, cases: 5, passed: Some(3), why: Why::Runtime("ValueError: x".into()) };
        assert_eq!(counted.to_string(), "runtime error, case 2 of 5; 3 passed: \"ValueError: x\"");
        assert_eq!(End::Passed { cases: 3 }.to_string(), "all 3 cases passed");
    }
}
