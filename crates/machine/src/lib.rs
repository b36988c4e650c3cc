//! The coordinator as a value: `step(now, event) -> effects`.
//!
//! The machine decides everything that a run decides: who is a member, which learners form a generation, which groups
//! are sampled, who holds what on lease, when a batch is complete, when state is saved, and how the run ends. It holds
//! no clock, channel, lock, randomness or payload: prompts, samples and files belong to the driver, which carries out
//! the effects in order.
//!
//! Start with [`Machine`], then [`Event`] and [`Effect`]. One step of training is one walk through
//! `Sampling -> Training`, with `Evaluating` and `Saving` between steps; `advance.rs` says what comes next.
#![forbid(unsafe_code)]

mod advance;
mod effect;
mod event;
mod lose;
mod machine;
mod options;
mod phase;
mod refusal;
mod round;
mod status;
mod verbs;
mod worker;

pub use effect::{
    Directive, Effect, End, GroupGrant, Membership, Reply, SampleGrant, TaskKind, TaskOrder, WantedSample,
};
pub use event::{Event, TaskResult};
pub use machine::Machine;
pub use options::{Counters, EvaluationPlan, Options, Snapshot};
pub use refusal::{Refusal, RefusalKind};
pub use round::{EVALUATION_GROUPS, evaluation_problem};
pub use status::{QueueDepths, Status, WorkerStatus};
