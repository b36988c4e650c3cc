//! Products of 16-bit matrices whose result is float32, which `tch` has no function for.
//!
//! On a GPU they are one call each of libtorch or of cuBLAS on libtorch's own handle, hence on its stream and in its workspace;
//! elsewhere they are made of other operations.
// Legend: `T` rows of a pass, `K` and `O` width of the input and output of a matrix product.
#![expect(unsafe_code, reason = "libtorch and cuBLAS are C++ and C libraries")]

use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::OnceLock;

use tch::{Device, Kind, Tensor, no_grad};

use crate::accumulate::accumulate;
use crate::dispatch::{Value, call_overload};
use crate::stream::symbol;
use crate::view::ViewError;

/// `x W^T` in float32, of operands in 16 bits.
///
/// `x`: `[T, K]`; `weight`: `[O, K]`, of one kind and on one device. Returns `[T, O]` float32.
///
/// # Panics
/// When the operands do not fit, or the device fails, as for any operation of it.
pub fn linear_float32(x: &Tensor, weight: &Tensor) -> Tensor {
    let is_narrow = matches!(x.kind(), Kind::BFloat16 | Kind::Half);
    match x.device() {
        Device::Cuda(_) if is_narrow => {
            let arguments = [Value::Tensor(x), Value::Tensor(&weight.tr()), Value::Kind(Kind::Float)];
            // SAFETY: Tensor self, Tensor mat2, ScalarType out_dtype -> Tensor.
            let product = unsafe { call_overload::<1>(c"aten::mm", c"dtype", &arguments) };
            let [product] = product.unwrap_or_else(|error| panic!("{error}"));
            product
        }
        _ => x.to_kind(Kind::Float).linear(&weight.to_kind(Kind::Float), None::<&Tensor>),
    }
}

/// Adds the gradient of a matrix to `sum`: `gradient^T input`, summed and kept in float32.
///
/// `sum`: `O K` elements, float32 or whatever [`accumulate`] adds to; `gradient`: `[T, O]`, by the output of the product;
/// `input`: `[T, K]`, what it was applied to.
///
/// # Errors
/// When a tensor of the host is not contiguous.
///
/// # Panics
/// When the shapes do not fit, or the device fails, as for any operation of it.
pub fn add_product(sum: &mut Tensor, gradient: &Tensor, input: &Tensor) -> Result<(), ViewError> {
    let on_device = matches!(sum.device(), Device::Cuda(_));
    let fits = sum.kind() == Kind::Float && gradient.kind() == Kind::BFloat16 && sum.is_contiguous();
    if on_device && fits {
        match Blas::get() {
            Some(blas) => {
                blas.add_product(sum, gradient, input);
                return Ok(());
            }
            None => warn_once(),
        }
    }
    accumulate(sum, &gradient.tr().matmul(input))
}

fn warn_once() {
    static SAID: std::sync::Once = std::sync::Once::new();
    SAID.call_once(|| {
        tracing::warn!("libtorch or cuBLAS cannot accumulate products in float32: gradients take one more pass")
    });
}

/// One call of `cublasGemmEx`. Matrices are column by column there, so what lies row by row is its own transpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Gemm {
    transposed: [bool; 2],
    /// Rows and columns of the result, and the inner dimension.
    m: c_int,
    n: c_int,
    k: c_int,
    /// Distances of columns: of both factors and of the result.
    strides: [c_int; 3],
}

impl Gemm {
    /// `sum += gradient^T input`, of rows that are `gradient_stride` and `input_stride` elements apart. The first factor is
    /// `input`: read column by column it is `[K, T]`, and the result `[K, O]`.
    fn of_gradient(rows: i64, [outputs, inputs]: [i64; 2], [gradient_stride, input_stride]: [i64; 2]) -> Self {
        let number = |size: i64| c_int::try_from(size).expect("sizes of a model are below 2^31");
        Self {
            transposed: [false, true],
            m: number(inputs),
            n: number(outputs),
            k: number(rows),
            strides: [number(input_stride), number(gradient_stride), number(inputs)],
        }
    }
}

/// `CUDA_R_16BF`, `CUDA_R_32F`, `CUBLAS_COMPUTE_32F`, `CUBLAS_GEMM_DEFAULT`.
const BFLOAT16: c_int = 14;
const FLOAT32: c_int = 0;
const COMPUTE_FLOAT32: c_int = 68;
const DEFAULT_ALGORITHM: c_int = -1;

type GemmEx = unsafe extern "C" fn(
    *mut c_void,
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    *const c_void,
    *const c_void,
    c_int,
    c_int,
    *const c_void,
    c_int,
    c_int,
    *const c_void,
    *mut c_void,
    c_int,
    c_int,
    c_int,
    c_int,
) -> c_int;

/// cuBLAS, as libtorch has it.
#[derive(Clone, Copy, Debug)]
struct Blas {
    /// libtorch's handle of this thread's device, set to its stream.
    handle: unsafe extern "C" fn(*mut *mut c_void) -> c_int,
    gemm: GemmEx,
}

impl Blas {
    /// What libtorch has loaded; none without its CUDA half.
    fn get() -> Option<&'static Self> {
        static BLAS: OnceLock<Option<Blas>> = OnceLock::new();
        BLAS.get_or_init(|| {
            let handle = symbol(c"torch_get_current_cuda_blas_handle").ok()?;
            let gemm = symbol(c"cublasGemmEx").ok()?;
            // SAFETY: the symbols are functions of these signatures.
            unsafe {
                Some(Self {
                    handle: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut *mut c_void) -> c_int>(handle),
                    gemm: std::mem::transmute::<*mut c_void, GemmEx>(gemm),
                })
            }
        })
        .as_ref()
    }

    /// `sum += gradient^T input`.
    fn add_product(&self, sum: &Tensor, gradient: &Tensor, input: &Tensor) {
        let [gradient, input] = [gradient, input].map(by_rows);
        let ((rows, outputs), (input_rows, inputs)) = (size2(&gradient), size2(&input));
        assert!(
            rows == input_rows && sum.numel() as i64 == outputs * inputs && input.kind() == gradient.kind(),
            "a gradient {:?} and an input {:?} for {} weights",
            gradient.size(),
            input.size(),
            sum.numel()
        );
        assert!(
            [&gradient, &input].into_iter().all(|factor| factor.device() == sum.device()),
            "factors of another device"
        );
        if rows == 0 || sum.numel() == 0 {
            return;
        }
        let gemm = Gemm::of_gradient(rows, [outputs, inputs], [&gradient, &input].map(|x| x.stride()[0].max(1)));
        let Gemm { transposed, m, n, k, strides } = gemm;
        let [first, second] = transposed.map(c_int::from);
        let one = 1.0f32;
        let mut handle = ptr::null_mut();
        // SAFETY: the handle is libtorch's, whose scalars are read from host memory, for this thread's device, on which all three
        // tensors are, and its stream, in whose order they are used and freed. Sizes and distances are theirs.
        let status = unsafe {
            assert_eq!((self.handle)(&mut handle), 0, "libtorch has no cuBLAS handle");
            (self.gemm)(
                handle,
                first,
                second,
                m,
                n,
                k,
                (&raw const one).cast(),
                input.data_ptr(),
                BFLOAT16,
                strides[0],
                gradient.data_ptr(),
                BFLOAT16,
                strides[1],
                (&raw const one).cast(),
                sum.data_ptr(),
                FLOAT32,
                strides[2],
                COMPUTE_FLOAT32,
                DEFAULT_ALGORITHM,
            )
        };
        assert_eq!(status, 0, "cublasGemmEx of {gemm:?} failed with status {status}");
    }
}

/// The same matrix with the elements of a row next to each other.
fn by_rows(x: &Tensor) -> Tensor {
    let is_whole = x.dim() == 2 && (x.stride()[1] == 1 || x.size()[1] == 1) && x.stride()[0] >= x.size()[1];
    if is_whole { x.shallow_clone() } else { no_grad(|| x.contiguous()) }
}

fn size2(x: &Tensor) -> (i64, i64) {
    x.size2().expect("a factor is a matrix")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{difference, gpu, random, wide};

    /// What BLAS defines: `C += op(A) op(B)` on matrices that lie column by column.
    fn reference(gemm: Gemm, a: &[f32], b: &[f32], c: &mut [f32]) {
        let Gemm { transposed, m, n, k, strides } = gemm;
        let [m, n, k] = [m, n, k].map(|size| size as usize);
        let at = |x: &[f32], which: usize, row: usize, column: usize| {
            let (row, column) = if transposed[which] { (column, row) } else { (row, column) };
            x[column * strides[which] as usize + row]
        };
        for row in 0..m {
            for column in 0..n {
                let sum: f32 = (0..k).map(|i| at(a, 0, row, i) * at(b, 1, i, column)).sum();
                c[column * strides[2] as usize + row] += sum;
            }
        }
    }

    #[test]
    fn the_numbers_of_the_call_are_those_of_the_product() {
        tch::manual_seed(12);
        // Rows of the gradient lie further apart than they are long, as those of a part of a matrix do.
        let whole = random(&[5, 9], Kind::Float);
        let (gradient, input) = (whole.narrow(1, 0, 7), random(&[5, 3], Kind::Float));
        let gemm = Gemm::of_gradient(5, [7, 3], [gradient.stride()[0], input.stride()[0]]);
        let slice = |x: &Tensor| crate::f32_ref(x).expect("host").to_vec();
        let mut sum = vec![1.0f32; 21];
        reference(gemm, &slice(&input), &slice(&whole), &mut sum);
        let expected = wide(&gradient).tr().matmul(&wide(&input)) + 1.0;
        assert!(difference(&Tensor::from_slice(&sum).view([7, 3]), &expected) < 1e-6);
    }

    #[test]
    fn products_of_narrow_numbers_are_float32() {
        tch::manual_seed(13);
        let devices = [Some(Device::Cpu), gpu().as_ref().ok().copied()];
        for device in devices.into_iter().flatten() {
            for kind in [Kind::BFloat16, Kind::Float] {
                let [x, weight, gradient] =
                    [[40, 64], [96, 64], [40, 96]].map(|size| random(&size, kind).to_device(device));
                let product = linear_float32(&x, &weight);
                assert_eq!((product.kind(), product.device()), (Kind::Float, device));
                assert!(difference(&product, &wide(&x).matmul(&wide(&weight).tr())) < 1e-5, "{device:?} {kind:?}");
                let mut sum = Tensor::ones([96, 64], (Kind::Float, device));
                let expected = wide(&gradient).tr().matmul(&wide(&x)) + 1.0;
                add_product(&mut sum, &gradient, &x).expect("contiguous");
                // In host memory the product is rounded first.
                let tolerance = if device == Device::Cpu && kind == Kind::BFloat16 { 1e-2 } else { 1e-5 };
                assert!(difference(&sum, &expected) < tolerance, "{device:?} {kind:?}");
                let mut twice = Tensor::zeros([96, 64], (Kind::Float, device));
                add_product(&mut twice, &gradient.narrow(1, 0, 96), &x.tr().contiguous().tr()).expect("contiguous");
                assert!(difference(&twice, &(expected - 1.0)) < tolerance, "what lies otherwise is the same");
            }
        }
    }
}
