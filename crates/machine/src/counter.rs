use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Value of each counter since the start of the job; counters at 0 may be absent.
pub type Counters = BTreeMap<Counter, u64>;

/// A statistic that the machine keeps. Checkpoints and journals store it under [`Counter::name`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Counter {
    /// Leases that ended before the leased work was handed in.
    LapsedLeases,
    /// Members that were removed, for any reason.
    LostWorkers,
    /// Members whose name a new process took over.
    RestartedWorkers,
    /// Times that so many workers were lost together that their deaths do not count against what they held.
    MassLosses,
    /// Learner generations that ended with the loss of the state in their memory.
    LostGenerations,
    /// Verifications that failed or timed out.
    FailedVerdicts,
    /// The share of `FailedVerdicts` that belongs to evaluations.
    EvaluationFailedVerdicts,
    /// Samples and verdicts that were handed in after their lease had ended.
    StaleSubmissions,
    /// Samples that were replaced because they could not be verified.
    ReplacedSamples,
    /// Samples whose content the disk has lost.
    LostSamples,
    /// Samples that were given up because verifiers died while they held them.
    DeadlySamples,
    /// Groups that were given up and replaced by the next prompt.
    DroppedGroups,
    /// Problems that an evaluation leaves out because they could not be verified; also counted in `DroppedGroups`.
    ExcludedProblems,
    /// Groups that were left out of a batch because they have no contrast.
    #[serde(rename = "uniform_groups_left_out")]
    UniformGroups,
    /// Groups that were restarted because they would have exceeded the lag bound.
    EvictedGroups,
    /// Times that a group ran out of `group_timeout`.
    OverdueGroups,
    /// Groups that were quarantined because their workers died.
    SetAsideGroups,
    /// Times that the watchdog found no progress for `stall_timeout`.
    Stalls,
    /// Checkpoints that could not be written or committed.
    FailedCheckpoints,
    /// Draws that the curriculum skipped.
    SkippedDraws,
    /// Retired problems that the curriculum drew again.
    ReopenedProblems,
}

impl Counter {
    /// Every counter, in declaration order.
    pub const ALL: [Self; 21] = [
        Self::LapsedLeases,
        Self::LostWorkers,
        Self::RestartedWorkers,
        Self::MassLosses,
        Self::LostGenerations,
        Self::FailedVerdicts,
        Self::EvaluationFailedVerdicts,
        Self::StaleSubmissions,
        Self::ReplacedSamples,
        Self::LostSamples,
        Self::DeadlySamples,
        Self::DroppedGroups,
        Self::ExcludedProblems,
        Self::UniformGroups,
        Self::EvictedGroups,
        Self::OverdueGroups,
        Self::SetAsideGroups,
        Self::Stalls,
        Self::FailedCheckpoints,
        Self::SkippedDraws,
        Self::ReopenedProblems,
    ];

    /// Name in metrics, in the status and on disk.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::LapsedLeases => "lapsed_leases",
            Self::LostWorkers => "lost_workers",
            Self::RestartedWorkers => "restarted_workers",
            Self::MassLosses => "mass_losses",
            Self::LostGenerations => "lost_generations",
            Self::FailedVerdicts => "failed_verdicts",
            Self::EvaluationFailedVerdicts => "evaluation_failed_verdicts",
            Self::StaleSubmissions => "stale_submissions",
            Self::ReplacedSamples => "replaced_samples",
            Self::LostSamples => "lost_samples",
            Self::DeadlySamples => "deadly_samples",
            Self::DroppedGroups => "dropped_groups",
            Self::ExcludedProblems => "excluded_problems",
            Self::UniformGroups => "uniform_groups_left_out",
            Self::EvictedGroups => "evicted_groups",
            Self::OverdueGroups => "overdue_groups",
            Self::SetAsideGroups => "set_aside_groups",
            Self::Stalls => "stalls",
            Self::FailedCheckpoints => "failed_checkpoints",
            Self::SkippedDraws => "skipped_draws",
            Self::ReopenedProblems => "reopened_problems",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_is_written_as_it_is_shown() {
        for counter in Counter::ALL {
            assert_eq!(serde_json::to_value(counter).unwrap(), counter.name());
        }
        let counters: Counters = [(Counter::UniformGroups, 3)].into();
        assert_eq!(serde_json::to_string(&counters).unwrap(), "{\"uniform_groups_left_out\":3}");
    }
}
