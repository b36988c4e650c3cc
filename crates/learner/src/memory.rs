//! What training takes of this rank's memory: planned before each pass, compared with what was used.

use std::collections::BTreeMap;

use pacs_model::Keep;
use pacs_runtime::{peak_resident_bytes, resident_bytes};
use pacs_shape::{HEAD_CHUNK, MemoryPlan, PassShape, TrainingSetup, WINDOWS};
use pacs_torch::device_memory;
use pacs_torch::tch::Device;

use crate::network::Network;
use crate::settings::TrainerSettings;

/// A plan that is exceeded by so much is wrong.
const TOLERANCE: f64 = 1.1;

/// The plan of one rank.
#[derive(Debug)]
pub(crate) struct Memory {
    setup: TrainingSetup,
    memory_bytes: Option<u64>,
    /// In use before the model was there.
    before: u64,
    /// The largest plan of the passes so far.
    largest: Option<MemoryPlan>,
    warned: bool,
}

impl Memory {
    pub(crate) fn new(network: &Network, settings: &TrainerSettings, before: u64) -> Self {
        let setup = TrainingSetup {
            config: network.config.clone(),
            weight_bytes: network.parameters.flat.kind().elt_size_in_bytes() as u64,
            division: network.division,
            windows: WINDOWS,
            holds_reference: settings.objective.needs().reference || settings.reference_reset_steps > 1,
            copies_state: settings.saves_in_background && network.device() == Device::Cpu,
            head_chunk: HEAD_CHUNK,
            has_kernels: network.device() == Device::Cpu,
        };
        Self { setup, memory_bytes: settings.memory_bytes, before, largest: None, warned: false }
    }

    /// Memory of `device` that is in use (bytes): by this process in host memory, by all processes on a GPU.
    pub(crate) fn used(device: Device) -> u64 {
        match device_memory(device) {
            Some((free, total)) => total - free,
            None => resident_bytes(),
        }
    }

    /// Decides what a pass keeps of its forward.
    pub(crate) fn keep(&mut self) -> impl FnOnce(&PassShape) -> Keep {
        |shape| {
            let layers = self.setup.config.layers;
            let plan = match self.memory_bytes {
                Some(bytes) => self.setup.fit(shape, bytes),
                None => self.setup.plan(shape, layers),
            };
            if self.largest.is_none_or(|largest| plan.total() > largest.total()) {
                self.largest = Some(plan);
            }
            if plan.kept_layers == layers { Keep::All } else { Keep::Last(plan.kept_layers) }
        }
    }

    /// Adds what was planned and what was used to the metrics; warns once when the plan was wrong.
    pub(crate) fn report(&mut self, device: Device, metrics: &mut BTreeMap<String, f64>) {
        let peak = if device == Device::Cpu { peak_resident_bytes() } else { Self::used(device) };
        let used = peak.saturating_sub(self.before);
        metrics.insert("memory_used_bytes".to_owned(), used as f64);
        let Some(largest) = self.largest else { return };
        let planned = largest.total();
        metrics.insert("memory_planned_bytes".to_owned(), planned as f64);
        metrics.insert("memory_kept_layers".to_owned(), largest.kept_layers as f64);
        if used as f64 > TOLERANCE * planned as f64 && !self.warned {
            self.warned = true;
            let mib = |bytes: u64| bytes >> 20;
            tracing::warn!(used_mib = mib(used), planned_mib = mib(planned), "training takes more memory than planned");
        }
    }
}
