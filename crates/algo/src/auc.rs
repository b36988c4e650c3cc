/// Computes the area under the ROC curve: the probability that a positive scores above a negative, with
/// ties counting half.
///
/// Returns `None` if one of the labels is missing or a score is NaN.
///
/// # Panics
///
/// When the slices differ in length.
#[must_use]
pub fn auc(scores: &[f64], labels: &[bool]) -> Option<f64> {
    assert_eq!(scores.len(), labels.len(), "every score has a label");
    if scores.iter().any(|score| score.is_nan()) {
        return None;
    }
    let mut pairs: Vec<(f64, bool)> = scores.iter().copied().zip(labels.iter().copied()).collect();
    pairs.sort_by(|a, b| a.0.total_cmp(&b.0));
    // Pairs are counted twice over, so that a tie (half a pair) stays an integer.
    let mut twice_won: u128 = 0;
    let mut positives = 0u128;
    let mut negatives = 0u128;
    for tied in pairs.chunk_by(|a, b| a.0 == b.0) {
        let tied_positives = tied.iter().filter(|pair| pair.1).count() as u128;
        let tied_negatives = tied.len() as u128 - tied_positives;
        twice_won += tied_positives * (2 * negatives + tied_negatives);
        positives += tied_positives;
        negatives += tied_negatives;
    }
    (positives > 0 && negatives > 0).then(|| twice_won as f64 / (2 * positives * negatives) as f64)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn known_values() {
        assert_eq!(auc(&[0.1, 0.9], &[false, true]), Some(1.0));
        assert_eq!(auc(&[0.9, 0.1], &[false, true]), Some(0.0));
        assert_eq!(auc(&[-0.0, 0.0], &[false, true]), Some(0.5), "both zeros are the same score");
        assert_eq!(auc(&[0.1, 0.9], &[true, true]), None);
        assert_eq!(auc(&[], &[]), None);
        assert_eq!(auc(&[f64::NAN, 0.9], &[false, true]), None);
    }

    proptest! {
        #[test]
        fn equals_the_share_of_pairs(items in prop::collection::vec((0u8..6, any::<bool>()), 0..30)) {
            let scores: Vec<f64> = items.iter().map(|item| f64::from(item.0)).collect();
            let labels: Vec<bool> = items.iter().map(|item| item.1).collect();
            let (mut won, mut pairs) = (0.0, 0.0);
            for (positive, _) in items.iter().filter(|item| item.1) {
                for (negative, _) in items.iter().filter(|item| !item.1) {
                    pairs += 1.0;
                    won += if positive > negative { 1.0 } else if positive == negative { 0.5 } else { 0.0 };
                }
            }
            prop_assert_eq!(auc(&scores, &labels), (pairs > 0.0).then(|| won / pairs));
        }
    }
}
