use std::collections::{BTreeSet, VecDeque};

use pacs_types::{Role, WorkerId};
use serde::{Deserialize, Serialize};

use crate::machine::Machine;
use crate::worker::{MOST_REMEMBERED, Process, Worker};
use crate::worker_loss::Departure;
use crate::{Counter, Refusal, Reply};

/// Former holders of names, to recognize processes that return after they were given up.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Names {
    /// Workers whose name was taken over: they are told to leave, not to register again.
    replaced: BTreeSet<WorkerId>,
    /// Names whose holder fell silent, oldest first. That process may still be alive, or be stopped.
    vacated: VecDeque<Vacant>,
}

/// A vacated name and its last holder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Vacant {
    role: Role,
    name: String,
    worker: WorkerId,
    process: Process,
}

impl Names {
    /// Whether this worker's name was taken over by another process.
    pub(crate) fn is_replaced(&self, worker: WorkerId) -> bool {
        self.replaced.contains(&worker)
    }

    /// Frees a name whose holder was not seen to end.
    pub(crate) fn vacate(&mut self, role: Role, name: String, worker: WorkerId, process: Process) {
        if self.vacated.len() == MOST_REMEMBERED {
            self.vacated.pop_front();
        }
        self.vacated.push_back(Vacant { role, name, worker, process });
    }

    fn replace(&mut self, worker: WorkerId) {
        self.replaced.insert(worker);
        if self.replaced.len() > MOST_REMEMBERED {
            self.replaced.pop_first();
        }
    }

    /// Assigns a name to a process; earlier holders that return find it taken.
    fn take(&mut self, role: Role, name: &str, process: &Process) {
        let vacated = std::mem::take(&mut self.vacated);
        for vacant in vacated {
            if (vacant.role, vacant.name.as_str()) != (role, name) {
                self.vacated.push_back(vacant);
            } else if !process.is(&vacant.process) {
                self.replace(vacant.worker);
            }
        }
    }
}

impl Machine {
    /// Registers a process. A name belongs to a live process until it has missed its heartbeats, or its supervisor
    /// vouches for its end; otherwise two processes with one name would replace each other in turns. Names are per
    /// role, so that a certificate of one role cannot take a slot of another.
    pub(crate) fn register(&mut self, role: Role, name: String, process: Process, collective_address: String) {
        let holder = self.workers.find(role, &name);
        if let Some((_, holder)) = holder
            && !process.is(&holder.process)
            && !process.outlives(&holder.process)
        {
            let (host, pid) = (holder.process.host.clone(), holder.process.pid);
            let heard_ago = self.now.saturating_sub(holder.heard);
            return self.refuse(Refusal::NameTaken { name, host, pid, heard_ago });
        }
        let earlier = holder.map(|(id, holder)| (id, process.is(&holder.process)));
        let id = WorkerId(self.next_id());
        self.reply(Reply::Registered(id));
        // Earlier holders of the name that come back are told to leave from now on.
        self.names.take(role, &name, &process);
        let worker = Worker::new(role, name, process, collective_address, self.now);
        self.workers.insert(id, worker);
        if let Some((earlier, is_same)) = earlier {
            self.count(Counter::RestartedWorkers, 1);
            // A process whose registration was duplicated has to register again, not to leave.
            if !is_same {
                self.names.replace(earlier);
            }
            self.lose_worker(earlier, Departure::Replaced);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::testing::*;
    use crate::{Answer, Directive, Effect, Event, Refusal, Reply};
    use pacs_types::{Role, WorkerId};

    fn register(run: &mut Run, host: &str, pid: u32, started: u64) -> Answer {
        run.call(registration(Role::Rollout, "rollout-0", host, pid, started))
    }

    fn id(answer: Answer) -> WorkerId {
        match answer {
            Ok(Reply::Registered(id)) => id,
            other => panic!("{other:?}"),
        }
    }

    /// Lets seconds pass in which these workers and the rest of the run send heartbeats.
    fn live(run: &mut Run, beating: &[WorkerId], seconds: u64) {
        for _ in 0..seconds {
            for worker in [run.verifier, run.learners[0]].iter().chain(beating) {
                run.step(Event::Heartbeat { worker: *worker, activity: String::new() });
            }
            run.pass(Duration::from_secs(1));
        }
    }

    #[test]
    fn a_new_process_takes_the_slot_and_its_work_is_issued_again() {
        let mut run = Run::sampling(options());
        let first = run.groups(run.rollout, 100);
        let (second, effects) = run.register(Role::Rollout, "rollout-0");
        assert!(effects.iter().any(|effect| matches!(effect, Effect::WorkerLost { name, .. } if name == "rollout-0")));
        assert_eq!(run.groups(second, 100).len(), first.len());
        let old = run.rollout;
        assert_eq!((run.told(old), run.told(second)), (Directive::Replaced, Directive::Continue));
        let refused = run.call(Event::LeaseGroups { worker: old, free_samples: 1, request: 0 });
        assert_eq!(refused, Err(Refusal::Replaced(old)));
    }

    #[test]
    fn a_name_is_kept_from_another_process_until_its_holder_falls_silent() {
        // Process id and start time of the holder and of the newcomer: no supervisor, only one of them has one, or the
        // holder was started later.
        for (holder, wanting) in [((10, 0), (20, 0)), ((10, 5), (20, 0)), ((10, 0), (20, 7)), ((10, 5), (20, 4))] {
            let mut run = Run::sampling(options());
            run.step(Event::Leave { worker: run.rollout, error: None });
            let first = id(register(&mut run, "a", holder.0, holder.1));
            live(&mut run, &[first], 3);
            for _ in 0..20 {
                let refused = register(&mut run, "b", wanting.0, wanting.1);
                let Err(Refusal::NameTaken { name, host, pid, heard_ago }) = refused else { panic!("{refused:?}") };
                let heard = Duration::from_secs(1);
                assert_eq!((name.as_str(), host.as_str(), pid, heard_ago), ("rollout-0", "a", holder.0, heard));
                live(&mut run, &[first], 1);
            }
            assert_eq!(run.told(first), Directive::Continue);
            live(&mut run, &[], 11);
            let second = id(register(&mut run, "b", wanting.0, wanting.1));
            assert_eq!(run.told(second), Directive::Continue);
            // The first process was stopped and continues: it is told to leave, and cannot get the name back.
            assert_eq!(run.told(first), Directive::Replaced);
            assert!(register(&mut run, "a", holder.0, 0).is_err());
            assert_eq!(run.told(second), Directive::Continue);
        }
    }

    #[test]
    fn a_process_that_registers_again_is_one_process() {
        let mut run = Run::sampling(options());
        run.step(Event::Leave { worker: run.rollout, error: None });
        let first = id(register(&mut run, "a", 10, 5));
        let second = id(register(&mut run, "a", 10, 5));
        // If its first answer arrives last, it registers once more, because nobody else has the name.
        assert_eq!((run.told(first), run.told(second)), (Directive::Register, Directive::Continue));
        // In a container, an older process may have had the same process id and host name.
        assert!(matches!(register(&mut run, "a", 10, 4), Err(Refusal::NameTaken { .. })));
        let third = id(register(&mut run, "a", 10, 6));
        assert_eq!((run.told(second), run.told(third)), (Directive::Register, Directive::Continue));
    }

    #[test]
    fn a_worker_of_another_role_takes_nothing_of_a_name() {
        let mut run = Run::sampling(options());
        let learner = run.learners[0];
        let verifier = id(run.call(registration(Role::Verifier, "learner-0", "b", 77, 5)));
        let rollout = id(run.call(registration(Role::Rollout, "learner-0", "c", 78, u64::MAX)));
        for worker in [learner, verifier, rollout] {
            assert_eq!(run.told(worker), Directive::Continue);
        }
        assert_eq!(run.machine.rank(learner), Some(0));
        // The same holds for a slot that has become vacant.
        live(&mut run, &[verifier, rollout], 1);
        for _ in 0..11 {
            for worker in [verifier, rollout, run.verifier, run.rollout] {
                run.step(Event::Heartbeat { worker, activity: String::new() });
            }
            run.pass(Duration::from_secs(1));
        }
        let second = id(run.call(registration(Role::Verifier, "learner-0", "d", 79, u64::MAX)));
        assert_eq!((run.told(learner), run.told(second)), (Directive::Register, Directive::Continue));
        assert_eq!(run.told(verifier), Directive::Replaced);
    }

    #[test]
    fn a_refused_registration_is_not_recorded() {
        let mut run = Run::sampling(options());
        let before = run.records.len();
        assert!(register(&mut run, "b", 77, 0).is_err());
        assert_eq!(run.records.len(), before);
    }
}
