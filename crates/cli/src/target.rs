//! Resolves which run a command means: an address, a run folder, a run id or its first digits, a job's name, or none.

use std::path::{Path, PathBuf};

use anyhow::anyhow;
use pacs_coordinator::CoordinatorRecord;
use pacs_protocol::v1::GetStatusRequest;
use pacs_runtime::Exit;
use serde_json::{Value, json};

use crate::client::{block_on, connect, in_time};
use crate::failure::Failure;
use crate::format::{count, table};
use crate::live::{self, LiveRun};

/// Fewest digits that name a run by the beginning of its id, if that is unambiguous.
const FEWEST_DIGITS: usize = 4;

/// How to reach the coordinator of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    /// Address to dial, host:port.
    pub(crate) address: String,
    /// Folder of the run's certificates; `None` when the run folder is unknown or names none.
    pub(crate) tls_dir: Option<PathBuf>,
}

impl Target {
    fn of_run(run: &LiveRun) -> Self {
        let record = CoordinatorRecord::read(&run.run_dir).ok();
        Self { address: run.address.clone(), tls_dir: record.and_then(|record| record.tls_dir(&run.run_dir)) }
    }
}

/// The outcome of resolving a target.
pub(crate) enum Choice {
    One(Target),
    /// No target was named and several runs are live.
    Several(Vec<Found>),
}

/// A live run of this machine, for the table that is shown when none was named.
pub(crate) struct Found {
    pub(crate) run: LiveRun,
    /// Finished and total steps; `None` when its coordinator does not answer.
    pub(crate) steps: Option<(u64, u64)>,
}

/// Resolves `target`, and fails where several live runs match.
pub(crate) fn one(target: Option<&str>) -> Result<Target, Failure> {
    match choose(target)? {
        Choice::One(target) => Ok(target),
        Choice::Several(found) => Err(ambiguous(&found)),
    }
}

/// Resolves `target`: an address, a run folder, the id of a live run or its first digits, or a job's name. Without a target it
/// is the only live run of this user on this machine.
pub(crate) fn choose(target: Option<&str>) -> Result<Choice, Failure> {
    match target {
        Some(target) => named(target, live::all()).map(Choice::One),
        None => {
            let (here, elsewhere): (Vec<LiveRun>, Vec<LiveRun>) = live::all().into_iter().partition(LiveRun::is_here);
            match here.as_slice() {
                [] => Err(none(&elsewhere)),
                [one] => Ok(Choice::One(Target::of_run(one))),
                _ => block_on(async { Ok(Choice::Several(survey(here).await)) }),
            }
        }
    }
}

/// Fails because no run is live on this machine. Runs `elsewhere` may be live; the hint lists them, because they can be named.
fn none(elsewhere: &[LiveRun]) -> Failure {
    let listed: Vec<String> = elsewhere.iter().map(|run| format!("{} on {}", run.job, run.host)).collect();
    let error = match listed.as_slice() {
        [] => anyhow!("no run of yours is live on this machine"),
        _ => anyhow!("no run of yours is live on this machine; listed are {}", listed.join(", ")),
    };
    Failure::with_exit(Exit::Usage, error)
        .doing("choose a run")
        .hint("`pacs run JOB.toml` starts one; one elsewhere is named by its address (host:port), folder or job")
}

/// Fails because several runs are live and none was named.
pub(crate) fn ambiguous(found: &[Found]) -> Failure {
    let error = anyhow!("{} runs of yours are live on this machine:\n{}", found.len(), as_text(found).trim_end());
    Failure::with_exit(Exit::Usage, error)
        .doing("choose a run")
        .hint("name one by its folder, address or job, or by the first digits of its id")
}

fn named(target: &str, live: Vec<LiveRun>) -> Result<Target, Failure> {
    let doing = || format!("find the coordinator `{target}`");
    let folder = Path::new(target);
    let of_folder = folder.is_dir().then(|| CoordinatorRecord::read(folder));
    if let Some(Ok(record)) = of_folder {
        return Ok(Target { tls_dir: record.tls_dir(folder), address: record.address });
    }
    if target.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok()) {
        // If one of this user's runs listens at that address, its folder names the certificates to use.
        let listens = |run: &&LiveRun| run.address == target;
        let unknown = || Target { address: target.to_owned(), tls_dir: None };
        return Ok(live.iter().find(listens).map_or_else(unknown, Target::of_run));
    }
    let is_meant = |run: &LiveRun| {
        run.job == target || (target.len() >= FEWEST_DIGITS && run.run_id.starts_with(&target.to_ascii_lowercase()))
    };
    let meant: Vec<LiveRun> = live.into_iter().filter(is_meant).collect();
    match (meant.as_slice(), of_folder) {
        ([run], _) => Ok(Target::of_run(run)),
        ([], Some(Err(error))) => Err(Failure::config(error)
            .doing(format!("read `{}`", folder.join(CoordinatorRecord::FILE).display()))
            .hint("the folder of a run is runs/<name of the job>, or what --run-dir said")),
        ([], _) => {
            let error = anyhow!("it is neither host:port, nor the folder of a run, nor the id or job of a live one");
            Err(Failure::config(error).doing(doing()))
        }
        (several, _) => {
            let found: Vec<Found> = several.iter().cloned().map(|run| Found { run, steps: None }).collect();
            let error = anyhow!("{} runs are called so:\n{}", found.len(), as_text(&found).trim_end());
            let failure = Failure::with_exit(Exit::Usage, error).doing(doing());
            Err(failure.hint("name one by its folder or address, or by the first digits of its id"))
        }
    }
}

/// Asks all of these runs concurrently for their status.
pub(crate) async fn survey(runs: Vec<LiveRun>) -> Vec<Found> {
    let asked: Vec<_> = runs
        .into_iter()
        .map(|run| {
            tokio::spawn(async move {
                let status = async {
                    let mut client = connect(&Target::of_run(&run)).await?;
                    in_time(client.get_status(GetStatusRequest {})).await
                };
                // A run that does not answer is still listed, because its process is alive.
                let steps = status.await.ok().map(|status| (status.step, status.total_steps));
                Found { run, steps }
            })
        })
        .collect();
    let mut found = Vec::new();
    for task in asked {
        found.extend(task.await.ok());
    }
    found
}

/// Formats the runs as a table.
pub(crate) fn as_text(found: &[Found]) -> String {
    let mut rows = vec![["job", "step", "address", "id", "folder"].map(str::to_owned).to_vec()];
    rows.extend(found.iter().map(|Found { run, steps }| {
        let steps = steps.map_or("-".to_owned(), |(step, total)| format!("{} of {}", count(step), count(total)));
        let id: String = run.run_id.chars().take(2 * FEWEST_DIGITS).collect();
        vec![run.job.clone(), steps, run.address.clone(), id, run.run_dir.display().to_string()]
    }));
    table(&rows)
}

/// Formats the runs as JSON, for scripts.
pub(crate) fn as_json(found: &[Found]) -> Value {
    let runs = found.iter().map(|Found { run, steps }| {
        json!({
            "run_id": run.run_id,
            "job": run.job,
            "run_dir": run.run_dir,
            "address": run.address,
            "host": run.host,
            "pid": run.pid,
            "started": run.started,
            "step": steps.map(|(step, _)| step),
            "total_steps": steps.map(|(_, total)| total),
        })
    });
    json!({"runs": runs.collect::<Vec<_>>()})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(job: &str, run_id: &str, address: &str) -> LiveRun {
        LiveRun {
            run_id: run_id.into(),
            job: job.into(),
            run_dir: format!("/runs/{job}").into(),
            address: address.into(),
            host: "node-1".into(),
            pid: 7,
            began: 1,
            started: 1,
        }
    }

    #[test]
    fn targets_are_addresses_folders_ids_and_jobs() {
        let live = || vec![run("one", "abcd01", "h:1"), run("two", "abcd02", "h:2"), run("two", "ff0003", "h:3")];
        let address = |target: &str| named(target, live()).map(|target| target.address);
        assert_eq!(address("node-3:7700").expect("an address"), "node-3:7700");
        assert_eq!(address("one").expect("a job"), "h:1");
        assert_eq!(address("abcd02").expect("an id"), "h:2");
        assert_eq!(address("FF00").expect("the beginning of an id"), "h:3");
        for (target, exit, said) in [
            ("two", Exit::Usage, "2 runs are called so"),
            ("abcd", Exit::Usage, "2 runs are called so"),
            ("abc", Exit::Config, "neither host:port"),
            ("runs/no-such", Exit::Config, "neither host:port"),
        ] {
            let failure = address(target).expect_err(target);
            assert!(failure.exit == exit && failure.to_string().contains(said), "{failure}");
        }

        let dir = tempfile::tempdir().expect("a temporary folder");
        let folder = dir.path().display().to_string();
        assert!(address(&folder).expect_err("no run").to_string().contains("coordinator.json"));
        let record = r#"{"address": "10.0.0.1:9", "host": "h", "pid": 1, "job": "j", "run_id": "", "starts": 1}"#;
        std::fs::write(dir.path().join(CoordinatorRecord::FILE), record).expect("written");
        assert_eq!(address(&folder).expect("a run"), "10.0.0.1:9");
    }

    #[test]
    fn the_run_folder_names_the_certificates() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let live = LiveRun { run_dir: dir.path().into(), ..run("one", "abcd01", "127.0.0.1:9") };
        for (written, expected) in [
            ("\"certificates\"", Some(dir.path().join("certificates"))),
            ("\"/etc/pacs\"", Some("/etc/pacs".into())),
            ("null", None),
        ] {
            let record = format!(
                r#"{{"address": "127.0.0.1:9", "host": "h", "pid": 1, "job": "one", "starts": 1, "tls_dir": {written}}}"#
            );
            std::fs::write(dir.path().join(CoordinatorRecord::FILE), record).expect("written");
            for target in ["one", "abcd", "127.0.0.1:9", &dir.path().display().to_string()] {
                let found = named(target, vec![live.clone()]).expect("found");
                assert_eq!((found.address.as_str(), &found.tls_dir), ("127.0.0.1:9", &expected), "{target}");
            }
        }
        assert_eq!(named("127.0.0.1:8", vec![live]).expect("an address").tls_dir, None);
    }

    #[test]
    fn runs_elsewhere_have_to_be_named() {
        let failure = none(&[run("one", "abcd01", "h:1")]);
        assert_eq!(failure.exit, Exit::Usage);
        assert!(failure.to_string().contains("is live on this machine; listed are one on node-1"), "{failure}");
    }

    #[test]
    fn several_runs_are_listed() {
        let runs =
            [(run("one", &"ab".repeat(16), "h:1"), Some((3, 1000))), (run("two", &"cd".repeat(16), "h:22"), None)];
        let found = runs.map(|(run, steps)| Found { run, steps });
        expect_test::expect![[r#"
            error: failed to choose a run: 2 runs of yours are live on this machine:
            job  step        address  id        folder
            one  3 of 1 000  h:1      abababab  /runs/one
            two  -           h:22     cdcdcdcd  /runs/two
            hint: name one by its folder, address or job, or by the first digits of its id"#]]
        .assert_eq(&ambiguous(&found).to_string());
        let json = as_json(&found);
        assert_eq!((&json["runs"][0]["step"], &json["runs"][1]["step"]), (&json!(3), &Value::Null));
    }
}
