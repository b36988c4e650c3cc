//! Connections that come in.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

use super::tls::{Tls, role_of};
use super::{PeerRole, Security};

/// How long a peer may take to prove who it is.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);

/// Peers that may prove who they are at the same time; others wait in the system's queue.
const HANDSHAKES: usize = 256;

/// Who is at the other end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Where it dialled from.
    pub address: Option<SocketAddr>,
    /// What its certificate says; `None` in plain text, within one machine.
    pub role: Option<PeerRole>,
}

/// A connection that came in, with its peer's identity.
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
    peer: Peer,
}

#[derive(Debug)]
enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// Accepts connections until the stream is dropped. Peers without a certificate of ours are turned away.
#[must_use]
pub fn accept(listener: TcpListener, security: Security) -> ReceiverStream<io::Result<Connection>> {
    // Full when the server takes none: then the handshakes wait.
    let (sender, connections) = mpsc::channel(64);
    // Ends with the receiver.
    tokio::spawn(async move {
        let room = Arc::new(Semaphore::new(HANDSHAKES));
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = sender.closed() => return,
            };
            let (stream, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of file descriptors, mostly: others give some back.
                    tracing::warn!("a connection was not accepted: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let permit = Arc::clone(&room).acquire_owned().await.expect("the semaphore is never closed");
            let (security, sender) = (security.clone(), sender.clone());
            tokio::spawn(async move {
                let greeted = tokio::time::timeout(HANDSHAKE_DEADLINE, greet(stream, address, &security)).await;
                drop(permit);
                match greeted {
                    Ok(Ok(connection)) => drop(sender.send(Ok(connection)).await),
                    Ok(Err(error)) => tracing::warn!(peer = %address, "a peer was turned away: {error}"),
                    Err(_) => tracing::warn!(peer = %address, "a peer did not say who it is in time"),
                }
            });
        }
    });
    ReceiverStream::new(connections)
}

async fn greet(stream: TcpStream, address: SocketAddr, security: &Security) -> io::Result<Connection> {
    stream.set_nodelay(true)?;
    match security {
        Security::Plain => {
            let peer = Peer { address: Some(address), role: None };
            Ok(Connection { stream: Stream::Plain(stream), peer })
        }
        Security::Mutual(tls) => handshake(stream, address, tls).await,
    }
}

async fn handshake(stream: TcpStream, address: SocketAddr, tls: &Tls) -> io::Result<Connection> {
    let stream = TlsAcceptor::from(tls.server()).accept(stream).await?;
    let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let role = certificate.map(role_of).transpose().map_err(io::Error::other)?.flatten();
    let role = role.ok_or_else(|| io::Error::other("its certificate names no role"))?;
    let peer = Peer { address: Some(address), role: Some(role) };
    Ok(Connection { stream: Stream::Tls(Box::new(stream)), peer })
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().stream {
            Stream::Plain(stream) => Pin::new(stream).poll_read(context, buffer),
            Stream::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().stream {
            Stream::Plain(stream) => Pin::new(stream).poll_write(context, bytes),
            Stream::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().stream {
            Stream::Plain(stream) => Pin::new(stream).poll_flush(context),
            Stream::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().stream {
            Stream::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Stream::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().stream {
            Stream::Plain(stream) => Pin::new(stream).poll_write_vectored(context, slices),
            Stream::Tls(stream) => Pin::new(stream).poll_write_vectored(context, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            Stream::Plain(stream) => stream.is_write_vectored(),
            Stream::Tls(stream) => stream.is_write_vectored(),
        }
    }
}
