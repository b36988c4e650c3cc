//! `pacs report`: a run as one HTML file to send to a colleague.

mod page;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use clap::Args;
use pacs_coordinator::CoordinatorRecord;
use pacs_dashboard::json;
use pacs_protocol::v1;
use pacs_protocol::v1::watch_response::Event;
use pacs_report::{Plot, Point, Series};
use pacs_runtime::Exit;
use serde_json::{Value, json as value};

use self::page::{Answer, Finding, Part};
use super::Looked;
use super::samples::signal;
use super::top::{clock, words};
use crate::client::block_on;
use crate::ending;
use crate::failure::Failure;
use crate::format::{percent, plural};
use crate::output;

/// Points of a curve.
const POINTS: u32 = 400;
/// Samples of the newest steps that are looked through, and those of each outcome that are shown.
const LOOKED_AT: u32 = 200;
const SHOWN: usize = 4;
/// Events and log lines in the report.
const MOST_EVENTS: u32 = 200;
/// Bytes at the end of the coordinator's log that are looked through for warnings.
const LOG_BYTES: usize = 1 << 20;
/// Bytes of an answer.
const TEXT_BYTES: u32 = 4000;

/// What a plot shows: title, unit, whether of evaluations, and the metrics with their names in the legend.
type Shown = (&'static str, &'static str, bool, &'static [(&'static str, &'static str)]);

const PLOTS: [Shown; 14] = [
    ("Reward", "mean", false, &[("reward_mean", "reward")]),
    ("Pass rate", "share", false, &[("pass_rate", "training")]),
    ("Held-out problems", "share", true, &[("pass_at_1", "pass@1"), ("pass_at_k", "pass@k")]),
    ("Mixed groups", "share", false, &[("mixed_share", "mixed")]),
    ("Entropy", "nats per token", false, &[("entropy", "rollout"), ("learner_entropy", "learner")]),
    ("Score calibration", "AUC", false, &[("score_auc", "AUC")]),
    ("Score size", "nats", false, &[("score_abs_mean", "score"), ("log_ratio_abs_mean", "log-ratio")]),
    ("Log-prob mismatch", "nats", false, &[("logprob_mismatch_mean", "mean"), ("logprob_mismatch_max", "largest")]),
    (
        "Answer length",
        "tokens",
        false,
        &[
            ("answer_tokens_mean", "all"),
            ("answer_tokens_correct_mean", "right"),
            ("answer_tokens_wrong_mean", "wrong"),
        ],
    ),
    ("Cut off, unreadable", "share", false, &[("truncated_share", "cut off"), ("unparsable_share", "no answer")]),
    ("Gradient norm", "before clipping", false, &[("grad_norm", "norm")]),
    (
        "Throughput",
        "tokens per second",
        false,
        &[("tokens_per_second", "generated"), ("trained_tokens_per_second", "trained")],
    ),
    (
        "Time of a step",
        "seconds",
        false,
        &[
            ("total_seconds", "all"),
            ("sampling_seconds", "sampling"),
            ("training_seconds", "training"),
            ("verifying_seconds", "verification tail"),
        ],
    ),
    ("Failures", "per step", false, &[("failed_verdicts", "verifications"), ("replaced_samples", "replaced samples")]),
];

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pacs report runs/demo                         write runs/demo/report.html
  pacs report runs/demo --output demo.html
  pacs report                                   the run on this machine, while it continues

The file needs no other file and no network, and holds no scripts. It contains questions and answers of the run.")]
pub(crate) struct Report {
    /// The run: its folder, or for a live run also its coordinator (host:port), job, or the first digits of its id. Default: the live
    /// run of this machine.
    pub(crate) target: Option<String>,
    /// File to write; an existing one is replaced. Default: report.html in the run folder, or here if that is on another machine.
    #[arg(long, short, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    /// Leave questions and answers out.
    #[arg(long)]
    pub(crate) no_samples: bool,
}

pub(crate) fn run(arguments: &Report) -> Result<Exit, Failure> {
    let (name, folder, html) = block_on(async {
        let run = Looked::find(arguments.target.as_deref()).await?;
        let (name, folder) = (run.name.clone(), run.folder.clone());
        Ok((name, folder, Gathered::of(run, arguments.no_samples).await?.html()))
    })?;
    let path = arguments.output.clone().unwrap_or_else(|| folder.unwrap_or_default().join("report.html"));
    fs::write(&path, html.as_bytes())
        .with_context(|| format!("write `{}`", path.display()))
        .map_err(Failure::config)?;
    output::line(format_args!("{} ({name}, {} KB)", path.display(), html.len() / 1000));
    Ok(Exit::Done)
}

/// What the report tells.
struct Gathered {
    name: String,
    live: bool,
    facts: Vec<(&'static str, String)>,
    findings: Vec<v1::Finding>,
    settings: Option<String>,
    steps: v1::GetMetricsResponse,
    evaluations: v1::GetMetricsResponse,
    /// Lines of `evaluations.jsonl`, which name their sets.
    evaluation_lines: Vec<Value>,
    events: Vec<Arc<v1::WatchResponse>>,
    warnings: Vec<String>,
    samples: Vec<v1::ObservedSample>,
}

impl Gathered {
    async fn of(mut run: Looked, no_samples: bool) -> Result<Self, Failure> {
        let mut metrics = Vec::new();
        for purpose in [v1::Purpose::Train, v1::Purpose::Evaluate] {
            let request = v1::GetMetricsRequest { purpose: purpose.into(), most_points: POINTS, ..Default::default() };
            metrics.push(run.metrics(request).await.map_err(|failure| failure.doing("read the metrics"))?);
        }
        let (evaluations, steps) = (metrics.pop().unwrap_or_default(), metrics.pop().unwrap_or_default());
        let samples = if no_samples {
            Vec::new()
        } else {
            // With a verdict: the newest answers of a live run may all be in flight.
            let outcomes = [v1::Outcome::Correct, v1::Outcome::Wrong, v1::Outcome::Unparsable].map(i32::from).to_vec();
            let request =
                v1::ListSamplesRequest { limit: LOOKED_AT, text_bytes: TEXT_BYTES, outcomes, ..Default::default() };
            chosen(run.samples(request).await.map_err(|failure| failure.doing("read the samples"))?.samples)
        };
        let (name, live, folder) = (run.name.clone(), run.is_live(), run.folder.clone());
        let source = run.into_dashboard_source();
        // What cannot be had from a run that ends just now is left out.
        let events = source.events(MOST_EVENTS).await.unwrap_or_default();
        let status = source.status().await.ok().flatten();
        let mut facts = facts(folder.as_deref());
        if let Some(status) = &status {
            facts.push(("state", format!("{}, step {} of {}", status.phase, status.step, status.total_steps)));
            facts.push(("workers", status.workers.len().to_string()));
        }
        Ok(Self {
            name,
            live,
            facts,
            findings: status.map(|status| status.findings.clone()).unwrap_or_default(),
            settings: folder.as_deref().and_then(|folder| fs::read_to_string(folder.join("job.toml")).ok()),
            steps,
            evaluations,
            evaluation_lines: folder.as_deref().map(evaluation_lines).unwrap_or_default(),
            events,
            warnings: folder.as_deref().map(warnings).unwrap_or_default(),
            samples,
        })
    }

    fn html(&self) -> String {
        let mut parts = vec![Part::Text(self.summary())];
        if !self.findings.is_empty() {
            parts.push(Part::Heading("What the coordinator finds".into()));
            parts.push(Part::Findings(self.findings.iter().map(shown_finding).collect()));
        }
        let facts = self.facts.iter().map(|(name, value)| vec![(*name).to_owned(), value.clone()]).collect();
        parts.push(Part::Table(vec!["environment".into(), "value".into()], facts));
        parts.push(Part::Heading("Curves".into()));
        let plots: Vec<Plot> = PLOTS.iter().filter_map(|plot| self.plot(plot)).collect();
        if self.steps.steps_per_point > 1 {
            let width = self.steps.steps_per_point;
            parts.push(Part::Text(format!(
                "Each point is the mean of up to {width} steps; the range of their values is shaded."
            )));
        }
        match plots.is_empty() {
            true => parts.push(Part::Text("No step has ended yet.".into())),
            false => parts.push(Part::Plots(plots)),
        }
        if !self.evaluation_lines.is_empty() {
            parts.push(Part::Heading("Evaluations".into()));
            parts.push(evaluation_table(&self.evaluation_lines));
        }
        if !self.events.is_empty() {
            parts.push(Part::Heading("Events".into()));
            parts.push(event_table(&self.events));
        }
        if !self.warnings.is_empty() {
            parts.push(Part::Heading("Warnings of the coordinator".into()));
            parts.push(Part::Folded(plural(self.warnings.len() as u64, "line", "lines"), self.warnings.join("\n")));
        }
        if !self.samples.is_empty() {
            parts.push(Part::Heading("Samples".into()));
            parts.push(Part::Text("The newest answers, some of each verdict.".into()));
            parts.push(Part::Answers(self.samples.iter().map(answer).collect()));
        }
        if let Some(settings) = &self.settings {
            parts.push(Part::Heading("Settings".into()));
            parts.push(Part::Folded("job.toml".into(), settings.clone()));
        }
        page::html(&format!("Run {}", self.name), &parts, &self.data())
    }

    fn summary(&self) -> String {
        let series = |name: &str| self.steps.series.iter().find(|series| series.name == name);
        let ends = |name: &str| {
            let means = &series(name)?.means;
            Some((*means.first()?, *means.last()?))
        };
        let step = series("reward_mean").and_then(|series| series.steps.last()).copied().unwrap_or(0);
        let mut text = plural(step, "step", "steps");
        text += if self.live { " so far" } else { "" };
        if let Some((first, last)) = ends("reward_mean") {
            text += &format!("; reward {first:.3} to {last:.3}");
        }
        if let Some((first, last)) = ends("pass_rate") {
            text += &format!("; pass rate {} to {}", percent(first), percent(last));
        }
        let held_out = self.evaluations.series.iter().find(|series| series.name == "pass_at_1");
        if let Some((first, last)) = held_out.and_then(|series| Some((series.means.first()?, series.means.last()?))) {
            text += &format!("; held-out pass@1 {} to {}", percent(*first), percent(*last));
        }
        text + "."
    }

    /// A plot of what the run writes of these metrics; `None` if that is nothing.
    fn plot(&self, (title, unit, of_evaluations, metrics): &Shown) -> Option<Plot> {
        let all = if *of_evaluations { &self.evaluations } else { &self.steps };
        let series = metrics.iter().filter_map(|(metric, name)| {
            let found = all.series.iter().find(|series| series.name == *metric)?;
            let point = |(place, (step, mean)): (usize, (&u64, &f64))| Point {
                x: *step as f64,
                y: *mean,
                interval: found.lows.get(place).copied().zip(found.highs.get(place).copied()),
            };
            let points = found.steps.iter().zip(&found.means).enumerate().map(point).collect();
            Some(Series { name: (*name).to_owned(), points })
        });
        let series: Vec<Series> = series.collect();
        (!series.is_empty()).then(|| Plot {
            title: (*title).to_owned(),
            x_label: "step".into(),
            y_label: (*unit).to_owned(),
            series,
            ..Plot::default()
        })
    }

    fn data(&self) -> Value {
        value!({
            "name": self.name,
            "live": self.live,
            "environment": self.facts.iter().cloned().collect::<BTreeMap<_, _>>(),
            "settings": self.settings,
            "findings": self.findings.iter().map(json::finding).collect::<Vec<_>>(),
            "steps": json::metrics(&self.steps),
            "evaluations": self.evaluation_lines,
            "events": self.events.iter().map(|event| json::event(event)).collect::<Vec<_>>(),
            "samples": self.samples.iter().map(json::sample).collect::<Vec<_>>(),
        })
    }
}

fn shown_finding(finding: &v1::Finding) -> Finding {
    let (evidence, advice) = (finding.sentence.clone(), finding.advice.clone());
    Finding { stops_run: finding.stops_run, evidence, advice }
}

/// Some samples of each outcome, the newest first.
fn chosen(samples: Vec<v1::ObservedSample>) -> Vec<v1::ObservedSample> {
    let mut counts: BTreeMap<i32, usize> = BTreeMap::new();
    let outcome = |sample: &v1::ObservedSample| sample.verdict.as_ref().map_or(0, |verdict| verdict.outcome);
    let wanted = samples.into_iter().filter(|sample| {
        let count = counts.entry(outcome(sample)).or_default();
        *count += 1;
        *count <= SHOWN
    });
    let mut chosen: Vec<_> = wanted.collect();
    chosen.sort_by_key(|sample| outcome(sample));
    chosen
}

fn answer(sample: &v1::ObservedSample) -> Answer {
    let verdict = sample.verdict.as_ref();
    let outcome = verdict.map_or("no verdict yet", |verdict| json::outcome(verdict.outcome()));
    let step = sample.step.map_or("in flight".to_owned(), |step| format!("step {step}"));
    let mut facts = vec![plural(u64::from(sample.tokens), "token", "tokens")];
    if let Some(verdict) = verdict {
        facts.push(format!("reward {:.3}", verdict.reward));
        facts.extend(signal(sample));
        facts.extend(verdict.extracted.iter().map(|extracted| format!("extracted {extracted}")));
        facts.push(format!("reference {}", sample.gold));
        facts.push(verdict.rule.clone());
    }
    Answer {
        title: format!("g{}.{}, {step}: {outcome}", sample.group_id, sample.index),
        question: sample.question.clone(),
        response: if sample.shortened { format!("{}…", sample.response) } else { sample.response.clone() },
        facts: facts.join(" · "),
    }
}

/// What the run folder says about where the run happened.
fn facts(folder: Option<&Path>) -> Vec<(&'static str, String)> {
    let Some(folder) = folder else { return Vec::new() };
    let mut facts = Vec::new();
    if let Ok(record) = CoordinatorRecord::read(folder) {
        facts.push(("job", record.job));
        facts.push(("run id", record.run_id));
        facts.push(("host", record.host));
        facts.push(("starts", record.starts.to_string()));
    }
    if let Some(ending) = ending::read(folder) {
        facts.push(("ending", ending));
    }
    facts.push(("folder", folder.display().to_string()));
    facts.push(("report by", format!("pacs {}", env!("CARGO_PKG_VERSION"))));
    facts
}

fn evaluation_lines(folder: &Path) -> Vec<Value> {
    let text = fs::read_to_string(folder.join("evaluations.jsonl")).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

fn evaluation_table(lines: &[Value]) -> Part {
    let titles = ["step", "set", "pass@1", "k", "pass@k", "problems", "tokens", "cut off", "no answer"];
    let row = |line: &Value| {
        let share = |name: &str| line[name].as_f64().map_or(String::new(), percent);
        let whole = |name: &str| line[name].as_u64().map_or(String::new(), |value| value.to_string());
        vec![
            whole("step"),
            line["set"].as_str().unwrap_or("held out").to_owned(),
            share("pass_at_1"),
            whole("k"),
            share("pass_at_k"),
            whole("problems"),
            line["answer_tokens_mean"].as_f64().map_or(String::new(), |tokens| format!("{tokens:.1}")),
            share("truncated_share"),
            share("unparsable_share"),
        ]
    };
    Part::Table(titles.map(str::to_owned).to_vec(), lines.iter().map(row).collect())
}

/// Events but those of steps, whose numbers the curves show.
fn event_table(events: &[Arc<v1::WatchResponse>]) -> Part {
    let shown = events.iter().filter(|event| !matches!(event.event, Some(Event::Step(_) | Event::Situation(_))));
    let row = |event: &Arc<v1::WatchResponse>| vec![clock(event.time), words(event)];
    Part::Table(["time (UTC)", "event"].map(str::to_owned).to_vec(), shown.map(row).collect())
}

/// Warnings and errors at the end of the coordinator's log.
fn warnings(folder: &Path) -> Vec<String> {
    let bytes = fs::read(folder.join("logs/coordinator.log")).unwrap_or_default();
    let end = String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(LOG_BYTES)..]).into_owned();
    let is_warning = |line: &&str| line.contains(" WARN ") || line.contains("ERROR ");
    let mut lines: Vec<String> = end.lines().filter(is_warning).map(str::to_owned).collect();
    lines.split_off(lines.len().saturating_sub(MOST_EVENTS as usize))
}
