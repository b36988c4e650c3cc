use std::io::BufRead;
use std::path::Path;

use pacs_text::Message;
use serde_json::{Map, Value};

use crate::source::jsonl::{lines_of, plain_object};
use crate::source::text;
use crate::{DataError, Prompt, Prompter};

/// A prompt of a JSONL file.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptRow {
    /// Line of the file, from 1.
    pub line: usize,
    /// The row's own `id`, whatever it is.
    pub id: Option<Value>,
    /// The prompt as it is given to the engine.
    pub prompt: Prompt,
}

/// Reads rows `{"prompt": "…"}` (taken as it is), `{"messages": [{"role": "…", "content": "…"}]}` (written with the chat
/// template) or `{"question": "…"}` (as the rows of a job's data: suffix, system message, chat template). Other fields are
/// passed over, but for an `id`. Errors name `path`.
///
/// # Errors
/// When a line is no such row, or its prompt cannot be made or is empty.
pub fn read_prompts(reader: &mut dyn BufRead, path: &Path, prompter: &Prompter) -> Result<Vec<PromptRow>, DataError> {
    let mut rows = Vec::new();
    let mut reader = text::unpacked(Box::new(reader), path)?;
    lines_of(&mut reader, path, &mut |number, line| {
        let prompt = plain_object(line).and_then(|row| {
            let prompt = prompt(&row, prompter)?;
            Ok(PromptRow { line: number, id: row.get("id").cloned(), prompt })
        });
        rows.push(prompt.map_err(|message| DataError::Row { path: path.to_owned(), row: number, message })?);
        Ok(true)
    })?;
    Ok(rows)
}

fn prompt(row: &Map<String, Value>, prompter: &Prompter) -> Result<Prompt, String> {
    let kinds: Vec<&str> =
        ["prompt", "messages", "question"].into_iter().filter(|field| row.contains_key(*field)).collect();
    let text = |field: &str| row[field].as_str().ok_or_else(|| format!("field `{field}` is no text"));
    let prompt = match kinds[..] {
        ["prompt"] => prompter.plain(text("prompt")?),
        ["question"] => prompter.question(text("question")?),
        ["messages"] => prompter.messages(&messages(&row["messages"])?),
        [] => return Err("expected a field `prompt`, `messages` or `question`".to_owned()),
        _ => return Err(format!("has fields `{}`; expected one of them", kinds.join("` and `"))),
    };
    let prompt = prompt.map_err(|error| error.to_string())?;
    if prompt.tokens.is_empty() {
        return Err("the prompt has no tokens".to_owned());
    }
    Ok(prompt)
}

fn messages(value: &Value) -> Result<Vec<Message>, String> {
    let turns = value.as_array().filter(|turns| !turns.is_empty());
    let turns = turns.ok_or("field `messages` is not a list of messages, or is empty")?;
    let message = |(place, turn): (usize, &Value)| {
        let text = |field: &str| {
            let text = turn.get(field).and_then(Value::as_str);
            text.map(str::to_owned).ok_or_else(|| format!("message {} has no text `{field}`", place + 1))
        };
        Ok(Message { role: text("role")?, content: text("content")? })
    };
    turns.iter().enumerate().map(message).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn prompter() -> Prompter {
        let model = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/qwen3");
        Prompter::read(&model, Some("Be brief.".into()), " Think.".into()).expect("a golden model")
    }

    fn read(text: &str) -> Result<Vec<PromptRow>, String> {
        read_prompts(&mut text.as_bytes(), Path::new("in.jsonl"), &prompter()).map_err(|error| error.to_string())
    }

    #[test]
    fn three_kinds_of_rows_are_prompts() {
        let rows = read(
            "{\"prompt\": \"1 + 1 =\", \"id\": 7}\n\n{\"question\": \"What?\", \"answer\": 3}\n{\"messages\": [{\"role\": \
             \"system\", \"content\": \"Be brief.\"}, {\"role\": \"user\", \"content\": \"What? Think.\"}]}",
        )
        .expect("well-formed");
        assert_eq!((rows[0].prompt.text.as_str(), rows[0].id.clone()), ("1 + 1 =", Some(7.into())));
        assert_eq!(rows.iter().map(|row| row.line).collect::<Vec<_>>(), [1, 3, 4]);
        assert_eq!(rows[1].prompt, rows[2].prompt, "a question is a conversation with suffix and system message");
        assert!(rows[1].prompt.text.contains("What? Think.") && rows[1].prompt.tokens.len() > 3);
    }

    #[test]
    fn wrong_rows_are_named_by_line() {
        for (row, problem) in [
            ("{\"text\": \"a\"}", "expected a field `prompt`, `messages` or `question`"),
            ("{\"prompt\": \"a\", \"question\": \"b\"}", "has fields `prompt` and `question`; expected one of them"),
            ("{\"prompt\": 3}", "field `prompt` is no text"),
            ("{\"prompt\": \"\"}", "the prompt has no tokens"),
            ("{\"messages\": []}", "field `messages` is not a list of messages, or is empty"),
            ("{\"messages\": [{\"role\": \"user\"}]}", "message 1 has no text `content`"),
            ("[1]", "not a JSON object"),
        ] {
            let problem_found = read(&format!("{{\"prompt\": \"a\"}}\n{row}")).expect_err(row);
            assert!(problem_found.starts_with("read data file `in.jsonl`:2: "), "{problem_found}");
            assert!(problem_found.contains(problem), "{problem_found}");
        }
    }
}
