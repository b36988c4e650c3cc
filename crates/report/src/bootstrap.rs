use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore as _, SeedableRng as _};
use serde::{Deserialize, Serialize};

/// An estimate with its 95 % confidence interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Estimate from all of the data.
    pub mean: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
}

/// Difference of two means over the same problems or seeds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// First mean minus second.
    #[serde(flatten)]
    pub interval: Interval,
    /// Two-sided p-value: the probability of a difference at least as large under the null hypothesis. Never below `2 /
    /// (draws + 1)`.
    pub p_value: f64,
}

/// Bootstrap: resampling units with replacement. Units are problems or seeds, over which the result shall generalise.
/// Answers to one problem are not units, because they are correlated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bootstrap {
    /// Number of resamples; at least 1.
    pub draws: usize,
    /// Seed of the resampling. Calls with the same seed and number of units see the same resamples, so the columns of a
    /// table vary together.
    pub seed: u64,
}

impl Default for Bootstrap {
    fn default() -> Self {
        Self { draws: 10_000, seed: 1 }
    }
}

impl Bootstrap {
    /// Returns the percentile interval of a statistic of `units` units. `statistic` gets the indices that were drawn,
    /// and once all of them in order for the estimate. `None` without units, or if the estimate is not finite.
    pub fn interval(&self, units: usize, statistic: impl Fn(&[usize]) -> f64) -> Option<Interval> {
        let (mean, drawn) = self.resample(units, statistic)?;
        Some(Interval { mean, low: quantile(&drawn, 0.025), high: quantile(&drawn, 0.975) })
    }

    /// Returns the mean of the values and its interval, resampling values.
    #[must_use]
    pub fn mean(&self, values: &[f64]) -> Option<Interval> {
        self.interval(values.len(), |drawn| mean_of(drawn.iter().map(|index| values[*index]), drawn.len()))
    }

    /// Returns the mean of `first - second` with its interval, resampling pairs. What both find hard or easy cancels,
    /// so this detects smaller differences than two overlapping intervals. `None` without pairs.
    ///
    /// # Panics
    ///
    /// When the slices differ in length.
    #[must_use]
    pub fn paired(&self, first: &[f64], second: &[f64]) -> Option<Difference> {
        assert_eq!(first.len(), second.len(), "pairs need both halves");
        let (mean, drawn) = self.resample(first.len(), |drawn| {
            mean_of(drawn.iter().map(|index| first[*index] - second[*index]), drawn.len())
        })?;
        let interval = Interval { mean, low: quantile(&drawn, 0.025), high: quantile(&drawn, 0.975) };
        // One is added to each count: a resample that did not occur is no proof that none exists.
        let share = |count: usize| (count + 1) as f64 / (drawn.len() + 1) as f64;
        let (below, above) =
            (drawn.partition_point(|value| *value < 0.0), drawn.partition_point(|value| *value <= 0.0));
        let p_value = (2.0 * share(above).min(share(drawn.len() - below))).min(1.0);
        Some(Difference { interval, p_value })
    }

    /// Computes the statistic of all units, and those of the resamples in ascending order.
    fn resample(&self, units: usize, statistic: impl Fn(&[usize]) -> f64) -> Option<(f64, Vec<f64>)> {
        if units == 0 {
            return None;
        }
        let all: Vec<usize> = (0..units).collect();
        let estimate = statistic(&all);
        if !estimate.is_finite() {
            return None;
        }
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        let mut drawn = all;
        let mut statistics = Vec::with_capacity(self.draws);
        for _ in 0..self.draws.max(1) {
            drawn.fill_with(|| below(&mut random, units));
            statistics.push(statistic(&drawn));
        }
        statistics.sort_by(f64::total_cmp);
        Some((estimate, statistics))
    }
}

/// Draws a number below `bound` by multiplication. The bias is below 2^-40 for any number of units that
/// fits into memory.
pub(crate) fn below(random: &mut ChaCha8Rng, bound: usize) -> usize {
    ((u128::from(random.next_u64()) * bound as u128) >> 64) as usize
}

fn mean_of(values: impl Iterator<Item = f64>, count: usize) -> f64 {
    values.sum::<f64>() / count as f64
}

/// Quantile of ascending values, interpolated between neighbours.
fn quantile(ascending: &[f64], at: f64) -> f64 {
    let place = at * (ascending.len() - 1) as f64;
    let (lower, part) = (place.floor() as usize, place.fract());
    let upper = (lower + 1).min(ascending.len() - 1);
    ascending[lower] + part * (ascending[upper] - ascending[lower])
}
