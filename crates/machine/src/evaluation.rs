//! Evaluations of the newest weights, by the schedule of each set.
//!
//! Without lag, and after the last step, an evaluation is a phase: no step can be trained before it is complete. With
//! lag, it runs concurrently with the next step, which is trained on samples that may be some versions old anyway. Its
//! groups are leased and verified first; training groups fill the rest of the fleet.
//!
//! All samples of an evaluation come from one version. So the step that is trained meanwhile does not count before the
//! evaluation is complete ([`Phase::Ahead`]): its weights are not announced, no lease names them, and the learners
//! wait. They are at most one step ahead, and idle only for the time by which the evaluation outlasts the step. Until
//! then the job's position is that of the evaluated version, so results, checkpoints and rewinds need no further rules:
//! the line of the result precedes that of the next step, and no later checkpoint can displace the evaluated one before
//! its score is known.
//!
//! Rejected:
//! - Counting the step once all samples are generated, while verdicts are missing. It would save the time of the last
//!   verdicts. But a sample that the disk loses could not be generated again, and the job could resume from a
//!   checkpoint of the next step without the result.
//! - Training up to `max_lag` steps ahead. Learners would have to retain every unannounced version for workers that
//!   join late, and groups would be drawn at an older version than `schedule.rs` assumes.
//! - Rollout workers that hold two versions. It doubles their memory for weights, or splits the fleet.

use pacs_types::GroupId;

use crate::machine::Machine;
use crate::phase::{Evaluation, Phase};
use crate::pool::{EVALUATION_GROUPS, Pool};
use crate::{Effect, EvaluationSetPlan};

impl Machine {
    /// Whether an evaluation has to begin before the next step.
    pub(crate) fn must_evaluate(&self) -> bool {
        let step = self.position.step;
        let is_due = self.options.due_sets(step).next().is_some() && !self.evaluated.contains(&step);
        is_due && self.concurrent.is_none()
    }

    /// Whether the evaluation of the current step runs concurrently with the next one.
    fn is_concurrent(&self) -> bool {
        let is_last = self.position.step >= self.options.total_steps;
        self.options.max_lag > 0 && !self.options.evaluation_only && !is_last
    }

    pub(crate) fn begin_evaluation(&mut self) {
        // Only a job that just evaluates has one. Its model never changes, so the samples are still valid.
        if let Some(unfinished) = self.unfinished.take() {
            self.enter(Phase::Evaluating(unfinished));
            return self.finish_evaluation_if_complete();
        }
        let evaluation = self.due_evaluation();
        if self.is_concurrent() {
            self.concurrent = Some(Evaluation { began: Some(self.now), ..evaluation });
            self.begin_sampling();
        } else {
            self.enter(Phase::Evaluating(evaluation));
        }
        // It may be complete already, because all its problems are quarantined.
        self.finish_evaluation_if_complete();
    }

    fn due_evaluation(&self) -> Evaluation {
        let (version, mut pool) = (self.policy_version(), Pool::default());
        let mut excluded = 0;
        for EvaluationSetPlan { first, plan } in self.options.due_sets(self.position.step) {
            for group in (0..u64::from(plan.problems)).map(|problem| GroupId(EVALUATION_GROUPS + first + problem)) {
                // A quarantined problem would kill its workers again, so the evaluation is done without it.
                if self.position.set_aside.contains_key(&group) {
                    excluded += 1;
                    continue;
                }
                pool.add(group, plan.samples_per_problem, version, self.now);
            }
        }
        let wanted = pool.len();
        Evaluation { pool, version, wanted, excluded, began: None }
    }

    /// The evaluation in progress, as a phase or concurrently.
    pub(crate) fn evaluation(&self) -> Option<&Evaluation> {
        self.phase.evaluation().or(self.concurrent.as_ref())
    }

    /// Ends the evaluation once every problem has its verdicts, and continues with what waits for it.
    pub(crate) fn finish_evaluation_if_complete(&mut self) {
        let Some(evaluation) = self.evaluation() else { return };
        if evaluation.pool.complete() < evaluation.wanted {
            return;
        }
        let step = self.position.step;
        debug_assert_eq!(evaluation.version.0, step, "no step counts while an evaluation is in progress");
        let (groups, excluded) = (evaluation.pool.group_ids().collect(), evaluation.excluded);
        let took = evaluation.began.map(|began| self.now.saturating_sub(began));
        self.note_evaluated();
        self.effects.push(Effect::Evaluated { step, groups, excluded, took });
        if self.concurrent.take().is_none() {
            return self.advance();
        }
        if matches!(self.phase, Phase::Ahead(_)) {
            self.finish_step();
        }
    }

    /// Holds the finished step until the concurrent evaluation is complete.
    pub(crate) fn hold_step(&mut self) {
        match std::mem::replace(&mut self.phase, Phase::Assembling) {
            Phase::Training(training) => self.enter(Phase::Ahead(training)),
            other => self.phase = other,
        }
    }

    /// Discards the concurrent evaluation. It is repeated when the job is at its step again.
    pub(crate) fn discard_evaluation(&mut self) {
        let Some(evaluation) = self.concurrent.take() else { return };
        self.effects.push(Effect::ForgetEvaluation(evaluation.pool.group_ids().collect()));
    }

    /// Discards the concurrent evaluation because a stop is due before it can be complete. It is lost if the learners
    /// are at the next step already, because the run resumes after that step. We rejected a stop that waits for it:
    /// rollout workers may be gone first, and then the step is lost instead.
    pub(crate) fn abandon_evaluation(&mut self) {
        if self.concurrent.is_some() && self.phase.training().is_some() {
            let step = self.position.step;
            self.effects.push(Effect::Note(format!(
                "the evaluation at step {step} is abandoned: the run stops while the learners are at step {}; \
                 `pacs stop --after-step` would wait for it",
                step + 1
            )));
        }
        self.discard_evaluation();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use pacs_types::{Outcome, Purpose, Role, SampleId, WeightVersion};

    use super::*;
    use crate::handlers::testing::*;
    use crate::{
        Command, Counter, End, EvaluationPlan, Event, Options, PhaseKind, Reply, SampleGrant, StopMode,
        evaluation_problem,
    };

    /// A job with lag whose every version is evaluated on two problems of two samples.
    fn overlapping() -> Options {
        let evaluation =
            EvaluationPlan { problems: 2, samples_per_problem: 2, every_steps: 1, before: true, after: true };
        Options { evaluation, max_lag: 1, slots: 4, total_steps: 4, ..options() }
    }

    fn phase(run: &Run) -> PhaseKind {
        run.machine.phase()
    }

    fn judge_as(run: &mut Run, grants: Vec<SampleGrant>, outcome: impl Fn(SampleId) -> Outcome) -> Vec<Effect> {
        let worker = run.verifier;
        let mut effects = Vec::new();
        for SampleGrant { lease, sample } in grants {
            let outcome = outcome(sample);
            let label = f64::from(u8::from(outcome == Outcome::Correct));
            let reward = Some(label);
            effects.extend(run.step(Event::SubmitVerdict { worker, lease, sample, outcome, label, reward }));
        }
        effects
    }

    fn judge(run: &mut Run, grants: Vec<SampleGrant>) -> Vec<Effect> {
        judge_as(run, grants, |sample| if sample.index == 0 { Outcome::Correct } else { Outcome::Wrong })
    }

    /// Leases all samples to the verifier; returns those of the evaluation and those of training.
    fn leased(run: &mut Run) -> (Vec<SampleGrant>, Vec<SampleGrant>) {
        run.samples().into_iter().partition(|grant| evaluation_problem(grant.sample.group).is_some())
    }

    /// A run whose learners train step 1 while the verifier holds all samples of the evaluation.
    fn training(options: Options) -> (Run, Vec<SampleGrant>) {
        let mut run = Run::sampling(options);
        run.generate_all();
        let (of_evaluation, of_training) = leased(&mut run);
        let effects = judge(&mut run, of_training);
        assert_eq!(trained(&effects).map(|(step, _)| step), Some(1));
        (run, of_evaluation)
    }

    /// The same with step 1 finished and held.
    fn ahead(options: Options) -> (Run, Vec<SampleGrant>) {
        let (mut run, of_evaluation) = training(options);
        let effects = run.train();
        assert_eq!(effects, [Effect::Phase(PhaseKind::Evaluating)], "the step is held");
        (run, of_evaluation)
    }

    fn counts_step(effects: &[Effect]) -> Option<u64> {
        effects.iter().find_map(|effect| if let Effect::StepDone { step } = effect { Some(*step) } else { None })
    }

    fn evaluated(effects: &[Effect]) -> Option<u64> {
        effects.iter().find_map(|effect| if let Effect::Evaluated { step, .. } = effect { Some(*step) } else { None })
    }

    fn is_discarded(effects: &[Effect]) -> bool {
        let problems = [0, 1].map(|problem| GroupId(EVALUATION_GROUPS + problem)).to_vec();
        effects.contains(&Effect::ForgetEvaluation(problems))
    }

    fn is_abandoned(effects: &[Effect]) -> bool {
        effects.iter().any(|effect| matches!(effect, Effect::Note(note) if note.contains("is abandoned")))
    }

    /// The only learner dies; another one takes its place.
    fn replace_learner(run: &mut Run) -> Vec<Effect> {
        let worker = run.learners[0];
        let mut effects = run.step(Event::Leave { worker, error: None });
        run.learners[0] = run.register(Role::Learner, "learner-0").0;
        run.step(Event::JoinGeneration { worker: run.learners[0] });
        effects.extend(run.prepare());
        effects
    }

    #[test]
    fn a_step_is_trained_during_an_evaluation_and_counts_after_it() {
        let mut run = Run::sampling(overlapping());
        assert_eq!((phase(&run), run.machine.measuring()), (PhaseKind::Sampling, Some((0, 4))));
        let grants = run.groups(run.rollout, 10_000);
        let purposes: Vec<Purpose> = grants.iter().map(|grant| grant.purpose).collect();
        let first =
            [Purpose::Evaluate, Purpose::Evaluate, Purpose::Train, Purpose::Train, Purpose::Train, Purpose::Train];
        assert_eq!(purposes, first);
        run.hand_in(grants);
        let (of_evaluation, of_training) = leased(&mut run);
        judge(&mut run, of_training);
        assert_eq!(run.train(), [Effect::Phase(PhaseKind::Evaluating)]);

        let status = run.machine.status(run.now);
        assert_eq!((status.step, status.weights), (0, Some(WeightVersion(0))), "version 1 is not announced");
        let (worker, generation) = (run.learners[0], status.generation);
        assert_eq!(run.call(Event::NextTask { worker, generation }), Ok(Reply::Task(None)));
        run.now += Duration::from_secs(5);
        let effects = judge(&mut run, of_evaluation);
        let at = |wanted: &dyn Fn(&Effect) -> bool| effects.iter().position(wanted).expect("it happens");
        let took = Some(Duration::from_secs(5));
        let result =
            at(&|effect| matches!(effect, Effect::Evaluated { step: 0, excluded: 0, took: t, .. } if *t == took));
        assert!(result < at(&|effect| *effect == Effect::StepDone { step: 1 }), "{effects:?}");
        // The evaluation of version 1 begins, and with it step 2, whose groups are complete.
        assert_eq!((phase(&run), run.machine.measuring()), (PhaseKind::Training, Some((0, 4))));
        assert_eq!(run.machine.status(run.now).weights, Some(WeightVersion(1)));
    }

    #[test]
    fn an_evaluation_that_ends_before_the_step_holds_nothing() {
        let (mut run, of_evaluation) = training(overlapping());
        let effects = judge(&mut run, of_evaluation);
        assert_eq!((evaluated(&effects), phase(&run), run.machine.measuring()), (Some(0), PhaseKind::Training, None));
        assert!(run.machine.has_evaluated(0));
        assert_eq!(counts_step(&run.train()), Some(1));
    }

    #[test]
    fn without_lag_the_learners_wait_and_the_snapshot_is_that_of_earlier_versions() {
        let mut run = Run::sampling(Options { max_lag: 0, slots: 2, ..overlapping() });
        assert_eq!((phase(&run), run.machine.measuring()), (PhaseKind::Evaluating, Some((0, 4))));
        assert!(run.groups(run.rollout, 10_000).iter().all(|grant| grant.purpose == Purpose::Evaluate));
        let snapshot = serde_json::to_string(&run.machine).unwrap();
        assert!(!snapshot.contains("concurrent") && !snapshot.contains("began"), "{snapshot}");
        let read: Machine = serde_json::from_str(&snapshot).unwrap();
        assert_eq!(read.recorded(), run.machine.recorded());
    }

    #[test]
    fn the_evaluation_after_the_last_step_is_a_phase() {
        let plan = EvaluationPlan { before: false, every_steps: 0, ..overlapping().evaluation };
        let mut run = Run::sampling(Options { evaluation: plan, total_steps: 1, ..overlapping() });
        run.full_step();
        assert_eq!((phase(&run), run.machine.training()), (PhaseKind::Evaluating, None));
        run.generate_all();
        assert_eq!(evaluated(&run.verify_all(|_| Outcome::Correct)), Some(1));
        assert_eq!(phase(&run), PhaseKind::Saving);
    }

    #[test]
    fn evaluations_never_overlap_and_every_version_is_evaluated() {
        let mut run = Run::sampling(overlapping());
        let mut results = Vec::new();
        for _ in 0..100 {
            if run.machine.ended().is_some() {
                break;
            }
            run.generate_all();
            let (of_evaluation, of_training) = leased(&mut run);
            assert!(of_evaluation.len() <= 4, "samples of two evaluations");
            let mut effects = judge(&mut run, of_training);
            let has_task = run.machine.openings().task.is_some();
            match phase(&run) {
                PhaseKind::Training | PhaseKind::Preparing => effects.extend(run.train()),
                PhaseKind::Saving if has_task => effects.extend(run.save()),
                PhaseKind::Committing => effects.extend(run.step(Event::CheckpointCommitted { step: 4 })),
                _ => {}
            }
            effects.extend(judge(&mut run, of_evaluation));
            for effect in effects {
                match effect {
                    Effect::Evaluated { step, groups, .. } => results.push((step, groups.len())),
                    Effect::StepDone { step } => assert_eq!(results.len() as u64, step, "one for each step before"),
                    _ => {}
                }
            }
        }
        assert_eq!(run.machine.ended(), Some(&End::Finished));
        assert_eq!(results, [(0, 2), (1, 2), (2, 2), (3, 2), (4, 2)]);
    }

    #[test]
    fn an_evaluation_of_the_checkpoints_weights_outlives_its_generation() {
        for make in [training as fn(Options) -> _, ahead] {
            let (mut run, of_evaluation) = make(overlapping());
            let effects = replace_learner(&mut run);
            assert!(effects.contains(&Effect::Rewound { step: 0, forgotten: Vec::new() }), "{effects:?}");
            assert!(!is_discarded(&effects));
            // The groups of the lost step are its batch again.
            assert_eq!(trained(&effects), Some((1, vec![GroupId(0), GroupId(1)])));
            assert_eq!((phase(&run), run.machine.measuring()), (PhaseKind::Training, Some((0, 4))));
            assert_eq!(evaluated(&judge(&mut run, of_evaluation)), Some(0));
            assert_eq!(counts_step(&run.train()), Some(1));
        }
    }

    #[test]
    fn an_evaluation_of_undone_weights_is_discarded_and_repeated() {
        let (mut run, of_evaluation) = ahead(overlapping());
        judge(&mut run, of_evaluation);
        run.generate_all();
        assert_eq!((run.machine.position().step, run.machine.measuring()), (1, Some((0, 4))));
        let effects = replace_learner(&mut run);
        assert!(is_discarded(&effects) && !is_abandoned(&effects), "{effects:?}");
        assert!(effects.iter().any(|effect| matches!(effect, Effect::Rewound { step: 0, .. })));
        assert_eq!(run.machine.measuring(), None, "that of version 0 is complete");
        run.full_step();
        assert_eq!((run.machine.position().step, run.machine.measuring()), (1, Some((0, 4))));
    }

    #[test]
    fn a_stop_abandons_the_evaluation_that_it_cannot_wait_for() {
        let (mut run, _) = training(overlapping());
        let effects = run.step(stop(StopMode::Save));
        assert!(is_discarded(&effects) && is_abandoned(&effects), "{effects:?}");
        assert_eq!(counts_step(&run.train()), Some(1));
        assert_eq!(phase(&run), PhaseKind::Saving);

        let (mut run, _) = ahead(overlapping());
        let effects = run.step(stop(StopMode::Save));
        assert!(is_discarded(&effects) && is_abandoned(&effects), "{effects:?}");
        assert_eq!((counts_step(&effects), phase(&run)), (Some(1), PhaseKind::Saving));
        run.save();
        let effects = run.step(Event::CheckpointCommitted { step: 1 });
        assert_eq!(effects.last(), Some(&Effect::Ended(End::Stopped)));
        run.step(Event::Reopened);
        run.join_again();
        run.prepare();
        assert_eq!((run.machine.position().step, run.machine.measuring()), (1, Some((0, 4))));
    }

    #[test]
    fn a_stop_before_the_next_step_repeats_the_evaluation() {
        let mut run = Run::sampling(overlapping());
        run.generate_all();
        let effects = run.step(stop(StopMode::Save));
        assert!(is_discarded(&effects) && !is_abandoned(&effects), "{effects:?}");
        assert_eq!(effects.last(), Some(&Effect::Ended(End::Stopped)));
        run.step(Event::Reopened);
        run.join_again();
        run.prepare();
        assert_eq!(run.machine.measuring(), Some((0, 4)));

        // At once, the step in training is lost, too.
        let (mut run, _) = ahead(overlapping());
        let effects = run.step(stop(StopMode::Now));
        assert!(is_discarded(&effects) && !is_abandoned(&effects), "{effects:?}");
        run.step(Event::Reopened);
        run.join_again();
        run.prepare();
        assert_eq!((run.machine.position().step, run.machine.measuring()), (0, Some((0, 4))));
        assert_eq!(phase(&run), PhaseKind::Training, "the batch is kept");
    }

    #[test]
    fn a_stop_after_the_step_waits_for_the_evaluation_unless_the_run_is_paused() {
        let (mut run, of_evaluation) = ahead(overlapping());
        assert_eq!(run.step(stop(StopMode::AfterStep)), []);
        let effects = judge(&mut run, of_evaluation);
        assert_eq!((evaluated(&effects), counts_step(&effects), phase(&run)), (Some(0), Some(1), PhaseKind::Saving));

        let (mut run, _) = ahead(overlapping());
        run.command(Command::Pause).unwrap();
        let effects = run.step(stop(StopMode::AfterStep));
        assert!(is_abandoned(&effects), "{effects:?}");
        assert_eq!((counts_step(&effects), phase(&run)), (Some(1), PhaseKind::Saving));
    }

    #[test]
    fn a_paused_run_takes_the_verdicts_and_counts_the_step() {
        let (mut run, of_evaluation) = ahead(overlapping());
        run.command(Command::Pause).unwrap();
        let effects = judge(&mut run, of_evaluation);
        assert_eq!((counts_step(&effects), phase(&run)), (Some(1), PhaseKind::Sampling));
        run.command(Command::Resume).unwrap();
        assert_eq!(phase(&run), PhaseKind::Training);
    }

    #[test]
    fn a_checkpoint_is_written_during_an_evaluation() {
        // So few slots that step 2 has no complete groups yet.
        let (mut run, of_evaluation) = ahead(Options { slots: 2, ..overlapping() });
        run.command(Command::Checkpoint).unwrap();
        assert_eq!(phase(&run), PhaseKind::Evaluating, "step 1 does not count yet");
        judge(&mut run, of_evaluation);
        assert_eq!((phase(&run), run.machine.position().step), (PhaseKind::Saving, 1));
        run.save();
        run.step(Event::CheckpointCommitted { step: 1 });
        assert_eq!((phase(&run), run.machine.measuring()), (PhaseKind::Sampling, Some((0, 4))));

        let mut run = Run::sampling(Options { slots: 2, ..overlapping() });
        run.generate_all();
        run.verify_all(|_| Outcome::Correct);
        run.train();
        assert_eq!((phase(&run), run.machine.measuring()), (PhaseKind::Sampling, Some((0, 4))));
        run.command(Command::Checkpoint).unwrap();
        assert_eq!(phase(&run), PhaseKind::Saving);
        run.generate_all();
        let (of_evaluation, _) = leased(&mut run);
        assert_eq!(evaluated(&judge(&mut run, of_evaluation)), Some(1));
        run.save();
        run.step(Event::CheckpointCommitted { step: 1 });
        assert_eq!((phase(&run), run.machine.measuring()), (PhaseKind::Sampling, None));
    }

    #[test]
    fn learners_regroup_during_an_evaluation() {
        let options = Options { learners: 2, min_learners: 1, ..overlapping() };
        let mut run = Run::sampling(options);
        let grants = run.groups(run.rollout, 10_000);
        run.command(Command::Drain { worker: "learner-1".into() }).unwrap();
        assert_eq!((phase(&run), run.machine.measuring()), (PhaseKind::Assembling, Some((0, 4))));
        assert_eq!(run.groups(run.rollout, 10_000), [], "there are no weights");
        run.hand_in(grants);
        run.step(Event::Leave { worker: run.learners[1], error: None });
        run.learners[1] = run.register(Role::Learner, "learner-1").0;
        for worker in run.learners.clone() {
            run.step(Event::JoinGeneration { worker });
        }
        run.prepare();
        assert_eq!((phase(&run), run.machine.measuring()), (PhaseKind::Sampling, Some((0, 4))));
        let (of_evaluation, of_training) = leased(&mut run);
        judge(&mut run, of_training);
        run.train();
        let effects = judge(&mut run, of_evaluation);
        assert_eq!((evaluated(&effects), counts_step(&effects)), (Some(0), Some(1)));
    }

    #[test]
    fn the_watchdog_acts_on_an_evaluation_that_holds_a_step() {
        let (task_timeout, stall_timeout) = (Duration::from_secs(20), Duration::from_secs(30));
        let (mut run, _) = ahead(Options { task_timeout, stall_timeout, ..overlapping() });
        let mut notes = Vec::new();
        for _ in 0..=31 {
            run.now += Duration::from_secs(1);
            let effects = run.tick();
            notes.extend(effects.into_iter().filter_map(|effect| match effect {
                Effect::Note(note) => Some(note),
                _ => None,
            }));
            run.beat_if_members();
        }
        let [note] = &notes[..] else { panic!("the task has no clock of its own any more: {notes:?}") };
        let said = "nothing has happened for 30 s (try 1 of 3): step 1 is trained and waits for the evaluation at step 0, \
                    which waits for 1 verifier worker";
        assert!(note.starts_with(said), "{note}");
        assert_eq!((phase(&run), run.machine.status(run.now).queues.samples_waiting), (PhaseKind::Evaluating, 4));
        let (of_evaluation, _) = leased(&mut run);
        assert_eq!(counts_step(&judge(&mut run, of_evaluation)), Some(1));
    }

    #[test]
    fn problems_without_verdicts_and_quarantined_ones_are_left_out() {
        let (mut run, of_evaluation) = ahead(Options { max_attempts: 1, ..overlapping() });
        let effects = judge_as(&mut run, of_evaluation, |_| Outcome::TimedOut);
        let left_out = |effect: &Effect| match effect {
            Effect::Evaluated { step: 0, groups, excluded: 2, .. } => groups.is_empty(),
            _ => false,
        };
        assert!(effects.iter().any(left_out), "{effects:?}");
        assert_eq!(
            (counts_step(&effects), run.machine.status(run.now).counters[&Counter::ExcludedProblems]),
            (Some(1), 2)
        );

        let mut run = Run::preparing(overlapping());
        for problem in 0..2 {
            run.machine.position.set_aside.insert(GroupId(EVALUATION_GROUPS + problem), "it is deadly".into());
        }
        let effects = run.prepare();
        assert!(effects.iter().any(left_out), "{effects:?}");
        assert_eq!((phase(&run), run.machine.measuring()), (PhaseKind::Sampling, None));
    }

    #[test]
    fn a_sample_that_the_disk_loses_is_generated_again_by_the_same_version() {
        let (mut run, of_evaluation) = ahead(overlapping());
        let sample = of_evaluation[0].sample;
        assert_eq!(run.step(Event::SampleGone { sample }), [Effect::ReplaceSample(sample)]);
        let grants = run.groups(run.rollout, 10_000);
        let asked: Vec<_> =
            grants.iter().map(|grant| (grant.group, grant.policy_step, grant.samples[0].attempt)).collect();
        assert_eq!(asked, [(sample.group, 0, 1)]);
        run.hand_in(grants);
        judge(&mut run, of_evaluation);
        let (again, _) = leased(&mut run);
        assert_eq!(counts_step(&judge(&mut run, again)), Some(1));
    }

    #[test]
    fn a_replayed_journal_holds_the_step() {
        let (run, _) = ahead(overlapping());
        let mut replayed = Machine::new(overlapping(), Duration::from_secs(1000));
        for record in run.records.clone() {
            replayed.step(record.now, record.event);
        }
        assert_eq!(replayed.recorded(), run.machine.recorded());
        let snapshot = serde_json::to_string(&run.machine).unwrap();
        let read: Machine = serde_json::from_str(&snapshot).unwrap();
        assert_eq!(read.recorded(), run.machine.recorded());
        assert_eq!(read.present().count(), 12, "samples of the evaluation, of the held step, and of the next one");
    }

    #[test]
    fn the_status_shows_training_and_evaluation() {
        let (mut run, of_evaluation) = training(overlapping());
        let status = run.machine.status(run.now);
        let said = "step 1 waits for learner learner-0 to train, for 0.0 s; the evaluation at step 0 runs \
                    concurrently: 0 of 4 samples judged";
        assert_eq!((status.phase, status.waiting_for.as_str()), (PhaseKind::Training, said));
        let queues = status.queues;
        assert_eq!((queues.samples_verifying, queues.groups_complete, queues.groups_wanted), (4, 2, 2));
        run.train();
        let status = run.machine.status(run.now);
        let said = "step 1 is trained and waits for the evaluation at step 0, which waits for 1 verifier worker: \
                    2 of 2 groups open; oldest: problem 0 for 0.0 s, 2 verdicts missing, held by verifier-0";
        assert_eq!((status.phase, status.waiting_for.as_str()), (PhaseKind::Evaluating, said));
        judge(&mut run, of_evaluation);
        assert_eq!(run.machine.status(run.now).step, 1);
    }
}
