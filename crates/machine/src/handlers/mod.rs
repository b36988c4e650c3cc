//! Event handlers, one file for each kind of event.

mod checkpoint;
mod complete_task;
mod heartbeat;
mod join_generation;
mod lease_groups;
mod lease_samples;
mod leave;
mod next_task;
mod register;
mod submit_sample;
mod submit_verdict;
#[cfg(test)]
pub(crate) mod testing;

pub(crate) use self::register::Names;
