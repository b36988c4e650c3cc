//! `pacs eval compare`: compares models problem by problem, with paired bootstrap intervals.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use pacs_report::{Bootstrap, Difference, MeasuredProblem, Table};
use pacs_runtime::Exit;
use serde_json::{Map, Value, json};

use super::estimate::{Estimates, curve as pass_of, votes};
use super::read::{Results, SetResults};
use super::report::{curve, percent, plot, range};
use super::write;
use crate::arguments::EvalCompare;
use crate::failure::Failure;
use crate::output;

pub(crate) fn run(arguments: &EvalCompare) -> Result<Exit, Failure> {
    let mut models = Vec::new();
    for folder in &arguments.folders {
        let (path, step) = folder_and_step(folder);
        models.push((folder.clone(), Results::read(&path, step)?));
    }
    let comparisons = compare(&models, &arguments.set)?;
    let json = json!({ "baseline": models[0].0, "sets": comparisons.iter().map(Comparison::json).collect::<Vec<_>>() });
    let markdown = markdown(&comparisons);
    if let Some(folder) = &arguments.output {
        let created = fs::create_dir_all(folder).with_context(|| format!("create folder `{}`", folder.display()));
        created.map_err(Failure::config)?;
        write(&folder.join("compare.json"), &format!("{json:#}\n"))?;
        write(&folder.join("compare.md"), &markdown)?;
        for comparison in &comparisons {
            let lines = comparison.models.iter().map(|model| curve(&model.name, &model.estimates)).collect();
            let svg = plot(format!("pass@k on {}", comparison.set), lines).to_svg();
            write(&folder.join(format!("{}.svg", comparison.set)), &svg)?;
        }
    }
    if arguments.json {
        output::json(json)
    } else {
        output::text(markdown)
    }
    Ok(Exit::Done)
}

/// Splits `FOLDER@STEP`, unless the whole text names an existing folder.
fn folder_and_step(text: &str) -> (PathBuf, Option<u64>) {
    match text.rsplit_once('@') {
        Some((folder, step)) if !Path::new(text).exists() => match step.parse() {
            Ok(step) => (folder.into(), Some(step)),
            Err(_) => (text.into(), None),
        },
        _ => (text.into(), None),
    }
}

/// All models compared on one set.
struct Comparison {
    set: String,
    /// Number of problems that every model was measured on.
    problems: usize,
    /// Values of `k` for which every model has enough samples.
    ks: Vec<usize>,
    models: Vec<Compared>,
}

struct Compared {
    name: String,
    estimates: Estimates,
    /// Difference of pass@k to the first model, per `k`; empty for the first model itself.
    pass: Vec<Difference>,
    /// Difference of maj@k to the first model, likewise.
    majority: Vec<Difference>,
}

fn compare(models: &[(String, Results)], wanted: &[String]) -> Result<Vec<Comparison>, Failure> {
    let of = |results: &'_ Results, name: &str| results.sets.iter().position(|set| set.name == name);
    let common = models[0].1.sets.iter().map(|set| set.name.clone());
    let common: Vec<String> =
        common.filter(|name| models.iter().all(|(_, results)| of(results, name).is_some())).collect();
    if let Some(unknown) = wanted.iter().find(|name| !common.contains(name)) {
        let error = anyhow!("not all of them have a set `{unknown}`; common to all: {}", common.join(", "));
        return Err(Failure::config(error).doing("compare the models"));
    }
    let mut comparisons = Vec::new();
    for name in common.into_iter().filter(|name| wanted.is_empty() || wanted.contains(name)) {
        let sets: Vec<&SetResults> =
            models.iter().filter_map(|(_, results)| results.sets.get(of(results, &name)?)).collect();
        comparisons.extend(compare_set(&name, models, &sets));
    }
    if comparisons.is_empty() {
        let error = anyhow!("they have no problem in common");
        let hint = "problems are the same where question and reference answer are, in sets of one name";
        return Err(Failure::config(error).doing("compare the models").hint(hint));
    }
    Ok(comparisons)
}

fn compare_set(name: &str, models: &[(String, Results)], sets: &[&SetResults]) -> Option<Comparison> {
    let keyed: Vec<BTreeMap<(String, usize), &MeasuredProblem>> = sets.iter().map(|set| by_key(set)).collect();
    let first = keyed.first()?;
    let common: Vec<&(String, usize)> =
        first.keys().filter(|key| keyed.iter().all(|of| of.contains_key(*key))).collect();
    let paired = |at: usize| -> Vec<MeasuredProblem> { common.iter().map(|key| keyed[at][*key].clone()).collect() };
    let mut models_of = Vec::new();
    for (at, (model, _)) in models.iter().enumerate() {
        let set = SetResults { name: name.to_owned(), settings: None, problems: paired(at), ..*sets[at] };
        models_of.push((model.clone(), Estimates::of(&set)?, set));
    }
    let fewest = models_of.iter().map(|(_, estimates, _)| estimates.samples).min()?;
    let ks = pacs_report::powers_of_two(fewest);
    let values = |set: &SetResults| -> (Vec<Vec<f64>>, Vec<Vec<f64>>) {
        let pass: Vec<Vec<f64>> = set.problems.iter().map(pass_of).collect();
        let votes: Vec<_> = set.problems.iter().map(|problem| votes(problem, set.math)).collect();
        let at = |k: &usize| {
            let majority = votes.iter().map(|votes| pacs_report::majority(votes, *k).unwrap_or(0.0)).collect();
            (pass.iter().map(|curve| curve[k - 1]).collect(), majority)
        };
        ks.iter().map(at).unzip()
    };
    let baseline = values(&models_of[0].2);
    let bootstrap = Bootstrap::default();
    let models = models_of.into_iter().enumerate().map(|(at, (name, estimates, set))| {
        let own = if at == 0 { (Vec::new(), Vec::new()) } else { values(&set) };
        let paired = |own: &[Vec<f64>], baseline: &[Vec<f64>]| {
            own.iter().zip(baseline).filter_map(|(own, baseline)| bootstrap.paired(own, baseline)).collect()
        };
        Compared { name, estimates, pass: paired(&own.0, &baseline.0), majority: paired(&own.1, &baseline.1) }
    });
    Some(Comparison { set: name.to_owned(), problems: common.len(), models: models.collect(), ks })
}

/// Indexes problems by key and occurrence, because a set may contain the same problem several times.
fn by_key(set: &SetResults) -> BTreeMap<(String, usize), &MeasuredProblem> {
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    let mut keyed = BTreeMap::new();
    for problem in &set.problems {
        let times = seen.entry(&problem.key).or_default();
        keyed.insert((problem.key.clone(), *times), problem);
        *times += 1;
    }
    keyed
}

impl Comparison {
    fn json(&self) -> Value {
        let by_k = |values: &[Difference]| -> Map<String, Value> {
            self.ks.iter().zip(values).map(|(k, value)| (k.to_string(), json!(value))).collect()
        };
        let model = |model: &Compared| {
            let pass = model.estimates.ks.iter().zip(&model.estimates.pass);
            let pass: Map<String, Value> = pass.map(|(k, value)| (k.to_string(), json!(value))).collect();
            json!({
                "model": model.name,
                "pass_at": pass,
                "pass_difference": by_k(&model.pass),
                "majority_difference": by_k(&model.majority),
            })
        };
        json!({ "set": self.set, "problems": self.problems, "models": self.models.iter().map(model).collect::<Vec<_>>() })
    }
}

fn markdown(comparisons: &[Comparison]) -> String {
    let mut text = String::from("# Comparison\n");
    for comparison in comparisons {
        text.push_str(&format!("\n## {} ({} problems)\n\n", comparison.set, comparison.problems));
        let mut table =
            Table::new(["model", "k", "pass@k", "95 %", "difference", "95 %", "p", "maj@k difference", "95 %"]);
        for (at, k) in comparison.ks.iter().enumerate() {
            for model in &comparison.models {
                let place = model.estimates.ks.iter().position(|own| own == k);
                let pass = place.map(|place| model.estimates.pass[place]);
                let mut row = vec![model.name.clone(), k.to_string()];
                row.push(pass.map(|pass| percent(pass.mean)).unwrap_or_default());
                row.push(pass.map(range).unwrap_or_default());
                if let (Some(pass), Some(majority)) = (model.pass.get(at), model.majority.get(at)) {
                    row.push(signed(pass.interval.mean));
                    row.push(range(pass.interval));
                    row.push(format!("{:.4}", pass.p_value));
                    row.push(signed(majority.interval.mean));
                    row.push(range(majority.interval));
                }
                table.row(row);
            }
        }
        text.push_str(&table.to_string());
    }
    text.push_str(&format!(
        "\nPercent and percentage points; differences are from the first model, over the same problems. Intervals and p-values are of a \
         paired bootstrap of {} resamples of problems.\n",
        Bootstrap::default().draws
    ));
    text
}

fn signed(share: f64) -> String {
    format!("{:+.1}", 100.0 * share)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results(name: &str, right: &[u32], shift: usize) -> (String, Results) {
        let problems = right.iter().enumerate().map(|(at, right)| MeasuredProblem {
            set: "s".to_owned(),
            problem: at as u64,
            key: format!("{:016x}", at + shift),
            samples: 4,
            right: *right,
            answers: vec![("7".to_owned(), *right, *right), ("8".to_owned(), 4 - right, 0)],
            ..MeasuredProblem::default()
        });
        let set = SetResults {
            name: "s".to_owned(),
            settings: None,
            math: true,
            excluded: 0,
            seconds: 0.0,
            problems: problems.collect(),
        };
        let results = Results { folder: name.into(), step: 0, only: true, model: name.into(), sets: vec![set] };
        (name.to_owned(), results)
    }

    #[test]
    fn models_are_compared_on_the_problems_that_all_have() {
        // The second file is shifted: one extra problem at its start, one missing at its end.
        let right: Vec<u32> = (0..40).map(|at| at % 3).collect();
        let better: Vec<u32> = (1..41).map(|at| (at + 1) % 3 + 1).collect();
        let models = [results("a", &right, 1), results("b", &better, 0)];
        let comparisons = compare(&models, &[]).unwrap();
        let [comparison] = comparisons.as_slice() else { panic!("one set") };
        assert_eq!((comparison.problems, comparison.ks.as_slice()), (39, &[1, 2, 4][..]));
        let difference = comparison.models[1].pass[0];
        let by_hand: f64 =
            (0..39).map(|at| (f64::from(better[at + 1]) - f64::from(right[at])) / 4.0).sum::<f64>() / 39.0;
        assert!((difference.interval.mean - by_hand).abs() < 1e-12, "{difference:?}");
        assert!(comparison.models[0].pass.is_empty());
        let text = markdown(&comparisons);
        assert!(text.contains("## s (39 problems)") && text.contains("paired bootstrap"), "{text}");
    }

    #[test]
    fn what_has_nothing_in_common_is_refused() {
        let models = [results("a", &[1, 2], 0), results("b", &[1, 2], 100)];
        let refused = compare(&models, &[]).err().expect("no problem in common").to_string();
        assert!(refused.contains("no problem in common"), "{refused}");
        let unknown = compare(&models, &["x".to_owned()]).err().expect("no such set").to_string();
        assert!(unknown.contains("common to all: s"), "{unknown}");
    }

    #[test]
    fn a_step_follows_the_folder() {
        assert_eq!(folder_and_step("runs/demo@40"), ("runs/demo".into(), Some(40)));
        assert_eq!(folder_and_step("runs/demo"), ("runs/demo".into(), None));
        assert_eq!(folder_and_step("runs/a@b"), ("runs/a@b".into(), None));
    }
}
