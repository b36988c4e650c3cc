//! NVRTC, which compiles the kernels: opened at run time, for it comes with libtorch's CUDA half or not at all.
#![expect(unsafe_code, reason = "NVRTC is a C library")]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr;

use libloading::Library;

use super::KernelError;

/// Names that NVRTC is installed under: libtorch 2.11 brings that of CUDA 13; older ones compile the kernels, too.
const NAMES: [&str; 3] = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];

type Program = *mut c_void;

/// The functions of NVRTC that are used; their signatures are those of `nvrtc.h`. The loader of `cudarc` panics where the
/// library is missing.
pub(crate) struct Nvrtc {
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
    log_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    log: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    ptx_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    ptx: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
}

impl Nvrtc {
    /// Opens NVRTC by the names that it is installed under.
    pub(crate) fn open() -> Result<Self, KernelError> {
        let mut problems = Vec::new();
        for name in NAMES {
            match Self::open_at(name) {
                Ok(found) => return Ok(found),
                Err(problem) => problems.push(problem.to_string()),
            }
        }
        Err(KernelError::NoCompiler { problems: problems.join("; ") })
    }

    /// Opens the library of a name or a path.
    pub(crate) fn open_at(name: &str) -> Result<Self, libloading::Error> {
        // SAFETY: NVRTC's initialisers set up nothing but its own state, and the signatures are those of its header.
        unsafe {
            if let Some(builtins) = builtins(Path::new(name)).and_then(|path| Library::new(path).ok()) {
                Box::leak(Box::new(builtins));
            }
            // Never closed: what it leaves to be done when a thread ends would no longer be there.
            let library: &'static Library = Box::leak(Box::new(Library::new(name)?));
            Ok(Self {
                create: *library.get(b"nvrtcCreateProgram")?,
                compile: *library.get(b"nvrtcCompileProgram")?,
                destroy: *library.get(b"nvrtcDestroyProgram")?,
                log_size: *library.get(b"nvrtcGetProgramLogSize")?,
                log: *library.get(b"nvrtcGetProgramLog")?,
                ptx_size: *library.get(b"nvrtcGetPTXSize")?,
                ptx: *library.get(b"nvrtcGetPTX")?,
                error_string: *library.get(b"nvrtcGetErrorString")?,
            })
        }
    }

    /// PTX of a text, for devices of this compute capability (80 for 8.0) and newer. Ends with a zero byte.
    pub(crate) fn compile(&self, text: &str, capability: u32) -> Result<Vec<u8>, KernelError> {
        let text = CString::new(text).expect("no zero byte in the text of the kernels");
        let mut program: Program = ptr::null_mut();
        // SAFETY: the strings live until the calls return, no headers are passed, and `program` is a local.
        let created =
            unsafe { (self.create)(&mut program, text.as_ptr(), c"kernels.cu".as_ptr(), 0, ptr::null(), ptr::null()) };
        self.check("nvrtcCreateProgram", created)?;
        let result = self.compile_program(program, capability);
        // SAFETY: the program was created above and is used no more.
        unsafe { (self.destroy)(&mut program) };
        result
    }

    fn compile_program(&self, program: Program, capability: u32) -> Result<Vec<u8>, KernelError> {
        let options = [format!("--gpu-architecture=compute_{capability}"), "--std=c++17".to_owned()];
        let options = options.map(|option| CString::new(option).expect("no zero byte in an option"));
        let pointers = options.each_ref().map(|option| option.as_ptr());
        // SAFETY: the program is alive, and the options live until the call returns.
        let compiled = unsafe { (self.compile)(program, pointers.len() as c_int, pointers.as_ptr()) };
        if compiled != 0 {
            let log = self.read(program, self.log_size, self.log).unwrap_or_default();
            let log = String::from_utf8_lossy(&log).trim_end_matches('\0').trim().to_owned();
            return Err(KernelError::Compile { log: format!("{}: {log}", self.message(compiled)) });
        }
        self.read(program, self.ptx_size, self.ptx)
    }

    fn read(
        &self,
        program: Program,
        size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
        get: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    ) -> Result<Vec<u8>, KernelError> {
        let mut bytes = 0;
        // SAFETY: the program is alive, and `bytes` is a local.
        self.check("nvrtcGetSize", unsafe { size(program, &mut bytes) })?;
        let mut text = vec![0u8; bytes];
        // SAFETY: the buffer has the size that was asked for.
        self.check("nvrtcGet", unsafe { get(program, text.as_mut_ptr().cast()) })?;
        Ok(text)
    }

    fn check(&self, call: &str, result: c_int) -> Result<(), KernelError> {
        match result {
            0 => Ok(()),
            _ => Err(KernelError::Call { call: call.to_owned(), message: self.message(result) }),
        }
    }

    fn message(&self, result: c_int) -> String {
        // SAFETY: NVRTC gives a string of its own for every code.
        let text = unsafe { (self.error_string)(result) };
        if text.is_null() {
            return format!("error {result}");
        }
        // SAFETY: as above; it ends with a zero byte.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }
}

/// The half of NVRTC that it opens by name itself, and does not look for in its own folder: open already, it is found.
fn builtins(library: &Path) -> Option<PathBuf> {
    let folder = library.parent().filter(|folder| !folder.as_os_str().is_empty())?;
    let paths = std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path());
    let name = |path: &PathBuf| path.file_name().and_then(|name| name.to_str()).map(str::to_owned);
    paths.into_iter().find(|path| name(path).is_some_and(|name| name.starts_with("libnvrtc-builtins.so")))
}

#[cfg(test)]
mod tests {

    use super::super::source::{KERNELS, KernelShape};
    use super::*;
    use tch::Kind;

    /// NVRTC of the system, of `PACS_NVRTC`, or among libtorch's libraries.
    fn compiler() -> Option<Nvrtc> {
        if let Some(path) = std::env::var_os("PACS_NVRTC") {
            return Some(Nvrtc::open_at(path.to_str().expect("a path of letters")).expect("PACS_NVRTC is NVRTC"));
        }
        let libtorch = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/libtorch");
        let found = find(&libtorch, 6).and_then(|path| Nvrtc::open_at(path.to_str()?).ok());
        found.or_else(|| Nvrtc::open().ok())
    }

    fn find(folder: &Path, depth: usize) -> Option<PathBuf> {
        let entries: Vec<PathBuf> = std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path()).collect();
        let is_it = |path: &&PathBuf| {
            path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("libnvrtc.so"))
        };
        entries.iter().find(is_it).cloned().or_else(|| {
            let folders = entries.iter().filter(|path| depth > 0 && path.is_dir());
            folders.filter_map(|path| find(path, depth - 1)).next()
        })
    }

    #[test]
    fn every_kernel_compiles_for_the_devices_that_are_meant() {
        let Some(compiler) = compiler() else {
            eprintln!("skipped: no NVRTC here; PACS_NVRTC=/path/to/libnvrtc.so.13 names one, no GPU is needed");
            return;
        };
        for (heads, kv_heads, head_dim) in
            [(14, 2, 64), (12, 2, 128), (28, 4, 128), (9, 3, 64), (32, 4, 24), (8, 8, 256)]
        {
            for kind in [Kind::BFloat16, Kind::Float] {
                let text = KernelShape { kind, heads, kv_heads, head_dim }.text();
                for capability in [80, 90] {
                    let ptx = compiler.compile(&text, capability).unwrap_or_else(|error| panic!("{error}"));
                    let ptx = String::from_utf8(ptx).expect("PTX is text");
                    assert!(ptx.contains(&format!(".target sm_{capability}")));
                    for kernel in KERNELS {
                        assert!(ptx.contains(&format!(".entry {kernel}(")), "{kernel} is missing");
                    }
                }
            }
        }
    }

    #[test]
    fn what_does_not_compile_says_why() {
        let Some(compiler) = compiler() else {
            eprintln!("skipped: no NVRTC here");
            return;
        };
        let error = compiler.compile("__global__ void f() { nothing; }", 80).expect_err("it is wrong");
        assert!(error.to_string().contains("nothing"), "{error}");
    }
}
