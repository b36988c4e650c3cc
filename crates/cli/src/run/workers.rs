//! The commands of the worker processes that a job needs on this machine.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use pacs_spec::{DeviceKind, JobSpec, RolloutEngineKind, VllmServerSpec};

use super::adopt::{ENDPOINT, SERVER_NAME, SERVER_OF, SERVER_PORT, server_ports};
use super::gpus::Gpus;
use super::supervisor::{COORDINATOR, WorkerCommand};
use crate::failure::Failure;
use crate::servers::{SERVER, Seat, free_ports};

pub(crate) const WORKER_PROGRAM: &str = "pacs-worker";

/// Option that names the folder of a worker's certificates.
pub(super) const TLS_DIR: &str = "--tls-dir";

/// Option that turns TLS off.
pub(super) const PLAINTEXT: &str = "--plaintext";

/// Returns the commands of all workers of `spec` in the run `run_id`, on `gpus` if the job uses any, with TLS from `tls_dir` or plain
/// text on loopback. Workers find the coordinator through the run folder, not by address: they outlive it, and its successor may have
/// to take another port. `served` is the folder that the job's own vLLM servers are started from.
pub(crate) fn commands(
    spec: &JobSpec,
    worker: &Path,
    (run_dir, run_id): (&Path, &str),
    tls_dir: Option<&Path>,
    gpus: Option<&Gpus>,
    served: Option<&Path>,
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
    let seats = match spec.own_servers() {
        Some(server) => seats(resources.rollouts * server.count, (&run_dir, run_id), gpus)?,
        None => Vec::new(),
    };
    // Those of the first rollout worker come first.
    let endpoints: Vec<String> = seats.iter().map(Seat::endpoint).collect();
    let endpoints = |index: u32| {
        let count = spec.own_servers().map_or(0, |server| server.count as usize);
        let own = endpoints.iter().skip(index as usize * count).take(count);
        own.flat_map(|endpoint| [ENDPOINT.to_owned(), endpoint.clone()]).collect::<Vec<String>>()
    };
    let mut commands = Vec::new();
    if let (Some(server), Some(served)) = (spec.own_servers(), served) {
        let of_run = |seat: Seat| of_run(seat, spec, server, (served, &run_dir, run_id));
        commands.extend(seats.into_iter().map(of_run));
    }
    let mut add = |role: &str, count: u32, program: &Path, extra: &dyn Fn(u32) -> Vec<String>| {
        for index in 0..count {
            let name = format!("{role}-{index}");
            let fixed = [role, COORDINATOR, &run_dir, "--name", &name].map(str::to_owned);
            let arguments = fixed.into_iter().chain(security.iter().cloned()).chain(extra(index)).collect();
            let gpu = gpus.and_then(|gpus| gpus.of_worker(&name));
            let (program, run_id, environment) = (program.to_owned(), run_id.to_owned(), Vec::new());
            commands.push(WorkerCommand {
                name,
                program,
                arguments,
                run_id,
                gpu,
                environment,
                gate: None,
                living: None,
            });
        }
    };
    add("verifier", resources.verifiers, &this, &|_| Vec::new());
    match spec.rollout.engine {
        RolloutEngineKind::Native => {
            let compute = compute(spec, cores, resources.rollouts);
            add("rollout", resources.rollouts, worker, &|_| compute.to_vec());
        }
        // Drives servers over HTTP, and computes nothing itself.
        RolloutEngineKind::Vllm => add("rollout", resources.rollouts, &this, &endpoints),
    }
    let compute = compute(spec, cores, resources.learners);
    add("learner", spec.learners(), worker, &|_| compute.to_vec());
    Ok(commands)
}

/// Names, ports and GPUs of the servers of a run. Those that live keep their ports, which their rollout workers know.
fn seats(count: u32, (run_dir, run_id): (&str, &str), gpus: Option<&Gpus>) -> Result<Vec<Seat>, Failure> {
    let known = server_ports(run_dir, run_id);
    let names: Vec<String> = (0..count).map(|index| format!("{SERVER}-{index}")).collect();
    let missing = names.iter().filter(|name| !known.contains_key(*name)).count();
    let taken: Vec<u16> = known.values().copied().collect();
    let fresh = free_ports(missing, &taken);
    let mut fresh = fresh.map_err(|error| Failure::again(error).doing("find ports for vLLM servers"))?.into_iter();
    let seat = |name: String| {
        let port = known.get(&name).copied().or_else(|| fresh.next())?;
        let gpu = gpus.and_then(|gpus| gpus.of_worker(&name));
        Some(Seat { name, port, gpu })
    };
    Ok(names.into_iter().filter_map(seat).collect())
}

/// A server that the next start of the run in the folder `run_dir` recognises.
fn of_run(
    seat: Seat,
    spec: &JobSpec,
    server: &VllmServerSpec,
    (served, run_dir, run_id): (&Path, &str, &str),
) -> WorkerCommand {
    let marks =
        [(SERVER_NAME, seat.name.clone()), (SERVER_PORT, seat.port.to_string()), (SERVER_OF, run_dir.to_owned())];
    let mut command = seat.process(spec, server, served, run_id);
    command.environment.extend(marks.map(|(name, value)| (name.to_owned(), value)));
    command
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
        let commands = commands(&spec, Path::new("/bin/pacs-worker"), run, None, None, None).expect("found");
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
        let commands = commands(&spec, Path::new("/bin/pacs-worker"), run, None, None, None).expect("found");
        assert_eq!(commands[1].program, std::env::current_exe().expect("a program"));
        assert_eq!(commands[1].arguments.join(" "), "rollout --coordinator / --name rollout-0 --plaintext");
    }

    #[test]
    fn each_rollout_worker_has_servers_of_its_own() {
        let text = "name = 'a'\nmodel.path = 'm'\ndata.train.path = 't.jsonl'\ndata.evaluation.path = 'e.jsonl'\n\
                    rollout = { engine = 'vllm', vllm.server = { count = 2 } }\nmodel.precision = 'float32'\nresources.rollouts = 2";
        let spec = pacs_spec::parse(text, Path::new("job.toml")).expect("valid");
        let run = (Path::new("/usr/../"), "no-such-run");
        let commands =
            commands(&spec, Path::new("/bin/pacs-worker"), run, None, None, Some(Path::new("/m"))).expect("found");
        let names: Vec<&str> = commands.iter().map(|command| command.name.as_str()).collect();
        let servers = ["vllm-0", "vllm-1", "vllm-2", "vllm-3"];
        assert_eq!(names, [&servers[..], &["verifier-0", "rollout-0", "rollout-1", "learner-0"]].concat());
        let ports: Vec<u16> = commands.iter().filter_map(|command| Some(command.gate.as_ref()?.port)).collect();
        assert_eq!(ports.iter().collect::<std::collections::BTreeSet<_>>().len(), 4);
        assert_eq!(
            commands[6].arguments.join(" "),
            format!(
                "rollout --coordinator / --name rollout-1 --plaintext --endpoint http://127.0.0.1:{} --endpoint http://127.0.0.1:{}",
                ports[2], ports[3]
            )
        );
        let server = &commands[3];
        assert_eq!(
            (server.program.as_path(), &server.arguments[..2]),
            (Path::new("vllm"), &["serve".into(), "/m".into()][..])
        );
        for (name, value) in [(SERVER_NAME, "vllm-3"), (SERVER_OF, "/"), ("VLLM_SERVER_DEV_MODE", "1")] {
            assert!(server.environment.contains(&(name.to_owned(), value.to_owned())), "{name}");
        }
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
