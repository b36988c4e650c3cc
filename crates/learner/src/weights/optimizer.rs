//! AdamW with float32 master weights over this rank's part of the parameters.

use pacs_spec::{OptimizerSpec, WeightDecayOn};
use pacs_torch::tch::{Device, Kind, Tensor, no_grad};
use pacs_torch::{
    AdamW, DeviceKernels, ViewError, adamw, bf16_mut, device_kernels, dithered_bf16, exact_to_f32, f32_mut, f32_ref,
    i64_ref,
};

use crate::comm::{Segment, part, zeros};

/// Elements per chunk where tensor operations allocate temporaries.
const CHUNK: usize = 1 << 26;

/// Elements of exact sums that are converted to floats at a time.
const EXACT_CHUNK: usize = 1 << 22;

/// Master weights and moments of this rank's part of the parameters, all float32.
#[derive(Debug)]
pub(crate) struct Optimizer {
    /// `None` if the model computes in float32: its weights are the master weights then.
    pub(crate) master: Option<Tensor>,
    pub(crate) moment1: Tensor,
    pub(crate) moment2: Tensor,
    /// Updates since the moments were last zero; drives the bias correction.
    pub(crate) updates: u64,
    /// Updates since the job began; drives the learning rate.
    pub(crate) total_updates: u64,
}

/// Parameters of one update, the same for all segments.
#[derive(Clone, Copy, Debug)]
pub(crate) struct UpdateStep<'a> {
    pub(crate) spec: &'a OptimizerSpec,
    pub(crate) learning_rate: f64,
    /// Factor applied to the gradient first, below 1 where it is clipped.
    pub(crate) grad_scale: f64,
}

/// A finite gradient norm, and what clipping makes of the gradient.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Clipped {
    /// Norm before clipping.
    pub(crate) norm: f64,
    /// Factor that brings the norm within its bound; 1 where it is within.
    pub(crate) scale: f64,
}

impl Clipped {
    /// Returns `None` for a norm that is not finite: the update is skipped, because AdamW's moments would stay NaN.
    pub(crate) fn new(norm: f64, spec: &OptimizerSpec) -> Option<Self> {
        let is_above = spec.max_grad_norm > 0.0 && norm > spec.max_grad_norm;
        let scale = if is_above { spec.max_grad_norm / (norm + 1e-6) } else { 1.0 };
        norm.is_finite().then_some(Self { norm, scale })
    }

    /// Whether the gradient is scaled.
    pub(crate) fn is_scaled(self) -> bool {
        self.scale < 1.0
    }
}

impl Optimizer {
    /// Allocates zero moments, and room for master weights unless `kind` is float32.
    pub(crate) fn new(elements: usize, kind: Kind, device: Device) -> Self {
        let zeros = || zeros(elements, device);
        let master = (kind != Kind::Float).then(zeros);
        Self { master, moment1: zeros(), moment2: zeros(), updates: 0, total_updates: 0 }
    }

    /// Zeroes the moments and restarts the bias correction.
    pub(crate) fn reset(&mut self) {
        let _ = self.moment1.zero_();
        let _ = self.moment2.zero_();
        self.updates = 0;
    }

    /// Applies one AdamW update in place; `of` returns the weights and the gradient of a segment.
    pub(crate) fn update(
        &mut self,
        step: &UpdateStep<'_>,
        segments: &[Segment],
        of: impl Fn(&Segment) -> (Tensor, Tensor),
    ) -> Result<(), ViewError> {
        self.updates += 1;
        self.total_updates += 1;
        for segment in segments {
            let (weights, gradient) = of(segment);
            let decays = segment.matrix || step.spec.weight_decay_on == WeightDecayOn::All;
            let weight_decay = if decays { step.spec.weight_decay } else { 0.0 };
            if let Some(kernels) = device_kernels() {
                self.update_on_device(&kernels, step, weight_decay, segment, weights, &gradient);
            } else if weights.device() == Device::Cpu {
                self.update_in_place(step, weight_decay, segment, weights, &gradient)?;
            } else {
                no_grad(|| self.update_by_tensors(step, weight_decay, segment, &weights, &gradient));
            }
        }
        Ok(())
    }

    fn update_in_place(
        &mut self,
        step: &UpdateStep<'_>,
        weight_decay: f64,
        segment: &Segment,
        mut weights: Tensor,
        gradient: &Tensor,
    ) -> Result<(), ViewError> {
        let options = self.options(step, weight_decay);
        let own = |tensor: &Tensor| part(tensor, segment.shard, segment.len);
        let mut moment1 = own(&self.moment1);
        let mut moment2 = own(&self.moment2);
        let moment1 = f32_mut(&mut moment1)?;
        let moment2 = f32_mut(&mut moment2)?;
        if gradient.kind() == Kind::Int64 {
            // Converted piece by piece, so that no second gradient is in memory. The update is element-wise, so pieces
            // do not change it.
            let mut floats = vec![0.0; EXACT_CHUNK.min(segment.len)];
            for start in (0..segment.len).step_by(EXACT_CHUNK) {
                let len = EXACT_CHUNK.min(segment.len - start);
                let Segment { shard, place, index, .. } = *segment;
                let piece =
                    Segment { shard: shard + start, place: place + start, index: index + start, len, ..*segment };
                exact_to_f32(i64_ref(&part(gradient, start, len))?, &mut floats[..len]);
                let gradient = Tensor::from_slice(&floats[..len]);
                self.update_in_place(step, weight_decay, &piece, part(&weights, start, len), &gradient)?;
            }
            return Ok(());
        }
        let gradient = f32_ref(gradient)?;
        match &self.master {
            Some(master) => {
                let compute = Some((bf16_mut(&mut weights)?, segment.index));
                adamw(&options, f32_mut(&mut own(master))?, moment1, moment2, gradient, compute);
            }
            None => adamw(&options, f32_mut(&mut weights)?, moment1, moment2, gradient, None),
        }
        Ok(())
    }

    /// The same update by a GPU kernel.
    fn update_on_device(
        &self,
        kernels: &DeviceKernels,
        step: &UpdateStep<'_>,
        weight_decay: f64,
        segment: &Segment,
        mut weights: Tensor,
        gradient: &Tensor,
    ) {
        let options = self.options(step, weight_decay);
        let own = |tensor: &Tensor| part(tensor, segment.shard, segment.len);
        let mut moment1 = own(&self.moment1);
        let mut moment2 = own(&self.moment2);
        let moments = [&mut moment1, &mut moment2];
        let updated = match &self.master {
            Some(master) => {
                kernels.adamw(&options, &mut own(master), moments, gradient, Some((&mut weights, segment.index)))
            }
            None => kernels.adamw(&options, &mut weights, moments, gradient, None),
        };
        updated.expect("a device that refuses a kernel computes nothing afterwards");
    }

    fn options(&self, step: &UpdateStep<'_>, weight_decay: f64) -> AdamW {
        AdamW {
            learning_rate: step.learning_rate as f32,
            beta1: step.spec.beta1 as f32,
            beta2: step.spec.beta2 as f32,
            epsilon: step.spec.epsilon as f32,
            weight_decay: weight_decay as f32,
            update: self.updates,
            grad_scale: step.grad_scale as f32,
        }
    }

    /// The same update by tensor operations, for devices without kernels.
    fn update_by_tensors(
        &self,
        step: &UpdateStep<'_>,
        weight_decay: f64,
        segment: &Segment,
        weights: &Tensor,
        gradient: &Tensor,
    ) {
        let spec = step.spec;
        let exponent = i32::try_from(self.updates).unwrap_or(i32::MAX);
        let correction1 = 1.0 - spec.beta1.powi(exponent);
        let correction2 = 1.0 - spec.beta2.powi(exponent);
        for start in (0..segment.len).step_by(CHUNK) {
            let len = CHUNK.min(segment.len - start);
            let own = |tensor: &Tensor| part(tensor, segment.shard + start, len);
            let gradient = part(gradient, start, len) * step.grad_scale;
            let mut moment1 = own(&self.moment1);
            let mut moment2 = own(&self.moment2);
            let _ = moment1.g_mul_scalar_(spec.beta1).g_add_(&(&gradient * (1.0 - spec.beta1)));
            let _ = moment2.g_mul_scalar_(spec.beta2).g_add_(&(gradient.square() * (1.0 - spec.beta2)));
            let denominator = moment2.sqrt() / correction2.sqrt() + spec.epsilon;
            let change = &moment1 / denominator * (step.learning_rate / correction1);
            let mut weights = part(weights, start, len);
            let keep = 1.0 - step.learning_rate * weight_decay;
            match &self.master {
                Some(master) => {
                    let mut master = own(master);
                    let _ = master.g_mul_scalar_(keep).g_sub_(&change);
                    weights.copy_(&dithered_bf16(&master, segment.index + start));
                }
                None => {
                    let _ = weights.g_mul_scalar_(keep).g_sub_(&change);
                }
            }
        }
    }
}

/// Sums the squares of a flat float32 buffer in float64.
pub(crate) fn sum_of_squares(values: &Tensor) -> Result<f64, ViewError> {
    if values.device() == Device::Cpu {
        return Ok(pacs_torch::sum_of_squares(f32_ref(values)?));
    }
    let chunks = (0..values.numel()).step_by(CHUNK);
    let squares = |start| part(values, start, CHUNK.min(values.numel() - start)).square().sum(Kind::Double);
    Ok(chunks.map(|start| squares(start).double_value(&[])).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_of_updating_agree_and_decay_what_they_should() {
        let n = 1000;
        let spec = |weight_decay_on| OptimizerSpec {
            learning_rate: 1e-2,
            weight_decay: 0.5,
            weight_decay_on,
            ..OptimizerSpec::default()
        };
        let segment = |start, len, matrix| Segment { shard: start, place: start, index: start, len, matrix };
        let segments = [segment(0, 600, true), segment(600, 400, false)];
        pacs_torch::tch::manual_seed(1);
        let start = Tensor::randn([n], (Kind::Float, Device::Cpu));
        let gradients: Vec<Tensor> = (0..3).map(|_| Tensor::randn([n], (Kind::Float, Device::Cpu))).collect();
        let mut results = Vec::new();
        for decay_on in [WeightDecayOn::All, WeightDecayOn::Matrices] {
            let spec = spec(decay_on);
            let step = UpdateStep { spec: &spec, learning_rate: 1e-2, grad_scale: 0.5 };
            let (first, second) = (start.copy(), start.copy());
            let mut one = Optimizer::new(n as usize, Kind::Float, Device::Cpu);
            let mut two = Optimizer::new(n as usize, Kind::Float, Device::Cpu);
            for gradient in &gradients {
                let of = |flat: &Tensor, segment: &Segment| part(flat, segment.place, segment.len);
                one.update(&step, &segments, |segment| (of(&first, segment), of(gradient, segment))).expect("host");
                two.updates += 1;
                for segment in &segments {
                    let decays = segment.matrix || decay_on == WeightDecayOn::All;
                    let decay = if decays { 0.5 } else { 0.0 };
                    let (weights, gradient) = (of(&second, segment), of(gradient, segment));
                    no_grad(|| two.update_by_tensors(&step, decay, segment, &weights, &gradient));
                }
            }
            let difference = (&first - &second).abs().max().double_value(&[]);
            assert!(difference < 1e-6, "the updates differ by {difference}");
            results.push(first);
        }
        let apart = (&results[0] - &results[1]).abs();
        assert_eq!(apart.narrow(0, 0, 600).max().double_value(&[]), 0.0);
        assert!(apart.narrow(0, 600, 400).max().double_value(&[]) > 1e-3, "a norm decays like a matrix");
    }
}
