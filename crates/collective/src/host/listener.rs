use std::fmt;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};

use super::socket::{CredentialSource, Credentials};
use crate::ListenError;

/// Connections that the system keeps until they are accepted, unless its own limit is lower. A predecessor that dials in
/// vain tries again, and every guest of a broadcast dials its host, so there may be more than the standard library's 128.
const BACKLOG: i32 = 4096;

/// The listening socket that a rank's predecessor dials.
///
/// It outlives generations, so that a rank keeps one address for the life of its process. A peer that dials while this
/// rank is leaving the previous generation waits in the backlog.
pub struct HostListener {
    socket: TcpListener,
    address: SocketAddr,
    credentials: Option<CredentialSource>,
}

impl HostListener {
    /// Listens on `address`, a `host:port`; port 0 chooses a free port.
    ///
    /// # Errors
    ///
    /// When the address cannot be resolved or is taken.
    pub fn bind(address: &str) -> Result<Self, ListenError> {
        let listen = || {
            let socket = TcpListener::bind(address)?;
            socket2::SockRef::from(&socket).listen(BACKLOG)?;
            // Accepting is polled, because it has a deadline.
            socket.set_nonblocking(true)?;
            let address = socket.local_addr()?;
            Ok(Self { socket, address, credentials: None })
        };
        listen().map_err(|source| ListenError { address: address.to_owned(), source })
    }

    /// Enables mutual TLS on every connection of this rank, incoming and outgoing.
    #[must_use]
    pub fn with_credentials(self, source: CredentialSource) -> Self {
        Self { credentials: Some(source), ..self }
    }

    /// Returns the current credentials; `None` for plain text.
    pub(crate) fn credentials(&self) -> Option<Credentials> {
        self.credentials.as_ref().map(|source| source())
    }

    /// Returns the local address, with the port that the system chose.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Accepts the next connection; fails with `WouldBlock` if none is waiting.
    pub(crate) fn accept(&self) -> std::io::Result<(TcpStream, SocketAddr)> {
        self.socket.accept()
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl fmt::Debug for HostListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { socket: _, address, credentials } = self;
        f.debug_struct("HostListener").field("address", address).field("tls", &credentials.is_some()).finish()
    }
}
