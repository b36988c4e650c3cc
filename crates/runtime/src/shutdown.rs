use std::sync::Arc;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, watch};

/// A request to leave that every task of a process can wait for.
#[derive(Clone, Debug)]
pub struct Shutdown {
    requested: Arc<watch::Sender<u32>>,
    checkpoint: Arc<Notify>,
}

impl Default for Shutdown {
    fn default() -> Self {
        Self::new()
    }
}

impl Shutdown {
    /// A request that has not been made yet.
    #[must_use]
    pub fn new() -> Self {
        Self { requested: Arc::new(watch::Sender::new(0)), checkpoint: Arc::new(Notify::new()) }
    }

    /// Makes the request on SIGTERM and SIGINT, and asks for a checkpoint on SIGUSR1; must be called within a runtime.
    ///
    /// # Errors
    /// When the signal handlers cannot be installed.
    pub fn on_signals(&self) -> std::io::Result<()> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut user = signal(SignalKind::user_defined1())?;
        let shutdown = self.clone();
        // Lives as long as the process; it owns nothing that must be released.
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                    _ = user.recv() => {
                        shutdown.checkpoint.notify_one();
                        continue;
                    }
                }
                shutdown.request();
            }
        });
        Ok(())
    }

    /// Makes the request; a second one hurries (see [`Self::hurried`]).
    pub fn request(&self) {
        self.requested.send_modify(|count| *count += 1);
    }

    /// Waits for the next wish for a checkpoint. Only the coordinator has one to make; to workers the signal means nothing.
    pub async fn checkpoint_wanted(&self) {
        self.checkpoint.notified().await;
    }

    /// Whether the request was made.
    #[must_use]
    pub fn is_requested(&self) -> bool {
        *self.requested.borrow() > 0
    }

    /// Waits for the request.
    pub async fn requested(&self) {
        self.at_least(1).await;
    }

    /// Waits for a second request: the operator will not wait for a graceful end.
    pub async fn hurried(&self) {
        self.at_least(2).await;
    }

    async fn at_least(&self, wanted: u32) {
        let mut receiver = self.requested.subscribe();
        // The sender lives in `self`, so the channel cannot close while this waits.
        let _ = receiver.wait_for(|count| *count >= wanted).await;
    }
}
