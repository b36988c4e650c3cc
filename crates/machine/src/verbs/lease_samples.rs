use pacs_types::{LeaseId, Role, WorkerId};

use crate::machine::Machine;
use crate::phase::Phase;
use crate::{Reply, SampleGrant};

impl Machine {
    /// Lends samples that wait for a verdict, oldest first.
    pub(crate) fn lease_samples(&mut self, worker: WorkerId, max_samples: u32) {
        if let Err(refusal) = self.member(worker, Role::Verifier) {
            return self.refuse(refusal);
        }
        let others = self.count_role(Role::Verifier) > 1;
        let (now, mut newest_id) = (self.now, self.newest_id);
        let mut grants = Vec::new();
        if let Phase::Sampling(round) = &mut self.phase {
            let mut leases = || {
                newest_id += 1;
                LeaseId(newest_id)
            };
            let lent = round.lend_samples(&mut leases, worker, max_samples as usize, others, now);
            grants = lent.into_iter().map(|(lease, sample)| SampleGrant { lease, sample }).collect();
        }
        self.newest_id = newest_id;
        self.reply(Reply::Samples(grants));
    }
}
