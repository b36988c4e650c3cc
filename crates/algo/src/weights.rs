use crate::LabelWeights;

/// What the two halves of the cross entropy of one sequence weigh, its label included: the loss is
/// `-right ln sigmoid(score) - wrong ln (1 - sigmoid(score))`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Halves {
    pub(crate) right: f64,
    pub(crate) wrong: f64,
}

impl Halves {
    fn plain(label: f64) -> Self {
        Self { right: label, wrong: 1.0 - label }
    }

    /// Both together: the weight of the sequence where its label is 0 or 1.
    pub(crate) fn sum(self) -> f64 {
        self.right + self.wrong
    }
}

/// Weighted labels of one group.
pub(crate) fn weighted(mode: LabelWeights, labels: &[f64]) -> Vec<Halves> {
    match mode {
        LabelWeights::None => labels.iter().copied().map(Halves::plain).collect(),
        LabelWeights::Question => balanced(labels),
        LabelWeights::OnlyPositive => only(labels, 1.0),
        LabelWeights::OnlyNegative => only(labels, 0.0),
    }
}

/// `n / (2 sum y)` for what is right of a label, `n / (2 sum (1 - y))` for what is wrong of it: right and wrong have the
/// same total in a group. Where nothing is right, or nothing is wrong, there is nothing to balance and all weigh 1.
///
/// A count of equal labels in the place of the sums gives the same weights for 0 and 1, and wrong ones for labels between
/// them: of seven labels of 0.2 and one of 0.4 the rare one would weigh seven times as much, its larger wrong part
/// included, and the best answer would be pushed down.
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
