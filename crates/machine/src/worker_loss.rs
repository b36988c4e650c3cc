//! Failure handling: dead workers lose their leases, a lost learner ends its generation, and samples and groups that
//! cannot be completed are given up.

use std::collections::VecDeque;
use std::time::Duration;

use pacs_types::{GroupId, LeaseId, Role, SampleId, WorkerId};
use serde::{Deserialize, Serialize};

use crate::machine::Machine;
use crate::phase::Phase;
use crate::pool::{Death, Revoked};
use crate::trial::Found;
use crate::{Counter, Dropped, Effect, Reply};

/// Number of groups that any step may drop, however small it is, before the run fails.
const MIN_DROPPED_GROUPS: usize = 8;
/// Groups that may be quarantined before the run fails: more deaths than that are not caused by prompts.
const MOST_SET_ASIDE: usize = 100;

/// Workers that may die within one window before their deaths stop counting against what they held.
const FEW_DEATHS: usize = 2;
/// The same bound as a share of the role's members: one in this many.
const FEW_OF_MANY: usize = 8;
/// The same bound however large the fleet is: prompts that cause more deaths than this would end the run anyway.
const FEW_OF_ALL: usize = MOST_SET_ASIDE;

/// Times of recent deaths by role, to tell a mass loss from a poison pill.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Losses {
    rollouts: VecDeque<Duration>,
    verifiers: VecDeque<Duration>,
    /// When the last mass loss was found, by role.
    together: [Option<Duration>; 2],
}

impl Losses {
    /// Records a death, and returns how many there were after `since`; `None` for a role whose deaths do not count.
    fn note(&mut self, role: Role, at: Duration, since: Duration) -> Option<usize> {
        let recent = match role {
            Role::Rollout => &mut self.rollouts,
            Role::Verifier => &mut self.verifiers,
            // A learner holds the whole step, which `trial.rs` accounts for.
            Role::Learner => return None,
        };
        while recent.front().is_some_and(|before| *before <= since) {
            recent.pop_front();
        }
        recent.push_back(at);
        Some(recent.len())
    }
}

/// How a worker left.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Departure<'a> {
    /// It deregistered without an error.
    Left,
    /// It deregistered because of an error.
    Failed(&'a str),
    Silent,
    /// Another process has registered under its name.
    Replaced,
    /// The watchdog restarts it because it makes no progress.
    Stuck(&'a str),
}

impl Departure<'_> {
    fn why(self) -> String {
        match self {
            Self::Left => "left".to_owned(),
            Self::Failed(error) => format!("left because of an error: {error}"),
            Self::Silent => "missed its heartbeats".to_owned(),
            Self::Replaced => "was replaced by a new process".to_owned(),
            Self::Stuck(why) => format!("{why}, and is to be started again"),
        }
    }

    /// Whether the work that the worker held may have caused its end.
    fn is_death(self) -> bool {
        match self {
            Self::Left => false,
            // A stuck worker may be stuck in the work that it holds.
            Self::Failed(_) | Self::Silent | Self::Replaced | Self::Stuck(_) => true,
        }
    }
}

impl Machine {
    /// Removes a member and reissues its work. A death counts against the work that it held.
    pub(crate) fn lose_worker(&mut self, worker: WorkerId, departure: Departure<'_>) {
        let Some(lost) = self.workers.remove(worker) else { return };
        let (name, role, why) = (lost.name, lost.role, departure.why());
        self.count(Counter::LostWorkers, 1);
        self.effects.push(Effect::WorkerLost { worker, name: name.clone(), role, why: why.clone() });
        let revoked = self.revoke_worker(worker);
        let leases: usize = revoked.iter().map(Revoked::leases).sum();
        self.count(Counter::LapsedLeases, leases as u64);
        // A worker that died while the coordinator was down may have died with it, of the same cause (the machine was
        // switched off), so its death does not count against its groups or the batch.
        let says_something = departure.is_death() && !lost.unheard;
        if says_something {
            self.hold_against(role, &revoked, &format!("{name} {why}"));
        }
        let is_rank = self.team.as_ref().is_some_and(|team| team.rank(worker).is_some());
        if role == Role::Learner && is_rank {
            self.lose_ranks(&format!("{name} {why}"), says_something);
        }
    }

    /// Marks all members as unheard since the restart of the coordinator.
    pub(crate) fn resumed(&mut self) {
        self.reply(Reply::Done);
        self.unchanged = self.workers.is_empty();
        self.workers.values_mut().for_each(|worker| worker.unheard = true);
    }

    /// Removes a worker that missed its heartbeats. Its process may still live, so its name is remembered as vacated.
    pub(crate) fn worker_silent(&mut self, worker: WorkerId) {
        if let Some(member) = self.workers.get(worker) {
            let (role, name, process) = (member.role, member.name.clone(), member.process.clone());
            self.names.vacate(role, name, worker, process);
        }
        self.lose_worker(worker, Departure::Silent);
    }

    /// Ends every lease of a worker, and returns what it held of each pool.
    pub(crate) fn revoke_worker(&mut self, worker: WorkerId) -> Vec<Revoked> {
        self.pools_mut().map(|pool| pool.revoke_worker(worker)).collect()
    }

    /// Counts a death against what the worker held, unless it is part of a mass loss.
    ///
    /// The window for a mass loss is the heartbeat timeout, within which simultaneous deaths are all noticed. Deaths of
    /// workers that held the same thing count against it however close in time they are.
    fn hold_against(&mut self, role: Role, revoked: &[Revoked], why: &str) {
        let window = self.options.heartbeat_timeout;
        let (now, since, most) = (self.now, self.now.saturating_sub(window), self.options.max_worker_losses);
        let left = self.workers.count(role);
        let Some(recent) = self.losses.note(role, now, since) else { return };
        let alone = revoked.iter().map(Revoked::leases).sum::<usize>() == 1;
        for (pool, revoked) in self.pools_mut().zip(revoked) {
            pool.hold_against(revoked, Death { at: now, why, alone, most });
        }
        // With no worker of the role left, a death counts only if every recent one held the same item.
        let few = if left == 0 { 0 } else { FEW_DEATHS.max((left + recent) / FEW_OF_MANY).min(FEW_OF_ALL) };
        if recent <= few {
            return;
        }
        let is_void = |own: usize| recent.saturating_sub(own) > few;
        let acquitted: usize = self.pools_mut().map(|pool| pool.acquit(role, since, most, is_void)).sum();
        if acquitted > 0 {
            self.note_mass_loss(role, recent, since);
        }
    }

    /// Reports a mass loss, once for each.
    fn note_mass_loss(&mut self, role: Role, recent: usize, since: Duration) {
        let together = match role {
            Role::Rollout => &mut self.losses.together[0],
            Role::Verifier => &mut self.losses.together[1],
            Role::Learner => return,
        };
        // A mass loss that continues is not reported again.
        let is_known = together.replace(self.now).is_some_and(|before| before > since);
        if is_known {
            return;
        }
        let seconds = self.options.heartbeat_timeout.as_secs();
        self.count(Counter::MassLosses, 1);
        self.effects.push(Effect::Note(format!(
            "{recent} {role} workers were lost within {seconds} s: none of their work is blamed for it"
        )));
    }

    /// Gives up the groups and samples whose accusation was not withdrawn within its window.
    pub(crate) fn accusations_due(&mut self, groups: &[GroupId], samples: &[SampleId]) {
        for group in groups {
            let accusation = self.pool_of(*group).and_then(|pool| pool.accusation(*group)).cloned();
            if let Some(accusation) = accusation {
                self.set_aside(*group, &accusation.why);
            }
        }
        for sample in samples {
            let accusation = self.pool_of(sample.group).and_then(|pool| pool.sample_accusation(*sample)).cloned();
            if let Some(accusation) = accusation {
                self.give_up_deadly(*sample, &accusation.why);
            }
        }
    }

    /// Quarantines a group that has killed its workers.
    fn set_aside(&mut self, group: GroupId, why: &str) {
        if self.is_ended() {
            return;
        }
        let losses = self.options.max_worker_losses;
        let what = format!("{losses} workers died while they held it, the last one in isolation: {why}");
        self.effects.push(Effect::Note(format!("{group} is quarantined: {what}")));
        self.position.set_aside.insert(group, what);
        self.count(Counter::SetAsideGroups, 1);
        if self.position.set_aside.len() > MOST_SET_ASIDE {
            return self.fail(format!(
                "more than {MOST_SET_ASIDE} prompts were quarantined because their workers died repeatedly; look at \
                 the workers' logs"
            ));
        }
        self.drop_group(group, Dropped::Deadly);
    }

    /// Gives up a sample that has killed its verifiers.
    fn give_up_deadly(&mut self, sample: SampleId, why: &str) {
        if self.is_ended() {
            return;
        }
        let losses = self.options.max_worker_losses;
        self.effects.push(Effect::Note(format!(
            "{sample} is replaced: {losses} verifiers died while they held it, the last one in isolation: {why}"
        )));
        self.count(Counter::DeadlySamples, 1);
        self.give_up_sample(sample);
    }

    /// Ends the generation. Its state is lost, so the job goes back to the newest checkpoint.
    pub(crate) fn lose_generation(&mut self, reason: &str) {
        self.lose_ranks(reason, true);
    }

    /// Ends the generation; `speaks` says whether the batch in training may be the cause.
    fn lose_ranks(&mut self, reason: &str, speaks: bool) {
        if self.is_ended() || self.team.take().is_none() {
            return;
        }
        let found = if speaks { self.training_failed(reason, false) } else { None };
        self.end_generation(reason, found);
    }

    /// Rewinds to where the state can be loaded again. A failure that narrows the search for its cause costs no budget.
    pub(crate) fn end_generation(&mut self, reason: &str, found: Option<Found>) {
        self.team = None;
        self.weights = None;
        self.regroup_reason = reason.to_owned();
        self.workers.values_mut().for_each(|worker| worker.joining = false);
        self.count(Counter::LostGenerations, 1);
        if !matches!(found, Some(Found::Fewer | Found::Guilty(_))) {
            self.lost_generations += 1;
        }
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
        // The files are written already, so the job resumes from them unless the disk refuses the commit.
        let is_committing = self.committing().is_some();
        if is_committing {
            self.wait_for_writing();
        } else {
            self.writing = None;
            self.rewind();
        }
        // The interrupted step has put the group back into the pool, so it can be dropped there.
        if let Some(Found::Guilty(group)) = found {
            self.quarantine(group);
        }
        if !is_committing {
            self.advance();
        }
    }

    /// Waits in `Committing` until the checkpoint in flight is durable or given up.
    pub(crate) fn wait_for_writing(&mut self) {
        if !matches!(self.phase, Phase::Committing) {
            self.interrupt();
            self.enter(Phase::Committing);
        }
    }

    /// Rewinds to the last checkpoint. Groups that were generated by its weights or older ones are kept.
    pub(crate) fn rewind(&mut self) {
        let mut forgotten: Vec<GroupId> = Vec::new();
        self.interrupt();
        let restart = self.restart.clone();
        let step = restart.step;
        if self.position.step > step {
            forgotten.extend(self.pool.forget_newer(pacs_types::WeightVersion(step)));
            // Its weights are undone. An evaluation of the checkpoint's own weights continues with the next generation.
            self.discard_evaluation();
        }
        // Groups that have filled up the batch of a trial are drawn again when it is their turn, by what the curriculum
        // knows then. With lag, they are kept: they may be trained on as they are.
        if self.options.max_lag == 0 {
            let most = (self.options.slots as usize).saturating_add(self.held_groups().len());
            forgotten.extend(self.pool.forget_beyond(most));
        }
        let undone = std::mem::replace(&mut self.position, restart);
        // A rewind undoes training only. What was counted, quarantined or set by operators stays.
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

    /// The position to checkpoint: groups in flight are requeued, because a checkpoint does not hold their samples.
    pub(crate) fn position_without_flight(&self) -> crate::Snapshot {
        self.position.clone().without(self.pool.group_ids())
    }

    /// Gives up a sample that cannot be verified: the next attempt replaces it, or its group is dropped.
    ///
    /// An evaluation replaces nothing, because that would measure the policy on the answers that are easy to verify.
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
        self.count(Counter::ReplacedSamples, 1);
        self.effects.push(Effect::ReplaceSample(sample));
    }

    pub(crate) fn is_measured(&self, group: GroupId) -> bool {
        crate::evaluation_problem(group).is_some()
    }

    /// Gives up a group; the next prompt replaces it. An evaluation continues without it.
    pub(crate) fn drop_group(&mut self, group: GroupId, why: Dropped) {
        if self.is_ended() || self.pool_of(group).and_then(|pool| pool.remove(group)).is_none() {
            return;
        }
        self.not_a_suspect(group);
        self.count(Counter::DroppedGroups, 1);
        self.count(Counter::ExcludedProblems, u64::from(self.is_measured(group)));
        self.effects.push(Effect::DropGroup { group, why });
        if self.is_measured(group)
            && let Some(evaluation) = self.phase.evaluation_mut().or(self.concurrent.as_mut())
        {
            evaluation.wanted -= 1;
            evaluation.excluded += 1;
            return self.finish_evaluation_if_complete();
        }
        if !matches!(why, Dropped::Deadly | Dropped::Poisonous) {
            self.failed_groups += 1;
        }
        if self.failed_groups > MIN_DROPPED_GROUPS.max(self.options.prompts_per_step as usize) {
            let dropped = self.failed_groups;
            let (reason, hint) = match why {
                Dropped::Overdue => (
                    format!("they were not done within {} s", self.options.group_timeout.as_secs()),
                    "look at what the rollout workers and verifiers do, or set a larger rollout.group_timeout_seconds",
                ),
                Dropped::NoVerdict | Dropped::Uniform | Dropped::Deadly | Dropped::Poisonous => (
                    format!(
                        "no verdict was reached for one of their samples (verifications failed or timed out, {} times \
                         for each sample)",
                        self.options.max_attempts
                    ),
                    "look at the verifiers' logs",
                ),
            };
            return self.fail(format!("{dropped} groups of one step were dropped because {reason}; {hint}"));
        }
        self.fill();
        // It may have been what others rested for.
        self.try_train();
    }

    /// Handles the loss of a sample's stored content: the sample is generated again. A batch in training with it ends.
    pub(crate) fn sample_gone(&mut self, sample: SampleId) {
        self.reply(Reply::Done);
        self.count(Counter::LostSamples, 1);
        if let Some(training) = self.phase.training()
            && training.groups.contains_key(&sample.group)
        {
            // The ranks hold the tasks of the batch, and there is no message that withdraws a part of it.
            self.lose_ranks(&format!("{sample} of the batch in training is gone from the disk"), false);
        }
        if self.pool_of(sample.group).is_some_and(|pool| pool.lose_sample(sample)) {
            self.effects.push(Effect::ReplaceSample(sample));
        }
    }

    /// Ends leases that made no progress within their timeout.
    pub(crate) fn lapse(&mut self, groups: &[LeaseId], samples: &[LeaseId]) {
        let lapsed: usize = self.pools_mut().map(|pool| pool.end_loans(groups, samples)).sum();
        self.count(Counter::LapsedLeases, lapsed as u64);
    }

    /// Reissues a group's open work, or gives the group up after too many tries.
    pub(crate) fn group_overdue(&mut self, group: GroupId) {
        let (attempts, now) = (self.options.max_group_attempts, self.now);
        let Some(pool) = self.pool_of(group).filter(|pool| pool.contains(group)) else { return };
        let is_hopeless = pool.reissue_group(group, attempts, now);
        self.count(Counter::OverdueGroups, 1);
        let seconds = self.options.group_timeout.as_secs();
        if is_hopeless {
            self.effects.push(Effect::Note(format!("{group} was not done within {seconds} s {attempts} times")));
            return self.drop_group(group, Dropped::Overdue);
        }
        self.effects.push(Effect::Note(format!("{group} was not done within {seconds} s; its work is issued again")));
    }

    /// Dissolves a generation whose task makes no progress, and restarts the ranks that have not reported.
    pub(crate) fn task_overdue(&mut self, task: u64) {
        let Some(current) = self.phase.task().filter(|current| current.id == task) else { return };
        let ranks = (0u32..).zip(self.team.iter().flat_map(|team| &team.ranks));
        let open: Vec<WorkerId> = ranks.filter(|(rank, _)| !current.done.contains(rank)).map(|(_, id)| *id).collect();
        let (what, seconds) = (self.phase.kind(), self.options.task_timeout.as_secs());
        if !self.note_stall(seconds) {
            return;
        }
        let why = format!("has reported nothing for {seconds} s of {what}");
        self.restart_all(&why, |_, worker| open.contains(&worker));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handlers::testing::*;
    use crate::{Event, GroupGrant, Options, PhaseKind, SampleGrant};

    const FLEET: u32 = 1000;

    fn large() -> Options {
        let groups = FLEET;
        Options { prompts_per_step: groups, slots: groups, samples_per_prompt: 1, total_steps: 2, ..options() }
    }

    fn lease(run: &mut Run, worker: WorkerId, role: Role) -> usize {
        let answer = match role {
            Role::Rollout => run.call(Event::LeaseGroups { worker, free_samples: 1, request: 0 }),
            _ => run.call(Event::LeaseSamples { worker, max_samples: 1, request: 0 }),
        };
        match answer {
            Ok(Reply::Groups(groups)) => groups.len(),
            Ok(Reply::Samples(samples)) => samples.len(),
            other => panic!("{other:?}"),
        }
    }

    /// A fleet takes all the work and falls silent within two seconds; all other workers live.
    fn preempt(run: &mut Run, role: Role, round: u32, others: &[WorkerId]) {
        let groups = run.machine.options.prompts_per_step;
        let fleet: Vec<WorkerId> = (0..groups).map(|slot| run.register(role, &format!("fleet-{slot}")).0).collect();
        let held: usize = fleet.iter().map(|worker| lease(run, *worker, role)).sum();
        assert_eq!(held, fleet.len(), "round {round}");
        for second in 0..13 {
            run.everybody_beats();
            let living = fleet.iter().skip(if second == 0 { fleet.len() / 2 } else { fleet.len() });
            for worker in others.iter().chain(living) {
                assert_eq!(run.told(*worker), crate::Directive::Continue);
            }
            run.pass(Duration::from_secs(1));
        }
        assert!(fleet.iter().all(|worker| run.machine.worker_role(*worker).is_none()), "all of them are lost");
    }

    #[test]
    fn a_fleet_that_is_preempted_repeatedly_accuses_no_prompt() {
        let mut run = Run::sampling(large());
        for round in 0..4 {
            preempt(&mut run, Role::Rollout, round, &[]);
        }
        // No group is leased in isolation: one worker is granted all of them.
        assert_eq!(run.groups(run.rollout, 10_000).len(), FLEET as usize);
        let status = run.machine.status(run.now);
        assert_eq!((status.phase, status.set_aside.len()), (PhaseKind::Sampling, 0));
        assert_eq!(status.counters[&Counter::MassLosses], 4);
        assert_eq!(status.counters[&Counter::LostWorkers], 4 * u64::from(FLEET));
    }

    #[test]
    fn nor_does_a_small_share_of_a_large_fleet() {
        let groups = 200;
        let mut run = Run::sampling(Options { prompts_per_step: groups, slots: groups, ..large() });
        let others: Vec<WorkerId> =
            (0..10 * groups).map(|slot| run.register(Role::Rollout, &format!("other-{slot}")).0).collect();
        for round in 0..4 {
            preempt(&mut run, Role::Rollout, round, &others);
        }
        // A worker of many is granted one group at a time, and would get no second one if the first were leased in isolation.
        assert_eq!((0..4).map(|_| run.groups(run.rollout, 10_000).len()).sum::<usize>(), 4);
        let status = run.machine.status(run.now);
        assert_eq!((status.set_aside.len(), status.counters[&Counter::MassLosses]), (0, 4));
    }

    #[test]
    fn nor_do_verifiers_lost_together_accuse_an_answer() {
        let mut run = Run::sampling(large());
        run.generate_all();
        for round in 0..4 {
            preempt(&mut run, Role::Verifier, round, &[]);
        }
        let effects = run.verify_all(|_| pacs_types::Outcome::Correct);
        assert_eq!(trained(&effects).map(|(step, groups)| (step, groups.len())), Some((1, FLEET as usize)));
        let counters = run.machine.status(run.now).counters;
        assert_eq!((counters[&Counter::MassLosses], counters.get(&Counter::DeadlySamples)), (4, None));
    }

    /// Runs workers of one role that hold their leases for three seconds. The worker that holds the pill dies after one
    /// second, and other workers die every few seconds.
    fn find_pill(role: Role, pill: GroupId, others_every: u64) -> (u64, Run) {
        let options = Options { prompts_per_step: 64, slots: 64, samples_per_prompt: 1, ..options() };
        let mut run = Run::sampling(Options { max_replacements: 1, ..options });
        if role == Role::Verifier {
            run.generate_all();
        }
        let name = |slot: usize| format!("fleet-{slot}");
        let mut fleet: Vec<WorkerId> = (0..40).map(|slot| run.register(role, &name(slot)).0).collect();
        let mut held: Vec<Vec<(u64, LeaseId, SampleId)>> = vec![Vec::new(); fleet.len()];
        for second in 0..600 {
            run.everybody_beats();
            for slot in 0..fleet.len() {
                let worker = fleet[slot];
                assert_eq!(run.told(worker), crate::Directive::Continue);
                let kills = held[slot].iter().any(|(_, _, sample)| sample.group == pill);
                let is_preempted =
                    others_every > 0 && second % others_every == 0 && second as usize % fleet.len() == slot;
                if kills || is_preempted {
                    fleet[slot] = run.register(role, &name(slot)).0;
                    held[slot].clear();
                    continue;
                }
                let (done, left): (Vec<_>, Vec<_>) = held[slot].drain(..).partition(|(since, ..)| since + 3 <= second);
                held[slot] = left;
                for (_, lease, sample) in done {
                    let version = pacs_types::WeightVersion(0);
                    run.step(match role {
                        Role::Rollout => Event::SubmitSample { worker, lease, sample, version },
                        _ => {
                            let (outcome, label) = (pacs_types::Outcome::Correct, 1.0);
                            Event::SubmitVerdict { worker, lease, sample, outcome, label, reward: Some(label) }
                        }
                    });
                }
                let event = match role {
                    Role::Rollout => Event::LeaseGroups { worker, free_samples: 3, request: 0 },
                    _ => Event::LeaseSamples { worker, max_samples: 3, request: 0 },
                };
                match run.call(event) {
                    Ok(Reply::Groups(groups)) => held[slot].extend(
                        groups
                            .into_iter()
                            .map(|GroupGrant { lease, group, .. }| (second, lease, SampleId { group, index: 0 })),
                    ),
                    Ok(Reply::Samples(samples)) => {
                        held[slot]
                            .extend(samples.into_iter().map(|SampleGrant { lease, sample }| (second, lease, sample)));
                    }
                    other => panic!("{other:?}"),
                }
            }
            run.pass(Duration::from_secs(1));
            let status = run.machine.status(run.now);
            let found = status.set_aside.len() as u64 + status.counters.get(&Counter::DeadlySamples).unwrap_or(&0);
            if found > 0 {
                return (second, run);
            }
        }
        panic!("the pill is not found");
    }

    #[test]
    fn a_prompt_that_kills_is_found_among_preemptions() {
        for others_every in [0, 5, 2] {
            let (second, run) = find_pill(Role::Rollout, GroupId(7), others_every);
            let found: Vec<GroupId> = run.machine.status(run.now).set_aside.into_iter().map(|(id, _)| id).collect();
            assert_eq!(found, [GroupId(7)]);
            // Three deaths, plus the window in which the last accusation could be withdrawn.
            assert!(second < 60, "found after {second} s with a preemption every {others_every} s");
        }
    }

    #[test]
    fn so_is_an_answer_that_does() {
        for others_every in [0, 5, 2] {
            let (second, run) = find_pill(Role::Verifier, GroupId(7), others_every);
            let counters = run.machine.status(run.now).counters;
            assert_eq!((counters[&Counter::DeadlySamples], counters[&Counter::ReplacedSamples]), (1, 1));
            assert!(second < 60, "found after {second} s with a preemption every {others_every} s");
        }
    }

    #[test]
    fn a_small_fleet_lost_at_once_accuses_no_prompt_either() {
        let mut run = Run::sampling(Options { prompts_per_step: 2, slots: 2, samples_per_prompt: 1, ..options() });
        for _ in 0..6 {
            let second = run.register(Role::Rollout, "rollout-1").0;
            assert_eq!((lease(&mut run, second, Role::Rollout), run.groups(run.rollout, 1).len()), (1, 1));
            for _ in 0..12 {
                run.told(run.verifier);
                run.told(run.learners[0]);
                run.pass(Duration::from_secs(1));
            }
            run.rollout = run.register(Role::Rollout, "rollout-0").0;
        }
        assert_eq!(run.machine.status(run.now).set_aside.len(), 0);
        assert_eq!(run.groups(run.rollout, 2).len(), 2, "nothing is leased alone");
    }
}
