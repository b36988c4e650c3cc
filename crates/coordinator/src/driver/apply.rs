//! How the driver carries out each effect.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pacs_machine::{Counter, Dropped, Effect, End, PhaseKind};
use pacs_types::{GroupId, Purpose, SampleId};
use serde::Serialize;

use super::summary::{RoundNumbers, unix_time};
use super::{Batch, Driver, RECENT_STEPS, Sharing, Wait};
use crate::progress::{Progress, RunEnd, StepSeconds, StepSummary};
use crate::records::{ArchivedSample, Job, LinesOf, Questions, Round};

/// Age of a phase at which watchers are told what it waits for; told again after `WAITING_AGAIN`.
const WAITING_FIRST: Duration = Duration::from_secs(10);
const WAITING_AGAIN: Duration = Duration::from_secs(60);
/// Time without progress after which watchers are told what is stuck.
const STALL_NAMED: Duration = Duration::from_secs(20);
/// Records after a snapshot that trigger another one even if no step was done.
const MOST_RECORDS: u64 = 500_000;

/// Least time between the snapshots of two steps. A snapshot copies the whole roster, so one per step would cost more
/// than the steps of a job that does a hundred per second; a restart replays at most this much time of records.
const SNAPSHOT_PERIOD: Duration = Duration::from_secs(1);

impl Driver {
    pub(crate) fn apply(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            self.apply_one(effect);
        }
    }

    /// Carries out an effect. During replay, effects on memory are repeated, but files are not written
    /// again and nobody is notified.
    pub(crate) fn apply_one(&mut self, effect: Effect) {
        let live = !self.replaying;
        match effect {
            Effect::Phase(phase) => {
                if live {
                    tracing::debug!(%phase, "phase");
                    self.clock.enter(phase, Instant::now());
                    self.told_waiting = None;
                }
            }
            Effect::DropGroup { group, why } => {
                if live {
                    log_dropped(group, why);
                }
                self.store.drop_group(group);
            }
            Effect::RestartGroup(group) => {
                tracing::debug!(%group, "a group is regenerated: it would have become too old");
                self.store.drop_group(group);
            }
            Effect::ForgetEvaluation(groups) => groups.into_iter().for_each(|group| self.store.drop_group(group)),
            Effect::ReplaceSample(sample) => {
                if live {
                    tracing::warn!(%sample, "a sample was replaced: its verifications failed or timed out");
                }
                self.store.drop_sample(sample);
            }
            Effect::Train { step, groups, left_out, ranks, lag } => {
                self.form_batch(step, groups, left_out, ranks);
                self.lag = lag;
            }
            // A replayed step whose line is on disk must not be archived and reported again.
            Effect::StepDone { step } => match self.run_folder.has(LinesOf::Metrics, step) {
                true => self.step_was_done(),
                false => self.step_done(step),
            },
            Effect::Evaluated { step, groups, took, .. } => match self.run_folder.has(LinesOf::Evaluations, step) {
                true => groups.into_iter().for_each(|group| self.store.drop_group(group)),
                false => self.evaluated(step, &groups, took),
            },
            Effect::CreateCheckpoint { step, save } => {
                self.saved.clear();
                // During replay these two are left to `go_on`, which does what is still missing at the end.
                if live {
                    self.create_checkpoint(step, save);
                }
            }
            Effect::CommitCheckpoint { snapshot, model, save } => {
                if live {
                    self.commit_checkpoint(snapshot, model, save);
                }
            }
            Effect::Rewound { step, forgotten } => self.rewound(step, &forgotten),
            Effect::GenerationFormed { generation, names } => {
                if live {
                    tracing::info!(%generation, learners = names.join(" "), "generation formed");
                }
                self.learner_names = names;
            }
            Effect::Prepared { step } => {
                self.weights.clone_from(&self.published);
                if live {
                    self.notify(Wait::Weights);
                    let (total_steps, learners) = (self.spec.batch.steps, self.learner_names.clone());
                    self.tell_progress(Progress::Prepared { step, total_steps, learners });
                }
            }
            Effect::WorkerLost { worker, name, role, why } => {
                if live {
                    tracing::warn!(worker = name, %role, "worker lost: it {why}");
                    // A call of the lost worker that still waits is refused at once.
                    self.wake_own(worker);
                    self.recent.lost(unix_time(), &name, &why);
                    self.tell_progress(Progress::WorkerLost { name, why });
                }
            }
            Effect::Drained { name } => {
                if live && self.drained.insert(name.clone()) {
                    self.tell_progress(Progress::Drained { name });
                }
            }
            Effect::Narrowed(text) => {
                if live {
                    tracing::warn!("{text}");
                    self.tell_progress(Progress::Narrowed { text });
                }
            }
            Effect::Note(text) => {
                if live {
                    tracing::warn!("{text}");
                    self.tell_progress(Progress::Note { text });
                }
            }
            Effect::Ended(end) => {
                if live {
                    self.finish(&end);
                }
            }
        }
    }

    pub(crate) fn form_batch(&mut self, step: u64, groups: Vec<GroupId>, left_out: Vec<GroupId>, ranks: u32) {
        self.trained = None;
        self.signals.clear();
        let prompt_tokens = |group: GroupId| self.problems.train_at(group.0).prompt_tokens.len();
        let (cost, store, by_units) = (self.cost, &self.store, self.spec.resources.deterministic);
        let sharing = Sharing { ranks, cost, store, prompt_tokens: &prompt_tokens, by_units };
        self.batch = Some(Batch::new(step, groups, left_out, self.spec.batch.mini_batches, &sharing));
    }

    /// A step that was recorded before a restart: only the state in memory is updated.
    fn step_was_done(&mut self) {
        self.weights.clone_from(&self.published);
        if let Some(batch) = self.batch.take() {
            batch.groups.iter().chain(&batch.left_out).for_each(|group| self.store.drop_group(*group));
        }
        self.trained = None;
        self.signals.clear();
    }

    fn step_done(&mut self, step: u64) {
        self.weights.clone_from(&self.published);
        self.notify(Wait::Weights);
        let Some(batch) = self.batch.take() else { return };
        let sampled: Vec<GroupId> = batch.groups.iter().chain(&batch.left_out).copied().collect();
        let numbers = RoundNumbers::new(&sampled, 1, &self.store);
        let trained = self.trained.take().unwrap_or_default();
        let now = Instant::now();
        let (sampling, training) =
            (self.clock.take(PhaseKind::Sampling, now), self.clock.take(PhaseKind::Training, now));
        let stalled = self.clock.take(PhaseKind::Saving, now) + self.clock.take(PhaseKind::Committing, now);
        let total = sampling + training;
        let seconds = StepSeconds {
            sampling_seconds: sampling,
            verifying_seconds: self.clock.verifying_tail(),
            training_seconds: training,
            total_seconds: total,
            checkpoint_stall_seconds: stalled,
            checkpoint_stall_share: stalled / (total + stalled).max(f64::MIN_POSITIVE),
            checkpoint_write_seconds: self.saves.take(),
        };
        if self.recent_steps.len() == RECENT_STEPS {
            self.recent_steps.pop_front();
        }
        self.recent_steps.push_back(seconds.total_seconds);
        let counted = self.take_counted();
        let count = |counter: Counter| counted.get(&counter).copied().unwrap_or(0);
        // Evaluation and training share the time, so their counters are told apart by name.
        let training = |all: Counter, measured: Counter| count(all).saturating_sub(count(measured));
        let summary = StepSummary {
            step,
            total_steps: self.spec.batch.steps,
            version: step - 1,
            lag: std::mem::take(&mut self.lag),
            time: unix_time(),
            reward_mean: numbers.reward_mean,
            pass_rate: numbers.pass_rate,
            mixed_share: numbers.mixed_share,
            entropy: numbers.entropy,
            answer_tokens_mean: numbers.answer_tokens_mean(),
            truncated_share: numbers.truncated_share,
            unparsable_share: numbers.unparsable_share,
            failed_verdicts: training(Counter::FailedVerdicts, Counter::EvaluationFailedVerdicts),
            replaced_samples: count(Counter::ReplacedSamples),
            dropped_groups: training(Counter::DroppedGroups, Counter::ExcludedProblems),
            uniform_groups_left_out: count(Counter::UniformGroups),
            evicted_groups: count(Counter::EvictedGroups),
            skipped_draws: count(Counter::SkippedDraws),
            reopened_problems: count(Counter::ReopenedProblems),
            retired_problems: self.machine.retired_problems().unwrap_or(0) as u64,
            generated_tokens: numbers.tokens,
            tokens_per_second: numbers.tokens as f64 / seconds.total_seconds.max(f64::MIN_POSITIVE),
            skipped_updates: trained.skipped_updates,
            seconds,
            metrics: trained.metrics.into_iter().chain(self.verifications.take_step()).collect(),
            remaining_seconds: self.remaining_seconds(step).unwrap_or(0.0),
        };
        // Archived before the metrics line, whose presence says that the step is completely written.
        self.archive_round(step, Purpose::Train, &sampled);
        self.signals.clear();
        let line = line(&summary.numbers());
        self.hand_over(Job::Append { to: LinesOf::Metrics, step, line, score: None });
        if self.journal.snapshot_age() >= SNAPSHOT_PERIOD {
            self.keep_snapshot();
        }
        self.recent.step(&summary);
        self.newest_step = Some(summary.clone());
        self.tell_progress(Progress::Step(Box::new(summary)));
        for finding in self.recent.new_findings() {
            self.note(finding);
        }
    }

    /// Estimated time to the end of the job, from the duration of the newest steps; `None` before the first.
    pub(crate) fn remaining_seconds(&self, step: u64) -> Option<f64> {
        if self.recent_steps.is_empty() {
            return None;
        }
        let mean = self.recent_steps.iter().sum::<f64>() / self.recent_steps.len() as f64;
        Some(mean * self.spec.batch.steps.saturating_sub(step) as f64)
    }

    /// Moves the groups from the store to the archive, if the run keeps one.
    pub(super) fn archive_round(&mut self, step: u64, purpose: Purpose, groups: &[GroupId]) {
        let mut samples = Vec::new();
        for group in groups {
            let judged = self.store.take(*group).into_iter();
            let row = |(index, sample, verdict)| {
                let signal = self.signals.get(SampleId { group: *group, index });
                ArchivedSample { group: *group, index, sample, verdict, signal }
            };
            samples.extend(judged.map(row));
        }
        if self.run_folder.archives() {
            // The writing thread looks up questions and prompts, because copying them here would happen under the lock.
            let problems = Arc::clone(&self.problems) as Arc<dyn Questions>;
            self.hand_over(Job::Archive(Round { step, purpose, samples, problems }));
        }
    }

    fn rewound(&mut self, step: u64, forgotten: &[GroupId]) {
        forgotten.iter().for_each(|group| self.store.drop_group(*group));
        self.batch = None;
        self.weights = None;
        self.published = None;
        self.trained = None;
        self.signals.clear();
        self.saved.clear();
        self.clock.clear();
        self.hand_over(Job::Truncate { steps: Some(step), evaluations: Some(step) });
        self.note(format!("the learners' state is lost; the run resumes from step {step}"));
        self.keep_snapshot();
    }

    pub(crate) fn finish(&mut self, end: &End) {
        let step = self.machine.position().step;
        let checkpoint = self.checkpoints.path(step);
        let end = match end {
            End::Finished => RunEnd::Finished { step, model: checkpoint.join("model"), checkpoint },
            End::Stopped => {
                let is_saved = self.machine.newest_checkpoint() == Some(step);
                RunEnd::Stopped { step, checkpoint: is_saved.then_some(checkpoint) }
            }
            End::Failed { reason } => RunEnd::Failed { reason: reason.clone() },
        };
        tracing::info!(?end, "the run is over");
        self.end.send_replace(Some(end));
    }

    /// Applies due events, and tells watchers about waits and stalls.
    pub(crate) fn tick(&mut self) {
        if let Some(problem) = self.journal.failure() {
            // The machine is ahead of the disk, and no answer has shown that state: only a restart is consistent.
            return self.interrupt(problem);
        }
        self.mind_room();
        let now = self.now();
        for event in self.machine.overdue(now) {
            self.tell(event);
        }
        self.offer_again();
        self.tell_measuring();
        if self.journal.since_snapshot() > MOST_RECORDS {
            self.keep_snapshot();
        }
        let told = self.told_waiting.map_or(WAITING_AGAIN, |at| at.elapsed());
        let waits = self.machine.phase_age(now) >= WAITING_FIRST && told >= WAITING_AGAIN;
        // A stall is reported soon, however long the phase has lasted and whatever was reported about it.
        let is_stalled = self.machine.stalled_for(now) >= STALL_NAMED;
        let newly_stalled = is_stalled && !std::mem::replace(&mut self.told_stall, is_stalled);
        if (waits || newly_stalled) && self.machine.ended().is_none() {
            self.told_waiting = Some(Instant::now());
            let sentence = self.waits_for_disk().unwrap_or_else(|| self.machine.waiting_for(now));
            if newly_stalled {
                tracing::warn!("{sentence}");
            }
            self.tell_progress(Progress::Waiting { sentence });
        }
    }
}

fn log_dropped(group: GroupId, why: Dropped) {
    match why {
        Dropped::NoVerdict => tracing::warn!(%group, "a group was dropped: its verifications failed"),
        Dropped::Overdue => tracing::warn!(%group, "a group was dropped: it was not done in time"),
        Dropped::Deadly => tracing::error!(%group, "a group was quarantined: its workers died"),
        Dropped::Poisonous => tracing::error!(%group, "a group was quarantined: training fails with it"),
        Dropped::Uniform => {
            tracing::debug!(%group, "a group was refilled: nothing in it differs that the objective contrasts")
        }
    }
}

/// Serializes a value as a line of a JSON Lines file.
pub(super) fn line(value: &impl Serialize) -> Vec<u8> {
    let mut line = serde_json::to_vec(value).expect("a summary is numbers with names");
    line.push(b'\n');
    line
}
