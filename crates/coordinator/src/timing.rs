use std::time::Duration;

/// How patient a coordinator is. The default suits real runs.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Time between two heartbeats of a worker.
    pub heartbeat_interval: Duration,
    /// Silence after which a worker is given up.
    pub heartbeat_timeout: Duration,
    /// Time between two looks at the clock.
    pub tick: Duration,
    /// How long workers are waited for after the end.
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
