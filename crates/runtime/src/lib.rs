//! Shared infrastructure of all service processes: their place in a cluster, protected connections, membership with the
//! coordinator and the loop that maintains it ([`work`]), call policy ([`Policy`]), traces, health, logging, exit
//! codes, and shutdown.
#![forbid(unsafe_code)]

mod backoff;
mod call;
mod error_chain;
mod exit;
mod health;
pub mod launch;
mod log_level;
mod logging;
mod membership;
pub mod net;
mod process;
mod process_memory;
mod shutdown;
mod terminal;
pub mod trace;
mod worker;

pub use backoff::Backoff;
pub use call::{CallError, Meaning, NO_ROOM_KEY, PATIENCE, Policy, Tries, meaning};
pub use error_chain::chain;
pub use exit::Exit;
pub use health::Health;
pub use logging::{LogFormat, init_logging, set_log_level};
pub use membership::{Activity, Ended, HOLDER_MISSED_KEY, JoinError, Link, Membership, WorkerIdentity, connect};
pub use process::run_role;
pub use process_memory::{available_bytes, peak_resident_bytes, resident_bytes};
pub use shutdown::Shutdown;
pub use terminal::{HarmlessLine, HarmlessLines, harmless, harmless_json, harmless_lines};
pub use worker::{Stop, Worker, work};
