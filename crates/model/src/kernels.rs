use std::sync::{Arc, Mutex, PoisonError};

use pacs_torch::tch::{Device, Kind};
use pacs_torch::{DeviceKernels, KernelError, KernelShape};

use crate::ModelConfig;

/// What the kernels of a GPU are compiled for, to compute this model.
#[must_use]
pub fn kernel_shape(config: &ModelConfig, kind: Kind) -> KernelShape {
    let [heads, kv_heads, head_dim] = [config.heads, config.kv_heads, config.head_dim].map(|size| size as usize);
    KernelShape { kind, heads, kv_heads, head_dim }
}

/// The kernels of a GPU for this model; none on another device.
///
/// # Errors
/// When the driver or NVRTC is missing, or there are no kernels for such a model.
pub fn load_kernels(
    config: &ModelConfig,
    kind: Kind,
    device: Device,
) -> Result<Option<Arc<DeviceKernels>>, KernelError> {
    // Compiled once a process, whoever asks: it takes seconds, and a learner asks in every generation.
    static LOADED: Mutex<Vec<(KernelShape, Device, Arc<DeviceKernels>)>> = Mutex::new(Vec::new());
    if !matches!(device, Device::Cuda(_)) {
        return Ok(None);
    }
    if let Some(what) = config.beyond_gpu_kernels() {
        return Err(KernelError::Shape { what: what.to_owned() });
    }
    let shape = kernel_shape(config, kind);
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((.., kernels)) = loaded.iter().find(|(of, on, _)| (*of, *on) == (shape, device)) {
        return Ok(Some(Arc::clone(kernels)));
    }
    let kernels = Arc::new(DeviceKernels::load(shape, device)?);
    loaded.push((shape, device, Arc::clone(&kernels)));
    Ok(Some(kernels))
}

/// Why a job must not begin that wants the kernels of a GPU: without them it would take several times as long and look as if it
/// were well. `None` where it has them, or computes elsewhere.
#[must_use]
pub fn missing_kernels(config: &ModelConfig, kind: Kind, device: Device) -> Option<String> {
    let error = load_kernels(config, kind, device).err()?;
    Some(format!(
        "this job computes on a GPU, and its kernels are not available: {error}. `resources.require_gpu_kernels = false` \
         continues without them, several times slower"
    ))
}
