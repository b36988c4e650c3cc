//! The learner's side of a broadcast: gathers the members and sends.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::broadcast::group_name;
use crate::data_protocol::MOST_MEMBERS;
use crate::{Description, Digest, Group, GroupTransport, Seat, VersionId};

/// How long a round stays open after its first member, unless as many hosts have joined as asked for the previous
/// version. Hosts hear of a version at the same moment, so this is for stragglers.
pub(crate) const WINDOW: Duration = Duration::from_millis(500);
/// Pause of broadcasts after a failed round; doubled after each further failure.
const PAUSE: Duration = Duration::from_secs(30);
const MOST_DOUBLINGS: u32 = 7;

/// The rounds of a learner, at most one at a time.
#[derive(Debug)]
pub(crate) struct Rounds {
    transport: Arc<dyn GroupTransport>,
    run: String,
    window: Duration,
    state: Mutex<OpenRounds>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct OpenRounds {
    round: Option<Round>,
    /// Whether a broadcast is running.
    busy: bool,
    /// Number of members of the last round, and of hosts that were too late for it.
    expected: usize,
    /// Number of consecutive failed rounds.
    failures: u32,
    paused_until: Option<Instant>,
}

/// The newest round.
#[derive(Debug)]
struct Round {
    id: VersionId,
    digest: Digest,
    opened: Instant,
    /// Addresses of the members in the order of joining.
    members: Vec<String>,
    /// Number of hosts that asked after it was closed.
    late: usize,
    /// All addresses by rank, once the round is closed; empty if it failed to form.
    formed: Option<Arc<[String]>>,
}

impl Rounds {
    pub(crate) fn new(transport: Arc<dyn GroupTransport>, run: &str, window: Duration) -> Self {
        Self { transport, run: run.to_owned(), window, state: Mutex::default(), changed: Condvar::new() }
    }

    /// Joins the process at `address` to the round of a version: returns its rank and all addresses once the round is
    /// closed, `None` if there is no place for it. `sent` is called with the bytes of each piece.
    pub(crate) fn join(
        self: &Arc<Self>,
        version: (Description, Arc<File>),
        transport: &str,
        address: &str,
        sent: impl Fn(u64) + Send + 'static,
    ) -> Option<(usize, Arc<[String]>)> {
        let (id, digest) = (version.0.id(), *version.0.digest());
        if transport != self.transport.name() {
            tracing::warn!(
                address,
                "a host asks for a broadcast over `{transport}`, and this learner was told `{}`; give every rollout worker and \
                 learner the same --weights-transport",
                self.transport.name()
            );
            return None;
        }
        let mut state = self.lock();
        let is_this = |round: &Round| (round.id, round.digest) == (id, digest);
        let leads = !state.round.as_ref().is_some_and(is_this);
        if leads {
            let paused = state.paused_until.is_some_and(|until| Instant::now() < until);
            let gathering = state.round.as_ref().is_some_and(|round| round.formed.is_none());
            if state.busy || paused || gathering {
                return None;
            }
            state.expected = state.round.as_ref().map_or(0, |round| round.members.len() + round.late);
            state.round =
                Some(Round { id, digest, opened: Instant::now(), members: Vec::new(), late: 0, formed: None });
        }
        let round = state.round.as_mut()?;
        if round.formed.is_some() || round.members.len() + 1 >= MOST_MEMBERS {
            round.late += 1;
            return None;
        }
        round.members.push(address.to_owned());
        let rank = round.members.len();
        self.changed.notify_all();
        if leads {
            self.close(state, version, sent);
            state = self.lock();
        }
        loop {
            let round = state.round.as_ref().filter(|round| is_this(round))?;
            if let Some(addresses) = &round.formed {
                return (rank < addresses.len()).then(|| (rank, Arc::clone(addresses)));
            }
            // The leader closes the round long before that; this only bounds the wait.
            if round.opened.elapsed() > self.window * 4 {
                return None;
            }
            state = self.changed.wait_timeout(state, self.window).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits for further members, closes the round, and starts a thread that sends.
    fn close(
        self: &Arc<Self>,
        mut state: MutexGuard<'_, OpenRounds>,
        version: (Description, Arc<File>),
        sent: impl Fn(u64) + Send + 'static,
    ) {
        let is_short = |state: &mut OpenRounds| {
            state.round.as_ref().is_some_and(|round| state.expected == 0 || round.members.len() < state.expected)
        };
        state = self.changed.wait_timeout_while(state, self.window, is_short).unwrap_or_else(PoisonError::into_inner).0;
        let seat = self.transport.listen();
        let Some(round) = &mut state.round else { return };
        let addresses: Arc<[String]> = match &seat {
            Ok(seat) => std::iter::once(seat.address()).chain(round.members.iter().cloned()).collect(),
            Err(error) => {
                tracing::warn!("weights are not broadcast: {error}");
                Arc::new([])
            }
        };
        round.formed = Some(Arc::clone(&addresses));
        self.changed.notify_all();
        let Ok(seat) = seat else { return };
        state.busy = true;
        drop(state);
        let rounds = Arc::clone(self);
        let group = Group { name: group_name(&self.run, version.0.digest()), rank: 0, addresses: addresses.to_vec() };
        let run = move || {
            let started = Instant::now();
            let result = send(seat, &group, &version, &sent);
            rounds.ended(version.0.id(), &group, started, result);
        };
        if let Err(error) = std::thread::Builder::new().name("weights-cast".into()).spawn(run) {
            tracing::warn!("no thread to broadcast weights: {error}");
            self.lock().busy = false;
        }
    }

    fn ended(&self, id: VersionId, group: &Group, started: Instant, result: Result<(), String>) {
        let (members, seconds) = (group.addresses.len() - 1, started.elapsed().as_secs_f64());
        let mut state = self.lock();
        state.busy = false;
        match result {
            Ok(()) => {
                (state.failures, state.paused_until) = (0, None);
                drop(state);
                let (generation, version) = (id.generation.0, id.version.0);
                tracing::debug!(generation, version, members, seconds, "weights broadcast");
            }
            Err(problem) => {
                let pause = PAUSE * (1 << state.failures.min(MOST_DOUBLINGS));
                state.failures += 1;
                state.paused_until = Some(Instant::now() + pause);
                drop(state);
                tracing::warn!(
                    members,
                    "the broadcast of {id} broke, its receivers fetch the rest; the next one begins in {} s at the earliest: \
                     {problem}",
                    pause.as_secs()
                );
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, OpenRounds> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn send(
    seat: Box<dyn Seat>,
    group: &Group,
    (description, file): &(Description, Arc<File>),
    sent: &impl Fn(u64),
) -> Result<(), String> {
    let mut channel = seat.enter(group)?;
    let mut buffer = Vec::new();
    for index in 0..description.pieces() {
        let range = description.piece(index);
        buffer.resize(usize::try_from(range.end - range.start).unwrap_or(usize::MAX), 0);
        file.read_exact_at(&mut buffer, range.start).map_err(|error| format!("read the weights: {error}"))?;
        channel.broadcast(&mut buffer)?;
        sent(buffer.len() as u64);
    }
    channel.finish()
}
