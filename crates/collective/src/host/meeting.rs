use std::io;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::thread;
use std::time::{Duration, Instant};

use super::hello::{read_text, text_of};
use super::listener::HostListener;
use super::socket::Socket;
use super::wait::Limit;
use crate::error::Fault;
use crate::{CollectiveError, ErrorKind, ListenError, Operation};

/// First bytes of a guest's message.
const MAGIC: [u8; 8] = *b"pacsmee1";
/// Longest list of addresses (bytes).
const LIST_LIMIT: usize = 1 << 20;
/// Pause between two polls or attempts.
const PAUSE: Duration = Duration::from_millis(20);
/// Longest wait for a guest's message, since other guests wait in the backlog.
const GREETING_TIMEOUT: Duration = Duration::from_secs(2);

/// Rendezvous at rank 0, for ranks without a coordinator: they know its address only, and learn those of all listeners.
#[derive(Debug)]
pub struct Meeting {
    socket: HostListener,
    /// Host as given by the caller, since others may know it by a name.
    host: String,
}

impl Meeting {
    /// Opens the rendezvous at `place`, a `host:port` of this machine; port 0 chooses a free port. Called by rank 0.
    ///
    /// # Errors
    ///
    /// When the address cannot be resolved or is taken.
    pub fn open(place: &str) -> Result<Self, ListenError> {
        let host = place.rsplit_once(':').map_or(place, |(host, _)| host).to_owned();
        Ok(Self { socket: HostListener::bind(place)?, host })
    }

    /// Returns the `host:port` for [`meet`].
    #[must_use]
    pub fn place(&self) -> String {
        format!("{}:{}", self.host, self.socket.address().port())
    }

    /// Waits for all other ranks of `world_size`, then sends every rank the addresses of all listeners, by rank.
    ///
    /// # Errors
    ///
    /// When a rank does not come in time.
    pub fn gather(
        self,
        world_size: usize,
        listener: &HostListener,
        timeout: Duration,
    ) -> Result<Vec<String>, CollectiveError> {
        let limit = Limit { deadline: Instant::now() + timeout, stopped: &|| false };
        let mut guests: Vec<Option<(Socket, String)>> = (1..world_size).map(|_| None).collect();
        while guests.iter().any(Option::is_none) {
            if limit.is_over() {
                let missing: Vec<String> =
                    (1..world_size).filter(|rank| guests[rank - 1].is_none()).map(|rank| rank.to_string()).collect();
                let waiting_for = format!("rank {} to come to `{}`", missing.join(", "), self.place());
                return Err(error(0, ErrorKind::TimedOut { timeout, waiting_for }));
            }
            match self.socket.accept() {
                Ok((stream, from)) => {
                    if let Err(problem) = welcome(stream, from, &mut guests, limit) {
                        tracing::warn!(%from, problem, "turned away");
                    }
                }
                Err(_) => thread::sleep(PAUSE),
            }
        }
        let mut addresses = vec![format!("{}:{}", self.host, listener.address().port())];
        addresses.extend(guests.iter().flatten().map(|(_, address)| address.clone()));
        let answer = answer(0, &addresses.join("\n"));
        for (socket, _) in guests.iter().flatten() {
            socket.write_all(&answer, limit).map_err(|source| error(0, ErrorKind::Io(source)))?;
        }
        Ok(addresses)
    }
}

/// Joins the rendezvous at `place` as `rank`, at least 1, and returns the addresses of all listeners, by rank. Retries
/// until the timeout, because ranks start in any order.
///
/// # Errors
///
/// When rank 0 is not reached in time, or refuses this rank.
pub fn meet(
    place: &str,
    rank: usize,
    world_size: usize,
    listener: &HostListener,
    timeout: Duration,
) -> Result<Vec<String>, CollectiveError> {
    let limit = Limit { deadline: Instant::now() + timeout, stopped: &|| false };
    let mut said = MAGIC.to_vec();
    for number in [rank as u64, world_size as u64, u64::from(listener.address().port())] {
        said.extend(number.to_le_bytes());
    }
    let mut problem = String::new();
    loop {
        let ask = || -> io::Result<(u8, String)> {
            let socket = Socket::plain(dial(place, limit)?)?;
            socket.write_all(&said, limit)?;
            let mut code = [0];
            socket.read_exact(&mut code, limit)?;
            Ok((code[0], read_text(&socket, LIST_LIMIT, limit)?))
        };
        match ask() {
            Ok((0, list)) => return Ok(list.split('\n').map(str::to_owned).collect()),
            Ok((_, reason)) => return Err(error(rank, ErrorKind::Refused { reason })),
            Err(latest) => {
                // An attempt that the deadline cut short explains less than the one before it.
                if problem.is_empty() || !limit.is_over() {
                    problem = latest.to_string();
                }
            }
        }
        if limit.is_over() {
            let waiting_for = format!("rank 0 at `{place}` ({problem})");
            return Err(error(rank, ErrorKind::TimedOut { timeout, waiting_for }));
        }
        thread::sleep(PAUSE);
    }
}

/// Records a guest's address, or returns why it is refused.
fn welcome(
    stream: TcpStream,
    from: SocketAddr,
    guests: &mut [Option<(Socket, String)>],
    limit: Limit<'_>,
) -> Result<(), String> {
    let socket = Socket::plain(stream).map_err(|problem| problem.to_string())?;
    let hear = || -> io::Result<[u64; 3]> {
        let limit = limit.within(GREETING_TIMEOUT);
        let mut bytes = [0; 32];
        socket.read_exact(&mut bytes, limit)?;
        if bytes[..8] != MAGIC {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not the greeting of a rank"));
        }
        let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        Ok([number(8), number(16), number(24)])
    };
    let [rank, world_size, port] = hear().map_err(|problem| problem.to_string())?;
    let place = usize::try_from(rank).ok().and_then(|rank| rank.checked_sub(1));
    let refusal = match place.and_then(|place| guests.get(place)) {
        _ if world_size != guests.len() as u64 + 1 => {
            format!("rank 0 expects {} ranks, rank {rank} expects {world_size}", guests.len() + 1)
        }
        None => format!("rank {rank} cannot join rank 0 in a world of {world_size}"),
        Some(Some((_, address))) => format!("rank {rank} is here already, from {address}"),
        Some(None) => {
            let guest = Some((socket, format!("{}:{port}", bracketed(from))));
            guests[place.expect("it was found above")] = guest;
            return Ok(());
        }
    };
    // If the refusal cannot be sent, the closed connection tells the guest.
    let _ = socket.write_all(&answer(1, &refusal), limit.within(GREETING_TIMEOUT));
    Err(refusal)
}

fn dial(place: &str, limit: Limit<'_>) -> io::Result<TcpStream> {
    let mut problem = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in place.to_socket_addrs()? {
        let left = limit.within(GREETING_TIMEOUT).deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        match TcpStream::connect_timeout(&address, left) {
            Ok(stream) => return Ok(stream),
            Err(error) => problem = error,
        }
    }
    Err(problem)
}

fn answer(code: u8, text: &str) -> Vec<u8> {
    let mut bytes = vec![code];
    bytes.extend(text_of(text, LIST_LIMIT));
    bytes
}

fn bracketed(address: SocketAddr) -> String {
    match address {
        SocketAddr::V4(address) => address.ip().to_string(),
        SocketAddr::V6(address) => format!("[{}]", address.ip()),
    }
}

fn error(rank: usize, kind: ErrorKind) -> CollectiveError {
    let Fault { peer, kind } = Fault::own(kind);
    CollectiveError { operation: Operation::Connect, rank, peer, kind }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENT: Duration = Duration::from_secs(60);

    fn listener() -> HostListener {
        HostListener::bind("127.0.0.1:0").unwrap()
    }

    #[test]
    fn every_rank_learns_every_address() {
        let meeting = Meeting::open("127.0.0.1:0").unwrap();
        let (place, listeners) = (meeting.place(), [listener(), listener(), listener()]);
        let expected: Vec<String> = listeners.iter().map(|listener| listener.address().to_string()).collect();
        thread::scope(|scope| {
            let guests = [2, 1].map(|rank| {
                let (place, listener) = (&place, &listeners[rank]);
                scope.spawn(move || meet(place, rank, 3, listener, PATIENT).unwrap())
            });
            assert_eq!(meeting.gather(3, &listeners[0], PATIENT).unwrap(), expected);
            guests.into_iter().for_each(|guest| assert_eq!(guest.join().unwrap(), expected));
        });
    }

    #[test]
    fn a_mismatched_rank_is_refused_with_a_reason() {
        let meeting = Meeting::open("127.0.0.1:0").unwrap();
        let place = meeting.place();
        thread::scope(|scope| {
            let host = scope.spawn(|| meeting.gather(2, &listener(), PATIENT));
            for (rank, world_size, reason) in [
                (1, 3, "rank 0 expects 2 ranks, rank 1 expects 3"),
                (2, 2, "rank 2 cannot join rank 0 in a world of 2"),
                (0, 2, "rank 0 cannot join rank 0 in a world of 2"),
            ] {
                let error = meet(&place, rank, world_size, &listener(), PATIENT).unwrap_err();
                assert!(error.to_string().contains(reason), "{error}");
            }
            meet(&place, 1, 2, &listener(), PATIENT).unwrap();
            host.join().unwrap().unwrap();
        });
    }

    #[test]
    fn missing_ranks_are_named() {
        let short = Duration::from_millis(200);
        let meeting = Meeting::open("127.0.0.1:0").unwrap();
        let error = meeting.gather(3, &listener(), short).unwrap_err();
        assert!(error.to_string().contains("waiting for rank 1, 2 to come to `127.0.0.1:"), "{error}");
        let error = meet("127.0.0.3:1", 1, 2, &listener(), short).unwrap_err();
        assert!(error.to_string().contains("rank 0 at `127.0.0.3:1` (Connection refused"), "{error}");
    }
}
