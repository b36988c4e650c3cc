//! What goes wrong with a run, told from its status and its newest steps.
//!
//! One place decides, so that `pacs status`, `pacs top`, the dashboard and the alerts say the same. A finding states its
//! evidence and what to do. It is a pure function of what it is given; which findings the console has printed is kept apart.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use pacs_protocol::v1;

use crate::progress::StepSummary;

/// Every rule, for `/metrics`, which exports a value for each.
///
/// A verifier that fails at times is no finding: its samples are verified again, and an alert has the long view.
pub(crate) const RULES: [&str; 13] = [
    "disk_full",
    "learners_missing",
    "no_workers",
    "verifier_stuck",
    "worker_silent",
    "stalled",
    "answers_cut",
    "nothing_to_learn",
    "policy_collapsed",
    "mismatch",
    "skipped_updates",
    "slow_rank",
    "worker_gone",
];

/// Steps that are kept for the rules.
const STEPS: usize = 32;
/// Steps in a row that a rule about the policy needs.
const IN_A_ROW: usize = 3;
/// Lost workers that are kept, and for how long a loss is a finding.
const LOST: usize = 256;
const LOST_SECONDS: f64 = 600.0;
/// Silence of a worker that is a finding; heartbeats come every second, and the dashboard draws as much.
const SILENT_SECONDS: f64 = 5.0;
/// Time without a verdict from a verifier that holds samples, and its multiple of the 99th percentile.
const STUCK_SECONDS: f64 = 30.0;
const STUCK_TIMES: f64 = 3.0;
/// Time for which workers may be absent, and learners, which load a model first.
const ABSENT_SECONDS: f64 = 15.0;
const LEARNERS_ABSENT_SECONDS: f64 = 120.0;
/// Time without progress that is a finding of its own when no other explains it.
const STALLED: Duration = Duration::from_secs(120);
/// Difference of log-probs of rollout and learner (nats per token) above which they compute different policies; as the alert.
const MISMATCH: f64 = 0.05;
/// The pass rate has collapsed below this share of its best, if that was worth something.
const COLLAPSED: f64 = 0.25;
const WORTH: f64 = 0.1;
/// Share of answers that end at the token limit above which most of them cannot be right.
const CUT_SHARE: f64 = 0.5;
/// A rank is slow when it computes so many times as long as the others, and holds them up for that share of the update.
const SLOW_TIMES: f64 = 1.5;
const SLOW_SHARE: f64 = 0.2;
/// Names in a sentence.
const NAMED: usize = 3;

/// The newest steps and losses, as far as the rules need them.
#[derive(Debug, Default)]
pub(crate) struct Recent {
    steps: VecDeque<Step>,
    /// Largest mean pass rate of `IN_A_ROW` steps, with the entropy there. The first steps count by themselves: an
    /// update that breaks the policy may be the first one.
    best: Option<(f64, f64)>,
    lost: VecDeque<Lost>,
    /// Findings of the newest steps that the console has shown.
    shown: BTreeSet<String>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Step {
    step: u64,
    pass_rate: f64,
    mixed_share: f64,
    cut_share: f64,
    entropy: f64,
    skipped: u32,
    update_seconds: f64,
    mismatch: Option<f64>,
    /// The slowest rank, its own computing time and the mean of the others, in seconds.
    slowest: Option<(u32, f64, f64)>,
}

#[derive(Debug)]
struct Lost {
    time: f64,
    name: String,
    why: String,
}

impl Recent {
    /// Takes a finished step into account. One that repeats undone steps replaces them.
    pub(crate) fn step(&mut self, summary: &StepSummary) {
        while self.steps.back().is_some_and(|last| last.step >= summary.step) {
            self.steps.pop_back();
        }
        if self.steps.len() == STEPS {
            self.steps.pop_front();
        }
        let of = |name: &str| summary.metrics.get(name).copied();
        let slowest = of("slowest_rank").zip(of("slowest_rank_seconds")).zip(of("other_ranks_seconds"));
        self.steps.push_back(Step {
            step: summary.step,
            pass_rate: summary.pass_rate,
            mixed_share: summary.mixed_share,
            cut_share: summary.truncated_share,
            entropy: summary.entropy,
            skipped: summary.skipped_updates,
            update_seconds: summary.seconds.training_seconds,
            mismatch: of("logprob_mismatch_mean"),
            slowest: slowest.map(|((rank, own), others)| (rank as u32, own, others)),
        });
        let newest: Vec<Step> = self.steps.iter().rev().take(IN_A_ROW).copied().collect();
        let (pass, entropy) = (mean(&newest, |step| step.pass_rate), mean(&newest, |step| step.entropy));
        if self.best.is_none_or(|(best, _)| pass > best) {
            self.best = Some((pass, entropy));
        }
    }

    /// Takes a lost worker into account; `time` is in seconds since 1970.
    pub(crate) fn lost(&mut self, time: f64, name: &str, why: &str) {
        if self.lost.len() == LOST {
            self.lost.pop_front();
        }
        self.lost.push_back(Lost { time, name: name.to_owned(), why: why.to_owned() });
    }

    /// What the newest steps show by themselves, without the state of the workers.
    fn of_steps(&self) -> impl Iterator<Item = v1::Finding> {
        let newest = self.newest().into_iter();
        newest
            .flat_map(|newest| [cut(newest), collapsed(newest, self.best), mismatch(newest)])
            .flatten()
            .chain(skipped(self))
    }

    /// Findings of the newest steps that were not there a step ago, as lines for the console.
    pub(crate) fn new_findings(&mut self) -> Vec<String> {
        let found: Vec<v1::Finding> = self.of_steps().collect();
        let shown = found.iter().map(|finding| finding.name.clone()).collect();
        let before = std::mem::replace(&mut self.shown, shown);
        let new = found.iter().filter(|finding| !before.contains(&finding.name));
        new.map(|finding| format!("notice: {}; {}", finding.sentence, finding.advice)).collect()
    }

    /// The newest steps, if there are `IN_A_ROW` of them.
    fn newest(&self) -> Option<[Step; IN_A_ROW]> {
        let first = self.steps.len().checked_sub(IN_A_ROW)?;
        Some(std::array::from_fn(|at| self.steps[first + at]))
    }
}

fn mean(steps: &[Step], value: impl Fn(&Step) -> f64) -> f64 {
    steps.iter().map(value).sum::<f64>() / steps.len() as f64
}

/// What goes wrong, that which stops the run first. `disk` is what the run waits for if that is its disk, `stalled` the
/// time without progress.
pub(crate) fn findings(
    status: &v1::GetStatusResponse,
    recent: &Recent,
    disk: Option<&str>,
    stalled: Duration,
) -> Vec<v1::Finding> {
    if status.paused || matches!(status.phase.as_str(), "finished" | "stopped" | "failed") {
        return Vec::new();
    }
    let mut found: Vec<v1::Finding> = Vec::new();
    found.extend(disk.map(disk_full));
    found.extend(learners_missing(status));
    found.extend(no_workers(status));
    found.extend(verifier_stuck(status));
    found.extend(workers_silent(status));
    // Of what stops the run, the cause alone is shown.
    if stalled >= STALLED && !found.iter().any(|finding| finding.stops_run) {
        let sentence =
            format!("nothing has happened for {}: the run {}", seconds(stalled.as_secs_f64()), status.waiting_for);
        found.push(finding(
            "stalled",
            true,
            sentence,
            "look at the logs of the role that it waits for: `pacs logs --role ROLE`",
            "timeline",
        ));
    }
    found.extend(recent.of_steps());
    found.extend(recent.newest().and_then(|newest| slow_rank(newest, status)));
    found.extend(workers_gone(status, recent));
    found.sort_by_key(|finding| !finding.stops_run);
    found
}

fn finding(name: &str, stops_run: bool, sentence: String, advice: &str, view: &str) -> v1::Finding {
    debug_assert!(RULES.contains(&name), "{name} is exported");
    v1::Finding { name: name.to_owned(), stops_run, sentence, advice: advice.to_owned(), view: view.to_owned() }
}

fn disk_full(waits_for: &str) -> v1::Finding {
    let sentence = format!("the run {waits_for}");
    finding("disk_full", true, sentence, "make room there; the run resumes by itself", "timeline")
}

fn learners_missing(status: &v1::GetStatusResponse) -> Option<v1::Finding> {
    let there = status.workers.iter().filter(|worker| worker.role() == v1::Role::Learner).count();
    let is_long = status.phase == "assembling" && status.phase_seconds > LEARNERS_ABSENT_SECONDS;
    (is_long && there < status.learners_wanted as usize).then(|| {
        let sentence =
            format!("{there} of {} learners have joined in {}", status.learners_wanted, seconds(status.phase_seconds));
        finding(
            "learners_missing",
            true,
            sentence,
            "start the missing ranks, or see why they ended: `pacs logs --role learner`",
            "workers",
        )
    })
}

/// A role that has work to do and no member.
fn no_workers(status: &v1::GetStatusResponse) -> Option<v1::Finding> {
    if status.phase_seconds < ABSENT_SECONDS || !matches!(status.phase.as_str(), "sampling" | "evaluating") {
        return None;
    }
    let queues = status.queues.unwrap_or_default();
    let role = [
        (v1::Role::Rollout, "rollout", queues.groups_waiting, "groups"),
        (v1::Role::Verifier, "verifier", queues.samples_waiting, "samples"),
    ];
    let is_absent = |role: v1::Role| status.workers.iter().all(|worker| worker.role() != role);
    let (_, name, waiting, what) = role.into_iter().find(|(role, _, waiting, _)| *waiting > 0 && is_absent(*role))?;
    let sentence = format!("no {name} worker is a member of the run, and {waiting} {what} wait for one");
    Some(finding("no_workers", true, sentence, "start one, or see why the others ended: `pacs logs`", "workers"))
}

/// Verifiers hold samples, and no verdict comes.
fn verifier_stuck(status: &v1::GetStatusResponse) -> Option<v1::Finding> {
    let mut stuck = Vec::new();
    let mut holders = 0;
    for worker in status.workers.iter().filter(|worker| worker.role() == v1::Role::Verifier && worker.leases > 0) {
        holders += 1;
        let own = status.verifiers.iter().filter(|verifier| verifier.worker == worker.name);
        let known = own.clone().next().is_some();
        let since = own.clone().filter_map(|verifier| verifier.seconds_since_verdict).fold(f64::INFINITY, f64::min);
        let usual = own.clone().filter_map(|verifier| verifier.p99_seconds).fold(0.0, f64::max);
        let failures: u64 = own.map(|verifier| verifier.failures_in_a_row).sum();
        // Before its first verdict a verifier is as old as what it does.
        let silent =
            if known && since.is_finite() { since.min(worker.activity_seconds) } else { worker.activity_seconds };
        if silent > STUCK_SECONDS.max(STUCK_TIMES * usual) || (failures >= 8 && since > STUCK_SECONDS) {
            stuck.push((worker, since, failures));
        }
    }
    let (worker, since, failures) = stuck.first()?;
    let whom = match stuck.len() {
        1 => format!("verifier {} has", worker.name),
        several => format!("{several} of {holders} verifiers ({} …) have", worker.name),
    };
    let since = if since.is_finite() { format!(" for {}", seconds(*since)) } else { " so far".to_owned() };
    let tries = match failures {
        0 => String::new(),
        1 => "; its last verification failed or timed out".to_owned(),
        several => format!("; its last {several} verifications failed or timed out"),
    };
    let queues = status.queues.unwrap_or_default();
    let waiting = queues.samples_waiting + queues.samples_verifying;
    let sentence = format!("{whom} given no verdict{since}{tries}; {waiting} samples have none");
    let advice = "see `pacs logs --role verifier`, and try the verifier alone with `pacs verify`; answers are verified again once it works";
    Some(finding("verifier_stuck", stuck.len() == holders, sentence, advice, "workers"))
}

/// Members that are frozen, or that the network has lost.
fn workers_silent(status: &v1::GetStatusResponse) -> Option<v1::Finding> {
    let silent: Vec<_> =
        status.workers.iter().filter(|worker| worker.seconds_since_heartbeat > SILENT_SECONDS).collect();
    let longest = silent.iter().map(|worker| worker.seconds_since_heartbeat).fold(0.0, f64::max);
    let (names, have) =
        (named(silent.iter().map(|worker| format!("{} on {}", worker.name, worker.host))), silent.len());
    let stops = silent.iter().any(|worker| {
        worker.role() == v1::Role::Learner
            || status.workers.iter().filter(|other| other.role() == worker.role()).count() == 1
    });
    (have > 0).then(|| {
        let sentence = format!(
            "{names} {} sent no heartbeat for {}: frozen, or cut off",
            if have == 1 { "has" } else { "have" },
            seconds(longest)
        );
        finding(
            "worker_silent",
            stops,
            sentence,
            "look at the host and its network; after the heartbeat timeout the work is issued again",
            "timeline",
        )
    })
}

/// Workers that were lost and have not come back, and those that come back to be lost again.
fn workers_gone(status: &v1::GetStatusResponse, recent: &Recent) -> Option<v1::Finding> {
    let mut losses: BTreeMap<&str, (usize, &Lost)> = BTreeMap::new();
    for lost in recent.lost.iter().filter(|lost| status.clock - lost.time < LOST_SECONDS) {
        losses.entry(&lost.name).and_modify(|(count, last)| (*count, *last) = (*count + 1, lost)).or_insert((1, lost));
    }
    let is_member = |name: &str| status.workers.iter().any(|worker| worker.name == name);
    let gone: Vec<_> = losses.values().filter(|(count, lost)| *count >= 3 || !is_member(&lost.name)).collect();
    let (count, last) = gone.iter().max_by(|a, b| a.1.time.total_cmp(&b.1.time))?;
    let names = named(gone.iter().map(|(_, lost)| lost.name.clone()));
    let ago = seconds((status.clock - last.time).max(0.0));
    let sentence = match (gone.len(), *count) {
        (1, 1) => format!("worker {names} was lost {ago} ago: it {}", last.why),
        (1, count) => {
            format!("worker {names} was lost {count} times in 10 minutes, the last time {ago} ago: it {}", last.why)
        }
        _ => format!("workers {names} were lost; {} {ago} ago: it {}", last.name, last.why),
    };
    let advice = "its work is issued again; `pacs logs --worker NAME` shows its last lines, and whoever started it starts it again";
    Some(finding("worker_gone", false, sentence, advice, "timeline"))
}

/// Answers that end at the token limit: the verifier sees no final answer in them.
fn cut(newest: [Step; IN_A_ROW]) -> Option<v1::Finding> {
    let share = mean(&newest, |step| step.cut_share);
    (share > CUT_SHARE).then(|| {
        let sentence = format!(
            "{} of the answers of the last {IN_A_ROW} steps end at `rollout.max_new_tokens`, before they are complete",
            percent(share)
        );
        let advice = "a larger `rollout.max_new_tokens`, or a prompt that asks for shorter answers";
        finding("answers_cut", false, sentence, advice, "samples")
    })
}

/// Nothing to learn from, because the policy is bad or because it is done.
fn collapsed(newest: [Step; IN_A_ROW], best: Option<(f64, f64)>) -> Option<v1::Finding> {
    let (pass, entropy) = (mean(&newest, |step| step.pass_rate), mean(&newest, |step| step.entropy));
    if let Some((best, before)) = best.filter(|(best, _)| *best >= WORTH && pass < COLLAPSED * best) {
        let sentence = format!(
            "the policy has collapsed: {} of the answers of the last {IN_A_ROW} steps are right, after {} at best; entropy {before:.2} nats then, {entropy:.2} now",
            percent(pass),
            percent(best)
        );
        let advice = "stop the run, remove the checkpoints of the steps since, and start it again with a smaller learning rate: it resumes from the newest one left";
        return Some(finding("policy_collapsed", false, sentence, advice, "samples"));
    }
    newest.iter().all(|step| step.mixed_share == 0.0).then(|| {
        let sentence = format!(
            "no group has had both right and wrong answers in the last {IN_A_ROW} steps ({} right): there is no gradient; entropy {entropy:.2} nats",
            percent(pass)
        );
        let advice = if pass > 0.5 {
            "harder problems, or the job is done"
        } else {
            "easier problems or supervised training first; the samples have the verifier's reasons"
        };
        finding("nothing_to_learn", false, sentence, advice, "samples")
    })
}

fn mismatch(newest: [Step; IN_A_ROW]) -> Option<v1::Finding> {
    let values: Vec<f64> = newest.iter().filter_map(|step| step.mismatch).collect();
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    (!values.is_empty() && least > MISMATCH).then(|| {
        let sentence = format!(
            "rollout and learner disagree by {:.3} nats per token about the same weights: what answers is not what is trained",
            values.iter().sum::<f64>() / values.len() as f64
        );
        let advice = "compare the model folders of the hosts; then a few steps with `rollout.kernels = \"reference\"`";
        finding("mismatch", false, sentence, advice, "curves")
    })
}

fn skipped(recent: &Recent) -> Option<v1::Finding> {
    let newest = recent.steps.iter().rev().take(2 * IN_A_ROW);
    let skipped: u32 = newest.clone().map(|step| step.skipped).sum();
    let last = newest.clone().find(|step| step.skipped > 0)?;
    let sentence = format!(
        "{skipped} updates of the last steps were skipped, the last in step {}: their gradients were not finite",
        last.step
    );
    Some(finding("skipped_updates", false, sentence, "lower the learning rate: `pacs set learning_rate=…`", "curves"))
}

/// One learner holds the others up, step after step.
fn slow_rank(newest: [Step; IN_A_ROW], status: &v1::GetStatusResponse) -> Option<v1::Finding> {
    let ranks = newest.map(|step| step.slowest);
    let slow = |step: &Step| {
        step.slowest.is_some_and(|(_, own, others)| {
            own > SLOW_TIMES * others && own - others > SLOW_SHARE * step.update_seconds
        })
    };
    let (rank, own, others) = ranks[IN_A_ROW - 1]?;
    let is_same = ranks.iter().all(|slowest| slowest.is_some_and(|(other, ..)| other == rank));
    if !is_same || !newest.iter().all(slow) {
        return None;
    }
    let member = status.workers.iter().find(|worker| worker.rank == Some(rank));
    let whom = member
        .map_or_else(|| format!("rank {rank}"), |worker| format!("{} (rank {rank} on {})", worker.name, worker.host));
    let sentence = format!(
        "{whom} holds the other learners up: it computed for {} in step {}, the others for {}",
        seconds(own),
        newest[IN_A_ROW - 1].step,
        seconds(others)
    );
    let advice = "look at its host: other programs, a throttled device, another model of it";
    Some(finding("slow_rank", false, sentence, advice, "curves"))
}

/// Up to `NAMED` names in a list, and the number of the others.
fn named(names: impl ExactSizeIterator<Item = String>) -> String {
    let more = names.len().saturating_sub(NAMED);
    let shown: Vec<String> = names.take(NAMED).collect();
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{}{more}", shown.join(", "))
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

fn seconds(seconds: f64) -> String {
    match seconds {
        short if short < 10.0 => format!("{short:.1} s"),
        short if short < 120.0 => format!("{short:.0} s"),
        long => format!("{:.0} min", long / 60.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(name: &str, role: v1::Role) -> v1::WorkerStatus {
        v1::WorkerStatus { name: name.into(), host: "node-1".into(), role: role.into(), ..Default::default() }
    }

    fn status(workers: Vec<v1::WorkerStatus>) -> v1::GetStatusResponse {
        v1::GetStatusResponse {
            phase: "sampling".into(),
            phase_seconds: 60.0,
            clock: 1000.0,
            learners_wanted: 2,
            waiting_for: "waits for groups".into(),
            queues: Some(v1::QueueDepths { samples_waiting: 240, samples_verifying: 16, ..Default::default() }),
            workers,
            ..Default::default()
        }
    }

    fn all() -> Vec<v1::WorkerStatus> {
        let rank = |worker, rank| v1::WorkerStatus { rank: Some(rank), ..worker };
        vec![
            worker("rollout-0", v1::Role::Rollout),
            worker("rollout-1", v1::Role::Rollout),
            rank(worker("learner-0", v1::Role::Learner), 0),
            rank(worker("learner-1", v1::Role::Learner), 1),
            v1::WorkerStatus { leases: 16, activity_seconds: 5.0, ..worker("verifier-0", v1::Role::Verifier) },
        ]
    }

    fn recent(steps: impl IntoIterator<Item = Step>) -> Recent {
        let mut recent = Recent::default();
        for (at, step) in (1..).zip(steps) {
            let mut metrics = BTreeMap::new();
            metrics.extend(step.mismatch.map(|value| ("logprob_mismatch_mean".to_owned(), value)));
            if let Some((rank, own, others)) = step.slowest {
                let named =
                    [("slowest_rank", f64::from(rank)), ("slowest_rank_seconds", own), ("other_ranks_seconds", others)];
                metrics.extend(named.map(|(name, value)| (name.to_owned(), value)));
            }
            let mut summary = StepSummary { step: at, metrics, ..Default::default() };
            (summary.pass_rate, summary.mixed_share) = (step.pass_rate, step.mixed_share);
            summary.truncated_share = step.cut_share;
            (summary.entropy, summary.skipped_updates) = (step.entropy, step.skipped);
            summary.seconds.training_seconds = step.update_seconds;
            recent.step(&summary);
        }
        recent
    }

    fn healthy() -> Step {
        let (mismatch, slowest) = (Some(1e-3), Some((1, 1.1, 1.0)));
        Step {
            pass_rate: 0.4,
            mixed_share: 0.7,
            entropy: 0.6,
            update_seconds: 1.2,
            mismatch,
            slowest,
            ..Step::default()
        }
    }

    fn told(status: &v1::GetStatusResponse, recent: &Recent) -> Vec<(String, bool, String)> {
        let found = findings(status, recent, None, Duration::ZERO);
        found.into_iter().map(|found| (found.name, found.stops_run, found.sentence)).collect()
    }

    fn one(status: &v1::GetStatusResponse, recent: &Recent) -> (String, bool, String) {
        let found: [_; 1] = told(status, recent).try_into().unwrap();
        found.into_iter().next().unwrap()
    }

    #[test]
    fn a_healthy_run_has_no_findings_and_neither_has_one_that_is_paused_or_over() {
        let recent = recent([healthy(); 8]);
        assert_eq!(told(&status(all()), &recent).len(), 0);
        let paused = v1::GetStatusResponse { paused: true, ..status(Vec::new()) };
        assert_eq!(told(&paused, &Recent::default()).len(), 0);
        let over = v1::GetStatusResponse { phase: "finished".into(), ..status(Vec::new()) };
        assert_eq!(told(&over, &Recent::default()).len(), 0);
    }

    #[test]
    fn a_verifier_without_verdicts_is_stuck_unless_it_is_known_to_be_slow() {
        let mut status = status(all());
        status.workers[4].activity_seconds = 50.0;
        let mut verifier = v1::VerifierStatus {
            worker: "verifier-0".into(),
            seconds_since_verdict: Some(50.0),
            failures_in_a_row: 20,
            p99_seconds: Some(0.5),
            ..Default::default()
        };
        status.verifiers = vec![verifier.clone()];
        let expected = "verifier verifier-0 has given no verdict for 50 s; its last 20 verifications failed or timed out; 256 samples have none";
        assert_eq!(one(&status, &Recent::default()), ("verifier_stuck".into(), true, expected.into()));
        // It has been idle during a long update, and has just begun.
        status.workers[4].activity_seconds = 2.0;
        status.verifiers[0].failures_in_a_row = 0;
        assert_eq!(told(&status, &Recent::default()).len(), 0);
        (verifier.p99_seconds, verifier.failures_in_a_row) = (Some(40.0), 0);
        status.verifiers = vec![verifier];
        status.workers[4].activity_seconds = 50.0;
        assert_eq!(told(&status, &Recent::default()).len(), 0);
    }

    #[test]
    fn lost_and_silent_workers_are_named_until_they_are_back() {
        let mut status = status(all());
        status.workers[1].seconds_since_heartbeat = 12.0;
        let expected = "rollout-1 on node-1 has sent no heartbeat for 12 s: frozen, or cut off";
        assert_eq!(one(&status, &Recent::default()), ("worker_silent".into(), false, expected.into()));
        let gone = status.workers.remove(1);
        let mut recent = Recent::default();
        recent.lost(970.0, "rollout-1", "sent no heartbeat");
        let expected = "worker rollout-1 was lost 30 s ago: it sent no heartbeat";
        assert_eq!(one(&status, &recent), ("worker_gone".into(), false, expected.into()));
        status.workers.push(v1::WorkerStatus { seconds_since_heartbeat: 0.0, ..gone });
        assert_eq!(told(&status, &recent).len(), 0);
        (971..973).for_each(|time| recent.lost(f64::from(time), "rollout-1", "was killed"));
        assert!(
            one(&status, &recent).2.contains("was lost 3 times in 10 minutes, the last time 28 s ago: it was killed")
        );
        status.clock += LOST_SECONDS;
        assert_eq!(told(&status, &recent).len(), 0);
    }

    #[test]
    fn absent_roles_stop_the_run() {
        let mut without = status(all());
        without.workers.pop();
        assert_eq!(one(&without, &Recent::default()).0, "no_workers");
        let mut assembling =
            v1::GetStatusResponse { phase: "assembling".into(), phase_seconds: 130.0, ..status(all()) };
        assembling.workers.remove(2);
        let expected = ("learners_missing".into(), true, "1 of 2 learners have joined in 2 min".into());
        assert_eq!(one(&assembling, &Recent::default()), expected);
        let stalled = findings(&status(all()), &Recent::default(), None, STALLED);
        assert_eq!((stalled.len(), stalled[0].name.as_str()), (1, "stalled"));
        // What it waits for is known, so the stall is not named apart.
        let disk = findings(&status(all()), &Recent::default(), Some("waits for 3 GiB of room in /runs"), STALLED);
        assert_eq!((disk.len(), disk[0].sentence.as_str()), (1, "the run waits for 3 GiB of room in /runs"));
    }

    #[test]
    fn policies_that_collapse_disagree_or_skip_are_found_after_a_few_steps() {
        let bad = Step { pass_rate: 0.0, mixed_share: 0.0, entropy: 3.1, ..healthy() };
        let found = one(&status(all()), &recent([healthy(); 6].into_iter().chain([bad; 3])));
        let expected = "the policy has collapsed: 0.0 % of the answers of the last 3 steps are right, after 40.0 % at best; entropy 0.60 nats then, 3.10 now";
        assert_eq!(found, ("policy_collapsed".into(), false, expected.into()));
        assert_eq!(told(&status(all()), &recent([healthy(), healthy(), healthy(), bad])).len(), 0);
        assert_eq!(
            one(&status(all()), &recent([healthy(), bad, bad, bad])).0,
            "policy_collapsed",
            "by the first update"
        );
        assert_eq!(one(&status(all()), &recent([bad; 3])).0, "nothing_to_learn", "it was never better");
        let done = Step { pass_rate: 1.0, mixed_share: 0.0, ..healthy() };
        assert_eq!(one(&status(all()), &recent([done; 3])).0, "nothing_to_learn");
        let long = Step { cut_share: 0.75, ..healthy() };
        let expected =
            "75.0 % of the answers of the last 3 steps end at `rollout.max_new_tokens`, before they are complete";
        assert_eq!(one(&status(all()), &recent([long; 3])), ("answers_cut".into(), false, expected.into()));
        assert_eq!(told(&status(all()), &recent([healthy(), long, long])).len(), 0, "their mean is half");
        let wide = Step { mismatch: Some(0.08), ..healthy() };
        assert!(one(&status(all()), &recent([wide; 3])).2.contains("disagree by 0.080 nats"));
        let skips = recent([healthy(), Step { skipped: 1, ..healthy() }, healthy()]);
        assert!(one(&status(all()), &skips).2.contains("the last in step 2"));
    }

    #[test]
    fn the_console_shows_a_finding_of_steps_once_while_it_lasts() {
        let (good, bad) = (healthy(), Step { mixed_share: 0.0, ..healthy() });
        let mut shown = recent([bad; 3]);
        let lines = shown.new_findings();
        assert!(lines.len() == 1 && lines[0].starts_with("notice: no group has had both"), "{lines:?}");
        assert_eq!(shown.new_findings(), [""; 0], "it lasts");
        for step in [good, bad, bad, bad] {
            let summary = StepSummary { step: shown.steps.len() as u64 + 1, pass_rate: 0.4, ..Default::default() };
            shown.step(&StepSummary { mixed_share: step.mixed_share, ..summary });
            assert_eq!(shown.new_findings().len(), usize::from(shown.steps.len() == 7), "step {}", shown.steps.len());
        }
    }

    #[test]
    fn a_rank_is_slow_when_it_holds_the_others_up_three_times_in_a_row() {
        let slow = Step { slowest: Some((1, 4.0, 0.5)), update_seconds: 4.1, ..healthy() };
        let expected = "learner-1 (rank 1 on node-1) holds the other learners up: it computed for 4.0 s in step 3, the others for 0.5 s";
        assert_eq!(one(&status(all()), &recent([slow; 3])), ("slow_rank".into(), false, expected.into()));
        let other = Step { slowest: Some((0, 4.0, 0.5)), ..slow };
        assert_eq!(
            told(&status(all()), &recent([slow, other, slow])).len(),
            0,
            "a slow rank is the same one each time"
        );
    }

    #[test]
    fn undone_steps_are_replaced_and_memory_is_bounded() {
        let mut recent = recent([healthy(); 100]);
        assert_eq!((recent.steps.len(), recent.steps.back().unwrap().step), (STEPS, 100));
        recent.step(&StepSummary { step: 90, ..Default::default() });
        assert_eq!(recent.steps.iter().map(|step| step.step).collect::<Vec<_>>(), (69..=90).collect::<Vec<_>>());
        (0..1000).for_each(|n| recent.lost(f64::from(n), "w", "died"));
        assert_eq!(recent.lost.len(), LOST);
    }
}
