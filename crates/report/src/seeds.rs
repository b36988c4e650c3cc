//! Intervals and tests for a handful of values, such as the seeds of a study. Resampling five values gives intervals
//! that are a third too narrow, and p-values that five values cannot support.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore as _, SeedableRng as _};

use crate::Interval;

/// Up to this many differences, all sign assignments are enumerated; beyond, random ones are drawn.
const MOST_EXACT: usize = 16;
const RANDOM_SIGNS: usize = 100_000;

/// Returns the mean of a few values with Student's 95 % interval; `None` for fewer than two values, or if one
/// is not finite.
#[must_use]
pub fn student(values: &[f64]) -> Option<Interval> {
    if values.len() < 2 || values.iter().any(|value| !value.is_finite()) {
        return None;
    }
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (count - 1.0);
    let half = critical(values.len() - 1) * (variance / count).sqrt();
    Some(Interval { mean, low: mean - half, high: mean + half })
}

/// Returns the two-sided p-value of paired differences under the null hypothesis that their signs are exchangeable: the
/// share of sign assignments with a mean at least as far from zero. Exact up to 16 differences; `n` of them cannot give
/// less than `2^(1 - n)`. `None` without differences, or if one is not finite.
#[must_use]
pub fn sign_flip(differences: &[f64]) -> Option<f64> {
    if differences.is_empty() || differences.iter().any(|value| !value.is_finite()) {
        return None;
    }
    let scale: f64 = differences.iter().map(|value| value.abs()).sum();
    // Sums of the same numbers in another order differ in their last bits, and must count as ties.
    let seen = differences.iter().sum::<f64>().abs() - 1e-12 * scale;
    let as_far = |signs: &dyn Fn(usize) -> bool| {
        let sum: f64 = differences.iter().enumerate().map(|(at, value)| if signs(at) { -value } else { *value }).sum();
        sum.abs() >= seen
    };
    if differences.len() <= MOST_EXACT {
        let all = 1_u32 << differences.len();
        let far = (0..all).filter(|bits| as_far(&|at| bits >> at & 1 == 1)).count();
        return Some(far as f64 / f64::from(all));
    }
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let mut far = 1;
    for _ in 0..RANDOM_SIGNS {
        let words: Vec<u64> = (0..differences.len().div_ceil(64)).map(|_| random.next_u64()).collect();
        far += usize::from(as_far(&|at| words[at / 64] >> (at % 64) & 1 == 1));
    }
    Some(far as f64 / (RANDOM_SIGNS + 1) as f64)
}

/// 97.5 % point of Student's distribution, by bisection.
fn critical(freedom: usize) -> f64 {
    let (mut low, mut high) = (0.0, 20.0);
    for _ in 0..80 {
        let middle = f64::midpoint(low, high);
        if within(middle, freedom) < 0.95 { low = middle } else { high = middle }
    }
    f64::midpoint(low, high)
}

/// Probability of a value within `±t`: the closed sums for integer degrees of freedom (Abramowitz and Stegun,
/// 26.7.3 and 26.7.4).
fn within(t: f64, freedom: usize) -> f64 {
    let angle = (t / (freedom as f64).sqrt()).atan();
    let (sine, cosine) = angle.sin_cos();
    let odd = freedom % 2 == 1;
    let mut term = if odd { cosine } else { 1.0 };
    let mut sum = if freedom == 1 { 0.0 } else { term };
    let mut at = usize::from(odd);
    while at + 4 <= freedom {
        at += 2;
        term *= cosine * cosine * (at - 1) as f64 / at as f64;
        sum += term;
    }
    if odd { std::f64::consts::FRAC_2_PI * (angle + sine * sum) } else { sine * sum }
}
