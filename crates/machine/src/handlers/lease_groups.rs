use pacs_types::{LeaseId, Purpose, Role, WorkerId};

use crate::machine::Machine;
use crate::pool::Pool;
use crate::{GroupGrant, Reply};

impl Machine {
    /// Leases waiting groups to a rollout worker: a fair share of them, as many as it has room for.
    pub(crate) fn lease_groups(&mut self, worker: WorkerId, free_samples: u32, request: u64) {
        if let Err(refusal) = self.member(worker, Role::Rollout) {
            return self.refuse(refusal);
        }
        let mut grants = self.groups_given(worker, request);
        if !grants.is_empty() {
            self.unchanged = true;
            return self.reply(Reply::Groups(grants));
        }
        let drains = self.workers.get(worker).is_none_or(|member| member.draining().is_some());
        // Without published weights nothing can be generated.
        if self.may_lend() && self.weights.is_some() && !drains {
            let rollouts = self.workers.staying(Role::Rollout);
            let (now, version) = (self.now, self.policy_version());
            let mut newest_id = self.newest_id;
            let mut free = free_samples as usize;
            let mut may_exceed = free > 0 && self.pools().all(|pool| !pool.holds_group(worker));
            // The learners wait for an evaluation, at once or after the next step, so its groups go first.
            for (purpose, pool) in self.lendable() {
                let mut share = pool.waiting_groups().div_ceil(rollouts);
                while share > 0 {
                    let Some((place, size, alone)) = pool.next_for(worker) else { break };
                    if size > free && !may_exceed {
                        break;
                    }
                    newest_id += 1;
                    let lease = LeaseId(newest_id);
                    let Some((group, samples)) = pool.lend_group(place, lease, worker, version, now) else { break };
                    free = if alone { 0 } else { free.saturating_sub(size) };
                    may_exceed = false;
                    share -= 1;
                    grants.push(GroupGrant { lease, group, purpose, policy_step: version.0, samples });
                }
            }
            self.newest_id = newest_id;
        }
        self.unchanged = grants.is_empty();
        self.note_answer(worker, request, grants.iter().map(|grant| grant.lease).collect());
        self.reply(Reply::Groups(grants));
    }

    /// The grants of an earlier try of the same request, as far as they are still open.
    fn groups_given(&mut self, worker: WorkerId, request: u64) -> Vec<GroupGrant> {
        let given = self.workers.get(worker).map(|member| member.given(request).to_vec()).unwrap_or_default();
        let policy_step = self.policy_version().0;
        let open = self.lendable().flat_map(|(purpose, pool)| {
            let lent = given.iter().filter_map(|lease| Some((*lease, pool.lent_group(*lease)?))).collect::<Vec<_>>();
            lent.into_iter().map(move |(lease, (group, samples))| GroupGrant {
                lease,
                group,
                purpose,
                policy_step,
                samples,
            })
        });
        open.collect()
    }

    /// Remembers the grants of a request, in case its answer is lost.
    pub(crate) fn note_answer(&mut self, worker: WorkerId, request: u64, given: Vec<LeaseId>) {
        if let Some(member) = self.workers.get_mut(worker).filter(|_| !given.is_empty()) {
            member.answered = Some((request, given));
        }
    }

    fn lendable(&mut self) -> impl Iterator<Item = (Purpose, &mut Pool)> {
        let evaluation = self.phase.evaluation_mut().or(self.concurrent.as_mut());
        let evaluated = evaluation.map(|evaluation| (Purpose::Evaluate, &mut evaluation.pool));
        evaluated.into_iter().chain([(Purpose::Train, &mut self.pool)])
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
            let options = Options { prompts_per_step: waiting, slots: waiting, samples_per_prompt: 4, ..options() };
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
    fn a_request_whose_answer_was_lost_gets_it_again() {
        let mut run = Run::sampling(options());
        let worker = run.rollout;
        let ask = |request| Event::LeaseGroups { worker, free_samples: 2, request };
        let first = run.call(ask(7)).unwrap();
        assert_eq!(run.call(ask(7)), Ok(first.clone()));
        assert_ne!(run.call(ask(8)), Ok(first), "another request gets other groups");
    }

    #[test]
    fn strangers_and_other_roles_are_refused() {
        let mut run = Run::sampling(options());
        let (verifier, nobody) = (run.verifier, pacs_types::WorkerId(999_999));
        let refusal = run.call(Event::LeaseGroups { worker: verifier, free_samples: 1, request: 0 }).unwrap_err();
        assert!(matches!(refusal, Refusal::WrongRole { .. }), "{refusal}");
        let refusal = run.call(Event::LeaseGroups { worker: nobody, free_samples: 1, request: 0 }).unwrap_err();
        assert_eq!(refusal, Refusal::UnknownWorker(nobody));
    }
}
