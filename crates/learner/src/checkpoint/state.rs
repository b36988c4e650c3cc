//! The training state on disk: everything that the next step depends on, in safetensors files.
//!
//! Replicated state is one file; sharded state is one file per rank. A file names its parameters by their place in the
//! layout of the whole model, so any number of ranks can restore what any other number has written.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use pacs_shape::{Division, ParameterLayout};
use pacs_torch::dithered_bf16;
use pacs_torch::tch::{Device, Kind, Tensor, no_grad};
use pacs_weights::Adapted;

use super::safetensors_file::{Written, write_tensors};
use super::state_files::{StateFiles, Target};
use crate::comm::part;
use crate::error::CheckpointError;
use crate::weights::ShardedModel;

/// File name prefix of the policy's state.
pub(super) const POLICY: &str = "training-state";
/// File name prefix of the value model's state.
pub(super) const VALUE_MODEL: &str = "value-model-state";

/// Name of the state file that this rank writes.
pub(super) fn file_name(prefix: &str, division: Division) -> String {
    match division.parts() {
        1 => format!("{prefix}.safetensors"),
        parts => format!("{prefix}-{}-of-{parts}.safetensors", division.part()),
    }
}

/// Whether captured tensors may share memory with the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CapturedBuffers {
    /// They may, and must be written before the next update.
    Shared,
    /// They are copies.
    Own,
}

/// Content of one state file.
#[derive(Debug)]
pub(super) struct StateContent {
    /// File name within the checkpoint's folder.
    pub(super) name: String,
    metadata: Vec<(&'static str, String)>,
    /// Flat tensors in host memory, by name.
    tensors: Vec<(&'static str, Tensor)>,
}

/// Captures this rank's part of the state after step `step`.
pub(super) fn capture(model: &ShardedModel, step: u64, prefix: &str, buffers: CapturedBuffers) -> StateContent {
    let optimizer = &model.optimizer;
    let own = |tensor: &Tensor| joined(&model.own_parts(tensor), tensor.kind(), buffers);
    let part_of = |tensor: &Tensor| joined(&model.optimizer_parts(tensor), tensor.kind(), buffers);
    let master = match &optimizer.master {
        Some(master) => part_of(master),
        None => own(model.weights()),
    };
    let mut tensors =
        vec![("master", master), ("moment1", part_of(&optimizer.moment1)), ("moment2", part_of(&optimizer.moment2))];
    if let Some(reference) = &model.reference {
        tensors.push(("reference", own(reference)));
    }
    let ranges: Vec<String> =
        model.segments().iter().map(|segment| format!("{}+{}", segment.index, segment.len)).collect();
    let mut metadata = vec![
        ("step", step.to_string()),
        ("updates", optimizer.updates.to_string()),
        ("total_updates", optimizer.total_updates.to_string()),
        ("ranges", ranges.join(" ")),
    ];
    metadata.extend(model.adapted.as_ref().map(|adapted| ("base", adapted.base_digits())));
    StateContent { name: file_name(prefix, model.division), metadata, tensors }
}

impl StateContent {
    /// Writes the file into `folder` and syncs it.
    pub(super) fn write(&self, folder: &Path, unwanted: &AtomicBool) -> Result<Written, CheckpointError> {
        write_tensors(&folder.join(&self.name), &self.metadata, &self.tensors, unwanted)
    }

    /// Size of the tensors in memory (bytes).
    pub(super) fn bytes(&self) -> u64 {
        let bytes = |tensor: &Tensor| (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64;
        self.tensors.iter().map(|(_, tensor)| bytes(tensor)).sum()
    }
}

/// Concatenates `parts` of a buffer of `kind` in host memory.
fn joined(parts: &[Tensor], kind: Kind, buffers: CapturedBuffers) -> Tensor {
    if let ([part], CapturedBuffers::Shared) = (parts, buffers)
        && part.device() == Device::Cpu
    {
        return part.contiguous();
    }
    // Each part is copied to its place directly: a concatenation on the GPU would take memory there that the plan
    // does not have.
    let elements = parts.iter().map(Tensor::numel).sum::<usize>();
    let whole = Tensor::empty([elements as i64], (kind, Device::Cpu));
    let mut start = 0;
    for values in parts {
        no_grad(|| part(&whole, start, values.numel()).copy_(values));
        start += values.numel();
    }
    whole
}

/// Restores this rank's part of the state from the files of `folder` that begin with `prefix`. Returns the step
/// of the state.
pub(super) fn restore(model: &mut ShardedModel, folder: &Path, prefix: &str) -> Result<u64, CheckpointError> {
    let layout = ParameterLayout::new(&model.config);
    let files = StateFiles::find(folder, prefix, layout.total())?;
    let [step, updates, total_updates] = files.counts;
    // Only the rank that publishes knows the digest of its base; one is enough to refuse.
    if let Some((found, own)) = files.base.as_ref().zip(model.adapted.as_ref().map(Adapted::base_digits))
        && *found != own
    {
        let problem = format!(
            "its adapters belong to a base with the digest {}…, and the model folder holds one with {}…, or is read in another precision",
            &found[..16.min(found.len())],
            &own[..16]
        );
        return Err(CheckpointError::Content { path: folder.to_owned(), problem });
    }
    let targets = |model: &ShardedModel, tensor: &Tensor| -> Vec<Target> {
        let parts = model.optimizer_parts(tensor).into_iter().zip(model.segments());
        parts.map(|(values, segment)| Target { index: segment.index, values }).collect()
    };
    for (name, tensor) in [("moment1", &model.optimizer.moment1), ("moment2", &model.optimizer.moment2)] {
        files.read(name, &targets(model, tensor))?;
    }
    if let Some(master) = &model.optimizer.master {
        files.read("master", &targets(model, master))?;
    }
    // Weights are derived from the master weights, for every element that this rank holds, whichever rank wrote it.
    for Target { index, values } in places(model, model.weights()) {
        files.each("master", index..index + values.numel(), |at, master| {
            let place = part(&values, at - index, master.numel());
            no_grad(|| match values.kind() {
                Kind::Float => place.shallow_clone().copy_(master),
                _ => place.shallow_clone().copy_(&dithered_bf16(master, at)),
            });
        })?;
    }
    if files.hold("reference") {
        let reference = model.weights().copy();
        files.read("reference", &places(model, &reference))?;
        model.hold_reference(reference);
    }
    model.weights_replaced();
    (model.optimizer.updates, model.optimizer.total_updates) = (updates, total_updates);
    Ok(step)
}

/// All pieces of a buffer that this rank holds, laid out like its weights.
fn places(model: &ShardedModel, tensor: &Tensor) -> Vec<Target> {
    model.held_parts(tensor).into_iter().map(|(index, values)| Target { index, values }).collect()
}
