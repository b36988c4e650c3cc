use crate::machine::Machine;
use crate::phase::Phase;
use crate::{Counter, Effect, Reply};

/// How often the final checkpoint, that of the last step or of a stop, is tried.
const MOST_LAST_SAVES: u32 = 5;

impl Machine {
    pub(crate) fn checkpoint_committed(&mut self, step: u64) {
        self.reply(Reply::Done);
        let Some(writing) = self.writing.take_if(|it| it.is_written() && it.snapshot.step == step) else { return };
        self.restart = writing.snapshot;
        self.restart_is_checkpoint = true;
        self.exported = writing.model;
        (self.lost_saves, self.failed_last_saves) = (0, 0);
        self.progress();
        self.go_on_without_writing();
    }

    /// Handles a failed save: an intermediate checkpoint may fail, the final one is tried again.
    pub(crate) fn checkpoint_failed(&mut self, step: u64, reason: &str) {
        self.reply(Reply::Done);
        self.give_checkpoint_up(step, reason);
    }

    /// Continues without the checkpoint of `step`. If it is the final one, tries again or ends the run.
    pub(crate) fn give_checkpoint_up(&mut self, step: u64, reason: &str) {
        let Some(writing) = self.writing.take_if(|writing| writing.snapshot.step == step) else { return };
        self.count(Counter::FailedCheckpoints, 1);
        // A stop after a failed background save makes a checkpoint of its own.
        if writing.model || (self.stop.is_some() && !writing.background) {
            self.failed_last_saves += 1;
            // A full disk may have room by the time that the next folder is created. Without
            // ranks there is nothing to save.
            if self.failed_last_saves < MOST_LAST_SAVES && self.team.is_some() && !self.is_ended() {
                let note = format!("the checkpoint of step {step} could not be saved, and is tried again: {reason}");
                self.effects.push(Effect::Note(note));
                return self.begin_save(writing.model, writing.background);
            }
            return self.fail(format!("the checkpoint of step {step} could not be saved: {reason}"));
        }
        if self.is_ended() {
            return;
        }
        let note = format!("the checkpoint of step {step} could not be saved, the run continues without it: {reason}");
        self.effects.push(Effect::Note(note));
        self.go_on_without_writing();
    }

    /// Continues with whatever waited for the checkpoint in flight.
    fn go_on_without_writing(&mut self) {
        if !matches!(self.phase, Phase::Saving(_) | Phase::Committing) {
            return;
        }
        // The learners were lost meanwhile, and with them the steps after the newest checkpoint.
        if self.team.is_none() {
            self.rewind();
        }
        self.advance();
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use crate::{Effect, End, Event, FailureKind, Options, PhaseKind, StopMode, TaskResult};
    use pacs_types::{Generation, GroupId, Outcome, Role};

    fn saving() -> Run {
        let mut run = Run::sampling(Options { total_steps: 4, checkpoint_every_steps: 2, ..options() });
        run.full_step();
        run.full_step();
        assert_eq!(run.machine.status(run.now).phase, PhaseKind::Saving);
        run
    }

    #[test]
    fn a_lost_learner_goes_back_to_the_committed_step_and_keeps_what_its_weights_generated() {
        let mut run = saving();
        let effects = run.save();
        let Some(Effect::CommitCheckpoint { snapshot, model: false, .. }) = effects.last() else {
            panic!("{effects:?}")
        };
        assert_eq!((snapshot.step, snapshot.cursor), (2, 4));
        run.step(Event::CheckpointCommitted { step: 2 });
        run.generate_all();
        let worker = run.learners[0];
        let effects = run.step(Event::Leave { worker, error: None });
        assert!(effects.contains(&Effect::Rewound { step: 2, forgotten: Vec::new() }), "{effects:?}");
        assert_eq!((run.machine.position().cursor, run.machine.present().count()), (6, 4));
        run.learners[0] = run.register(Role::Learner, "learner-0").0;
        run.step(Event::JoinGeneration { worker: run.learners[0] });
        run.prepare();
        let effects = run.verify_all(|_| Outcome::Correct);
        assert!(effects.iter().any(|effect| matches!(effect, Effect::Train { step: 3, .. })), "{effects:?}");
        run.train();
        run.generate_all();
        // Step 3 is undone, and so are the groups that its weights generated.
        let worker = run.learners[0];
        let effects = run.step(Event::Leave { worker, error: None });
        let forgotten = vec![GroupId(6), GroupId(7)];
        assert!(effects.contains(&Effect::Rewound { step: 2, forgotten }), "{effects:?}");
        assert_eq!((run.machine.position().cursor, run.machine.present().count()), (4, 0));
    }

    #[test]
    fn learners_lost_during_the_commit_do_not_undo_it() {
        let mut run = saving();
        run.save();
        let worker = run.learners[0];
        run.step(Event::Leave { worker, error: None });
        run.step(Event::CheckpointCommitted { step: 2 });
        let status = run.machine.status(run.now);
        assert_eq!((status.phase, status.step), (PhaseKind::Assembling, 2));
    }

    #[test]
    fn a_failed_checkpoint_on_the_way_is_noted_but_the_last_one_must_hold() {
        let mut run = saving();
        run.save();
        let effects = run.step(Event::CheckpointFailed { step: 2, reason: "disk full".into() });
        assert!(effects.iter().any(|effect| matches!(effect, Effect::Note(note) if note.contains("disk full"))));
        run.full_step();
        run.full_step();
        for _ in 1..super::MOST_LAST_SAVES {
            run.save();
            let effects = run.step(Event::CheckpointFailed { step: 4, reason: "disk full".into() });
            assert!(matches!(effects.last(), Some(Effect::CreateCheckpoint { step: 4, .. })), "{effects:?}");
        }
        run.save();
        let effects = run.step(Event::CheckpointFailed { step: 4, reason: "disk full".into() });
        assert!(matches!(effects.last(), Some(Effect::Ended(End::Failed { .. }))), "{effects:?}");
    }

    #[test]
    fn a_rank_that_cannot_write_loses_no_step() {
        let mut run = saving();
        let (worker, task) = (run.learners[0], run.task_of(0));
        let failed = || TaskResult::Failed { message: "no space left on device".into(), kind: FailureKind::Write };
        let report = |run: &mut Run, task| {
            run.step(Event::CompleteTask { worker, generation: Generation(1), task, result: failed() })
        };
        let effects = report(&mut run, task);
        let noted = |effect: &Effect| matches!(effect, Effect::Note(note) if note.contains("no space left on device"));
        assert!(effects.iter().any(noted), "{effects:?}");
        let status = run.machine.status(run.now);
        assert_eq!((status.phase, status.step, status.generation), (PhaseKind::Sampling, 2, Generation(1)));
        run.full_step();
        run.full_step();
        for _ in 1..super::MOST_LAST_SAVES {
            let task = run.task_of(0);
            let effects = report(&mut run, task);
            assert!(matches!(effects.last(), Some(Effect::CreateCheckpoint { step: 4, .. })), "{effects:?}");
        }
        let task = run.task_of(0);
        let effects = report(&mut run, task);
        assert!(matches!(effects.last(), Some(Effect::Ended(End::Failed { .. }))), "{effects:?}");
    }

    fn lose_a_peer(run: &mut Run, generation: u64) -> Vec<Effect> {
        let (worker, task) = (run.learners[0], run.task_of(0));
        let result = TaskResult::Failed { message: "peer lost".into(), kind: FailureKind::Generation };
        let effects = run.step(Event::CompleteTask { worker, generation: Generation(generation), task, result });
        run.step(Event::JoinGeneration { worker });
        effects
    }

    #[test]
    fn a_peer_lost_in_the_last_save_costs_a_generation_and_not_the_run() {
        let mut run = Run::sampling(Options { total_steps: 2, max_lost_saves: 2, ..options() });
        run.full_step();
        run.full_step();
        assert_eq!(run.machine.status(run.now).phase, PhaseKind::Saving);
        let effects = lose_a_peer(&mut run, 1);
        assert!(effects.contains(&Effect::Rewound { step: 0, forgotten: Vec::new() }), "{effects:?}");
        let status = run.machine.status(run.now);
        assert_eq!((status.phase, status.generation), (PhaseKind::Preparing, Generation(2)));
        // The steps are recomputed, and repeated losses end the run although steps succeed in between.
        run.prepare();
        run.full_step();
        run.full_step();
        assert_eq!(run.machine.status(run.now).phase, PhaseKind::Saving);
        let effects = lose_a_peer(&mut run, 2);
        let Some(Effect::Ended(End::Failed { reason })) = effects.last() else { panic!("{effects:?}") };
        assert!(reason.contains("2 generations of learners were lost in a row while they saved"), "{reason}");
    }

    #[test]
    fn a_peer_lost_in_the_save_of_a_stop_ends_the_run_where_it_was_saved_last() {
        let mut run = Run::sampling(Options { total_steps: 5, ..options() });
        run.full_step();
        run.step(stop(StopMode::Save));
        assert_eq!(run.machine.status(run.now).phase, PhaseKind::Saving);
        let effects = lose_a_peer(&mut run, 1);
        assert_eq!(effects.last(), Some(&Effect::Ended(End::Stopped)), "{effects:?}");
        assert_eq!(run.machine.position().step, 0, "what nobody holds is not claimed");
    }

    #[test]
    fn a_committed_checkpoint_ends_the_count_of_lost_saves() {
        let options = Options { total_steps: 6, checkpoint_every_steps: 1, max_lost_saves: 2, ..options() };
        let mut run = Run::sampling(options);
        for round in 0..2 {
            run.full_step();
            lose_a_peer(&mut run, 2 * round + 1);
            run.prepare();
            run.full_step();
            run.save();
            run.step(Event::CheckpointCommitted { step: round + 1 });
            let worker = run.learners[0];
            run.step(Event::Leave { worker, error: None });
            run.learners[0] = run.register(Role::Learner, "learner-0").0;
            run.step(Event::JoinGeneration { worker: run.learners[0] });
            run.prepare();
        }
        assert_eq!(run.machine.status(run.now).phase, PhaseKind::Sampling);
    }

    #[test]
    fn the_last_checkpoint_exports_the_model() {
        let mut run = saving();
        run.save();
        run.step(Event::CheckpointCommitted { step: 2 });
        run.full_step();
        run.full_step();
        let effects = run.save();
        assert!(matches!(effects.last(), Some(Effect::CommitCheckpoint { model: true, .. })), "{effects:?}");
        let effects = run.step(Event::CheckpointCommitted { step: 4 });
        assert_eq!(effects.last(), Some(&Effect::Ended(End::Finished)));
    }
}
