use pacs_types::{Generation, Role, WorkerId};

use crate::machine::Machine;
use crate::{Reply, TaskKind, TaskOrder};

impl Machine {
    /// Returns the current task until the rank has reported it. Asking again is idempotent.
    pub(crate) fn next_task(&mut self, worker: WorkerId, generation: Generation) {
        self.unchanged = true;
        if let Err(refusal) = self.member(worker, Role::Learner) {
            return self.refuse(refusal);
        }
        let rank = self.team.as_ref().filter(|team| team.generation == generation).and_then(|team| team.rank(worker));
        let Some(rank) = rank else {
            if self.is_ended() {
                return self.reply(Reply::Task(None));
            }
            let kind = TaskKind::Regroup { reason: self.regroup_reason.clone() };
            // Nobody reports this one, so it needs no number of its own.
            let task = self.newest_id;
            return self.reply(Reply::Task(Some(TaskOrder { task, rank: 0, kind })));
        };
        let open = self.phase.task().filter(|task| !task.done.contains(&rank));
        let order = open.map(|task| TaskOrder { task: task.id, rank, kind: task.kind.clone() });
        self.reply(Reply::Task(order));
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use crate::{Event, Reply, TaskKind};
    use pacs_types::Generation;

    #[test]
    fn a_task_is_given_until_it_is_reported_and_an_old_generation_regroups() {
        let mut run = Run::preparing(options());
        let worker = run.learners[0];
        let ask = |generation| Event::NextTask { worker, generation: Generation(generation) };
        let Ok(Reply::Task(Some(first))) = run.call(ask(1)) else { panic!() };
        let Ok(Reply::Task(Some(second))) = run.call(ask(1)) else { panic!() };
        assert_eq!((&first, &first.kind), (&second, &TaskKind::Prepare));
        run.prepare();
        assert_eq!(run.call(ask(1)), Ok(Reply::Task(None)));
        let Ok(Reply::Task(Some(order))) = run.call(ask(0)) else { panic!() };
        assert!(matches!(order.kind, TaskKind::Regroup { .. }));
    }
}
