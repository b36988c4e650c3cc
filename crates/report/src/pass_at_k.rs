/// Returns the unbiased estimate of pass@k of one problem for every `k` from 1 to `samples`, at index `k - 1`, given
/// that `right` of its `samples` answers were right: `1 - C(n - c, k) / C(n, k)` (Chen et al. 2021).
///
/// Binomial coefficients overflow float64 from `n` = 1030 on, and `1 - q` loses the digits of small values, so neither
/// is formed. With `q(k)` the probability that `k` answers are all wrong, `q(k) - q(k + 1) = q(k) · c / (n - k)`;
/// pass@k is the sum of these terms, all of them positive.
///
/// # Panics
///
/// When `right` exceeds `samples`.
#[must_use]
pub fn pass_curve(samples: usize, right: usize) -> Vec<f64> {
    assert!(right <= samples, "{right} of {samples} answers are right");
    let mut curve = Vec::with_capacity(samples);
    let (mut pass, mut all_wrong) = (0.0_f64, 1.0_f64);
    for drawn in 0..samples {
        let left = (samples - drawn) as f64;
        pass += all_wrong * right as f64 / left;
        all_wrong *= (samples - drawn).saturating_sub(right) as f64 / left;
        // From here on one answer is right for certain, whatever the rounding of the sum.
        curve.push(if drawn + right >= samples { 1.0 } else { pass.min(1.0) });
    }
    curve
}

/// Returns the unbiased estimate of pass@k of one problem; `None` if `k` is 0 or exceeds the number of answers.
#[must_use]
pub fn pass_at(k: usize, samples: usize, right: usize) -> Option<f64> {
    pass_curve(samples, right).get(k.checked_sub(1)?).copied()
}

/// Returns the `k` that tables and plots show: the powers of two up to `most`, and `most` itself.
#[must_use]
pub fn powers_of_two(most: usize) -> Vec<usize> {
    let mut ks: Vec<usize> =
        std::iter::successors(Some(1_usize), |k| k.checked_mul(2)).take_while(|k| *k < most).collect();
    if most > 0 {
        ks.push(most);
    }
    ks
}
