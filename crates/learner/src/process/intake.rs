//! Receiving a batch from the coordinator in pieces.
//!
//! Each piece is checked and moved out of its message before the next one is requested, so the batch is in memory once.
//! A broken stream resumes after the last whole piece. A batch that contradicts itself ends the run, because a new
//! generation of learners would receive the same one.

use std::collections::HashMap;
use std::time::Duration;

use pacs_protocol::v1;
use pacs_runtime::{Meaning, Policy, meaning};
use tonic::{Code, Response, Status, Streaming};

use crate::error::BatchError;
use crate::update::{IndexEntry, SequenceTokens, TrainBatch};

/// Deadline for one piece; the coordinator reads a few megabytes at most for it.
const PIECE_DEADLINE: Duration = Duration::from_secs(60);

/// Why a batch was not received.
#[derive(Debug, thiserror::Error)]
pub(super) enum IntakeError {
    /// The batch is malformed, and would be so again.
    #[error(transparent)]
    Malformed(#[from] BatchError),
    /// One of its messages exceeds the size limit, and would do so again.
    #[error("the batch of step {step} cannot be delivered: {problem}")]
    TooLarge { step: u64, problem: String },
    /// The task no longer belongs to this rank.
    #[error("the batch of step {step} is no longer meant for this rank")]
    Withdrawn { step: u64 },
    /// The coordinator does not know this worker.
    #[error("the coordinator does not know this worker")]
    Unknown,
    /// No piece arrived within the caller's patience.
    #[error("receiving the batch of step {step}: no data for {waited} s: {problem}")]
    Silent { step: u64, waited: u64, problem: String },
}

/// Receives the batch of a task through streams that `open` opens. Failed streams are reopened until nothing has
/// arrived for `patience`.
pub(super) async fn receive<F>(
    open: impl Fn(v1::StreamBatchRequest) -> F,
    request: v1::StreamBatchRequest,
    task: &v1::TrainTask,
    rank: u32,
    patience: Duration,
) -> Result<TrainBatch, IntakeError>
where
    F: Future<Output = Result<Response<Streaming<v1::BatchPiece>>, Status>>,
{
    let step = task.step;
    let mut intake = Intake::new(task, rank)?;
    let policy = Policy::new("StreamBatch", PIECE_DEADLINE).patience(patience);
    let mut tries = policy.tries();
    loop {
        let before = intake.received();
        let (index_received, sequences_received) = before;
        let opened = open(v1::StreamBatchRequest { index_received, sequences_received, ..request });
        let problem = match take_stream(opened, &mut intake).await {
            Ok(()) => return Ok(intake.finish()),
            Err(Broken::Malformed(error)) => return Err(error.into()),
            Err(Broken::Silent) => format!("no piece within {} s", PIECE_DEADLINE.as_secs()),
            // A stream that ends without a piece and without an error has no more: every rank that asks would
            // see the same.
            Err(Broken::Early) if intake.received() == before => return Err(intake.short().into()),
            Err(Broken::Early) => "the stream ended early".to_owned(),
            Err(Broken::Refused(status)) => match status.code() {
                Code::FailedPrecondition => return Err(IntakeError::Withdrawn { step }),
                // tonic's status for a message above the size limit of either side.
                Code::OutOfRange => {
                    return Err(IntakeError::TooLarge { step, problem: status.message().to_owned() });
                }
                code => match meaning(code) {
                    Meaning::Gone | Meaning::OtherRun => return Err(IntakeError::Unknown),
                    Meaning::TryAgain | Meaning::Refused => status.message().to_owned(),
                },
            },
        };
        // Patience limits silence only: every piece that arrives restarts it.
        if intake.received() != before {
            tries = policy.tries();
        }
        if !tries.again("StreamBatch", &problem).await {
            return Err(IntakeError::Silent { step, waited: tries.waited().as_secs(), problem });
        }
    }
}

/// Why a stream ended before the batch was complete.
enum Broken {
    Malformed(BatchError),
    Refused(Status),
    Silent,
    Early,
}

/// Reads pieces from one stream until the batch is complete.
async fn take_stream(
    opened: impl Future<Output = Result<Response<Streaming<v1::BatchPiece>>, Status>>,
    intake: &mut Intake,
) -> Result<(), Broken> {
    let opened = tokio::time::timeout(PIECE_DEADLINE, opened).await;
    let mut pieces = opened.map_err(|_| Broken::Silent)?.map_err(Broken::Refused)?.into_inner();
    while !intake.is_whole() {
        let piece = tokio::time::timeout(PIECE_DEADLINE, pieces.message()).await;
        match piece.map_err(|_| Broken::Silent)?.map_err(Broken::Refused)? {
            Some(piece) => intake.take(piece).map_err(Broken::Malformed)?,
            None => return Err(Broken::Early),
        }
    }
    Ok(())
}

/// A batch that is being received.
#[derive(Debug)]
struct Intake {
    step: u64,
    rank: u32,
    /// Length that the index will have, as announced by the task.
    entries: u32,
    /// Number of sequences that this rank will have, as announced.
    own: u32,
    /// Total answer tokens of those sequences, as announced.
    tokens: u64,
    index: Vec<IndexEntry>,
    /// Positions of this rank's sequences in the index received so far.
    positions: Vec<u32>,
    /// Answer tokens of those sequences, by the index.
    own_tokens: u64,
    prompts: HashMap<u64, Vec<u32>>,
    /// Routes of those prompts that have some.
    prompt_routes: HashMap<u64, Vec<u8>>,
    sequences: Vec<SequenceTokens>,
}

impl Intake {
    fn new(task: &v1::TrainTask, rank: u32) -> Result<Self, BatchError> {
        let intake = Self {
            step: task.step,
            rank,
            entries: task.sequences,
            own: task.rank_sequences,
            tokens: task.rank_tokens,
            index: Vec::new(),
            positions: Vec::new(),
            own_tokens: 0,
            prompts: HashMap::new(),
            prompt_routes: HashMap::new(),
            sequences: Vec::new(),
        };
        match task.sequences {
            0 => intake.fail("it has no sequences"),
            all if task.rank_sequences > all => {
                intake.fail(format!("{} of its {all} sequences are this rank's", intake.own))
            }
            _ => Ok(intake),
        }
    }

    /// Counts the index entries and sequences received so far.
    fn received(&self) -> (u32, u32) {
        let count = |length: usize| u32::try_from(length).expect("no more than were announced");
        (count(self.index.len()), count(self.sequences.len()))
    }

    fn is_whole(&self) -> bool {
        self.received() == (self.entries, self.own)
    }

    fn take(&mut self, piece: v1::BatchPiece) -> Result<(), BatchError> {
        let v1::BatchPiece { index, prompts, sequences } = piece;
        if index.is_empty() && sequences.is_empty() {
            return self.fail("a piece of it is empty");
        }
        for entry in index {
            self.take_entry(entry)?;
        }
        if self.index.len() < self.entries as usize {
            return if sequences.is_empty() { Ok(()) } else { self.fail("sequences came before the whole index") };
        }
        if (self.positions.len(), self.own_tokens) != (self.own as usize, self.tokens) {
            let sequences = self.positions.len();
            let tokens = self.own_tokens;
            return self.fail(format!(
                "{} sequences of {} tokens were announced to rank {}, and its index gives it {sequences} of {tokens}",
                self.own, self.tokens, self.rank
            ));
        }
        for v1::GroupPrompt { group_id, mut tokens, routes } in prompts {
            tokens.shrink_to_fit();
            if tokens.is_empty() {
                return self.fail(format!("the prompt of group {group_id} is empty"));
            }
            if self.prompts.len() == self.own as usize || self.prompts.insert(group_id, tokens).is_some() {
                return self.fail(format!("the prompt of group {group_id} is one too many"));
            }
            if !routes.is_empty() {
                // A copy: what was decoded is a part of the whole message, which would stay for the step.
                self.prompt_routes.insert(group_id, routes.to_vec());
            }
        }
        sequences.into_iter().try_for_each(|sequence| self.take_sequence(sequence))
    }

    fn take_entry(&mut self, entry: v1::SequenceIndex) -> Result<(), BatchError> {
        let position = self.index.len();
        let at = |problem: &str| format!("entry {position} of its index {problem}");
        if position >= self.entries as usize {
            return self.fail(at("is one too many"));
        }
        let taken = IndexEntry {
            group: entry.group_id,
            sample: entry.sample_index,
            mini_batch: entry.mini_batch as usize,
            rank: entry.rank as usize,
            label: entry.label,
            reward: entry.reward,
            answer_tokens: entry.answer_tokens,
            truncated: entry.truncated,
            unit: entry.unit.map(|unit| unit as usize),
        };
        if self.index.last().is_some_and(|before| before.mini_batch > taken.mini_batch) {
            return self.fail(at("is not in mini-batch order"));
        }
        if !(0.0..=1.0).contains(&entry.label) || !entry.reward.is_finite() {
            return self.fail(at(&format!("has label {} and reward {}", entry.label, entry.reward)));
        }
        if entry.answer_tokens == 0 {
            return self.fail(at("has no tokens"));
        }
        if entry.rank == self.rank {
            self.positions.push(u32::try_from(position).expect("no more than were announced"));
            self.own_tokens += u64::from(entry.answer_tokens);
        }
        self.index.push(taken);
        Ok(())
    }

    fn take_sequence(&mut self, sequence: v1::SequenceData) -> Result<(), BatchError> {
        let v1::SequenceData { position, mut tokens, mut rollout_logprobs, mut sampled_logprobs, version, routes } =
            sequence;
        let at = |problem: &str| format!("sequence {position} {problem}");
        // Sequences have to arrive in order and once each; anything else is refused.
        if self.positions.get(self.sequences.len()) != Some(&position) {
            let expected = self.positions.get(self.sequences.len());
            let expected = expected.map_or("none".to_owned(), |position| format!("sequence {position}"));
            return self.fail(at(&format!("came to rank {} where {expected} was expected", self.rank)));
        }
        let entry = &self.index[position as usize];
        let lengths = [tokens.len(), rollout_logprobs.len()];
        let fits = lengths == [entry.answer_tokens as usize; 2];
        if !fits || !(sampled_logprobs.is_empty() || sampled_logprobs.len() == tokens.len()) {
            let [tokens, logprobs] = lengths;
            return self.fail(at(&format!(
                "has {tokens} tokens, {logprobs} and {} log-probs, and {} tokens in the index",
                sampled_logprobs.len(),
                entry.answer_tokens
            )));
        }
        if let Some(bad) = rollout_logprobs.iter().chain(&sampled_logprobs).find(|value| !value.is_finite()) {
            return self.fail(at(&format!("has a log-prob of {bad}")));
        }
        if !self.prompts.contains_key(&entry.group) {
            return self.fail(at(&format!("came before the prompt of group {}", entry.group)));
        }
        // Decoding repeated fields doubles their capacity as they grow; a batch stays for the whole step.
        tokens.shrink_to_fit();
        rollout_logprobs.shrink_to_fit();
        sampled_logprobs.shrink_to_fit();
        let (position, routes) = (position as usize, routes.to_vec());
        self.sequences.push(SequenceTokens { position, tokens, rollout_logprobs, sampled_logprobs, version, routes });
        Ok(())
    }

    fn finish(self) -> TrainBatch {
        let Self { step, index, prompts, prompt_routes, sequences, .. } = self;
        TrainBatch { step, index, prompts, prompt_routes, sequences }
    }

    /// Error for a stream that ended before the batch was complete.
    fn short(&self) -> BatchError {
        let ((entries, sequences), step) = (self.received(), self.step);
        let Self { entries: all, own, .. } = self;
        let problem = format!("{entries} of {all} entries and {sequences} of {own} sequences are all that comes");
        BatchError { step, problem }
    }

    fn fail<T>(&self, problem: impl Into<String>) -> Result<T, BatchError> {
        Err(BatchError { step: self.step, problem: problem.into() })
    }
}

#[cfg(test)]
mod tests;
