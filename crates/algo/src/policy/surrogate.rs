use super::{Clip, Divergence, PolicyConfig, Surrogate as Kind};

/// Inputs of a token's surrogate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Ratio {
    /// New log-prob minus the one that the ratio compares with (nats).
    pub(crate) log_ratio: f64,
    /// New log-prob (nats).
    pub(crate) new: f64,
}

impl PolicyConfig {
    /// Computes the surrogate of a token, of the configured kind.
    pub(crate) fn surrogate(&self, advantage: f64, ratio: Ratio) -> Surrogate {
        match self.surrogate {
            Kind::Clipped => surrogate(&self.clip, advantage, ratio.log_ratio),
            Kind::Weighted => weighted(&self.clip, advantage, ratio),
            Kind::Masked { divergence, cap } => masked(&self.clip, divergence, cap, advantage, ratio),
        }
    }
}

/// `-A sg(clamp(r)) ln p` (CISPO, arXiv 2506.13585, eq. 4 and 5).
fn weighted(clip: &Clip, advantage: f64, Ratio { log_ratio, new }: Ratio) -> Surrogate {
    if advantage == 0.0 {
        return Surrogate::default();
    }
    let ratio = log_ratio.exp();
    let weight = ratio.clamp(1.0 - clip.low, 1.0 + clip.high);
    let slope = -advantage * weight;
    Surrogate { loss: slope * new, slope, clipped: weight != ratio, dual_clipped: false }
}

/// `-A sg(min(r, cap)) ln p`, unless the probability has moved too far in the direction of the advantage (DPPO, arXiv
/// 2602.04879, the binary masks).
fn masked(clip: &Clip, divergence: Divergence, cap: f64, advantage: f64, Ratio { log_ratio, new }: Ratio) -> Surrogate {
    if advantage == 0.0 {
        return Surrogate::default();
    }
    let now = new.exp();
    let before = (new - log_ratio).exp();
    let (limit, goes_on) = if advantage > 0.0 { (clip.high, now > before) } else { (clip.low, now < before) };
    let distance = match divergence {
        Divergence::Tv => (now - before).abs(),
        Divergence::Kl => binary_kl(before, now, log_ratio),
    };
    if goes_on && distance > limit {
        return Surrogate { clipped: true, ..Surrogate::default() };
    }
    let slope = -advantage * log_ratio.exp().min(cap);
    Surrogate { loss: slope * new, slope, clipped: false, dual_clipped: log_ratio.exp() > cap }
}

/// Divergence of two distributions with two outcomes, the token and all others.
fn binary_kl(before: f64, now: f64, log_ratio: f64) -> f64 {
    let others = 1.0 - before;
    // With no probability left for the others, their term has the limit 0.
    let of_others = if others > 0.0 { others * (others.ln() - (1.0 - now).ln()) } else { 0.0 };
    -before * log_ratio + of_others
}

/// Loss and derivative of one token's surrogate.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Surrogate {
    pub(crate) loss: f64,
    /// Derivative of the loss by the logarithm of the ratio.
    pub(crate) slope: f64,
    /// Whether the loss is that of the clipped ratio.
    pub(crate) clipped: bool,
    /// Whether the loss is that of the dual clip.
    pub(crate) dual_clipped: bool,
}

/// `max(-A r, -A clamp(r))`, for a negative advantage at most `-A c` (PPO, Schulman et al. 2017; the second bound is
/// the dual clip of Ye et al. 2020).
pub(crate) fn surrogate(clip: &Clip, advantage: f64, log_ratio: f64) -> Surrogate {
    if advantage == 0.0 {
        return Surrogate::default();
    }
    let ratio = log_ratio.exp();
    let free = -advantage * ratio;
    let bounded = -advantage * ratio.clamp(1.0 - clip.low, 1.0 + clip.high);
    let clipped = bounded > free;
    let loss = free.max(bounded);
    if let Some(dual) = clip.dual.filter(|dual| advantage < 0.0 && loss > -advantage * dual) {
        return Surrogate { loss: -advantage * dual, slope: 0.0, clipped, dual_clipped: true };
    }
    Surrogate { loss, slope: if clipped { 0.0 } else { free }, clipped, dual_clipped: false }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_looks_at_probabilities_and_at_where_they_go() {
        let clip = Clip { low: 0.2, high: 0.2, dual: None };
        let at = |divergence, advantage: f64, before: f64, now: f64| {
            masked(&clip, divergence, 20.0, advantage, Ratio { log_ratio: (now / before).ln(), new: now.ln() })
        };
        // A ratio of 100 is a small distance for a rare token; a ratio of 1.8 is a large one for a likely token.
        assert!(!at(Divergence::Tv, 1.0, 0.001, 0.1).clipped && at(Divergence::Tv, 1.0, 0.5, 0.9).clipped);
        assert_eq!(at(Divergence::Tv, 1.0, 0.001, 0.1).slope, -20.0, "held by the cap");
        assert!(!at(Divergence::Tv, 1.0, 0.9, 0.5).clipped, "it comes back");
        assert!(at(Divergence::Tv, -1.0, 0.9, 0.5).clipped && !at(Divergence::Tv, -1.0, 0.5, 0.9).clipped);
        assert!(at(Divergence::Kl, 1.0, 0.5, 0.9).clipped && !at(Divergence::Kl, 1.0, 0.5, 0.6).clipped);
        assert!(
            (binary_kl(0.2, 0.3, 1.5f64.ln()) - (0.2 * (2.0f64 / 3.0).ln() + 0.8 * (8.0f64 / 7.0).ln())).abs() < 1e-12
        );
    }

    #[test]
    fn a_weighted_token_pulls_beyond_its_bounds() {
        let clip = Clip { low: 1.0, high: 4.0, dual: None };
        let at = |ratio: f64| weighted(&clip, 2.0, Ratio { log_ratio: ratio.ln(), new: -0.5 });
        assert!((at(9.0).slope + 10.0).abs() < 1e-12 && at(9.0).clipped && (at(9.0).loss - 5.0).abs() < 1e-12);
        assert!((at(0.01).slope + 0.02).abs() < 1e-12 && !at(0.01).clipped, "no lower bound");
    }

    #[test]
    fn only_ongoing_moves_are_stopped() {
        let clip = Clip { low: 0.2, high: 0.3, dual: Some(3.0) };
        let at = |advantage: f64, ratio: f64| surrogate(&clip, advantage, ratio.ln());
        assert_eq!((at(1.0, 2.0).loss, at(1.0, 2.0).slope, at(1.0, 2.0).clipped), (-1.3, 0.0, true));
        assert!((at(1.0, 0.5).slope + 0.5).abs() < 1e-12, "a good token that became rarer still pulls");
        assert_eq!((at(-1.0, 0.5).loss, at(-1.0, 0.5).slope), (0.8, 0.0));
        assert!((at(-1.0, 2.0).slope - 2.0).abs() < 1e-12);
        assert!(at(-1.0, 5.0).dual_clipped && at(-1.0, 5.0).loss == 3.0);
        let free = Clip { dual: None, ..clip };
        assert!((surrogate(&free, -1.0, 5f64.ln()).loss - 5.0).abs() < 1e-12);
        assert_eq!(surrogate(&clip, 0.0, 1e6), Surrogate::default(), "no advantage, no overflow");
        assert_eq!(surrogate(&clip, 1.0, 1e6).loss, -1.3);
    }
}
