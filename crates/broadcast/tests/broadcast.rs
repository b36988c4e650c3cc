//! A learner and hosts that receive its weights in one broadcast, or by what a broken one leaves to do.

#[path = "../../weights/tests/support/certificates.rs"]
mod certificates;

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use pacs_broadcast::CollectiveTransport;
use pacs_runtime::net::{PeerRole, Security};
use pacs_weights::{
    Announcement, Channel, DataServer, FetchOptions, Group, GroupTransport, HostStore, ReceiveError, Received,
    Receiver, Seat, ServerOptions, Shelf, Source, Transport, VersionId, WeightKind, Whole,
};
use tempfile::TempDir;

const RUN: &str = "run";
/// Large enough for eight pieces, so that a member can fail between two of them.
const BYTES: u64 = 8_000_000;
/// Longest that a test waits for what should happen.
const PATIENCE: Duration = Duration::from_secs(120);

fn numbers(version: u64) -> Vec<u8> {
    let version = u32::try_from(version).expect("small");
    (0..2_000_000u32).map(|i| i.wrapping_mul(2_654_435_761) ^ version).flat_map(u32::to_le_bytes).collect()
}

fn host_transport() -> Arc<dyn GroupTransport> {
    Arc::new(CollectiveTransport::host("127.0.0.1", Security::Plain))
}

struct Learner {
    store: HostStore,
    shelf: Shelf,
    server: DataServer,
    _place: TempDir,
}

impl Learner {
    fn new(broadcast: Option<Arc<dyn GroupTransport>>, security: Security) -> Self {
        // Members are threads of one busy machine.
        let window = Duration::from_secs(2);
        let options = ServerOptions { broadcast, window, ..ServerOptions::new(security, RUN) };
        let (place, shelf) = (tempfile::tempdir().expect("a temporary folder"), Shelf::default());
        let store = HostStore::open_in(RUN, &[place.path().to_owned()]).expect("a store");
        let server = DataServer::start("127.0.0.1:0", shelf.clone(), options).expect("a server");
        Self { store, shelf, server, _place: place }
    }

    fn publish(&self, version: u64) -> Whole {
        let whole = self.store.publish(VersionId::new(1, version), WeightKind::Float32, &numbers(version));
        let whole = whole.expect("room");
        self.shelf.put(&whole);
        whole
    }

    fn announcement(&self, whole: &Whole) -> Announcement {
        let address = self.server.address().to_string();
        Announcement { description: whole.description().clone(), address, probe: None }
    }
}

struct Host {
    receiver: Receiver,
    _place: TempDir,
}

impl Host {
    fn new(broadcast: Option<Arc<dyn GroupTransport>>, security: Security) -> Self {
        let place = tempfile::tempdir().expect("a temporary folder");
        let store = Arc::new(HostStore::open_in(RUN, &[place.path().to_owned()]).expect("a store"));
        let receiver = Receiver::new(store, Shelf::default(), FetchOptions::new(security, RUN));
        Self { receiver: receiver.with_broadcast(broadcast), _place: place }
    }

    fn plain(transport: Arc<dyn GroupTransport>) -> Self {
        Self::new(Some(transport), Security::Plain)
    }

    fn receive(&self, announcement: &Announcement, cancelled: &AtomicBool) -> Result<Received, ReceiveError> {
        let source = Source { address: announcement.address.clone(), role: PeerRole::Learner };
        self.receiver.receive(announcement, &|_| Ok(vec![source.clone()]), cancelled)
    }
}

fn content(received: &Received) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(received.whole.description().bytes()).expect("small")];
    received.whole.file().read_exact_at(&mut bytes, 0).expect("it is whole");
    bytes
}

/// All hosts at the same time.
fn receive_all(hosts: &[Host], announcement: &Announcement) -> Vec<Received> {
    let flag = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let threads: Vec<_> = hosts.iter().map(|host| scope.spawn(|| host.receive(announcement, &flag))).collect();
        let received = threads.into_iter().map(|thread| thread.join().expect("no panic").expect("received"));
        received.collect()
    })
}

/// What a member that is not well does in place of the broadcast of its piece `piece`.
#[derive(Clone, Debug)]
enum Illness {
    /// It receives other bytes than those that were sent.
    Flips,
    /// Its process dies.
    Dies,
    /// Blocks its member until it is resumed.
    Stops(Arc<Stop>),
}

#[derive(Debug, Default)]
struct Stop {
    state: Mutex<Stopped>,
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Stopped {
    #[default]
    NotYet,
    Stands,
    GoesOn,
}

impl Stop {
    fn set(&self, state: Stopped) {
        *self.state.lock().expect("no panic") = state;
        self.changed.notify_all();
    }

    /// Waits for a state, or a later one.
    fn wait_for(&self, wanted: Stopped) {
        let state = self.state.lock().expect("no panic");
        let waited = self.changed.wait_timeout_while(state, PATIENCE, |state| *state < wanted).expect("no panic");
        assert!(!waited.1.timed_out(), "{wanted:?} was waited for in vain");
    }
}

#[derive(Debug)]
struct Ill {
    inner: CollectiveTransport,
    illness: Illness,
}

const ILL_AT: usize = 3;

struct IllMember<T: ?Sized> {
    inner: Option<Box<T>>,
    illness: Illness,
    pieces: usize,
}

impl GroupTransport for Ill {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn listen(&self) -> io::Result<Box<dyn Seat>> {
        let inner = Some(self.inner.listen()?);
        Ok(Box::new(IllMember { inner, illness: self.illness.clone(), pieces: 0 }))
    }
}

impl Seat for IllMember<dyn Seat> {
    fn address(&self) -> String {
        self.inner.as_ref().expect("not entered").address()
    }

    fn enter(mut self: Box<Self>, group: &Group) -> Result<Box<dyn Channel>, String> {
        let inner = Some(self.inner.take().expect("entered once").enter(group)?);
        Ok(Box::new(IllMember { inner, illness: self.illness, pieces: 0 }))
    }
}

impl Channel for IllMember<dyn Channel> {
    fn broadcast(&mut self, bytes: &mut [u8]) -> Result<(), String> {
        let is_due = self.pieces == ILL_AT;
        self.pieces += 1;
        match &self.illness {
            Illness::Dies if is_due => {
                self.inner = None;
                return Err("it died".to_owned());
            }
            Illness::Stops(stop) if is_due => {
                stop.set(Stopped::Stands);
                stop.wait_for(Stopped::GoesOn);
            }
            _ => {}
        }
        self.inner.as_mut().ok_or("it is dead")?.broadcast(bytes)?;
        if is_due && matches!(self.illness, Illness::Flips) {
            bytes[5] ^= 1;
        }
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> Result<(), String> {
        self.inner.take().ok_or("it is dead")?.finish()
    }
}

fn ill(illness: Illness) -> Host {
    Host::plain(Arc::new(Ill { inner: CollectiveTransport::host("127.0.0.1", Security::Plain), illness }))
}

#[test]
fn hosts_receive_a_version_together_and_the_learner_sends_it_once() {
    let learner = Learner::new(Some(host_transport()), Security::Plain);
    let hosts = [0, 1, 2].map(|_| Host::plain(host_transport()));
    for version in 1..=2 {
        let published = learner.publish(version);
        for received in receive_all(&hosts, &learner.announcement(&published)) {
            assert_eq!((received.transport, received.fetched.broadcast_bytes), (Transport::Broadcast, BYTES));
            assert_eq!(content(&received), numbers(version));
        }
        assert_eq!(learner.server.sent_bytes(), version * BYTES, "each version left the learner once");
    }
    // Who comes later is served all the same.
    let late = Host::plain(host_transport());
    let published = learner.publish(2);
    let received = receive_all(&[late], &learner.announcement(&published)).remove(0);
    assert_eq!((received.transport, content(&received)), (Transport::Stream, numbers(2)));
}

#[test]
fn pieces_pass_through_the_memory_of_a_device() {
    let transport = || -> Arc<dyn GroupTransport> { Arc::new(CollectiveTransport::emulated("127.0.0.1")) };
    let learner = Learner::new(Some(transport()), Security::Plain);
    let hosts = [0, 1].map(|_| Host::plain(transport()));
    let published = learner.publish(1);
    for received in receive_all(&hosts, &learner.announcement(&published)) {
        assert_eq!((received.fetched.broadcast_bytes, content(&received)), (BYTES, numbers(1)));
    }
}

#[test]
fn with_certificates_learner_and_rollout_workers_know_each_other() {
    let place = tempfile::tempdir().expect("a temporary folder");
    certificates::make(place.path());
    let security = |role: PeerRole| Security::mutual(&place.path().join(role.name()), role).expect("certificates");
    let secured = |role| -> (Arc<dyn GroupTransport>, Security) {
        (Arc::new(CollectiveTransport::host("127.0.0.1", security(role))), security(role))
    };
    let (transport, own) = secured(PeerRole::Learner);
    let learner = Learner::new(Some(transport), own);
    let host = |role| {
        let (transport, own) = secured(role);
        Host::new(Some(transport), own)
    };
    let hosts = [host(PeerRole::Rollout), host(PeerRole::Rollout)];
    let published = learner.publish(1);
    for received in receive_all(&hosts, &learner.announcement(&published)) {
        assert_eq!((received.fetched.broadcast_bytes, content(&received)), (BYTES, numbers(1)));
    }
}

#[test]
fn a_piece_that_came_wrong_is_fetched_again() {
    let learner = Learner::new(Some(host_transport()), Security::Plain);
    let hosts = [ill(Illness::Flips), Host::plain(host_transport())];
    let published = learner.publish(1);
    let received = receive_all(&hosts, &learner.announcement(&published));
    let piece = published.description().piece(ILL_AT);
    let fetched = received[0].fetched;
    assert_eq!(fetched.wrong_pieces, 1);
    assert_eq!((fetched.bytes, fetched.broadcast_bytes), (BYTES, BYTES - (piece.end - piece.start)));
    assert_eq!(received[1].fetched.broadcast_bytes, BYTES, "the others lose nothing");
    assert!(received.iter().all(|received| content(received) == numbers(1)));
}

#[test]
fn a_member_that_dies_leaves_the_rest_to_be_fetched() {
    let learner = Learner::new(Some(host_transport()), Security::Plain);
    let hosts = [ill(Illness::Dies), Host::plain(host_transport()), Host::plain(host_transport())];
    let published = learner.publish(1);
    let received = receive_all(&hosts, &learner.announcement(&published));
    // What the dead one did not take may lie in the buffers of sockets, so the others may have all pieces.
    assert!(received[0].fetched.broadcast_bytes < BYTES, "{:?}", received[0].fetched);
    for received in received {
        assert_eq!((received.fetched.bytes, content(&received)), (BYTES, numbers(1)));
    }
    // A host that is ill would break the next one, too.
    let published = learner.publish(2);
    let received = receive_all(&hosts[1..], &learner.announcement(&published));
    assert!(received.iter().all(|received| received.transport == Transport::Stream));
    assert!(received.iter().all(|received| content(received) == numbers(2)));
}

#[test]
fn a_stalled_member_delays_the_others_for_one_deadline() {
    let learner = Learner::new(Some(host_transport()), Security::Plain);
    let stop = Arc::new(Stop::default());
    let stopped = ill(Illness::Stops(Arc::clone(&stop)));
    let others = [0, 1].map(|_| Host::plain(host_transport()));
    let published = learner.publish(1);
    let announcement = learner.announcement(&published);
    std::thread::scope(|scope| {
        let stopped = scope.spawn(|| stopped.receive(&announcement, &AtomicBool::new(false)));
        for received in receive_all(&others, &announcement) {
            assert_eq!((received.fetched.bytes, content(&received)), (BYTES, numbers(1)));
        }
        // What it did not take may lie in the buffers of sockets, so the others may have all pieces.
        assert_eq!(*stop.state.lock().expect("no panic"), Stopped::Stands, "it took part");
        stop.set(Stopped::GoesOn);
        let received = stopped.join().expect("no panic").expect("it fetches when it is back");
        assert_eq!(content(&received), numbers(1));
    });
}

#[test]
fn a_member_that_cancels_does_not_fail_the_others() {
    let learner = Learner::new(Some(host_transport()), Security::Plain);
    let stop = Arc::new(Stop::default());
    let leaving = ill(Illness::Stops(Arc::clone(&stop)));
    let other = [Host::plain(host_transport())];
    let published = learner.publish(1);
    let (announcement, cancelled) = (learner.announcement(&published), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let leaving = scope.spawn(|| leaving.receive(&announcement, &cancelled));
        let other = scope.spawn(|| receive_all(&other, &announcement));
        stop.wait_for(Stopped::Stands);
        cancelled.store(true, Ordering::Release);
        stop.set(Stopped::GoesOn);
        assert!(leaving.join().expect("no panic").is_err_and(|error| error.is_cancelled()));
        let received = other.join().expect("no panic").remove(0);
        assert_eq!((received.fetched.broadcast_bytes, content(&received)), (BYTES, numbers(1)));
    });
}

#[test]
fn ends_that_were_told_different_transports_stream() {
    let emulated: Arc<dyn GroupTransport> = Arc::new(CollectiveTransport::emulated("127.0.0.1"));
    for learners in [None, Some(emulated)] {
        let learner = Learner::new(learners, Security::Plain);
        let published = learner.publish(1);
        let hosts = [Host::plain(host_transport())];
        let received = receive_all(&hosts, &learner.announcement(&published)).remove(0);
        assert_eq!((received.transport, content(&received)), (Transport::Stream, numbers(1)));
    }
}
