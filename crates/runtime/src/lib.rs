//! What every service process needs and no role should write twice: logging, exit codes, shutdown, back-off, and
//! membership with the coordinator.
#![forbid(unsafe_code)]

mod backoff;
mod exit;
mod logging;
mod membership;
mod memory;
mod shutdown;

pub use backoff::Backoff;
pub use exit::Exit;
pub use logging::{LogFormat, init_logging};
pub use membership::{Activity, Ended, JoinError, Membership, WorkerIdentity, connect};
pub use memory::{available_bytes, peak_resident_bytes, resident_bytes};
pub use shutdown::Shutdown;
