//! Invariants of every single step, checked against its answer and against the machine's own
//! account before and after it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pacs_machine::{Directive, Effect, Event, Machine, Openings, PhaseKind, Reply, Step};
use pacs_types::WorkerId;

/// Time of each registration's last sign of life.
#[derive(Debug, Default)]
pub(crate) struct Promises {
    heard: BTreeMap<WorkerId, Duration>,
}

impl Promises {
    /// Checks a step that led to this machine. `before` holds the openings when the step began.
    pub(crate) fn check(&mut self, before: Openings, event: &Event, step: &Step, machine: &Machine) {
        self.woken(before, event, step);
        self.silence(event, step, machine);
        if let (Event::Heartbeat { worker, .. }, Ok(Reply::Directive(Directive::Leave | Directive::LeaveForNow))) =
            (event, &step.answer)
            && machine.ended().is_none()
        {
            let held = machine.status(machine.now()).workers.into_iter().find(|member| member.id == *worker);
            let held = held.map(|member| (member.leases, member.rank));
            assert!(matches!(held, None | Some((0, None))), "{worker} may leave while it holds {held:?}");
        }
    }

    /// Checks that whatever a caller is granted was listed in the openings, so that a waiting
    /// caller would have been woken.
    fn woken(&self, before: Openings, event: &Event, step: &Step) {
        let is_new = step.record.is_some();
        match (event, &step.answer) {
            (Event::LeaseGroups { .. }, Ok(Reply::Groups(given))) if is_new => {
                assert!(before.groups > 0 || given.is_empty(), "groups were leased, and who waited was not woken");
            }
            (Event::LeaseSamples { .. }, Ok(Reply::Samples(given))) if is_new => {
                assert!(before.samples > 0 || given.is_empty(), "samples were leased, and who waited was not woken");
            }
            (Event::NextTask { generation, .. }, Ok(Reply::Task(Some(order))))
                if before.generation == Some(*generation) =>
            {
                assert_eq!(before.task, Some(order.task), "a task was given out, and who waited was not woken");
            }
            _ => {}
        }
    }

    /// Checks that no worker is given up before it was silent for the whole timeout.
    fn silence(&mut self, event: &Event, step: &Step, machine: &Machine) {
        let now = machine.now();
        match (event, &step.answer) {
            (Event::Register { .. }, Ok(Reply::Registered(worker))) => drop(self.heard.insert(*worker, now)),
            (Event::Heartbeat { worker, .. }, _) => drop(self.heard.insert(*worker, now)),
            (Event::WorkerSilent { worker }, _) => {
                let lost = step.effects.iter().any(|effect| matches!(effect, Effect::WorkerLost { .. }));
                let silent = self.heard.get(worker).map(|heard| now.saturating_sub(*heard));
                let may_be = machine.options().heartbeat_timeout;
                assert!(
                    !lost || silent.is_none_or(|silent| silent > may_be),
                    "{worker} was silent for {silent:?} only"
                );
            }
            _ => {}
        }
    }
}

/// Checks the status of the members: a name occurs once per role, and members hold all leases.
pub(crate) fn members(machine: &Machine) {
    let status = machine.status(machine.now());
    let mut names = BTreeSet::new();
    for member in &status.workers {
        assert!(names.insert((member.role, &member.name)), "{} has two members", member.name);
    }
    // While the learners wait for an evaluation, the queue lengths are those of its pool alone.
    if status.phase != PhaseKind::Evaluating {
        let held: usize = status.workers.iter().map(|member| member.leases).sum();
        let leased = status.queues.groups_generating + status.queues.samples_verifying;
        assert_eq!(held, leased, "leases that no member holds");
    }
}
