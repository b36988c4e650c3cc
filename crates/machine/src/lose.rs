//! What happens when workers are lost: their leases lapse, and a lost learner ends its generation.

use pacs_types::{GroupId, Purpose, Role, SampleId, WorkerId};

use crate::machine::Machine;
use crate::phase::Phase;
use crate::{Effect, End};

/// Names of the counters that the machine keeps.
pub(crate) mod counter {
    pub(crate) const LAPSED_LEASES: &str = "lapsed_leases";
    pub(crate) const LOST_WORKERS: &str = "lost_workers";
    pub(crate) const RESTARTED_WORKERS: &str = "restarted_workers";
    pub(crate) const LOST_GENERATIONS: &str = "lost_generations";
    pub(crate) const FAILED_VERDICTS: &str = "failed_verdicts";
    pub(crate) const STALE_SUBMISSIONS: &str = "stale_submissions";
    pub(crate) const REPLACED_SAMPLES: &str = "replaced_samples";
    pub(crate) const DROPPED_GROUPS: &str = "dropped_groups";
    pub(crate) const FAILED_CHECKPOINTS: &str = "failed_checkpoints";
}

impl Machine {
    /// Removes a member and issues its work again.
    pub(crate) fn lose_worker(&mut self, worker: WorkerId, why: &str) {
        let Some(lost) = self.workers.remove(&worker) else { return };
        let (name, role) = (lost.name, lost.role);
        self.count(counter::LOST_WORKERS, 1);
        if let Phase::Sampling(round) = &mut self.phase {
            let lapsed = round.revoke_worker(worker) as u64;
            self.count(counter::LAPSED_LEASES, lapsed);
        }
        self.effects.push(Effect::WorkerLost { name: name.clone(), role, why: why.to_owned() });
        let is_rank = self.team.as_ref().is_some_and(|team| team.rank(worker).is_some());
        if role == Role::Learner && is_rank {
            self.lose_generation(&format!("{name} {why}"));
        }
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
        // The files are written already: whether they become a checkpoint no longer depends on the learners.
        if matches!(self.phase, Phase::Committing { .. }) {
            return;
        }
        self.rewind();
        self.advance();
    }

    /// Undoes everything after the last checkpoint.
    pub(crate) fn rewind(&mut self) {
        let counters = std::mem::take(&mut self.position.counters);
        self.position = self.restart.clone();
        self.position.counters = counters;
        let step = self.position.step;
        self.save_tried = None;
        self.evaluated.retain(|evaluated| *evaluated <= step);
        self.effects.push(Effect::Rewound { step });
    }

    /// Ends the round; its prompts will be drawn again.
    pub(crate) fn abandon_round(&mut self) {
        if let Phase::Sampling(round) = &self.phase {
            self.position.cursor = round.cursor_before;
            self.effects.push(Effect::Abandoned);
        }
    }

    /// Gives a sample up because no verdict could be had for it: another one takes its place, or its group is dropped.
    ///
    /// An evaluation has no replacements: they would measure the policy on the answers that are easy to verify.
    pub(crate) fn give_up_sample(&mut self, sample: SampleId) {
        let Phase::Sampling(round) = &mut self.phase else { return };
        if round.purpose == Purpose::Evaluate || round.replaced(sample) >= self.options.max_replacements {
            return self.drop_group(sample.group);
        }
        round.replace_sample(sample);
        self.count(counter::REPLACED_SAMPLES, 1);
        self.effects.push(Effect::ReplaceSample(sample));
    }

    /// Gives a group up because no verdict could be had for one of its samples.
    fn drop_group(&mut self, group: GroupId) {
        let Phase::Sampling(round) = &mut self.phase else { return };
        round.drop_group(group);
        let (purpose, dropped, wanted) = (round.purpose, round.dropped, round.wanted);
        self.count(counter::DROPPED_GROUPS, 1);
        self.effects.push(Effect::DropGroup(group));
        if purpose == Purpose::Train && dropped > wanted.max(MIN_DROPPED_GROUPS) {
            return self.end(End::Failed {
                reason: format!(
                    "{dropped} groups of one step were dropped because no verdict could be had for one of their samples \
                     (verifications failed or timed out, {} times for each sample); look at the verifiers' logs",
                    self.options.max_attempts
                ),
            });
        }
        match purpose {
            Purpose::Train => {
                let replacement = self.draw_group();
                let (samples, now) = (self.options.samples_per_prompt, self.now);
                if let Phase::Sampling(round) = &mut self.phase {
                    round.add(replacement, samples, now);
                }
            }
            Purpose::Evaluate => {
                if let Phase::Sampling(round) = &mut self.phase {
                    round.wanted -= 1;
                }
            }
        }
    }
}

/// A step may drop this many groups, however small it is, before the run fails.
const MIN_DROPPED_GROUPS: usize = 8;
