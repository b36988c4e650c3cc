//! Writing a Hugging Face folder that other tools load as it is.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use pacs_torch::tch::{Kind, Tensor};
use safetensors::tensor::{Dtype, View};
use serde_json::Value;

use crate::{ModelError, ParameterLayout, ParameterSpec, Parameters, ShapeError};

/// File of a model's weights.
pub(crate) const WEIGHTS: &str = "model.safetensors";
/// Files beside the weights that a copy of the model needs; absent ones are passed over.
const COMPANIONS: [&str; 10] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
];

impl Parameters {
    /// Writes the parameters as a Hugging Face folder: `model.safetensors` in `kind`, the configuration of
    /// `source_dir` with its kind updated, tokenizer and chat template as they are.
    ///
    /// Each file is written under a temporary name, synced, and renamed; `config.json` comes last, so that a folder
    /// that loads is whole.
    ///
    /// # Errors
    /// When a file cannot be read or written, or `kind` is none that weights are stored in.
    pub fn save_hf(&self, source_dir: &Path, out_dir: &Path, kind: Kind) -> Result<(), ModelError> {
        fs::create_dir_all(out_dir).map_err(ModelError::io("create", out_dir))?;
        write_tensors(self, &out_dir.join(WEIGHTS), kind, str::to_owned)?;
        copy_companions(source_dir, out_dir)?;
        write_config(&source_dir.join("config.json"), &out_dir.join("config.json"), kind)?;
        sync_folder(out_dir)
    }
}

/// Makes a folder of a model that has no weights yet, for [`Parameters::save_hf`] to take its configuration and tokenizer
/// from: `config` becomes its `config.json`; tokenizer, chat template and generation settings are those of `tokenizer_dir`.
///
/// # Errors
/// When a file cannot be read or written.
pub fn prepare_folder(config: &Path, tokenizer_dir: &Path, out_dir: &Path) -> Result<(), ModelError> {
    let content = fs::read(config).map_err(ModelError::io("read", config))?;
    fs::create_dir_all(out_dir).map_err(ModelError::io("create", out_dir))?;
    copy_companions(tokenizer_dir, out_dir)?;
    write_file(&out_dir.join("config.json"), &content)?;
    sync_folder(out_dir)
}

pub(crate) fn copy_companions(source_dir: &Path, out_dir: &Path) -> Result<(), ModelError> {
    for name in COMPANIONS {
        let source = source_dir.join(name);
        if source.exists() {
            let content = fs::read(&source).map_err(ModelError::io("read", &source))?;
            write_file(&out_dir.join(name), &content)?;
        }
    }
    Ok(())
}

/// Writes parameters to one file, under names made of theirs.
pub(crate) fn write_tensors(
    parameters: &Parameters,
    path: &Path,
    kind: Kind,
    named: impl Fn(&str) -> String,
) -> Result<(), ModelError> {
    write_made(&parameters.layout, path, kind, named, |spec| parameters.view(&spec.name))
}

/// The same of the parameters of a layout that are made one by one, while they are written.
pub(crate) fn write_made(
    layout: &ParameterLayout,
    path: &Path,
    kind: Kind,
    named: impl Fn(&str) -> String,
    make: impl Fn(&ParameterSpec) -> Tensor,
) -> Result<(), ModelError> {
    let dtype = stored_dtype(kind, path)?;
    let tensors = layout.parameters().iter().map(|spec| {
        let shape = spec.shape.iter().map(|&size| size as usize).collect();
        (named(&spec.name), Stored { spec, make: &make, kind, dtype, shape })
    });
    // Loaders older than this format's documentation insist on the entry.
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let temporary = temporary_name(path);
    safetensors::serialize_to_file(tensors, Some(metadata), &temporary).map_err(|error| match error {
        safetensors::SafeTensorError::IoError(source) => ModelError::io("write", &temporary)(source),
        other => ModelError::io("write", &temporary)(io::Error::other(other)),
    })?;
    finish(&temporary, path)
}

/// Writes a small file so that it is there in full or not at all.
pub(crate) fn write_file(path: &Path, content: &[u8]) -> Result<(), ModelError> {
    let temporary = temporary_name(path);
    fs::write(&temporary, content).map_err(ModelError::io("write", &temporary))?;
    finish(&temporary, path)
}

/// Makes the renames in a folder durable.
pub(crate) fn sync_folder(dir: &Path) -> Result<(), ModelError> {
    File::open(dir).and_then(|folder| folder.sync_all()).map_err(ModelError::io("sync", dir))
}

/// Name of a kind in config.json.
pub(crate) fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::BFloat16 => "bfloat16",
        Kind::Half => "float16",
        _ => "float32",
    }
}

fn stored_dtype(kind: Kind, path: &Path) -> Result<Dtype, ModelError> {
    match kind {
        Kind::Float => Ok(Dtype::F32),
        Kind::BFloat16 => Ok(Dtype::BF16),
        Kind::Half => Ok(Dtype::F16),
        other => Err(ShapeError::Unsupported {
            path: path.to_owned(),
            feature: format!("storing weights as {other:?}"),
            hint: "supported are float32, bfloat16 and float16",
        }
        .into()),
    }
}

pub(crate) fn write_config(source: &Path, target: &Path, kind: Kind) -> Result<(), ModelError> {
    let text = fs::read_to_string(source).map_err(ModelError::io("read", source))?;
    let mut config: Value =
        serde_json::from_str(&text).map_err(|error| ModelError::config(source, error.to_string()))?;
    let Some(fields) = config.as_object_mut() else {
        return Err(ModelError::config(source, "it is not a JSON object"));
    };
    // Newer files say `dtype`, older ones `torch_dtype`.
    let key = if fields.contains_key("dtype") { "dtype" } else { "torch_dtype" };
    fields.insert(key.to_owned(), kind_name(kind).into());
    if key == "dtype" && fields.contains_key("torch_dtype") {
        fields.insert("torch_dtype".to_owned(), kind_name(kind).into());
    }
    write_file(target, format!("{config:#}\n").as_bytes())
}

fn temporary_name(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".tmp");
    path.with_file_name(name)
}

fn finish(temporary: &Path, path: &Path) -> Result<(), ModelError> {
    File::open(temporary).and_then(|file| file.sync_all()).map_err(ModelError::io("sync", temporary))?;
    fs::rename(temporary, path).map_err(ModelError::io("rename into place", path))
}

/// A tensor that is made, converted and copied to host memory only while it is written.
struct Stored<'a, M> {
    spec: &'a ParameterSpec,
    make: &'a M,
    kind: Kind,
    dtype: Dtype,
    shape: Vec<usize>,
}

impl<M: Fn(&ParameterSpec) -> Tensor> View for Stored<'_, M> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let tensor = (self.make)(self.spec).to_kind(self.kind).contiguous();
        let mut data = vec![0; self.data_len()];
        tensor.copy_data_u8(&mut data, tensor.numel());
        data.into()
    }

    fn data_len(&self) -> usize {
        self.spec.numel() * self.kind.elt_size_in_bytes()
    }
}
