//! The state files of a checkpoint, read a piece at a time: while a rank takes its state over, it has no memory for two.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use pacs_torch::bytes_mut;
use pacs_torch::tch::{Device, Kind, Tensor, no_grad};
use serde_json::Value;

use crate::checkpoint::{CheckpointError, file_error};
use crate::segment::part;

/// Longest header that is read.
const MAX_HEADER_BYTES: u64 = 64 << 20;
/// Elements that are read at a time.
const PIECE: usize = 4 << 20;

/// Parameters that are wanted.
pub(crate) struct Target {
    /// Place of the first one in the layout of the whole model.
    pub(crate) index: usize,
    /// Where they go.
    pub(crate) values: Tensor,
}

/// The state files of a checkpoint.
pub(crate) struct StateFiles {
    /// Step, updates since the moments were zero, updates of the job.
    pub(crate) counts: [u64; 3],
    files: Vec<StateFile>,
}

struct StateFile {
    path: PathBuf,
    /// Parameters that it holds, by their place in the layout of the whole model.
    ranges: Vec<Range<usize>>,
    tensors: HashMap<String, Stored>,
}

/// A flat tensor of a file.
#[derive(Clone, Copy)]
struct Stored {
    kind: Kind,
    elements: usize,
    /// Where its bytes begin.
    at: u64,
}

impl StateFiles {
    /// The files of `folder` that begin with `prefix`; together they hold so many parameters.
    pub(crate) fn find(folder: &Path, prefix: &str, parameters: usize) -> Result<Self, CheckpointError> {
        let entries = std::fs::read_dir(folder).map_err(|error| file_error(folder, error))?;
        let (mut files, mut counts) = (Vec::new(), None);
        for entry in entries {
            let entry = entry.map_err(|error| file_error(folder, error))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(prefix) && name.ends_with(".safetensors") {
                let (found, file) = StateFile::open(entry.path())?;
                if *counts.get_or_insert(found) != found {
                    let problem = "it is of another step than the files beside it".to_owned();
                    return Err(CheckpointError::Content { path: entry.path(), problem });
                }
                files.push(file);
            }
        }
        let held: usize = files.iter().map(StateFile::parameters).sum();
        let Some(counts) = counts.filter(|_| held == parameters) else {
            let problem = format!("the state files hold {held} parameters, the model has {parameters}");
            return Err(CheckpointError::Content { path: folder.to_owned(), problem });
        };
        Ok(Self { counts, files })
    }

    /// Whether the files hold a tensor of that name.
    pub(crate) fn hold(&self, name: &str) -> bool {
        self.files.first().is_some_and(|file| file.tensors.contains_key(name))
    }

    /// Copies what is wanted of the tensor `name`.
    pub(crate) fn read(&self, name: &str, targets: &[Target]) -> Result<(), CheckpointError> {
        targets.iter().try_for_each(|Target { index, values }| {
            self.each(name, *index..index + values.numel(), |at, piece| {
                no_grad(|| part(values, at - index, piece.numel()).copy_(piece));
            })
        })
    }

    /// Shows the parameters `wanted` of the tensor `name`, piece by piece: the place of the first one, and `[n]` in host
    /// memory, which is read over afterwards.
    pub(crate) fn each(
        &self,
        name: &str,
        wanted: Range<usize>,
        mut show: impl FnMut(usize, &Tensor),
    ) -> Result<(), CheckpointError> {
        for file in &self.files {
            let mut before = 0;
            for range in &file.ranges {
                let common = range.start.max(wanted.start)..range.end.min(wanted.end);
                if common.start < common.end {
                    let first = before + common.start - range.start;
                    file.each(name, first..first + common.len(), |place, piece| {
                        show(common.start + place - first, piece);
                    })?;
                }
                before += range.len();
            }
        }
        Ok(())
    }
}

impl StateFile {
    /// Reads what a file says of itself: its counts, and what it holds.
    fn open(path: PathBuf) -> Result<([u64; 3], Self), CheckpointError> {
        let content = |problem: String| CheckpointError::Content { path: path.clone(), problem };
        let (header, data) = read_header(&path).map_err(|error| file_error(&path, error))?;
        let header: serde_json::Map<String, Value> = serde_json::from_slice(&header)
            .map_err(|_| content("the header is not that of a safetensors file".to_owned()))?;
        let metadata = header.get("__metadata__");
        let text = |name: &str| {
            let text = metadata.and_then(|metadata| metadata[name].as_str());
            text.ok_or_else(|| content(format!("`{name}` is missing from its metadata")))
        };
        let count = |name: &str| {
            text(name)?.parse::<u64>().map_err(|_| content(format!("`{name}` of its metadata is no number")))
        };
        let counts = [count("step")?, count("updates")?, count("total_updates")?];
        let range = |text: &str| {
            let (start, len) = text.split_once('+')?;
            let start: usize = start.parse().ok()?;
            Some(start..start.checked_add(len.parse().ok()?)?)
        };
        let ranges: Option<Vec<Range<usize>>> =
            text("ranges")?.split(' ').filter(|text| !text.is_empty()).map(range).collect();
        let ranges = ranges.ok_or_else(|| content("`ranges` of its metadata cannot be read".to_owned()))?;
        let tensors = header.iter().filter(|(name, _)| *name != "__metadata__");
        let tensors: Result<HashMap<String, Stored>, CheckpointError> = tensors
            .map(|(name, value)| {
                let stored = Stored::of(value, data);
                Ok((name.clone(), stored.ok_or_else(|| content(format!("what it says of `{name}` cannot be read")))?))
            })
            .collect();
        let tensors = tensors?;
        Ok((counts, Self { path, ranges, tensors }))
    }

    fn parameters(&self) -> usize {
        self.ranges.iter().map(Range::len).sum()
    }

    /// Shows elements of a tensor, piece by piece: the place of the first one in the tensor, and `[n]` in host memory.
    fn each(
        &self,
        name: &str,
        wanted: Range<usize>,
        mut show: impl FnMut(usize, &Tensor),
    ) -> Result<(), CheckpointError> {
        let content = |problem: String| CheckpointError::Content { path: self.path.clone(), problem };
        let held = self.parameters();
        let stored = match self.tensors.get(name) {
            Some(stored) if stored.elements == held => stored,
            Some(stored) => return Err(content(format!("`{name}` has {} elements, not {held}", stored.elements))),
            None => return Err(content(format!("`{name}` is missing"))),
        };
        let failed = |error| file_error(&self.path, error);
        let size = stored.kind.elt_size_in_bytes();
        let mut file = File::open(&self.path).map_err(failed)?;
        file.seek(SeekFrom::Start(stored.at + (wanted.start * size) as u64)).map_err(failed)?;
        let room = Tensor::empty([wanted.len().min(PIECE) as i64], (stored.kind, Device::Cpu));
        for start in wanted.clone().step_by(PIECE) {
            let len = PIECE.min(wanted.end - start);
            let mut piece = part(&room, 0, len);
            let bytes = bytes_mut(&mut piece).map_err(|error| content(error.to_string()))?;
            file.read_exact(bytes).map_err(failed)?;
            show(start, &piece);
        }
        Ok(())
    }
}

impl Stored {
    /// What a safetensors header says of a tensor; `data`: where the bytes of tensors begin.
    fn of(value: &Value, data: u64) -> Option<Self> {
        let kind = match value["dtype"].as_str()? {
            "F32" => Kind::Float,
            "BF16" => Kind::BFloat16,
            _ => return None,
        };
        let mut elements: usize = 1;
        for size in value["shape"].as_array()? {
            elements = elements.checked_mul(usize::try_from(size.as_u64()?).ok()?)?;
        }
        let [start, end] = [value["data_offsets"][0].as_u64()?, value["data_offsets"][1].as_u64()?];
        let bytes = u64::try_from(elements.checked_mul(kind.elt_size_in_bytes())?).ok()?;
        (end.checked_sub(start)? == bytes).then_some(Self { kind, elements, at: data.checked_add(start)? })
    }
}

/// The JSON header of a safetensors file (eight bytes of length, then as many bytes), and where the data begin.
fn read_header(path: &Path) -> std::io::Result<(Vec<u8>, u64)> {
    let mut file = File::open(path)?;
    let mut length = [0; 8];
    file.read_exact(&mut length)?;
    let length = u64::from_le_bytes(length).min(MAX_HEADER_BYTES);
    let mut header = Vec::new();
    file.take(length).read_to_end(&mut header)?;
    Ok((header, 8 + length))
}
