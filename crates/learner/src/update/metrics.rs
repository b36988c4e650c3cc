//! Metrics of a step: each rank sums its own passes, and one exchange adds up the ranks.

use std::collections::BTreeMap;

use pacs_algo::ObjectiveMetrics;

use super::batch::TrainBatch;
use super::pass::AnswerScores;
use super::signals::Signals;
use crate::comm::Traffic;

macro_rules! sums {
    ($($(#[$doc:meta])* $name:ident,)+) => {
        /// Sums over the passes of a step on one rank.
        #[derive(Clone, Debug, Default, PartialEq)]
        pub(super) struct Sums {
            $($(#[$doc])* pub(super) $name: f64,)+
        }

        impl Sums {
            pub(super) fn to_vec(&self) -> Vec<f64> {
                vec![$(self.$name),+]
            }

            pub(super) fn add(&mut self, other: &[f64]) {
                let mut values = other.iter();
                $(self.$name += values.next().copied().unwrap_or(0.0);)+
            }
        }
    };
}

sums! {
    /// This rank's shares of the policy loss, over the updates of the step.
    loss,
    /// This rank's shares of the value loss.
    value_loss,
    /// Tokens of passes with a gradient, prompts included.
    trained_tokens,
    /// Sequences that a gradient was computed for.
    trained_sequences,
    /// Answer tokens that `entropy` is summed over.
    scored_tokens,
    /// Entropies at those tokens (nats).
    entropy,
    /// Answer tokens whose log-probs were compared with the rollout engine's, under the weights that generated them.
    compared_tokens,
    /// Absolute differences of those log-probs (nats).
    mismatch,
    /// Answer tokens whose recorded experts were compared with the choices of the learner's routers, before the first update.
    routed_tokens,
    /// Shares of the layers with experts that would have chosen others, over those tokens.
    rerouted,
    /// Floating-point operations of the passes with a gradient.
    flops,
}

/// Everything that a step reports. The largest log-prob difference is a maximum and not a sum, so it is exchanged next
/// to the sums.
#[derive(Clone, Debug, Default)]
pub(super) struct StepMetrics {
    pub(super) sums: Sums,
    pub(super) mismatch_max: f64,
    /// What the updates made of this rank's answers; not exchanged.
    pub(super) signals: Signals,
    /// Statistics of labels, rewards and lengths, the same on every rank.
    pub(super) outcomes: BTreeMap<&'static str, f64>,
    /// Wall-clock time of the whole step on this rank.
    pub(super) step_seconds: f64,
    /// Peak FLOP/s of all ranks together; `None` if the job does not configure it.
    pub(super) peak_flops: Option<f64>,
    pub(super) objective: ObjectiveMetrics,
    pub(super) grad_norms: Vec<f64>,
    pub(super) clipped: u32,
    /// Gradient norms of the value model, one per update that was applied.
    pub(super) value_grad_norms: Vec<f64>,
    /// Updates of the value model, skipped ones included.
    pub(super) value_updates: u32,
    pub(super) updates: u32,
    pub(super) skipped: u32,
    pub(super) learning_rate: f64,
    /// PACS scores and labels, of mini-batches whose scores are not zero by construction.
    pub(super) scores: Vec<f64>,
    pub(super) positive: Vec<bool>,
    pub(super) log_ratios: Vec<f64>,
    pub(super) seconds: BTreeMap<&'static str, f64>,
    pub(super) traffic: Traffic,
    /// Time that each rank computed, by rank: its own time without that in which it waited for the others.
    pub(super) rank_seconds: Vec<f64>,
}

impl StepMetrics {
    pub(super) fn add_seconds(&mut self, phase: &'static str, since: std::time::Instant) {
        *self.seconds.entry(phase).or_default() += since.elapsed().as_secs_f64();
    }

    /// Compares what the learner computes for the sequence at `place` with what the rollout engine did: experts, and log-probs. The
    /// log-probs of sequences of older weights are passed over: they differ by training, which is no mismatch. Experts are compared all
    /// the same, for those of older weights are replayed, too.
    pub(super) fn compare(&mut self, batch: &TrainBatch, place: usize, learner: AnswerScores<'_>) {
        self.sums.routed_tokens += learner.rerouted.len() as f64;
        self.sums.rerouted += learner.rerouted.iter().map(|share| f64::from(*share)).sum::<f64>();
        if !batch.is_current(place) {
            return;
        }
        let learner = learner.logprobs;
        for (a, b) in learner.iter().zip(&batch.sequences[place].rollout_logprobs) {
            let difference = f64::from((a - b).abs());
            self.sums.mismatch += difference;
            self.mismatch_max = self.mismatch_max.max(difference);
        }
        self.sums.compared_tokens += learner.len() as f64;
    }

    /// Returns the metrics by name, as `docs/METRICS.md` lists them. Values that are not finite are left out.
    pub(super) fn named(&self) -> BTreeMap<String, f64> {
        let mut named = BTreeMap::new();
        let mut put = |name: &str, value: f64| {
            if value.is_finite() {
                named.insert(name.to_owned(), value);
            }
        };
        put("loss", self.sums.loss / f64::from(self.updates));
        put("grad_norm", mean(&self.grad_norms));
        put("value_loss", self.sums.value_loss / f64::from(self.value_updates));
        put("value_grad_norm", mean(&self.value_grad_norms));
        put("clipped_share", f64::from(self.clipped) / f64::from(self.updates));
        put("learning_rate", self.learning_rate);
        put("skipped_updates", f64::from(self.skipped));
        put("score_abs_mean", mean_abs(&self.scores));
        put("log_ratio_abs_mean", mean_abs(&self.log_ratios));
        if let Some(auc) = pacs_algo::auc(&self.scores, &self.positive) {
            put("score_auc", auc);
        }
        put("learner_entropy", self.sums.entropy / self.sums.scored_tokens);
        put("logprob_mismatch_mean", self.sums.mismatch / self.sums.compared_tokens);
        // With nothing compared, a maximum of 0 would claim that the engines agree.
        if self.sums.compared_tokens > 0.0 {
            put("logprob_mismatch_max", self.mismatch_max);
        }
        put("router_mismatch", self.sums.rerouted / self.sums.routed_tokens);
        put("trained_sequences", self.sums.trained_sequences);
        put("trained_tokens", self.sums.trained_tokens);
        put("trained_tokens_per_second", self.sums.trained_tokens / self.step_seconds);
        put("model_flops", self.sums.flops);
        if let Some(peak) = self.peak_flops {
            put("model_flops_utilisation", self.sums.flops / (peak * self.step_seconds));
        }
        for (name, value) in &self.outcomes {
            put(name, *value);
        }
        for (name, value) in self.objective.named() {
            put(name, value);
        }
        put("communication_bytes", self.traffic.bytes as f64);
        put("seconds_communication", self.traffic.busy.as_secs_f64());
        put("seconds_communication_wait", self.traffic.waited.as_secs_f64());
        put("communication_hidden_share", self.traffic.hidden_share());
        if let Some((rank, slowest, others)) = slowest(&self.rank_seconds) {
            put("slowest_rank", rank as f64);
            put("slowest_rank_seconds", slowest);
            put("other_ranks_seconds", others);
        }
        for (phase, seconds) in &self.seconds {
            put(&format!("seconds_{phase}"), *seconds);
        }
        named
    }
}

/// The rank that computed longest, its time, and the mean of the others; `None` for one rank.
fn slowest(seconds: &[f64]) -> Option<(usize, f64, f64)> {
    if seconds.len() < 2 {
        return None;
    }
    let (rank, slowest) = seconds.iter().copied().enumerate().max_by(|a, b| a.1.total_cmp(&b.1))?;
    let others = seconds.iter().sum::<f64>() - slowest;
    Some((rank, slowest, others / (seconds.len() - 1) as f64))
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn mean_abs(values: &[f64]) -> f64 {
    values.iter().map(|value| value.abs()).sum::<f64>() / values.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_rank_is_named_with_the_mean_of_the_others() {
        assert_eq!(slowest(&[1.0, 4.0, 2.0]), Some((1, 4.0, 1.5)));
        assert_eq!(slowest(&[3.0]), None);
        assert_eq!(slowest(&[]), None);
    }
}
