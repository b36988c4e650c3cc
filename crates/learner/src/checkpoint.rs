//! Checkpoints: the training state ([`crate::state`]) and the model as a Hugging Face folder.

use std::fs::File;
use std::path::{Path, PathBuf};

use pacs_collective::Collective;
use pacs_protocol::v1;
use pacs_torch::ViewError;

use crate::state;
use crate::trainer::{TrainError, Trainer};

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
    /// Divided weights could not be brought together.
    #[error("bring the weights together: {0}")]
    Gather(#[source] Box<TrainError>),
}

impl Trainer {
    /// Writes what was asked for into `folder` and returns the files that this rank wrote, relative to it, with sizes and
    /// checksums. Every rank of `collective` has to call this; rank 0 writes the model and replicated state, and each rank
    /// writes its part of divided state.
    ///
    /// # Errors
    /// See [`CheckpointError`].
    pub fn save(
        &mut self,
        folder: &Path,
        training_state: bool,
        model_from: Option<&Path>,
        collective: &mut dyn Collective,
    ) -> Result<Vec<v1::SavedFile>, CheckpointError> {
        let mut files = Vec::new();
        let (division, writes_model) = (self.network.division, collective.rank() == 0);
        if training_state && (division.parts() > 1 || writes_model) {
            let path = folder.join(state::file_name(division));
            state::save(&self.network, self.step, &path)?;
            files.push(describe(folder, &path)?);
        }
        let Some(source) = model_from else { return Ok(files) };
        if let Some(parameters) =
            self.weights(collective, writes_model).map_err(|error| CheckpointError::Gather(Box::new(error)))?
        {
            let target = folder.join(MODEL_FOLDER);
            parameters.save_hf(source, &target, parameters.flat.kind())?;
            let entries = std::fs::read_dir(&target).map_err(|error| file_error(&target, error))?;
            for entry in entries {
                let path = entry.map_err(|error| file_error(&target, error))?.path();
                files.push(describe(folder, &path)?);
            }
            files.sort_by(|a, b| a.path.cmp(&b.path));
        }
        Ok(files)
    }

    /// Takes the state of the checkpoint in `folder` over, whatever the number of ranks that wrote it.
    ///
    /// # Errors
    /// When a file is missing, damaged, or of another model.
    pub fn restore(&mut self, folder: &Path) -> Result<(), CheckpointError> {
        self.step = state::restore(&mut self.network, folder)?;
        Ok(())
    }
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

pub(crate) fn file_error(path: &Path, error: std::io::Error) -> CheckpointError {
    CheckpointError::File { path: path.to_owned(), error }
}
