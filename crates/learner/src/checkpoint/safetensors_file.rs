//! Writing a safetensors file in pieces, with its checksum computed on the way and cancellation between pieces.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use pacs_torch::bytes;
use pacs_torch::tch::{Kind, Tensor};
use serde_json::{Map, Value, json};

use crate::error::{CheckpointError, file_error};

/// Bytes between two checks for cancellation.
const PIECE: usize = 4 << 20;
/// The header is padded to a multiple of this, so that tensors start where they can be mapped.
const ALIGNMENT: usize = 8;

/// Size and CRC-32 of a written file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Written {
    pub(super) bytes: u64,
    pub(super) crc32: u32,
}

/// Writes contiguous tensors in host memory (flat, float32 or bfloat16) to `path` and syncs the file.
///
/// # Errors
/// When the file system refuses, or as soon as `unwanted` is set. The file is incomplete then.
pub(super) fn write_tensors(
    path: &Path,
    metadata: &[(&'static str, String)],
    tensors: &[(&'static str, Tensor)],
    unwanted: &AtomicBool,
) -> Result<Written, CheckpointError> {
    let header = header(metadata, tensors);
    let file = File::create(path).map_err(|error| file_error(path, error))?;
    let mut sink = Sink { path, file, unwanted, hasher: crc32fast::Hasher::new(), bytes: 0 };
    sink.write(&(header.len() as u64).to_le_bytes())?;
    sink.write(&header)?;
    for (_, tensor) in tensors {
        sink.write(bytes(tensor)?)?;
    }
    sink.file.sync_all().map_err(|error| file_error(path, error))?;
    Ok(Written { bytes: sink.bytes, crc32: sink.hasher.finalize() })
}

fn header(metadata: &[(&'static str, String)], tensors: &[(&'static str, Tensor)]) -> Vec<u8> {
    let texts = metadata.iter().map(|(name, text)| ((*name).to_owned(), Value::from(text.as_str())));
    let mut fields = Map::from_iter([("__metadata__".to_owned(), Value::Object(texts.collect()))]);
    let mut end = 0;
    for (name, tensor) in tensors {
        let kind = if tensor.kind() == Kind::Float { "F32" } else { "BF16" };
        let start = end;
        end += tensor.numel() * tensor.kind().elt_size_in_bytes();
        let field = json!({ "dtype": kind, "shape": [tensor.numel()], "data_offsets": [start, end] });
        fields.insert((*name).to_owned(), field);
    }
    let mut header = Value::Object(fields).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(ALIGNMENT), b' ');
    header
}

struct Sink<'a> {
    path: &'a Path,
    file: File,
    unwanted: &'a AtomicBool,
    hasher: crc32fast::Hasher,
    bytes: u64,
}

impl Sink<'_> {
    fn write(&mut self, content: &[u8]) -> Result<(), CheckpointError> {
        for piece in content.chunks(PIECE) {
            if self.unwanted.load(Ordering::Relaxed) {
                return Err(CheckpointError::Unwanted { path: self.path.to_owned() });
            }
            self.file.write_all(piece).map_err(|error| file_error(self.path, error))?;
            self.hasher.update(piece);
            self.bytes += piece.len() as u64;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use pacs_torch::tch::Device;

    use super::*;

    fn tensors() -> [(&'static str, Tensor); 2] {
        let flat = Tensor::arange(1000, (Kind::Float, Device::Cpu));
        [("master", flat.shallow_clone()), ("reference", flat.to_kind(Kind::BFloat16))]
    }

    #[test]
    fn other_readers_of_the_format_find_what_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.safetensors");
        let metadata = [("step", "3".to_owned()), ("ranges", "0+1000".to_owned())];
        let written = write_tensors(&path, &metadata, &tensors(), &AtomicBool::new(false)).unwrap();
        let content = std::fs::read(&path).unwrap();
        assert_eq!((written.bytes, written.crc32), (content.len() as u64, crc32fast::hash(&content)));
        let (_, header) = safetensors::SafeTensors::read_metadata(&content).unwrap();
        assert_eq!(header.metadata().as_ref().unwrap()["ranges"], "0+1000");
        let read = Tensor::read_safetensors(&path).unwrap();
        for (name, tensor) in tensors() {
            let found = &read.iter().find(|(found, _)| found == name).unwrap().1;
            assert_eq!((found.kind(), found), (tensor.kind(), &tensor), "{name}");
        }
    }

    #[test]
    fn an_unwanted_file_is_abandoned() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.safetensors");
        let given_up = write_tensors(&path, &[], &tensors(), &AtomicBool::new(true));
        assert!(matches!(given_up, Err(CheckpointError::Unwanted { .. })), "{given_up:?}");
        // Nothing can be written to a folder that was removed meanwhile.
        let gone = write_tensors(&folder.path().join("gone/state"), &[], &tensors(), &AtomicBool::new(false));
        assert!(matches!(gone, Err(CheckpointError::File { .. })), "{gone:?}");
    }
}
