//! `pacs watch`: everything that a run measures, from its beginning on, as lines for another program.

use std::collections::BTreeMap;

use anyhow::anyhow;
use clap::Args;
use pacs_dashboard::json;
use pacs_protocol::v1;
use pacs_protocol::v1::watch_response::Event;
use pacs_runtime::{Exit, harmless, harmless_json};
use serde_json::{Value, json as value};

use super::{Looked, Source};
use crate::client::{block_on, in_time};
use crate::failure::Failure;
use crate::output;

/// Steps asked for at once, so that each is a point of its own.
const PAGE: u64 = 1000;
/// Past events of a live run that may be newer than its metrics; the coordinator keeps no more.
const PAST: u32 = 512;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pacs watch                            the run on this machine, until it ends
  pacs watch runs/demo | jq -c 'select(.event == \"step\") | [.fields.step, .fields.metrics.reward_mean]'
  pacs watch runs/demo --after 120      without the steps that the reader has
  pacs watch runs/over                  a run that is over: its steps and evaluations, then the end

Each line is a JSON object {number, time, event, fields}. The first is `run`; then come the steps and evaluations so far, with number
0, and then the events of a live run as they happen. deploy/trackers/follow.py reads this, for TensorBoard, W&B and MLflow.")]
pub(crate) struct Watch {
    /// The run: its folder, or for a live run also its coordinator (host:port), job, or the first digits of its id. Default: the live
    /// run of this machine.
    pub(crate) target: Option<String>,
    /// Leave out steps and evaluations up to this step.
    #[arg(long, value_name = "STEP", default_value_t = 0)]
    pub(crate) after: u64,
    /// Print JSON, which is the only format.
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) fn run(arguments: &Watch) -> Result<Exit, Failure> {
    block_on(async {
        let mut run = Looked::find(arguments.target.as_deref()).await?;
        // Subscribed before the past is read, so that nothing is missed between the two.
        let events = match &mut run.source {
            Source::Coordinator(observer, _) => {
                let stream = in_time(observer.watch(v1::WatchRequest { past: PAST })).await;
                Some(stream.map_err(|failure| failure.doing("watch the run"))?)
            }
            Source::Folder(_) => None,
        };
        if !output::line_is_read(line(&first(&run))) {
            return Ok(Exit::Done);
        }
        let mut seen = Seen::after(arguments.after);
        for (step, event) in past(&mut run, arguments.after).await? {
            seen.is_new(&event, step);
            if !output::line_is_read(line(&event)) {
                return Ok(Exit::Done);
            }
        }
        let Some(mut events) = events else { return Ok(Exit::Done) };
        loop {
            let next = events.message().await;
            let next = next.map_err(|status| {
                Failure::again(anyhow!("{}", harmless(status.message())))
                    .doing("watch the run")
                    .hint("`--after STEP` continues where this reader is")
            })?;
            let Some(event) = next else { return Ok(Exit::Done) };
            let step = match &event.event {
                Some(Event::Step(step)) => step.step,
                Some(Event::Evaluation(evaluation)) => evaluation.step,
                _ => u64::MAX,
            };
            let event = json::event(&event);
            if seen.is_new(&event, step) && !output::line_is_read(line(&event)) {
                return Ok(Exit::Done);
            }
        }
    })
}

fn line(event: &Value) -> String {
    harmless_json(&event.to_string()).into_owned()
}

fn first(run: &Looked) -> Value {
    let spec = run.folder.as_deref().and_then(|folder| std::fs::read_to_string(folder.join("job.toml")).ok());
    let spec = spec.and_then(|text| toml::from_str::<toml::Table>(&text).ok());
    value!({"number": 0, "time": null, "event": "run",
            "fields": {"name": run.name, "live": run.is_live(), "folder": run.folder, "spec": spec}})
}

/// Which steps and evaluations were printed. A lost generation repeats steps, which are new then, and a reader overwrites
/// what it has.
struct Seen {
    step: u64,
    /// The evaluations up to here are not wanted; `None` wants all.
    after: Option<u64>,
    /// The newest evaluation by its set. The job spec bounds the number of sets.
    evaluations: BTreeMap<String, u64>,
}

impl Seen {
    fn after(step: u64) -> Self {
        Self { step, after: step.checked_sub(1), evaluations: BTreeMap::new() }
    }

    fn is_new(&mut self, event: &Value, step: u64) -> bool {
        match event["event"].as_str() {
            Some("step") if step > self.step => self.step = step,
            Some("evaluation") => {
                let set = event["fields"]["set"].as_str().unwrap_or_default();
                let last = self.evaluations.get(set).copied().or(self.after);
                if last.is_some_and(|last| step <= last) {
                    return false;
                }
                self.evaluations.insert(set.to_owned(), step);
            }
            // Events of before that the past has covered.
            Some("step") => return false,
            _ => {}
        }
        true
    }
}

/// The steps and evaluations so far, in the order in which they ended.
async fn past(run: &mut Looked, after: u64) -> Result<Vec<(u64, Value)>, Failure> {
    let mut events = Vec::new();
    let sets = sets(run).await?;
    let evaluations = sets.iter().map(|set| (v1::Purpose::Evaluate, set.as_str()));
    for (purpose, set) in std::iter::once((v1::Purpose::Train, "")).chain(evaluations) {
        let mut first = if purpose == v1::Purpose::Train || after > 0 { after + 1 } else { 0 };
        let newest = newest(run, purpose, set).await?;
        while newest.is_some_and(|newest| first <= newest) {
            let request = v1::GetMetricsRequest {
                purpose: purpose.into(),
                first_step: Some(first),
                last_step: Some(first + PAGE - 1),
                most_points: 2000,
                set: set.to_owned(),
                ..Default::default()
            };
            let response = run.metrics(request).await.map_err(|failure| failure.doing("read the metrics"))?;
            events.extend(by_step(&response, (purpose == v1::Purpose::Evaluate).then_some(set)));
            first += PAGE;
        }
    }
    // An evaluation after step n ends after that step.
    events.sort_by_key(|(step, event)| (*step, event["event"] == "evaluation"));
    Ok(events)
}

/// Names of the sets that were evaluated.
async fn sets(run: &mut Looked) -> Result<Vec<String>, Failure> {
    let purpose = v1::Purpose::Evaluate.into();
    let request =
        v1::GetMetricsRequest { purpose, names: vec!["time".to_owned()], most_points: 1, ..Default::default() };
    let response = run.metrics(request).await.map_err(|failure| failure.doing("read the metrics"))?;
    Ok(response.sets)
}

async fn newest(run: &mut Looked, purpose: v1::Purpose, set: &str) -> Result<Option<u64>, Failure> {
    let request = v1::GetMetricsRequest {
        purpose: purpose.into(),
        names: vec!["time".to_owned()],
        most_points: 1,
        set: set.to_owned(),
        ..Default::default()
    };
    let response = run.metrics(request).await.map_err(|failure| failure.doing("read the metrics"))?;
    Ok(response.series.first().and_then(|series| series.steps.last().copied()))
}

/// Series by metric as events by step: evaluations of `set`, or training steps.
fn by_step(response: &v1::GetMetricsResponse, set: Option<&str>) -> Vec<(u64, Value)> {
    let mut steps: BTreeMap<u64, BTreeMap<&str, f64>> = BTreeMap::new();
    for series in &response.series {
        for (step, value) in series.steps.iter().zip(&series.means) {
            steps.entry(*step).or_default().insert(&series.name, *value);
        }
    }
    let event = |(step, metrics): (u64, BTreeMap<&str, f64>)| {
        let time = metrics.get("time").copied().map(json::number);
        let metrics: serde_json::Map<String, Value> =
            metrics.into_iter().map(|(name, value)| (name.to_owned(), json::number(value))).collect();
        let (kind, fields) = match set {
            None => ("step", value!({"step": step, "metrics": metrics})),
            Some(set) => ("evaluation", value!({"step": step, "set": set, "metrics": metrics})),
        };
        (step, value!({"number": 0, "time": time, "event": kind, "fields": fields}))
    };
    steps.into_iter().map(event).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_become_one_event_for_each_step() {
        let series = |name: &str, steps: &[u64], means: &[f64]| v1::MetricSeries {
            name: name.into(),
            steps: steps.into(),
            means: means.into(),
            ..Default::default()
        };
        let series = vec![series("reward_mean", &[1, 2], &[0.5, 0.75]), series("time", &[1, 2], &[10.0, 20.5])];
        let events = by_step(&v1::GetMetricsResponse { series, ..Default::default() }, None);
        assert_eq!(events.len(), 2);
        let expected = value!({"number": 0, "time": 20.5, "event": "step",
                               "fields": {"step": 2, "metrics": {"reward_mean": 0.75, "time": 20.5}}});
        assert_eq!(events[1], (2, expected));
    }

    #[test]
    fn what_the_past_has_shown_is_not_repeated() {
        let mut seen = Seen::after(3);
        let event = |kind: &str| value!({"event": kind});
        assert!(!seen.is_new(&event("step"), 3) && seen.is_new(&event("step"), 4) && !seen.is_new(&event("step"), 4));
        assert!(!seen.is_new(&event("evaluation"), 2) && seen.is_new(&event("evaluation"), 3));
        assert!(seen.is_new(&event("note"), u64::MAX));
        let of_set = |set: &str| value!({"event": "evaluation", "fields": {"set": set}});
        assert!(seen.is_new(&of_set("hard"), 3) && seen.is_new(&of_set("easy"), 3) && !seen.is_new(&of_set("hard"), 3));
        assert!(Seen::after(0).is_new(&event("evaluation"), 0), "an evaluation may come before the first step");
    }
}
