//! Checks before a run begins that its messages will not be too large.

use pacs_data::Problem;
use pacs_protocol::ANSWER_BYTES;

use crate::StartError;

/// Space next to a sample in a message, for its question and reference answer, or the prompt of its group. The sample
/// itself takes up to [`pacs_types::MAX_SAMPLE_BYTES`].
const MOST_BYTES: usize = ANSWER_BYTES - 4096;
/// Upper bound on an encoded token id.
const TOKEN_BYTES: usize = 5;

/// Checks the parts of messages that depend on the job alone.
///
/// # Errors
/// When a part is too large to be sent.
pub(crate) fn check<'a>(
    spec: &str,
    train: &'a [Problem],
    evaluation: impl IntoIterator<Item = &'a [Problem]>,
) -> Result<(), StartError> {
    refuse(|| "the job spec".to_owned(), spec.len(), "every worker gets it; shorten its texts")?;
    let sets = std::iter::once(("training", train)).chain(evaluation.into_iter().map(|set| ("evaluation", set)));
    for (set, problems) in sets {
        for (row, problem) in problems.iter().enumerate() {
            let what = || format!("{set} problem {} (`{}`)", row + 1, begin(problem));
            let judged = problem.question.len() + problem.answer.len();
            let remedy = "question and reference answer go to a verifier with each sample; shorten or remove it";
            refuse(what, judged, remedy)?;
            let prompt = problem.prompt_tokens.len() * TOKEN_BYTES;
            refuse(what, prompt, "its prompt goes to learners with its samples; lower `data.max_prompt_tokens`")?;
        }
    }
    Ok(())
}

fn refuse(what: impl Fn() -> String, bytes: usize, remedy: &'static str) -> Result<(), StartError> {
    if bytes <= MOST_BYTES {
        return Ok(());
    }
    Err(StartError::TooLarge { what: what(), bytes, most: MOST_BYTES, remedy })
}

/// The beginning of a question, for an error message.
fn begin(problem: &Problem) -> String {
    problem.question.chars().take(40).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_message_could_carry_is_named() {
        let problem = |question: usize, tokens: usize| Problem {
            question: "x".repeat(question),
            answer: "2".to_owned(),
            verifier: None,
            prompt_tokens: vec![1; tokens],
        };
        let small = [problem(10, 10), problem(1000, 1000)];
        assert!(check("name = 'm'", &small, [&small[..]]).is_ok());
        let said = |spec: &str, problem: Problem| check(spec, &small, [&[problem][..]]).unwrap_err().to_string();
        let question = said("", problem(5 << 20, 10));
        assert!(
            question.starts_with("evaluation problem 1 (`xxxx") && question.contains("takes 5242881"),
            "{question}"
        );
        assert!(said("", problem(10, 1 << 20)).contains("lower `data.max_prompt_tokens`"));
        assert!(said(&"#".repeat(5 << 20), problem(1, 1)).starts_with("the job spec takes"));
    }
}
