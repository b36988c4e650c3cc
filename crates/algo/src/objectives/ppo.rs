//! Proximal policy optimisation with a value model.

use super::grpo;
use crate::{AdvantageEstimator, PolicyConfig, ValueConfig};

/// PPO (Schulman et al. 2017, arXiv 1707.06347): generalised advantage estimation on a value model's estimates,
/// whitened; a clipped ratio and a clipped value loss. The settings are those of the PACS paper's scripts; the mean
/// over an answer's tokens is that of its text.
#[must_use]
pub fn ppo() -> PolicyConfig {
    PolicyConfig {
        advantage: AdvantageEstimator::Gae { gamma: 1.0, lambda: 1.0 },
        value: Some(ValueConfig { clip: 0.5, aggregation: grpo().aggregation, warmup_steps: 0 }),
        ..grpo()
    }
}
