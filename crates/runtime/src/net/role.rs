use std::fmt;

use pacs_types::Role;

/// What a process is to others: the subject of its certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PeerRole {
    /// Holds the run together.
    Coordinator,
    /// Computes gradients and hands out weights.
    Learner,
    /// Generates samples.
    Rollout,
    /// Grades samples.
    Verifier,
    /// Looks at runs and commands them.
    Operator,
}

impl PeerRole {
    /// Every role.
    pub const ALL: [Self; 5] = [Self::Coordinator, Self::Learner, Self::Rollout, Self::Verifier, Self::Operator];

    /// Lower-case name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Coordinator => "coordinator",
            Self::Learner => "learner",
            Self::Rollout => "rollout",
            Self::Verifier => "verifier",
            Self::Operator => "operator",
        }
    }

    /// The DNS name that stands in certificates of this role. It is never looked up.
    #[must_use]
    pub fn dns_name(self) -> &'static str {
        match self {
            Self::Coordinator => "coordinator.pacs.internal",
            Self::Learner => "learner.pacs.internal",
            Self::Rollout => "rollout.pacs.internal",
            Self::Verifier => "verifier.pacs.internal",
            Self::Operator => "operator.pacs.internal",
        }
    }

    /// The role that a DNS name stands for.
    #[must_use]
    pub fn of_dns_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.dns_name() == name)
    }
}

impl From<Role> for PeerRole {
    fn from(role: Role) -> Self {
        match role {
            Role::Learner => Self::Learner,
            Role::Rollout => Self::Rollout,
            Role::Verifier => Self::Verifier,
        }
    }
}

impl fmt::Display for PeerRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
