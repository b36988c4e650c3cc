//! What every service process needs and no role should write twice: its place in a cluster, protected connections,
//! membership with the coordinator, health, logging, exit codes, shutdown, and back-off.
#![forbid(unsafe_code)]

mod backoff;
mod exit;
mod health;
pub mod launch;
mod logging;
mod membership;
mod memory;
pub mod net;
mod shutdown;

pub use backoff::Backoff;
pub use exit::Exit;
pub use health::Health;
pub use logging::{LogFormat, init_logging, set_log_level};
pub use membership::{Activity, Ended, JoinError, Link, Membership, WorkerIdentity, connect};
pub use memory::{available_bytes, peak_resident_bytes, resident_bytes};
pub use shutdown::Shutdown;
