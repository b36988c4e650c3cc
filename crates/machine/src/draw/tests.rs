//! A run that is interrupted anywhere draws what an uninterrupted one draws.

use std::collections::{BTreeMap, BTreeSet};

use pacs_order::{Curriculum, DrawOrder, DrawPlan, SetShare};
use pacs_types::{GroupId, Outcome, Role, SampleId};

use crate::handlers::testing::*;
use crate::{Counter, Effect, Event, Machine, Options, PhaseKind, Record, Snapshot, UniformGroups};

/// Nearly six epochs of seven problems, so that epochs end at every position within a step.
const STEPS: u64 = 14;

/// One configuration of the draw order.
#[derive(Clone, Debug)]
struct Case {
    plan: DrawPlan,
    retire_after: Option<u32>,
    difficulty_floor: Option<f64>,
    max_lag: u32,
    uniform: UniformGroups,
}

fn cases() -> Vec<Case> {
    let set = |weight, problems| SetShare { weight, problems };
    let mut cases = Vec::new();
    for sets in [vec![set(1.0, 7)], vec![set(2.0, 7), set(1.0, 4)]] {
        for (retire_after, difficulty_floor) in [(None, None), (Some(2), None), (None, Some(0.2)), (Some(1), Some(0.1))]
        {
            for (max_lag, uniform) in [
                (0, UniformGroups::Keep),
                (1, UniformGroups::Keep),
                (0, UniformGroups::Drop),
                (0, UniformGroups::Refill),
            ] {
                let plan = DrawPlan { seed: 3, shuffle: true, sets: sets.clone() };
                cases.push(Case { plan, retire_after, difficulty_floor, max_lag, uniform });
            }
        }
    }
    cases
}

impl Case {
    fn skips(&self) -> bool {
        self.retire_after.is_some() || self.difficulty_floor.is_some()
    }

    fn options(&self, checkpoint_every_steps: u64) -> Options {
        let Self { plan, retire_after, difficulty_floor, .. } = self.clone();
        Options {
            prompts_per_step: 3,
            slots: 3 * (self.max_lag + 1),
            max_lag: self.max_lag,
            total_steps: STEPS,
            checkpoint_every_steps,
            uniform_groups: self.uniform,
            max_refills: 2,
            curriculum: self.skips().then_some(Curriculum { plan, retire_after, difficulty_floor, least_left: 3 }),
            ..options()
        }
    }

    /// Outcome of a sample whenever it is drawn: a third of the problems is solved, a third half
    /// solved, a third hardly ever.
    fn outcome(&self, order: &DrawOrder, sample: SampleId) -> Outcome {
        let noise = pacs_types::mix(7 * sample.group.0 + u64::from(sample.index));
        let right = match order.index_at(sample.group.0) % 3 {
            0 => true,
            1 => noise.is_multiple_of(2),
            _ => noise.is_multiple_of(5),
        };
        if right { Outcome::Correct } else { Outcome::Wrong }
    }
}

/// A simulated run and its recorded batches and checkpoints.
struct Walk<'a> {
    case: &'a Case,
    order: DrawOrder,
    run: Run,
    /// The problems of each step's groups, including groups that the learner does not receive.
    batches: BTreeMap<u64, Vec<(GroupId, usize)>>,
    /// The snapshot of each checkpoint, serialized as in its manifest.
    checkpoints: BTreeMap<u64, String>,
    /// Whether the coordinator crashes and resumes from its journal between any two events.
    dies: bool,
    /// The journal: a serialized machine and the records after it.
    journal: (String, Vec<Record>),
}

impl<'a> Walk<'a> {
    fn new(case: &'a Case, options: Options) -> Self {
        let order = DrawOrder::new(case.plan.clone());
        let mut run = Run::preparing(options);
        run.records.clear();
        let journal = (serde_json::to_string(&run.machine).unwrap(), Vec::new());
        Self { case, order, run, batches: BTreeMap::new(), checkpoints: BTreeMap::new(), dies: false, journal }
    }

    /// Starts a new run from the snapshot of a checkpoint alone.
    fn resumed(case: &'a Case, snapshot: &str) -> Self {
        let start: Snapshot = serde_json::from_str(snapshot).unwrap();
        Self::new(case, Options { start, ids_above: 1_000_000, generations_above: 1000, ..case.options(1) })
    }

    fn finish(mut self) -> Self {
        self.go_to(STEPS);
        self
    }

    fn go_to(&mut self, step: u64) {
        for _ in 0..10_000 {
            if self.run.machine.position().step >= step {
                return;
            }
            self.act();
            self.write_journal();
        }
        panic!("does not get on: {:#?}", self.run.machine.status(self.run.now));
    }

    /// Does the work that the run waits for.
    fn act(&mut self) {
        let status = self.run.machine.status(self.run.now);
        let effects = match status.phase {
            PhaseKind::Sampling => {
                self.run.generate_all();
                let (case, order) = (self.case, &self.order);
                self.run.verify_all(|sample| case.outcome(order, sample))
            }
            PhaseKind::Preparing => self.run.prepare(),
            PhaseKind::Training => self.run.train(),
            PhaseKind::Saving => self.run.save(),
            PhaseKind::Committing => self.run.step(Event::CheckpointCommitted { step: status.step }),
            phase => panic!("{phase}"),
        };
        for effect in effects {
            match effect {
                Effect::Train { step, groups, left_out, .. } => {
                    let all: BTreeSet<GroupId> = groups.into_iter().chain(left_out).collect();
                    let problems = all.into_iter().map(|group| (group, self.order.index_at(group.0))).collect();
                    self.batches.insert(step, problems);
                }
                Effect::CommitCheckpoint { snapshot, .. } => {
                    self.checkpoints.insert(snapshot.step, serde_json::to_string_pretty(&snapshot).unwrap());
                }
                _ => {}
            }
        }
    }

    fn write_journal(&mut self) {
        self.journal.1.append(&mut self.run.records);
        if !self.dies {
            return;
        }
        let mut found: Machine = serde_json::from_str(&self.journal.0).unwrap();
        for record in &self.journal.1 {
            found.step(record.now, record.event.clone());
        }
        assert_eq!(found.recorded(), self.run.machine.recorded());
        found.resume(self.run.now);
        self.run.machine = found;
        // Now and then a snapshot replaces the records, as in the real journal.
        if self.journal.1.len() > 100 {
            self.journal = (serde_json::to_string(&self.run.machine).unwrap(), Vec::new());
        }
    }

    /// The learner dies with its state, and another one joins.
    fn lose_learner(&mut self) {
        let worker = self.run.learners[0];
        self.run.step(Event::Leave { worker, error: None });
        self.run.learners[0] = self.run.register(Role::Learner, "learner-0").0;
        self.run.step(Event::JoinGeneration { worker: self.run.learners[0] });
    }
}

fn undisturbed(case: &Case) -> Walk<'_> {
    let walk = Walk::new(case, case.options(1)).finish();
    assert_eq!(walk.batches.len() as u64, STEPS);
    let skipped = walk.run.machine.position().counters.get(&Counter::SkippedDraws).copied().unwrap_or(0);
    assert_eq!(skipped > 0, case.skips(), "{case:?}");
    walk
}

#[test]
fn a_checkpoint_resumes_the_data_order() {
    for case in cases() {
        let whole = undisturbed(&case);
        for (step, snapshot) in whole.checkpoints.range(..STEPS) {
            let resumed = Walk::resumed(&case, snapshot).finish();
            let expected: BTreeMap<_, _> = whole.batches.range(step + 1..).map(|(s, b)| (*s, b.clone())).collect();
            assert_eq!(resumed.batches, expected, "resumed at step {step} of {case:?}");
        }
    }
}

#[test]
fn an_incomplete_snapshot_draws_something_else() {
    type Loss = fn(&mut Snapshot);
    let losses: [(&str, Loss); 3] = [
        ("cursor", |snapshot| snapshot.cursor = 0),
        ("history", |snapshot| snapshot.history = Default::default()),
        ("requeued", |snapshot| snapshot.requeued.clear()),
    ];
    for case in cases() {
        let whole = undisturbed(&case);
        for (what, lose) in losses {
            let has_it = match what {
                "history" => case.skips(),
                // Only with lag are groups in flight while the learners save.
                "requeued" => case.max_lag > 0,
                _ => true,
            };
            let found = whole.checkpoints.range(..STEPS).any(|(step, snapshot)| {
                let mut snapshot: Snapshot = serde_json::from_str(snapshot).unwrap();
                lose(&mut snapshot);
                let resumed = Walk::resumed(&case, &serde_json::to_string(&snapshot).unwrap()).finish();
                whole.batches.range(step + 1..).any(|(step, batch)| resumed.batches.get(step) != Some(batch))
            });
            assert_eq!(found, has_it, "without its {what}: {case:?}");
        }
    }
}

#[test]
fn a_journal_resumes_the_data_order() {
    for case in cases() {
        let whole = undisturbed(&case);
        let dying = Walk { dies: true, ..Walk::new(&case, case.options(1)) }.finish();
        assert_eq!(dying.batches, whole.batches, "{case:?}");
    }
}

#[test]
fn recomputed_steps_draw_the_same_prompts() {
    for case in cases().into_iter().filter(|case| case.max_lag == 0) {
        let whole = undisturbed(&case);
        for lost_at in 1..STEPS {
            let mut walk = Walk::new(&case, case.options(3));
            walk.go_to(lost_at);
            walk.lose_learner();
            // The checkpoint of the step itself does not exist yet.
            assert_eq!(walk.run.machine.position().step, (lost_at - 1) / 3 * 3);
            let walk = walk.finish();
            assert_eq!(walk.batches, whole.batches, "lost at step {lost_at}: {case:?}");
        }
    }
}

#[test]
fn an_asynchronous_run_that_is_rolled_back_repeats_and_skips_no_draw() {
    for case in cases().into_iter().filter(|case| case.max_lag > 0) {
        for lost_at in 1..STEPS {
            let mut walk = Walk::new(&case, case.options(3));
            walk.go_to(lost_at);
            walk.lose_learner();
            let walk = walk.finish();
            let trained: Vec<GroupId> = walk.batches.values().flatten().map(|(group, _)| *group).collect();
            let distinct: BTreeSet<GroupId> = trained.iter().copied().collect();
            assert_eq!(trained.len(), distinct.len(), "lost at step {lost_at}: {case:?}");
            if !case.skips() {
                let all: BTreeSet<GroupId> = (0..3 * STEPS).map(GroupId).collect();
                assert_eq!(distinct, all, "lost at step {lost_at}: {case:?}");
            }
        }
    }
}

#[test]
fn finished_draws_are_not_repeated() {
    let drawn = Snapshot { cursor: 6, ..Snapshot::default() };
    let mut back = drawn.clone().without([4, 2].map(GroupId));
    assert_eq!((back.cursor, back.requeued.len()), (6, 2));
    back.pass_over([3, 4, 7, 8].map(GroupId).into_iter());
    assert_eq!((&back.requeued, back.cursor), (&BTreeSet::from([GroupId(2)]), 6));
    assert_eq!([back.draw_any(), back.draw_any()], [6, 9].map(GroupId));
    assert!(back.ahead.is_empty());
    // A quarantined group is not drawn, and an evaluation problem has no draw.
    let measured = GroupId(crate::EVALUATION_GROUPS + 1);
    let mut careful = Snapshot { set_aside: [(GroupId(6), String::new()), (measured, String::new())].into(), ..drawn };
    careful.pass_over(std::iter::empty());
    assert_eq!((careful.draw_any(), careful.ahead.len()), (GroupId(7), 0));
}
