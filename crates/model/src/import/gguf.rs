//! Typed access to a GGUF file.

mod header;

use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::{Path, PathBuf};

use candle_core::Device;
use candle_core::quantized::gguf_file::{Content, TensorInfo, Value};

use super::ImportError;
use crate::ModelError;

/// An open GGUF file: its header is read, its tensors are read one by one.
pub(crate) struct Gguf {
    path: PathBuf,
    reader: BufReader<File>,
    content: Content,
}

impl Gguf {
    pub(crate) fn open(path: &Path) -> Result<Self, ImportError> {
        let file = File::open(path).map_err(ModelError::io("open", path))?;
        let length = file.metadata().map_err(ModelError::io("read", path))?.len();
        let mut reader = BufReader::new(file);
        let mut magic = [0; 4];
        if reader.read_exact(&mut magic).is_err() || magic != *b"GGUF" {
            return Err(ImportError::NotGguf { file: path.to_owned() });
        }
        let corrupt = |detail| ImportError::Corrupt { file: path.to_owned(), detail };
        // The reader takes memory for whatever length the file claims, and goes as deep as it nests.
        header::check(&mut reader, length).map_err(corrupt)?;
        reader.rewind().map_err(ModelError::io("read", path))?;
        let content = Content::read(&mut reader).map_err(|error| header_error(path, &error))?;
        let gguf = Self { path: path.to_owned(), reader, content };
        gguf.check_extent(length)?;
        Ok(gguf)
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.path.clone()
    }

    pub(crate) fn tensors(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        self.content.tensor_infos.iter().map(|(name, info)| (name.as_str(), info))
    }

    pub(crate) fn has_tensor(&self, name: &str) -> bool {
        self.content.tensor_infos.contains_key(name)
    }

    /// Shape, outermost dimension first, of a tensor that is there.
    pub(crate) fn shape(&self, name: &str) -> Vec<i64> {
        self.content.tensor_infos[name].shape.dims().iter().map(|&size| size as i64).collect()
    }

    /// The values of a tensor that is there, as float32.
    pub(crate) fn read(&mut self, name: &str) -> Result<Vec<f32>, ImportError> {
        let tensor = self.content.tensor(&mut self.reader, name, &Device::Cpu);
        let values = tensor
            .and_then(|tensor| tensor.dequantize(&Device::Cpu))
            .and_then(|tensor| tensor.flatten_all())
            .and_then(|tensor| tensor.to_vec1::<f32>());
        values.map_err(|error| self.tensor_error(name, error.to_string()))
    }

    pub(crate) fn tensor_error(&self, tensor: &str, problem: String) -> ImportError {
        ImportError::Tensor { file: self.path(), tensor: tensor.to_owned(), problem }
    }

    /// A metadata entry read by `get`; `None` when it is not there.
    pub(crate) fn optional<'a, T>(
        &'a self,
        key: &str,
        get: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ImportError> {
        let Some(value) = self.content.metadata.get(key) else { return Ok(None) };
        get(value).map(Some).ok_or_else(|| self.metadata_error(key, "has an unexpected type or value"))
    }

    pub(crate) fn required<'a, T>(
        &'a self,
        key: &str,
        get: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<T, ImportError> {
        self.optional(key, get)?.ok_or_else(|| self.metadata_error(key, "is missing"))
    }

    pub(crate) fn metadata_error(&self, key: &str, problem: &'static str) -> ImportError {
        ImportError::Metadata { file: self.path(), key: key.to_owned(), problem }
    }

    fn check_extent(&self, length: u64) -> Result<(), ImportError> {
        for (name, info) in self.tensors() {
            let blocks = info.shape.elem_count().div_ceil(info.ggml_dtype.block_size());
            let bytes = blocks.saturating_mul(info.ggml_dtype.type_size()) as u64;
            let end = self.content.tensor_data_offset.saturating_add(info.offset).saturating_add(bytes);
            if end > length {
                let detail = format!("tensor `{name}` ends at byte {end}, the file at byte {length}");
                return Err(ImportError::Corrupt { file: self.path(), detail });
            }
        }
        Ok(())
    }
}

fn header_error(path: &Path, error: &candle_core::Error) -> ImportError {
    let (file, detail) = (path.to_owned(), error.to_string());
    // The reader has one error for everything; its text is what tells.
    if detail.contains("unknown dtype") {
        return ImportError::UnsupportedQuantisation { file, detail };
    }
    ImportError::Corrupt { file, detail }
}

/// Any unsigned or non-negative integer.
pub(crate) fn integer(value: &Value) -> Option<u64> {
    match *value {
        Value::I8(value) => value.try_into().ok(),
        Value::I16(value) => value.try_into().ok(),
        Value::I32(value) => value.try_into().ok(),
        Value::I64(value) => value.try_into().ok(),
        Value::Bool(_) => None,
        _ => value.to_u64().ok(),
    }
}

/// A float, as the decimal number that was meant: `1e-5`, not `9.99999974738e-6`.
pub(crate) fn float(value: &Value) -> Option<f64> {
    match value {
        Value::F32(value) => value.to_string().parse().ok(),
        Value::F64(value) => Some(*value),
        _ => None,
    }
}

pub(crate) fn boolean(value: &Value) -> Option<bool> {
    value.to_bool().ok()
}

pub(crate) fn string(value: &Value) -> Option<&str> {
    value.to_string().ok().map(String::as_str)
}

pub(crate) fn strings(value: &Value) -> Option<Vec<&str>> {
    value.to_vec().ok()?.iter().map(string).collect()
}

pub(crate) fn integers(value: &Value) -> Option<Vec<u64>> {
    value.to_vec().ok()?.iter().map(integer).collect()
}
