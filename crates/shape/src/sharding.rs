use serde::{Deserialize, Serialize};

/// What of the training state every learner rank holds as a whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sharding {
    /// Everything: weights, gradients, master weights and moments.
    #[default]
    Replicated,
    /// Weights and gradients; master weights and moments are divided among the ranks (ZeRO stage 1, Rajbhandari et al.
    /// 2020).
    ShardOptimizer,
    /// Nothing: weights come layer by layer when they are used, gradients leave when they are complete (ZeRO stage 3).
    ShardAll,
}

/// The part of the training state that is one rank's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Division {
    /// What is divided.
    pub sharding: Sharding,
    /// This rank, below `ranks`.
    pub rank: usize,
    /// How many ranks there are, at least 1.
    pub ranks: usize,
}

impl Division {
    /// A world of one rank.
    #[must_use]
    pub fn alone(sharding: Sharding) -> Self {
        Self { sharding, rank: 0, ranks: 1 }
    }

    /// In how many parts master weights and moments are divided.
    #[must_use]
    pub fn parts(&self) -> usize {
        if self.sharding == Sharding::Replicated { 1 } else { self.ranks }
    }

    /// Which of them is this rank's.
    #[must_use]
    pub fn part(&self) -> usize {
        if self.sharding == Sharding::Replicated { 0 } else { self.rank }
    }
}
