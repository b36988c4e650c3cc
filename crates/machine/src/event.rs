use std::time::Duration;

use pacs_types::{Generation, GroupId, LeaseId, Outcome, Role, SampleId, WeightVersion, WorkerId};
use serde::{Deserialize, Serialize};

/// An event that has changed the machine, and when. A machine that takes in the records of another one, in order, comes
/// to the same state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Time of the machine.
    pub now: Duration,
    /// What happened.
    pub event: Event,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// A worker process wants to be a member.
    Register {
        /// What it does.
        role: Role,
        /// Name of its slot; only a live member of that name keeps it from the process.
        name: String,
        /// Where it runs.
        host: String,
        /// Its process id there.
        pid: u32,
        /// When its supervisor started it, in microseconds since 1970, after it had seen the end of every process that it
        /// had started under this name before; 0: none vouches for that.
        started: u64,
        /// Learners: where other ranks reach it.
        collective_address: String,
    },
    /// A member is alive.
    Heartbeat {
        /// Who.
        worker: WorkerId,
        /// What it does now.
        activity: String,
    },
    /// A member's process was asked to end; it goes on for a while, so that what it holds can be saved.
    Ending {
        /// Who.
        worker: WorkerId,
    },
    /// A member goes.
    Leave {
        /// Who.
        worker: WorkerId,
        /// The error that ends it, if one does.
        error: Option<String>,
    },
    /// A rollout worker wants groups.
    LeaseGroups {
        /// Who.
        worker: WorkerId,
        /// Samples that it has room for.
        free_samples: u32,
        /// Number of the worker's request: one that is asked again gets what it got, if that never arrived. 0: none.
        request: u64,
    },
    /// A rollout worker hands in a sample.
    SubmitSample {
        /// Who.
        worker: WorkerId,
        /// The loan that it answers.
        lease: LeaseId,
        /// Which sample.
        sample: SampleId,
        /// The weights that generated its oldest token.
        version: WeightVersion,
    },
    /// A verifier wants samples.
    LeaseSamples {
        /// Who.
        worker: WorkerId,
        /// At most so many.
        max_samples: u32,
        /// As for `LeaseGroups`.
        request: u64,
    },
    /// A verifier hands in a verdict.
    SubmitVerdict {
        /// Who.
        worker: WorkerId,
        /// The loan that it answers.
        lease: LeaseId,
        /// Which sample.
        sample: SampleId,
        /// How the verification ended.
        outcome: Outcome,
        /// The label, when the outcome is conclusive.
        #[serde(with = "pacs_types::bits")]
        label: f64,
        /// The reward, likewise. Records of versions that did not say it have none.
        #[serde(default, with = "pacs_types::bits::option")]
        reward: Option<f64>,
    },
    /// A learner wants to be a rank of the next generation.
    JoinGeneration {
        /// Who.
        worker: WorkerId,
    },
    /// A rank wants its next task.
    NextTask {
        /// Who.
        worker: WorkerId,
        /// The generation that it believes to be in.
        generation: Generation,
    },
    /// A rank reports a finished task.
    CompleteTask {
        /// Who.
        worker: WorkerId,
        /// The generation of the task.
        generation: Generation,
        /// Which task.
        task: u64,
        /// How it ended.
        result: TaskResult,
    },
    /// The checkpoint that was to be committed is durable.
    CheckpointCommitted {
        /// Its step.
        step: u64,
    },
    /// The checkpoint could not be created or committed.
    CheckpointFailed {
        /// Its step.
        step: u64,
        /// Why.
        reason: String,
    },
    /// Somebody wants something of the run.
    Operator {
        /// Who, for the record.
        who: String,
        /// When, in seconds since 1970.
        at: u64,
        /// What.
        command: Command,
    },
    /// What was kept of a sample is gone (a damaged disk): it has to be generated again.
    SampleGone {
        /// Which.
        sample: SampleId,
    },
    /// A run that had ended goes on: its workers are gone, its groups are not.
    Reopened,
    /// The coordinator was started again: which of its members have died meanwhile, and of what, is not known.
    Resumed,
    /// A worker has not been heard of for too long.
    WorkerSilent {
        /// Who.
        worker: WorkerId,
    },
    /// Nothing came of these loans for too long.
    LeasesLapsed {
        /// Loans of groups.
        groups: Vec<LeaseId>,
        /// Loans of samples.
        samples: Vec<LeaseId>,
    },
    /// Nothing has spoken for these since the workers that held them alone died.
    AccusationsDue {
        /// Groups.
        groups: Vec<GroupId>,
        /// Samples.
        samples: Vec<SampleId>,
    },
    /// A group takes too long.
    GroupOverdue {
        /// Which.
        group: GroupId,
    },
    /// Nothing has come of anything for too long.
    Stalled,
    /// Ranks have not reported a task for too long.
    TaskOverdue {
        /// Which.
        task: u64,
    },
    /// Nothing was heard of the checkpoint in flight for too long.
    CheckpointOverdue {
        /// The task that asked for it.
        task: u64,
    },
    /// Learners are missing for so long that the run goes on with those that are there.
    LearnersMissing,
}

/// What an operator can want.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// Give out no new work; what is in work is finished.
    Pause,
    /// Go on after a pause.
    Resume,
    /// Save as soon as the learners are between two tasks.
    Checkpoint,
    /// Give a worker no new work, and dismiss it when it holds none; a learner, when what it has trained is saved.
    Drain {
        /// Its slot.
        worker: String,
    },
    /// End the run.
    Stop(StopMode),
    /// Change the room for groups in flight.
    SetSlots(u32),
    /// Change the learning rate, from the next step on.
    SetLearningRate(#[serde(with = "pacs_types::bits")] f64),
    /// Change what the run's processes log, the workers' with their next heartbeat.
    SetLogLevel(LogLevel),
}

/// The least urgent events that are logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogLevel {
    /// Somebody must look.
    Error,
    /// Something went wrong and was dealt with.
    Warn,
    /// What a run does.
    Info,
    /// Why.
    Debug,
    /// Everything.
    Trace,
}

impl LogLevel {
    /// Its name in filters and settings.
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

/// When a run ends that is to be stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopMode {
    /// At the next safe point, after a checkpoint.
    Save,
    /// After the step in work and a checkpoint.
    AfterStep,
    /// At once; what is not saved yet is lost.
    Now,
}

/// How a rank's task ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskResult {
    /// The starting state is loaded; rank 0 names the version that it published.
    Prepared {
        /// Set by rank 0.
        weights: Option<WeightVersion>,
    },
    /// The step is made; rank 0 names the version that it published.
    Trained {
        /// Set by rank 0.
        weights: Option<WeightVersion>,
        /// Updates that the optimizer skipped.
        skipped_updates: u32,
    },
    /// The rank's part of the state to be saved is copied: it may be trained further.
    Captured,
    /// The rank's files are durable.
    Saved,
    /// The task failed.
    Failed {
        /// Why.
        message: String,
        /// What it means for the run.
        kind: FailureKind,
    },
}

/// What a failed task means for the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// The rank lost a peer, or cannot go on in its generation for another reason that a new one may cure.
    Generation,
    /// The rank could not write its files of a checkpoint; what it has in memory is whole.
    Write,
    /// Trying again cannot help.
    Permanent,
}
