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

const DEADLINES: Deadlines = Deadlines {
    silence: Duration::from_secs(10),
    handshake: Duration::from_secs(10),
    first_call: Some(Duration::from_secs(30)),
};
/// Connections of probes at once.
const PROBES: usize = 64;

/// What every client of HTTP/2 says first.
const PREFACE: [u8; 24] = *b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// How long a stranger may take.
#[derive(Clone, Copy, Debug)]
struct Deadlines {
    /// To say something, and to wait for a seat then.
    silence: Duration,
    /// To prove who it is, and to say what it speaks.
    handshake: Duration,
    /// To its first call; none where peers need not call.
    first_call: Option<Duration>,
}

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
    accept_into(listener, security, Admission::of_process(), DEADLINES)
}

/// Accepts connections of probes, in plain text: a few, of which a new one takes the place of the oldest.
pub(crate) fn accept_probes(listener: TcpListener) -> ReceiverStream<io::Result<Connection>> {
    accept_into(listener, Security::Plain, Admission::new(PROBES, PROBES), Deadlines { first_call: None, ..DEADLINES })
}

fn accept_into(
    listener: TcpListener,
    security: Security,
    admission: Admission,
    deadlines: Deadlines,
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

/// A connection whose peer has said who it is, and the place that is kept for it.
type Entered<'a> = ((Stream, Option<PeerRole>), mpsc::Permit<'a, io::Result<Connection>>);

/// Waits until a peer says something, then until there is a seat for it, and has it say who it is.
async fn enter<'a>(
    stream: TcpStream,
    address: SocketAddr,
    security: &Security,
    seat: &Seat,
    sender: &'a mpsc::Sender<io::Result<Connection>>,
    deadlines: Deadlines,
) -> io::Result<Entered<'a>> {
    let spoken = async {
        // Not `readable`, which may return when there is nothing to read: silent peers would be taken for speaking ones.
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
