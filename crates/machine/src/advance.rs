//! What the run does next: the transitions of the learners' phase, and the filling of free slots.

use std::collections::BTreeSet;

use pacs_types::{GroupId, WeightVersion};

use crate::machine::Machine;
use crate::phase::{Phase, Task, Training};
use crate::schedule::{Candidate, Decision, Terms, decide};
use crate::{Counter, Effect, End, StopMode, TaskKind, UniformGroups};

/// The transition that `advance` takes from a point between two tasks.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Next {
    Assemble,
    Evaluate,
    Sample,
    Save {
        model: bool,
        background: bool,
    },
    /// The checkpoint in flight has to become durable first.
    Settle,
    /// A learner has returned or is to leave: the generation is dissolved and formed again with other ranks.
    Regroup,
    End(End),
}

impl Machine {
    /// Leaves a point between two tasks for the next phase.
    pub(crate) fn advance(&mut self) {
        match self.next() {
            Next::Assemble => {
                self.enter(Phase::Assembling);
                self.try_assemble();
            }
            Next::Evaluate => self.begin_evaluation(),
            Next::Sample => self.begin_sampling(),
            Next::Save { model, background } => self.begin_save(model, background),
            Next::Settle => self.enter(Phase::Committing),
            Next::Regroup => self.regroup(),
            Next::End(end) => self.end(end),
        }
        // An asynchronous job samples ahead whatever the learners do, so the slots are filled in every phase.
        self.fill();
    }

    pub(crate) fn begin_sampling(&mut self) {
        self.enter(Phase::Sampling);
        self.fill();
        self.try_train();
    }

    fn next(&self) -> Next {
        let step = self.position.step;
        if self.options.evaluation_only {
            return match (self.stop, self.evaluated.contains(&step)) {
                (Some(_), _) => Next::End(End::Stopped),
                (None, true) => Next::End(End::Finished),
                (None, false) => Next::Evaluate,
            };
        }
        let is_last = step >= self.options.total_steps;
        let is_unsaved = step > self.restart.step;
        if is_last && self.exported && !is_unsaved {
            return Next::End(End::Finished);
        }
        // A graceful stop reaches this point once its last step is done; `StopMode::Now` has ended the run already.
        if self.stop.is_some() && !is_unsaved || self.stop == Some(StopMode::Now) {
            return Next::End(End::Stopped);
        }
        if self.team.is_none() {
            return Next::Assemble;
        }
        // At most one checkpoint is in flight.
        let save = |model, background| match self.writing {
            Some(_) => Next::Settle,
            None => Next::Save { model, background },
        };
        if self.stop.is_some() {
            return save(false, false);
        }
        let is_tried = self.save_tried == Some(step);
        if (self.may_grow() || self.must_release()) && !is_last {
            match is_unsaved {
                false => return Next::Regroup,
                // Regrouping loses nothing only if the step is saved: a step that cannot be
                // saved is not given up for it.
                true if !is_tried || self.writing.is_some() => return save(false, false),
                true => {}
            }
        }
        let every = self.options.checkpoint_every_steps;
        let is_due = every > 0 && step.is_multiple_of(every) && !is_tried;
        if is_unsaved && !is_last && (is_due || self.checkpoint_wanted) {
            return save(false, self.options.background_saves);
        }
        // A trial is undone, which costs nothing but its own step if the steps before it are saved. A save that has failed
        // is not tried again for it.
        if is_unsaved && self.trials.are_due_at(step + 1) && (!is_tried || self.writing.is_some()) {
            return save(false, false);
        }
        if self.must_evaluate() {
            return Next::Evaluate;
        }
        if is_last { save(true, false) } else { Next::Sample }
    }

    pub(crate) fn new_task(&mut self, kind: TaskKind) -> Task {
        Task { id: self.next_id(), kind, done: BTreeSet::new(), heard: self.now, skipped_updates: 0 }
    }

    pub(crate) fn policy_version(&self) -> WeightVersion {
        WeightVersion(self.position.step)
    }

    /// Draws prompts into the free slots, but no more than the remaining steps need.
    pub(crate) fn fill(&mut self) {
        // Without lag, prompts are drawn only while the learners sample, so that samples come from the newest weights.
        let is_ahead = self.options.max_lag > 0 && self.weights.is_some() && self.team.is_some();
        if self.options.evaluation_only || self.is_ended() || !(is_ahead || matches!(self.phase, Phase::Sampling)) {
            return;
        }
        let per_step = self.options.prompts_per_step as usize;
        let (trained, making) = self.phase.training().map_or((0, 0), |training| (training.groups.len(), 1));
        let steps_left = match self.stop {
            None => self.options.total_steps.saturating_sub(self.position.step + making),
            // A stop after this step leaves the following steps to the next process.
            Some(_) => u64::from(matches!(self.phase, Phase::Sampling)),
        };
        let needed = usize::try_from(steps_left).unwrap_or(usize::MAX).saturating_mul(per_step);
        let room = (self.options.slots as usize).saturating_sub(trained);
        let (samples, version, now) = (self.options.samples_per_prompt, self.policy_version(), self.now);
        // Held suspects take no slots, or no batch would fill up. They are counted in every turn,
        // because a draw may return one.
        while self.pool.len() < room.min(needed).saturating_add(self.held_groups().len()) {
            let group = self.draw();
            self.pool.add(group, samples, version, now);
        }
    }

    /// Begins the step as soon as enough groups for a batch are complete.
    pub(crate) fn try_train(&mut self) {
        let groups = self.options.prompts_per_step as usize;
        while matches!(self.phase, Phase::Sampling) && !self.paused && self.pool.complete() >= groups {
            match decide(self.terms(), self.candidates()) {
                Decision::Train(batch) => {
                    let is_trial = self.is_trial(&batch);
                    return self.begin_training(&batch, is_trial);
                }
                Decision::TooFew | Decision::WaitFor(_) => return,
                Decision::Evict(stale) => {
                    let version = self.policy_version();
                    self.count(Counter::EvictedGroups, stale.len() as u64);
                    for group in stale {
                        self.pool.restart_group(group, version);
                        self.effects.push(Effect::RestartGroup(group));
                    }
                }
            }
        }
    }

    /// Groups that the next batch may be chosen from: those in the pool, without suspects that a trial holds back.
    pub(crate) fn candidates(&self) -> Vec<Candidate> {
        let held = self.held_groups();
        let mut candidates = self.pool.candidates();
        candidates.retain(|candidate| !held.contains(&candidate.id));
        candidates
    }

    /// Whether the search for a group at fault has changed what is in the next batch.
    ///
    /// Groups that it holds back count as complete: the batch does not wait for them, and would without the search.
    fn is_trial(&self, batch: &[GroupId]) -> bool {
        let (held, mut natural) = (self.held_groups(), self.pool.candidates());
        natural.iter_mut().for_each(|candidate| candidate.complete |= held.contains(&candidate.id));
        !held.is_empty() && !matches!(decide(self.terms(), natural), Decision::Train(natural) if natural == batch)
    }

    pub(crate) fn terms(&self) -> Terms {
        Terms {
            version: self.position.step,
            max_lag: u64::from(self.options.max_lag),
            groups: self.options.prompts_per_step as usize,
            staleness: self.options.staleness,
        }
    }

    fn begin_training(&mut self, batch: &[GroupId], is_trial: bool) {
        let groups = self.pool.take(batch);
        if let Some(reason) = self.collapse(groups.values()) {
            self.pool.put_back(groups);
            return self.fail(reason);
        }
        let step = self.position.step + 1;
        let uniform: Vec<GroupId> = match self.options.uniform_groups {
            UniformGroups::Drop => groups
                .iter()
                .filter(|(_, group)| group.is_uniform(self.options.uniform_by))
                .map(|(id, _)| *id)
                .collect(),
            UniformGroups::Keep | UniformGroups::Refill => Vec::new(),
        };
        // If too few groups would be left, the newest uniform ones stay in the batch.
        let may_go = groups.len().saturating_sub(self.options.min_batch_groups as usize);
        let left_out: Vec<GroupId> = uniform.into_iter().take(may_go).collect();
        self.count(Counter::UniformGroups, left_out.len() as u64);
        let oldest = groups.values().map(|group| group.born().0).min().unwrap_or(self.position.step);
        let lag = self.position.step.saturating_sub(oldest);
        let trained = groups.keys().filter(|group| !left_out.contains(group)).copied().collect();
        let (task, ranks) = (self.new_task(TaskKind::Train { step }), self.team_size());
        let ranks = u32::try_from(ranks).expect("a generation has at most as many ranks as the job spec says, a u32");
        self.enter(Phase::Training(Training { task, groups, left_out: left_out.clone(), is_trial }));
        self.effects.push(Effect::Train { step, groups: trained, left_out, ranks, lag });
        self.fill();
    }

    /// Replaces a complete group without contrast by the next prompt, if the job refills and its budget allows.
    pub(crate) fn refill_if_uniform(&mut self, group: GroupId) {
        let wanted = self.options.uniform_groups == UniformGroups::Refill && self.refills < self.options.max_refills;
        if !wanted || !self.pool.is_uniform(group, self.options.uniform_by) {
            return;
        }
        self.refills += 1;
        self.count(Counter::UniformGroups, 1);
        // The curriculum counts refilled groups, too: they show which problems are always or never solved.
        if let Some(uniform) = self.pool.remove(group) {
            self.note_evidence(group, &uniform);
        }
        self.effects.push(Effect::DropGroup { group, why: crate::Dropped::Uniform });
        self.fill();
    }

    /// Whether new leases may be granted.
    pub(crate) fn may_lend(&self) -> bool {
        let is_leaving = matches!(self.stop, Some(StopMode::Save | StopMode::Now));
        !self.paused && !is_leaving && !self.is_ended()
    }

    pub(crate) fn fail(&mut self, reason: String) {
        self.end(End::Failed { reason });
    }

    /// Leaves a phase early: a batch in training becomes complete groups again, and an evaluation is discarded. A job
    /// that only evaluates keeps it, because the model does not change and its samples stay valid.
    pub(crate) fn interrupt(&mut self) {
        match std::mem::replace(&mut self.phase, Phase::Assembling) {
            Phase::Training(training) | Phase::Ahead(training) => self.pool.put_back(training.groups),
            Phase::Evaluating(mut evaluation) if self.options.evaluation_only => {
                // Lease holders learn of the end with their next heartbeat and request nothing more.
                evaluation.pool.end_all_loans();
                self.unfinished = Some(evaluation);
            }
            Phase::Evaluating(evaluation) => {
                let groups = evaluation.pool.group_ids().collect();
                self.effects.push(Effect::ForgetEvaluation(groups));
            }
            Phase::Assembling
            | Phase::Preparing(_)
            | Phase::Sampling
            | Phase::Saving(_)
            | Phase::Committing
            | Phase::Ended(_) => {}
        }
    }

    pub(crate) fn end(&mut self, end: End) {
        // One event can have several consequences that each end the run; the first one counts.
        if self.is_ended() {
            return;
        }
        self.interrupt();
        self.discard_evaluation();
        self.enter(Phase::Ended(end.clone()));
        self.effects.push(Effect::Ended(end));
    }
}

#[cfg(test)]
mod tests {
    use pacs_types::{GroupId, Outcome, Role, SampleId};

    use crate::handlers::testing::*;
    use crate::{
        Effect, EvaluationPlan, EvaluationSetPlan, Event, Options, PhaseKind, SampleGrant, UniformBy, UniformGroups,
    };

    fn judge(run: &mut Run) {
        run.generate_all();
        run.verify_all(|sample| if sample.index == 0 { Outcome::Correct } else { Outcome::Wrong });
    }

    /// Groups that step 1 trains on and leaves out; `judge` returns the `(label, reward)` of a sample.
    fn trained_and_left_out(uniform_by: UniformBy, judge: fn(SampleId) -> (f64, f64)) -> (Vec<u64>, Vec<u64>) {
        let uniform_groups = UniformGroups::Drop;
        let mut run = Run::sampling(Options { uniform_groups, uniform_by, min_batch_groups: 1, ..options() });
        run.generate_all();
        let (worker, mut effects) = (run.verifier, Vec::new());
        for SampleGrant { lease, sample } in run.samples() {
            let (label, reward) = judge(sample);
            let outcome = if label > 0.5 { Outcome::Correct } else { Outcome::Wrong };
            let reward = Some(reward);
            effects.extend(run.step(Event::SubmitVerdict { worker, lease, sample, outcome, label, reward }));
        }
        let numbers = |groups: &[GroupId]| groups.iter().map(|group| group.0).collect::<Vec<_>>();
        let train = effects.iter().find_map(|effect| match effect {
            Effect::Train { groups, left_out, .. } => Some((numbers(groups), numbers(left_out))),
            _ => None,
        });
        train.expect("a step begins")
    }

    #[test]
    fn groups_are_uniform_by_what_the_objective_contrasts() {
        // Group 0: one label, rewards that differ. Group 1: labels that differ, one reward.
        let judge = |sample: SampleId| {
            let odd = f64::from(sample.index % 2);
            if sample.group.0 == 0 { (1.0, 1.0 + odd) } else { (odd, 0.5) }
        };
        assert_eq!(trained_and_left_out(UniformBy::Labels, judge), (vec![1], vec![0]));
        assert_eq!(trained_and_left_out(UniformBy::Rewards, judge), (vec![0], vec![1]));
    }

    fn measuring(before: bool) -> EvaluationPlan {
        EvaluationPlan { problems: 2, samples_per_problem: 3, every_steps: 0, before, after: false }
    }

    #[test]
    fn a_job_that_only_measures_needs_no_learner_and_keeps_its_samples_over_a_stop() {
        let sets = vec![EvaluationSetPlan { first: 1 << 24, plan: measuring(true) }];
        let options = Options {
            evaluation: measuring(true),
            evaluation_sets: sets,
            evaluation_only: true,
            max_lag: 1,
            ..options()
        };
        let mut run = Run::new(Options { slots: 4, ..options });
        run.rollout = run.register(Role::Rollout, "rollout-0").0;
        run.verifier = run.register(Role::Verifier, "verifier-0").0;
        assert_eq!(run.machine.status(run.now).phase, PhaseKind::Evaluating);
        let mut held = run.groups(run.rollout, 10_000);
        let ids: Vec<u64> = held.iter().map(|grant| grant.group.0 - crate::EVALUATION_GROUPS).collect();
        assert_eq!(ids, [0, 1, 1 << 24, (1 << 24) + 1], "and nothing to train on");
        let late = held.split_off(2);
        run.hand_in(held);
        run.verify_all(|_| Outcome::Correct);
        assert_eq!(run.machine.measuring(), Some((6, 12)));

        let effects = run.step(crate::handlers::testing::stop(crate::StopMode::Save));
        assert_eq!(effects.last(), Some(&Effect::Ended(crate::End::Stopped)));
        assert!(!effects.iter().any(|effect| matches!(effect, Effect::ForgetEvaluation(_))), "{effects:?}");
        assert_eq!(run.machine.present().count(), 6, "the journal keeps them");
        let sample = SampleId { group: late[0].group, index: 0 };
        let (worker, lease, version) = (run.rollout, late[0].lease, pacs_types::WeightVersion(0));
        assert!(run.call(Event::SubmitSample { worker, lease, sample, version }).is_err(), "its lease is over");

        run.step(Event::Reopened);
        run.join_again();
        assert_eq!(run.machine.measuring(), Some((6, 12)));
        run.generate_all();
        let effects = run.verify_all(|_| Outcome::Wrong);
        let Some(Effect::Evaluated { step: 0, groups, excluded: 0, took: None }) =
            effects.iter().find(|effect| matches!(effect, Effect::Evaluated { .. }))
        else {
            panic!("{effects:?}")
        };
        assert_eq!(groups.len(), 4);
        assert_eq!(effects.last(), Some(&Effect::Ended(crate::End::Finished)));
        run.step(Event::Reopened);
        assert_eq!(run.machine.ended(), Some(&crate::End::Finished), "nothing is measured twice");
    }

    #[test]
    fn each_set_is_measured_by_its_own_schedule() {
        let set = |first, every_steps| EvaluationSetPlan {
            first,
            plan: EvaluationPlan { every_steps, before: false, ..measuring(false) },
        };
        let sets = vec![set(1 << 24, 1), set(1 << 25, 2)];
        let mut run = Run::sampling(Options { evaluation_sets: sets, total_steps: 4, ..options() });
        let mut measured = Vec::new();
        for _ in 0..3 {
            run.full_step();
            let groups: Vec<u64> = run.machine.phase.evaluation().map_or(Vec::new(), |evaluation| {
                evaluation.pool.group_ids().map(|group| group.0 - crate::EVALUATION_GROUPS).collect()
            });
            measured.push(groups);
            run.generate_all();
            run.verify_all(|_| Outcome::Correct);
        }
        let (first, second) = (1 << 24, 1 << 25);
        assert_eq!(measured[0], [first, first + 1]);
        assert_eq!(measured[1], [first, first + 1, second, second + 1]);
        assert_eq!(measured[2], [first, first + 1]);
    }

    #[test]
    fn a_snapshot_holds_the_evaluations_that_the_job_may_repeat_and_no_others() {
        let evaluation =
            EvaluationPlan { problems: 1, samples_per_problem: 1, every_steps: 1, before: true, after: true };
        let options = Options { total_steps: 40, checkpoint_every_steps: 3, evaluation, ..options() };
        let mut run = Run::sampling(options);
        for step in 1..=30 {
            judge(&mut run);
            assert!(run.machine.has_evaluated(step - 1) && !run.machine.has_evaluated(step));
            judge(&mut run);
            run.train();
            if step % 3 == 0 {
                run.save();
                run.step(Event::CheckpointCommitted { step });
            }
            assert!(run.machine.evaluated.len() <= 3, "{:?}", run.machine.evaluated);
        }
        // One more step is trained, evaluated and lost: the evaluation of the step before it is not repeated.
        judge(&mut run);
        judge(&mut run);
        run.train();
        judge(&mut run);
        assert!(run.machine.has_evaluated(31));
        let worker = run.learners[0];
        run.step(Event::Leave { worker, error: None });
        run.learners[0] = run.register(Role::Learner, "learner-0").0;
        run.step(Event::JoinGeneration { worker: run.learners[0] });
        run.prepare();
        assert_eq!(run.machine.position().step, 30);
        assert!(run.machine.has_evaluated(30) && !run.machine.has_evaluated(31));
        assert_eq!(run.machine.status(run.now).phase, crate::PhaseKind::Sampling);
    }
}
