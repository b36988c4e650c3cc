//! The streams of libtorch on a GPU: which one its work goes to, and others to put it on.
#![expect(unsafe_code, reason = "libtorch is a C++ library")]

use std::ffi::{CStr, c_int, c_void};
use std::ptr;

/// A stream of the CUDA driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stream(*mut c_void);

// SAFETY: a name for something of the driver, which may be used from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    pub(crate) fn as_ptr(self) -> *mut c_void {
        self.0
    }
}

/// The CUDA half of libtorch lacks a function, or one failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum StreamError {
    #[error("the CUDA half of libtorch has no `{0}`: it is loaded from torch 2.11")]
    Missing(String),
    #[error("`{0}` failed; standard error has what libtorch says of it (`Exception in aoti_torch`)")]
    Failed(&'static str),
}

/// A symbol of what is loaded.
pub(crate) fn symbol(name: &CStr) -> Result<*mut c_void, StreamError> {
    // SAFETY: a lookup by a name that ends with a zero byte.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    if found.is_null() { Err(StreamError::Missing(name.to_string_lossy().into_owned())) } else { Ok(found) }
}

/// The functions for the streams of one GPU, of the C interface that libtorch keeps stable
/// (`torch/csrc/stable/c/shim.h`).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Streams {
    index: i32,
    current: unsafe extern "C" fn(i32, *mut *mut c_void) -> c_int,
    set: unsafe extern "C" fn(*mut c_void, i32) -> c_int,
    from_pool: unsafe extern "C" fn(bool, i32, *mut *mut c_void) -> c_int,
    synchronize: unsafe extern "C" fn(*mut c_void, i32) -> c_int,
}

impl Streams {
    /// Those of the GPU `index`, once [`crate::init`] has loaded the library.
    pub(crate) fn of(index: usize) -> Result<Self, StreamError> {
        // SAFETY: the symbols are functions of these signatures.
        unsafe {
            Ok(Self {
                index: i32::try_from(index).unwrap_or(i32::MAX),
                current: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(i32, *mut *mut c_void) -> c_int>(
                    symbol(c"aoti_torch_get_current_cuda_stream")?,
                ),
                set: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut c_void, i32) -> c_int>(symbol(
                    c"torch_set_current_cuda_stream",
                )?),
                from_pool: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(bool, i32, *mut *mut c_void) -> c_int>(
                    symbol(c"torch_get_cuda_stream_from_pool")?,
                ),
                synchronize: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut c_void, i32) -> c_int>(
                    symbol(c"torch_cuda_stream_synchronize")?,
                ),
            })
        }
    }

    /// The stream that this thread's work goes to.
    pub(crate) fn current(&self) -> Result<Stream, StreamError> {
        let mut stream = ptr::null_mut();
        // SAFETY: the pointer is to a local.
        check("aoti_torch_get_current_cuda_stream", unsafe { (self.current)(self.index, &mut stream) })?;
        Ok(Stream(stream))
    }

    /// Another stream than the default one.
    pub(crate) fn another(&self) -> Result<Stream, StreamError> {
        let mut stream = ptr::null_mut();
        // SAFETY: the pointer is to a local.
        check("torch_get_cuda_stream_from_pool", unsafe { (self.from_pool)(false, self.index, &mut stream) })?;
        Ok(Stream(stream))
    }

    /// Waits until all work of a stream is done.
    pub(crate) fn synchronize(&self, stream: Stream) -> Result<(), StreamError> {
        // SAFETY: the stream is libtorch's.
        check("torch_cuda_stream_synchronize", unsafe { (self.synchronize)(stream.0, self.index) })
    }

    /// Sends this thread's work to `stream` until what is returned is dropped.
    pub(crate) fn enter(&self, stream: Stream) -> Result<Entered, StreamError> {
        let before = self.current()?;
        self.set(stream)?;
        Ok(Entered { streams: *self, before })
    }

    fn set(&self, stream: Stream) -> Result<(), StreamError> {
        // SAFETY: the stream is libtorch's.
        check("torch_set_current_cuda_stream", unsafe { (self.set)(stream.0, self.index) })
    }
}

/// Puts back the stream that was there.
#[derive(Debug)]
pub(crate) struct Entered {
    streams: Streams,
    before: Stream,
}

impl Drop for Entered {
    fn drop(&mut self) {
        // It was the current stream, so it can be again.
        let _ = self.streams.set(self.before);
    }
}

fn check(call: &'static str, status: c_int) -> Result<(), StreamError> {
    if status == 0 { Ok(()) } else { Err(StreamError::Failed(call)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_the_cuda_half_of_libtorch_it_says_what_is_missing() {
        if symbol(c"torch_set_current_cuda_stream").is_err() {
            let error = Streams::of(0).expect_err("nothing was loaded").to_string();
            assert!(error.contains("`aoti_torch_get_current_cuda_stream`"), "{error}");
        }
    }
}
