//! The CUDA driver, opened once a process by the name that it is installed under.
//!
//! The loader of `cudarc` opens `libcuda.so` first, which on a machine with the toolkit may be a stub that can do nothing, and
//! looks through up to 17 names each time it is asked whether there is a driver.
#![expect(unsafe_code, reason = "the CUDA driver is a C library")]

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use cudarc::driver::sys::{CUcontext, CUdevice, CUdevice_attribute, CUfunction, CUmodule, CUresult, CUstream};
use libloading::Library;

use super::KernelError;

/// The name that the driver's own installation has, then that of a development one.
const NAMES: [&str; 2] = ["libcuda.so.1", "libcuda.so"];

/// The functions of the driver that are used; their signatures are those of `cuda.h`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Driver {
    pub(super) init: unsafe extern "C" fn(c_uint) -> CUresult,
    pub(super) get_device: unsafe extern "C" fn(*mut CUdevice, c_int) -> CUresult,
    pub(super) get_attribute: unsafe extern "C" fn(*mut c_int, CUdevice_attribute, CUdevice) -> CUresult,
    pub(super) retain_context: unsafe extern "C" fn(*mut CUcontext, CUdevice) -> CUresult,
    pub(super) set_context: unsafe extern "C" fn(CUcontext) -> CUresult,
    pub(super) load_module: unsafe extern "C" fn(*mut CUmodule, *const c_void) -> CUresult,
    pub(super) get_function: unsafe extern "C" fn(*mut CUfunction, CUmodule, *const c_char) -> CUresult,
    pub(super) launch: unsafe extern "C" fn(
        CUfunction,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        CUstream,
        *mut *mut c_void,
        *mut *mut c_void,
    ) -> CUresult,
    pub(super) error_string: unsafe extern "C" fn(CUresult, *mut *const c_char) -> CUresult,
}

impl Driver {
    /// The driver of this process.
    ///
    /// # Errors
    /// When there is none.
    pub(super) fn get() -> Result<&'static Self, KernelError> {
        static DRIVER: OnceLock<Option<Driver>> = OnceLock::new();
        DRIVER.get_or_init(|| NAMES.iter().find_map(|name| Self::open(name).ok())).as_ref().ok_or(KernelError::NoDriver)
    }

    fn open(name: &str) -> Result<Self, libloading::Error> {
        // SAFETY: opening the driver's library runs its initialisers, which any CUDA program relies on, and the symbols are
        // functions of these signatures.
        unsafe {
            // Never closed: libtorch works with it as long as the process lives.
            let library: &'static Library = Box::leak(Box::new(Library::new(name)?));
            Ok(Self {
                init: *library.get(b"cuInit")?,
                get_device: *library.get(b"cuDeviceGet")?,
                get_attribute: *library.get(b"cuDeviceGetAttribute")?,
                retain_context: *library.get(b"cuDevicePrimaryCtxRetain")?,
                set_context: *library.get(b"cuCtxSetCurrent")?,
                load_module: *library.get(b"cuModuleLoadData")?,
                get_function: *library.get(b"cuModuleGetFunction")?,
                launch: *library.get(b"cuLaunchKernel")?,
                error_string: *library.get(b"cuGetErrorString")?,
            })
        }
    }
}
