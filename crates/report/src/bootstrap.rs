use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore as _, SeedableRng as _};
use serde::{Deserialize, Serialize};

/// A number and the range that it lies in, with a confidence of 95 %.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// The estimate from all of the data.
    pub mean: f64,
    /// The lower end.
    pub low: f64,
    /// The upper end.
    pub high: f64,
}

/// How much larger one mean is than another, over the same problems or seeds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// First minus second.
    #[serde(flatten)]
    pub interval: Interval,
    /// Two-sided: the chance of a difference at least as clear where there is none. Never below `2 / (draws + 1)`.
    pub p_value: f64,
}

/// Resampling with replacement. The units that are drawn (problems, or seeds) are what the result is to hold for in general; answers to
/// one problem are no units, for they are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bootstrap {
    /// Resamples; at least 1.
    pub draws: usize,
    /// Two calls with one seed and one number of units see the same resamples, so columns of a table move together.
    pub seed: u64,
}

impl Default for Bootstrap {
    fn default() -> Self {
        Self { draws: 10_000, seed: 1 }
    }
}

impl Bootstrap {
    /// The percentile interval of any statistic of `units` units: `statistic` is given the indices that were drawn, and once all of
    /// them in order for the estimate itself. None without units, or where the statistic of all units is not finite.
    pub fn interval(&self, units: usize, statistic: impl Fn(&[usize]) -> f64) -> Option<Interval> {
        let (mean, drawn) = self.resample(units, statistic)?;
        Some(Interval { mean, low: quantile(&drawn, 0.025), high: quantile(&drawn, 0.975) })
    }

    /// The mean of the values and its interval, resampling values.
    #[must_use]
    pub fn mean(&self, values: &[f64]) -> Option<Interval> {
        self.interval(values.len(), |drawn| mean_of(drawn.iter().map(|index| values[*index]), drawn.len()))
    }

    /// The mean of `first - second`, resampling pairs: what both find hard or easy cancels, so it sees smaller differences than two
    /// intervals that overlap. None where there are no pairs.
    ///
    /// # Panics
    ///
    /// With slices of different lengths.
    #[must_use]
    pub fn paired(&self, first: &[f64], second: &[f64]) -> Option<Difference> {
        assert_eq!(first.len(), second.len(), "pairs need both halves");
        let (mean, drawn) = self.resample(first.len(), |drawn| {
            mean_of(drawn.iter().map(|index| first[*index] - second[*index]), drawn.len())
        })?;
        let interval = Interval { mean, low: quantile(&drawn, 0.025), high: quantile(&drawn, 0.975) };
        // One is added to each count: a resample that was not drawn is no proof that there is none.
        let share = |count: usize| (count + 1) as f64 / (drawn.len() + 1) as f64;
        let (below, above) =
            (drawn.partition_point(|value| *value < 0.0), drawn.partition_point(|value| *value <= 0.0));
        let p_value = (2.0 * share(above).min(share(drawn.len() - below))).min(1.0);
        Some(Difference { interval, p_value })
    }

    /// The statistic of all units and, in ascending order, of each resample.
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

/// A number below `bound`. The bias of the multiplication is below 2^-40 for any number of units that fits into memory.
pub(crate) fn below(random: &mut ChaCha8Rng, bound: usize) -> usize {
    ((u128::from(random.next_u64()) * bound as u128) >> 64) as usize
}

fn mean_of(values: impl Iterator<Item = f64>, count: usize) -> f64 {
    values.sum::<f64>() / count as f64
}

/// Of ascending values, interpolated between neighbours.
fn quantile(ascending: &[f64], at: f64) -> f64 {
    let place = at * (ascending.len() - 1) as f64;
    let (lower, part) = (place.floor() as usize, place.fract());
    let upper = (lower + 1).min(ascending.len() - 1);
    ascending[lower] + part * (ascending[upper] - ascending[lower])
}
