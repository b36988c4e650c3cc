use std::time::Duration;

/// Timeouts and intervals of a coordinator. The default suits real runs.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Time between two heartbeats of a worker.
    pub heartbeat_interval: Duration,
    /// Silence after which a worker is removed from the members.
    pub heartbeat_timeout: Duration,
    /// Interval at which the driver checks for due events.
    pub tick: Duration,
    /// Longest wait for workers to leave after the end of the run.
    pub goodbye: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            heartbeat_interval: Duration::from_secs(1),
            heartbeat_timeout: Duration::from_secs(10),
            tick: Duration::from_millis(200),
            goodbye: Duration::from_secs(5),
        }
    }
}
