use std::time::Duration;

/// Waiting times that double up to a limit, for things that are tried again.
#[derive(Clone, Debug)]
pub struct Backoff {
    next: Duration,
    limit: Duration,
}

impl Backoff {
    /// Starts with `first`, never waits longer than `limit`.
    #[must_use]
    pub fn new(first: Duration, limit: Duration) -> Self {
        Self { next: first, limit }
    }

    /// How long to wait before the next try.
    pub fn wait(&mut self) -> Duration {
        let wait = self.next.min(self.limit);
        self.next = (wait * 2).min(self.limit);
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_up_to_the_limit() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_millis(350));
        let waits: Vec<u128> = (0..4).map(|_| backoff.wait().as_millis()).collect();
        assert_eq!(waits, [100, 200, 350, 350]);
    }
}
