//! A published version as a Hugging Face folder, from which servers load it.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::{Path, PathBuf};

use pacs_shape::{LM_HEAD, ModelConfig, ParameterLayout, ParameterSpec};
use pacs_weights::{Received, VersionId, WeightKind};
use safetensors::tensor::{Dtype, View};

use crate::merge::{Base, MergeError, Merged};
use crate::untie::{UntieError, write_untied_config};

/// File of the weights in a folder.
const WEIGHTS: &str = "model.safetensors";
/// Files of the model's folder that a server may look for beside the weights.
const COMPANIONS: [&str; 3] = ["config.json", "generation_config.json", "tokenizer_config.json"];
/// How the name of a version's folder begins.
const PREFIX: &str = "version-";

/// Why a version cannot be written for the servers.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FolderError {
    /// The weights are not of this model.
    #[error("{bytes} bytes of weights do not fit this model, which has {expected}")]
    OtherModel {
        /// Bytes that were published.
        bytes: u64,
        /// Bytes that the model has.
        expected: u64,
    },
    /// The model's configuration cannot be written for servers that have the head apart.
    #[error(transparent)]
    Config(#[from] UntieError),
    /// Adapters cannot be merged into the model.
    #[error(transparent)]
    Merge(#[from] MergeError),
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

impl FolderError {
    /// Whether every later version would be refused, too.
    pub(crate) fn is_final(&self) -> bool {
        matches!(self, Self::Merge(error) if error.is_final())
    }
}

fn failed<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> FolderError + 'a {
    move |source| FolderError::Io { action, path: path.to_owned(), source }
}

/// Where versions are written for servers.
#[derive(Debug)]
pub(crate) struct Folders {
    place: PathBuf,
    /// The same under the servers' name for it.
    servers_place: PathBuf,
    model: PathBuf,
    layout: ParameterLayout,
    /// What versions are merged into, where they are adapters.
    base: Option<Base>,
    /// Whether versions of a tied model have its output head as a tensor of its own, too.
    has_head: bool,
}

/// The folder of one version.
#[derive(Debug)]
pub(crate) struct VersionFolder {
    path: PathBuf,
    /// The path that servers are told.
    pub(crate) servers_path: String,
}

impl Drop for VersionFolder {
    /// A version that no server loads any more is removed; what cannot be removed is left for the next start.
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::debug!("remove `{}`: {error}", self.path.display());
        }
    }
}

impl Folders {
    /// Takes `place` for the versions of a model. Leftovers of an earlier process are removed. `trained` is the configuration of what is
    /// published: the model, or adapters of it. `untied_head`: see [`crate::untie()`].
    pub(crate) fn open(
        place: PathBuf,
        servers_place: Option<PathBuf>,
        model: &Path,
        trained: &ModelConfig,
        untied_head: bool,
    ) -> Result<Self, FolderError> {
        let base = trained.lora.as_ref().map(|_| Base::open(model, trained)).transpose()?;
        fs::DirBuilder::new().recursive(true).mode(0o755).create(&place).map_err(failed("create", &place))?;
        for entry in fs::read_dir(&place).map_err(failed("read", &place))? {
            let path = entry.map_err(failed("read", &place))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.starts_with(PREFIX) {
                fs::remove_dir_all(&path).map_err(failed("remove", &path))?;
            }
        }
        let servers_place = servers_place.unwrap_or_else(|| place.clone());
        Ok(Self {
            place,
            servers_place,
            model: model.to_owned(),
            layout: ParameterLayout::new(&trained.base()),
            base,
            has_head: untied_head && trained.tie_embeddings,
        })
    }

    /// Writes a version. The weights are there in full under their name or not at all.
    pub(crate) fn write(&self, received: &Received) -> Result<VersionFolder, FolderError> {
        let description = received.whole.description();
        let (dtype, element) = match description.kind() {
            WeightKind::Float32 => (Dtype::F32, 4),
            WeightKind::Bfloat16 => (Dtype::BF16, 2),
        };
        let content = self.content(received, element)?;
        let VersionId { generation, version } = description.id();
        // Written twice after a failure, so names are never those of a folder that a server may be reading.
        let name = format!("{PREFIX}{}-{}-{:016x}", generation.0, version.0, unique());
        let path = self.place.join(&name);
        let folder = VersionFolder { servers_path: self.servers_place.join(&name).display().to_string(), path };
        let path = &folder.path;
        fs::create_dir(path).map_err(failed("create", path))?;
        for companion in COMPANIONS {
            let source = self.model.join(companion);
            if source.exists() {
                let target = path.join(companion);
                fs::copy(&source, &target).map_err(failed("copy", &source))?;
            }
        }
        if self.has_head {
            write_untied_config(&self.model, path)?;
        }
        let file = path.join(WEIGHTS);
        let problem = RefCell::new(None);
        let stored = |spec| Stored::new(&content, spec, (dtype, element), &problem);
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let partial = path.join("model.partial");
        let parameters = self.layout.parameters().iter().map(|spec| (spec.name.clone(), stored(spec)));
        let head = self.has_head.then(|| (LM_HEAD.to_owned(), stored(self.layout.head())));
        safetensors::serialize_to_file(parameters.chain(head), Some(metadata), &partial).map_err(
            |error| match error {
                safetensors::SafeTensorError::IoError(source) => failed("write", &partial)(source),
                other => failed("write", &partial)(io::Error::other(other.to_string())),
            },
        )?;
        if let Some(error) = problem.take() {
            return Err(error);
        }
        // Not synced: a version is worth nothing after a crash of this machine. Another machine sees it under its name.
        fs::rename(&partial, &file).map_err(failed("rename into place", &file))?;
        Ok(folder)
    }
}

impl Folders {
    /// What a version holds, of elements of so many bytes.
    fn content<'a>(&'a self, received: &'a Received, element: usize) -> Result<Content<'a>, FolderError> {
        let description = received.whole.description();
        if let Some(base) = &self.base {
            return Ok(Content::Merged(base.version(received)?));
        }
        if description.adapted().is_some() {
            let (found, expected) = ("a set of adapters", "a whole model");
            return Err(MergeError::OtherContent { found, expected }.into());
        }
        let expected = (self.layout.total() * element) as u64;
        if description.bytes() != expected {
            return Err(FolderError::OtherModel { bytes: description.bytes(), expected });
        }
        Ok(Content::Whole { received, element })
    }
}

/// The weights of a version.
enum Content<'a> {
    /// As they were published.
    Whole { received: &'a Received, element: usize },
    /// Adapters over their base.
    Merged(Merged<'a>),
}

impl Content<'_> {
    fn parameter(&self, spec: &ParameterSpec) -> Result<Vec<u8>, FolderError> {
        match self {
            Self::Whole { received, element } => {
                let mut data = vec![0; spec.numel() * element];
                let read = received.whole.file().read_exact_at(&mut data, (spec.offset * element) as u64);
                let path = Path::new("the received weights");
                read.map_err(failed("read", path)).map(|()| data)
            }
            Self::Merged(merged) => Ok(merged.parameter(spec)?),
        }
    }
}

/// A number that no other folder of this machine's processes has.
fn unique() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    // Truncated: the low digits are the ones that differ.
    pacs_types::mix(now as u64 ^ u64::from(std::process::id()).rotate_left(32))
}

/// A parameter that is read or merged only while it is written.
struct Stored<'a> {
    content: &'a Content<'a>,
    spec: &'a ParameterSpec,
    bytes: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Why some parameter could not be read or merged: the writer has no other way to say so.
    problem: &'a RefCell<Option<FolderError>>,
}

impl<'a> Stored<'a> {
    fn new(
        content: &'a Content<'a>,
        spec: &'a ParameterSpec,
        (dtype, element): (Dtype, usize),
        problem: &'a RefCell<Option<FolderError>>,
    ) -> Self {
        let shape = spec.shape.iter().map(|&size| size as usize).collect();
        Self { content, spec, bytes: spec.numel() * element, dtype, shape, problem }
    }
}

impl View for Stored<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let data = self.content.parameter(self.spec).unwrap_or_else(|error| {
            self.problem.replace(Some(error));
            vec![0; self.bytes]
        });
        Cow::Owned(data)
    }

    fn data_len(&self) -> usize {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use pacs_weights::{Fetched, HostStore, Transport};
    use safetensors::SafeTensors;

    use super::*;

    #[test]
    fn a_folder_holds_every_parameter_as_it_was_published() {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/qwen3");
        let config = ModelConfig::read(&model).expect("a golden model");
        let layout = ParameterLayout::new(&config);
        let content: Vec<u8> = (0..layout.total()).flat_map(|place| (place as f32).to_le_bytes()).collect();
        let (store_dir, place) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
        let store = HostStore::open_in("run", &[store_dir.path().to_owned()]).expect("a store");
        let receive = |version, content: &[u8]| {
            let whole = store.publish(VersionId::new(1, version), WeightKind::Float32, content).expect("room");
            Received { whole, transport: Transport::Shared, fetched: Fetched::default() }
        };
        fs::create_dir(place.path().join("version-of-a-dead-process")).expect("room");
        let servers = Some(PathBuf::from("/mnt/w"));
        let folders = Folders::open(place.path().to_owned(), servers, &model, &config, false).expect("a place");
        assert_eq!(fs::read_dir(place.path()).expect("a folder").count(), 0, "leftovers are removed");
        let folder = folders.write(&receive(3, &content)).expect("room");
        assert!(folder.servers_path.starts_with("/mnt/w/version-1-3-"), "{}", folder.servers_path);
        let bytes = fs::read(folder.path.join(WEIGHTS)).expect("the weights");
        let read = SafeTensors::deserialize(&bytes).expect("safetensors");
        assert_eq!(read.len(), layout.parameters().len());
        for spec in layout.parameters() {
            let tensor = read.tensor(&spec.name).expect("every parameter");
            let first = f32::from_le_bytes(tensor.data()[..4].try_into().expect("four bytes"));
            assert_eq!((first as usize, tensor.data().len()), (spec.offset, 4 * spec.numel()), "{}", spec.name);
        }
        assert!(folder.path.join("config.json").exists());
        let path = folder.path.clone();
        drop(folder);
        assert!(!path.exists());
        let short = folders.write(&receive(4, &content[..64]));
        assert!(matches!(short, Err(FolderError::OtherModel { bytes: 64, .. })));
        assert_eq!(fs::read_dir(place.path()).expect("a folder").count(), 0);
        // Adapters of a job that trains the whole model.
        let adapted = pacs_weights::Adapted { base: [0; 32], settings: "rank 4".to_owned() };
        let whole =
            store.publish_adapters(VersionId::new(1, 5), WeightKind::Float32, &adapted, &content).expect("room");
        let received = Received { whole, transport: Transport::Shared, fetched: Fetched::default() };
        let error = folders.write(&received).expect_err("refused");
        assert!(error.is_final() && error.to_string().starts_with("a set of adapters was published"), "{error}");
    }

    #[test]
    fn servers_with_a_head_of_their_own_get_it_with_each_version() {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/qwen2-tied");
        let config = ModelConfig::read(&model).expect("a golden model");
        let content: Vec<u8> =
            (0..ParameterLayout::new(&config).total()).flat_map(|place| (place as f32).to_le_bytes()).collect();
        let (store_dir, place) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
        let store = HostStore::open_in("run", &[store_dir.path().to_owned()]).expect("a store");
        let whole = store.publish(VersionId::new(1, 1), WeightKind::Float32, content.as_slice()).expect("room");
        let received = Received { whole, transport: Transport::Shared, fetched: Fetched::default() };
        let folders = Folders::open(place.path().to_owned(), None, &model, &config, true).expect("a place");
        let folder = folders.write(&received).expect("room");
        let bytes = fs::read(folder.path.join(WEIGHTS)).expect("the weights");
        let read = SafeTensors::deserialize(&bytes).expect("safetensors");
        let tensor = |name| read.tensor(name).expect("a tensor");
        assert_eq!(tensor(LM_HEAD), tensor("model.embed_tokens.weight"));
        assert!(!ModelConfig::read(&folder.path).expect("a configuration").tie_embeddings);
    }
}
