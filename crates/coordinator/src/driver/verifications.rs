//! Statistics of verifications: outcomes, cache hits and latency.

use std::collections::BTreeMap;
use std::time::Instant;

use pacs_protocol::v1;
use pacs_types::Outcome;

/// Pairs of worker and verifier with their own entry. Workers that appear under ever new names share one.
const MOST_PAIRS: usize = 256;
const OTHERS: &str = "others";
/// Verifications whose outcome is remembered one by one: the bits of a word.
const RECENT: u32 = u64::BITS;

/// The result of one verifier for one sample.
#[derive(Clone, Debug)]
pub(crate) struct Verification {
    pub(crate) verifier: String,
    pub(crate) outcome: Outcome,
    pub(crate) reward: f64,
    pub(crate) elapsed_us: u64,
    pub(crate) cached: bool,
}

/// Statistics of all verifications since the coordinator started, and since the last step.
#[derive(Debug, Default)]
pub(crate) struct Verifications {
    by_worker: BTreeMap<(String, String), Counts>,
    of_step: BTreeMap<String, Counts>,
}

impl Verifications {
    /// Counts a verification. One of an evaluation (`measured`) does not enter the metrics of steps.
    pub(crate) fn note(&mut self, worker: &str, verification: &Verification, measured: bool) {
        let key = (worker.to_owned(), verification.verifier.clone());
        let known = self.by_worker.len() < MOST_PAIRS || self.by_worker.contains_key(&key);
        let key = if known { key } else { (OTHERS.to_owned(), key.1) };
        self.by_worker.entry(key).or_default().note(verification);
        if !measured {
            self.of_step.entry(verification.verifier.clone()).or_default().note(verification);
        }
    }

    /// Metrics of the verifications since the last call, named `verifier_<name>_<what>`.
    pub(crate) fn take_step(&mut self) -> BTreeMap<String, f64> {
        let mut metrics = BTreeMap::new();
        for (verifier, counts) in std::mem::take(&mut self.of_step) {
            let mut add = |what: &str, value: f64| metrics.insert(format!("verifier_{verifier}_{what}"), value);
            add("verdicts", counts.total() as f64);
            add("failed", counts.of(Outcome::Failed) as f64);
            add("timed_out", counts.of(Outcome::TimedOut) as f64);
            add("cache_hits", counts.cache_hits as f64);
            counts.reward_mean().map(|mean| add("reward_mean", mean));
            counts.times.quantile(0.5).map(|seconds| add("p50_seconds", seconds));
            counts.times.quantile(0.99).map(|seconds| add("p99_seconds", seconds));
        }
        metrics
    }

    pub(crate) fn status(&self) -> Vec<v1::VerifierStatus> {
        let status = |((worker, verifier), counts): (&(String, String), &Counts)| v1::VerifierStatus {
            worker: worker.clone(),
            verifier: verifier.clone(),
            outcomes: OUTCOMES.iter().map(|outcome| (outcome.name().to_owned(), counts.of(*outcome))).collect(),
            cache_hits: counts.cache_hits,
            p50_seconds: counts.times.quantile(0.5),
            p99_seconds: counts.times.quantile(0.99),
            failures_in_a_row: counts.failures_in_a_row,
            recent: u32::try_from(counts.total()).unwrap_or(u32::MAX).min(RECENT),
            recent_failures: counts.recent_failures.count_ones(),
            seconds_since_verdict: counts.last_verdict.map(|at| at.elapsed().as_secs_f64()),
        };
        self.by_worker.iter().map(status).collect()
    }
}

const OUTCOMES: [Outcome; 5] =
    [Outcome::Correct, Outcome::Wrong, Outcome::Unparsable, Outcome::Failed, Outcome::TimedOut];

#[derive(Debug, Default)]
struct Counts {
    /// Counts in the order of `OUTCOMES`.
    outcomes: [u64; OUTCOMES.len()],
    cache_hits: u64,
    reward_sum: f64,
    times: Histogram,
    /// Verifications without a verdict since the last verdict.
    failures_in_a_row: u64,
    /// One bit for each of the last `RECENT` verifications, the newest at the low end: 1 if it gave no verdict.
    recent_failures: u64,
    last_verdict: Option<Instant>,
}

impl Counts {
    fn note(&mut self, verification: &Verification) {
        self.outcomes[position(verification.outcome)] += 1;
        self.cache_hits += u64::from(verification.cached);
        let is_conclusive = verification.outcome.is_conclusive();
        self.recent_failures = self.recent_failures << 1 | u64::from(!is_conclusive);
        if is_conclusive {
            self.reward_sum += verification.reward;
            (self.failures_in_a_row, self.last_verdict) = (0, Some(Instant::now()));
        } else {
            self.failures_in_a_row += 1;
        }
        if !verification.cached {
            self.times.note(verification.elapsed_us);
        }
    }

    fn of(&self, outcome: Outcome) -> u64 {
        self.outcomes[position(outcome)]
    }

    fn total(&self) -> u64 {
        self.outcomes.iter().sum()
    }

    /// Mean reward over the conclusive verifications; `None` without any.
    fn reward_mean(&self) -> Option<f64> {
        let conclusive = OUTCOMES.iter().filter(|outcome| outcome.is_conclusive()).map(|outcome| self.of(*outcome));
        let count: u64 = conclusive.sum();
        (count > 0).then(|| self.reward_sum / count as f64)
    }
}

fn position(outcome: Outcome) -> usize {
    OUTCOMES.iter().position(|known| *known == outcome).expect("all outcomes are listed")
}

/// Durations in microseconds, in buckets of an eighth of a power of two: a quantile is off by at most a sixteenth.
#[derive(Debug, Default)]
struct Histogram {
    counts: BTreeMap<u32, u64>,
    total: u64,
}

impl Histogram {
    fn note(&mut self, elapsed_us: u64) {
        *self.counts.entry(bucket(elapsed_us)).or_default() += 1;
        self.total += 1;
    }

    /// The duration in seconds that this share of the values does not exceed; `None` without values.
    fn quantile(&self, share: f64) -> Option<f64> {
        let rank = (share * self.total as f64).ceil().max(1.0) as u64;
        let mut seen = 0;
        let bucket = self.counts.iter().find_map(|(bucket, count)| {
            seen += count;
            (seen >= rank).then_some(*bucket)
        });
        bucket.map(|bucket| middle(bucket) / 1e6)
    }
}

/// Index of a bucket: 0 to 7 have one each, and each further power of two has eight.
fn bucket(us: u64) -> u32 {
    match us.checked_ilog2() {
        None | Some(0..3) => us as u32,
        Some(exponent) => 8 * (exponent - 2) + ((us >> (exponent - 3)) & 7) as u32,
    }
}

fn middle(bucket: u32) -> f64 {
    if bucket < 8 {
        return f64::from(bucket);
    }
    let width = ((bucket / 8 - 1) as f64).exp2();
    (f64::from(8 + bucket % 8) + 0.5) * width
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verification(outcome: Outcome, elapsed_us: u64) -> Verification {
        let cached = elapsed_us == 0;
        Verification { verifier: "label".into(), outcome, reward: 0.5, elapsed_us, cached }
    }

    #[test]
    fn buckets_are_in_order_and_close_to_their_values() {
        let mut before = 0;
        for us in (0..5000u64).chain((13..40).map(|shift| 1 << shift)) {
            let here = bucket(us);
            assert!(here == before || here == before + 1 || us >= 5000, "{us} is in bucket {here} after {before}");
            before = here;
            assert!((middle(here) - us as f64).abs() <= us as f64 / 16.0, "{us}: {}", middle(here));
        }
        assert!(middle(bucket(u64::MAX)).is_finite());
    }

    #[test]
    fn quantiles_of_a_hundred_values() {
        let mut times = Histogram::default();
        assert_eq!(times.quantile(0.5), None);
        (1..=100).for_each(|ms| times.note(ms * 1000));
        let near = |share, seconds: f64| (times.quantile(share).unwrap() / seconds - 1.0).abs() < 1.0 / 16.0;
        assert!(near(0.5, 0.05) && near(0.99, 0.099) && near(1.0, 0.1) && near(0.0, 0.001));
    }

    #[test]
    fn steps_are_counted_apart_and_workers_on() {
        let mut verifications = Verifications::default();
        for (worker, outcome, us) in [
            ("a", Outcome::Correct, 100),
            ("a", Outcome::Failed, 7),
            ("b", Outcome::Wrong, 0),
            ("b", Outcome::TimedOut, 9000),
        ] {
            verifications.note(worker, &verification(outcome, us), false);
        }
        verifications.note("a", &verification(Outcome::Correct, 5), true);
        let metrics = verifications.take_step();
        let of = |what: &str| metrics[&format!("verifier_label_{what}")];
        assert_eq!((of("verdicts"), of("failed"), of("timed_out"), of("cache_hits")), (4.0, 1.0, 1.0, 1.0));
        assert_eq!(of("reward_mean"), 0.5);
        assert!(of("p50_seconds") < of("p99_seconds"));
        assert!(verifications.take_step().is_empty());
        let status = verifications.status();
        let workers: Vec<_> = status.iter().map(|entry| (entry.worker.as_str(), entry.cache_hits)).collect();
        assert_eq!(workers, [("a", 0), ("b", 1)]);
        assert_eq!((status[0].outcomes["correct"], status[1].outcomes["timed_out"]), (2, 1));
    }

    #[test]
    fn ever_new_workers_share_an_entry() {
        let mut verifications = Verifications::default();
        for worker in 0..1000 {
            verifications.note(&format!("verifier-{worker}"), &verification(Outcome::Wrong, 1), false);
        }
        assert_eq!(verifications.status().len(), MOST_PAIRS + 1);
    }
}
