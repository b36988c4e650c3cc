//! The coordinator's process: a machine whose answers and effects wait until its records are synced.

use std::collections::VecDeque;
use std::time::Duration;

use pacs_machine::{Answer, Effect, Event, Machine, Options, Record, Step};

use crate::promises::Promises;

/// Who asked, and which of its requests this was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Caller {
    pub(crate) actor: usize,
    /// A process that was started again does not hear what was meant for the one before.
    pub(crate) process: u64,
    pub(crate) request: u64,
}

/// What others see, in order, once everything before it is durable.
#[derive(Clone, Debug)]
pub(crate) enum Output {
    Answer { caller: Option<Caller>, event: Event, answer: Answer },
    Effect(Effect),
}

/// What a crash leaves.
#[derive(Debug)]
pub(crate) struct Disk {
    /// A machine, as JSON.
    snapshot: String,
    /// The records behind it, as JSON.
    records: Vec<String>,
}

#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) machine: Machine,
    disk: Disk,
    /// Records that a crash loses.
    unsynced: Vec<Record>,
    outputs: VecDeque<Output>,
    /// The machine when everything was synced last.
    synced: Machine,
    promises: Promises,
    /// Compare the machine before and after each event that is not recorded: slow.
    pub(crate) suspicious: bool,
    /// Print what happens: `PACS_TRACE=1`, for a seed that is replayed.
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

    /// Looks at the time.
    pub(crate) fn tick(&mut self, now: Duration) {
        let before = self.suspicious.then(|| self.machine.recorded());
        let due = self.machine.overdue(now);
        if let Some(before) = before {
            assert_eq!(before, self.machine.recorded(), "looking at the time changed the machine");
        }
        due.into_iter().for_each(|event| self.step(now, event, None));
    }

    /// Makes everything durable; returns what others may see now.
    pub(crate) fn sync(&mut self) -> VecDeque<Output> {
        for record in self.unsynced.drain(..) {
            self.disk.records.push(serde_json::to_string(&record).unwrap());
        }
        self.synced = self.machine.clone();
        std::mem::take(&mut self.outputs)
    }

    /// Puts a snapshot in the place of the records.
    pub(crate) fn compact(&mut self) {
        assert!(self.unsynced.is_empty(), "only what is synced is compacted");
        self.disk.snapshot = serde_json::to_string(&self.machine).unwrap();
        self.disk.records.clear();
    }

    /// Dies, and comes back with what was synced. Returns whether anything was lost.
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

    /// Starts with another machine: the journal is gone.
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
