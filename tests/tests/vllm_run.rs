//! Whole runs whose samples vLLM servers generate: on stubs always, and on a real server where `PACS_TEST_VLLM` names the `vllm` program
//! (docs/ENGINES.md says how to install one for the CPU).

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use pacs_tests::{Job, Run, RunProcess, StubState, VllmStub, first_weight, program, root};
use serde_json::Value;

/// Deadline for a real server to start: it compiles on its first start.
const SERVER_DEADLINE: Duration = Duration::from_secs(900);

/// The tiny job with its samples from servers, and one more key of `[rollout.vllm]`.
fn job(endpoints: &[String], steps: i64, (key, value): (&str, toml::Value)) -> Result<Job> {
    let endpoints: Vec<toml::Value> = endpoints.iter().map(|endpoint| endpoint.as_str().into()).collect();
    let job = Job::tiny()?.with("rollout.engine", "vllm").with("rollout.temperature", 1.0);
    let weights = job.path("weights").display().to_string();
    let vllm = toml::Table::from_iter([
        ("endpoints".to_owned(), endpoints.into()),
        ("weights_dir".to_owned(), toml::Value::from(weights)),
        ("request_seconds".to_owned(), 60.into()),
        (key.to_owned(), value),
    ]);
    let job = job.with("rollout.vllm", vllm).with("batch.steps", steps);
    Ok(job.with("evaluation.before", false).with("evaluation.after", false))
}

/// What jobs on stubs need: a stub has no model, so its log-probs are not those of the learner.
fn of_stubs() -> (&'static str, toml::Value) {
    ("max_probe_error", 100.0.into())
}

fn servers(status: &Value) -> Vec<Value> {
    let workers = status["workers"].as_array().into_iter().flatten();
    workers.flat_map(|worker| worker["servers"].as_array().cloned().unwrap_or_default()).collect()
}

fn wait_for_step(run: &mut Run, step: u64) -> Result<Value> {
    run.wait_until(&format!("step {step}"), |status| status["step"].as_u64() >= Some(step))
}

#[test]
fn a_run_on_servers_survives_the_loss_of_its_worker_and_of_a_server() -> Result<()> {
    const STEPS: i64 = 12;
    let runtime = tokio::runtime::Runtime::new()?;
    let mut stubs = Vec::new();
    for _ in 0..2 {
        // So slow that faults meet requests.
        stubs.push(runtime.block_on(VllmStub::start(StubState { token_ms: 2, ..StubState::default() }))?);
    }
    let job = job(&stubs.iter().map(VllmStub::url).collect::<Vec<_>>(), STEPS, of_stubs())?;
    let mut run = job.start()?;
    let ready = |status: &Value| servers(status).iter().filter(|server| server["state"] == "ready").count() == 2;
    let status = run.wait_until("two ready servers", ready)?;
    let shown = servers(&status);
    assert_eq!(shown[0]["address"], stubs[0].url().as_str());
    assert_eq!(shown[0]["error"], "");
    wait_for_step(&mut run, 2)?;
    let probed = |status: &Value| servers(status).iter().any(|server| server["probe_error"].as_f64() > Some(0.0));
    run.wait_until("a probe of the learner on a server", probed)?;
    run.kill_worker("rollout-0")?;
    wait_for_step(&mut run, 5)?;
    stubs[0].kill();
    let down = |status: &Value| servers(status).iter().any(|server| server["state"] == "down");
    run.wait_until("a server that is down", down)?;
    let text = job.command("pacs")?.arg("status").arg(job.run_path("")).output()?;
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    ensure!(text.contains(&stubs[0].url()) && text.contains("down"), "{text}");
    runtime.block_on(stubs[0].restart())?;
    run.wait()?.expect_code(0);
    job.check_every_step_once(u64::try_from(STEPS)?)?;
    job.check_no_panic()?;
    for line in job.json_lines("metrics.jsonl")? {
        assert_eq!(line["lag"], 0, "the synchronous loop trains on no older weights: {line}");
    }
    for stub in &stubs {
        assert!(stub.state().reloads >= 6, "servers follow the weights: {}", stub.state().reloads);
    }
    Ok(())
}

/// The tiny job with two servers for each rollout worker, which PACS starts itself.
fn job_with_servers(steps: i64) -> Result<Job> {
    let stub = program("vllm-stub")?.display().to_string();
    let server = toml::Table::from_iter([
        ("command".to_owned(), toml::Value::from(vec![stub, "serve".to_owned()])),
        ("count".to_owned(), 2.into()),
        ("start_seconds".to_owned(), 60.into()),
        ("extra_args".to_owned(), vec!["--seed", "$(7) '8'"].into()),
        ("environment".to_owned(), toml::Table::from_iter([("STUB_TOKEN_MS".to_owned(), "20".into())]).into()),
    ]);
    let job = Job::tiny()?.with("rollout.engine", "vllm").with("rollout.temperature", 1.0);
    let weights = job.path("weights").display().to_string();
    let vllm = toml::Table::from_iter([
        ("server".to_owned(), server.into()),
        ("weights_dir".to_owned(), weights.into()),
        ("request_seconds".to_owned(), 60.into()),
        ("max_requests".to_owned(), 32.into()),
        ("max_probe_error".to_owned(), 100.0.into()),
    ]);
    // A head of its own: servers on CPUs refuse another.
    let model = root().join("tests/golden/models/qwen2-untied").display().to_string();
    let job = job.with("rollout.vllm", vllm).with("batch.steps", steps).with("model.path", model);
    Ok(job.with("evaluation.before", false).with("evaluation.after", false))
}

fn processes_of_servers(job: &Job) -> Result<Vec<RunProcess>> {
    Ok(job.workers()?.into_iter().filter(|process| process.name.starts_with("vllm-")).collect())
}

fn two_are_ready(status: &Value) -> bool {
    servers(status).iter().filter(|server| server["state"] == "ready").count() == 2
}

#[test]
fn a_run_starts_its_servers_restarts_them_and_ends_them() -> Result<()> {
    // Enough that the run does not end before the last fault.
    const STEPS: i64 = 20;
    let job = job_with_servers(STEPS)?;
    let mut run = job.start()?;
    let status = run.wait_until("two ready servers", two_are_ready)?;
    assert!(
        servers(&status).iter().all(|server| {
            server["address"].as_str().is_some_and(|address| address.starts_with("http://127.0.0.1:"))
        })
    );
    wait_for_step(&mut run, 2)?;
    let before = processes_of_servers(&job)?;
    let names: Vec<&str> = before.iter().map(|process| process.name.as_str()).collect();
    assert_eq!(names, ["vllm-0", "vllm-1"]);
    let log = std::fs::read_to_string(job.run_path("logs/vllm-0.log")).context("the log of a server")?;
    // The longest prompt and answer of the job, and one token; the word of the job as it was written.
    for words in [
        "qwen2-untied --seed $(7) '8' --host 127.0.0.1 --port ",
        "--max-model-len 1037 --max-num-seqs 32 --logprobs-mode processed_logprobs --dtype float32 --tensor-parallel-size 1",
        "--enable-scale-out",
    ] {
        ensure!(log.contains(words), "{words}: {log}");
    }

    // One dies, and comes back at its address; what it was working on is generated by the other.
    before[0].signal(Signal::SIGKILL)?;
    let another = |status: &Value| {
        let now = processes_of_servers(&job).unwrap_or_default();
        now.len() == 2 && now[0].pid != before[0].pid && two_are_ready(status)
    };
    run.wait_until("another server in its place", another)?;
    wait_for_step(&mut run, 5)?;

    // The run dies alone. The next one takes over what it left.
    let left = processes_of_servers(&job)?;
    run.signal(Signal::SIGKILL)?;
    run.wait()?;
    let mut run = job.start()?;
    run.wait_until("two ready servers", two_are_ready)?;
    assert_eq!(processes_of_servers(&job)?, left, "they were started anew");
    let ended = run.wait()?;
    ended.expect_code(0);
    ensure!(ended.stdout.contains("worker vllm-1 is still alive and continues"), "{}", ended.stdout);
    ensure!(ended.stdout.contains("2 vLLM servers"), "{}", ended.stdout);
    job.check_every_step_once(u64::try_from(STEPS)?)?;
    job.check_no_panic()?;
    assert_eq!(processes_of_servers(&job)?, [], "servers outlive their run");
    Ok(())
}

#[test]
fn servers_and_their_worker_are_started_where_no_run_does() -> Result<()> {
    const STEPS: i64 = 4;
    let job = job_with_servers(STEPS)?.with("resources.rollouts", 0);
    let mut run = job.start()?;
    run.wait_until("a coordinator", |status| status["step"] == 0)?;
    let (pacs, run_dir) = (program("pacs")?, job.run_path("").display().to_string());
    let (logs, certificates) = (job.path("servers"), job.run_path("certificates"));
    let mut command = Command::new(&pacs);
    command.arg("servers").arg(job.path("job.toml")).arg("--logs").arg(&logs).args(["--name", "host-7"]);
    command.arg("--").arg(&pacs).args(["rollout", "--coordinator", &run_dir, "--name", "rollout-7", "--tls-dir"]);
    let mut host =
        command.arg(certificates).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let status = run.wait_until("two ready servers", two_are_ready);
    let finished = status.and_then(|status| {
        let shown = servers(&status);
        let port = |server: &Value| server["address"].as_str()?.rsplit(':').next()?.parse::<u16>().ok();
        let ports: Vec<u16> = shown.iter().filter_map(port).collect();
        run.wait()?.expect_code(0);
        Ok(ports)
    });
    if finished.is_err() {
        // It would look for its coordinator for minutes. It ends its servers when it is asked to.
        kill(Pid::from_raw(i32::try_from(host.id())?), Signal::SIGTERM)?;
    }
    let (ports, code) = (finished?, host.wait()?.code());
    assert_eq!((ports.len(), code), (2, Some(0)), "the worker was dismissed");
    for port in ports {
        ensure!(!healthy(port), "a server at {port} outlives its worker");
    }
    for index in 0..2 {
        let log = std::fs::read_to_string(logs.join(format!("host-7-{index}.log")))?;
        ensure!(log.contains("--max-num-seqs 32"), "{log}");
    }
    job.check_every_step_once(u64::try_from(STEPS)?)
}

#[test]
fn servers_of_a_job_with_adapters_load_whole_models() -> Result<()> {
    const STEPS: i64 = 3;
    const TENSOR: &str = "model.layers.0.self_attn.q_proj.weight";
    let runtime = tokio::runtime::Runtime::new()?;
    let stub = runtime.block_on(VllmStub::start(StubState { reads: TENSOR, ..StubState::default() }))?;
    let lora = toml::Table::from_iter([("rank".to_owned(), toml::Value::from(4))]);
    let job = job(&[stub.url()], STEPS, of_stubs())?.with("model.lora", lora).with("optimizer.learning_rate", 1e-3);
    // The last version is generated with, too.
    let job = job.with("evaluation.after", true);
    job.start()?.wait()?.expect_code(0);
    job.check_every_step_once(u64::try_from(STEPS)?)?;
    let loaded = stub.state().loaded.clone();
    let base = first_weight(&root().join("tests/golden/models/qwen2-tied"), TENSOR)?;
    assert_eq!(loaded.first(), Some(&base), "adapters begin with the model as it is");
    // Each version is computed from the base, so the last one is what the learner exports, and not a sum over versions.
    let exported = first_weight(&job.run_path("checkpoints/step-000003/model"), TENSOR)?;
    let last = *loaded.last().context("a version")?;
    ensure!((last - exported).abs() < 1e-6 && last != base, "{loaded:?}, and {exported} was exported");
    let mut distinct: Vec<u32> = loaded.iter().map(|weight| weight.to_bits()).collect();
    distinct.dedup();
    ensure!(distinct.len() >= 2, "{loaded:?}");
    Ok(())
}

#[test]
fn each_engine_refuses_the_worker_of_the_other() -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    let stub = runtime.block_on(VllmStub::start(StubState::default()))?;
    for (vllm, binary) in [(true, "pacs-worker"), (false, "pacs")] {
        let job = if vllm { job(&[stub.url()], 1, of_stubs())? } else { Job::tiny()? };
        let job = job.with("resources.rollouts", 0);
        let mut run = job.start()?;
        run.wait_until("a coordinator", |status| status["step"] == 0)?;
        let job_dir = job.run_path("").display().to_string();
        let mut command = Command::new(program(binary)?);
        command.args(["rollout", "--coordinator", &job_dir, "--name", "rollout-9"]);
        if !vllm {
            command.args(["--endpoint", &stub.url()]);
        }
        let certificates = job.run_path("certificates");
        let output = command.arg("--tls-dir").arg(certificates).stdin(Stdio::null()).output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(78), "{said}");
        ensure!(said.contains("its rollout workers are started as"), "{said}");
    }
    Ok(())
}

/// A real server; dropping it kills it.
struct Server {
    child: Child,
    port: u16,
    command: Vec<String>,
}

impl Server {
    fn start(program: &str, model: &str, more: &[&str]) -> Result<Self> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let text = port.to_string();
        let fixed = [program, "serve", model, "--host", "127.0.0.1", "--port", &text, "--dtype", "float32"];
        let flags = ["--enforce-eager", "--enable-scale-out", "--max-num-seqs", "64"];
        let command: Vec<String> = [&fixed[..], &flags, more].concat().into_iter().map(str::to_owned).collect();
        let child = Self::spawn(&command)?;
        let mut server = Self { child, port, command };
        server.wait()?;
        Ok(server)
    }

    fn spawn(command: &[String]) -> Result<Child> {
        let mut server = Command::new(&command[0]);
        server.args(&command[1..]).env("VLLM_SERVER_DEV_MODE", "1").env("VLLM_CPU_KVCACHE_SPACE", "1");
        server.env("HF_HUB_OFFLINE", "1").env("VLLM_NO_USAGE_STATS", "1");
        server.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        server.process_group(0);
        server.spawn().with_context(|| format!("start {}", command[0]))
    }

    fn wait(&mut self) -> Result<()> {
        let started = Instant::now();
        while started.elapsed() < SERVER_DEADLINE {
            if let Some(status) = self.child.try_wait()? {
                bail!("{:?} ended: {status}", self.command);
            }
            if healthy(self.port) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(500));
        }
        bail!("{:?} does not answer", self.command)
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn kill(&mut self) -> Result<()> {
        // With its engine, which is a process of its own.
        let group = Pid::from_raw(i32::try_from(self.child.id())?);
        killpg(group, Signal::SIGKILL).context("kill the server")?;
        self.child.wait()?;
        Ok(())
    }

    fn restart(&mut self) -> Result<()> {
        self.child = Self::spawn(&self.command)?;
        self.wait()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

fn healthy(port: u16) -> bool {
    use std::io::{Read, Write};
    let Ok(mut stream) = std::net::TcpStream::connect(("127.0.0.1", port)) else { return false };
    let asked = stream.set_read_timeout(Some(Duration::from_secs(5))).is_ok()
        && stream.write_all(b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").is_ok();
    let mut head = [0; 12];
    asked && stream.read_exact(&mut head).is_ok() && head.ends_with(b"200")
}

/// The largest error of each version's probe, by the debug log of the rollout workers (nats per token).
fn probe_errors(job: &Job) -> Result<BTreeMap<u64, f64>> {
    let mut errors = BTreeMap::new();
    for (_, text) in job.logs()?.into_iter().filter(|(name, _)| name.starts_with("rollout-0")) {
        for line in text.lines().filter(|line| line.contains("probe scored")) {
            let field = |name: &str| {
                let rest = line.split_once(name)?.1;
                rest.split_whitespace().next()
            };
            let version = field(" to=version ").context("a version")?.parse::<u64>()?;
            let error = field(" error=").context("an error")?.parse::<f64>()?;
            let largest = errors.entry(version).or_insert(error);
            *largest = error.max(*largest);
        }
    }
    Ok(errors)
}

#[test]
fn a_run_on_a_real_server_agrees_with_the_learner() -> Result<()> {
    const STEPS: i64 = 8;
    let Ok(vllm) = std::env::var("PACS_TEST_VLLM") else {
        eprintln!("skipped: PACS_TEST_VLLM does not name a `vllm` program; the stub is all that was tested");
        return Ok(());
    };
    let folder = tempfile::tempdir()?;
    let model = folder.path().join("blank").display().to_string();
    let untied = folder.path().join("untied").display().to_string();
    for (binary, arguments) in
        [("pacs-worker", &["create", &model][..]), ("pacs", &["model", "untie", &model, &untied][..])]
    {
        let done = Command::new(program(binary)?).args(arguments).output()?;
        ensure!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }
    let mut server = Server::start(&vllm, &model, &["--max-model-len", "200"])?;
    let untied_head = ("untied_head", true.into());
    let job = job(&[server.url()], STEPS, untied_head)?.with("model.path", model).with("model.precision", "float32");
    let job = job.with("data.max_prompt_tokens", 128).with("resources.threads", 1);
    let mut run = job.start_with_debug_log()?;
    // The head that this server computes with would never change.
    let refused = |status: &Value| {
        servers(status).iter().any(|server| server["error"].as_str().is_some_and(|error| error.contains("model untie")))
    };
    run.wait_until("a refusal of the tied head", refused)?;
    server.kill()?;
    server.command[2] = untied;
    server.restart()?;
    wait_for_step(&mut run, 2)?;
    run.kill_worker("rollout-0")?;
    wait_for_step(&mut run, 4)?;
    server.kill()?;
    server.restart()?;
    run.wait()?.expect_code(0);
    job.check_every_step_once(u64::try_from(STEPS)?)?;
    let metrics = job.json_lines("metrics.jsonl")?;
    let compared: Vec<f64> = metrics.iter().filter_map(|line| line["logprob_mismatch_mean"].as_f64()).collect();
    ensure!(!compared.is_empty(), "nothing was compared");
    // Two implementations in float32, each with its own order of additions.
    ensure!(compared.iter().all(|mismatch| *mismatch < 1e-3), "log-probs disagree: {compared:?}");
    println!("mean log-prob mismatch of {} steps: {compared:?}", compared.len());
    let probed = probe_errors(&job)?;
    println!("error of each version's probe: {probed:?}");
    // The last version is not generated with, so nobody waits for it.
    for version in 1..u64::try_from(STEPS)? {
        let error = probed.get(&version).with_context(|| format!("version {version} was not probed: {probed:?}"))?;
        ensure!(*error < 1e-4, "the server does not compute with version {version}: {probed:?}");
    }
    Ok(())
}
