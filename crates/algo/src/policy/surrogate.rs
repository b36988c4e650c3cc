use super::Clip;

/// The clipped surrogate of one ratio.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Surrogate {
    pub(crate) loss: f64,
    /// Derivative of the loss by the logarithm of the ratio.
    pub(crate) slope: f64,
    /// The bounded ratio decides.
    pub(crate) clipped: bool,
    /// The bound on negative advantages decides.
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
    let (clipped, loss) = (bounded > free, free.max(bounded));
    if let Some(dual) = clip.dual.filter(|dual| advantage < 0.0 && loss > -advantage * dual) {
        return Surrogate { loss: -advantage * dual, slope: 0.0, clipped, dual_clipped: true };
    }
    Surrogate { loss, slope: if clipped { 0.0 } else { free }, clipped, dual_clipped: false }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_moves_that_go_on_are_stopped() {
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
