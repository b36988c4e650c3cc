//! The process of a learner rank: its service, the thread that trains, and what it receives and publishes.

mod intake;
mod publish;
mod service;
mod signals;
mod training_thread;

pub use self::service::{LearnerError, LearnerOptions, run};
pub use self::training_thread::Backend;
