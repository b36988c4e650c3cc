use std::error::Error;

/// Formats an error with its causes, as `what: why: why`.
///
/// Libraries differ in whether an error's text includes that of its cause. A cause is left out if the text before it
/// contains it, so that no message of the operating system appears twice.
#[must_use]
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::fmt;
    use std::io;

    use super::*;

    #[derive(Debug)]
    struct Told(&'static str, io::Error);

    impl fmt::Display for Told {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }
    }

    impl Error for Told {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            Some(&self.1)
        }
    }

    #[test]
    fn a_cause_is_printed_once() {
        let cause = || io::Error::other("no space");
        assert_eq!(chain(&Told("write `x`", cause())), "write `x`: no space");
        assert_eq!(chain(&Told("write `x`: no space", cause())), "write `x`: no space");
        assert_eq!(chain(&cause()), "no space");
    }
}
