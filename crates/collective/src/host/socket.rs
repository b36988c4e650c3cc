//! A connection with a neighbour: TCP that never blocks, with TLS over it where ranks have certificates.

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

/// Bytes that may lie encrypted before the socket has to take some.
const ENCRYPTED_AHEAD: usize = 1 << 18;

/// What a rank shows its neighbours, and what it asks of them.
#[derive(Clone)]
pub struct Credentials {
    /// For the rank that it dials.
    pub client: Arc<ClientConfig>,
    /// For the rank that dials it; asks for a certificate.
    pub server: Arc<ServerConfig>,
    /// The name in every rank's certificate.
    pub name: ServerName<'static>,
    /// Why the holder of a certificate may not dial in, if it may not: a name is asked of the dialled side only.
    pub judge: fn(&CertificateDer<'_>) -> Result<(), String>,
}

/// Says what the credentials are now: certificates are exchanged while a job runs.
pub type CredentialSource = Arc<dyn Fn() -> Credentials + Send + Sync>;

/// A connection. Writing and reading give `WouldBlock` instead of waiting.
pub(crate) struct Socket {
    stream: Arc<TcpStream>,
    tls: Option<RefCell<Connection>>,
}

impl Socket {
    /// Takes a connection as it is.
    pub(crate) fn plain(stream: TcpStream) -> io::Result<Self> {
        prepare(&stream)?;
        Ok(Self { stream: Arc::new(stream), tls: None })
    }

    /// Greets the rank that was dialled, which has to show that it is one.
    pub(crate) fn dialled(stream: TcpStream, credentials: &Credentials, limit: Limit<'_>) -> io::Result<Self> {
        let connection = ClientConnection::new(Arc::clone(&credentials.client), credentials.name.clone());
        Self::secured(stream, connection.map_err(io::Error::other)?.into(), limit)
    }

    /// Lets a rank greet that has dialled in, which has to show that it is one.
    pub(crate) fn accepted(stream: TcpStream, credentials: &Credentials, limit: Limit<'_>) -> io::Result<Self> {
        let mut config = (*credentials.server).clone();
        // Nothing may come against the ring, and no connection is taken up again.
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

    /// The TCP connection below, to wait for and to shut down.
    pub(crate) fn stream(&self) -> &Arc<TcpStream> {
        &self.stream
    }

    /// Takes as much as there is room for.
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

    /// Sends what was taken and is not on its way yet.
    pub(crate) fn flush(&self) -> io::Result<()> {
        match &self.tls {
            Some(tls) => push_out(&mut tls.borrow_mut(), &self.stream),
            None => Ok(()),
        }
    }

    /// Reads what is there; 0 at the end.
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

    /// Whether the other side has closed the connection, which never sends anything; what it sends all the same is an
    /// error.
    pub(crate) fn is_closed(&self) -> io::Result<bool> {
        match self.stream.peek(&mut [0]) {
            Ok(0) => Ok(true),
            Ok(_) => {
                // The other side may say why it closes.
                if let Some(tls) = &self.tls {
                    take_in(&mut tls.borrow_mut(), &self.stream)?;
                }
                Err(io::Error::new(io::ErrorKind::InvalidData, "data against the ring"))
            }
            Err(error) if is_passing(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Writes all of it.
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

    /// Fills all of it.
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

/// Whether the error only says that nothing can be done now.
pub(crate) fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// Buffer sizes stay as they are: the kernel grows them with the traffic, unless somebody sets them.
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

/// Takes what the stream has and decrypts it; 0 at its end.
fn take_in(tls: &mut Connection, mut stream: &TcpStream) -> io::Result<usize> {
    let read = tls.read_tls(&mut stream)?;
    if let Err(error) = tls.process_new_packets() {
        // The other side learns why, if it still listens.
        let _ = push_out(tls, stream);
        return Err(io::Error::new(io::ErrorKind::InvalidData, error));
    }
    Ok(read)
}

/// Waits when that is all that the error asks for.
fn wait_out(error: io::Error, stream: &TcpStream, flags: PollFlags, limit: Limit<'_>) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::Interrupted => Ok(()),
        io::ErrorKind::WouldBlock if !limit.is_over() => wait(&[(stream.as_fd(), flags)], limit.deadline),
        io::ErrorKind::WouldBlock => Err(io::ErrorKind::TimedOut.into()),
        _ => Err(error),
    }
}
