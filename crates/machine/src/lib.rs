//! The coordinator as a value: `step(now, event) -> Step { record, answer, effects }`.
//!
//! The machine decides everything that a run decides: who is a member, which learners form a generation, which groups
//! are sampled, who holds what on lease, when a batch is complete, when state is saved, and how the run ends. It holds
//! no clock, channel, lock, randomness or payload: prompts, samples and files belong to the driver, which carries out
//! the effects in order.
//!
//! Start with [`Machine`], then [`Event`] and [`Effect`]. What the learners do is one line, `Sampling -> Training`, with
//! `Evaluating` and `Saving` between steps; `advance.rs` says what comes next. Beside it, the pool of groups in flight
//! fills the slots as they free up; `schedule.rs` says which groups become a batch, and how old they may be.
//!
//! A machine that is restored from a snapshot of itself and the [`Record`]s behind it is the same machine:
//! what a step changed is in its record, which is durable before others see the answer or an effect. Time alone changes
//! nothing: [`Machine::overdue`] says which events are due, and each of them is a step like any other.
#![forbid(unsafe_code)]

mod advance;
mod assemble;
mod collapse;
mod counter;
mod draw;
mod effect;
mod event;
mod lose;
mod machine;
mod openings;
mod operate;
mod options;
mod phase;
mod pool;
mod refusal;
mod roster;
mod schedule;
mod status;
mod trial;
mod verbs;
mod watchdog;
mod worker;
mod writing;

pub use collapse::Contrast;
pub use counter::{Counter, Counters};
pub use effect::{
    Answer, Directive, Dropped, Effect, End, GroupGrant, Membership, Reply, SampleGrant, Step, TaskKind, TaskOrder,
    WantedSample,
};
pub use event::{Command, Event, FailureKind, LogLevel, Record, StopMode, TaskResult};
pub use machine::{Machine, Present};
pub use openings::Openings;
pub use operate::Action;
pub use options::{EvaluationPlan, EvaluationSetPlan, Options, Snapshot, Staleness, UniformBy, UniformGroups};
pub use phase::PhaseKind;
pub use pool::{EVALUATION_GROUPS, evaluation_problem};
pub use refusal::{Refusal, RefusalKind};
pub use status::{QueueDepths, Status, WorkerStatus};
