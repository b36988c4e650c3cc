//! The no-signal stop: ends a run whose recent steps carry no gradient.

use serde::{Deserialize, Serialize};

use crate::machine::Machine;
use crate::pool::{Group, pass_rate_and_mixed_share};

/// The level at which label variance is needed for a non-zero gradient.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Contrast {
    /// Between the samples of a group: for objectives that compare a sample with the others of its prompt.
    #[default]
    Group,
    /// Between any two samples of the step: for objectives with a baseline over the step, or a learned one.
    Step,
    /// At no level: the objective has other sources of gradient than the labels.
    None,
}

impl Machine {
    /// Records whether the labels of a batch carry gradient. Returns the reason to end the run with, when none of the
    /// last steps' did.
    pub(crate) fn collapse<'a>(&mut self, batch: impl Iterator<Item = &'a Group>) -> Option<String> {
        let (pass_rate, mixed_share) = pass_rate_and_mixed_share(batch);
        let says_nothing = match self.options.contrast {
            Contrast::Group => true,
            Contrast::Step => pass_rate == 0.0 || pass_rate == 1.0,
            Contrast::None => false,
        };
        let teaches = mixed_share > 0.0 || !(says_nothing || pass_rate < COLLAPSED_PASS_RATE);
        self.position.collapsed_steps = if teaches { 0 } else { self.position.collapsed_steps + 1 };
        let patience = COLLAPSED_STEPS.max(COLLAPSED_GROUPS.div_ceil(u64::from(self.options.prompts_per_step.max(1))));
        let steps = self.position.collapsed_steps;
        (steps >= patience).then(|| {
            let step = self.position.step + 1;
            let advice = if pass_rate < 0.5 { TOO_HARD } else { TOO_EASY };
            format!(
                "for {steps} steps in a row no group had both right and wrong answers (the mixed share stayed 0), and {:.1} % \
                 of the answers of step {step} were right: there is nothing left to learn from; {advice}",
                100.0 * pass_rate
            )
        })
    }
}

const TOO_HARD: &str =
    "look at the samples, then start from an earlier checkpoint with easier problems or a smaller learning rate";
const TOO_EASY: &str =
    "these problems give no more signal: take the newest checkpoint, or continue with harder problems";
const COLLAPSED_STEPS: u64 = 10;
/// Least number of groups in those steps: with few groups per step, several uniform steps in a row happen by chance.
const COLLAPSED_GROUPS: u64 = 64;
/// Pass rate below which the run ends whatever other rewards vary: it does not learn to solve its problems.
const COLLAPSED_PASS_RATE: f64 = 0.05;

#[cfg(test)]
mod tests {
    use pacs_types::{Outcome, SampleId};

    use super::*;
    use crate::handlers::testing::{Run, options};
    use crate::{Effect, End, Options};

    /// Number of steps that are trained before the no-signal stop (40 at most), and its reason.
    fn steps_of(contrast: Contrast, prompts: u32, outcome: impl Fn(SampleId) -> Outcome) -> (u64, Option<String>) {
        let job = Options { contrast, prompts_per_step: prompts, slots: prompts, total_steps: 40, ..options() };
        let mut run = Run::sampling(job);
        for step in 0..40 {
            run.generate_all();
            let effects = run.verify_all(&outcome);
            let ended = effects.iter().find_map(|effect| match effect {
                Effect::Ended(End::Failed { reason }) => Some(reason.clone()),
                _ => None,
            });
            if ended.is_some() {
                return (step, ended);
            }
            run.train();
        }
        (40, None)
    }

    fn all(outcome: Outcome) -> impl Fn(SampleId) -> Outcome {
        move |_| outcome
    }

    fn by_group(sample: SampleId) -> Outcome {
        if sample.group.0.is_multiple_of(2) { Outcome::Correct } else { Outcome::Wrong }
    }

    #[test]
    fn a_run_without_mixed_groups_ends_with_that_reason_at_any_pass_rate() {
        let (steps, reason) = steps_of(Contrast::Group, 8, all(Outcome::Wrong));
        let reason = reason.unwrap();
        assert_eq!(steps, 9);
        assert!(reason.contains("for 10 steps in a row no group had both") && reason.contains("0.0 %"), "{reason}");
        assert!(reason.contains("easier problems"), "{reason}");

        let (steps, reason) = steps_of(Contrast::Group, 8, all(Outcome::Correct));
        let reason = reason.unwrap();
        assert_eq!(steps, 9);
        assert!(reason.contains("100.0 %") && reason.contains("harder problems"), "{reason}");

        let (steps, reason) = steps_of(Contrast::Group, 8, by_group);
        assert_eq!(steps, 9);
        assert!(reason.unwrap().contains("50.0 %"));
    }

    #[test]
    fn small_steps_need_a_longer_streak_to_exclude_chance() {
        assert_eq!(steps_of(Contrast::Group, 2, all(Outcome::Correct)).0, 31);
        assert_eq!(steps_of(Contrast::Group, 16, all(Outcome::Correct)).0, 9);
    }

    #[test]
    fn groups_that_differ_teach_an_objective_with_a_baseline_over_the_step() {
        assert_eq!(steps_of(Contrast::Step, 8, by_group), (40, None));
        assert_eq!(steps_of(Contrast::Step, 8, all(Outcome::Correct)).0, 9);
        assert_eq!(steps_of(Contrast::Step, 8, all(Outcome::Wrong)).0, 9);
    }

    #[test]
    fn a_reward_other_than_the_label_gives_signal_unless_nearly_nothing_is_right() {
        assert_eq!(steps_of(Contrast::None, 8, all(Outcome::Correct)), (40, None));
        assert_eq!(steps_of(Contrast::None, 8, by_group), (40, None));
        assert_eq!(steps_of(Contrast::None, 8, all(Outcome::Wrong)).0, 9);
    }

    #[test]
    fn one_mixed_group_is_enough() {
        let outcome = |sample: SampleId| {
            if sample.group.0 % 72 == 71 && sample.index == 0 { Outcome::Correct } else { Outcome::Wrong }
        };
        assert_eq!(steps_of(Contrast::Group, 8, outcome), (40, None));
    }
}
