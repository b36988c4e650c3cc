use std::time::Duration;

use pacs_types::{Generation, GroupId, LeaseId, Purpose, Role, SampleId, WorkerId};

use serde::{Deserialize, Serialize};

use crate::{PhaseKind, Record, Refusal, Snapshot};

/// The reply to an event's caller, or why the caller is refused.
pub type Answer = Result<Reply, Refusal>;

/// Result of one event: what to persist, what to reply, and what to do.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// The event to journal; `None` if it changed no durable state. It must be durable before anyone
    /// sees the answer or an effect.
    pub record: Option<Record>,
    /// Reply to the caller of the event.
    pub answer: Answer,
    /// Work for the driver, to be carried out in order.
    pub effects: Vec<Effect>,
}

/// Work for the driver.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// The phase has changed to this one.
    Phase(PhaseKind),
    /// Forget the samples and verdicts of a group that was given up.
    DropGroup {
        /// The group, of training or of an evaluation.
        group: GroupId,
        /// Reason, for the log.
        why: Dropped,
    },
    /// Forget the samples and verdicts of an evaluation that was discarded.
    ForgetEvaluation(Vec<GroupId>),
    /// Forget the samples and verdicts of a group that is generated again with newer weights.
    RestartGroup(GroupId),
    /// Forget a sample that could not be verified; the next attempt replaces it.
    ReplaceSample(SampleId),
    /// Form the ranks' tasks for this batch. All groups are complete.
    Train {
        /// The step being made, from 1.
        step: u64,
        /// All groups of the step, in order of id, including `left_out`.
        groups: Vec<GroupId>,
        /// Groups that the learner does not receive because they have no contrast.
        left_out: Vec<GroupId>,
        /// Number of ranks to share the batch among.
        ranks: u32,
        /// Lag of the batch: versions between its oldest token and the newest weights.
        lag: u64,
    },
    /// All ranks have finished the step: archive the batch and forget its groups.
    StepDone {
        /// Training steps done, this one included.
        step: u64,
    },
    /// An evaluation is complete: archive it and forget its groups.
    Evaluated {
        /// Training steps that the evaluated policy has seen.
        step: u64,
        /// The evaluated groups, in order of id.
        groups: Vec<GroupId>,
        /// Problems left out because they could not be verified.
        excluded: u32,
        /// Duration, if it ran concurrently with training; `None` for a phase, which the driver times.
        took: Option<Duration>,
    },
    /// Create an empty folder for the ranks' files. Their task is handed out only after that; a failure is
    /// reported as `CheckpointFailed`.
    CreateCheckpoint {
        /// Training steps done in the state to be saved.
        step: u64,
        /// The save task, which the folder is named after: a rank that still writes for an
        /// earlier task cannot write into it.
        save: u64,
    },
    /// Turn the folder into a checkpoint (manifest, sync, rename), then report the outcome as an event.
    CommitCheckpoint {
        /// Position of the job that the manifest holds.
        snapshot: Snapshot,
        /// Whether the folder holds the exported model.
        model: bool,
        /// The save task, which the folder is named after.
        save: u64,
    },
    /// The job was rewound to this step: truncate the records after it.
    Rewound {
        /// The step that the job is back at.
        step: u64,
        /// Groups to forget: those of undone steps, those with tokens from undone weights, and those that were drawn
        /// before their turn.
        forgotten: Vec<GroupId>,
    },
    /// A new generation of learners has formed.
    GenerationFormed {
        /// Its number, which fences messages of earlier generations.
        generation: Generation,
        /// Worker names, indexed by rank.
        names: Vec<String>,
    },
    /// All ranks have loaded their starting state.
    Prepared {
        /// Training steps that the state has seen.
        step: u64,
    },
    /// A worker was removed from the members.
    WorkerLost {
        /// Its registration id.
        worker: WorkerId,
        /// Name of its slot.
        name: String,
        /// Role that it worked in.
        role: Role,
        /// How it ended, in words.
        why: String,
    },
    /// A draining worker holds nothing any more and is told to leave; its supervisor must not restart it. May be sent
    /// more than once.
    Drained {
        /// Name of the worker.
        name: String,
    },
    /// A message that the operator should read.
    Note(String),
    /// A message about the poison-pill search in training: the suspects were narrowed down, so the lost generation does
    /// not count as a failure.
    Narrowed(String),
    /// The run has ended.
    Ended(End),
}

/// Reason why a group is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dropped {
    /// One of its samples could not be verified within the budgets.
    NoVerdict,
    /// It ran out of `group_timeout` too often.
    Overdue,
    /// It has no contrast, and the next prompt replaces it.
    Uniform,
    /// Rollout workers died again and again while they held it.
    Deadly,
    /// Training fails whenever it is in the batch.
    Poisonous,
}

/// Successful answer to the caller of an event.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// Answers `Register` with the new member's id.
    Registered(WorkerId),
    /// Answers `Heartbeat` with the worker's next instruction.
    Directive(Directive),
    /// Answers `LeaseGroups`; empty when nothing can be leased now.
    Groups(Vec<GroupGrant>),
    /// Answers `LeaseSamples`; empty when nothing can be leased now.
    Samples(Vec<SampleGrant>),
    /// Answers `SubmitSample`, `SubmitVerdict` and `CompleteTask`. The driver keeps the payload only when `fresh`.
    Accepted {
        /// False for a repeat, and for a verdict that decides nothing about its sample.
        fresh: bool,
    },
    /// Answers `JoinGeneration`; `None` while no generation has formed.
    Joined(Option<Membership>),
    /// Answers `NextTask`; `None` while there is no task.
    Task(Option<TaskOrder>),
    /// Answers `Leave` and all other events.
    Done,
}

/// Instruction to a worker, sent with the answer to its heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Directive {
    /// Continue with the work at hand.
    Continue,
    /// Leave: the run is over.
    Leave,
    /// Everything that the worker held is saved or issued again, so a process that was asked to end may do so.
    LeaveForNow,
    /// The id is unknown: register again.
    Register,
    /// The process makes no progress: it must end and be restarted by its supervisor.
    Restart,
    /// Another process has taken over the name: this one must end and must not be restarted.
    Replaced,
}

/// A group leased to a rollout worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupGrant {
    /// Lease that its samples are submitted under.
    pub lease: LeaseId,
    /// The group to generate.
    pub group: GroupId,
    /// Whether the samples are for training or for an evaluation.
    pub purpose: Purpose,
    /// Training steps that the newest policy has seen.
    pub policy_step: u64,
    /// Samples that are still missing.
    pub samples: Vec<WantedSample>,
}

/// One sample for a rollout worker to generate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WantedSample {
    /// Position in the group, from 0.
    pub index: u32,
    /// Number of samples at this position that were given up as unverifiable; it selects the sampling noise.
    pub attempt: u32,
}

/// A sample leased to a verifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampleGrant {
    /// Lease that the verdict is submitted under.
    pub lease: LeaseId,
    /// The sample to verify.
    pub sample: SampleId,
}

/// A learner's rank in a generation, and what it starts from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Membership {
    /// Number of the generation.
    pub generation: Generation,
    /// Rank of this worker, from 0.
    pub rank: u32,
    /// Addresses for the collective, indexed by rank.
    pub addresses: Vec<String>,
    /// Step of the checkpoint to load; `None`: the model of the job spec.
    pub checkpoint: Option<u64>,
    /// Training steps that the starting state has seen.
    pub step: u64,
}

/// A task for one rank of the generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskOrder {
    /// Number of the task, never 0; a report names it.
    pub task: u64,
    /// The rank that it is for. 0 for a `Regroup`, which goes to any learner of an earlier generation.
    pub rank: u32,
    /// What the rank has to do.
    pub kind: TaskKind,
}

/// Work for a rank.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TaskKind {
    /// Load the starting state and publish its weights.
    Prepare,
    /// Train on the batch that was formed last.
    Train {
        /// The step being made, from 1.
        step: u64,
    },
    /// Save the training state.
    Save {
        /// Training steps done in that state.
        step: u64,
        /// Whether to export the model, too.
        model: bool,
        /// Whether to copy the state and write it while training continues.
        background: bool,
    },
    /// Leave the generation, which is over, and join the next one.
    Regroup {
        /// Why it ended, for the log.
        reason: String,
    },
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// All steps are made, and the model is exported.
    Finished,
    /// An operator stopped it; it can resume from the newest checkpoint.
    Stopped,
    /// It cannot continue.
    Failed {
        /// One sentence for the operator.
        reason: String,
    },
}
