//! The small operations of a layer and their backward: fused kernels in host memory, those of a device where its user has put
//! them in place, tensor operations elsewhere.
// Legend: `T` tokens, `D` width, `F` width of the feed-forward block, `H` head.

use pacs_shape::Activation;
use pacs_torch::tch::{Kind, Tensor};
use pacs_torch::{
    KernelError, Units, ViewError, accumulate, add_product, by_rows, device_kernels, fixed_units, has_kernels,
};

/// States why a kernel cannot refuse its tensors: they were made here.
fn fused<T>(result: Result<T, ViewError>) -> T {
    result.expect("the tensors of a layer are contiguous and of one kind")
}

/// States why a launch cannot be refused.
pub(crate) fn launched<T>(result: Result<T, KernelError>) -> T {
    result.expect("the kernels are those of this model, and a device that refuses them computes nothing afterwards")
}

/// `x W^T + b` of the rows of a pass; unit by unit within [`pacs_torch::with_units`], as all products here.
pub(crate) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    match fixed_units() {
        Some(units) => pacs_torch::linear(&units, x, weight, bias),
        None => x.linear(weight, bias),
    }
}

/// `x W` of the rows of a pass.
pub(crate) fn matmul(x: &Tensor, weight: &Tensor) -> Tensor {
    match fixed_units() {
        Some(units) => pacs_torch::matmul(&units, x, weight),
        None => x.matmul(weight),
    }
}

/// Adds the gradient of a matrix to `slot`, over the rows of a pass: `gradient` by its output, `input` it was applied to.
pub(crate) fn add_weight_gradient(slot: &mut Tensor, gradient: &Tensor, input: &Tensor) {
    match fixed_units() {
        Some(units) => fused(pacs_torch::add_weight_gradient(&units, slot, gradient, input)),
        None => fused(add_product(slot, gradient, input)),
    }
}

/// Adds the sum over the rows of a pass to `slot`.
pub(crate) fn add_column_sums(slot: &mut Tensor, rows: &Tensor) {
    match fixed_units() {
        Some(units) => fused(pacs_torch::add_column_sums(&units, slot, rows)),
        None => fused(accumulate(slot, &rows.sum_dim_intlist(0, false, wide(rows.kind())))),
    }
}

/// Adds rows to those rows of `slot` that `index` names.
pub(crate) fn add_rows(slot: &mut Tensor, index: &Tensor, rows: &Tensor) {
    if slot.kind() == Kind::Int64 {
        return fused(pacs_torch::add_rows_exact(slot, index, &rows.contiguous()));
    }
    let _ = slot.index_add_(0, index, &rows.to_kind(slot.kind()));
}

/// Root-mean-square norm over the last dimension, with statistics in float32 at least.
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f64) -> Tensor {
    if has_kernels(x) {
        return fused(pacs_torch::rms_norm(&x.contiguous(), weight, epsilon));
    }
    if let Some(kernels) = device_kernels() {
        return launched(kernels.add_rms_norm(&x.contiguous(), None, weight, epsilon)).1;
    }
    x.rms_norm(weight.size(), Some(weight), epsilon)
}

/// `x + y` and its norm.
pub(crate) fn add_rms_norm(x: &Tensor, y: &Tensor, weight: &Tensor, epsilon: f64) -> (Tensor, Tensor) {
    if has_kernels(x) {
        return fused(pacs_torch::add_rms_norm(x, y, weight, epsilon));
    }
    if let Some(kernels) = device_kernels() {
        return launched(kernels.add_rms_norm(x, Some(y), weight, epsilon));
    }
    let sum = x + y;
    let normed = rms_norm(&sum, weight, epsilon);
    (sum, normed)
}

/// Backward of [`rms_norm`]: adds to `weight_gradient` (`[D]`), returns the gradient by `x` plus `past`, the gradient
/// that flows past the norm.
pub(crate) fn rms_norm_backward(
    x: &Tensor,
    weight: &Tensor,
    epsilon: f64,
    gradient: &Tensor,
    past: Option<&Tensor>,
    weight_gradient: &mut Tensor,
) -> Tensor {
    if has_kernels(x) {
        let (x, gradient) = (x.contiguous(), gradient.contiguous());
        return fused(pacs_torch::rms_norm_backward(&x, weight, epsilon, &gradient, past, weight_gradient));
    }
    if let Some(kernels) = device_kernels() {
        let (x, gradient) = (x.contiguous(), gradient.contiguous());
        return launched(kernels.rms_norm_backward(&x, weight, epsilon, &gradient, past, weight_gradient));
    }
    let kind = wide(x.kind());
    let (wide_x, slope) = (x.to_kind(kind), gradient.to_kind(kind));
    let scale = (wide_x.square().mean_dim(-1, true, kind) + epsilon).rsqrt();
    let unit = &wide_x * &scale;
    let by_weight = (&slope * &unit).flatten(0, -2).sum_dim_intlist(0, false, kind);
    fused(accumulate(weight_gradient, &by_weight));
    let slope = slope * weight.to_kind(kind);
    let along = (&slope * &unit).mean_dim(-1, true, kind);
    let by_x = ((slope - unit * along) * scale).to_kind(x.kind());
    past.map_or_else(|| by_x.shallow_clone(), |past| &by_x + past)
}

/// `activation(gate) * up` of `[T, 2 F]`, gates first. Returns `[T, F]`.
pub(crate) fn gate(activation: Activation, gate_up: &Tensor) -> Tensor {
    match activation {
        Activation::Silu => silu_gate(gate_up),
        Activation::GeluTanh => {
            let [gated] = row_by_row(gate_up, |gate_up| {
                let [gate, up] = halves(&gate_up);
                [gate.gelu("tanh") * up]
            });
            gated
        }
    }
}

/// Backward of [`gate`]: the gradient by `gate_up`, which it takes over, and the gated activation once more.
pub(crate) fn gate_backward(activation: Activation, gate_up: Tensor, gradient: &Tensor) -> (Tensor, Tensor) {
    match activation {
        Activation::Silu => silu_gate_backward(gate_up, gradient),
        Activation::GeluTanh => {
            let kind = gate_up.kind();
            let width = gradient.size()[1];
            let all = Tensor::cat(&[&gate_up, gradient], 1).to_kind(wide(kind));
            drop(gate_up);
            let [by_gate_up, gated] = row_by_row(&all, |all| {
                let [gate, up, slope] = [0, 1, 2].map(|part| all.narrow(1, part * width, width).contiguous());
                let gelu = gate.gelu("tanh");
                let by_gate = gate.gelu_backward(&(&slope * &up), "tanh");
                [Tensor::cat(&[by_gate, slope * &gelu], 1).to_kind(kind), (gelu * up).to_kind(kind)]
            });
            (by_gate_up, gated)
        }
    }
}

/// `cap tanh(x / cap)` of logits `[C, V]`, rows of one unit within [`pacs_torch::with_units`].
pub(crate) fn capped(x: &Tensor, cap: f64) -> Tensor {
    let cap_rows = |x: Tensor| [(x / cap).tanh() * cap];
    let [capped] = match fixed_units() {
        Some(_) => by_rows(&Units::new(&[x.size()[0] as usize]), x, |rows| cap_rows(rows.copy())),
        None => cap_rows(x.shallow_clone()),
    };
    capped
}

/// Functions of single numbers whose last bits depend on where these stand in a vector register: tile by tile within
/// [`pacs_torch::with_units`].
pub(crate) fn row_by_row<const N: usize>(x: &Tensor, work: impl Fn(Tensor) -> [Tensor; N] + Sync) -> [Tensor; N] {
    match fixed_units() {
        Some(units) => by_rows(&units, x, |rows| work(rows.copy())),
        None => work(x.shallow_clone()),
    }
}

/// `silu(gate) * up` of `[T, 2 F]`, gates first. Returns `[T, F]`.
fn silu_gate(gate_up: &Tensor) -> Tensor {
    if has_kernels(gate_up) {
        return fused(pacs_torch::silu_gate(gate_up));
    }
    if let Some(kernels) = device_kernels() {
        return launched(kernels.silu_gate(gate_up));
    }
    let [gate, up] = halves(gate_up);
    gate.silu() * up
}

/// Backward of [`silu_gate`]: the gradient by `gate_up`, which it takes over, and the activation once more.
fn silu_gate_backward(mut gate_up: Tensor, gradient: &Tensor) -> (Tensor, Tensor) {
    if has_kernels(&gate_up) {
        let activation = fused(pacs_torch::silu_gate_backward(&mut gate_up, gradient));
        return (gate_up, activation);
    }
    if let Some(kernels) = device_kernels() {
        let activation = launched(kernels.silu_gate_backward(&mut gate_up, gradient));
        return (gate_up, activation);
    }
    let kind = wide(gate_up.kind());
    let [gate, up] = halves(&gate_up).map(|half| half.to_kind(kind));
    let slope = gradient.to_kind(kind);
    let sigmoid = gate.sigmoid();
    let silu = &gate * &sigmoid;
    let by_gate = &slope * &up * (&sigmoid + &silu * (1.0 - &sigmoid));
    let by_up = &slope * &silu;
    let narrow = |x: Tensor| x.to_kind(gradient.kind());
    (narrow(Tensor::cat(&[by_gate, by_up], -1)), narrow(silu * up))
}

/// Turns heads `[T, heads, H]` by angles whose `cos` and `sin` are `[T, H / 2]` float32; the result may be `x` itself.
pub(crate) fn rotate(mut x: Tensor, cos: &Tensor, sin: &Tensor, backwards: bool) -> Tensor {
    if has_kernels(&x) {
        fused(pacs_torch::rotate(&mut x, cos, sin, backwards));
        return x;
    }
    if let Some(kernels) = device_kernels() {
        launched(kernels.rotate(&mut x, (cos, sin), backwards));
        return x;
    }
    let (cos, sin) = (cos.to_kind(wide(x.kind())).unsqueeze(1), sin.to_kind(wide(x.kind())).unsqueeze(1));
    let sin = if backwards { -sin } else { sin };
    let parts = x.chunk(2, -1);
    let turned = [&parts[0] * &cos - &parts[1] * &sin, &parts[1] * &cos + &parts[0] * &sin];
    Tensor::cat(&turned, -1).to_kind(x.kind())
}

/// Kind that sums are taken in.
fn wide(kind: Kind) -> Kind {
    if kind == Kind::Double { Kind::Double } else { Kind::Float }
}

fn halves(x: &Tensor) -> [Tensor; 2] {
    x.chunk(2, -1).try_into().expect("two halves")
}

#[cfg(test)]
mod tests {
    use super::*;
    use pacs_torch::tch::Device;

    fn random(size: &[i64], seed: i64) -> Tensor {
        pacs_torch::tch::manual_seed(seed);
        Tensor::randn(size, (Kind::Double, Device::Cpu))
    }

    fn assert_close(fused: &Tensor, plain: &Tensor) {
        let difference = (fused.to_kind(Kind::Double) - plain).abs().max().double_value(&[]);
        assert!(difference < 1e-5, "{difference}");
    }

    /// Float64 goes through tensor operations as a device without kernels does, float32 through the kernels.
    #[test]
    fn both_ways_of_every_operation_agree() {
        let narrow = |x: &Tensor| x.to_kind(Kind::Float);
        let (x, y, weight) = (random(&[7, 12], 1), random(&[7, 12], 2), random(&[12], 3));
        let (sum, normed) = add_rms_norm(&x, &y, &weight, 1e-5);
        let (fused_sum, fused_normed) = add_rms_norm(&narrow(&x), &narrow(&y), &narrow(&weight), 1e-5);
        assert_close(&fused_sum, &sum);
        assert_close(&fused_normed, &normed);

        let mut sums =
            [Tensor::zeros([12], (Kind::Double, Device::Cpu)), Tensor::zeros([12], (Kind::Float, Device::Cpu))];
        let [plain_sum, fused_sum] = &mut sums;
        let plain = rms_norm_backward(&x, &weight, 1e-5, &y, Some(&sum), plain_sum);
        let fused = rms_norm_backward(&narrow(&x), &narrow(&weight), 1e-5, &narrow(&y), Some(&narrow(&sum)), fused_sum);
        assert_close(&fused, &plain);
        assert_close(&sums[1], &sums[0]);

        let gradient = random(&[7, 6], 4);
        assert_close(&silu_gate(&narrow(&x)), &silu_gate(&x));
        let plain = silu_gate_backward(x.copy(), &gradient);
        let fused = silu_gate_backward(narrow(&x), &narrow(&gradient));
        assert_close(&fused.0, &plain.0);
        assert_close(&fused.1, &plain.1);

        // Gradients by the gates and by what they gate, against autograd.
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let leaf = x.detach().set_requires_grad(true);
            let gated = pacs_torch::tch::with_grad(|| gate(activation, &leaf));
            pacs_torch::tch::with_grad(|| (&gated * &gradient).sum(Kind::Double)).backward();
            for (kind, tolerance) in [(Kind::Double, 1e-12), (Kind::Float, 1e-5), (Kind::BFloat16, 1e-1)] {
                let (by_gate_up, again) = gate_backward(activation, x.to_kind(kind), &gradient.to_kind(kind));
                assert_eq!((by_gate_up.kind(), again.kind()), (kind, kind));
                let difference = |a: &Tensor, b: &Tensor| (a.to_kind(Kind::Double) - b).abs().max().double_value(&[]);
                assert!(difference(&by_gate_up, &leaf.grad()) < tolerance, "{activation:?}, {kind:?}");
                assert!(difference(&again, &gated.detach()) < tolerance, "{activation:?}, {kind:?}");
            }
        }

        let (heads, angles) = (random(&[7, 3, 4], 5), random(&[7, 2], 6));
        let (cos, sin) = (narrow(&angles.cos()), narrow(&angles.sin()));
        for backwards in [false, true] {
            let fused = rotate(narrow(&heads), &cos, &sin, backwards);
            assert_close(&fused, &rotate(heads.shallow_clone(), &cos, &sin, backwards));
        }
    }
}
