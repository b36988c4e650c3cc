//! Which tokens of a distribution may be drawn: top-k, top-p and min-p, without sorting the vocabulary.
//!
//! Tokens are ranked by weight, equal ones by index. Every filter keeps a prefix of that order, so the kept set is known by
//! its last member. A histogram over the leading bits of the weights finds the place; only the weights of one bucket are
//! sorted.

use crate::softmax::BLOCK;

/// What may be drawn of a row. The order is that of most programs: the k most probable first, then the nucleus of what is
/// left, renormalised, then the least share of the most probable token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Filters {
    /// Most probable tokens kept; 0 is off.
    pub top_k: u32,
    /// Smallest set with this probability, above 0; 1 is off.
    pub top_p: f64,
    /// Least probability relative to the most probable token; 0 is off.
    pub min_p: f64,
}

impl Filters {
    /// Everything may be drawn.
    pub const OFF: Self = Self { top_k: 0, top_p: 1.0, min_p: 0.0 };

    /// Whether anything may be cut off.
    #[must_use]
    pub fn cut(&self) -> bool {
        self.top_k != 0 || self.top_p < 1.0 || self.min_p > 0.0
    }
}

/// Weights that share their exponent and the first three bits of their fraction are in one bucket.
const SHIFT: u32 = 20;

/// Buckets of the weights from 0 to 1.
const BUCKETS: usize = (1.0f32.to_bits() >> SHIFT) as usize + 1;

/// Room to find the kept tokens of a row in.
#[derive(Debug)]
pub(crate) struct Scratch {
    counts: Vec<u32>,
    masses: Vec<f64>,
    bucket: Vec<f32>,
}

impl Scratch {
    pub(crate) fn new() -> Self {
        Self { counts: vec![0; BUCKETS], masses: vec![0.0; BUCKETS], bucket: Vec::new() }
    }
}

/// The last kept tokens: all that weigh more are kept, and the first `equal` of those that weigh the same.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Last {
    weight: f32,
    equal: usize,
}

/// Sets the weights that `filters` cut off to zero. Returns the sum of what is left of each [`BLOCK`] of `weights`.
///
/// `weights`: exponentials of logits less their maximum, so the largest is 1.
pub(crate) fn keep(weights: &mut [f32], filters: &Filters, scratch: &mut Scratch) -> Vec<f64> {
    let mut last = Last { weight: 0.0, equal: 0 };
    if filters.top_k != 0 || filters.top_p < 1.0 {
        scratch.fill(weights);
        let mut kept: (usize, f64) = (usize::MAX, scratch.masses.iter().sum());
        if filters.top_k != 0 {
            let most = filters.top_k as usize;
            (last, kept) = scratch.prefix(weights, |count, _| count >= most);
        }
        if filters.top_p < 1.0 {
            let most = kept.0;
            let mass = filters.top_p * kept.1;
            // The first always stays, whatever rounding makes of a small nucleus.
            (last, _) = scratch.prefix(weights, |count, before| count > 0 && (count >= most || before >= mass));
        }
    }
    let least = filters.min_p as f32;
    let mut equal = last.equal;
    let sum = |block: &mut [f32]| {
        let mut sum = 0.0;
        for weight in block {
            let mut stays = *weight > last.weight;
            if *weight == last.weight && equal > 0 {
                equal -= 1;
                stays = true;
            }
            if stays && *weight >= least {
                sum += f64::from(*weight);
            } else {
                *weight = 0.0;
            }
        }
        sum
    };
    weights.chunks_mut(BLOCK).map(sum).collect()
}

fn bucket_of(weight: f32) -> usize {
    ((weight.to_bits() >> SHIFT) as usize).min(BUCKETS - 1)
}

impl Scratch {
    fn fill(&mut self, weights: &[f32]) {
        self.counts.fill(0);
        self.masses.fill(0.0);
        for weight in weights {
            let bucket = bucket_of(*weight);
            // Weights that underflowed can never be drawn, and would make the lowest bucket as large as the vocabulary.
            self.counts[bucket] += u32::from(*weight > 0.0);
            self.masses[bucket] += f64::from(*weight);
        }
    }

    /// The longest prefix of the ranking whose members all come before `full` is true of the number and the weight of
    /// those ahead of them; and its number and weight. The last is 0 when it is never full.
    fn prefix(&mut self, weights: &[f32], full: impl Fn(usize, f64) -> bool) -> (Last, (usize, f64)) {
        let mut count = 0;
        let mut mass = 0.0;
        for bucket in (0..BUCKETS).rev().filter(|bucket| self.counts[*bucket] > 0).collect::<Vec<_>>() {
            let with_bucket = (count + self.counts[bucket] as usize, mass + self.masses[bucket]);
            if !full(with_bucket.0, with_bucket.1) {
                (count, mass) = with_bucket;
                continue;
            }
            self.bucket.clear();
            self.bucket.extend(weights.iter().filter(|weight| **weight > 0.0 && bucket_of(**weight) == bucket));
            self.bucket.sort_unstable_by(|a, b| b.total_cmp(a));
            let mut last = Last { weight: f32::INFINITY, equal: 0 };
            for &weight in &self.bucket {
                if full(count, mass) {
                    break;
                }
                last = Last { weight, equal: if weight == last.weight { last.equal + 1 } else { 1 } };
                count += 1;
                mass += f64::from(weight);
            }
            if last.equal == 0 {
                // Nothing of this bucket: everything above it.
                last.weight = self.bucket[0];
            }
            return (last, (count, mass));
        }
        (Last { weight: 0.0, equal: 0 }, (count, mass))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kept set by sorting everything.
    fn sorted(weights: &[f32], filters: &Filters) -> Vec<bool> {
        let mut order: Vec<usize> = (0..weights.len()).collect();
        order.sort_by(|a, b| weights[*b].total_cmp(&weights[*a]).then(a.cmp(b)));
        let most = if filters.top_k == 0 { order.len() } else { filters.top_k as usize };
        let total: f64 = order.iter().take(most).map(|place| f64::from(weights[*place])).sum();
        let mut kept = vec![false; weights.len()];
        let mut before = 0.0;
        for (rank, place) in order.into_iter().enumerate() {
            let weight = f64::from(weights[place]);
            let nucleus = rank == 0 || filters.top_p >= 1.0 || before < filters.top_p * total;
            kept[place] = rank < most && nucleus && weight >= filters.min_p && weight > 0.0;
            before += weight;
        }
        kept
    }

    #[test]
    fn the_kept_set_is_that_of_a_sort() {
        // Few values, so that many are equal; then many.
        for (seed, values) in [(1u64, 7u64), (2, 1 << 40)] {
            let mut state = seed;
            let mut next = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 20) % values
            };
            let mut weights: Vec<f32> = (0..3_000).map(|_| (-(next() as f32) / values as f32 * 12.0).exp()).collect();
            weights[17] = 1.0;
            weights[40..60].fill(0.0);
            for top_k in [0, 1, 2, 50, 1_500, 5_000] {
                for top_p in [1e-9, 0.3, 0.9, 0.999, 1.0] {
                    for min_p in [0.0, 0.01, 0.5] {
                        let filters = Filters { top_k, top_p, min_p };
                        let mut kept = weights.clone();
                        let sums = keep(&mut kept, &filters, &mut Scratch::new());
                        let expected = sorted(&weights, &filters);
                        for (place, stays) in expected.into_iter().enumerate() {
                            let wanted = if stays { weights[place] } else { 0.0 };
                            assert_eq!(kept[place], wanted, "{filters:?}: token {place} of weight {}", weights[place]);
                        }
                        let total: f64 = kept.iter().map(|weight| f64::from(*weight)).sum();
                        assert!((sums.iter().sum::<f64>() - total).abs() < 1e-9 && total >= 1.0);
                    }
                }
            }
        }
    }
}
