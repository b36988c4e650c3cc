//! Where the files of libtorch are, so that what belongs to them is found next to them.
#![expect(unsafe_code, reason = "the loader is a C library")]

use std::ffi::{CStr, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::ptr;

use crate::stream::symbol;

/// The CUDA half of libtorch.
pub(crate) const CUDA_HALF: &str = "libtorch_cuda.so";

/// Where `cargo xtask setup --cuda` installs it, next to the folder of the CPU half.
const INSTALLED: &str = "torch-2.11.0-cuda/site/torch/lib";

/// The file of libtorch in this process: of its CUDA half where that is loaded.
pub(crate) fn libtorch() -> Option<PathBuf> {
    let names = [c"aoti_torch_get_current_cuda_stream", c"aoti_torch_call_dispatcher"];
    let address = names.into_iter().find_map(|name| symbol(name).ok())?;
    let mut info = libc::Dl_info {
        dli_fname: ptr::null(),
        dli_fbase: ptr::null_mut(),
        dli_sname: ptr::null(),
        dli_saddr: ptr::null_mut(),
    };
    // SAFETY: the address is that of a symbol, and the pointer is to a local.
    if unsafe { libc::dladdr(address, &raw mut info) } == 0 || info.dli_fname.is_null() {
        return None;
    }
    // SAFETY: the loader's own text, which ends with a zero byte and lives as long as the library.
    let name = unsafe { CStr::from_ptr(info.dli_fname) };
    std::fs::canonicalize(Path::new(OsStr::from_bytes(name.to_bytes()))).ok()
}

/// Files of the CUDA half that belong to the CPU half in this process: in its folder, or where the set-up has put them.
pub(crate) fn cuda_halves() -> Vec<PathBuf> {
    let Some(library) = libtorch() else { return Vec::new() };
    // `cache/libtorch-2.11.0/torch/lib/libtorch_cpu.so`.
    let beside = library.parent().map(|folder| folder.join(CUDA_HALF));
    let installed = library.ancestors().nth(4).map(|cache| cache.join(INSTALLED).join(CUDA_HALF));
    beside.into_iter().chain(installed).filter(|path| path.is_file()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_of_libtorch_is_known() {
        let path = libtorch().expect("libtorch is loaded");
        let name = path.file_name().and_then(OsStr::to_str).expect("a name");
        assert!(["libtorch_cpu.so", CUDA_HALF].contains(&name) && path.is_absolute(), "{}", path.display());
        assert!(cuda_halves().iter().all(|path| path.is_file()));
    }
}
