//! Precision, device and threads of the model tools.

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use pacs_torch::tch::{Device, Kind};

/// Options of every tool that computes with a model.
#[derive(Debug, Args)]
pub(crate) struct Compute {
    /// Precision of the computation; master weights and moments are always float32.
    #[arg(long, value_enum, default_value_t = Precision::Auto)]
    precision: Precision,
    /// Device of weights and activations.
    #[arg(long, value_enum, default_value_t = DeviceKind::Cpu)]
    device: DeviceKind,
    /// Threads of libtorch; 0: one per core.
    #[arg(long, default_value_t = 0, value_parser = crate::bounds::usize_to(crate::bounds::MOST_THREADS))]
    threads: usize,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Precision {
    /// bfloat16 where the hardware multiplies it, else float32.
    Auto,
    Float32,
    Bfloat16,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum DeviceKind {
    /// Host memory and `--threads` threads.
    Cpu,
    /// The first NVIDIA GPU that the process sees.
    Cuda,
}

impl Compute {
    /// Initialises libtorch, and returns the element type and the device.
    pub(crate) fn start(&self) -> Result<(Kind, Device)> {
        let device = pacs_torch::init(self.device == DeviceKind::Cuda, self.threads).context("start libtorch")?;
        let kind = match self.precision {
            Precision::Bfloat16 => Kind::BFloat16,
            Precision::Auto if pacs_torch::multiplies_bf16(device) => Kind::BFloat16,
            Precision::Auto | Precision::Float32 => Kind::Float,
        };
        Ok((kind, device))
    }
}
