//! The coordinator process: a machine whose answers and effects are held back until its records are synced.

use std::collections::VecDeque;
use std::time::Duration;

use pacs_machine::{Answer, Effect, Event, Machine, Options, Record, Step};

use crate::promises::Promises;

/// The sender of a request, and the number of that request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Caller {
    pub(crate) actor: usize,
    /// Number of the sending process; a restarted one ignores answers to its predecessor.
    pub(crate) process: u64,
    pub(crate) request: u64,
}

/// An answer or effect, released in order once all earlier records are durable.
#[derive(Clone, Debug)]
pub(crate) enum Output {
    Answer { caller: Option<Caller>, event: Event, answer: Answer },
    Effect(Effect),
}

/// What survives a crash.
#[derive(Debug)]
pub(crate) struct Disk {
    /// A snapshot of the machine, as JSON.
    snapshot: String,
    /// The records after the snapshot, as JSON.
    records: Vec<String>,
}

#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) machine: Machine,
    disk: Disk,
    /// Records that a crash would lose.
    unsynced: Vec<Record>,
    outputs: VecDeque<Output>,
    /// The machine as of the last sync.
    synced: Machine,
    promises: Promises,
    /// Whether to compare the machine before and after each unrecorded event, which is slow.
    pub(crate) suspicious: bool,
    /// Whether to print all events (`PACS_TRACE=1`), to replay a single seed.
    trace: bool,
}

impl Server {
    pub(crate) fn new(options: Options, now: Duration) -> Self {
        let machine = Machine::new(options, now);
        let snapshot = serde_json::to_string(&machine).unwrap();
        let disk = Disk { snapshot, records: Vec::new() };
        Self {
            synced: machine.clone(),
            machine,
            disk,
            unsynced: Vec::new(),
            outputs: VecDeque::new(),
            promises: Promises::default(),
            suspicious: false,
            trace: std::env::var_os("PACS_TRACE").is_some(),
        }
    }

    pub(crate) fn step(&mut self, now: Duration, event: Event, caller: Option<Caller>) {
        let before = self.suspicious.then(|| self.machine.recorded());
        let openings = self.machine.openings();
        let step = self.machine.step(now, event.clone());
        if self.trace {
            println!("{now:?} {event:?} -> {step:?}");
        }
        self.promises.check(openings, &event, &step, &self.machine);
        let Step { record, answer, effects } = step;
        if let Some(before) = before
            && record.is_none()
        {
            assert_eq!(before, self.machine.recorded(), "{event:?} changed the machine and was not recorded");
        }
        self.unsynced.extend(record);
        self.outputs.push_back(Output::Answer { caller, event, answer });
        self.outputs.extend(effects.into_iter().map(Output::Effect));
    }

    /// Applies the events that are due.
    pub(crate) fn tick(&mut self, now: Duration) {
        let before = self.suspicious.then(|| self.machine.recorded());
        let due = self.machine.overdue(now);
        if let Some(before) = before {
            assert_eq!(before, self.machine.recorded(), "looking at the time changed the machine");
        }
        due.into_iter().for_each(|event| self.step(now, event, None));
    }

    /// Makes all records durable; returns the outputs that others may see now.
    pub(crate) fn sync(&mut self) -> VecDeque<Output> {
        for record in self.unsynced.drain(..) {
            self.disk.records.push(serde_json::to_string(&record).unwrap());
        }
        self.synced = self.machine.clone();
        std::mem::take(&mut self.outputs)
    }

    /// Replaces the records by a snapshot.
    pub(crate) fn compact(&mut self) {
        assert!(self.unsynced.is_empty(), "only what is synced is compacted");
        self.disk.snapshot = serde_json::to_string(&self.machine).unwrap();
        self.disk.records.clear();
    }

    /// Crashes and restarts from what was synced. Returns whether anything was lost.
    pub(crate) fn crash(&mut self, now: Duration) -> bool {
        let lost = !self.unsynced.is_empty();
        self.unsynced.clear();
        self.outputs.clear();
        if self.trace {
            println!("{now:?} crash");
        }
        self.machine = serde_json::from_str(&self.disk.snapshot).unwrap();
        for record in &self.disk.records {
            let record: Record = serde_json::from_str(record).unwrap();
            self.machine.step(record.now, record.event);
        }
        assert_eq!(self.machine.recorded(), self.synced.recorded(), "the records do not lead to the synced state");
        self.machine.resume(now);
        lost
    }

    /// Starts over with another machine, because the journal is lost.
    pub(crate) fn replace(&mut self, machine: Machine) {
        let suspicious = self.suspicious;
        let snapshot = serde_json::to_string(&machine).unwrap();
        if self.trace {
            println!("the journal is lost: {machine:?}");
        }
        *self = Self {
            synced: machine.clone(),
            machine,
            disk: Disk { snapshot, records: Vec::new() },
            unsynced: Vec::new(),
            outputs: VecDeque::new(),
            promises: Promises::default(),
            suspicious,
            trace: self.trace,
        };
    }
}
