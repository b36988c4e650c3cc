//! Layer hooks of a pass: all-gather sharded weights before a bucket uses them, reduce its gradients once they are
//! complete. Both overlap with the computation of other buckets.

use pacs_model::LayerHooks;
use pacs_shape::{Bucket, Division, ParameterLayout, Sharding, WINDOWS};
use pacs_torch::tch::Tensor;

use super::queue::{CollectiveQueue, Exchange, Pending};
use super::segment::part;
use crate::error::TrainError;

/// Buffers that gathered weights take turns in: one for the embedding, one for each layer window, one for the final
/// norm and the head.
const PLACES: usize = WINDOWS + 2;

/// Which weights a pass uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// The weights being trained.
    Policy,
    /// The frozen copy that serves as reference or old policy.
    Reference,
}

/// What happens to the gradients after a backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    /// They accumulate: another backward of this update follows.
    Accumulate,
    /// They are complete and are reduced over the ranks.
    Reduce,
}

/// Which bucket's weights each buffer holds, or is about to receive.
#[derive(Debug, Default)]
pub(crate) struct GatheredBuckets {
    places: [Option<Content>; PLACES],
}

#[derive(Debug)]
struct Content {
    source: Source,
    bucket: usize,
    arriving: Option<Pending>,
}

impl GatheredBuckets {
    /// Invalidates everything gathered from `source`, whose weights have changed.
    pub(crate) fn forget(&mut self, source: Source) {
        for place in &mut self.places {
            if place.as_ref().is_some_and(|content| content.source == source) {
                *place = None;
            }
        }
    }
}

/// This rank's weight shard and the buffers that it is gathered into.
#[derive(Debug)]
pub(crate) struct Windows<'a> {
    pub(crate) source: Source,
    /// This rank's part of the weights, in the sharded layout.
    pub(crate) shard: &'a Tensor,
    /// Buffers that hold one gathered bucket each; the model computes with views of them.
    pub(crate) flat: &'a Tensor,
    /// Where reduced gradients of this rank accumulate; `None` where gradients are not sharded.
    pub(crate) gradient_shard: Option<&'a Tensor>,
    pub(crate) held: &'a mut GatheredBuckets,
}

/// The layer hooks of one pass.
#[derive(Debug)]
pub(crate) struct ShardHooks<'a, 'w> {
    division: Division,
    /// Layout that the model computes in; with windows, layers share their places.
    layout: &'a ParameterLayout,
    /// Layout in which every bucket divides evenly among the ranks.
    divided: &'a ParameterLayout,
    windows: Option<Windows<'a>>,
    /// What happens to gradients after the backward of a bucket, and their buffer; `None` in a forward.
    gradients: Option<(Flow, &'a Tensor)>,
    /// Gradient reductions in flight, by bucket.
    leaving: Vec<Option<Pending>>,
    queue: &'a mut CollectiveQueue<'w>,
}

impl<'a, 'w> ShardHooks<'a, 'w> {
    pub(crate) fn new(
        division: Division,
        layout: &'a ParameterLayout,
        divided: &'a ParameterLayout,
        windows: Option<Windows<'a>>,
        gradients: Option<(Flow, &'a Tensor)>,
        queue: &'a mut CollectiveQueue<'w>,
    ) -> Self {
        let leaving = divided.buckets().iter().map(|_| None).collect();
        Self { division, layout, divided, windows, gradients, leaving, queue }
    }

    /// Waits until every gradient of the pass has been reduced.
    pub(crate) fn finish(mut self) -> Result<(), TrainError> {
        (0..self.leaving.len()).try_for_each(|bucket| self.wait_for_gradient(bucket))
    }

    fn wait_for_gradient(&mut self, bucket: usize) -> Result<(), TrainError> {
        self.leaving[bucket].take().map_or(Ok(()), |pending| self.queue.wait(pending).map(|_| ()))
    }

    /// Waits for the weights of `bucket` and prefetches those of `next`.
    fn ensure_gathered(&mut self, bucket: usize, next: Option<usize>) -> Result<(), TrainError> {
        if self.windows.is_none() {
            return Ok(());
        }
        self.prefetch(bucket);
        // A bucket of the same window would overwrite the weights that are about to be used.
        if let Some(next) = next.filter(|next| self.place(*next) != self.place(bucket)) {
            self.prefetch(next);
        }
        let place = self.place(bucket);
        let Some(windows) = &mut self.windows else { return Ok(()) };
        // Nothing was sent for where the bucket is empty, as those of adapters at both ends.
        let Some(content) = windows.held.places[place].as_mut() else { return Ok(()) };
        content.arriving.take().map_or(Ok(()), |pending| self.queue.wait(pending).map(|_| ()))
    }

    fn prefetch(&mut self, bucket: usize) {
        let place = self.place(bucket);
        let target = self.layout.buckets()[bucket];
        let own = self.own(bucket);
        let Some(windows) = &mut self.windows else { return };
        let wanted = |content: &&Content| content.source == windows.source && content.bucket == bucket;
        if target.room > 0 && windows.held.places[place].as_ref().filter(wanted).is_none() {
            let buffer = part(windows.flat, target.offset, target.room);
            let mine = Some(part(windows.shard, own.0, own.1));
            let arriving = Some(self.queue.submit(Exchange::AllGather { buffer, part: mine }));
            windows.held.places[place] = Some(Content { source: windows.source, bucket, arriving });
        }
    }

    /// Buffer that the weights of a bucket are gathered into.
    fn place(&self, bucket: usize) -> usize {
        match bucket {
            0 => 0,
            last if last == self.divided.buckets().len() - 1 => PLACES - 1,
            layer => 1 + (layer - 1) % WINDOWS,
        }
    }

    /// First element and length of this rank's part of a bucket, in its shards.
    fn own(&self, bucket: usize) -> (usize, usize) {
        let Bucket { offset, room, .. } = self.divided.buckets()[bucket];
        (offset / self.division.parts(), room / self.division.parts())
    }
}

impl LayerHooks for ShardHooks<'_, '_> {
    type Error = TrainError;

    fn before_forward(&mut self, bucket: usize) -> Result<(), TrainError> {
        let next = Some(bucket + 1).filter(|next| *next < self.divided.buckets().len());
        self.ensure_gathered(bucket, next)
    }

    fn before_backward(&mut self, bucket: usize) -> Result<(), TrainError> {
        self.ensure_gathered(bucket, bucket.checked_sub(1))?;
        let is_layer = (1..self.divided.buckets().len() - 1).contains(&bucket);
        if let (Some(_), Some((_, gradients)), true) = (&self.windows, self.gradients, is_layer) {
            // The layer that used this window before; its gradients must be out of the buffer first.
            if bucket + WINDOWS < self.leaving.len() - 1 {
                self.wait_for_gradient(bucket + WINDOWS)?;
            }
            let window = self.layout.buckets()[bucket];
            let _ = part(gradients, window.offset, window.room).zero_();
        }
        Ok(())
    }

    fn after_backward(&mut self, bucket: usize) -> Result<(), TrainError> {
        let Some((flow, gradients)) = self.gradients else { return Ok(()) };
        let place = self.layout.buckets()[bucket];
        if place.room == 0 {
            return Ok(());
        }
        let buffer = part(gradients, place.offset, place.room);
        let exchange = match (self.division.sharding, flow) {
            // Another layer reuses the window, so gradients leave even if another pass of this update follows.
            (Sharding::ShardAll, _) => {
                let (start, len) = self.own(bucket);
                let shard = self.windows.as_ref().and_then(|windows| windows.gradient_shard);
                Exchange::ReduceScatter { buffer, sum: shard.map(|shard| part(shard, start, len)) }
            }
            (_, Flow::Accumulate) => return Ok(()),
            (Sharding::Replicated, Flow::Reduce) => Exchange::AllReduce(buffer),
            (Sharding::ShardOptimizer, Flow::Reduce) => Exchange::ReduceScatter { buffer, sum: None },
        };
        self.leaving[bucket] = Some(self.queue.submit(exchange));
        Ok(())
    }
}
