//! Versions between hosts: each "host" is a store, a shelf and a server of its own.

#[path = "support/certificates.rs"]
mod certificates;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use pacs_runtime::net::{PeerRole, Security};
use pacs_weights::{
    Announcement, Claim, DataServer, Description, FetchError, FetchOptions, HostStore, ReceiveError, Received,
    Receiver, ServerOptions, Shelf, Source, Transport, VersionId, WeightKind, Whole, fetch,
};
use tempfile::TempDir;

const RUN: &str = "run";
/// Longest that a test waits for what should happen.
const PATIENCE: Duration = Duration::from_secs(60);

/// Weights of eight pieces that differ between versions.
fn numbers(version: u32) -> Vec<u8> {
    (0..2_000_000u32).map(|i| i.wrapping_mul(2_654_435_761) ^ version).flat_map(u32::to_le_bytes).collect()
}

struct Host {
    store: Arc<HostStore>,
    shelf: Shelf,
    server: DataServer,
    place: TempDir,
}

impl Host {
    fn with(options: ServerOptions) -> Self {
        let place = tempfile::tempdir().expect("a temporary folder");
        let store = Arc::new(HostStore::open_in(RUN, &[place.path().to_owned()]).expect("a store"));
        let shelf = Shelf::default();
        let server = DataServer::start("127.0.0.1:0", shelf.clone(), options).expect("a server");
        Self { store, shelf, server, place }
    }

    fn new() -> Self {
        Self::with(ServerOptions::new(Security::Plain, RUN))
    }

    fn publish(&self, version: u32) -> Whole {
        let id = VersionId::new(1, u64::from(version));
        let whole = self.store.publish(id, WeightKind::Float32, &numbers(version)).expect("room");
        self.shelf.put(&whole);
        whole
    }

    fn address(&self) -> String {
        self.server.address().to_string()
    }

    fn receiver(&self, options: FetchOptions) -> Receiver {
        Receiver::new(Arc::clone(&self.store), self.shelf.clone(), options)
    }
}

fn options() -> FetchOptions {
    FetchOptions::new(Security::Plain, RUN)
}

fn learner(address: String) -> Source {
    Source { address, role: PeerRole::Learner }
}

fn content(whole: &Whole) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(whole.description().bytes()).expect("small")];
    whole.file().read_exact_at(&mut bytes, 0).expect("it is whole");
    bytes
}

/// Announced by a learner that broadcasts to nobody.
fn announced(description: &Description) -> Announcement {
    Announcement { description: description.clone(), address: String::new(), probe: None }
}

fn receive(host: &Host, description: &Description, from: &[String]) -> Result<Received, ReceiveError> {
    let found = |_: &[String]| Ok(from.iter().cloned().map(learner).collect());
    host.receiver(options()).receive(&announced(description), &found, &AtomicBool::new(false))
}

/// A proxy of `to` whose every connection is handled by `each`: what comes from the server, at which byte of the connection, is
/// changed, or ends it when that says so.
fn proxy(to: SocketAddr, each: impl Fn(usize, &mut [u8]) -> bool + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let each = Arc::new(each);
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (client, each) = (client.expect("accepted"), Arc::clone(&each));
            std::thread::spawn(move || {
                let server = TcpStream::connect(to)?;
                let (mut from_client, mut to_server) = (client.try_clone()?, server.try_clone()?);
                std::thread::spawn(move || std::io::copy(&mut from_client, &mut to_server));
                let (mut client, mut server, mut at, mut buffer) = (client, server, 0, vec![0; 64 << 10]);
                loop {
                    let read = server.read(&mut buffer)?;
                    if read == 0 || !each(at, &mut buffer[..read]) {
                        let _ = client.shutdown(std::net::Shutdown::Both);
                        let _ = server.shutdown(std::net::Shutdown::Both);
                        return Ok::<(), std::io::Error>(());
                    }
                    client.write_all(&buffer[..read])?;
                    at += read;
                }
            });
        }
    });
    address
}

#[test]
fn a_version_comes_over_the_wire_once_and_is_then_shared() {
    let (learner_host, host) = (Host::new(), Host::new());
    let published = learner_host.publish(1);
    let received = receive(&host, published.description(), &[learner_host.address()]).expect("fetched");
    assert_eq!((received.transport, received.fetched.wrong_pieces), (Transport::Stream, 0));
    assert_eq!(content(&received.whole), numbers(1));
    assert_eq!(learner_host.server.sent_bytes(), 8_000_000);
    // A second worker of the host asks nobody.
    let nobody = |_: &[String]| -> Result<Vec<Source>, String> { panic!("nobody is to be asked") };
    let second = host.receiver(options());
    let shared =
        second.receive(&announced(published.description()), &nobody, &AtomicBool::new(false)).expect("it is here");
    assert_eq!((shared.transport, content(&shared.whole)), (Transport::Shared, numbers(1)));
}

#[test]
fn workers_of_a_host_fetch_one_copy_together() {
    let learner_host = Host::with(ServerOptions { rate: Some(40 << 20), ..ServerOptions::new(Security::Plain, RUN) });
    let host = Host::new();
    let published = learner_host.publish(1);
    let transports: Vec<Transport> = std::thread::scope(|scope| {
        let worker = || receive(&host, published.description(), &[learner_host.address()]).expect("received").transport;
        let workers: Vec<_> = (0..4).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().map(|worker| worker.join().expect("no panic")).collect()
    });
    assert_eq!(transports.iter().filter(|transport| **transport == Transport::Stream).count(), 1, "{transports:?}");
    assert_eq!(learner_host.server.sent_bytes(), 8_000_000);
}

#[test]
fn a_bit_that_flips_on_the_way_costs_one_piece() {
    let (learner_host, host) = (Host::new(), Host::new());
    let published = learner_host.publish(1);
    let flipped = AtomicBool::new(false);
    let proxy = proxy(learner_host.server.address(), move |at, bytes| {
        if at > 500_000 && !flipped.swap(true, Ordering::Relaxed) {
            bytes[0] ^= 0x10;
        }
        true
    });
    let received = receive(&host, published.description(), &[proxy.to_string()]).expect("fetched");
    assert_eq!(received.fetched.wrong_pieces, 1);
    assert_eq!(content(&received.whole), numbers(1));
    let again = published.description().piece(0).end;
    assert_eq!(learner_host.server.sent_bytes(), 8_000_000 + again, "that piece twice, and no other");
}

#[test]
fn a_source_of_wrong_pieces_is_not_used_again() {
    let (learner_host, host) = (Host::new(), Host::new());
    let published = learner_host.publish(1);
    let bad = proxy(learner_host.server.address(), |_, bytes| {
        if bytes.len() > 1000 {
            bytes[500] ^= 1;
        }
        true
    });
    let (bad, good) = (bad.to_string(), learner_host.address());
    let asked = Mutex::new(Vec::new());
    let finder = |failed: &[String]| {
        asked.lock().expect("no panic").push(failed.to_vec());
        Ok(vec![learner(if failed.is_empty() { bad.clone() } else { good.clone() })])
    };
    let received =
        host.receiver(options()).receive(&announced(published.description()), &finder, &AtomicBool::new(false));
    let received = received.expect("fetched from the other");
    assert!(received.fetched.wrong_pieces > 0);
    assert_eq!(content(&received.whole), numbers(1));
    assert_eq!(*asked.lock().expect("no panic"), [vec![], vec![bad.clone()]]);
}

#[test]
fn a_sender_that_dies_leaves_no_partial_version_and_another_continues() {
    let (first, second, host) = (Host::new(), Host::new(), Host::new());
    let published = first.publish(1);
    second.publish(1);
    // The first dies for good after three pieces on all its connections together.
    let sent = AtomicU32::new(0);
    let dying = proxy(first.server.address(), move |_, bytes| {
        sent.fetch_add(u32::try_from(bytes.len()).expect("small"), Ordering::Relaxed) < 3_500_000
    });
    let alone = FetchOptions { patience: Duration::from_secs(1), connections: 2, ..options() };
    let nobody_else = |_: &[String]| Ok(vec![learner(dying.to_string())]);
    let lost = host.receiver(alone).receive(&announced(published.description()), &nobody_else, &AtomicBool::new(false));
    assert!(matches!(lost, Err(ReceiveError::Fetch(FetchError::NoProgress { .. }))), "{lost:?}");
    assert!(host.store.find(published.description()).expect("readable").is_none(), "half a version is none");
    let received = receive(&host, published.description(), &[second.address()]).expect("fetched");
    assert_eq!(content(&received.whole), numbers(1));
    let resumed = received.fetched.resumed_pieces;
    assert!(resumed > 0, "what came before is not fetched again");
    let rest: u64 = received.whole.description().bytes() - received.fetched.bytes;
    assert_eq!(second.server.sent_bytes(), 8_000_000 - rest);
}

#[test]
fn a_connection_that_breaks_is_taken_up_again() {
    let (learner_host, host) = (Host::new(), Host::new());
    let published = learner_host.publish(1);
    let breaks = AtomicU32::new(0);
    let proxy =
        proxy(learner_host.server.address(), move |at, _| at < 1_500_000 || breaks.fetch_add(1, Ordering::Relaxed) > 0);
    let received = receive(&host, published.description(), &[proxy.to_string()]).expect("fetched");
    assert_eq!(content(&received.whole), numbers(1));
}

#[test]
fn hosts_relay_while_they_fetch() {
    // The learner takes a while, and sends once; the relay has no limit.
    let learner_host = Host::with(ServerOptions { rate: Some(16 << 20), ..ServerOptions::new(Security::Plain, RUN) });
    let (relay, leaf) = (Host::new(), Host::new());
    let published = learner_host.publish(1);
    let description = published.description();
    let whole_before = std::thread::scope(|scope| {
        let fetching = scope.spawn(|| receive(&relay, description, &[learner_host.address()]).expect("fetched"));
        let passing = scope.spawn(|| {
            let part = match leaf.store.claim(description).expect("room") {
                Claim::Ours(part) => part,
                other => panic!("{other:?}"),
            };
            let relay_address = relay.address();
            let finder = |_: &[String]| Ok(vec![Source { address: relay_address.clone(), role: PeerRole::Rollout }]);
            let fetched = fetch(&part, &leaf.shelf, &finder, &options(), &AtomicBool::new(false)).expect("fetched");
            assert_eq!(fetched.bytes, 8_000_000);
            part.finish().expect("renamed")
        });
        // A piece arrives at the leaf before the relay has the last one.
        let started = std::time::Instant::now();
        let mut early = false;
        while !fetching.is_finished() && started.elapsed() < PATIENCE {
            early |= relay.server.sent_bytes() > 0;
            std::thread::sleep(Duration::from_millis(1));
        }
        fetching.join().expect("no panic");
        assert_eq!(content(&passing.join().expect("no panic")), numbers(1));
        early
    });
    assert!(whole_before, "the relay waited until it had all of it");
    assert_eq!(learner_host.server.sent_bytes(), 8_000_000, "the leaf asked the relay alone");
}

#[test]
fn a_receiver_that_does_not_read_delays_no_other() {
    let (learner_host, host) = (Host::new(), Host::new());
    let published = learner_host.publish(1);
    let mut stuck = TcpStream::connect(learner_host.server.address()).expect("connected");
    stuck.write_all(b"PACSWGT2\x03run").expect("sent");
    let mut answer = [0; 9];
    stuck.read_exact(&mut answer).expect("answered");
    let mut request = vec![0];
    request.extend(1u64.to_le_bytes());
    request.extend(1u64.to_le_bytes());
    request.extend(published.description().digest());
    request.extend(0u32.to_le_bytes());
    request.extend(8u32.to_le_bytes());
    stuck.write_all(&request).expect("sent");
    let received = receive(&host, published.description(), &[learner_host.address()]).expect("fetched meanwhile");
    assert_eq!(content(&received.whole), numbers(1));
    drop(stuck);
}

#[test]
fn unauthenticated_peers_get_nothing() {
    let (learner_host, host) = (Host::new(), Host::new());
    let published = learner_host.publish(1);
    let other_run = FetchOptions { run: "other".into(), patience: Duration::from_millis(200), ..options() };
    let finder = |_: &[String]| Ok(vec![learner(learner_host.address())]);
    let refused =
        host.receiver(other_run).receive(&announced(published.description()), &finder, &AtomicBool::new(false));
    let Err(ReceiveError::Fetch(FetchError::NoProgress { last, .. })) = refused else { panic!("{refused:?}") };
    assert!(last.contains("another run"), "{last}");
    // Same version, other content: what a learner of another start may have published.
    let other = Description::of(VersionId::new(1, 1), WeightKind::Float32, &numbers(9));
    let short = FetchOptions { patience: Duration::from_millis(200), ..options() };
    let refused = host.receiver(short).receive(&announced(&other), &finder, &AtomicBool::new(false));
    let Err(ReceiveError::Fetch(FetchError::NoProgress { last, .. })) = refused else { panic!("{refused:?}") };
    assert!(last.contains("does not have this version"), "{last}");
    assert_eq!(learner_host.server.sent_bytes(), 0);
}

#[test]
fn an_unwanted_one_is_abandoned() {
    let (learner_host, host) =
        (Host::with(ServerOptions { rate: Some(1 << 20), ..ServerOptions::new(Security::Plain, RUN) }), Host::new());
    let published = learner_host.publish(1);
    let cancelled = AtomicBool::new(false);
    let finder = |_: &[String]| Ok(vec![learner(learner_host.address())]);
    let receiver = host.receiver(options());
    std::thread::scope(|scope| {
        let fetching = scope.spawn(|| receiver.receive(&announced(published.description()), &finder, &cancelled));
        let started = std::time::Instant::now();
        while learner_host.server.sent_bytes() == 0 && started.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(1));
        }
        cancelled.store(true, Ordering::Release);
        assert!(fetching.join().expect("no panic").expect_err("given up").is_cancelled());
    });
}

#[test]
fn with_certificates_rollout_workers_fetch_and_no_other_role() {
    let place = tempfile::tempdir().expect("a temporary folder");
    certificates::make(place.path());
    let security = |role: PeerRole| Security::mutual(&place.path().join(role.name()), role).expect("certificates");
    let learner_host = Host::with(ServerOptions::new(security(PeerRole::Learner), RUN));
    let host = Host::new();
    let published = learner_host.publish(1);
    let with = |role| FetchOptions { patience: Duration::from_millis(300), ..FetchOptions::new(security(role), RUN) };
    let finder = |_: &[String]| Ok(vec![learner(learner_host.address())]);
    let cancelled = AtomicBool::new(false);
    let refused =
        host.receiver(with(PeerRole::Verifier)).receive(&announced(published.description()), &finder, &cancelled);
    assert!(matches!(refused, Err(ReceiveError::Fetch(FetchError::NoProgress { .. }))), "{refused:?}");
    // One that says it is a learner and shows another role's certificate is no source.
    let as_relay = |_: &[String]| Ok(vec![Source { address: learner_host.address(), role: PeerRole::Rollout }]);
    let refused =
        host.receiver(with(PeerRole::Rollout)).receive(&announced(published.description()), &as_relay, &cancelled);
    assert!(matches!(refused, Err(ReceiveError::Fetch(FetchError::NoProgress { .. }))), "{refused:?}");
    assert_eq!(learner_host.server.sent_bytes(), 0);
    let options = FetchOptions::new(security(PeerRole::Rollout), RUN);
    let received =
        host.receiver(options).receive(&announced(published.description()), &finder, &cancelled).expect("fetched");
    assert_eq!((received.transport, content(&received.whole)), (Transport::Stream, numbers(1)));
}

#[test]
fn plain_text_does_not_leave_the_machine() {
    let refused = DataServer::start("0.0.0.0:0", Shelf::default(), ServerOptions::new(Security::Plain, RUN));
    assert!(refused.expect_err("refused").to_string().contains("plain text never leaves the machine"));
}

#[test]
fn superseded_versions_are_removed() {
    let (learner_host, host) = (Host::new(), Host::new());
    let receiver = host.receiver(options());
    let finder = |_: &[String]| Ok(vec![learner(learner_host.address())]);
    let files = || {
        let folder = std::fs::read_dir(host.place.path()).expect("the place").next().expect("a folder").expect("read");
        let names = std::fs::read_dir(folder.path()).expect("the folder");
        let mut names: Vec<String> =
            names.map(|entry| entry.expect("read").file_name().to_string_lossy().into_owned()).collect();
        names.retain(|name| name != "lock");
        names.sort_unstable();
        names
    };
    let mut kept = Vec::new();
    for version in 1..=4 {
        let published = learner_host.publish(version);
        receiver.receive(&announced(published.description()), &finder, &AtomicBool::new(false)).expect("fetched");
        kept.push(published.description().file_name());
    }
    assert_eq!(files(), kept[2..], "the newest, and the one before that may be in use");
    // The process starts again, and does not know what it has received.
    let published = learner_host.publish(5);
    kept.push(published.description().file_name());
    let again = host.receiver(options());
    again.receive(&announced(published.description()), &finder, &AtomicBool::new(false)).expect("fetched");
    assert_eq!(files(), kept[3..], "the same after a restart");
}
