//! Handing a new version of the weights to the rollout workers: a file in shared memory, or chunks over gRPC.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use pacs_model::Parameters;
use pacs_protocol::v1;
use pacs_protocol::v1::weight_service_server::WeightService;
use pacs_torch::bytes;
use pacs_torch::tch::{Device, Kind};
use tonic::{Request, Response, Status};

/// Versions that stay readable: the newest, and the one that a worker may still be reading.
const KEPT_VERSIONS: usize = 2;
/// Most bytes of one chunk.
const MAX_CHUNK_BYTES: u32 = 16 << 20;

/// Writes versions of the weights where rollout workers find them, and removes old ones.
#[derive(Debug)]
pub(crate) struct Publisher {
    folder: PathBuf,
    address: String,
    published: Published,
}

/// The readable versions, shared with [`WeightServer`]: (generation, version, file).
type Published = Arc<Mutex<Vec<(u64, u64, PathBuf)>>>;

impl Publisher {
    /// Publishes in shared memory where the machine has it, else among the temporary files. `slot` names the process
    /// slot, so that a restarted learner removes what the one before it left.
    pub(crate) fn new(slot: &str, address: String) -> std::io::Result<Self> {
        let shared = PathBuf::from("/dev/shm");
        let parent = if shared.is_dir() { shared } else { std::env::temp_dir() };
        let folder = parent.join(format!("pacs-weights-{:08x}", crc32fast::hash(slot.as_bytes())));
        let cleared = if folder.exists() { std::fs::remove_dir_all(&folder) } else { Ok(()) };
        cleared
            .and_then(|()| std::fs::create_dir_all(&folder))
            .map_err(|error| std::io::Error::new(error.kind(), format!("make `{}` anew: {error}", folder.display())))?;
        Ok(Self { folder, address, published: Arc::default() })
    }

    /// The service that hands out the same bytes to other machines.
    pub(crate) fn server(&self) -> WeightServer {
        WeightServer { published: Arc::clone(&self.published) }
    }

    /// Writes the weights as `version` of `generation`.
    pub(crate) fn publish(
        &self,
        parameters: &Parameters,
        generation: u64,
        version: u64,
    ) -> anyhow::Result<v1::WeightsRef> {
        let on_host;
        let flat = if parameters.flat.device() == Device::Cpu {
            &parameters.flat
        } else {
            on_host = parameters.flat.to_device(Device::Cpu);
            &on_host
        };
        let content = bytes(flat)?;
        let path = self.folder.join(format!("{generation}-{version}"));
        let unfinished = path.with_extension("part");
        let mut file = std::fs::File::create(&unfinished)?;
        file.write_all(content)?;
        std::fs::rename(&unfinished, &path)?;
        let mut published = self.published.lock().expect("no holder of the lock panics");
        published.push((generation, version, path.clone()));
        while published.len() > KEPT_VERSIONS {
            let (_, _, old) = published.remove(0);
            // A worker that still reads it keeps its open file.
            let _ = std::fs::remove_file(old);
        }
        Ok(v1::WeightsRef {
            version,
            generation,
            path: path.to_string_lossy().into_owned(),
            address: self.address.clone(),
            bytes: content.len() as u64,
            crc32: crc32fast::hash(content),
            kind: if flat.kind() == Kind::Float { "float32" } else { "bfloat16" }.to_owned(),
        })
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        // Best effort: the next run of the same folder removes what is left.
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// Serves published weights in chunks.
#[derive(Clone, Debug)]
pub(crate) struct WeightServer {
    published: Published,
}

#[tonic::async_trait]
impl WeightService for WeightServer {
    async fn fetch_weights(
        &self,
        request: Request<v1::FetchWeightsRequest>,
    ) -> Result<Response<v1::FetchWeightsResponse>, Status> {
        let request = request.into_inner();
        if request.length > MAX_CHUNK_BYTES {
            return Err(Status::invalid_argument(format!("a chunk has at most {MAX_CHUNK_BYTES} bytes")));
        }
        let wanted = (request.generation, request.version);
        let path = {
            let published = self.published.lock().expect("no holder of the lock panics");
            published
                .iter()
                .find(|(generation, version, _)| (*generation, *version) == wanted)
                .map(|entry| entry.2.clone())
        };
        let path = path.ok_or_else(|| {
            Status::not_found(format!("version {} of generation {} is not published", wanted.1, wanted.0))
        })?;
        let read = tokio::task::spawn_blocking(move || read_chunk(&path, request.offset, request.length));
        let data = read.await.map_err(|error| Status::internal(error.to_string()))?;
        let data = data.map_err(|error| Status::internal(format!("read weights: {error}")))?;
        Ok(Response::new(v1::FetchWeightsResponse { data: data.into() }))
    }
}

fn read_chunk(path: &Path, offset: u64, length: u32) -> std::io::Result<Vec<u8>> {
    use std::io::{Read, Seek, SeekFrom};
    let mut file = std::fs::File::open(path)?;
    file.seek(SeekFrom::Start(offset))?;
    let mut data = Vec::with_capacity(length as usize);
    file.take(u64::from(length)).read_to_end(&mut data)?;
    Ok(data)
}
