use pacs_types::{Generation, LeaseId, Outcome, Role, SampleId, WeightVersion, WorkerId};

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A worker process wants to be a member.
    Register {
        /// What it does.
        role: Role,
        /// Name of its slot; replaces the member of that name.
        name: String,
        /// Where it runs.
        host: String,
        /// Its process id there.
        pid: u32,
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
    },
    /// A rollout worker hands in a sample.
    SubmitSample {
        /// Who.
        worker: WorkerId,
        /// The loan that it answers.
        lease: LeaseId,
        /// Which sample.
        sample: SampleId,
        /// The weights that generated it.
        version: WeightVersion,
    },
    /// A verifier wants samples.
    LeaseSamples {
        /// Who.
        worker: WorkerId,
        /// At most so many.
        max_samples: u32,
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
        label: f64,
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
    /// The operator wants the run to save and end.
    StopRequested,
    /// Time has passed.
    Tick,
}

/// How a rank's task ended.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// The rank's files are written.
    Saved,
    /// The task failed.
    Failed {
        /// Why.
        message: String,
        /// Trying again cannot help.
        permanent: bool,
    },
}
