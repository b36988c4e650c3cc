//! Evaluation results: one line for each set, and one for each of its problems.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use pacs_data::{MeasuredSet, Problem};
use pacs_machine::PhaseKind;
use pacs_report::{MeasuredProblem, pass_curve, powers_of_two};
use pacs_types::{FinishReason, GroupId, Outcome, Purpose, evaluation_problem, mix};

use super::apply::line;
use super::summary::{RoundNumbers, unix_time};
use super::{Driver, Store};
use crate::progress::{EvaluationSummary, Progress};
use crate::records::{Job, LinesOf};

/// Interval of progress reports of an evaluation.
const TOLD_AGAIN: Duration = Duration::from_secs(5);
/// Bytes of a question or answer in a problem's line.
const SHOWN: usize = 200;

/// What watchers were told about the evaluation in progress.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MeasuringTold {
    /// When this process first saw it, and how many samples were judged then.
    since: (Instant, u64),
    last: Instant,
}

impl Driver {
    /// Records an evaluation; `took` is its duration if it ran concurrently with training.
    pub(super) fn evaluated(&mut self, step: u64, groups: &[GroupId], took: Option<Duration>) {
        // Taken in any case: a step that was held for it entered this phase.
        let awaited = self.clock.take(PhaseKind::Evaluating, Instant::now());
        let seconds = took.map_or(awaited, |took| took.as_secs_f64());
        self.told_measuring = None;
        let (mut problems, mut lines, mut score) = (Vec::new(), Vec::new(), None);
        let mut summaries = Vec::new();
        for measured in &self.problems.sets {
            let of_set: Vec<(GroupId, usize)> =
                groups.iter().filter_map(|group| Some((*group, position(measured, *group)?))).collect();
            // A set that is not due in this step has no groups.
            if of_set.is_empty() && !self.is_due(measured, step) {
                continue;
            }
            let rows = of_set.iter().map(|(group, at)| problem(step, measured, *at, &self.store, *group));
            let rows: Vec<MeasuredProblem> = rows.collect();
            rows.iter().for_each(|row| problems.extend(line(row)));
            let ids: Vec<GroupId> = of_set.into_iter().map(|(group, _)| group).collect();
            let summary = EvaluationSummary { seconds, ..summary(step, measured, &ids, &rows, &self.store) };
            // `checkpoint.keep_best` compares checkpoints by the unnamed set.
            if summary.set.is_none() {
                score = Some(summary.pass_at_1);
            }
            lines.extend(line(&summary));
            summaries.push(summary);
        }
        self.archive_round(step, Purpose::Evaluate, groups);
        // Archived before the lines of the sets, whose presence says that the evaluation is completely written.
        self.hand_over(Job::Append { to: LinesOf::Problems, step, line: problems, score: None });
        self.hand_over(Job::Append { to: LinesOf::Evaluations, step, line: lines, score });
        for summary in summaries {
            self.measured.insert(summary.label().to_owned(), summary.clone());
            self.tell_progress(Progress::Evaluated(summary));
        }
    }

    fn is_due(&self, measured: &MeasuredSet, step: u64) -> bool {
        let (evaluation, total) = (&self.spec.evaluation, self.spec.batch.steps);
        match step {
            0 => evaluation.before,
            _ if step >= total => evaluation.after,
            _ => measured.set.every_steps > 0 && step.is_multiple_of(measured.set.every_steps),
        }
    }

    /// Restores the newest result of each set from the lines that earlier processes wrote.
    pub(crate) fn remember_measured(&mut self, lines: &str) {
        let summaries = lines.lines().filter_map(|line| serde_json::from_str::<EvaluationSummary>(line).ok());
        self.measured.extend(summaries.map(|summary| (summary.label().to_owned(), summary)));
    }

    /// The newest result of each set as named numbers, for the status.
    pub(super) fn measured_numbers(&self) -> impl Iterator<Item = (String, f64)> {
        self.measured.iter().flat_map(|(set, summary)| {
            let at_k = summary.pass_at_k.map(|share| (format!("pass_at_{}", summary.k), share));
            let numbers = [("step".to_owned(), summary.step as f64), ("pass_at_1".to_owned(), summary.pass_at_1)];
            numbers.into_iter().chain(at_k).map(move |(name, value)| (format!("evaluation_{set}_{name}"), value))
        })
    }

    /// Estimated time to the end of the evaluation in progress, at the rate of this process.
    pub(super) fn measuring_left(&self) -> Option<f64> {
        let (judged, samples) = self.machine.measuring()?;
        let (began, before) = self.told_measuring?.since;
        seconds_left(began.elapsed().as_secs_f64(), before, judged, samples)
    }

    /// Reports the progress of an evaluation at intervals.
    pub(super) fn tell_measuring(&mut self) {
        let Some((judged, samples)) = self.machine.measuring() else {
            self.told_measuring = None;
            return;
        };
        let now = Instant::now();
        let told = self.told_measuring.get_or_insert(MeasuringTold { since: (now, judged), last: now });
        if now.duration_since(told.last) < TOLD_AGAIN {
            return;
        }
        told.last = now;
        let remaining_seconds = self.measuring_left();
        self.tell_progress(Progress::Measuring { judged, samples, remaining_seconds });
    }
}

fn position(measured: &MeasuredSet, group: GroupId) -> Option<usize> {
    measured.set.position(evaluation_problem(group)?)
}

fn summary(
    step: u64,
    measured: &MeasuredSet,
    groups: &[GroupId],
    rows: &[MeasuredProblem],
    store: &Store,
) -> EvaluationSummary {
    let k = measured.set.samples;
    let numbers = RoundNumbers::new(groups, k, store);
    let ks = powers_of_two(k as usize);
    let mut curve = BTreeMap::new();
    for row in rows.iter().filter(|row| row.samples == k) {
        let pass = pass_curve(row.samples as usize, row.right as usize);
        ks.iter().for_each(|k| *curve.entry(*k).or_insert(0.0) += pass[k - 1] / rows.len() as f64);
    }
    EvaluationSummary {
        step,
        set: measured.set.name.clone(),
        time: unix_time(),
        pass_at_1: numbers.pass_rate,
        k,
        pass_at_k: (k > 1).then_some(numbers.pass_at_k),
        pass_curve: if k > 1 { curve } else { BTreeMap::new() },
        problems: numbers.groups,
        excluded: u32::try_from(measured.problems.len() - groups.len()).unwrap_or(u32::MAX),
        samples: numbers.samples,
        answer_tokens_mean: numbers.answer_tokens_mean(),
        truncated_share: numbers.truncated_share,
        unparsable_share: numbers.unparsable_share,
        seconds: 0.0,
    }
}

fn problem(step: u64, measured: &MeasuredSet, position: usize, store: &Store, group: GroupId) -> MeasuredProblem {
    let asked = &measured.problems[position];
    let mut row = MeasuredProblem {
        step,
        set: measured.set.label().to_owned(),
        problem: position as u64,
        key: key(asked),
        question: shortened(&asked.question),
        gold: shortened(&asked.answer),
        ..MeasuredProblem::default()
    };
    let mut answers: BTreeMap<String, (u32, u32)> = BTreeMap::new();
    for (_, sample, verdict) in store.group(group) {
        let right = u32::from(verdict.outcome == Outcome::Correct);
        row.samples += 1;
        row.right += right;
        row.truncated += u32::from(sample.finish == FinishReason::Length);
        row.unparsable += u32::from(verdict.outcome == Outcome::Unparsable);
        row.tokens += u64::from(sample.tokens);
        // An unparsable answer is no vote, even if something was extracted.
        if let Some(extracted) = verdict.extracted.as_ref().filter(|_| verdict.outcome != Outcome::Unparsable) {
            let (count, of_right) = answers.entry(shortened(extracted.trim())).or_default();
            *count += 1;
            *of_right += right;
        }
    }
    row.answers = answers.into_iter().map(|(answer, (count, right))| (answer, count, right)).collect();
    row
}

/// A text as it is, or its beginning and a digest of the whole, so that two long answers stay distinct.
fn shortened(text: &str) -> String {
    if text.len() <= SHOWN {
        return text.to_owned();
    }
    format!("{}… [{:016x}]", &text[..text.floor_char_boundary(SHOWN)], digest(0, text))
}

fn key(problem: &Problem) -> String {
    format!("{:016x}", digest(digest(0, &problem.question), &problem.answer))
}

fn digest(seed: u64, text: &str) -> u64 {
    let words = text.as_bytes().chunks(8).map(|chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        u64::from_le_bytes(word)
    });
    words.fold(mix(seed ^ text.len() as u64), |digest, word| mix(digest ^ mix(word)))
}

/// Seconds until all `samples` are judged, from `judged - before` of them in `elapsed` seconds. `None` until a twentieth of them is: samples
/// are generated side by side, so the first ones say how long an answer takes and not how many come out per second.
fn seconds_left(elapsed: f64, before: u64, judged: u64, samples: u64) -> Option<f64> {
    let done = judged.checked_sub(before).filter(|done| *done > 0)?;
    let is_told = done.saturating_mul(20) >= samples.saturating_sub(before);
    is_told.then(|| elapsed / done as f64 * samples.saturating_sub(judged) as f64)
}

#[cfg(test)]
mod tests {
    use super::seconds_left;

    #[test]
    fn the_end_of_an_evaluation_is_estimated_once_a_twentieth_is_judged() {
        assert_eq!([0, 1, 9].map(|judged| seconds_left(20.0, 0, judged, 200)), [None; 3]);
        assert_eq!(seconds_left(20.0, 0, 10, 200), Some(380.0));
        assert_eq!(seconds_left(20.0, 100, 110, 200), Some(180.0), "what an earlier process judged took it no time");
        assert_eq!(seconds_left(20.0, 200, 200, 200), None);
    }
}
