use pacs_types::{Generation, GroupId, LeaseId, Purpose, Role, SampleId, WorkerId};

use serde::{Deserialize, Serialize};

use crate::{PhaseKind, Record, Refusal, Snapshot};

/// What the caller of an event is told.
pub type Answer = Result<Reply, Refusal>;

/// What comes of one event.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// The event, if it changed anything that others may rely on: durable before the answer or an effect is seen by them.
    pub record: Option<Record>,
    /// For the caller of the event.
    pub answer: Answer,
    /// What the driver has to do, in order.
    pub effects: Vec<Effect>,
}

/// Something that the driver has to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// The phase has changed.
    Phase(PhaseKind),
    /// Forget the samples and verdicts of a group that was dropped.
    DropGroup {
        /// The group.
        group: GroupId,
        /// Why.
        why: Dropped,
    },
    /// Forget the samples and verdicts of an evaluation that is given up.
    ForgetEvaluation(Vec<GroupId>),
    /// Forget the samples and verdicts of a group that is generated anew.
    RestartGroup(GroupId),
    /// Forget a sample that no verdict could be had for; another one takes its place.
    ReplaceSample(SampleId),
    /// Form the tasks of this batch; the groups are complete, in order of id.
    Train {
        /// The step being made.
        step: u64,
        /// Its groups.
        groups: Vec<GroupId>,
        /// Groups of the step that the learner does not get, because their labels are all the same.
        left_out: Vec<GroupId>,
        /// Ranks to share them among.
        ranks: u32,
        /// How many versions behind the newest weights the oldest token of the step is.
        lag: u64,
    },
    /// All ranks have made the step; archive the batch and forget its groups.
    StepDone {
        /// Training steps done.
        step: u64,
    },
    /// An evaluation round is complete; archive it and forget its groups.
    Evaluated {
        /// Training steps that the policy has seen.
        step: u64,
        /// The measured groups, in order of id.
        groups: Vec<GroupId>,
        /// Problems left out because no verdict could be had.
        excluded: u32,
    },
    /// Make an empty folder for the ranks' files. Their task is not handed out before it is there; a failure is an event.
    CreateCheckpoint {
        /// Training steps done.
        step: u64,
        /// The task that asks for it, which the folder is named after: whoever still writes for an earlier one does not
        /// write there.
        save: u64,
    },
    /// Make the folder a checkpoint (manifest, sync, rename), then report an event.
    CommitCheckpoint {
        /// Where the job stands.
        snapshot: Snapshot,
        /// The folder holds the exported model.
        model: bool,
        /// The task that asked for it.
        save: u64,
    },
    /// Everything after this point is undone: truncate the records.
    Rewound {
        /// The step that the job stands at.
        step: u64,
        /// Groups to forget: those of undone steps, and those with tokens of undone weights.
        forgotten: Vec<GroupId>,
    },
    /// A generation of learners begins.
    GenerationFormed {
        /// Its number.
        generation: Generation,
        /// Names by rank.
        names: Vec<String>,
    },
    /// All ranks have loaded their state.
    Prepared {
        /// Training steps that it has seen.
        step: u64,
    },
    /// A worker is gone.
    WorkerLost {
        /// Its registration.
        worker: WorkerId,
        /// Its slot.
        name: String,
        /// What it did.
        role: Role,
        /// How it went.
        why: String,
    },
    /// A worker that was to be drained holds nothing any more and is told to leave: it is not to be started again. May
    /// come more than once.
    Drained {
        /// Its slot.
        name: String,
    },
    /// Something that the operator should read.
    Note(String),
    /// Likewise: the search for the group that training fails by has come further, so learners do not die in vain.
    Narrowed(String),
    /// The run is over.
    Ended(End),
}

/// Why a group is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dropped {
    /// No verdict could be had for one of its samples.
    NoVerdict,
    /// It was not done in time, again and again.
    Overdue,
    /// Its labels are all the same, and the next prompt takes its place.
    Uniform,
    /// Its workers died again and again.
    Deadly,
    /// Training fails with it.
    Poisonous,
}

/// Answer to the caller of an event.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// To `Register`.
    Registered(WorkerId),
    /// To `Heartbeat`.
    Directive(Directive),
    /// To `LeaseGroups`; empty: ask again.
    Groups(Vec<GroupGrant>),
    /// To `LeaseSamples`; empty: ask again.
    Samples(Vec<SampleGrant>),
    /// To `SubmitSample`, `SubmitVerdict` and `CompleteTask`: taken. Keep what came with it when `fresh`.
    Accepted {
        /// False for a repeat, and for a verdict that says nothing about its sample.
        fresh: bool,
    },
    /// To `JoinGeneration`; none: ask again.
    Joined(Option<Membership>),
    /// To `NextTask`; none: ask again.
    Task(Option<TaskOrder>),
    /// To `Leave` and the rest.
    Done,
}

/// What a worker should do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Directive {
    /// Go on.
    Continue,
    /// The run is over.
    Leave,
    /// What it held is saved or issued again: the process that was asked to end may do so.
    LeaveForNow,
    /// Unknown: register again.
    Register,
    /// Nothing comes of what the process does: it is to end, and to be started again.
    Restart,
    /// Another process has the name: this one is to end, and not to be started again.
    Replaced,
}

/// A group on loan to a rollout worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupGrant {
    /// The loan.
    pub lease: LeaseId,
    /// The group.
    pub group: GroupId,
    /// What it is for.
    pub purpose: Purpose,
    /// Training steps that the policy has seen.
    pub policy_step: u64,
    /// Samples that are still missing.
    pub samples: Vec<WantedSample>,
}

/// One sample that a rollout worker has to generate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WantedSample {
    /// Its position in the group.
    pub index: u32,
    /// How many samples were given up in this place because no verdict could be had; each has noise of its own.
    pub attempt: u32,
}

/// A sample on loan to a verifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampleGrant {
    /// The loan.
    pub lease: LeaseId,
    /// The sample.
    pub sample: SampleId,
}

/// A place in a generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Membership {
    /// The generation.
    pub generation: Generation,
    /// The worker's rank.
    pub rank: u32,
    /// Collective addresses by rank.
    pub addresses: Vec<String>,
    /// Step of the checkpoint to start from; none: the model of the job spec.
    pub checkpoint: Option<u64>,
    /// Training steps that the starting state has seen.
    pub step: u64,
}

/// A task for one rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskOrder {
    /// Its number, never 0.
    pub task: u64,
    /// The rank that it is for (0 for a `Regroup`, which has none).
    pub rank: u32,
    /// What to do.
    pub kind: TaskKind,
}

/// What a rank has to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TaskKind {
    /// Load the starting state and publish its weights.
    Prepare,
    /// Make a training step of the batch that was formed last.
    Train {
        /// The step being made.
        step: u64,
    },
    /// Write the training state.
    Save {
        /// Training steps done.
        step: u64,
        /// Export the model too.
        model: bool,
        /// Capture the state, and write it while training goes on.
        background: bool,
    },
    /// The generation is over; join the next.
    Regroup {
        /// Why.
        reason: String,
    },
}

/// How a run ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// All steps are made, and the model is exported.
    Finished,
    /// The operator stopped it; the newest checkpoint is where it stands.
    Stopped,
    /// It cannot go on.
    Failed {
        /// One sentence for the operator.
        reason: String,
    },
}
