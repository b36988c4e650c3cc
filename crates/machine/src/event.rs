use std::time::Duration;

use pacs_types::{Generation, GroupId, LeaseId, Outcome, Role, SampleId, WeightVersion, WorkerId};
use serde::{Deserialize, Serialize};

/// A journaled event and the machine time at which it was applied. Replaying the records of a machine in order
/// reproduces its state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Machine time of the event.
    pub now: Duration,
    /// The event that was applied.
    pub event: Event,
}

/// An input of the machine: a call of a worker or operator, a report of the driver, or a deadline that has passed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// A worker process asks to become a member.
    Register {
        /// Role that it works in.
        role: Role,
        /// Name of its slot; refused while another live member of the role holds it.
        name: String,
        /// Host name of the process.
        host: String,
        /// Process id on that host.
        pid: u32,
        /// When its supervisor started it, in microseconds since 1970, having seen the end of every earlier process
        /// that it started under this name. 0: there is no such supervisor.
        started: u64,
        /// Learners: address at which the other ranks reach it.
        collective_address: String,
    },
    /// A member reports that it is alive.
    Heartbeat {
        /// Registration id of the member.
        worker: WorkerId,
        /// What it does now, in words, for the status.
        activity: String,
    },
    /// A member's process was asked to end; it keeps working for a grace period so that its state can be saved.
    Ending {
        /// Registration id of the member.
        worker: WorkerId,
    },
    /// A member deregisters.
    Leave {
        /// Registration id of the member.
        worker: WorkerId,
        /// The error that ends it; `None` for a regular exit.
        error: Option<String>,
    },
    /// A rollout worker asks for groups.
    LeaseGroups {
        /// Registration id of the rollout worker.
        worker: WorkerId,
        /// Samples that it has room for.
        free_samples: u32,
        /// Number of the worker's request: a retry with the same number is granted the same
        /// leases again. 0: not numbered.
        request: u64,
    },
    /// A rollout worker hands in a sample.
    SubmitSample {
        /// Registration id of the rollout worker.
        worker: WorkerId,
        /// The lease that it was generated under.
        lease: LeaseId,
        /// The sample, by group and index.
        sample: SampleId,
        /// Version of the weights that generated its oldest token.
        version: WeightVersion,
    },
    /// A verifier asks for samples.
    LeaseSamples {
        /// Registration id of the verifier.
        worker: WorkerId,
        /// Upper bound on the samples to grant.
        max_samples: u32,
        /// Number of the request, as for `LeaseGroups`.
        request: u64,
    },
    /// A verifier hands in a verdict.
    SubmitVerdict {
        /// Registration id of the verifier.
        worker: WorkerId,
        /// The lease that it was made under.
        lease: LeaseId,
        /// The sample, by group and index.
        sample: SampleId,
        /// Whether the answer is correct or wrong, or the verification failed.
        outcome: Outcome,
        /// Label in 0 to 1; meaningful only when the outcome is conclusive.
        #[serde(with = "pacs_types::bits")]
        label: f64,
        /// Reward, under the same condition. `None` in records of versions that did not store it.
        #[serde(default, with = "pacs_types::bits::option")]
        reward: Option<f64>,
    },
    /// A learner asks for a rank in the next generation.
    JoinGeneration {
        /// Registration id of the learner.
        worker: WorkerId,
    },
    /// A rank asks for its next task.
    NextTask {
        /// Registration id of the learner.
        worker: WorkerId,
        /// The generation that it believes to be a member of.
        generation: Generation,
    },
    /// A rank reports the end of a task.
    CompleteTask {
        /// Registration id of the learner.
        worker: WorkerId,
        /// The generation of the task.
        generation: Generation,
        /// Number of the task.
        task: u64,
        /// Result, or how the task failed.
        result: TaskResult,
    },
    /// The driver reports that the checkpoint is durable.
    CheckpointCommitted {
        /// Step of the checkpoint.
        step: u64,
    },
    /// The driver could not create or commit the checkpoint.
    CheckpointFailed {
        /// Step of the checkpoint.
        step: u64,
        /// Error text, for the note or the end of the run.
        reason: String,
    },
    /// An operator's command.
    Operator {
        /// Identity of the operator, for the audit trail.
        who: String,
        /// Wall-clock time, in seconds since 1970.
        at: u64,
        /// What the operator asks for.
        command: Command,
    },
    /// The stored content of a sample is lost (a damaged disk): it has to be generated again.
    SampleGone {
        /// The sample, by group and index.
        sample: SampleId,
    },
    /// An ended run is started again: its workers are gone, its groups are still there.
    Reopened,
    /// The coordinator was restarted. Members may have died meanwhile, of unknown causes.
    Resumed,
    /// A worker has missed its heartbeats for `heartbeat_timeout`.
    WorkerSilent {
        /// Registration id of the silent member.
        worker: WorkerId,
    },
    /// These leases saw no progress within their timeouts.
    LeasesLapsed {
        /// Leases of groups.
        groups: Vec<LeaseId>,
        /// Leases of samples.
        samples: Vec<LeaseId>,
    },
    /// These were accused when a worker died that held nothing else, and no mass loss has acquitted them since.
    AccusationsDue {
        /// Groups whose window is over.
        groups: Vec<GroupId>,
        /// Samples whose window is over.
        samples: Vec<SampleId>,
    },
    /// A group has exceeded `group_timeout`.
    GroupOverdue {
        /// The overdue group, of training or of an evaluation.
        group: GroupId,
    },
    /// The run has made no progress for `stall_timeout`.
    Stalled,
    /// No rank has reported on a task for `task_timeout`.
    TaskOverdue {
        /// Number of the task.
        task: u64,
    },
    /// The checkpoint in flight has made no progress for `checkpoint_timeout`.
    CheckpointOverdue {
        /// The save task.
        task: u64,
    },
    /// Learners have been missing for `learner_wait`, so the generation forms without them.
    LearnersMissing,
}

/// A command of an operator.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// Grant no new leases; work in progress is finished.
    Pause,
    /// End a pause.
    Resume,
    /// Save at the next point between two tasks.
    Checkpoint,
    /// Grant a worker no new work and dismiss it when it holds none; a learner leaves once its state is saved.
    Drain {
        /// Name of the worker.
        worker: String,
    },
    /// End the run, at the point that the mode names.
    Stop(StopMode),
    /// Change the number of training groups that may be in flight.
    SetSlots(u32),
    /// Change the learning rate from the next step on.
    SetLearningRate(#[serde(with = "pacs_types::bits")] f64),
    /// Change the log level of all processes; workers receive it with their next heartbeat.
    SetLogLevel(LogLevel),
}

/// The least urgent level that is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogLevel {
    /// Failures that an operator must look into.
    Error,
    /// Faults that the program handled.
    Warn,
    /// The course of the run.
    Info,
    /// Reasons of decisions, and each sample's stations.
    Debug,
    /// Every event, down to the finest detail.
    Trace,
}

impl LogLevel {
    /// Name in log filters and settings.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

/// The point at which a stopped run ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopMode {
    /// At the next point between two tasks, after a checkpoint.
    Save,
    /// After the current step and a checkpoint.
    AfterStep,
    /// At once; unsaved state is lost.
    Now,
}

/// Result of a rank's task.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskResult {
    /// The starting state is loaded, and its weights are published.
    Prepared {
        /// Version that rank 0 published; `None` from other ranks.
        weights: Option<WeightVersion>,
    },
    /// The step is trained, and its weights are published.
    Trained {
        /// Version that rank 0 published; `None` from other ranks.
        weights: Option<WeightVersion>,
        /// Updates that the optimizer skipped.
        skipped_updates: u32,
    },
    /// The rank has copied its part of the state, so training may continue while the copy is written.
    Captured,
    /// The rank's files are durable.
    Saved,
    /// The task failed.
    Failed {
        /// Error text, for the operator.
        message: String,
        /// What the failure means for the run.
        kind: FailureKind,
    },
}

/// What a failed task means for the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// The rank lost a peer, or failed in another way that a new generation may cure.
    Generation,
    /// The rank could not write its files of a checkpoint; what it has in memory is whole.
    Write,
    /// Trying again cannot help.
    Permanent,
}
