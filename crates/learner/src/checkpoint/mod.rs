//! Checkpoints: the training state ([`state`]) and the model as a Hugging Face folder.
//!
//! State is first captured, which takes as long as a copy in memory. The holder of the capture then writes it while
//! training continues. The model is exported in the foreground, when no training is left to delay.

mod background_writer;
mod safetensors_file;
mod state;
mod state_files;

use std::fs::File;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use pacs_collective::Collective;
use pacs_model::{Export, ModelError};
use pacs_protocol::v1;
use pacs_spec::JobSpec;

use crate::error::{CheckpointError, file_error};
use crate::update::Trainer;

use self::state::{CapturedBuffers, StateContent};

pub(crate) use self::background_writer::{BackgroundWriter, Busy, WriteOutcome};

/// Folder of the exported Hugging Face model, relative to the checkpoint; adapters are merged into it.
const MODEL_FOLDER: &str = "model";
/// Folder of the adapters as PEFT loads them, relative to the checkpoint.
const ADAPTER_FOLDER: &str = "adapter";

/// A copy of one rank's part of the training state after a step.
#[derive(Debug)]
pub struct Captured {
    files: Vec<StateContent>,
}

impl Captured {
    /// Size of the copy in host memory (bytes).
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(StateContent::bytes).sum()
    }

    /// Whether this rank has nothing to write, as ranks above 0 of replicated state.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Writes the capture into `folder` and returns its files with relative paths, sizes and checksums. Each file is
    /// synced to disk.
    ///
    /// # Errors
    /// When the file system refuses, or soon after `unwanted` is set.
    pub fn write(&self, folder: &Path, unwanted: &AtomicBool) -> Result<Vec<v1::SavedFile>, CheckpointError> {
        let write = |content: &StateContent| {
            let written = content.write(folder, unwanted)?;
            Ok(v1::SavedFile { path: content.name.clone(), bytes: written.bytes, crc32: written.crc32 })
        };
        self.files.iter().map(write).collect()
    }
}

/// Describes the export of a job's model: the files of `source`, with the chat template and variables of the job.
///
/// # Errors
/// When the template cannot be used, or a file of `source` that names end tokens.
pub fn exported(spec: &JobSpec, source: &Path) -> Result<Export, ModelError> {
    let variables = match serde_json::to_value(&spec.model.template_variables) {
        Ok(serde_json::Value::Object(variables)) => variables,
        other => unreachable!("a TOML table became {other:?}"),
    };
    Export::new(source, spec.model.chat_template.as_deref(), &variables)
}

impl Trainer {
    /// Copies this rank's part of the state. Rank 0 captures replicated state; every rank captures its shard
    /// of divided state.
    #[must_use]
    pub fn capture(&self) -> Captured {
        self.take_state(CapturedBuffers::Own)
    }

    fn take_state(&self, buffers: CapturedBuffers) -> Captured {
        let division = self.policy.division;
        if division.parts() == 1 && division.rank > 0 {
            return Captured { files: Vec::new() };
        }
        let critic = self.critic.as_ref().map(|critic| (state::VALUE_MODEL, &critic.model));
        let models = [(state::POLICY, &self.policy)].into_iter().chain(critic);
        Captured { files: models.map(|(prefix, it)| state::capture(it, self.step, prefix, buffers)).collect() }
    }

    /// Writes a checkpoint into `folder` in the foreground and returns the files of this rank, with relative paths,
    /// sizes and checksums. Collective: every rank has to call it. Rank 0 writes the model, and adapters also by themselves.
    ///
    /// # Errors
    /// When a file cannot be written, the model cannot be exported, or another rank fails while weights are gathered.
    pub fn save(
        &mut self,
        folder: &Path,
        training_state: bool,
        model: Option<&Export>,
        collective: &mut dyn Collective,
    ) -> Result<Vec<v1::SavedFile>, CheckpointError> {
        let mut files = match training_state {
            true => self.take_state(CapturedBuffers::Shared).write(folder, &AtomicBool::new(false))?,
            false => Vec::new(),
        };
        let Some(export) = model else { return Ok(files) };
        let model = folder.join(MODEL_FOLDER);
        let adapter = folder.join(ADAPTER_FOLDER);
        if self.export(export, &model, &adapter, collective)? {
            describe_all(folder, &model, &mut files)?;
            if self.base().is_some() {
                describe_all(folder, &adapter, &mut files)?;
            }
            files.sort_by(|a, b| a.path.cmp(&b.path));
        }
        Ok(files)
    }

    /// Writes the model into the folder `model`. Adapters are merged into it, and written by themselves into `adapter`, as PEFT loads
    /// them. Collective: every rank has to call it; rank 0 writes, and only there the result is true.
    ///
    /// # Errors
    /// As [`Trainer::save`].
    pub fn export(
        &mut self,
        export: &Export,
        model: &Path,
        adapter: &Path,
        collective: &mut dyn Collective,
    ) -> Result<bool, CheckpointError> {
        let writes = collective.rank() == 0;
        let parameters = self.weights(collective, writes).map_err(|error| CheckpointError::Gather(Box::new(error)))?;
        let Some(parameters) = parameters else { return Ok(false) };
        let kind = parameters.flat.kind();
        match self.base() {
            None => parameters.export(export, model, kind)?,
            Some((config, base)) => {
                parameters.export_merged(config, base, export, model)?;
                parameters.save_adapters(config, &export.source().display().to_string(), adapter, kind)?;
            }
        }
        Ok(true)
    }

    /// Restores the state of the checkpoint in `folder`, whatever number of ranks wrote it.
    ///
    /// # Errors
    /// When a file is missing, damaged, or belongs to another model.
    pub fn restore(&mut self, folder: &Path) -> Result<(), CheckpointError> {
        self.step = state::restore(&mut self.policy, folder, state::POLICY)?;
        if let Some(critic) = &mut self.critic {
            state::restore(&mut critic.model, folder, state::VALUE_MODEL)?;
        }
        Ok(())
    }
}

/// Adds the files of `target`, a folder within `folder`.
fn describe_all(folder: &Path, target: &Path, files: &mut Vec<v1::SavedFile>) -> Result<(), CheckpointError> {
    for entry in std::fs::read_dir(target).map_err(|error| file_error(target, error))? {
        let path = entry.map_err(|error| file_error(target, error))?.path();
        files.push(describe(folder, &path)?);
    }
    Ok(())
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
