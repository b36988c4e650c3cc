//! `pacs-worker rollout` and `pacs-worker learner`.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, ValueEnum};
use pacs_broadcast::CollectiveTransport;
use pacs_learner::{Backend, LearnerOptions};
use pacs_rollout::RolloutOptions;
use pacs_runtime::launch::{PlaceError, Placement, WorkerArguments};
use pacs_runtime::net::{PeerRole, Security};
use pacs_runtime::{Exit, Shutdown, run_role};
use pacs_weights::GroupTransport;

use crate::Failure;

/// Options of both roles.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    worker: WorkerArguments,
    /// Threads of libtorch; 0: one per core.
    #[arg(long, env = "PACS_THREADS", default_value_t = 0, value_parser = crate::bounds::usize_to(crate::bounds::MOST_THREADS))]
    threads: usize,
    /// Device of weights and activations.
    #[arg(long, env = "PACS_DEVICE", value_enum, default_value_t = Device::Cpu)]
    device: Device,
    /// Transport of weights from the learner to hosts that lack them. Learners and rollout workers must agree; a
    /// rollout worker that does not fetches.
    #[arg(long, env = "PACS_WEIGHTS_TRANSPORT", value_enum, default_value_t = WeightsTransport::Stream)]
    weights_transport: WeightsTransport,
}

impl Arguments {
    /// Returns the transport for broadcasts, if broadcasts are enabled.
    fn broadcast(&self, bind: &str, security: &Security) -> Result<Option<Arc<dyn GroupTransport>>, Failure> {
        match (self.weights_transport, self.device) {
            (WeightsTransport::Stream, _) => Ok(None),
            (WeightsTransport::Host, _) => Ok(Some(Arc::new(CollectiveTransport::host(bind, security.clone())))),
            (WeightsTransport::Nccl, Device::Cpu) => Err(Failure {
                error: anyhow::anyhow!("--weights-transport nccl needs --device cuda; take `host` or `stream`"),
                exit: Exit::Config,
            }),
            // Device 0, because `pacs_torch::init` takes the first visible device.
            (WeightsTransport::Nccl, Device::Cuda) => match CollectiveTransport::nccl(bind, security.clone(), 0) {
                Ok(transport) => Ok(Some(Arc::new(transport))),
                Err(error) => Err(Failure {
                    error: anyhow::Error::new(error).context("broadcast weights over NCCL"),
                    exit: Exit::Config,
                }),
            },
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum WeightsTransport {
    /// Each host fetches from the learner or from another host, in a tree.
    Stream,
    /// A broadcast over TCP to all hosts that ask in time; the others, and those that lose a piece, fetch.
    Host,
    /// A broadcast over NCCL, through the memory of GPUs. Never run on a GPU yet.
    Nccl,
}

/// Options of a rollout worker.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pacs-worker rollout --coordinator node-1:7700 --name rollout-3 --tls-dir certs --threads 8
  pacs-worker rollout --coordinator 127.0.0.1:7700 --name rollout-3 --plaintext")]
pub(crate) struct RolloutArguments {
    #[command(flatten)]
    common: Arguments,
    /// Address of this machine at which other machines fetch weights. Default: $PACS_BIND, else the Slurm node's name,
    /// else the address from which the coordinator is reached.
    #[arg(long, value_name = "ADDRESS")]
    bind: Option<String>,
}

/// Options of a learner rank.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pacs-worker learner --coordinator node-1:7700 --name learner-0 --bind 10.0.0.7 --tls-dir certs
  pacs-worker learner --coordinator 127.0.0.1:7700 --name learner-0 --plaintext")]
pub(crate) struct LearnerArguments {
    #[command(flatten)]
    common: Arguments,
    /// Address of this machine that other ranks and rollout workers reach. Default: $PACS_BIND, else the Slurm node's
    /// name, else the address from which the coordinator is reached.
    #[arg(long, value_name = "ADDRESS")]
    bind: Option<String>,
    /// Seconds to continue after SIGTERM, so that the run can be saved; a second SIGTERM leaves at once. Must be less
    /// than the launcher waits before it kills.
    #[arg(long, value_name = "SECONDS", env = "PACS_GRACE", default_value_t = 25, value_parser = clap::value_parser!(u64).range(..=315_360_000))]
    grace: u64,
    /// Collective backend for gradients; every rank must use the same.
    #[arg(long, env = "PACS_COLLECTIVE", value_enum, default_value_t = Collective::Auto)]
    collective: Collective,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Collective {
    /// NCCL between GPUs, TCP otherwise.
    Auto,
    /// TCP, through host memory.
    Host,
    /// NCCL, even for a single rank.
    Nccl,
}

impl From<Collective> for Backend {
    fn from(collective: Collective) -> Self {
        match collective {
            Collective::Auto => Self::Auto,
            Collective::Host => Self::Host,
            Collective::Nccl => Self::Nccl,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Device {
    /// Host memory and `--threads` threads.
    Cpu,
    /// The first NVIDIA GPU that the process sees.
    Cuda,
}

pub(crate) fn rollout(arguments: RolloutArguments) -> Result<Exit, Failure> {
    let RolloutArguments { common, bind } = arguments;
    run(Shutdown::new(), |shutdown| async move {
        let Placement { link, name } = common.worker.place(PeerRole::Rollout).await.map_err(misplaced)?;
        let bind = common.worker.own_address(bind.as_deref(), &link.coordinator).await.map_err(misplaced)?;
        let (cuda, threads) = (common.device == Device::Cuda, common.threads);
        let broadcast = common.broadcast(&bind, &link.security)?;
        let options = RolloutOptions { link, name, bind, cuda, threads, broadcast };
        pacs_rollout::run(options, shutdown).await.map_err(|error| Failure {
            exit: error.exit(),
            error: anyhow::Error::new(error).context("generate samples"),
        })
    })
}

pub(crate) fn learner(arguments: LearnerArguments) -> Result<Exit, Failure> {
    let LearnerArguments { common, bind, grace, collective } = arguments;
    let shutdown = Shutdown::new().with_grace(Duration::from_secs(grace));
    run(shutdown, |shutdown| async move {
        let Placement { link, name } = common.worker.place(PeerRole::Learner).await.map_err(misplaced)?;
        let bind = common.worker.own_address(bind.as_deref(), &link.coordinator).await.map_err(misplaced)?;
        let (cuda, threads) = (common.device == Device::Cuda, common.threads);
        let broadcast = common.broadcast(&bind, &link.security)?;
        let options = LearnerOptions { link, name, bind, cuda, backend: collective.into(), threads, broadcast };
        pacs_learner::run(options, shutdown)
            .await
            .map_err(|error| Failure { exit: error.exit(), error: anyhow::Error::new(error).context("train") })
    })
}

fn misplaced(error: PlaceError) -> Failure {
    Failure { exit: error.exit(), error: anyhow::Error::new(error).context("find the place of this process in a run") }
}

fn run<F>(shutdown: Shutdown, role: impl FnOnce(Shutdown) -> F) -> Result<Exit, Failure>
where
    F: Future<Output = Result<Exit, Failure>> + Send + 'static,
{
    let ended = run_role(shutdown, role).context("start the runtime and its signal handlers");
    ended.unwrap_or_else(|error| Err(Failure { error, exit: Exit::Bug }))
}
