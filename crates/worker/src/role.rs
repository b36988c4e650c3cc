//! `pacs-worker rollout` and `pacs-worker learner`.

use std::time::Duration;

use anyhow::Context;
use clap::{Args, ValueEnum};
use pacs_learner::{Backend, LearnerOptions};
use pacs_rollout::RolloutOptions;
use pacs_runtime::{Exit, Shutdown};

use crate::Failure;

/// What both roles need.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pacs-worker rollout --coordinator 10.0.0.5:7700 --name rollout-3 --threads 8")]
pub(crate) struct Arguments {
    /// Coordinator, host:port.
    #[arg(long, env = "PACS_COORDINATOR")]
    coordinator: String,
    /// Stable name of this process slot; a second process of the same name replaces the first.
    #[arg(long, env = "PACS_WORKER_NAME")]
    name: String,
    /// Threads of libtorch; 0: one a core.
    #[arg(long, env = "PACS_THREADS", default_value_t = 0)]
    threads: usize,
    /// Where tensors live.
    #[arg(long, env = "PACS_DEVICE", value_enum, default_value_t = Device::Cpu)]
    device: Device,
    /// Seconds to wait for the coordinator to appear.
    #[arg(long, default_value_t = 300)]
    join_timeout: u64,
}

/// What a learner needs besides.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pacs-worker learner --coordinator 10.0.0.5:7700 --name learner-0 --bind 10.0.0.7")]
pub(crate) struct LearnerArguments {
    #[command(flatten)]
    common: Arguments,
    /// Address of this machine that other ranks and rollout workers reach.
    #[arg(long, env = "PACS_BIND", default_value = "127.0.0.1")]
    bind: String,
    /// What carries gradients between ranks; every rank must say the same.
    #[arg(long, env = "PACS_COLLECTIVE", value_enum, default_value_t = Collective::Auto)]
    collective: Collective,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Collective {
    /// NCCL between GPUs, TCP otherwise.
    Auto,
    /// TCP, by way of host memory.
    Host,
    /// NCCL, also for a rank alone.
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
    /// The processor.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

pub(crate) fn rollout(arguments: Arguments) -> Result<Exit, Failure> {
    let options = RolloutOptions {
        coordinator: arguments.coordinator,
        name: arguments.name,
        cuda: arguments.device == Device::Cuda,
        threads: arguments.threads,
        join_timeout: Duration::from_secs(arguments.join_timeout),
    };
    block_on(async |shutdown| {
        pacs_rollout::run(options, shutdown).await.map_err(|error| Failure {
            exit: error.exit(),
            error: anyhow::Error::new(error).context("generate samples"),
        })
    })
}

pub(crate) fn learner(arguments: LearnerArguments) -> Result<Exit, Failure> {
    let common = arguments.common;
    let options = LearnerOptions {
        coordinator: common.coordinator,
        name: common.name,
        bind: arguments.bind,
        cuda: common.device == Device::Cuda,
        backend: arguments.collective.into(),
        threads: common.threads,
        join_timeout: Duration::from_secs(common.join_timeout),
    };
    block_on(async |shutdown| {
        pacs_learner::run(options, shutdown)
            .await
            .map_err(|error| Failure { exit: error.exit(), error: anyhow::Error::new(error).context("train") })
    })
}

fn block_on(role: impl AsyncFnOnce(Shutdown) -> Result<Exit, Failure>) -> Result<Exit, Failure> {
    let bug = |error: anyhow::Error| Failure { error, exit: Exit::Bug };
    // Two threads: the heartbeat must not wait for a message that is being decoded.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the runtime")
        .map_err(bug)?;
    let result = runtime.block_on(async {
        let shutdown = Shutdown::new();
        shutdown.on_signals().context("install signal handlers").map_err(bug)?;
        role(shutdown).await
    });
    // A tensor operation cannot be interrupted; the process does not wait for one that nobody needs.
    runtime.shutdown_background();
    result
}
