//! What is observed of a run as JSON: the form that the page, `pacs watch` and `pacs report` share.

use std::collections::HashMap;

use pacs_protocol::v1;
use pacs_protocol::v1::watch_response::Event;
use serde_json::{Map, Value, json};

/// A number with seven significant digits, which halve the length of most; times in seconds since 1970 keep
/// milliseconds. Null if it is not finite.
#[must_use]
pub fn number(value: f64) -> Value {
    let short = match value.abs() {
        0.0..1e6 => format!("{value:.6e}").parse().unwrap_or(value),
        1e6..1e12 => (value * 1e3).round() / 1e3,
        _ => value,
    };
    json!(short)
}

fn numbers(values: &[f64]) -> Value {
    values.iter().map(|value| number(*value)).collect()
}

fn sorted(map: &HashMap<String, f64>) -> Value {
    let mut entries: Vec<_> = map.iter().collect();
    entries.sort_by_key(|(name, _)| *name);
    let entries = entries.into_iter().map(|(name, value)| (name.clone(), number(*value)));
    Value::Object(entries.collect::<Map<_, _>>())
}

/// Series of `GetMetrics`; those that cover several steps per point have `lows` and `highs`.
#[must_use]
pub fn metrics(response: &v1::GetMetricsResponse) -> Value {
    let series = response.series.iter().map(|series| {
        let mut object = json!({"name": series.name, "steps": series.steps, "means": numbers(&series.means)});
        if !series.lows.is_empty() {
            object["lows"] = numbers(&series.lows);
            object["highs"] = numbers(&series.highs);
        }
        object
    });
    json!({
        "steps_per_point": response.steps_per_point,
        "left_out": response.left_out,
        "sets": response.sets,
        "series": series.collect::<Vec<_>>(),
    })
}

/// One event of `Watch`: its number (0 for `situation` and `lost`), time (seconds since 1970), kind and fields.
#[must_use]
pub fn event(event: &v1::WatchResponse) -> Value {
    let (kind, fields) = match &event.event {
        Some(Event::Situation(situation)) => ("situation", self::situation(situation)),
        Some(Event::Lost(lost)) => ("lost", json!({"events": lost.events})),
        Some(Event::Step(step)) => (
            "step",
            json!({"step": step.step, "total_steps": step.total_steps, "metrics": sorted(&step.metrics),
                   "remaining_seconds": number(step.remaining_seconds)}),
        ),
        Some(Event::Evaluation(evaluation)) => {
            let fields =
                json!({"step": evaluation.step, "set": evaluation.set, "metrics": sorted(&evaluation.metrics)});
            ("evaluation", fields)
        }
        Some(Event::Saved(saved)) => {
            ("saved", json!({"step": saved.step, "path": saved.path, "seconds": number(saved.seconds)}))
        }
        Some(Event::WorkerGone(gone)) => {
            ("worker_gone", json!({"name": gone.name, "reason": gone.reason, "drained": gone.drained}))
        }
        Some(Event::LearnersReady(ready)) => {
            ("learners_ready", json!({"step": ready.step, "learners": ready.learners}))
        }
        Some(Event::Waiting(sentence)) => ("waiting", json!({"sentence": sentence})),
        Some(Event::Note(note)) => ("note", json!({"text": note})),
        Some(Event::Operator(done)) => ("operator", action(done)),
        Some(Event::RunOver(over)) => ("run_over", json!({"how": over.how, "reason": over.reason})),
        None => ("unknown", json!({})),
    };
    json!({"number": event.number, "time": number(event.time), "event": kind, "fields": fields})
}

fn situation(situation: &v1::Situation) -> Value {
    json!({
        "phase": situation.phase,
        "step": situation.step,
        "total_steps": situation.total_steps,
        "weight_version": situation.weight_version,
        "generation": situation.generation,
        "paused": situation.paused,
        "queues": queues(&situation.queues.unwrap_or_default()),
        "groups_in_flight": situation.groups_in_flight,
        "workers": situation.workers,
    })
}

/// Name of a worker's role.
#[must_use]
pub fn role(role: v1::Role) -> &'static str {
    match role {
        v1::Role::Rollout => "rollout",
        v1::Role::Learner => "learner",
        v1::Role::Verifier => "verifier",
        v1::Role::Unspecified => "unknown",
    }
}

/// The queues of a run.
#[must_use]
pub fn queues(queues: &v1::QueueDepths) -> Value {
    json!({
        "groups_waiting": queues.groups_waiting,
        "groups_generating": queues.groups_generating,
        "groups_complete": queues.groups_complete,
        "groups_wanted": queues.groups_wanted,
        "samples_waiting": queues.samples_waiting,
        "samples_verifying": queues.samples_verifying,
    })
}

/// Something that goes wrong with a run.
#[must_use]
pub fn finding(finding: &v1::Finding) -> Value {
    json!({
        "name": finding.name,
        "stops_run": finding.stops_run,
        "sentence": finding.sentence,
        "advice": finding.advice,
        "view": finding.view,
    })
}

fn action(action: &v1::OperatorAction) -> Value {
    json!({"operator": action.operator, "time": action.time, "action": action.action})
}

/// A server that a rollout worker drives.
#[must_use]
pub fn server(server: &v1::EngineServer) -> Value {
    json!({
        "address": server.address,
        "state": server.state,
        "weight_version": server.weight_version,
        "probe_error": server.probe_error.map(number),
        "in_flight": server.in_flight,
        "running": server.running,
        "queued": server.queued,
        "samples": server.samples,
        "discarded": server.discarded,
        "error": server.error,
    })
}

/// The status of a run.
#[must_use]
pub fn status(status: &v1::GetStatusResponse) -> Value {
    let worker = |worker: &v1::WorkerStatus| {
        json!({
            "name": worker.name,
            "role": role(worker.role()),
            "rank": worker.rank,
            "host": worker.host,
            "pid": worker.pid,
            "activity": worker.activity,
            "activity_seconds": number(worker.activity_seconds),
            "silent_seconds": number(worker.seconds_since_heartbeat),
            "leases": worker.leases,
            "draining": worker.draining,
            "servers": worker.servers.iter().map(server).collect::<Vec<_>>(),
        })
    };
    let verifier = |verifier: &v1::VerifierStatus| {
        json!({
            "worker": verifier.worker,
            "verifier": verifier.verifier,
            "outcomes": verifier.outcomes,
            "cache_hits": verifier.cache_hits,
            "p50_seconds": verifier.p50_seconds.map(number),
            "p99_seconds": verifier.p99_seconds.map(number),
            "failures_in_a_row": verifier.failures_in_a_row,
            "recent": verifier.recent,
            "recent_failures": verifier.recent_failures,
            "seconds_since_verdict": verifier.seconds_since_verdict.map(number),
        })
    };
    let quarantined = |group: &v1::SetAsideGroup| json!({"group": group.group_id, "question": group.question, "reason": group.reason});
    json!({
        "job": status.job,
        "run_dir": status.run_dir,
        "phase": status.phase,
        "phase_seconds": number(status.phase_seconds),
        "paused": status.paused,
        "step": status.step,
        "total_steps": status.total_steps,
        "weight_version": status.weight_version,
        "generation": status.generation,
        "waiting_for": status.waiting_for,
        "findings": status.findings.iter().map(finding).collect::<Vec<_>>(),
        "oldest_group": status.oldest_group,
        "uptime_seconds": number(status.uptime_seconds),
        "remaining_seconds": status.remaining_seconds.map(number),
        "clock": number(status.clock),
        "learners_wanted": status.learners_wanted,
        "slots": status.slots,
        "groups_in_flight": status.groups_in_flight,
        "queues": queues(&status.queues.unwrap_or_default()),
        "counters": status.counters,
        "metrics": sorted(&status.metrics),
        "workers": status.workers.iter().map(worker).collect::<Vec<_>>(),
        "verifiers": status.verifiers.iter().map(verifier).collect::<Vec<_>>(),
        "actions": status.actions.iter().map(action).collect::<Vec<_>>(),
        "quarantined": status.set_aside.iter().map(quarantined).collect::<Vec<_>>(),
        "retired_problems": status.retired_problems,
        "training_problems": status.training_problems,
        "left_out": status.left_out,
    })
}

/// A sample without its tokens.
#[must_use]
pub fn sample(sample: &v1::ObservedSample) -> Value {
    let verdict = sample.verdict.as_ref();
    json!({
        "group": sample.group_id,
        "index": sample.index,
        "set": if sample.purpose() == v1::Purpose::Evaluate { "evaluation" } else { "train" },
        "state": match sample.state() {
            v1::SampleState::Archived => "archived",
            v1::SampleState::Judged => "judged",
            v1::SampleState::Unjudged | v1::SampleState::Unspecified => "unjudged",
        },
        "step": sample.step,
        "question": sample.question,
        "gold": sample.gold,
        "response": sample.response,
        "shortened": sample.shortened,
        "outcome": verdict.map(|verdict| outcome(verdict.outcome())),
        "label": verdict.map(|verdict| number(verdict.label)),
        "reward": verdict.map(|verdict| number(verdict.reward)),
        "extracted": verdict.and_then(|verdict| verdict.extracted.as_ref()),
        "rule": verdict.map(|verdict| &verdict.rule),
        "tokens": sample.tokens,
        "finish": match sample.finish() {
            v1::FinishReason::Stop => "stop",
            v1::FinishReason::Length => "length",
            v1::FinishReason::Unspecified => "unknown",
        },
        "version": sample.version,
        "logprob_sum": sample.logprob_sum.map(number),
        "entropy_sum": number(sample.entropy_sum),
        "score": sample.score.map(|score| number(score.into())),
        "coefficient": sample.coefficient.map(|coefficient| number(coefficient.into())),
    })
}

/// Name of an outcome.
#[must_use]
pub fn outcome(outcome: v1::Outcome) -> &'static str {
    match outcome {
        v1::Outcome::Correct => "correct",
        v1::Outcome::Wrong => "wrong",
        v1::Outcome::Unparsable => "unparsable",
        v1::Outcome::Failed => "failed",
        v1::Outcome::TimedOut => "timed_out",
        v1::Outcome::Unspecified => "unknown",
    }
}

/// One sample with its tokens. `pieces` are their texts; empty where no tokenizer is at hand.
#[must_use]
pub fn whole_sample(response: &v1::GetSampleResponse, pieces: &[String]) -> Value {
    let mut object = sample(&response.sample.clone().unwrap_or_default());
    let floats = |values: &[f32]| -> Value { values.iter().map(|value| number(f64::from(*value))).collect() };
    let span = |span: &v1::VersionSpan| json!({"version": span.version, "tokens": span.tokens});
    object["first_token"] = json!(response.first_token);
    object["token_ids"] = json!(response.tokens);
    object["pieces"] = json!(pieces);
    object["logprobs"] = floats(&response.logprobs);
    object["sampled_logprobs"] = floats(&response.sampled_logprobs);
    object["prompt_tokens"] = json!(response.prompt_tokens.len());
    object["spans"] = response.spans.iter().map(span).collect();
    object
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_times_stay_exact() {
        let text = |value: f64| number(value).to_string();
        assert_eq!(text(0.123_456_789_012), "0.1234568");
        assert_eq!(text(1.0 / 3e9), "3.333333e-10");
        assert_eq!(text(1_764_495_896.123_4), "1764495896.123");
        assert_eq!(
            (text(0.0), text(-2.5), text(f64::NAN), text(f64::INFINITY)),
            ("0.0".into(), "-2.5".into(), "null".into(), "null".into())
        );
    }
}
