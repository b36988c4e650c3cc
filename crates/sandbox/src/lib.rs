//! Runs untrusted programs: several layers of isolation that the kernel enforces, each of which is reported.
//!
//! Start at [`Sandbox`]: a process tree that keeps a warm Python interpreter and forks it into namespaces of its own for each
//! [`Job`]. It is started by way of [`Entry`], for a process must be single-threaded while it isolates itself: [`run_init`] is what
//! that process does. `view` builds the root that programs see, `filter` the system calls that they may make, `cgroup` what they may
//! take together; `warm.py` is the forked side. [`Enclosure`] puts the same layers around a program that stays, a verifier of a user's own. [`Layer`] names the layers, and which of them do not hold on a machine is part of
//! every answer: nothing is left out in silence.
//!
//! What is not here: what a program's output is worth (`pacs-verifier`), and virtual machines. A bug of the kernel that programs can
//! reach through the allowed system calls is not stopped.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a panic is how a test fails"))]

mod cgroup;
mod enclosure;
mod error;
mod filter;
mod init;
mod interpreter;
mod job;
mod layer;
mod plan;
mod sandbox;
mod view;

pub use cgroup::own_control_group;
pub use enclosure::{Enclosed, Enclosure, Isolated};
pub use error::SandboxError;
pub use init::run_init;
pub use job::{Case, Ended, Job, Limits, Outcome, Told};
pub use layer::{Layer, Layers};
pub use plan::Policy;
pub use sandbox::{Entry, Running, Sandbox};
