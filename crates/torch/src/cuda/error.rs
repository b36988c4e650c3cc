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
        "NVRTC cannot be opened ({problems}): it comes with Python's torch in `nvidia/cu13/lib`, where it is found by itself \
         (`cargo xtask setup --cuda` installs it); otherwise put the folder of `libnvrtc.so.13` on LD_LIBRARY_PATH"
    )]
    NoCompiler {
        /// What the loader said of each name.
        problems: String,
    },
    /// The compiler is older than the device.
    #[error(
        "NVRTC compiles for {known:?}, of which compute capability {}.{} runs none: install a newer `nvidia-cuda-nvrtc`",
        capability / 10,
        capability % 10
    )]
    Architecture {
        /// Of the device, 90 for 9.0.
        capability: u32,
        /// What it compiles for.
        known: Vec<u32>,
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
        /// Name of the CUDA function.
        call: String,
        /// What the library says.
        message: String,
    },
}
