//! How the dispatcher has a server's driver look at the server.

use std::sync::{Mutex, PoisonError};

use tokio::sync::Notify;

use crate::Fault;

/// A call to the driver, and what the dispatcher holds against the server.
#[derive(Debug, Default)]
pub(crate) struct Wake {
    notify: Notify,
    accusation: Mutex<Option<Fault>>,
}

impl Wake {
    /// Has the driver look at the server.
    pub(crate) fn call(&self) {
        self.notify.notify_one();
    }

    /// Has the driver take the server out of service for this, even if it answers other calls.
    pub(crate) fn accuse(&self, fault: Fault) {
        *self.accusation.lock().unwrap_or_else(PoisonError::into_inner) = Some(fault);
        self.call();
    }

    /// Waits for the next call; one that was made while nobody waited counts.
    pub(crate) async fn called(&self) {
        self.notify.notified().await;
    }

    /// Takes the accusation, if there is one.
    pub(crate) fn accused(&self) -> Option<Fault> {
        self.accusation.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
