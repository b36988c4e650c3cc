//! What a valid job does otherwise than its author may think: nothing of it is an error.

use pacs_algo::Objective;

use crate::{JobSpec, OldLogprobs, RewardSpec};

impl JobSpec {
    /// Sentences about settings that are allowed and do not do what they seem to: `pacs job check` shows them.
    #[must_use]
    pub fn advice(&self) -> Vec<String> {
        let objective = self.objective.filled().objective(self.rollout.max_new_tokens);
        [
            self.uncorrected_staleness(&objective),
            self.uncorrected_filters(&objective),
            self.unread_rewards(&objective),
            self.lost_decay(),
            self.inverted_labels(),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    /// Ratios that start from the learner's own log-probs are 1 however old a token is, so no clip sees its age.
    fn uncorrected_staleness(&self, objective: &Objective) -> Option<String> {
        let lag = self.asynchrony.max_lag;
        let needs = objective.needs();
        let sees_age = needs.rollout || needs.old && self.batch.old_logprobs == OldLogprobs::Rollout;
        (lag > 0 && !sees_age).then(|| {
            format!(
                "samples may be {lag} versions old (`asynchrony.max_lag`), and nothing corrects for that: old log-probs are the \
                 learner's, so a clip does not see the age of a token; set `objective.importance` = \"truncate\""
            )
        })
    }

    fn uncorrected_filters(&self, objective: &Objective) -> Option<String> {
        let rollout = &self.rollout;
        let set = [("top_p", rollout.top_p < 1.0), ("top_k", rollout.top_k > 0), ("min_p", rollout.min_p > 0.0)];
        let set: Vec<String> = set.iter().filter(|(_, is)| *is).map(|(name, _)| format!("`rollout.{name}`")).collect();
        (!set.is_empty() && !objective.needs().rollout).then(|| {
            format!(
                "samples are drawn after {}, and the objective computes with log-probs of the whole distribution: nothing \
                 corrects for what was cut off; train without, or set `objective.importance` = \"truncate\"",
                set.join(", ")
            )
        })
    }

    /// Objectives that train on labels do not read what a reward is made of.
    fn unread_rewards(&self, objective: &Objective) -> Option<String> {
        let RewardSpec { weight, format_bonus, overlong_tokens, verifiers, .. } = &self.reward;
        let parts = [
            ("weight", *weight != 1.0),
            ("format_bonus", *format_bonus != 0.0),
            ("overlong_tokens", *overlong_tokens > 0),
            ("verifiers", !verifiers.is_empty()),
        ];
        let parts: Vec<String> =
            parts.iter().filter(|(_, is)| *is).map(|(name, _)| format!("`reward.{name}`")).collect();
        let by_labels = matches!(objective, Objective::Pacs(_) | Objective::Real(_) | Objective::Disco(_));
        (by_labels && !parts.is_empty()).then(|| {
            let kind = self.objective.kind.name();
            let parts = parts.join(", ");
            format!("`{kind}` trains on labels alone: {parts} change the reward in metrics and nothing that is learnt")
        })
    }

    fn inverted_labels(&self) -> Option<String> {
        let noise = self.reward.label_noise;
        (noise > 0.0).then(|| {
            format!(
                "{:.3} % of the training samples get the opposite of their label (`reward.label_noise`): the pass rate and the reward \
                 of training are those of the inverted labels, evaluations are not affected",
                100.0 * noise
            )
        })
    }

    /// What is taken from a float32 weight has to be half of its last bit to be seen.
    fn lost_decay(&self) -> Option<String> {
        let (rate, decay) = (self.optimizer.learning_rate, self.optimizer.weight_decay);
        let is_lost = decay > 0.0 && (1.0 - rate * decay) as f32 == 1.0;
        is_lost.then(|| {
            format!(
                "weights do not decay: `optimizer.learning_rate` x `optimizer.weight_decay` = {:e} of a float32 weight is \
                 rounded away in every update; set `weight_decay` = 0.0, or above {:e}",
                rate * decay,
                f64::from(f32::EPSILON) / 4.0 / rate
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    fn advice(more: &str) -> Vec<String> {
        let text = format!(
            "name = 'a'\nmodel.path = 'm'\ndata.train.path = 't.jsonl'\ndata.evaluation.path = 'e.jsonl'\n\
             batch.prompts_per_step = 32\noptimizer.learning_rate = 1e-4\n{more}"
        );
        crate::parse(&text, Path::new("job.toml")).unwrap_or_else(|error| panic!("{more}: {error}")).advice()
    }

    #[test]
    fn settings_without_effect_are_reported_with_a_remedy() {
        assert_eq!(advice(""), [""; 0]);
        for (more, expected) in [
            ("asynchrony.max_lag = 4\nobjective.kind = 'grpo'", Some("samples may be 4 versions old")),
            ("asynchrony.max_lag = 4", Some("samples may be 4 versions old")),
            ("asynchrony.max_lag = 4\nobjective.importance = 'truncate'", None),
            ("asynchrony.max_lag = 4\nobjective = { kind = 'grpo', importance = 'truncate' }", None),
            ("asynchrony.max_lag = 4\nobjective.kind = 'grpo'\nbatch.old_logprobs = 'rollout'", None),
            (
                "reward.format_bonus = 0.1\nreward.format_strings = ['x']",
                Some("`pacs` trains on labels alone: `reward.format"),
            ),
            ("reward.format_bonus = 0.1\nreward.format_strings = ['x']\nobjective.kind = 'grpo'", None),
            ("reward.overlong_tokens = 8\nobjective.score = 'naive'", Some("`reward.overlong_tokens`")),
            ("reward.weight = 2.0", Some("`reward.weight` change")),
            ("rollout.top_p = 0.9", Some("drawn after `rollout.top_p`, and")),
            ("rollout = { top_k = 5, min_p = 0.1 }\nobjective.kind = 'rloo'", Some("`rollout.top_k`, `rollout.min_p`")),
            ("rollout.top_p = 0.9\nobjective = { kind = 'rloo', importance = 'mask' }", None),
            ("optimizer.weight_decay = 1e-4", Some("weights do not decay")),
            ("reward.label_noise = 0.05", Some("5.000 % of the training samples get the opposite")),
        ] {
            let found = advice(more);
            match expected {
                None => assert_eq!(found, [""; 0], "{more}"),
                Some(expected) => assert!(found.iter().any(|text| text.contains(expected)), "{more}: {found:?}"),
            }
        }
    }

    #[test]
    fn the_decay_that_is_advised_is_one() {
        let least = f64::from(f32::EPSILON) / 4.0;
        assert_eq!((1.0 - least * 0.99) as f32, 1.0);
        assert!(((1.0 - least * 1.01) as f32) < 1.0);
    }
}
