//! `pacs top` without a screen: one line per event.

use pacs_dashboard::json::event as json;
use pacs_protocol::v1;
use pacs_protocol::v1::watch_response::Event;
use pacs_runtime::{Exit, harmless, harmless_json};

use super::Run;
use crate::failure::Failure;
use crate::format::{percent, seconds};
use crate::output;

/// Prints events until the run ends, the coordinator is gone, or the reader is.
pub(super) async fn follow(run: &mut Run, as_json: bool) -> Result<Exit, Failure> {
    loop {
        let event = run.events.message().await.map_err(|status| {
            Failure::again(anyhow::anyhow!("{}", harmless(status.message()))).doing("watch the run")
        })?;
        let Some(event) = event else { return Ok(Exit::Done) };
        let line = if as_json { harmless_json(&json(&event).to_string()).into_owned() } else { as_text(&event) };
        // A closed pipe ends the command, as in `pacs top | head`.
        if !output::line_is_read(line) {
            return Ok(Exit::Done);
        }
    }
}

/// Formats an event on one line, with control characters neutralised.
pub(super) fn as_text(event: &v1::WatchResponse) -> String {
    format!("{}  {}", clock(event.time), words(event))
}

/// Says what has happened on one line, with control characters neutralised.
pub(in crate::look) fn words(event: &v1::WatchResponse) -> String {
    let text = match &event.event {
        Some(Event::Situation(situation)) => {
            let paused = if situation.paused { ", paused" } else { "" };
            let mut workers: Vec<String> =
                situation.workers.iter().map(|(role, count)| format!("{count} {role}")).collect();
            workers.sort();
            let workers = if workers.is_empty() { "no workers".to_owned() } else { workers.join(", ") };
            let queues = situation.queues.unwrap_or_default();
            format!(
                "{}{paused}: step {} of {}, {} of {} groups complete; {workers}",
                situation.phase, situation.step, situation.total_steps, queues.groups_complete, queues.groups_wanted
            )
        }
        Some(Event::Lost(lost)) => format!("{} events were lost: this reader is too slow", lost.events),
        Some(Event::Step(step)) => {
            let metric = |name: &str| step.metrics.get(name).copied();
            let mut text = format!("step {} of {}", step.step, step.total_steps);
            let parts = [
                ("reward", metric("reward_mean").map(|value| format!("{value:.3}"))),
                ("pass", metric("pass_rate").map(percent)),
                ("mixed", metric("mixed_share").map(percent)),
                ("entropy", metric("entropy").map(|value| format!("{value:.2}"))),
                ("tok/s", metric("tokens_per_second").map(|value| format!("{value:.0}"))),
                ("took", metric("total_seconds").map(seconds)),
            ];
            for (name, value) in parts.into_iter().filter_map(|(name, value)| Some((name, value?))) {
                text.push_str(&format!("  {name} {value}"));
            }
            text
        }
        Some(Event::Evaluation(evaluation)) => {
            let pass = evaluation.metrics.get("pass_at_1").copied().unwrap_or_default();
            let of = match evaluation.set.as_str() {
                "" | "evaluation" => String::new(),
                set => format!(" of {set}"),
            };
            format!("evaluation{of} after {} steps: pass@1 {}", evaluation.step, percent(pass))
        }
        Some(Event::Saved(saved)) => {
            format!("checkpoint of step {} in {} ({})", saved.step, saved.path, seconds(saved.seconds))
        }
        Some(Event::WorkerGone(gone)) if gone.drained => format!("worker {} was drained", gone.name),
        Some(Event::WorkerGone(gone)) => format!("worker {} is gone: {}", gone.name, gone.reason),
        Some(Event::LearnersReady(ready)) => {
            format!("learners are ready at step {}: {}", ready.step, ready.learners.join(", "))
        }
        Some(Event::Waiting(sentence)) => format!("waiting: {sentence}"),
        Some(Event::Operator(done)) => format!("operator {} {}", done.operator, done.action),
        Some(Event::Note(note)) => note.clone(),
        Some(Event::RunOver(over)) if over.reason.is_empty() => format!("the run is over: {}", over.how),
        Some(Event::RunOver(over)) => format!("the run is over: {}: {}", over.how, over.reason),
        None => "an event that this version does not know".to_owned(),
    };
    harmless(&text).into_owned()
}

/// Formats a Unix time as hours, minutes and seconds in UTC.
pub(in crate::look) fn clock(time: f64) -> String {
    let of_day = time.max(0.0) as u64 % 86_400;
    format!("{:02}:{:02}:{:02}", of_day / 3600, of_day / 60 % 60, of_day % 60)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::json as as_json;
    use super::*;

    fn event(event: Event) -> v1::WatchResponse {
        v1::WatchResponse { number: 7, time: 86_400.0 + 3661.5, event: Some(event) }
    }

    #[test]
    fn events_are_lines_and_objects() {
        let metrics = [("reward_mean".to_owned(), 0.25), ("pass_rate".to_owned(), 0.5)].into();
        let step = event(Event::Step(v1::StepDone { step: 3, total_steps: 9, metrics, remaining_seconds: 4.0 }));
        assert_eq!(as_text(&step), "01:01:01  step 3 of 9  reward 0.250  pass 50.0 %");
        assert_eq!(
            (&as_json(&step)["event"], &as_json(&step)["fields"]["metrics"]["pass_rate"]),
            (&json!("step"), &json!(0.5))
        );
        let hostile = event(Event::Note("one\ntwo\u{1b}[2J".into()));
        assert_eq!(as_text(&hostile), "01:01:01  one\\ntwo\\u{1b}[2J");
        assert!(!harmless_json(&as_json(&hostile).to_string()).contains('\u{1b}'));
        let over = event(Event::RunOver(v1::RunOver { how: "failed".into(), reason: "why".into() }));
        assert_eq!(as_text(&over), "01:01:01  the run is over: failed: why");
    }
}
