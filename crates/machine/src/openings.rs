use pacs_types::Generation;

use crate::machine::Machine;

/// Amounts of work that blocked callers wait for. The driver compares them before and after a step, and wakes only as
/// many callers as there is new work for, so computing them must be cheap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Openings {
    /// Groups that can be leased to rollout workers.
    pub groups: usize,
    /// Samples that can be leased to verifiers.
    pub samples: usize,
    /// The current generation. When it changes, learners that wait for a rank have to ask again, because the end of a
    /// generation discards all requests to join the next one.
    pub generation: Option<Generation>,
    /// Number of the task that the ranks work on.
    pub task: Option<u64>,
    /// Whether the run has no members.
    pub alone: bool,
}

impl Machine {
    /// The work that callers can get now.
    #[must_use]
    pub fn openings(&self) -> Openings {
        let may_lease = self.may_lend();
        // Without published weights nothing can be generated.
        let may_generate = may_lease && self.weights.is_some();
        Openings {
            groups: if may_generate { self.pools().map(|pool| pool.leasable_groups()).sum() } else { 0 },
            samples: if may_lease { self.pools().map(|pool| pool.leasable_samples()).sum() } else { 0 },
            generation: self.team.as_ref().map(|team| team.generation),
            task: self.phase.task().map(|task| task.id),
            alone: self.is_alone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use pacs_types::Outcome;

    use super::*;
    use crate::handlers::testing::*;
    use crate::{Command, Options};

    #[test]
    fn what_opens_is_what_can_be_leased() {
        let run = Run::new(options());
        assert_eq!(run.machine.openings(), Openings { alone: true, ..Openings::default() });
        let mut run = Run::preparing(Options { prompts_per_step: 3, slots: 3, ..options() });
        let before = run.machine.openings();
        assert_eq!((before.groups, before.generation), (0, Some(Generation(1))), "there are no weights yet");
        assert_eq!(before.task, Some(run.task_of(0)));
        run.prepare();
        let opened = run.machine.openings();
        assert_eq!((opened.groups, opened.samples, opened.task), (3, 0, None));
        run.command(Command::Pause).unwrap();
        assert_eq!(run.machine.openings().groups, 0);
        run.command(Command::Resume).unwrap();
        run.generate_all();
        assert_eq!((run.machine.openings().groups, run.machine.openings().samples), (0, 6));
        run.verify_all(|_| Outcome::Correct);
        let trains = run.machine.openings();
        assert_eq!((trains.samples, trains.task), (0, Some(run.task_of(0))));
    }
}
