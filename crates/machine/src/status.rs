use std::time::Duration;

use pacs_types::{Generation, GroupId, Role, WeightVersion, WorkerId};

use crate::machine::Machine;
use crate::operate::Action;
use crate::phase::{Evaluation, Phase, Task};
use crate::pool::{Pool, evaluation_problem};
use crate::schedule::{Decision, decide};
use crate::{Counters, End, PhaseKind, TaskKind};

/// Time without progress after which the status sentence mentions it.
const NAMED_AFTER: Duration = Duration::from_secs(15);

/// A run as its operator sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Status {
    /// What the learners do, or how the run ended.
    pub phase: PhaseKind,
    /// Time since that phase began.
    pub phase_age: Duration,
    /// Training steps done.
    pub step: u64,
    /// Newest weights that rank 0 has published; `None` before the first.
    pub weights: Option<WeightVersion>,
    /// Number of the newest learner generation.
    pub generation: Generation,
    /// Members, ordered by role and name.
    pub workers: Vec<WorkerStatus>,
    /// Queue lengths of the phase's pool; waiting and leased work includes that of a concurrent evaluation.
    pub queues: QueueDepths,
    /// One sentence: what the run waits for.
    pub waiting_for: String,
    /// Time since the last progress.
    pub stalled: Duration,
    /// The oldest incomplete group and what holds it up, in words.
    pub oldest_group: Option<String>,
    /// Counters since the start of the job.
    pub counters: Counters,
    /// Bound on training groups in flight.
    pub slots: u32,
    /// Training groups in flight, including those of the batch in training.
    pub in_flight: usize,
    /// Whether an operator has paused the run.
    pub paused: bool,
    /// The last operator actions, newest at the end.
    pub actions: Vec<Action>,
    /// Quarantined groups, with the reason.
    pub set_aside: Vec<(GroupId, String)>,
}

/// One member in the status.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkerStatus {
    /// Registration id; a restarted worker gets a new one.
    pub id: WorkerId,
    /// Name of its slot.
    pub name: String,
    /// Role that it works in.
    pub role: Role,
    /// Host name of its process.
    pub host: String,
    /// Process id on that host.
    pub pid: u32,
    /// What it does, in its own words.
    pub activity: String,
    /// Time since that activity began.
    pub active: Duration,
    /// Whether it gets no new work and is dismissed once it holds none.
    pub draining: bool,
    /// Time since its last heartbeat.
    pub silent: Duration,
    /// Number of leases that it holds.
    pub leases: usize,
    /// Learners: rank in the current generation; `None` outside of it.
    pub rank: Option<u32>,
}

/// Lengths of the work queues.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueDepths {
    /// Groups that wait for a rollout worker.
    pub groups_waiting: usize,
    /// Groups on lease to rollout workers.
    pub groups_generating: usize,
    /// Samples that wait for a verifier.
    pub samples_waiting: usize,
    /// Samples on lease to verifiers.
    pub samples_verifying: usize,
    /// Groups with verdicts for all samples.
    pub groups_complete: usize,
    /// Complete groups that the step or evaluation needs.
    pub groups_wanted: usize,
}

impl Machine {
    /// The status as of `now`.
    #[must_use]
    pub fn status(&self, now: Duration) -> Status {
        let mut workers: Vec<_> = self
            .workers
            .iter()
            .map(|(id, worker)| WorkerStatus {
                id,
                name: worker.name.clone(),
                role: worker.role,
                host: worker.process.host.clone(),
                pid: worker.process.pid,
                activity: worker.activity.clone(),
                active: now.saturating_sub(worker.active_since),
                draining: worker.draining().is_some(),
                silent: now.saturating_sub(worker.heard),
                leases: self.pools().map(|pool| pool.loans_of(id)).sum(),
                rank: self.team.as_ref().and_then(|team| team.rank(id)),
            })
            .collect();
        workers.sort_by(|a, b| (a.role, a.name.len(), &a.name).cmp(&(b.role, b.name.len(), &b.name)));
        Status {
            phase: self.phase.kind(),
            phase_age: self.phase_age(now),
            step: self.position.step,
            weights: self.weights,
            generation: self.newest_generation,
            workers,
            queues: self.depths(),
            waiting_for: self.waiting_for(now),
            stalled: self.stalled_for(now),
            oldest_group: self
                .current_pool()
                .oldest_open()
                .map(|oldest| self.describe(self.current_pool(), oldest, now)),
            counters: self.position.counters.clone(),
            slots: self.options.slots,
            in_flight: self.in_flight(),
            paused: self.paused,
            actions: self.actions.iter().cloned().collect(),
            set_aside: self.position.set_aside.iter().map(|(group, what)| (*group, what.clone())).collect(),
        }
    }

    /// Time since the current phase began.
    #[must_use]
    pub fn phase_age(&self, now: Duration) -> Duration {
        now.saturating_sub(self.phase_since)
    }

    /// Time without progress; zero while the run is paused or has ended.
    #[must_use]
    pub fn stalled_for(&self, now: Duration) -> Duration {
        if self.is_ended() || self.paused { Duration::ZERO } else { now.saturating_sub(self.progressed) }
    }

    /// One sentence: what the run waits for, from which role, since when, and whether it is stalled.
    #[must_use]
    pub fn waiting_for(&self, now: Duration) -> String {
        let (waiting, stalled) = (self.waits_for(now) + &self.and_evaluates(), self.stalled_for(now));
        match stalled >= NAMED_AFTER {
            true => format!("{waiting}; nothing has happened for {}", seconds(stalled)),
            false => waiting,
        }
    }

    fn waits_for(&self, now: Duration) -> String {
        let age = seconds(now.saturating_sub(self.phase_since));
        match &self.phase {
            Phase::Assembling => {
                let joining = self.workers.values().filter(|worker| worker.joining).count();
                let (wanted, there) = (self.options.learners, self.workers.count(Role::Learner));
                let least = match self.options.min_learners {
                    least if least < wanted => {
                        format!(" ({least} are enough after {})", seconds(self.options.learner_wait))
                    }
                    _ => String::new(),
                };
                let after = match self.regroup_reason.as_str() {
                    "" => String::new(),
                    reason => format!(", after {reason}"),
                };
                format!(
                    "waits for learners: {wanted} wanted{least}, {there} registered, {joining} ready, for {age}{after}"
                )
            }
            Phase::Preparing(task) => {
                format!("waits for {} to load their state, for {age}", self.open_ranks(task))
            }
            Phase::Evaluating(evaluation) => {
                let what = format!("the evaluation at step {}", self.position.step);
                self.waiting_for_groups(&what, &evaluation.pool, evaluation.wanted, now)
            }
            Phase::Sampling => {
                let what = format!("step {}", self.position.step + 1);
                self.waiting_for_groups(&what, &self.pool, self.options.prompts_per_step as usize, now)
            }
            Phase::Training(training) => {
                let (step, whom) = (self.position.step + 1, self.open_ranks(&training.task));
                format!("step {step} waits for {whom} to train, for {age}")
            }
            Phase::Ahead(_) => {
                let step = self.position.step;
                let what = format!("step {} is trained and waits for the evaluation at step {step}, which", step + 1);
                let (pool, wanted) = self.concurrent.as_ref().map_or((&self.pool, 0), |it| (&it.pool, it.wanted));
                self.waiting_for_groups(&what, pool, wanted, now)
            }
            Phase::Saving(task) => {
                let how = match task.kind {
                    TaskKind::Save { background: true, .. } => "capture",
                    TaskKind::Save { background: false, .. }
                    | TaskKind::Prepare
                    | TaskKind::Train { .. }
                    | TaskKind::Regroup { .. } => "write",
                };
                let (whom, step) = (self.open_ranks(task), self.position.step);
                format!("waits for {whom} to {how} the checkpoint of step {step}, for {age}")
            }
            Phase::Committing => {
                let what = self.writing_status().unwrap_or_else(|| "the checkpoint in flight".to_owned());
                format!("waits for {what}, for {age}")
            }
            Phase::Ended(End::Finished) => "waits for nothing: the run is finished".to_owned(),
            Phase::Ended(End::Stopped) => "waits for nothing: the run was stopped".to_owned(),
            Phase::Ended(End::Failed { reason }) => format!("waits for nothing: the run failed: {reason}"),
        }
    }

    /// Progress of an unawaited evaluation, as a further clause of the sentence.
    fn and_evaluates(&self) -> String {
        let Some(Evaluation { pool, version, .. }) = self.unawaited() else { return String::new() };
        let (judged, samples) = pool.judged_samples();
        format!("; the evaluation at step {} runs concurrently: {judged} of {samples} samples judged", version.0)
    }

    /// The concurrent evaluation, unless the learners wait for it.
    fn unawaited(&self) -> Option<&Evaluation> {
        self.concurrent.as_ref().filter(|_| !matches!(self.phase, Phase::Ahead(_)))
    }

    pub(crate) fn open_ranks(&self, task: &Task) -> String {
        self.ranks_but(|rank| task.done.contains(&rank))
    }

    /// The ranks that are not done, in a word or two.
    pub(crate) fn ranks_but(&self, is_done: impl Fn(u32) -> bool) -> String {
        let ranks = self.team.as_ref().map(|team| team.ranks.as_slice()).unwrap_or_default();
        let open: Vec<String> = (0u32..)
            .zip(ranks)
            .filter(|(rank, _)| !is_done(*rank))
            .map(|(_, worker)| self.worker_name(*worker))
            .collect();
        match open.as_slice() {
            [] => "the learners".to_owned(),
            [one] => format!("learner {one}"),
            [first, ..] => format!("{} of {} learners ({first} …)", open.len(), ranks.len()),
        }
    }

    fn waiting_for_groups(&self, what: &str, pool: &Pool, wanted: usize, now: Duration) -> String {
        if self.paused {
            return format!("{what} waits for the operator: the run is paused (`pacs resume` continues it)");
        }
        // Enough groups are complete, but the schedule demands one that is not.
        let is_enough = matches!(self.phase, Phase::Sampling) && pool.complete() >= wanted;
        let due = is_enough.then(|| decide(self.terms(), self.candidates())).and_then(|decision| match decision {
            Decision::WaitFor(group) => Some(group),
            Decision::Train(_) | Decision::TooFew | Decision::Evict(_) => None,
        });
        if let Some(due) = due.and_then(|group| pool.open(group)) {
            let lag = self.options.max_lag;
            return format!(
                "{what} waits for a group that would grow older than {lag} versions: {}",
                self.describe(pool, due, now)
            );
        }
        let oldest = match pool.oldest_open() {
            None => String::new(),
            Some(oldest) => format!("; oldest: {}", self.describe(pool, oldest, now)),
        };
        let open = wanted - pool.complete().min(wanted);
        let depths = pool.depths();
        let generating = depths.groups_waiting + depths.groups_generating > 0;
        let role = if generating { Role::Rollout } else { Role::Verifier };
        let there = self.workers.count(role);
        let whom = match there {
            0 => format!("a {role} worker, but none is registered"),
            1 => format!("1 {role} worker"),
            _ => format!("{there} {role} workers"),
        };
        format!("{what} waits for {whom}: {open} of {wanted} groups open{oldest}")
    }

    /// An incomplete group in words: which, since when, and who holds it.
    fn describe(&self, pool: &Pool, open: (GroupId, Duration, Option<WorkerId>), now: Duration) -> String {
        let (id, drawn, holder) = open;
        let name = evaluation_problem(id).map_or_else(|| id.to_string(), |problem| format!("problem {problem}"));
        let holder = holder.map_or_else(|| "no worker".to_owned(), |worker| self.worker_name(worker));
        let missing = match pool.open_samples(id) {
            Some((0, verdicts)) => format!(", {verdicts} verdicts missing"),
            Some((samples, _)) => format!(", {samples} samples missing"),
            None => String::new(),
        };
        let troubles: String = pool.troubles(id).into_iter().map(|trouble| format!(", {trouble}")).collect();
        format!("{name} for {}{missing}{troubles}, held by {holder}", seconds(now.saturating_sub(drawn)))
    }

    /// The groups that the learners wait for.
    fn current_pool(&self) -> &Pool {
        let first = self.pools().next().filter(|_| self.unawaited().is_none());
        first.unwrap_or(&self.pool)
    }

    fn depths(&self) -> QueueDepths {
        let per_step = self.options.prompts_per_step as usize;
        let Some(Evaluation { pool, .. }) = self.unawaited() else {
            let wanted = self.evaluation().map_or(per_step, |evaluation| evaluation.wanted);
            return QueueDepths { groups_wanted: wanted, ..self.current_pool().depths() };
        };
        // Workers serve both pools; the learners wait for groups of training alone.
        let (training, evaluation) = (self.pool.depths(), pool.depths());
        QueueDepths {
            groups_waiting: training.groups_waiting + evaluation.groups_waiting,
            groups_generating: training.groups_generating + evaluation.groups_generating,
            samples_waiting: training.samples_waiting + evaluation.samples_waiting,
            samples_verifying: training.samples_verifying + evaluation.samples_verifying,
            groups_complete: training.groups_complete,
            groups_wanted: per_step,
        }
    }
}

fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crate::handlers::testing::*;

    #[test]
    fn the_status_line_names_role_age_and_oldest_group() {
        let mut run = Run::new(options());
        run.pass(Duration::from_millis(1500));
        let sentence = |run: &Run| run.machine.status(run.now).waiting_for;
        assert_eq!(sentence(&run), "waits for learners: 1 wanted, 0 registered, 0 ready, for 1.5 s");

        let run = Run::preparing(options());
        assert_eq!(sentence(&run), "waits for learner learner-0 to load their state, for 0.0 s");

        let mut run = Run::sampling(options());
        run.now += Duration::from_millis(2500);
        let expected = "step 1 waits for 1 rollout worker: 2 of 2 groups open; oldest: g0 for 2.5 s, 2 samples missing, \
                        held by no worker";
        assert_eq!(sentence(&run), expected);
        run.groups(run.rollout, 100);
        assert!(sentence(&run).ends_with("held by rollout-0"));
        run.generate_all();
        assert!(sentence(&run).starts_with("step 1 waits for 1 rollout worker"), "{}", sentence(&run));
    }

    #[test]
    fn the_oldest_group_reports_its_failures() {
        let mut run = Run::sampling(options());
        run.generate_all();
        let (verifier, worker) = (run.verifier, run.rollout);
        let grants = run.samples();
        let lease = grants[0].lease;
        let (outcome, sample) = (pacs_types::Outcome::TimedOut, grants[0].sample);
        run.step(crate::Event::SubmitVerdict { worker: verifier, lease, sample, outcome, label: 0.0, reward: None });
        run.verifier = run.register(pacs_types::Role::Verifier, "verifier-0").0;
        assert_ne!(run.verifier, worker);
        let oldest = run.machine.status(run.now).oldest_group.unwrap();
        let expected = "g0 for 0.0 s, 2 verdicts missing, verifications failed once, a worker died that held it once, \
                        held by no worker";
        assert_eq!(oldest, expected);
    }

    #[test]
    fn the_status_line_switches_to_the_verifiers() {
        let mut run = Run::sampling(options());
        run.generate_all();
        let sentence = run.machine.status(run.now).waiting_for;
        assert!(sentence.starts_with("step 1 waits for 1 verifier worker: 2 of 2 groups open"), "{sentence}");
    }
}
