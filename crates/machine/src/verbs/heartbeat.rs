use pacs_types::WorkerId;

use crate::lose::counter;
use crate::machine::Machine;
use crate::phase::Phase;
use crate::{Directive, Reply};

impl Machine {
    pub(crate) fn heartbeat(&mut self, worker: WorkerId, activity: String) {
        let is_ended = self.is_ended();
        let directive = match self.workers.get_mut(&worker) {
            _ if is_ended => Directive::Leave,
            Some(member) => {
                member.heard = self.now;
                member.activity = activity;
                Directive::Continue
            }
            None if self.replaced.contains(&worker) => Directive::Leave,
            None => Directive::Register,
        };
        self.reply(Reply::Directive(directive));
    }

    /// Gives up workers that are silent and leases that nothing comes of.
    pub(crate) fn tick(&mut self) {
        self.reply(Reply::Done);
        if self.is_ended() {
            return;
        }
        self.forgive_own_silence();
        let Some(limit) = self.now.checked_sub(self.options.heartbeat_timeout) else { return };
        let silent: Vec<_> =
            self.workers.iter().filter(|(_, worker)| worker.heard < limit).map(|(id, _)| *id).collect();
        for worker in silent {
            self.lose_worker(worker, "missed its heartbeats");
        }
        self.lapse_old_leases();
    }

    /// A coordinator that stood still (a slow disk, a suspended machine) has not heard its workers: that time is not
    /// held against them.
    fn forgive_own_silence(&mut self) {
        let stood_still = self.now.saturating_sub(std::mem::replace(&mut self.ticked, self.now));
        if stood_still > self.options.heartbeat_timeout / 4 {
            let now = self.now;
            self.workers.values_mut().for_each(|worker| worker.heard = (worker.heard + stood_still).min(now));
        }
    }

    fn lapse_old_leases(&mut self) {
        let groups = self.now.checked_sub(self.options.rollout_lease_timeout);
        let samples = self.now.checked_sub(self.options.verifier_lease_timeout);
        if let Phase::Sampling(round) = &mut self.phase {
            let lapsed = round.revoke_older(groups, samples) as u64;
            if lapsed > 0 {
                self.count(counter::LAPSED_LEASES, lapsed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use crate::{Directive, Event, Reply};
    use std::time::Duration;

    #[test]
    fn a_silent_worker_is_told_to_register_again() {
        let mut run = Run::sampling(options());
        let held = run.groups(run.rollout, 100);
        let seconds = |run: &mut Run, seconds| (0..seconds).for_each(|_| run.pass(Duration::from_secs(1)));
        seconds(&mut run, 5);
        let (verifier, learner) = (run.verifier, run.learners[0]);
        run.call(Event::Heartbeat { worker: verifier, activity: "works".into() }).unwrap();
        run.call(Event::Heartbeat { worker: learner, activity: "works".into() }).unwrap();
        seconds(&mut run, 6);
        let rollout = run.rollout;
        let told = run.call(Event::Heartbeat { worker: rollout, activity: String::new() });
        assert_eq!(told, Ok(Reply::Directive(Directive::Register)));
        assert_eq!(run.machine.status(run.now).queues.groups_waiting, held.len());
        assert_eq!(run.machine.status(run.now).counters["lapsed_leases"], held.len() as u64);
    }

    #[test]
    fn workers_do_not_pay_for_a_coordinator_that_stood_still() {
        let mut run = Run::sampling(options());
        run.pass(Duration::from_secs(3600));
        assert_eq!(run.machine.status(run.now).workers.len(), 3);
        (0..11).for_each(|_| run.pass(Duration::from_secs(1)));
        assert_eq!(run.machine.status(run.now).workers.len(), 0);
    }

    #[test]
    fn a_lease_lapses_although_its_worker_lives() {
        let mut run = Run::sampling(options());
        run.groups(run.rollout, 100);
        for _ in 0..=options().rollout_lease_timeout.as_secs() {
            run.everybody_beats();
            run.pass(Duration::from_secs(1));
        }
        assert!(run.machine.status(run.now).queues.groups_generating == 0);
    }
}
