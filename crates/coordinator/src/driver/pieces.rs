//! Sends a rank's part of a batch in bounded messages; each sample is read from the disk when its message is built.

use std::sync::Arc;

use pacs_protocol::{MAX_MESSAGE_BYTES, v1};
use pacs_types::{GroupId, Sample, SampleId};
use prost::Message;

use super::batch::BatchContent;
use super::store::ContentError;

/// Size up to which a piece is filled, unless a single sequence with its prompt is larger. Encoding a piece
/// blocks a runtime thread for a fraction of a millisecond; pieces of 1 MiB to eight ranks at once delayed other
/// calls by tens of milliseconds.
const PIECE_BYTES: usize = 256 << 10;

/// What a rank has received of the stream already.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Received {
    /// Number of index entries.
    pub(crate) index: u32,
    /// Number of the rank's sequences.
    pub(crate) sequences: u32,
}

/// Stream of one rank's pieces: the whole index, then its sequences, with the prompt at the first one of a group.
pub(crate) struct Pieces {
    content: Arc<BatchContent>,
    prompt: Box<dyn Fn(GroupId) -> Vec<u32> + Send>,
    /// Number of index entries sent.
    index: usize,
    /// Index positions of the rank's sequences.
    positions: Vec<u32>,
    /// Number of sequences sent.
    sequences: usize,
    /// Bytes of the routes of one token; 0 where none are recorded.
    route_bytes: usize,
}

/// A sample of the batch whose content cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{sample}: {error}")]
pub(crate) struct Lost {
    pub(crate) sample: SampleId,
    pub(crate) error: ContentError,
}

impl Pieces {
    /// The pieces that `rank` has not received; `None` when it claims more than there are.
    pub(crate) fn new(
        content: Arc<BatchContent>,
        rank: u32,
        received: Received,
        route_bytes: usize,
        prompt: impl Fn(GroupId) -> Vec<u32> + Send + 'static,
    ) -> Option<Self> {
        let positions: Vec<u32> =
            (0..).zip(&content.index).filter(|(_, entry)| entry.rank == rank).map(|(position, _)| position).collect();
        let (index, sequences) = (received.index as usize, received.sequences as usize);
        let is_sound = index <= content.index.len() && sequences <= positions.len();
        is_sound.then(|| Self { content, prompt: Box::new(prompt), index, positions, sequences, route_bytes })
    }

    fn index_piece(&mut self) -> v1::BatchPiece {
        let mut bytes = 0;
        let fits = |entry: &&v1::SequenceIndex| {
            bytes += entry.encoded_len() + FIELD_BYTES;
            bytes <= PIECE_BYTES
        };
        let index: Vec<_> = self.content.index[self.index..].iter().take_while(fits).cloned().collect();
        self.index += index.len();
        v1::BatchPiece { index, ..Default::default() }
    }

    fn sequences_piece(&mut self) -> Result<v1::BatchPiece, Lost> {
        let mut piece = v1::BatchPiece::default();
        let mut bytes = 0;
        while let Some(position) = self.positions.get(self.sequences) {
            let entry = &self.content.index[*position as usize];
            let before = self.sequences.checked_sub(1).map(|before| self.positions[before] as usize);
            let is_first = before.is_none_or(|before| self.content.index[before].group_id != entry.group_id);
            let group = GroupId(entry.group_id);
            let mut prompt = is_first.then(|| v1::GroupPrompt {
                group_id: group.0,
                tokens: (self.prompt)(group),
                ..v1::GroupPrompt::default()
            });
            let prompt_bytes = prompt
                .as_ref()
                .map_or(0, |prompt| prompt.encoded_len() + FIELD_BYTES + prompt.tokens.len() * self.route_bytes);
            // An upper bound, to avoid reading a sample that does not fit. Most samples take less.
            let most = entry.answer_tokens as usize * (MOST_BYTES_PER_TOKEN + self.route_bytes) + prompt_bytes;
            if bytes > 0 && bytes + most > PIECE_BYTES {
                break;
            }
            let mut content = self.sample(*position as usize)?;
            let routes = self.split_off_answer(&mut content);
            if let Some(prompt) = prompt.as_mut().filter(|_| self.route_bytes > 0) {
                prompt.routes = self.prompt_routes(*position as usize, content.routes)?.into();
            }
            let sequence = v1::SequenceData {
                position: *position,
                tokens: content.tokens,
                rollout_logprobs: content.logprobs,
                sampled_logprobs: content.sampled_logprobs,
                version: content.version.0,
                routes: routes.into(),
            };
            bytes += sequence.encoded_len() + FIELD_BYTES + prompt_bytes;
            piece.prompts.extend(prompt);
            piece.sequences.push(sequence);
            self.sequences += 1;
        }
        debug_assert!(piece.encoded_len() <= MAX_MESSAGE_BYTES, "a sample and a prompt are bounded at the door");
        Ok(piece)
    }

    /// Reads the sample of an index entry.
    fn sample(&self, position: usize) -> Result<Sample, Lost> {
        let entry = &self.content.index[position];
        let sample = SampleId { group: GroupId(entry.group_id), index: entry.sample_index };
        self.content.samples[position].content().map_err(|error| Lost { sample, error })
    }

    /// Takes the routes of the answer out of a sample, and leaves those of its prompt.
    fn split_off_answer(&self, sample: &mut Sample) -> Vec<u8> {
        let of_answer = (sample.tokens.len() - 1) * self.route_bytes;
        sample.routes.split_off(sample.routes.len().saturating_sub(of_answer))
    }

    /// Routes of the prompt of the group whose sequence is at `position`: those that its first sample recorded, on any rank, so
    /// that the prompt is computed by the same experts everywhere. `own` are those of the sequence itself.
    ///
    /// The samples of a group have different ones only where its prompt was computed several times: by several workers, or before and
    /// after an update of the weights.
    fn prompt_routes(&self, position: usize, own: Vec<u8>) -> Result<Vec<u8>, Lost> {
        let group = self.content.index[position].group_id;
        let before = self.content.index[..position].iter().rev().take_while(|entry| entry.group_id == group).count();
        if before == 0 {
            return Ok(own);
        }
        let mut first = self.sample(position - before)?;
        self.split_off_answer(&mut first);
        Ok(first.routes)
    }
}

/// Bytes for tag and length of a list element that is a message.
const FIELD_BYTES: usize = 6;
/// Upper bound per token: an id of up to 28 bits and two log-probs.
const MOST_BYTES_PER_TOKEN: usize = 4 + 4 + 4;

impl Iterator for Pieces {
    type Item = Result<v1::BatchPiece, Lost>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.index < self.content.index.len() {
            return Some(Ok(self.index_piece()));
        }
        (self.sequences < self.positions.len()).then(|| self.sequences_piece())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use pacs_types::{FinishReason, LeaseId, VersionSpan, WeightVersion};

    use super::*;
    use crate::driver::KeptSample;
    use crate::journal::{Frame, FrameKey, write_frames};

    /// A batch of groups of two samples with these lengths, whose content is on disk; every third sequence is rank 1's.
    fn batch(folder: &std::path::Path, tokens: &[u32]) -> Arc<BatchContent> {
        let mut content = BatchContent::default();
        let mut frames = Vec::new();
        for (position, &tokens) in (0u32..).zip(tokens) {
            let (group, index) = (GroupId(u64::from(position) / 2), position % 2);
            let sample = Sample {
                tokens: (0..tokens).map(|token| 100_000 + token).collect(),
                logprobs: vec![-0.5; tokens as usize],
                sampled_logprobs: vec![-0.25; tokens as usize],
                entropy_sum: 1.0,
                text: format!("answer {position}"),
                finish: FinishReason::Stop,
                version: WeightVersion(6),
                spans: vec![VersionSpan { version: WeightVersion(6), tokens }],
                // Two bytes a token: the prompt's are named after the sample, the answer's after the group.
                routes: [vec![100 + position as u8; 2 * 3], vec![group.0 as u8; 2 * (tokens as usize - 1)]].concat(),
            };
            let key = FrameKey::Sample(SampleId { group, index }, LeaseId(1));
            let frame = Frame::new(key, v1::Sample::from(sample.clone()).encode_to_vec());
            content.samples.push(KeptSample::new(&sample, frame.stored()));
            content.index.push(v1::SequenceIndex {
                group_id: group.0,
                sample_index: index,
                rank: u32::from(position % 3 == 2),
                answer_tokens: tokens,
                ..Default::default()
            });
            frames.push((1, frame));
        }
        write_frames(folder, &frames).unwrap();
        Arc::new(content)
    }

    fn pieces(content: &Arc<BatchContent>, rank: u32, received: Received) -> Pieces {
        let prompt = |group: GroupId| vec![group.0 as u32; 3];
        Pieces::new(Arc::clone(content), rank, received, 2, prompt).expect("it is there")
    }

    #[test]
    fn every_rank_gets_the_whole_index_and_each_of_its_sequences_once_in_bounded_messages() {
        let folder = tempfile::tempdir().unwrap();
        // Some exceed the size that a piece is filled up to.
        let lengths = [3, 20_000, 250_000, 1, 40_000, 40_000, 40_000, 200_000, 5, 6, 7, 40_000];
        let content = batch(folder.path(), &lengths);
        let mut seen = Vec::new();
        for rank in 0..2 {
            let (mut index, mut prompts) = (Vec::new(), BTreeSet::new());
            for piece in pieces(&content, rank, Received::default()) {
                let piece = piece.unwrap();
                let alone = piece.sequences.len() == 1;
                assert!(alone || piece.encoded_len() <= PIECE_BYTES, "{} bytes", piece.encoded_len());
                assert!(!(piece.index.is_empty() && piece.sequences.is_empty()), "no piece is empty");
                assert!(piece.sequences.is_empty() || index.len() == lengths.len(), "the index comes first");
                index.extend(piece.index);
                for prompt in piece.prompts {
                    assert_eq!(prompt.tokens, [prompt.group_id as u32; 3]);
                    // The first sample of a group has twice the group's number as position.
                    assert_eq!(prompt.routes, vec![100 + 2 * prompt.group_id as u8; 2 * 3], "on any rank");
                    assert!(prompts.insert(prompt.group_id), "a prompt comes once");
                }
                for data in piece.sequences {
                    let entry = &index[data.position as usize];
                    assert_eq!((entry.rank, entry.answer_tokens as usize), (rank, data.tokens.len()));
                    assert!(prompts.contains(&entry.group_id), "no later than its first sequence");
                    assert_eq!((data.rollout_logprobs[0], data.sampled_logprobs[0], data.version), (-0.5, -0.25, 6));
                    assert_eq!(data.routes, vec![entry.group_id as u8; 2 * (data.tokens.len() - 1)]);
                    seen.push(data.position);
                }
            }
            assert_eq!(index, content.index);
        }
        seen.sort_unstable();
        assert!(seen.into_iter().eq(0..lengths.len() as u32));
    }

    #[test]
    fn a_stream_is_resumed_wherever_it_broke() {
        let folder = tempfile::tempdir().unwrap();
        let content = batch(folder.path(), &[30_000, 30_000, 60_000, 10, 60_000, 20, 30]);
        let whole: Vec<v1::BatchPiece> = pieces(&content, 0, Received::default()).collect::<Result<_, _>>().unwrap();
        assert!(whole.len() >= 3, "{} pieces", whole.len());
        let flat = |pieces: &[v1::BatchPiece]| -> (Vec<u32>, Vec<u64>) {
            let positions = pieces.iter().flat_map(|piece| piece.sequences.iter().map(|data| data.position)).collect();
            let prompts = pieces.iter().flat_map(|piece| piece.prompts.iter().map(|prompt| prompt.group_id)).collect();
            (positions, prompts)
        };
        for broken in 0..=whole.len() {
            let (before, _) = whole.split_at(broken);
            let received = Received {
                index: before.iter().map(|piece| piece.index.len() as u32).sum(),
                sequences: before.iter().map(|piece| piece.sequences.len() as u32).sum(),
            };
            let rest: Vec<_> = pieces(&content, 0, received).collect::<Result<_, _>>().unwrap();
            let all: Vec<_> = before.iter().chain(&rest).cloned().collect();
            assert_eq!(flat(&all), flat(&whole), "broken after {broken} pieces");
        }
        let too_many = Received { index: 0, sequences: 100 };
        assert!(Pieces::new(content, 0, too_many, 0, |_| Vec::new()).is_none());
    }

    #[test]
    fn a_damaged_sample_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let content = batch(folder.path(), &[10, 10, 10, 10]);
        for entry in std::fs::read_dir(folder.path()).unwrap() {
            let path = entry.unwrap().path();
            let mut bytes = std::fs::read(&path).unwrap();
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
            std::fs::write(path, bytes).unwrap();
        }
        let lost: Vec<Lost> = pieces(&content, 0, Received::default()).filter_map(Result::err).take(1).collect();
        assert_eq!(lost[0].sample, SampleId { group: GroupId(1), index: 1 });
        assert!(lost[0].error.is_damage(), "{}", lost[0]);
    }
}
