use std::ffi::{CStr, CString, OsString};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use tch::Device;

use crate::place::{CUDA_HALF, cuda_halves};
use crate::stream::symbol;

/// Why a device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The CUDA half of libtorch is not there or does not load.
    #[error(
        "cannot load libtorch_cuda.so: {0}; `cargo xtask setup --cuda` installs it next to the CPU half, or put torch/lib of a \
         Python's torch 2.11 (pip install torch==2.11.0) on LD_LIBRARY_PATH"
    )]
    NoCudaLibrary(String),
    /// The library is there, a usable GPU is not.
    #[error("libtorch sees no usable CUDA device; check the driver with nvidia-smi and CUDA_VISIBLE_DEVICES")]
    NoDevice,
    /// The process has computed otherwise before: libtorch cannot be set up twice.
    #[error("libtorch computes {before} in this process; it cannot be set up again for {wanted}")]
    SetUp {
        /// Settings that the process has already.
        before: String,
        /// Settings that were asked for.
        wanted: String,
    },
}

/// How libtorch was set up: with CUDA or without, and by how many threads.
static SET_UP: Mutex<Option<(bool, usize)>> = Mutex::new(None);

/// Prepares libtorch for this process and returns the device to compute on.
///
/// Must come before any other libtorch call: a question for CUDA before its library is loaded caches "no CUDA" for good.
/// `threads` 0 means one per core. A second call with the same arguments changes nothing.
///
/// # Errors
/// When `cuda` is asked for and cannot be had, or the process was set up in another way before.
pub fn init(cuda: bool, threads: usize) -> Result<Device, DeviceError> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = if threads == 0 { cores } else { threads };
    let mut set_up = SET_UP.lock().unwrap_or_else(PoisonError::into_inner);
    match *set_up {
        // libtorch aborts when the second of its pools is set again.
        Some(before) if before == (cuda, threads) => {}
        Some(before) => {
            let named =
                |(cuda, threads)| format!("{} with {threads} threads", if cuda { "on CUDA" } else { "on the CPU" });
            return Err(DeviceError::SetUp { before: named(before), wanted: named((cuda, threads)) });
        }
        None => {
            if cuda {
                load_cuda()?;
                reduce_in_float32();
            }
            tch::set_num_threads(i32::try_from(threads).unwrap_or(i32::MAX));
            // One stream of work a process: a second pool would only take cores from the first.
            tch::set_num_interop_threads(1);
            *set_up = Some((cuda, threads));
        }
    }
    if !cuda {
        return Ok(Device::Cpu);
    }
    if tch::Cuda::is_available() { Ok(Device::Cuda(0)) } else { Err(DeviceError::NoDevice) }
}

/// Ends the process at once, without the static destructors of libtorch.
///
/// They do not wait for a thread that still computes: it would find the library's state gone, and the process would end by a
/// panic or a segmentation fault in place of `code`.
pub fn end_process(code: u8) -> ! {
    // Best effort: there is no caller left to report to.
    let _ = std::io::Write::flush(&mut std::io::stdout());
    let _ = std::io::Write::flush(&mut std::io::stderr());
    // SAFETY: the call does not return, and touches no memory of this process.
    unsafe { libc::_exit(i32::from(code)) }
}

/// What libtorch's allocators are set by: its name today, and that of earlier versions.
const ALLOCATOR_SETTINGS: [&str; 2] = ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"];

/// Has products of 16-bit numbers that are divided along their inner dimension add up the parts in float32. libtorch allows
/// cuBLAS to add them up in bfloat16, and the inner dimension of the head's backward is the vocabulary.
fn reduce_in_float32() {
    type GlobalContext = unsafe extern "C" fn() -> *mut libc::c_void;
    type Allow = unsafe extern "C" fn(*mut libc::c_void, bool, bool);
    let symbols = [c"_ZN2at13globalContextEv", c"_ZN2at7Context27setAllowBF16ReductionCuBLASEbb"].map(symbol);
    let [Ok(context), Ok(allow)] = symbols else {
        tracing::warn!("libtorch is not 2.11: products in bfloat16 may be added up in bfloat16");
        return;
    };
    // SAFETY: the symbols are libtorch's functions of these signatures: one that gives a reference to the one context of the
    // process, and a member function that sets two flags of it.
    unsafe {
        let context = std::mem::transmute::<*mut libc::c_void, GlobalContext>(context)();
        std::mem::transmute::<*mut libc::c_void, Allow>(allow)(context, false, true);
    }
}

/// Makes large buffers, of the host and of a GPU, cheap to take and give back; call it first thing in `main`, before any thread
/// is started.
///
/// Every pass of a model takes and frees hundreds of megabytes. By default each large block is mapped anew and its pages
/// are faulted in and cleared one by one, which costs more than an eighth of a training step; kept in one heap, and
/// backed by huge pages, they are there already.
pub fn prepare_allocator() {
    // SAFETY: no other thread runs yet, so nothing reads the environment or allocates meanwhile.
    unsafe {
        #[cfg(target_env = "gnu")]
        {
            // Nothing is mapped on its own, nothing given back to the system. Other arenas than the main one could not
            // hold such blocks.
            libc::mallopt(libc::M_MMAP_MAX, 0);
            libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
            libc::mallopt(libc::M_ARENA_MAX, 1);
        }
        if std::env::var_os("THP_MEM_ALLOC_ENABLE").is_none() {
            std::env::set_var("THP_MEM_ALLOC_ENABLE", "1");
        }
        // Passes differ in size. In segments of fixed size each of them leaves holes, and memory runs out long before it is full.
        if ALLOCATOR_SETTINGS.iter().all(|name| std::env::var_os(name).is_none()) {
            std::env::set_var(ALLOCATOR_SETTINGS[0], "expandable_segments:True");
        }
    }
}

/// Gives the system back what host buffers have freed: call it where much was dropped and something else is to come
/// in its place, for the heap of [`prepare_allocator`] keeps what it has, and a hole is no room for a larger block.
pub fn release_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the call touches free memory only, under the allocator's own locks.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Free and total memory of a GPU (bytes), all processes counted; `None` for host memory, or where CUDA does not say.
#[must_use]
pub fn device_memory(device: Device) -> Option<(u64, u64)> {
    let Device::Cuda(_) = device else { return None };
    type MemGetInfo = unsafe extern "C" fn(*mut usize, *mut usize) -> libc::c_int;
    let mut free = 0usize;
    let mut total = 0usize;
    // SAFETY: the symbol is that of the CUDA runtime that libtorch has loaded, whose signature this is; both pointers are
    // valid for the call. The current device is the one that `init` has returned, the only one of this process.
    let status = unsafe {
        let symbol = libc::dlsym(libc::RTLD_DEFAULT, c"cudaMemGetInfo".as_ptr());
        if symbol.is_null() {
            return None;
        }
        std::mem::transmute::<*mut libc::c_void, MemGetInfo>(symbol)(&raw mut free, &raw mut total)
    };
    (status == 0).then_some((free as u64, total as u64))
}

pub(crate) fn load_cuda() -> Result<(), DeviceError> {
    // By name first, which is where the user says (LD_LIBRARY_PATH), then where it belongs. The libraries below it are found by
    // its own run path.
    let found = cuda_halves().into_iter().map(PathBuf::into_os_string);
    let mut problems = Vec::new();
    for name in std::iter::once(OsString::from(CUDA_HALF)).chain(found) {
        let Ok(name) = CString::new(name.into_encoded_bytes()) else { continue };
        // SAFETY: dlopen and dlerror are called with valid strings; the library stays loaded for the life of the process.
        unsafe {
            if !libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL).is_null() {
                return Ok(());
            }
            let message = libc::dlerror();
            if !message.is_null() {
                problems.push(CStr::from_ptr(message).to_string_lossy().into_owned());
            }
        }
    }
    Err(DeviceError::NoCudaLibrary(problems.join("; ")))
}

/// Bytes of memory that computing on `device` can count on: all of the host's, or what is free on the GPU now. `None` when
/// the system does not say.
#[must_use]
pub fn memory_bytes(device: Device) -> Option<u64> {
    match device {
        Device::Cuda(_) => device_memory(device).map(|(free, _)| free),
        _ => host_bytes(),
    }
}

fn host_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("MemTotal:"))?;
    let kilobytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kilobytes * 1024)
}

/// Whether `device` multiplies bfloat16 in hardware, so that computing in it is faster than in float32.
#[must_use]
pub fn multiplies_bf16(device: Device) -> bool {
    match device {
        Device::Cuda(_) => true,
        #[cfg(target_arch = "x86_64")]
        Device::Cpu => std::arch::is_x86_feature_detected!("avx512bf16"),
        _ => false,
    }
}
