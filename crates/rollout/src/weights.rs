//! Getting a published version of the weights into the engine's parameters.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use pacs_model::Parameters;
use pacs_protocol::v1::weight_service_client::WeightServiceClient;
use pacs_protocol::{MAX_MESSAGE_BYTES, v1};
use pacs_runtime::Link;
use pacs_runtime::net::PeerRole;
use pacs_torch::tch::{Device, Kind, Tensor};
use pacs_torch::{ViewError, bytes, bytes_mut};

/// Bytes asked for in one call of a transfer.
const CHUNK_BYTES: u32 = 8 << 20;
/// How long one chunk may take.
const CHUNK_DEADLINE: Duration = Duration::from_secs(30);

/// Why weights could not be loaded.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WeightsError {
    #[error("read weights {}: {error}", path.display())]
    File { path: PathBuf, error: std::io::Error },
    #[error("weights {}: {problem}", path.display())]
    Content { path: PathBuf, problem: String },
    #[error("fetch weights from {address}: {problem}")]
    Fetch { address: String, problem: String },
    #[error(transparent)]
    View(#[from] ViewError),
}

/// The kind that published weights are in.
pub(crate) fn kind(reference: &v1::WeightsRef) -> Option<Kind> {
    match reference.kind.as_str() {
        "float32" => Some(Kind::Float),
        "bfloat16" => Some(Kind::BFloat16),
        _ => None,
    }
}

/// Makes sure that the bytes are in a file of this machine: the published one, or else a copy fetched from the learner.
pub(crate) async fn ensure_local(
    reference: &v1::WeightsRef,
    scratch: &Path,
    link: &Link,
) -> Result<PathBuf, WeightsError> {
    let published = PathBuf::from(&reference.path);
    if published.metadata().is_ok_and(|file| file.len() == reference.bytes) || reference.address.is_empty() {
        return Ok(published);
    }
    let copy = scratch.join(format!("weights-{}-{}", reference.generation, reference.version));
    let problem = |problem: String| WeightsError::Fetch { address: reference.address.clone(), problem };
    let channel = link.dial(&reference.address, PeerRole::Learner).await;
    let channel = channel.map_err(|error| problem(error.to_string()))?;
    let mut client = WeightServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let mut file = File::create(&copy).map_err(|error| WeightsError::File { path: copy.clone(), error })?;
    let mut offset = 0;
    while offset < reference.bytes {
        let request = v1::FetchWeightsRequest {
            version: reference.version,
            generation: reference.generation,
            offset,
            length: CHUNK_BYTES,
        };
        let chunk = tokio::time::timeout(CHUNK_DEADLINE, client.fetch_weights(request))
            .await
            .map_err(|_| problem(format!("no answer within {} s", CHUNK_DEADLINE.as_secs())))?
            .map_err(|status| problem(status.message().to_owned()))?
            .into_inner()
            .data;
        if chunk.is_empty() {
            return Err(problem(format!("the weights end after {offset} of {} bytes", reference.bytes)));
        }
        file.write_all(&chunk).map_err(|error| WeightsError::File { path: copy.clone(), error })?;
        offset += chunk.len() as u64;
    }
    Ok(copy)
}

/// Overwrites `parameters` with the bytes at `path`, after checking their number and checksum.
pub(crate) fn load(reference: &v1::WeightsRef, path: &Path, parameters: &mut Parameters) -> Result<(), WeightsError> {
    let content = |problem: String| WeightsError::Content { path: path.to_owned(), problem };
    let expected = parameters.flat.numel() * parameters.flat.kind().elt_size_in_bytes();
    if kind(reference) != Some(parameters.flat.kind()) || reference.bytes != expected as u64 {
        return Err(content(format!(
            "{} bytes of {} do not fit this model's {expected} bytes of {:?}",
            reference.bytes,
            reference.kind,
            parameters.flat.kind()
        )));
    }
    let mut staging = match parameters.flat.device() {
        Device::Cpu => parameters.flat.shallow_clone(),
        _ => Tensor::empty(parameters.flat.size(), (parameters.flat.kind(), Device::Cpu)),
    };
    let file_error = |error| WeightsError::File { path: path.to_owned(), error };
    let mut file = File::open(path).map_err(file_error)?;
    file.read_exact(bytes_mut(&mut staging)?).map_err(file_error)?;
    let crc32 = crc32fast::hash(bytes(&staging)?);
    if crc32 != reference.crc32 {
        return Err(content(format!("checksum {crc32:08x}, expected {:08x}", reference.crc32)));
    }
    if parameters.flat.device() != Device::Cpu {
        parameters.flat.copy_(&staging);
    }
    Ok(())
}
