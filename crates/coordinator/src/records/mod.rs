//! The files of a run folder.
//!
//! ```text
//! run folder
//! ├── lock                        held by the one coordinator that works here
//! ├── run_id                      which run this is; written once
//! ├── epoch                       which coordinator that is, should the lock be lost; its number counts the starts
//! ├── coordinator.json            where it listens
//! ├── job.toml                    the resolved job spec
//! ├── problems.json               digests of the problems that it was begun with
//! ├── journal/                    what happened since the last step, see `journal`
//! ├── metrics.jsonl               one line a step
//! ├── evaluations.jsonl           one line an evaluation and set
//! ├── evaluation_problems.jsonl   one line for each problem of it
//! ├── samples/                    step-000130.parquet, eval-000000.parquet: one round each, merged in time into
//! │                               steps-000001-000064.parquet and evals-…: a row group a round
//! └── checkpoints/step-000040/    manifest.json, the ranks' files, model/ in the last one
//! ```
//!
//! After the start, one thread writes all of them except the journal: see [`writer`].

mod archive;
mod atomic;
mod checkpoint;
mod coverage;
mod epoch;
mod fault;
mod identity;
mod lines;
mod problem_set;
mod room;
mod sweep;
mod writer;

#[cfg(test)]
pub(crate) use archive::testing::one_question;
pub(crate) use archive::{
    Archive, ArchiveFile, ArchiveReader, ArchivedSample, Columns, Questions, Round, archive_files, is_gone,
};
pub(crate) use atomic::write_atomically;
pub(crate) use checkpoint::{Checkpoints, Manifest, RankFile, Retention};
pub(crate) use coverage::Coverage;
#[cfg(test)]
pub(crate) use coverage::state_file;
pub(crate) use epoch::Epoch;
pub(crate) use fault::Fault;
#[cfg(any(test, feature = "faults"))]
pub use fault::slow_disk;
pub(crate) use identity::RunLock;
pub use identity::{CoordinatorRecord, identify, run_id};
pub(crate) use lines::Lines;
pub(crate) use problem_set::ProblemSet;
pub(crate) use room::{Room, is_full};
pub(crate) use writer::{Done, Files, Job, LinesOf, MOST_WAITING, RunFolder};
