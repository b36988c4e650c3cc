//! The small operations of a layer. `T` tokens, `D` width, `F` feed-forward width, `N` query heads, `K` key heads, `H` head.
#![expect(unsafe_code, reason = "kernels are launched on the memory of tensors")]

use tch::{Kind, Tensor};

use super::{Argument, DecodeSlots, DeviceKernels, KernelError, Launch};
use crate::BLOCK_TOKENS;

/// Bytes that a thread moves at once where rows allow it.
const PACK_BYTES: usize = 16;

impl DeviceKernels {
    /// `x + y` and its norm; without `y`, `x` itself and its norm. Statistics are float32, each result is rounded once.
    ///
    /// `x` and `y`: `[.., D]`, contiguous; `weight`: `[D]`.
    ///
    /// # Errors
    /// When the launch fails.
    ///
    /// # Panics
    /// When the tensors do not fit each other or these kernels.
    pub fn add_rms_norm(
        &self,
        x: &Tensor,
        y: Option<&Tensor>,
        weight: &Tensor,
        epsilon: f64,
    ) -> Result<(Tensor, Tensor), KernelError> {
        let sizes = x.size();
        let width = *sizes.last().expect("rows have a width");
        self.expect("rows", x, &sizes);
        self.expect("a weight", weight, &[width]);
        if let Some(y) = y {
            self.expect("what is added", y, &sizes);
        }
        let sum = y.map(Tensor::empty_like);
        let output = x.empty_like();
        let packed = self.packed(width, [Some(x), y, sum.as_ref(), Some(&output)].into_iter().flatten());
        let arguments = [
            x.into(),
            y.into(),
            weight.into(),
            sum.as_ref().into(),
            (&output).into(),
            number(width),
            (epsilon as f32).into(),
            i32::from(packed).into(),
        ];
        let threads = self.threads(width, packed);
        self.run("add_rms_norm", [rows(x, width), 1, 1], threads, &arguments)?;
        Ok((sum.unwrap_or_else(|| x.shallow_clone()), output))
    }

    /// `silu(gate) * up` of `[T, 2 F]`, contiguous, gates first. Returns `[T, F]`.
    ///
    /// # Errors
    /// When the launch fails.
    ///
    /// # Panics
    /// When the tensor is none of these kernels.
    pub fn silu_gate(&self, gate_up: &Tensor) -> Result<Tensor, KernelError> {
        let (tokens, columns) = gate_up.size2().expect("gates and ups are a matrix");
        self.expect("gates and ups", gate_up, &[tokens, columns]);
        assert!(columns % 2 == 0, "{columns} columns are no pairs");
        let width = columns / 2;
        let output = Tensor::empty([tokens, width], (gate_up.kind(), gate_up.device()));
        let packed = self.packed(width, [gate_up, &output].into_iter());
        let (threads, blocks) = self.columns(width, packed);
        let arguments = [gate_up.into(), (&output).into(), number(width), i32::from(packed).into()];
        self.run("silu_gate", [rows(gate_up, columns), blocks, 1], threads, &arguments)?;
        Ok(output)
    }

    /// Norms of heads, where there are any, rotation, and the way of keys and values into their blocks, at once. Returns
    /// rotated queries `[T, N, H]` and keys `[T, K, H]`.
    ///
    /// `projected`: `[T, N + 2 K, H]`, contiguous; `norms`: weights of queries and keys, `[H]` each, and their epsilon; `cos`
    /// and `sin`: `[T, H / 2]` float32; `slots`: `[T, 2]` int32, block and place of each token; `keys`: `[P, K, H, S]` and
    /// `values`: `[P, K, S, H]` of one layer.
    ///
    /// # Errors
    /// When the launch fails.
    ///
    /// # Panics
    /// When the tensors do not fit each other or these kernels, or a slot lies outside the blocks.
    pub fn rotate_store(
        &self,
        projected: &Tensor,
        norms: Option<(&Tensor, &Tensor, f64)>,
        (cos, sin): (&Tensor, &Tensor),
        slots: &DecodeSlots,
        (keys, values): (&mut Tensor, &mut Tensor),
    ) -> Result<(Tensor, Tensor), KernelError> {
        let shape = self.shape();
        let [n, k, h] = [shape.heads, shape.kv_heads, shape.head_dim].map(|size| size as i64);
        let tokens = projected.size()[0];
        self.expect("projections", projected, &[tokens, n + 2 * k, h]);
        for angles in [cos, sin] {
            self.expect_kind("a rotation", angles, Kind::Float, &[tokens, h / 2]);
        }
        self.expect_kind("slots", slots.tensor(), Kind::Int, &[tokens, 2]);
        let blocks = keys.size()[0];
        slots.expect_within(blocks);
        self.expect("keys", keys, &[blocks, k, h, BLOCK_TOKENS as i64]);
        self.expect("values", values, &[blocks, k, BLOCK_TOKENS as i64, h]);
        if let Some((q_norm, k_norm, _)) = norms {
            self.expect("a norm", q_norm, &[h]);
            self.expect("a norm", k_norm, &[h]);
        }
        let empty = |heads: i64| Tensor::empty([tokens, heads, h], (projected.kind(), projected.device()));
        let q = empty(n);
        let rotated = empty(k);
        let arguments = [
            projected.into(),
            norms.map(|norms| norms.0).into(),
            norms.map(|norms| norms.1).into(),
            cos.into(),
            sin.into(),
            slots.tensor().into(),
            (&q).into(),
            (&rotated).into(),
            (&*keys).into(),
            (&*values).into(),
            number(n),
            number(k),
            (norms.map_or(0.0, |norms| norms.2) as f32).into(),
        ];
        let warps = dimension((n + 2 * k) as usize).min(8);
        self.run("rotate_store", [dimension(tokens as usize), 1, 1], 32 * warps, &arguments)?;
        Ok((q, rotated))
    }

    /// Threads of a block, and blocks, for one row of independent columns.
    pub(super) fn columns(&self, width: i64, packed: bool) -> (u32, u32) {
        let threads = self.threads(width, packed).min(256);
        (threads, dimension((width as usize).div_ceil(threads as usize * self.elements(packed))))
    }

    /// Threads of a block that has one row of such a width.
    pub(super) fn threads(&self, width: i64, packed: bool) -> u32 {
        let steps = (width as usize).div_ceil(self.elements(packed));
        dimension(steps.next_multiple_of(32).min(512))
    }

    /// Elements that a thread moves at once.
    fn elements(&self, packed: bool) -> usize {
        if packed { PACK_BYTES / self.kind().elt_size_in_bytes() } else { 1 }
    }

    /// Whether rows of such a width begin at multiples of what a thread moves at once.
    pub(super) fn packed<'a>(&self, width: i64, mut tensors: impl Iterator<Item = &'a Tensor>) -> bool {
        let whole = (width as usize * self.kind().elt_size_in_bytes()).is_multiple_of(PACK_BYTES);
        whole && tensors.all(|tensor| (tensor.data_ptr() as usize).is_multiple_of(PACK_BYTES))
    }

    pub(super) fn expect(&self, what: &str, tensor: &Tensor, sizes: &[i64]) {
        self.expect_kind(what, tensor, self.kind(), sizes);
    }

    #[track_caller]
    pub(super) fn expect_kind(&self, what: &str, tensor: &Tensor, kind: Kind, sizes: &[i64]) {
        let found = (tensor.kind(), tensor.device(), tensor.size());
        assert!(
            found == (kind, self.machine.device(), sizes.to_vec()) && tensor.is_contiguous(),
            "{what}: {found:?}, contiguous: {}; expected {kind:?} {sizes:?}",
            tensor.is_contiguous()
        );
    }

    /// Launches a kernel on tensors that the caller has checked.
    pub(super) fn run(
        &self,
        kernel: &'static str,
        grid: [u32; 3],
        threads: u32,
        arguments: &[Argument],
    ) -> Result<(), KernelError> {
        if grid.contains(&0) {
            return Ok(());
        }
        // SAFETY: every caller passes what the kernel declares, with tensors whose kinds, places and sizes it has checked
        // or made. Work of libtorch and launches are in one order, so that memory is not given to others before they are
        // done.
        unsafe { self.machine.launch(&Launch { kernel, grid, threads, arguments }) }
    }
}

/// Rows of such a width.
pub(super) fn rows(tensor: &Tensor, width: i64) -> u32 {
    dimension(tensor.numel() / width.max(1) as usize)
}

/// A size as the kernels take it.
pub(super) fn number(size: i64) -> Argument {
    i32::try_from(size).expect("sizes of a model are below 2^31").into()
}

/// A dimension of a grid.
pub(super) fn dimension(size: usize) -> u32 {
    u32::try_from(size).expect("a grid has fewer than 2^32 blocks")
}
