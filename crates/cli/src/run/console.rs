//! The output of `pacs run`: one line per event, for people or as JSON.

use std::path::Path;

use pacs_coordinator::{EvaluationSummary, Progress, StepSummary};
use serde_json::{Value, json};

use super::shown;
use super::supervisor::{GivenUp, WorkerNews};
use crate::format::{count, duration, percent, plural, seconds};
use crate::output;

/// Steps after which the column headings are repeated.
const STEPS_PER_HEAD: u64 = 20;

/// Prints the events of a run.
pub(crate) struct Console {
    json: bool,
    steps_shown: u64,
}

impl Console {
    pub(crate) fn new(json: bool) -> Self {
        Self { json, steps_shown: 0 }
    }

    /// Prints a progress event of the coordinator.
    pub(crate) fn progress(&mut self, progress: &Progress) {
        if self.json {
            output::json(progress_json(progress));
        } else {
            self.progress_text(progress).iter().for_each(output::line);
        }
    }

    /// Prints what happened to a worker process.
    pub(crate) fn worker(&self, news: &WorkerNews) {
        let (name, text) = match news {
            WorkerNews::Restarting { name, how, wait } => {
                (name, format!("worker {name} {how}; it is started again in {}", duration(*wait)))
            }
            WorkerNews::GivenUp(GivenUp { name, how, .. }) => {
                (name, format!("worker {name} {how}; the run cannot continue"))
            }
        };
        self.say("worker", &text, json!({"worker": name}));
    }

    /// Prints a sentence, or with `--json` the event with these `fields`.
    pub(crate) fn say(&self, event: &str, text: &str, fields: Value) {
        if self.json {
            let mut object = json!({"event": event, "text": text});
            if let (Some(object), Value::Object(fields)) = (object.as_object_mut(), fields) {
                object.extend(fields);
            }
            output::json(object);
        } else {
            output::line(text);
        }
    }

    /// Prints an event as a table of labelled lines, or with `--json` the event only.
    pub(crate) fn block(&self, event: &str, lines: &[(&str, String)], fields: &Value) {
        if self.json {
            self.say(event, event, fields.clone());
            return;
        }
        output::line("");
        for (name, line) in lines {
            output::line(format_args!("{name:<12}{line}"));
        }
        output::line("");
    }

    fn progress_text(&mut self, progress: &Progress) -> Vec<String> {
        let text = match progress {
            Progress::Waiting { sentence } => format!("… {sentence}"),
            Progress::Prepared { step, learners, .. } => {
                format!("ready after {}: {} loaded the model", steps(*step), learners.join(", "))
            }
            Progress::Evaluated(evaluation) => evaluation_line(evaluation),
            Progress::Measuring { judged, samples, remaining_seconds } => {
                let left = remaining_seconds.map(|left| format!(", {} left", seconds(left)));
                let left = left.unwrap_or_default();
                format!("measured {} of {} samples{left}", count(*judged), count(*samples))
            }
            Progress::Step(step) => return self.step_lines(step),
            Progress::Saved { step, path, seconds: took } => {
                format!("checkpoint of step {step} saved in {}: {}", seconds(*took), shown(path).display())
            }
            Progress::WorkerLost { name, why } => format!("worker {name} is gone: {why}; its work is issued again"),
            Progress::Drained { name } => format!("worker {name} is drained and leaves"),
            // The supervisor has said so itself.
            Progress::Operated { who, .. } if who == "this process" => return Vec::new(),
            Progress::Operated { who, what } => format!("operator {who} {what}"),
            Progress::Narrowed { text } | Progress::Note { text } => return text.lines().map(str::to_owned).collect(),
        };
        vec![text]
    }

    fn step_lines(&mut self, step: &StepSummary) -> Vec<String> {
        let mut lines = Vec::new();
        let width = step.total_steps.to_string().len() * 2 + 1;
        let width = width.max(4);
        if self.steps_shown.is_multiple_of(STEPS_PER_HEAD) {
            lines.push(format!(
                "{:>width$}  {:>6}  {:>7}  {:>7}  {:>7}  {:>7}  {:>6}  {:>6}  {:>12}",
                "step", "reward", "pass", "mixed", "entropy", "length", "tok/s", "sec", "left"
            ));
        }
        self.steps_shown += 1;
        lines.push(format!(
            "{:>width$}  {:>6.3}  {:>7}  {:>7}  {:>7.2}  {:>7.1}  {:>6.0}  {:>6.1}  {:>12}",
            format!("{}/{}", step.step, step.total_steps),
            step.reward_mean,
            percent(step.pass_rate),
            percent(step.mixed_share),
            step.entropy,
            step.answer_tokens_mean,
            step.tokens_per_second,
            step.seconds.total_seconds,
            seconds(step.remaining_seconds),
        ));
        lines
    }
}

fn evaluation_line(evaluation: &EvaluationSummary) -> String {
    let at_k = evaluation.pass_at_k.map(|share| format!(", pass@{} {}", evaluation.k, percent(share)));
    let excluded = match evaluation.excluded {
        0 => String::new(),
        excluded => format!(", {excluded} left out for lack of a verdict"),
    };
    format!(
        "evaluation{} after {}: pass@1 {}{} on {} held-out problems{excluded} ({})",
        evaluation.set.as_ref().map(|set| format!(" of {set}")).unwrap_or_default(),
        steps(evaluation.step),
        percent(evaluation.pass_at_1),
        at_k.unwrap_or_default(),
        count(evaluation.problems),
        seconds(evaluation.seconds),
    )
}

fn steps(count: u64) -> String {
    plural(count, "step", "steps")
}

fn progress_json(progress: &Progress) -> Value {
    let tagged = |event: &str, summary: Result<Value, serde_json::Error>| {
        let mut object = json!({"event": event});
        if let (Some(object), Ok(Value::Object(fields))) = (object.as_object_mut(), summary) {
            object.extend(fields);
        }
        object
    };
    match progress {
        Progress::Waiting { sentence } => json!({"event": "waiting", "text": sentence}),
        Progress::Prepared { step, total_steps, learners } => {
            json!({"event": "prepared", "step": step, "total_steps": total_steps, "learners": learners})
        }
        Progress::Evaluated(evaluation) => tagged("evaluation", serde_json::to_value(evaluation)),
        Progress::Measuring { judged, samples, remaining_seconds } => {
            json!({"event": "measuring", "judged": judged, "samples": samples, "remaining_seconds": remaining_seconds})
        }
        Progress::Step(step) => {
            let mut object = tagged("step", serde_json::to_value(step));
            object["total_steps"] = json!(step.total_steps);
            object["remaining_seconds"] = json!(step.remaining_seconds);
            object
        }
        Progress::Saved { step, path, seconds } => {
            json!({"event": "checkpoint", "step": step, "path": path, "seconds": seconds})
        }
        Progress::WorkerLost { name, why } => json!({"event": "worker_lost", "worker": name, "text": why}),
        Progress::Drained { name } => json!({"event": "worker_drained", "worker": name}),
        Progress::Operated { who, what } => json!({"event": "operator", "operator": who, "text": what}),
        Progress::Narrowed { text } | Progress::Note { text } => json!({"event": "note", "text": text}),
    }
}

/// Held-out pass@1 before and after training, from the records of the run folder.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct BeforeAfter {
    pub(crate) before: f64,
    pub(crate) after: f64,
    problems: u64,
}

impl BeforeAfter {
    /// Reads the first and last evaluation of a run, including those of its earlier starts.
    pub(crate) fn read(run_dir: &Path) -> Option<Self> {
        let text = std::fs::read_to_string(run_dir.join("evaluations.jsonl")).ok()?;
        let mut evaluations: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        // Compare within one set, because pass rates of different sets are not comparable. The unnamed set comes first.
        let set = evaluations.iter().map(|line| line["set"].clone()).min_by_key(|set| !set.is_null())?;
        evaluations.retain(|line| line["set"] == set);
        let (first, last) = (evaluations.first()?, evaluations.last()?);
        if evaluations.len() < 2 {
            return None;
        }
        let pass = |evaluation: &Value| evaluation["pass_at_1"].as_f64();
        Some(Self { before: pass(first)?, after: pass(last)?, problems: last["problems"].as_u64()? })
    }
}

/// Parts of the commands that are suggested to the user.
pub(crate) struct Commands {
    /// Name by which the user called this program.
    pub(crate) program: String,
    /// Path of the job spec.
    pub(crate) job: String,
    /// The command that was given, without the number of steps.
    pub(crate) same: String,
}

/// Composes the lines after a finished run: the result, where its files are, what to do next.
pub(crate) fn finish_lines(
    step: u64,
    model: &Path,
    run_dir: &Path,
    command: &Commands,
    measured: Option<BeforeAfter>,
) -> Vec<(&'static str, String)> {
    let Commands { program, job, same } = command;
    let mut lines = vec![("done", steps(step))];
    if let Some(BeforeAfter { before, after, problems }) = measured {
        let (before, after, problems) = (percent(before), percent(after), count(problems));
        lines.push(("pass@1", format!("{before} before, {after} after, on {problems} held-out problems")));
    }
    lines.push(("model", format!("{} (a Hugging Face folder)", model.display())));
    lines.push(("metrics", run_dir.join("metrics.jsonl").display().to_string()));
    lines.push(("samples", format!("{} (Parquet, with their verdicts)", run_dir.join("samples").display())));
    lines.push(("try next", format!("{same} --steps {}  # continue from here", 2 * step)));
    lines.push(("", format!("{program} run {job} --seed 2 --run-dir DIR  # again with another seed")));
    lines.push(("", format!("{program} run {job} --dataset FILE.jsonl --model DIR  # your own problems and model")));
    lines.push(("", format!("{program} job init FILE  # a job of your own")));
    lines
}

#[cfg(test)]
mod tests {
    use expect_test::expect;
    use pacs_coordinator::StepSeconds;

    use super::*;

    fn step(step: u64) -> Progress {
        Progress::Step(Box::new(StepSummary {
            step,
            total_steps: 40,
            reward_mean: 0.015625,
            pass_rate: 0.015625,
            mixed_share: 0.125,
            entropy: 2.041,
            answer_tokens_mean: 21.3,
            tokens_per_second: 842.4,
            seconds: StepSeconds { total_seconds: 8.14, ..StepSeconds::default() },
            remaining_seconds: 316.0,
            ..StepSummary::default()
        }))
    }

    #[test]
    fn progress_reads_as_a_table() {
        let evaluation = EvaluationSummary { pass_at_1: 0.015, problems: 200, seconds: 10.4, ..Default::default() };
        let events = [
            Progress::Waiting { sentence: "waits for learners: 1 wanted, 0 registered".into() },
            Progress::Prepared { step: 0, total_steps: 40, learners: vec!["learner-0".into()] },
            Progress::Evaluated(evaluation),
            step(1),
            step(2),
            Progress::WorkerLost { name: "rollout-0".into(), why: "silent for 10 s".into() },
            step(40),
            Progress::Saved { step: 40, path: "runs/demo/checkpoints/step-000040".into(), seconds: 1.2 },
        ];
        let mut console = Console::new(false);
        let lines: Vec<String> = events.iter().flat_map(|event| console.progress_text(event)).collect();
        expect![[r#"
            … waits for learners: 1 wanted, 0 registered
            ready after 0 steps: learner-0 loaded the model
            evaluation after 0 steps: pass@1 1.5 % on 200 held-out problems (10 s)
             step  reward     pass    mixed  entropy   length   tok/s     sec          left
             1/40   0.016    1.6 %   12.5 %     2.04     21.3     842     8.1    5 min 16 s
             2/40   0.016    1.6 %   12.5 %     2.04     21.3     842     8.1    5 min 16 s
            worker rollout-0 is gone: silent for 10 s; its work is issued again
            40/40   0.016    1.6 %   12.5 %     2.04     21.3     842     8.1    5 min 16 s
            checkpoint of step 40 saved in 1.2 s: runs/demo/checkpoints/step-000040"#]]
        .assert_eq(&lines.join("\n"));
    }

    #[test]
    fn heads_come_again() {
        let mut console = Console::new(false);
        let heads: Vec<usize> = (1..=41).map(|n| console.progress_text(&step(n)).len()).collect();
        assert_eq!(heads.iter().filter(|lines| **lines == 2).count(), 3);
    }

    #[test]
    fn json_events_carry_their_numbers() {
        let event = progress_json(&step(3));
        assert_eq!((&event["event"], &event["step"], &event["total_steps"]), (&json!("step"), &json!(3), &json!(40)));
        assert_eq!(event["mixed_share"], 0.125);
    }

    #[test]
    fn the_final_message_summarises_the_run() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        assert_eq!(BeforeAfter::read(dir.path()), None);
        let text =
            "{\"step\":0,\"pass_at_1\":0.015,\"problems\":200}\n{\"step\":40,\"pass_at_1\":0.7,\"problems\":200}\n";
        std::fs::write(dir.path().join("evaluations.jsonl"), text).expect("written");
        let measured = BeforeAfter::read(dir.path());
        let commands =
            Commands { program: "pacs".into(), job: "demo.toml".into(), same: "pacs run demo.toml --seed 3".into() };
        let lines = finish_lines(40, Path::new("c/model"), Path::new("runs/demo"), &commands, measured);
        let text: Vec<String> = lines.iter().map(|(name, line)| format!("{name:<12}{line}")).collect();
        expect![[r#"
            done        40 steps
            pass@1      1.5 % before, 70.0 % after, on 200 held-out problems
            model       c/model (a Hugging Face folder)
            metrics     runs/demo/metrics.jsonl
            samples     runs/demo/samples (Parquet, with their verdicts)
            try next    pacs run demo.toml --seed 3 --steps 80  # continue from here
                        pacs run demo.toml --seed 2 --run-dir DIR  # again with another seed
                        pacs run demo.toml --dataset FILE.jsonl --model DIR  # your own problems and model
                        pacs job init FILE  # a job of your own"#]]
        .assert_eq(&text.join("\n"));
    }
}
