//! What is lost and how the run goes on: workers, whose leases lapse; a learner, which ends its generation; samples and
//! groups that nothing comes of.

use pacs_types::{GroupId, LeaseId, Role, SampleId, WorkerId};

use crate::machine::Machine;
use crate::phase::Phase;
use crate::pool::Revoked;
use crate::{Dropped, Effect, Reply};

/// Names of the counters that the machine keeps.
pub(crate) mod counter {
    pub(crate) const LAPSED_LEASES: &str = "lapsed_leases";
    pub(crate) const LOST_WORKERS: &str = "lost_workers";
    pub(crate) const RESTARTED_WORKERS: &str = "restarted_workers";
    pub(crate) const LOST_GENERATIONS: &str = "lost_generations";
    pub(crate) const FAILED_VERDICTS: &str = "failed_verdicts";
    pub(crate) const STALE_SUBMISSIONS: &str = "stale_submissions";
    pub(crate) const REPLACED_SAMPLES: &str = "replaced_samples";
    pub(crate) const LOST_SAMPLES: &str = "lost_samples";
    pub(crate) const DEADLY_SAMPLES: &str = "deadly_samples";
    pub(crate) const DROPPED_GROUPS: &str = "dropped_groups";
    pub(crate) const UNIFORM_GROUPS: &str = "uniform_groups_left_out";
    pub(crate) const EVICTED_GROUPS: &str = "evicted_groups";
    pub(crate) const OVERDUE_GROUPS: &str = "overdue_groups";
    pub(crate) const SET_ASIDE_GROUPS: &str = "set_aside_groups";
    pub(crate) const STALLS: &str = "stalls";
    pub(crate) const FAILED_CHECKPOINTS: &str = "failed_checkpoints";
    pub(crate) const SKIPPED_DRAWS: &str = "skipped_draws";
    pub(crate) const REOPENED_PROBLEMS: &str = "reopened_problems";
}

/// A step may drop this many groups, however small it is, before the run fails.
const MIN_DROPPED_GROUPS: usize = 8;
/// Groups that may be set aside before the run fails: then it is not the prompts.
const MOST_SET_ASIDE: usize = 100;

impl Machine {
    /// Removes a member and issues its work again. When it `died`, that is held against what it worked on.
    pub(crate) fn lose_worker(&mut self, worker: WorkerId, why: &str, died: bool) {
        let Some(lost) = self.workers.remove(&worker) else { return };
        let (name, role) = (lost.name, lost.role);
        self.count(counter::LOST_WORKERS, 1);
        self.effects.push(Effect::WorkerLost { name: name.clone(), role, why: why.to_owned() });
        let revoked = self.revoke_worker(worker, died);
        self.count(counter::LAPSED_LEASES, revoked.loans as u64);
        for group in revoked.deadly {
            self.set_aside(group, &name, why);
        }
        for sample in revoked.deadly_samples {
            self.give_up_deadly(sample, &name, why);
        }
        let is_rank = self.team.as_ref().is_some_and(|team| team.rank(worker).is_some());
        if role == Role::Learner && is_rank {
            self.lose_generation(&format!("{name} {why}"));
        }
    }

    pub(crate) fn revoke_worker(&mut self, worker: WorkerId, died: bool) -> Revoked {
        let most = self.options.max_worker_losses;
        let mut all = Revoked::default();
        for pool in self.pools_mut() {
            let revoked = pool.revoke_worker(worker, died, most);
            all.loans += revoked.loans;
            all.deadly.extend(revoked.deadly);
            all.deadly_samples.extend(revoked.deadly_samples);
        }
        all
    }

    /// Does not try a group again that has killed its workers.
    fn set_aside(&mut self, group: GroupId, worker: &str, why: &str) {
        let losses = self.options.max_worker_losses;
        let what = format!("{losses} workers died while they held it, the last of them alone: {worker} {why}");
        self.effects.push(Effect::Note(format!("{group} is set aside: {what}")));
        self.position.set_aside.insert(group, what);
        self.count(counter::SET_ASIDE_GROUPS, 1);
        if self.position.set_aside.len() > MOST_SET_ASIDE {
            return self.fail(format!(
                "more than {MOST_SET_ASIDE} prompts were set aside because their workers died again and again; look at \
                 the workers' logs"
            ));
        }
        self.drop_group(group, Dropped::Deadly);
    }

    /// Does not have a sample judged again that has killed its verifiers.
    fn give_up_deadly(&mut self, sample: SampleId, worker: &str, why: &str) {
        if self.is_ended() {
            return;
        }
        let losses = self.options.max_worker_losses;
        self.effects.push(Effect::Note(format!(
            "{sample} is given up: {losses} verifiers died while they held it, the last of them alone: {worker} {why}"
        )));
        self.count(counter::DEADLY_SAMPLES, 1);
        self.give_up_sample(sample);
    }

    /// Ends the generation: its state is gone, so the job goes back to where it can be loaded again.
    pub(crate) fn lose_generation(&mut self, reason: &str) {
        if self.is_ended() || self.team.take().is_none() {
            return;
        }
        self.weights = None;
        self.regroup_reason = reason.to_owned();
        self.workers.values_mut().for_each(|worker| worker.joining = false);
        self.count(counter::LOST_GENERATIONS, 1);
        self.lost_generations += 1;
        if self.lost_generations >= self.options.max_lost_generations {
            return self.fail(format!(
                "{} generations of learners were lost in a row without a finished step; the last because {reason}",
                self.lost_generations
            ));
        }
        if self.saving().is_some() {
            self.lost_saves += 1;
            if self.lost_saves >= self.options.max_lost_saves {
                return self.fail(format!(
                    "{} generations of learners were lost in a row while they saved, the last while it wrote the \
                     checkpoint of step {}, because {reason}; look at the learners' logs",
                    self.lost_saves,
                    self.saving().map_or(self.position.step, |(step, _)| step)
                ));
            }
        }
        // The files are written already, so the job goes back to them unless the disk refuses.
        if self.committing().is_some() {
            return self.wait_for_writing();
        }
        self.writing = None;
        self.rewind();
        self.advance();
    }

    /// Stands still until the checkpoint in flight is durable, or given up.
    pub(crate) fn wait_for_writing(&mut self) {
        if !matches!(self.phase, Phase::Committing) {
            self.interrupt();
            self.enter(Phase::Committing);
        }
    }

    /// Undoes everything after the last checkpoint but the groups that its weights, or older ones, have generated.
    pub(crate) fn rewind(&mut self) {
        let mut forgotten: Vec<GroupId> = Vec::new();
        self.interrupt();
        let restart = self.restart.clone();
        let step = restart.step;
        if self.position.step > step {
            forgotten.extend(self.pool.forget_newer(pacs_types::WeightVersion(step)));
        }
        let undone = std::mem::replace(&mut self.position, restart);
        self.position.counters = undone.counters;
        self.position.set_aside = undone.set_aside;
        self.position.learning_rate = undone.learning_rate;
        self.position.log_level = undone.log_level;
        self.position.pass_over(self.pool.group_ids());
        self.save_tried = None;
        (self.failed_groups, self.refills) = (0, 0);
        self.evaluated.retain(|evaluated| *evaluated <= step);
        self.effects.push(Effect::Rewound { step, forgotten });
    }

    /// Where the job stands for whoever knows nothing of the groups in flight.
    pub(crate) fn position_without_flight(&self) -> crate::Snapshot {
        self.position.clone().without(self.pool.group_ids())
    }

    /// Gives a sample up because no verdict could be had for it: another one takes its place, or its group is dropped.
    ///
    /// An evaluation has no replacements: they would measure the policy on the answers that are easy to verify.
    pub(crate) fn give_up_sample(&mut self, sample: SampleId) {
        if self.is_ended() {
            return;
        }
        let (is_measured, most) = (self.is_measured(sample.group), self.options.max_replacements);
        let Some(pool) = self.pool_of(sample.group).filter(|pool| pool.contains(sample.group)) else { return };
        if is_measured || pool.replaced(sample) >= most {
            return self.drop_group(sample.group, Dropped::NoVerdict);
        }
        pool.replace_sample(sample);
        self.count(counter::REPLACED_SAMPLES, 1);
        self.effects.push(Effect::ReplaceSample(sample));
    }

    fn is_measured(&self, group: GroupId) -> bool {
        crate::evaluation_problem(group).is_some()
    }

    /// Gives a group up; the next prompt takes its place. An evaluation goes on without it.
    pub(crate) fn drop_group(&mut self, group: GroupId, why: Dropped) {
        if self.is_ended() || self.pool_of(group).and_then(|pool| pool.remove(group)).is_none() {
            return;
        }
        self.count(counter::DROPPED_GROUPS, 1);
        self.effects.push(Effect::DropGroup { group, why });
        if let (true, Phase::Evaluating(evaluation)) = (self.is_measured(group), &mut self.phase) {
            evaluation.wanted -= 1;
            evaluation.excluded += 1;
            return self.finish_evaluation_if_complete();
        }
        if why != Dropped::Deadly {
            self.failed_groups += 1;
        }
        if self.failed_groups > MIN_DROPPED_GROUPS.max(self.options.prompts_per_step as usize) {
            let dropped = self.failed_groups;
            let (reason, hint) = match why {
                Dropped::Overdue => (
                    format!("they were not done within {} s", self.options.group_timeout.as_secs()),
                    "look at what the rollout workers and verifiers do, or set a larger rollout.group_timeout_seconds",
                ),
                _ => (
                    format!(
                        "no verdict could be had for one of their samples (verifications failed or timed out, {} times \
                         for each sample)",
                        self.options.max_attempts
                    ),
                    "look at the verifiers' logs",
                ),
            };
            return self.fail(format!("{dropped} groups of one step were dropped because {reason}; {hint}"));
        }
        self.fill();
    }

    /// What was kept of a sample is gone: it has to be generated again, or its group has.
    pub(crate) fn sample_gone(&mut self, sample: SampleId) {
        self.reply(Reply::Done);
        self.count(counter::LOST_SAMPLES, 1);
        if let Phase::Training(training) = &self.phase
            && training.groups.contains_key(&sample.group)
        {
            // The ranks cannot be told to forget half a batch.
            self.lose_generation(&format!("{sample} of the batch in training is gone from the disk"));
        }
        if self.pool_of(sample.group).is_some_and(|pool| pool.lose_sample(sample)) {
            self.effects.push(Effect::ReplaceSample(sample));
        }
    }

    /// Ends loans that nothing comes of.
    pub(crate) fn lapse(&mut self, groups: &[LeaseId], samples: &[LeaseId]) {
        let lapsed: usize = self.pools_mut().map(|pool| pool.end_loans(groups, samples)).sum();
        self.count(counter::LAPSED_LEASES, lapsed as u64);
    }

    /// Issues a group's open work again, or gives the group up.
    pub(crate) fn group_overdue(&mut self, group: GroupId) {
        let (attempts, now) = (self.options.max_group_attempts, self.now);
        let Some(pool) = self.pool_of(group).filter(|pool| pool.contains(group)) else { return };
        let is_hopeless = pool.reissue_group(group, attempts, now);
        self.count(counter::OVERDUE_GROUPS, 1);
        let seconds = self.options.group_timeout.as_secs();
        if is_hopeless {
            self.effects.push(Effect::Note(format!("{group} was not done within {seconds} s {attempts} times")));
            return self.drop_group(group, Dropped::Overdue);
        }
        self.effects.push(Effect::Note(format!("{group} was not done within {seconds} s; its work is issued again")));
    }

    /// Gives a generation up whose ranks do not get on, and has those started again that have not reported.
    pub(crate) fn task_overdue(&mut self, task: u64) {
        let Some(current) = self.phase.task().filter(|current| current.id == task) else { return };
        let ranks = (0u32..).zip(self.team.iter().flat_map(|team| &team.ranks));
        let open: Vec<WorkerId> = ranks.filter(|(rank, _)| !current.done.contains(rank)).map(|(_, id)| *id).collect();
        let (what, seconds) = (self.phase.name(), self.options.task_timeout.as_secs());
        if !self.note_stall(seconds) {
            return;
        }
        let why = format!("has reported nothing for {seconds} s of {what}");
        self.restart_all(&why, |_, worker| open.contains(&worker));
    }
}
