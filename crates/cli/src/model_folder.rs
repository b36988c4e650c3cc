//! Checks of a model folder that need no libtorch: configuration, tokenizer, headers of weight files.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};

/// A model folder that passed the checks.
#[derive(Debug)]
pub(crate) struct ModelFolder {
    /// `model_type` of `config.json`.
    pub(crate) kind: String,
    /// Number of parameters, summed over the weight files.
    pub(crate) parameters: u64,
}

/// Checks `config.json`, `tokenizer.json`, and the header of every weight file against the file's length, so that an incomplete
/// download is found before any worker starts.
pub(crate) fn inspect(dir: &Path) -> Result<ModelFolder> {
    ensure!(dir.exists(), "there is no such folder");
    ensure!(dir.is_dir(), "that is not a folder");
    // Read for its errors: it recognises adapters and Git LFS pointers and names them.
    pacs_shape::ModelConfig::read(dir)?;
    let config = read_object(&dir.join("config.json"))?;
    let kind = config.get("model_type").and_then(Value::as_str).unwrap_or("unknown").to_owned();
    let tokenizer = dir.join("tokenizer.json");
    ensure!(tokenizer.exists(), "there is no `{}`", tokenizer.display());
    let mut parameters = 0;
    for file in weight_files(dir)? {
        parameters += parameters_of(&file).with_context(|| format!("read weights `{}`", file.display()))?;
    }
    Ok(ModelFolder { kind, parameters })
}

/// Returns whether the folder has weight files or an index that names some.
pub(crate) fn has_weights(dir: &Path) -> bool {
    ["model.safetensors", "model.safetensors.index.json"].iter().any(|name| dir.join(name).exists())
}

fn read_object(path: &Path) -> Result<Map<String, Value>> {
    let text = fs::read_to_string(path).with_context(|| format!("read `{}`", path.display()))?;
    serde_json::from_str(text.strip_prefix('\u{feff}').unwrap_or(&text))
        .with_context(|| format!("read `{}`", path.display()))
}

/// Lists `model.safetensors`, else the files that the index names: the same rule as in the loader.
fn weight_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let (whole, index) = (dir.join("model.safetensors"), dir.join("model.safetensors.index.json"));
    if whole.exists() || !index.exists() {
        return Ok(vec![whole]);
    }
    let object = read_object(&index)?;
    let Some(map) = object.get("weight_map").and_then(Value::as_object) else {
        bail!("`{}` has no `weight_map`", index.display());
    };
    let mut names: Vec<&str> = map.values().filter_map(Value::as_str).collect();
    names.sort_unstable();
    names.dedup();
    ensure!(!names.is_empty(), "`{}` names no file", index.display());
    Ok(names.into_iter().map(|name| dir.join(name)).collect())
}

/// Limit of a header; models of thousands of tensors stay far below it.
const MAX_HEADER_BYTES: u64 = 100 << 20;

/// Sums the elements of one safetensors file, whose layout is 8 bytes of header length, a JSON header, then the data.
fn parameters_of(path: &Path) -> Result<u64> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    let mut size = [0; 8];
    file.read_exact(&mut size).context("the file is cut off")?;
    let header_bytes = u64::from_le_bytes(size);
    let most = length.saturating_sub(8).min(MAX_HEADER_BYTES);
    ensure!(header_bytes <= most, "no safetensors file: it claims a header of {header_bytes} bytes");
    let mut header = Vec::new();
    file.take(header_bytes).read_to_end(&mut header)?;
    let header: Map<String, Value> = serde_json::from_slice(&header).context("no safetensors file: bad header")?;
    let (mut parameters, mut end) = (0, 0);
    for (name, tensor) in header.iter().filter(|(name, _)| *name != "__metadata__") {
        let numbers = |value: &Value| value.as_array().map(|list| list.iter().filter_map(Value::as_u64).collect());
        let sizes: Option<Vec<u64>> = numbers(&tensor["shape"]);
        let offsets: Option<Vec<u64>> = numbers(&tensor["data_offsets"]);
        let (Some(sizes), Some([_, last])) = (sizes, offsets.as_deref()) else { bail!("tensor `{name}` is garbled") };
        parameters += sizes.iter().try_fold(1u64, |product, size| product.checked_mul(*size)).unwrap_or(0);
        end = end.max(*last);
    }
    let expected = end.checked_add(8 + header_bytes).context("bad offsets")?;
    ensure!(length == expected, "the file has {length} bytes, its header says {expected}; fetch or import it again");
    Ok(parameters)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn golden(model: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models").join(model)
    }

    #[test]
    fn parameters_are_counted_over_all_files() {
        let summary = fs::read_to_string(golden("summary.json")).expect("golden files");
        let summary: Value = serde_json::from_str(&summary).expect("JSON");
        for model in ["qwen2-tied", "qwen2-untied", "qwen3", "llama3"] {
            let folder = inspect(&golden(model)).expect("a model folder");
            assert_eq!(Some(folder.parameters), summary[model]["params"].as_u64(), "{model}");
        }
    }

    #[test]
    fn broken_folders_are_refused() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let complaint = |path: &Path| format!("{:#}", inspect(path).expect_err("must be refused"));
        assert_eq!(complaint(&dir.path().join("x")), "there is no such folder");
        assert!(complaint(dir.path()).contains("config.json"));
        for file in ["config.json", "tokenizer.json", "model.safetensors"] {
            fs::copy(golden("qwen2-tied").join(file), dir.path().join(file)).expect("copied");
        }
        assert!(inspect(dir.path()).is_ok());
        let case = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/cases/stale-index");
        let index = "model.safetensors.index.json";
        fs::copy(case.join(index), dir.path().join(index)).expect("copied");
        assert!(inspect(dir.path()).is_ok(), "an index of files that are gone says nothing of a whole one");
        let weights = dir.path().join("model.safetensors");
        let whole = fs::read(&weights).expect("read");
        fs::write(&weights, &whole[..whole.len() - 1]).expect("written");
        assert!(complaint(dir.path()).contains("bytes, its header says"), "{}", complaint(dir.path()));
        fs::write(&weights, b"garbage, and more of it").expect("written");
        assert!(complaint(dir.path()).contains("no safetensors file"), "{}", complaint(dir.path()));
    }
}
