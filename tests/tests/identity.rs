//! Runs on one machine are distinguished by the run id, which workers carry, and not by ports or worker names.

use std::fs;
use std::io::ErrorKind;
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::process::Output;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use pacs_tests::{Job, Run, RunProcess};

/// Deadline of every wait in this file.
const DEADLINE: Duration = Duration::from_secs(240);

const WORKERS: [&str; 3] = ["learner-0", "rollout-0", "verifier-0"];

/// Makes a job with enough steps to be disturbed before its end.
fn job(name: &str, steps: u64) -> Result<Job> {
    let job = Job::tiny()?.named(name).with("batch.steps", i64::try_from(steps)?).with("checkpoint.every_steps", 5);
    Ok(job.with("evaluation.before", false).with("evaluation.after", false))
}

fn wait_for(what: &str, mut found: impl FnMut() -> Result<bool>) -> Result<()> {
    let began = Instant::now();
    while !found()? {
        ensure!(began.elapsed() < DEADLINE, "no {what} within {} s", DEADLINE.as_secs());
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn wait_for_step(run: &mut Run, step: u64) -> Result<()> {
    run.wait_until(&format!("step {step}"), |status| status["step"].as_u64() >= Some(step)).map(drop)
}

/// Returns a port that is free at the moment.
fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

fn lines_with<'a>(text: &'a str, wanted: &'a str) -> Vec<&'a str> {
    text.lines().filter(|line| line.contains(wanted)).collect()
}

/// Starts the run of a job and kills `pacs run` after two steps; returns its workers, which survive.
fn orphans(job: &Job, listen: &str) -> Result<Vec<RunProcess>> {
    orphans_with(job, &["--listen", listen])
}

fn orphans_with(job: &Job, options: &[&str]) -> Result<Vec<RunProcess>> {
    let mut run = job.start_with(options)?;
    wait_for_step(&mut run, 2)?;
    let workers = job.workers()?;
    ensure!(workers.iter().map(|worker| worker.name.as_str()).eq(WORKERS), "{workers:?}");
    run.signal(Signal::SIGKILL)?;
    run.wait()?;
    Ok(workers)
}

/// Waits until each worker of `ours` was refused as a stranger by the run `theirs`.
fn wait_for_refusals(ours: &Job, theirs: &Job) -> Result<()> {
    wait_for("id of the other run", || Ok(theirs.run_id().is_ok()))?;
    let (our_id, their_id) = (ours.run_id()?, theirs.run_id()?);
    let said_by_coordinator = format!("run {our_id} was refused: this is run {their_id}");
    wait_for("word of the strangers in the other run's log", || {
        Ok(theirs.logs()?.get("coordinator.log").is_some_and(|log| log.contains(&said_by_coordinator)))
    })?;
    for worker in WORKERS {
        wait_for(&format!("word of the other run in the log of {worker}"), || {
            Ok(ours.logs()?.get(&format!("{worker}.log")).is_some_and(|log| log.contains(&their_id)))
        })?;
    }
    Ok(())
}

/// Checks that the run `stranger` did not affect that of `job`, and that each side logged it once at most.
fn check_undisturbed(job: &Job, stranger: &Job, steps: u64) -> Result<()> {
    job.check_every_step_once(steps)?;
    job.check_no_panic()?;
    let logs = job.logs()?;
    for (name, log) in &logs {
        ensure!(lines_with(log, "was replaced").is_empty(), "{name}: a worker was replaced:\n{log}");
    }
    let complaints = lines_with(&logs["coordinator.log"], &stranger.run_id()?).len();
    ensure!(complaints <= 1, "{complaints} lines about one stranger");
    for worker in WORKERS {
        let log = &stranger.logs()?[&format!("{worker}.log")];
        let complaints = lines_with(log, "looking for its own run").len();
        ensure!(complaints == 1, "{complaints} lines about one other run in the log of {worker}:\n{log}");
    }
    Ok(())
}

#[test]
fn the_workers_of_a_killed_run_do_not_join_another_on_its_port() -> Result<()> {
    // Long enough that the second run is still alive when the last worker of the first has asked it.
    const STEPS: u64 = 60;
    let (first, second) = (job("first", 12)?, job("second", STEPS)?);
    let listen = format!("127.0.0.1:{}", free_port()?);
    // Plain text, so that only the run id tells the runs apart.
    let options = ["--listen", &listen, "--plaintext"];
    let workers = orphans_with(&first, &options)?;

    let run = second.start_with(&options)?;
    wait_for_refusals(&first, &second)?;
    run.wait()?.expect_code(0);
    check_undisturbed(&second, &first, STEPS)?;
    assert_eq!(first.workers()?, workers, "they wait for their own run");

    let ended = first.start_with(&options)?.wait()?;
    ended.expect_code(0);
    for worker in WORKERS {
        assert!(ended.stdout.contains(&format!("worker {worker} is still alive")), "{}", ended.stdout);
    }
    first.check_every_step_once(12)?;
    first.check_no_panic()
}

/// With TLS the other run on the port has another authority, so workers of the first close the connection before they send a
/// call. What that run claims to be does not matter; it could be an attacker's.
#[test]
fn the_workers_of_a_killed_run_ask_nothing_of_a_coordinator_that_they_cannot_know() -> Result<()> {
    const STEPS: u64 = 60;
    let (first, second) = (job("first", 12)?, job("second", STEPS)?);
    let listen = format!("127.0.0.1:{}", free_port()?);
    let workers = orphans(&first, &listen)?;
    // The second run claims the id of the first, as an attacker could who knows it.
    fs::create_dir(second.run_path(""))?;
    fs::copy(first.run_path("run_id"), second.run_path("run_id"))?;

    let run = second.start_with(&["--listen", &listen])?;
    wait_for("strangers who are turned away", || {
        // Refusals are logged at most once per interval.
        let turned_away = |log: &String| !lines_with(log, "was turned away").is_empty();
        Ok(second.run_path("logs").exists() && second.logs()?.get("coordinator.log").is_some_and(turned_away))
    })?;
    run.wait()?.expect_code(0);
    second.check_every_step_once(STEPS)?;
    for (name, log) in second.logs()? {
        ensure!(
            lines_with(&log, "is held").is_empty() && lines_with(&log, "was replaced").is_empty(),
            "{name}:\n{log}"
        );
    }
    assert_eq!(first.workers()?, workers, "they wait for their own run");

    let ended = first.start_with(&["--listen", &listen])?.wait()?;
    ended.expect_code(0);
    for worker in WORKERS {
        assert!(ended.stdout.contains(&format!("worker {worker} is still alive")), "{}", ended.stdout);
    }
    first.check_every_step_once(12)?;
    assert!(!first.run_path("certificates").exists(), "no key stays of a run that has ended");
    first.check_no_panic()
}

/// Without a run's certificates it cannot be read or stopped through its port, in plain text or with other certificates. Its user's
/// commands find them in the run folder.
#[test]
fn only_who_can_read_the_run_folder_can_command_the_run() -> Result<()> {
    // No periodic checkpoints, so that there is always something to save on request.
    let job = job("closed", 100_000)?.with("checkpoint.every_steps", 0);
    let mut run = job.start()?;
    wait_for_step(&mut run, 1)?;
    let mode = |name: &str| Ok::<_, anyhow::Error>(fs::metadata(job.run_path(name))?.permissions().mode() & 0o777);
    assert_eq!((mode("")?, mode("certificates")?, mode("certificates/operator/tls.key")?), (0o700, 0o700, 0o600));
    let record: serde_json::Value = serde_json::from_slice(&fs::read(job.run_path("coordinator.json"))?)?;
    let address = record["address"].as_str().context("an address")?.to_owned();

    let stranger = Job::tiny()?;
    let certs = stranger.path("certs").display().to_string();
    ensure!(pacs(&stranger, &["certs", &certs])?.status.success(), "no certificates");
    for (how, folder) in [("in plain text", None), ("with other certificates", Some(&certs))] {
        for command in ["status", "pause", "stop"] {
            let mut asked = stranger.command("pacs")?;
            asked
                .args([command, &address])
                .env_remove("PACS_TLS_DIR")
                .envs(folder.map(|folder| ("PACS_TLS_DIR", folder)));
            let output = asked.output()?;
            assert!(!output.status.success(), "{command} {how}: {}", String::from_utf8_lossy(&output.stdout));
        }
    }
    let folder = job.run_path("").display().to_string();
    for arguments in [
        &["status"][..],
        &["status", &address],
        &["status", &folder],
        &["pause"],
        &["resume", &address],
        &["checkpoint", "closed"],
        &["set", "learning_rate=1e-6"],
        &["drain", "verifier-0", &folder],
        &["stop", &job.run_id()?[..8]],
    ] {
        operate(&job, arguments)?;
    }
    run.wait()?.expect_code(75);
    assert!(!job.run_path("certificates").exists(), "no key stays of a run that has ended");
    Ok(())
}

/// Workers that had not registered are missing in the journal. If the next start did not adopt them, it would start a second worker
/// of each name and these would never be ended.
#[test]
fn unregistered_workers_are_adopted() -> Result<()> {
    let job = job("young", 4)?;
    let run = job.start()?;
    let workers = || Ok::<_, anyhow::Error>(if job.run_id().is_ok() { job.workers()? } else { Vec::new() });
    wait_for("process of each worker", || Ok(workers()?.iter().map(|worker| worker.name.as_str()).eq(WORKERS)))?;
    run.signal(Signal::SIGKILL)?;
    run.wait()?;
    let young = workers()?;

    let mut run = job.start()?;
    wait_for_step(&mut run, 1)?;
    assert_eq!(workers()?, young, "a worker has a double");
    let ended = run.wait()?;
    ended.expect_code(0);
    for worker in WORKERS {
        assert!(ended.stdout.contains(&format!("worker {worker} is still alive")), "{}", ended.stdout);
    }
    job.check_every_step_once(4)?;
    job.check_no_panic()
}

#[test]
fn a_run_whose_port_was_taken_finds_its_workers_all_the_same() -> Result<()> {
    let (first, second) = (job("first", 12)?, job("second", 40)?);
    let listen = format!("127.0.0.1:{}", free_port()?);
    orphans_with(&first, &["--listen", &listen, "--plaintext"])?;

    let mut other = second.start_with(&["--listen", &listen, "--plaintext"])?;
    wait_for_step(&mut other, 1)?;
    // Paused, so that it is still alive when the first run is done.
    operate(&second, &["pause", &second.run_path("").display().to_string()])?;
    wait_for_refusals(&first, &second)?;

    let ended = first.start_with(&["--plaintext"])?.wait()?;
    ended.expect_code(0);
    for worker in WORKERS {
        assert!(ended.stdout.contains(&format!("worker {worker} is still alive")), "{}", ended.stdout);
    }
    first.check_every_step_once(12)?;
    first.check_no_panic()?;

    ensure!(!other.has_ended()?, "the other run was paused");
    operate(&second, &["resume", &second.run_path("").display().to_string()])?;
    other.wait()?.expect_code(0);
    check_undisturbed(&second, &first, 40)
}

/// The restarted coordinator takes another port, and nothing answers at the old one.
#[test]
fn a_run_that_starts_again_at_another_port_is_found_in_its_folder() -> Result<()> {
    // Below the time after which workers abandon a silent coordinator and look it up in any case.
    const SILENCE: Duration = Duration::from_secs(110);
    // Enough steps to observe the run on a fast machine.
    const STEPS: u64 = 60;
    let job = job("moved", STEPS)?;
    let workers = orphans(&job, &format!("127.0.0.1:{}", free_port()?))?;
    let began = Instant::now();
    let mut run = job.start_with(&["--listen", &format!("127.0.0.1:{}", free_port()?)])?;
    let status = run.wait_until("workers", |status| {
        let there = status["workers"].as_array().map_or(0, Vec::len) == WORKERS.len();
        there && status["step"].as_u64() >= Some(5)
    })?;
    ensure!(began.elapsed() < SILENCE, "it took {} s: {status}", began.elapsed().as_secs());
    assert_eq!(job.workers()?, workers, "they were taken over");
    run.wait()?.expect_code(0);
    job.check_every_step_once(STEPS)?;
    job.check_no_panic()
}

#[test]
fn a_port_that_was_asked_for_and_is_taken_is_an_error() -> Result<()> {
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let listen = taken.local_addr()?.to_string();
    let ended = job("one", 2)?.start_with(&["--listen", &listen])?.wait()?;
    ended.expect_code(75);
    assert!(ended.stderr.contains(&listen) && ended.stderr.contains("without --listen"), "{}", ended.stderr);
    Ok(())
}

/// A second process claims the name of a live worker: it waits until the other one has proved to be alive, and exits.
#[test]
fn a_name_that_is_held_by_a_live_process_is_not_taken_over() -> Result<()> {
    let job = job("names", 100_000)?;
    let mut run = job.start()?;
    wait_for_step(&mut run, 1)?;
    let before = job.workers()?;
    let folder = job.run_path("").canonicalize()?.display().to_string();
    let claims: Vec<(&str, std::process::Child)> = WORKERS
        .into_iter()
        .map(|name| {
            let role = name.split('-').next().unwrap_or(name);
            let program = if role == "verifier" { "pacs" } else { "pacs-worker" };
            let mut command = job.command(program)?;
            command.args([role, "--coordinator", &folder, "--name", name, "--threads", "1", "--tls-dir"]);
            command.arg(job.run_path("certificates"));
            let output = fs::File::create(job.path(&format!("{name}.out")))?;
            Ok((name, command.stdout(output.try_clone()?).stderr(output).spawn()?))
        })
        .collect::<Result<_>>()?;
    for (name, mut claim) in claims {
        let said = || fs::read_to_string(job.path(&format!("{name}.out"))).unwrap_or_default();
        let began = Instant::now();
        let status = loop {
            if let Some(status) = claim.try_wait()? {
                break status;
            }
            if began.elapsed() > DEADLINE {
                claim.kill()?;
                claim.wait()?;
                bail!("the second {name} does not end:\n{}", said());
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        assert_eq!(status.code(), Some(78), "{}", said());
        let said = said();
        let errors = lines_with(&said, "error: failed to");
        assert_eq!(errors.len(), 1, "{said}");
        let holder = before.iter().find(|worker| worker.name == name).context("it was there")?;
        assert!(errors[0].contains(name) && errors[0].contains(&holder.pid.to_string()), "{said}");
    }
    assert_eq!(job.workers()?, before, "nobody was replaced");
    let step = run.status()?.context("a status")?["step"].as_u64().context("a step")?;
    wait_for_step(&mut run, step + 1)?;
    run.signal(Signal::SIGINT)?;
    let ended = run.wait()?;
    ended.expect_code(75);
    assert!(!ended.stdout.contains(" is gone"), "{}", ended.stdout);
    job.check_no_panic()
}

/// A process that looks like a worker of the run but belongs to another run is neither adopted nor killed.
#[test]
fn what_belongs_to_another_run_is_not_ended_with_this_one() -> Result<()> {
    let (first, second) = (job("first", 8)?, job("second", 8)?);
    // Workers of the second run wait for their coordinator throughout the first.
    let theirs = orphans(&second, "127.0.0.1:0")?;
    orphans(&first, "127.0.0.1:0")?;
    first.start()?.wait()?.expect_code(0);
    assert_eq!(first.workers()?, [], "its own have ended with it");
    assert_eq!(second.workers()?, theirs);
    second.start()?.wait()?.expect_code(0);
    second.check_every_step_once(8)
}

/// Another user has taken the port of a coordinator: workers do not send it even their identity.
#[test]
fn workers_do_not_work_for_another_user() -> Result<()> {
    const NOBODY: u32 = 65534;
    if fs::metadata("/proc/self")?.uid() != 0 {
        println!("skipped: only the superuser can start a process of another user");
        return Ok(());
    }
    let thief = job("thief", 2)?;
    let spec = thief.write_spec()?.display().to_string();
    let folder = thief.run_path("");
    fs::create_dir(&folder)?;
    chown(&folder, Some(NOBODY), Some(NOBODY))?;
    fs::set_permissions(thief.path(""), fs::Permissions::from_mode(0o755))?;
    let listen = format!("127.0.0.1:{}", free_port()?);
    let mut command = thief.command("pacs")?;
    command.args(["coordinator", &spec, "--listen", &listen, "--plaintext", "--run-dir"]).arg(&folder);
    let output = fs::File::create(thief.path("thief.out"))?;
    command.stdout(output.try_clone()?).stderr(output).uid(NOBODY).gid(NOBODY);
    let mut coordinator = match command.spawn() {
        Ok(child) => child,
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            println!("skipped: another user cannot start the program here ({error})");
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    let said = || fs::read_to_string(thief.path("thief.out")).unwrap_or_default();
    let serves = wait_for("coordinator of another user", || {
        ensure!(coordinator.try_wait()?.is_none(), "it has ended: {}", said());
        Ok(said().contains("serving "))
    });
    let asked = serves.and_then(|()| {
        let name = ["verifier", "--name", "verifier-0", "--plaintext", "--join-timeout", "1", "--coordinator", &listen];
        pacs(&thief, &name)
    });
    coordinator.kill()?;
    coordinator.wait()?;
    let output = asked?;
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(75), "{error}");
    assert!(error.contains(&format!("a process of user {NOBODY} listens at {listen}")), "{error}");
    assert!(!said().contains("verifier-0"), "{}", said());
    Ok(())
}

/// Runs `pacs` with these arguments, as the job's user.
fn pacs(job: &Job, arguments: &[&str]) -> Result<Output> {
    job.command("pacs")?.args(arguments).output().context("run pacs")
}

fn operate(job: &Job, arguments: &[&str]) -> Result<()> {
    let output = pacs(job, arguments)?;
    ensure!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

#[test]
fn a_command_without_a_target_means_the_one_run_that_lives() -> Result<()> {
    let first = job("first", 100_000)?;
    let state = first.path("state");
    let second = job("second", 100_000)?.listed_in(&state);
    let asked = |arguments: &[&str]| -> Result<(Option<i32>, String, String)> {
        let output = pacs(&first, arguments)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok((output.status.code(), text(&output.stdout), text(&output.stderr)))
    };
    let (code, _, said) = asked(&["status"])?;
    assert!(code == Some(2) && said.contains("no run of yours is live"), "{said}");

    let mut one = first.start_at_any_port()?;
    wait_for_step(&mut one, 1)?;
    let (code, status, said) = asked(&["status"])?;
    assert!(code == Some(0) && status.contains("first in "), "{status}{said}");

    let mut two = second.start_at_any_port()?;
    wait_for_step(&mut two, 1)?;
    let folders = [&first, &second].map(|job| job.run_path("").canonicalize());
    for command in ["status", "pause", "stop"] {
        let (code, _, said) = asked(&[command])?;
        assert_eq!(code, Some(2), "{said}");
        for (name, folder) in ["first", "second"].iter().zip(&folders) {
            let folder = folder.as_ref().map_err(|error| anyhow::anyhow!("{error}"))?.display().to_string();
            assert!(said.lines().any(|line| line.starts_with(name) && line.contains(&folder)), "{said}");
        }
    }
    let (code, json, _) = asked(&["status", "--json"])?;
    let json: serde_json::Value = serde_json::from_str(&json)?;
    assert_eq!(code, Some(2));
    assert!(
        json["runs"].as_array().is_some_and(|runs| runs.len() == 2 && runs[0]["step"].as_u64() >= Some(1)),
        "{json}"
    );

    let id = second.run_id()?;
    for target in ["second", &id[..8]] {
        let (code, status, said) = asked(&["status", target])?;
        assert!(code == Some(0) && status.contains("second in "), "{status}{said}");
    }
    // After SIGKILL the registry entry is stale, and must not be listed as live.
    one.signal(Signal::SIGKILL)?;
    one.wait()?;
    let (code, status, said) = asked(&["status"])?;
    assert!(code == Some(0) && status.contains("second in "), "{status}{said}");
    let (code, _, said) = asked(&["stop"])?;
    assert_eq!(code, Some(0), "{said}");
    two.wait()?.expect_code(75);
    let (code, _, said) = asked(&["status"])?;
    assert!(code == Some(2) && said.contains("no run of yours is live"), "{said}");
    Ok(())
}

#[test]
fn a_coordinator_that_is_meant_for_another_run_does_not_touch_the_folder() -> Result<()> {
    let job = job("one", 2)?;
    let spec = job.write_spec()?.display().to_string();
    let folder = job.run_path("").display().to_string();
    let id = String::from_utf8(pacs(&job, &["run-id", &folder])?.stdout)?.trim().to_owned();
    assert_eq!(job.run_id()?, id);
    assert_eq!(String::from_utf8(pacs(&job, &["run-id", &folder])?.stdout)?.trim(), id, "made once");
    let other = "f".repeat(32);
    let output = job
        .command("pacs")?
        .args(["coordinator", &spec, "--run-dir", &folder, "--listen", "127.0.0.1:0", "--plaintext"])
        .env("PACS_RUN_ID", &other)
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(78), "{said}");
    assert!(said.contains(&id) && said.contains(&other), "{said}");
    assert!(!job.run_path("coordinator.json").exists(), "it has not begun to work there");
    Ok(())
}
