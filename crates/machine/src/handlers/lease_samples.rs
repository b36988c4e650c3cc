use pacs_types::{LeaseId, Role, WorkerId};

use crate::machine::Machine;
use crate::{Reply, SampleGrant};

impl Machine {
    /// Leases samples that wait for a verdict, oldest first: a fair share, so that slow verifiers do not hoard the
    /// work. A verifier that holds a suspect gets nothing else.
    pub(crate) fn lease_samples(&mut self, worker: WorkerId, max_samples: u32, request: u64) {
        if let Err(refusal) = self.member(worker, Role::Verifier) {
            return self.refuse(refusal);
        }
        let verifiers = self.workers.staying(Role::Verifier);
        let drains = self.workers.get(worker).is_none_or(|member| member.draining().is_some());
        let (now, mut newest_id) = (self.now, self.newest_id);
        let given = self.workers.get(worker).map(|member| member.given(request).to_vec()).unwrap_or_default();
        // A repeated request gets the leases whose grant may have been lost, as far as they are open.
        let open = given.iter().filter_map(|lease| {
            let sample = self.pools().find_map(|pool| pool.lent_sample(*lease))?;
            Some(SampleGrant { lease: *lease, sample })
        });
        let mut grants: Vec<_> = open.collect();
        if !grants.is_empty() {
            self.unchanged = true;
            return self.reply(Reply::Samples(grants));
        }
        let is_alone = self.pools().any(|pool| pool.holds_suspect_sample(worker));
        let holds = self.pools().any(|pool| pool.holds_sample(worker));
        if self.may_lend() && !drains && !is_alone {
            let mut leases = || {
                newest_id += 1;
                LeaseId(newest_id)
            };
            let mut room = max_samples as usize;
            for pool in self.pools_mut() {
                let most = pool.unverified().div_ceil(verifiers).min(room);
                let has_some = holds || !grants.is_empty();
                let lent = pool.lend_samples(&mut leases, worker, most, (verifiers > 1, has_some), now);
                room -= lent.len();
                if lent.first().is_some_and(|(_, sample)| pool.is_suspect_sample(*sample)) {
                    // A suspect must be alone with its verifier.
                    room = 0;
                }
                grants.extend(lent.into_iter().map(|(lease, sample)| SampleGrant { lease, sample }));
            }
        }
        self.newest_id = newest_id;
        self.unchanged = grants.is_empty();
        self.note_answer(worker, request, grants.iter().map(|grant| grant.lease).collect());
        self.reply(Reply::Samples(grants));
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use crate::{Event, Options, Reply};
    use pacs_types::Role;

    #[test]
    fn verifiers_share_what_waits() {
        let mut run = Run::sampling(Options { samples_per_prompt: 5, ..options() });
        let (second, _) = run.register(Role::Verifier, "verifier-1");
        run.generate_all();
        let mut lease = |worker, max_samples| match run.call(Event::LeaseSamples { worker, max_samples, request: 0 }) {
            Ok(Reply::Samples(samples)) => samples.len(),
            other => panic!("{other:?}"),
        };
        assert_eq!([lease(second, 100), lease(second, 2), lease(second, 100)], [5, 2, 2]);
    }
}
