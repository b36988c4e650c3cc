use crate::SampleId;

/// Mixes a 64-bit value so that every input bit changes about half of the output bits (the finaliser of SplitMix64,
/// Steele et al. 2014).
#[must_use]
pub fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The identity that a sample's noise is drawn from.
///
/// Noise is a function of the job seed, the sample and the token position alone, so a sample does not depend on the
/// worker that generates it, on its batch slot, or on how often its group was leased.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoiseKey(u64);

impl NoiseKey {
    /// The key of one sample of the job with `seed`. Evaluation rounds pass a `stream` of their own, so that they
    /// never share noise with training.
    #[must_use]
    pub fn new(seed: u64, stream: u64, sample: SampleId) -> Self {
        let mut key = mix(seed);
        for part in [stream, sample.group.0, u64::from(sample.index)] {
            key = mix(key ^ mix(part));
        }
        Self(key)
    }

    /// The key of the sample that takes the place of `attempt` samples that were replaced before; for 0, this key.
    #[must_use]
    pub fn attempt(self, attempt: u32) -> Self {
        match attempt {
            0 => self,
            // Counted from the top: positions, which are mixed in the same way, never get there.
            _ => Self(mix(self.0 ^ mix(!u64::from(attempt)))),
        }
    }

    /// The key as a number, for devices that count the noise themselves.
    #[must_use]
    pub fn bits(self) -> u64 {
        self.0
    }

    /// The uniform number in `[0, 1)` that picks the token at `position` of the answer.
    #[must_use]
    pub fn uniform(self, position: u64) -> f64 {
        // 53 bits: every value is exact in a double.
        (mix(self.0 ^ mix(position)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::GroupId;

    #[test]
    fn noise_is_uniform_and_depends_on_every_part() {
        let sample = |group, index| SampleId { group: GroupId(group), index };
        let n = 20_000;
        let mean = (0..n).map(|p| NoiseKey::new(1, 0, sample(3, 4)).uniform(p)).sum::<f64>() / n as f64;
        assert!((mean - 0.5).abs() < 0.01, "mean {mean}");
        let reference = NoiseKey::new(1, 0, sample(3, 4)).uniform(0);
        for other in [
            NoiseKey::new(2, 0, sample(3, 4)).uniform(0),
            NoiseKey::new(1, 1, sample(3, 4)).uniform(0),
            NoiseKey::new(1, 0, sample(4, 3)).uniform(0),
            NoiseKey::new(1, 0, sample(3, 5)).uniform(0),
            NoiseKey::new(1, 0, sample(3, 4)).uniform(1),
            NoiseKey::new(1, 0, sample(3, 4)).attempt(1).uniform(0),
            NoiseKey::new(1, 0, sample(3, 4)).attempt(2).uniform(0),
        ] {
            assert_ne!(reference, other);
        }
        assert_eq!(NoiseKey::new(1, 0, sample(3, 4)).attempt(0).uniform(0), reference);
    }
}
