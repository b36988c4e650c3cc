use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};

/// How long a wait lasts before it looks at the abort flag again. Shutting a socket down wakes a wait on that socket at
/// once; this bounds the waits where there is no such socket yet.
const SLICE: Duration = Duration::from_millis(10);

/// When to stop waiting.
#[derive(Clone, Copy)]
pub(crate) struct Limit<'a> {
    /// The operation has failed if it is not done by then.
    pub(crate) deadline: Instant,
    /// The operation is no longer wanted when this says so.
    pub(crate) stopped: &'a dyn Fn() -> bool,
}

impl Limit<'_> {
    /// The same, but no later than `time` from now.
    pub(crate) fn within(self, time: Duration) -> Self {
        Self { deadline: self.deadline.min(Instant::now() + time), ..self }
    }

    pub(crate) fn is_over(&self) -> bool {
        (self.stopped)() || Instant::now() >= self.deadline
    }

    /// Waits until the limit is over.
    pub(crate) fn pause(&self) -> io::Result<()> {
        while !self.is_over() {
            wait(&[], self.deadline)?;
        }
        Ok(())
    }
}

/// Waits until one of the sockets is ready, the slice is over, or `until`. Returning early is allowed: callers loop.
pub(crate) fn wait(sockets: &[(BorrowedFd<'_>, PollFlags)], until: Instant) -> io::Result<()> {
    let left = until.saturating_duration_since(Instant::now()).min(SLICE);
    // Rounded up, or the last fraction of a millisecond would be a busy loop.
    let millis = u8::try_from(left.as_micros().div_ceil(1000)).expect("a slice is a few milliseconds");
    let mut polled: Vec<PollFd<'_>> = sockets.iter().map(|&(socket, flags)| PollFd::new(socket, flags)).collect();
    match poll(&mut polled, millis) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}
