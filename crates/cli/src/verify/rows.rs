use std::fs::File;
use std::io::{BufRead, BufReader, Read, stdin};
use std::path::Path;

use anyhow::anyhow;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::failure::Failure;

/// Limit of a row, in bytes.
const MOST_BYTES: u64 = 64 << 20;

/// One row to grade.
#[derive(Debug, PartialEq)]
pub(super) struct Row {
    pub(super) id: RowId,
    pub(super) question: String,
    pub(super) gold: String,
    pub(super) pred: String,
}

/// Id of a row, kept as written, so that an integer of twenty digits is not rounded.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct RowId(Box<RawValue>);

impl PartialEq for RowId {
    fn eq(&self, other: &Self) -> bool {
        self.0.get() == other.0.get()
    }
}

impl RowId {
    fn line(number: u64) -> Self {
        Self(RawValue::from_string(number.to_string()).expect("a number is JSON"))
    }
}

/// The row as it is parsed. Unknown keys are ignored, because files carry columns for other uses.
#[derive(Deserialize)]
struct Written {
    id: Option<RowId>,
    #[serde(default)]
    question: String,
    gold: Box<RawValue>,
    pred: String,
}

/// Reads rows, from standard input for `-`, and passes each to `give` until that returns false. An error of the input is passed as
/// the last item.
pub(super) fn read(input: &Path, give: impl FnMut(Result<Row, Failure>) -> bool) {
    if input == Path::new("-") {
        return read_lines(stdin().lock(), "standard input", give);
    }
    let name = format!("`{}`", input.display());
    let mut give = give;
    match File::open(input) {
        Ok(file) => read_lines(BufReader::new(file), &name, give),
        Err(error) => {
            give(Err(Failure::config(error).doing(format!("read {name}"))));
        }
    }
}

fn read_lines(mut input: impl BufRead, name: &str, mut give: impl FnMut(Result<Row, Failure>) -> bool) {
    let mut line = Vec::new();
    // Skip a byte order mark, which is not part of the first row.
    const MARK: &[u8] = b"\xef\xbb\xbf";
    for number in 1u64.. {
        line.clear();
        let bytes = match input.by_ref().take(MOST_BYTES).read_until(b'\n', &mut line) {
            Ok(0) => return,
            Ok(bytes) => bytes as u64,
            Err(error) => {
                give(Err(Failure::again(error).doing(format!("read {name}, line {number}"))));
                return;
            }
        };
        let text = if number == 1 { line.strip_prefix(MARK).unwrap_or(&line) } else { &line };
        let text = text.trim_ascii();
        if text.is_empty() {
            continue;
        }
        let too_long = bytes == MOST_BYTES && !line.ends_with(b"\n");
        let row = if too_long { Err(format!("it has more than {MOST_BYTES} bytes")) } else { parse(text, number) };
        let row = row.map_err(|problem| Failure::config(anyhow!(problem)).doing(format!("read {name}, line {number}")));
        let is_last = row.is_err();
        if !give(row) || is_last {
            return;
        }
    }
}

fn parse(line: &[u8], number: u64) -> Result<Row, String> {
    let Written { id, question, gold, pred } = serde_json::from_slice(line).map_err(|error| {
        let text = error.to_string();
        // Cut off the parser's position: it counts within this line, not within the file.
        let what = text.split(" at line ").next().unwrap_or(&text);
        format!("{what} (column {})", error.column())
    })?;
    let gold =
        pacs_data::exact_text(&gold).map_err(|what| format!("field `gold` is {what}, expected a text or a number"))?;
    Ok(Row { id: id.unwrap_or_else(|| RowId::line(number)), question, gold, pred })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(text: &str) -> Vec<Result<Row, String>> {
        let mut rows = Vec::new();
        read_lines(text.as_bytes(), "`x`", |row| {
            rows.push(row.map_err(|failure| failure.to_string()));
            true
        });
        rows
    }

    #[test]
    fn rows_have_ids_and_line_numbers() {
        let text = "{\"id\": \"a\", \"gold\": 5, \"pred\": \"p\", \"more\": 1}\n\n{\"gold\": \"g\", \"pred\": \"\", \
                    \"question\": \"q\"}";
        let id = |text: &str| RowId(RawValue::from_string(text.to_owned()).expect("JSON"));
        let row = |id: RowId, question: &str, gold: &str, pred: &str| {
            Ok(Row { id, question: question.into(), gold: gold.into(), pred: pred.into() })
        };
        assert_eq!(rows(text), [row(id("\"a\""), "", "5", "p"), row(id("3"), "q", "g", "")]);
        // Neither number may pass through a float.
        let text = "{\"id\": 12345678901234567890123, \"gold\": 12345678901234567890124, \"pred\": \"12345678901234567890123\"}";
        let number = "12345678901234567890123";
        assert_eq!(rows(text), [row(id(number), "", "12345678901234567890124", number)]);
    }

    #[test]
    fn the_first_bad_row_is_named_and_the_last() {
        let good = r#"{"gold": "5", "pred": "p"}"#;
        for (bad, expected) in [
            ("{\"gold\": \"5\"}", "missing field `pred` (column 13)"),
            (
                "{\"gold\": [5, 6], \"pred\": \"p\"}",
                "field `gold` is a list of 2 values (one value would be taken), expected a text or a number",
            ),
            ("{\"gold\": ", "EOF while parsing a value (column 8)"),
            ("\u{1}", "expected value (column 1)"),
        ] {
            let rows = rows(&format!("{good}\n{bad}\n{good}"));
            let [Ok(_), Err(problem)] = &rows[..] else { panic!("{rows:?}") };
            assert_eq!(problem, &format!("error: failed to read `x`, line 2: {expected}"));
        }
    }

    #[test]
    fn reading_ends_when_nobody_takes_the_rows() {
        let mut taken = 0;
        read_lines("{\"gold\": 1, \"pred\": \"\"}\n".repeat(10).as_bytes(), "`x`", |_| {
            taken += 1;
            taken < 3
        });
        assert_eq!(taken, 3);
    }
}
