use pacs_types::{Role, WorkerId};

use crate::machine::Machine;
use crate::phase::Phase;
use crate::{Membership, Reply};

impl Machine {
    pub(crate) fn join_generation(&mut self, worker: WorkerId) {
        if let Err(refusal) = self.member(worker, Role::Learner) {
            return self.refuse(refusal);
        }
        let mut asked_before = true;
        if let Some(member) = self.workers.get_mut(worker) {
            asked_before = std::mem::replace(&mut member.joining, true);
        }
        self.unchanged = asked_before;
        self.try_assemble();
        // A step that is being sampled has no state to lose, so the newcomer need not wait for its end.
        if !asked_before && self.may_grow() && matches!(self.phase, Phase::Sampling) {
            self.advance();
        }
        self.unchanged &= self.effects.is_empty();
        let membership = self.membership(worker);
        self.reply(Reply::Joined(membership));
    }

    fn membership(&self, worker: WorkerId) -> Option<Membership> {
        let team = self.team.as_ref()?;
        let rank = team.rank(worker)?;
        let addresses = team
            .ranks
            .iter()
            .map(|id| self.workers.get(*id).map(|worker| worker.collective_address.clone()).unwrap_or_default())
            .collect();
        Some(Membership {
            generation: team.generation,
            rank,
            addresses,
            checkpoint: self.restart_is_checkpoint.then_some(self.restart.step),
            step: self.restart.step,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use crate::{Event, Options, Reply};
    use pacs_types::{Generation, Role};

    #[test]
    fn ranks_are_in_order_of_name_once_all_have_asked() {
        let mut run = Run::new(Options { learners: 3, ..options() });
        let ids: Vec<_> =
            ["learner-10", "learner-2", "learner-1"].map(|name| run.register(Role::Learner, name).0).into();
        assert_eq!(run.call(Event::JoinGeneration { worker: ids[0] }), Ok(Reply::Joined(None)));
        assert_eq!(run.call(Event::JoinGeneration { worker: ids[0] }), Ok(Reply::Joined(None)));
        assert_eq!(run.call(Event::JoinGeneration { worker: ids[1] }), Ok(Reply::Joined(None)));
        for (worker, rank) in [(ids[2], 0), (ids[1], 1), (ids[0], 2), (ids[0], 2)] {
            let Ok(Reply::Joined(Some(group))) = run.call(Event::JoinGeneration { worker }) else { panic!() };
            assert_eq!((group.rank, group.generation, group.step, group.checkpoint), (rank, Generation(1), 0, None));
            assert_eq!(group.addresses, ["learner-1:1", "learner-2:1", "learner-10:1"]);
        }
    }
}
