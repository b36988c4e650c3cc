//! The search for a poison pill in training: a group that kills every generation of learners that trains on it. The
//! group is in the journal, so without the search it would do so after every restart.
//!
//! A failed training task says that one of its groups may be the cause, or none, because learners are also preempted.
//! So the first failure changes nothing. After the second failure of batches with the same groups, the next batches are
//! trials: half of the suspects are in them, the others rest, and other groups fill the batch up. A failure leaves the
//! tried half under suspicion; a successful step clears it. The last remaining group is quarantined if a batch fails
//! with it as the only suspect, the next one succeeds without it, and another one fails with it. If the batch without
//! it fails as well, the data is not the cause.
//!
//! A search takes at most log2(suspects) + 5 batches. The step of a trial is undone, whatever its result: the resting
//! groups keep their samples, which would have exceeded the lag bound, and a search that finds nobody leaves no trace,
//! because the step is then made of the groups whose turn it was. To undo one step and no other, a checkpoint is written
//! before the first trial; only if that fails, or a trial has come to another step (possible with lag), the step counts.
//! Rejected: letting trials count, because two deaths of a preempted learner in one step would then change which groups
//! are in all later batches; and having the learner report which sequence it fails on, because a killed one reports
//! nothing.

use std::collections::BTreeSet;

use pacs_types::GroupId;
use serde::{Deserialize, Serialize};

use crate::machine::Machine;
use crate::phase::Phase;
use crate::{Counter, Dropped, Effect, Staleness};

/// Consecutive failures of batches with the same groups after which trials begin.
const TRIED_AFTER: u32 = 2;
/// Bound on the batches of one search. A search ends long before, unless its cause changes meanwhile.
const MOST_BATCHES: u32 = 64;

/// State of the search for a group that makes training fail.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Trials {
    /// Groups that were in every failed batch since the search began.
    suspects: BTreeSet<GroupId>,
    /// Former suspects, which rest until the search is over, because there may be two pills.
    resting: BTreeSet<GroupId>,
    /// The step that the last failed batch was for.
    #[serde(default)]
    step: u64,
    failures: u32,
    batches: u32,
    /// Number of failed batches in which the last suspect was the only one.
    alone: u32,
    /// Whether a batch without the last suspect has succeeded since.
    is_controlled: bool,
    /// Error of the last failed batch.
    why: String,
}

/// What a failed batch says about the cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// Too little so far.
    Suspects,
    /// The suspects were narrowed down.
    Fewer,
    /// This group is the cause.
    Guilty(GroupId),
    /// None of the tried groups is the cause.
    NotTheData,
}

/// What a successful batch says about the cause.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Cleared {
    Nothing,
    /// No suspect was in it, so it says nothing of them.
    Unrelated,
    /// Suspects remain, and some of them rested in this batch.
    Some,
}

impl Trials {
    /// Groups that the next batch leaves out.
    pub(crate) fn held(&self) -> impl Iterator<Item = GroupId> {
        let is_on = self.is_on();
        let tried = match (is_on, self.is_to_be_controlled()) {
            (false, _) => usize::MAX,
            (true, true) => 0,
            (true, false) => self.suspects.len().div_ceil(2),
        };
        let resting = self.resting.iter().filter(move |_| is_on);
        self.suspects.iter().skip(tried).chain(resting).copied()
    }

    /// Whether batches are trials.
    fn is_on(&self) -> bool {
        self.failures >= TRIED_AFTER
    }

    /// Whether a trial is to be expected at `step`, which is where batches with the suspects have failed.
    pub(crate) fn are_due_at(&self, step: u64) -> bool {
        self.is_on() && self.step == step
    }

    /// Whether the next batch is the control without the last suspect.
    fn is_to_be_controlled(&self) -> bool {
        self.alone > 0 && !self.is_controlled
    }

    /// Records a failed batch. `again` says that the error is permanent, so the same batch would fail again.
    fn failed(&mut self, step: u64, batch: &BTreeSet<GroupId>, why: &str, again: bool) -> Found {
        let tried: BTreeSet<GroupId> = self.suspects.intersection(batch).copied().collect();
        let was_on = self.is_on();
        self.batches += 1;
        // Without a suspect in the batch, none of them is the cause: the search starts over with this batch.
        if tried.is_empty() || self.batches > MOST_BATCHES {
            let failures = if again { TRIED_AFTER } else { 1 };
            *self = Self { suspects: batch.clone(), step, failures, why: why.to_owned(), ..Self::default() };
            return if was_on { Found::NotTheData } else { Found::Suspects };
        }
        why.clone_into(&mut self.why);
        self.step = step;
        self.failures += 1;
        // The other half is not cleared: it may contain a second pill.
        self.resting.extend(self.suspects.difference(&tried));
        let is_fewer = tried.len() < self.suspects.len();
        self.suspects = tried;
        let last = self.suspects.first().copied().filter(|_| was_on && self.suspects.len() == 1);
        match last {
            Some(guilty) if self.is_controlled => return Found::Guilty(guilty),
            Some(_) => self.alone += 1,
            None => {}
        }
        if was_on && (is_fewer || last.is_some()) { Found::Fewer } else { Found::Suspects }
    }

    /// Records a successful batch.
    fn made(&mut self, batch: &BTreeSet<GroupId>) -> Cleared {
        if self.failures == 0 {
            return Cleared::Nothing;
        }
        self.batches += 1;
        let tried = self.suspects.intersection(batch).count();
        if self.is_to_be_controlled() && tried == 0 {
            self.is_controlled = true;
            return Cleared::Some;
        }
        if tried == 0 && self.batches <= MOST_BATCHES {
            return Cleared::Unrelated;
        }
        self.suspects.retain(|group| !batch.contains(group));
        if self.suspects.is_empty() || self.batches > MOST_BATCHES {
            *self = Self::default();
            return Cleared::Nothing;
        }
        if self.is_on() { Cleared::Some } else { Cleared::Nothing }
    }

    /// Removes a group that is given up for another reason.
    fn forget(&mut self, group: GroupId) {
        self.resting.remove(&group);
        if self.suspects.remove(&group) && self.suspects.is_empty() {
            *self = Self::default();
        }
    }
}

impl Machine {
    /// Records that the step in training has failed; `None` if there is none.
    pub(crate) fn training_failed(&mut self, why: &str, again: bool) -> Option<Found> {
        let batch = self.trained_groups()?;
        let found = self.trials.failed(self.position.step + 1, &batch, why, again);
        if self.trials.is_on() {
            self.note_crowd();
        }
        if matches!(found, Found::Fewer | Found::Guilty(_)) {
            self.effects.push(Effect::Narrowed(self.describe_search()));
        }
        Some(found)
    }

    /// Records that the step in training succeeded. Returns whether it counts: that of a trial is undone, unless other
    /// steps would have to be recomputed with it.
    ///
    /// With lag, older groups go before suspects, and the same batch without a suspect would be tried again and again, so such a
    /// step counts. Without lag, a step never takes other groups than those whose turn it is.
    pub(crate) fn training_succeeded(&mut self) -> bool {
        let batch = self.trained_groups().unwrap_or_default();
        let cleared = self.trials.made(&batch);
        if cleared == Cleared::Some {
            self.effects.push(Effect::Narrowed(self.describe_search()));
        }
        let says_nothing = self.options.max_lag > 0 && cleared == Cleared::Unrelated;
        let is_trial = !says_nothing && self.phase.training().is_some_and(|training| training.is_trial);
        let costs_nothing = self.position.step == self.restart.step && self.writing.is_none();
        !(is_trial && costs_nothing)
    }

    /// Restarts groups that would exceed the lag bound: those that rested, and others that waited for them. While
    /// groups rest, and for some steps after that, more are in flight than the remaining steps can consume in time.
    pub(crate) fn renew_late(&mut self) {
        let (version, max_lag) = (self.policy_version(), u64::from(self.options.max_lag));
        if version.0 > self.crowded_until || self.options.staleness == Staleness::Accept {
            return;
        }
        let late = self.pool.candidates().into_iter().filter(|candidate| candidate.born + max_lag < version.0);
        let late: Vec<GroupId> = late.map(|candidate| candidate.id).collect();
        if self.trials.is_on() || self.pool.len() > self.options.slots as usize || !late.is_empty() {
            self.note_crowd();
        }
        for group in late {
            self.pool.restart_group(group, version);
            self.count(Counter::EvictedGroups, 1);
            self.effects.push(Effect::RestartGroup(group));
        }
    }

    /// Notes that there may be more groups in flight than slots; all of them are due within the lag bound.
    fn note_crowd(&mut self) {
        self.crowded_until = self.position.step + u64::from(self.options.max_lag) + 2;
    }

    /// Undoes the step of a trial: the next batch is another trial, or has the groups whose turn it was.
    pub(crate) fn undo_trial(&mut self) {
        (self.team, self.weights) = (None, None);
        "a step was tried out that does not count".clone_into(&mut self.regroup_reason);
        self.workers.values_mut().for_each(|worker| worker.joining = false);
        self.rewind();
        self.advance();
    }

    /// Groups in the pool that trials leave out of the batch.
    pub(crate) fn held_groups(&self) -> BTreeSet<GroupId> {
        self.trials.held().filter(|group| self.pool.contains(*group)).collect()
    }

    /// Removes a given-up group from the search.
    pub(crate) fn not_a_suspect(&mut self, group: GroupId) {
        self.trials.forget(group);
    }

    fn trained_groups(&self) -> Option<BTreeSet<GroupId>> {
        let Phase::Training(training) = &self.phase else { return None };
        Some(training.groups.keys().filter(|group| !training.left_out.contains(group)).copied().collect())
    }

    /// Quarantines a group that makes training fail.
    pub(crate) fn quarantine(&mut self, group: GroupId) {
        let why = std::mem::take(&mut self.trials).why;
        let what = format!("training fails with it and not without it: {why}");
        self.effects.push(Effect::Note(format!("{group} is quarantined: {what}")));
        self.position.set_aside.insert(group, what);
        self.count(Counter::SetAsideGroups, 1);
        self.drop_group(group, Dropped::Poisonous);
        // It must not be drawn again, whether it is requeued or in flight.
        self.position.requeued.remove(&group);
        let in_flight: Vec<GroupId> = self.pool.group_ids().collect();
        self.position.pass_over(in_flight.into_iter());
    }

    fn describe_search(&self) -> String {
        let Trials { suspects, why, .. } = &self.trials;
        let names: Vec<String> = suspects.iter().take(4).map(ToString::to_string).collect();
        let (names, more) = (names.join(", "), if suspects.len() > 4 { " …" } else { "" });
        format!(
            "training fails by one of {} groups, or by none ({names}{more}), which are tried apart: {why}",
            suspects.len()
        )
    }
}

#[cfg(test)]
mod tests {
    use pacs_types::{Outcome, Role, WeightVersion};

    use super::*;
    use crate::handlers::testing::*;
    use crate::{Event, FailureKind, Options, PhaseKind, Reply, TaskKind, TaskOrder, TaskResult};

    /// How a learner fails on a pill.
    #[derive(Clone, Copy, Debug)]
    enum How {
        Dies,
        Fails(FailureKind),
    }

    struct Outbreak {
        run: Run,
        /// Number of lost generations.
        lost: u32,
        notes: Vec<String>,
    }

    /// Makes steps with one learner that fails on pills as `how` says, until `steps` are done or the run is over.
    fn train_with(options: Options, pills: &[u64], how: How, steps: u64) -> Outbreak {
        let mut run = Run::sampling(options);
        let (mut lost, mut notes) = (0, Vec::new());
        let is_pill = |groups: &[GroupId]| groups.iter().any(|group| pills.contains(&group.0));
        for _ in 0..400 {
            if run.machine.position().step >= steps || run.machine.ended().is_some() {
                return Outbreak { run, lost, notes };
            }
            let mut effects = Vec::new();
            let (worker, generation) = (run.learners[0], run.machine.status(run.now).generation);
            run.generate_all();
            effects.extend(run.verify_all(|sample| if sample.index == 0 { Outcome::Correct } else { Outcome::Wrong }));
            let batch = run.machine.training().map(|(_, groups, _)| groups).unwrap_or_default();
            match run.call(Event::NextTask { worker, generation }) {
                Ok(Reply::Task(Some(TaskOrder { task, kind: TaskKind::Train { .. }, .. }))) if is_pill(&batch) => {
                    lost += 1;
                    match how {
                        How::Dies => {
                            let (successor, died) = run.register(Role::Learner, "learner-0");
                            run.learners[0] = successor;
                            effects.extend(died);
                        }
                        How::Fails(kind) => {
                            let result = TaskResult::Failed { message: "it is poison".into(), kind };
                            effects.extend(run.step(Event::CompleteTask { worker, generation, task, result }));
                        }
                    }
                }
                Ok(Reply::Task(Some(TaskOrder { task, kind, .. }))) => {
                    let step = run.machine.position().step;
                    let result = match kind {
                        TaskKind::Prepare => TaskResult::Prepared { weights: Some(WeightVersion(step)) },
                        TaskKind::Train { step } => {
                            TaskResult::Trained { weights: Some(WeightVersion(step)), skipped_updates: 0 }
                        }
                        TaskKind::Save { .. } => TaskResult::Saved,
                        TaskKind::Regroup { reason } => panic!("{reason}"),
                    };
                    effects.extend(run.step(Event::CompleteTask { worker, generation, task, result }));
                }
                Ok(_) => {}
                // The generation is over already.
                Err(_) => {}
            }
            run.step(Event::JoinGeneration { worker: run.learners[0] });
            for effect in effects {
                match effect {
                    Effect::CommitCheckpoint { snapshot, .. } => {
                        run.step(Event::CheckpointCommitted { step: snapshot.step });
                    }
                    Effect::Note(note) | Effect::Narrowed(note) => notes.push(note),
                    _ => {}
                }
            }
        }
        panic!("it comes to nothing: {:?}, {notes:#?}", run.machine.status(run.now));
    }

    fn eight() -> Options {
        Options { prompts_per_step: 8, slots: 8, total_steps: 6, max_lost_generations: 4, ..options() }
    }

    fn quarantined(outbreak: &Outbreak) -> Vec<u64> {
        outbreak.run.machine.status(outbreak.run.now).set_aside.iter().map(|(group, _)| group.0).collect()
    }

    #[test]
    fn a_group_that_kills_learners_is_quarantined_and_listed_wherever_it_is() {
        for how in [How::Dies, How::Fails(FailureKind::Generation), How::Fails(FailureKind::Permanent)] {
            for pill in 0..8 {
                let outbreak = train_with(eight(), &[pill], how, 3);
                assert_eq!(quarantined(&outbreak), [pill], "{how:?}: {:#?}", outbreak.notes);
                assert!(outbreak.lost <= 6, "{how:?} {pill}: {} generations", outbreak.lost);
                let status = outbreak.run.machine.status(outbreak.run.now);
                assert_eq!((status.phase, status.step), (PhaseKind::Sampling, 3));
                assert_eq!(status.counters[&Counter::SetAsideGroups], 1);
                assert!(status.set_aside[0].1.contains("training fails with it and not without it"), "{status:?}");
            }
        }
    }

    #[test]
    fn two_poison_groups_and_those_of_later_steps_are_quarantined_too() {
        for pills in [[0, 1], [0, 7], [3, 4], [2, 17], [11, 30]] {
            let outbreak = train_with(Options { max_lost_generations: 8, ..eight() }, &pills, How::Dies, 6);
            assert_eq!(quarantined(&outbreak), pills, "{:#?}", outbreak.notes);
            assert_eq!(outbreak.run.machine.position().step, 6);
        }
    }

    #[test]
    fn a_job_of_one_group_a_step_quarantines_it_too() {
        let options = Options { prompts_per_step: 1, slots: 1, ..eight() };
        let outbreak = train_with(options, &[1], How::Dies, 4);
        assert_eq!(quarantined(&outbreak), [1], "{:#?}", outbreak.notes);
    }

    #[test]
    fn a_poison_group_is_found_in_asynchronous_mode_too() {
        for pill in [0, 5, 9, 20] {
            let options = Options { max_lag: 2, slots: 24, checkpoint_every_steps: 2, ..eight() };
            let outbreak = train_with(options, &[pill], How::Dies, 5);
            assert_eq!(quarantined(&outbreak), [pill], "{:#?}", outbreak.notes);
        }
    }

    #[test]
    fn a_systematic_failure_ends_the_run_and_accuses_no_group() {
        for how in [How::Fails(FailureKind::Generation), How::Fails(FailureKind::Permanent)] {
            let all: Vec<u64> = (0..1000).collect();
            let outbreak = train_with(Options { max_lost_generations: 6, ..eight() }, &all, how, 1);
            assert_eq!(quarantined(&outbreak), [0u64; 0]);
            assert_eq!(outbreak.run.machine.status(outbreak.run.now).phase, PhaseKind::Failed, "{how:?}");
        }
    }

    #[test]
    fn learners_that_are_preempted_accuse_next_to_nothing() {
        let both = |sample: pacs_types::SampleId| if sample.index == 0 { Outcome::Correct } else { Outcome::Wrong };
        let (mut steps, mut accused) = (0, 0);
        for seed in 0..200u64 {
            let mut run = Run::sampling(Options { max_lost_generations: 1000, total_steps: 50, ..eight() });
            for round in 0..100u64 {
                run.generate_all();
                run.verify_all(both);
                let worker = run.learners[0];
                // One batch in six fails, whatever it contains.
                if pacs_types::mix(seed ^ pacs_types::mix(round)).is_multiple_of(6) {
                    run.learners[0] = run.register(Role::Learner, "learner-0").0;
                } else if run.machine.status(run.now).phase == PhaseKind::Training {
                    run.train();
                } else if run.machine.status(run.now).phase == PhaseKind::Saving {
                    run.save();
                    run.step(Event::CheckpointCommitted { step: run.machine.position().step });
                }
                run.step(Event::JoinGeneration { worker });
                run.step(Event::JoinGeneration { worker: run.learners[0] });
                if run.machine.status(run.now).phase == PhaseKind::Preparing {
                    run.prepare();
                }
            }
            steps += run.machine.position().step;
            accused += run.machine.status(run.now).set_aside.len();
        }
        assert!(steps > 0 && accused <= 10, "{accused} of about {} groups", 200 * 100 * 8);
    }

    #[test]
    fn a_search_without_a_culprit_leaves_every_step_its_groups() {
        let both = |sample: pacs_types::SampleId| if sample.index == 0 { Outcome::Correct } else { Outcome::Wrong };
        let (mut searches, mut undone) = (0, 0);
        for seed in 0..100u64 {
            let mut run = Run::sampling(Options { max_lost_generations: 1000, checkpoint_every_steps: 3, ..eight() });
            let (mut made, mut batch) = (Vec::new(), Vec::new());
            for round in 0..1000u64 {
                if run.machine.ended().is_some() {
                    break;
                }
                run.generate_all();
                run.verify_all(both);
                let (worker, step) = (run.learners[0], run.machine.position().step);
                let mut effects = Vec::new();
                match run.machine.status(run.now).phase {
                    PhaseKind::Training => {
                        batch = run.machine.training().expect("a step is in training").1;
                        // One batch in three fails, whatever it contains.
                        if pacs_types::mix(seed ^ pacs_types::mix(round)).is_multiple_of(3) {
                            (run.learners[0], effects) = run.register(Role::Learner, "learner-0");
                        } else {
                            effects = run.train();
                        }
                    }
                    PhaseKind::Saving => {
                        run.save();
                        run.step(Event::CheckpointCommitted { step });
                    }
                    PhaseKind::Preparing => drop(run.prepare()),
                    _ => {}
                }
                for effect in effects {
                    match effect {
                        Effect::StepDone { step } => {
                            made.truncate(step as usize - 1);
                            made.push(batch.iter().map(|group| group.0).collect::<Vec<_>>());
                        }
                        Effect::Narrowed(_) => searches += 1,
                        _ => {}
                    }
                }
                undone += u64::from(run.machine.regroup_reason.contains("does not count"));
                run.step(Event::JoinGeneration { worker });
                run.step(Event::JoinGeneration { worker: run.learners[0] });
            }
            if run.machine.status(run.now).set_aside.is_empty() {
                let expected: Vec<Vec<u64>> = (0..6).map(|step| (8 * step..8 * step + 8).collect()).collect();
                assert_eq!(made, expected, "seed {seed}");
            }
        }
        assert!(searches > 100 && undone > 100, "{searches} searches, {undone} rounds after an undone trial");
    }

    #[test]
    fn a_failure_says_nothing_alone() {
        let groups: BTreeSet<GroupId> = (0..8).map(GroupId).collect();
        let mut trials = Trials::default();
        assert_eq!(trials.failed(1, &groups, "x", false), Found::Suspects);
        assert_eq!(trials.held().count(), 0);
        assert_eq!(trials.made(&groups), Cleared::Nothing);
        assert_eq!(trials, Trials::default());
        // A permanent error starts the trials at once.
        assert_eq!(trials.failed(1, &groups, "x", true), Found::Suspects);
        assert!(trials.held().eq((4..8).map(GroupId)));
    }

    #[test]
    fn learners_lost_with_the_coordinator_accuse_no_batch() {
        for (is_heard, failures) in [(false, 0), (true, 1)] {
            let mut run = Run::sampling(options());
            run.generate_all();
            run.verify_all(|sample| if sample.index == 0 { Outcome::Correct } else { Outcome::Wrong });
            assert_eq!(run.machine.status(run.now).phase, PhaseKind::Training);
            run.step(Event::Resumed);
            let worker = run.learners[0];
            if is_heard {
                let beat = Event::Heartbeat { worker, activity: String::new() };
                assert!(run.whole_step(beat.clone()).record.is_some(), "what its death says depends on it");
                assert_eq!(run.whole_step(beat).record, None);
            }
            run.register(Role::Learner, "learner-0");
            assert_eq!(run.machine.status(run.now).phase, PhaseKind::Assembling);
            assert_eq!(run.machine.trials.failures, failures);
        }
    }
}
