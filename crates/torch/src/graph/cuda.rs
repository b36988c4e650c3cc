//! CUDA graphs by libtorch's own class for them (`ATen/cuda/CUDAGraph.h`), which keeps the memory of what is recorded
//! apart. `tch` does not know it and no C interface has it, so its functions are called by their names in the library.
#![expect(unsafe_code, reason = "libtorch is a C++ library")]

use std::ffi::{CStr, c_void};
use std::mem::{self, MaybeUninit};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};

use tch::Tensor;

use super::{GraphError, Work};
use crate::guard::guarded;
use crate::stream::{Stream, StreamError, Streams, symbol};

/// `c10::MempoolId_t`, a pair of numbers; both 0 for a pool of one's own.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Pool(u64, u64);

/// `cudaStreamCaptureModeThreadLocal`: what other threads do meanwhile is not looked at.
const THREAD_LOCAL: i32 = 1;

/// Room for the class, which takes less than 200 bytes in libtorch 2.11.
type Place = Box<[MaybeUninit<u128>; 64]>;

/// Member functions of `at::cuda::CUDAGraph`.
#[derive(Clone, Copy, Debug)]
struct Class {
    construct: unsafe extern "C-unwind" fn(*mut c_void, bool),
    destroy: unsafe extern "C-unwind" fn(*mut c_void),
    begin: unsafe extern "C-unwind" fn(*mut c_void, Pool, i32),
    end: unsafe extern "C-unwind" fn(*mut c_void),
    pool: unsafe extern "C-unwind" fn(*mut c_void) -> Pool,
    replay: unsafe extern "C-unwind" fn(*mut c_void),
}

impl Class {
    fn find() -> Result<Self, StreamError> {
        type Member = unsafe extern "C-unwind" fn(*mut c_void);
        let member = |name: &CStr| {
            // SAFETY: the symbol is a member function without arguments.
            symbol(name).map(|symbol| unsafe { mem::transmute::<*mut c_void, Member>(symbol) })
        };
        let construct = symbol(c"_ZN2at4cuda9CUDAGraphC1Eb")?;
        let begin = symbol(c"_ZN2at4cuda9CUDAGraph13capture_beginESt4pairIyyE21cudaStreamCaptureMode")?;
        let pool = symbol(c"_ZN2at4cuda9CUDAGraph4poolEv")?;
        // SAFETY: the names say what the functions take; a pair of numbers is passed as the structure of them.
        unsafe {
            Ok(Self {
                construct: mem::transmute::<*mut c_void, unsafe extern "C-unwind" fn(*mut c_void, bool)>(construct),
                begin: mem::transmute::<*mut c_void, unsafe extern "C-unwind" fn(*mut c_void, Pool, i32)>(begin),
                pool: mem::transmute::<*mut c_void, unsafe extern "C-unwind" fn(*mut c_void) -> Pool>(pool),
                destroy: member(c"_ZN2at4cuda9CUDAGraphD1Ev")?,
                end: member(c"_ZN2at4cuda9CUDAGraph11capture_endEv")?,
                replay: member(c"_ZN2at4cuda9CUDAGraph6replayEv")?,
            })
        }
    }
}

/// Set when a recording was not brought to its end. libtorch's allocators then keep filters that point to the graph, its random
/// generator stays as if it recorded, and its cache is never emptied again where memory is short: what is recorded later in
/// this process might get memory that is not its own.
static BROKEN: AtomicBool = AtomicBool::new(false);

/// Records the work of a GPU.
#[derive(Debug)]
pub(super) struct Recorder {
    streams: Streams,
    class: Class,
    /// Work is recorded on a stream of its own: the default one cannot be.
    side: Stream,
    pool: Pool,
}

impl Recorder {
    pub(super) fn new(index: usize) -> Result<Self, GraphError> {
        let streams = Streams::of(index)?;
        Ok(Self { streams, class: Class::find()?, side: streams.another()?, pool: Pool::default() })
    }

    pub(super) fn record(&mut self, work: &Work) -> Result<(Recorded, Tensor), GraphError> {
        if BROKEN.load(Ordering::Relaxed) {
            return Err(GraphError::Broken);
        }
        // What the work reads was written on the stream of before.
        self.streams.synchronize(self.streams.current()?)?;
        let _side = self.streams.enter(self.side)?;
        // Libraries take memory and load their kernels at the first call, which cannot be recorded.
        drop(attempt(work)?);
        self.streams.synchronize(self.side)?;
        let mut recorded = Recorded::new(self.class)?;
        let pool = self.pool;
        let begun = recorded.call("the begin of a recording", |class, graph| {
            // SAFETY: a graph that has recorded nothing.
            unsafe { (class.begin)(graph, pool, THREAD_LOCAL) }
        });
        if let Err(error) = begun {
            recorded.abandon();
            return Err(error);
        }
        let output = attempt(work);
        // Also after work that failed: the stream must not stay as it is.
        let ended = recorded.call("the end of a recording", |class, graph| {
            // SAFETY: a graph that records.
            unsafe { (class.end)(graph) }
        });
        if let Err(error) = ended {
            // What failed first says more.
            let error = output.err().unwrap_or(error);
            recorded.abandon();
            return Err(error);
        }
        let output = output?;
        self.pool = recorded.call("the pool of a recording", |class, graph| {
            // SAFETY: a graph that has recorded.
            unsafe { (class.pool)(graph) }
        })?;
        Ok((recorded, output))
    }
}

/// The work, with its panic as an error.
fn attempt(work: &Work) -> Result<Tensor, GraphError> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        GraphError::Work(text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("it panicked").to_owned())
    })
}

/// A captured `at::cuda::CUDAGraph`, destroyed with its memory pool when it is dropped.
#[derive(Debug)]
pub(super) struct Recorded {
    class: Class,
    place: Place,
}

impl Recorded {
    fn new(class: Class) -> Result<Self, GraphError> {
        let mut place: Place = Box::new([MaybeUninit::zeroed(); 64]);
        let graph = place.as_mut_ptr().cast();
        // SAFETY: there is room for the class, which is only used in this place.
        guarded(|| unsafe { (class.construct)(graph, false) }).map_err(|_| GraphError::Call("making a graph"))?;
        Ok(Self { class, place })
    }

    /// Leaks the graph, and notes that nothing can be recorded from now on.
    fn abandon(self) {
        // The filters of the allocators hold its address, and the next graph might get the same one.
        mem::forget(self);
        BROKEN.store(true, Ordering::Relaxed);
        tracing::error!("CUDA refused to record a pass: this process records no more passes");
    }

    pub(super) fn replay(&mut self) -> Result<(), GraphError> {
        // SAFETY: the graph has recorded; what it reads and writes is held next to it.
        self.call("a recorded pass", |class, graph| unsafe { (class.replay)(graph) })
    }

    fn call<R>(&mut self, what: &'static str, member: impl FnOnce(Class, *mut c_void) -> R) -> Result<R, GraphError> {
        let class = self.class;
        let graph = self.place.as_mut_ptr().cast();
        guarded(|| member(class, graph)).map_err(|_| GraphError::Call(what))
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        let graph = self.place.as_mut_ptr().cast();
        // SAFETY: it was made, and has no other user. What it complains of goes to standard error.
        let _ = guarded(|| unsafe { (self.class.destroy)(graph) });
    }
}

impl From<StreamError> for GraphError {
    fn from(error: StreamError) -> Self {
        Self::Library(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DeviceError;
    use crate::testing::gpu;

    /// Says something wherever the CUDA half of libtorch can be loaded, with a GPU or without.
    #[test]
    fn the_library_has_all_that_is_called() {
        let found = gpu();
        if let Err(error @ DeviceError::NoCudaLibrary(_)) = found {
            eprintln!("skipped: {error}");
            return;
        }
        Streams::of(0).expect("streams");
        let class = Class::find().expect("a class for graphs");
        // Without a GPU the constructor throws.
        assert_eq!(Recorded::new(class).is_ok(), found.is_ok());
    }
}
