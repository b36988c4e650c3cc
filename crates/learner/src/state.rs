//! The training state on disk: everything that the next step depends on, in safetensors files.
//!
//! Replicated state is one file, divided state one file a rank. A file says which parameters it holds by their place in the
//! layout of the whole model, so that any number of ranks can take over what any other number has written.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use pacs_shape::{Division, ParameterLayout};
use pacs_torch::dithered_bf16;
use pacs_torch::tch::{Device, Kind, Tensor, no_grad};

use crate::checkpoint::CheckpointError;
use crate::file::{Written, write_tensors};
use crate::network::Network;
use crate::segment::part;
use crate::state_files::{StateFiles, Target};

/// What the names of the policy's state files begin with.
pub(crate) const POLICY: &str = "training-state";
/// What those of the value model begin with.
pub(crate) const VALUE_MODEL: &str = "value-model-state";

/// Name of the file that this rank writes.
pub(crate) fn file_name(prefix: &str, division: Division) -> String {
    match division.parts() {
        1 => format!("{prefix}.safetensors"),
        parts => format!("{prefix}-{}-of-{parts}.safetensors", division.part()),
    }
}

/// Who owns the memory of captured tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Memory {
    /// The network: they must be written before it is trained further.
    Shared,
    /// The capture.
    Own,
}

/// What a state file holds.
#[derive(Debug)]
pub(crate) struct StateContent {
    /// Its name within the checkpoint's folder.
    pub(crate) name: String,
    metadata: Vec<(&'static str, String)>,
    /// Flat, in host memory.
    tensors: Vec<(&'static str, Tensor)>,
}

/// This rank's part of the state behind step `step`.
pub(crate) fn capture(network: &Network, step: u64, prefix: &str, memory: Memory) -> StateContent {
    let optimizer = &network.optimizer;
    let own = |tensor: &Tensor| joined(&network.own_parts(tensor), tensor.kind(), memory);
    let part_of = |tensor: &Tensor| joined(&network.optimizer_parts(tensor), tensor.kind(), memory);
    let master = match &optimizer.master {
        Some(master) => part_of(master),
        None => own(network.weights()),
    };
    let mut tensors =
        vec![("master", master), ("moment1", part_of(&optimizer.moment1)), ("moment2", part_of(&optimizer.moment2))];
    if let Some(reference) = &network.reference {
        tensors.push(("reference", own(reference)));
    }
    let ranges: Vec<String> =
        network.segments().iter().map(|segment| format!("{}+{}", segment.index, segment.len)).collect();
    let metadata = vec![
        ("step", step.to_string()),
        ("updates", optimizer.updates.to_string()),
        ("total_updates", optimizer.total_updates.to_string()),
        ("ranges", ranges.join(" ")),
    ];
    StateContent { name: file_name(prefix, network.division), metadata, tensors }
}

impl StateContent {
    /// Makes it a durable file of `folder`.
    pub(crate) fn write(&self, folder: &Path, unwanted: &AtomicBool) -> Result<Written, CheckpointError> {
        write_tensors(&folder.join(&self.name), &self.metadata, &self.tensors, unwanted)
    }

    /// Memory that it takes.
    pub(crate) fn bytes(&self) -> u64 {
        let bytes = |tensor: &Tensor| (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64;
        self.tensors.iter().map(|(_, tensor)| bytes(tensor)).sum()
    }
}

/// `parts` of a buffer of `kind`, one behind the other in host memory.
fn joined(parts: &[Tensor], kind: Kind, memory: Memory) -> Tensor {
    if let ([part], Memory::Shared) = (parts, memory)
        && part.device() == Device::Cpu
    {
        return part.contiguous();
    }
    // Each part goes to its place at once: joined on a GPU they would take memory there that nobody has planned.
    let elements = parts.iter().map(Tensor::numel).sum::<usize>();
    let whole = Tensor::empty([elements as i64], (kind, Device::Cpu));
    let mut start = 0;
    for values in parts {
        no_grad(|| part(&whole, start, values.numel()).copy_(values));
        start += values.numel();
    }
    whole
}

/// Takes over this rank's part of the state in the files of `folder` that begin with `prefix`; returns the step that it is
/// of.
pub(crate) fn restore(network: &mut Network, folder: &Path, prefix: &str) -> Result<u64, CheckpointError> {
    let layout = ParameterLayout::new(&network.config);
    let files = StateFiles::find(folder, prefix, layout.total())?;
    let [step, updates, total_updates] = files.counts;
    let targets = |network: &Network, tensor: &Tensor| -> Vec<Target> {
        let parts = network.optimizer_parts(tensor).into_iter().zip(network.segments());
        parts.map(|(values, segment)| Target { index: segment.index, values }).collect()
    };
    for (name, tensor) in [("moment1", &network.optimizer.moment1), ("moment2", &network.optimizer.moment2)] {
        files.read(name, &targets(network, tensor))?;
    }
    if let Some(master) = &network.optimizer.master {
        files.read("master", &targets(network, master))?;
    }
    // Every element of the weights that this rank holds follows from the master weights, by whichever rank they were
    // written.
    for Target { index, values } in places(network, network.weights()) {
        files.each("master", index..index + values.numel(), |at, master| {
            let place = part(&values, at - index, master.numel());
            no_grad(|| match values.kind() {
                Kind::Float => place.shallow_clone().copy_(master),
                _ => place.shallow_clone().copy_(&dithered_bf16(master, at)),
            });
        })?;
    }
    if files.hold("reference") {
        let reference = network.weights().copy();
        files.read("reference", &places(network, &reference))?;
        network.hold_reference(reference);
    }
    network.weights_replaced();
    (network.optimizer.updates, network.optimizer.total_updates) = (updates, total_updates);
    Ok(step)
}

/// All of a buffer that this rank holds like its weights.
fn places(network: &Network, tensor: &Tensor) -> Vec<Target> {
    network.held_parts(tensor).into_iter().map(|(index, values)| Target { index, values }).collect()
}
