use std::collections::BTreeMap;

use crate::group::mean_of;
use crate::metrics::ObjectiveMetrics;
use crate::objectives::pacs::{PacsStep, Sequence, pacs};
use crate::policy::importance::held;
use crate::sequence::{Placed, check_infos};
use crate::{
    AdvantageEstimator, Answer, DiscoConfig, ImportanceLevel, ImportanceWeights, KlPlace, Normaliser, ObjectiveError,
    PacsConfig, PolicyConfig, RealConfig, RewardMethod, ScalarStep, ScoreEstimator, SequenceInfo, StepBaseline,
    StepSummary, Surrogate, TokenAdvantages, TokenData, ValueOutcome,
};

/// A training objective: the single entry point of the trainer, replay and tests.
///
/// [`evaluate`](Self::evaluate) computes the whole of it, for a mini-batch that is in one place. Across ranks the same
/// is computed in three parts, so that answers may sit on any rank and only a few numbers per sequence travel:
///
/// 1. once a step, [`summary`](Self::summary) of every answer, then [`baseline`](Self::baseline) of all summaries and
///    [`advantages`](Self::advantages) of every answer;
/// 2. once an update, [`sums`](Self::sums) of every answer, then [`update`](Self::update) of all sums;
/// 3. then [`sequence`](Self::sequence) of every answer: its share of the loss, and the coefficients of its backward.
///
/// [`Needs`] says which of these numbers have to be gathered; none, if every rank can compute them itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Objective {
    /// PACS: cross entropy of verdicts with a group score of the policy's own log-ratios.
    Pacs(PacsConfig),
    /// Clipped policy gradient: GRPO, PPO, RLOO, REINFORCE++ and their variants.
    Policy(PolicyConfig),
    /// REAL: rewards as labels of a mean log-ratio, with an anchor.
    Real(RealConfig),
    /// DisCO: right answers scored above wrong ones by mean log-prob, close to the old policy.
    Disco(DiscoConfig),
    /// An external program, which maps the facts and log-prob sums of the answers to losses and coefficients. Its reply
    /// is passed in by [`scalars`](Objective::scalars).
    External,
}

/// The inputs of an objective, and what ranks have to gather.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// Whether it reads old log-probs of each token.
    pub old: bool,
    /// Whether the old policy is the reference, frozen for a configured number of steps. Otherwise it is the policy at
    /// the start of the step.
    pub old_is_reference: bool,
    /// Whether it reads log-probs of the rollout engine.
    pub rollout: bool,
    /// Whether it reads log-probs under a frozen reference policy.
    pub reference: bool,
    /// Whether it reads estimates of a value model.
    pub values: bool,
    /// Whether the head's backward has to take derivatives by the entropy of each token.
    pub entropy: bool,
    /// Whether ranks gather the [`StepSummary`] of every answer, once a step: three numbers per sequence.
    pub summaries: bool,
    /// Whether those summaries depend on old log-probs.
    pub summaries_read_old: bool,
    /// Whether ranks gather the [`LogprobSums`] of every answer, once an update: three numbers per sequence.
    pub sums: bool,
    /// Whether the coefficients of an on-policy update are known before its forward, since every log-ratio is 0. Those
    /// of a value model never are: they need its values.
    pub known_on_policy: bool,
}

/// The level at which answers of one prompt must vary for a non-zero gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contrasts {
    /// Their labels must differ.
    Labels,
    /// Their rewards must differ.
    Rewards,
    /// No variance is needed that is known before the update: an answer has a gradient without the others of its
    /// prompt, or they differ by numbers that only a learner has.
    Nothing,
}

/// Log-prob sums over the tokens of one answer (nats).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LogprobSums {
    /// Sum under the policy being trained.
    pub new: f64,
    /// Sum under the old policy; for PACS that of the last reference reset.
    pub old: f64,
    /// Sum under the distribution that the rollout engine drew from.
    pub rollout: f64,
}

/// What the answers of one mini-batch share.
#[derive(Clone, Debug, PartialEq)]
pub enum UpdateState {
    /// PACS: the whole step, since the coefficients of a group depend on each other.
    Pacs(PacsStep),
    /// Policy gradients: only the divisors of their losses.
    Policy(Normaliser),
    /// Other objectives with one coefficient per answer: the whole step.
    Scalar(ScalarStep),
}

/// Loss and derivatives of one answer in a mini-batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SequenceOutcome {
    /// Share of the mini-batch's loss; shares add up over sequences and ranks.
    pub loss: f64,
    /// What the objective compares with the verdict: the score of PACS, the logit of REAL, the mean log-prob of DisCO,
    /// and for policy gradients the mean advantage of the answer's tokens, also where they are masked out. `None` for
    /// an external program, which names none.
    pub score: Option<f64>,
    /// Derivative of the mini-batch's loss by the new log-prob of each token. Exactly 0 for all tokens if the answer
    /// needs no backward pass.
    pub dloss_dlogprob: Vec<f64>,
    /// Derivative of the mini-batch's loss by the entropy of each token, the same for all tokens of an answer.
    pub dloss_dentropy: f64,
    /// Share of the mini-batch's value loss.
    pub value_loss: f64,
    /// Derivative of the value loss by the new value of each token; `None` for objectives without a value model.
    pub dloss_dvalue: Option<Vec<f64>>,
    /// Metrics of the answer, to be merged.
    pub metrics: ObjectiveMetrics,
}

/// Result of an objective for one mini-batch. Vectors are in the order of the answers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ObjectiveStep {
    /// Policy loss of the mini-batch.
    pub loss: f64,
    /// Loss of the value model; 0 without one.
    pub value_loss: f64,
    /// Loss and derivatives of each answer.
    pub sequences: Vec<SequenceOutcome>,
    /// Metrics of the mini-batch by name.
    pub metrics: BTreeMap<&'static str, f64>,
}

impl Objective {
    /// Returns which numbers the objective reads, and which ranks have to gather.
    #[must_use]
    pub fn needs(&self) -> Needs {
        match self {
            Self::Pacs(config) => {
                let log_ratio = config.reward_method == RewardMethod::LogRatio;
                let weighted = config.importance.is_some();
                Needs {
                    old: log_ratio || weighted,
                    old_is_reference: true,
                    rollout: weighted,
                    reference: false,
                    values: false,
                    entropy: false,
                    summaries: false,
                    summaries_read_old: false,
                    sums: true,
                    known_on_policy: log_ratio && !weighted,
                }
            }
            Self::Real(_) | Self::Disco(_) | Self::External => Needs {
                old: true,
                old_is_reference: false,
                rollout: *self == Self::External,
                reference: false,
                values: false,
                entropy: false,
                summaries: false,
                summaries_read_old: false,
                sums: true,
                known_on_policy: matches!(self, Self::Real(_)),
            },
            Self::Policy(config) => Needs {
                // A mask compares with the policy of the rollout engine, not with the old policy.
                old: !config.is_masked() || config.kl_at(KlPlace::Reward).is_some(),
                old_is_reference: false,
                rollout: config.importance.is_some() || config.is_masked(),
                reference: config.kl.is_some(),
                values: config.advantage.uses_values(),
                entropy: config.entropy > 0.0,
                summaries: config.exchanges_summaries(),
                summaries_read_old: config.kl_at(KlPlace::Reward).is_some(),
                sums: false,
                // A weighted or masked surrogate contains the log-prob itself, which only the forward gives.
                known_on_policy: config.importance.is_none()
                    && config.kl.is_none()
                    && config.entropy == 0.0
                    && config.surrogate == Surrogate::Clipped,
            },
        }
    }

    /// Returns the level at which the answers of a prompt must vary.
    #[must_use]
    pub fn contrasts(&self) -> Contrasts {
        match self {
            Self::Pacs(config) if config.actor_term || config.score == ScoreEstimator::Naive => Contrasts::Nothing,
            Self::Pacs(_) | Self::Disco(_) => Contrasts::Labels,
            // REAL's anchor gives a gradient even for equal labels; nothing is known of a program.
            Self::Real(_) | Self::External => Contrasts::Nothing,
            // A KL penalty in the reward tells answers of equal rewards apart.
            Self::Policy(config) if !config.advantage.compares_group() || config.kl_at(KlPlace::Reward).is_some() => {
                Contrasts::Nothing
            }
            // The weight of a prompt with equal labels is 0.
            Self::Policy(PolicyConfig { advantage: AdvantageEstimator::WeightedRloo { right, wrong }, .. })
                if (*right, *wrong) != (0.0, 0.0) =>
            {
                Contrasts::Labels
            }
            Self::Policy(_) => Contrasts::Rewards,
        }
    }

    /// Returns the summary of one answer at the start of a step, without reading `tokens.new`. Errors name the
    /// answer by `index`.
    ///
    /// # Errors
    /// When numbers that the objective reads are missing or not finite.
    pub fn summary(
        &self,
        index: usize,
        info: &SequenceInfo,
        tokens: &TokenData<'_>,
    ) -> Result<StepSummary, ObjectiveError> {
        match self {
            Self::Pacs(_) | Self::Real(_) | Self::Disco(_) | Self::External => Ok(StepSummary::default()),
            Self::Policy(config) => config.summary(index, info, tokens),
        }
    }

    /// Returns what the advantages of a step share. Takes all answers, in the same order on every rank.
    ///
    /// # Errors
    /// When an answer is unusable or has nothing to be compared with.
    ///
    /// # Panics
    /// When the slices differ in length.
    pub fn baseline(&self, infos: &[SequenceInfo], summaries: &[StepSummary]) -> Result<StepBaseline, ObjectiveError> {
        check_infos(infos)?;
        match self {
            Self::Pacs(_) | Self::Real(_) | Self::Disco(_) | Self::External => Ok(StepBaseline::default()),
            Self::Policy(config) => config.check().and_then(|()| config.baseline(infos, summaries)),
        }
    }

    /// Returns the token advantages of answer `index`, counted as in the input of `baseline`; empty for
    /// objectives without advantages.
    ///
    /// # Errors
    /// As [`Self::summary`], or when an advantage overflows.
    pub fn advantages(
        &self,
        baseline: &StepBaseline,
        index: usize,
        info: &SequenceInfo,
        tokens: &TokenData<'_>,
    ) -> Result<TokenAdvantages, ObjectiveError> {
        match self {
            Self::Pacs(_) | Self::Real(_) | Self::Disco(_) | Self::External => Ok(TokenAdvantages::default()),
            Self::Policy(config) => config.advantages(baseline, index, info, tokens),
        }
    }

    /// Returns the log-prob sums that other ranks need of one answer; zeros unless [`Needs::sums`].
    ///
    /// # Errors
    /// When numbers that the objective reads are missing or not finite.
    pub fn sums(
        &self,
        index: usize,
        info: &SequenceInfo,
        tokens: &TokenData<'_>,
    ) -> Result<LogprobSums, ObjectiveError> {
        let answer = Placed::new(index, info, tokens);
        let needs = self.needs();
        let sum = |values: &[f64]| values.iter().sum();
        Ok(LogprobSums {
            new: if needs.sums { sum(answer.new_logprobs()?) } else { 0.0 },
            old: if needs.sums && needs.old { sum(answer.old_logprobs()?) } else { 0.0 },
            rollout: if needs.sums && needs.rollout { sum(answer.rollout_logprobs()?) } else { 0.0 },
        })
    }

    /// Returns what the answers of a mini-batch share. Takes all answers, in whole groups and in the same order on
    /// every rank. `sums` are read only if [`Needs::sums`].
    ///
    /// # Errors
    /// When an answer is unusable, or the arithmetic overflows.
    ///
    /// # Panics
    /// When sums are read and there is not one for each answer.
    pub fn update(&self, infos: &[SequenceInfo], sums: &[LogprobSums]) -> Result<UpdateState, ObjectiveError> {
        let sequences = |importance: Option<ImportanceWeights>| -> Vec<Sequence> {
            // A mismatch would pair answers with the log-probs of others, and no later check could see it.
            assert_eq!(infos.len(), sums.len(), "every answer has its sums");
            infos.iter().zip(sums).map(|(info, sums)| coupled(info, *sums, importance)).collect()
        };
        match self {
            Self::Pacs(config) => pacs(config, &sequences(config.importance)).map(UpdateState::Pacs),
            Self::Real(config) => config.evaluate(&sequences(None)).map(UpdateState::Scalar),
            Self::Disco(config) => config.evaluate(&sequences(None)).map(UpdateState::Scalar),
            Self::External => Err(ObjectiveError::NoProgram),
            Self::Policy(config) => config.normaliser(infos).map(UpdateState::Policy),
        }
    }

    /// Returns the state of an update from an external program's reply, one loss and one coefficient per answer.
    ///
    /// # Errors
    /// When there is not one of each per answer, or a number is not finite.
    pub fn scalars(infos: &[SequenceInfo], step: ScalarStep) -> Result<UpdateState, ObjectiveError> {
        for (what, values) in [("losses", &step.loss), ("coefficients", &step.dloss_dlogprob)] {
            if values.len() != infos.len() {
                return Err(ObjectiveError::Answers { what, values: values.len(), answers: infos.len() });
            }
            if let Some(index) = values.iter().position(|value| !value.is_finite()) {
                return Err(ObjectiveError::Overflow { index, group: infos[index].group });
            }
        }
        Ok(UpdateState::Scalar(step))
    }

    /// Returns the loss and derivatives of answer `index`, counted as in the input of `state`.
    ///
    /// # Errors
    /// When numbers that the objective reads are missing or not finite, or the arithmetic overflows.
    ///
    /// # Panics
    /// When the state belongs to another objective.
    pub fn sequence(
        &self,
        state: &UpdateState,
        index: usize,
        info: &SequenceInfo,
        advantages: &TokenAdvantages,
        tokens: &TokenData<'_>,
    ) -> Result<SequenceOutcome, ObjectiveError> {
        match (self, state) {
            (Self::Pacs(config), UpdateState::Pacs(step)) => {
                let answer = Placed::new(index, info, tokens);
                let mut outcome = SequenceOutcome::zeroed(info.tokens as usize);
                outcome.loss = step.sequence_loss[index] / step.sequence_loss.len() as f64;
                outcome.score = Some(step.score[index]);
                outcome.dloss_dlogprob.fill(step.dloss_dlogprob[index]);
                if config.reward_method == RewardMethod::LogRatio {
                    let new = answer.new_logprobs()?;
                    let old = answer.old_logprobs()?;
                    let log_ratios: Vec<f64> = new.iter().zip(old).map(|(new, old)| new - old).collect();
                    outcome.metrics.add_ratios(&log_ratios);
                }
                if let Some(weights) = &config.importance {
                    let old = answer.old_logprobs()?;
                    let rollout = answer.rollout_logprobs()?;
                    let sums = LogprobSums { new: 0.0, old: old.iter().sum(), rollout: rollout.iter().sum() };
                    let (weight, is_cut) = held(weights, log_weight(weights, sums, info.tokens));
                    let tokens = info.tokens as usize;
                    outcome.metrics.add_importance(&vec![weight; tokens], if is_cut { tokens } else { 0 });
                }
                Ok(outcome)
            }
            (Self::Real(_) | Self::Disco(_) | Self::External, UpdateState::Scalar(step)) => {
                let answer = Placed::new(index, info, tokens);
                let mut outcome = SequenceOutcome::zeroed(info.tokens as usize);
                outcome.loss = step.loss[index];
                outcome.dloss_dlogprob.fill(step.dloss_dlogprob[index]);
                let new = answer.new_logprobs()?;
                let old = answer.old_logprobs()?;
                outcome.score = self.score_of_sums(new.iter().sum(), old.iter().sum(), info.tokens);
                let log_ratios: Vec<f64> = new.iter().zip(old).map(|(new, old)| new - old).collect();
                outcome.metrics.add_ratios(&log_ratios);
                Ok(outcome)
            }
            (Self::Policy(config), UpdateState::Policy(normaliser)) => {
                config.sequence(normaliser, index, info, advantages, tokens)
            }
            _ => unreachable!("the state is that of another objective"),
        }
    }

    /// Score of an answer under objectives that compute it from its own log-prob sums; `None` for others.
    fn score_of_sums(&self, new: f64, old: f64, tokens: u32) -> Option<f64> {
        match self {
            Self::Real(config) => Some((new - old) / (f64::from(tokens) * config.tau)),
            Self::Disco(_) => Some(new / f64::from(tokens)),
            Self::Pacs(_) | Self::External | Self::Policy(_) => None,
        }
    }

    /// Returns the objective of the policy update: the same without the value loss. Advantages come from
    /// the full objective.
    #[must_use]
    pub fn of_policy(self) -> Self {
        match self {
            Self::Pacs(_) | Self::Real(_) | Self::Disco(_) | Self::External => self,
            Self::Policy(config) => Self::Policy(PolicyConfig { value: None, ..config }),
        }
    }

    /// Whether step `step` (from 1) trains the policy; steps before that train only the value model.
    #[must_use]
    pub fn trains_policy(&self, step: u64) -> bool {
        match self {
            Self::Pacs(_) | Self::Real(_) | Self::Disco(_) | Self::External => true,
            Self::Policy(config) => config.trains_policy(step),
        }
    }

    /// Returns the value loss of answer `index`, counted as in the input of `state`: the part of
    /// [`sequence`](Self::sequence) that trains a value model. Reads neither `tokens.new` nor `tokens.old`.
    ///
    /// # Errors
    /// When values are missing or not finite, or the arithmetic overflows.
    ///
    /// # Panics
    /// When the state belongs to another objective.
    pub fn value(
        &self,
        state: &UpdateState,
        index: usize,
        info: &SequenceInfo,
        targets: &TokenAdvantages,
        tokens: &TokenData<'_>,
    ) -> Result<ValueOutcome, ObjectiveError> {
        match (self, state) {
            (Self::Pacs(_), UpdateState::Pacs(_))
            | (Self::Real(_) | Self::Disco(_) | Self::External, UpdateState::Scalar(_)) => {
                Ok(ValueOutcome::zeroed(info.tokens as usize))
            }
            (Self::Policy(config), UpdateState::Policy(normaliser)) => {
                config.value_sequence(normaliser, index, info, targets, tokens)
            }
            _ => unreachable!("the state is that of another objective"),
        }
    }

    /// Returns the metrics of an answer that has no gradient at any log-probs, so that its forward can be skipped.
    /// `None` for others.
    #[must_use]
    pub fn inert(&self, info: &SequenceInfo, advantages: &TokenAdvantages) -> Option<ObjectiveMetrics> {
        match self {
            Self::Pacs(_) | Self::Real(_) | Self::Disco(_) | Self::External => None,
            Self::Policy(config) => config.inert(info, advantages),
        }
    }

    /// Evaluates the objective on a mini-batch that is a whole step, in one process.
    ///
    /// Pass all members of every group. Old, rollout and reference log-probs, old values, rewards and importance
    /// weights are constants of the derivatives.
    ///
    /// ```
    /// use pacs_algo::{Answer, Objective, PacsConfig, SequenceInfo, TokenData};
    ///
    /// // A right and a wrong answer to one prompt, in the first update of a step: the policy is still the old one.
    /// let logprobs = [-1.0, -2.0];
    /// let answer = |label| Answer {
    ///     info: SequenceInfo { group: 0, label, reward: label, greedy_reward: None, tokens: 2, truncated: false },
    ///     tokens: TokenData { new: &logprobs, old: &logprobs, ..TokenData::default() },
    /// };
    /// let step = Objective::Pacs(PacsConfig::paper()).evaluate(&[answer(1.0), answer(0.0)])?;
    ///
    /// // The scores are 0, so the loss is ln 2; its gradient makes the right answer more probable.
    /// assert!((step.loss - f64::ln(2.0)).abs() < 1e-12);
    /// assert!(step.sequences[0].dloss_dlogprob.iter().all(|slope| *slope < 0.0));
    /// assert!(step.sequences[1].dloss_dlogprob.iter().all(|slope| *slope > 0.0));
    /// # Ok::<(), pacs_algo::ObjectiveError>(())
    /// ```
    ///
    /// # Errors
    /// See [`ObjectiveError`].
    pub fn evaluate(&self, answers: &[Answer<'_>]) -> Result<ObjectiveStep, ObjectiveError> {
        let infos: Vec<SequenceInfo> = answers.iter().map(|answer| answer.info).collect();
        check_infos(&infos)?;
        let every = || answers.iter().enumerate();
        let summaries: Vec<StepSummary> =
            every().map(|(i, answer)| self.summary(i, &answer.info, &answer.tokens)).collect::<Result<_, _>>()?;
        let baseline = self.baseline(&infos, &summaries)?;
        let sums: Vec<LogprobSums> =
            every().map(|(i, answer)| self.sums(i, &answer.info, &answer.tokens)).collect::<Result<_, _>>()?;
        let state = self.update(&infos, &sums)?;
        let mut step = ObjectiveStep::default();
        let mut metrics = ObjectiveMetrics::default();
        for (i, Answer { info, tokens }) in every() {
            let advantages = self.advantages(&baseline, i, info, tokens)?;
            let outcome = self.sequence(&state, i, info, &advantages, tokens)?;
            step.loss += outcome.loss;
            step.value_loss += outcome.value_loss;
            metrics.merge(&outcome.metrics);
            step.sequences.push(outcome);
        }
        step.metrics = metrics.named().into_iter().collect();
        Ok(step)
    }
}

/// Converts an answer to the input of objectives with one coefficient per answer.
fn coupled(info: &SequenceInfo, sums: LogprobSums, importance: Option<ImportanceWeights>) -> Sequence {
    Sequence {
        importance: importance.map_or(1.0, |weights| held(&weights, log_weight(&weights, sums, info.tokens)).0),
        group: info.group,
        label: info.label,
        new_logprob_sum: sums.new,
        old_logprob_sum: sums.old,
        tokens: info.tokens,
    }
}

/// Logarithm of an answer's importance weight.
fn log_weight(weights: &ImportanceWeights, sums: LogprobSums, tokens: u32) -> f64 {
    match weights.level {
        ImportanceLevel::Geometric => (sums.old - sums.rollout) / f64::from(tokens),
        ImportanceLevel::Sequence | ImportanceLevel::Token => sums.old - sums.rollout,
    }
}

impl SequenceOutcome {
    pub(crate) fn zeroed(tokens: usize) -> Self {
        Self { dloss_dlogprob: vec![0.0; tokens], ..Self::default() }
    }

    /// Returns the weight of the answer's log-prob in the update: minus the mean over its tokens of `dloss_dlogprob`.
    /// Positive makes the answer more probable, under every objective; 0 without a gradient.
    ///
    /// Under PACS it is minus the total derivative of the loss by the answer's summed log-prob. An entropy bonus, the
    /// learning rate and gradient clipping have no part in it.
    #[must_use]
    pub fn coefficient(&self) -> f64 {
        // Not a negation, which would turn 0 into -0.
        0.0 - mean_of(&self.dloss_dlogprob)
    }

    pub(crate) fn finite(self, index: usize, group: u64) -> Result<Self, ObjectiveError> {
        let derivatives = self.dloss_dlogprob.iter().chain(self.dloss_dvalue.iter().flatten());
        let finite = derivatives.chain([&self.loss, &self.value_loss]).all(|number| number.is_finite());
        if finite { Ok(self) } else { Err(ObjectiveError::Overflow { index, group }) }
    }
}
