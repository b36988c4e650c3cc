//! AdamW with float32 master weights over the flat parameter buffer.

use pacs_model::Parameters;
use pacs_spec::OptimizerSpec;
use pacs_torch::tch::{Device, Kind, Tensor, no_grad};
use pacs_torch::{AdamW, Decay, ViewError, adamw, bf16_mut, dithered_bf16, f32_mut, f32_ref, sum_of_squares};

/// Master weights and moments, each a flat float32 buffer in the layout of the parameters.
#[derive(Debug)]
pub(crate) struct Optimizer {
    /// `None` when the model computes in float32: its parameters are the master weights then.
    pub(crate) master: Option<Tensor>,
    pub(crate) moment1: Tensor,
    pub(crate) moment2: Tensor,
    /// Updates since the moments were zero; drives the bias correction.
    pub(crate) updates: u64,
    /// Updates since the job began; drives the learning rate.
    pub(crate) total_updates: u64,
}

impl Optimizer {
    /// Zero moments; master weights equal to the parameters.
    pub(crate) fn new(parameters: &Parameters) -> Self {
        let flat = &parameters.flat;
        let zeros = || Tensor::zeros(flat.size(), (Kind::Float, flat.device()));
        let master = (flat.kind() != Kind::Float).then(|| flat.to_kind(Kind::Float));
        Self { master, moment1: zeros(), moment2: zeros(), updates: 0, total_updates: 0 }
    }

    /// Forgets the moments.
    pub(crate) fn reset(&mut self) {
        let _ = self.moment1.zero_();
        let _ = self.moment2.zero_();
        self.updates = 0;
    }

    /// Applies one update to the parameters in place.
    pub(crate) fn update(
        &mut self,
        spec: &OptimizerSpec,
        learning_rate: f64,
        grad_scale: f64,
        gradients: &Tensor,
        parameters: &mut Parameters,
    ) -> Result<(), ViewError> {
        self.updates += 1;
        self.total_updates += 1;
        if parameters.flat.device() != Device::Cpu {
            no_grad(|| self.update_by_tensors(spec, learning_rate, grad_scale, gradients, parameters));
            return Ok(());
        }
        let options = AdamW {
            learning_rate: learning_rate as f32,
            beta1: spec.beta1 as f32,
            beta2: spec.beta2 as f32,
            epsilon: spec.epsilon as f32,
            weight_decay: spec.weight_decay as f32,
            update: self.updates,
            grad_scale: grad_scale as f32,
        };
        let (moment1, moment2) = (f32_mut(&mut self.moment1)?, f32_mut(&mut self.moment2)?);
        let gradients = f32_ref(gradients)?;
        match &mut self.master {
            Some(master) => {
                let compute = bf16_mut(&mut parameters.flat)?;
                adamw(&options, Decay::All, f32_mut(master)?, moment1, moment2, gradients, Some(compute));
            }
            None => adamw(&options, Decay::All, f32_mut(&mut parameters.flat)?, moment1, moment2, gradients, None),
        }
        Ok(())
    }

    /// The same update by tensor operations, for devices whose memory the host cannot see.
    fn update_by_tensors(
        &mut self,
        spec: &OptimizerSpec,
        learning_rate: f64,
        grad_scale: f64,
        gradients: &Tensor,
        parameters: &mut Parameters,
    ) {
        let exponent = i32::try_from(self.updates).unwrap_or(i32::MAX);
        let correction1 = 1.0 - spec.beta1.powi(exponent);
        let correction2 = 1.0 - spec.beta2.powi(exponent);
        let gradients = gradients * grad_scale;
        let _ = self.moment1.g_mul_scalar_(spec.beta1).g_add_(&(&gradients * (1.0 - spec.beta1)));
        let _ = self.moment2.g_mul_scalar_(spec.beta2).g_add_(&(gradients.square() * (1.0 - spec.beta2)));
        let denominator = self.moment2.sqrt() / correction2.sqrt() + spec.epsilon;
        let change = &self.moment1 / denominator * (learning_rate / correction1);
        let master = self.master.as_mut().unwrap_or(&mut parameters.flat);
        let _ = master.g_mul_scalar_(1.0 - learning_rate * spec.weight_decay).g_sub_(&change);
        if let Some(master) = &self.master {
            parameters.flat.copy_(&dithered_bf16(master));
        }
    }
}

/// Euclidean norm of a flat float32 buffer, summed in float64.
pub(crate) fn norm(gradients: &Tensor) -> Result<f64, ViewError> {
    if gradients.device() == Device::Cpu {
        return Ok(sum_of_squares(f32_ref(gradients)?).sqrt());
    }
    Ok(gradients.square().sum(Kind::Double).sqrt().double_value(&[]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pacs_model::ModelConfig;
    use std::path::Path;

    #[test]
    fn both_ways_of_updating_agree() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/qwen3");
        let config = ModelConfig::read(&folder).expect("golden model");
        let load = || Parameters::load(&folder, &config, Kind::Float, Device::Cpu).expect("golden model");
        let (mut first, mut second) = (load(), load());
        let (mut one, mut two) = (Optimizer::new(&first), Optimizer::new(&second));
        let spec = OptimizerSpec { learning_rate: 1e-2, ..OptimizerSpec::default() };
        for seed in 0..3 {
            pacs_torch::tch::manual_seed(seed);
            let gradients = Tensor::randn(first.flat.size(), (Kind::Float, Device::Cpu));
            one.update(&spec, 1e-2, 0.5, &gradients, &mut first).expect("host tensors");
            two.updates += 1;
            no_grad(|| two.update_by_tensors(&spec, 1e-2, 0.5, &gradients, &mut second));
        }
        let difference = (&first.flat - &second.flat).abs().max().double_value(&[]);
        assert!(difference < 1e-6, "the updates differ by {difference}");
    }
}
