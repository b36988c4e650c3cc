use crate::LabelWeights;

/// Weights of the labels of one group.
pub(crate) fn weights(mode: LabelWeights, labels: &[f64]) -> Vec<f64> {
    match mode {
        LabelWeights::None => vec![1.0; labels.len()],
        LabelWeights::Question => balanced(labels),
        LabelWeights::OnlyPositive => indicator(labels, 1.0),
        LabelWeights::OnlyNegative => indicator(labels, 0.0),
    }
}

/// `n / (distinct labels * members with this label)`: every label value of the group gets the same total.
fn balanced(labels: &[f64]) -> Vec<f64> {
    let mut distinct = labels.to_vec();
    distinct.sort_by(f64::total_cmp);
    distinct.dedup();
    let share = labels.len() as f64 / distinct.len() as f64;
    labels.iter().map(|label| share / labels.iter().filter(|other| *other == label).count() as f64).collect()
}

fn indicator(labels: &[f64], wanted: f64) -> Vec<f64> {
    labels.iter().map(|&label| if label == wanted { 1.0 } else { 0.0 }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn balanced_weights_give_every_label_the_same_total() {
        assert_eq!(weights(LabelWeights::Question, &[1.0, 0.0, 0.0, 0.0]), [2.0, 2.0 / 3.0, 2.0 / 3.0, 2.0 / 3.0]);
        assert_eq!(weights(LabelWeights::Question, &[1.0, 1.0]), [1.0, 1.0]);
        assert_eq!(weights(LabelWeights::Question, &[0.0, -0.0]), [1.0, 1.0], "both zeros are the same label");
    }

    #[test]
    fn one_sided_weights_ignore_fractional_labels() {
        assert_eq!(weights(LabelWeights::OnlyPositive, &[1.0, 0.5, 0.0]), [1.0, 0.0, 0.0]);
        assert_eq!(weights(LabelWeights::OnlyNegative, &[1.0, 0.5, 0.0]), [0.0, 0.0, 1.0]);
    }
}
