use pacs_types::{Role, WorkerId};

use crate::machine::Machine;
use crate::phase::Phase;
use crate::{GroupGrant, Reply};

impl Machine {
    /// Lends waiting groups: a fair share of them, as many as the worker has room for.
    pub(crate) fn lease_groups(&mut self, worker: WorkerId, free_samples: u32) {
        if let Err(refusal) = self.member(worker, Role::Rollout) {
            return self.refuse(refusal);
        }
        let rollouts = self.count_role(Role::Rollout);
        let policy_step = self.position.step;
        let (now, mut newest_id) = (self.now, self.newest_id);
        let mut grants = Vec::new();
        if let Phase::Sampling(round) = &mut self.phase {
            let share = round.waiting_groups().div_ceil(rollouts);
            let mut free = free_samples as usize;
            let mut may_exceed = free > 0 && !round.holds_group(worker);
            while grants.len() < share {
                let Some(size) = round.next_group_size() else { break };
                if size > free && !may_exceed {
                    break;
                }
                newest_id += 1;
                let lease = pacs_types::LeaseId(newest_id);
                let Some((group, samples)) = round.lend_group(lease, worker, now) else { break };
                free = free.saturating_sub(size);
                may_exceed = false;
                grants.push(GroupGrant { lease, group, purpose: round.purpose, policy_step, samples });
            }
        }
        self.newest_id = newest_id;
        self.reply(Reply::Groups(grants));
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use crate::{Event, Options, Refusal};
    use pacs_types::Role;

    #[test]
    fn shares_are_fair_and_fit() {
        // (waiting groups, rollout workers, free samples) -> groups, with 4 samples a group.
        let table = [
            (8, 1, 100, 8),
            (8, 2, 100, 4),
            (8, 3, 100, 3),
            (8, 1, 11, 2),
            (8, 1, 4, 1),
            (8, 1, 3, 1), // Holds none, so it gets one although there is not room for all of it.
            (8, 1, 0, 0),
            (1, 4, 100, 1),
        ];
        for (waiting, workers, free, expected) in table {
            let options = Options { prompts_per_step: waiting, samples_per_prompt: 4, ..options() };
            let mut run = Run::sampling(options);
            for extra in 1..workers {
                run.register(Role::Rollout, &format!("rollout-{extra}"));
            }
            let got = run.groups(run.rollout, free).len();
            assert_eq!(got, expected, "{waiting} groups, {workers} workers, {free} free samples");
        }
    }

    #[test]
    fn a_holder_gets_no_group_that_does_not_fit() {
        let mut run = Run::sampling(Options { samples_per_prompt: 4, ..options() });
        assert_eq!(run.groups(run.rollout, 3).len(), 1);
        assert_eq!(run.groups(run.rollout, 3).len(), 0);
    }

    #[test]
    fn strangers_and_other_roles_are_refused() {
        let mut run = Run::sampling(options());
        let (verifier, nobody) = (run.verifier, pacs_types::WorkerId(999_999));
        let refusal = run.call(Event::LeaseGroups { worker: verifier, free_samples: 1 }).unwrap_err();
        assert!(matches!(refusal, Refusal::WrongRole { .. }), "{refusal}");
        let refusal = run.call(Event::LeaseGroups { worker: nobody, free_samples: 1 }).unwrap_err();
        assert_eq!(refusal, Refusal::UnknownWorker(nobody));
    }
}
