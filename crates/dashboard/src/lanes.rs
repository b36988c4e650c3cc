//! What each worker did in the last half hour, and how full the queues were: sampled from the status, in bounded memory.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use pacs_protocol::v1;
use serde_json::{Value, json};

use crate::json::{number, role};

/// Interval at which the status is looked at.
pub(crate) const EVERY: Duration = Duration::from_secs(2);
/// How far back the lanes reach, in seconds.
const SPAN: f64 = 1800.0;
/// Workers that have a lane, in the order of their names; others are only counted.
const MOST_LANES: usize = 256;
/// Segments per lane. A worker that changes more often loses its oldest ones first.
const MOST_SEGMENTS: usize = 900;
/// Age of a heartbeat from which a worker counts as silent, in seconds. Busy runs ask for one every two seconds.
const SILENT: f64 = 5.0;

/// What a worker does, as far as a timeline distinguishes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Doing {
    /// Generates, verifies or trains.
    Working,
    /// Has nothing to do.
    Waiting,
    /// Loads, saves, connects or receives weights.
    Moving,
    /// Is not heard of.
    Silent,
}

impl Doing {
    fn of(worker: &v1::WorkerStatus) -> Self {
        let activity = worker.activity.as_str();
        let begins = |words: &[&str]| words.iter().any(|word| activity.starts_with(word));
        if worker.seconds_since_heartbeat > SILENT {
            Self::Silent
        } else if begins(&["loading", "saving", "receiving", "connecting", "preparing", "publishing"]) {
            Self::Moving
        } else if begins(&["training", "generating 0"]) {
            if activity.starts_with("training") { Self::Working } else { Self::Waiting }
        } else if worker.leases > 0 || begins(&["generating", "verifying", "grading"]) {
            Self::Working
        } else {
            Self::Waiting
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Working => "working",
            Self::Waiting => "waiting",
            Self::Moving => "moving",
            Self::Silent => "silent",
        }
    }
}

/// One state from its begin to its end, in seconds since 1970.
#[derive(Clone, Debug)]
struct Segment<T> {
    begin: f64,
    end: f64,
    what: T,
}

#[derive(Clone, Debug)]
struct Lane<T> {
    role: &'static str,
    segments: VecDeque<Segment<T>>,
}

impl<T: PartialEq> Lane<T> {
    fn new(role: &'static str) -> Self {
        Self { role, segments: VecDeque::new() }
    }

    /// Adds what was seen at `now`. `gap` is the longest pause that still belongs to the segment before.
    fn add(&mut self, now: f64, gap: f64, what: T) {
        match self.segments.back_mut() {
            Some(last) if now - last.end <= gap && last.what == what => {
                last.end = now;
                return;
            }
            // Drawn without a gap, because nothing is known of the moment of the change.
            Some(last) if now - last.end <= gap => last.end = now,
            _ => {}
        }
        if self.segments.len() == MOST_SEGMENTS {
            self.segments.pop_front();
        }
        self.segments.push_back(Segment { begin: now, end: now, what });
    }

    fn forget(&mut self, before: f64) {
        while self.segments.front().is_some_and(|segment| segment.end < before) {
            self.segments.pop_front();
        }
    }
}

/// The lanes of one run.
#[derive(Clone, Debug)]
pub(crate) struct Lanes {
    phases: Lane<String>,
    workers: BTreeMap<String, Lane<Doing>>,
    queues: VecDeque<(f64, [u32; 6])>,
    without_lane: usize,
}

impl Lanes {
    pub(crate) fn new() -> Self {
        let (workers, queues) = (BTreeMap::new(), VecDeque::new());
        Self { phases: Lane::new("run"), workers, queues, without_lane: 0 }
    }

    /// Takes a status into the lanes.
    pub(crate) fn look(&mut self, status: &v1::GetStatusResponse) {
        // Missed looks are drawn as gaps.
        let (now, gap) = (status.clock, 3.0 * EVERY.as_secs_f64());
        let phase = if status.paused { "paused".to_owned() } else { status.phase.chars().take(32).collect() };
        self.phases.add(now, gap, phase);
        self.without_lane = 0;
        for worker in &status.workers {
            if !self.workers.contains_key(&worker.name) {
                if self.workers.len() == MOST_LANES {
                    self.without_lane += 1;
                    continue;
                }
                self.workers.insert(worker.name.clone(), Lane::new(role(worker.role())));
            }
            if let Some(lane) = self.workers.get_mut(&worker.name) {
                lane.add(now, gap, Doing::of(worker));
            }
        }
        let queues = status.queues.unwrap_or_default();
        let depths = [
            queues.groups_waiting,
            queues.groups_generating,
            queues.samples_waiting,
            queues.samples_verifying,
            queues.groups_complete,
            status.groups_in_flight,
        ];
        if self.queues.len() as f64 >= SPAN / EVERY.as_secs_f64() {
            self.queues.pop_front();
        }
        self.queues.push_back((now, depths));

        let before = now - SPAN;
        self.phases.forget(before);
        self.workers.values_mut().for_each(|lane| lane.forget(before));
        self.workers.retain(|_, lane| !lane.segments.is_empty());
    }

    /// The lanes: segments as `[begin, end, state]`, in seconds since 1970. With `seconds` only the newest part.
    pub(crate) fn json(&self, seconds: f64) -> Value {
        let end = self.phases.segments.back().map_or(0.0, |segment| segment.end);
        let from = end - seconds.clamp(1.0, SPAN);
        let time = |time: f64| number((time * 10.0).round() / 10.0);
        let phases = segments(&self.phases, from, time, |phase| phase.as_str());
        let workers: Vec<Value> = self
            .workers
            .iter()
            .map(|(name, lane)| {
                json!({"name": name, "role": lane.role, "segments": segments(lane, from, time, |doing| doing.name())})
            })
            .collect();
        let queues = self.queues.iter().filter(|(time, _)| *time >= from);
        json!({
            "from": time(from),
            "to": time(end),
            "phases": phases,
            "workers": workers,
            "without_lane": self.without_lane,
            "queue_names":
                ["groups_waiting", "groups_generating", "samples_waiting", "samples_verifying", "groups_complete", "groups_in_flight"],
            "queues": queues.map(|(at, depths)| json!([time(*at), depths])).collect::<Vec<_>>(),
        })
    }
}

fn segments<T>(lane: &Lane<T>, from: f64, time: impl Fn(f64) -> Value, name: impl Fn(&T) -> &str) -> Vec<Value> {
    let shown = lane.segments.iter().filter(|segment| segment.end >= from);
    shown.map(|segment| json!([time(segment.begin.max(from)), time(segment.end), name(&segment.what)])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(clock: f64, workers: &[(&str, &str, f64)]) -> v1::GetStatusResponse {
        let worker = |(name, activity, silent): &(&str, &str, f64)| v1::WorkerStatus {
            name: (*name).into(),
            role: v1::Role::Rollout.into(),
            activity: (*activity).into(),
            seconds_since_heartbeat: *silent,
            ..Default::default()
        };
        let workers = workers.iter().map(worker).collect();
        v1::GetStatusResponse { clock, phase: "sampling".into(), workers, ..Default::default() }
    }

    #[test]
    fn a_lane_shows_when_a_worker_worked_waited_and_fell_silent() {
        let mut lanes = Lanes::new();
        for (clock, activity, silent) in [
            (100.0, "generating 4 samples", 0.1),
            (102.0, "generating 4 samples", 0.1),
            (104.0, "waiting for groups", 0.1),
            (106.0, "waiting for groups", 9.0),
            (130.0, "receiving weights", 0.1),
        ] {
            lanes.look(&status(clock, &[("r-0", activity, silent)]));
        }
        let json = lanes.json(1800.0);
        let expected = json!([
            [100.0, 104.0, "working"],
            [104.0, 106.0, "waiting"],
            [106.0, 106.0, "silent"],
            [130.0, 130.0, "moving"]
        ]);
        assert_eq!(json["workers"][0]["segments"], expected, "{json:#}");
        assert_eq!(json["phases"], json!([[100.0, 106.0, "sampling"], [130.0, 130.0, "sampling"]]));
        assert_eq!(lanes.json(10.0)["workers"][0]["segments"], json!([[130.0, 130.0, "moving"]]));
    }

    #[test]
    fn memory_is_bounded_however_many_workers_come_and_however_long_it_takes() {
        let mut lanes = Lanes::new();
        for turn in 0..4000_u32 {
            let names: Vec<String> = (0..300).map(|n| format!("r-{n}-{}", turn / 1000)).collect();
            let activity = if turn % 2 == 0 { "generating 1 samples" } else { "waiting for groups" };
            // Every name at the beginning of its thousand; later a few, to keep the test short.
            let shown = if turn % 1000 == 0 { 300 } else { 4 };
            let workers: Vec<_> = names.iter().take(shown).map(|name| (name.as_str(), activity, 0.0)).collect();
            lanes.look(&status(f64::from(turn) * 2.0, &workers));
            assert!(lanes.workers.len() <= MOST_LANES);
        }
        assert!(lanes.workers.values().all(|lane| lane.segments.len() <= MOST_SEGMENTS));
        assert_eq!(lanes.workers.len(), 4, "who is gone for half an hour has no lane any more");
        assert_eq!(lanes.queues.len(), 900);
        let bytes = lanes.json(1e9).to_string().len();
        assert!(bytes < 1 << 20, "{bytes}");
    }
}
