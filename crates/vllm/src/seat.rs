//! A server as the dispatcher sees it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pacs_protocol::v1;
use pacs_weights::VersionId;
use tokio::sync::watch;

use crate::answer::Accepted;
use crate::client::Load;
use crate::queue::Wanted;
use crate::wake::Wake;
use crate::{Client, Fault};

/// How long a server that says that it is busy gets nothing.
const BUSY: Duration = Duration::from_secs(1);
/// Useless answers in a row after which a server is out of service for a while, and for how long.
const USELESS: u32 = 8;
const OUT_OF_SERVICE: Duration = Duration::from_secs(30);
/// Versions of a server that are remembered as verified.
const REMEMBERED: usize = 64;

/// What a server is ready for.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum State {
    /// Its driver has not reached it yet.
    Unknown,
    /// It is there, and there is nothing to give it yet.
    Idle,
    /// It is given weights, or they are verified.
    Updating(VersionId),
    /// It generates with this version, which was verified.
    Ready(VersionId),
    /// A request to it failed in a way that makes its driver look at it.
    Suspect(VersionId),
    /// It cannot be used, and its driver tries again.
    Down,
}

/// A server, and what it has of ours.
pub(crate) struct Seat {
    pub(crate) endpoint: String,
    pub(crate) client: Client,
    pub(crate) state: State,
    /// The label of the version that it is ready with.
    pub(crate) label: String,
    /// Has its driver look at it.
    pub(crate) wake: Arc<Wake>,
    /// Requests that it has not answered; its driver waits for 0 where an update must not meet any.
    pub(crate) in_flight: watch::Sender<usize>,
    /// Finished samples with tokens of a version that is not verified yet.
    pub(crate) parked: Vec<(Wanted, Accepted)>,
    verified: VecDeque<VersionId>,
    load: Load,
    probe_error: Option<f64>,
    samples: u64,
    discarded: u64,
    useless_in_a_row: u32,
    /// When it answered a request last, be the answer useful or not.
    answered: Option<Instant>,
    held_until: Option<Instant>,
    error: String,
}

impl Seat {
    pub(crate) fn new(endpoint: String, client: Client) -> Self {
        Self {
            endpoint,
            client,
            state: State::Unknown,
            label: String::new(),
            wake: Arc::default(),
            in_flight: watch::Sender::new(0),
            parked: Vec::new(),
            verified: VecDeque::new(),
            load: Load::default(),
            probe_error: None,
            samples: 0,
            discarded: 0,
            useless_in_a_row: 0,
            answered: None,
            held_until: None,
            error: String::new(),
        }
    }

    /// Whether it can take a sample that needs `oldest` or a newer version.
    pub(crate) fn takes(&self, oldest: VersionId, most: usize, now: Instant) -> bool {
        matches!(self.state, State::Ready(version) if version >= oldest) && self.has_room(most, now)
    }

    /// Whether it can take a sample at all.
    pub(crate) fn has_room(&self, most: usize, now: Instant) -> bool {
        let in_flight = *self.in_flight.borrow();
        // A server that queues requests is full, whatever else is configured. One without any of ours is given some all the
        // same, because others may keep it busy.
        let is_full = in_flight >= most || (self.load.queued > 0 && in_flight > 0);
        let is_held = self.held_until.is_some_and(|until| now < until);
        matches!(self.state, State::Ready(_)) && !is_full && !is_held
    }

    /// Whether it is there, so that what it has room for counts.
    pub(crate) fn is_up(&self) -> bool {
        matches!(self.state, State::Ready(_) | State::Updating(_) | State::Suspect(_))
    }

    /// Notes that its driver has verified a version on it; returns what waited for that.
    pub(crate) fn verified(&mut self, version: VersionId, label: String) -> Vec<(Wanted, Accepted)> {
        self.state = State::Ready(version);
        self.label = label;
        if !self.verified.contains(&version) {
            if self.verified.len() == REMEMBERED {
                self.verified.pop_front();
            }
            self.verified.push_back(version);
        }
        std::mem::take(&mut self.parked)
    }

    /// Whether all versions of an answer were verified on this server.
    pub(crate) fn has_verified(&self, accepted: &Accepted) -> bool {
        accepted.versions.iter().all(|version| self.verified.contains(version))
    }

    pub(crate) fn used(&mut self) {
        self.samples += 1;
        self.useless_in_a_row = 0;
    }

    /// Notes the end of a request that began at `began`. A server that lets one pass its deadline, and has answered no other one
    /// meanwhile, generates nothing, although it answers other calls: its driver takes it out of service.
    pub(crate) fn ended(&mut self, fault: Option<&Fault>, began: Instant, now: Instant) {
        match fault {
            Some(late @ Fault::Late { .. }) if self.answered.is_none_or(|last| last < began) => {
                self.wake.accuse(late.clone());
            }
            Some(Fault::Late { .. } | Fault::Unreachable(_) | Fault::Broken { .. }) => {}
            Some(_) | None => self.answered = Some(now),
        }
    }

    /// Notes that an answer was of no use.
    pub(crate) fn failed(&mut self, fault: &Fault, now: Instant) {
        self.discarded += 1;
        self.error = fault.to_string();
        if matches!(fault, Fault::Busy(_)) {
            self.held_until = Some(now + BUSY);
            return;
        }
        self.useless_in_a_row += 1;
        if self.useless_in_a_row >= USELESS {
            tracing::warn!(
                server = self.endpoint,
                seconds = OUT_OF_SERVICE.as_secs(),
                "{USELESS} answers in a row were of no use, the server is out of service: {fault}"
            );
            (self.useless_in_a_row, self.held_until) = (0, Some(now + OUT_OF_SERVICE));
        }
        if let State::Ready(version) = self.state
            && fault.questions_the_server()
        {
            self.state = State::Suspect(version);
            self.wake.call();
        }
    }

    pub(crate) fn down(&mut self, fault: &Fault) {
        self.state = State::Down;
        self.load = Load::default();
        self.error = fault.to_string();
    }

    pub(crate) fn loaded(&mut self, load: Load) {
        self.load = load;
    }

    /// Notes how far its log-probs of the last probe were from the learner's (nats per token).
    pub(crate) fn probed(&mut self, error: f64) {
        self.probe_error = Some(error);
    }

    /// For the status page.
    pub(crate) fn status(&self, now: Instant) -> v1::EngineServer {
        let (state, version) = match &self.state {
            State::Unknown => ("not reached yet", None),
            State::Idle => ("waiting for weights", None),
            State::Updating(_) => ("updating", None),
            State::Ready(version) if self.held_until.is_some_and(|until| now < until) => {
                ("out of service", Some(version))
            }
            State::Ready(version) => ("ready", Some(version)),
            State::Suspect(version) => ("suspect", Some(version)),
            State::Down => ("down", None),
        };
        v1::EngineServer {
            address: self.endpoint.clone(),
            state: state.to_owned(),
            weight_version: version.map(|id| id.version.0),
            in_flight: u32::try_from(*self.in_flight.borrow()).unwrap_or(u32::MAX),
            running: self.load.running,
            queued: self.load.queued,
            samples: self.samples,
            discarded: self.discarded,
            error: self.error.clone(),
            probe_error: self.probe_error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Limits;

    #[test]
    fn a_server_that_answers_nothing_for_the_time_of_a_request_is_accused() {
        let late = || Fault::Late { call: "generate", seconds: 1800 };
        let (began, later) = (Instant::now(), Instant::now() + Duration::from_secs(1));
        let seat = || Seat::new("http://a:1".to_owned(), Client::new("a:1", None, Limits::default()));
        // Others were answered meanwhile, so this request alone was lost.
        let mut busy = seat();
        busy.ended(None, began, later);
        busy.ended(Some(&late()), began, later);
        assert_eq!(busy.wake.accused(), None);
        // A refusal is an answer, too.
        let mut refusing = seat();
        refusing.ended(Some(&Fault::Busy(503)), began, later);
        refusing.ended(Some(&late()), began, later);
        assert_eq!(refusing.wake.accused(), None);
        let mut silent = seat();
        silent.ended(Some(&late()), began, later);
        assert_eq!((silent.wake.accused(), silent.wake.accused()), (Some(late()), None));
        // What it answered before that request says nothing.
        let mut hung = seat();
        hung.ended(None, began, began);
        hung.ended(Some(&late()), later, later + Duration::from_secs(1800));
        assert_eq!(hung.wake.accused(), Some(late()));
    }
}
