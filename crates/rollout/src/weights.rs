//! A received version of the weights, made ready for the engine.

use std::sync::mpsc as sync;
use std::sync::{Mutex, PoisonError};

use pacs_model::{Lora, ModelConfig, ParameterLayout, Parameters};
use pacs_torch::tch::{Device, Kind, TchError, Tensor};
use pacs_torch::{ViewError, bytes};
use pacs_types::{Generation, WeightVersion};
use pacs_weights::{Adapted, Claim, Description, Fetched, HostStore, Received, Transport, VersionId, WeightKind};

use crate::Engine;
use crate::thread::Setup;

/// Bytes that are staged at a time on the way to a device.
const STAGED_BYTES: usize = 64 << 20;
/// The version that a model's own weights are, where nothing is trained: older than any that a learner publishes.
pub(crate) const OWN: VersionId = VersionId { generation: Generation(0), version: WeightVersion(0) };
/// Longest that a process waits for another one to write them: that of a large model to a slow disk.
const OTHERS_DEADLINE: std::time::Duration = std::time::Duration::from_secs(900);
/// How often a process looks whether another one of its host has written the weights.
const OTHERS_WRITE: std::time::Duration = std::time::Duration::from_millis(50);
/// Distance of the bytes that are touched so that every page is in the page table.
const PAGE: usize = 4096;

/// Why weights cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// They are not this model's.
    #[error("{bytes} bytes of {kind:?} do not fit this model, which has {expected}")]
    OtherModel {
        /// Size of the received weights in bytes.
        bytes: u64,
        /// Element kind of the received weights.
        kind: WeightKind,
        /// The size of the model's in that kind.
        expected: u64,
    },
    /// Adapters were published, and the job trains the whole model, or the other way round.
    #[error("{found} was published, and this worker's job trains {expected}: both have to run the same job spec")]
    OtherContent {
        /// What they are.
        found: &'static str,
        /// What they should be.
        expected: &'static str,
    },
    /// They are adapters of another base.
    #[error(
        "the adapters belong to a base with the digest {found}…, and `{model}` of this worker has {expected}…: the learner's folder \
         holds other weights, or was read in another precision"
    )]
    OtherBase {
        /// This worker's model.
        model: String,
        /// First digits of the digest of the learner's base.
        found: String,
        /// The same of this worker's base.
        expected: String,
    },
    /// They are applied in another way.
    #[error("the adapters have {found}, and this worker's job asks for {expected}")]
    OtherAdapters {
        /// Rank, scale and targets of the learner's.
        found: String,
        /// The same of this worker's job.
        expected: String,
    },
    /// The system does not map the file.
    #[error("map weights: {0}")]
    Map(#[from] TchError),
    /// The mapping cannot be read.
    #[error(transparent)]
    View(#[from] ViewError),
}

impl WeightsError {
    /// Whether the same version would be refused again, by this worker.
    pub(crate) fn is_final(&self) -> bool {
        match self {
            Self::OtherContent { .. } | Self::OtherBase { .. } | Self::OtherAdapters { .. } => true,
            Self::OtherModel { .. } | Self::Map(_) | Self::View(_) => false,
        }
    }
}

/// The untouched model that adapters are merged into, once a process: every version is computed from it.
#[derive(Debug)]
pub struct Base {
    /// Of the adapters.
    config: ModelConfig,
    /// In host memory.
    parameters: Parameters,
    /// What a version has to belong to.
    adapted: Adapted,
    /// Folder or name of the model, as errors call it.
    model: String,
}

impl Base {
    /// A base in host memory, for adapters of `config`; `model` is what messages call it.
    ///
    /// # Errors
    /// When the memory cannot be read.
    ///
    /// # Panics
    /// When `config` has no adapters.
    pub fn new(config: &ModelConfig, parameters: Parameters, model: &str) -> Result<Self, WeightsError> {
        let lora: &Lora = config.lora.as_ref().expect("the configuration has adapters");
        let adapted = Adapted::of(weight_kind(parameters.flat.kind()), bytes(&parameters.flat)?, lora.to_string());
        Ok(Self { config: config.clone(), parameters, adapted, model: model.to_owned() })
    }

    /// Refuses a version that does not belong to this base.
    fn check(&self, description: &Description) -> Result<(), WeightsError> {
        let Some(found) = description.adapted() else {
            return Err(WeightsError::OtherContent { found: "a whole model", expected: "adapters" });
        };
        if found.settings != self.adapted.settings {
            let (found, expected) = (found.settings.clone(), self.adapted.settings.clone());
            return Err(WeightsError::OtherAdapters { found, expected });
        }
        if found.base != self.adapted.base {
            let digits = |adapted: &Adapted| adapted.base_digits()[..16].to_owned();
            let (found, expected) = (digits(found), digits(&self.adapted));
            return Err(WeightsError::OtherBase { model: self.model.clone(), found, expected });
        }
        Ok(())
    }

    /// The same base, sharing its memory: each thread has a handle of its own.
    fn share(&self) -> Self {
        let Self { config, parameters: Parameters { layout, flat }, adapted, model } = self;
        let parameters = Parameters { layout: layout.clone(), flat: flat.shallow_clone() };
        Self { config: config.clone(), parameters, adapted: adapted.clone(), model: model.clone() }
    }
}

/// The base of this process, loaded when the first adapters arrive.
#[derive(Debug, Default)]
pub(crate) struct BaseCell(Mutex<Option<Base>>);

impl BaseCell {
    /// The base of the job's adapters, in the kind in which they were published.
    pub(crate) fn get(&self, store: &HostStore, setup: &Setup, kind: Kind) -> Result<Base, String> {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let model = setup.model().display().to_string();
        let is_it =
            |base: &&Base| (&base.config, base.parameters.flat.kind(), &base.model) == (setup.trained(), kind, &model);
        if let Some(base) = held.as_ref().filter(is_it) {
            return Ok(base.share());
        }
        *held = None;
        let Content::Whole(parameters) = MappedWeights::of_model(store, setup, kind)?.content else {
            unreachable!("a model's own weights are no adapters");
        };
        let base = Base::new(setup.trained(), parameters, &model).map_err(|error| error.to_string())?;
        Ok(held.insert(base).share())
    }
}

/// A version whose bytes are mapped: the copy of this host, shared with its other processes.
#[derive(Debug)]
pub struct MappedWeights {
    pub(crate) description: Description,
    content: Content,
}

/// What a version holds, in host memory.
#[derive(Debug)]
enum Content {
    Whole(Parameters),
    /// Adapters, and what they are merged into.
    Adapters(Parameters, Box<Base>),
}

impl MappedWeights {
    /// Maps a version and has the system bring its pages, so that the engine waits for neither.
    ///
    /// The mapping is private: nothing that is computed can write through it. The file under it never changes, as the store
    /// promises, and it may be unlinked.
    ///
    /// # Errors
    /// See [`WeightsError`].
    pub fn map(received: &Received, config: &ModelConfig) -> Result<Self, WeightsError> {
        let description = received.whole.description().clone();
        if description.adapted().is_some() {
            return Err(WeightsError::OtherContent { found: "a set of adapters", expected: "a whole model" });
        }
        let content = Content::Whole(map(received, config)?);
        Ok(Self { description, content })
    }

    /// Maps a version that is adapters of `base`.
    ///
    /// # Errors
    /// See [`WeightsError`]: among others when they belong to another base, or are applied in another way.
    pub fn map_adapters(received: &Received, base: Base) -> Result<Self, WeightsError> {
        let description = received.whole.description().clone();
        base.check(&description)?;
        let adapters = map(received, &base.config)?;
        Ok(Self { description, content: Content::Adapters(adapters, Box::new(base)) })
    }

    /// The model's own weights, as the version that a job begins with. Each process reads the model folder, for it has to know the
    /// digest; what stays in memory is one copy for all processes of this host.
    ///
    /// The lock is the system's, so a process that dies while it writes leaves the work to the next one.
    pub(crate) fn of_model(store: &HostStore, setup: &Setup, kind: Kind) -> Result<Self, String> {
        let (model, config) = (setup.model(), setup.config());
        let reading = |error: &dyn std::fmt::Display| format!("load model `{}`: {error}", model.display());
        let parameters = Parameters::load(model, config, kind, Device::Cpu).map_err(|error| reading(&error))?;
        let of = weight_kind(kind);
        let content = bytes(&parameters.flat).map_err(|error| reading(&error))?;
        let wanted = Description::of(OWN, of, content);
        let began = std::time::Instant::now();
        let whole = loop {
            match store.claim(&wanted).map_err(|error| error.to_string())? {
                Claim::Whole(whole) => break whole,
                Claim::Theirs if began.elapsed() > OTHERS_DEADLINE => {
                    let waited = OTHERS_DEADLINE.as_secs();
                    return Err(format!("another process of this host writes the weights for more than {waited} s"));
                }
                Claim::Theirs => std::thread::sleep(OTHERS_WRITE),
                Claim::Ours(part) => {
                    part.write(content, 0).map_err(|error| error.to_string())?;
                    break part.finish().map_err(|error| error.to_string())?;
                }
            }
        };
        let received = Received { whole, transport: Transport::Shared, fetched: Fetched::default() };
        Self::map(&received, config).map_err(|error| error.to_string())
    }

    /// The kind of its numbers.
    pub(crate) fn kind(&self) -> Kind {
        kind(self.description.kind())
    }

    fn version(&self) -> WeightVersion {
        self.description.id().version
    }

    /// An engine's first weights: as they are in host memory, as a copy on a device; with adapters, a base that they are merged into.
    pub(crate) fn into_first(self, device: Device) -> Result<(Parameters, WeightVersion), TchError> {
        let (version, kind) = (self.version(), self.kind());
        let on_device = |host: &Tensor| {
            let mut flat = Tensor::f_zeros(host.size(), (kind, device))?;
            stage(host, &mut flat, STAGED_BYTES)?;
            Ok::<Tensor, TchError>(flat)
        };
        let parameters = match self.content {
            Content::Whole(parameters) if device == Device::Cpu => parameters,
            Content::Whole(Parameters { layout, flat }) => Parameters { layout, flat: on_device(&flat)? },
            Content::Adapters(adapters, base) if device == Device::Cpu => {
                adapters.merged(&base.config, &base.parameters)?
            }
            Content::Adapters(adapters, base) => {
                let Parameters { layout, flat } = &base.parameters;
                let merged = Parameters { layout: layout.clone(), flat: on_device(flat)? };
                adapters.merge_into(&base.config, &base.parameters, &merged)?;
                merged
            }
        };
        Ok((parameters, version))
    }

    /// Takes the place of an engine's weights, between two steps. Returns the old ones where they were not overwritten: another
    /// thread drops them, for to give so much memory back takes longer than a pass may wait.
    ///
    /// Adapters are merged into the engine's weights where these lie, from the base. An engine with adapters owns its weights.
    ///
    /// # Errors
    /// When they cannot be copied to the engine's device.
    pub fn replace(self, engine: &mut Engine) -> Result<Option<Parameters>, TchError> {
        let version = self.version();
        let parameters = match self.content {
            Content::Whole(parameters) => parameters,
            Content::Adapters(adapters, base) => {
                adapters.merge_into(&base.config, &base.parameters, engine.parameters_mut(version))?;
                return Ok(None);
            }
        };
        if engine.shares_parameters() {
            return Ok(Some(engine.replace_parameters(parameters, version)));
        }
        // Recorded passes know where the weights lie, so they are overwritten in place.
        stage(&parameters.flat, &mut engine.parameters_mut(version).flat, STAGED_BYTES)?;
        Ok(None)
    }
}

/// Maps a version in the layout of `config`.
fn map(received: &Received, config: &ModelConfig) -> Result<Parameters, WeightsError> {
    let description = received.whole.description();
    let layout = ParameterLayout::new(config);
    let kind = kind(description.kind());
    let expected = (layout.total() * kind.elt_size_in_bytes()) as u64;
    if description.bytes() != expected {
        return Err(WeightsError::OtherModel { bytes: description.bytes(), kind: description.kind(), expected });
    }
    let name = received.whole.open_name();
    let flat = Tensor::f_from_file(&name, false, layout.total() as i64, (kind, Device::Cpu))?;
    let touched = bytes(&flat)?.iter().step_by(PAGE).fold(0u8, |sum, byte| sum ^ byte);
    std::hint::black_box(touched);
    Ok(Parameters { layout, flat })
}

/// The kind of tensors that holds a version.
pub(crate) fn kind(kind: WeightKind) -> Kind {
    match kind {
        WeightKind::Float32 => Kind::Float,
        WeightKind::Bfloat16 => Kind::BFloat16,
    }
}

fn weight_kind(kind: Kind) -> WeightKind {
    if kind == Kind::BFloat16 { WeightKind::Bfloat16 } else { WeightKind::Float32 }
}

/// Copies `host` over `target` by way of two buffers, pinned where `target` is on a device: while one is copied to the device,
/// a thread fills the other.
fn stage(host: &Tensor, target: &mut Tensor, staged_bytes: usize) -> Result<(), TchError> {
    let total = host.size1()?;
    let piece = (staged_bytes / host.kind().elt_size_in_bytes()).max(1) as i64;
    let device = target.device();
    let (give, empty) = sync::sync_channel::<Tensor>(2);
    let (fill, filled) = sync::sync_channel::<Result<(i64, i64, Tensor), TchError>>(2);
    for _ in 0..2 {
        let buffer = Tensor::f_empty([piece.min(total)], (host.kind(), Device::Cpu))?;
        let buffer = if device == Device::Cpu { buffer } else { buffer.f_pin_memory(device)? };
        give.send(buffer).expect("the receiver is here");
    }
    let source = host.shallow_clone();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut begin = 0;
            while begin < total {
                let length = piece.min(total - begin);
                // The other side is gone when it has failed.
                let Ok(buffer) = empty.recv() else { return };
                let copied = (|| {
                    buffer.f_narrow(0, 0, length)?.f_copy_(&source.f_narrow(0, begin, length)?)?;
                    Ok((begin, length, buffer))
                })();
                if fill.send(copied).is_err() {
                    return;
                }
                begin += length;
            }
        });
        for copied in filled {
            let (begin, length, buffer) = copied?;
            // Returns when the device has it, so that the buffer can be filled again.
            target.f_narrow(0, begin, length)?.f_copy_(&buffer.f_narrow(0, 0, length)?)?;
            // Nobody waits for it after the last piece.
            let _ = give.send(buffer);
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use pacs_torch::f32_ref;

    use super::*;

    #[test]
    fn staged_pieces_make_the_whole() {
        let host = Tensor::arange(1000, (Kind::Float, Device::Cpu));
        for staged_bytes in [4, 4 * 7, 4 * 500, 4 * 1000, 1 << 20] {
            let mut target = Tensor::zeros([1000], (Kind::Float, Device::Cpu));
            stage(&host, &mut target, staged_bytes).expect("host memory");
            assert_eq!(
                f32_ref(&target).expect("host"),
                f32_ref(&host).expect("host"),
                "{staged_bytes} bytes at a time"
            );
        }
    }
}
