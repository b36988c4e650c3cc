//! Connections that come in.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Sleep;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

use super::admission::{Admission, Holder, Seat};
use super::tls::{Tls, role_of};
use super::{PeerRole, Security};

/// How long a peer may take to prove who it is and to say what it speaks.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);
/// How long a peer may take to its first call.
const FIRST_CALL: Duration = Duration::from_secs(30);
/// Connections of probes at once.
const PROBES: usize = 64;

/// What every client of HTTP/2 says first.
const PREFACE: [u8; 24] = *b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Who is at the other end.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Where it dialled from.
    pub address: Option<SocketAddr>,
    /// What its certificate says; `None` in plain text, within one machine.
    pub role: Option<PeerRole>,
    holder: Holder,
}

impl Peer {
    /// A peer whose connection is not one of [`accept`].
    #[must_use]
    pub fn new(address: Option<SocketAddr>, role: Option<PeerRole>) -> Self {
        Self { address, role, holder: Holder::default() }
    }

    /// Notes that a call of the peer was let in: its connection stays, however many others come.
    pub(super) fn settle(&self) {
        self.holder.settle();
    }
}

/// A connection that came in, with its peer's identity.
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
    peer: Peer,
    /// What was read already and is to be read again.
    ahead: &'static [u8],
    /// Until its first call.
    stranger: Option<Stranger>,
    _seat: Seat,
}

#[derive(Debug)]
enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// What ends a connection that nothing comes of.
#[derive(Debug)]
struct Stranger {
    put_out: oneshot::Receiver<()>,
    /// None where peers need not call.
    deadline: Option<Pin<Box<Sleep>>>,
}

/// Accepts connections until the stream is dropped. Peers without a certificate of ours are turned away, and so are those
/// that say nothing: however many they are, they neither take all file descriptors nor hold others up.
#[must_use]
pub fn accept(listener: TcpListener, security: Security) -> ReceiverStream<io::Result<Connection>> {
    accept_into(listener, security, Admission::of_process(), Some(FIRST_CALL))
}

/// Accepts connections of probes, in plain text: a few, of which a new one takes the place of the oldest.
pub(crate) fn accept_probes(listener: TcpListener) -> ReceiverStream<io::Result<Connection>> {
    accept_into(listener, Security::Plain, Admission::new(PROBES, PROBES), None)
}

fn accept_into(
    listener: TcpListener,
    security: Security,
    admission: Admission,
    first_call: Option<Duration>,
) -> ReceiverStream<io::Result<Connection>> {
    // Full when the server takes none: then they wait, each for as long as it has to greet.
    let (sender, connections) = mpsc::channel(64);
    // Ends with the receiver.
    tokio::spawn(async move {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = sender.closed() => return,
            };
            let (stream, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of file descriptors, mostly: others give some back.
                    admission.complain_of(|| format!("a connection was not accepted: {error}"));
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            // Closed at once where there is no room: left in the system's queue it would keep others from being seen.
            let seat = tokio::select! {
                seat = admission.seat(address.ip()) => seat,
                () = sender.closed() => return,
            };
            let Some((seat, mut put_out)) = seat else {
                admission
                    .complain_of(|| format!("{address} was turned away: all connections are taken by peers that work"));
                continue;
            };
            let (security, sender, admission) = (security.clone(), sender.clone(), admission.clone());
            tokio::spawn(async move {
                let greeted = async {
                    // Not `readable`, which may return when there is nothing to read: silent peers would be taken for speaking ones.
                    if stream.peek(&mut [0]).await? == 0 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                    seat.speaks();
                    let greeted = greet(stream, address, &security, &seat).await?;
                    let room = sender.reserve().await.map_err(io::Error::other)?;
                    Ok::<_, io::Error>((greeted, room))
                };
                let greeted = tokio::select! {
                    greeted = tokio::time::timeout(HANDSHAKE_DEADLINE, greeted) => greeted,
                    _ = &mut put_out => return,
                };
                let ((stream, role), room) = match greeted {
                    Ok(Ok(greeted)) => greeted,
                    Ok(Err(error)) => return admission.complain_of(|| format!("{address} was turned away: {error}")),
                    Err(_) => return admission.complain_of(|| format!("{address} did not say who it is in time")),
                };
                let peer = Peer { address: Some(address), role, holder: seat.holder() };
                let deadline = first_call.map(|wait| Box::pin(tokio::time::sleep(wait)));
                let stranger = Some(Stranger { put_out, deadline });
                room.send(Ok(Connection { stream, peer, ahead: &PREFACE, stranger, _seat: seat }));
            });
        }
    });
    ReceiverStream::new(connections)
}

/// Takes the first words of a peer, which show that it speaks HTTP/2 and means to.
async fn greet(
    stream: TcpStream,
    address: SocketAddr,
    security: &Security,
    seat: &Seat,
) -> io::Result<(Stream, Option<PeerRole>)> {
    stream.set_nodelay(true)?;
    let mut said = [0; PREFACE.len()];
    let (stream, role) = match security {
        Security::Plain => {
            let mut stream = stream;
            stream.read_exact(&mut said).await?;
            (Stream::Plain(stream), None)
        }
        Security::Mutual(tls) => {
            let (mut stream, role) = handshake(stream, tls).await?;
            seat.prove();
            stream.read_exact(&mut said).await?;
            (Stream::Tls(Box::new(stream)), Some(role))
        }
    };
    match said == PREFACE {
        true => Ok((stream, role)),
        false => Err(io::Error::other(format!("{address} does not speak HTTP/2"))),
    }
}

async fn handshake(stream: TcpStream, tls: &Tls) -> io::Result<(TlsStream<TcpStream>, PeerRole)> {
    let stream = TlsAcceptor::from(tls.server()).accept(stream).await?;
    let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let role = certificate.map(role_of).transpose().map_err(io::Error::other)?.flatten();
    let role = role.ok_or_else(|| io::Error::other("its certificate names no role"))?;
    Ok((stream, role))
}

impl Stranger {
    /// Why the connection has to end, if it has to; whether the peer is a stranger still.
    fn poll(&mut self, context: &mut Context<'_>) -> Result<bool, io::Error> {
        match Pin::new(&mut self.put_out).poll(context) {
            Poll::Ready(Ok(())) => Err(io::Error::new(io::ErrorKind::TimedOut, "another connection needs the room")),
            // Nobody can put it out any more.
            Poll::Ready(Err(_)) => Ok(false),
            Poll::Pending => match self.deadline.as_mut().map(|deadline| deadline.as_mut().poll(context)) {
                Some(Poll::Ready(())) => Err(io::Error::new(io::ErrorKind::TimedOut, "no call in time")),
                Some(Poll::Pending) | None => Ok(true),
            },
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if let Some(stranger) = &mut this.stranger {
            match stranger.poll(context) {
                Ok(true) => {}
                Ok(false) => this.stranger = None,
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        if !this.ahead.is_empty() {
            let (now, later) = this.ahead.split_at(this.ahead.len().min(buffer.remaining()));
            buffer.put_slice(now);
            this.ahead = later;
            return Poll::Ready(Ok(()));
        }
        match &mut this.stream {
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
