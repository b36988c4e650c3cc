//! `pacs runs`: lists this user's live and past runs.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use clap::Args;
use pacs_coordinator::{CoordinatorRecord, Recorded};
use pacs_protocol::v1::GetMetricsRequest;
use pacs_runtime::Exit;
use serde_json::{Value, json};

use crate::client::block_on;
use crate::failure::Failure;
use crate::format::{count, seconds, table};
use crate::live::{self, LiveRun};
use crate::{ending, output, target};

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pacs runs                                     runs that live, then those that are over
  pacs runs --live
  pacs runs --json | jq -r '.runs[] | select(.live) | .address'

Runs of this user on this machine, and those in `runs` here. Of a run on another machine nothing is known but that it was started; its
coordinator answers to `pacs status HOST:PORT`.")]
pub(crate) struct Runs {
    /// List live runs only.
    #[arg(long)]
    pub(crate) live: bool,
    /// Print one JSON object, with all of what is known of each run.
    #[arg(long)]
    pub(crate) json: bool,
}

/// A row of the table: a live or past run.
#[derive(Debug)]
struct Row {
    run_id: String,
    job: String,
    run_dir: PathBuf,
    address: Option<String>,
    host: String,
    /// Unix time of the start in seconds; `None` where only the folder is known.
    started: Option<u64>,
    /// One word: how a past run ended, or where a live one is.
    state: String,
    steps: Option<(u64, Option<u64>)>,
}

pub(crate) fn run(arguments: &Runs) -> Result<Exit, Failure> {
    let (here, elsewhere): (Vec<LiveRun>, Vec<LiveRun>) = live::all().into_iter().partition(LiveRun::is_here);
    let found = block_on(async { Ok(target::survey(here).await) })?;
    let mut rows: Vec<Row> = found.into_iter().map(|found| living(found.run, found.steps)).collect();
    rows.extend(elsewhere.into_iter().map(|run| Row { state: "elsewhere".to_owned(), ..living(run, None) }));
    if !arguments.live {
        let past = past(&rows);
        rows.extend(past);
    }
    if arguments.json {
        output::json(format_args!("{:#}", as_json(&rows)));
    } else if rows.is_empty() {
        output::line("no run of yours is known here; `pacs run JOB.toml` starts one");
    } else {
        output::text(as_text(&rows));
    }
    Ok(Exit::Done)
}

fn living(run: LiveRun, steps: Option<(u64, u64)>) -> Row {
    Row {
        state: if steps.is_some() { "lives" } else { "does not answer" }.to_owned(),
        run_id: run.run_id,
        job: run.job,
        run_dir: run.run_dir,
        address: Some(run.address),
        host: run.host,
        started: Some(run.started),
        steps: steps.map(|(step, total)| (step, Some(total))),
    }
}

/// Returns past runs, newest first: those this user started on this machine, and those in `./runs`.
fn past(live: &[Row]) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    // The newest run in a folder is the one that is there.
    let known = live::past().into_iter().rev().map(|run| (run.run_dir, Some(run.started)));
    let here = std::fs::read_dir("runs").into_iter().flatten().flatten();
    let here = here.filter_map(|entry| entry.path().canonicalize().ok()).map(|folder| (folder, None));
    for (folder, started) in known.chain(here) {
        let is_listed = live.iter().chain(&rows).any(|row| row.run_dir == folder);
        // Runs whose folder was removed are left out, because nothing of them can be inspected.
        if let Some(row) = over(&folder, started).filter(|_| !is_listed) {
            rows.push(row);
        }
    }
    rows.sort_by_key(|row| std::cmp::Reverse(row.started));
    rows
}

fn over(folder: &Path, started: Option<u64>) -> Option<Row> {
    let record = CoordinatorRecord::read(folder).ok()?;
    let request = GetMetricsRequest { names: vec!["reward_mean".to_owned()], most_points: 1, ..Default::default() };
    let metrics = Recorded::new(folder).metrics(&request).unwrap_or_default();
    let step = metrics.series.first().and_then(|series| series.steps.last()).copied().unwrap_or(0);
    let job = folder.join("job.toml");
    let spec = std::fs::read_to_string(&job).ok().and_then(|text| pacs_spec::parse(&text, &job).ok());
    let total = spec.map(|spec| spec.batch.steps);
    // Without an `ending` file (as after a kill) the number of steps decides.
    let finished = || if Some(step) == total { "finished" } else { "over" }.to_owned();
    Some(Row {
        run_id: record.run_id,
        job: record.job,
        run_dir: folder.to_owned(),
        address: None,
        host: record.host,
        started,
        state: ending::read(folder).unwrap_or_else(finished),
        steps: Some((step, total)),
    })
}

fn as_text(rows: &[Row]) -> String {
    let mut lines = vec![["run", "job", "state", "step", "started", "id", "folder"].map(str::to_owned).to_vec()];
    for row in rows {
        let steps = row.steps.map_or("-".to_owned(), |(step, total)| match total {
            Some(total) => format!("{} of {}", count(step), count(total)),
            None => count(step),
        });
        let id: String = row.run_id.chars().take(8).collect();
        let place = row.address.clone().unwrap_or_else(|| "-".to_owned());
        let started = row.started.map_or("-".to_owned(), ago);
        lines.push(vec![
            place,
            row.job.clone(),
            row.state.clone(),
            steps,
            started,
            id,
            row.run_dir.display().to_string(),
        ]);
    }
    table(&lines)
}

fn ago(time: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    match now.saturating_sub(time) {
        days if days >= 2 * 86_400 => format!("{} days ago", days / 86_400),
        short => format!("{} ago", seconds(short as f64)),
    }
}

fn as_json(rows: &[Row]) -> Value {
    let row = |row: &Row| {
        json!({
            "run_id": row.run_id,
            "job": row.job,
            "run_dir": row.run_dir,
            "address": row.address,
            "host": row.host,
            "started": row.started,
            "live": row.state == "lives",
            "state": row.state,
            "step": row.steps.map(|(step, _)| step),
            "total_steps": row.steps.and_then(|(_, total)| total),
        })
    };
    json!({"runs": rows.iter().map(row).collect::<Vec<_>>()})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_is_over_is_known_by_its_folder() {
        let folder = tempfile::tempdir().expect("a folder");
        let folder = folder.path();
        assert!(over(folder, None).is_none(), "no run");
        let record = r#"{"address": "h:1", "host": "h", "pid": 1, "job": "tiny", "run_id": "abcdef0123", "starts": 1}"#;
        std::fs::write(folder.join(CoordinatorRecord::FILE), record).expect("written");
        std::fs::write(
            folder.join("metrics.jsonl"),
            "{\"step\":1,\"reward_mean\":0}\n{\"step\":2,\"reward_mean\":1}\n",
        )
        .expect("written");
        let row = over(folder, Some(5)).expect("a run");
        assert_eq!((row.job.as_str(), row.state.as_str(), row.steps), ("tiny", "over", Some((2, None))));
        let job = "name = 'tiny'\nmodel.path = 'm'\ndata.train.path = 'd.jsonl'\ndata.evaluation.path = 'e.jsonl'\nbatch.steps = 2\n";
        std::fs::write(folder.join("job.toml"), job).expect("written");
        assert_eq!(over(folder, None).expect("a run").state, "finished");
        std::fs::write(folder.join("ending"), "stopped\n").expect("written");
        let row = over(folder, Some(5)).expect("a run");
        assert_eq!(row.state, "stopped");
        let text = as_text(&[row]);
        assert!(text.contains("tiny  stopped  2 of 2") && text.contains("abcdef01  "), "{text}");
    }
}
