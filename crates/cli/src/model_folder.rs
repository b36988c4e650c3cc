//! Checks of a model folder that need no libtorch: configuration, tokenizer, headers of weight files.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use pacs_shape::{WeightFile, WeightFiles};
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
    let parameters = WeightFiles::open(dir)?.files.iter().map(WeightFile::elements).sum();
    Ok(ModelFolder { kind, parameters })
}

fn read_object(path: &Path) -> Result<Map<String, Value>> {
    let text = fs::read_to_string(path).with_context(|| format!("read `{}`", path.display()))?;
    serde_json::from_str(text.strip_prefix('\u{feff}').unwrap_or(&text))
        .with_context(|| format!("read `{}`", path.display()))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

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
        assert!(complaint(dir.path()).contains("is truncated: tensor `"), "{}", complaint(dir.path()));
        fs::write(&weights, b"garbage, and more of it").expect("written");
        assert!(complaint(dir.path()).contains("not the size of a safetensors header"), "{}", complaint(dir.path()));
    }
}
