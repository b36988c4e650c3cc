use std::ops::Range;

use toml::de::{DeTable, DeValue};

/// Finds the line of a value by its dotted path.
pub(crate) struct Lines<'a> {
    text: &'a str,
    table: &'a DeTable<'a>,
}

impl<'a> Lines<'a> {
    pub(crate) fn new(text: &'a str, table: &'a DeTable<'a>) -> Self {
        Self { text, table }
    }

    /// Line of the key at `path`, or of the closest table above it that the text has.
    pub(crate) fn of(&self, path: &str) -> Option<usize> {
        let mut table = self.table;
        let mut found = None;
        for segment in path.split('.') {
            let (name, index) = split_index(segment);
            let Some((key, value)) = table.iter().find(|(key, _)| key.get_ref().as_ref() == name) else { break };
            found = Some(key.span());
            let value = match (value.get_ref(), index) {
                (DeValue::Array(items), Some(index)) => {
                    let Some(item) = items.get(index) else { break };
                    found = Some(item.span());
                    item.get_ref()
                }
                (value, _) => value,
            };
            let DeValue::Table(inner) = value else { break };
            table = inner;
        }
        found.map(|span| line_of(self.text, &span))
    }
}

/// Line (from 1) that `span` starts in.
pub(crate) fn line_of(text: &str, span: &Range<usize>) -> usize {
    let before = text.as_bytes().iter().take(span.start);
    1 + before.filter(|byte| **byte == b'\n').count()
}

/// Splits `stop[2]` into its name and index.
fn split_index(segment: &str) -> (&str, Option<usize>) {
    let Some((name, rest)) = segment.split_once('[') else { return (segment, None) };
    (name, rest.trim_end_matches(']').parse().ok())
}
