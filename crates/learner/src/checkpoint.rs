//! Checkpoints: the training state ([`crate::state`]) and the model as a Hugging Face folder.
//!
//! State is captured first, which takes as long as copying it in memory, and written by whoever holds the capture, while
//! training goes on. The model is exported where nothing is trained any more.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use pacs_collective::Collective;
use pacs_model::{Export, ModelError};
use pacs_protocol::v1;
use pacs_spec::JobSpec;
use pacs_torch::ViewError;

use crate::state::{self, Memory, StateContent};
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
    /// The file is not wanted any more: its generation is over, or nobody works on it.
    #[error("{}: given up half-written, since nobody wants it any more", path.display())]
    Unwanted {
        /// The file.
        path: PathBuf,
    },
    /// The model could not be exported.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A tensor is not in host memory.
    #[error(transparent)]
    View(#[from] ViewError),
    /// Divided weights could not be brought together.
    #[error("bring the weights together: {0}")]
    Gather(#[source] Box<TrainError>),
}

/// One rank's part of the training state behind a step, in memory of its own.
#[derive(Debug)]
pub struct Captured {
    files: Vec<StateContent>,
}

impl Captured {
    /// Memory that it takes (bytes).
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(StateContent::bytes).sum()
    }

    /// Whether this rank has nothing to write.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Writes it into `folder` and returns the files, relative to it, with sizes and checksums. Each is durable.
    ///
    /// # Errors
    /// When the file system refuses, and soon after `unwanted` is set.
    pub fn write(&self, folder: &Path, unwanted: &AtomicBool) -> Result<Vec<v1::SavedFile>, CheckpointError> {
        let write = |content: &StateContent| {
            let written = content.write(folder, unwanted)?;
            Ok(v1::SavedFile { path: content.name.clone(), bytes: written.bytes, crc32: written.crc32 })
        };
        self.files.iter().map(write).collect()
    }
}

/// The export of a job's model that began as the folder `source`: with the chat template and variables of the job.
///
/// # Errors
/// When the template, or a file of `source` that names end tokens, cannot be used.
pub fn exported(spec: &JobSpec, source: &Path) -> Result<Export, ModelError> {
    let variables = match serde_json::to_value(&spec.model.template_variables) {
        Ok(serde_json::Value::Object(variables)) => variables,
        other => unreachable!("a TOML table became {other:?}"),
    };
    Export::new(source, spec.model.chat_template.as_deref(), &variables)
}

impl Trainer {
    /// Copies this rank's part of the state. Rank 0 holds replicated state, and each rank its part of divided state.
    #[must_use]
    pub fn capture(&self) -> Captured {
        self.take_state(Memory::Own)
    }

    fn take_state(&self, memory: Memory) -> Captured {
        let division = self.network.division;
        if division.parts() == 1 && division.rank > 0 {
            return Captured { files: Vec::new() };
        }
        let critic = self.critic.as_ref().map(|critic| (state::VALUE_MODEL, &critic.network));
        let networks = [(state::POLICY, &self.network)].into_iter().chain(critic);
        Captured { files: networks.map(|(prefix, it)| state::capture(it, self.step, prefix, memory)).collect() }
    }

    /// Writes what was asked for into `folder` and returns the files that this rank wrote, relative to it, with sizes and
    /// checksums. Every rank of `collective` has to call this; rank 0 writes the model.
    ///
    /// # Errors
    /// See [`CheckpointError`].
    pub fn save(
        &mut self,
        folder: &Path,
        training_state: bool,
        model: Option<&Export>,
        collective: &mut dyn Collective,
    ) -> Result<Vec<v1::SavedFile>, CheckpointError> {
        let mut files = match training_state {
            true => self.take_state(Memory::Shared).write(folder, &AtomicBool::new(false))?,
            false => Vec::new(),
        };
        let Some(export) = model else { return Ok(files) };
        let writes_model = collective.rank() == 0;
        if let Some(parameters) =
            self.weights(collective, writes_model).map_err(|error| CheckpointError::Gather(Box::new(error)))?
        {
            let target = folder.join(MODEL_FOLDER);
            parameters.export(export, &target, parameters.flat.kind())?;
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
        self.step = state::restore(&mut self.network, folder, state::POLICY)?;
        if let Some(critic) = &mut self.critic {
            state::restore(&mut critic.network, folder, state::VALUE_MODEL)?;
        }
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
