//! Statistics of the samples of a step or evaluation.

use std::time::{SystemTime, UNIX_EPOCH};

use pacs_types::{FinishReason, GroupId, Outcome};

use super::Store;

/// Statistics of the samples of some groups.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct RoundNumbers {
    pub(crate) groups: u64,
    pub(crate) samples: u64,
    pub(crate) tokens: u64,
    pub(crate) reward_mean: f64,
    /// Share of right answers, over all samples.
    pub(crate) pass_rate: f64,
    /// Mean over groups of the probability that at least one of `k` samples is right.
    pub(crate) pass_at_k: f64,
    pub(crate) mixed_share: f64,
    pub(crate) entropy: f64,
    pub(crate) truncated_share: f64,
    pub(crate) unparsable_share: f64,
}

impl RoundNumbers {
    pub(crate) fn new(groups: &[GroupId], k: u32, store: &Store) -> Self {
        let mut sums = Self::default();
        for group in groups {
            sums.groups += 1;
            let samples = store.group(*group);
            let right = samples.iter().filter(|(_, _, verdict)| verdict.outcome == Outcome::Correct).count();
            // A problem with fewer than `k` answers counts with those that it has.
            let drawn = samples.len().min(k as usize);
            sums.pass_at_k += pacs_report::pass_at(drawn, samples.len(), right).unwrap_or(0.0);
            let labels = || samples.iter().map(|(_, _, verdict)| verdict.label);
            let (low, high) = (labels().fold(f64::INFINITY, f64::min), labels().fold(f64::NEG_INFINITY, f64::max));
            sums.mixed_share += share(low < high);
            for (_, sample, verdict) in samples {
                sums.samples += 1;
                sums.tokens += u64::from(sample.tokens);
                sums.reward_mean += verdict.reward;
                sums.pass_rate += verdict.label;
                sums.entropy += sample.entropy_sum;
                sums.truncated_share += share(sample.finish == FinishReason::Length);
                sums.unparsable_share += share(verdict.outcome == Outcome::Unparsable);
            }
        }
        let (groups, samples, tokens) = (count(sums.groups), count(sums.samples), count(sums.tokens));
        Self {
            reward_mean: sums.reward_mean / samples,
            pass_rate: sums.pass_rate / samples,
            pass_at_k: sums.pass_at_k / groups,
            mixed_share: sums.mixed_share / groups,
            entropy: sums.entropy / tokens,
            truncated_share: sums.truncated_share / samples,
            unparsable_share: sums.unparsable_share / samples,
            ..sums
        }
    }

    pub(crate) fn answer_tokens_mean(&self) -> f64 {
        self.tokens as f64 / count(self.samples)
    }
}

fn share(is: bool) -> f64 {
    f64::from(u8::from(is))
}

/// A count as a divisor, at least 1, so that the mean of nothing is 0.
fn count(n: u64) -> f64 {
    n.max(1) as f64
}

/// Current time in seconds since 1970.
pub(crate) fn unix_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::store::counted;
    use pacs_types::{SampleId, Verdict};

    #[test]
    fn numbers_of_a_small_round() {
        let mut store = Store::default();
        let mut put = |group, index, outcome, tokens, finish| {
            let id = SampleId { group: GroupId(group), index };
            let label = share(outcome == Outcome::Correct);
            store.put_sample(id, counted(tokens, finish));
            let verdict = Verdict { outcome, label, reward: 2.0 * label, extracted: None, rule: String::new() };
            store.put_verdict(id, verdict);
        };
        put(0, 0, Outcome::Correct, 2, FinishReason::Stop);
        put(0, 1, Outcome::Wrong, 4, FinishReason::Stop);
        put(1, 0, Outcome::Unparsable, 8, FinishReason::Length);
        put(1, 1, Outcome::Wrong, 2, FinishReason::Stop);
        let numbers = RoundNumbers::new(&[GroupId(0), GroupId(1)], 2, &store);
        let expected = RoundNumbers {
            groups: 2,
            samples: 4,
            tokens: 16,
            reward_mean: 0.5,
            pass_rate: 0.25,
            pass_at_k: 0.5,
            mixed_share: 0.5,
            entropy: 0.25,
            truncated_share: 0.25,
            unparsable_share: 0.25,
        };
        assert_eq!(numbers, expected);
        assert_eq!(numbers.answer_tokens_mean(), 4.0);
        assert_eq!(RoundNumbers::new(&[], 1, &store), RoundNumbers::default());
    }
}
