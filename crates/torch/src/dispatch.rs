//! Operators that `tch` has no function for, through the C interface that libtorch keeps stable
//! (`torch/csrc/stable/stableivalue_conversions.h` says how values become words).
#![expect(unsafe_code, reason = "libtorch is a C++ library")]

use std::ffi::{CStr, c_char, c_void};
use std::mem::ManuallyDrop;
use std::ptr;

use tch::{Kind, Tensor};

/// A kernel as libtorch calls it: inputs lie on the stack, outputs take their places. An exception of C++ goes through it.
pub(crate) type Kernel = unsafe extern "C-unwind" fn(stack: *mut u64, inputs: u64, outputs: u64);

/// The C interface of libtorch, and the allocator of the words that hold optional values.
pub(crate) mod library {
    use super::{Kernel, c_char, c_void};

    unsafe extern "C" {
        pub(crate) fn aoti_torch_call_dispatcher(name: *const c_char, overload: *const c_char, stack: *mut u64) -> i32;
        /// A library that defines operators.
        pub(crate) fn aoti_torch_library_init_def(
            namespace: *const c_char,
            file: *const c_char,
            line: u32,
            library: *mut *mut c_void,
        ) -> i32;
        /// A library of kernels for operators that are there.
        pub(crate) fn aoti_torch_library_init_impl(
            namespace: *const c_char,
            key: *const c_char,
            file: *const c_char,
            line: u32,
            library: *mut *mut c_void,
        ) -> i32;
        pub(crate) fn aoti_torch_library_def(library: *mut c_void, schema: *const c_char) -> i32;
        pub(crate) fn aoti_torch_library_impl(library: *mut c_void, name: *const c_char, kernel: Kernel) -> i32;
        /// `operator new(size_t)`: libtorch frees with the operator that belongs to it.
        #[link_name = "_Znwm"]
        pub(crate) fn operator_new(bytes: usize) -> *mut c_void;
        /// `operator delete(void*)`, for what a kernel takes over.
        #[link_name = "_ZdlPv"]
        pub(crate) fn operator_delete(place: *mut c_void);
    }
}

/// An argument of an operator, by the type that its schema declares.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Value<'a> {
    /// `Tensor`.
    Tensor(&'a Tensor),
    /// `Tensor?` that is there.
    Some(&'a Tensor),
    /// `int?` or `SymInt?` that is there.
    SomeInt(i64),
    /// Any optional that is not there.
    None,
    /// `int` or `SymInt`.
    Int(i64),
    /// `float`.
    Float(f64),
    /// `bool`.
    Bool(bool),
    /// `ScalarType`.
    Kind(Kind),
}

/// An operator failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("libtorch's operator {name} failed; standard error has what libtorch says of it (`Exception in aoti_torch`)")]
pub(crate) struct OperatorError {
    name: String,
}

/// Calls the operator `name`, whose overload has no name; it takes these arguments and gives that many tensors.
///
/// # Safety
/// The arguments are those of the operator's schema, in number and type, and so are the outputs: libtorch does not check.
pub(crate) unsafe fn call<const OUTPUTS: usize>(
    name: &CStr,
    arguments: &[Value<'_>],
) -> Result<[Tensor; OUTPUTS], OperatorError> {
    // SAFETY: what the caller has promised.
    unsafe { call_overload(name, c"", arguments) }
}

/// The same of an operator whose overload has a name.
///
/// # Safety
/// As [`call`].
pub(crate) unsafe fn call_overload<const OUTPUTS: usize>(
    name: &CStr,
    overload: &CStr,
    arguments: &[Value<'_>],
) -> Result<[Tensor; OUTPUTS], OperatorError> {
    let mut stack: Vec<u64> = arguments.iter().map(|argument| argument.word()).collect();
    stack.resize(arguments.len().max(OUTPUTS), 0);
    // SAFETY: the names end with a zero byte, and the stack has room for what goes in and for what comes out. The call takes
    // over what the words point to.
    let status = unsafe { library::aoti_torch_call_dispatcher(name.as_ptr(), overload.as_ptr(), stack.as_mut_ptr()) };
    if status != 0 {
        return Err(OperatorError { name: name.to_string_lossy().into_owned() });
    }
    // SAFETY: every output is a tensor, whose handle is the caller's now.
    Ok(std::array::from_fn(|i| unsafe { from_word(stack[i]) }))
}

impl Value<'_> {
    /// The word for it, which owns what it points to.
    fn word(self) -> u64 {
        match self {
            Self::Tensor(tensor) => into_word(tensor.shallow_clone()),
            Self::Some(tensor) => optional(into_word(tensor.shallow_clone())),
            Self::SomeInt(value) => optional(value.cast_unsigned()),
            Self::None => 0,
            Self::Int(value) => value.cast_unsigned(),
            Self::Float(value) => value.to_bits(),
            Self::Bool(value) => u64::from(value),
            Self::Kind(kind) => scalar_type(kind),
        }
    }
}

/// The word for an optional that is there: the place of its own word.
fn optional(word: u64) -> u64 {
    // SAFETY: a fresh block for one word, which libtorch frees.
    unsafe {
        let place = library::operator_new(size_of::<u64>()).cast::<u64>();
        place.write(word);
        ptr::from_mut(&mut *place).expose_provenance() as u64
    }
}

/// The number that libtorch has for a kind (`c10/core/ScalarType.h`).
///
/// # Panics
/// For kinds that nothing here asks for.
fn scalar_type(kind: Kind) -> u64 {
    match kind {
        Kind::Int => 3,
        Kind::Int64 => 4,
        Kind::Half => 5,
        Kind::Float => 6,
        Kind::Double => 7,
        Kind::BFloat16 => 15,
        _ => panic!("no operator is asked for {kind:?}"),
    }
}

/// A handle that owns the tensor.
pub(crate) fn into_word(tensor: Tensor) -> u64 {
    ManuallyDrop::new(tensor).as_ptr().expose_provenance() as u64
}

/// The tensor of a handle that owns it.
///
/// # Safety
/// The word comes from [`into_word`] or from libtorch, and has no other user.
pub(crate) unsafe fn from_word(word: u64) -> Tensor {
    // SAFETY: both sides hold a tensor as a pointer to an `at::Tensor` on the heap.
    unsafe { Tensor::from_ptr(ptr::with_exposed_provenance_mut(word as usize)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn an_operator_is_called_and_a_wrong_input_is_an_error() {
        let [q, k, v] = [0, 1, 2].map(|_| Tensor::randn([1, 2, 5, 8], (Kind::Float, Device::Cpu)));
        let causal = Tensor::ones([5, 5], (Kind::Float, Device::Cpu)).tril(0).log();
        let name = c"aten::_scaled_dot_product_flash_attention_for_cpu";
        let call = |q: &Tensor, mask: Option<&Tensor>| {
            let tensors = [q, &k, &v].map(Value::Tensor);
            let mask = mask.map_or(Value::None, Value::Some);
            let rest = [Value::Float(0.0), Value::Bool(false), mask, Value::None];
            // SAFETY: Tensor query, key, value, float dropout_p, bool is_causal, *, Tensor? attn_mask, float? scale.
            unsafe { call::<2>(name, &[&tensors[..], &rest].concat()) }
        };
        for mask in [None, Some(&causal)] {
            let [output, sums] = call(&q, mask).unwrap();
            let expected = Tensor::scaled_dot_product_attention(&q, &k, &v, mask, 0.0, false, None::<f64>, false);
            assert!(output.allclose(&expected, 1e-6, 1e-6, false));
            assert_eq!(sums.size(), [1, 2, 5]);
        }
        // An overload, and a kind.
        let double = [Value::Tensor(&q), Value::Kind(Kind::Double), Value::Bool(false), Value::Bool(true), Value::None];
        // SAFETY: Tensor self, ScalarType dtype, bool non_blocking, bool copy, MemoryFormat? memory_format.
        let [double] = unsafe { call_overload::<1>(c"aten::to", c"dtype", &double) }.unwrap();
        assert!(double.kind() == Kind::Double && double.equal(&q.to_kind(Kind::Double)));
        let error = call(&q.squeeze_dim(0), None).unwrap_err();
        assert!(error.to_string().contains("_flash_attention_for_cpu"), "{error}");
    }
}
