/// The unbiased estimate of pass@k for every `k` from 1 to `samples`, at index `k - 1`, of one problem of whose `samples` answers
/// `right` were right: `1 - C(n - c, k) / C(n, k)` (Chen et al. 2021).
///
/// Binomial coefficients overflow float64 from `n` = 1030 on, and `1 - q` loses the digits of small values, so neither is formed:
/// with `q(k)` the chance that `k` answers are all wrong, `q(k) - q(k + 1) = q(k) · c / (n - k)`, and pass@k is the sum of these
/// terms, all of them positive.
///
/// # Panics
///
/// With more right answers than answers.
#[must_use]
pub fn pass_curve(samples: usize, right: usize) -> Vec<f64> {
    assert!(right <= samples, "{right} of {samples} answers are right");
    let mut curve = Vec::with_capacity(samples);
    let (mut pass, mut all_wrong) = (0.0_f64, 1.0_f64);
    for drawn in 0..samples {
        let left = (samples - drawn) as f64;
        pass += all_wrong * right as f64 / left;
        all_wrong *= (samples - drawn).saturating_sub(right) as f64 / left;
        // From here on one of them is right for certain, whatever rounding made of the sum.
        curve.push(if drawn + right >= samples { 1.0 } else { pass.min(1.0) });
    }
    curve
}

/// The unbiased estimate of pass@k of one problem; none where `k` is 0 or more than the answers that there are.
#[must_use]
pub fn pass_at(k: usize, samples: usize, right: usize) -> Option<f64> {
    pass_curve(samples, right).get(k.checked_sub(1)?).copied()
}

/// The powers of two up to `most`, and `most` itself: the `k` that tables and plots show.
#[must_use]
pub fn powers_of_two(most: usize) -> Vec<usize> {
    let mut ks: Vec<usize> =
        std::iter::successors(Some(1_usize), |k| k.checked_mul(2)).take_while(|k| *k < most).collect();
    if most > 0 {
        ks.push(most);
    }
    ks
}
