//! From a batch and the log-probs of its answers to the coefficients of the backward pass.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use pacs_algo::{
    LogprobSums, Needs, Objective, ObjectiveError, ScalarStep, SequenceInfo, StepSummary, TokenAdvantages, TokenData,
    UpdateState,
};

use super::batch::{IndexEntry, TrainBatch};
use super::external::External;
use super::metrics::StepMetrics;
use super::pass::TokenCoefficients;
use crate::comm::CollectiveQueue;
use crate::error::TrainError;

/// The objective at one training step, on one rank.
#[derive(Debug)]
pub(super) struct StepObjective<'a> {
    /// Objective that advantages and the value model use.
    objective: Objective,
    /// Objective of the policy update: the same without the value loss.
    of_policy: Objective,
    batch: &'a TrainBatch,
    /// What every rank knows of each answer, by position.
    infos: Vec<SequenceInfo>,
    /// Per-token numbers of this rank's answers, by place.
    own: Vec<Own>,
}

/// Per-token numbers of one answer, gathered before its update.
#[derive(Clone, Debug, Default)]
struct Own {
    /// Log-probs of the old policy; `None` where the forward of the update is itself that of the old policy.
    old: Option<Vec<f64>>,
    reference: Option<Vec<f64>>,
    /// Estimates of the value model at the start of the step.
    values: Option<Vec<f64>>,
    advantages: TokenAdvantages,
}

impl<'a> StepObjective<'a> {
    /// Starts a step. Advantages are computed at once, unless they depend on numbers that have to be gathered first.
    pub(super) fn new(objective: Objective, batch: &'a TrainBatch) -> Result<Self, ObjectiveError> {
        let infos: Vec<SequenceInfo> = batch.index.iter().map(info).collect();
        let own = vec![Own::default(); batch.sequences.len()];
        let mut step = Self { objective, of_policy: objective.of_policy(), batch, infos, own };
        if !step.needs().summaries {
            let summary = |(position, info)| step.objective.summary(position, info, &TokenData::default());
            let summaries: Vec<StepSummary> = step.infos.iter().enumerate().map(summary).collect::<Result<_, _>>()?;
            step.set_advantages(&summaries)?;
        }
        Ok(step)
    }

    pub(super) fn needs(&self) -> Needs {
        self.objective.needs()
    }

    /// Whether this step trains the policy, rather than the value model alone.
    pub(super) fn trains_policy(&self) -> bool {
        self.objective.trains_policy(self.batch.step)
    }

    /// Whether the answer at `place` gives the policy no gradient, whatever its log-probs are.
    pub(super) fn is_inert(&self, place: usize) -> bool {
        let info = &self.infos[self.batch.sequences[place].position];
        self.of_policy.inert(info, &self.own[place].advantages).is_some()
    }

    /// Adds the metrics of an answer that is skipped because it is inert.
    pub(super) fn skip(&self, place: usize, metrics: &mut StepMetrics) {
        let info = &self.infos[self.batch.sequences[place].position];
        let advantages = &self.own[place].advantages;
        if let Some(inert) = self.of_policy.inert(info, advantages) {
            metrics.objective.merge(&inert);
            metrics.signals.note_inert(place, advantages.mean());
        }
    }

    /// Sets the log-probs of the answer at `place` under the old policy (nats).
    pub(super) fn set_old(&mut self, place: usize, logprobs: &[f32]) {
        self.own[place].old = Some(float64(logprobs));
    }

    /// Sets the log-probs of the answer at `place` under the reference policy (nats).
    pub(super) fn set_reference(&mut self, place: usize, logprobs: &[f32]) {
        self.own[place].reference = Some(float64(logprobs));
    }

    /// Sets the value estimates for the tokens of the answer at `place`.
    pub(super) fn set_values(&mut self, place: usize, values: &[f32]) {
        self.own[place].values = Some(float64(values));
    }

    /// Exchanges what advantages need from other ranks, if anything, and computes them. Old and reference log-probs and
    /// values must be set.
    pub(super) fn settle(&mut self, queue: &mut CollectiveQueue<'_>) -> Result<(), TrainError> {
        if !self.needs().summaries {
            return Ok(());
        }
        let mut mine = Vec::with_capacity(4 * self.own.len());
        for place in 0..self.own.len() {
            let position = self.batch.sequences[place].position;
            let StepSummary { reward, mean, squares } =
                self.with_tokens(place, &[], |tokens| self.objective.summary(position, &self.infos[position], tokens))?;
            mine.extend([reward, mean, squares]);
        }
        let summaries = self.gather(0..self.infos.len(), &mine, queue)?;
        let summaries: Vec<StepSummary> =
            summaries.into_iter().map(|[reward, mean, squares]| StepSummary { reward, mean, squares }).collect();
        Ok(self.set_advantages(&summaries)?)
    }

    fn set_advantages(&mut self, summaries: &[StepSummary]) -> Result<(), ObjectiveError> {
        let baseline = self.objective.baseline(&self.infos, summaries)?;
        for place in 0..self.own.len() {
            let position = self.batch.sequences[place].position;
            let info = &self.infos[position];
            self.own[place].advantages =
                self.with_tokens(place, &[], |tokens| self.objective.advantages(&baseline, position, info, tokens))?;
        }
        Ok(())
    }

    /// Returns an update that needs no log-probs of a forward: an on-policy one, whose log-ratios are all 0, or that of
    /// a value model.
    pub(super) fn on_policy(&self, members: Range<usize>) -> Result<UpdateObjective<'_>, ObjectiveError> {
        let sums = vec![LogprobSums::default(); members.len()];
        self.update(members, &sums)
    }

    /// Returns an update after gathering the log-prob sums of all its answers, if the objective couples answers by
    /// them. Only then is `scored`, this rank's answers, read. `external` is the program of the objective, on the rank
    /// that asks it.
    pub(super) fn gathered(
        &self,
        members: Range<usize>,
        scored: &[Scored],
        external: Option<&Mutex<External>>,
        queue: &mut CollectiveQueue<'_>,
        metrics: &mut StepMetrics,
    ) -> Result<UpdateObjective<'_>, TrainError> {
        if !self.needs().sums {
            return Ok(self.update(members, &[])?);
        }
        // Ranks exchange numbers in the order of the index, which passes do not preserve.
        let mut in_order: Vec<&Scored> = scored.iter().collect();
        in_order.sort_unstable_by_key(|scored| scored.place);
        let mut mine = Vec::with_capacity(3 * scored.len());
        for Scored { place, logprobs, .. } in in_order {
            let position = self.batch.sequences[*place].position;
            let info = &self.infos[position];
            let new = float64(logprobs);
            let sums = self.with_tokens(*place, &new, |tokens| self.objective.sums(position, info, tokens))?;
            mine.extend([sums.new, sums.old, sums.rollout]);
        }
        let sums = self.gather(members.clone(), &mine, queue)?;
        let sums: Vec<LogprobSums> =
            sums.into_iter().map(|[new, old, rollout]| LogprobSums { new, old, rollout }).collect();
        let update = match self.objective {
            Objective::External => self.answered(members.clone(), &sums, external, queue)?,
            _ => self.update(members.clone(), &sums)?,
        };
        if self.needs().old {
            metrics.log_ratios.extend(sums.iter().map(|sums| sums.new - sums.old));
        }
        if let UpdateState::Pacs(step) = &update.state {
            metrics.scores.extend(&step.score);
            metrics.positive.extend(self.infos[members].iter().map(|info| info.label > 0.5));
        }
        Ok(update)
    }

    /// Returns an update whose numbers an external program computes: one rank asks it and broadcasts the reply.
    fn answered(
        &self,
        members: Range<usize>,
        sums: &[LogprobSums],
        external: Option<&Mutex<External>>,
        queue: &mut CollectiveQueue<'_>,
    ) -> Result<UpdateObjective<'_>, TrainError> {
        let infos = &self.infos[members.clone()];
        let mut said = Vec::new();
        if let Some(external) = external {
            let update = self.batch.index[members.start].mini_batch;
            // A panic while the lock was held has already ended the learner, so poison carries no information.
            let mut external = external.lock().unwrap_or_else(PoisonError::into_inner);
            let ScalarStep { loss, dloss_dlogprob } = external.ask((self.batch.step, update), infos, sums)?;
            // The count goes first, because losses and coefficients travel in one list.
            said.push(loss.len() as f64);
            said.extend(loss.into_iter().chain(dloss_dlogprob));
        }
        let heard = queue.gather(said)?.into_iter().flatten().collect::<Vec<f64>>();
        let (first, numbers) = heard.split_first().ok_or(ObjectiveError::NoProgram)?;
        let (loss, coefficients) = numbers.split_at((*first as usize).min(numbers.len()));
        let step = ScalarStep { loss: loss.to_vec(), dloss_dlogprob: coefficients.to_vec() };
        Ok(UpdateObjective { step: self, first: members.start, state: Objective::scalars(infos, step)? })
    }

    fn update(&self, members: Range<usize>, sums: &[LogprobSums]) -> Result<UpdateObjective<'_>, ObjectiveError> {
        let state = self.objective.update(&self.infos[members.clone()], sums)?;
        Ok(UpdateObjective { step: self, first: members.start, state })
    }

    /// Gathers `N` numbers for each sequence at `positions`. Every rank knows which rank computes which sequence, so
    /// the numbers travel in the order of the index without identifiers.
    fn gather<const N: usize>(
        &self,
        positions: Range<usize>,
        mine: &[f64],
        queue: &mut CollectiveQueue<'_>,
    ) -> Result<Vec<[f64; N]>, TrainError> {
        let ranks = queue.gather(mine.to_vec())?;
        let mut of_rank: Vec<_> = ranks.iter().map(|numbers| numbers.chunks_exact(N)).collect();
        let next = |position: usize| {
            let mut numbers = [f64::NAN; N];
            let rank = self.batch.index[position].rank;
            if let Some(chunk) = of_rank.get_mut(rank).and_then(Iterator::next) {
                numbers.copy_from_slice(chunk);
            }
            numbers
        };
        Ok(positions.map(next).collect())
    }

    /// Calls `f` with all numbers of the answer at `place`. `new` are its log-probs in this update, empty before it.
    fn with_tokens<T>(&self, place: usize, new: &[f64], f: impl FnOnce(&TokenData<'_>) -> T) -> T {
        let own = &self.own[place];
        let rollout = self.needs().rollout.then(|| float64(self.batch.sequences[place].behaviour_logprobs()));
        f(&TokenData {
            new,
            old: own.old.as_deref().unwrap_or(new),
            rollout: rollout.as_deref(),
            reference: own.reference.as_deref(),
            values: own.values.as_deref(),
            ..TokenData::default()
        })
    }
}

/// One of this rank's answers, scored under the policy being trained.
#[derive(Clone, Debug, Default)]
pub(super) struct Scored {
    pub(super) place: usize,
    /// Log-prob of each token (nats).
    pub(super) logprobs: Vec<f32>,
    /// Entropy at each token (nats); empty where the objective reads none.
    pub(super) entropies: Vec<f32>,
}

/// The objective at one optimizer update, on one rank.
#[derive(Debug)]
pub(super) struct UpdateObjective<'a> {
    step: &'a StepObjective<'a>,
    /// Position of the mini-batch's first answer in the index.
    first: usize,
    state: UpdateState,
}

impl UpdateObjective<'_> {
    /// Computes the coefficients of an answer in an update that needs no forward first.
    pub(super) fn known(&self, place: usize, metrics: &mut StepMetrics) -> Result<TokenCoefficients, ObjectiveError> {
        let tokens = self.step.batch.sequences[place].tokens.len();
        self.coefficients(&Scored { place, logprobs: vec![0.0; tokens], entropies: Vec::new() }, metrics)
    }

    /// Computes the coefficients of an answer from its log-probs, and adds its loss and metrics.
    pub(super) fn coefficients(
        &self,
        scored: &Scored,
        metrics: &mut StepMetrics,
    ) -> Result<TokenCoefficients, ObjectiveError> {
        let step = self.step;
        let place = scored.place;
        let position = step.batch.sequences[place].position;
        let info = &step.infos[position];
        let advantages = &step.own[place].advantages;
        let new = float64(&scored.logprobs);
        let entropies = float64(&scored.entropies);
        let outcome = step.with_tokens(place, &new, |tokens| {
            let tokens = TokenData { entropies: Some(&entropies), ..*tokens };
            step.of_policy.sequence(&self.state, position - self.first, info, advantages, &tokens)
        })?;
        metrics.sums.loss += outcome.loss;
        metrics.objective.merge(&outcome.metrics);
        metrics.signals.note(place, &outcome);
        let by_entropy = step.objective.needs().entropy.then_some(outcome.dloss_dentropy as f32);
        Ok(TokenCoefficients {
            by_logprob: float32(&outcome.dloss_dlogprob),
            by_entropy: by_entropy.map(|by_entropy| vec![by_entropy; new.len()]).unwrap_or_default(),
        })
    }

    /// Whether the value model learns from the answer at `place`.
    pub(super) fn counts(&self, place: usize) -> bool {
        let info = &self.step.infos[self.step.batch.sequences[place].position];
        match &self.step.objective {
            Objective::Pacs(_) | Objective::Real(_) | Objective::Disco(_) | Objective::External => false,
            Objective::Policy(config) => config.counts(info),
        }
    }

    /// Computes the derivative of the value loss with respect to each of the answer's new values, `new`.
    pub(super) fn by_values(
        &self,
        place: usize,
        new: &[f32],
        metrics: &mut StepMetrics,
    ) -> Result<Vec<f32>, ObjectiveError> {
        let step = self.step;
        let position = step.batch.sequences[place].position;
        let info = &step.infos[position];
        let targets = &step.own[place].advantages;
        let new = float64(new);
        let outcome = step.with_tokens(place, &[], |tokens| {
            let tokens = TokenData { new_values: Some(&new), ..*tokens };
            step.objective.value(&self.state, position - self.first, info, targets, &tokens)
        })?;
        metrics.sums.value_loss += outcome.loss;
        metrics.objective.merge(&outcome.metrics);
        Ok(float32(&outcome.dloss_dvalue))
    }
}

fn info(entry: &IndexEntry) -> SequenceInfo {
    SequenceInfo {
        group: entry.group,
        label: entry.label,
        reward: entry.reward,
        greedy_reward: None,
        tokens: entry.answer_tokens,
        truncated: entry.truncated,
    }
}

fn float32(values: &[f64]) -> Vec<f32> {
    values.iter().map(|value| *value as f32).collect()
}

fn float64(values: &[f32]) -> Vec<f64> {
    values.iter().map(|value| f64::from(*value)).collect()
}
