use std::fmt;

use pacs_types::Role;

/// Role of a process, as its certificate proves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, clap::ValueEnum)]
pub enum PeerRole {
    /// Owns the run: hands out work and writes the journal.
    Coordinator,
    /// Computes gradients and publishes weights.
    Learner,
    /// Generates samples with the published weights.
    Rollout,
    /// Verifies samples and returns verdicts.
    Verifier,
    /// Observes and controls runs.
    Operator,
}

impl PeerRole {
    /// Every role, in declaration order.
    pub const ALL: [Self; 5] = [Self::Coordinator, Self::Learner, Self::Rollout, Self::Verifier, Self::Operator];

    /// Lower-case name, as in file and worker names.
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

    /// DNS name in certificates of this role. It is never resolved.
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

    /// The role with this DNS name; `None` for other names.
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
