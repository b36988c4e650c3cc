use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::ErrorKind;

/// Ends a communicator from any thread. A blocked operation returns within milliseconds, later ones fail at once, and
/// the closed sockets make the neighbours fail too.
#[derive(Clone, Debug, Default)]
pub struct AbortHandle(Arc<Mutex<AbortState>>);

#[derive(Debug, Default)]
struct AbortState {
    end: Option<End>,
    /// Sockets to shut down at the end, so that neither side keeps waiting on them.
    sockets: Vec<Arc<TcpStream>>,
}

/// How the communicator ended; the first cause is kept.
#[derive(Clone, Debug)]
enum End {
    Aborted { reason: String },
    Failed { first: String },
    Dropped,
}

impl AbortHandle {
    /// Creates an unused handle, to be passed to [`crate::HostCollective::connect_abortable`].
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends the communicator. Has no effect if it has already ended.
    pub fn abort(&self, reason: impl Into<String>) {
        self.end(End::Aborted { reason: reason.into() });
    }

    /// Whether the communicator has ended, for any reason.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.state().end.is_some()
    }

    /// Records the first error and closes the sockets.
    pub(crate) fn fail(&self, first: String) {
        self.end(End::Failed { first });
    }

    /// Closes the sockets when the communicator is dropped, since handles may outlive it.
    pub(crate) fn close(&self) {
        self.end(End::Dropped);
    }

    /// Adds sockets to shut down at the end; if the communicator has ended already, they are shut down at once.
    pub(crate) fn watch(&self, sockets: [&Arc<TcpStream>; 2]) {
        let mut state = self.state();
        state.sockets.extend(sockets.map(Arc::clone));
        if state.end.is_some() {
            state.close_sockets();
        }
    }

    /// Returns why operations fail from now on, or `None` while the communicator is usable.
    pub(crate) fn reason(&self) -> Option<ErrorKind> {
        self.state().end.clone().map(|end| match end {
            End::Aborted { reason } => ErrorKind::Aborted { reason },
            End::Failed { first } => ErrorKind::Ended { first },
            End::Dropped => ErrorKind::Ended { first: "it was dropped".to_owned() },
        })
    }

    fn end(&self, end: End) {
        let mut state = self.state();
        state.end.get_or_insert(end);
        state.close_sockets();
    }

    fn state(&self) -> MutexGuard<'_, AbortState> {
        // No code in this file panics halfway through a change, so poison carries no information.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AbortState {
    fn close_sockets(&mut self) {
        for socket in self.sockets.drain(..) {
            // It fails on a socket that the peer has closed already, which is fine.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}
