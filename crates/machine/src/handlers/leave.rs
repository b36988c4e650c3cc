use pacs_types::WorkerId;

use crate::Reply;
use crate::machine::Machine;
use crate::phase::Phase;
use crate::worker::Drain;
use crate::worker_loss::Departure;

/// Consecutive lost generations after which a learner that fails in preparation ends the run.
const FAILED_PREPARATIONS: u32 = 3;

impl Machine {
    pub(crate) fn ending(&mut self, worker: WorkerId) {
        self.reply(Reply::Done);
        let is_ended = self.is_ended();
        if is_ended || self.workers.get(worker).is_none_or(|member| member.draining().is_some()) {
            self.unchanged = true;
            return;
        }
        self.workers.drain(worker, Drain::Ending);
        self.release_rank(worker);
    }

    pub(crate) fn leave(&mut self, worker: WorkerId, error: Option<String>) {
        self.reply(Reply::Done);
        let Some(member) = self.workers.get(worker) else {
            self.unchanged = true;
            return;
        };
        if self.is_ended() {
            // If the run continues later, what it held must not be waited for.
            self.revoke_worker(worker);
            self.workers.remove(worker);
            return;
        }
        let is_rank = self.team.as_ref().is_some_and(|team| team.rank(worker).is_some());
        match error {
            None => self.lose_worker(worker, Departure::Left),
            // One failure may be a peer's fault. A learner that fails repeatedly cannot load its state.
            Some(error)
                if is_rank
                    && matches!(self.phase, Phase::Preparing(_))
                    && self.lost_generations + 1 >= FAILED_PREPARATIONS =>
            {
                let reason = format!("{} could not prepare: {error}", member.name);
                self.team = None;
                self.lose_worker(worker, Departure::Failed(&error));
                self.fail(reason);
            }
            Some(error) => self.lose_worker(worker, Departure::Failed(&error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use crate::{Effect, End, Event, PhaseKind, StopMode};
    use pacs_types::Role;

    #[test]
    fn a_learner_that_never_can_prepare_ends_the_run() {
        let mut run = Run::preparing(options());
        for attempt in 1..=3 {
            assert_eq!(run.machine.status(run.now).phase, PhaseKind::Preparing);
            let worker = run.learners[0];
            let effects = run.step(Event::Leave { worker, error: Some("no such file".into()) });
            let reason = effects.iter().find_map(|effect| match effect {
                Effect::Ended(End::Failed { reason }) => Some(reason.as_str()),
                _ => None,
            });
            let expected = (attempt == 3).then_some("learner-0 could not prepare: no such file");
            assert_eq!(reason, expected, "attempt {attempt}");
            run.learners[0] = run.register(Role::Learner, "learner-0").0;
            run.step(Event::JoinGeneration { worker: run.learners[0] });
        }
    }

    #[test]
    fn work_of_a_dismissed_worker_is_leased_again_when_the_run_resumes() {
        let mut run = Run::sampling(options());
        let held = run.groups(run.rollout, 100).len();
        run.step(stop(StopMode::Now));
        let worker = run.rollout;
        run.step(Event::Leave { worker, error: None });
        run.step(Event::Reopened);
        run.join_again();
        run.prepare();
        assert_eq!(run.groups(run.rollout, 100).len(), held);
    }

    #[test]
    fn a_learner_that_leaves_later_ends_its_generation_only() {
        let mut run = Run::sampling(options());
        let worker = run.learners[0];
        let effects = run.step(Event::Leave { worker, error: Some("out of memory".into()) });
        assert!(effects.contains(&Effect::Rewound { step: 0, forgotten: Vec::new() }), "{effects:?}");
        assert_eq!(run.machine.status(run.now).phase, PhaseKind::Assembling);
    }
}
