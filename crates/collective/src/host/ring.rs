//! Ring algorithms for `W` ranks. Every rank makes the same number of exchanges.

use std::ops::Range;

use bytemuck::Pod;

use super::link::{Call, Link, Receive};
use crate::error::Fault;

/// Message size of operations that cut their buffer into parts (bytes): what was received is still in cache when
/// it is added.
const CHUNK_BYTES: usize = 1 << 20;
/// Message size of a broadcast (bytes); small, so that ranks far down the ring start early.
const PIECE_BYTES: usize = 1 << 18;

/// An element type that can be summed over ranks.
pub(crate) trait Summand: Pod {
    fn plus(self, other: Self) -> Self;
}

impl Summand for f32 {
    fn plus(self, other: Self) -> Self {
        self + other
    }
}

impl Summand for i64 {
    fn plus(self, other: Self) -> Self {
        // Wrapping keeps the sum independent of the order of additions, even if a partial sum overflows.
        self.wrapping_add(other)
    }
}

/// A ring of at least two ranks.
#[derive(Debug)]
pub(crate) struct Ring {
    pub(crate) link: Link,
    pub(crate) rank: usize,
    pub(crate) world_size: usize,
}

impl Ring {
    /// A reduce-scatter and an all-gather, chunk by chunk, so that sums are still in cache when they are sent.
    pub(crate) fn all_reduce_sum<T: Summand>(&self, call: &Call, data: &mut [T]) -> Result<(), Fault> {
        if data.is_empty() {
            return self.barrier(call);
        }
        let parts = Parts::of(data, self.world_size);
        let mut incoming = vec![T::zeroed(); parts.longest_chunk()];
        // Both halves for one chunk before the next: the other order would read the whole buffer from memory twice.
        for chunk in 0..parts.chunks() {
            self.reduce_chunk(call, data, parts, chunk, &mut incoming)?;
            self.share_chunk(call, data, parts, chunk)?;
        }
        Ok(())
    }

    /// The first half of [`Ring::all_reduce_sum`], with the same additions in the same order.
    pub(crate) fn reduce_scatter_sum<T: Summand>(&self, call: &Call, data: &mut [T]) -> Result<(), Fault> {
        if data.is_empty() {
            return self.barrier(call);
        }
        let parts = Parts::of(data, self.world_size);
        let mut incoming = vec![T::zeroed(); parts.longest_chunk()];
        (0..parts.chunks()).try_for_each(|chunk| self.reduce_chunk(call, data, parts, chunk, &mut incoming))
    }

    /// The second half of [`Ring::all_reduce_sum`].
    pub(crate) fn all_gather(&self, call: &Call, data: &mut [u8]) -> Result<(), Fault> {
        if data.is_empty() {
            return self.barrier(call);
        }
        let parts = Parts::of(data, self.world_size);
        (0..parts.chunks()).try_for_each(|chunk| self.share_chunk(call, data, parts, chunk))
    }

    /// Part `p` starts at rank `p + 1`, collects the other ranks' numbers around the ring, and is complete at rank `p`.
    fn reduce_chunk<T: Summand>(
        &self,
        call: &Call,
        data: &mut [T],
        parts: Parts,
        chunk: usize,
        incoming: &mut [T],
    ) -> Result<(), Fault> {
        for step in 1..self.world_size {
            let outgoing = &data[parts.range(self.back(step), chunk)];
            let target = parts.range(self.back(step + 1), chunk);
            let incoming = &mut incoming[..target.len()];
            let receive = Receive::Bytes(bytemuck::cast_slice_mut(incoming));
            self.link.exchange(call, Some(bytemuck::cast_slice(outgoing)), receive)?;
            // Ours plus theirs, in the order of the ring: a part is summed once, at one rank after the other, so all ranks end with the
            // same bits.
            for (ours, theirs) in data[target].iter_mut().zip(incoming) {
                *ours = ours.plus(*theirs);
            }
        }
        Ok(())
    }

    /// Every rank forwards complete parts, beginning with its own.
    fn share_chunk<T: Pod>(&self, call: &Call, data: &mut [T], parts: Parts, chunk: usize) -> Result<(), Fault> {
        for step in 0..self.world_size - 1 {
            let ranges = [self.back(step), self.back(step + 1)].map(|part| parts.range(part, chunk));
            let [outgoing, target] = data.get_disjoint_mut(ranges).expect("different parts do not overlap");
            let receive = Receive::Bytes(bytemuck::cast_slice_mut(target));
            self.link.exchange(call, Some(bytemuck::cast_slice(outgoing)), receive)?;
        }
        Ok(())
    }

    /// Fills in the other ranks' entries of `blocks`; this rank's entry is set by the caller.
    pub(crate) fn all_gather_f64(&self, call: &Call, blocks: &mut [Vec<f64>]) -> Result<(), Fault> {
        for step in 0..self.world_size - 1 {
            let mut incoming = Vec::new();
            let outgoing = bytemuck::cast_slice(&blocks[self.back(step)]);
            self.link.exchange(call, Some(outgoing), Receive::Numbers(&mut incoming))?;
            blocks[self.back(step + 1)] = incoming;
        }
        Ok(())
    }

    /// A pipeline from the root to the rank before it: a rank forwards one piece while it receives the next.
    pub(crate) fn broadcast(&self, call: &Call, root: usize, data: &mut [u8]) -> Result<(), Fault> {
        let is_root = self.rank == root;
        let is_last = (self.rank + 1) % self.world_size == root;
        // An empty buffer is one empty piece, so that the ranks still synchronise.
        let pieces = data.len().div_ceil(PIECE_BYTES).max(1);
        let length = data.len();
        let start = |piece: usize| (piece * PIECE_BYTES).min(length);
        for piece in 0..=pieces {
            let (earlier, ahead) = data.split_at_mut(start(piece));
            let ahead = &mut ahead[..start(piece + 1) - start(piece)];
            if is_root && piece < pieces {
                self.link.exchange(call, Some(ahead), Receive::Nothing)?;
            } else if !is_root {
                let outgoing = (piece > 0 && !is_last).then(|| &earlier[start(piece - 1)..]);
                let receive = if piece < pieces { Receive::Bytes(ahead) } else { Receive::Nothing };
                self.link.exchange(call, outgoing, receive)?;
            }
        }
        Ok(())
    }

    /// After `k` exchanges a rank has heard, through its predecessors, from the `k` ranks before it.
    pub(crate) fn barrier(&self, call: &Call) -> Result<(), Fault> {
        // Around the ring, and not by a tree of fewer steps: the links to the two neighbours are the only connections there are.
        (1..self.world_size).try_for_each(|_| self.link.exchange(call, Some(&[]), Receive::Bytes(&mut [])))
    }

    /// Rank or part `steps` before this rank in the ring; `steps` is at most `2 W`.
    fn back(&self, steps: usize) -> usize {
        (self.rank + 2 * self.world_size - steps) % self.world_size
    }
}

/// A buffer divided into one part per rank, whose lengths differ by one at most, and the parts into chunks of
/// one message each.
#[derive(Clone, Copy, Debug)]
struct Parts {
    length: usize,
    world_size: usize,
    chunk_length: usize,
}

impl Parts {
    fn of<T>(data: &[T], world_size: usize) -> Self {
        Self { length: data.len(), world_size, chunk_length: CHUNK_BYTES / size_of::<T>() }
    }

    /// Number of chunks of the longest part.
    fn chunks(self) -> usize {
        self.length.div_ceil(self.world_size).div_ceil(self.chunk_length)
    }

    fn longest_chunk(self) -> usize {
        self.length.div_ceil(self.world_size).min(self.chunk_length)
    }

    /// Range of a chunk of a part; empty if the part has no such chunk.
    fn range(self, part: usize, chunk: usize) -> Range<usize> {
        let start = |part: usize| self.length * part / self.world_size;
        let end = start(part + 1);
        let at = |chunk: usize| (start(part) + chunk * self.chunk_length).min(end);
        at(chunk)..at(chunk + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_tile_the_buffer() {
        for (length, world_size, chunk_length) in [(1, 4, 3), (12, 4, 3), (13, 4, 3), (100, 3, 7), (99, 3, 33)] {
            let parts = Parts { length, world_size, chunk_length };
            let all = (0..world_size).flat_map(|part| (0..parts.chunks()).map(move |chunk| parts.range(part, chunk)));
            let covered: Vec<usize> =
                all.inspect(|range| assert!(range.len() <= parts.longest_chunk())).flatten().collect();
            assert!(covered.iter().copied().eq(0..length), "{parts:?}: {covered:?}");
        }
    }
}
