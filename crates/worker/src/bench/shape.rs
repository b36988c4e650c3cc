//! The model that is measured, and the device it is measured on.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use pacs_model::{ModelConfig, Parameters};
use pacs_torch::tch::{Device, Kind};

/// Which model, where.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Hugging Face folder.
    #[arg(long)]
    pub(crate) model: PathBuf,
    /// Take only the shape from the folder's config.json; weights are random, and no others need be there.
    #[arg(long)]
    random_weights: bool,
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

/// A model ready to be measured.
pub(crate) struct Subject {
    pub(crate) config: ModelConfig,
    pub(crate) parameters: Parameters,
    pub(crate) kind: Kind,
    pub(crate) device: Device,
}

impl Arguments {
    pub(crate) fn subject(&self) -> Result<Subject> {
        let device = pacs_torch::init(self.device == DeviceKind::Cuda, self.threads)?;
        let name = || format!("load model `{}`", self.model.display());
        let config = ModelConfig::read(&self.model).with_context(name)?;
        let kind = match self.precision {
            Precision::Bfloat16 => Kind::BFloat16,
            Precision::Auto if pacs_torch::multiplies_bf16(device) => Kind::BFloat16,
            Precision::Auto | Precision::Float32 => Kind::Float,
        };
        let parameters = if self.random_weights {
            Parameters::random(&config, kind, device, 1)
        } else {
            Parameters::load(&self.model, &config, kind, device).with_context(name)?
        };
        Ok(Subject { config, parameters, kind, device })
    }
}

impl Subject {
    /// What every line says of the model and the machine.
    pub(crate) fn describe(&self) -> serde_json::Value {
        serde_json::json!({
            "parameters": self.config.parameter_count(),
            "precision": format!("{:?}", self.kind),
            "device": format!("{:?}", self.device),
            "threads": pacs_torch::tch::get_num_threads(),
        })
    }
}
