//! Everything that a run writes down.
//!
//! ```text
//! run folder
//! ├── lock                        held by the one coordinator that works here
//! ├── run_id                      which run this is; written once
//! ├── coordinator.json            where it listens
//! ├── starts                      coordinators that have worked here
//! ├── job.toml                    the resolved job spec
//! ├── journal/                    what happened since the last step, see `journal`
//! ├── metrics.jsonl               one line a step
//! ├── evaluations.jsonl           one line an evaluation
//! ├── samples/step-000012.parquet, eval-000000.parquet
//! └── checkpoints/step-000040/    manifest.json, the ranks' files, model/ in the last one
//! ```

mod archive;
mod atomic;
mod checkpoint;
mod identity;
mod lines;

pub(crate) use archive::{Archive, ArchivedSample, Round};
pub(crate) use atomic::write_atomically;
pub(crate) use checkpoint::{Checkpoints, Manifest, RankFile, Retention};
pub use identity::{CoordinatorRecord, identify, is_run_id, run_id};
pub(crate) use identity::{RunLock, count_start, starts_so_far};
pub(crate) use lines::Lines;
