//! Memory of this rank in training: planned before each pass, then compared with what was used.

use std::collections::BTreeMap;

use pacs_model::Keep;
use pacs_runtime::{peak_resident_bytes, resident_bytes};
use pacs_shape::{PassShape, StateCopy, TrainingSetup, WINDOWS, head_chunk};
use pacs_torch::device_memory;
use pacs_torch::tch::Device;

use super::sharded_model::ShardedModel;
use crate::settings::TrainerSettings;

/// A plan that is exceeded by this factor is wrong, and warned of.
const TOLERANCE: f64 = 1.1;

/// Which of the two models a pass trains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trained {
    Policy,
    Values,
}

/// Memory plan of one rank, over the passes of the job.
#[derive(Debug)]
pub(crate) struct MemoryPlan {
    setup: TrainingSetup,
    memory_bytes: Option<u64>,
    /// Bytes in use before the model was loaded.
    before: u64,
    /// Largest plan so far for a pass of the policy, and for one of the value model.
    largest: [Option<Planned>; 2],
    warned: bool,
}

/// What was planned for one pass.
#[derive(Clone, Copy, Debug)]
struct Planned {
    /// Training state and activations together.
    bytes: u64,
    kept_layers: usize,
}

impl MemoryPlan {
    pub(crate) fn new(model: &ShardedModel, settings: &TrainerSettings, before: u64, has_device_kernels: bool) -> Self {
        let needs = settings.objective.needs();
        let on_host = model.device() == Device::Cpu;
        let setup = TrainingSetup {
            config: model.config.clone(),
            weight_bytes: model.parameters.flat.kind().elt_size_in_bytes() as u64,
            division: model.division,
            windows: WINDOWS,
            holds_reference: needs.reference || settings.reference_reset_steps > 1,
            trains_values: needs.values,
            copy: match (settings.saves_in_background, on_host) {
                (false, _) => StateCopy::Absent,
                (true, true) => StateCopy::Here,
                (true, false) => StateCopy::InHostMemory,
            },
            head_chunk: head_chunk(on_host),
            has_kernels: on_host || has_device_kernels,
            in_host_memory: on_host,
            exact_sums: settings.deterministic,
        };
        Self { setup, memory_bytes: settings.memory_bytes, before, largest: [None; 2], warned: false }
    }

    /// Bytes of `device` that are in use: by this process in host memory, by all processes on a GPU.
    pub(crate) fn used(device: Device) -> u64 {
        match device_memory(device) {
            Some((free, total)) => total - free,
            None => resident_bytes(),
        }
    }

    /// Decides which activations a pass keeps for its backward; the others are recomputed.
    pub(crate) fn keep(&mut self, trained: Trained) -> impl FnOnce(&PassShape) -> Keep {
        move |shape| {
            let layers = self.setup.config.layers;
            let plan = match self.memory_bytes {
                Some(bytes) => self.setup.fit(shape, bytes),
                None => self.setup.plan(shape, layers),
            };
            let (model, largest) = match (trained, &mut self.largest) {
                (Trained::Policy, [policy, _]) => (plan.policy, policy),
                (Trained::Values, [_, values]) => (plan.value_model.unwrap_or(plan.policy), values),
            };
            let planned = Planned { bytes: plan.state() + model.pass(), kept_layers: model.kept_layers };
            if largest.is_none_or(|largest| planned.bytes > largest.bytes) {
                *largest = Some(planned);
            }
            if model.kept_layers == layers { Keep::All } else { Keep::Last(model.kept_layers) }
        }
    }

    /// Adds planned and used memory to the metrics. Warns once if the plan was exceeded.
    pub(crate) fn report(&mut self, device: Device, metrics: &mut BTreeMap<String, f64>) {
        let peak = if device == Device::Cpu { peak_resident_bytes() } else { Self::used(device) };
        let used = peak.saturating_sub(self.before);
        metrics.insert("memory_used_bytes".to_owned(), used as f64);
        for (name, largest) in ["memory_kept_layers", "memory_value_model_kept_layers"].iter().zip(&self.largest) {
            if let Some(largest) = largest {
                metrics.insert((*name).to_owned(), largest.kept_layers as f64);
            }
        }
        let Some(planned) = self.largest.iter().flatten().map(|largest| largest.bytes).max() else { return };
        metrics.insert("memory_planned_bytes".to_owned(), planned as f64);
        if used as f64 > TOLERANCE * planned as f64 && !self.warned {
            self.warned = true;
            let mib = |bytes: u64| bytes >> 20;
            tracing::warn!(used_mib = mib(used), planned_mib = mib(planned), "training takes more memory than planned");
        }
    }
}
