//! Helpers of the process-level tests: a job on a tiny model, run by the real programs.
//!
//! The programs must be built first (`cargo xtask test` does so); a test that misses them says so.
#![forbid(unsafe_code)]

mod cluster;
mod disk;
mod hosts;
mod processes;
mod samples;
mod vllm_stub;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

pub use cluster::Cluster;
pub use hosts::{Host, hosts, lonely_host};
pub use processes::RunProcess;
pub use samples::{Archived, TrainedSample};
pub use vllm_stub::{StubFault, StubStall, StubState, VllmStub, first_weight, stub_logprob, stub_tokens};

use disk::Disk;

/// Deadline of a whole run; the slowest takes a fifth of it on two busy cores.
const RUN_DEADLINE: Duration = Duration::from_secs(300);

/// Returns the root folder of the repository.
#[must_use]
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the root").to_owned()
}

/// Returns the path of a program of this workspace, built in the same profile as the test.
///
/// # Errors
/// When the program is not built.
pub fn program(name: &str) -> Result<PathBuf> {
    let test = std::env::current_exe().context("find the test program")?;
    let folder = test.ancestors().nth(2).context("the test program lies in <profile>/deps")?;
    let program = folder.join(name);
    if !program.exists() {
        bail!("{} is not built; run `cargo build --release --workspace --bins` first", program.display());
    }
    Ok(program)
}

/// A job in a temporary folder; dropping it kills its workers and removes the folder.
#[derive(Debug)]
pub struct Job {
    folder: tempfile::TempDir,
    spec: toml::Table,
    /// Name of the run folder inside the job's folder.
    run: &'static str,
    /// Registry of live runs that `pacs` uses instead of the user's own.
    state: PathBuf,
    /// The network namespace of the run; `None` when it shares the machine's.
    host: Option<Arc<Host>>,
    /// The small file system of the run folder; `None` when it is on a disk of the machine.
    disk: Option<Disk>,
}

impl Job {
    /// Makes a short job on a tiny random model whose samples match the reference answers now and then.
    ///
    /// # Errors
    /// When its files cannot be written.
    pub fn tiny() -> Result<Self> {
        let folder = tempfile::tempdir().context("create a temporary folder")?;
        let state = folder.path().join("state");
        let spec = Self::tiny_spec(folder.path())?;
        let job = Self { spec, folder, run: "run", state, host: None, disk: None };
        job.write_problems(|i| format!(r#"{{"question": "Question {i}?", "answer": "{}"}}"#, i % 10))?;
        Ok(job)
    }

    fn tiny_spec(folder: &Path) -> Result<toml::Table> {
        let problems = folder.join("problems.jsonl");
        let text = format!(
            r#"
            name = "tiny"
            [model]
            path = "{model}"
            precision = "float32"
            [data]
            prompt_suffix = ""
            [data.train]
            path = "{problems}"
            [data.evaluation]
            path = "{problems}"
            limit = 10
            [rollout]
            samples_per_prompt = 8
            max_new_tokens = 12
            temperature = 3.0
            [optimizer]
            learning_rate = 2e-5
            [batch]
            steps = 3
            prompts_per_step = 8
            mini_batches = 2
            [verifier]
            extraction = "number"
            [evaluation]
            every_steps = 0
            [checkpoint]
            every_steps = 2
            [resources]
            threads = 1
            "#,
            model = root().join("tests/golden/models/qwen2-tied").display(),
            problems = problems.display(),
        );
        toml::from_str(&text).context("parse the tiny job")
    }

    /// Replaces the training file by forty problems; `line` makes the JSON line of each.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_problems(&self, line: impl Fn(usize) -> String) -> Result<()> {
        let lines: Vec<String> = (0..40).map(line).collect();
        fs::write(self.path("problems.jsonl"), lines.join("\n")).context("write the problems")
    }

    /// Sets the key `section.key` of the spec.
    ///
    /// # Panics
    /// When the section is not a table.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl Into<toml::Value>) -> Self {
        let (section, key) = key.split_once('.').expect("section.key");
        let section = self.spec.entry(section).or_insert_with(|| toml::Table::new().into());
        let section = section.as_table_mut().expect("a section of the job");
        section.insert(key.to_owned(), value.into());
        self
    }

    /// Sets the job's name.
    #[must_use]
    pub fn named(mut self, name: &str) -> Self {
        self.spec.insert("name".to_owned(), name.into());
        self
    }

    /// Uses this folder as the registry of live runs, so that several jobs share one.
    #[must_use]
    pub fn listed_in(mut self, state: &Path) -> Self {
        self.state = state.to_owned();
        self
    }

    /// Makes a command of a program of this workspace that uses this job's registry of live runs.
    ///
    /// # Errors
    /// When the program is not built.
    pub fn command(&self, name: &str) -> Result<Command> {
        let mut command = Command::new(program(name)?);
        command.env("XDG_STATE_HOME", &self.state).env_remove("XDG_RUNTIME_DIR").stdin(Stdio::null());
        Ok(command)
    }

    /// Reads the run id from the run folder.
    ///
    /// # Errors
    /// When the run folder has none yet.
    pub fn run_id(&self) -> Result<String> {
        Ok(fs::read_to_string(self.run_path("run_id")).context("read the id of the run")?.trim().to_owned())
    }

    /// Returns the live workers of the run.
    ///
    /// # Errors
    /// When the run has no id.
    pub fn workers(&self) -> Result<Vec<RunProcess>> {
        Ok(RunProcess::of(&self.run_id()?))
    }

    /// Reads all logs of the run, and the output of `pacs run`, by file name.
    ///
    /// # Errors
    /// When a log cannot be read.
    pub fn logs(&self) -> Result<BTreeMap<String, String>> {
        let mut logs = BTreeMap::new();
        for entry in fs::read_dir(self.run_path("logs")).context("list the logs")? {
            let entry = entry?;
            let text = String::from_utf8_lossy(&fs::read(entry.path())?).into_owned();
            logs.insert(entry.file_name().to_string_lossy().into_owned(), text);
        }
        for name in ["stdout", "stderr"] {
            logs.insert(name.to_owned(), fs::read_to_string(self.path(name)).unwrap_or_default());
        }
        Ok(logs)
    }

    /// Checks that no process of the run panicked.
    ///
    /// # Errors
    /// When one did, with the log lines.
    pub fn check_no_panic(&self) -> Result<()> {
        for (name, text) in self.logs()? {
            let panic = text.lines().find(|line| line.contains("panicked at") || line.contains("exit code 101"));
            ensure!(panic.is_none(), "{name}: {}", panic.unwrap_or_default());
        }
        Ok(())
    }

    /// Replaces a whole section of the spec.
    #[must_use]
    pub fn with_section(mut self, section: &str, values: toml::Table) -> Self {
        self.spec.insert(section.to_owned(), values.into());
        self
    }

    /// Removes the extraction settings, which only the built-in verifier has.
    #[must_use]
    pub fn without_extraction(mut self) -> Self {
        if let Some(verifier) = self.spec.get_mut("verifier").and_then(toml::Value::as_table_mut) {
            verifier.remove("extraction");
        }
        self
    }

    /// Returns a path inside the job's folder.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Returns a path inside the run folder.
    #[must_use]
    pub fn run_path(&self, name: &str) -> PathBuf {
        self.path(self.run).join(name)
    }

    /// Copies the run folder to another name, as to another machine, and removes the old one. Later starts resume in the copy.
    ///
    /// # Errors
    /// When the files cannot be copied or removed.
    pub fn move_run(&mut self, name: &'static str) -> Result<()> {
        let (old, new) = (self.path(self.run), self.path(name));
        let status = Command::new("cp").arg("-R").arg(&old).arg(&new).status().context("start cp")?;
        if !status.success() {
            bail!("cp -R {} {} ended with {status}", old.display(), new.display());
        }
        fs::remove_dir_all(&old).context("remove the old run folder")?;
        self.run = name;
        Ok(())
    }

    /// Reads the float32 weights that the run exported after a step, in the order of the file.
    ///
    /// # Errors
    /// When the file is missing or too short.
    pub fn exported(&self, step: u64) -> Result<Vec<f32>> {
        let path = self.run_path(&format!("checkpoints/step-{step:06}/model/model.safetensors"));
        let file = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        // The safetensors layout: eight bytes of header length, the header, then float32 values.
        let (length, rest) = file.split_first_chunk::<8>().context("a safetensors file has a header")?;
        let header = usize::try_from(u64::from_le_bytes(*length)).context("a header's length")?;
        let (values, _) = rest.get(header..).context("values after the header")?.as_chunks::<4>();
        Ok(values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
    }

    /// Checks that two runs exported the same weights after a step, to within 1e-5.
    ///
    /// # Errors
    /// When weights differ by more, or a model is missing.
    pub fn check_same_weights(&self, other: &Self, step: u64) -> Result<()> {
        let (ours, theirs) = (self.exported(step)?, other.exported(step)?);
        ensure!(!ours.is_empty() && ours.len() == theirs.len(), "{} and {} weights", ours.len(), theirs.len());
        // A NaN fails the comparison, as it should.
        let is_near = ours.iter().zip(&theirs).all(|(a, b)| (a - b).abs() < 1e-5);
        ensure!(is_near, "the weights differ by more than 1e-5, or are no numbers");
        Ok(())
    }

    /// Checks that two runs exported bit-identical weights after a step.
    ///
    /// # Errors
    /// When a bit differs, or a model is missing.
    pub fn check_same_bits(&self, other: &Self, step: u64) -> Result<()> {
        let bits = |job: &Self| -> Result<Vec<u32>> { Ok(job.exported(step)?.into_iter().map(f32::to_bits).collect()) };
        let (ours, theirs) = (bits(self)?, bits(other)?);
        ensure!(!ours.is_empty() && ours.len() == theirs.len(), "{} and {} weights", ours.len(), theirs.len());
        let differing = ours.iter().zip(&theirs).filter(|(a, b)| a != b).count();
        ensure!(differing == 0, "{differing} of {} weights differ", ours.len());
        Ok(())
    }

    /// Checks that each of `steps` steps was made and counted once, and that something was trained.
    ///
    /// # Errors
    /// When a step is missing or repeated, or nothing was trained.
    pub fn check_every_step_once(&self, steps: u64) -> Result<()> {
        let metrics = self.json_lines("metrics.jsonl")?;
        let made: Vec<u64> = metrics.iter().filter_map(|line| line["step"].as_u64()).collect();
        ensure!(made == (1..=steps).collect::<Vec<_>>(), "steps {made:?}");
        let trained: f64 = metrics.iter().filter_map(|line| line["trained_sequences"].as_f64()).sum();
        ensure!(trained > 0.0, "no sample hit its answer by chance: nothing was trained");
        Ok(())
    }

    /// Starts `pacs run` on the job, on a port that the coordinator chooses.
    ///
    /// # Errors
    /// When the program is not built or cannot be started.
    pub fn start(&self) -> Result<Run> {
        self.start_with(&[])
    }

    /// Writes the job spec to `job.toml` in the job's folder, and returns its path.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_spec(&self) -> Result<PathBuf> {
        let spec = self.path("job.toml");
        fs::write(&spec, toml::to_string(&self.spec)?).context("write the job spec")?;
        Ok(spec)
    }

    /// Starts `pacs run` with more options.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_with(&self, options: &[&str]) -> Result<Run> {
        let fixed = if options.contains(&"--listen") { &[][..] } else { &["--listen", "127.0.0.1:0"] };
        self.launch("run", Command::new(program("pacs")?), &[fixed, options].concat())
    }

    /// Starts `pacs run` with the log level `debug` in all processes.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_with_debug_log(&self) -> Result<Run> {
        let mut command = Command::new(program("pacs")?);
        command.env("PACS_LOG", "debug");
        self.launch("run", command, &["--listen", "127.0.0.1:0"])
    }

    /// Starts `pacs eval` with more options.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_evaluation(&self, options: &[&str]) -> Result<Run> {
        self.launch("eval", Command::new(program("pacs")?), &[&["--listen", "127.0.0.1:0"], options].concat())
    }

    /// Starts `pacs run` without `--listen`, as users do.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_at_any_port(&self) -> Result<Run> {
        self.launch("run", Command::new(program("pacs")?), &[])
    }

    /// Starts `pacs run` with a limit of `bytes` on the size of every file it writes, as if the disk were full. Existing content
    /// stays.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_with_full_disk(&self, bytes: u64) -> Result<Run> {
        let mut command = Command::new("sh");
        // With SIGXFSZ ignored the write fails with an error, as on a full disk.
        let script = format!("trap '' XFSZ; ulimit -f {}; exec \"$@\"", bytes / 512);
        command.arg("-c").arg(script).arg("sh").arg(program("pacs")?);
        self.launch("run", command, &["--listen", "127.0.0.1:0"])
    }

    fn launch(&self, verb: &str, mut command: Command, options: &[&str]) -> Result<Run> {
        let spec = self.write_spec()?;
        let output = fs::File::create(self.path("stdout")).context("create stdout")?;
        let errors = fs::File::create(self.path("stderr")).context("create stderr")?;
        if let Some(host) = &self.host {
            command = host.within(&command);
        }
        command.arg(verb).arg(spec).arg("--run-dir").arg(self.path(self.run));
        command.env("XDG_STATE_HOME", &self.state).env_remove("XDG_RUNTIME_DIR");
        command.args(options).stdin(Stdio::null()).stdout(output).stderr(errors);
        let child = command.spawn().context("start pacs run")?;
        let host = self.host.clone();
        Ok(Run { child, folder: self.folder.path().to_owned(), run_dir: self.path(self.run), host })
    }

    /// Writes a shell script as the verifier of `kind = "exec"`, and returns its command.
    ///
    /// The script sends its greeting and then runs `each` for every request. In it, `$id` is the request's number, `$task` the rest
    /// of its line, and `answer OUTCOME RULE` answers it.
    ///
    /// # Errors
    /// When the script cannot be written.
    pub fn verifier_script(&self, each: &str) -> Result<Vec<String>> {
        let path = self.path("verifier.sh");
        let script = format!(
            r#"answer() {{ echo "{{\"id\": $id, \"outcome\": \"$1\", \"rule\": \"$2\"}}"; }}
echo '{{"pacs_verifier": 1, "version": "test"}}'
while read -r line; do
    id=${{line#*:}}; id=${{id%%,*}}; task=${{line#*,}}
    {each}
done
"#
        );
        fs::write(&path, script).context("write the verifier")?;
        Ok(vec!["sh".to_owned(), path.display().to_string()])
    }

    /// Gives the job a network namespace, where permissions allow it.
    ///
    /// # Errors
    /// When the namespace was made and cannot be used.
    pub fn on_own_network(mut self) -> Result<Self> {
        self.host = lonely_host()?.map(Arc::new);
        Ok(self)
    }

    /// Returns the job's own network host; `None` when it shares the machine's network.
    #[must_use]
    pub fn host(&self) -> Option<&Host> {
        self.host.as_deref()
    }

    /// Puts the run folder on a small file system of its own, where permissions allow it.
    ///
    /// # Errors
    /// When the folder cannot be created.
    pub fn on_small_disk(mut self, megabytes: u32) -> Result<Self> {
        self.disk = Disk::mount(&self.run_path(""), megabytes)?;
        Ok(self)
    }

    /// Fills that file system up to `but` free bytes; returns false when there is none.
    ///
    /// # Errors
    /// When it takes no file at all.
    pub fn fill_disk(&self, but: u64) -> Result<bool> {
        self.disk.as_ref().map_or(Ok(false), |disk| disk.fill(but).map(|()| true))
    }

    /// Frees that file system again.
    ///
    /// # Errors
    /// When the filler cannot be removed.
    pub fn clear_disk(&self) -> Result<()> {
        self.disk.as_ref().map_or(Ok(()), Disk::clear)
    }

    /// Checks that no partial file is left in the run folder.
    ///
    /// # Errors
    /// When there is one, with its name.
    pub fn check_no_half_file(&self) -> Result<()> {
        let mut folders = vec![self.run_path("")];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))? {
                let path = entry?.path();
                let is_half = path.extension().is_some_and(|extension| extension == "tmp" || extension == "part");
                ensure!(!is_half, "{} is half a file", path.display());
                if path.is_dir() {
                    folders.push(path);
                }
            }
        }
        Ok(())
    }

    /// Reads a JSON-lines file of the run folder.
    ///
    /// # Errors
    /// When the file is missing or not JSON.
    pub fn json_lines(&self, name: &str) -> Result<Vec<serde_json::Value>> {
        let text = fs::read_to_string(self.run_path(name)).with_context(|| format!("read {name}"))?;
        text.lines().map(|line| serde_json::from_str(line).with_context(|| format!("read {name}"))).collect()
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        // Workers of a killed run would wait minutes for the next one.
        for worker in self.workers().unwrap_or_default() {
            // The worker may have ended at this moment, so a failure is ignored.
            let _ = worker.signal(nix::sys::signal::Signal::SIGKILL);
        }
        // Unmount before the folder that holds the mount point is removed.
        self.disk = None;
    }
}

/// How a command ended, with its output.
#[derive(Debug)]
pub struct Ended {
    /// Exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// Everything written to standard output.
    pub stdout: String,
    /// Everything written to standard error.
    pub stderr: String,
}

impl Ended {
    /// Panics with the whole output unless the exit code is `code`.
    #[track_caller]
    pub fn expect_code(&self, code: i32) {
        assert_eq!(self.code, Some(code), "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
    }
}

/// A running `pacs run` or `pacs eval`; dropping it kills the process.
#[derive(Debug)]
pub struct Run {
    child: Child,
    folder: PathBuf,
    run_dir: PathBuf,
    host: Option<Arc<Host>>,
}

impl Run {
    /// Waits for the end of the run and returns its output.
    ///
    /// # Errors
    /// When the run exceeds the deadline.
    pub fn wait(mut self) -> Result<Ended> {
        let started = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().context("wait for pacs run")? {
                break status;
            }
            if started.elapsed() > RUN_DEADLINE {
                bail!("the run takes longer than {} s; it said:\n{}", RUN_DEADLINE.as_secs(), self.read("stdout"));
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        Ok(Ended { code: status.code(), stdout: self.read("stdout"), stderr: self.read("stderr") })
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.folder.join(name)).unwrap_or_default()
    }

    /// Returns whether the process has ended, without waiting.
    ///
    /// # Errors
    /// When the system call fails.
    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait().context("wait for pacs run")?.is_some())
    }

    /// Sends a signal to `pacs run` itself, not to its workers.
    ///
    /// # Errors
    /// When the process has ended.
    pub fn signal(&self, signal: nix::sys::signal::Signal) -> Result<()> {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).context("a pid")?);
        nix::sys::signal::kill(pid, signal).context("signal pacs run")
    }

    /// Returns the run's status as `pacs status --json` prints it; `None` before the coordinator serves.
    ///
    /// # Errors
    /// When the program cannot be run or prints no JSON.
    pub fn status(&self) -> Result<Option<serde_json::Value>> {
        if !self.run_dir.join("coordinator.json").exists() {
            return Ok(None);
        }
        let mut command = Command::new(program("pacs")?);
        if let Some(host) = &self.host {
            command = host.within(&command);
        }
        let output = command.arg("status").arg(&self.run_dir).arg("--json").output().context("run pacs status")?;
        if !output.status.success() {
            return Ok(None);
        }
        Ok(Some(serde_json::from_slice(&output.stdout).context("read the status")?))
    }

    /// Polls the status until `found` returns true, and returns that status; `what` names the condition in the error.
    ///
    /// # Errors
    /// When the run ends first, or the deadline passes.
    pub fn wait_until(&mut self, what: &str, found: impl Fn(&serde_json::Value) -> bool) -> Result<serde_json::Value> {
        let started = Instant::now();
        loop {
            if let Some(status) = self.status()?
                && found(&status)
            {
                return Ok(status);
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("the run ended ({status}) before {what}:\n{}\n{}", self.read("stdout"), self.read("stderr"));
            }
            if started.elapsed() > RUN_DEADLINE {
                bail!("no {what} within {} s:\n{}", RUN_DEADLINE.as_secs(), self.read("stdout"));
            }
            // Short, because phases of a tiny job last only milliseconds.
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Kills the worker of this name with SIGKILL.
    ///
    /// # Errors
    /// When the run has no such worker.
    pub fn kill_worker(&mut self, name: &str) -> Result<()> {
        self.signal_worker(name, nix::sys::signal::Signal::SIGKILL).map(drop)
    }

    /// Sends a signal to the worker of this name, and returns its process.
    ///
    /// # Errors
    /// When the run has no such worker.
    pub fn signal_worker(&mut self, name: &str, signal: nix::sys::signal::Signal) -> Result<Worker> {
        let status = self.wait_until(&format!("worker {name}"), |status| Worker::of(status, name).is_some())?;
        let worker = Worker::of(&status, name).context("the worker was there")?;
        worker.signal(signal)?;
        Ok(worker)
    }
}

/// The process of a worker, which may have been replaced since.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Worker(i32);

impl Worker {
    /// Returns the worker's process that a status lists; `None` when the name is not listed.
    pub fn of(status: &serde_json::Value, name: &str) -> Option<Self> {
        let worker = status["workers"].as_array()?.iter().find(|worker| worker["name"] == name)?;
        Some(Self(i32::try_from(worker["pid"].as_i64()?).ok()?))
    }

    /// Sends the process a signal.
    ///
    /// # Errors
    /// When the process has ended.
    pub fn signal(self, signal: nix::sys::signal::Signal) -> Result<()> {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.0), signal).context("signal a worker")
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // Killing the coordinator is enough here: `Job` kills workers that are left.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
