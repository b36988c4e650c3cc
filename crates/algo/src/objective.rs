use std::collections::BTreeMap;

use crate::metrics::ObjectiveMetrics;
use crate::objectives::pacs::{PacsStep, Sequence, pacs};
use crate::policy::importance::held;
use crate::sequence::{Placed, check_infos};
use crate::{
    AdvantageEstimator, Answer, DiscoConfig, ImportanceLevel, ImportanceWeights, KlPlace, Normaliser, ObjectiveError,
    PacsConfig, PolicyConfig, RealConfig, RewardMethod, ScalarStep, ScoreEstimator, SequenceInfo, StepBaseline,
    StepSummary, Surrogate, TokenAdvantages, TokenData, ValueOutcome,
};

/// A training objective: the one door through which trainer, replay and tests call any of them.
///
/// [`evaluate`](Self::evaluate) is the whole of it, for a mini-batch that is in one place. Across ranks the same is
/// computed in three parts, so that answers may sit anywhere and only a few numbers a sequence travel:
///
/// 1. once a step, [`summary`](Self::summary) of every answer, then [`baseline`](Self::baseline) of all summaries and
///    [`advantages`](Self::advantages) of every answer;
/// 2. once an update, [`sums`](Self::sums) of every answer, then [`update`](Self::update) of all sums;
/// 3. then [`sequence`](Self::sequence) of every answer: its share of the loss, and the coefficients of its backward.
///
/// [`Needs`] says which of these numbers have to be gathered: none where every rank can compute them itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Objective {
    /// Cross entropy of verdicts with a group score of the policy's own log-ratios.
    Pacs(PacsConfig),
    /// Clipped policy gradient: GRPO, PPO, RLOO, REINFORCE++ and their variants.
    Policy(PolicyConfig),
    /// Rewards as labels of a mean log-ratio, with an anchor.
    Real(RealConfig),
    /// Right answers above wrong ones by their mean log-prob, near the old policy.
    Disco(DiscoConfig),
    /// A program of the job's own, which gets what every answer is and its log-probs as sums, and gives its loss and
    /// coefficient. What it says comes in by [`scalars`](Objective::scalars).
    External,
}

/// What an objective reads, and what ranks have to tell each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// Old log-probs of each token.
    pub old: bool,
    /// The old policy is the reference, which lives for as many steps as it is set to. Otherwise it is the policy at the
    /// start of the step.
    pub old_is_reference: bool,
    /// Log-probs of the rollout engine.
    pub rollout: bool,
    /// Log-probs under a frozen reference policy.
    pub reference: bool,
    /// Estimates of a value model.
    pub values: bool,
    /// A derivative by the entropy of each token has to go through the head's backward.
    pub entropy: bool,
    /// [`StepSummary`] of every answer must be gathered, once a step: three numbers a sequence.
    pub summaries: bool,
    /// Those summaries are made of old log-probs too.
    pub summaries_read_old: bool,
    /// [`LogprobSums`] of every answer must be gathered, once an update: three numbers a sequence.
    pub sums: bool,
    /// Before the forward the coefficients of an update whose new policy is the old one are known: every log-ratio is 0.
    /// Those of a value model are not, its values are needed.
    pub known_on_policy: bool,
}

/// What an objective contrasts between the answers of one prompt: where it is all the same they teach nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contrasts {
    /// Their labels.
    Labels,
    /// Their rewards.
    Rewards,
    /// Nothing that is known before the update: an answer teaches without the others of its prompt, or they differ by
    /// numbers that only a learner has.
    Nothing,
}

/// Sums over the tokens of one answer (nats, float64).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LogprobSums {
    /// Under the policy being trained.
    pub new: f64,
    /// Under the reference policy.
    pub old: f64,
    /// Of the distribution drawn from, by the rollout engine.
    pub rollout: f64,
}

/// What the answers of one mini-batch have to do with each other.
#[derive(Clone, Debug, PartialEq)]
pub enum UpdateState {
    /// Everything: only the tokens of a sequence share their coefficient.
    Pacs(PacsStep),
    /// What losses are divided by.
    Policy(Normaliser),
    /// Everything, likewise.
    Scalar(ScalarStep),
}

/// Loss and derivatives of one answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SequenceOutcome {
    /// Its share of the mini-batch's loss: shares add up, over sequences and ranks.
    pub loss: f64,
    /// Derivative of the mini-batch's loss by the new log-prob of each token. All exactly 0 where the answer needs no
    /// backward pass.
    pub dloss_dlogprob: Vec<f64>,
    /// Derivative of the mini-batch's loss by the entropy of each token: the same for all tokens of an answer.
    pub dloss_dentropy: f64,
    /// Its share of the value loss.
    pub value_loss: f64,
    /// Derivative of the value loss by the new value of each token, for objectives with a value model.
    pub dloss_dvalue: Option<Vec<f64>>,
    /// What to report.
    pub metrics: ObjectiveMetrics,
}

/// The objective at one mini-batch. Vectors are in the order of the answers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ObjectiveStep {
    /// The loss.
    pub loss: f64,
    /// The loss of the value model; 0 without one.
    pub value_loss: f64,
    /// What each answer has part in it.
    pub sequences: Vec<SequenceOutcome>,
    /// Metrics by name.
    pub metrics: BTreeMap<&'static str, f64>,
}

impl Objective {
    /// What it reads and what ranks have to gather.
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
                // A mask compares with the rollout engine's policy alone.
                old: !config.is_masked() || config.kl_at(KlPlace::Reward).is_some(),
                old_is_reference: false,
                rollout: config.importance.is_some() || config.is_masked(),
                reference: config.kl.is_some(),
                values: config.advantage.uses_values(),
                entropy: config.entropy > 0.0,
                summaries: config.exchanges_summaries(),
                summaries_read_old: config.kl_at(KlPlace::Reward).is_some(),
                sums: false,
                // The loss of a weighted or masked log-prob is made of that log-prob.
                known_on_policy: config.importance.is_none()
                    && config.kl.is_none()
                    && config.entropy == 0.0
                    && config.surrogate == Surrogate::Clipped,
            },
        }
    }

    /// What tells the answers of a prompt from each other.
    #[must_use]
    pub fn contrasts(&self) -> Contrasts {
        match self {
            Self::Pacs(config) if config.actor_term || config.score == ScoreEstimator::Naive => Contrasts::Nothing,
            Self::Pacs(_) | Self::Disco(_) => Contrasts::Labels,
            // Its anchor teaches of a group of equal labels, too; of a program nothing is known.
            Self::Real(_) | Self::External => Contrasts::Nothing,
            // A penalty in the reward differs between answers of equal rewards.
            Self::Policy(config) if !config.advantage.compares_group() || config.kl_at(KlPlace::Reward).is_some() => {
                Contrasts::Nothing
            }
            // Its weight is 0 where all labels are the same.
            Self::Policy(PolicyConfig { advantage: AdvantageEstimator::WeightedRloo { right, wrong }, .. })
                if (*right, *wrong) != (0.0, 0.0) =>
            {
                Contrasts::Labels
            }
            Self::Policy(_) => Contrasts::Rewards,
        }
    }

    /// Summary of one answer at the start of a step; `tokens.new` is not read. Errors name the answer by `index`.
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

    /// What the advantages of a step share: all answers, in the same order on every rank.
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

    /// Advantages of the tokens of answer `index` of those that `baseline` was made of; none for objectives without.
    ///
    /// # Errors
    /// As [`Self::summary`]; when an advantage overflows.
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

    /// What an update needs to know of one answer on every rank, where [`Needs::sums`].
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

    /// What the answers of a mini-batch share: all of them, whole groups, in the same order on every rank. `sums` are
    /// read where [`Needs::sums`].
    ///
    /// # Errors
    /// When an answer is unusable, or the arithmetic overflows.
    ///
    /// # Panics
    /// When sums are read and there is not one for each answer.
    pub fn update(&self, infos: &[SequenceInfo], sums: &[LogprobSums]) -> Result<UpdateState, ObjectiveError> {
        let sequences = |importance: Option<ImportanceWeights>| -> Vec<Sequence> {
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

    /// The state of an update whose loss and coefficients a program has given, one of each an answer.
    ///
    /// # Errors
    /// When there is not one of each for every answer, or a number is not finite.
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

    /// Loss and derivatives of answer `index` of those that `state` was made of.
    ///
    /// # Errors
    /// When numbers that the objective reads are missing or not finite, or the arithmetic overflows.
    ///
    /// # Panics
    /// When the state is another objective's.
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
                outcome.dloss_dlogprob.fill(step.dloss_dlogprob[index]);
                if config.reward_method == RewardMethod::LogRatio {
                    let (new, old) = (answer.new_logprobs()?, answer.old_logprobs()?);
                    let log_ratios: Vec<f64> = new.iter().zip(old).map(|(new, old)| new - old).collect();
                    outcome.metrics.add_ratios(&log_ratios);
                }
                if let Some(weights) = &config.importance {
                    let (old, rollout) = (answer.old_logprobs()?, answer.rollout_logprobs()?);
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
                let (new, old) = (answer.new_logprobs()?, answer.old_logprobs()?);
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

    /// The same objective without its value model's loss: what the policy is trained on. Advantages come from the whole
    /// one.
    #[must_use]
    pub fn of_policy(self) -> Self {
        match self {
            Self::Pacs(_) | Self::Real(_) | Self::Disco(_) | Self::External => self,
            Self::Policy(config) => Self::Policy(PolicyConfig { value: None, ..config }),
        }
    }

    /// Whether step `step` (from 1) trains the policy; before, only the value model is trained.
    #[must_use]
    pub fn trains_policy(&self, step: u64) -> bool {
        match self {
            Self::Pacs(_) | Self::Real(_) | Self::Disco(_) | Self::External => true,
            Self::Policy(config) => config.trains_policy(step),
        }
    }

    /// Value loss of answer `index` of those that `state` was made of: the part of [`sequence`](Self::sequence) that
    /// trains a value model. `tokens.new` and `tokens.old` are not read.
    ///
    /// # Errors
    /// When values are missing or not finite, or the arithmetic overflows.
    ///
    /// # Panics
    /// When the state is another objective's.
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

    /// Whether an answer has no gradient whatever its log-probs are: then it needs no forward, and these are its metrics.
    #[must_use]
    pub fn inert(&self, info: &SequenceInfo, advantages: &TokenAdvantages) -> Option<ObjectiveMetrics> {
        match self {
            Self::Pacs(_) | Self::Real(_) | Self::Disco(_) | Self::External => None,
            Self::Policy(config) => config.inert(info, advantages),
        }
    }

    /// Evaluates the objective on a mini-batch that is a whole step, in one place.
    ///
    /// Pass all members of every group. No derivative goes through old, rollout or reference log-probs, old values,
    /// rewards or importance weights.
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

/// An answer as objectives see it that couple answers by their log-probs.
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

/// Logarithm of the weight of an answer as a whole.
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

    pub(crate) fn finite(self, index: usize, group: u64) -> Result<Self, ObjectiveError> {
        let derivatives = self.dloss_dlogprob.iter().chain(self.dloss_dvalue.iter().flatten());
        let finite = derivatives.chain([&self.loss, &self.value_loss]).all(|number| number.is_finite());
        if finite { Ok(self) } else { Err(ObjectiveError::Overflow { index, group }) }
    }
}
