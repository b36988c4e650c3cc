//! Serves weights to other hosts.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use pacs_runtime::net::Security;

use crate::data_protocol::{DataConnection, MAGIC, Pace, Request, Status, invalid};
use crate::rounds::{Rounds, WINDOW};
use crate::shelf::{Piece, Shelf};
use crate::{Digest, GroupTransport, VersionId, is_address};

/// Longest silence of a connection between two requests.
const IDLE: Duration = Duration::from_secs(60);
/// How long a request waits for a piece that is on its way here; shorter than the receiver's wait for a status.
const PIECE_WAIT: Duration = Duration::from_secs(5);

/// Connections that the system keeps until they are accepted, unless its own limit is lower: all receivers of a version
/// connect when it is announced. The system drops what does not fit into the standard library's 128, and those receivers
/// dial again after one, three and seven seconds.
const BACKLOG: i32 = 4096;

/// Parameters of a [`DataServer`].
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Protection of the connections.
    pub security: Security,
    /// Id of the run whose members it serves.
    pub run: String,
    /// Bound on concurrent connections; further ones are closed and retry.
    pub connections: usize,
    /// Bound on the total rate in bytes per second, for measurements; `None`: no bound.
    pub rate: Option<u64>,
    /// Transport of broadcasts; `None`: no broadcasts.
    pub broadcast: Option<Arc<dyn GroupTransport>>,
    /// How long a broadcast waits for members after its first one, unless as many hosts have joined as
    /// asked for the previous version.
    pub window: Duration,
}

impl ServerOptions {
    /// Parameters without a rate limit and without broadcasts.
    #[must_use]
    pub fn new(security: Security, run: impl Into<String>) -> Self {
        Self { security, run: run.into(), connections: 64, rate: None, broadcast: None, window: WINDOW }
    }
}

/// Serves the versions on a shelf until it is dropped. Every connection has its own thread, so a
/// slow receiver delays nobody.
#[derive(Debug)]
pub struct DataServer {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    shelf: Shelf,
    options: ServerOptions,
    pace: Pace,
    rounds: Option<Arc<Rounds>>,
    sent: Arc<AtomicU64>,
    connections: AtomicUsize,
    ended: AtomicBool,
}

impl DataServer {
    /// Starts to listen on `bind` (host:port).
    ///
    /// # Errors
    /// When the address cannot be used, or plain text would leave the machine.
    pub fn start(bind: &str, shelf: Shelf, options: ServerOptions) -> io::Result<Self> {
        let listener = TcpListener::bind(bind)?;
        socket2::SockRef::from(&listener).listen(BACKLOG)?;
        let address = listener.local_addr()?;
        options.security.check_listen(address).map_err(io::Error::other)?;
        let pace = Pace::new(options.rate);
        let rounds =
            options.broadcast.clone().map(|transport| Arc::new(Rounds::new(transport, &options.run, options.window)));
        let (sent, connections, ended) = Default::default();
        let shared = Arc::new(Shared { shelf, options, pace, rounds, sent, connections, ended });
        let serving = Arc::clone(&shared);
        std::thread::Builder::new().name("weights-accept".into()).spawn(move || accept(&listener, &serving))?;
        Ok(Self { address, shared })
    }

    /// Address that it listens on.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Bytes of weights sent so far.
    #[must_use]
    pub fn sent_bytes(&self) -> u64 {
        self.shared.sent.load(Ordering::Relaxed)
    }
}

impl Drop for DataServer {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Release);
        // Wakes the accepting thread.
        let _ = TcpStream::connect_timeout(&self.address, Duration::from_secs(1));
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    loop {
        let accepted = listener.accept();
        if shared.ended.load(Ordering::Acquire) {
            return;
        }
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Mostly out of file descriptors: others will free some.
                tracing::warn!("a receiver of weights was not admitted: {error}");
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        // Closed without a handshake, which would cost what is scarce. The receiver sees a
        // closed connection and retries.
        let Some(place) = Place::take(shared) else {
            tracing::debug!(%peer, "a receiver of weights was refused: all connections are taken");
            continue;
        };
        let spawned = std::thread::Builder::new().name("weights-send".into()).spawn(move || {
            if let Err(error) = serve(stream, &place.0) {
                match error.kind() {
                    io::ErrorKind::UnexpectedEof | io::ErrorKind::TimedOut | io::ErrorKind::ConnectionReset => {
                        tracing::debug!(%peer, "a receiver of weights has left: {error}");
                    }
                    _ => tracing::warn!(%peer, "a receiver of weights was refused: {error}"),
                }
            }
        });
        if let Err(error) = spawned {
            tracing::warn!(%peer, "no thread for a receiver of weights: {error}");
        }
    }
}

/// A permit for one connection.
struct Place(Arc<Shared>);

impl Place {
    fn take(shared: &Arc<Shared>) -> Option<Self> {
        let taken = shared.connections.fetch_add(1, Ordering::AcqRel);
        let place = Self(Arc::clone(shared));
        (taken < shared.options.connections).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::AcqRel);
    }
}

fn serve(stream: TcpStream, shared: &Shared) -> io::Result<()> {
    let (mut connection, run) = DataConnection::accept(stream, &shared.options.security)?;
    connection.write_all(&MAGIC)?;
    if run != shared.options.run {
        connection.write_all(&[Status::Stranger as u8])?;
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "it belongs to another run"));
    }
    connection.write_all(&[Status::Here as u8])?;
    loop {
        connection.wait_up_to(IDLE)?;
        let (id, digest, first, count) = match Request::read(&mut connection)? {
            Request::Pieces { id, digest, first, count } => (id, digest, first, count),
            Request::Join { id, digest, transport, address } => {
                gather(&mut connection, shared, (id, digest), &transport, &address)?;
                continue;
            }
        };
        for index in first..first.saturating_add(count) {
            if shared.ended.load(Ordering::Acquire) {
                return Ok(());
            }
            let piece = shared.shelf.piece(id, &digest, index as usize, PIECE_WAIT);
            let (status, found) = match piece {
                Piece::Ready(file, range) => (Status::Here, Some((file, range))),
                Piece::NotYet => (Status::NotYet, None),
                Piece::Unknown => (Status::Unknown, None),
            };
            connection.expect(found.as_ref().map_or(0, |(_, range)| range.end - range.start));
            connection.write_all(&[status as u8])?;
            // The receiver asks again, here or elsewhere.
            let Some((file, range)) = found else { break };
            let pace = |bytes| {
                shared.pace.wait(bytes);
                shared.sent.fetch_add(bytes, Ordering::Relaxed);
            };
            connection.send(&file, range, &pace)?;
        }
    }
}

/// Answers a request for a place in a broadcast.
fn gather(
    connection: &mut DataConnection,
    shared: &Shared,
    (id, digest): (VersionId, Digest),
    transport: &str,
    address: &str,
) -> io::Result<()> {
    if !is_address(address) {
        return Err(invalid(format!("`{}` is not host:port", address.escape_debug())));
    }
    let Some(version) = shared.shelf.whole(id, &digest) else {
        connection.expect(0);
        return connection.write_all(&[Status::Unknown as u8]);
    };
    let sent = Arc::clone(&shared.sent);
    let count = move |bytes| {
        sent.fetch_add(bytes, Ordering::Relaxed);
    };
    let place = shared.rounds.as_ref().and_then(|rounds| rounds.join(version, transport, address, count));
    connection.expect(0);
    match place {
        Some((rank, addresses)) => connection.write_members(rank, &addresses),
        None => connection.write_all(&[Status::NoBroadcast as u8]),
    }
}
