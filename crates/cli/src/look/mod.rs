//! Looking at runs, those that live and those that are over: `pacs top | samples | compare | logs | runs`.
//!
//! A run that lives is asked (`ObserveService`); of one that does not, its folder is read, by the same code that the coordinator
//! reads it with.

pub(crate) mod compare;
pub(crate) mod logs;
pub(crate) mod runs;
pub(crate) mod samples;
pub(crate) mod top;

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

/// A run that is looked at.
pub(crate) struct Looked {
    source: Source,
    /// Its folder, where that is on this machine.
    pub(crate) folder: Option<PathBuf>,
    /// How it is called in tables: its folder's name, else its address.
    pub(crate) name: String,
}

enum Source {
    Coordinator(ObserveServiceClient<Channel>),
    Folder(Recorded),
}

impl Looked {
    /// The run that `target` names: the folder of any run, or whatever names one that lives.
    pub(crate) async fn find(target: Option<&str>) -> Result<Self, Failure> {
        let folder = target.map(Path::new).filter(|folder| folder.is_dir());
        if let Some(folder) = folder {
            return Self::of_folder(folder).await;
        }
        let target = target::one(target).map_err(|failure| {
            failure.hint("name the folder of a run that is over; `pacs runs` lists those of before, too")
        })?;
        let (client, status) = ask(&target).await?;
        let run_dir = PathBuf::from(&status.run_dir);
        let folder = Some(run_dir).filter(|folder| folder.join(CoordinatorRecord::FILE).is_file());
        let name = folder.as_deref().map_or(target.address, name_of);
        Ok(Self { source: Source::Coordinator(client), folder, name })
    }

    /// The run of a folder: its coordinator, if one lives there.
    async fn of_folder(folder: &Path) -> Result<Self, Failure> {
        let record = CoordinatorRecord::read(folder).map_err(|error| {
            Failure::config(error)
                .doing(format!("read `{}`", folder.join(CoordinatorRecord::FILE).display()))
                .hint("the folder of a run is runs/<name of the job>, or what --run-dir said")
        })?;
        let target = Target { tls_dir: record.tls_dir(folder), address: record.address };
        let (absolute, name) = (folder.canonicalize().unwrap_or_else(|_| folder.to_owned()), name_of(folder));
        let source = match ask(&target).await {
            // Another run may have taken the port of one that is over.
            Ok((client, status)) if Path::new(&status.run_dir) == absolute => Source::Coordinator(client),
            Ok(_) | Err(_) => Source::Folder(Recorded::new(&absolute)),
        };
        Ok(Self { source, folder: Some(absolute), name })
    }

    pub(crate) async fn metrics(&mut self, request: v1::GetMetricsRequest) -> Result<v1::GetMetricsResponse, Failure> {
        match &mut self.source {
            Source::Coordinator(client) => in_time(client.get_metrics(request)).await,
            Source::Folder(recorded) => recorded.metrics(&request).map_err(unread),
        }
    }

    pub(crate) async fn samples(
        &mut self,
        request: v1::ListSamplesRequest,
    ) -> Result<v1::ListSamplesResponse, Failure> {
        match &mut self.source {
            Source::Coordinator(client) => in_time(client.list_samples(request)).await,
            Source::Folder(recorded) => recorded.samples(request).map_err(unread),
        }
    }

    pub(crate) async fn sample(&mut self, request: v1::GetSampleRequest) -> Result<v1::GetSampleResponse, Failure> {
        match &mut self.source {
            Source::Coordinator(client) => in_time(client.get_sample(request)).await,
            Source::Folder(recorded) => recorded.sample(&request).map_err(unread),
        }
    }

    /// The folder of the run, for what is read there only.
    pub(crate) fn folder(&self) -> Result<&Path, Failure> {
        self.folder.as_deref().ok_or_else(|| {
            let error = anyhow!("its folder is on another machine");
            Failure::config(error).doing(format!("read the files of {}", self.name)).hint("give the command there")
        })
    }
}

/// A client of a coordinator that answers, and its status.
async fn ask(target: &Target) -> Result<(ObserveServiceClient<Channel>, v1::GetStatusResponse), Failure> {
    let channel = channel(target).await?;
    let mut operator = OperatorServiceClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let status = in_time(operator.get_status(GetStatusRequest {})).await?;
    Ok((ObserveServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES), status))
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
