use half::bf16;
use tch::{Device, Kind, Tensor};

use crate::element::{Element, has_kernels};

/// Why a tensor cannot be seen as a slice.
#[derive(Debug, thiserror::Error)]
#[error("a {device:?} tensor of kind {kind:?}{layout} cannot be viewed as contiguous {wanted} in host memory")]
pub struct ViewError {
    device: Device,
    kind: Kind,
    layout: &'static str,
    wanted: &'static str,
}

fn check(tensor: &Tensor, kind: Option<Kind>, wanted: &'static str) -> Result<(), ViewError> {
    let contiguous = tensor.is_contiguous();
    if tensor.device() == Device::Cpu && contiguous && kind.is_none_or(|kind| kind == tensor.kind()) {
        return Ok(());
    }
    let layout = if contiguous { "" } else { " (not contiguous)" };
    Err(ViewError { device: tensor.device(), kind: tensor.kind(), layout, wanted })
}

macro_rules! views {
    ($(#[$doc:meta])* $name:ident, $element:ty, $kind:expr, $wanted:literal, ref) => {
        $(#[$doc])*
        ///
        /// # Errors
        /// When the tensor is not contiguous in host memory or has another kind.
        pub fn $name(tensor: &Tensor) -> Result<&[$element], ViewError> {
            check(tensor, $kind, $wanted)?;
            let elements = tensor.numel() * tensor.kind().elt_size_in_bytes() / size_of::<$element>();
            if elements == 0 {
                return Ok(&[]);
            }
            // SAFETY: the storage is contiguous host memory of that many elements and lives as long as the tensor.
            Ok(unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<$element>(), elements) })
        }
    };
    ($(#[$doc:meta])* $name:ident, $element:ty, $kind:expr, $wanted:literal, mut) => {
        $(#[$doc])*
        ///
        /// Other tensors may share the storage: the caller must not use them while the slice lives.
        ///
        /// # Errors
        /// When the tensor is not contiguous in host memory or has another kind.
        pub fn $name(tensor: &mut Tensor) -> Result<&mut [$element], ViewError> {
            check(tensor, $kind, $wanted)?;
            let elements = tensor.numel() * tensor.kind().elt_size_in_bytes() / size_of::<$element>();
            if elements == 0 {
                return Ok(&mut []);
            }
            // SAFETY: as for the shared view; `&mut` keeps this handle from being used meanwhile, and tensors are
            // owned by the one thread of their device, so no other handle is used either.
            Ok(unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<$element>(), elements) })
        }
    };
}

views!(
    /// The raw bytes of a tensor.
    bytes, u8, None, "bytes", ref
);
views!(
    /// The raw bytes of a tensor, to be written.
    bytes_mut, u8, None, "bytes", mut
);
views!(
    /// The elements of a float32 tensor.
    f32_ref, f32, Some(Kind::Float), "float32", ref
);
views!(
    /// The elements of a float32 tensor, to be written.
    f32_mut, f32, Some(Kind::Float), "float32", mut
);
views!(
    /// The elements of an int64 tensor.
    i64_ref, i64, Some(Kind::Int64), "int64", ref
);
views!(
    /// The elements of an int64 tensor, to be written.
    i64_mut, i64, Some(Kind::Int64), "int64", mut
);
views!(
    /// The elements of a bfloat16 tensor.
    bf16_ref, bf16, Some(Kind::BFloat16), "bfloat16", ref
);
views!(
    /// The elements of a bfloat16 tensor, to be written.
    bf16_mut, bf16, Some(Kind::BFloat16), "bfloat16", mut
);

/// Distance between the tokens of a `[T, heads, H]` tensor of elements `T`, each of which is contiguous.
fn token_stride<T: Element>(tensor: &Tensor) -> Result<usize, ViewError> {
    let sizes = tensor.size();
    let strides = tensor.stride();
    let fits = has_kernels(tensor) && tensor.kind().elt_size_in_bytes() == size_of::<T>();
    match (&sizes[..], &strides[..]) {
        (&[_, heads, width], &[token, head, 1]) if fits && (head == width || heads == 1) && token >= heads * width => {
            Ok(token as usize)
        }
        _ => Err(ViewError { device: tensor.device(), kind: tensor.kind(), layout: LAYOUT, wanted: "tokens" }),
    }
}

const LAYOUT: &str = " with such strides";

/// The tokens of a `[T, heads, H]` tensor, which may lie apart, as one slice each.
///
/// # Errors
/// When a token is not contiguous in host memory or the kind is another.
pub(crate) fn rows_ref<T: Element>(tensor: &Tensor) -> Result<Vec<&[T]>, ViewError> {
    let stride = token_stride::<T>(tensor)?;
    let tokens = tensor.size()[0] as usize;
    let width = (tensor.size()[1] * tensor.size()[2]) as usize;
    let first = tensor.data_ptr().cast::<T>().cast_const();
    // SAFETY: by size and stride each token is that many elements of the storage, which lives as long as the tensor.
    Ok((0..tokens).map(|token| unsafe { std::slice::from_raw_parts(first.add(token * stride), width) }).collect())
}

/// The same, to be written; other tensors that share the storage must not be used meanwhile.
///
/// # Errors
/// As [`rows_ref`].
pub(crate) fn rows_mut<T: Element>(tensor: &mut Tensor) -> Result<Vec<&mut [T]>, ViewError> {
    let stride = token_stride::<T>(tensor)?;
    let tokens = tensor.size()[0] as usize;
    let width = (tensor.size()[1] * tensor.size()[2]) as usize;
    let first = tensor.data_ptr().cast::<T>();
    // SAFETY: as above; the stride is no less than the width, so the slices do not overlap.
    Ok((0..tokens).map(|token| unsafe { std::slice::from_raw_parts_mut(first.add(token * stride), width) }).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_read_and_write_the_storage() {
        let mut tensor = Tensor::from_slice(&[1.0f32, 2.0]);
        f32_mut(&mut tensor).expect("host float32")[1] = 5.0;
        assert_eq!(f32_ref(&tensor).expect("host float32"), [1.0, 5.0]);
        assert_eq!(bytes(&tensor).expect("host").len(), 8);
    }

    #[test]
    fn wrong_kind_and_layout_are_refused() {
        let tensor = Tensor::from_slice(&[1i64, 2, 3, 4]).view([2, 2]);
        assert!(f32_ref(&tensor).is_err());
        assert!(bytes(&tensor.transpose(0, 1)).is_err());
    }

    #[test]
    fn tokens_may_lie_apart_but_not_be_split() {
        let mut tensor = Tensor::arange(24, (Kind::Float, Device::Cpu)).view([2, 3, 4]);
        let mut heads = tensor.narrow(1, 1, 2);
        assert_eq!(rows_ref::<f32>(&heads).expect("tokens")[1][..3], [16.0, 17.0, 18.0]);
        rows_mut::<f32>(&mut heads).expect("tokens")[0][0] = -1.0;
        assert_eq!(f32_ref(&tensor).expect("host")[4], -1.0);
        assert!(rows_ref::<f32>(&tensor.narrow(2, 0, 2)).is_err());
        assert!(rows_ref::<bf16>(&tensor).is_err());
        assert!(rows_mut::<f32>(&mut tensor.transpose_(0, 1)).is_err());
    }
}
