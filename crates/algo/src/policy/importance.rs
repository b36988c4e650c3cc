use super::{ImportanceLevel, ImportanceMode, ImportanceWeights};

/// Importance weights of one answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Weights {
    /// Weight of each token.
    pub(crate) weight: Vec<f64>,
    /// Number of tokens whose weight the cap changed.
    pub(crate) cut: usize,
}

/// Computes the token weights of one answer from log-probs of the old policy by the learner and by the rollout engine.
/// They are constants of the derivatives.
pub(crate) fn weights(config: &ImportanceWeights, old: &[f64], rollout: &[f64]) -> Weights {
    let differences = old.iter().zip(rollout).map(|(old, rollout)| old - rollout);
    let log_weights: Vec<f64> = match config.level {
        ImportanceLevel::Token => differences.collect(),
        ImportanceLevel::Sequence => vec![differences.sum(); old.len()],
        ImportanceLevel::Geometric => vec![differences.sum::<f64>() / old.len() as f64; old.len()],
    };
    let mut weights = Weights::default();
    for log_weight in log_weights {
        let (kept, is_cut) = held(config, log_weight);
        weights.cut += usize::from(is_cut);
        weights.weight.push(kept);
    }
    weights
}

/// Applies the cap to a weight; also returns whether it changed.
pub(crate) fn held(config: &ImportanceWeights, log_weight: f64) -> (f64, bool) {
    let plain = log_weight.exp();
    let kept = match config.mode {
        ImportanceMode::Truncate => plain.min(config.cap),
        ImportanceMode::Mask if plain > config.cap || plain * config.cap < 1.0 => 0.0,
        ImportanceMode::Mask => plain,
    };
    (kept, kept != plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weighted(level: ImportanceLevel, mode: ImportanceMode, old: &[f64]) -> (Vec<f64>, usize) {
        let weights = weights(&ImportanceWeights { level, mode, cap: 2.0 }, old, &vec![0.0; old.len()]);
        (weights.weight, weights.cut)
    }

    #[test]
    fn large_weights_are_truncated_or_masked() {
        let old = [3f64.ln(), 0.0, 0.4f64.ln()];
        let (token, sequence) = (ImportanceLevel::Token, ImportanceLevel::Sequence);
        let (weight, cut) = weighted(token, ImportanceMode::Truncate, &old);
        assert_eq!((weight[0], weight[1], cut), (2.0, 1.0, 1));
        assert!((weight[2] - 0.4).abs() < 1e-12, "small weights stay when truncating");
        assert_eq!(weighted(token, ImportanceMode::Mask, &old), (vec![0.0, 1.0, 0.0], 2));
        let (weight, cut) = weighted(sequence, ImportanceMode::Mask, &old);
        assert!(weight.iter().all(|weight| (weight - 1.2).abs() < 1e-12) && cut == 0);
        assert_eq!(weighted(token, ImportanceMode::Truncate, &[1e4]), (vec![2.0], 1), "no overflow");
    }
}
