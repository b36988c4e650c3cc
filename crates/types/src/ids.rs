use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The identifier that follows this one.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }
    };
}

id!(
    /// One prompt with its samples; numbered in the order in which prompts are drawn, over the whole job.
    GroupId,
    "g"
);
id!(
    /// One registration of a worker process with the coordinator.
    WorkerId,
    "w"
);
id!(
    /// One lease of work to a worker; a lapsed lease is refused by number.
    LeaseId,
    "lease-"
);
id!(
    /// One membership of the learner group; fences communicators, step reports and weight publications.
    Generation,
    "gen-"
);
id!(
    /// How many training steps the weights have seen: version 0 is the model that the job started from.
    WeightVersion,
    "v"
);

/// One answer of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SampleId {
    /// The group that the sample belongs to.
    pub group: GroupId,
    /// Position within the group, `0..n`.
    pub index: u32,
}

impl fmt::Display for SampleId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.group, self.index)
    }
}

/// What a worker process does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Generates samples with published weights; any number may join and leave.
    Rollout,
    /// Computes gradients and owns the weights.
    Learner,
    /// Grades samples; any number may join and leave, without libtorch.
    Verifier,
}

impl Role {
    /// Every role, in the order in which status output lists them.
    pub const ALL: [Self; 3] = [Self::Rollout, Self::Verifier, Self::Learner];

    /// Lower-case name, as in command lines and logs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Rollout => "rollout",
            Self::Learner => "learner",
            Self::Verifier => "verifier",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Ids of evaluation groups start here, so that they never meet those of training groups, and so that the noise of an
/// evaluation does not depend on how many prompts were trained on before it.
pub const EVALUATION_GROUPS: u64 = 1 << 40;

/// Number of the problem that an evaluation group measures, among those of all sets; none for a training group.
#[must_use]
pub fn evaluation_problem(group: GroupId) -> Option<u64> {
    group.0.checked_sub(EVALUATION_GROUPS)
}
