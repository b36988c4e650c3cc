use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;

use super::group::GroupConfig;
use super::hello::{Answer, Hello};
use super::link::Link;
use super::listener::HostListener;
use super::socket::Socket;
use super::wait::{Limit, wait};
use crate::error::Fault;
use crate::{AbortHandle, ErrorKind};

/// Longest attempt to reach an address; the name is then resolved again.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest wait for a greeting. A rank greets at once, so a slow connection is not a rank, and others may wait
/// in the backlog.
const GREETING_TIMEOUT: Duration = Duration::from_secs(2);
/// Shortest and longest pause between two attempts; it doubles each time.
const PAUSE: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(200));

/// Connects this rank to its two neighbours.
pub(crate) fn join(
    listener: &HostListener,
    group: &GroupConfig,
    abort: &AbortHandle,
    deadline: Instant,
) -> Result<Link, Fault> {
    // One half that fails stops the other; without this the error would come at the deadline only.
    let given_up = AtomicBool::new(false);
    let join = Join { listener, group, abort, deadline, given_up: &given_up };
    // Dial and accept concurrently: the successor replies only when it accepts, so a ring of ranks that all dial
    // first would deadlock.
    let (next, previous) = thread::scope(|scope| {
        let dialling = scope.spawn(|| join.dial());
        let previous = join.accept();
        (dialling.join().expect("dialling does not panic"), previous)
    });
    match (next?, previous?) {
        (Some(next), Some(previous)) => Ok(Link::new(group, next, previous)),
        _ => Err(Fault::own(abort.reason().expect("without a fault, only the abort handle stops either half"))),
    }
}

/// Both halves of joining. A half returns `None` if it was told to stop.
struct Join<'a> {
    listener: &'a HostListener,
    group: &'a GroupConfig,
    abort: &'a AbortHandle,
    deadline: Instant,
    /// Set by the half that fails, to stop the other.
    given_up: &'a AtomicBool,
}

/// Why an attempt to dial failed, and whether it may be retried.
enum Attempt {
    Again(String),
    Refused(String),
}

impl From<io::Error> for Attempt {
    fn from(error: io::Error) -> Self {
        Self::Again(error.to_string())
    }
}

impl Join<'_> {
    fn dial(&self) -> Result<Option<Socket>, Fault> {
        let next = self.group.next();
        let stopped = || self.stopped();
        let limit = Limit { deadline: self.deadline, stopped: &stopped };
        let mut pause = PAUSE.0;
        let mut problem = String::new();
        loop {
            let latest = match self.try_dial(limit) {
                Ok(socket) => return Ok(Some(socket)),
                Err(_) if self.stopped() => return Ok(None),
                // Final: the peer belongs to another job or a later generation, and will never welcome this rank.
                Err(Attempt::Refused(reason)) => return Err(self.give_up(next, ErrorKind::Refused { reason })),
                Err(Attempt::Again(problem)) => problem,
            };
            // An attempt that the deadline cut short explains less than the one before it.
            if problem.is_empty() || !limit.is_over() {
                problem = latest;
            }
            if limit.is_over() {
                let address = &self.group.addresses[next];
                return Err(self.timed_out(next, format!("the peer at `{address}` ({problem})")));
            }
            tracing::debug!(peer = next, problem, "peer rank not reached yet");
            limit.within(pause).pause().map_err(|error| self.give_up(next, ErrorKind::Io(error)))?;
            pause = (2 * pause).min(PAUSE.1);
        }
    }

    fn try_dial(&self, limit: Limit<'_>) -> Result<Socket, Attempt> {
        let stream = connect(&self.group.addresses[self.group.next()], limit)?;
        let socket = match self.listener.credentials() {
            Some(credentials) => Socket::dialled(stream, &credentials, limit)?,
            None => Socket::plain(stream)?,
        };
        Hello::of(self.group).send(&socket, limit)?;
        match Answer::receive(&socket, limit)? {
            Answer::Welcome => Ok(socket),
            Answer::NotYet(reason) => Err(Attempt::Again(reason)),
            Answer::Refused(reason) => Err(Attempt::Refused(reason)),
        }
    }

    fn accept(&self) -> Result<Option<Socket>, Fault> {
        let previous = self.group.previous();
        let mut problem = "no rank dialled".to_owned();
        while !self.stopped() {
            if Instant::now() >= self.deadline {
                return Err(self.timed_out(previous, format!("the peer to dial in ({problem})")));
            }
            match self.listener.accept() {
                Ok((stream, from)) => match self.welcome(stream) {
                    Ok(socket) => return Ok(Some(socket)),
                    Err(reason) => {
                        let news = format!("last refused: {reason}");
                        // A peer of a later generation keeps retrying; log it once.
                        if problem != news {
                            tracing::warn!(%from, %reason, "connection refused");
                            problem = news;
                        }
                    }
                },
                Err(error) => {
                    // Besides an empty backlog, accept reports faults of a connection that is gone,
                    // or temporary shortages.
                    if error.kind() != io::ErrorKind::WouldBlock {
                        problem = error.to_string();
                    }
                    wait(&[(self.listener.as_fd(), PollFlags::POLLIN)], self.deadline)
                        .map_err(|error| self.give_up(previous, ErrorKind::Io(error)))?;
                }
            }
        }
        Ok(None)
    }

    /// Completes the handshake with a connection; returns the reason if it is refused.
    fn welcome(&self, stream: TcpStream) -> Result<Socket, String> {
        let stopped = || self.stopped();
        let limit = Limit { deadline: self.deadline, stopped: &stopped }.within(GREETING_TIMEOUT);
        let greet = || -> io::Result<(Socket, Answer)> {
            let socket = match self.listener.credentials() {
                Some(credentials) => Socket::accepted(stream, &credentials, limit)?,
                None => Socket::plain(stream)?,
            };
            let answer = Hello::receive(&socket, limit)?.judge(self.group);
            answer.send(&socket, limit)?;
            Ok((socket, answer))
        };
        match greet() {
            Ok((socket, Answer::Welcome)) => Ok(socket),
            Ok((_, Answer::NotYet(reason) | Answer::Refused(reason))) => Err(reason),
            Err(error) => Err(error.to_string()),
        }
    }

    fn stopped(&self) -> bool {
        self.given_up.load(Ordering::Relaxed) || self.abort.has_ended()
    }

    fn give_up(&self, peer: usize, kind: ErrorKind) -> Fault {
        self.given_up.store(true, Ordering::Relaxed);
        Fault::with(peer, kind)
    }

    /// Does not stop the other half: it has the same deadline, and the dialling half gives the better explanation.
    fn timed_out(&self, peer: usize, waiting_for: String) -> Fault {
        Fault::with(peer, ErrorKind::TimedOut { timeout: self.group.timeout, waiting_for })
    }
}

fn connect(address: &str, limit: Limit<'_>) -> io::Result<TcpStream> {
    let mut problem = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for resolved in address.to_socket_addrs()? {
        let left = limit.within(ATTEMPT_TIMEOUT).deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        match TcpStream::connect_timeout(&resolved, left) {
            Ok(stream) => return Ok(stream),
            Err(error) => problem = error,
        }
    }
    Err(problem)
}
