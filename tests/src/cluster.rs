//! A job whose processes a test starts one by one, as launchers do, with mutual TLS.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pacs_runtime::launch;
use pacs_runtime::net::{PeerRole, RunChannel, RunIdentity, dial};

use crate::{Host, Job, program};

/// Deadline of every wait in these helpers.
const DEADLINE: Duration = Duration::from_secs(300);

/// The processes of a job; dropping it ends them.
#[derive(Debug)]
pub struct Cluster {
    /// The job whose processes these are, with its folder and spec.
    pub job: Job,
    processes: Vec<(String, Child)>,
    /// Open-file limit of processes started from now on; `None` inherits this process's.
    files: Option<u32>,
    /// Extra environment variables of processes started from now on.
    environment: Vec<(String, String)>,
}

impl Cluster {
    /// Writes the spec and certificates of a job, and starts nothing.
    ///
    /// # Errors
    /// When files cannot be written or `pacs certs` fails.
    pub fn new(job: Job) -> Result<Self> {
        job.write_spec()?;
        let cluster = Self { job, processes: Vec::new(), files: None, environment: Vec::new() };
        cluster.make_certificates()?;
        Ok(cluster)
    }

    /// Returns the folder with the certificates of all roles.
    #[must_use]
    pub fn certificates(&self) -> PathBuf {
        self.job.path("certs")
    }

    /// Makes new certificates, signed by the present authority or else by a new one.
    ///
    /// # Errors
    /// When `pacs certs` fails.
    pub fn make_certificates(&self) -> Result<()> {
        let mut command = Command::new(program("pacs")?);
        let status = command.arg("certs").arg(self.certificates()).stdout(Stdio::null()).status()?;
        ensure!(status.success(), "pacs certs: {status}");
        Ok(())
    }

    /// Sets an environment variable of processes started from now on.
    pub fn set_variable(&mut self, name: &str, value: &str) {
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    /// Limits the open files of processes started from now on.
    pub fn limit_files(&mut self, files: u32) {
        self.files = Some(files);
    }

    /// Lifts that limit for processes started from now on.
    pub fn no_limits(&mut self) {
        self.files = None;
    }

    /// Starts a program of this workspace, with its output in `<name>.out` of the job's folder.
    ///
    /// # Errors
    /// When the program is not built or cannot be started.
    pub fn start(&mut self, name: &str, binary: &str, arguments: &[&str]) -> Result<()> {
        let program = program(binary)?;
        let command = match self.files {
            None => Command::new(program),
            Some(files) => {
                let mut shell = Command::new("sh");
                shell.args(["-c", &format!("ulimit -n {files}; exec \"$0\" \"$@\"")]).arg(program);
                shell
            }
        };
        self.launch(name, command, arguments)
    }

    /// Starts a program of this workspace on another host.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_on(&mut self, host: &Host, name: &str, binary: &str, arguments: &[&str]) -> Result<()> {
        let command = host.command(&program(binary)?);
        self.launch(name, command, arguments)
    }

    fn launch(&mut self, name: &str, mut command: Command, arguments: &[&str]) -> Result<()> {
        let output = fs::File::options().create(true).append(true).open(self.job.path(&format!("{name}.out")))?;
        command.args(arguments).stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        command.env("PACS_TLS_DIR", self.certificates()).env("PACS_RUN_DIR", self.job.path("run"));
        command.env("PACS_COORDINATOR", self.job.path("run")).env("PACS_JOIN_TIMEOUT", "60");
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        let child = command.spawn().with_context(|| format!("start {name}"))?;
        self.processes.push((name.to_owned(), child));
        Ok(())
    }

    /// Starts `pacs coordinator` on a free port, with these additional arguments.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_coordinator(&mut self, more: &[&str]) -> Result<()> {
        let spec = self.job.path("job.toml").display().to_string();
        let fixed = ["coordinator", &spec, "--listen", "127.0.0.1:0"];
        self.start("coordinator", "pacs", &[&fixed, more].concat())
    }

    /// Starts a worker under `pacs supervise`. The name gives its role: `learner-0` is a learner.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_worker(&mut self, name: &str) -> Result<()> {
        self.start_worker_with(name, None)
    }

    /// Starts a worker on another host, under `pacs supervise`.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_worker_on(&mut self, host: &Host, name: &str) -> Result<()> {
        self.start_worker_with(name, Some(host))
    }

    fn start_worker_with(&mut self, name: &str, host: Option<&Host>) -> Result<()> {
        let role = name.split('-').next().unwrap_or(name);
        let binary = program(if role == "verifier" { "pacs" } else { "pacs-worker" })?.display().to_string();
        let arguments = ["supervise", "--", &binary, role, "--name", name, "--threads", "1"];
        match host {
            Some(host) => self.start_on(host, name, "pacs", &arguments),
            None => self.start(name, "pacs", &arguments),
        }
    }

    /// Waits for the end of a process and returns its exit code; `None` when a signal ended it.
    ///
    /// # Errors
    /// When it does not end before the deadline.
    pub fn code(&mut self, name: &str) -> Result<Option<i32>> {
        let position = self.processes.iter().position(|(known, _)| known == name).context("a process of this name")?;
        let started = Instant::now();
        loop {
            if let Some(status) = self.processes[position].1.try_wait()? {
                self.processes.remove(position);
                return Ok(status.code());
            }
            if started.elapsed() > DEADLINE {
                bail!("{name} does not end; it said:\n{}", self.said(name));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Returns all output of processes with this name.
    #[must_use]
    pub fn said(&self, name: &str) -> String {
        fs::read_to_string(self.job.path(&format!("{name}.out"))).unwrap_or_default()
    }

    /// Sends a signal to a started process; workers have their supervisor in between.
    ///
    /// # Errors
    /// When the process has ended.
    pub fn signal(&self, name: &str, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(i32::try_from(self.pid(name)?)?), signal).context("signal it")
    }

    /// Kills the worker under the supervisor of this name, which then restarts it.
    ///
    /// # Errors
    /// When the supervisor has no worker at the moment.
    pub fn kill_worker(&self, name: &str) -> Result<()> {
        let supervisor = self.pid(name)?;
        let children = fs::read_to_string(format!("/proc/{supervisor}/task/{supervisor}/children"))?;
        let worker = children.split_whitespace().next().with_context(|| format!("{name} has no worker"))?;
        kill(Pid::from_raw(worker.parse()?), Signal::SIGKILL).context("kill it")
    }

    /// Lists the weight files in the shared memory that a process sees, partial downloads included.
    #[must_use]
    pub fn weights_on_host_of(&self, name: &str) -> Vec<String> {
        let Ok(pid) = self.pid(name) else { return Vec::new() };
        let stores = fs::read_dir(format!("/proc/{pid}/root/dev/shm")).into_iter().flatten().flatten();
        // A store disappears when the last worker that uses it leaves.
        let files = stores.flat_map(|store| fs::read_dir(store.path()).into_iter().flatten().flatten());
        let names = files.map(|file| file.file_name().to_string_lossy().into_owned());
        names.filter(|name| name.starts_with(|first: char| first.is_ascii_digit())).collect()
    }

    fn pid(&self, name: &str) -> Result<u32> {
        let (_, child) = self.processes.iter().find(|(known, _)| known == name).context("a process of this name")?;
        Ok(child.id())
    }

    /// Polls `condition` until it holds; `what` names it in the error.
    ///
    /// # Errors
    /// When it does not hold before the deadline.
    pub fn wait_for(&self, what: &str, condition: impl Fn(&Self) -> bool) -> Result<()> {
        let started = Instant::now();
        while !condition(self) {
            ensure!(started.elapsed() < DEADLINE, "no {what}; the coordinator said:\n{}", self.said("coordinator"));
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Returns the number of training steps made and not undone.
    #[must_use]
    pub fn steps(&self) -> usize {
        self.job.json_lines("metrics.jsonl").map_or(0, |lines| lines.len())
    }

    /// Connects to the coordinator with the certificate of `role`; calls carry the run id.
    ///
    /// # Errors
    /// When the coordinator cannot be found or reached.
    pub async fn channel(&self, role: PeerRole) -> Result<RunChannel> {
        self.wait_for("coordinator", |cluster| cluster.said("coordinator").contains("serving "))?;
        let address = launch::find(&self.job.path("run").display().to_string())?;
        let security = launch::security(&self.certificates(), role)?;
        let run = RunIdentity::told(fs::read_to_string(self.job.path("run/run_id"))?.trim_end())?;
        Ok(dial(&address, PeerRole::Coordinator, &security, &run).await?)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // SIGTERM rather than SIGKILL, because supervisors forward it and so end their workers.
        self.processes.iter().for_each(|(name, _)| drop(self.signal(name, Signal::SIGTERM)));
        self.processes.iter().for_each(|(name, _)| drop(self.signal(name, Signal::SIGTERM)));
        for (_, child) in &mut self.processes {
            let started = Instant::now();
            while matches!(child.try_wait(), Ok(None)) && started.elapsed() < Duration::from_secs(10) {
                std::thread::sleep(Duration::from_millis(20));
            }
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
