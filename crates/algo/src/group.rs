use std::collections::BTreeMap;

use crate::Sequence;

/// Collects the positions of each group's members, groups by id, members in an order that depends on
/// their values alone.
///
/// Floating-point sums depend on their order. This order does not depend on that of the input, so neither does any bit
/// of the result: ranks may gather the sequences in any order.
pub(crate) fn members_by_group(sequences: &[Sequence]) -> BTreeMap<u64, Vec<usize>> {
    let mut groups: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
    for (index, sequence) in sequences.iter().enumerate() {
        groups.entry(sequence.group).or_default().push(index);
    }
    for members in groups.values_mut() {
        // By content and not by index: sums over a group then have one order, whichever rank or pass a member came from.
        members.sort_by(|&a, &b| {
            let a = &sequences[a];
            let b = &sequences[b];
            (a.new_logprob_sum.total_cmp(&b.new_logprob_sum))
                .then(a.old_logprob_sum.total_cmp(&b.old_logprob_sum))
                .then(a.label.total_cmp(&b.label))
                .then(a.tokens.cmp(&b.tokens))
        });
    }
    groups
}

/// Subtracts the mean of all values from each; exactly 0 everywhere if the values are equal.
///
/// The mean is that of the distances to the first value: a plain mean of equal values may differ from them in the last
/// bit, and the learner skips the backward of sequences whose gradient is exactly 0.
pub(crate) fn centred(values: &[f64]) -> Vec<f64> {
    let Some(&pivot) = values.first() else { return Vec::new() };
    let mean = values.iter().map(|value| value - pivot).sum::<f64>() / values.len() as f64;
    values.iter().map(|value| (value - pivot) - mean).collect()
}

/// Mean of `values`; 0 of none. Equal values have exactly their value as mean, as in [`centred`].
pub(crate) fn mean_of(values: &[f64]) -> f64 {
    let Some(&pivot) = values.first() else { return 0.0 };
    pivot + values.iter().map(|value| value - pivot).sum::<f64>() / values.len() as f64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn equal_values_have_no_deviation(value in -1e6..1e6f64, n in 1usize..20) {
            prop_assert!(centred(&vec![value; n]).iter().all(|&deviation| deviation == 0.0));
            prop_assert_eq!(mean_of(&vec![value; n]), value);
        }

        #[test]
        fn deviations_sum_to_zero_and_keep_distances(values in prop::collection::vec(-1e3..1e3f64, 1..20)) {
            let deviations = centred(&values);
            prop_assert!(deviations.iter().sum::<f64>().abs() < 1e-9);
            for (value, deviation) in values.iter().zip(&deviations) {
                prop_assert!(((value - values[0]) - (deviation - deviations[0])).abs() < 1e-9);
            }
        }
    }
}
