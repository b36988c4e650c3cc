use pacs_types::{Generation, Role, WeightVersion, WorkerId};

use crate::machine::Machine;
use crate::phase::{Phase, Task};
use crate::trial::Found;
use crate::{Effect, FailureKind, Refusal, Reply, TaskKind, TaskResult};

impl Machine {
    /// Records a rank's report; the run continues when all ranks have reported.
    pub(crate) fn complete_task(&mut self, worker: WorkerId, generation: Generation, task: u64, result: TaskResult) {
        let rank = match self.rank_in(worker, generation) {
            Ok(rank) => rank,
            Err(refusal) => return self.refuse(refusal),
        };
        if self.is_of_writing(task) {
            return self.report_of_writing(worker, rank, task, result);
        }
        let (newest_id, now, ranks, step) = (self.newest_id, self.now, self.team_size(), self.position.step);
        let Some(current) = self.phase.task_mut().filter(|current| current.id == task) else {
            // An earlier task is a repeat, whose answer was lost; a later one was never given out.
            if task == 0 || task > newest_id {
                return self.refuse(Refusal::UnknownTask { task });
            }
            self.unchanged = true;
            return self.reply(Reply::Accepted { fresh: false });
        };
        if let TaskResult::Failed { message, kind } = result {
            if kind == FailureKind::Write {
                let problem = "only a save can fail because its files cannot be written".to_owned();
                return self.refuse(Refusal::BadResult { task, problem });
            }
            self.reply(Reply::Accepted { fresh: true });
            return self.task_failed(worker, &message, kind);
        }
        if current.done.contains(&rank) {
            self.unchanged = true;
            return self.reply(Reply::Accepted { fresh: false });
        }
        if let Err(problem) = check(current, rank, &result, step) {
            return self.refuse(Refusal::BadResult { task, problem });
        }
        current.done.insert(rank);
        current.heard = now;
        // Progress, but not the end of a series of stalls: ranks that hang in every step still report each preparation.
        self.progressed = now;
        if let (0, TaskResult::Trained { skipped_updates, .. }) = (rank, &result) {
            current.skipped_updates = *skipped_updates;
        }
        let is_done = current.done.len() == ranks;
        self.reply(Reply::Accepted { fresh: true });
        if is_done {
            self.task_done();
        }
    }

    /// Rank whose report on `task` would count, if that is the training task of the worker's generation. `None` for
    /// repeats of earlier tasks and for whatever [`Event::CompleteTask`](crate::Event::CompleteTask) would refuse.
    #[must_use]
    pub fn training_rank(&self, worker: WorkerId, generation: Generation, task: u64) -> Option<u32> {
        self.phase.training().filter(|training| training.task.id == task)?;
        self.rank_in(worker, generation).ok()
    }

    fn rank_in(&self, worker: WorkerId, generation: Generation) -> Result<u32, Refusal> {
        self.member(worker, Role::Learner)?;
        let stale = Refusal::StaleGeneration { asked: generation, current: self.newest_generation };
        let team = self.team.as_ref().filter(|team| team.generation == generation).ok_or(stale.clone())?;
        team.rank(worker).ok_or(stale)
    }

    pub(crate) fn task_failed(&mut self, worker: WorkerId, message: &str, kind: FailureKind) {
        let name = self.worker_name(worker);
        match kind {
            FailureKind::Permanent => self.failed_for_good(&format!("{name} failed for good: {message}")),
            // The rank still has the state in memory, so only the checkpoint is lost.
            FailureKind::Write => {
                let step = self.saving().map_or(self.position.step, |(step, _)| step);
                self.give_checkpoint_up(step, &format!("{name} failed to write it: {message}"));
            }
            // Also during a save: without the peer, neither this checkpoint nor the next step can complete.
            FailureKind::Generation => self.lose_generation(&format!("{name} failed: {message}")),
        }
    }

    /// Ends the run, unless a step has failed and one of its groups may be the cause.
    fn failed_for_good(&mut self, reason: &str) {
        match self.training_failed(reason, true) {
            None | Some(Found::NotTheData) => self.fail(reason.to_owned()),
            found @ Some(Found::Suspects | Found::Fewer | Found::Guilty(_)) => self.end_generation(reason, found),
        }
    }

    fn task_done(&mut self) {
        match &self.phase {
            Phase::Preparing(_) => {
                let step = self.position.step;
                self.weights = Some(WeightVersion(step));
                self.effects.push(Effect::Prepared { step });
                self.advance();
            }
            Phase::Training(_) => {
                if !self.training_succeeded() {
                    return self.undo_trial();
                }
                // It would announce the next version, and an evaluation has samples of one version only.
                if self.concurrent.is_some() {
                    return self.hold_step();
                }
                self.finish_step();
            }
            Phase::Assembling
            | Phase::Evaluating(_)
            | Phase::Sampling
            | Phase::Ahead(_)
            | Phase::Saving(_)
            | Phase::Committing
            | Phase::Ended(_) => unreachable!("a save is reported by itself, and these have no tasks"),
        }
    }

    /// Counts the step that all ranks have finished.
    pub(crate) fn finish_step(&mut self) {
        let Some(training) = self.phase.training() else { return };
        let skipped = u64::from(training.task.skipped_updates);
        self.settle_history();
        self.step_done(skipped);
    }

    fn step_done(&mut self, skipped: u64) {
        self.position.step += 1;
        self.position.skipped_updates += skipped;
        // A finished step shows that learners can work, so losses no longer count as consecutive.
        self.lost_generations = 0;
        self.progress();
        (self.failed_groups, self.refills) = (0, 0);
        let step = self.position.step;
        // All ranks have reached this version, so leases may name it.
        self.weights = Some(WeightVersion(step));
        self.effects.push(Effect::StepDone { step });
        self.renew_late();
        if self.position.skipped_updates > self.options.max_skipped_updates {
            return self.fail(format!(
                "{} optimizer updates were skipped because their gradient was not finite, more than the {} that \
                 optimizer.max_skipped_updates allows; a smaller learning rate may help",
                self.position.skipped_updates, self.options.max_skipped_updates
            ));
        }
        self.advance();
    }
}

/// Checks that a result fits its task, in a job that has done `made` steps.
fn check(task: &Task, rank: u32, result: &TaskResult, made: u64) -> Result<(), String> {
    match (&task.kind, result) {
        (TaskKind::Prepare, TaskResult::Prepared { weights })
        | (TaskKind::Train { .. }, TaskResult::Trained { weights, .. })
            if rank == 0 && weights.is_none() =>
        {
            Err("rank 0 must name the weights that it published".to_owned())
        }
        (TaskKind::Prepare, TaskResult::Prepared { weights: Some(version) }) if version.0 != made => Err(format!(
            "the weights that a job is resumed with after step {made} must have version v{made}, not {version}"
        )),
        (TaskKind::Train { step }, TaskResult::Trained { weights: Some(version), .. }) if version.0 != *step => {
            Err(format!("the weights after step {step} must have version v{step}, not {version}"))
        }
        (TaskKind::Prepare, TaskResult::Prepared { .. }) | (TaskKind::Train { .. }, TaskResult::Trained { .. }) => {
            Ok(())
        }
        (kind, result) => Err(format!("{result:?} does not answer {kind:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use crate::{Effect, End, Event, FailureKind, Options, PhaseKind, Refusal, TaskResult};
    use pacs_types::{Generation, Outcome, WeightVersion};

    #[test]
    fn all_ranks_must_report() {
        let mut run = Run::preparing(Options { learners: 2, ..options() });
        let task = run.task_of(0);
        let report = |run: &mut Run, rank: usize, weights| {
            let worker = run.learners[rank];
            run.whole_step(Event::CompleteTask {
                worker,
                generation: Generation(1),
                task,
                result: TaskResult::Prepared { weights },
            })
        };
        let refused = report(&mut run, 0, None);
        assert!(matches!(refused.answer, Err(Refusal::BadResult { .. })), "{refused:?}");
        assert!(report(&mut run, 0, Some(WeightVersion(0))).record.is_some());
        assert_eq!(report(&mut run, 0, Some(WeightVersion(0))).record, None, "a repeat changes nothing");
        assert!(report(&mut run, 1, None).effects.contains(&Effect::Prepared { step: 0 }));
    }

    #[test]
    fn reports_on_the_step_in_training_are_told_from_others() {
        let mut run = Run::preparing(Options { learners: 2, ..options() });
        let generation = Generation(1);
        let prepared = run.task_of(0);
        let rank = |run: &Run, worker, task| run.machine.training_rank(worker, generation, task);
        assert_eq!(rank(&run, run.learners[0], prepared), None, "that is no step");
        run.prepare();
        run.generate_all();
        run.verify_all(|_| Outcome::Correct);
        let task = run.task_of(1);
        assert_eq!(rank(&run, run.learners[0], task), Some(0));
        assert_eq!(rank(&run, run.learners[1], task), Some(1));
        assert_eq!(rank(&run, run.learners[1], prepared), None);
        assert_eq!(run.machine.training_rank(run.learners[1], Generation(2), task), None);
    }

    #[test]
    fn failures_regroup_or_end_the_run() {
        for (kind, phase) in [
            (FailureKind::Generation, PhaseKind::Assembling),
            (FailureKind::Permanent, PhaseKind::Failed),
            (FailureKind::Write, PhaseKind::Preparing),
        ] {
            let mut run = Run::preparing(options());
            let (worker, task) = (run.learners[0], run.task_of(0));
            let result = TaskResult::Failed { message: "bad file".into(), kind };
            run.step(Event::CompleteTask { worker, generation: Generation(1), task, result });
            assert_eq!(run.machine.status(run.now).phase, phase);
        }
    }

    #[test]
    fn too_many_skipped_updates_end_the_run() {
        let mut run = Run::sampling(Options { max_skipped_updates: 3, ..options() });
        run.generate_all();
        run.verify_all(|_| Outcome::Correct);
        let effects = run.train_skipping(4);
        assert!(matches!(effects.last(), Some(Effect::Ended(End::Failed { .. }))), "{effects:?}");
    }

    #[test]
    fn generations_lost_in_a_row_end_the_run() {
        let mut run = Run::preparing(Options { max_lost_generations: 3, ..options() });
        for lost in 1..=3 {
            let worker = run.learners[0];
            let (task, generation) = (run.task_of(0), Generation(lost));
            let result = TaskResult::Failed { message: "peer gone".into(), kind: FailureKind::Generation };
            run.step(Event::CompleteTask { worker, generation, task, result });
            run.step(Event::JoinGeneration { worker });
        }
        assert_eq!(run.machine.status(run.now).phase, PhaseKind::Failed);
    }
}
