use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};

/// Longest wait before the abort flag is checked again. Shutting a socket down wakes a wait on it at once; this bounds
/// waits without a socket.
const SLICE: Duration = Duration::from_millis(10);

/// When to stop waiting: a deadline, or an external stop.
#[derive(Clone, Copy)]
pub(crate) struct Limit<'a> {
    /// Time at which the operation fails.
    pub(crate) deadline: Instant,
    /// Whether the operation is no longer wanted.
    pub(crate) stopped: &'a dyn Fn() -> bool,
}

impl Limit<'_> {
    /// Tightens the deadline to at most `time` from now.
    pub(crate) fn within(self, time: Duration) -> Self {
        Self { deadline: self.deadline.min(Instant::now() + time), ..self }
    }

    pub(crate) fn is_over(&self) -> bool {
        (self.stopped)() || Instant::now() >= self.deadline
    }

    /// Waits until the deadline or a stop.
    pub(crate) fn pause(&self) -> io::Result<()> {
        while !self.is_over() {
            wait(&[], self.deadline)?;
        }
        Ok(())
    }
}

/// Waits until a socket is ready, a slice has passed, or `until`. May return early, so callers loop.
pub(crate) fn wait(sockets: &[(BorrowedFd<'_>, PollFlags)], until: Instant) -> io::Result<()> {
    let left = until.saturating_duration_since(Instant::now()).min(SLICE);
    // Rounded up: otherwise the last fraction of a millisecond would be a busy loop.
    let millis = u8::try_from(left.as_micros().div_ceil(1000)).expect("a slice is a few milliseconds");
    let mut polled: Vec<PollFd<'_>> = sockets.iter().map(|&(socket, flags)| PollFd::new(socket, flags)).collect();
    match poll(&mut polled, millis) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}
