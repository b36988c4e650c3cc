//! The checkpoint in flight. Nothing counts as saved before it is committed: until then a lost generation goes back to
//! the checkpoint before it.

use std::collections::BTreeSet;
use std::time::Duration;

use pacs_types::WorkerId;
use serde::{Deserialize, Serialize};

use crate::machine::Machine;
use crate::phase::Phase;
use crate::{Effect, FailureKind, Refusal, Reply, Snapshot, TaskKind, TaskResult};

/// A requested checkpoint that is not committed yet; at most one exists.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct PendingCheckpoint {
    /// The save task.
    pub(crate) task: u64,
    /// Position of the job that it stores.
    pub(crate) snapshot: Snapshot,
    /// Whether it contains the exported model.
    pub(crate) model: bool,
    /// Whether training continues as soon as the state is captured.
    pub(crate) background: bool,
    /// Number of ranks that take part.
    ranks: usize,
    /// Ranks whose files are durable.
    written: BTreeSet<u32>,
    /// Time of the last report, or the start of the save.
    pub(crate) heard: Duration,
}

impl PendingCheckpoint {
    /// Whether all files are durable, so that the commit no longer depends on the learners.
    pub(crate) fn is_written(&self) -> bool {
        self.written.len() == self.ranks
    }
}

impl Machine {
    pub(crate) fn begin_save(&mut self, model: bool, background: bool) {
        let step = self.position.step;
        self.save_tried = Some(step);
        self.checkpoint_wanted = false;
        let task = self.new_task(TaskKind::Save { step, model, background });
        self.writing = Some(PendingCheckpoint {
            task: task.id,
            snapshot: self.position_without_flight(),
            model,
            background,
            ranks: self.team_size(),
            written: BTreeSet::new(),
            heard: self.now,
        });
        let save = task.id;
        self.enter(Phase::Saving(task));
        self.effects.push(Effect::CreateCheckpoint { step, save });
    }

    /// Whether a report is about the checkpoint in flight. Such a report can arrive in any phase.
    pub(crate) fn is_of_writing(&self, task: u64) -> bool {
        self.writing.as_ref().is_some_and(|writing| writing.task == task)
    }

    /// Records a rank's report about the checkpoint in flight.
    pub(crate) fn report_of_writing(&mut self, worker: WorkerId, rank: u32, task: u64, result: TaskResult) {
        let now = self.now;
        let Some(writing) = &mut self.writing else { return };
        let fresh = match (&mut self.phase, &result) {
            // Files that were reported as durable stay so, whatever a repeated try reports:
            // they may be committed already.
            (_, TaskResult::Failed { kind: FailureKind::Write, .. }) if writing.written.contains(&rank) => false,
            (_, TaskResult::Failed { message, kind }) => {
                self.reply(Reply::Accepted { fresh: true });
                return self.task_failed(worker, message, *kind);
            }
            (phase, TaskResult::Saved) => {
                if let Phase::Saving(task) = phase {
                    task.done.insert(rank);
                }
                writing.written.insert(rank)
            }
            (Phase::Saving(task), TaskResult::Captured) if writing.background => task.done.insert(rank),
            // A late repeat.
            (_, TaskResult::Captured) if writing.background => false,
            (_, result) => {
                let problem = format!("{result:?} does not answer a save");
                return self.refuse(Refusal::BadResult { task, problem });
            }
        };
        if fresh {
            writing.heard = now;
            if let Phase::Saving(task) = &mut self.phase {
                task.heard = now;
            }
        }
        self.unchanged = !fresh;
        self.reply(Reply::Accepted { fresh });
        if fresh {
            self.save_goes_on(result == TaskResult::Saved);
        }
    }

    /// Continues training once all ranks have captured their state, and commits the files if the
    /// current report was the last one.
    fn save_goes_on(&mut self, files: bool) {
        let Some(writing) = &self.writing else { return };
        let (snapshot, model, save) = (writing.snapshot.clone(), writing.model, writing.task);
        let (written, background, ranks) = (writing.is_written() && files, writing.background, writing.ranks);
        let captured = matches!(&self.phase, Phase::Saving(task) if task.done.len() == ranks);
        if captured && !background {
            self.enter(Phase::Committing);
        }
        if written {
            self.effects.push(Effect::CommitCheckpoint { snapshot, model, save });
        }
        if captured && background {
            self.advance();
        }
    }

    /// Gives up the checkpoint in flight, because the ranks or the disk made no progress within the timeout.
    pub(crate) fn checkpoint_overdue(&mut self, task: u64) {
        let Some(writing) = self.writing.as_ref().filter(|writing| writing.task == task) else { return };
        let (step, seconds) = (writing.snapshot.step, self.options.checkpoint_timeout.as_secs());
        if writing.is_written() {
            // The commit may still succeed, so no other checkpoint can be started in its place.
            return self.fail(format!(
                "the disk has not taken the checkpoint of step {step} within {seconds} s; look at the disk of the run \
                 folder, then start the run again"
            ));
        }
        let whom = self.writing_ranks();
        self.give_checkpoint_up(step, &format!("{whom} has written nothing of it for {seconds} s"));
    }

    /// The save task, if the checkpoint in flight has made no progress since before `limit`. While ranks capture their
    /// state, the task timeout applies instead.
    pub(crate) fn overdue_writing(&self, limit: Duration) -> Option<u64> {
        let writing = self.writing.as_ref().filter(|writing| writing.heard < limit)?;
        (writing.is_written() || !matches!(self.phase, Phase::Saving(_))).then_some(writing.task)
    }

    /// What the checkpoint in flight waits for, in words.
    pub(crate) fn writing_status(&self) -> Option<String> {
        let writing = self.writing.as_ref()?;
        let step = writing.snapshot.step;
        Some(match writing.is_written() {
            true => format!("the disk to take the checkpoint of step {step}"),
            false => format!("{} to write the checkpoint of step {step}", self.writing_ranks()),
        })
    }

    fn writing_ranks(&self) -> String {
        let written = self.writing.as_ref().map(|writing| &writing.written);
        self.ranks_but(|rank| written.is_some_and(|written| written.contains(&rank)))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use pacs_types::{Generation, Outcome, Role};

    use crate::handlers::testing::*;
    use crate::{Effect, End, Event, FailureKind, Options, PhaseKind, Reply, Step, StopMode, TaskResult};

    /// Two learners whose captured state of step 1 is being written, and the save task.
    fn writing() -> (Run, u64) {
        let options = Options {
            learners: 2,
            total_steps: 6,
            checkpoint_every_steps: 1,
            background_saves: true,
            checkpoint_timeout: Duration::from_secs(60),
            ..options()
        };
        let mut run = Run::sampling(options);
        run.full_step();
        assert_eq!(run.machine.status(run.now).phase, PhaseKind::Saving);
        let save = run.task_of(0);
        report(&mut run, 0, save, TaskResult::Captured);
        assert_eq!(run.machine.status(run.now).phase, PhaseKind::Saving, "one rank has not captured its state yet");
        report(&mut run, 1, save, TaskResult::Captured);
        assert_eq!(run.machine.status(run.now).phase, PhaseKind::Sampling, "training continues");
        (run, save)
    }

    fn report(run: &mut Run, rank: usize, task: u64, result: TaskResult) -> Vec<Effect> {
        report_whole(run, rank, task, result).effects
    }

    fn report_whole(run: &mut Run, rank: usize, task: u64, result: TaskResult) -> Step {
        let (worker, generation) = (run.learners[rank], run.machine.status(run.now).generation);
        run.whole_step(Event::CompleteTask { worker, generation, task, result })
    }

    /// Result of a report that changes nothing.
    fn known() -> Step {
        Step { record: None, answer: Ok(Reply::Accepted { fresh: false }), effects: Vec::new() }
    }

    fn write(run: &mut Run, save: u64) {
        for rank in 0..2 {
            let effects = report(run, rank, save, TaskResult::Saved);
            let commits = effects.iter().any(|effect| matches!(effect, Effect::CommitCheckpoint { .. }));
            assert_eq!(commits, rank == 1, "{effects:?}");
        }
    }

    fn cannot_write() -> TaskResult {
        TaskResult::Failed { message: "no space left on device".into(), kind: FailureKind::Write }
    }

    fn lose_learner(run: &mut Run) -> Vec<Effect> {
        let worker = run.learners[1];
        let effects = run.step(Event::Leave { worker, error: None });
        run.learners[1] = run.register(Role::Learner, "learner-1").0;
        effects
    }

    fn rewound(effects: &[Effect]) -> Option<u64> {
        effects.iter().find_map(|effect| match effect {
            Effect::Rewound { step, .. } => Some(*step),
            _ => None,
        })
    }

    #[test]
    fn what_a_rank_has_written_stays_written() {
        let (mut run, save) = writing();
        report(&mut run, 0, save, TaskResult::Saved);
        assert_eq!(report_whole(&mut run, 0, save, cannot_write()), known());
        let effects = report(&mut run, 1, save, TaskResult::Saved);
        assert!(matches!(effects.last(), Some(Effect::CommitCheckpoint { .. })), "{effects:?}");
        // The same while it is being committed.
        assert_eq!(report_whole(&mut run, 1, save, cannot_write()), known());
    }

    #[test]
    fn a_rollback_targets_durable_state_only() {
        let (mut run, save) = writing();
        report(&mut run, 0, save, TaskResult::Saved);
        assert_eq!(rewound(&lose_learner(&mut run)), Some(0), "a half-written checkpoint is none");

        let (mut run, save) = writing();
        write(&mut run, save);
        run.generate_all();
        run.verify_all(|_| Outcome::Correct);
        assert_eq!(run.machine.status(run.now).phase, PhaseKind::Training);
        assert_eq!(rewound(&lose_learner(&mut run)), None, "the disk has not said yet whether it is one");
        let sentence = run.machine.status(run.now).waiting_for;
        assert!(sentence.starts_with("waits for the disk to take the checkpoint of step 1"), "{sentence}");
        let effects = run.step(Event::CheckpointCommitted { step: 1 });
        assert_eq!(rewound(&effects), Some(1));
        assert_eq!(run.machine.status(run.now).phase, PhaseKind::Assembling);
        assert_eq!(run.machine.present().count(), 4, "the batch was generated with weights that the checkpoint knows");

        let (mut run, save) = writing();
        write(&mut run, save);
        lose_learner(&mut run);
        let effects = run.step(Event::CheckpointFailed { step: 1, reason: "disk full".into() });
        assert_eq!(rewound(&effects), Some(0));
    }

    #[test]
    fn the_next_checkpoint_waits_for_the_one_in_flight_and_says_so() {
        let (mut run, save) = writing();
        run.full_step();
        let status = run.machine.status(run.now);
        assert_eq!((status.phase, status.step), (PhaseKind::Committing, 2));
        assert_eq!(
            status.waiting_for,
            "waits for 2 of 2 learners (learner-0 …) to write the checkpoint of step 1, for 0.0 s"
        );
        write(&mut run, save);
        run.step(Event::CheckpointCommitted { step: 1 });
        assert_eq!(run.machine.status(run.now).phase, PhaseKind::Saving);
        assert_eq!(run.machine.newest_checkpoint(), Some(1));
    }

    #[test]
    fn a_disk_that_is_full_costs_the_step_that_it_was_full_for() {
        let (mut run, save) = writing();
        run.generate_all();
        run.verify_all(|_| Outcome::Correct);
        let effects = report(&mut run, 0, save, cannot_write());
        let said = "the checkpoint of step 1 could not be saved, the run continues without it: learner-0 failed to write it: no \
                    space left on device";
        assert!(effects.contains(&Effect::Note(said.to_owned())), "{effects:?}");
        let late = report_whole(&mut run, 1, save, TaskResult::Saved);
        assert_eq!(late, known(), "nobody waits for the other rank's files any more");
        run.train();
        assert_eq!(run.machine.status(run.now).phase, PhaseKind::Saving, "the next step tries again");
        assert_eq!(rewound(&lose_learner(&mut run)), Some(0));
    }

    #[test]
    fn a_rank_or_disk_that_is_silent_too_long_is_abandoned() {
        let (mut run, save) = writing();
        report(&mut run, 0, save, TaskResult::Saved);
        let mut notes = Vec::new();
        for _ in 0..=61 {
            run.everybody_beats();
            run.now += Duration::from_secs(1);
            notes.extend(run.tick().into_iter().filter(|effect| matches!(effect, Effect::Note(_))));
        }
        let said = "the checkpoint of step 1 could not be saved, the run continues without it: learner learner-1 has written \
                    nothing of it for 60 s";
        assert_eq!(notes, [Effect::Note(said.to_owned())]);
        assert_eq!(run.machine.status(run.now).phase, PhaseKind::Sampling);

        let (mut run, save) = writing();
        write(&mut run, save);
        for _ in 0..=61 {
            run.everybody_beats();
            run.pass(Duration::from_secs(1));
        }
        let Some(End::Failed { reason }) = run.machine.ended() else { panic!("the disk is waited for") };
        assert!(reason.contains("the disk has not taken the checkpoint of step 1 within 60 s"), "{reason}");
        // If it is committed after all, the run resumes from it.
        run.step(Event::CheckpointCommitted { step: 1 });
        run.step(Event::Reopened);
        assert_eq!((run.machine.newest_checkpoint(), run.machine.position().step), (Some(1), 1));
    }

    #[test]
    fn a_stop_waits_for_the_checkpoint_in_flight_and_makes_its_own() {
        let (mut run, save) = writing();
        run.full_step();
        run.step(stop(StopMode::Save));
        write(&mut run, save);
        run.step(Event::CheckpointCommitted { step: 1 });
        assert_eq!(run.machine.status(run.now).phase, PhaseKind::Saving);
        let effects = run.save();
        assert!(matches!(effects.last(), Some(Effect::CommitCheckpoint { .. })), "{effects:?}");
        let effects = run.step(Event::CheckpointCommitted { step: 2 });
        assert_eq!(effects.last(), Some(&Effect::Ended(End::Stopped)));
        assert_eq!(run.machine.newest_checkpoint(), Some(2));
    }

    #[test]
    fn a_stop_at_once_waits_for_the_disk_alone() {
        let (mut run, _) = writing();
        let effects = run.step(stop(StopMode::Now));
        assert_eq!(effects.last(), Some(&Effect::Ended(End::Stopped)));
        let (mut run, save) = writing();
        write(&mut run, save);
        run.step(stop(StopMode::Now));
        assert_eq!(run.machine.status(run.now).phase, PhaseKind::Committing);
        let effects = run.step(Event::CheckpointCommitted { step: 1 });
        assert_eq!(effects.last(), Some(&Effect::Ended(End::Stopped)));
    }

    #[test]
    fn repeats_and_answers_to_something_else_change_nothing() {
        let (mut run, save) = writing();
        for result in [TaskResult::Captured, TaskResult::Captured] {
            assert_eq!(report_whole(&mut run, 0, save, result), known());
        }
        let refused = report_whole(&mut run, 0, save, TaskResult::Prepared { weights: None });
        assert!(refused.answer.is_err() && refused.effects.is_empty(), "{refused:?}");
        report(&mut run, 0, save, TaskResult::Saved);
        assert_eq!(report_whole(&mut run, 0, save, TaskResult::Saved), known());
        let worker = run.learners[0];
        let result = TaskResult::Saved;
        let stale = run.whole_step(Event::CompleteTask { worker, generation: Generation(9), task: save, result });
        assert!(stale.answer.is_err() && stale.record.is_none() && stale.effects.is_empty(), "{stale:?}");
    }
}
