//! What training computes besides matrix products and attention. `T` tokens, `D` width, `F` feed-forward width, `C` rows of
//! logits, `V` vocabulary, `H` head.

use tch::{Device, Kind, Tensor};

use super::drawing::packed_logits;
use super::layer::{dimension, number, rows};
use super::{DeviceKernels, KernelError};
use crate::adamw::AdamW;

/// Blocks a multiprocessor for kernels that take their work in turns: enough to hide the latency of memory.
const BLOCKS_PER_PROCESSOR: usize = 4;
const THREADS: u32 = 256;
const WARP: usize = 32;

/// Where the copies of each row are, of rows that were picked by index.
#[derive(Debug)]
pub struct RowCopies {
    /// `[rows + 1]` int32: where in `copies` those of a row begin.
    starts: Tensor,
    /// Int32, those of a row in their order.
    copies: Tensor,
}

/// What rows of logits say of their targets.
#[derive(Debug)]
pub struct TargetScores {
    /// Log-probs of the targets, `[C]` float32 (nats).
    pub logprobs: Tensor,
    /// Entropies of the rows, `[C]` float32 (nats).
    pub entropies: Tensor,
    /// The gradient by the logits, where the slopes of a loss were given.
    pub by_logits: Option<Tensor>,
}

impl RowCopies {
    /// Of `rows` rows, picked by `index`.
    ///
    /// # Panics
    /// When the index names a row that is not there.
    #[must_use]
    pub fn new(index: &[i64], rows: usize, device: Device) -> Self {
        let mut starts = vec![0i32; rows + 1];
        index.iter().for_each(|row| starts[*row as usize + 1] += 1);
        for row in 0..rows {
            starts[row + 1] += starts[row];
        }
        let mut next = starts.clone();
        let mut copies = vec![0i32; index.len()];
        for (copy, row) in (0..).zip(index) {
            let place = &mut next[*row as usize];
            copies[*place as usize] = copy;
            *place += 1;
        }
        let upload = |numbers: &[i32]| Tensor::from_slice(numbers).to_device(device);
        Self { starts: upload(&starts), copies: upload(&copies) }
    }
}

impl DeviceKernels {
    /// For each row the sums of its copies in two tensors: the backward of picking rows by index. Summed in float32 and in
    /// one order, so that the result is the same every time.
    ///
    /// `tensors`: `[copies, ..]`, contiguous, of one size. Returns `[rows, ..]`.
    ///
    /// # Errors
    /// When the launch fails.
    ///
    /// # Panics
    /// When there are other copies than planned, or the tensors are none of these kernels.
    pub fn sum_copies(&self, tensors: [&Tensor; 2], copies: &RowCopies) -> Result<[Tensor; 2], KernelError> {
        let mut sizes = tensors[0].size();
        assert!(copies.copies.size() == sizes[..1], "{:?} copies, planned {:?}", sizes, copies.copies.size());
        for tensor in tensors {
            self.expect("copies", tensor, &sizes);
        }
        let width: i64 = sizes[1..].iter().product();
        sizes[0] = copies.starts.size()[0] - 1;
        let sums = tensors.map(|tensor| Tensor::empty(&sizes, (tensor.kind(), tensor.device())));
        let arguments = [
            tensors[0].into(),
            tensors[1].into(),
            (&copies.starts).into(),
            (&copies.copies).into(),
            (&sums[0]).into(),
            (&sums[1]).into(),
            number(width),
        ];
        let threads = dimension(width as usize).next_multiple_of(32).min(THREADS);
        self.run("sum_copies", [dimension(sizes[0] as usize), 2, 1], threads, &arguments)?;
        Ok(sums)
    }

    /// Backward of the norm that [`Self::add_rms_norm`] gives for `x`: the gradient by `x`, plus `past`, the gradient that flows
    /// past the norm, rounded once. Adds the gradient by the weight to `by_weight`.
    ///
    /// `x`, `gradient`, `past`: `[.., D]`, contiguous; `weight`: `[D]`; `by_weight`: `[D]` float32.
    ///
    /// # Errors
    /// When the launch fails.
    ///
    /// # Panics
    /// When the tensors do not fit each other or these kernels.
    pub fn rms_norm_backward(
        &self,
        x: &Tensor,
        weight: &Tensor,
        epsilon: f64,
        gradient: &Tensor,
        past: Option<&Tensor>,
        by_weight: &mut Tensor,
    ) -> Result<Tensor, KernelError> {
        let sizes = x.size();
        let width = *sizes.last().expect("rows have a width");
        self.expect("rows", x, &sizes);
        self.expect("a weight", weight, &[width]);
        self.expect("a gradient", gradient, &sizes);
        self.expect_kind("a gradient by a weight", by_weight, Kind::Float, &[width]);
        if let Some(past) = past {
            self.expect("a gradient", past, &sizes);
        }
        let by_x = x.empty_like();
        let packed = self.packed(width, [Some(x), Some(gradient), past, Some(&by_x)].into_iter().flatten());
        let rows = rows(x, width);
        let blocks = rows.min(self.many_blocks());
        let parts = Tensor::empty([i64::from(blocks), width], (Kind::Float, x.device()));
        let arguments = [
            x.into(),
            weight.into(),
            gradient.into(),
            past.into(),
            (&by_x).into(),
            (&parts).into(),
            number(i64::from(rows)),
            number(width),
            (epsilon as f32).into(),
            i32::from(packed).into(),
        ];
        self.run("rms_norm_backward", [blocks, 1, 1], self.threads(width, packed), &arguments)?;
        let columns = dimension((width as usize).div_ceil(WARP));
        let arguments = [(&parts).into(), (&*by_weight).into(), number(i64::from(blocks)), number(width)];
        self.run("add_column_sums", [columns, 1, 1], THREADS, &arguments)?;
        Ok(by_x)
    }

    /// Backward of [`Self::silu_gate`]: `gate_up` becomes the gradient by itself; returns the activation, `[T, F]`.
    ///
    /// `gate_up`: `[T, 2 F]`, `gradient`: `[T, F]`, contiguous.
    ///
    /// # Errors
    /// When the launch fails.
    ///
    /// # Panics
    /// When the tensors do not fit each other or these kernels.
    pub fn silu_gate_backward(&self, gate_up: &mut Tensor, gradient: &Tensor) -> Result<Tensor, KernelError> {
        let (tokens, width) = gradient.size2().expect("a gradient is a matrix");
        self.expect("gates and ups", gate_up, &[tokens, 2 * width]);
        self.expect("a gradient", gradient, &[tokens, width]);
        let activation = gradient.empty_like();
        let packed = self.packed(width, [&*gate_up, gradient, &activation].into_iter());
        let (threads, blocks) = self.columns(width, packed);
        let arguments =
            [(&*gate_up).into(), gradient.into(), (&activation).into(), number(width), i32::from(packed).into()];
        self.run("silu_gate_backward", [dimension(tokens as usize), blocks, 1], threads, &arguments)?;
        Ok(activation)
    }

    /// Turns heads in place by angles whose cosines and sines are `[T, H / 2]` float32.
    ///
    /// `x`: `[T, heads, H]`, the heads of a token side by side.
    ///
    /// # Errors
    /// When the launch fails.
    ///
    /// # Panics
    /// When the tensors do not fit each other or these kernels.
    pub fn rotate(&self, x: &mut Tensor, (cos, sin): (&Tensor, &Tensor), backwards: bool) -> Result<(), KernelError> {
        let (tokens, heads, width) = x.size3().expect("heads are [T, heads, H]");
        let strides = x.stride();
        assert!(
            x.kind() == self.kind()
                && x.device() == self.machine.device()
                && width as usize == self.shape().head_dim
                && strides[1..] == [width, 1],
            "heads {:?} with strides {strides:?}, {:?} {:?}",
            x.size(),
            x.kind(),
            x.device()
        );
        for angles in [cos, sin] {
            self.expect_kind("a rotation", angles, Kind::Float, &[tokens, width / 2]);
        }
        let direction: f32 = if backwards { -1.0 } else { 1.0 };
        let arguments = [(&*x).into(), cos.into(), sin.into(), number(heads), strides[0].into(), direction.into()];
        let threads = dimension((heads * width / 2) as usize).next_multiple_of(32).min(THREADS);
        self.run("rotate", [dimension(tokens as usize), 1, 1], threads, &arguments)
    }

    /// Log-prob of the target of every row and entropy of the row's distribution, `[C]` float32 each, in nats. Nothing is brought
    /// to the device, so that it is not waited for.
    ///
    /// With `slopes`, the derivatives of a loss by log-probs and, where it depends on them, by entropies, `[C]` float32 each,
    /// also the gradient by the logits, `[C, V]` in the kind of the model; see [`crate::target_gradient`].
    ///
    /// `logits`: `[C, V]` float32, contiguous, which a float32 gradient takes the place of; `targets`: `[C]` int64, each below
    /// `V`, which is not looked at here.
    ///
    /// # Errors
    /// When the launch fails.
    ///
    /// # Panics
    /// When the lengths differ, or the logits do not fit these kernels.
    pub fn target_scores(
        &self,
        logits: &Tensor,
        targets: &Tensor,
        slopes: Option<(&Tensor, Option<&Tensor>)>,
        temperature: f64,
    ) -> Result<TargetScores, KernelError> {
        let (count, vocabulary) = logits.size2().expect("logits are a matrix");
        self.expect_kind("logits", logits, Kind::Float, &[count, vocabulary]);
        self.expect_kind("targets", targets, Kind::Int64, &[count]);
        let by_logprob = slopes.map(|slopes| slopes.0);
        let by_entropy = slopes.and_then(|slopes| slopes.1);
        for slopes in by_logprob.into_iter().chain(by_entropy) {
            self.expect_kind("slopes", slopes, Kind::Float, &[count]);
        }
        let scores = [(); 2].map(|()| Tensor::empty([count], (Kind::Float, logits.device())));
        let by_logits = slopes.map(|_| match self.kind() {
            Kind::Float => logits.shallow_clone(),
            kind => Tensor::empty([count, vocabulary], (kind, logits.device())),
        });
        let packed = packed_logits(logits);
        let arguments = [
            logits.into(),
            by_logits.as_ref().into(),
            targets.into(),
            by_logprob.into(),
            by_entropy.into(),
            (&scores[0]).into(),
            (&scores[1]).into(),
            number(vocabulary),
            ((1.0 / temperature) as f32).into(),
            i32::from(packed).into(),
        ];
        let threads = self.threads(vocabulary, packed);
        self.run("target_scores", [dimension(count as usize), 1, 1], threads, &arguments)?;
        let [logprobs, entropies] = scores;
        Ok(TargetScores { logprobs, entropies, by_logits })
    }

    /// One update of flat float32 buffers of one length, as [`crate::adamw`] makes it: `weights` and both `moments` in place,
    /// from `gradients`; `compute` are the weights that a bfloat16 model computes with, and the index of the first one among all.
    ///
    /// # Errors
    /// When the launch fails.
    ///
    /// # Panics
    /// When a buffer differs in length or kind, or is not contiguous.
    pub fn adamw(
        &self,
        options: &AdamW,
        weights: &mut Tensor,
        moments: [&mut Tensor; 2],
        gradients: &Tensor,
        compute: Option<(&mut Tensor, usize)>,
    ) -> Result<(), KernelError> {
        let sizes = weights.size();
        for buffer in [&*weights, &*moments[0], &*moments[1], gradients] {
            self.expect_kind("a buffer", buffer, Kind::Float, &sizes);
        }
        if let Some((compute, _)) = &compute {
            self.expect_kind("weights", compute, Kind::BFloat16, &sizes);
        }
        let factors = options.factors();
        let count = weights.numel();
        let arguments = [
            (&*weights).into(),
            (&*moments[0]).into(),
            (&*moments[1]).into(),
            gradients.into(),
            compute.as_ref().map(|(compute, _)| &**compute).into(),
            (count as i64).into(),
            compute.as_ref().map_or(0, |(_, first)| *first as i64).into(),
            factors.keep.into(),
            factors.beta1.into(),
            factors.beta2.into(),
            factors.epsilon.into(),
            factors.step_size.into(),
            factors.root_correction.into(),
            factors.grad_scale.into(),
        ];
        let blocks = dimension(count.div_ceil(THREADS as usize)).min(2 * self.many_blocks());
        self.run("adamw", [blocks, 1, 1], THREADS, &arguments)
    }

    fn many_blocks(&self) -> u32 {
        dimension(BLOCKS_PER_PROCESSOR) * self.machine.processors()
    }
}
