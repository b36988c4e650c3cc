//! A GPU by the CUDA driver, in the context that libtorch works in.
#![expect(unsafe_code, reason = "the CUDA driver is a C library")]

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_void};
use std::ptr;
use std::sync::{Mutex, PoisonError};

use cuda::CUdevice_attribute_enum as Attribute;
use cudarc::driver::sys as cuda;
use tch::Device;

use super::library::Driver;
use super::nvrtc::Nvrtc;
use super::source::KERNELS;
use super::{KernelError, KernelShape, Launch, Machine};
use crate::stream::{StreamError, Streams};

/// The kernels, loaded into the primary context of a device.
#[derive(Debug)]
pub(super) struct Gpu {
    device: Device,
    driver: &'static Driver,
    context: cuda::CUcontext,
    functions: HashMap<&'static str, cuda::CUfunction>,
    processors: u32,
    streams: Streams,
}

// SAFETY: handles of the driver may be used from any thread; every call here makes their context current first.
unsafe impl Send for Gpu {}
// SAFETY: as above; nothing is changed after `load`.
unsafe impl Sync for Gpu {}

impl Gpu {
    pub(super) fn load(shape: &KernelShape, device: Device) -> Result<Self, KernelError> {
        let Device::Cuda(index) = device else {
            return Err(KernelError::Shape { what: format!("{device:?}") });
        };
        let driver = Driver::get()?;
        let ordinal = ordinal(index)?;
        let streams = Streams::of(index)?;
        let mut context = ptr::null_mut();
        // SAFETY: every pointer is to a local of the right type, and calls come in the order that the driver asks for. The
        // primary context is libtorch's; it is never released, as libtorch never does.
        unsafe {
            check("cuDevicePrimaryCtxRetain", (driver.retain_context)(&mut context, ordinal))?;
            check("cuCtxSetCurrent", (driver.set_context)(context))?;
        }
        let [major, minor] = compute_capability(index)?;
        let processors = attribute(ordinal, Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let image = Nvrtc::open()?.compile(&shape.text(), 10 * major + minor)?;
        let mut module = ptr::null_mut();
        // SAFETY: the image is a whole ELF file, which says how long it is, and the context is current.
        check("cuModuleLoadData", unsafe { (driver.load_module)(&mut module, image.as_ptr().cast()) })?;
        let mut functions = HashMap::new();
        for name in KERNELS {
            let text = CString::new(name).expect("no zero byte in a name");
            let mut function = ptr::null_mut();
            // SAFETY: the module was loaded, and is never unloaded.
            check(name, unsafe { (driver.get_function)(&mut function, module, text.as_ptr()) })?;
            functions.insert(name, function);
        }
        Ok(Self { device, driver, context, functions, processors: processors.max(1), streams })
    }
}

/// Compute capability of a GPU, major and minor.
///
/// # Errors
/// When there is no driver, or no such GPU.
pub(crate) fn compute_capability(index: usize) -> Result<[u32; 2], KernelError> {
    // It is asked for in every pass.
    static KNOWN: Mutex<Vec<(usize, [u32; 2])>> = Mutex::new(Vec::new());
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, capability)) = known.iter().find(|(known, _)| *known == index) {
        return Ok(*capability);
    }
    let ordinal = ordinal(index)?;
    let capability = [
        attribute(ordinal, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        attribute(ordinal, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    ];
    known.push((index, capability));
    Ok(capability)
}

/// The driver's handle of a GPU.
fn ordinal(index: usize) -> Result<cuda::CUdevice, KernelError> {
    let driver = Driver::get()?;
    let mut ordinal = 0;
    // SAFETY: the pointer is to a local, and the driver is initialised first.
    unsafe {
        check("cuInit", (driver.init)(0))?;
        check("cuDeviceGet", (driver.get_device)(&mut ordinal, i32::try_from(index).unwrap_or(i32::MAX)))?;
    }
    Ok(ordinal)
}

fn attribute(ordinal: cuda::CUdevice, which: Attribute) -> Result<u32, KernelError> {
    let driver = Driver::get()?;
    let mut value = 0;
    // SAFETY: the pointer is to a local, and the handle is the driver's.
    check("cuDeviceGetAttribute", unsafe { (driver.get_attribute)(&mut value, which, ordinal) })?;
    Ok(value.unsigned_abs())
}

impl Machine for Gpu {
    fn device(&self) -> Device {
        self.device
    }

    fn processors(&self) -> u32 {
        self.processors
    }

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<(), KernelError> {
        let function = self.functions[launch.kernel];
        let mut arguments: Vec<*mut c_void> =
            launch.arguments.iter().map(|argument| ptr::from_ref(&argument.0).cast_mut().cast()).collect();
        let [x, y, z] = launch.grid;
        let stream = self.streams.current()?.as_ptr().cast();
        // SAFETY: the driver reads as many arguments as the kernel declares, which the caller has seen to.
        unsafe {
            check("cuCtxSetCurrent", (self.driver.set_context)(self.context))?;
            let launched = (self.driver.launch)(
                function,
                x,
                y,
                z,
                launch.threads,
                1,
                1,
                0,
                stream,
                arguments.as_mut_ptr(),
                ptr::null_mut(),
            );
            check(launch.kernel, launched)
        }
    }
}

impl From<StreamError> for KernelError {
    fn from(error: StreamError) -> Self {
        Self::Call { call: "the stream of libtorch".to_owned(), message: error.to_string() }
    }
}

fn check(call: &str, result: cuda::CUresult) -> Result<(), KernelError> {
    if result == cuda::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = ptr::null();
    if let Ok(driver) = Driver::get() {
        // SAFETY: the pointer is to a local, in which the driver puts a string of its own, or null.
        unsafe { (driver.error_string)(result, &mut text) };
    }
    if text.is_null() {
        return Err(KernelError::Call { call: call.to_owned(), message: format!("{result:?}") });
    }
    // SAFETY: the driver's string ends with a zero byte.
    let message = unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
    Err(KernelError::Call { call: call.to_owned(), message })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Kind;

    #[test]
    fn a_machine_without_a_gpu_says_so() {
        let shape = KernelShape { kind: Kind::BFloat16, heads: 4, kv_heads: 2, head_dim: 64 };
        assert!(matches!(Gpu::load(&shape, Device::Cpu), Err(KernelError::Shape { .. })));
        if Driver::get().is_err() {
            assert_eq!(Gpu::load(&shape, Device::Cuda(0)).err(), Some(KernelError::NoDriver));
        }
    }
}
