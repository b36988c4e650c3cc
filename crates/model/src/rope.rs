// Legend: `T` tokens, `H` head, `R` elements of a head that are rotated.

use std::f64::consts::TAU;

use pacs_torch::tch::{Device, Tensor};
use pacs_torch::{by_rows, fixed_units};

use crate::ops::rotate;
use crate::{ModelConfig, RopeScaling, Rotary};

/// The rotary position embeddings of a model, of the rotate-half kind: element `i` of a head turns together with element
/// `i + R / 2`, and those from `R` on stay.
#[derive(Debug)]
pub(crate) struct Ropes(Vec<Rope>);

#[derive(Debug)]
struct Rope {
    /// Angle per position, `[R / 2]` float32.
    frequencies: Tensor,
    /// Cosines and sines are multiplied by it.
    magnitude: f64,
}

/// Cosines and sines of one forward pass, `[T, R / 2]` float32.
#[derive(Debug)]
pub(crate) struct Rotation {
    cos: Tensor,
    sin: Tensor,
}

impl Ropes {
    /// Those of [`ModelConfig::rotary`], then the identity where some layer does not rotate.
    pub(crate) fn new(config: &ModelConfig, device: Device) -> Self {
        let rope = |frequencies: Vec<f64>, magnitude| {
            let frequencies: Vec<f32> = frequencies.into_iter().map(|value| value as f32).collect();
            Rope { frequencies: Tensor::from_slice(&frequencies).to_device(device), magnitude }
        };
        let mut ropes: Vec<Rope> =
            config.rotary.iter().map(|rotary| rope(frequencies(rotary, config.head_dim), magnitude(rotary))).collect();
        if (0..config.layers).any(|layer| config.layer_kind(layer).rotary.is_none()) {
            ropes.push(rope(vec![0.0; config.head_dim as usize / 2], 1.0));
        }
        Self(ropes)
    }

    /// The rotations of a pass, one a rotary embedding.
    pub(crate) fn at(&self, positions: &Tensor) -> Vec<Rotation> {
        self.0.iter().map(|rope| rope.at(positions)).collect()
    }
}

impl Rope {
    /// Angles in float32 whatever the kind of the model: bfloat16 cannot tell position 257 from 256.
    ///
    /// Computed anew in each forward, which costs less than gathering from a table at every length that matters.
    fn at(&self, positions: &Tensor) -> Rotation {
        let angles = positions.to_kind(pacs_torch::tch::Kind::Float).unsqueeze(-1) * &self.frequencies;
        let [cos, sin] = match fixed_units() {
            Some(units) => by_rows(&units, &angles, |angles| {
                let angles = angles.copy();
                [angles.cos(), angles.sin()]
            }),
            None => [angles.cos(), angles.sin()],
        };
        if self.magnitude == 1.0 {
            return Rotation { cos, sin };
        }
        Rotation { cos: cos * self.magnitude, sin: sin * self.magnitude }
    }
}

impl Rotation {
    /// Cosines and sines.
    pub(crate) fn parts(&self) -> (&Tensor, &Tensor) {
        (&self.cos, &self.sin)
    }

    /// Turns every head of `x`, `[T, heads, H]`; takes it over.
    pub(crate) fn apply(&self, x: Tensor) -> Tensor {
        self.turn(x, false)
    }

    /// The backward of [`Rotation::apply`], which is a turn back, by the same magnitude.
    pub(crate) fn undo(&self, x: Tensor) -> Tensor {
        self.turn(x, true)
    }

    fn turn(&self, x: Tensor, backwards: bool) -> Tensor {
        let (width, rotated) = (x.size()[2], 2 * self.cos.size()[1]);
        if rotated == width {
            return rotate(x, &self.cos, &self.sin, backwards);
        }
        let turned = rotate(x.narrow(2, 0, rotated).contiguous(), &self.cos, &self.sin, backwards);
        Tensor::cat(&[turned, x.narrow(2, rotated, width - rotated)], 2)
    }
}

fn magnitude(rotary: &Rotary) -> f64 {
    match rotary.scaling {
        RopeScaling::LongRope { magnitude, .. } => magnitude,
        RopeScaling::None | RopeScaling::Linear { .. } | RopeScaling::Llama3 { .. } => 1.0,
    }
}

fn frequencies(rotary: &Rotary, head_dim: i64) -> Vec<f64> {
    let width = rotary.width(head_dim);
    let base = (0..width / 2).map(|i| rotary.theta.powf(-2.0 * i as f64 / width as f64));
    match &rotary.scaling {
        RopeScaling::None => base.collect(),
        RopeScaling::Linear { factor } => base.map(|frequency| frequency / factor).collect(),
        RopeScaling::LongRope { factors, .. } => {
            base.zip(factors).map(|(frequency, factor)| frequency / factor).collect()
        }
        &RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => base
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
    use pacs_torch::tch::Kind;
    use std::path::Path;

    fn golden(name: &str) -> ModelConfig {
        ModelConfig::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models").join(name)).unwrap()
    }

    #[test]
    fn llama3_scaling_has_three_branches() {
        let config = golden("llama3");
        let [rotary] = &config.rotary[..] else { panic!("{:?}", config.rotary) };
        let scaled = frequencies(rotary, config.head_dim);
        let plain = frequencies(&Rotary::plain(rotary.theta), config.head_dim);
        let ratios: Vec<f64> = plain.iter().zip(&scaled).map(|(plain, scaled)| plain / scaled).collect();
        assert_eq!(ratios.first().copied(), Some(1.0));
        assert!((ratios.last().unwrap() - 8.0).abs() < 1e-9);
        assert!(ratios.iter().any(|&ratio| ratio > 1.01 && ratio < 7.99), "{ratios:?}");
    }

    #[test]
    fn rotation_depends_on_distance_alone() {
        // All of a head, and a part of it.
        for name in ["qwen3", "phi3"] {
            let config = golden(name);
            let ropes = Ropes::new(&config, Device::Cpu);
            let x = Tensor::randn([1, 2, config.head_dim], (Kind::Float, Device::Cpu));
            let dot = |a: i64, b: i64| {
                let turned = ropes.at(&Tensor::from_slice(&[a, b]))[0].apply(x.expand([2, -1, -1], false).copy());
                f64::try_from((turned.get(0) * turned.get(1)).sum(Kind::Float)).unwrap()
            };
            assert!((dot(3, 10) - dot(103, 110)).abs() < 1e-3, "{name}");
            assert!((dot(3, 10) - dot(3, 11)).abs() > 1e-3, "{name}");
        }
    }

    #[test]
    fn layers_that_do_not_rotate_leave_heads_to_the_last_bit() {
        let config = golden("smollm3");
        let rotations = Ropes::new(&config, Device::Cpu).at(&Tensor::from_slice(&[0_i64, 7, 90]));
        let x = Tensor::randn([3, 2, config.head_dim], (Kind::Float, Device::Cpu));
        assert_eq!(rotations.len(), 2);
        assert!(rotations[1].apply(x.copy()).equal(&x) && !rotations[0].apply(x.copy()).equal(&x));
    }
}
