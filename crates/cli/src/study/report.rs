//! The report of a study: tables and plots computed from the files in its `data` folder alone.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use pacs_report::{Bootstrap, Interval, Plot, Point, Series, Table, sign_flip, student};

use super::folder::{Plan, is_of_cell, is_try_of};
use super::record::{Budget, Evaluation, Record};
use super::spec::{Cell, StudySpec, plain};
use crate::format::plural;

/// Extracts a number from an evaluation; `None` where the evaluation lacks it.
type Measure = fn(&Evaluation) -> Option<f64>;

/// The compared measures, with their column names.
const MEASURES: [(&str, Measure); 2] = [("pass@1", |one| Some(one.pass_at_1)), ("pass@k", |one| one.pass_at_k)];

/// Plots of training curves: metric and axis label.
const TRAINING: [(&str, &str); 4] = [
    ("entropy", "entropy of the policy (nats a token)"),
    ("answer_tokens_mean", "tokens of an answer"),
    ("grad_norm", "gradient norm before clipping"),
    ("mixed_share", "share of prompts with right and wrong answers"),
];

/// One method on one task at one point of the grid: its runs by seed.
struct Method<'a> {
    name: &'a str,
    runs: BTreeMap<u64, &'a Record>,
}

/// The methods on one task at one point of the grid, which are compared with each other.
struct Group<'a> {
    id: String,
    methods: Vec<Method<'a>>,
}

/// Writes `report.md`, its plots and `results.csv`; returns the path of `report.md`.
pub(super) fn write(study: &StudySpec, folder: &Path, file: &Path, plan: &Plan) -> Result<PathBuf> {
    let groups = groups(study, &plan.finished);
    let mut plots = Vec::new();
    let text = text(study, file, plan, &groups, &mut plots)?;
    let put = |name: &str, content: &str| {
        let path = folder.join(name);
        let write = || -> std::io::Result<()> {
            fs::create_dir_all(path.parent().unwrap_or(folder))?;
            fs::write(&path, content)
        };
        write().with_context(|| format!("write `{}`", path.display())).map(|()| path.clone())
    };
    for (name, svg) in &plots {
        put(name, svg)?;
    }
    put("results.csv", &results(&plan.finished))?;
    put("report.md", &text)
}

fn groups<'a>(study: &'a StudySpec, finished: &'a [Record]) -> Vec<Group<'a>> {
    let mut groups: Vec<Group<'a>> = Vec::new();
    for cell in study.cells() {
        let (id, name) =
            (cell.group(), study.methods.get_key_value(&cell.method).map_or("", |(name, _)| name.as_str()));
        let of_cell = |record: &&Record| !record.is_try && is_of_cell(record, &cell);
        let runs = finished.iter().filter(of_cell).map(|record| (record.seed, record)).collect();
        let method = Method { name, runs };
        match groups.last_mut().filter(|group| group.id == id) {
            Some(group) => group.methods.push(method),
            None => groups.push(Group { id, methods: vec![method] }),
        }
    }
    groups
}

fn text(
    study: &StudySpec,
    file: &Path,
    plan: &Plan,
    groups: &[Group<'_>],
    plots: &mut Vec<(String, String)>,
) -> Result<String> {
    let mut text = String::new();
    let all = plan.finished.len() + plan.open.len() + plan.waiting;
    writeln!(text, "# {}\n", study.name)?;
    if !study.about.is_empty() {
        writeln!(text, "{}\n", study.about.trim())?;
    }
    let seeds = study.seeds.len();
    writeln!(
        text,
        "{} of {all} runs are finished. {}, {}, {} a cell. Every number is made of the files in `data/`, one a \
         run, by `pacs study report {}`; `results.csv` has what was left after the last step of each.\n",
        plan.finished.len(),
        plural(study.methods.len() as u64, "method", "methods"),
        plural(study.tasks.len() as u64, "task", "tasks"),
        plural(seeds as u64, "seed", "seeds"),
        file.display()
    )?;
    writeln!(
        text,
        "How to read it: no step of a run was chosen for what it reached; values at a budget lie on the straight line between the two \
         measurements around it. Rates are in percent. Ranges are 95 % intervals of the mean over seeds (Student), in plots from three seeds \
         on. Differences to `{}` are of runs with the \
         same seed, which draw the same prompts; `p` is of a sign-flip test of them, and `p (Holm)` counts all comparisons of its table. \
         The column `bootstrap` resamples the pairs, which is too narrow for a handful of them. With {seeds} seeds no `p` of one task can be \
         below {}. Intervals hold for other seeds, not for other problems.\n",
        study.reference,
        short(0.5_f64.powi(i32::try_from(seeds).unwrap_or(i32::MAX) - 1).min(1.0))
    )?;
    incomplete(&mut text, plan)?;
    for group in groups.iter().filter(|group| group.methods.iter().any(|method| !method.runs.is_empty())) {
        of_group(&mut text, study, group, plots)?;
    }
    overall(&mut text, study, groups)?;
    tries(&mut text, study, plan)?;
    Ok(text)
}

fn incomplete(text: &mut String, plan: &Plan) -> Result<()> {
    if !plan.open.is_empty() || plan.waiting > 0 {
        let open = plan.open.iter().map(|run| format!("`{}`", run.id)).take(20).collect::<Vec<_>>();
        let more = (plan.open.len() + plan.waiting).saturating_sub(open.len());
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        writeln!(text, "**Not finished**, and left out of every number: {}{more}.\n", open.join(", "))?;
    }
    let early: Vec<&Record> = plan.finished.iter().filter(|record| record.ended_early.is_some()).collect();
    if !early.is_empty() {
        writeln!(
            text,
            "**Ended early** because nothing was left to learn from; they keep what their last measurement said, wherever they are \
             compared: {}.\n",
            early.iter().map(|record| format!("`{}`", record.id)).collect::<Vec<_>>().join(", ")
        )?;
    }
    Ok(())
}

fn of_group(text: &mut String, study: &StudySpec, group: &Group<'_>, plots: &mut Vec<(String, String)>) -> Result<()> {
    writeln!(text, "## {}\n", group.id)?;
    let budgets = [(Budget::Samples, "samples"), (Budget::Tokens, "generated tokens")];
    for (measure, value) in MEASURES {
        let measure = measure_name(group, measure);
        for (budget, unit) in budgets {
            let Some(spent) = common(group, budget) else { continue };
            let reached = |record: &Record| record.at(budget, spent, value);
            let table = compared(study, &[group], &reached);
            if let Some(table) = table {
                writeln!(text, "{measure} at {spent} {unit}, the most that every run has spent:\n\n{table}")?;
            }
        }
    }
    let stem = format!("plots/{}", group.id.replace('/', "-"));
    for (name, value) in MEASURES {
        let label = measure_name(group, name);
        let plot = Plot {
            title: format!("{}: {label}", group.id),
            x_label: "generated samples".into(),
            y_label: format!("{label} on held-out problems"),
            series: group.methods.iter().map(|method| curve(method, value)).collect(),
            ..Plot::default()
        };
        add(text, plots, &plot, &format!("{stem}-{}.svg", name.replace('@', "-at-")))?;
    }
    for (metric, label) in TRAINING {
        let plot = Plot {
            title: format!("{}: {label}", group.id),
            x_label: "training step".into(),
            y_label: label.into(),
            series: group.methods.iter().map(|method| training(method, metric)).collect(),
            ..Plot::default()
        };
        add(text, plots, &plot, &format!("{stem}-{metric}.svg"))?;
    }
    Ok(())
}

fn measure_name(group: &Group<'_>, measure: &str) -> String {
    let mut runs = group.methods.iter().flat_map(|method| method.runs.values());
    let k = runs.find_map(|record| record.evaluations.last()).map_or(1, |one| one.k);
    if measure == "pass@k" { format!("pass@{k}") } else { measure.to_owned() }
}

fn add(text: &mut String, plots: &mut Vec<(String, String)>, plot: &Plot, name: &str) -> Result<()> {
    if plot.series.iter().any(|series| !series.points.is_empty()) {
        writeln!(text, "![{}]({name})\n", plot.title)?;
        plots.push((name.to_owned(), plot.to_svg()));
    }
    Ok(())
}

/// Returns the largest budget that every run of a group reached. Runs that ended early do not limit it.
fn common(group: &Group<'_>, budget: Budget) -> Option<u64> {
    let runs = || group.methods.iter().flat_map(|method| method.runs.values());
    let spent = |record: &&&Record| record.evaluations.last().map_or(0, |one| one.spent(budget));
    let whole = runs().filter(|record| record.ended_early.is_none()).map(|record| spent(&record)).min();
    whole.or_else(|| runs().map(|record| spent(&record)).max())
}

/// Makes a table with one row per method and its difference to the reference. Values are paired by group and seed.
fn compared(study: &StudySpec, groups: &[&Group<'_>], value: &dyn Fn(&Record) -> Option<f64>) -> Option<Table> {
    let values = |name: &str| -> BTreeMap<(String, u64), f64> {
        let of_group = |group: &&Group<'_>| {
            let runs = group.methods.iter().filter(|method| method.name == name).flat_map(|method| &method.runs);
            let id = group.id.clone();
            runs.filter_map(|(seed, record)| Some(((id.clone(), *seed), value(record)?))).collect::<Vec<_>>()
        };
        groups.iter().flat_map(of_group).collect()
    };
    let reference = values(&study.reference);
    let mut rows = Vec::new();
    for name in study.methods.keys() {
        let own = values(name);
        if own.is_empty() {
            continue;
        }
        let differences: Vec<f64> = match *name == study.reference {
            true => Vec::new(),
            false => own.iter().filter_map(|(key, value)| Some(value - reference.get(key)?)).collect(),
        };
        rows.push((name, own.into_values().collect::<Vec<f64>>(), differences));
    }
    if rows.is_empty() {
        return None;
    }
    let tests: Vec<Option<f64>> = rows.iter().map(|(_, _, differences)| sign_flip(differences)).collect();
    let adjusted = holm(&tests);
    let against = format!("minus {}", study.reference);
    let mut table = Table::new(["method", "runs", "mean", "95 %", &against, "95 %", "bootstrap", "p", "p (Holm)"]);
    for ((name, own, differences), (p, holm)) in rows.iter().zip(tests.iter().zip(&adjusted)) {
        let mean = own.iter().sum::<f64>() / own.len() as f64;
        let pairs = (!differences.is_empty()).then(|| differences.iter().sum::<f64>() / differences.len() as f64);
        let resampled = (differences.len() > 1).then(|| Bootstrap::default().mean(differences)).flatten();
        table.row([
            name.to_string(),
            own.len().to_string(),
            points(mean),
            interval(student(own)),
            pairs.map(signed).unwrap_or_default(),
            interval(student(differences)),
            interval(resampled),
            p.map(short).unwrap_or_default(),
            holm.map(short).unwrap_or_default(),
        ]);
    }
    Some(table)
}

/// Holm's step-down adjustment: the smallest of `m` p-values is multiplied by `m`, the next by `m - 1`, and so on, with none below
/// the one before it.
fn holm(tests: &[Option<f64>]) -> Vec<Option<f64>> {
    let mut order: Vec<(usize, f64)> = tests.iter().enumerate().filter_map(|(at, p)| Some((at, (*p)?))).collect();
    order.sort_by(|left, right| left.1.total_cmp(&right.1));
    let mut adjusted = vec![None; tests.len()];
    let mut least = 0.0_f64;
    for (rank, (at, p)) in order.iter().enumerate() {
        least = least.max(p * (order.len() - rank) as f64).min(1.0);
        adjusted[*at] = Some(least);
    }
    adjusted
}

fn overall(text: &mut String, study: &StudySpec, groups: &[Group<'_>]) -> Result<()> {
    // Averages go over tasks only: each point of the grid is a question of its own.
    let mut variants = BTreeMap::<&str, Vec<&Group<'_>>>::new();
    for group in groups {
        let variant = group.id.split_once('/').map_or("", |(_, variant)| variant);
        variants.entry(variant).or_default().push(group);
    }
    for (variant, groups) in variants.into_iter().filter(|(_, groups)| groups.len() > 1) {
        if let Some(table) = compared(study, &groups, &Record::last) {
            let at = if variant.is_empty() { String::new() } else { format!(", {variant}") };
            writeln!(text, "## All tasks{at}\n\npass@1 after the last step, pairs of task and seed:\n\n{table}")?;
        }
    }
    Ok(())
}

/// Appends the table of all tuning runs and the chosen values.
fn tries(text: &mut String, study: &StudySpec, plan: &Plan) -> Result<()> {
    let Some(tuning) = &study.tuning else { return Ok(()) };
    writeln!(
        text,
        "## Tries\n\n`{}` of every cell was chosen among {} values by the mean of pass@1 after the last step over the seeds {:?}, none of \
         which is one of the study's. An `edge` is the smallest or largest value: a better one may lie beyond.\n",
        tuning.key,
        tuning.values.len(),
        tuning.seeds
    )?;
    let words: Vec<String> = tuning.values.iter().map(plain).collect();
    let titles = std::iter::once("cell".to_owned()).chain(words.iter().cloned());
    let mut table = Table::new(titles.chain(["chosen".to_owned(), "note".to_owned()]));
    for cell in study.cells() {
        let chosen = plan.chosen.get(&cell.id());
        let reached = words.iter().map(|word| tried(&plan.finished, &cell, word));
        let is_edge = chosen.is_some_and(|chosen| words.first() == Some(chosen) || words.last() == Some(chosen));
        let note = [chosen.cloned().unwrap_or_default(), if is_edge { "edge".to_owned() } else { String::new() }];
        table.row(std::iter::once(cell.id()).chain(reached).chain(note));
    }
    writeln!(text, "{table}")?;
    Ok(())
}

fn tried(finished: &[Record], cell: &Cell, word: &str) -> String {
    let of_value = |record: &&Record| is_try_of(record, cell) && record.tuned.as_deref() == Some(word);
    let reached: Vec<f64> = finished.iter().filter(of_value).filter_map(Record::last).collect();
    if reached.is_empty() {
        return String::new();
    }
    points(reached.iter().sum::<f64>() / reached.len() as f64)
}

fn curve(method: &Method<'_>, value: fn(&Evaluation) -> Option<f64>) -> Series {
    let mut by_samples = BTreeMap::<u64, Vec<f64>>::new();
    for one in method.runs.values().flat_map(|record| &record.evaluations) {
        if let Some(value) = value(one) {
            by_samples.entry(one.samples).or_default().push(value);
        }
    }
    let points = by_samples.into_iter().map(|(samples, values)| point(samples as f64, &values));
    Series { name: method.name.to_owned(), points: points.collect() }
}

fn training(method: &Method<'_>, metric: &str) -> Series {
    let mut by_step = BTreeMap::<u64, Vec<f64>>::new();
    for record in method.runs.values() {
        let (Some(steps), Some(values)) = (record.training.get("step"), record.training.get(metric)) else { continue };
        for (step, value) in steps.iter().zip(values) {
            if let (Some(step), Some(value)) = (step, value) {
                by_step.entry(*step as u64).or_default().push(*value);
            }
        }
    }
    let points = by_step.into_iter().map(|(step, values)| point(step as f64, &values));
    Series { name: method.name.to_owned(), points: points.collect() }
}

fn point(x: f64, values: &[f64]) -> Point {
    // With two seeds Student's factor is 12.7, and the band would hide every line.
    let interval = student(values).filter(|_| values.len() > 2).map(|interval| (interval.low, interval.high));
    Point { x, y: values.iter().sum::<f64>() / values.len() as f64, interval }
}

/// Renders the last evaluation of each run as CSV.
fn results(finished: &[Record]) -> String {
    let mut text =
        String::from("id,task,grid,method,seed,tuned,is_try,ended_early,step,samples,tokens,pass_at_1,k,pass_at_k\n");
    for record in finished {
        let Some(last) = record.evaluations.last() else { continue };
        let grid: Vec<String> = record.grid.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let grid = grid.join(" ");
        let tuned = record.tuned.as_deref().unwrap_or_default();
        let pass_at_k = last.pass_at_k.map(|value| value.to_string()).unwrap_or_default();
        let _ = writeln!(
            text,
            "{},{},{grid},{},{},{tuned},{},{},{},{},{},{},{},{pass_at_k}",
            record.id,
            record.task,
            record.method,
            record.seed,
            record.is_try,
            record.ended_early.is_some(),
            last.step,
            last.samples,
            last.tokens,
            last.pass_at_1,
            last.k
        );
    }
    text
}

/// Formats a share in percent.
fn points(share: f64) -> String {
    format!("{:.1}", 100.0 * share)
}

fn signed(share: f64) -> String {
    format!("{:+.1}", 100.0 * share)
}

fn interval(interval: Option<Interval>) -> String {
    interval.map(|Interval { low, high, .. }| format!("{} to {}", points(low), points(high))).unwrap_or_default()
}

fn short(p: f64) -> String {
    if p < 0.001 { format!("{p:.1e}") } else { format!("{p:.3}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comparisons_are_counted() {
        let adjusted = holm(&[Some(0.04), None, Some(0.01), Some(0.03)]);
        let rounded: Vec<Option<f64>> = adjusted.iter().map(|p| p.map(|p| (p * 1e6).round() / 1e6)).collect();
        // 0.01 · 3, 0.03 · 2, and 0.04 · 1 raised to the value before it.
        assert_eq!(rounded, [Some(0.06), None, Some(0.03), Some(0.06)]);
        assert_eq!(holm(&[Some(0.9), Some(0.8)]), [Some(1.0), Some(1.0)]);
    }
}
