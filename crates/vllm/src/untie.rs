//! Folders of models with tied embeddings, with an output head of their own.
//!
//! vLLM on CPUs packs the head of a model when it starts, and packs it anew only when `reload_weights` brings a tensor for it. A tied model
//! has none, so its head would stay that of the first version, without a word from the server. A server that was started from
//! such a folder gets the head with each version (`rollout.vllm.untied_head`).

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use pacs_shape::{
    LM_HEAD, ModelConfig, ParameterLayout, ShapeError, WEIGHTS_INDEX, WeightFile, WeightFileError, WeightFiles,
};
use safetensors::tensor::{Dtype, View};
use serde_json::{Map, Value, json};

/// Why a folder cannot be written with an output head of its own.
#[derive(Debug, thiserror::Error)]
pub enum UntieError {
    /// The folder is no model that is supported.
    #[error(transparent)]
    Config(#[from] ShapeError),
    /// The weight files of the folder cannot be used.
    #[error(transparent)]
    Weights(#[from] WeightFileError),
    /// Nothing is to be done.
    #[error("`{}` has an output head of its own already: servers can be started from it as it is", .0.display())]
    Untied(PathBuf),
    /// There is something at the place already.
    #[error("`{}` exists already: name a folder that does not", .0.display())]
    Exists(PathBuf),
    /// A file says what cannot be.
    #[error("`{}`: {problem}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A file or folder cannot be read or written.
    #[error("{action} `{}`: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// File or folder that it was tried on.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

fn failed<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> UntieError + 'a {
    move |source| UntieError::Io { action, path: path.to_owned(), source }
}

fn wrong(path: &Path, problem: impl ToString) -> UntieError {
    UntieError::File { path: path.to_owned(), problem: problem.to_string() }
}

/// Writes the model of the folder `model` to the new folder `out`, with the embedding once more as its output head.
///
/// # Errors
/// See [`UntieError`]. What was written until then is removed.
pub fn untie(model: &Path, out: &Path) -> Result<(), UntieError> {
    let config = ModelConfig::read(model)?;
    if !config.tie_embeddings {
        return Err(UntieError::Untied(model.to_owned()));
    }
    match fs::create_dir(out) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Err(UntieError::Exists(out.to_owned())),
        created => created.map_err(failed("create", out))?,
    }
    let written = write(model, &config, out);
    if written.is_err() {
        let _ = fs::remove_dir_all(out);
    }
    written
}

fn write(model: &Path, config: &ModelConfig, out: &Path) -> Result<(), UntieError> {
    let files = WeightFiles::open(model)?.files;
    copy_companions(model, &files, out)?;
    let embedding = ParameterLayout::new(config).head().name.clone();
    let of = files.len() + 1;
    let shard = |number: usize| format!("model-{number:05}-of-{of:05}.safetensors");
    let mut map = BTreeMap::new();
    let mut head = None;
    for (index, file) in files.iter().enumerate() {
        let WeightFile { path, file, data_start, tensors } = file;
        let name = shard(index + 1);
        fs::copy(path, out.join(&name)).map_err(failed("copy", path))?;
        for (tensor, info) in tensors {
            if *tensor == embedding {
                let (from, to) = info.data_offsets;
                let mut data = vec![0; to - from];
                file.read_exact_at(&mut data, data_start + from as u64).map_err(failed("read", path))?;
                head = Some(Tensor { dtype: info.dtype, shape: info.shape.clone(), data });
            }
            map.insert(tensor.clone(), name.clone());
        }
    }
    let Some(head) = head else { return Err(wrong(model, format!("its weights have no `{embedding}`"))) };
    let name = shard(of);
    let target = out.join(&name);
    let metadata = std::collections::HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file([(LM_HEAD, head)], Some(metadata), &target)
        .map_err(|error| wrong(&target, error))?;
    map.insert(LM_HEAD.to_owned(), name);
    // Last, because it is what makes the shards a model.
    let (index, content) = (out.join(WEIGHTS_INDEX), json!({"metadata": {}, "weight_map": map}));
    fs::write(&index, format!("{content:#}\n")).map_err(failed("write", &index))
}

/// Copies all other files at the top of the folder; config.json says that the head is not tied.
fn copy_companions(model: &Path, weights: &[WeightFile], out: &Path) -> Result<(), UntieError> {
    for entry in fs::read_dir(model).map_err(failed("read", model))? {
        let path = entry.map_err(failed("read", model))?.path();
        let Some(name) = path.file_name().filter(|_| path.is_file()) else { continue };
        let is_weights =
            weights.iter().any(|file| file.path == path) || path.extension().is_some_and(|end| end == "safetensors");
        if is_weights || name == WEIGHTS_INDEX || name == "config.json" {
            continue;
        }
        fs::copy(&path, out.join(name)).map_err(failed("copy", &path))?;
    }
    write_untied_config(model, out)
}

/// Writes the model's config.json to `out` with `tie_word_embeddings` switched off.
pub(crate) fn write_untied_config(model: &Path, out: &Path) -> Result<(), UntieError> {
    let mut config = object(&model.join("config.json"))?;
    config.insert("tie_word_embeddings".to_owned(), false.into());
    let target = out.join("config.json");
    fs::write(&target, format!("{:#}\n", Value::Object(config))).map_err(failed("write", &target))
}

fn object(path: &Path) -> Result<Map<String, Value>, UntieError> {
    let text = fs::read_to_string(path).map_err(failed("read", path))?;
    serde_json::from_str(text.strip_prefix('\u{feff}').unwrap_or(&text)).map_err(|error| wrong(path, error))
}

struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
}

impl View for Tensor {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.data)
    }

    fn data_len(&self) -> usize {
        self.data.len()
    }
}

#[cfg(test)]
mod tests {
    use pacs_shape::WEIGHTS_FILE;
    use safetensors::SafeTensors;

    use super::*;

    fn golden(model: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models").join(model)
    }

    #[test]
    fn an_untied_folder_is_the_same_model_with_a_head() {
        let place = tempfile::tempdir().expect("a folder");
        let out = place.path().join("untied");
        untie(&golden("qwen2-tied"), &out).expect("a tied model");
        let config = ModelConfig::read(&out).expect("a model");
        assert!(!config.tie_embeddings);
        let bytes = |file: &str| fs::read(out.join(file)).expect("a weight file");
        let (first, second) = (bytes("model-00001-of-00002.safetensors"), bytes("model-00002-of-00002.safetensors"));
        let (body, head) = (SafeTensors::deserialize(&first), SafeTensors::deserialize(&second));
        let (body, head) = (body.expect("safetensors"), head.expect("safetensors"));
        let head = head.tensor(LM_HEAD).expect("the head");
        assert_eq!(head, body.tensor("model.embed_tokens.weight").expect("the embedding"));
        let index = object(&out.join(WEIGHTS_INDEX)).expect("an index");
        for spec in ParameterLayout::new(&config).parameters() {
            assert!(index["weight_map"][&spec.name].is_string(), "{}", spec.name);
        }
        assert!(out.join("tokenizer.json").exists());
    }

    #[test]
    fn what_cannot_be_untied_is_refused_and_leaves_nothing() {
        let place = tempfile::tempdir().expect("a folder");
        let out = place.path().join("untied");
        assert!(matches!(untie(&golden("qwen2-untied"), &out), Err(UntieError::Untied(_))));
        let broken = place.path().join("broken");
        fs::create_dir(&broken).expect("room");
        fs::copy(golden("qwen2-tied").join("config.json"), broken.join("config.json")).expect("copied");
        fs::write(broken.join(WEIGHTS_FILE), [255; 64]).expect("written");
        assert!(matches!(untie(&broken, &out), Err(UntieError::Weights(_))));
        assert!(!out.exists());
        assert!(matches!(untie(&golden("qwen2-tied"), place.path()), Err(UntieError::Exists(_))));
    }
}
