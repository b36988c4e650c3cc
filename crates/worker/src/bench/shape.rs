//! The model that is measured, and the device it is measured on.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use pacs_model::{ModelConfig, Parameters};
use pacs_torch::tch::{Device, Kind};

use crate::compute::Compute;

/// Which model, where.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Hugging Face folder.
    #[arg(long)]
    pub(crate) model: PathBuf,
    /// Take only the shape from the folder's config.json; weights are random, and no others need be there.
    #[arg(long)]
    random_weights: bool,
    #[command(flatten)]
    compute: Compute,
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
        let (kind, device) = self.compute.start()?;
        let name = || format!("load model `{}`", self.model.display());
        let config = ModelConfig::read(&self.model).with_context(name)?;
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
