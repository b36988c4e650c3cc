//! Whether an answer of a server may become a sample, and what it says.

use pacs_engine::SamplingOptions;
use pacs_protocol::{HIGHEST_LOGPROB, LOWEST_LOGPROB};
use pacs_text::{StopStrings, Tokenizer, TokenizerError};
use pacs_types::{FinishReason, Sample, VersionSpan};
use pacs_weights::VersionId;

use crate::Fault;
use crate::installed::Installed;
use crate::wire::{GenerateResponse, Logprobs, WeightVersionSpan};

/// What is known of the model, by which answers are checked.
pub(crate) struct Model {
    pub(crate) tokenizer: Tokenizer,
    pub(crate) end_tokens: Vec<u32>,
    pub(crate) vocabulary: u32,
}

/// A sample, and the versions that generated it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Accepted {
    pub(crate) sample: Sample,
    /// Without repetitions, in ascending order.
    pub(crate) versions: Vec<VersionId>,
}

/// Reads the one choice of an answer to `prompt`. Nothing of it is repaired; but what follows the first end of an answer, as the
/// job's stop strings define it, is left out.
pub(crate) fn accept(
    answer: GenerateResponse,
    prompt: &[u32],
    options: &SamplingOptions,
    model: &Model,
    installed: &Installed,
) -> Result<Accepted, Fault> {
    let malformed = |problem: &str| Fault::Malformed { call: "generate", problem: problem.to_owned() };
    if answer.prompt_token_ids.as_deref() != Some(prompt) {
        return Err(Fault::OtherPrompt);
    }
    let mut choices = answer.choices;
    let (Some(choice), true) = (choices.pop(), choices.is_empty()) else {
        return Err(malformed("it does not have one choice"));
    };
    if choice.index != 0 {
        return Err(malformed("its choice is not the first"));
    }
    let mut tokens = choice.token_ids.ok_or_else(|| malformed("it has no tokens"))?;
    let finish = choice.finish_reason.as_deref().unwrap_or_default();
    if finish == "abort" {
        return Err(Fault::Aborted);
    }
    check_tokens(&tokens, options, model)?;
    let mut logprobs = check_logprobs(choice.logprobs, &tokens)?;
    let spans = choice.weight_versions.ok_or_else(|| Fault::UnknownVersion("the answer names none".to_owned()))?;
    let mut versions = versions_of(&spans, tokens.len(), installed)?;

    let stop = StopStrings::new(Some(&model.tokenizer), &options.stop);
    let first_end = first_end(&tokens, options, &stop, model).map_err(no_text)?;
    let finish = match (finish, first_end) {
        ("stop", None) => {
            let last = tokens.last().copied().unwrap_or_default();
            return Err(Fault::WrongTokens(format!("it ends with token {last}, which ends no answer of this job")));
        }
        (_, Some(length)) => {
            tokens.truncate(length);
            logprobs.truncate(length);
            versions.truncate(length);
            FinishReason::Stop
        }
        ("length", None) if tokens.len() < options.max_new_tokens as usize => {
            return Err(Fault::TooFewTokens { found: tokens.len(), wanted: options.max_new_tokens });
        }
        ("length", None) => FinishReason::Length,
        (other, None) => return Err(malformed(&format!("its finish reason is {:?}", cut(other)))),
    };
    let text = stop.text(&model.tokenizer, &tokens).map_err(no_text)?;
    // The drawn token's surprise is an unbiased estimate of the entropy; servers report nothing better.
    let most = f64::from(model.vocabulary).ln() * tokens.len() as f64;
    let entropy_sum = logprobs.iter().map(|logprob| -f64::from(*logprob)).sum::<f64>().clamp(0.0, most);
    let spans = spans_of(&versions);
    let version = spans.iter().map(|span| span.version).min().expect("there is a token");
    versions.sort_unstable();
    versions.dedup();
    let sample = Sample {
        tokens,
        logprobs,
        sampled_logprobs: Vec::new(),
        entropy_sum,
        text,
        finish,
        version,
        spans,
        routes: Vec::new(),
    };
    Ok(Accepted { sample, versions })
}

/// Log-probs of the tokens from `first` on, and the label of the weights that scored them.
pub(crate) fn scores(answer: GenerateResponse, tokens: &[u32], first: usize) -> Result<(Vec<f32>, String), Fault> {
    let malformed = |problem: &str| Fault::Malformed { call: "score", problem: problem.to_owned() };
    if answer.prompt_token_ids.as_deref() != Some(tokens) {
        return Err(Fault::OtherPrompt);
    }
    let scored = answer.prompt_logprobs.ok_or_else(|| malformed("it has no log-probs of its prompt"))?;
    if scored.len() != tokens.len() {
        let problem = format!("it has {} log-probs for a prompt of {} tokens", scored.len(), tokens.len());
        return Err(malformed(&problem));
    }
    let label = answer.choices.into_iter().next().and_then(|choice| choice.weight_versions);
    let label = match label.as_deref() {
        Some([span]) => span.version.clone(),
        _ => return Err(Fault::UnknownVersion("a scored sequence does not name one version".to_owned())),
    };
    let mut logprobs = Vec::with_capacity(tokens.len() - first);
    for (place, token) in tokens.iter().enumerate().skip(first) {
        let found = scored[place].as_ref().and_then(|candidates| candidates.get(token));
        let logprob = found.ok_or_else(|| malformed("a token of the prompt has no log-prob"))?.logprob;
        logprobs.push(checked(logprob)?);
    }
    Ok((logprobs, label))
}

fn check_tokens(tokens: &[u32], options: &SamplingOptions, model: &Model) -> Result<(), Fault> {
    if tokens.is_empty() {
        return Err(Fault::TooFewTokens { found: 0, wanted: options.max_new_tokens });
    }
    if tokens.len() > options.max_new_tokens as usize {
        let problem = format!("{} tokens, where {} were asked for", tokens.len(), options.max_new_tokens);
        return Err(Fault::WrongTokens(problem));
    }
    match tokens.iter().find(|token| **token >= model.vocabulary) {
        Some(token) => Err(Fault::WrongTokens(format!("{token} of a vocabulary of {}", model.vocabulary))),
        None => Ok(()),
    }
}

fn check_logprobs(logprobs: Option<Logprobs>, tokens: &[u32]) -> Result<Vec<f32>, Fault> {
    let content = logprobs.and_then(|logprobs| logprobs.content).unwrap_or_default();
    if content.len() != tokens.len() {
        let problem = format!("{} log-probs for {} tokens", content.len(), tokens.len());
        return Err(Fault::WrongLogprobs(problem));
    }
    let pairs = content.iter().zip(tokens);
    pairs
        .map(|(found, token)| match found.token_id == *token {
            true => checked(found.logprob),
            false => {
                Err(Fault::WrongTokens(format!("a log-prob of token {}, where {token} was drawn", found.token_id)))
            }
        })
        .collect()
}

fn checked(logprob: f32) -> Result<f32, Fault> {
    // vLLM writes -9999 for NaN and minus infinity. The coordinator refuses what is out of these bounds, NaN included.
    match (LOWEST_LOGPROB..=HIGHEST_LOGPROB).contains(&logprob) {
        true => Ok(logprob.min(0.0)),
        false => Err(Fault::WrongLogprobs(format!("{logprob} of a drawn token"))),
    }
}

/// The version of every token.
fn versions_of(spans: &[WeightVersionSpan], tokens: usize, installed: &Installed) -> Result<Vec<VersionId>, Fault> {
    let mut versions = Vec::with_capacity(tokens);
    for span in spans {
        if span.start != versions.len() || span.end < span.start || span.end > tokens {
            let problem = format!("tokens {} to {} of {tokens} are said to be of one version", span.start, span.end);
            return Err(Fault::UnknownVersion(problem));
        }
        let Some(id) = installed.version_of(&span.version) else {
            return Err(Fault::UnknownVersion(format!("weights named {:?}", cut(&span.version))));
        };
        versions.resize(span.end, id);
    }
    if !versions.is_sorted_by_key(|id| id.version) {
        // After a lost generation of learners; the staleness bound relies on the first version being the oldest.
        return Err(Fault::UnknownVersion("they went back to older weights in the middle of the answer".to_owned()));
    }
    match versions.len() == tokens {
        true => Ok(versions),
        false => Err(Fault::UnknownVersion(format!("{} of {tokens} tokens name one", versions.len()))),
    }
}

/// Spans of equal versions.
fn spans_of(versions: &[VersionId]) -> Vec<VersionSpan> {
    let runs = versions.chunk_by(|first, second| first.version == second.version);
    // An answer is shorter than a million tokens.
    runs.map(|run| VersionSpan { version: run[0].version, tokens: run.len() as u32 }).collect()
}

/// How many tokens there are up to the first that ends the answer; `None` when none does.
fn first_end(
    tokens: &[u32],
    options: &SamplingOptions,
    stop: &StopStrings,
    model: &Model,
) -> Result<Option<usize>, TokenizerError> {
    for length in 1..=tokens.len() {
        let ends = !options.stop.is_empty() && stop.ends(&model.tokenizer, &tokens[..length])?;
        if ends || model.end_tokens.contains(&tokens[length - 1]) {
            return Ok(Some(length));
        }
    }
    Ok(None)
}

fn no_text(error: TokenizerError) -> Fault {
    Fault::WrongTokens(format!("they have no text: {error}"))
}

/// A text of the server for a message.
fn cut(text: &str) -> String {
    text.chars().take(80).collect()
}
