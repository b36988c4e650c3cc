//! Sanitizes foreign text before it reaches a terminal, or a log that people read.
//!
//! Names, activities, errors and model outputs contain whatever their author wants: control sequences can move the
//! cursor, rename the window or type for the reader, a line break forges a line, and direction marks show a name
//! backwards. All of these are shown as escapes. This module alone decides which characters those are.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, Write};

use tracing_subscriber::fmt::MakeWriter;

/// Escapes foreign text, so that it stays on one line and has no effect on a terminal.
#[must_use]
pub fn harmless(text: &str) -> Cow<'_, str> {
    escaped(text, is_harmful)
}

/// The same for our own text of several lines, which keeps its line breaks and tabs. Foreign parts must be passed
/// through [`harmless`] when they are inserted, or they could forge a line of ours.
#[must_use]
pub fn harmless_lines(text: &str) -> Cow<'_, str> {
    escaped(text, |c| is_harmful(c) && !matches!(c, '\n' | '\t'))
}

/// The same for JSON, whose value does not change: such characters occur only in strings, where escapes are equivalent.
#[must_use]
pub fn harmless_json(json: &str) -> Cow<'_, str> {
    let is_harmful = |c: char| is_harmful(c) && c != '\n';
    if !json.chars().any(is_harmful) {
        return Cow::Borrowed(json);
    }
    let mut harmless = String::with_capacity(json.len() + 16);
    for c in json.chars() {
        match is_harmful(c) {
            true => {
                let mut units = [0; 2];
                c.encode_utf16(&mut units)
                    .iter()
                    .for_each(|unit| write!(harmless, "\\u{unit:04x}").expect("a string takes any text"));
            }
            false => harmless.push(c),
        }
    }
    Cow::Owned(harmless)
}

/// Control characters of both sets, line separators, direction marks, and invisible characters.
fn is_harmful(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
            | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

fn escaped(text: &str, is_harmful: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.chars().any(&is_harmful) {
        return Cow::Borrowed(text);
    }
    let mut harmless = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match is_harmful(c) {
            true => write!(harmless, "{}", c.escape_default()).expect("a string takes any text"),
            false => harmless.push(c),
        }
    }
    Cow::Owned(harmless)
}

/// Log writer that sanitizes events, so that each is one line whatever it contains.
#[derive(Clone, Debug)]
pub struct HarmlessLines<M>(
    /// The writer that receives the lines.
    pub M,
);

impl<'a, M: MakeWriter<'a>> MakeWriter<'a> for HarmlessLines<M> {
    type Writer = HarmlessLine<M::Writer>;

    fn make_writer(&'a self) -> Self::Writer {
        HarmlessLine(self.0.make_writer())
    }

    fn make_writer_for(&'a self, metadata: &tracing::Metadata<'_>) -> Self::Writer {
        HarmlessLine(self.0.make_writer_for(metadata))
    }
}

/// The writer of a single event.
#[derive(Debug)]
pub struct HarmlessLine<W>(W);

impl<W: Write> Write for HarmlessLine<W> {
    /// Writes one event as a whole; the subscriber passes each in one call.
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(event);
        match text.strip_suffix('\n') {
            Some(line) => self.0.write_all(format!("{}\n", harmless(line)).as_bytes())?,
            None => self.0.write_all(harmless(&text).as_bytes())?,
        }
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex, PoisonError};

    use super::*;

    /// Sequences that terminals interpret, and other hostile names.
    const HOSTILE: [&str; 12] = [
        "\u{1b}[2J\u{1b}[31mred",
        "\u{1b}]0;title\u{7}",
        "\u{1b}]52;c;cm0gLXJmIH4=\u{7}",
        "\u{9b}31m",
        "\u{90}payload\u{9c}",
        "over\rwritten",
        "back\u{8}\u{8}\u{8}\u{8}",
        "two\nlines",
        "two\u{85}lines\u{2028}and\u{2029}more",
        "\u{202e}gnp.exe",
        "\u{2066}hidden\u{2069}\u{200b}",
        "nul\0del\u{7f}",
    ];

    #[test]
    fn nothing_is_left_that_a_terminal_acts_on() {
        for text in HOSTILE {
            let shown = harmless(text);
            assert!(!shown.chars().any(is_harmful), "{shown:?}");
            assert!(shown.contains('\\'), "what was there is still told: {shown}");
        }
        assert_eq!(harmless("\u{1b}[31m\n"), "\\u{1b}[31m\\n");
        assert_eq!(harmless_lines("one\n\ttwo \u{1b}[1m"), "one\n\ttwo \\u{1b}[1m");
        for plain in ["rollout-0", "37 + 58 = 95", "naïve Größe 数学 🙂", "", "a\\b \"c\""] {
            assert!(matches!(harmless(plain), Cow::Borrowed(same) if same == plain), "{plain}");
        }
    }

    #[test]
    fn json_says_the_same() {
        for text in HOSTILE.into_iter().chain(["\u{e0041}"]) {
            let json = serde_json::to_string_pretty(&[text]).expect("a text");
            let shown = harmless_json(&json);
            assert!(!shown.chars().any(|c| is_harmful(c) && c != '\n'), "{shown:?}");
            assert_eq!(serde_json::from_str::<[String; 1]>(&shown).expect("JSON"), [text]);
        }
    }

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn an_event_of_the_log_is_one_line() {
        let kept = Kept::default();
        let writer = kept.clone();
        let log =
            tracing_subscriber::fmt().with_ansi(false).with_writer(HarmlessLines(move || writer.clone())).finish();
        tracing::subscriber::with_default(log, || {
            for text in HOSTILE {
                tracing::error!(name = text, other = ?text, "worker {text} is gone");
            }
        });
        let text = String::from_utf8(kept.0.lock().unwrap_or_else(PoisonError::into_inner).clone()).expect("UTF-8");
        assert_eq!(text.lines().count(), HOSTILE.len(), "{text}");
        assert!(!text.chars().any(|c| is_harmful(c) && c != '\n'), "{text:?}");
    }
}
