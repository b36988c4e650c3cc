//! The coordinator as a service: it carries out what the [machine](pacs_machine) decides.
//!
//! One mutex holds the machine and the payloads that belong to it (samples, verdicts, weights references); the services
//! turn calls into events, and the `driver` turns effects into files and answers. State that has to survive this
//! process is in the `journal` before anyone hears of it; files for operators are in `records`: the lock, the metrics,
//! the archive of samples, the checkpoints.
//!
//! It neither starts workers nor touches a tensor. Start with [`Coordinator`].
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a panic is how a test fails"))]

mod coordinator;
mod driver;
mod error;
mod journal;
mod machine_options;
mod observe;
mod open;
mod progress;
mod records;
mod services;
mod sizes;
mod timing;

pub use coordinator::{Coordinator, CoordinatorOptions, StopHandle};
pub use error::{FileError, StartError};
pub use observe::{DashboardError, DashboardRecord, ObserveError, Observer, Recorded, TraceExport, TraceExportError};
pub use progress::{EvaluationSummary, Progress, RunEnd, StepSeconds, StepSummary};
#[cfg(any(test, feature = "faults"))]
pub use records::slow_disk;
pub use records::{CoordinatorRecord, identify, run_id};
pub use timing::Timing;
