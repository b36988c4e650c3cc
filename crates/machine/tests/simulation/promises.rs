//! What holds of every single step of the machine, whoever sees it: of the answer at hand, and of what the machine says of
//! itself before and after it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pacs_machine::{Directive, Effect, Event, Machine, Openings, PhaseKind, Reply, Step};
use pacs_types::WorkerId;

/// When each registration was heard last.
#[derive(Debug, Default)]
pub(crate) struct Promises {
    heard: BTreeMap<WorkerId, Duration>,
}

impl Promises {
    /// Checks a step that led to this machine. `before` is what callers could wait for when it began.
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

    /// Whoever is given something had to be woken for it: what was there is in the openings.
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

    /// Nobody is given up before it was silent for as long as it may be.
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

/// Checks what the machine says of its members: a name has one of each role, and what is leased is held by members.
pub(crate) fn members(machine: &Machine) {
    let status = machine.status(machine.now());
    let mut names = BTreeSet::new();
    for member in &status.workers {
        assert!(names.insert((member.role, &member.name)), "{} has two members", member.name);
    }
    // The queues are those of an evaluation while there is one.
    if status.phase != PhaseKind::Evaluating {
        let held: usize = status.workers.iter().map(|member| member.leases).sum();
        let leased = status.queues.groups_generating + status.queues.samples_verifying;
        assert_eq!(held, leased, "leases that no member holds");
    }
}
