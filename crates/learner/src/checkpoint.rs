//! The training state on disk: everything that the next step depends on, in one safetensors file.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use pacs_model::Parameters;
use pacs_protocol::v1;
use pacs_torch::tch::{Device, Kind, Tensor, no_grad};
use pacs_torch::{ViewError, bytes, dithered_bf16};
use safetensors::tensor::{Dtype, TensorView};

use crate::optimizer::Optimizer;
use crate::trainer::{Trainer, duplicate};

/// File of the training state within a checkpoint.
const STATE_FILE: &str = "training-state.safetensors";
/// Folder of the Hugging Face model within a checkpoint.
const MODEL_FOLDER: &str = "model";

/// Why a checkpoint could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The file system failed.
    #[error("{}: {error}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What happened.
        error: std::io::Error,
    },
    /// The file is there and makes no sense.
    #[error("{}: {problem}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The model could not be exported.
    #[error(transparent)]
    Model(#[from] pacs_model::ModelError),
    /// A tensor is not in host memory.
    #[error(transparent)]
    View(#[from] ViewError),
}

impl Trainer {
    /// Writes what was asked for into `folder` and returns the files, relative to it, with sizes and checksums.
    ///
    /// # Errors
    /// See [`CheckpointError`].
    pub fn save(
        &self,
        folder: &Path,
        training_state: bool,
        model_from: Option<&Path>,
    ) -> Result<Vec<v1::SavedFile>, CheckpointError> {
        let mut files = Vec::new();
        if training_state {
            let path = folder.join(STATE_FILE);
            self.write_state(&path)?;
            files.push(describe(folder, &path)?);
        }
        if let Some(source) = model_from {
            let target = folder.join(MODEL_FOLDER);
            self.parameters().save_hf(source, &target, self.parameters().flat.kind())?;
            let entries = std::fs::read_dir(&target).map_err(|error| file_error(&target, error))?;
            for entry in entries {
                let path = entry.map_err(|error| file_error(&target, error))?.path();
                files.push(describe(folder, &path)?);
            }
            files.sort_by(|a, b| a.path.cmp(&b.path));
        }
        Ok(files)
    }

    fn write_state(&self, path: &Path) -> Result<(), CheckpointError> {
        let host = |tensor: &Tensor| tensor.to_device(Device::Cpu).contiguous();
        let master = self.optimizer.master.as_ref().unwrap_or(&self.parameters().flat);
        let mut tensors = vec![
            ("master", host(master)),
            ("moment1", host(&self.optimizer.moment1)),
            ("moment2", host(&self.optimizer.moment2)),
        ];
        if let Some(reference) = &self.reference {
            tensors.push(("reference", host(&reference.flat)));
        }
        if let Some(critic) = &self.critic {
            let master = critic.optimizer.master.as_ref().unwrap_or(&critic.parameters.flat);
            tensors.push(("critic_master", host(master)));
            tensors.push(("critic_moment1", host(&critic.optimizer.moment1)));
            tensors.push(("critic_moment2", host(&critic.optimizer.moment2)));
        }
        let content = |problem: String| CheckpointError::Content { path: path.to_owned(), problem };
        let mut views = Vec::new();
        for (name, tensor) in &tensors {
            let kind = if tensor.kind() == Kind::Float { Dtype::F32 } else { Dtype::BF16 };
            let view = TensorView::new(kind, vec![tensor.numel()], bytes(tensor)?);
            views.push((*name, view.map_err(|error| content(error.to_string()))?));
        }
        let mut counts = vec![
            ("step", self.step),
            ("updates", self.optimizer.updates),
            ("total_updates", self.optimizer.total_updates),
        ];
        if let Some(critic) = &self.critic {
            counts.push(("critic_updates", critic.optimizer.updates));
            counts.push(("critic_total_updates", critic.optimizer.total_updates));
        }
        let metadata: HashMap<String, String> =
            counts.into_iter().map(|(name, count)| (name.to_owned(), count.to_string())).collect();
        safetensors::serialize_to_file(views, Some(metadata), path).map_err(|error| content(error.to_string()))?;
        File::open(path).and_then(|file| file.sync_all()).map_err(|error| file_error(path, error))
    }

    /// Takes the state of the checkpoint in `folder` over.
    ///
    /// # Errors
    /// When the file is missing, damaged, or of another model.
    pub fn restore(&mut self, folder: &Path) -> Result<(), CheckpointError> {
        let path = folder.join(STATE_FILE);
        let content = |problem: String| CheckpointError::Content { path: path.clone(), problem };
        let counts = read_counts(&path, ["step", "updates", "total_updates"])?;
        let tensors = Tensor::read_safetensors(&path).map_err(|error| content(error.to_string()))?;
        let mut tensors: HashMap<String, Tensor> = tensors.into_iter().collect();
        let mut take = |name: &str, expected: &[i64]| match tensors.remove(name) {
            Some(tensor) if tensor.size() == expected => Ok(tensor),
            Some(tensor) => Err(content(format!("`{name}` has {:?} elements, the model {expected:?}", tensor.size()))),
            None => Err(content(format!("`{name}` is missing"))),
        };
        let size = self.parameters.flat.size();
        let held = [take("master", &size)?, take("moment1", &size)?, take("moment2", &size)?];
        let reference = take("reference", &size).ok();
        let critic = match &self.critic {
            None => None,
            Some(critic) => {
                let size = critic.parameters.flat.size();
                let names = ["critic_master", "critic_moment1", "critic_moment2"];
                let [master, moment1, moment2] = names.map(|name| take(name, &size));
                let counts = read_counts(&path, ["critic_updates", "critic_total_updates"])?;
                Some(([master?, moment1?, moment2?], counts))
            }
        };
        put(&mut self.parameters, &mut self.optimizer, &held);
        self.reference = reference.map(|flat| {
            let mut held = duplicate(&self.parameters);
            no_grad(|| held.flat.copy_(&flat));
            held
        });
        if let (Some(critic), Some((held, counts))) = (&mut self.critic, critic) {
            put(&mut critic.parameters, &mut critic.optimizer, &held);
            [critic.optimizer.updates, critic.optimizer.total_updates] = counts;
        }
        [self.step, self.optimizer.updates, self.optimizer.total_updates] = counts;
        Ok(())
    }
}

/// Puts master weights and moments in their places.
fn put(parameters: &mut Parameters, optimizer: &mut Optimizer, [master, moment1, moment2]: &[Tensor; 3]) {
    no_grad(|| {
        match &mut optimizer.master {
            Some(held) => {
                held.copy_(master);
                parameters.flat.copy_(&dithered_bf16(master));
            }
            None => parameters.flat.copy_(master),
        }
        optimizer.moment1.copy_(moment1);
        optimizer.moment2.copy_(moment2);
    });
}

fn read_counts<const N: usize>(path: &Path, names: [&str; N]) -> Result<[u64; N], CheckpointError> {
    let content = |problem: &str| CheckpointError::Content { path: path.to_owned(), problem: problem.to_owned() };
    let header = read_header(path).map_err(|error| file_error(path, error))?;
    let header: serde_json::Value =
        serde_json::from_slice(&header).map_err(|_| content("the header is not that of a safetensors file"))?;
    let count = |name: &str| {
        let text = header["__metadata__"][name].as_str().ok_or_else(|| content("the step counts are missing"))?;
        text.parse::<u64>().map_err(|_| content("a step count is not a number"))
    };
    let mut counts = [0; N];
    for (value, name) in counts.iter_mut().zip(names) {
        *value = count(name)?;
    }
    Ok(counts)
}

/// The JSON header of a safetensors file: eight bytes of length, then as many bytes.
fn read_header(path: &Path) -> std::io::Result<Vec<u8>> {
    use std::io::Read;
    let mut file = File::open(path)?;
    let mut length = [0; 8];
    file.read_exact(&mut length)?;
    let mut header = Vec::new();
    file.take(u64::from_le_bytes(length).min(1 << 20)).read_to_end(&mut header)?;
    Ok(header)
}

fn describe(folder: &Path, path: &Path) -> Result<v1::SavedFile, CheckpointError> {
    use std::io::Read;
    let mut file = File::open(path).map_err(|error| file_error(path, error))?;
    let mut hasher = crc32fast::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    let mut bytes = 0;
    loop {
        let read = file.read(&mut buffer).map_err(|error| file_error(path, error))?;
        if read == 0 {
            break;
        }
        hasher.update(&buffer[..read]);
        bytes += read as u64;
    }
    let relative = path.strip_prefix(folder).unwrap_or(path).to_string_lossy().into_owned();
    Ok(v1::SavedFile { path: relative, bytes, crc32: hasher.finalize() })
}

fn file_error(path: &Path, error: std::io::Error) -> CheckpointError {
    CheckpointError::File { path: path.to_owned(), error }
}
