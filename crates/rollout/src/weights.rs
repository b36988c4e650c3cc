//! A received version of the weights, made ready for the engine.

use std::sync::mpsc as sync;

use pacs_model::{ModelConfig, ParameterLayout, Parameters};
use pacs_torch::tch::{Device, Kind, TchError, Tensor};
use pacs_torch::{ViewError, bytes};
use pacs_types::{Generation, WeightVersion};
use pacs_weights::{Claim, Description, Fetched, HostStore, Received, Transport, VersionId, WeightKind};

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
    /// The system does not map the file.
    #[error("map weights: {0}")]
    Map(#[from] TchError),
    /// The mapping cannot be read.
    #[error(transparent)]
    View(#[from] ViewError),
}

/// A version whose bytes are mapped: the copy of this host, shared with its other processes.
#[derive(Debug)]
pub struct MappedWeights {
    pub(crate) description: Description,
    /// In host memory.
    parameters: Parameters,
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
        Ok(Self { description, parameters: Parameters { layout, flat } })
    }

    /// The model's own weights, as the version that a job begins with. Each process reads the model folder, for it has to know the
    /// digest; what stays in memory is one copy for all processes of this host.
    ///
    /// The lock is the system's, so a process that dies while it writes leaves the work to the next one.
    pub(crate) fn of_model(store: &HostStore, setup: &Setup, kind: Kind) -> Result<Self, String> {
        let (model, config) = (setup.model(), setup.config());
        let reading = |error: &dyn std::fmt::Display| format!("load model `{}`: {error}", model.display());
        let parameters = Parameters::load(model, config, kind, Device::Cpu).map_err(|error| reading(&error))?;
        let of = if kind == Kind::BFloat16 { WeightKind::Bfloat16 } else { WeightKind::Float32 };
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
        self.parameters.flat.kind()
    }

    fn version(&self) -> WeightVersion {
        self.description.id().version
    }

    /// An engine's first weights: as they are in host memory, as a copy on a device.
    pub(crate) fn into_first(self, device: Device) -> Result<(Parameters, WeightVersion), TchError> {
        let version = self.version();
        if device == Device::Cpu {
            return Ok((self.parameters, version));
        }
        let mut flat = Tensor::f_zeros(self.parameters.flat.size(), (self.kind(), device))?;
        stage(&self.parameters.flat, &mut flat, STAGED_BYTES)?;
        Ok((Parameters { layout: self.parameters.layout, flat }, version))
    }

    /// Takes the place of an engine's weights, between two steps. Returns the old ones where they were not overwritten: another
    /// thread drops them, for to give so much memory back takes longer than a pass may wait.
    ///
    /// # Errors
    /// When they cannot be copied to the engine's device.
    pub fn replace(self, engine: &mut Engine) -> Result<Option<Parameters>, TchError> {
        let version = self.version();
        if engine.shares_parameters() {
            return Ok(Some(engine.replace_parameters(self.parameters, version)));
        }
        // Recorded passes know where the weights lie, so they are overwritten in place.
        stage(&self.parameters.flat, &mut engine.parameters_mut(version).flat, STAGED_BYTES)?;
        Ok(None)
    }
}

fn kind(kind: WeightKind) -> Kind {
    match kind {
        WeightKind::Float32 => Kind::Float,
        WeightKind::Bfloat16 => Kind::BFloat16,
    }
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
