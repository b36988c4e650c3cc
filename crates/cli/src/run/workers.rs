//! The commands of the worker processes that a job needs on this machine.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use pacs_spec::{DeviceKind, JobSpec, RolloutEngineKind};

use super::gpus::Gpus;
use super::supervisor::{COORDINATOR, WorkerCommand};
use crate::failure::Failure;

pub(crate) const WORKER_PROGRAM: &str = "pacs-worker";

/// Option that names the folder of a worker's certificates.
pub(super) const TLS_DIR: &str = "--tls-dir";

/// Option that turns TLS off.
pub(super) const PLAINTEXT: &str = "--plaintext";

/// Returns the commands of all workers of `spec` in the run `run_id`, on `gpus` if the job uses any, with TLS from `tls_dir` or plain
/// text on loopback. Workers find the coordinator through the run folder, not by address: they outlive it, and its successor may have
/// to take another port.
pub(crate) fn commands(
    spec: &JobSpec,
    worker: &Path,
    (run_dir, run_id): (&Path, &str),
    tls_dir: Option<&Path>,
    gpus: Option<&Gpus>,
) -> Result<Vec<WorkerCommand>, Failure> {
    let this = std::env::current_exe().context("find this program's own file").map_err(Failure::bug)?;
    // Canonical, because `--coordinator` takes anything but an absolute path for an address.
    let run_dir = run_dir.canonicalize().context("resolve the run folder").map_err(Failure::config)?;
    let run_dir = run_dir.display().to_string();
    let resources = &spec.resources;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let security = match tls_dir {
        Some(folder) => vec![TLS_DIR.to_owned(), folder.display().to_string()],
        None => vec![PLAINTEXT.to_owned()],
    };
    let mut commands = Vec::new();
    let mut add = |role: &str, count: u32, program: &Path, extra: &[String]| {
        for index in 0..count {
            let name = format!("{role}-{index}");
            let fixed = [role, COORDINATOR, &run_dir, "--name", &name].map(str::to_owned);
            let arguments = fixed.into_iter().chain(security.iter().cloned()).chain(extra.iter().cloned()).collect();
            let gpu = gpus.and_then(|gpus| gpus.of_worker(&name)).map(str::to_owned);
            let (program, run_id) = (program.to_owned(), run_id.to_owned());
            commands.push(WorkerCommand { name, program, arguments, run_id, gpu, living: None });
        }
    };
    add("verifier", resources.verifiers, &this, &[]);
    match spec.rollout.engine {
        RolloutEngineKind::Native => {
            add("rollout", resources.rollouts, worker, &compute(spec, cores, resources.rollouts));
        }
        // Drives servers over HTTP, and computes nothing itself.
        RolloutEngineKind::Vllm => add("rollout", resources.rollouts, &this, &[]),
    }
    add("learner", spec.learners(), worker, &compute(spec, cores, resources.learners));
    Ok(commands)
}

/// Returns the device and thread options of one of `processes` that compute at the same time. Rollouts and learners alternate, so
/// each role may use all cores.
fn compute(spec: &JobSpec, cores: usize, processes: u32) -> [String; 4] {
    let threads = match spec.resources.threads {
        0 => (cores / processes.max(1) as usize).max(1),
        threads => threads as usize,
    };
    let device = match spec.resources.device {
        DeviceKind::Cpu => "cpu",
        DeviceKind::Cuda => "cuda",
    };
    ["--threads", &threads.to_string(), "--device", device].map(str::to_owned)
}

/// Returns the address at which local processes reach a coordinator that listens on `address`.
pub(crate) fn local(address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() { (Ipv4Addr::LOCALHOST, address.port()).into() } else { address }
}

/// Finds the `pacs-worker` program: `given`, else next to this program, else on PATH.
pub(crate) fn find_worker(given: Option<&Path>) -> Result<PathBuf, Failure> {
    let this = std::env::current_exe().ok();
    let beside = this.as_deref().and_then(Path::parent).map(Path::to_owned);
    let on_path = std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect()).unwrap_or_default();
    find_in(given, beside.into_iter().chain::<Vec<PathBuf>>(on_path)).ok_or_else(|| {
        let looked = match given {
            Some(path) => anyhow!("there is no file `{}`", path.display()),
            None => anyhow!("it is neither next to this program nor on PATH"),
        };
        let hint = "build it (`cargo build --release -p pacs-worker`) or say where it is with --worker-binary PATH";
        Failure::config(looked).doing(format!("find the program `{WORKER_PROGRAM}`")).hint(hint)
    })
}

fn find_in(given: Option<&Path>, folders: impl Iterator<Item = PathBuf>) -> Option<PathBuf> {
    match given {
        Some(path) => Some(path.to_owned()).filter(|path| path.is_file()),
        None => folders.map(|folder| folder.join(WORKER_PROGRAM)).find(|path| path.is_file()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_has_all_its_workers() {
        let text = "name = 'a'\nmodel.path = 'm'\ndata.train.path = 't.jsonl'\ndata.evaluation.path = 'e.jsonl'\n\
                    resources = { rollouts = 2, learners = 1, verifiers = 1, threads = 3 }";
        let spec = pacs_spec::parse(text, Path::new("job.toml")).expect("valid");
        let run = (Path::new("/usr/../"), "0123");
        let commands = commands(&spec, Path::new("/bin/pacs-worker"), run, None, None).expect("found");
        let names: Vec<&str> = commands.iter().map(|command| command.name.as_str()).collect();
        assert_eq!(names, ["verifier-0", "rollout-0", "rollout-1", "learner-0"]);
        assert_eq!(commands[0].arguments.join(" "), "verifier --coordinator / --name verifier-0 --plaintext");
        assert!(commands.iter().all(|command| command.run_id == "0123"));
        assert_eq!(commands[2].program, Path::new("/bin/pacs-worker"));
        assert_eq!(
            commands[2].arguments.join(" "),
            "rollout --coordinator / --name rollout-1 --plaintext --threads 3 --device cpu"
        );
    }

    #[test]
    fn vllm_servers_are_driven_without_libtorch() {
        let text = "name = 'a'\nmodel.path = 'm'\ndata.train.path = 't.jsonl'\ndata.evaluation.path = 'e.jsonl'\n\
                    rollout = { engine = 'vllm', vllm.endpoints = ['http://a:1'] }\nresources.device = 'cuda'";
        let spec = pacs_spec::parse(text, Path::new("job.toml")).expect("valid");
        let run = (Path::new("/usr/../"), "0123");
        let commands = commands(&spec, Path::new("/bin/pacs-worker"), run, None, None).expect("found");
        assert_eq!(commands[1].program, std::env::current_exe().expect("a program"));
        assert_eq!(commands[1].arguments.join(" "), "rollout --coordinator / --name rollout-0 --plaintext");
    }

    #[test]
    fn cores_are_shared_within_a_role() {
        let text = "name = 'a'\nmodel.path = 'm'\ndata.train.path = 't.jsonl'\ndata.evaluation.path = 'e.jsonl'";
        let spec = pacs_spec::parse(text, Path::new("job.toml")).expect("valid");
        assert_eq!(compute(&spec, 8, 3)[1], "2");
        assert_eq!(compute(&spec, 2, 4)[1], "1");
        assert_eq!(compute(&spec, 2, 0)[1], "2");
    }

    #[test]
    fn the_worker_program_is_looked_for_in_order() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let folders = || [dir.path().join("a"), dir.path().to_owned()].into_iter();
        assert_eq!(find_in(None, folders()), None);
        let program = dir.path().join(WORKER_PROGRAM);
        std::fs::write(&program, "").expect("written");
        assert_eq!(find_in(None, folders()), Some(program.clone()));
        assert_eq!(find_in(Some(&program), folders()), Some(program));
        assert_eq!(find_in(Some(Path::new("/no/such")), folders()), None);
    }
}
