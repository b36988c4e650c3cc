//! Incoming connections: handshake, identity and admission of peers.

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

const DEADLINES: Deadlines = Deadlines {
    silence: Duration::from_secs(10),
    handshake: Duration::from_secs(10),
    first_call: Some(Duration::from_secs(30)),
};
/// Bound on concurrent connections of probes.
const PROBES: usize = 64;

/// First bytes of every HTTP/2 client.
const PREFACE: [u8; 24] = *b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// How long a stranger may take.
#[derive(Clone, Copy, Debug)]
struct Deadlines {
    /// Until its first byte, and again until it has a seat.
    silence: Duration,
    /// For the TLS handshake and the HTTP/2 preface.
    handshake: Duration,
    /// Until its first call; `None` where peers need not call.
    first_call: Option<Duration>,
}

/// Identity of the process at the other end of a connection.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Remote address; `None` if the connection has none.
    pub address: Option<SocketAddr>,
    /// Role in its certificate; `None` in plain text, within one machine.
    pub role: Option<PeerRole>,
    holder: Holder,
}

impl Peer {
    /// A peer of a connection that [`accept`] did not make.
    #[must_use]
    pub fn new(address: Option<SocketAddr>, role: Option<PeerRole>) -> Self {
        Self { address, role, holder: Holder::default() }
    }

    /// Records that a call of the peer was admitted, so that its connection cannot be evicted any more.
    pub(super) fn settle(&self) {
        self.holder.settle();
    }
}

/// An accepted connection with its peer's identity.
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
    peer: Peer,
    /// The part of the preface that was read already and has to be read again.
    ahead: &'static [u8],
    /// Present until the first call.
    stranger: Option<Stranger>,
    _seat: Seat,
}

#[derive(Debug)]
enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// Conditions that end a connection without calls.
#[derive(Debug)]
struct Stranger {
    put_out: oneshot::Receiver<()>,
    /// Deadline for the first call; `None` where peers need not call.
    deadline: Option<Pin<Box<Sleep>>>,
}

/// Accepts connections until the stream is dropped. Peers without a valid certificate and silent peers are turned away;
/// however many there are, they neither exhaust the file descriptors nor delay others.
#[must_use]
pub fn accept(listener: TcpListener, security: Security) -> ReceiverStream<io::Result<Connection>> {
    accept_into(listener, security, Admission::of_process(), DEADLINES)
}

/// Accepts plain-text connections of probes, a few at a time; a new one evicts the oldest.
pub(crate) fn accept_probes(listener: TcpListener) -> ReceiverStream<io::Result<Connection>> {
    accept_into(listener, Security::Plain, Admission::new(PROBES, PROBES), Deadlines { first_call: None, ..DEADLINES })
}

fn accept_into(
    listener: TcpListener,
    security: Security,
    admission: Admission,
    deadlines: Deadlines,
) -> ReceiverStream<io::Result<Connection>> {
    // Full while the server accepts none; connections then wait, each until its greeting deadline.
    let (sender, connections) = mpsc::channel(64);
    // Ends when the receiver is dropped.
    tokio::spawn(async move {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = sender.closed() => return,
            };
            let (stream, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Mostly out of file descriptors: others will free some.
                    admission.complain_of(|| format!("a connection was not accepted: {error}"));
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            // Closed at once if there is no seat: left in the listen queue, it would hide connections after it.
            let seat = tokio::select! {
                seat = admission.place(address.ip()) => seat,
                () = sender.closed() => return,
            };
            let Some((seat, mut put_out)) = seat else {
                admission
                    .complain_of(|| format!("{address} was turned away: all connections are taken by peers that work"));
                continue;
            };
            let (security, sender, admission) = (security.clone(), sender.clone(), admission.clone());
            tokio::spawn(async move {
                let entered = tokio::select! {
                    entered = enter(stream, address, &security, &seat, &sender, deadlines) => entered,
                    _ = &mut put_out => return,
                };
                let ((stream, role), room) = match entered {
                    Ok(entered) => entered,
                    Err(error) => return admission.complain_of(|| format!("{address} was turned away: {error}")),
                };
                let peer = Peer { address: Some(address), role, holder: seat.holder() };
                let deadline = deadlines.first_call.map(|wait| Box::pin(tokio::time::sleep(wait)));
                let stranger = Some(Stranger { put_out, deadline });
                room.send(Ok(Connection { stream, peer, ahead: &PREFACE, stranger, _seat: seat }));
            });
        }
    });
    ReceiverStream::new(connections)
}

/// A connection with an identified peer, and the queue slot that is reserved for it.
type Entered<'a> = ((Stream, Option<PeerRole>), mpsc::Permit<'a, io::Result<Connection>>);

/// Waits for the first byte of a peer, then for a seat, then identifies the peer.
async fn enter<'a>(
    stream: TcpStream,
    address: SocketAddr,
    security: &Security,
    seat: &Seat,
    sender: &'a mpsc::Sender<io::Result<Connection>>,
    deadlines: Deadlines,
) -> io::Result<Entered<'a>> {
    let spoken = async {
        // `peek` instead of `readable`, which may return spuriously: silent peers would count as having spoken.
        if stream.peek(&mut [0]).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        seat.enter().await;
        io::Result::Ok(())
    };
    let late = |what: &'static str| move |_| io::Error::new(io::ErrorKind::TimedOut, what);
    tokio::time::timeout(deadlines.silence, spoken).await.map_err(late("it said nothing in time"))??;
    let greeted = async {
        let greeted = greet(stream, address, security, seat).await?;
        let room = sender.reserve().await.map_err(io::Error::other)?;
        io::Result::Ok((greeted, room))
    };
    tokio::time::timeout(deadlines.handshake, greeted).await.map_err(late("it did not say who it is in time"))?
}

/// Reads the first bytes of a peer, which show that it speaks HTTP/2.
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
    /// Returns an error if the connection has to end, otherwise whether the peer is still a stranger.
    fn poll(&mut self, context: &mut Context<'_>) -> Result<bool, io::Error> {
        match Pin::new(&mut self.put_out).poll(context) {
            Poll::Ready(Ok(())) => Err(io::Error::new(io::ErrorKind::TimedOut, "another connection needs the room")),
            // The seat was settled, so it cannot be evicted any more.
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

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use tokio::io::AsyncWriteExt;
    use tokio_stream::StreamExt;

    use super::*;

    /// How long it takes until a connection is closed by the other end.
    async fn until_closed(stream: &mut TcpStream, began: Instant) -> Duration {
        // A reset is an end, too.
        let _ = stream.read(&mut [0; 64]).await;
        began.elapsed()
    }

    #[tokio::test]
    async fn peers_have_so_long_to_speak_and_so_long_to_call() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let (short, long) = (Duration::from_millis(100), Duration::from_secs(300));
        let deadlines = Deadlines { silence: long, handshake: long, first_call: Some(long) };
        let accepting = |listener, deadlines| accept_into(listener, Security::Plain, Admission::new(9, 3), deadlines);
        let connections = accepting(listener, Deadlines { silence: short, ..deadlines });
        let began = Instant::now();
        let mut silent = TcpStream::connect(address).await.expect("connected");
        assert!(until_closed(&mut silent, began).await >= short);
        drop(connections);

        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let connections = accepting(listener, Deadlines { handshake: short, ..deadlines });
        let began = Instant::now();
        let mut mumbling = TcpStream::connect(address).await.expect("connected");
        mumbling.write_all(b"PRI").await.expect("sent");
        assert!(until_closed(&mut mumbling, began).await >= short);
        drop(connections);

        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let mut connections = accepting(listener, Deadlines { first_call: Some(short), ..deadlines });
        let mut speaking = TcpStream::connect(address).await.expect("connected");
        speaking.write_all(&PREFACE).await.expect("sent");
        let mut connection = connections.next().await.expect("accepting").expect("let in");
        let mut said = [0; PREFACE.len()];
        let read = connection.read_exact(&mut said).await;
        // On a busy machine its time may be over by now.
        assert!(read.is_err() || said == PREFACE);
        let late = connection.read(&mut said).await.expect_err("it makes no call");
        assert!(late.to_string().contains("no call in time"), "{late}");
    }
}
