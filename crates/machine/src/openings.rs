use pacs_types::Generation;

use crate::machine::Machine;

/// What callers may be waiting for. Cheap to ask for, so that a driver can compare what was there before a step with what is
/// there behind it, and wake as many of those who wait as there is something new for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Openings {
    /// Groups that rollout workers may be given.
    pub groups: usize,
    /// Samples that verifiers may be given.
    pub samples: usize,
    /// The generation of learners that there is. Those who wait for a place have to ask again whenever it changes, for a
    /// generation that ends takes all wishes for the next one with it.
    pub generation: Option<Generation>,
    /// The task that its ranks work on.
    pub task: Option<u64>,
    /// No worker is a member.
    pub alone: bool,
}

impl Machine {
    /// What callers may be waiting for now.
    #[must_use]
    pub fn openings(&self) -> Openings {
        let may_lease = self.may_lend();
        // Without published weights there is nothing to generate with.
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
    use crate::verbs::testing::*;
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
