//! The probe of a step: one sequence of its batch, scored with the weights before and after the updates.

use std::time::Instant;

use pacs_types::WeightVersion;
use pacs_weights::Probe;

use super::batch::{SequenceTokens, TrainBatch};
use super::trainer::Trainer;
use crate::comm::{CollectiveQueue, Source};
use crate::error::TrainError;

/// Answers of at least so many tokens are preferred: a mean over fewer tells little.
const WORTH: usize = 8;
/// vLLM scores prompts at temperature 1, independent of the sampling temperature.
const RAW: f64 = 1.0;

impl Trainer {
    /// Makes the updates of a step by `train`. With [`crate::TrainerSettings::probe`] it also scores the batch's first sequence that fits
    /// into a probe, before and after them, and returns the same probe on every rank. Collective.
    ///
    /// Both scores come from passes of their own. Log-probs that the updates compute anyway are those of packed passes, at the
    /// temperature of sampling, and not of every sequence; in 16 bits the difference between two packings would be taken for an
    /// effect of the update.
    pub(super) fn probed(
        &mut self,
        batch: &TrainBatch,
        queue: &mut CollectiveQueue<'_>,
        train: impl FnOnce(&mut Self, &mut CollectiveQueue<'_>) -> Result<(), TrainError>,
    ) -> Result<Option<Probe>, TrainError> {
        let chosen = if self.settings.probe { choose(batch, queue)? } else { None };
        let Some(position) = chosen else { return train(self, queue).map(|()| None) };
        let is_chosen = |place: &usize| batch.sequences[*place].position == position;
        let mine: Vec<usize> = (0..batch.sequences.len()).filter(is_chosen).collect();
        let started = Instant::now();
        let before = self.score_raw(batch, &mine, queue)?;
        let first_seconds = started.elapsed().as_secs_f64();
        train(self, queue)?;
        let started = Instant::now();
        let after = self.score_raw(batch, &mine, queue)?;
        // The rank that publishes is not the one that computes the sequence, in general.
        let said = mine.first().map(|place| to_numbers(batch, *place, &after, &before)).unwrap_or_default();
        let heard = queue.gather(said)?;
        let seconds = first_seconds + started.elapsed().as_secs_f64();
        tracing::debug!(step = batch.step, position, seconds, "probe scored");
        Ok(heard.iter().find(|numbers| !numbers.is_empty()).and_then(|numbers| of_numbers(batch.step, numbers)))
    }

    /// Log-probs of the answers at `places` under the present policy, as servers report them for prompts.
    fn score_raw(
        &mut self,
        batch: &TrainBatch,
        places: &[usize],
        queue: &mut CollectiveQueue<'_>,
    ) -> Result<Vec<f32>, TrainError> {
        let mut logprobs = Vec::new();
        self.score_at(RAW, Source::Policy, batch, places, queue, |_, scored| {
            logprobs.extend_from_slice(scored.logprobs)
        })?;
        Ok(logprobs)
    }
}

/// Position of the batch's first sequence that fits into a probe and has a long enough answer, or else of the first that fits. A rank
/// knows the prompts of its own sequences only, so ranks say which is their first.
fn choose(batch: &TrainBatch, queue: &mut CollectiveQueue<'_>) -> Result<Option<usize>, TrainError> {
    let fits = |sequence: &&SequenceTokens| {
        let prompt = batch.prompts[&batch.index[sequence.position].group].len();
        prompt > 0 && prompt + sequence.tokens.len() <= Probe::MOST_TOKENS
    };
    let first = |least: usize| {
        let enough = batch.sequences.iter().filter(fits).filter(|sequence| sequence.tokens.len() >= least);
        enough.map(|sequence| sequence.position as f64).fold(f64::INFINITY, f64::min)
    };
    let heard = queue.gather(vec![first(WORTH), first(1)])?;
    let of_all =
        |place: usize| heard.iter().filter_map(|numbers| numbers.get(place)).fold(f64::INFINITY, |a, b| a.min(*b));
    Ok([of_all(0), of_all(1)].into_iter().find(|position| position.is_finite()).map(|position| position as usize))
}

/// Everything of a probe as the numbers that ranks exchange: two lengths, the tokens, and both lists of log-probs.
fn to_numbers(batch: &TrainBatch, place: usize, logprobs: &[f32], previous: &[f32]) -> Vec<f64> {
    let sequence = &batch.sequences[place];
    let prompt = &batch.prompts[&batch.index[sequence.position].group];
    let lengths = [prompt.len() as f64, sequence.tokens.len() as f64];
    let tokens = prompt.iter().chain(&sequence.tokens).map(|token| f64::from(*token));
    let scores = logprobs.iter().chain(previous).map(|logprob| f64::from(*logprob));
    lengths.into_iter().chain(tokens).chain(scores).collect()
}

/// The probe of step `step` in the numbers of a rank; `None`, with a warning, when servers would have to refuse it.
fn of_numbers(step: u64, numbers: &[f64]) -> Option<Probe> {
    let [prompt, answer, rest @ ..] = numbers else { return None };
    let (prompt, answer) = (*prompt as usize, *answer as usize);
    let (tokens, scores) = rest.split_at_checked(prompt.saturating_add(answer))?;
    let (logprobs, previous_logprobs) = scores.split_at_checked(answer)?;
    let scores = |numbers: &[f64]| numbers.iter().map(|number| *number as f32).collect();
    let tokens = tokens.iter().map(|token| *token as u32).collect();
    // Step `n` trains version `n - 1`.
    let previous = WeightVersion(step.saturating_sub(1));
    match Probe::new(tokens, prompt, scores(logprobs), scores(previous_logprobs), previous) {
        Ok(probe) => Some(probe),
        // Weights that are NaN, for example; the metrics of the step report them.
        Err(problem) => {
            tracing::warn!(step, "this version has no probe: {problem}");
            None
        }
    }
}
