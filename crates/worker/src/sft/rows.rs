//! Rows of fine-tuning data: JSON lines of three forms, read as conversations.

use std::io::BufRead;
use std::path::Path;

use anyhow::{Result, bail};
use pacs_data::Demonstration;
use pacs_spec::{JobSpec, SourceSpec};
use pacs_text::Message;
use serde::Deserialize;

/// One line of data; the fields decide its form.
#[derive(Debug, Deserialize)]
struct Row {
    question: Option<String>,
    answer: Option<String>,
    prompt: Option<String>,
    response: Option<String>,
    messages: Option<Vec<RowMessage>>,
}

#[derive(Debug, Deserialize)]
struct RowMessage {
    role: String,
    content: String,
}

/// Reads the conversations of the file at `path`, each with its line number. `suffix` is appended to the question of
/// rows with a question; `system` precedes conversations without a system message.
pub(super) fn read<'a>(
    path: &Path,
    system: Option<&'a str>,
    suffix: &'a str,
) -> Result<impl Iterator<Item = Result<(usize, Vec<Message>)>> + 'a> {
    let lines = pacs_data::open_text(path)?.lines().enumerate();
    Ok(lines.filter_map(move |(number, line)| {
        let number = number + 1;
        let conversation = || -> Result<Option<Vec<Message>>> {
            let line = line?;
            if line.trim().is_empty() {
                return Ok(None);
            }
            conversation(&line, system, suffix).map(Some)
        };
        match conversation() {
            Ok(None) => None,
            Ok(Some(messages)) => Some(Ok((number, messages))),
            Err(error) => Some(Err(error.context(format!("line {number}")))),
        }
    }))
}

/// Returns conversations of a job's problems: the prompt that a rollout worker gets, and a response that
/// the task accepts.
pub(super) fn of_job(spec: &JobSpec, source: &SourceSpec) -> Result<Vec<(usize, Vec<Message>)>> {
    let demonstrations = pacs_data::demonstrations(source, spec.data.system.as_deref(), spec.suffix_of(source))?;
    let conversation = |(number, Demonstration { mut asked, response }): (usize, Demonstration)| {
        asked.push(Message { role: ASSISTANT.to_owned(), content: response });
        (number + 1, asked)
    };
    Ok(demonstrations.into_iter().enumerate().map(conversation).collect())
}

fn conversation(line: &str, system: Option<&str>, suffix: &str) -> Result<Vec<Message>> {
    let row: Row = serde_json::from_str(line)?;
    let asked = |question: String, answer: String| {
        vec![Message::user(question + suffix), Message { role: ASSISTANT.to_owned(), content: answer }]
    };
    let mut messages = match row {
        Row { question: Some(question), answer: Some(answer), prompt: None, response: None, messages: None } => {
            asked(question, answer)
        }
        Row { prompt: Some(prompt), response: Some(response), question: None, answer: None, messages: None } => {
            asked(prompt, response)
        }
        Row { messages: Some(messages), question: None, answer: None, prompt: None, response: None } => {
            messages.into_iter().map(|message| Message { role: message.role, content: message.content }).collect()
        }
        _ => bail!("expected `question` and `answer`, `prompt` and `response`, or `messages`, and no two of these"),
    };
    if !messages.iter().any(|message| message.role == ASSISTANT) {
        bail!("no message has the role `{ASSISTANT}`, so that there is nothing to learn");
    }
    if messages[0].role == ASSISTANT {
        bail!("the first message is the assistant's; nothing comes before it that it could answer");
    }
    if let Some(system) = system.filter(|_| messages[0].role != "system") {
        messages.insert(0, Message::system(system));
    }
    Ok(messages)
}

/// Role whose messages are learnt.
pub(super) const ASSISTANT: &str = "assistant";

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Vec<(String, String)>> {
        let messages = conversation(line, Some("Be brief."), " Think.")?;
        Ok(messages.into_iter().map(|message| (message.role, message.content)).collect())
    }

    fn turns(turns: &[(&str, &str)]) -> Vec<(String, String)> {
        turns.iter().map(|(role, content)| (role.to_string(), content.to_string())).collect()
    }

    #[test]
    fn three_shapes_become_conversations() {
        let asked = turns(&[("system", "Be brief."), ("user", "1+1? Think."), ("assistant", "2")]);
        assert_eq!(parsed(r#"{"question": "1+1?", "answer": "2", "source": "x"}"#).expect("a row"), asked);
        assert_eq!(parsed(r#"{"prompt": "1+1?", "response": "2"}"#).expect("a row"), asked);
        let own = r#"{"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"},
                      {"role": "assistant", "content": "A"}]}"#;
        assert_eq!(parsed(own).expect("a row"), turns(&[("system", "S"), ("user", "U"), ("assistant", "A")]));
    }

    #[test]
    fn other_rows_are_refused_with_what_was_expected() {
        for (line, expected) in [
            (r#"{"question": "1+1?"}"#, "expected `question` and `answer`"),
            (r#"{"question": "1+1?", "answer": "2", "messages": []}"#, "no two of these"),
            (r#"{"messages": [{"role": "user", "content": "U"}]}"#, "nothing to learn"),
            (r#"{"messages": [{"role": "assistant", "content": "U"}]}"#, "the first message"),
            (r#"{"question": 3, "answer": "2"}"#, "invalid type"),
            ("[]", "invalid"),
        ] {
            let error = parsed(line).expect_err(line).to_string();
            assert!(error.contains(expected), "{line}: {error}");
        }
    }
}
