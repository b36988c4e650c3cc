use crate::LabelWeights;

/// Weights of the two halves of a sequence's cross entropy, with its label multiplied in. The loss is `-right ln
/// sigmoid(score) - wrong ln (1 - sigmoid(score))`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Halves {
    pub(crate) right: f64,
    pub(crate) wrong: f64,
}

impl Halves {
    fn plain(label: f64) -> Self {
        Self { right: label, wrong: 1.0 - label }
    }

    /// Sum of both halves; for labels of 0 and 1 the weight of the sequence.
    pub(crate) fn sum(self) -> f64 {
        self.right + self.wrong
    }
}

/// Computes the weighted labels of one group.
pub(crate) fn weighted(mode: LabelWeights, labels: &[f64]) -> Vec<Halves> {
    match mode {
        LabelWeights::None => labels.iter().copied().map(Halves::plain).collect(),
        LabelWeights::Question => balanced(labels),
        LabelWeights::OnlyPositive => only(labels, 1.0),
        LabelWeights::OnlyNegative => only(labels, 0.0),
    }
}

/// Weighs the right part of each label by `n / (2 sum y)` and the wrong part by `n / (2 sum (1 - y))`, so both have the
/// same total in a group. If all labels are 0, or all 1, there is nothing to balance and every weight is 1.
///
/// Counting equal labels instead of summing them gives the same weights for labels of 0 and 1, but wrong ones for
/// labels between them: of seven labels of 0.2 and one of 0.4, the rare one would weigh seven times as much, its larger
/// wrong part included, and the best answer would be pushed down.
fn balanced(labels: &[f64]) -> Vec<Halves> {
    let n = labels.len() as f64;
    let right: f64 = labels.iter().sum();
    let wrong: f64 = labels.iter().map(|label| 1.0 - label).sum();
    if right == 0.0 || wrong == 0.0 {
        return labels.iter().copied().map(Halves::plain).collect();
    }
    let halves = |&label: &f64| Halves { right: n * label / (2.0 * right), wrong: n * (1.0 - label) / (2.0 * wrong) };
    labels.iter().map(halves).collect()
}

fn only(labels: &[f64], wanted: f64) -> Vec<Halves> {
    let halves = |&label: &f64| if label == wanted { Halves::plain(label) } else { Halves::default() };
    labels.iter().map(halves).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sums(mode: LabelWeights, labels: &[f64]) -> Vec<f64> {
        weighted(mode, labels).into_iter().map(Halves::sum).collect()
    }

    #[test]
    fn balanced_weights_give_right_and_wrong_the_same_total() {
        assert_eq!(sums(LabelWeights::Question, &[1.0, 0.0, 0.0, 0.0]), [2.0, 2.0 / 3.0, 2.0 / 3.0, 2.0 / 3.0]);
        assert_eq!(sums(LabelWeights::Question, &[1.0, 1.0]), [1.0, 1.0]);
        assert_eq!(sums(LabelWeights::Question, &[0.0, -0.0]), [1.0, 1.0], "both zeros are the same label");
        let soft = weighted(LabelWeights::Question, &[0.2, 0.2, 0.4, 0.0]);
        let total = |part: fn(&Halves) -> f64| soft.iter().map(part).sum::<f64>();
        assert!((total(|halves| halves.right) - 2.0).abs() < 1e-12);
        assert!((total(|halves| halves.wrong) - 2.0).abs() < 1e-12);
    }

    #[test]
    fn one_sided_weights_ignore_fractional_labels() {
        assert_eq!(sums(LabelWeights::OnlyPositive, &[1.0, 0.5, 0.0]), [1.0, 0.0, 0.0]);
        assert_eq!(sums(LabelWeights::OnlyNegative, &[1.0, 0.5, 0.0]), [0.0, 0.0, 1.0]);
    }
}
