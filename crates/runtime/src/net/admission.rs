//! Which connections a process has, so that strangers cannot take all that there may be.
//!
//! A connection is a stranger's until its first call is let in by a guard ([`Seat::settle`]). Strangers have few seats, and so
//! long to make that call; when all seats are taken, a newcomer takes that of another stranger: the one that has waited longest
//! among those of the address that has most. So a peer that means to work gets in, however many others connect and say nothing;
//! waiting in line would let them hold it up. What is settled is never put out, and together they leave file descriptors for
//! what the process writes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::sync::oneshot;

/// File descriptors that are left for journals, checkpoints, logs and child processes; of a low limit, half.
const RESERVED: usize = 256;
/// Connections at once, whatever the system allows: each takes some 30 KiB.
const MOST: usize = 65_536;
/// Strangers at once.
const MOST_STRANGERS: usize = 256;
/// Lines about strangers in one [`WINDOW`].
const MOST_LINES: u32 = 20;
const WINDOW: Duration = Duration::from_secs(60);

/// The seats of a listener; clones share them.
#[derive(Clone, Debug)]
pub(super) struct Admission(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    most: usize,
    most_strangers: usize,
    newest: u64,
    settled: BTreeSet<u64>,
    strangers: BTreeMap<u64, Stranger>,
    lines: Option<(Instant, u32)>,
    untold: u64,
}

#[derive(Debug)]
struct Stranger {
    host: IpAddr,
    /// Tells its connection to end; dropped, that it is a stranger's no more.
    put_out: oneshot::Sender<()>,
}

/// A seat is taken for a connection, which has it until this is dropped.
#[derive(Debug)]
pub(super) struct Seat {
    admission: Admission,
    number: u64,
}

impl Admission {
    /// As many seats as the process may have file descriptors, and the system's largest number of them.
    pub(super) fn of_process() -> Self {
        let descriptors = descriptors();
        let most = descriptors.saturating_sub(RESERVED.min(descriptors / 2)).clamp(1, MOST);
        Self::new(most, MOST_STRANGERS.min(most.div_ceil(2)))
    }

    /// So many seats, of which so many are for strangers.
    pub(super) fn new(most: usize, most_strangers: usize) -> Self {
        let (newest, settled, strangers, lines, untold) = Default::default();
        Self(Arc::new(Mutex::new(State { most, most_strangers, newest, settled, strangers, lines, untold })))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change of it is a whole one.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A seat for a stranger from this host, and word when it has to make room for another; none when all are taken by peers
    /// that work.
    pub(super) fn admit(&self, host: IpAddr) -> Option<(Seat, oneshot::Receiver<()>)> {
        let mut state = self.lock();
        if state.strangers.len() >= state.most_strangers || state.strangers.len() + state.settled.len() >= state.most {
            let stranger = state.longest_of_the_most()?;
            // Its connection ends at once; the seat counts as free already.
            state.strangers.remove(&stranger).map(|stranger| stranger.put_out.send(()));
            Self::complain(&mut state, || "connections that say nothing make room for others".to_owned());
        }
        state.newest += 1;
        let number = state.newest;
        let (put_out, told) = oneshot::channel();
        state.strangers.insert(number, Stranger { host, put_out });
        Some((Seat { admission: self.clone(), number }, told))
    }

    /// Logs something about strangers, unless too much was said of late.
    pub(super) fn complain_of(&self, line: impl FnOnce() -> String) {
        Self::complain(&mut self.lock(), line);
    }

    fn complain(state: &mut State, line: impl FnOnce() -> String) {
        if let Some(untold) = state.may_say(Instant::now()) {
            tracing::warn!(untold, "{}", line());
        }
    }
}

impl State {
    /// The stranger that has waited longest, of the host that has most of them.
    fn longest_of_the_most(&self) -> Option<u64> {
        let mut hosts: BTreeMap<IpAddr, (usize, u64)> = BTreeMap::new();
        for (number, stranger) in &self.strangers {
            hosts.entry(stranger.host).or_insert((0, *number)).0 += 1;
        }
        hosts.into_values().max_by_key(|(count, first)| (*count, std::cmp::Reverse(*first))).map(|(_, first)| first)
    }

    /// Whether another line may be said: then how many were not.
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

impl Seat {
    /// What a peer is known by, for those who let its calls in.
    pub(super) fn holder(&self) -> Holder {
        Holder(Some(Arc::new((AtomicBool::new(false), self.admission.clone(), self.number))))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut state = self.admission.lock();
        // One that was put out has none any more.
        if state.strangers.remove(&self.number).is_none() {
            state.settled.remove(&self.number);
        }
    }
}

/// Who has a seat; none for a peer that was let in by other means.
#[derive(Clone, Debug, Default)]
pub(super) struct Holder(Option<Arc<(AtomicBool, Admission, u64)>>);

impl Holder {
    /// A call of the peer was let in: it is no stranger.
    pub(super) fn settle(&self) {
        let Some((is_settled, admission, number)) = self.0.as_deref() else { return };
        if !is_settled.swap(true, Ordering::Relaxed) {
            let mut state = admission.lock();
            if state.strangers.remove(number).is_some() {
                state.settled.insert(*number);
            }
        }
    }
}

/// How many file descriptors the process may have: as many as the system lets it ask for.
fn descriptors() -> usize {
    let wanted = getrlimit(Resource::RLIMIT_NOFILE).map(|(now, most)| {
        let raised = most > now && setrlimit(Resource::RLIMIT_NOFILE, most, most).is_ok();
        if raised { most } else { now }
    });
    // Where nobody knows, what every system has.
    wanted.ok().and_then(|limit| usize::try_from(limit).ok()).unwrap_or(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(last: u8) -> IpAddr {
        [10, 0, 0, last].into()
    }

    /// Seats of peers that work, and of strangers.
    fn taken(admission: &Admission) -> (usize, usize) {
        let state = admission.lock();
        (state.settled.len(), state.strangers.len())
    }

    /// Numbers of the strangers that were put out.
    fn out(told: &mut [oneshot::Receiver<()>]) -> Vec<usize> {
        (0..).zip(told).filter_map(|(number, told)| told.try_recv().is_ok().then_some(number)).collect()
    }

    #[test]
    fn strangers_make_room_for_each_other_the_longest_of_the_busiest_host_first() {
        let admission = Admission::new(100, 4);
        let (mut seats, mut told): (Vec<_>, Vec<_>) =
            [1, 2, 2, 1].map(|last| admission.admit(host(last)).expect("room")).into_iter().unzip();
        assert!(out(&mut told).is_empty());
        seats.push(admission.admit(host(2)).expect("another makes room").0);
        assert_eq!(out(&mut told), [0], "of equals, the one that came first");
        seats.push(admission.admit(host(3)).expect("another makes room").0);
        assert_eq!(out(&mut told), [1], "host 2 has three");
        seats.clear();
        assert_eq!(taken(&admission), (0, 0));
    }

    #[test]
    fn who_works_is_never_put_out_and_room_comes_back() {
        let admission = Admission::new(3, 2);
        let mut seats: Vec<_> = (0..3)
            .map(|_| {
                let (seat, told) = admission.admit(host(1)).expect("room");
                let holder = seat.holder();
                (0..2).for_each(|_| holder.settle());
                (seat, told)
            })
            .collect();
        assert!(admission.admit(host(1)).is_none(), "all seats are taken by peers that work");
        for (_, told) in &mut seats {
            assert!(
                matches!(told.try_recv(), Err(oneshot::error::TryRecvError::Closed)),
                "told that it is no stranger"
            );
        }
        seats.pop();
        let (stranger, mut told) = admission.admit(host(1)).expect("room again");
        let (_newcomer, _told) = admission.admit(host(2)).expect("the stranger makes room");
        assert_eq!(told.try_recv(), Ok(()));
        // Too late.
        stranger.holder().settle();
        drop(stranger);
        assert_eq!(taken(&admission), (2, 1));
    }

    #[test]
    fn many_strangers_are_not_told_of_one_by_one() {
        let mut state = State { most: 1, ..Arc::into_inner(Admission::new(1, 1).0).unwrap().into_inner().unwrap() };
        let now = Instant::now();
        assert_eq!((0..1000).filter(|_| state.may_say(now).is_some()).count(), MOST_LINES as usize);
        assert_eq!(state.may_say(now + WINDOW), Some(1000 - u64::from(MOST_LINES)));
    }

    #[test]
    fn descriptors_are_left_for_the_process_itself() {
        let admission = Admission::of_process();
        let State { most, most_strangers: strangers, .. } = *admission.lock();
        assert!(
            most >= 1 && most < descriptors() && strangers <= MOST_STRANGERS && strangers <= most,
            "{most} {strangers}"
        );
    }
}
