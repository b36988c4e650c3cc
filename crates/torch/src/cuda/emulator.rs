//! Kernels on a processor: their text, compiled by the C++ compiler of the system after a header that runs threads in
//! turn.
#![expect(unsafe_code, reason = "what was compiled is a C library")]

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fmt::Write;
use std::process::Command;
use std::ptr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use libloading::Library;
use tch::Device;

use super::source::KERNELS;
use super::{KernelError, KernelShape, Launch, Machine};

type Function = unsafe extern "C" fn(*mut *mut c_void, *const c_uint, c_uint, c_int) -> *const c_char;

/// A processor that runs kernels slowly and one at a time, and refuses barriers that not all threads reach.
#[derive(Debug)]
pub(super) struct Emulator {
    functions: HashMap<&'static str, Function>,
    /// Its threads live in globals of the library.
    running: Mutex<()>,
    backwards: AtomicBool,
    // Declared after the functions, so that it is dropped after their last use.
    _library: Library,
}

impl Emulator {
    pub(super) fn load(shape: &KernelShape) -> Result<Self, KernelError> {
        let folder = Scratch::create()?;
        let source = folder.0.join("kernels.cpp");
        let library = folder.0.join("kernels.so");
        let mut text = include_str!("emulator.h").to_owned() + &shape.text();
        for kernel in KERNELS {
            let _ = writeln!(
                text,
                "extern \"C\" const char* launch_{kernel}(void** a, const unsigned* grid, unsigned threads, int backwards) \
                 {{ return emulator::launch({kernel}, a, grid, threads, backwards); }}"
            );
        }
        let call = |call: &str, message: String| KernelError::Call { call: call.to_owned(), message };
        std::fs::write(&source, text).map_err(|error| call("write the kernels", error.to_string()))?;
        let compiled = Command::new(compiler())
            // Rounding is that of the kernels' operations, not of others that a processor may have.
            .args(["-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-w", "-o"])
            .args([&library, &source])
            .output()
            .map_err(|error| KernelError::NoCompiler { problems: format!("{}: {error}", compiler().display()) })?;
        if !compiled.status.success() {
            return Err(KernelError::Compile { log: String::from_utf8_lossy(&compiled.stderr).into_owned() });
        }
        // SAFETY: the library is what was compiled above: it has no initialisers of its own, and functions of this
        // signature.
        unsafe {
            let library = Library::new(&library).map_err(|error| call("open the kernels", error.to_string()))?;
            let mut functions = HashMap::new();
            for kernel in KERNELS {
                let symbol = library.get::<Function>(format!("launch_{kernel}").as_bytes());
                functions.insert(kernel, *symbol.map_err(|error| call(kernel, error.to_string()))?);
            }
            Ok(Self { functions, running: Mutex::new(()), backwards: AtomicBool::new(false), _library: library })
        }
    }
}

/// The compiler that `CXX` names, or `c++`.
fn compiler() -> std::path::PathBuf {
    std::env::var_os("CXX").map_or_else(|| "c++".into(), Into::into)
}

impl Machine for Emulator {
    fn device(&self) -> Device {
        Device::Cpu
    }

    fn processors(&self) -> u32 {
        // As many as make a few rows take several splits.
        8
    }

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<(), KernelError> {
        let function = self.functions[launch.kernel];
        let mut arguments: Vec<*mut c_void> =
            launch.arguments.iter().map(|argument| ptr::from_ref(&argument.0).cast_mut().cast()).collect();
        let _running = self.running.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // The order of threads and blocks is another one each time: no result may depend on it.
        let backwards = c_int::from(self.backwards.fetch_xor(true, Ordering::Relaxed));
        // SAFETY: the caller has seen to the arguments; only one launch runs at a time.
        let problem = unsafe { function(arguments.as_mut_ptr(), launch.grid.as_ptr(), launch.threads, backwards) };
        if problem.is_null() {
            return Ok(());
        }
        // SAFETY: the library's own text, which ends with a zero byte and is not written while the lock is held.
        let message = unsafe { CStr::from_ptr(problem) }.to_string_lossy().into_owned();
        Err(KernelError::Call { call: launch.kernel.to_owned(), message })
    }
}

/// A folder of its own for what is compiled, removed when it is open.
struct Scratch(std::path::PathBuf);

impl Scratch {
    fn create() -> Result<Self, KernelError> {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("pacs-kernels-{}-{number}", std::process::id()));
        let failed = |error: std::io::Error| KernelError::Call {
            call: format!("create `{}`", path.display()),
            message: error.to_string(),
        };
        std::fs::create_dir_all(&path).map_err(failed)?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Best effort: what is left is a small file in the temporary folder.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
