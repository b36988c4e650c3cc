/// Unbiased estimate of the chance that at least one of `k` answers is correct, from `n` answers of which `correct`
/// are: `1 - C(n - correct, k) / C(n, k)` (Chen et al. 2021). A `k` above `n` counts as `n`.
///
/// Exact to a few roundings for any size: no factorial is formed, and small chances keep their digits.
#[must_use]
pub fn pass_at_k(n: u64, correct: u64, k: u64) -> f64 {
    let (correct, k) = (correct.min(n), k.min(n));
    // The ratio is symmetric in `correct` and `k`: it is a product over the smaller of factors in the larger.
    let (fewer, more) = (correct.min(k), correct.max(k));
    let ln_all_wrong: f64 = (0..fewer).map(|i| (-(more as f64) / (n - i) as f64).max(-1.0).ln_1p()).sum();
    // Adding 0 turns the -0 of an empty product into 0.
    -ln_all_wrong.exp_m1() + 0.0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn known_values() {
        assert_eq!(pass_at_k(10, 0, 5), 0.0);
        assert_eq!(pass_at_k(10, 3, 0), 0.0);
        assert_eq!(pass_at_k(10, 10, 1), 1.0);
        assert_eq!(pass_at_k(10, 6, 5), 1.0, "five draws cannot all be among four wrong answers");
        assert_eq!(pass_at_k(4, 1, 9), 1.0, "k above n counts as n");
        assert_eq!(pass_at_k(0, 0, 1), 0.0);
        let (n, c) = (128, 37);
        assert!((pass_at_k(n, c, 1) - c as f64 / n as f64).abs() < 1e-15);
        // 1 - C(7, 2) / C(10, 2) = 1 - 21 / 45.
        assert!((pass_at_k(10, 3, 2) - 24.0 / 45.0).abs() < 1e-15);
        let tiny = pass_at_k(1 << 40, 1, 1) * (1u64 << 40) as f64;
        assert!((tiny - 1.0).abs() < 1e-14, "{tiny}");
    }

    /// The definition: the share of the `k`-subsets of `n` answers, the first `correct` right, that hold a right one.
    fn counted(n: u64, correct: u64, k: u64) -> f64 {
        let subsets: Vec<u32> = (0u32..1 << n).filter(|set| u64::from(set.count_ones()) == k).collect();
        let right = (1u32 << correct) - 1;
        subsets.iter().filter(|&set| set & right != 0).count() as f64 / subsets.len() as f64
    }

    proptest! {
        #[test]
        fn equals_the_share_of_subsets(n in 1u64..11, correct in 0u64..11, k in 0u64..11) {
            prop_assume!(correct <= n && k <= n);
            prop_assert!((pass_at_k(n, correct, k) - counted(n, correct, k)).abs() < 1e-14);
        }

        #[test]
        fn grows_with_k(n in 1u64..5000, correct in 0u64..5000, k in 1u64..500) {
            let (fewer, more) = (pass_at_k(n, correct, k), pass_at_k(n, correct, k + 1));
            prop_assert!((0.0..=1.0).contains(&fewer) && fewer <= more + 1e-12);
        }
    }
}
