// Legend: `T` tokens, `H` head.

use std::f64::consts::TAU;

use pacs_torch::tch::{Device, Kind, Tensor};
use pacs_torch::{by_rows, fixed_units};

use crate::ops::rotate;
use crate::{ModelConfig, RopeScaling};

/// Rotary position embedding of the rotate-half kind: element `i` of a head turns together with element `i + H / 2`.
#[derive(Debug)]
pub(crate) struct Rope {
    /// Angle per position, `[H / 2]` float32.
    frequencies: Tensor,
}

/// Cosines and sines of one forward pass, `[T, H / 2]` float32.
#[derive(Debug)]
pub(crate) struct Rotation {
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    pub(crate) fn new(config: &ModelConfig, device: Device) -> Self {
        let frequencies: Vec<f32> = frequencies(config).into_iter().map(|value| value as f32).collect();
        Self { frequencies: Tensor::from_slice(&frequencies).to_device(device) }
    }

    /// Angles in float32 whatever the kind of the model: bfloat16 cannot tell position 257 from 256.
    ///
    /// Computed anew in each forward, which costs less than gathering from a table at every length that matters.
    pub(crate) fn at(&self, positions: &Tensor) -> Rotation {
        let angles = positions.to_kind(Kind::Float).unsqueeze(-1) * &self.frequencies;
        let [cos, sin] = match fixed_units() {
            Some(units) => by_rows(&units, &angles, |angles| {
                let angles = angles.copy();
                [angles.cos(), angles.sin()]
            }),
            None => [angles.cos(), angles.sin()],
        };
        Rotation { cos, sin }
    }
}

impl Rotation {
    /// Cosines and sines.
    pub(crate) fn parts(&self) -> (&Tensor, &Tensor) {
        (&self.cos, &self.sin)
    }

    /// Turns every head of `x`, `[T, heads, H]`; takes it over.
    pub(crate) fn apply(&self, x: Tensor) -> Tensor {
        rotate(x, &self.cos, &self.sin, false)
    }

    /// Turns every head back, which is the backward of [`Rotation::apply`].
    pub(crate) fn undo(&self, x: Tensor) -> Tensor {
        rotate(x, &self.cos, &self.sin, true)
    }
}

fn frequencies(config: &ModelConfig) -> Vec<f64> {
    let base = (0..config.head_dim / 2).map(|i| config.rope_theta.powf(-2.0 * i as f64 / config.head_dim as f64));
    match config.rope_scaling {
        RopeScaling::None => base.collect(),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => base
            .map(|frequency| {
                // Waves that fit into the original context this many times.
                let turns = original_max_positions * frequency / TAU;
                let kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                frequency * (kept + (1.0 - kept) / factor)
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn llama3_scaling_has_three_branches() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/llama3");
        let mut config = ModelConfig::read(&dir).unwrap();
        let scaled = frequencies(&config);
        config.rope_scaling = RopeScaling::None;
        let plain = frequencies(&config);
        let ratios: Vec<f64> = plain.iter().zip(&scaled).map(|(plain, scaled)| plain / scaled).collect();
        assert_eq!(ratios.first().copied(), Some(1.0));
        assert!((ratios.last().unwrap() - 8.0).abs() < 1e-9);
        assert!(ratios.iter().any(|&ratio| ratio > 1.01 && ratio < 7.99), "{ratios:?}");
    }

    #[test]
    fn rotation_depends_on_distance_alone() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/qwen3");
        let config = ModelConfig::read(&dir).unwrap();
        let rope = Rope::new(&config, Device::Cpu);
        let x = Tensor::randn([1, 2, config.head_dim], (Kind::Float, Device::Cpu));
        let dot = |a: i64, b: i64| {
            let turned = rope.at(&Tensor::from_slice(&[a, b])).apply(x.expand([2, -1, -1], false).copy());
            f64::try_from((turned.get(0) * turned.get(1)).sum(Kind::Float)).unwrap()
        };
        assert!((dot(3, 10) - dot(103, 110)).abs() < 1e-3);
        assert!((dot(3, 10) - dot(3, 11)).abs() > 1e-3);
    }
}
