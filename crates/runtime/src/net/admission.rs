//! Admission of connections, so that unauthenticated peers cannot exhaust them.
//!
//! A connection whose peer has sent nothing waits on the *porch* and costs a file descriptor. From its first byte it
//! needs a *seat*. Seats are few, because a handshake costs memory and processor time; peers that have sent something
//! queue for one in order. A connection belongs to a *stranger* until its certificate is verified ([`Seat::prove`]) or,
//! in plain text, until a guard admits its first call ([`Holder::settle`]). When all places of a kind are taken, a
//! newcomer evicts another stranger: the one that has waited longest, of the host with the most strangers. So a
//! legitimate peer gets in however many others connect and stay silent. One pool for both kinds was rejected: the
//! listener had to wait for silent peers while the system's listen queue overflowed, and legitimate peers redialled
//! after seconds.
//!
//! A place is protected for a short time, and longer once its peer has spoken. Otherwise thousands of workers that look
//! for their run at once would evict each other in the middle of their handshakes. Newcomers to a full porch wait in the
//! listen queue meanwhile. A host that holds most of the places is not protected from other hosts.
//!
//! Peers with a certificate may use all seats except those of strangers. One that has not called yet can be evicted
//! when all are taken. Settled peers are never evicted. Some file descriptors are reserved for what the process writes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot};

/// File descriptors reserved for journals, checkpoints, logs and child processes; at most half of the limit.
const RESERVED: usize = 256;
/// Bound on connections, whatever the system allows: each takes some 30 KiB.
const MOST: usize = 65_536;
/// Bound on concurrent strangers that have sent something.
const MOST_STRANGERS: usize = 256;
/// Strangers that have said nothing, or that wait for a seat. Handshakes of so many take a busy machine a few seconds.
const MOST_SILENT: usize = 1024;
/// How often those who wait for a seat look whether somebody has had his time.
const LOOK: Duration = Duration::from_secs(1);
/// How long the place of a silent stranger is protected, per place there is: about a thousand of them make room per second, however
/// many there are. A busy machine on which thousands of workers start takes a while to send anything.
const SILENT_CHANCE: Duration = Duration::from_millis(1);
/// How long the seat of a stranger that has sent something is protected. A handshake takes a millisecond of work; 256 of them on a
/// busy machine may take a second.
const SPEAKING_CHANCE: Duration = Duration::from_secs(2);
/// Bound on log lines about strangers per [`WINDOW`].
const MOST_LINES: u32 = 20;
const WINDOW: Duration = Duration::from_secs(60);

/// The seats of a listener; clones share them.
#[derive(Clone, Debug)]
pub(super) struct Admission(Arc<Seats>);

#[derive(Debug)]
struct Seats {
    state: Mutex<AdmissionState>,
    /// Notified when the listener may have room for another connection.
    freed: Notify,
    /// Seats for strangers that speak.
    room: Arc<Semaphore>,
}

#[derive(Clone, Copy, Debug)]
struct Chances {
    silent: Duration,
    speaking: Duration,
}

#[derive(Debug)]
struct AdmissionState {
    most: usize,
    most_silent: usize,
    chances: Chances,
    newest: u64,
    settled: BTreeSet<u64>,
    /// On the porch.
    silent: BTreeMap<u64, Stranger>,
    strangers: BTreeMap<u64, Stranger>,
    /// Peers with a valid certificate that have not called yet.
    proven: BTreeMap<u64, Stranger>,
    lines: Option<(Instant, u32)>,
    untold: u64,
}

#[derive(Debug)]
struct Stranger {
    host: IpAddr,
    since: Instant,
    has_spoken: bool,
    /// Its seat, once its peer has sent something and one was free.
    _seat: Option<OwnedSemaphorePermit>,
    /// Evicts the connection. Dropped when it no longer belongs to a stranger.
    put_out: oneshot::Sender<()>,
}

/// Result of a newcomer's request for a seat.
#[derive(Debug)]
pub(super) enum Admitted {
    /// A place on the porch, and a signal that arrives when the peer is evicted.
    Place(Seat, oneshot::Receiver<()>),
    /// No place yet: ask again when one is freed or loses its protection, which is after this time.
    After(Duration),
    /// No seat: all are held by settled peers.
    Full,
}

/// The place of a connection, freed on drop.
#[derive(Debug)]
pub(super) struct Seat {
    admission: Admission,
    number: u64,
}

impl Admission {
    /// As many seats as the process can have file descriptors, after raising their limit.
    pub(super) fn of_process() -> Self {
        let descriptors = descriptors();
        let most = descriptors.saturating_sub(RESERVED.min(descriptors / 2)).clamp(1, MOST);
        let third = most.div_ceil(3);
        let places = MOST_SILENT.min(third);
        let silent = SILENT_CHANCE.saturating_mul(u32::try_from(places).unwrap_or(u32::MAX));
        let chances = Chances { silent, speaking: SPEAKING_CHANCE };
        Self::with(most, places, MOST_STRANGERS.min(third), chances)
    }

    /// Places without protection: `most` connections in all, `most_strangers` of them for strangers that speak, and as many for
    /// silent ones.
    pub(super) fn new(most: usize, most_strangers: usize) -> Self {
        Self::with(most, most_strangers, most_strangers, Chances { silent: Duration::ZERO, speaking: Duration::ZERO })
    }

    fn with(most: usize, most_silent: usize, most_strangers: usize, chances: Chances) -> Self {
        let (newest, settled, silent, strangers, proven, lines, untold) = Default::default();
        let state =
            AdmissionState { most, most_silent, chances, newest, settled, silent, strangers, proven, lines, untold };
        let room = Arc::new(Semaphore::new(most_strangers));
        Self(Arc::new(Seats { state: Mutex::new(state), freed: Notify::new(), room }))
    }

    fn lock(&self) -> MutexGuard<'_, AdmissionState> {
        // Every change under the lock is complete, so a poisoned lock is usable.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a place for a stranger; `None` when all are held by settled peers.
    pub(super) async fn place(&self, host: IpAddr) -> Option<(Seat, oneshot::Receiver<()>)> {
        loop {
            let freed = self.0.freed.notified();
            match self.admit(host, Instant::now()) {
                Admitted::Place(seat, put_out) => return Some((seat, put_out)),
                Admitted::Full => return None,
                // A timeout only means that a protection has expired.
                Admitted::After(wait) => drop(tokio::time::timeout(wait, freed).await),
            }
        }
    }

    /// Requests a seat for a stranger from this host.
    fn admit(&self, host: IpAddr, now: Instant) -> Admitted {
        let mut state = self.lock();
        let is_full = state.taken() >= state.most;
        if is_full || state.silent.len() >= state.most_silent {
            match state.put_one_out(host, is_full, now) {
                Ok(()) => {}
                Err(Some(wait)) => return Admitted::After(wait),
                Err(None) => return Admitted::Full,
            }
            Self::complain(&mut state, || "connections that say nothing make room for others".to_owned());
        }
        state.newest += 1;
        let number = state.newest;
        let (put_out, told) = oneshot::channel();
        state.silent.insert(number, Stranger { host, since: now, has_spoken: false, _seat: None, put_out });
        Admitted::Place(Seat { admission: self.clone(), number }, told)
    }

    /// Puts a stranger that speaks out, if all seats are taken and it has had its time. How long until another look is worth
    /// it.
    fn make_room(&self, number: u64, now: Instant) -> Duration {
        let mut state = self.lock();
        let host = state.silent.get(&number).map(|stranger| stranger.host);
        let (Some(host), 0) = (host, self.0.room.available_permits()) else { return LOOK };
        let chances = state.chances;
        match longest_of_the_most(&state.strangers, host, chances, now) {
            // Its seat goes to whoever waits longest.
            Ok(number) => drop(state.strangers.remove(&number).map(|stranger| stranger.put_out.send(()))),
            Err(wait) => return wait.unwrap_or(LOOK),
        }
        Self::complain(&mut state, || "connections that do not prove themselves make room for others".to_owned());
        LOOK
    }

    /// Logs a line about strangers, unless too many were logged lately.
    pub(super) fn complain_of(&self, line: impl FnOnce() -> String) {
        Self::complain(&mut self.lock(), line);
    }

    fn complain(state: &mut AdmissionState, line: impl FnOnce() -> String) {
        if let Some(untold) = state.may_say(Instant::now()) {
            tracing::warn!(untold, "{}", line());
        }
    }
}

impl AdmissionState {
    fn taken(&self) -> usize {
        self.silent.len() + self.strangers.len() + self.proven.len() + self.settled.len()
    }

    /// Evicts a silent stranger for a newcomer from `host`; when the process may hold no more connections, also a stranger that
    /// speaks or a peer that has not called yet. Its connection ends at once, and the place counts as free already.
    ///
    /// # Errors
    /// The time after which a seat loses its protection, if any will.
    fn put_one_out(&mut self, host: IpAddr, is_full: bool, now: Instant) -> Result<(), Option<Duration>> {
        let chances = self.chances;
        let others = is_full.then_some([&mut self.strangers, &mut self.proven]);
        let mut soonest = None;
        for strangers in [&mut self.silent].into_iter().chain(others.into_iter().flatten()) {
            match longest_of_the_most(strangers, host, chances, now) {
                Ok(number) => {
                    strangers.remove(&number).map(|stranger| stranger.put_out.send(()));
                    return Ok(());
                }
                Err(wait) => soonest = soonest.into_iter().chain(wait).min(),
            }
        }
        Err(soonest)
    }

    /// Whether another line may be logged; if so, the number of lines that were suppressed.
    fn may_say(&mut self, now: Instant) -> Option<u64> {
        let (_, lines) = match &mut self.lines {
            Some(window) if now.duration_since(window.0) < WINDOW => window,
            window => window.insert((now, 0)),
        };
        if *lines >= MOST_LINES {
            self.untold += 1;
            return None;
        }
        *lines += 1;
        Some(std::mem::take(&mut self.untold))
    }
}

/// The longest-waiting stranger of the host with the most seats, among seats that are not
/// protected from a newcomer of `host`.
///
/// # Errors
/// The time until one of them loses its protection, if any will.
fn longest_of_the_most(
    strangers: &BTreeMap<u64, Stranger>,
    host: IpAddr,
    chances: Chances,
    now: Instant,
) -> Result<u64, Option<Duration>> {
    let mut all: BTreeMap<IpAddr, usize> = BTreeMap::new();
    strangers.values().for_each(|stranger| *all.entry(stranger.host).or_insert(0) += 1);
    let (mut hosts, mut soonest): (BTreeMap<IpAddr, (usize, u64)>, Option<Duration>) = Default::default();
    for (number, stranger) in strangers {
        let chance = if stranger.has_spoken { chances.speaking } else { chances.silent };
        let left = chance.saturating_sub(now.saturating_duration_since(stranger.since));
        let crowds = stranger.host != host && all.get(&stranger.host).is_some_and(|count| 2 * count > strangers.len());
        if left.is_zero() || crowds {
            hosts.entry(stranger.host).or_insert((0, *number)).0 += 1;
        } else {
            soonest = Some(soonest.map_or(left, |soonest| soonest.min(left)));
        }
    }
    let found = hosts.into_values().max_by_key(|(count, first)| (*count, std::cmp::Reverse(*first)));
    found.map(|(_, first)| first).ok_or(soonest)
}

impl Seat {
    /// Waits for a seat for the peer, which has sent something. The caller sets the deadline.
    pub(super) async fn enter(&self) {
        let Self { admission, number } = self;
        if let Some(stranger) = admission.lock().silent.get_mut(number) {
            stranger.has_spoken = true;
        }
        let mut seat = pin!(Arc::clone(&admission.0.room).acquire_owned());
        let seat = loop {
            let wait = admission.make_room(*number, Instant::now());
            if let Ok(seat) = tokio::time::timeout(wait, &mut seat).await {
                break seat;
            }
        };
        let mut state = admission.lock();
        if let Some(stranger) = state.silent.remove(number) {
            // It is never closed.
            state.strangers.insert(*number, Stranger { since: Instant::now(), _seat: seat.ok(), ..stranger });
        }
        drop(state);
        admission.0.freed.notify_one();
    }

    /// Records that the peer has a valid certificate.
    pub(super) fn prove(&self) {
        let mut state = self.admission.lock();
        if let Some(stranger) = state.strangers.remove(&self.number) {
            state.proven.insert(self.number, Stranger { since: Instant::now(), _seat: None, ..stranger });
        }
        drop(state);
        self.admission.0.freed.notify_one();
    }

    /// A handle on the seat for guards, which settle it.
    pub(super) fn holder(&self) -> Holder {
        Holder(Some(Arc::new((AtomicBool::new(false), self.admission.clone(), self.number))))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut state = self.admission.lock();
        let AdmissionState { silent, strangers, proven, .. } = &mut *state;
        // The seat of an evicted connection is gone already.
        if [silent, strangers, proven].into_iter().all(|places| places.remove(&self.number).is_none()) {
            state.settled.remove(&self.number);
        }
        drop(state);
        self.admission.0.freed.notify_one();
    }
}

/// Handle on a peer's seat; empty for a peer that was admitted by other means.
#[derive(Clone, Debug, Default)]
pub(super) struct Holder(Option<Arc<(AtomicBool, Admission, u64)>>);

impl Holder {
    /// Records that a call of the peer was admitted, so that it is no longer a stranger.
    pub(super) fn settle(&self) {
        let Some((is_settled, admission, number)) = self.0.as_deref() else { return };
        if !is_settled.swap(true, Ordering::Relaxed) {
            let mut state = admission.lock();
            if state.strangers.remove(number).or_else(|| state.proven.remove(number)).is_some() {
                state.settled.insert(*number);
            }
            drop(state);
            admission.0.freed.notify_one();
        }
    }
}

/// Number of file descriptors that the process may have, after raising the soft limit to the hard one.
fn descriptors() -> usize {
    let wanted = getrlimit(Resource::RLIMIT_NOFILE).map(|(now, most)| {
        let raised = most > now && setrlimit(Resource::RLIMIT_NOFILE, most, most).is_ok();
        if raised { most } else { now }
    });
    // The default limit, if the system does not say.
    wanted.ok().and_then(|limit| usize::try_from(limit).ok()).unwrap_or(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(last: u8) -> IpAddr {
        [10, 0, 0, last].into()
    }

    /// A place that is granted without waiting.
    fn place(admission: &Admission, last: u8) -> Option<(Seat, oneshot::Receiver<()>)> {
        match admission.admit(host(last), Instant::now()) {
            Admitted::Place(seat, put_out) => Some((seat, put_out)),
            Admitted::Full => None,
            Admitted::After(wait) => panic!("no place is safe here: {wait:?}"),
        }
    }

    /// A seat that is free at once.
    async fn seat(admission: &Admission, last: u8) -> Option<(Seat, oneshot::Receiver<()>)> {
        let (seat, put_out) = place(admission, last)?;
        tokio::time::timeout(LOOK / 2, seat.enter()).await.expect("no seat is safe here");
        Some((seat, put_out))
    }

    /// Numbers of settled peers and of strangers.
    fn taken(admission: &Admission) -> (usize, usize) {
        let state = admission.lock();
        (state.settled.len(), state.strangers.len())
    }

    /// Indexes of the strangers that were evicted.
    fn out(told: &mut [oneshot::Receiver<()>]) -> Vec<usize> {
        (0..).zip(told).filter_map(|(number, told)| told.try_recv().is_ok().then_some(number)).collect()
    }

    #[tokio::test]
    async fn unauthenticated_connections_are_evicted_oldest_of_the_busiest_host_first() {
        let admission = Admission::new(100, 4);
        let (mut seats, mut told) = (vec![], vec![]);
        for last in [1, 2, 2, 1] {
            let (seat, put_out) = seat(&admission, last).await.expect("room");
            seats.push(seat);
            told.push(put_out);
        }
        assert!(out(&mut told).is_empty());
        seats.push(seat(&admission, 2).await.expect("another makes room").0);
        assert_eq!(out(&mut told), [0], "of equals, the one that came first");
        seats.push(seat(&admission, 3).await.expect("another makes room").0);
        assert_eq!(out(&mut told), [1], "host 2 has three");
        seats.clear();
        assert_eq!(taken(&admission), (0, 0));
    }

    #[tokio::test]
    async fn a_working_connection_is_never_evicted_and_room_is_freed() {
        let admission = Admission::new(3, 2);
        let mut seats = vec![];
        for _ in 0..3 {
            let (seat, told) = seat(&admission, 1).await.expect("room");
            let holder = seat.holder();
            (0..2).for_each(|_| holder.settle());
            seats.push((seat, told));
        }
        assert!(place(&admission, 1).is_none(), "all seats are taken by peers that work");
        for (_, told) in &mut seats {
            assert!(
                matches!(told.try_recv(), Err(oneshot::error::TryRecvError::Closed)),
                "told that it is no stranger"
            );
        }
        seats.pop();
        let (stranger, mut told) = seat(&admission, 1).await.expect("room again");
        let (_newcomer, _told) = place(&admission, 2).expect("the stranger makes room");
        assert_eq!(told.try_recv(), Ok(()));
        // Settling an evicted connection has no effect.
        stranger.holder().settle();
        drop(stranger);
        assert_eq!(taken(&admission), (2, 0));
    }

    #[tokio::test]
    async fn a_handshake_in_progress_is_not_evicted() {
        let chances = Chances { silent: Duration::from_secs(1), speaking: Duration::from_secs(5) };
        let admission = Admission::with(100, 2, 2, chances);
        let now = Instant::now();
        let come = |last: u8, later: u64| admission.admit(host(last), now + Duration::from_secs(later));
        let (Admitted::Place(speaks, mut first), Admitted::Place(_silent, mut second)) = (come(1, 0), come(2, 0))
        else {
            panic!("there is room")
        };
        assert!(
            matches!(come(3, 0), Admitted::After(wait) if wait == Duration::from_secs(1)),
            "both have their chance"
        );
        speaks.enter().await;
        let Admitted::Place(third, _put_out) = come(3, 0) else { panic!("one has gone in") };
        assert!(matches!(come(3, 1), Admitted::Place(..)), "who says nothing has had it; its place is given back here");
        assert_eq!((first.try_recv().is_ok(), second.try_recv().is_ok()), (false, true));
        third.enter().await;
        let Admitted::Place(fourth, _put_out) = come(3, 1) else { panic!("another one has gone in") };
        let waits = tokio::time::timeout(Duration::from_millis(50), fourth.enter()).await;
        assert!(waits.is_err() && first.try_recv().is_err(), "both seats are of peers that speak");
        speaks.prove();
        let entered = tokio::time::timeout(Duration::from_secs(4), fourth.enter()).await;
        assert!(entered.is_ok(), "a peer with a certificate is no stranger");
        assert!(first.try_recv().is_err());
    }

    #[tokio::test]
    async fn silent_connections_do_not_delay_active_ones() {
        let chances = Chances { silent: Duration::from_secs(60), speaking: Duration::from_secs(60) };
        let admission = Admission::with(100, 9, 1, chances);
        let now = Instant::now();
        let silent: Vec<_> = (0..8).map(|_| admission.admit(host(1), now)).collect();
        assert!(silent.iter().all(|admitted| matches!(admitted, Admitted::Place(..))));
        for _ in 0..100 {
            let (seat, _told) = seat(&admission, 1).await.expect("a place and a seat at once");
            seat.holder().settle();
        }
    }

    #[tokio::test]
    async fn an_idle_authenticated_peer_is_evicted_when_all_slots_are_taken() {
        let admission = Admission::new(2, 1);
        let (idle, mut told) = seat(&admission, 1).await.expect("room");
        idle.prove();
        let (works, _told) = seat(&admission, 1).await.expect("room");
        works.prove();
        works.holder().settle();
        let (_newcomer, _told) = place(&admission, 2).expect("the idle one makes room");
        assert_eq!(told.try_recv(), Ok(()));
    }

    #[test]
    fn many_strangers_are_not_told_of_one_by_one() {
        let mut state =
            AdmissionState { most: 1, ..Arc::into_inner(Admission::new(1, 1).0).unwrap().state.into_inner().unwrap() };
        let now = Instant::now();
        assert_eq!((0..1000).filter(|_| state.may_say(now).is_some()).count(), MOST_LINES as usize);
        assert_eq!(state.may_say(now + WINDOW), Some(1000 - u64::from(MOST_LINES)));
    }

    #[test]
    fn descriptors_are_left_for_the_process_itself() {
        let admission = Admission::of_process();
        let (AdmissionState { most, most_silent, .. }, strangers) =
            (&*admission.lock(), admission.0.room.available_permits());
        assert!(*most >= 1 && *most < descriptors(), "{most}");
        assert!(strangers <= MOST_STRANGERS && strangers + most_silent <= most + 1, "{strangers} {most_silent} {most}");
    }
}
