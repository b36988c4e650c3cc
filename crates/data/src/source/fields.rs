//! Which fields of a file hold the question and the reference answer, and what they have to hold.

use pacs_spec::SourceSpec;
use pacs_text::Message;

use super::value::Value;
use super::{Asked, Record};

/// Where the question is looked for, in this order, while `question_field` is what it is by default.
const QUESTIONS: [&str; 7] = ["question", "problem", "prompt", "messages", "query", "instruction", "input"];
/// Likewise for the reference answer. A worked solution comes after the fields that hold an answer alone.
const ANSWERS: [&str; 9] = [
    "answer",
    "final_answer",
    "expected_answer",
    "ground_truth",
    "reward_model.ground_truth",
    "reference_answer",
    "target",
    "solution",
    "response",
];

/// The fields that are read of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fields {
    pub(crate) question: String,
    pub(crate) answer: String,
    /// Field that names the verifier of a row, where the source has one.
    pub(crate) verifier: Option<String>,
}

impl Fields {
    /// Chooses the fields by which paths are `there`; `names` are all fields, for the message.
    pub(crate) fn choose(
        source: &SourceSpec,
        there: impl Fn(&str) -> bool,
        names: impl Fn() -> Vec<String>,
    ) -> Result<Self, String> {
        let default = SourceSpec::default();
        let choose = |field: &String, default: &String, candidates: &[&str]| {
            let (chosen, what) = match field == default {
                true => (candidates.iter().copied().find(|path| there(path)), candidates.join("`, `")),
                false => (there(field).then_some(field.as_str()), field.clone()),
            };
            chosen.map(str::to_owned).ok_or_else(|| no_field(&what, &names()))
        };
        let question = choose(&source.question_field, &default.question_field, &QUESTIONS)?;
        let answer = choose(&source.answer_field, &default.answer_field, &ANSWERS)?;
        Ok(Self { question, answer, verifier: source.verifier_field.clone() })
    }

    /// What was chosen, where that is not what the spec says.
    pub(crate) fn chosen(&self, source: &SourceSpec) -> Option<String> {
        let is_said = self.question == source.question_field && self.answer == source.answer_field;
        (!is_said).then(|| format!("questions from `{}`, answers from `{}`", self.question, self.answer))
    }

    /// Makes a record of a row, whose values `value` knows by path.
    pub(crate) fn record(
        &self,
        value: impl Fn(&str) -> Result<Option<Value>, String>,
        names: impl Fn() -> Vec<String>,
        place: String,
    ) -> Result<Record, String> {
        let at = |field: &String| value(field)?.ok_or_else(|| no_field(field, &names()));
        let question = at(&self.question)?;
        let answer = at(&self.answer)?;
        let is_wrong =
            |field: &str, what: String, wanted: &str| format!("field `{field}` is {what}, expected {wanted}");
        let asked = match question {
            Value::List(turns) if turns.iter().any(|turn| matches!(turn, Value::Fields(_))) => {
                let messages = messages(turns).map_err(|problem| format!("field `{}`: {problem}", self.question))?;
                Asked::Conversation(messages)
            }
            number @ Value::Number(_) => {
                return Err(is_wrong(&self.question, number.what(), "a text or a list of messages"));
            }
            other => {
                let text = other.into_text();
                Asked::Question(text.map_err(|what| is_wrong(&self.question, what, "a text or a list of messages"))?)
            }
        };
        let answer = match answer.is_cases() {
            true => Ok(answer.into_json()),
            false => answer.into_text(),
        };
        let answer = answer.map_err(|what| is_wrong(&self.answer, what, "a text or a number"))?;
        let answer = after_solution(&answer).map_or(answer.clone(), str::to_owned);
        for (field, text) in [(&self.question, asked.question()), (&self.answer, answer.as_str())] {
            if text.trim().is_empty() {
                return Err(format!("field `{field}` is empty"));
            }
        }
        let verifier = match &self.verifier {
            Some(field) => match value(field)? {
                None | Some(Value::Null) => None,
                Some(name) => Some(name.into_text().map_err(|what| is_wrong(field, what, "the name of a verifier"))?),
            },
            None => None,
        };
        Ok(Record { asked, answer, response: None, verifier, place })
    }
}

/// What the last line of a worked solution gives after `####`, as in GSM8K. It is the reference answer, for all verifiers.
fn after_solution(text: &str) -> Option<&str> {
    let last = text.trim_end().rsplit('\n').next()?;
    let answer = last.trim_start().strip_prefix("####")?.trim();
    (!answer.is_empty() && !answer.starts_with('#')).then_some(answer)
}

/// The message for a field that is not there.
fn no_field(wanted: &str, present: &[String]) -> String {
    let present: Vec<String> = present.iter().map(|name| format!("`{name}`")).collect();
    let present = if present.is_empty() { "none".to_owned() } else { present.join(", ") };
    let one_of = if wanted.contains('`') { "none of the fields" } else { "no field" };
    format!("there is {one_of} `{wanted}` (fields: {present}); `question_field` and `answer_field` choose the fields")
}

/// A conversation up to its question: the last message is the user's, those before it may be of the system and examples.
fn messages(turns: Vec<Value>) -> Result<Vec<Message>, String> {
    let mut messages = Vec::with_capacity(turns.len());
    for (place, turn) in turns.into_iter().enumerate() {
        let text = |field: &str| {
            let value = turn.at(field).cloned().unwrap_or(Value::Null);
            let text = if field == "content" { content(value) } else { value.into_text() };
            text.map_err(|what| format!("`{field}` of message {} is {what}, expected a text", place + 1))
        };
        messages.push(Message { role: text("role")?, content: text("content")? });
    }
    match messages.last() {
        Some(last) if last.role == "user" => Ok(messages),
        Some(last) => Err(format!(
            "the last message has the role `{}`, expected `user`, whose question is to be answered",
            last.role
        )),
        None => Err("there is no message".to_owned()),
    }
}

/// What a message says: a text, or a list of parts that are texts.
fn content(value: Value) -> Result<String, String> {
    let Value::List(parts) = value else { return value.into_text() };
    let part = |part: Value| match (part.at("type"), part.at("text")) {
        (None, Some(Value::Text(text))) => Ok(text.clone()),
        (Some(Value::Text(kind)), Some(Value::Text(text))) if kind == "text" => Ok(text.clone()),
        (Some(Value::Text(kind)), _) => Err(format!("made of parts, one of the type `{kind}`")),
        _ => part.into_text(),
    };
    parts.into_iter().map(part).collect()
}
