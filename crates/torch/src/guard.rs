//! Calls of C++ functions that may throw. Nothing of C++ can catch for us but libtorch itself, so such a call is made from
//! within an operator of our own: whatever runs there under libtorch's dispatcher, an exception becomes a status.
#![expect(unsafe_code, reason = "libtorch is a C++ library")]

use std::ptr;
use std::sync::Once;

use crate::dispatch::library;

/// A function of C++ threw an exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Thrown;

/// Does `work`, which calls functions of C++ and does nothing that panics: a panic cannot go through frames of C++.
///
/// # Errors
/// When one of them throws; what was to be dropped after it is dropped. Standard error has what libtorch says of it
/// (`Exception in aoti_torch`).
pub(crate) fn guarded<R>(work: impl FnOnce() -> R) -> Result<R, Thrown> {
    static REGISTERED: Once = Once::new();
    REGISTERED.call_once(register);
    let mut work = Some(work);
    let mut result = None;
    let mut run = || result = work.take().map(|work| work());
    let mut run: &mut dyn FnMut() = &mut run;
    let mut stack = [ptr::from_mut(&mut run).expose_provenance() as u64];
    // SAFETY: the texts end with a zero byte, and the one word of the stack is what the kernel takes.
    let status =
        unsafe { library::aoti_torch_call_dispatcher(c"pacs::guarded".as_ptr(), c"".as_ptr(), stack.as_mut_ptr()) };
    if status == 0 { result.ok_or(Thrown) } else { Err(Thrown) }
}

/// Registers the operator, for as long as the process lives.
fn register() {
    let mut pacs = ptr::null_mut();
    // SAFETY: the texts end with a zero byte, the pointer is to a local, and the kernel takes the word of its schema.
    unsafe {
        let made = library::aoti_torch_library_init_def(c"pacs".as_ptr(), c"guard.rs".as_ptr(), 1, &mut pacs);
        assert_eq!(made, 0, "libtorch takes no operators");
        assert_eq!(library::aoti_torch_library_def(pacs, c"guarded(int work) -> ()".as_ptr()), 0, "nor this one");
        assert_eq!(library::aoti_torch_library_impl(pacs, c"guarded".as_ptr(), run), 0, "nor its kernel");
    }
}

/// The operator: its argument is where a closure lies.
unsafe extern "C-unwind" fn run(stack: *mut u64, _inputs: u64, _outputs: u64) {
    // SAFETY: `guarded` has put the place of its closure there, and waits meanwhile.
    let work: &mut &mut dyn FnMut() = unsafe { &mut *ptr::with_exposed_provenance_mut(*stack as usize) };
    work();
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::{c_char, c_void};

    /// What every check of libtorch calls when it fails.
    type Fail = unsafe extern "C-unwind" fn(*const c_char, *const c_char, u32, *const c_char) -> !;

    #[test]
    fn an_exception_is_an_error_and_drops_what_it_passes() {
        struct Count<'a>(&'a mut u32);
        impl Drop for Count<'_> {
            fn drop(&mut self) {
                *self.0 += 1;
            }
        }
        // SAFETY: the symbol is looked up in what is loaded, and is a function of this signature.
        let fail = unsafe {
            let symbol = libc::dlsym(libc::RTLD_DEFAULT, c"_ZN3c106detail14torchCheckFailEPKcS2_jS2_".as_ptr());
            assert!(!symbol.is_null(), "libtorch has its checks");
            std::mem::transmute::<*mut c_void, Fail>(symbol)
        };
        let mut dropped = 0;
        let thrown = guarded(|| {
            let _count = Count(&mut dropped);
            // SAFETY: texts that end with a zero byte.
            unsafe { fail(c"here".as_ptr(), c"guard.rs".as_ptr(), 1, c"as wanted".as_ptr()) }
        });
        assert_eq!(thrown.err(), Some(Thrown));
        assert_eq!((guarded(|| 7), dropped), (Ok(7), 1));
    }
}
