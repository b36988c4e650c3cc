//! Which group it is that training fails by: a poison pill kills every generation of learners that gets it, and it is in the
//! journal, so without this it would do so for ever.
//!
//! A training task that fails says that one of its groups may be the cause, or none: learners are preempted, too. So the first
//! failure changes nothing. After the second one of a batch with the same groups, the next batches are trials: half of the
//! suspects are in them, the others rest, and other groups fill the batch up. A failure leaves the half that was tried under
//! suspicion; a step that is made clears it. What is left is one group, and it is quarantined if a batch fails with it as the
//! only suspect, the next one succeeds without it, and another one fails with it. If the one without it fails as well, it is not
//! the data.
//!
//! A search takes log2(suspects) + 5 batches at most. A step that a trial makes is undone when it costs nothing but itself (no
//! step was made since the checkpoint): the groups that rest keep their samples that way, which would have grown too old, and
//! with them the evidence. Rejected: to let the learner say which sequence it failed by, for one that was killed says nothing.

use std::collections::BTreeSet;

use pacs_types::GroupId;
use serde::{Deserialize, Serialize};

use crate::machine::Machine;
use crate::phase::Phase;
use crate::{Counter, Dropped, Effect, Staleness};

/// Failures in a row of batches with the same groups after which they are tried apart.
const TRIED_AFTER: u32 = 2;
/// Batches of one search: it ends long before, unless what it looks for changes meanwhile.
const MOST_BATCHES: u32 = 64;

/// A search for the group that training fails by.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Trials {
    /// All of them were in each batch that has failed since the search began.
    suspects: BTreeSet<GroupId>,
    /// Suspects that the others were narrowed down from: they rest, too, until the search is over, for there may be two pills.
    resting: BTreeSet<GroupId>,
    failures: u32,
    batches: u32,
    /// Batches that have failed in which the last suspect was the only one.
    alone: u32,
    /// One was made without it since.
    is_controlled: bool,
    /// How the last batch failed.
    why: String,
}

/// What a failed batch says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// Nothing yet.
    Suspects,
    /// Fewer groups are suspects than before.
    Fewer,
    /// This group it is.
    Guilty(GroupId),
    /// It is none of the groups that were tried.
    NotTheData,
}

/// What a batch that was made says.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Cleared {
    Nothing,
    /// Suspects are left, and they have rested.
    Some,
}

impl Trials {
    /// Groups that the next batch is made without.
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

    /// Whether suspects are tried apart.
    fn is_on(&self) -> bool {
        self.failures >= TRIED_AFTER
    }

    /// Whether the next batch is made without the last suspect.
    fn is_to_be_controlled(&self) -> bool {
        self.alone > 0 && !self.is_controlled
    }

    /// Takes in that a batch has failed. `again` says that it would fail again for sure.
    fn failed(&mut self, batch: &BTreeSet<GroupId>, why: &str, again: bool) -> Found {
        let tried: BTreeSet<GroupId> = self.suspects.intersection(batch).copied().collect();
        let was_on = self.is_on();
        self.batches += 1;
        if tried.is_empty() || self.batches > MOST_BATCHES {
            let failures = if again { TRIED_AFTER } else { 1 };
            *self = Self { suspects: batch.clone(), failures, why: why.to_owned(), ..Self::default() };
            return if was_on { Found::NotTheData } else { Found::Suspects };
        }
        why.clone_into(&mut self.why);
        self.failures += 1;
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

    /// Takes in that a batch was made.
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
        self.suspects.retain(|group| !batch.contains(group));
        if self.suspects.is_empty() || self.batches > MOST_BATCHES {
            *self = Self::default();
            return Cleared::Nothing;
        }
        if tried > 0 && self.is_on() { Cleared::Some } else { Cleared::Nothing }
    }

    /// Forgets a group that is given up for another reason.
    fn forget(&mut self, group: GroupId) {
        self.resting.remove(&group);
        if self.suspects.remove(&group) && self.suspects.is_empty() {
            *self = Self::default();
        }
    }
}

impl Machine {
    /// Takes in that the step in the making has failed, if one is.
    pub(crate) fn training_failed(&mut self, why: &str, again: bool) -> Option<Found> {
        let batch = self.trained_groups()?;
        let found = self.trials.failed(&batch, why, again);
        if self.trials.is_on() {
            self.note_crowd();
        }
        if matches!(found, Found::Fewer | Found::Guilty(_)) {
            self.effects.push(Effect::Narrowed(self.describe_search()));
        }
        Some(found)
    }

    /// Takes in that the step in the making is made. Returns whether it counts: that of a trial may not.
    pub(crate) fn training_succeeded(&mut self) -> bool {
        let batch = self.trained_groups().unwrap_or_default();
        match self.trials.made(&batch) {
            Cleared::Nothing => {}
            Cleared::Some => {
                self.effects.push(Effect::Narrowed(self.describe_search()));
                let costs_nothing = self.position.step == self.restart.step && self.writing.is_none();
                return !costs_nothing;
            }
        }
        true
    }

    /// Starts groups again that would be trained on too late: those that have rested, and others that wait for them. While groups
    /// rest and for some steps after it, more are in flight than the steps until they are due consume.
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

    /// Notes that more groups than slots may be in flight: what is here now is due within so many steps.
    fn note_crowd(&mut self) {
        self.crowded_until = self.position.step + u64::from(self.options.max_lag) + 2;
    }

    /// Undoes the step that a trial has made: the groups that rest are of the weights before it.
    pub(crate) fn undo_trial(&mut self) {
        (self.team, self.weights) = (None, None);
        "a step was tried out that does not count".clone_into(&mut self.regroup_reason);
        self.workers.values_mut().for_each(|worker| worker.joining = false);
        self.rewind();
        self.advance();
    }

    /// Groups that wait beside the batches while others are tried.
    pub(crate) fn held_groups(&self) -> BTreeSet<GroupId> {
        self.trials.held().filter(|group| self.pool.contains(*group)).collect()
    }

    /// A group is given up, whatever the reason.
    pub(crate) fn not_a_suspect(&mut self, group: GroupId) {
        self.trials.forget(group);
    }

    fn trained_groups(&self) -> Option<BTreeSet<GroupId>> {
        let Phase::Training(training) = &self.phase else { return None };
        Some(training.groups.keys().filter(|group| !training.left_out.contains(group)).copied().collect())
    }

    /// Does not train on a group again that training fails by.
    pub(crate) fn quarantine(&mut self, group: GroupId) {
        let why = std::mem::take(&mut self.trials).why;
        let what = format!("training fails with it and not without it: {why}");
        self.effects.push(Effect::Note(format!("{group} is quarantined: {what}")));
        self.position.set_aside.insert(group, what);
        self.count(Counter::SetAsideGroups, 1);
        self.drop_group(group, Dropped::Poisonous);
        // Wherever it was: it is not drawn again.
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
    use crate::verbs::testing::*;
    use crate::{Event, FailureKind, Options, PhaseKind, Reply, TaskKind, TaskOrder, TaskResult};

    /// How a learner takes a pill.
    #[derive(Clone, Copy, Debug)]
    enum How {
        Dies,
        Fails(FailureKind),
    }

    struct Outbreak {
        run: Run,
        /// Generations that were lost.
        lost: u32,
        notes: Vec<String>,
    }

    /// Makes steps with one learner that takes a pill as `how` says, until a number of steps is made or the run is over.
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
                // The generation is over.
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
    fn a_group_that_kills_learners_is_found_quarantined_and_listed_wherever_it_is() {
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
    fn so_are_two_of_them_and_those_of_later_steps() {
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
    fn with_groups_in_flight_ahead_it_is_found_as_well() {
        for pill in [0, 5, 9, 20] {
            let options = Options { max_lag: 2, slots: 24, checkpoint_every_steps: 2, ..eight() };
            let outbreak = train_with(options, &[pill], How::Dies, 5);
            assert_eq!(quarantined(&outbreak), [pill], "{:#?}", outbreak.notes);
        }
    }

    #[test]
    fn what_fails_whatever_it_gets_fails_the_run_and_accuses_nothing() {
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
                // One batch out of six, whatever is in it.
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
    fn a_failure_says_nothing_alone() {
        let groups: BTreeSet<GroupId> = (0..8).map(GroupId).collect();
        let mut trials = Trials::default();
        assert_eq!(trials.failed(&groups, "x", false), Found::Suspects);
        assert_eq!(trials.held().count(), 0);
        assert_eq!(trials.made(&groups), Cleared::Nothing);
        assert_eq!(trials, Trials::default());
        // One that would come again is looked into at once.
        assert_eq!(trials.failed(&groups, "x", true), Found::Suspects);
        assert!(trials.held().eq((4..8).map(GroupId)));
    }

    #[test]
    fn learners_that_went_with_the_coordinator_say_nothing_of_the_batch() {
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
