use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

/// How the learning rate decays after warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// The rate stays at its base value after the warm-up.
    #[default]
    Constant,
    /// It falls in a line.
    Linear,
    /// It falls along half a wave of a cosine.
    Cosine,
}

/// Learning-rate schedule over the updates of a job.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LearningRate {
    /// Learning rate at the end of warm-up, the peak.
    pub base: f64,
    /// Updates of the linear warm-up, which reaches `base` at the last of them.
    pub warmup_updates: u64,
    /// Shape of the decay after warm-up.
    pub schedule: Schedule,
    /// Learning rate at the last update, as a share of `base`; the constant schedule ignores it.
    pub final_ratio: f64,
    /// Total updates of the job, warm-up included.
    pub updates: u64,
}

impl LearningRate {
    /// Returns the learning rate of an update, counted from 1.
    #[must_use]
    pub fn at(&self, update: u64) -> f64 {
        let Self { base, warmup_updates, schedule, final_ratio, updates } = *self;
        if update < warmup_updates {
            return base * (update as f64 / warmup_updates as f64);
        }
        let start = warmup_updates.max(1);
        let falling = updates.saturating_sub(start).max(1);
        let done = (update.saturating_sub(start) as f64 / falling as f64).min(1.0);
        let left = match schedule {
            Schedule::Constant => return base,
            Schedule::Linear => 1.0 - done,
            Schedule::Cosine => 0.5 * (1.0 + (PI * done).cos()),
        };
        base * (final_ratio + (1.0 - final_ratio) * left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(schedule: Schedule, warmup_updates: u64) -> Vec<f64> {
        let rate = LearningRate { base: 2.0, warmup_updates, schedule, final_ratio: 0.5, updates: 8 };
        (1..=10).map(|update| (rate.at(update) * 1e6).round() / 1e6).collect()
    }

    #[test]
    fn rises_in_a_line_then_follows_its_schedule_to_the_last_update() {
        assert_eq!(rates(Schedule::Constant, 4), [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]);
        assert_eq!(rates(Schedule::Linear, 4), [0.5, 1.0, 1.5, 2.0, 1.75, 1.5, 1.25, 1.0, 1.0, 1.0]);
        assert_eq!(rates(Schedule::Cosine, 4)[3..], [2.0, 1.853553, 1.5, 1.146447, 1.0, 1.0, 1.0]);
        let at_once = rates(Schedule::Linear, 0);
        assert_eq!((at_once[0], at_once[7]), (2.0, 1.0), "no warm-up starts at the base");
    }

    #[test]
    fn a_warm_up_as_long_as_the_job_never_divides_by_zero() {
        let rate =
            LearningRate { base: 1.0, warmup_updates: 3, schedule: Schedule::Cosine, final_ratio: 0.0, updates: 3 };
        assert!((0..6).all(|update| rate.at(update).is_finite()));
    }
}
