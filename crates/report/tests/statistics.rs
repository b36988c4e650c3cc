//! The estimators against exact rational arithmetic, enumeration of all subsets, and tables.

use num_bigint::BigInt;
use num_rational::BigRational;
use num_traits::ToPrimitive as _;
use pacs_report::{Bootstrap, Votes, majority, pass_at, pass_curve, powers_of_two, sign_flip, student};
use proptest::prelude::*;

fn binomial(n: usize, k: usize) -> BigInt {
    if k > n {
        return BigInt::ZERO;
    }
    (0..k).fold(BigInt::from(1), |product, at| product * BigInt::from(n - at) / BigInt::from(at + 1))
}

/// `1 - C(n - c, k) / C(n, k)`, without rounding.
fn exact_pass(n: usize, c: usize, k: usize) -> f64 {
    let ratio = BigRational::new(binomial(n, k) - binomial(n - c, k), binomial(n, k));
    ratio.to_f64().expect("a probability is a float")
}

#[test]
fn pass_at_k_agrees_with_exact_arithmetic_up_to_1024_samples() {
    for n in [1_usize, 2, 3, 7, 8, 64, 129, 1024] {
        for c in [0, 1, 2, 3, n / 3, n / 2, n.saturating_sub(2), n - 1, n].into_iter().filter(|c| *c <= n) {
            let curve = pass_curve(n, c);
            assert_eq!(curve.len(), n);
            for k in powers_of_two(n).into_iter().chain([3, 5, n / 2, n - 1]).filter(|k| (1..=n).contains(k)) {
                let (ours, exact) = (curve[k - 1], exact_pass(n, c, k));
                assert!((ours - exact).abs() <= 1e-12 * exact, "n {n}, c {c}, k {k}: {ours} is not {exact}");
            }
        }
    }
}

#[test]
fn pass_at_k_is_the_share_of_subsets_with_a_right_answer() {
    for n in 1..=9_usize {
        for c in 0..=n {
            for k in 1..=n {
                let subsets: Vec<u32> = (0..1_u32 << n).filter(|bits| bits.count_ones() as usize == k).collect();
                let right = subsets.iter().filter(|bits| **bits & ((1 << c) - 1) != 0).count();
                let share = right as f64 / subsets.len() as f64;
                assert!((pass_at(k, n, c).unwrap() - share).abs() < 1e-14, "n {n}, c {c}, k {k}");
            }
        }
    }
}

#[test]
fn pass_at_k_has_no_value_for_more_answers_than_there_are() {
    assert_eq!([pass_at(0, 4, 2), pass_at(5, 4, 2), pass_at(1, 0, 0)], [None; 3]);
    assert_eq!(
        [powers_of_two(0), powers_of_two(1), powers_of_two(6), powers_of_two(8)],
        [vec![], vec![1], vec![1, 2, 4, 6], vec![1, 2, 4, 8]]
    );
}

/// Expected correctness of the majority over all subsets of `k` answers, by enumeration.
fn enumerated(votes: &Votes, k: usize) -> f64 {
    let mut classes: Vec<Option<usize>> = vec![None; votes.silent];
    for (index, class) in votes.classes.iter().enumerate() {
        classes.extend(std::iter::repeat_n(Some(index), class.0));
    }
    let subsets: Vec<u32> = (0..1_u32 << classes.len()).filter(|bits| bits.count_ones() as usize == k).collect();
    let total: f64 = subsets
        .iter()
        .map(|bits| {
            let mut counts = vec![0; votes.classes.len()];
            for (at, class) in classes.iter().enumerate() {
                if let Some(class) = class
                    && bits >> at & 1 == 1
                {
                    counts[*class] += 1;
                }
            }
            let most = counts.iter().copied().max().unwrap_or(0);
            let winners: Vec<usize> = (0..counts.len()).filter(|class| most > 0 && counts[*class] == most).collect();
            winners.iter().map(|class| votes.classes[*class].1).sum::<f64>() / winners.len().max(1) as f64
        })
        .sum();
    total / subsets.len() as f64
}

proptest! {
    #[test]
    fn the_majority_is_that_of_all_subsets(
        classes in prop::collection::vec((0_usize..4, prop::sample::select(vec![0.0, 0.5, 1.0])), 0..5),
        silent in 0_usize..3,
    ) {
        let votes = Votes { classes, silent };
        for k in 1..=votes.samples() {
            let (ours, exact) = (majority(&votes, k).unwrap(), enumerated(&votes, k));
            prop_assert!((ours - exact).abs() < 1e-12, "{votes:?}, k {k}: {ours} is not {exact}");
        }
    }

    #[test]
    fn a_curve_of_pass_at_k_rises_and_its_first_value_is_the_share(n in 1_usize..200, c in 0_usize..200) {
        let c = c.min(n);
        let curve = pass_curve(n, c);
        prop_assert!((curve[0] - c as f64 / n as f64).abs() < 1e-15);
        prop_assert!(curve.windows(2).all(|pair| pair[0] <= pair[1]));
        prop_assert!(curve.iter().all(|value| (0.0..=1.0).contains(value)));
    }

    #[test]
    fn one_answer_is_its_own_majority(counts in prop::collection::vec(1_usize..40, 1..8), silent in 0_usize..40) {
        let votes = Votes { classes: counts.iter().enumerate().map(|(at, n)| (*n, f64::from(u8::from(at == 0)))).collect(), silent };
        let share = counts[0] as f64 / votes.samples() as f64;
        prop_assert!((majority(&votes, 1).unwrap() - share).abs() < 1e-12);
    }
}

#[test]
fn a_majority_of_a_thousand_answers_neither_overflows_nor_vanishes() {
    let votes = Votes { classes: vec![(400, 1.0), (300, 0.0), (200, 0.0)], silent: 124 };
    let ks = [1, 8, 64, 512];
    let chances: Vec<f64> = ks.iter().map(|k| majority(&votes, *k).unwrap()).collect();
    assert!(chances.windows(2).all(|pair| pair[0] < pair[1]), "{chances:?}");
    assert!((chances[0] - 400.0 / 1024.0).abs() < 1e-10, "{chances:?}");
    assert!(chances[3] > 0.999, "{chances:?}");
    assert_eq!(majority(&votes, 1024), Some(1.0));
    assert_eq!(majority(&votes, 1025), None);
}

#[test]
fn an_interval_of_the_bootstrap_covers_the_mean_it_was_drawn_from() {
    // A linear congruential generator: the test needs numbers that are the same everywhere, not good ones.
    let mut state = 12_345_u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 11) as f64 / (1_u64 << 53) as f64
    };
    let bootstrap = Bootstrap { draws: 400, seed: 3 };
    let trials = 400;
    let covered = (0..trials)
        .filter(|_| {
            let values: Vec<f64> = (0..60).map(|_| if uniform() < 0.3 { 1.0 } else { 0.0 }).collect();
            let interval = bootstrap.mean(&values).unwrap();
            interval.low <= 0.3 && 0.3 <= interval.high
        })
        .count();
    // Of 400 intervals that each cover with 0.94 (60 draws, percentiles), 360 is more than three standard deviations below.
    assert!((360..=396).contains(&covered), "{covered} of {trials} intervals cover");
}

#[test]
fn pairs_see_what_overlapping_intervals_do_not() {
    let hard: Vec<f64> = (0..40).map(|at| f64::from(at) / 40.0).collect();
    let better: Vec<f64> = hard.iter().enumerate().map(|(at, value)| value + 0.02 + 0.01 * (at % 2) as f64).collect();
    let bootstrap = Bootstrap::default();
    let (first, second) = (bootstrap.mean(&better).unwrap(), bootstrap.mean(&hard).unwrap());
    assert!(first.low < second.high, "the intervals overlap");
    let difference = bootstrap.paired(&better, &hard).unwrap();
    assert!(difference.interval.low > 0.0 && difference.p_value < 0.001, "{difference:?}");
    assert_eq!(bootstrap.paired(&hard, &hard).unwrap().p_value, 1.0);
    let back = bootstrap.paired(&hard, &better).unwrap();
    assert!((back.interval.mean + difference.interval.mean).abs() < 1e-15 && back.p_value == difference.p_value);
    assert_eq!(bootstrap.mean(&[]), None);
    assert_eq!(bootstrap.mean(&[0.1, 0.4, 0.7]), bootstrap.mean(&[0.1, 0.4, 0.7]));
}

#[test]
fn students_interval_agrees_with_the_table() {
    // 97.5 % points: 12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.0452 for 1, 2, 3, 4, 5, 29 degrees of freedom.
    for (count, point) in [(2_usize, 12.7062), (3, 4.3027), (4, 3.1824), (5, 2.7764), (6, 2.5706), (30, 2.0452)] {
        let values: Vec<f64> = (0..count).map(|at| at as f64).collect();
        let mean = (count - 1) as f64 / 2.0;
        let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (count - 1) as f64;
        let interval = student(&values).unwrap();
        let half = (interval.high - interval.low) / 2.0;
        assert!((half / (variance / count as f64).sqrt() - point).abs() < 1e-4, "{count}: {interval:?}");
        assert!((interval.mean - mean).abs() < 1e-12);
    }
    assert_eq!(student(&[1.0]), None);
    assert_eq!(student(&[1.0, f64::NAN]), None);
}

#[test]
fn flipped_signs_give_the_p_value_of_all_assignments() {
    // Five differences of one sign: 2 of 32 assignments are as far from zero.
    assert_eq!(sign_flip(&[0.1, 0.2, 0.3, 0.1, 0.05]), Some(2.0 / 32.0));
    assert_eq!(sign_flip(&[0.1, -0.1]), Some(1.0));
    assert_eq!(sign_flip(&[0.0; 4]), Some(1.0));
    assert_eq!(sign_flip(&[]), None);
    // Exact and random assignments agree where both are possible: 3, -1 of ones repeated.
    let many: Vec<f64> = (0..40).map(|at| if at % 4 == 0 { -1.0 } else { 1.0 }).collect();
    // 30 of 40 or more of one sign: 2 · P(Bin(40, 1/2) >= 30) = 0.002222.
    let p = sign_flip(&many).unwrap();
    assert!((p - 0.002_222).abs() < 6e-4, "{p}");
}
