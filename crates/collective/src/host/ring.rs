//! The algorithms. `W` ranks; every rank does the same number of exchanges.

use std::ops::Range;

use super::link::{Call, Link, Receive};
use crate::error::Fault;

/// Numbers in one message of an all-reduce: 1 MiB, so that what was received is still in the cache when it is added.
const CHUNK_NUMBERS: usize = 1 << 18;
/// Bytes in one message of a broadcast; small enough that the ranks down the ring start early.
const PIECE_BYTES: usize = 1 << 18;

/// A ring of at least two ranks.
#[derive(Debug)]
pub(crate) struct Ring {
    pub(crate) link: Link,
    pub(crate) rank: usize,
    pub(crate) world_size: usize,
}

impl Ring {
    pub(crate) fn all_reduce_sum(&self, call: &Call, data: &mut [f32]) -> Result<(), Fault> {
        if data.is_empty() {
            return self.barrier(call);
        }
        let mut incoming = vec![0.0; data.len().div_ceil(self.world_size).min(CHUNK_NUMBERS)];
        for segment in data.chunks_mut(CHUNK_NUMBERS * self.world_size) {
            self.reduce_scatter(call, segment, &mut incoming)?;
            self.share_chunks(call, segment)?;
        }
        Ok(())
    }

    /// Chunk `c` starts at rank `c` and collects the other ranks' numbers on its way around: it is complete, and the
    /// same for everybody, at rank `c - 1`.
    fn reduce_scatter(&self, call: &Call, segment: &mut [f32], incoming: &mut [f32]) -> Result<(), Fault> {
        for step in 0..self.world_size - 1 {
            let outgoing = &segment[self.chunk(segment.len(), self.back(step))];
            let target = self.chunk(segment.len(), self.back(step + 1));
            let incoming = &mut incoming[..target.len()];
            let receive = Receive::Bytes(bytemuck::cast_slice_mut(incoming));
            self.link.exchange(call, Some(bytemuck::cast_slice(outgoing)), receive)?;
            for (ours, theirs) in segment[target].iter_mut().zip(incoming) {
                *ours += *theirs;
            }
        }
        Ok(())
    }

    /// Every rank passes on complete chunks, beginning with the one that was completed here.
    fn share_chunks(&self, call: &Call, segment: &mut [f32]) -> Result<(), Fault> {
        for step in 0..self.world_size - 1 {
            let ranges = [self.back(step + self.world_size - 1), self.back(step)];
            let ranges = ranges.map(|chunk| self.chunk(segment.len(), chunk));
            let [outgoing, target] = segment.get_disjoint_mut(ranges).expect("different chunks do not overlap");
            let receive = Receive::Bytes(bytemuck::cast_slice_mut(target));
            self.link.exchange(call, Some(bytemuck::cast_slice(outgoing)), receive)?;
        }
        Ok(())
    }

    /// Fills in the other ranks' entries of `blocks`; this rank's own is there.
    pub(crate) fn all_gather(&self, call: &Call, blocks: &mut [Vec<f64>]) -> Result<(), Fault> {
        for step in 0..self.world_size - 1 {
            let mut incoming = Vec::new();
            let outgoing = bytemuck::cast_slice(&blocks[self.back(step)]);
            self.link.exchange(call, Some(outgoing), Receive::Numbers(&mut incoming))?;
            blocks[self.back(step + 1)] = incoming;
        }
        Ok(())
    }

    /// A pipeline from the root to the rank before it: a rank passes on one piece while it receives the next.
    pub(crate) fn broadcast(&self, call: &Call, root: usize, data: &mut [u8]) -> Result<(), Fault> {
        let is_root = self.rank == root;
        let is_last = (self.rank + 1) % self.world_size == root;
        // An empty buffer is one empty piece: the ranks still meet.
        let pieces = data.len().div_ceil(PIECE_BYTES).max(1);
        let length = data.len();
        let start = |piece: usize| (piece * PIECE_BYTES).min(length);
        for piece in 0..=pieces {
            let (behind, ahead) = data.split_at_mut(start(piece));
            let ahead = &mut ahead[..start(piece + 1) - start(piece)];
            if is_root && piece < pieces {
                self.link.exchange(call, Some(ahead), Receive::Nothing)?;
            } else if !is_root {
                let outgoing = (piece > 0 && !is_last).then(|| &behind[start(piece - 1)..]);
                let receive = if piece < pieces { Receive::Bytes(ahead) } else { Receive::Nothing };
                self.link.exchange(call, outgoing, receive)?;
            }
        }
        Ok(())
    }

    /// After `k` exchanges a rank has heard, through its predecessors, of the `k` ranks before it.
    pub(crate) fn barrier(&self, call: &Call) -> Result<(), Fault> {
        (1..self.world_size).try_for_each(|_| self.link.exchange(call, Some(&[]), Receive::Bytes(&mut [])))
    }

    /// The rank, or chunk, that lies `steps` before this rank, at most `2 W`.
    fn back(&self, steps: usize) -> usize {
        (self.rank + 2 * self.world_size - steps) % self.world_size
    }

    /// Where chunk `index` of `W` lies in a segment of `length` numbers.
    fn chunk(&self, length: usize, index: usize) -> Range<usize> {
        length * index / self.world_size..length * (index + 1) / self.world_size
    }
}
