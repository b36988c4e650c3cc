//! A connection to a neighbour: non-blocking TCP, with TLS where ranks have certificates.

use std::cell::RefCell;
use std::fmt;
use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::Arc;

use nix::poll::PollFlags;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection};

use super::wait::{Limit, wait};

/// Encrypted bytes that may wait in memory until the socket accepts them.
const ENCRYPTED_AHEAD: usize = 1 << 18;

/// TLS configuration of a rank: what it shows its neighbours, and what it requires of them.
#[derive(Clone)]
pub struct Credentials {
    /// Configuration for the rank that this one dials.
    pub client: Arc<ClientConfig>,
    /// Configuration for the rank that dials this one; requires a certificate.
    pub server: Arc<ServerConfig>,
    /// Name that every rank's certificate must hold.
    pub name: ServerName<'static>,
    /// Decides whether the holder of a certificate may dial in, else says why not. TLS checks the name of the
    /// dialled side only.
    pub judge: fn(&CertificateDer<'_>) -> Result<(), String>,
}

/// Returns the current credentials. They may change, since certificates are rotated while a job runs.
pub type CredentialSource = Arc<dyn Fn() -> Credentials + Send + Sync>;

/// A connection. Reads and writes fail with `WouldBlock` instead of blocking.
pub(crate) struct Socket {
    stream: Arc<TcpStream>,
    tls: Option<RefCell<Connection>>,
}

impl Socket {
    /// Wraps a connection without TLS.
    pub(crate) fn plain(stream: TcpStream) -> io::Result<Self> {
        prepare(&stream)?;
        Ok(Self { stream: Arc::new(stream), tls: None })
    }

    /// Makes the TLS handshake with a rank that was dialled, and verifies it.
    pub(crate) fn dialled(stream: TcpStream, credentials: &Credentials, limit: Limit<'_>) -> io::Result<Self> {
        let connection = ClientConnection::new(Arc::clone(&credentials.client), credentials.name.clone());
        Self::secured(stream, connection.map_err(io::Error::other)?.into(), limit)
    }

    /// Makes the TLS handshake with a rank that dialled in, and verifies it.
    pub(crate) fn accepted(stream: TcpStream, credentials: &Credentials, limit: Limit<'_>) -> io::Result<Self> {
        let mut config = (*credentials.server).clone();
        // A ticket would be data against the ring's direction, and sessions are never resumed.
        config.send_tls13_tickets = 0;
        let connection = ServerConnection::new(Arc::new(config)).map_err(io::Error::other)?;
        let socket = Self::secured(stream, connection.into(), limit)?;
        let tls = socket.tls.as_ref().expect("it is secured").borrow();
        let shown = tls.peer_certificates().and_then(|chain| chain.first());
        let judged = shown.ok_or_else(|| "it shows no certificate".to_owned()).and_then(credentials.judge);
        judged.map_err(|problem| io::Error::new(io::ErrorKind::PermissionDenied, problem))?;
        drop(tls);
        Ok(socket)
    }

    fn secured(stream: TcpStream, mut tls: Connection, limit: Limit<'_>) -> io::Result<Self> {
        prepare(&stream)?;
        tls.set_buffer_limit(Some(ENCRYPTED_AHEAD));
        while tls.is_handshaking() || tls.wants_write() {
            let (done, ready) = match tls.wants_write() {
                true => (tls.write_tls(&mut &stream), PollFlags::POLLOUT),
                false => (take_in(&mut tls, &stream), PollFlags::POLLIN),
            };
            match done {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(error) => wait_out(error, &stream, ready, limit)?,
            }
        }
        Ok(Self { stream: Arc::new(stream), tls: Some(RefCell::new(tls)) })
    }

    /// Returns the underlying TCP connection, for polling and shutdown.
    pub(crate) fn stream(&self) -> &Arc<TcpStream> {
        &self.stream
    }

    /// Writes as much as the connection accepts.
    pub(crate) fn write(&self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let Some(tls) = &self.tls else { return (&*self.stream).write_vectored(parts) };
        let tls = &mut *tls.borrow_mut();
        push_out(tls, &self.stream)?;
        let written = tls.writer().write_vectored(parts)?;
        match push_out(tls, &self.stream) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            Ok(()) | Err(_) => Ok(written),
        }
    }

    /// Sends encrypted bytes that are still in memory.
    pub(crate) fn flush(&self) -> io::Result<()> {
        match &self.tls {
            Some(tls) => push_out(&mut tls.borrow_mut(), &self.stream),
            None => Ok(()),
        }
    }

    /// Reads available bytes; 0 at the end of the stream.
    pub(crate) fn read(&self, bytes: &mut [u8]) -> io::Result<usize> {
        let Some(tls) = &self.tls else { return (&*self.stream).read(bytes) };
        let tls = &mut *tls.borrow_mut();
        loop {
            match tls.reader().read(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
            if take_in(tls, &self.stream)? == 0 {
                return Ok(0);
            }
        }
    }

    /// Whether the peer has closed the connection. The peer never sends on it, so any data are an error.
    pub(crate) fn is_closed(&self) -> io::Result<bool> {
        match self.stream.peek(&mut [0]) {
            Ok(0) => Ok(true),
            Ok(_) => {
                // They may be a TLS alert that says why the peer closes.
                if let Some(tls) = &self.tls {
                    take_in(&mut tls.borrow_mut(), &self.stream)?;
                }
                Err(io::Error::new(io::ErrorKind::InvalidData, "data against the ring"))
            }
            Err(error) if is_passing(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Writes all bytes, waiting within `limit`.
    pub(crate) fn write_all(&self, mut bytes: &[u8], limit: Limit<'_>) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.write(&[IoSlice::new(bytes)]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => bytes = &bytes[written..],
                Err(error) => wait_out(error, &self.stream, PollFlags::POLLOUT, limit)?,
            }
        }
        while let Err(error) = self.flush() {
            wait_out(error, &self.stream, PollFlags::POLLOUT, limit)?;
        }
        Ok(())
    }

    /// Fills the buffer, waiting within `limit`.
    pub(crate) fn read_exact(&self, mut bytes: &mut [u8], limit: Limit<'_>) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.read(bytes) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => bytes = &mut bytes[read..],
                Err(error) => wait_out(error, &self.stream, PollFlags::POLLIN, limit)?,
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Socket").field("stream", &self.stream).field("tls", &self.tls.is_some()).finish()
    }
}

/// Whether the error only means that the call would block, or was interrupted.
pub(crate) fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// Configures the socket. Buffer sizes are left alone: the kernel adapts them to the traffic unless they are set.
fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)
}

fn push_out(tls: &mut Connection, mut stream: &TcpStream) -> io::Result<()> {
    while tls.wants_write() {
        tls.write_tls(&mut stream)?;
    }
    Ok(())
}

/// Reads and decrypts what the stream has; 0 at its end.
fn take_in(tls: &mut Connection, mut stream: &TcpStream) -> io::Result<usize> {
    let read = tls.read_tls(&mut stream)?;
    if let Err(error) = tls.process_new_packets() {
        // Tells the peer why, if it still listens.
        let _ = push_out(tls, stream);
        return Err(io::Error::new(io::ErrorKind::InvalidData, error));
    }
    Ok(read)
}

/// Waits for readiness if the error asks for nothing more, otherwise returns it.
fn wait_out(error: io::Error, stream: &TcpStream, flags: PollFlags, limit: Limit<'_>) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::Interrupted => Ok(()),
        io::ErrorKind::WouldBlock if !limit.is_over() => wait(&[(stream.as_fd(), flags)], limit.deadline),
        io::ErrorKind::WouldBlock => Err(io::ErrorKind::TimedOut.into()),
        _ => Err(error),
    }
}
