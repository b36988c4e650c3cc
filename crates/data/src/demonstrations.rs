use pacs_spec::SourceSpec;
use pacs_text::Message;

use crate::DataError;
use crate::source::rows;

/// What is asked, and what a model that can answer it would respond.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Demonstration {
    /// The messages that a rollout worker is given, with system message and suffix.
    pub asked: Vec<Message>,
    /// A response that the verifier of the task takes for right; the reference answer where that is one.
    pub response: String,
}

/// The problems of a source with responses to learn from, before there is a policy that finds any.
///
/// Of a file these are its reference answers, which are responses only where the verifier reads them as such.
///
/// # Errors
/// [`DataError`] when a file or row cannot be used.
pub fn demonstrations(
    source: &SourceSpec,
    system: Option<&str>,
    suffix: &str,
) -> Result<Vec<Demonstration>, DataError> {
    let mut found = Vec::new();
    rows(source, &mut |row| {
        let row = row?;
        let asked = row.asked.messages(system, suffix);
        found.push(Demonstration { asked, response: row.response.unwrap_or(row.answer) });
        Ok(())
    })?;
    Ok(found)
}
