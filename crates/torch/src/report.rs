//! Which parts of the GPU stack a machine has, to be known before a job starts.

use tch::{Device, Kind};

use crate::cuda::{DeviceKernels, KernelShape, compute_capability};
use crate::place::libtorch;
use crate::{Graphs, device_memory, init};

/// One GPU that this process sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuParts {
    /// Compute capability, major and minor.
    pub capability: [u32; 2],
    /// Free bytes of its memory, and all.
    pub memory: (u64, u64),
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuReport {
    /// The file of libtorch's CUDA half, or why it cannot be used.
    pub library: Result<String, String>,
    /// GPUs that are visible.
    pub visible: i64,
    /// The first of them, which a worker computes on.
    pub first: Option<GpuParts>,
    /// Whether the kernels of a common model compile and load.
    pub kernels: Result<(), String>,
    /// Whether libtorch has what CUDA graphs take.
    pub graphs: Result<(), String>,
}

/// Looks for all that a worker with `--device cuda` needs. Sets libtorch up for CUDA, so nothing else can be computed before.
#[must_use]
pub fn gpu_report() -> GpuReport {
    let device = init(true, 1).map_err(|error| error.to_string());
    let library = match &device {
        Ok(_) => libtorch().map(|path| path.display().to_string()).ok_or_else(|| "its file is not known".to_owned()),
        Err(error) => Err(error.clone()),
    };
    let Ok(device @ Device::Cuda(index)) = device else {
        let none = || Err("there is no GPU to try them on".to_owned());
        return GpuReport { library, visible: 0, first: None, kernels: none(), graphs: none() };
    };
    let shape = KernelShape { kind: Kind::BFloat16, heads: 14, kv_heads: 2, head_dim: 64 };
    let first = compute_capability(index).ok().zip(device_memory(device));
    GpuReport {
        library,
        visible: tch::Cuda::device_count(),
        first: first.map(|(capability, memory)| GpuParts { capability, memory }),
        kernels: DeviceKernels::load(shape, device).map(drop).map_err(|error| error.to_string()),
        graphs: Graphs::new(device).map(drop).map_err(|error| error.to_string()),
    }
}
