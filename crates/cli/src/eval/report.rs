//! The report of an evaluation as Markdown, JSON and an SVG plot.

use pacs_report::{Bootstrap, Interval, Plot, Point, Scale, Series, Table};
use serde_json::{Map, Value, json};

use super::estimate::Estimates;
use super::read::{Results, SetResults};
use crate::format::{count, seconds};

/// Results of one model with their estimates.
pub(super) struct Report<'a> {
    results: &'a Results,
    sets: Vec<(&'a SetResults, Estimates)>,
}

impl<'a> Report<'a> {
    pub(super) fn of(results: &'a Results) -> Self {
        let sets = results.sets.iter().filter_map(|set| Some((set, Estimates::of(set)?))).collect();
        Self { results, sets }
    }

    pub(super) fn json(&self) -> Value {
        let set = |(set, estimates): &(&SetResults, Estimates)| {
            let by_k = |values: &[Interval]| -> Map<String, Value> {
                estimates.ks.iter().zip(values).map(|(k, value)| (k.to_string(), json!(value))).collect()
            };
            let settings = set.settings.as_ref().map(|settings| {
                json!({
                    "temperature": settings.temperature,
                    "top_p": settings.top_p,
                    "top_k": settings.top_k,
                    "min_p": settings.min_p,
                    "max_new_tokens": settings.max_new_tokens,
                    "prompt_suffix": settings.prompt_suffix,
                    "path": settings.source.path,
                })
            });
            json!({
                "set": set.name,
                "problems": set.problems.len(),
                "excluded": set.excluded,
                "samples_per_problem": estimates.samples,
                "well_estimated_k": estimates.well_estimated(),
                "pass_at": by_k(&estimates.pass),
                "majority_at": by_k(&estimates.majority),
                "pass_curve": estimates.curve,
                "answers_are_one": if set.math { "equivalent" } else { "same_text" },
                "answer_tokens": estimates.tokens,
                "truncated_share": estimates.truncated,
                "unparsable_share": estimates.unparsable,
                "seconds": set.seconds,
                "settings": settings,
                "table": set.problems,
            })
        };
        json!({
            "model": self.results.model,
            "run_dir": self.results.folder,
            "step": self.results.step,
            "bootstrap": { "draws": Bootstrap::default().draws, "confidence": 0.95, "units": "problems" },
            "sets": self.sets.iter().map(set).collect::<Vec<_>>(),
        })
    }

    /// Writes the report as Markdown. `plot` is the plot's file name; empty for no plot.
    pub(super) fn markdown(&self, plot: &str, with_problems: bool) -> String {
        let model = self.results.model.display();
        let mut text = match self.results.step {
            0 => format!("# Evaluation of {model}\n\n"),
            step => format!("# Evaluation of {model} after {step} training steps\n\n"),
        };
        let mut overview =
            Table::new(["set", "problems", "samples", "tokens", "truncated", "unreadable", "left out", "time"]);
        for (set, estimates) in &self.sets {
            overview.row([
                set.name.clone(),
                count(set.problems.len() as u64),
                estimates.samples.to_string(),
                format!("{:.1}", estimates.tokens.mean),
                percent(estimates.truncated.mean),
                percent(estimates.unparsable.mean),
                set.excluded.to_string(),
                seconds(set.seconds),
            ]);
        }
        text.push_str(&overview.to_string());
        for (set, estimates) in &self.sets {
            text.push_str(&format!("\n## {}\n\n", set.name));
            let mut table = Table::new(["k", "pass@k", "95 %", "maj@k", "95 %"]);
            for (index, k) in estimates.ks.iter().enumerate() {
                let (pass, majority) = (estimates.pass[index], estimates.majority[index]);
                let mark = if *k > estimates.well_estimated() { "*" } else { "" };
                table.row([
                    format!("{k}{mark}"),
                    percent(pass.mean),
                    range(pass),
                    percent(majority.mean),
                    range(majority),
                ]);
            }
            text.push_str(&table.to_string());
            if let Some(settings) = &set.settings {
                text.push_str(&format!(
                    "\nTemperature {}, top-p {}, answers of up to {} tokens.\n",
                    settings.temperature, settings.top_p, settings.max_new_tokens
                ));
            }
        }
        text.push_str(&format!(
            "\nPercent; pass@k is the unbiased estimate, intervals are 95 % percentile intervals of {} bootstrap resamples of problems. \
             maj@k: the most frequent of k answers, ties by chance, {}. `*`: fewer than 4 k samples.\n",
            Bootstrap::default().draws,
            if self.sets.iter().all(|(set, _)| set.math) {
                "answers that the built-in verifier takes for equal being one"
            } else {
                "answers of the built-in verifier being one where it takes them for equal, others where their text is the same"
            }
        ));
        if !plot.is_empty() {
            text.push_str(&format!("\n![pass@k]({plot})\n"));
        }
        if with_problems {
            self.sets.iter().for_each(|(set, _)| problems(&mut text, set));
        }
        text
    }

    pub(super) fn plot(&self) -> Plot {
        let series = |(set, estimates): &(&SetResults, Estimates)| curve(&set.name, estimates);
        plot(format!("pass@k of {}", self.results.model.display()), self.sets.iter().map(series).collect())
    }
}

/// Makes a plot of pass@k against k.
pub(super) fn plot(title: String, series: Vec<Series>) -> Plot {
    Plot {
        title,
        x_label: "k (answers)".to_owned(),
        y_label: "pass@k (%)".to_owned(),
        x_scale: Scale::Log2,
        y_range: Some((0.0, 100.0)),
        series,
    }
}

/// Makes one line of the plot.
pub(super) fn curve(name: &str, estimates: &Estimates) -> Series {
    let point = |(k, pass): (&usize, &Interval)| Point {
        x: *k as f64,
        y: 100.0 * pass.mean,
        interval: Some((100.0 * pass.low, 100.0 * pass.high)),
    };
    Series { name: name.to_owned(), points: estimates.ks.iter().zip(&estimates.pass).map(point).collect() }
}

fn problems(text: &mut String, set: &SetResults) {
    text.push_str(&format!("\n## Problems of {}\n\n", set.name));
    let mut table =
        Table::new(["question", "#", "reference", "right", "of", "most frequent answer", "tokens", "truncated"]);
    for problem in &set.problems {
        let most = problem.answers.iter().max_by(|first, second| first.1.cmp(&second.1).then(second.0.cmp(&first.0)));
        table.row([
            problem.question.chars().take(80).collect(),
            problem.problem.to_string(),
            problem.gold.clone(),
            problem.right.to_string(),
            problem.samples.to_string(),
            most.map(|(answer, count, _)| format!("{answer} ({count})")).unwrap_or_default(),
            format!("{:.1}", problem.tokens as f64 / f64::from(problem.samples.max(1))),
            problem.truncated.to_string(),
        ]);
    }
    text.push_str(&table.to_string());
}

/// Formats a share in percent without the sign, which the heading gives once.
pub(super) fn percent(share: f64) -> String {
    format!("{:.1}", 100.0 * share)
}

pub(super) fn range(interval: Interval) -> String {
    format!("{} to {}", percent(interval.low), percent(interval.high))
}
