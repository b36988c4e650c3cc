//! What a model computes in, and where: options that several commands share.

use anyhow::Result;
use clap::{Args, ValueEnum};
use pacs_torch::tch::{Device, Kind};

/// Precision, device and threads.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Arguments {
    /// Kind to compute in.
    #[arg(long, value_enum, default_value_t = Precision::Auto)]
    precision: Precision,
    /// Where tensors live.
    #[arg(long, value_enum, default_value_t = DeviceKind::Cpu)]
    device: DeviceKind,
    /// Threads of libtorch; 0: one a core.
    #[arg(long, default_value_t = 0)]
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
    Cpu,
    Cuda,
}

impl Arguments {
    /// Prepares libtorch; returns the device and the kind to compute in.
    pub(crate) fn start(self) -> Result<(Device, Kind)> {
        let device = pacs_torch::init(self.device == DeviceKind::Cuda, self.threads)?;
        let kind = match self.precision {
            Precision::Bfloat16 => Kind::BFloat16,
            Precision::Auto if pacs_torch::multiplies_bf16(device) => Kind::BFloat16,
            Precision::Auto | Precision::Float32 => Kind::Float,
        };
        Ok((device, kind))
    }
}
