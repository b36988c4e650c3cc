use crate::group::members_by_group;
use crate::weights::{Halves, weighted};
use crate::{ObjectiveError, PacsConfig, RewardMethod, estimator};

/// One answer, as input of an objective with one coefficient per answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sequence {
    /// Group of the answer; its members may sit anywhere in the slice.
    pub group: u64,
    /// Verifiable outcome, in `[0, 1]`.
    pub label: f64,
    /// Sum of the answer's log-probs under the policy being trained (nats).
    pub new_logprob_sum: f64,
    /// Sum of the answer's log-probs under the reference policy (nats).
    pub old_logprob_sum: f64,
    /// Number of tokens in the sums; above 0.
    pub tokens: u32,
    /// Importance weight of its loss, a constant; 1 for none. An answer with weight 0 still counts in the baseline
    /// of the others.
    pub importance: f64,
}

/// Result of PACS for one mini-batch. Vectors are in the order of the sequences.
#[derive(Clone, Debug, PartialEq)]
pub struct PacsStep {
    /// Mean of the sequence losses. The divisor is the number of sequences, not the sum of their weights.
    pub loss: f64,
    /// Reward proxy of each sequence.
    pub reward_proxy: Vec<f64>,
    /// Score of each sequence: the logit of the modelled probability that its answer is correct.
    pub score: Vec<f64>,
    /// Weight of each sequence's label; for labels between 0 and 1 the sum of its two halves.
    pub weight: Vec<f64>,
    /// Weighted cross entropy of each sequence.
    pub sequence_loss: Vec<f64>,
    /// Derivative of the loss by each score.
    pub dloss_dscore: Vec<f64>,
    /// Derivative of the loss by each proxy, through the scores of the whole group.
    pub dloss_dproxy: Vec<f64>,
    /// Coefficient of each sequence's answer tokens in the backward pass; one number, since tokens enter only through
    /// their sum. It is the derivative of the loss by the new log-prob. The actor term adds the sequence's loss times
    /// the derivative of its sampling log-probability. Exactly 0 if the sequence needs no backward pass.
    pub dloss_dlogprob: Vec<f64>,
}

/// Evaluates the PACS loss and its derivatives (Li et al. 2025, eq. 6 to 10). Importance weights, which the paper does
/// not have, multiply the loss of a sequence as constants.
///
/// Pass every sequence of the mini-batch at once: all members of each group, and all groups that share the divisor. No
/// bit of the result depends on the order of the sequences. A group that is split over two calls is not detected; its
/// halves are scored as two groups.
///
/// # Errors
///
/// Refuses inputs that would give a meaningless or non-finite step; see [`ObjectiveError`].
pub fn pacs(config: &PacsConfig, sequences: &[Sequence]) -> Result<PacsStep, ObjectiveError> {
    check(config, sequences)?;
    let mut step = PacsStep::zeroed(sequences.len());
    let mut loss_sum = 0.0;
    // In the order of group ids, because a sum that followed the order of arrival would differ between ranks.
    for (group, members) in members_by_group(sequences) {
        if members.len() < config.score.min_group_size() {
            return Err(ObjectiveError::GroupTooSmall { group, size: members.len(), estimator: config.score });
        }
        loss_sum += step.evaluate_group(config, sequences, &members);
    }
    step.loss = loss_sum / sequences.len() as f64;
    step.check_finite(sequences)?;
    Ok(step)
}

fn check(config: &PacsConfig, sequences: &[Sequence]) -> Result<(), ObjectiveError> {
    // The bounds of a spec refuse this, too; here it protects callers that build a configuration themselves.
    let beta = config.beta;
    if !(beta.is_finite() && beta > 0.0) {
        return Err(ObjectiveError::Beta { beta });
    }
    if let Some(weights) = config.importance {
        let holds = weights.cap >= 1.0 && weights.cap.is_finite();
        if !holds {
            return Err(ObjectiveError::Setting { name: "importance_cap", value: weights.cap, expected: "1 or more" });
        }
    }
    if sequences.is_empty() {
        return Err(ObjectiveError::NoSequences);
    }
    sequences.iter().enumerate().try_for_each(|(index, sequence)| check_sequence(index, sequence))
}

pub(crate) fn check_sequence(index: usize, sequence: &Sequence) -> Result<(), ObjectiveError> {
    let &Sequence { group, label, new_logprob_sum: new, old_logprob_sum: old, tokens, importance } = sequence;
    if tokens == 0 {
        return Err(ObjectiveError::EmptyAnswer { index, group });
    }
    if !(0.0..=1.0).contains(&label) {
        return Err(ObjectiveError::Label { index, group, label });
    }
    if !(new.is_finite() && old.is_finite()) {
        return Err(ObjectiveError::LogprobSum { index, group, new, old });
    }
    if !(importance.is_finite() && importance >= 0.0) {
        return Err(ObjectiveError::Overflow { index, group });
    }
    Ok(())
}

impl PacsStep {
    fn zeroed(n: usize) -> Self {
        let zeros = || vec![0.0; n];
        Self {
            loss: 0.0,
            reward_proxy: zeros(),
            score: zeros(),
            weight: zeros(),
            sequence_loss: zeros(),
            dloss_dscore: zeros(),
            dloss_dproxy: zeros(),
            dloss_dlogprob: zeros(),
        }
    }

    /// Fills in the entries of one group, and returns the sum of its sequence losses.
    fn evaluate_group(&mut self, config: &PacsConfig, sequences: &[Sequence], members: &[usize]) -> f64 {
        // The number of sequences and not the sum of their weights, which would undo what importance weights take away.
        let divisor = sequences.len() as f64;
        let proxies: Vec<f64> = members.iter().map(|&i| reward_proxy(config, &sequences[i])).collect();
        let labels: Vec<f64> = members.iter().map(|&i| sequences[i].label).collect();
        let scores = estimator::scores(config.score, &proxies);
        let halves = weighted(config.label_weights, &labels);
        let weighted = |m: usize, value: f64| sequences[members[m]].importance * value;
        let losses: Vec<f64> = (0..members.len()).map(|m| weighted(m, cross_entropy(scores[m], halves[m]))).collect();
        let dscores: Vec<f64> =
            (0..members.len()).map(|m| weighted(m, cross_entropy_slope(scores[m], halves[m])) / divisor).collect();
        // A score depends on the proxies of the whole group, so every answer gets a gradient through every other one's loss. Treating
        // the baseline as a constant, as policy gradients do, would drop that part.
        let dproxies = estimator::backward(config.score, &proxies, &dscores);
        for (m, &i) in members.iter().enumerate() {
            self.reward_proxy[i] = proxies[m];
            self.score[i] = scores[m];
            self.weight[i] = halves[m].sum();
            self.sequence_loss[i] = losses[m];
            self.dloss_dscore[i] = dscores[m];
            self.dloss_dproxy[i] = dproxies[m];
            self.dloss_dlogprob[i] = dproxies[m] * proxy_slope(config, &sequences[i]);
            // The loss weighs the log-prob of its own sample, as a score-function estimator does; the reference code leaves this term out.
            if config.actor_term {
                self.dloss_dlogprob[i] += losses[m] / divisor;
            }
        }
        losses.iter().sum()
    }

    fn check_finite(&self, sequences: &[Sequence]) -> Result<(), ObjectiveError> {
        let finite = |i: usize| {
            [self.score[i], self.sequence_loss[i], self.dloss_dproxy[i], self.dloss_dlogprob[i]]
                .iter()
                .all(|value| value.is_finite())
        };
        let overflow = |index: usize| ObjectiveError::Overflow { index, group: sequences[index].group };
        // Finite inputs can still overflow. An error names the sequence; a NaN in the gradient would only show as a skipped update.
        match (0..sequences.len()).find(|&i| !finite(i)) {
            Some(index) => Err(overflow(index)),
            None if self.loss.is_finite() => Ok(()),
            None => Err(overflow(0)),
        }
    }
}

fn reward_proxy(config: &PacsConfig, sequence: &Sequence) -> f64 {
    match config.reward_method {
        RewardMethod::LogRatio => config.beta * (sequence.new_logprob_sum - sequence.old_logprob_sum),
        RewardMethod::MeanLogprob => config.beta * sequence.new_logprob_sum / f64::from(sequence.tokens),
    }
}

/// Derivative of the proxy by the new log-prob of any answer token.
fn proxy_slope(config: &PacsConfig, sequence: &Sequence) -> f64 {
    match config.reward_method {
        RewardMethod::LogRatio => config.beta,
        RewardMethod::MeanLogprob => config.beta / f64::from(sequence.tokens),
    }
}

/// Cross entropy of a weighted label with the probability of logit `score`, in a form that does not overflow.
fn cross_entropy(score: f64, Halves { right, wrong }: Halves) -> f64 {
    // `-ln sigmoid(score)` less the tail that both halves share.
    let tail = (-score.abs()).exp().ln_1p();
    right * ((-score).max(0.0) + tail) + wrong * (score.max(0.0) + tail)
}

/// Derivative of [`cross_entropy`] by the score, in a form that keeps the small difference of a
/// confident, correct score.
fn cross_entropy_slope(score: f64, Halves { right, wrong }: Halves) -> f64 {
    // Not `sigmoid(score) - right`: for a large score that rounds to 0, and a confident answer would get no gradient at all.
    wrong * sigmoid(score) - right * sigmoid(-score)
}

fn sigmoid(x: f64) -> f64 {
    // The exponent is never positive, so nothing overflows.
    let decay = (-x.abs()).exp();
    if x >= 0.0 { 1.0 / (1.0 + decay) } else { decay / (1.0 + decay) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ScoreEstimator;

    const CONFIG: PacsConfig = PacsConfig::paper();
    const SEQUENCE: Sequence =
        Sequence { group: 7, label: 1.0, new_logprob_sum: -3.0, old_logprob_sum: -4.0, tokens: 2, importance: 1.0 };

    #[test]
    fn unusable_input_is_refused_by_name() {
        let with = |change: fn(&mut Sequence)| {
            let mut other = SEQUENCE;
            change(&mut other);
            pacs(&CONFIG, &[SEQUENCE, other]).unwrap_err()
        };
        assert_eq!(with(|s| s.tokens = 0), ObjectiveError::EmptyAnswer { index: 1, group: 7 });
        for label in [-0.1, 1.1] {
            let other = Sequence { label, ..SEQUENCE };
            let refused = pacs(&CONFIG, &[other, SEQUENCE]).unwrap_err();
            assert_eq!(refused, ObjectiveError::Label { index: 0, group: 7, label });
        }
        assert!(matches!(with(|s| s.label = f64::NAN), ObjectiveError::Label { index: 1, .. }));
        assert!(matches!(with(|s| s.new_logprob_sum = f64::NAN), ObjectiveError::LogprobSum { index: 1, .. }));
        assert!(matches!(with(|s| s.old_logprob_sum = f64::NEG_INFINITY), ObjectiveError::LogprobSum { .. }));
        let huge = |s: &mut Sequence| (s.new_logprob_sum, s.old_logprob_sum) = (-1e308, 1e308);
        assert!(matches!(with(huge), ObjectiveError::Overflow { group: 7, .. }));
        assert_eq!(pacs(&CONFIG, &[]), Err(ObjectiveError::NoSequences));
        for beta in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let refused = pacs(&PacsConfig { beta, ..CONFIG }, &[SEQUENCE; 2]);
            assert!(matches!(refused, Err(ObjectiveError::Beta { .. })), "beta {beta}: {refused:?}");
        }
    }

    #[test]
    fn a_group_of_one_needs_the_naive_score() {
        for estimator in [ScoreEstimator::Rloo, ScoreEstimator::Grpo, ScoreEstimator::DrGrpo] {
            let lonely = Sequence { group: 9, ..SEQUENCE };
            let refused = pacs(&PacsConfig { score: estimator, ..CONFIG }, &[SEQUENCE, lonely, SEQUENCE]);
            assert_eq!(refused, Err(ObjectiveError::GroupTooSmall { group: 9, size: 1, estimator }));
        }
        let step = pacs(&PacsConfig { score: ScoreEstimator::Naive, ..CONFIG }, &[SEQUENCE]).unwrap();
        assert_eq!(step.score, [1.0]);
    }

    #[test]
    fn the_actor_term_is_the_loss_of_the_sequence() {
        let wrong = Sequence { label: 0.0, ..SEQUENCE };
        let (plain, with) = (CONFIG, PacsConfig { actor_term: true, ..CONFIG });
        let [plain, with] = [plain, with].map(|config| pacs(&config, &[SEQUENCE, wrong]).unwrap());
        for i in 0..2 {
            let added = with.dloss_dlogprob[i] - plain.dloss_dlogprob[i];
            assert!((added - plain.sequence_loss[i] / 2.0).abs() < 1e-15 && added > 0.0, "{added}");
        }
        assert_eq!(with.loss, plain.loss);
    }

    #[test]
    fn a_masked_sample_has_no_loss_and_stays_in_the_baseline() {
        let old = |old_logprob_sum: f64, label: f64| Sequence { old_logprob_sum, label, ..SEQUENCE };
        let group = [old(-4.0, 1.0), old(-2.5, 0.0), old(-3.0, 0.0)];
        let plain = pacs(&CONFIG, &group).unwrap();
        let masked = pacs(&CONFIG, &[group[0], group[1], Sequence { importance: 0.0, ..group[2] }]).unwrap();
        assert_eq!((masked.score, masked.sequence_loss[2]), (plain.score, 0.0));
        assert_eq!(masked.sequence_loss[..2], plain.sequence_loss[..2]);
        assert!(masked.dloss_dlogprob[2] != 0.0 && masked.dloss_dlogprob != plain.dloss_dlogprob);
        let halved = pacs(&CONFIG, &group.map(|s| Sequence { importance: 0.5, ..s })).unwrap();
        assert!((halved.loss - plain.loss / 2.0).abs() < 1e-15);
    }

    #[test]
    fn messages_say_what_to_do() {
        let error = ObjectiveError::GroupTooSmall { group: 9, size: 1, estimator: ScoreEstimator::Rloo };
        assert_eq!(error.to_string(), "group 9 has 1 sequences; the Rloo score needs 2");
    }

    #[test]
    fn slope_of_a_saturated_score_is_not_lost() {
        let (right, wrong) = (Halves { right: 1.0, wrong: 0.0 }, Halves { right: 0.0, wrong: 1.0 });
        assert_eq!(cross_entropy_slope(800.0, right), 0.0);
        assert!((cross_entropy_slope(50.0, right) + (-50f64).exp()).abs() < 1e-30);
        assert!((cross_entropy_slope(-50.0, wrong) - (-50f64).exp()).abs() < 1e-30);
        assert_eq!(cross_entropy(-1000.0, right), 1000.0);
        assert_eq!(cross_entropy_slope(-1000.0, right), -1.0);
    }

    #[test]
    fn the_best_of_graded_answers_is_pushed_up_and_the_worst_down() {
        let group = |label: f64, odd: f64| {
            let at = |m| Sequence { label: if m == 3 { odd } else { label }, old_logprob_sum: -3.0, ..SEQUENCE };
            pacs(&CONFIG, &(0..8).map(at).collect::<Vec<_>>()).unwrap()
        };
        // Labels are counted in neither: seven and one are not seven and one.
        let best = group(0.2, 0.4);
        assert!(best.dloss_dlogprob[3] < 0.0 && best.dloss_dlogprob[0] > 0.0, "{best:?}");
        let worst = group(0.8, 0.6);
        assert!(worst.dloss_dlogprob[3] > 0.0 && worst.dloss_dlogprob[0] < 0.0, "{worst:?}");
        // A label that is nearly another one is pushed nearly the same.
        let near = group(0.2, 0.2 + 1e-9);
        assert!(near.dloss_dlogprob.iter().all(|coefficient| coefficient.abs() < 1e-8), "{near:?}");
    }
}
