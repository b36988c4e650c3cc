use pacs_machine::{Action, PhaseKind, WorkerStatus};
use pacs_protocol::v1;
use pacs_types::{GroupId, WorkerId};

use super::Driver;
use super::bounded::shorten_server;
use super::findings::findings;
use super::summary::unix_time;

impl Driver {
    pub(crate) fn status(&self) -> v1::GetStatusResponse {
        let status = self.machine.status(self.now());
        let queues = status.queues;
        let metrics = self.newest_step.as_ref().map(|step| step.numbers()).unwrap_or_default();
        let retired = self.machine.retired_problems();
        let (disk, stalled) = (self.waits_for_disk(), status.stalled);
        // An evaluation that holds the run has an end of its own.
        let remaining_seconds = match status.phase {
            PhaseKind::Evaluating => self.measuring_left(),
            _ => self.remaining_seconds(status.step),
        };
        let mut response = v1::GetStatusResponse {
            job: self.spec.name.clone(),
            run_dir: self.run_dir.display().to_string(),
            clock: unix_time(),
            phase: status.phase.name().to_owned(),
            phase_seconds: status.phase_age.as_secs_f64(),
            step: status.step,
            total_steps: self.spec.batch.steps,
            weight_version: status.weights.map_or(status.step, |version| version.0),
            generation: status.generation.0,
            learners_wanted: self.spec.learners(),
            workers: status.workers.into_iter().map(|status| self.with_servers(worker(status))).collect(),
            queues: Some(v1::QueueDepths {
                groups_waiting: narrow(queues.groups_waiting),
                groups_generating: narrow(queues.groups_generating),
                samples_waiting: narrow(queues.samples_waiting),
                samples_verifying: narrow(queues.samples_verifying),
                groups_complete: narrow(queues.groups_complete),
                groups_wanted: narrow(queues.groups_wanted),
            }),
            waiting_for: disk.clone().unwrap_or(status.waiting_for),
            metrics: metrics
                .into_iter()
                .filter_map(|(name, value)| Some((name, value.as_f64()?)))
                .chain(self.measured_numbers())
                .collect(),
            uptime_seconds: self.started.elapsed().as_secs_f64(),
            remaining_seconds,
            counters: status.counters.into_iter().map(|(counter, count)| (counter.name().to_owned(), count)).collect(),
            verifiers: self.verifications.status(),
            oldest_group: status.oldest_group,
            slots: status.slots,
            groups_in_flight: narrow(status.in_flight),
            paused: status.paused,
            actions: status.actions.into_iter().map(action).collect(),
            retired_problems: retired.map(narrow),
            training_problems: narrow(self.problems.train.len()),
            set_aside: status.set_aside.into_iter().map(|(group, reason)| self.set_aside(group, reason)).collect(),
            findings: Vec::new(),
            left_out: Default::default(),
        };
        response.findings = findings(&response, &self.recent, disk.as_deref(), stalled);
        response
    }
}

/// Characters of a question that the status shows.
const SHOWN_QUESTION: usize = 200;

/// Servers of one worker that are remembered.
const MOST_SERVERS: usize = 256;

impl Driver {
    /// Remembers the servers that a worker has described, and forgets those of workers that are gone.
    pub(crate) fn note_servers(&mut self, worker: WorkerId, mut servers: Vec<v1::EngineServer>) {
        if servers.is_empty() {
            self.servers.remove(&worker);
            return;
        }
        servers.truncate(MOST_SERVERS);
        servers.iter_mut().for_each(shorten_server);
        if self.servers.insert(worker, servers).is_none() {
            let machine = &self.machine;
            self.servers.retain(|worker, _| machine.worker_role(*worker).is_some());
        }
    }

    fn with_servers(&self, mut status: v1::WorkerStatus) -> v1::WorkerStatus {
        status.servers = self.servers.get(&WorkerId(status.worker_id)).cloned().unwrap_or_default();
        status
    }

    fn set_aside(&self, group: GroupId, reason: String) -> v1::SetAsideGroup {
        let question = self.problem(group).question.chars().take(SHOWN_QUESTION).collect();
        v1::SetAsideGroup { group_id: group.0, question, reason }
    }
}

fn action(action: Action) -> v1::OperatorAction {
    v1::OperatorAction { operator: action.who, time: action.at, action: action.what }
}

fn worker(worker: WorkerStatus) -> v1::WorkerStatus {
    v1::WorkerStatus {
        worker_id: worker.id.0,
        name: worker.name,
        role: v1::Role::from(worker.role).into(),
        host: worker.host,
        pid: worker.pid,
        activity: worker.activity,
        seconds_since_heartbeat: worker.silent.as_secs_f64(),
        leases: narrow(worker.leases),
        rank: worker.rank,
        activity_seconds: worker.active.as_secs_f64(),
        draining: worker.draining,
        servers: Vec::new(),
    }
}

fn narrow(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}
