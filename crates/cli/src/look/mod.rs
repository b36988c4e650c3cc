//! Inspecting runs, live or past: `pacs top | dashboard | watch | report | samples | compare | logs | runs`.
//!
//! A live run is asked through `ObserveService`. For a past run its folder is read, with the code that the coordinator itself uses.

pub(crate) mod compare;
pub(crate) mod dashboard;
pub(crate) mod logs;
pub(crate) mod report;
pub(crate) mod runs;
pub(crate) mod samples;
mod source;
pub(crate) mod top;
pub(crate) mod watch;

use std::path::{Path, PathBuf};

use anyhow::anyhow;
use pacs_coordinator::{CoordinatorRecord, ObserveError, Recorded};
use pacs_protocol::MAX_MESSAGE_BYTES;
use pacs_protocol::v1::observe_service_client::ObserveServiceClient;
use pacs_protocol::v1::operator_service_client::OperatorServiceClient;
use pacs_protocol::v1::{self, GetStatusRequest};
use pacs_runtime::Exit;
use tonic::transport::Channel;

use crate::client::{channel, in_time};
use crate::failure::Failure;
use crate::target::{self, Target};

/// A run to inspect, with where its data comes from.
pub(crate) struct Looked {
    source: Source,
    /// The run folder; `None` when it is not on this machine.
    pub(crate) folder: Option<PathBuf>,
    /// Name in tables: the folder's name, or else the address.
    pub(crate) name: String,
}

enum Source {
    Coordinator(ObserveServiceClient<Channel>, OperatorServiceClient<Channel>),
    Folder(Recorded),
}

impl Looked {
    /// Resolves `target`: the folder of any run, or anything that names a live one.
    pub(crate) async fn find(target: Option<&str>) -> Result<Self, Failure> {
        let folder = target.map(Path::new).filter(|folder| folder.is_dir());
        if let Some(folder) = folder {
            return Self::of_folder(folder).await;
        }
        // It asks the live runs of this machine with a runtime of its own, which this thread, being in one, cannot have.
        let found = std::thread::scope(|scope| scope.spawn(|| target::one(target)).join());
        let found = found.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let target = found.map_err(|failure| {
            failure.hint("name the folder of a run that is over; `pacs runs` lists those of before, too")
        })?;
        let (observer, operator, status) = ask(&target).await?;
        let run_dir = PathBuf::from(&status.run_dir);
        let folder = Some(run_dir).filter(|folder| folder.join(CoordinatorRecord::FILE).is_file());
        let name = folder.as_deref().map_or(target.address, name_of);
        Ok(Self { source: Source::Coordinator(observer, operator), folder, name })
    }

    /// Opens the run of a folder: asks its coordinator if one serves, else reads the files.
    async fn of_folder(folder: &Path) -> Result<Self, Failure> {
        let record = CoordinatorRecord::read(folder).map_err(|error| {
            Failure::config(error)
                .doing(format!("read `{}`", folder.join(CoordinatorRecord::FILE).display()))
                .hint("the folder of a run is runs/<name of the job>, or what --run-dir said")
        })?;
        let target = Target { tls_dir: record.tls_dir(folder), address: record.address };
        let (absolute, name) = (folder.canonicalize().unwrap_or_else(|_| folder.to_owned()), name_of(folder));
        let source = match ask(&target).await {
            // Compare folders: another run may have taken the port of a past one.
            Ok((observer, operator, status)) if Path::new(&status.run_dir) == absolute => {
                Source::Coordinator(observer, operator)
            }
            Ok(_) | Err(_) => Source::Folder(Recorded::new(&absolute)),
        };
        Ok(Self { source, folder: Some(absolute), name })
    }

    pub(crate) async fn metrics(&mut self, request: v1::GetMetricsRequest) -> Result<v1::GetMetricsResponse, Failure> {
        match &mut self.source {
            Source::Coordinator(client, _) => in_time(client.get_metrics(request)).await,
            Source::Folder(recorded) => recorded.metrics(&request).map_err(unread),
        }
    }

    pub(crate) async fn samples(
        &mut self,
        request: v1::ListSamplesRequest,
    ) -> Result<v1::ListSamplesResponse, Failure> {
        match &mut self.source {
            Source::Coordinator(client, _) => in_time(client.list_samples(request)).await,
            Source::Folder(recorded) => recorded.samples(request).map_err(unread),
        }
    }

    pub(crate) async fn sample(&mut self, request: v1::GetSampleRequest) -> Result<v1::GetSampleResponse, Failure> {
        match &mut self.source {
            Source::Coordinator(client, _) => in_time(client.get_sample(request)).await,
            Source::Folder(recorded) => recorded.sample(&request).map_err(unread),
        }
    }

    /// Returns the run folder, for data that only files have.
    pub(crate) fn folder(&self) -> Result<&Path, Failure> {
        self.folder.as_deref().ok_or_else(|| {
            let error = anyhow!("its folder is on another machine");
            Failure::config(error).doing(format!("read the files of {}", self.name)).hint("give the command there")
        })
    }
}

/// Connects to a coordinator, and returns its status as proof that it answers.
async fn ask(
    target: &Target,
) -> Result<(ObserveServiceClient<Channel>, OperatorServiceClient<Channel>, v1::GetStatusResponse), Failure> {
    let channel = channel(target).await?;
    let mut operator = OperatorServiceClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let status = in_time(operator.get_status(GetStatusRequest {})).await?;
    let observer = ObserveServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
    Ok((observer, operator, status))
}

fn name_of(folder: &Path) -> String {
    let folder = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    folder.file_name().map_or_else(|| folder.display().to_string(), |name| name.to_string_lossy().into_owned())
}

fn unread(error: ObserveError) -> Failure {
    let exit = match &error {
        ObserveError::Invalid { .. } | ObserveError::NotFound(_) => Exit::Usage,
        ObserveError::File(_) => Exit::Config,
        ObserveError::Busy(_) | ObserveError::Ending(_) => Exit::Again,
    };
    Failure::with_exit(exit, error)
}
