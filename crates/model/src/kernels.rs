use std::sync::Arc;

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
    match device {
        Device::Cuda(_) => {
            if let Some(what) = config.beyond_gpu_kernels() {
                return Err(KernelError::Shape { what: what.to_owned() });
            }
            DeviceKernels::load(kernel_shape(config, kind), device).map(|kernels| Some(Arc::new(kernels)))
        }
        _ => Ok(None),
    }
}
