use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};

use crate::ListenError;

/// The port that a rank's predecessor dials.
///
/// It outlives generations, so that a rank has one address for the life of its process: a peer that dials while this
/// rank is still leaving the previous generation waits in the backlog.
#[derive(Debug)]
pub struct HostListener {
    socket: TcpListener,
    address: SocketAddr,
}

impl HostListener {
    /// Listens on `address`, a `host:port`; port 0 takes a free one.
    ///
    /// # Errors
    ///
    /// When the address cannot be resolved or is taken.
    pub fn bind(address: &str) -> Result<Self, ListenError> {
        let listen = || {
            let socket = TcpListener::bind(address)?;
            // Accepting is polled, because it has a deadline.
            socket.set_nonblocking(true)?;
            let address = socket.local_addr()?;
            Ok(Self { socket, address })
        };
        listen().map_err(|source| ListenError { address: address.to_owned(), source })
    }

    /// Where it listens, with the port that the system chose.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The next connection, or an error of kind `WouldBlock` when nobody is in line.
    pub(crate) fn accept(&self) -> std::io::Result<(TcpStream, SocketAddr)> {
        self.socket.accept()
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
