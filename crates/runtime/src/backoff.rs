use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};

/// Jittered exponential back-off: waiting times that double up to a limit.
///
/// Each wait is drawn between one half and the whole of its nominal time. The workers of a run lose their coordinator
/// at the same moment, and must not all return at once.
#[derive(Debug)]
pub struct Backoff {
    waits: ExponentialBackoff,
    limit: Duration,
}

impl Backoff {
    /// Creates a back-off whose first wait is at most `first`, and none longer than `limit`.
    #[must_use]
    pub fn new(first: Duration, limit: Duration) -> Self {
        // `with_jitter` adds a random part of up to the same size to each wait, so it starts from half.
        let waits = ExponentialBuilder::new()
            .with_factor(2.0)
            .with_min_delay(first.min(limit) / 2)
            .with_max_delay(limit / 2)
            .without_max_times()
            .with_jitter()
            .build();
        Self { waits, limit }
    }

    /// Returns the time to wait before the next try.
    pub fn wait(&mut self) -> Duration {
        self.waits.next().unwrap_or(self.limit).min(self.limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_up_to_the_limit_within_its_bounds() {
        let turns = [100, 200, 350, 350].map(Duration::from_millis);
        let mut all = Vec::new();
        for _ in 0..200 {
            let mut backoff = Backoff::new(turns[0], turns[2]);
            for turn in turns {
                let wait = backoff.wait();
                assert!(turn / 2 <= wait && wait <= turn, "{wait:?} of a turn of {turn:?}");
                all.push(wait);
            }
        }
        all.sort();
        all.dedup();
        assert!(all.len() > 400, "workers that fail at one moment wait for different times: {} of 800", all.len());
    }

    #[test]
    fn a_first_wait_beyond_the_limit_is_the_limit() {
        let mut backoff = Backoff::new(Duration::from_secs(9), Duration::from_secs(1));
        assert!((0..3).all(|_| backoff.wait() <= Duration::from_secs(1)));
    }
}
