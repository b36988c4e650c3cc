//! vLLM servers that PACS starts: what they are started with, and `pacs servers`, which starts those of one rollout worker where no
//! `pacs run` does.

mod command;
mod health;
mod ports;

use std::path::Path;

use anyhow::{Context, anyhow};
use nix::sys::signal::Signal;
use pacs_hub::Part;
use pacs_runtime::{Exit, LogFormat, Shutdown, harmless, init_logging};
use pacs_spec::{DeviceKind, JobSpec, VllmServerSpec};
use tokio::sync::mpsc::UnboundedReceiver;

pub(crate) use self::command::{HOST, Seat, endpoint, environment, model, problem, words};
pub(crate) use self::health::Gate;
pub(crate) use self::ports::free as free_ports;
use crate::arguments::Servers;
use crate::failure::Failure;
use crate::hub;
use crate::run::gpus::visible;
use crate::run::supervisor::{GivenUp, Supervisor, WorkerCommand, WorkerNews};
use crate::supervise::{signals, supervise};

/// What names of servers and their logs begin with.
pub(crate) const SERVER: &str = "vllm";

/// Variable by which a rollout worker is told its servers.
const ENDPOINTS: &str = "PACS_VLLM_ENDPOINTS";

pub(crate) fn run(arguments: &Servers) -> Result<Exit, Failure> {
    init_logging(LogFormat::Human);
    let spec = pacs_spec::read(&arguments.job).map_err(|errors| Failure::config(errors).doing("read the job"))?;
    let server = spec.own_servers().ok_or_else(|| {
        let hint = "set `rollout.vllm.server`, or start servers yourself and `pacs rollout --endpoint` next to them";
        Failure::config(anyhow!("the job leaves its servers to you")).doing("start vLLM servers").hint(hint)
    })?;
    let (trained, _) = hub::session(arguments.run_dir.as_deref(), |hub| hub.model(&spec.model.path, Part::Whole))?;
    let model = model(&spec, server, &trained)?;
    let seats = seats(&spec, server, &arguments.name)?;
    let endpoints: Vec<String> = seats.iter().map(Seat::endpoint).collect();
    let run_id = std::env::var("PACS_RUN_ID").unwrap_or_default();
    let commands = seats.into_iter().map(|seat| seat.process(&spec, server, &model, &run_id)).collect();
    std::fs::create_dir_all(&arguments.logs)
        .with_context(|| format!("create folder `{}`", arguments.logs.display()))
        .map_err(Failure::config)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the runtime")
        .map_err(Failure::bug)?;
    runtime.block_on(serve(commands, &endpoints, &arguments.logs, &arguments.command))
}

/// Names, ports and GPUs of the servers of one rollout worker.
fn seats(spec: &JobSpec, server: &VllmServerSpec, name: &str) -> Result<Vec<Seat>, Failure> {
    let failed = |failure: Failure| failure.doing("start vLLM servers");
    let gpus = match spec.resources.device {
        DeviceKind::Cpu => Vec::new(),
        DeviceKind::Cuda => visible(),
    };
    let each = server.tensor_parallel as usize;
    let wanted = server.count as usize * each;
    if spec.resources.device == DeviceKind::Cuda && gpus.len() < wanted {
        let have = gpus.len();
        let hint = "look at `nvidia-smi --list-gpus` and CUDA_VISIBLE_DEVICES, or at `rollout.vllm.server` of the job";
        return Err(failed(
            Failure::config(anyhow!("they take {wanted} GPUs, and this process sees {have}")).hint(hint),
        ));
    }
    let ports = free_ports(server.count as usize, &[]).map_err(|error| failed(Failure::again(error)))?;
    let mut shares = gpus.chunks(each).map(|share| share.join(","));
    let seat = |(index, port): (usize, u16)| Seat { name: format!("{name}-{index}"), port, gpu: shares.next() };
    Ok(ports.into_iter().enumerate().map(seat).collect())
}

/// Keeps the servers running, and the worker next to them once each has answered. The servers end last in every case.
async fn serve(
    commands: Vec<WorkerCommand>,
    endpoints: &[String],
    logs: &Path,
    worker: &[String],
) -> Result<Exit, Failure> {
    let mut signals = signals().context("install signal handlers").map_err(Failure::bug)?;
    let gates: Vec<Gate> = commands.iter().filter_map(|command| command.gate.clone()).collect();
    let environment = [(ENDPOINTS, endpoints.join(","))];
    let mut servers = Supervisor::start(commands, logs);
    tracing::info!(servers = gates.len(), logs = %logs.display(), "starting vLLM servers");
    let ended = tokio::select! {
        asked = wait_for_all(&gates, &mut signals) => match asked {
            true => Ok(Exit::Again),
            false => {
                tracing::info!(endpoints = endpoints.join(","), "all vLLM servers answer");
                tokio::select! {
                    ended = supervise(worker, false, &environment, &mut signals) => ended,
                    lost = lost_server(&mut servers) => Err(lost),
                }
            }
        },
        lost = lost_server(&mut servers) => Err(lost),
    };
    servers.finish(std::time::Duration::ZERO, &Shutdown::new()).await;
    ended
}

/// Returns true when a signal asks to leave before all servers answer.
async fn wait_for_all(gates: &[Gate], signals: &mut UnboundedReceiver<Signal>) -> bool {
    let all = async {
        for gate in gates {
            gate.passed().await;
        }
    };
    tokio::pin!(all);
    loop {
        tokio::select! {
            () = &mut all => return false,
            // A warning that the time is nearly over is for workers that have something to save.
            Some(signal) = signals.recv() => if signal != Signal::SIGUSR1 { return true },
        }
    }
}

/// Waits until a server is not worth another start, and logs the starts until then.
async fn lost_server(servers: &mut Supervisor) -> Failure {
    loop {
        match servers.news().await {
            WorkerNews::Restarting { name, how, wait } => {
                let seconds = wait.as_secs_f64();
                tracing::warn!("server {name} {how}; it is started again in {seconds:.1} s");
            }
            WorkerNews::GivenUp(GivenUp { name, how, exit, log, tail }) => {
                let lines: String = tail.iter().map(|line| format!("\n  | {}", harmless(line))).collect();
                let error = anyhow!("server {name} {how}; the end of its log `{}`:{lines}", log.display());
                return Failure::with_exit(exit, error).doing("keep the vLLM servers running");
            }
        }
    }
}
