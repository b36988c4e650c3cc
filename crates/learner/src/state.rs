//! The training state on disk: everything that the next step depends on, in safetensors files.
//!
//! Replicated state is one file, divided state one file a rank. A file says which parameters it holds by their place in the
//! layout of the whole model, so that any number of ranks can take over what any other number has written.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use pacs_shape::{Division, ParameterLayout};
use pacs_torch::dithered_bf16;
use pacs_torch::tch::{Device, Kind, Tensor, no_grad};

use crate::checkpoint::{CheckpointError, file_error};
use crate::file::{Written, write_tensors};
use crate::network::Network;
use crate::segment::{part, zeros};

/// What the names of the policy's state files begin with.
pub(crate) const POLICY: &str = "training-state";
/// What those of the value model begin with.
pub(crate) const VALUE_MODEL: &str = "value-model-state";
/// Longest header that is read.
const MAX_HEADER_BYTES: u64 = 64 << 20;

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
    let mut files = StateFiles::find(folder, prefix, layout.total())?;
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
    for target in places(network, network.weights()) {
        let master = zeros(target.values.numel(), Device::Cpu);
        files.read("master", &[Target { index: target.index, values: master.shallow_clone() }])?;
        no_grad(|| match target.values.kind() {
            Kind::Float => target.values.shallow_clone().copy_(&master),
            _ => target.values.shallow_clone().copy_(&dithered_bf16(&master, target.index)),
        });
    }
    if files.hold("reference")? {
        let reference = network.weights().copy();
        files.read("reference", &places(network, &reference))?;
        network.hold_reference(reference);
    }
    network.weights_replaced();
    (network.optimizer.updates, network.optimizer.total_updates) = (updates, total_updates);
    Ok(step)
}

/// Parameters that are wanted.
struct Target {
    /// Place of the first one in the layout of the whole model.
    index: usize,
    /// Where they go.
    values: Tensor,
}

/// All of a buffer that this rank holds like its weights.
fn places(network: &Network, tensor: &Tensor) -> Vec<Target> {
    network.held_parts(tensor).into_iter().map(|(index, values)| Target { index, values }).collect()
}

/// The state files of a checkpoint.
struct StateFiles {
    /// Step, updates since the moments were zero, updates of the job.
    counts: [u64; 3],
    files: Vec<StateFile>,
}

struct StateFile {
    path: PathBuf,
    /// Parameters that it holds, by their place in the layout of the whole model.
    ranges: Vec<Range<usize>>,
    /// Its tensors, once they were asked for.
    tensors: Option<HashMap<String, Tensor>>,
}

impl StateFiles {
    fn find(folder: &Path, prefix: &str, parameters: usize) -> Result<Self, CheckpointError> {
        let entries = std::fs::read_dir(folder).map_err(|error| file_error(folder, error))?;
        let (mut files, mut counts) = (Vec::new(), None);
        for entry in entries {
            let entry = entry.map_err(|error| file_error(folder, error))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(prefix) && name.ends_with(".safetensors") {
                let (found, ranges) = read_metadata(&entry.path())?;
                if *counts.get_or_insert(found) != found {
                    let problem = "it is of another step than the files beside it".to_owned();
                    return Err(CheckpointError::Content { path: entry.path(), problem });
                }
                files.push(StateFile { path: entry.path(), ranges, tensors: None });
            }
        }
        let held: usize = files.iter().flat_map(|file| &file.ranges).map(Range::len).sum();
        let Some(counts) = counts.filter(|_| held == parameters) else {
            let problem = format!("the state files hold {held} parameters, the model has {parameters}");
            return Err(CheckpointError::Content { path: folder.to_owned(), problem });
        };
        Ok(Self { counts, files })
    }

    /// Whether the files hold a tensor of that name.
    fn hold(&mut self, name: &str) -> Result<bool, CheckpointError> {
        let Some(file) = self.files.first_mut() else { return Ok(false) };
        Ok(file.tensors()?.contains_key(name))
    }

    /// Copies what is wanted of the tensor `name`.
    fn read(&mut self, name: &str, targets: &[Target]) -> Result<(), CheckpointError> {
        for file in &mut self.files {
            let wanted = |range: &Range<usize>| targets.iter().any(|target| overlap(range, target).is_some());
            if !file.ranges.iter().any(wanted) {
                continue;
            }
            let (path, ranges) = (file.path.clone(), file.ranges.clone());
            let content = |problem: String| CheckpointError::Content { path: path.clone(), problem };
            let held: usize = ranges.iter().map(Range::len).sum();
            let tensor = match file.tensors()?.get(name) {
                Some(tensor) if tensor.numel() == held => tensor,
                Some(tensor) => {
                    return Err(content(format!("`{name}` has {} elements, not {held}", tensor.numel())));
                }
                None => return Err(content(format!("`{name}` is missing"))),
            };
            let mut start = 0;
            for range in &ranges {
                for target in targets {
                    let Some(common) = overlap(range, target) else { continue };
                    let source = part(tensor, start + common.start - range.start, common.len());
                    no_grad(|| part(&target.values, common.start - target.index, common.len()).copy_(&source));
                }
                start += range.len();
            }
        }
        Ok(())
    }
}

fn overlap(range: &Range<usize>, target: &Target) -> Option<Range<usize>> {
    let common = range.start.max(target.index)..range.end.min(target.index + target.values.numel());
    (common.start < common.end).then_some(common)
}

impl StateFile {
    fn tensors(&mut self) -> Result<&HashMap<String, Tensor>, CheckpointError> {
        if self.tensors.is_none() {
            let read = Tensor::read_safetensors(&self.path)
                .map_err(|error| CheckpointError::Content { path: self.path.clone(), problem: error.to_string() })?;
            self.tensors = Some(read.into_iter().collect());
        }
        Ok(self.tensors.as_ref().expect("just read"))
    }
}

/// Counts and ranges of a state file.
fn read_metadata(path: &Path) -> Result<([u64; 3], Vec<Range<usize>>), CheckpointError> {
    let content = |problem: &str| CheckpointError::Content { path: path.to_owned(), problem: problem.to_owned() };
    let header = read_header(path).map_err(|error| file_error(path, error))?;
    let header: serde_json::Value =
        serde_json::from_slice(&header).map_err(|_| content("the header is not that of a safetensors file"))?;
    let text = |name: &str| {
        header["__metadata__"][name].as_str().ok_or_else(|| content(&format!("`{name}` is missing from its metadata")))
    };
    let count = |name: &str| text(name)?.parse::<u64>().map_err(|_| content(&format!("`{name}` is no number")));
    let counts = [count("step")?, count("updates")?, count("total_updates")?];
    let range = |text: &str| {
        let (start, len) = text.split_once('+')?;
        let start: usize = start.parse().ok()?;
        Some(start..start.checked_add(len.parse().ok()?)?)
    };
    let ranges: Option<Vec<Range<usize>>> =
        text("ranges")?.split(' ').filter(|text| !text.is_empty()).map(range).collect();
    Ok((counts, ranges.ok_or_else(|| content("`ranges` cannot be read"))?))
}

/// The JSON header of a safetensors file: eight bytes of length, then as many bytes.
fn read_header(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let mut length = [0; 8];
    file.read_exact(&mut length)?;
    let mut header = Vec::new();
    file.take(u64::from_le_bytes(length).min(MAX_HEADER_BYTES)).read_to_end(&mut header)?;
    Ok(header)
}
