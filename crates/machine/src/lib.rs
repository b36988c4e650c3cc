//! The coordinator as a value: `step(now, event) -> Step { record, answer, effects }`.
//!
//! The machine makes every decision of a run: who is a member, which learners form a generation, which groups are
//! sampled, who holds which lease, when a batch is complete, when state is saved, and how the run ends. It holds no
//! clock, channel, lock, randomness or payload: prompts, samples and files belong to the driver, which carries out the
//! effects in order.
//!
//! Start with [`Machine`], then [`Event`] and [`Effect`]. The learners follow one line, `Sampling -> Training`, with
//! `Evaluating` and `Saving` between steps; `advance.rs` decides what comes next. Independently of it, the pool of
//! groups in flight fills the slots as they free up; `schedule.rs` decides which groups form a batch, and how old they
//! may be. With lag, an evaluation is independent of that line, too (`evaluation.rs`).
//!
//! A machine that is restored from one of its snapshots and the [`Record`]s after it equals the original: a step's
//! record holds everything that the step changed, and is durable before anyone sees the answer or an effect. Time alone
//! changes nothing: [`Machine::overdue`] says which events are due, and each of them is a step like any other.
#![forbid(unsafe_code)]

mod advance;
mod assemble;
mod counter;
mod draw;
mod effect;
mod evaluation;
mod event;
mod handlers;
mod machine;
mod no_signal;
mod openings;
mod operate;
mod options;
mod pending_checkpoint;
mod phase;
mod pool;
mod refusal;
mod roster;
mod schedule;
mod status;
mod trial;
mod watchdog;
mod worker;
mod worker_loss;

pub use counter::{Counter, Counters};
pub use effect::{
    Answer, Directive, Dropped, Effect, End, GroupGrant, Membership, Reply, SampleGrant, Step, TaskKind, TaskOrder,
    WantedSample,
};
pub use event::{Command, Event, FailureKind, LogLevel, Record, StopMode, TaskResult};
pub use machine::{Machine, Present};
pub use no_signal::Contrast;
pub use openings::Openings;
pub use operate::Action;
pub use options::{EvaluationPlan, EvaluationSetPlan, Options, Snapshot, Staleness, UniformBy, UniformGroups};
pub use phase::PhaseKind;
pub use pool::{EVALUATION_GROUPS, evaluation_problem};
pub use refusal::{Refusal, RefusalKind};
pub use status::{QueueDepths, Status, WorkerStatus};
