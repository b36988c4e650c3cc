//! The run's metrics in the Prometheus text format.
//!
//! Written by hand: all values are known at the time of the scrape, so there is nothing to register. The client library
//! writes OpenMetrics, whose counters `promtool check metrics` reports as undocumented.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pacs_machine::Counter;
use pacs_protocol::v1;
use tokio::sync::OwnedSemaphorePermit;

use super::Observer;
use crate::driver::{RULES, unix_time};

pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Timeout for asking the file system how full it is.
const DISK_WAIT: Duration = Duration::from_secs(2);
/// Bound on exported step metrics, some of which are named by learners and verifiers.
const MOST_METRICS: usize = 300;
/// Bytes of a label value that are kept.
const MOST_LABEL: usize = 128;
const PHASES: [&str; 10] = [
    "assembling",
    "preparing",
    "evaluating",
    "sampling",
    "training",
    "saving",
    "committing",
    "finished",
    "stopped",
    "failed",
];

/// The values that one scrape exports.
#[derive(Debug, Default)]
struct Scrape {
    status: Arc<v1::GetStatusResponse>,
    run_id: String,
    /// Numbers of the newest evaluation of each set.
    evaluations: BTreeMap<String, BTreeMap<String, f64>>,
    /// Free and total bytes of the run folder's file system; `None` if it did not answer.
    disk: Option<(u64, u64)>,
    /// Seconds until the coordinator's certificate expires; `None` without TLS.
    certificate: Option<f64>,
    now: f64,
}

impl Observer {
    /// The page with all current metrics.
    pub(super) async fn exposition(&self) -> String {
        let scrape = Scrape {
            status: self.status(),
            run_id: self.0.run_id.clone(),
            evaluations: self.0.feed.newest_evaluations(),
            disk: self.disk().await,
            certificate: self.0.security.valid_for().map(|valid| valid.as_secs_f64()),
            now: unix_time(),
        };
        scrape.text()
    }

    /// Free and total bytes of the disk; `None` if it does not answer in time. A hung disk blocks one thread, however
    /// often it is asked.
    async fn disk(&self) -> Option<(u64, u64)> {
        let place = Arc::clone(&self.0.disk).try_acquire_owned().ok()?;
        let run_dir = self.0.run_dir.clone();
        let asked = tokio::task::spawn_blocking(move || free_and_size(run_dir, place));
        tokio::time::timeout(DISK_WAIT, asked).await.ok()?.ok()?
    }
}

fn free_and_size(run_dir: PathBuf, _place: OwnedSemaphorePermit) -> Option<(u64, u64)> {
    let disk = nix::sys::statvfs::statvfs(&run_dir).ok()?;
    let block = disk.fragment_size();
    Some((disk.blocks_available().saturating_mul(block), disk.blocks().saturating_mul(block)))
}

impl Scrape {
    fn text(&self) -> String {
        let mut page = Page(String::with_capacity(16 << 10));
        self.run(&mut page);
        self.work(&mut page);
        self.verifications(&mut page);
        self.numbers(&mut page);
        self.machine(&mut page);
        page.0
    }

    fn run(&self, page: &mut Page) {
        let status = &*self.status;
        page.gauge("pacs_info", "The run and the program that coordinates it.");
        let info = [("job", status.job.as_str()), ("run_id", &self.run_id), ("version", env!("CARGO_PKG_VERSION"))];
        page.value("pacs_info", &info, 1.0);
        page.one("pacs_uptime_seconds", "Time since this coordinator started.", status.uptime_seconds);
        page.gauge("pacs_phase", "1 for the phase that the run is in.");
        for phase in PHASES {
            page.value("pacs_phase", &[("phase", phase)], f64::from(u8::from(phase == status.phase)));
        }
        page.one("pacs_phase_age_seconds", "Time since the phase began.", status.phase_seconds);
        page.one("pacs_paused", "1 when an operator has paused the run.", f64::from(u8::from(status.paused)));
        page.counter("pacs_steps_total", "Training steps done; goes back when a generation of learners is lost.");
        page.value("pacs_steps_total", &[], status.step as f64);
        page.one("pacs_steps_planned", "Training steps of the job.", status.total_steps as f64);
        let last = status.metrics.get("time").copied().unwrap_or(self.now - status.uptime_seconds);
        let help = "When the newest step ended; when this coordinator started, before it has seen one.";
        page.one("pacs_last_step_timestamp_seconds", help, last);
        page.one("pacs_weight_version", "Newest published weights.", status.weight_version as f64);
        page.one("pacs_learner_generation", "Generation of the learners.", status.generation as f64);
        if let Some(remaining) = status.remaining_seconds {
            page.one(
                "pacs_remaining_seconds",
                "Estimated time to the end of the job, or of the evaluation that holds it.",
                remaining,
            );
        }
        page.gauge("pacs_finding", "1 while the coordinator sees this going wrong; `pacs status` says it in words.");
        for rule in RULES {
            let is_found = status.findings.iter().any(|finding| finding.name == rule);
            page.value("pacs_finding", &[("finding", rule)], f64::from(u8::from(is_found)));
        }
        page.counter("pacs_events_total", "What was counted since the run began, by its name in `pacs status`.");
        // All counters, including zeros: Prometheus sees no increase in a counter that appears with its first event.
        for counter in Counter::ALL {
            let count = status.counters.get(counter.name()).copied().unwrap_or(0);
            page.value("pacs_events_total", &[("event", counter.name())], count as f64);
        }
    }

    fn work(&self, page: &mut Page) {
        let status = &*self.status;
        let roles = [(v1::Role::Rollout, "rollout"), (v1::Role::Learner, "learner"), (v1::Role::Verifier, "verifier")];
        let of = |role| status.workers.iter().filter(move |worker| worker.role() == role);
        page.gauge("pacs_workers", "Workers that are members of the run.");
        for (role, name) in roles {
            page.value("pacs_workers", &[("role", name)], of(role).count() as f64);
        }
        page.gauge("pacs_workers_draining", "Workers that get no new work.");
        for (role, name) in roles {
            page.value(
                "pacs_workers_draining",
                &[("role", name)],
                of(role).filter(|worker| worker.draining).count() as f64,
            );
        }
        page.gauge("pacs_heartbeat_age_seconds", "Time since the most silent worker was heard.");
        for (role, name) in roles {
            let most = of(role).map(|worker| worker.seconds_since_heartbeat).fold(0.0, f64::max);
            page.value("pacs_heartbeat_age_seconds", &[("role", name)], most);
        }
        page.one("pacs_learners_wanted", "Learners of the job.", f64::from(status.learners_wanted));
        let queues = status.queues.unwrap_or_default();
        page.gauge("pacs_groups", "Groups of the round in work.");
        for (state, count) in [
            ("waiting", queues.groups_waiting),
            ("generating", queues.groups_generating),
            ("complete", queues.groups_complete),
        ] {
            page.value("pacs_groups", &[("state", state)], f64::from(count));
        }
        page.one("pacs_groups_wanted", "Groups that the round needs.", f64::from(queues.groups_wanted));
        page.gauge("pacs_samples", "Samples that have arrived and have no verdict.");
        for (state, count) in [("waiting", queues.samples_waiting), ("verifying", queues.samples_verifying)] {
            page.value("pacs_samples", &[("state", state)], f64::from(count));
        }
        page.one("pacs_group_slots", "Room for groups in flight.", f64::from(status.slots));
        page.one("pacs_groups_in_flight", "Groups in flight.", f64::from(status.groups_in_flight));
        page.one("pacs_groups_quarantined", "Groups that killed workers or training.", status.set_aside.len() as f64);
        if let Some(retired) = status.retired_problems {
            page.one("pacs_problems_retired", "Problems that are no longer drawn.", f64::from(retired));
        }
        page.one("pacs_problems", "Problems to train on.", f64::from(status.training_problems));
    }

    /// Aggregated by verifier, because there may be hundreds of workers.
    fn verifications(&self, page: &mut Page) {
        let mut outcomes: BTreeMap<(&str, &str), u64> = BTreeMap::new();
        let mut slowest: BTreeMap<&str, f64> = BTreeMap::new();
        for worker in &self.status.verifiers {
            for (outcome, count) in &worker.outcomes {
                *outcomes.entry((&worker.verifier, outcome)).or_default() += count;
            }
            let most = slowest.entry(&worker.verifier).or_default();
            *most = most.max(worker.p99_seconds.unwrap_or(0.0));
        }
        page.counter("pacs_verifications_total", "Verifications since this coordinator started.");
        for ((verifier, outcome), count) in outcomes {
            page.value("pacs_verifications_total", &[("verifier", verifier), ("outcome", outcome)], count as f64);
        }
        page.gauge(
            "pacs_verification_p99_seconds",
            "99th percentile of the time of a verification, of the slowest worker.",
        );
        for (verifier, seconds) in slowest {
            page.value("pacs_verification_p99_seconds", &[("verifier", verifier)], seconds);
        }
    }

    /// The metrics that docs/METRICS.md explains, one name each.
    fn numbers(&self, page: &mut Page) {
        // These two have their own metrics.
        let wanted = |name: &str| !matches!(name, "step" | "time");
        let of_step: BTreeMap<_, _> = self.status.metrics.iter().filter(|(name, _)| wanted(name)).collect();
        let named = of_step.into_iter().filter_map(|(name, value)| Some((metric_name(name)?, *value)));
        // Names that differ in odd characters alone become one.
        let named: BTreeMap<String, f64> = named.take(MOST_METRICS).collect();
        for (name, value) in named {
            page.one(&format!("pacs_step_{name}"), "Of the newest step; see docs/METRICS.md.", value);
        }
        let mut by_name: BTreeMap<String, BTreeMap<&str, f64>> = BTreeMap::new();
        for (set, numbers) in &self.evaluations {
            for (name, value) in numbers.iter().filter(|(name, _)| wanted(name)) {
                let Some(name) = metric_name(name) else { continue };
                by_name.entry(name).or_default().insert(set, *value);
            }
        }
        for (name, values) in by_name.into_iter().take(MOST_METRICS) {
            let name = format!("pacs_evaluation_{name}");
            page.gauge(&name, "Of the newest evaluation of the set; see docs/METRICS.md.");
            values.into_iter().for_each(|(set, value)| page.value(&name, &[("set", set)], value));
        }
    }

    fn machine(&self, page: &mut Page) {
        if let Some((free, size)) = self.disk {
            page.one("pacs_run_folder_free_bytes", "Room on the file system of the run folder.", free as f64);
            page.one("pacs_run_folder_size_bytes", "Size of the file system of the run folder.", size as f64);
        }
        if let Some(certificate) = self.certificate {
            let help = "When the coordinator's certificate expires.";
            page.one("pacs_certificate_expiry_timestamp_seconds", help, self.now + certificate);
        }
        let resident = pacs_runtime::resident_bytes() as f64;
        page.one("pacs_coordinator_resident_memory_bytes", "Memory of this coordinator.", resident);
    }
}

/// A name that Prometheus accepts; `None` for invalid names and those with a suffix that has a meaning there.
fn metric_name(name: &str) -> Option<String> {
    let ends_badly = ["_total", "_count", "_sum", "_bucket"].iter().any(|suffix| name.ends_with(suffix));
    let is_fine = |c: char| c.is_ascii_alphanumeric() || c == '_';
    (!name.is_empty() && name.len() <= MOST_LABEL && !ends_badly)
        .then(|| name.chars().map(|c| if is_fine(c) { c.to_ascii_lowercase() } else { '_' }).collect())
}

struct Page(String);

impl Page {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn gauge(&mut self, name: &str, help: &str) {
        self.head(name, "gauge", help);
    }

    fn counter(&mut self, name: &str, help: &str) {
        self.head(name, "counter", help);
    }

    fn one(&mut self, name: &str, help: &str, value: f64) {
        self.gauge(name, help);
        self.value(name, &[], value);
    }

    fn value(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        self.0.push_str(name);
        for (place, (label, text)) in labels.iter().enumerate() {
            let _ = write!(self.0, "{}{label}=\"", if place == 0 { '{' } else { ',' });
            for c in text[..text.floor_char_boundary(MOST_LABEL)].chars() {
                match c {
                    '\\' => self.0.push_str("\\\\"),
                    '"' => self.0.push_str("\\\""),
                    '\n' => self.0.push_str("\\n"),
                    c => self.0.push(c),
                }
            }
            self.0.push('"');
        }
        let end = if labels.is_empty() { "" } else { "}" };
        let _ = match value {
            value if value.is_nan() => writeln!(self.0, "{end} NaN"),
            f64::INFINITY => writeln!(self.0, "{end} +Inf"),
            f64::NEG_INFINITY => writeln!(self.0, "{end} -Inf"),
            value => writeln!(self.0, "{end} {value}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    use super::*;

    fn worker(role: v1::Role) -> v1::WorkerStatus {
        v1::WorkerStatus { role: role.into(), seconds_since_heartbeat: 1.5, ..Default::default() }
    }

    /// A scrape without absent values, whose names contain control characters.
    fn scrape() -> Scrape {
        let hostile = "a\"b\\c\nd 1\n# HELP x";
        let verifier = |worker: &str| v1::VerifierStatus {
            worker: worker.into(),
            verifier: hostile.into(),
            outcomes: [("correct".to_owned(), 5), ("failed".to_owned(), 2), ("timed_out".to_owned(), 1)].into(),
            p99_seconds: Some(0.25),
            ..Default::default()
        };
        let metrics = [
            "time",
            "step",
            "mixed_share",
            "logprob_mismatch_mean",
            "skipped_updates",
            "pass_rate",
            "loss",
            "odd/ name\n",
        ];
        let others =
            ["reward_mean", "entropy", "score_auc", "answer_tokens_mean", "tokens_per_second", "total_seconds"];
        let seconds = ["sampling_seconds", "verifying_seconds", "training_seconds", "checkpoint_stall_seconds", "lag"];
        let all = metrics.into_iter().chain(others).chain(seconds);
        let status = v1::GetStatusResponse {
            job: hostile.into(),
            phase: "sampling".into(),
            step: 7,
            total_steps: 9,
            uptime_seconds: 10.0,
            workers: vec![worker(v1::Role::Rollout), worker(v1::Role::Rollout), worker(v1::Role::Learner)],
            metrics: all.map(|name| (name.to_owned(), 0.5)).chain([("nan".to_owned(), f64::NAN)]).collect(),
            counters: [("restarted_workers".to_owned(), 3)].into(),
            verifiers: vec![verifier("v-0"), verifier("v-1")],
            remaining_seconds: Some(5.0),
            retired_problems: Some(1),
            findings: vec![v1::Finding { name: "slow_rank".into(), ..Default::default() }],
            ..Default::default()
        };
        Scrape {
            status: Arc::new(status),
            run_id: "ab".repeat(16),
            evaluations: [
                ("evaluation".to_owned(), [("pass_at_1".to_owned(), 0.25), ("step".to_owned(), 4.0)].into()),
                ("hard".to_owned(), [("pass_at_1".to_owned(), 0.125)].into()),
            ]
            .into(),
            disk: Some((1 << 30, 1 << 40)),
            certificate: Some(3600.0),
            now: 1e9,
        }
    }

    #[test]
    fn every_line_is_one_metric_whatever_names_hold() {
        let text = scrape().text();
        for line in text.lines() {
            let is_value = line.starts_with("pacs_")
                && line.rsplit_once(' ').is_some_and(|(_, value)| value.parse::<f64>().is_ok());
            assert!(is_value || line.starts_with("# HELP pacs_") || line.starts_with("# TYPE pacs_"), "{line}");
        }
        for line in [
            "pacs_steps_total 7",
            "pacs_workers{role=\"rollout\"} 2",
            "pacs_workers{role=\"verifier\"} 0",
            "pacs_phase{phase=\"sampling\"} 1",
            "pacs_step_pass_rate 0.5",
            "pacs_events_total{event=\"restarted_workers\"} 3",
            "pacs_events_total{event=\"failed_checkpoints\"} 0",
            "pacs_step_nan NaN",
            "pacs_step_odd__name_ 0.5",
            "pacs_evaluation_pass_at_1{set=\"evaluation\"} 0.25",
            "pacs_evaluation_pass_at_1{set=\"hard\"} 0.125",
            "pacs_finding{finding=\"slow_rank\"} 1",
            "pacs_finding{finding=\"disk_full\"} 0",
            "pacs_verifications_total{verifier=\"a\\\"b\\\\c\\nd 1\\n# HELP x\",outcome=\"failed\"} 4",
            "pacs_certificate_expiry_timestamp_seconds 1000003600",
        ] {
            assert!(text.lines().any(|found| found == line), "`{line}` is missing in\n{text}");
        }
    }

    /// The metric names of ours that occur in a text.
    fn named(text: &str) -> BTreeSet<String> {
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        words.filter(|word| word.starts_with("pacs_")).map(str::to_owned).collect()
    }

    #[test]
    fn alerts_and_dashboard_query_existing_metrics() {
        let there = named(&scrape().text());
        for file in ["alerts.yaml", "dashboard.json"] {
            let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/observability").join(file);
            let asked = named(&std::fs::read_to_string(&path).unwrap());
            assert!(asked.len() > 5, "{} asks for something", path.display());
            let absent: Vec<_> = asked.difference(&there).collect();
            assert!(absent.is_empty(), "{} asks for {absent:?}, which no scrape has", path.display());
        }
    }

    #[test]
    fn every_alert_has_a_page_that_says_what_to_do() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let rules = std::fs::read_to_string(root.join("deploy/observability/alerts.yaml")).unwrap();
        let page = std::fs::read_to_string(root.join("docs/ALERTS.md")).unwrap();
        let alerts: Vec<_> = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
        assert!(alerts.len() >= 8, "{alerts:?}");
        for alert in &alerts {
            let section = page.split("\n## ").find(|section| section.lines().next() == Some(alert));
            let section = section.unwrap_or_else(|| panic!("docs/ALERTS.md has no section `{alert}`"));
            for part in ["**Means.**", "**Look at.**", "**Do.**"] {
                assert!(section.contains(part), "`{alert}` of docs/ALERTS.md has no {part}");
            }
            let anchor = format!("ALERTS.md#{}", alert.to_lowercase());
            assert!(rules.contains(&anchor), "`{alert}` does not link to its section");
        }
        let sections: Vec<_> = page.split("\n## ").skip(1).filter_map(|section| section.lines().next()).collect();
        assert_eq!(sections, alerts, "sections are alerts, in their order");
    }

    /// Runs Prometheus' own checker on the page, the rules and the tests of the rules.
    #[test]
    fn promtool_finds_nothing_wrong() {
        let promtool = |arguments: &[&str], input: &str| -> std::io::Result<(bool, String)> {
            let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/observability");
            let piped = Stdio::piped;
            let mut command = Command::new("promtool");
            let command = command.args(arguments).current_dir(folder).stdin(piped()).stdout(piped()).stderr(piped());
            let mut child = command.spawn()?;
            child.stdin.take().unwrap().write_all(input.as_bytes())?;
            let output = child.wait_with_output()?;
            let said = [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned()).concat();
            Ok((output.status.success(), said))
        };
        if let Err(error) = promtool(&["--version"], "") {
            eprintln!("SKIPPED: promtool (Debian package `prometheus`) does not run here: {error}");
            return;
        }
        for (arguments, input) in [
            (&["check", "metrics"][..], scrape().text()),
            (&["check", "rules", "alerts.yaml"], String::new()),
            (&["test", "rules", "alerts.test.yaml"], String::new()),
        ] {
            let (is_fine, said) = promtool(arguments, &input).unwrap();
            assert!(is_fine, "promtool {}:\n{said}", arguments.join(" "));
        }
    }
}
