//! Reading the state files of a checkpoint in pieces: a rank has no memory for a second copy of its state.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use pacs_torch::bytes_mut;
use pacs_torch::tch::{Device, Kind, Tensor, no_grad};
use serde_json::Value;

use crate::comm::part;
use crate::error::{CheckpointError, file_error};

/// Longest header that is read (bytes).
const MAX_HEADER_BYTES: u64 = 64 << 20;
/// Elements per read.
const PIECE: usize = 4 << 20;

/// A range of parameters to read.
pub(super) struct Target {
    /// Place of the first parameter in the layout of the whole model.
    pub(super) index: usize,
    /// Flat tensor that the values are copied to.
    pub(super) values: Tensor,
}

/// All state files of one model in a checkpoint.
pub(super) struct StateFiles {
    /// Step, updates since the moments were zero, and updates of the job; the same in all files.
    pub(super) counts: [u64; 3],
    /// Digest of the base that adapters belong to, in hexadecimal digits, where a file says so.
    pub(super) base: Option<String>,
    files: Vec<StateFile>,
}

struct StateFile {
    path: PathBuf,
    /// Parameters in the file, in its order, by their place in the layout of the whole model.
    ranges: Vec<Range<usize>>,
    base: Option<String>,
    tensors: HashMap<String, Stored>,
}

/// Location of a flat tensor in a file.
#[derive(Clone, Copy)]
struct Stored {
    kind: Kind,
    elements: usize,
    /// Byte offset in the file.
    at: u64,
}

impl StateFiles {
    /// Opens the files of `folder` that begin with `prefix` and checks that together they hold `parameters` parameters.
    pub(super) fn find(folder: &Path, prefix: &str, parameters: usize) -> Result<Self, CheckpointError> {
        let entries = std::fs::read_dir(folder).map_err(|error| file_error(folder, error))?;
        let mut files = Vec::new();
        let mut counts = None;
        let mut base = None;
        for entry in entries {
            let entry = entry.map_err(|error| file_error(folder, error))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(prefix) && name.ends_with(".safetensors") {
                let (found, file) = StateFile::open(entry.path())?;
                if *counts.get_or_insert(found) != found {
                    let problem = "it is of another step than the files next to it".to_owned();
                    return Err(CheckpointError::Content { path: entry.path(), problem });
                }
                base = base.or_else(|| file.base.clone());
                files.push(file);
            }
        }
        let held: usize = files.iter().map(StateFile::parameters).sum();
        let Some(counts) = counts.filter(|_| held == parameters) else {
            let problem = format!("the state files hold {held} parameters, the model has {parameters}");
            return Err(CheckpointError::Content { path: folder.to_owned(), problem });
        };
        Ok(Self { counts, base, files })
    }

    /// Whether the files hold a tensor `name`.
    pub(super) fn hold(&self, name: &str) -> bool {
        self.files.first().is_some_and(|file| file.tensors.contains_key(name))
    }

    /// Reads the wanted ranges of the tensor `name` into their targets.
    pub(super) fn read(&self, name: &str, targets: &[Target]) -> Result<(), CheckpointError> {
        targets.iter().try_for_each(|Target { index, values }| {
            self.each(name, *index..index + values.numel(), |at, piece| {
                no_grad(|| part(values, at - index, piece.numel()).copy_(piece));
            })
        })
    }

    /// Calls `show` with the wanted parameters of the tensor `name` in pieces: the place of the first one, and the
    /// values `[n]` in host memory. The buffer is reused for the next piece.
    pub(super) fn each(
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
    /// Reads the header of a file: its counts, ranges and tensors.
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
        let base = text("base").ok().map(str::to_owned);
        Ok((counts, Self { path, ranges, base, tensors }))
    }

    fn parameters(&self) -> usize {
        self.ranges.iter().map(Range::len).sum()
    }

    /// Calls `show` with elements of a tensor in pieces: the place of the first one in the tensor, and the values `[n]`
    /// in host memory.
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
    /// Parses the entry of a tensor in a safetensors header; `data` is the offset of the first tensor byte.
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

/// Reads the JSON header of a safetensors file (eight bytes of length, then the JSON). Returns it with the offset
/// of the data.
fn read_header(path: &Path) -> std::io::Result<(Vec<u8>, u64)> {
    let mut file = File::open(path)?;
    let mut length = [0; 8];
    file.read_exact(&mut length)?;
    let length = u64::from_le_bytes(length).min(MAX_HEADER_BYTES);
    let mut header = Vec::new();
    file.take(length).read_to_end(&mut header)?;
    Ok((header, 8 + length))
}
