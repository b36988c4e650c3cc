//! `pacs compare`: the metrics of several runs in one table, and the settings in which they differ.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use clap::Args;
use pacs_protocol::v1;
use pacs_runtime::{Exit, harmless};
use serde_json::{Map, Value, json};

use super::Looked;
use crate::client::block_on;
use crate::failure::Failure;
use crate::format::table;
use crate::output;

/// Metrics compared without `--metric`.
const USUAL: [&str; 14] = [
    "reward_mean",
    "pass_rate",
    "mixed_share",
    "entropy",
    "score_auc",
    "logprob_mismatch_mean",
    "answer_tokens_mean",
    "truncated_share",
    "tokens_per_second",
    "lag",
    "sampling_seconds",
    "training_seconds",
    "total_seconds",
    "failed_verdicts",
];
const USUAL_EVALUATIONS: [&str; 2] = ["pass_at_1", "pass_at_k"];
/// Points of a drawn curve.
const CURVE: u32 = 24;
const TAIL: usize = 10;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pacs compare runs/demo                        one run: where it began, where it is
  pacs compare runs/pacs runs/grpo              two runs, and the settings in which they differ
  pacs compare runs/* --metric entropy --metric loss
  pacs compare runs/pacs runs/grpo --json       whole curves, for scripts

Each metric shows the mean of its first tenth and of its last tenth, and its curve from the lowest value (▁) to the highest (█) of all
runs. Runs that are over are named by their folder.")]
pub(crate) struct Compare {
    /// The runs: folders, or for live runs also coordinators (host:port), jobs, or the first digits of their ids.
    #[arg(required = true, num_args = 1..=16)]
    pub(crate) targets: Vec<String>,
    /// Compare this metric of docs/METRICS.md; may be given several times. Default: the ones that show how training goes.
    #[arg(long, value_name = "NAME")]
    pub(crate) metric: Vec<String>,
    /// Print JSON, with up to 2000 points per curve.
    #[arg(long)]
    pub(crate) json: bool,
}

/// The series of one run: those of its steps, and those of its evaluations.
struct Numbers {
    name: String,
    steps: BTreeMap<String, v1::MetricSeries>,
    evaluations: BTreeMap<String, v1::MetricSeries>,
    spec: Option<pacs_spec::JobSpec>,
}

pub(crate) fn run(arguments: &Compare) -> Result<Exit, Failure> {
    let mut runs = block_on(async {
        let mut runs = Vec::new();
        for target in &arguments.targets {
            let doing = format!("look at `{target}`");
            runs.push(numbers(target, arguments).await.map_err(|failure| failure.doing(doing))?);
        }
        Ok(runs)
    })?;
    tell_apart(&mut runs);
    if arguments.json {
        output::json(format_args!("{:#}", as_json(&runs)));
    } else {
        output::text(as_text(&runs, &arguments.metric));
    }
    Ok(Exit::Done)
}

async fn numbers(target: &str, arguments: &Compare) -> Result<Numbers, Failure> {
    let mut run = Looked::find(Some(target)).await?;
    let most_points = if arguments.json { 2000 } else { 500 };
    let mut of = async |purpose: v1::Purpose| {
        let request = v1::GetMetricsRequest {
            purpose: purpose.into(),
            names: arguments.metric.clone(),
            most_points,
            ..Default::default()
        };
        let series = run.metrics(request).await?.series;
        Ok::<_, Failure>(series.into_iter().map(|series| (series.name.clone(), series)).collect())
    };
    let (steps, evaluations) = (of(v1::Purpose::Train).await?, of(v1::Purpose::Evaluate).await?);
    // The settings are unknown for a run whose folder is on another machine.
    let spec = run.folder.as_deref().and_then(read_spec);
    Ok(Numbers { name: run.name, steps, evaluations, spec })
}

fn read_spec(folder: &Path) -> Option<pacs_spec::JobSpec> {
    let path = folder.join("job.toml");
    pacs_spec::parse(&std::fs::read_to_string(&path).ok()?, &path).ok()
}

/// Numbers runs that have the same name.
fn tell_apart(runs: &mut [Numbers]) {
    let names: Vec<String> = runs.iter().map(|run| run.name.clone()).collect();
    for (place, run) in runs.iter_mut().enumerate() {
        if names.iter().filter(|name| **name == run.name).count() > 1 {
            run.name = format!("{} ({})", run.name, place + 1);
        }
    }
}

fn as_text(runs: &[Numbers], asked: &[String]) -> String {
    let mut heading = vec!["metric".to_owned()];
    heading.extend(runs.iter().map(|run| run.name.clone()));
    let mut rows = vec![heading];
    let last = |run: &Numbers| run.steps.values().filter_map(|series| series.steps.last()).max().copied();
    let mut steps = vec!["steps".to_owned()];
    steps.extend(runs.iter().map(|run| last(run).map_or("0".to_owned(), |step| step.to_string())));
    rows.push(steps);
    type OfRun = fn(&Numbers) -> &BTreeMap<String, v1::MetricSeries>;
    let tables: [(OfRun, &[&str], &str); 2] =
        [(|run| &run.evaluations, &USUAL_EVALUATIONS, "evaluation "), (|run| &run.steps, &USUAL, "")];
    for (of, usual, prefix) in tables {
        let names: Vec<&str> =
            if asked.is_empty() { usual.to_vec() } else { asked.iter().map(String::as_str).collect() };
        for name in names {
            let all: Vec<Option<&v1::MetricSeries>> = runs.iter().map(|run| of(run).get(name)).collect();
            if all.iter().any(Option::is_some) {
                let mut row = vec![format!("{prefix}{name}")];
                let range = range(&all);
                row.extend(all.iter().map(|series| series.map_or("-".to_owned(), |series| cell(series, range))));
                rows.push(row);
            }
        }
    }
    let mut text = table(&rows);
    let missing: Vec<&str> = asked
        .iter()
        .map(String::as_str)
        .filter(|name| !runs.iter().any(|run| run.steps.contains_key(*name) || run.evaluations.contains_key(*name)))
        .collect();
    if !missing.is_empty() {
        let _ = writeln!(text, "\nno run has {}; docs/METRICS.md lists all names", harmless(&missing.join(", ")));
    }
    differences(&mut text, runs);
    text
}

/// Returns the lowest and highest value over all runs: the common scale of a row's curves.
fn range(all: &[Option<&v1::MetricSeries>]) -> (f64, f64) {
    let values = all.iter().flatten().flat_map(|series| &series.means).filter(|value| value.is_finite());
    values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(*value), high.max(*value)))
}

/// Formats a cell: the mean of the first tenth, of the last tenth, and the curve.
fn cell(series: &v1::MetricSeries, range: (f64, f64)) -> String {
    let tail = series.means.len().div_ceil(TAIL);
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
    let (first, last) = (mean(&series.means[..tail]), mean(&series.means[series.means.len() - tail..]));
    format!("{} -> {}  {}", number(first), number(last), curve(&series.means, range))
}

fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        small if small < 1e-3 => format!("{value:.1e}"),
        large if large >= 1000.0 => format!("{value:.0}"),
        _ => format!("{value:.3}"),
    }
}

fn curve(values: &[f64], (low, high): (f64, f64)) -> String {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let part = values.len().div_ceil(CURVE as usize).max(1);
    let bar = |values: &[f64]| {
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let share = if high > low { (mean - low) / (high - low) } else { 0.5 };
        BARS[(share.clamp(0.0, 1.0) * 7.0).round() as usize]
    };
    values.chunks(part).map(bar).collect()
}

/// Appends the settings in which the other runs differ from the first.
fn differences(text: &mut String, runs: &[Numbers]) {
    let Some((first, others)) = runs.split_first() else { return };
    for other in others {
        let (Some(before), Some(after)) = (&first.spec, &other.spec) else {
            let _ = writeln!(text, "\nthe settings of {} are not known here", harmless(&other.name));
            continue;
        };
        let found = pacs_spec::differences(before, after);
        let _ = writeln!(text, "\n{} differs from {} in", harmless(&other.name), harmless(&first.name));
        for difference in &found {
            let _ = writeln!(text, "  {}", harmless(&difference.to_string()));
        }
        if found.is_empty() {
            let _ = writeln!(text, "  nothing that the job says");
        }
    }
}

fn as_json(runs: &[Numbers]) -> Value {
    let all = |series: &BTreeMap<String, v1::MetricSeries>| -> Map<String, Value> {
        let one = |series: &v1::MetricSeries| json!({"steps": series.steps, "means": series.means, "lows": series.lows, "highs": series.highs});
        series.iter().map(|(name, series)| (name.clone(), one(series))).collect()
    };
    let run = |run: &Numbers| {
        let first = runs.first().and_then(|first| first.spec.as_ref());
        let differences = first
            .zip(run.spec.as_ref())
            .map(|(first, own)| pacs_spec::differences(first, own).iter().map(ToString::to_string).collect::<Vec<_>>());
        json!({"name": run.name, "steps": all(&run.steps), "evaluations": all(&run.evaluations), "differences": differences})
    };
    json!({"runs": runs.iter().map(run).collect::<Vec<_>>()})
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    fn run(name: &str, values: &[f64], beta: f64) -> Numbers {
        let series = |name: &str, means: &[f64]| {
            let steps = (1..=means.len() as u64).collect();
            (
                name.to_owned(),
                v1::MetricSeries { name: name.into(), steps, means: means.to_vec(), ..Default::default() },
            )
        };
        let text = format!(
            "name = 'x'\nmodel.path = 'm'\ndata.train.path = 'd.jsonl'\ndata.evaluation.path = 'e.jsonl'\nobjective.beta = {beta:?}\n"
        );
        Numbers {
            name: name.into(),
            steps: [series("reward_mean", values), series("tokens_per_second", &[12_345.6])].into(),
            evaluations: [series("pass_at_1", &[0.25, 0.5])].into(),
            spec: Some(pacs_spec::parse(&text, Path::new("x")).expect("a job")),
        }
    }

    #[test]
    fn runs_are_compared_from_their_beginning_to_their_end() {
        let rising: Vec<f64> = (0..20).map(|step| f64::from(step) / 20.0).collect();
        let mut runs = [run("one", &rising, 1.0), run("one", &[0.1, 0.1], 10.0)];
        runs[1].evaluations.clear();
        tell_apart(&mut runs);
        expect![[r#"
            metric                one (1)                               one (2)
            steps                 20                                    2
            evaluation pass_at_1  0.250 -> 0.500  ▁█                    -
            reward_mean           0.025 -> 0.925  ▁▁▂▂▂▃▃▄▄▄▅▅▅▆▆▇▇▇██  0.100 -> 0.100  ▂▂
            tokens_per_second     12346 -> 12346  ▅                     12346 -> 12346  ▅

            one (2) differs from one (1) in
              objective.beta: was 1.0, is 10.0
        "#]]
        .assert_eq(&as_text(&runs, &[]));
        let text = as_text(&runs, &["lossy".to_owned()]);
        assert!(text.contains("no run has lossy; docs/METRICS.md lists all names"), "{text}");
        let json = as_json(&runs);
        assert_eq!(json["runs"][0]["steps"]["reward_mean"]["means"].as_array().map(Vec::len), Some(20));
        assert_eq!(json["runs"][1]["differences"].as_array().map(Vec::len), Some(1));
    }
}
