//! Which learners are ranks. A generation forms when all wanted learners have joined, or with fewer of them after
//! `learner_wait`. It grows again between two steps when the missing ones return.

use std::time::Duration;

use pacs_types::WorkerId;

use crate::machine::Machine;
use crate::phase::{Phase, Team};
use crate::worker::{Worker, name_order};
use crate::{Effect, TaskKind};

impl Machine {
    /// Forms a generation when all wanted learners have asked to join one.
    pub(crate) fn try_assemble(&mut self) {
        if matches!(self.phase, Phase::Assembling) && self.joining().len() >= self.options.learners as usize {
            self.form();
        }
    }

    /// Forms a generation of the learners that have joined, because the wait for the others is over.
    pub(crate) fn learners_missing(&mut self) {
        let (there, wanted) = (self.joining().len(), self.options.learners);
        if !matches!(self.phase, Phase::Assembling) || there < self.options.min_learners as usize {
            return;
        }
        let seconds = self.options.learner_wait.as_secs();
        let note = format!(
            "{there} of {wanted} learners have joined after {seconds} s; the run continues with them and takes the others in \
             when they come"
        );
        self.effects.push(Effect::Note(note));
        self.form();
    }

    /// Whether fewer learners than wanted, but at least `min_learners`, have been waiting since before `limit`.
    pub(crate) fn is_short_since(&self, limit: Duration) -> bool {
        let enough = self.options.min_learners as usize..self.options.learners as usize;
        matches!(self.phase, Phase::Assembling) && self.phase_since < limit && enough.contains(&self.joining().len())
    }

    /// Whether a learner has asked for a rank that is vacant.
    pub(crate) fn may_grow(&self) -> bool {
        let is_short = self.team.is_some() && self.team_size() < self.options.learners as usize;
        is_short && self.joining().iter().any(|(id, _)| self.rank(*id).is_none())
    }

    /// Whether a rank is draining, so that the generation has to regroup once its state is saved.
    pub(crate) fn must_release(&self) -> bool {
        let ranks = self.team.iter().flat_map(|team| &team.ranks);
        ranks.filter_map(|id| self.workers.get(*id)).any(|worker| worker.draining().is_some())
    }

    /// Lets a draining rank leave: at once where that loses nothing, otherwise after the step and a checkpoint.
    pub(crate) fn release_rank(&mut self, worker: WorkerId) {
        if self.rank(worker).is_none() {
            return;
        }
        let name = self.workers.get(worker).map_or("", |worker| worker.name.as_str());
        let note =
            format!("{name} is to leave: what is trained is saved, then the learners form a generation without it");
        self.effects.push(Effect::Note(note));
        // All other phases come to `advance` by themselves, which regroups then.
        if matches!(self.phase, Phase::Sampling) {
            self.advance();
        }
    }

    /// Dissolves the generation between two steps, to form one with other ranks. Its state is saved by then.
    pub(crate) fn regroup(&mut self) {
        let names = |ids: Vec<&Worker>| ids.iter().map(|worker| worker.name.clone()).collect::<Vec<_>>().join(", ");
        let newcomers = self.joining().into_iter().filter(|(id, _)| self.rank(*id).is_none());
        let newcomers = names(newcomers.map(|(_, worker)| worker).collect());
        let is_leaving = |(id, worker): &(WorkerId, &Worker)| worker.draining().is_some() && self.rank(*id).is_some();
        let leaving = names(self.workers.iter().filter(is_leaving).map(|(_, worker)| worker).collect());
        self.regroup_reason = match (newcomers.as_str(), leaving.as_str()) {
            (_, "") => format!("{newcomers} has returned"),
            ("", _) => format!("{leaving} leaves"),
            _ => format!("{leaving} leaves, {newcomers} has returned"),
        };
        let note = format!("{}: the learners form a new generation", self.regroup_reason);
        self.effects.push(Effect::Note(note));
        (self.team, self.weights) = (None, None);
        // Requests to join are discarded: every learner asks again once it has left the old communicator.
        self.workers.values_mut().for_each(|worker| worker.joining = false);
        self.enter(Phase::Assembling);
    }

    /// Number of ranks in the generation; 0 while there is none.
    pub(crate) fn team_size(&self) -> usize {
        self.team.as_ref().map_or(0, |team| team.ranks.len())
    }

    /// Learners that have asked for a rank since the last generation ended, in rank order.
    fn joining(&self) -> Vec<(WorkerId, &Worker)> {
        // A learner that is to leave must not become a rank again.
        let joining = self.workers.iter().filter(|(_, worker)| worker.joining && worker.draining().is_none());
        let mut joining: Vec<_> = joining.collect();
        joining.sort_by_key(|(_, worker)| name_order(&worker.name));
        joining
    }

    fn form(&mut self) {
        let joining = self.joining().into_iter().take(self.options.learners as usize);
        let (ranks, names) = joining.map(|(id, worker)| (id, worker.name.clone())).unzip();
        self.newest_generation = self.newest_generation.next();
        let generation = self.newest_generation;
        self.team = Some(Team { generation, ranks });
        self.effects.push(Effect::GenerationFormed { generation, names });
        let task = self.new_task(TaskKind::Prepare);
        self.enter(Phase::Preparing(task));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crate::handlers::testing::*;
    use crate::{Command, Counter, Directive, Effect, Event, Options, PhaseKind, Reply, TaskKind};
    use pacs_types::{Generation, Outcome, Role};

    fn short_of_one() -> (Run, Vec<Effect>) {
        let wait = Duration::from_secs(60);
        let options = Options { learners: 2, min_learners: 1, learner_wait: wait, total_steps: 8, ..options() };
        let mut run = Run::sampling(options);
        run.full_step();
        let lost = run.learners.pop().unwrap();
        run.step(Event::Leave { worker: lost, error: None });
        let worker = run.learners[0];
        run.step(Event::JoinGeneration { worker });
        assert_eq!(run.machine.status(run.now).phase, PhaseKind::Assembling);
        let mut effects = Vec::new();
        for _ in 0..=wait.as_secs() {
            assert!(effects.is_empty());
            run.everybody_beats();
            run.now += Duration::from_secs(1);
            effects = run.tick();
            effects.retain(|effect| matches!(effect, Effect::GenerationFormed { .. }));
        }
        (run, effects)
    }

    #[test]
    fn the_run_continues_with_the_remaining_ranks_after_the_wait() {
        let (mut run, effects) = short_of_one();
        let names = vec!["learner-0".to_owned()];
        assert_eq!(effects, [Effect::GenerationFormed { generation: Generation(2), names }]);
        run.prepare();
        run.generate_all();
        let effects = run.verify_all(|_| Outcome::Correct);
        assert!(effects.iter().any(|effect| matches!(effect, Effect::Train { ranks: 1, .. })), "{effects:?}");
        run.train();
        assert_eq!(run.machine.status(run.now).phase, PhaseKind::Sampling);
    }

    #[test]
    fn a_learner_that_is_back_is_taken_in_between_two_steps_and_no_step_is_lost() {
        let (mut run, _) = short_of_one();
        run.prepare();
        run.generate_all();
        run.verify_all(|_| Outcome::Correct);
        assert_eq!(run.machine.status(run.now).phase, PhaseKind::Training);
        let (back, _) = run.register(Role::Learner, "learner-1");
        run.step(Event::JoinGeneration { worker: back });
        run.train();
        // The step that was trained meanwhile is checkpointed first.
        assert_eq!(run.machine.status(run.now).phase, PhaseKind::Saving);
        let effects = run.save();
        assert!(matches!(effects.last(), Some(Effect::CommitCheckpoint { .. })), "{effects:?}");
        let effects = run.step(Event::CheckpointCommitted { step: 1 });
        assert!(!effects.iter().any(|effect| matches!(effect, Effect::Rewound { .. })), "{effects:?}");
        assert_eq!(run.machine.status(run.now).phase, PhaseKind::Assembling);
        run.learners.push(back);
        for worker in run.learners.clone() {
            run.step(Event::JoinGeneration { worker });
        }
        run.prepare();
        let status = run.machine.status(run.now);
        assert_eq!((status.phase, status.step, status.generation), (PhaseKind::Sampling, 1, Generation(3)));
        assert_eq!(status.counters[&Counter::LostGenerations], 1, "growing is no loss");
    }

    #[test]
    fn a_learner_that_is_back_while_the_run_samples_does_not_wait_for_the_step() {
        let (mut run, _) = short_of_one();
        run.prepare();
        assert_eq!(run.machine.status(run.now).phase, PhaseKind::Sampling);
        let (back, _) = run.register(Role::Learner, "learner-1");
        run.step(Event::JoinGeneration { worker: back });
        assert_eq!(run.machine.status(run.now).phase, PhaseKind::Assembling, "nothing was made since the checkpoint");
    }

    #[test]
    fn an_unsaved_step_is_not_discarded_for_a_larger_generation() {
        let (mut run, _) = short_of_one();
        run.prepare();
        run.generate_all();
        run.verify_all(|_| Outcome::Correct);
        let (back, _) = run.register(Role::Learner, "learner-1");
        run.step(Event::JoinGeneration { worker: back });
        run.train();
        run.save();
        run.step(Event::CheckpointFailed { step: 1, reason: "disk full".into() });
        let status = run.machine.status(run.now);
        assert_eq!((status.phase, status.step, status.generation), (PhaseKind::Sampling, 1, Generation(2)));
        // The next step tries to save again.
        run.full_step();
        assert_eq!(run.machine.status(run.now).phase, PhaseKind::Saving);
        let worker = run.learners[0];
        let asked = run.call(Event::NextTask { worker, generation: Generation(2) });
        let Ok(Reply::Task(Some(order))) = asked else { panic!("{asked:?}") };
        assert_eq!(order.kind, TaskKind::Save { step: 2, model: false, background: false });
    }

    #[test]
    fn a_rank_that_is_to_end_leaves_after_its_step_is_saved_and_nothing_is_lost() {
        let options = Options { learners: 2, min_learners: 1, total_steps: 8, ..options() };
        let mut run = Run::sampling(options);
        run.generate_all();
        run.verify_all(|_| Outcome::Correct);
        assert_eq!(run.machine.status(run.now).phase, PhaseKind::Training);
        let worker = run.learners[1];
        for _ in 0..2 {
            run.step(Event::Ending { worker });
            assert_eq!(run.told(worker), Directive::Continue, "its state is not saved");
        }
        run.train();
        assert_eq!(run.machine.status(run.now).phase, PhaseKind::Saving);
        run.save();
        let effects = run.step(Event::CheckpointCommitted { step: 1 });
        assert!(!effects.iter().any(|effect| matches!(effect, Effect::Rewound { .. })), "{effects:?}");
        assert_eq!(run.machine.status(run.now).phase, PhaseKind::Assembling);
        // It asks for a rank like the others before it hears that it may leave.
        for worker in run.learners.clone() {
            assert_eq!(run.call(Event::JoinGeneration { worker }), Ok(Reply::Joined(None)));
        }
        assert_eq!(run.told(worker), Directive::LeaveForNow);
        run.step(Event::Leave { worker, error: None });
        run.learners[1] = run.register(Role::Learner, "learner-1").0;
        run.step(Event::JoinGeneration { worker: run.learners[1] });
        run.prepare();
        let status = run.machine.status(run.now);
        assert_eq!((status.phase, status.step, status.generation), (PhaseKind::Sampling, 1, Generation(2)));
        assert!(!status.counters.contains_key(&Counter::LostGenerations), "{:?}", status.counters);
    }

    #[test]
    fn a_rank_that_an_operator_drains_leaves_at_once_where_nothing_is_unsaved_and_is_not_started_again() {
        let options = Options { learners: 2, min_learners: 1, total_steps: 8, ..options() };
        let mut run = Run::sampling(options);
        let worker = run.learners[0];
        run.command(Command::Drain { worker: "learner-0".into() }).unwrap();
        assert_eq!(run.machine.status(run.now).phase, PhaseKind::Assembling);
        let step = run.whole_step(Event::Heartbeat { worker, activity: String::new() });
        assert_eq!(step.answer, Ok(Reply::Directive(Directive::Leave)));
        assert_eq!(step.effects, [Effect::Drained { name: "learner-0".into() }]);
        let refused = run.command(Command::Drain { worker: "learner-1".into() }).unwrap_err().to_string();
        assert!(refused.contains("0 would be left of the 1"), "{refused}");
    }
}
