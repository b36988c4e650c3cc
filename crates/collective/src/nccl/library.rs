#![expect(unsafe_code, reason = "CUDA and NCCL are C libraries")]

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr;
use std::sync::OnceLock;

use cudarc::driver::sys as cuda;
use cudarc::nccl::sys as types;
use libloading::Library as SharedLibrary;

use super::api::{Api, Comm, DeviceError, Event, Launch, Pointer, Stream, UniqueId, Versions};

/// File names of NCCL: that of its packages, then that of a development installation.
const NCCL_NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// The exit code of a process that is to be started again (docs/EXIT_CODES.md).
const EXIT_AGAIN: c_int = 75;

/// `ncclSuccess` of `nccl.h`; every other value is an error.
const SUCCESS: c_int = 0;
/// `ncclInProgress`: the call on a non-blocking communicator continues in the background.
const IN_PROGRESS: c_int = 7;
/// `ncclUint8` and `ncclFloat32` of `nccl.h`, the only element types that are exchanged.
const UINT8: c_uint = 1;
const FLOAT32: c_uint = 7;
/// `ncclSum` of `nccl.h`, the only reduction that is used.
const SUM: c_uint = 0;
/// `NCCL_API_MAGIC`, `NCCL_CONFIG_UNDEF_INT`, and the version of the header that declares the configuration's fields,
/// as in `NCCL_CONFIG_INITIALIZER` of NCCL 2.22. Newer versions read the configuration by its size and version.
const CONFIG_MAGIC: c_uint = 0xcafe_beef;
const UNDEFINED: c_int = c_int::MIN;
const CONFIG_VERSION: c_uint = 22200;

/// The functions of NCCL in use. Result codes are plain integers, since a newer NCCL may return codes that no
/// enumeration of today has.
///
/// The signatures are those of `nccl.h`. The loader of `cudarc` was rejected: it panics when the library is missing,
/// and does not look for `libnccl.so.2`, the only name that NCCL's packages install.
#[derive(Debug)]
struct Nccl {
    get_version: unsafe extern "C" fn(*mut c_int) -> c_int,
    get_unique_id: unsafe extern "C" fn(*mut types::ncclUniqueId) -> c_int,
    comm_init_rank_config: unsafe extern "C" fn(
        *mut types::ncclComm_t,
        c_int,
        types::ncclUniqueId,
        c_int,
        *mut types::ncclConfig_t,
    ) -> c_int,
    comm_get_async_error: unsafe extern "C" fn(types::ncclComm_t, *mut c_int) -> c_int,
    comm_finalize: unsafe extern "C" fn(types::ncclComm_t) -> c_int,
    comm_destroy: unsafe extern "C" fn(types::ncclComm_t) -> c_int,
    comm_abort: unsafe extern "C" fn(types::ncclComm_t) -> c_int,
    all_reduce: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        c_uint,
        c_uint,
        types::ncclComm_t,
        types::cudaStream_t,
    ) -> c_int,
    reduce_scatter: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        c_uint,
        c_uint,
        types::ncclComm_t,
        types::cudaStream_t,
    ) -> c_int,
    all_gather: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        c_uint,
        types::ncclComm_t,
        types::cudaStream_t,
    ) -> c_int,
    broadcast: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        c_uint,
        c_int,
        types::ncclComm_t,
        types::cudaStream_t,
    ) -> c_int,
    get_error_string: unsafe extern "C" fn(c_int) -> *const c_char,
}

impl Nccl {
    /// Returns NCCL, opened once for the life of the process.
    fn get() -> Result<&'static Self, DeviceError> {
        static NCCL: OnceLock<Result<Nccl, DeviceError>> = OnceLock::new();
        NCCL.get_or_init(Self::open).as_ref().map_err(Clone::clone)
    }

    fn open() -> Result<Self, DeviceError> {
        let mut problems = Vec::new();
        for name in NCCL_NAMES {
            // SAFETY: NCCL's initialisers only set up its own state.
            match unsafe { SharedLibrary::new(name) } {
                Ok(library) => return Self::of(library),
                Err(error) => problems.push(error.to_string()),
            }
        }
        Err(DeviceError::NoNccl { problems: problems.join("; ") })
    }

    fn of(library: SharedLibrary) -> Result<Self, DeviceError> {
        // Never unloaded: the function pointers outlive every borrow, and NCCL runs threads of its own.
        let library: &'static SharedLibrary = Box::leak(Box::new(library));
        Ok(Self {
            get_version: symbol(library, "ncclGetVersion")?,
            get_unique_id: symbol(library, "ncclGetUniqueId")?,
            comm_init_rank_config: symbol(library, "ncclCommInitRankConfig")?,
            comm_get_async_error: symbol(library, "ncclCommGetAsyncError")?,
            comm_finalize: symbol(library, "ncclCommFinalize")?,
            comm_destroy: symbol(library, "ncclCommDestroy")?,
            comm_abort: symbol(library, "ncclCommAbort")?,
            all_reduce: symbol(library, "ncclAllReduce")?,
            reduce_scatter: symbol(library, "ncclReduceScatter")?,
            all_gather: symbol(library, "ncclAllGather")?,
            broadcast: symbol(library, "ncclBroadcast")?,
            get_error_string: symbol(library, "ncclGetErrorString")?,
        })
    }

    /// Converts a result code to an error. `ncclInProgress` is not an error.
    fn check(&self, call: &'static str, code: c_int) -> Result<(), DeviceError> {
        if matches!(code, SUCCESS | IN_PROGRESS) {
            return Ok(());
        }
        // SAFETY: NCCL returns a string constant for every code.
        let text = unsafe { (self.get_error_string)(code) };
        Err(DeviceError::Call { call, message: format!("{} (code {code})", describe(text)) })
    }
}

fn symbol<F: Copy>(library: &'static SharedLibrary, name: &'static str) -> Result<F, DeviceError> {
    // SAFETY: every caller asks for the type that `nccl.h` declares under this name.
    let found = unsafe { library.get::<F>(name.as_bytes()) };
    found.map(|symbol| *symbol).map_err(|_| DeviceError::OldNccl { symbol: name })
}

/// Whether there is a driver, looked for once. First by the name that it is installed under: the other one may be a stub.
fn has_driver() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        ["libcuda.so.1", "libcuda.so"].into_iter().any(|name| {
            // SAFETY: opening the driver's library runs its initialisers, which any CUDA program relies on.
            match unsafe { SharedLibrary::new(name) } {
                Ok(library) => {
                    // Never closed: the driver is used as long as the process lives.
                    std::mem::forget(library);
                    true
                }
                Err(_) => false,
            }
        })
    })
}

/// NCCL, and the driver's primary context of one device.
#[derive(Debug)]
pub(crate) struct Library {
    nccl: &'static Nccl,
    /// Index among the visible devices.
    index: usize,
    device: cuda::CUdevice,
    context: Context,
}

/// A context handle, which the driver allows any thread to use.
#[derive(Clone, Copy, Debug)]
struct Context(cuda::CUcontext);

// SAFETY: a CUDA context belongs to the process; every call makes it current for its own thread first.
unsafe impl Send for Context {}
// SAFETY: as above; the driver locks what it shares.
unsafe impl Sync for Context {}

impl Library {
    pub(crate) fn open(index: usize) -> Result<Self, DeviceError> {
        // Checked first, because `cudarc` panics when the driver is missing.
        if !has_driver() {
            return Err(DeviceError::NoDriver);
        }
        let nccl = Nccl::get()?;
        let mut count = 0;
        let mut device = 0;
        let mut context = ptr::null_mut();
        // SAFETY: every pointer is to a local of the right type, and the calls are in the order that
        // the driver requires.
        unsafe {
            check("cuInit", cuda::cuInit(0))?;
            check("cuDeviceGetCount", cuda::cuDeviceGetCount(&mut count))?;
            let count = usize::try_from(count).unwrap_or(0);
            let ordinal = c_int::try_from(index).ok().filter(|_| index < count);
            let Some(ordinal) = ordinal else { return Err(DeviceError::NoDevice { index, count }) };
            check("cuDeviceGet", cuda::cuDeviceGet(&mut device, ordinal))?;
            check("cuDevicePrimaryCtxRetain", cuda::cuDevicePrimaryCtxRetain(&mut context, device))?;
        }
        Ok(Self { nccl, index, device, context: Context(context) })
    }

    /// Makes the device's context current on the calling thread.
    fn enter(&self) -> Result<(), DeviceError> {
        // SAFETY: the context is retained until this value is dropped.
        check("cuCtxSetCurrent", unsafe { cuda::cuCtxSetCurrent(self.context.0) })
    }

    /// Frees a resource. Errors are only logged, since callers are destructors.
    fn release(&self, call: &'static str, free: impl FnOnce() -> cuda::CUresult) {
        if let Err(error) = self.enter().and_then(|()| check(call, free())) {
            tracing::warn!(%error, "a device resource was not freed");
        }
    }

    fn end(&self, call: &'static str, end: impl FnOnce() -> c_int) {
        if let Err(error) = self.enter().and_then(|()| self.nccl.check(call, end())) {
            tracing::warn!(%error, "the NCCL communicator did not end well");
        }
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        // SAFETY: pairs with the retain in `open`; streams, events and memory keep this value alive.
        let _ = unsafe { cuda::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

// In the calls below, handles were created by this value and not yet destroyed by their owners (see `Api`); other
// pointers are to locals of the right type. `enter` has made the context current.
impl Api for Library {
    fn versions(&self) -> Result<Versions, DeviceError> {
        let mut nccl = 0;
        let mut cuda = 0;
        // SAFETY: see above.
        self.nccl.check("ncclGetVersion", unsafe { (self.nccl.get_version)(&mut nccl) })?;
        // SAFETY: see above.
        check("cuDriverGetVersion", unsafe { cuda::cuDriverGetVersion(&mut cuda) })?;
        Ok(Versions { nccl, cuda })
    }

    fn index(&self) -> Option<usize> {
        Some(self.index)
    }

    fn create_stream(&self) -> Result<Stream, DeviceError> {
        self.enter()?;
        let mut stream = ptr::null_mut();
        // Non-blocking streams do not synchronise with the default stream, on which others may compute.
        let flags = cuda::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as c_uint;
        // SAFETY: see above.
        check("cuStreamCreate", unsafe { cuda::cuStreamCreate(&mut stream, flags) })?;
        Ok(Stream(stream as usize))
    }

    fn destroy_stream(&self, stream: Stream) {
        // SAFETY: see above.
        self.release("cuStreamDestroy", || unsafe { cuda::cuStreamDestroy_v2(stream.0 as cuda::CUstream) });
    }

    fn create_event(&self) -> Result<Event, DeviceError> {
        self.enter()?;
        let mut event = ptr::null_mut();
        // Without time stamps, waiting for an event and querying it are cheaper.
        let flags = cuda::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING as c_uint;
        // SAFETY: see above.
        check("cuEventCreate", unsafe { cuda::cuEventCreate(&mut event, flags) })?;
        Ok(Event(event as usize))
    }

    fn destroy_event(&self, event: Event) {
        // SAFETY: see above; the driver frees an event that is still waited for once it is reached.
        self.release("cuEventDestroy", || unsafe { cuda::cuEventDestroy_v2(event.0 as cuda::CUevent) });
    }

    fn record(&self, event: Event, stream: Stream) -> Result<(), DeviceError> {
        self.enter()?;
        // SAFETY: see above; for a foreign stream, the caller of `CudaDevice::buffer` guarantees validity.
        check("cuEventRecord", unsafe { cuda::cuEventRecord(event.0 as cuda::CUevent, stream.0 as cuda::CUstream) })
    }

    fn wait_for(&self, stream: Stream, event: Event) -> Result<(), DeviceError> {
        self.enter()?;
        let stream = stream.0 as cuda::CUstream;
        let event = event.0 as cuda::CUevent;
        // SAFETY: see above.
        check("cuStreamWaitEvent", unsafe { cuda::cuStreamWaitEvent(stream, event, 0) })
    }

    fn is_reached(&self, event: Event) -> Result<bool, DeviceError> {
        self.enter()?;
        // SAFETY: see above.
        match unsafe { cuda::cuEventQuery(event.0 as cuda::CUevent) } {
            cuda::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => check("cuEventQuery", result).map(|()| true),
        }
    }

    fn allocate(&self, bytes: usize) -> Result<Pointer, DeviceError> {
        self.enter()?;
        let mut pointer = 0;
        // At least one byte: the driver refuses an empty allocation.
        // SAFETY: see above.
        check("cuMemAlloc", unsafe { cuda::cuMemAlloc_v2(&mut pointer, bytes.max(1)) })?;
        Ok(Pointer(pointer))
    }

    fn free(&self, memory: Pointer) {
        // SAFETY: see above.
        self.release("cuMemFree", || unsafe { cuda::cuMemFree_v2(memory.0) });
    }

    fn upload(&self, from: &[u8], to: Pointer) -> Result<(), DeviceError> {
        self.enter()?;
        // SAFETY: `DeviceMemory` has checked that the bytes fit.
        let result = unsafe { cuda::cuMemcpyHtoD_v2(to.0, from.as_ptr().cast(), from.len()) };
        check("cuMemcpyHtoD", result)
    }

    fn download(&self, from: Pointer, to: &mut [u8]) -> Result<(), DeviceError> {
        self.enter()?;
        // SAFETY: `DeviceMemory` has checked that there are as many bytes.
        let result = unsafe { cuda::cuMemcpyDtoH_v2(to.as_mut_ptr().cast(), from.0, to.len()) };
        check("cuMemcpyDtoH", result)
    }

    fn copy(&self, from: Pointer, to: Pointer, bytes: usize, stream: Stream) -> Result<(), DeviceError> {
        self.enter()?;
        // SAFETY: `DeviceMemory` copies within itself.
        let result = unsafe { cuda::cuMemcpyDtoDAsync_v2(to.0, from.0, bytes, stream.0 as cuda::CUstream) };
        check("cuMemcpyDtoDAsync", result)
    }

    fn unique_id(&self) -> Result<UniqueId, DeviceError> {
        self.enter()?;
        let mut id = types::ncclUniqueId { internal: [0; 128] };
        // SAFETY: see above.
        self.nccl.check("ncclGetUniqueId", unsafe { (self.nccl.get_unique_id)(&mut id) })?;
        Ok(id.internal.map(|byte| byte as u8))
    }

    fn begin(&self, id: &UniqueId, world_size: usize, rank: usize) -> Result<Comm, DeviceError> {
        self.enter()?;
        let call = "ncclCommInitRankConfig";
        let number = |value: usize| {
            let message = format!("{value} is no number of ranks");
            c_int::try_from(value).map_err(|_| DeviceError::Call { call, message })
        };
        let world_size = number(world_size)?;
        let rank = number(rank)?;
        let id = types::ncclUniqueId { internal: id.map(|byte| byte as c_char) };
        let mut config = types::ncclConfig_t {
            size: size_of::<types::ncclConfig_t>(),
            magic: CONFIG_MAGIC,
            version: CONFIG_VERSION,
            blocking: 0,
            cgaClusterSize: UNDEFINED,
            minCTAs: UNDEFINED,
            maxCTAs: UNDEFINED,
            netName: ptr::null(),
            splitShare: UNDEFINED,
        };
        let mut comm = ptr::null_mut();
        // SAFETY: see above; NCCL copies the configuration before it returns.
        let code = unsafe { (self.nccl.comm_init_rank_config)(&mut comm, world_size, id, rank, &mut config) };
        self.nccl.check(call, code)?;
        Ok(Comm(comm as usize))
    }

    fn is_settled(&self, comm: Comm) -> Result<bool, DeviceError> {
        let call = "ncclCommGetAsyncError";
        let mut state = SUCCESS;
        // SAFETY: see above.
        let code = unsafe { (self.nccl.comm_get_async_error)(comm.0 as types::ncclComm_t, &mut state) };
        self.nccl.check(call, code)?;
        self.nccl.check("NCCL", state)?;
        Ok(state == SUCCESS)
    }

    fn enqueue(&self, comm: Comm, launch: Launch, stream: Stream) -> Result<(), DeviceError> {
        self.enter()?;
        let comm = comm.0 as types::ncclComm_t;
        let stream = stream.0 as types::cudaStream_t;
        let nccl = self.nccl;
        let at = |pointer: Pointer, offset: usize| (pointer.0 as usize + offset) as *mut c_void;
        // SAFETY: see above. The maker of the buffer guarantees its memory until the operation has returned, and
        // `communicator` took the lengths from the buffer. NCCL works in place if this rank's part lies at its place in
        // the whole buffer.
        unsafe {
            match launch {
                Launch::AllReduceSum { data, numbers } => {
                    let data = at(data, 0);
                    let code = (nccl.all_reduce)(data, data, numbers, FLOAT32, SUM, comm, stream);
                    nccl.check("ncclAllReduce", code)
                }
                Launch::ReduceScatterSum { data, part, rank } => {
                    let mine = at(data, rank * part * size_of::<f32>());
                    let code = (nccl.reduce_scatter)(at(data, 0), mine, part, FLOAT32, SUM, comm, stream);
                    nccl.check("ncclReduceScatter", code)
                }
                Launch::AllGather { data, part, rank } => {
                    let code = (nccl.all_gather)(at(data, rank * part), at(data, 0), part, UINT8, comm, stream);
                    nccl.check("ncclAllGather", code)
                }
                Launch::Broadcast { data, bytes, root } => {
                    let data = at(data, 0);
                    let root = c_int::try_from(root).unwrap_or(c_int::MAX);
                    nccl.check("ncclBroadcast", (nccl.broadcast)(data, data, bytes, UINT8, root, comm, stream))
                }
            }
        }
    }

    fn finalize(&self, comm: Comm) -> Result<(), DeviceError> {
        self.enter()?;
        // SAFETY: see above.
        self.nccl.check("ncclCommFinalize", unsafe { (self.nccl.comm_finalize)(comm.0 as types::ncclComm_t) })
    }

    fn destroy(&self, comm: Comm) {
        // SAFETY: see above; the owner drops the handle.
        self.end("ncclCommDestroy", || unsafe { (self.nccl.comm_destroy)(comm.0 as types::ncclComm_t) });
    }

    fn abort(&self, comm: Comm) {
        // SAFETY: see above; the owner drops the handle.
        self.end("ncclCommAbort", || unsafe { (self.nccl.comm_abort)(comm.0 as types::ncclComm_t) });
    }

    fn leave(&self, why: &str) {
        tracing::error!("{why}; this process exits, because its communicator cannot be aborted");
        // Best effort: there is no caller left to report to.
        let _ = std::io::Write::flush(&mut std::io::stderr());
        // SAFETY: the call does not return, and touches no memory of this process. Destructors of libraries would wait for the
        // thread that is stuck.
        unsafe { nix::libc::_exit(EXIT_AGAIN) }
    }
}

/// Converts a result of the driver to an error.
fn check(call: &'static str, result: cuda::CUresult) -> Result<(), DeviceError> {
    if result == cuda::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = ptr::null();
    // SAFETY: the driver stores a string constant, or null for an unknown code.
    let _ = unsafe { cuda::cuGetErrorString(result, &mut text) };
    Err(DeviceError::Call { call, message: format!("{} (code {})", describe(text), result as c_uint) })
}

fn describe(text: *const c_char) -> String {
    if text.is_null() {
        return "unknown error".to_owned();
    }
    // SAFETY: the libraries return zero-terminated constants.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let has_driver = has_driver();
        match Library::open(9999) {
            Err(DeviceError::NoDriver) => assert!(!has_driver),
            Err(DeviceError::NoNccl { problems }) => assert!(problems.contains("libnccl.so.2"), "{problems}"),
            // This machine has both.
            Err(DeviceError::NoDevice { index: 9999, .. } | DeviceError::Call { call: "cuInit", .. }) => {}
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_configuration_is_that_of_its_version() {
        // Nine fields, as `nccl.h` of 2.22 declares them.
        assert_eq!(size_of::<types::ncclConfig_t>(), 48);
        assert_eq!(size_of::<types::ncclUniqueId>(), 128);
    }
}
