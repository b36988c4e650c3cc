use std::time::Duration;

use pacs_types::WorkerId;

use crate::machine::Machine;
use crate::worker::Drain;
use crate::{Directive, Effect, Event, Reply};

impl Machine {
    pub(crate) fn heartbeat(&mut self, worker: WorkerId, activity: String) {
        // The first heartbeat after a coordinator restart is journaled, because it decides
        // what the worker's death means.
        let was_unheard = self.workers.get_mut(worker).is_some_and(|member| std::mem::take(&mut member.unheard));
        self.unchanged = !was_unheard;
        let is_ended = self.is_ended();
        let holds_nothing = self.rank(worker).is_none() && self.pools().all(|pool| pool.loans_of(worker) == 0);
        let directive = match self.workers.get_mut(worker) {
            _ if is_ended => Directive::Leave,
            Some(member) => {
                member.heard = self.now;
                if member.activity != activity {
                    (member.activity, member.active_since) = (activity, self.now);
                }
                match member.draining() {
                    Some(Drain::Operator) if holds_nothing => Directive::Leave,
                    Some(Drain::Ending) if holds_nothing => Directive::LeaveForNow,
                    Some(Drain::Operator | Drain::Ending) | None => Directive::Continue,
                }
            }
            None if self.restarting.contains(&worker) => Directive::Restart,
            None if self.names.is_replaced(worker) => Directive::Replaced,
            None => Directive::Register,
        };
        self.reply(Reply::Directive(directive));
        if let Some(member) = self.workers.get(worker).filter(|_| directive == Directive::Leave && !is_ended) {
            self.effects.push(Effect::Drained { name: member.name.clone() });
        }
    }

    /// Events that are due at `now`, in the order in which the driver has to apply them.
    ///
    /// Heartbeats are not journaled, so looking at the time is not either; the events that this finds are.
    pub fn overdue(&mut self, now: Duration) -> Vec<Event> {
        self.now = self.now.max(now);
        if self.is_ended() {
            return Vec::new();
        }
        self.forgive_own_silence();
        self.due()
    }

    /// Extends all liveness deadlines by the time that the coordinator itself stood still (a slow disk, a suspended
    /// machine), because it received no heartbeat in that time. The time does not count as a stall, either.
    fn forgive_own_silence(&mut self) {
        let stood_still = self.now.saturating_sub(std::mem::replace(&mut self.ticked, self.now));
        if stood_still > self.options.heartbeat_timeout / 4 {
            let now = self.now;
            self.workers.values_mut().for_each(|worker| worker.heard = (worker.heard + stood_still).min(now));
            self.progressed = (self.progressed + stood_still).min(now);
        }
    }

    /// Events whose deadline has passed.
    fn due(&self) -> Vec<Event> {
        let mut due = Vec::new();
        let before = |timeout| self.now.checked_sub(timeout);
        if let Some(limit) = before(self.options.heartbeat_timeout) {
            let silent = self.workers.iter().filter(|(_, worker)| worker.heard < limit);
            due.extend(silent.map(|(id, _)| Event::WorkerSilent { worker: id }));
            let (mut groups, mut samples) = (Vec::new(), Vec::new());
            for pool in self.pools() {
                let condemnable = pool.condemnable(limit);
                groups.extend(condemnable.0);
                samples.extend(condemnable.1);
            }
            if !(groups.is_empty() && samples.is_empty()) {
                due.push(Event::AccusationsDue { groups, samples });
            }
        }
        let limits = (before(self.options.rollout_lease_timeout), before(self.options.verifier_lease_timeout));
        let (mut groups, mut samples) = (Vec::new(), Vec::new());
        for pool in self.pools() {
            let silent = pool.silent_loans(limits.0, limits.1);
            groups.extend(silent.0);
            samples.extend(silent.1);
        }
        if !(groups.is_empty() && samples.is_empty()) {
            due.push(Event::LeasesLapsed { groups, samples });
        }
        // While no leases are granted, no group can be late.
        if let Some(limit) = before(self.options.group_timeout).filter(|_| self.may_lend() && self.weights.is_some()) {
            let overdue = self.pools().flat_map(|pool| pool.overdue_groups(limit));
            due.extend(overdue.map(|group| Event::GroupOverdue { group }));
        }
        if let Some(task) = self.phase.task()
            && before(self.options.task_timeout).is_some_and(|limit| task.heard < limit)
        {
            due.push(Event::TaskOverdue { task: task.id });
        }
        let overdue = before(self.options.checkpoint_timeout).and_then(|limit| self.overdue_writing(limit));
        due.extend(overdue.map(|task| Event::CheckpointOverdue { task }));
        if before(self.options.learner_wait).is_some_and(|limit| self.is_short_since(limit)) {
            due.push(Event::LearnersMissing);
        }
        due.extend(self.stall_due());
        due
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use crate::{Counter, Directive, Event, Reply};
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
        assert_eq!(run.machine.status(run.now).counters[&Counter::LapsedLeases], held.len() as u64);
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
