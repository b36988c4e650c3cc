//! NVRTC, which compiles the kernels: opened at run time, for it comes with libtorch's CUDA half or not at all.
#![expect(unsafe_code, reason = "NVRTC is a C library")]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr;

use libloading::Library;

use super::KernelError;
use crate::place::libtorch;

/// Names that NVRTC is installed under: libtorch 2.11 brings that of CUDA 13; older ones compile the kernels, too.
const NAMES: [&str; 3] = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];

/// Where NVIDIA's packages for Python keep it, from the folder that has `torch` in it.
const FOLDERS: [&str; 3] = ["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib", "torch/lib"];

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
    cubin_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    cubin: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    architecture_count: unsafe extern "C" fn(*mut c_int) -> c_int,
    architectures: unsafe extern "C" fn(*mut c_int) -> c_int,
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
}

impl Nvrtc {
    /// Opens the NVRTC that came with libtorch, or else the one that the system finds by name. That of libtorch goes first, so
    /// that LD_LIBRARY_PATH need not be set, and one that happens to be on it for other programs does no harm.
    pub(crate) fn open() -> Result<Self, KernelError> {
        let mut problems = Vec::new();
        for path in beside_libtorch() {
            match path.to_str().map(Self::open_at) {
                Some(Ok(found)) => return Ok(found),
                Some(Err(problem)) => problems.push(problem.to_string()),
                None => problems.push(format!("{} is no UTF-8", path.display())),
            }
        }
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
                cubin_size: *library.get(b"nvrtcGetCUBINSize")?,
                cubin: *library.get(b"nvrtcGetCUBIN")?,
                architecture_count: *library.get(b"nvrtcGetNumSupportedArchs")?,
                architectures: *library.get(b"nvrtcGetSupportedArchs")?,
                error_string: *library.get(b"nvrtcGetErrorString")?,
            })
        }
    }

    /// Machine code of a text for devices of this compute capability (80 for 8.0).
    ///
    /// Not PTX: a driver refuses the PTX of an NVRTC that is newer than itself, even within one major version of CUDA, and takes
    /// a second to compile the rest.
    pub(crate) fn compile(&self, text: &str, capability: u32) -> Result<Vec<u8>, KernelError> {
        let architecture = self.architecture(capability)?;
        let text = CString::new(text).expect("no zero byte in the text of the kernels");
        let mut program: Program = ptr::null_mut();
        // SAFETY: the strings live until the calls return, no headers are passed, and `program` is a local.
        let created =
            unsafe { (self.create)(&mut program, text.as_ptr(), c"kernels.cu".as_ptr(), 0, ptr::null(), ptr::null()) };
        self.check("nvrtcCreateProgram", created)?;
        let built = self.build(program, architecture, None);
        let result = built.and_then(|()| self.read(program, self.cubin_size, self.cubin));
        // SAFETY: the program was created above and is used no more.
        unsafe { (self.destroy)(&mut program) };
        result
    }

    /// What to compile for, so that a device of this compute capability runs it.
    fn architecture(&self, capability: u32) -> Result<u32, KernelError> {
        let mut count = 0;
        // SAFETY: the pointer is to a local.
        self.check("nvrtcGetNumSupportedArchs", unsafe { (self.architecture_count)(&mut count) })?;
        let mut known = vec![0; usize::try_from(count).unwrap_or(0)];
        // SAFETY: there is room for as many as were announced.
        self.check("nvrtcGetSupportedArchs", unsafe { (self.architectures)(known.as_mut_ptr()) })?;
        let known: Vec<u32> = known.into_iter().filter_map(|known| u32::try_from(known).ok()).collect();
        closest(&known, capability).ok_or(KernelError::Architecture { capability, known })
    }

    fn build(&self, program: Program, architecture: u32, option: Option<&str>) -> Result<(), KernelError> {
        let options = [format!("--gpu-architecture=sm_{architecture}"), "--std=c++17".to_owned()];
        let options = options.into_iter().chain(option.map(str::to_owned));
        let options: Vec<_> = options.map(|option| CString::new(option).expect("no zero byte in an option")).collect();
        let pointers: Vec<_> = options.iter().map(|option| option.as_ptr()).collect();
        // SAFETY: the program is alive, and the options live until the call returns.
        let compiled = unsafe { (self.compile)(program, pointers.len() as c_int, pointers.as_ptr()) };
        if compiled != 0 {
            let log = self.read(program, self.log_size, self.log).unwrap_or_default();
            let log = String::from_utf8_lossy(&log).trim_end_matches('\0').trim().to_owned();
            return Err(KernelError::Compile { log: format!("{}: {log}", self.message(compiled)) });
        }
        Ok(())
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

/// The newest architecture whose machine code a device runs: of its own major version, and not newer than it is.
fn closest(known: &[u32], capability: u32) -> Option<u32> {
    known.iter().copied().filter(|known| known / 10 == capability / 10 && *known <= capability).max()
}

/// Paths of NVRTC in the packages that libtorch was installed with, as far as they are there.
fn beside_libtorch() -> Vec<PathBuf> {
    let Some(library) = libtorch() else { return Vec::new() };
    // `site-packages/torch/lib/libtorch_cpu.so`.
    let Some(packages) = library.ancestors().nth(3) else { return Vec::new() };
    let paths = FOLDERS.iter().flat_map(|folder| NAMES.map(|name| packages.join(folder).join(name)));
    paths.filter(|path| path.is_file()).collect()
}

/// The half of NVRTC that it opens by name itself, and does not look for in its own folder: open already, it is found.
fn builtins(library: &Path) -> Option<PathBuf> {
    let folder = library.parent().filter(|folder| !folder.as_os_str().is_empty())?;
    let paths = std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path());
    let name = |path: &PathBuf| path.file_name().and_then(|name| name.to_str()).map(str::to_owned);
    let is_builtins = |name: String| name.starts_with("libnvrtc-builtins.so");
    paths.into_iter().find(|path| name(path).is_some_and(is_builtins))
}

#[cfg(test)]
mod tests {
    use super::super::source::{KERNELS, KernelShape};
    use super::*;
    use tch::Kind;

    /// NVRTC of `PACS_NVRTC`, or where a worker would find it.
    fn compiler() -> Option<Nvrtc> {
        match std::env::var_os("PACS_NVRTC") {
            Some(path) => Some(Nvrtc::open_at(path.to_str().expect("a path of letters")).expect("PACS_NVRTC is NVRTC")),
            None => Nvrtc::open().ok(),
        }
    }

    const SKIPPED: &str = "SKIPPED: no NVRTC here; PACS_NVRTC=/path/to/libnvrtc.so.13 names one (`pip install \
                           nvidia-cuda-nvrtc==13.0.*`), no GPU is needed";

    /// Heads, key heads, width: of Qwen2.5 0.5B, 1.5B, 7B and 14B, SmolLM2, Llama 1B and 8B, Llama 2, Gemma, and odd ones.
    const SHAPES: [(usize, usize, usize); 12] = [
        (14, 2, 64),
        (12, 2, 128),
        (28, 4, 128),
        (40, 8, 128),
        (9, 3, 64),
        (32, 8, 64),
        (32, 8, 128),
        (32, 32, 128),
        (16, 8, 256),
        (8, 1, 256),
        (32, 4, 24),
        (4, 2, 96),
    ];

    impl Nvrtc {
        /// What the assembler says of every kernel of a text.
        fn usage(&self, text: &str, architecture: u32) -> Vec<Usage> {
            let text = CString::new(text).expect("text");
            let mut program: Program = ptr::null_mut();
            // SAFETY: as in `compile`.
            let created = unsafe {
                (self.create)(&mut program, text.as_ptr(), c"kernels.cu".as_ptr(), 0, ptr::null(), ptr::null())
            };
            self.check("nvrtcCreateProgram", created).expect("created");
            self.build(program, architecture, Some("--ptxas-options=-v")).unwrap_or_else(|error| panic!("{error}"));
            let log = self.read(program, self.log_size, self.log).expect("a log");
            // SAFETY: as in `compile`.
            unsafe { (self.destroy)(&mut program) };
            Usage::read(&String::from_utf8_lossy(&log))
        }
    }

    /// What a kernel takes of a multiprocessor.
    #[derive(Clone, Debug, Default, PartialEq, Eq)]
    struct Usage {
        kernel: String,
        registers: u32,
        shared_bytes: u32,
        spilled_bytes: u32,
    }

    impl Usage {
        /// Those of a log of `ptxas -v`.
        fn read(log: &str) -> Vec<Self> {
            let before = |line: &str, unit: &str| {
                let head = line.split(unit).next().filter(|head| head.len() < line.len())?;
                head.split_whitespace().next_back()?.parse().ok()
            };
            let mut found: Vec<Self> = Vec::new();
            for line in log.lines() {
                if line.contains("Compiling entry function") {
                    let kernel = line.split('\'').nth(1).expect("a name in quotes").to_owned();
                    found.push(Self { kernel, ..Self::default() });
                    continue;
                }
                let Some(usage) = found.last_mut() else { continue };
                usage.spilled_bytes += before(line, " bytes spill stores").unwrap_or(0);
                usage.registers += before(line, " registers").unwrap_or(0);
                usage.shared_bytes += before(line, " bytes smem").unwrap_or(0);
            }
            found
        }
    }

    #[test]
    fn what_the_assembler_says_is_understood() {
        let log = "ptxas info    : Compiling entry function 'attend_blocks' for 'sm_90'\n\
                   ptxas info    : Function properties for attend_blocks\n\
                   ptxas         .     24 bytes stack frame, 20 bytes spill stores, 28 bytes spill loads\n\
                   ptxas info    : Used 168 registers, used 1 barriers, 9184 bytes smem\n";
        let usage = Usage { kernel: "attend_blocks".to_owned(), registers: 168, shared_bytes: 9184, spilled_bytes: 20 };
        assert_eq!(Usage::read(log), [usage]);
    }

    /// Registers that do not fit go through the very memory that decoding waits for, so none may.
    #[test]
    fn every_kernel_compiles_for_the_devices_that_are_meant_and_spills_nothing() {
        let Some(compiler) = compiler() else {
            eprintln!("{SKIPPED}");
            return;
        };
        let check = |what: &str, text: &str, architecture: u32| {
            let found = compiler.usage(text, architecture);
            for Usage { kernel, registers, shared_bytes, spilled_bytes } in &found {
                eprintln!(
                    "sm_{architecture} {what} {kernel}: {registers} registers, {shared_bytes} bytes shared, \
                     {spilled_bytes} spilled"
                );
                assert_eq!(*spilled_bytes, 0, "sm_{architecture} {what} {kernel} spills");
                assert!(*registers > 0 && *shared_bytes <= 48 << 10, "sm_{architecture} {what} {kernel}");
            }
            found.into_iter().map(|usage| usage.kernel).collect::<Vec<_>>()
        };
        for architecture in [80, 90, 100] {
            for kind in [Kind::BFloat16, Kind::Float] {
                let text = KernelShape { kind, heads: 14, kv_heads: 2, head_dim: 64 }.text();
                let found = check(&format!("{kind:?}"), &text, architecture);
                let missing: Vec<_> =
                    KERNELS.iter().filter(|kernel| !found.iter().any(|found| found == *kernel)).collect();
                assert!(missing.is_empty(), "{missing:?}");
            }
            // Most of the text is the same for all shapes.
            for (heads, kv_heads, head_dim) in SHAPES {
                let shape = KernelShape { kind: Kind::BFloat16, heads, kv_heads, head_dim };
                check(&format!("{heads}/{kv_heads} x {head_dim}"), &shape.attention_text(), architecture);
            }
        }
    }

    #[test]
    fn machine_code_is_for_the_major_version_of_the_device() {
        let known = [75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121];
        let found = [75, 80, 86, 89, 90, 100, 101, 103, 121, 122].map(|capability| closest(&known, capability));
        assert_eq!(found, [75, 80, 86, 89, 90, 100, 100, 103, 121, 121].map(Some));
        assert_eq!([70, 72, 130].map(|capability| closest(&known, capability)), [None; 3]);
        let Some(compiler) = compiler() else {
            eprintln!("{SKIPPED}");
            return;
        };
        let code = compiler.compile("extern \"C\" __global__ void f() {}", 90).expect("compiles");
        assert_eq!(code[..4], *b"\x7fELF");
        let refused = compiler.compile("", 990).expect_err("there is no such device");
        assert!(refused.to_string().contains("compute capability 99.0"), "{refused}");
    }

    #[test]
    fn what_does_not_compile_says_why() {
        let Some(compiler) = compiler() else {
            eprintln!("{SKIPPED}");
            return;
        };
        let error = compiler.compile("__global__ void f() { nothing; }", 80).expect_err("it is wrong");
        assert!(error.to_string().contains("nothing"), "{error}");
    }
}
