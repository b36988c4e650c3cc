//! `pacs status`: what a run does, and what it waits for.

use std::fmt::Write;

use pacs_protocol::v1::{GetStatusRequest, GetStatusResponse, VerifierStatus, WorkerStatus};
use pacs_runtime::{Exit, harmless};
use serde_json::{Value, json};

use crate::arguments::Status;
use crate::client::{block_on, connect, in_time};
use crate::failure::Failure;
use crate::format::{count, percent, plural, seconds, table};
use crate::output;
use crate::target::{self, Choice};

pub(crate) fn status(arguments: &Status) -> Result<Exit, Failure> {
    let target = match target::choose(arguments.target.as_deref())? {
        Choice::One(target) => target,
        Choice::Several(found) => {
            if arguments.json {
                output::json(format_args!("{:#}", target::as_json(&found)));
            }
            return Err(target::ambiguous(&found));
        }
    };
    let status = block_on(async {
        let mut client = connect(&target).await?;
        in_time(client.get_status(GetStatusRequest {})).await.map_err(|failure| failure.doing("get the status"))
    })?;
    if arguments.json {
        output::json(format_args!("{:#}", as_json(&status)));
    } else {
        output::text(as_text(&status));
    }
    Ok(Exit::Done)
}

fn as_text(status: &GetStatusResponse) -> String {
    let mut text = String::new();
    for finding in &status.findings {
        let mark = if finding.stops_run { "stopped" } else { "notice" };
        line_of(&mut text, mark, &format!("{}; {}", finding.sentence, finding.advice));
    }
    let left = status.remaining_seconds.map(|left| format!(", {} left", seconds(left))).unwrap_or_default();
    let (of_run, of_phase) = if status.phase == "evaluating" { ("", left.as_str()) } else { (left.as_str(), "") };
    let lines = [
        ("job", format!("{} in {}, up for {}", status.job, status.run_dir, seconds(status.uptime_seconds))),
        ("phase", format!("{} for {}{of_phase}", status.phase, seconds(status.phase_seconds))),
        ("step", format!("{} of {}{of_run}", count(status.step), count(status.total_steps))),
        ("weights", format!("version {}, learner generation {}", status.weight_version, status.generation)),
        ("waiting", status.waiting_for.clone()),
    ];
    for (name, line) in lines {
        line_of(&mut text, name, &line);
    }
    if let Some(oldest) = &status.oldest_group {
        line_of(&mut text, "oldest", oldest);
    }
    if status.slots > 0 {
        let slots = format!("{} of {} filled", status.groups_in_flight, status.slots);
        line_of(&mut text, "slots", &slots);
    }
    if let Some(retired) = status.retired_problems {
        line_of(&mut text, "problems", &format!("{retired} of {} retired", status.training_problems));
    }
    if let Some(queues) = status.queues {
        let groups = format!(
            "groups: {} waiting, {} generating, {} of {} complete; samples: {} waiting, {} verifying",
            queues.groups_waiting,
            queues.groups_generating,
            queues.groups_complete,
            queues.groups_wanted,
            queues.samples_waiting,
            queues.samples_verifying,
        );
        line_of(&mut text, "queues", &groups);
    }
    let metrics = metrics_line(status);
    if !metrics.is_empty() {
        line_of(&mut text, "last step", &metrics);
    }
    let measured = measured_line(status);
    if !measured.is_empty() {
        line_of(&mut text, "evaluated", &measured);
    }
    let counted: Vec<String> = sorted(&status.counters)
        .into_iter()
        .filter(|(_, value)| **value > 0)
        .map(|(name, value)| format!("{} {}", name.replace('_', " "), count(*value)))
        .collect();
    if !counted.is_empty() {
        line_of(&mut text, "counts", &counted.join(", "));
    }
    for action in &status.actions {
        line_of(&mut text, "operator", &format!("{} {} ({})", action.operator, action.action, ago(action.time)));
    }
    for group in &status.set_aside {
        line_of(&mut text, "quarantined ", &format!("g{}: {}; {}", group.group_id, group.reason, group.question));
    }
    workers_table(&mut text, status);
    servers_table(&mut text, status);
    verifiers_table(&mut text, status);
    text
}

/// Formats how long ago a Unix time in seconds was.
fn ago(time: u64) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    format!("{} ago", seconds(now.saturating_sub(time) as f64))
}

fn line_of(text: &mut String, name: &str, line: &str) {
    // Half of the lines hold text that workers sent.
    let _ = writeln!(text, "{name:<10}{}", harmless(line));
}

/// Formats the few metrics that show how training is going; `--json` has all of them.
fn metrics_line(status: &GetStatusResponse) -> String {
    let shown = [
        ("reward_mean", "reward", (|value| format!("{value:.3}")) as fn(f64) -> String),
        ("pass_rate", "pass rate", percent),
        ("mixed_share", "mixed groups", percent),
        ("entropy", "entropy", |value| format!("{value:.2}")),
        ("answer_tokens_mean", "answer tokens", |value| format!("{value:.1}")),
        ("tokens_per_second", "tokens/s", |value| format!("{value:.0}")),
    ];
    let parts = shown.into_iter().filter_map(|(name, label, format)| {
        status.metrics.get(name).map(|value| format!("{label} {}", format(*value)))
    });
    parts.collect::<Vec<_>>().join(", ")
}

/// Formats the newest evaluation of each set.
fn measured_line(status: &GetStatusResponse) -> String {
    let sets = sorted(&status.metrics).into_iter().filter_map(|(name, share)| {
        let set = name.strip_prefix("evaluation_")?.strip_suffix("_pass_at_1")?;
        let of = |what: &str| status.metrics.get(&format!("evaluation_{set}_{what}"));
        let at_k = status.metrics.iter().find_map(|(name, share)| {
            let k = name.strip_prefix(&format!("evaluation_{set}_pass_at_"))?;
            (k != "1").then(|| format!(", pass@{k} {}", percent(*share)))
        });
        let step = of("step").copied().unwrap_or_default();
        Some(format!("{set} after step {step}: pass@1 {}{}", percent(*share), at_k.unwrap_or_default()))
    });
    sets.collect::<Vec<_>>().join("; ")
}

fn workers_table(text: &mut String, status: &GetStatusResponse) {
    if status.workers.is_empty() {
        let wanted = plural(u64::from(status.learners_wanted), "learner is", "learners are");
        let _ = writeln!(text, "\nno worker is registered; {wanted} wanted");
        return;
    }
    let mut rows = vec![["worker", "role", "where", "heard", "leases", "does"].map(str::to_owned).to_vec()];
    rows.extend(status.workers.iter().map(worker_row));
    let _ = write!(text, "\n{}", table(&rows));
    if let Some(more) = status.left_out.get("workers") {
        let _ = writeln!(text, "and {}", plural(u64::from(*more), "more worker", "more workers"));
    }
}

/// Appends the table of servers that rollout workers drive.
fn servers_table(text: &mut String, status: &GetStatusResponse) {
    let mut rows = vec![
        [
            "server",
            "worker",
            "state",
            "version",
            "probe error",
            "in flight",
            "running",
            "queued",
            "samples",
            "discarded",
            "error",
        ]
        .map(str::to_owned)
        .to_vec(),
    ];
    for worker in &status.workers {
        for server in &worker.servers {
            rows.push(vec![
                server.address.clone(),
                worker.name.clone(),
                server.state.clone(),
                server.weight_version.map_or("-".to_owned(), |version| version.to_string()),
                server.probe_error.map_or("-".to_owned(), |error| format!("{error:.1e}")),
                server.in_flight.to_string(),
                server.running.to_string(),
                server.queued.to_string(),
                count(server.samples),
                count(server.discarded),
                if server.error.is_empty() { "-".to_owned() } else { server.error.clone() },
            ]);
        }
    }
    if rows.len() > 1 {
        let _ = write!(text, "\n{}", table(&rows));
    }
}

/// Appends the table of verifier workers, including those that have left.
fn verifiers_table(text: &mut String, status: &GetStatusResponse) {
    if status.verifiers.is_empty() {
        return;
    }
    let heading =
        ["verifier", "gives", "correct", "wrong", "unparsable", "failed", "timed out", "cached", "p50", "p99"];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    for verifier in &status.verifiers {
        let mut row = vec![verifier.worker.clone(), verifier.verifier.clone()];
        let outcomes = ["correct", "wrong", "unparsable", "failed", "timed_out"];
        row.extend(outcomes.map(|outcome| count(verifier.outcomes.get(outcome).copied().unwrap_or(0))));
        row.push(count(verifier.cache_hits));
        let time = |time: Option<f64>| time.map_or("-".to_owned(), |seconds| format!("{:.2} ms", 1e3 * seconds));
        row.extend([verifier.p50_seconds, verifier.p99_seconds].map(time));
        rows.push(row);
    }
    let _ = write!(text, "\n{}", table(&rows));
}

fn worker_row(worker: &WorkerStatus) -> Vec<String> {
    let role = match worker.rank {
        Some(rank) => format!("{} rank {rank}", role_name(worker)),
        None => role_name(worker).to_owned(),
    };
    vec![
        worker.name.clone(),
        role,
        format!("{}:{}", worker.host, worker.pid),
        format!("{} ago", seconds(worker.seconds_since_heartbeat)),
        worker.leases.to_string(),
        does(worker),
    ]
}

/// Describes what a worker is doing, and for how long once that is notable.
fn does(worker: &WorkerStatus) -> String {
    let since = match worker.activity_seconds {
        short if short < 10.0 => String::new(),
        long => format!(" for {}", seconds(long)),
    };
    let draining = if worker.draining { " (draining)" } else { "" };
    format!("{}{since}{draining}", worker.activity)
}

fn role_name(worker: &WorkerStatus) -> &'static str {
    pacs_dashboard::json::role(worker.role())
}

fn as_json(status: &GetStatusResponse) -> Value {
    let queues = status.queues.unwrap_or_default();
    let workers: Vec<Value> = status.workers.iter().map(worker_json).collect();
    json!({
        "job": status.job,
        "run_dir": status.run_dir,
        "phase": status.phase,
        "phase_seconds": status.phase_seconds,
        "step": status.step,
        "total_steps": status.total_steps,
        "weight_version": status.weight_version,
        "generation": status.generation,
        "learners_wanted": status.learners_wanted,
        "waiting_for": status.waiting_for,
        "queues": pacs_dashboard::json::queues(&queues),
        "workers": workers,
        "left_out": sorted(&status.left_out).into_iter().map(|(name, count)| (name.clone(), json!(count)))
            .collect::<serde_json::Map<_, _>>(),
        "metrics": sorted(&status.metrics).into_iter().map(|(name, value)| (name.clone(), json!(value)))
            .collect::<serde_json::Map<_, _>>(),
        "counters": sorted(&status.counters).into_iter().map(|(name, value)| (name.clone(), json!(value)))
            .collect::<serde_json::Map<_, _>>(),
        "verifiers": status.verifiers.iter().map(verifier_json).collect::<Vec<_>>(),
        "oldest_group": status.oldest_group,
        "slots": status.slots,
        "groups_in_flight": status.groups_in_flight,
        "retired_problems": status.retired_problems,
        "training_problems": status.training_problems,
        "paused": status.paused,
        "findings": status.findings.iter().map(pacs_dashboard::json::finding).collect::<Vec<_>>(),
        "actions": status.actions.iter().map(|action| {
            json!({"operator": action.operator, "time": action.time, "action": action.action})
        }).collect::<Vec<_>>(),
        "set_aside": status.set_aside.iter().map(|group| {
            json!({"group": group.group_id, "question": group.question, "reason": group.reason})
        }).collect::<Vec<_>>(),
        "uptime_seconds": status.uptime_seconds,
        "remaining_seconds": status.remaining_seconds,
    })
}

fn worker_json(worker: &WorkerStatus) -> Value {
    json!({
        "id": worker.worker_id,
        "name": worker.name,
        "role": role_name(worker),
        "host": worker.host,
        "pid": worker.pid,
        "activity": worker.activity,
        "activity_seconds": worker.activity_seconds,
        "draining": worker.draining,
        "seconds_since_heartbeat": worker.seconds_since_heartbeat,
        "leases": worker.leases,
        "rank": worker.rank,
        "servers": worker.servers.iter().map(pacs_dashboard::json::server).collect::<Vec<_>>(),
    })
}

fn verifier_json(verifier: &VerifierStatus) -> Value {
    json!({
        "worker": verifier.worker,
        "verifier": verifier.verifier,
        "outcomes": sorted(&verifier.outcomes).into_iter().map(|(name, value)| (name.clone(), json!(value)))
            .collect::<serde_json::Map<_, _>>(),
        "cache_hits": verifier.cache_hits,
        "p50_seconds": verifier.p50_seconds,
        "p99_seconds": verifier.p99_seconds,
        "failures_in_a_row": verifier.failures_in_a_row,
        "recent": verifier.recent,
        "recent_failures": verifier.recent_failures,
        "seconds_since_verdict": verifier.seconds_since_verdict,
    })
}

fn sorted<T>(map: &std::collections::HashMap<String, T>) -> Vec<(&String, &T)> {
    let mut entries: Vec<_> = map.iter().collect();
    entries.sort_by_key(|(name, _)| *name);
    entries
}

#[cfg(test)]
mod tests {
    use expect_test::expect;
    use pacs_protocol::v1::{Finding, QueueDepths, Role};

    use super::*;

    fn worker(role: Role, name: &str, rank: Option<u32>) -> WorkerStatus {
        WorkerStatus {
            worker_id: 3,
            name: name.into(),
            role: role.into(),
            host: "node-1".into(),
            pid: 4711,
            activity: "waits for work".into(),
            seconds_since_heartbeat: 0.42,
            leases: 2,
            rank,
            activity_seconds: 75.0,
            draining: false,
            servers: Vec::new(),
        }
    }

    fn running() -> GetStatusResponse {
        GetStatusResponse {
            job: "demo".into(),
            run_dir: "/runs/demo".into(),
            phase: "sampling".into(),
            phase_seconds: 2.5,
            step: 12,
            total_steps: 40,
            weight_version: 12,
            generation: 1,
            learners_wanted: 1,
            workers: vec![worker(Role::Rollout, "rollout-0", None), worker(Role::Learner, "learner-0", Some(0))],
            queues: Some(QueueDepths { groups_generating: 8, groups_wanted: 8, ..QueueDepths::default() }),
            waiting_for: "step 13 waits for 1 rollout worker: 8 of 8 groups open".into(),
            metrics: [("reward_mean".to_owned(), 0.25), ("entropy".to_owned(), 1.5)].into(),
            uptime_seconds: 75.0,
            remaining_seconds: Some(130.0),
            counters: [("dropped_groups".to_owned(), 0), ("lapsed_leases".to_owned(), 1)].into(),
            verifiers: vec![VerifierStatus {
                worker: "verifier-0".into(),
                verifier: "label".into(),
                outcomes: [("correct".to_owned(), 1200), ("failed".to_owned(), 3)].into(),
                cache_hits: 700,
                p50_seconds: Some(0.000_25),
                p99_seconds: Some(0.0125),
                ..Default::default()
            }],
            findings: vec![Finding {
                name: "slow_rank".into(),
                sentence: "learner-0 holds the other learners up".into(),
                advice: "look at its host".into(),
                ..Default::default()
            }],
            oldest_group: Some("g96 for 2.5 s, 8 samples missing, held by rollout-0".into()),
            slots: 16,
            groups_in_flight: 8,
            retired_problems: Some(12),
            training_problems: 8100,
            ..GetStatusResponse::default()
        }
    }

    #[test]
    fn the_text_says_what_the_run_does() {
        expect![[r#"
            notice    learner-0 holds the other learners up; look at its host
            job       demo in /runs/demo, up for 1 min 15 s
            phase     sampling for 2.5 s
            step      12 of 40, 2 min 10 s left
            weights   version 12, learner generation 1
            waiting   step 13 waits for 1 rollout worker: 8 of 8 groups open
            oldest    g96 for 2.5 s, 8 samples missing, held by rollout-0
            slots     8 of 16 filled
            problems  12 of 8100 retired
            queues    groups: 0 waiting, 8 generating, 0 of 8 complete; samples: 0 waiting, 0 verifying
            last step reward 0.250, entropy 1.50
            counts    lapsed leases 1

            worker     role            where        heard      leases  does
            rollout-0  rollout         node-1:4711  0.4 s ago  2       waits for work for 1 min 15 s
            learner-0  learner rank 0  node-1:4711  0.4 s ago  2       waits for work for 1 min 15 s

            verifier    gives  correct  wrong  unparsable  failed  timed out  cached  p50      p99
            verifier-0  label  1 200    0      0           3       0          700     0.25 ms  12.50 ms
        "#]]
        .assert_eq(&as_text(&running()));
    }

    #[test]
    fn nothing_that_a_worker_says_reaches_the_terminal_as_it_is() {
        let hostile = "\u{1b}]0;x\u{7}\u{9b}2J\n\u{202e}step";
        let mut status = running();
        let before = as_text(&status).lines().count();
        for text in [&mut status.job, &mut status.run_dir, &mut status.phase, &mut status.waiting_for] {
            text.push_str(hostile);
        }
        status.oldest_group = status.oldest_group.map(|oldest| oldest + hostile);
        for worker in &mut status.workers {
            [&mut worker.name, &mut worker.host, &mut worker.activity]
                .into_iter()
                .for_each(|text| text.push_str(hostile));
        }
        for verifier in &mut status.verifiers {
            [&mut verifier.worker, &mut verifier.verifier].into_iter().for_each(|text| text.push_str(hostile));
        }
        for finding in &mut status.findings {
            [&mut finding.sentence, &mut finding.advice].into_iter().for_each(|text| text.push_str(hostile));
        }
        status.counters.insert(hostile.to_owned(), 1);
        let text = as_text(&status);
        assert_eq!(text.lines().count(), before, "no line was forged: {text}");
        assert_eq!(pacs_runtime::harmless_lines(&text), text);
        let json = as_json(&status).to_string();
        let shown = pacs_runtime::harmless_json(&json);
        assert!(!shown.contains(['\u{9b}', '\u{202e}']));
        assert_eq!(serde_json::from_str::<Value>(&shown).expect("JSON"), as_json(&status));
    }

    #[test]
    fn a_run_without_workers_says_so() {
        let status = GetStatusResponse {
            job: "demo".into(),
            phase: "assembling".into(),
            waiting_for: "waits for learners: 1 wanted, 0 registered, 0 ready, for 1.5 s".into(),
            learners_wanted: 1,
            total_steps: 40,
            ..GetStatusResponse::default()
        };
        expect![[r#"
            job       demo in , up for 0.0 s
            phase     assembling for 0.0 s
            step      0 of 40
            weights   version 0, learner generation 0
            waiting   waits for learners: 1 wanted, 0 registered, 0 ready, for 1.5 s

            no worker is registered; 1 learner is wanted
        "#]]
        .assert_eq(&as_text(&status));
    }

    #[test]
    fn the_json_has_every_field() {
        let json = as_json(&running());
        assert_eq!(json["workers"][1]["rank"], 0);
        assert_eq!(json["workers"][0]["rank"], Value::Null);
        assert_eq!((&json["queues"]["groups_wanted"], &json["counters"]["lapsed_leases"]), (&json!(8), &json!(1)));
        assert_eq!(json["metrics"]["reward_mean"], 0.25);
        assert_eq!(
            (&json["verifiers"][0]["outcomes"]["failed"], &json["verifiers"][0]["cache_hits"]),
            (&json!(3), &json!(700))
        );
    }
}
