/// Why the kernels of a GPU cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    /// The model is none that they can compute.
    #[error("no kernels for {what}; `rollout.kernels = \"reference\"` computes any model")]
    Shape {
        /// What does not fit.
        what: String,
    },
    /// There is no CUDA driver.
    #[error(
        "the CUDA driver `libcuda.so.1` cannot be opened: this machine has no NVIDIA driver, or the container lacks it"
    )]
    NoDriver,
    /// There is no compiler for them.
    #[error(
        "NVRTC cannot be opened ({problems}): put the folder of `libnvrtc.so` on LD_LIBRARY_PATH; Python's torch brings it \
         in `nvidia/cu13/lib` or `nvidia/cuda_nvrtc/lib`"
    )]
    NoCompiler {
        /// What the loader said of each name.
        problems: String,
    },
    /// The kernels do not compile.
    #[error("the kernels do not compile: {log}")]
    Compile {
        /// What the compiler says.
        log: String,
    },
    /// A call failed.
    #[error("{call}: {message}")]
    Call {
        /// The function.
        call: String,
        /// What the library says.
        message: String,
    },
}
