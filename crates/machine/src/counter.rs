use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Counts since the start of the job.
pub type Counters = BTreeMap<Counter, u64>;

/// What a run counts. Checkpoints and journals name a counter as [`Counter::name`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Counter {
    /// Leases that ended before what they ask for was handed in.
    LapsedLeases,
    /// Members that went, whatever the reason.
    LostWorkers,
    /// Members whose name a new process took over.
    RestartedWorkers,
    /// Times at which so many workers were lost together that it says nothing about what they held.
    MassLosses,
    /// Generations of learners that ended with the state in their memory.
    LostGenerations,
    /// Verifications that failed or timed out.
    FailedVerdicts,
    /// Those of them that were verifications of an evaluation.
    EvaluationFailedVerdicts,
    /// Samples and verdicts that came after their lease had ended.
    StaleSubmissions,
    /// Samples that were given up for others because no verdict could be had.
    ReplacedSamples,
    /// Samples that the disk has lost.
    LostSamples,
    /// Samples that were given up because their verifiers died.
    DeadlySamples,
    /// Groups that were given up for the next prompts.
    DroppedGroups,
    /// Those of them that were problems of an evaluation, which is made without them.
    ExcludedProblems,
    /// Groups that the learner did not get because they had nothing to contrast.
    #[serde(rename = "uniform_groups_left_out")]
    UniformGroups,
    /// Groups that were started again because they would have grown too old.
    EvictedGroups,
    /// Times at which a group was not done in time.
    OverdueGroups,
    /// Groups that are not tried again because their workers died.
    SetAsideGroups,
    /// Times at which nothing had come of anything for too long.
    Stalls,
    /// Checkpoints that could not be saved.
    FailedCheckpoints,
    /// Draws that the curriculum skipped.
    SkippedDraws,
    /// Retired problems that were drawn again.
    ReopenedProblems,
}

impl Counter {
    /// Every counter.
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

    /// Its name in metrics, in the status and on disk.
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
