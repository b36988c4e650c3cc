use pacs_types::{LeaseId, Role, SampleId, WeightVersion, WorkerId};

use crate::machine::Machine;
use crate::pool::Taken;
use crate::{Counter, Refusal, Reply};

impl Machine {
    pub(crate) fn submit_sample(&mut self, worker: WorkerId, lease: LeaseId, sample: SampleId, version: WeightVersion) {
        if let Err(refusal) = self.member(worker, Role::Rollout) {
            return self.refuse(refusal);
        }
        let (now, newest) = (self.now, self.policy_version());
        let Some(pool) = self.pool_of(sample.group) else { return self.refuse_stale(lease, sample) };
        // The worker ignores the versions that its lease allows, so the rest of the group is revoked, too.
        if let Some(oldest) = pool.oldest_allowed(lease)
            && !(oldest..=newest).contains(&version)
            && pool.revoke_group(lease, worker)
        {
            self.count(Counter::LapsedLeases, 1);
            return self.refuse(Refusal::WrongVersion { sample, found: version, oldest, newest });
        }
        let taken = pool.take_sample(lease, worker, sample, (version, newest), now);
        match taken {
            Taken::Fresh => {
                self.progress();
                self.reply(Reply::Accepted { fresh: true });
            }
            Taken::Repeat => {
                self.unchanged = true;
                self.reply(Reply::Accepted { fresh: false });
            }
            Taken::Stale | Taken::Again | Taken::GiveUp | Taken::Completes => self.refuse_stale(lease, sample),
        }
    }

    pub(crate) fn refuse_stale(&mut self, lease: LeaseId, sample: SampleId) {
        self.refuse(Refusal::StaleLease { lease, sample });
        self.count(Counter::StaleSubmissions, 1);
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use crate::{Event, Refusal, Reply, WantedSample};
    use pacs_types::{SampleId, WeightVersion};

    #[test]
    fn samples_count_once_and_only_from_the_right_weights() {
        let mut run = Run::sampling(options());
        let grant = run.groups(run.rollout, 100).remove(0);
        let worker = run.rollout;
        let submit = |index, version| Event::SubmitSample {
            worker,
            lease: grant.lease,
            sample: SampleId { group: grant.group, index },
            version: WeightVersion(version),
        };
        assert_eq!(run.call(submit(0, 0)), Ok(Reply::Accepted { fresh: true }));
        assert_eq!(run.call(submit(0, 0)), Ok(Reply::Accepted { fresh: false }));
        let refusal = run.call(submit(1, 7)).unwrap_err();
        assert!(matches!(refusal, Refusal::WrongVersion { .. }), "{refusal}");
        let refusal = run.call(submit(1, 0)).unwrap_err();
        assert!(matches!(refusal, Refusal::StaleLease { .. }), "the lease was revoked: {refusal}");
        let again = run.groups(worker, 100).remove(0);
        assert_eq!((again.group, again.samples), (grant.group, vec![WantedSample { index: 1, attempt: 0 }]));
    }
}
