//! The protocol for weights: frames over a blocking stream, plain or TLS, with a deadline on every read and write.
//!
//! A client sends the magic and the run; the server answers with the magic and a status byte. Each request is a verb
//! and identifies a version by id and digest. `Pieces` adds a range of pieces; the server answers each with a status
//! byte and, if it has it, the bytes, whose number both sides know from the description. `Join` adds a transport and
//! the address at which the client awaits its peers; the answer is a status byte and, when a broadcast is about to
//! begin, the client's rank and all addresses. Numbers are little-endian.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::net::TcpStream;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pacs_runtime::net::{PeerRole, Security, check_role};
use rustix::fs::sendfile;
use rustix::io::Errno;
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, Connection, ServerConnection};

use crate::store::CHUNK;
use crate::{Digest, VersionId, is_address};

/// Identifies the protocol and its version.
pub(crate) const MAGIC: [u8; 8] = *b"PACSWGT2";
/// Longest run id in a greeting, in bytes.
pub(crate) const MOST_RUN: usize = 64;
/// Deadline of a greeting.
pub(crate) const GREETING: Duration = Duration::from_secs(10);
/// Deadline of one read or write.
pub(crate) const STALL: Duration = Duration::from_secs(15);
/// Longest name or address in a frame, in bytes.
const MOST_TEXT: usize = 300;
/// Bound on the members of a broadcast.
pub(crate) const MOST_MEMBERS: usize = 1024;
/// Rate in bytes per second below which a sender or receiver counts as dead.
const LEAST_RATE: u64 = 256 << 10;
/// Plain text that TLS buffers before the socket has to accept more.
const TLS_AHEAD: usize = 256 << 10;

/// Answer to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    /// The bytes follow.
    Here = 0,
    /// The version is not here (any more).
    Unknown = 1,
    /// The piece is being fetched.
    NotYet = 2,
    /// The client belongs to another run, or speaks another protocol.
    Stranger = 3,
    /// No broadcast of this version will begin, or this server broadcasts none.
    NoBroadcast = 4,
}

impl Status {
    fn read(byte: u8) -> io::Result<Self> {
        let known = [Self::Here, Self::Unknown, Self::NotYet, Self::Stranger, Self::NoBroadcast];
        let status = known.into_iter().find(|status| *status as u8 == byte);
        status.ok_or_else(|| invalid(format!("status {byte}")))
    }
}

pub(crate) fn invalid(problem: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, problem.into())
}

/// A request of a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// A range of pieces of a version.
    Pieces { id: VersionId, digest: Digest, first: u32, count: u32 },
    /// A place in the broadcast of a version.
    Join { id: VersionId, digest: Digest, transport: String, address: String },
}

const PIECES: u8 = 0;
const JOIN: u8 = 1;
/// Size of a verb, generation, version and digest.
const HEAD_BYTES: usize = 1 + 8 + 8 + 32;

impl Request {
    pub(crate) fn write(&self, connection: &mut DataConnection) -> io::Result<()> {
        let (Self::Pieces { id, digest, .. } | Self::Join { id, digest, .. }) = self;
        let mut bytes = vec![if matches!(self, Self::Pieces { .. }) { PIECES } else { JOIN }];
        bytes.extend(id.generation.0.to_le_bytes());
        bytes.extend(id.version.0.to_le_bytes());
        bytes.extend(digest);
        match self {
            Self::Pieces { first, count, .. } => {
                bytes.extend(first.to_le_bytes());
                bytes.extend(count.to_le_bytes());
            }
            Self::Join { transport, address, .. } => {
                put_text(&mut bytes, transport)?;
                put_text(&mut bytes, address)?;
            }
        }
        connection.write_all(&bytes)
    }

    pub(crate) fn read(connection: &mut DataConnection) -> io::Result<Self> {
        let head: [u8; HEAD_BYTES] = connection.take()?;
        let long = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| head[at + byte]));
        let (id, digest) = (VersionId::new(long(1), long(9)), std::array::from_fn(|byte| head[17 + byte]));
        match head[0] {
            PIECES => {
                let range: [u8; 8] = connection.take()?;
                let short = |at: usize| u32::from_le_bytes(std::array::from_fn(|byte| range[at + byte]));
                Ok(Self::Pieces { id, digest, first: short(0), count: short(4) })
            }
            JOIN => Ok(Self::Join { id, digest, transport: connection.text()?, address: connection.text()? }),
            other => Err(invalid(format!("request {other}"))),
        }
    }
}

fn put_text(bytes: &mut Vec<u8>, text: &str) -> io::Result<()> {
    if text.len() > MOST_TEXT {
        return Err(invalid(format!("`{}` is longer than {MOST_TEXT} bytes", text.escape_debug())));
    }
    bytes.extend((text.len() as u16).to_le_bytes());
    bytes.extend(text.as_bytes());
    Ok(())
}

/// A connection of the weights protocol.
pub(crate) struct DataConnection {
    stream: BufReader<TcpStream>,
    tls: Option<Box<Connection>>,
    /// Deadline of the current operation, however many reads it takes.
    deadline: Instant,
}

impl DataConnection {
    /// Dials a sender of this role, and names the run.
    pub(crate) fn dial(address: &str, role: PeerRole, security: &Security, run: &str) -> io::Result<Self> {
        use std::net::ToSocketAddrs;
        let mut problem = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for candidate in address.to_socket_addrs()? {
            if matches!(security, Security::Plain) && !candidate.ip().is_loopback() {
                problem = io::Error::other(format!("{candidate}: plain text never leaves the machine"));
                continue;
            }
            match TcpStream::connect_timeout(&candidate, GREETING) {
                Ok(stream) => return Self::greet(stream, role, security, run),
                Err(error) => problem = error,
            }
        }
        Err(problem)
    }

    fn greet(stream: TcpStream, role: PeerRole, security: &Security, run: &str) -> io::Result<Self> {
        let tls = match security.rustls() {
            None => None,
            Some((client, _)) => {
                let name = ServerName::try_from(role.dns_name()).map_err(io::Error::other)?;
                Some(Connection::from(ClientConnection::new(client, name).map_err(io::Error::other)?))
            }
        };
        let mut connection = Self::new(stream, tls)?;
        connection.handshake()?;
        let mut hello = MAGIC.to_vec();
        hello.push(u8::try_from(run.len()).map_err(io::Error::other)?);
        hello.extend(run.as_bytes());
        connection.write_all(&hello)?;
        let mut magic = [0; MAGIC.len()];
        connection.read_exact(&mut magic)?;
        if magic != MAGIC {
            return Err(invalid("it does not hand out weights, or is of another version of this program"));
        }
        match connection.status()? {
            Status::Here => Ok(connection),
            Status::Stranger => Err(io::Error::new(io::ErrorKind::PermissionDenied, "it belongs to another run")),
            status => Err(io::Error::new(io::ErrorKind::ConnectionRefused, format!("it answers {status:?}"))),
        }
    }

    /// Accepts the greeting of a rollout worker; returns the run that it names.
    pub(crate) fn accept(stream: TcpStream, security: &Security) -> io::Result<(Self, String)> {
        let tls = match security.rustls() {
            None => None,
            Some((_, server)) => Some(Connection::from(ServerConnection::new(server).map_err(io::Error::other)?)),
        };
        let mut connection = Self::new(stream, tls)?;
        connection.handshake()?;
        if let Some(tls) = &connection.tls {
            let shown = tls.peer_certificates().and_then(|chain| chain.first());
            let judged = shown.ok_or_else(|| "it shows no certificate".to_owned());
            let judged = judged.and_then(|certificate| check_role(certificate, PeerRole::Rollout));
            judged.map_err(|problem| io::Error::new(io::ErrorKind::PermissionDenied, problem))?;
        }
        let mut magic = [0; MAGIC.len()];
        connection.read_exact(&mut magic)?;
        if magic != MAGIC {
            return Err(invalid("it speaks another protocol"));
        }
        let mut length = [0];
        connection.read_exact(&mut length)?;
        let length = usize::from(length[0]);
        if length > MOST_RUN {
            return Err(invalid("the name of its run is too long"));
        }
        let mut run = vec![0; length];
        connection.read_exact(&mut run)?;
        Ok((connection, String::from_utf8_lossy(&run).into_owned()))
    }

    fn new(stream: TcpStream, mut tls: Option<Connection>) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(STALL))?;
        stream.set_write_timeout(Some(STALL))?;
        if let Some(tls) = &mut tls {
            tls.set_buffer_limit(Some(TLS_AHEAD));
        }
        let capacity = if tls.is_some() { TLS_AHEAD } else { 0 };
        let stream = BufReader::with_capacity(capacity, stream);
        Ok(Self { stream, tls: tls.map(Box::new), deadline: Instant::now() + GREETING })
    }

    fn handshake(&mut self) -> io::Result<()> {
        while self.tls.as_ref().is_some_and(|tls| tls.is_handshaking()) {
            self.check_deadline()?;
            let Some(tls) = &mut self.tls else { break };
            if tls.wants_write() {
                tls.write_tls(self.stream.get_mut())?;
            } else {
                take_in(tls, &mut self.stream)?;
            }
        }
        self.push_out()
    }

    /// Sets the deadline for `bytes` to be transferred, at the lowest acceptable rate.
    pub(crate) fn expect(&mut self, bytes: u64) {
        self.deadline = Instant::now() + STALL + Duration::from_secs(bytes / LEAST_RATE);
    }

    /// Sets the deadline for the next operation, which may be longer than that of a read.
    pub(crate) fn wait_up_to(&mut self, limit: Duration) -> io::Result<()> {
        self.deadline = Instant::now() + limit;
        self.stream.get_ref().set_read_timeout(Some(limit))
    }

    fn check_deadline(&self) -> io::Result<()> {
        if Instant::now() > self.deadline {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "it is too slow"));
        }
        Ok(())
    }

    pub(crate) fn status(&mut self) -> io::Result<Status> {
        let mut byte = [0];
        self.read_exact(&mut byte)?;
        Status::read(byte[0])
    }

    fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn text(&mut self) -> io::Result<String> {
        let length = usize::from(u16::from_le_bytes(self.take()?));
        if length > MOST_TEXT {
            return Err(invalid(format!("a text of {length} bytes")));
        }
        let mut bytes = vec![0; length];
        self.read_exact(&mut bytes)?;
        String::from_utf8(bytes).map_err(|error| invalid(error.to_string()))
    }

    /// Sends a member its rank and all addresses.
    pub(crate) fn write_members(&mut self, rank: usize, addresses: &[String]) -> io::Result<()> {
        let mut bytes = vec![Status::Here as u8];
        for number in [rank, addresses.len()] {
            bytes.extend(u32::try_from(number).map_err(io::Error::other)?.to_le_bytes());
        }
        addresses.iter().try_for_each(|address| put_text(&mut bytes, address))?;
        self.write_all(&bytes)
    }

    /// Reads what [`DataConnection::write_members`] sent after the status byte.
    pub(crate) fn members(&mut self) -> io::Result<(usize, Vec<String>)> {
        let mut number = || self.take().map(u32::from_le_bytes).map(|number| number as usize);
        let (rank, count) = (number()?, number()?);
        if !(2..=MOST_MEMBERS).contains(&count) || !(1..count).contains(&rank) {
            return Err(invalid(format!("rank {rank} of {count}")));
        }
        let addresses = (0..count).map(|_| self.text()).collect::<io::Result<Vec<String>>>()?;
        match addresses.iter().find(|address| !is_address(address)) {
            Some(wrong) => Err(invalid(format!("`{}` is not host:port", wrong.escape_debug()))),
            None => Ok((rank, addresses)),
        }
    }

    pub(crate) fn read_exact(&mut self, mut bytes: &mut [u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.read(bytes)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => bytes = &mut bytes[read..],
            }
        }
        Ok(())
    }

    /// Reads available bytes, waiting for at least one; 0 at the end of the stream.
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        loop {
            self.check_deadline()?;
            let read = match &mut self.tls {
                None => self.stream.read(bytes),
                Some(tls) => match tls.reader().read(bytes) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => match take_in(tls, &mut self.stream) {
                        Ok(0) => return Ok(0),
                        Ok(_) => continue,
                        Err(error) => Err(error),
                    },
                    other => other,
                },
            };
            match read {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The system's error for a timeout.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(io::ErrorKind::TimedOut.into()),
                other => return other,
            }
        }
    }

    pub(crate) fn write_all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        if self.tls.is_none() {
            return self.stream.get_mut().write_all(bytes);
        }
        while !bytes.is_empty() {
            self.check_deadline()?;
            let Some(tls) = &mut self.tls else { break };
            let written = tls.writer().write(bytes)?;
            bytes = &bytes[written..];
            self.push_out()?;
        }
        Ok(())
    }

    /// Sends a range of a file; `pace` is called before each part with its size. In plain text the kernel sends from
    /// the page cache.
    pub(crate) fn send(&mut self, file: &File, range: Range<u64>, pace: &dyn Fn(u64)) -> io::Result<()> {
        let (mut at, mut chunk) = (range.start, Vec::new());
        while at < range.end {
            self.check_deadline()?;
            let length = usize::try_from(range.end - at).unwrap_or(usize::MAX).min(CHUNK);
            pace(length as u64);
            if self.tls.is_none() {
                self.send_cached(file, at, length)?;
            } else {
                chunk.resize(length, 0);
                file.read_exact_at(&mut chunk, at)?;
                self.write_all(&chunk)?;
            }
            at += length as u64;
        }
        Ok(())
    }

    /// Sends by `sendfile`. The standard library avoids it, because a changing file would change data on its way; these
    /// files do not change.
    fn send_cached(&mut self, file: &File, mut at: u64, length: usize) -> io::Result<()> {
        let mut left = length;
        while left > 0 {
            match sendfile(self.stream.get_ref(), file, Some(&mut at), left) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(sent) => left -= sent,
                Err(Errno::INTR) => {}
                // The system's error for a timeout.
                Err(Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn push_out(&mut self) -> io::Result<()> {
        let Some(tls) = &mut self.tls else { return Ok(()) };
        while tls.wants_write() {
            match tls.write_tls(self.stream.get_mut()) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Reads from the stream and decrypts; 0 at its end.
fn take_in(tls: &mut Connection, stream: &mut BufReader<TcpStream>) -> io::Result<usize> {
    let read = tls.read_tls(stream)?;
    if let Err(error) = tls.process_new_packets() {
        // Sends the alert, so that the other side learns the reason.
        let _ = tls.write_tls(stream.get_mut());
        return Err(invalid(error.to_string()));
    }
    Ok(read)
}

/// A limit in bytes per second that all clones share.
#[derive(Clone, Debug)]
pub(crate) struct Pace(Option<Arc<std::sync::Mutex<Instant>>>, u64);

impl Pace {
    pub(crate) fn new(rate: Option<u64>) -> Self {
        Self(rate.map(|_| Arc::new(std::sync::Mutex::new(Instant::now()))), rate.unwrap_or(0).max(1))
    }

    /// Waits until `bytes` may be sent.
    pub(crate) fn wait(&self, bytes: u64) {
        let Some(next) = &self.0 else { return };
        let turn = {
            let mut next = next.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let turn = (*next).max(Instant::now());
            *next = turn + Duration::from_secs_f64(bytes as f64 / self.1 as f64);
            turn
        };
        std::thread::sleep(turn.saturating_duration_since(Instant::now()));
    }
}
