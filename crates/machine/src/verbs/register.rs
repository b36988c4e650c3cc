use pacs_types::{Role, WorkerId};

use crate::Reply;
use crate::lose::counter;
use crate::machine::Machine;
use crate::worker::{MOST_REMEMBERED, Worker};

impl Machine {
    pub(crate) fn register(&mut self, role: Role, name: String, host: String, pid: u32, collective_address: String) {
        let id = WorkerId(self.next_id());
        self.reply(Reply::Registered(id));
        let earlier = self.workers.iter().find(|(_, worker)| worker.name == name).map(|(id, _)| *id);
        if let Some(earlier) = earlier {
            self.count(counter::RESTARTED_WORKERS, 1);
            self.replaced.insert(earlier);
            if self.replaced.len() > MOST_REMEMBERED {
                self.replaced.pop_first();
            }
        }
        let activity = "registered".to_owned();
        let worker = Worker {
            role,
            name,
            host,
            pid,
            collective_address,
            activity,
            active_since: self.now,
            heard: self.now,
            answered: None,
            draining: None,
            joining: false,
        };
        self.workers.insert(id, worker);
        if let Some(earlier) = earlier {
            self.lose_worker(earlier, "was replaced by a new process", true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use crate::{Directive, Effect, Event, Reply};
    use pacs_types::Role;

    #[test]
    fn a_new_process_takes_the_slot_and_its_work_is_issued_again() {
        let mut run = Run::sampling(options());
        let first = run.groups(run.rollout, 100);
        let (second, effects) = run.register(Role::Rollout, "rollout-0");
        assert!(effects.iter().any(|effect| matches!(effect, Effect::WorkerLost { name, .. } if name == "rollout-0")));
        assert_eq!(run.groups(second, 100).len(), first.len());
        let told = |run: &mut Run, worker| run.call(Event::Heartbeat { worker, activity: String::new() });
        let old = run.rollout;
        assert_eq!(told(&mut run, old), Ok(Reply::Directive(Directive::Replaced)));
        assert_eq!(told(&mut run, second), Ok(Reply::Directive(Directive::Continue)));
    }
}
