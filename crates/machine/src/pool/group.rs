use std::collections::BTreeMap;
use std::time::Duration;

use pacs_types::{GroupId, LeaseId, Outcome, SampleId, WeightVersion, WorkerId};
use serde::{Deserialize, Serialize};

use crate::UniformBy;

/// The samples of one prompt and their bookkeeping.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Group {
    pub(super) drawn: Duration,
    /// Start of the group timeout: the first lease, or the last reissue.
    pub(super) started: Option<Duration>,
    /// Lower bound on the version of its tokens.
    pub(super) born: WeightVersion,
    pub(super) samples: Vec<Slot>,
    pub(super) unjudged: usize,
    /// Times that it exceeded the group timeout.
    pub(super) overdue: u32,
    /// Restarts for exceeding the lag bound.
    pub(super) evictions: u32,
    /// Times at which workers died while they held it, as far as they count.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) deaths: Vec<Duration>,
}

/// A verifier's result for a sample.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Judgement {
    pub(crate) outcome: Outcome,
    pub(crate) label: f64,
    pub(crate) reward: Option<f64>,
}

/// State of one sample position of a group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Slot {
    pub(super) state: SampleState,
    /// Samples that were given up at this position as unverifiable.
    pub(super) replaced: u32,
    /// The lease that the sample was submitted under.
    pub(super) generated_under: LeaseId,
    /// Version of the sample's oldest token.
    pub(super) version: WeightVersion,
    /// The newest version when the sample was submitted: an upper bound on the version of its tokens.
    pub(super) newest: WeightVersion,
    /// Failed verifications of this sample.
    pub(super) failures: u32,
    /// The verifier that failed last, and when; others are preferred for a while.
    pub(super) failed_by: Option<(WorkerId, Duration)>,
    /// Times at which verifiers died while they held this sample, as far as they count.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) deaths: Vec<Duration>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum SampleState {
    /// Waits for a rollout worker; its group is in the queue.
    Missing,
    Generating {
        under: LeaseId,
    },
    Unverified,
    Verifying,
    Judged {
        under: LeaseId,
        #[serde(with = "pacs_types::bits")]
        label: f64,
        #[serde(default, with = "pacs_types::bits::option", skip_serializing_if = "Option::is_none")]
        reward: Option<f64>,
    },
}

/// The samples that are present in these groups, with the leases of the sample and of its verdict.
pub(crate) fn present(groups: &BTreeMap<GroupId, Group>) -> impl Iterator<Item = (SampleId, LeaseId, Option<LeaseId>)> {
    groups.iter().flat_map(|(id, group)| {
        (0u32..).zip(&group.samples).filter_map(move |(index, slot)| {
            let sample = SampleId { group: *id, index };
            match slot.state {
                SampleState::Missing | SampleState::Generating { .. } => None,
                SampleState::Unverified | SampleState::Verifying => Some((sample, slot.generated_under, None)),
                SampleState::Judged { under, .. } => Some((sample, slot.generated_under, Some(under))),
            }
        })
    })
}

/// Pass rate, and share of mixed groups (neither all right nor all wrong), over complete groups.
pub(crate) fn pass_rate_and_mixed_share<'a>(groups: impl Iterator<Item = &'a Group>) -> (f64, f64) {
    let (mut passes, mut samples, mut mixed, mut count) = (0.0, 0.0f64, 0.0, 0.0f64);
    for group in groups {
        let (sum, low, high) = group.labels();
        passes += sum;
        samples += group.samples.len() as f64;
        mixed += f64::from(u8::from(low < high));
        count += 1.0;
    }
    (passes / samples.max(1.0), mixed / count.max(1.0))
}

impl Group {
    /// Version of the group's oldest token.
    pub(crate) fn born(&self) -> WeightVersion {
        self.born
    }

    /// Whether no token of the group can come from weights newer than `version`.
    pub(crate) fn is_of(&self, version: WeightVersion) -> bool {
        let is_there = |slot: &&Slot| !matches!(slot.state, SampleState::Missing | SampleState::Generating { .. });
        let is_lent = self.samples.iter().any(|slot| matches!(slot.state, SampleState::Generating { .. }));
        !is_lent && self.born <= version && self.samples.iter().filter(is_there).all(|slot| slot.newest <= version)
    }

    /// Whether the samples do not differ in the quantity that the objective contrasts. Labels replace rewards that
    /// records of an earlier version lack.
    pub(crate) fn is_uniform(&self, by: UniformBy) -> bool {
        let (_, low, high) = match by {
            UniformBy::Labels => self.labels(),
            UniformBy::Rewards => bounds(self.samples.iter().filter_map(|slot| match slot.state {
                SampleState::Judged { label, reward, .. } => Some(reward.unwrap_or(label)),
                SampleState::Missing
                | SampleState::Generating { .. }
                | SampleState::Unverified
                | SampleState::Verifying => None,
            })),
        };
        low == high
    }

    pub(super) fn missing(&self) -> usize {
        self.samples.iter().filter(|slot| slot.state == SampleState::Missing).count()
    }

    /// The labels of the judged samples.
    pub(crate) fn judged_labels(&self) -> impl Iterator<Item = f64> {
        self.samples.iter().filter_map(|slot| match slot.state {
            SampleState::Judged { label, .. } => Some(label),
            SampleState::Missing
            | SampleState::Generating { .. }
            | SampleState::Unverified
            | SampleState::Verifying => None,
        })
    }

    /// Sum, minimum and maximum of the labels of the judged samples.
    pub(super) fn labels(&self) -> (f64, f64, f64) {
        bounds(self.judged_labels())
    }
}

/// Sum, minimum and maximum.
fn bounds(values: impl Iterator<Item = f64>) -> (f64, f64, f64) {
    values.fold((0.0, f64::INFINITY, f64::NEG_INFINITY), |(sum, low, high), value| {
        (sum + value, low.min(value), high.max(value))
    })
}

impl Slot {
    pub(super) fn empty() -> Self {
        Self {
            state: SampleState::Missing,
            replaced: 0,
            generated_under: LeaseId(0),
            version: WeightVersion(0),
            newest: WeightVersion(0),
            failures: 0,
            failed_by: None,
            deaths: Vec::new(),
        }
    }
}
