use std::collections::BTreeMap;
use std::time::Duration;

use pacs_types::{GroupId, LeaseId, Outcome, SampleId, WeightVersion, WorkerId};
use serde::{Deserialize, Serialize};

use crate::UniformBy;

/// The samples of one prompt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Group {
    pub(super) drawn: Duration,
    /// When its work was issued first, or again because it took too long.
    pub(super) started: Option<Duration>,
    /// No token of it comes from older weights.
    pub(super) born: WeightVersion,
    pub(super) samples: Vec<Slot>,
    pub(super) unjudged: usize,
    /// How often it took too long.
    pub(super) overdue: u32,
    /// How often it was started again because it grew too old.
    pub(super) evictions: u32,
    /// When workers died while they held it: the newest deaths that count.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) deaths: Vec<Duration>,
}

/// What a verifier says of a sample.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Judgement {
    pub(crate) outcome: Outcome,
    pub(crate) label: f64,
    pub(crate) reward: Option<f64>,
}

/// One sample of a group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Slot {
    pub(super) state: State,
    /// Samples of this slot that were given up because no verdict could be had.
    pub(super) replaced: u32,
    /// The loan that the sample came under.
    pub(super) generated_under: LeaseId,
    /// The version of the sample's oldest token.
    pub(super) version: WeightVersion,
    /// The newest version when the sample was handed in: none of its tokens is newer.
    pub(super) newest: WeightVersion,
    /// Verifications of this sample that failed.
    pub(super) failures: u32,
    /// The verifier that failed last, and when.
    pub(super) failed_by: Option<(WorkerId, Duration)>,
    /// When verifiers died while they held this sample: the newest deaths that count.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) deaths: Vec<Duration>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum State {
    /// Waits for a rollout worker; its group is in `waiting`.
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

/// The samples of some groups that are there, the loans that they and their verdicts came under.
pub(crate) fn present(groups: &BTreeMap<GroupId, Group>) -> impl Iterator<Item = (SampleId, LeaseId, Option<LeaseId>)> {
    groups.iter().flat_map(|(id, group)| {
        (0u32..).zip(&group.samples).filter_map(move |(index, slot)| {
            let sample = SampleId { group: *id, index };
            match slot.state {
                State::Missing | State::Generating { .. } => None,
                State::Unverified | State::Verifying => Some((sample, slot.generated_under, None)),
                State::Judged { under, .. } => Some((sample, slot.generated_under, Some(under))),
            }
        })
    })
}

/// Share of right answers and of mixed groups (neither all right nor all wrong), over complete groups.
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
    /// The version of its oldest token.
    pub(crate) fn born(&self) -> WeightVersion {
        self.born
    }

    /// Whether no token of it can be of weights behind `version`.
    pub(crate) fn is_of(&self, version: WeightVersion) -> bool {
        let is_there = |slot: &&Slot| !matches!(slot.state, State::Missing | State::Generating { .. });
        let is_lent = self.samples.iter().any(|slot| matches!(slot.state, State::Generating { .. }));
        !is_lent && self.born <= version && self.samples.iter().filter(is_there).all(|slot| slot.newest <= version)
    }

    /// Whether nothing that an objective contrasts differs between its samples. Labels stand in for rewards that a record
    /// of an earlier version does not have.
    pub(crate) fn is_uniform(&self, by: UniformBy) -> bool {
        let (_, low, high) = match by {
            UniformBy::Labels => self.labels(),
            UniformBy::Rewards => bounds(self.samples.iter().filter_map(|slot| match slot.state {
                State::Judged { label, reward, .. } => Some(reward.unwrap_or(label)),
                State::Missing | State::Generating { .. } | State::Unverified | State::Verifying => None,
            })),
        };
        low == high
    }

    pub(super) fn missing(&self) -> usize {
        self.samples.iter().filter(|slot| slot.state == State::Missing).count()
    }

    /// The labels that are there.
    pub(crate) fn judged_labels(&self) -> impl Iterator<Item = f64> {
        self.samples.iter().filter_map(|slot| match slot.state {
            State::Judged { label, .. } => Some(label),
            State::Missing | State::Generating { .. } | State::Unverified | State::Verifying => None,
        })
    }

    /// Sum, smallest and largest of the labels that are there.
    pub(super) fn labels(&self) -> (f64, f64, f64) {
        bounds(self.judged_labels())
    }
}

/// Sum, smallest and largest.
fn bounds(values: impl Iterator<Item = f64>) -> (f64, f64, f64) {
    values.fold((0.0, f64::INFINITY, f64::NEG_INFINITY), |(sum, low, high), value| {
        (sum + value, low.min(value), high.max(value))
    })
}

impl Slot {
    pub(super) fn empty() -> Self {
        Self {
            state: State::Missing,
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
