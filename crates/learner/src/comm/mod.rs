//! Exchanges with the other ranks: a queue of collectives, the layer hooks that fill it, and the places of shards.

mod queue;
mod segment;
mod shard_hooks;

pub(crate) use self::queue::{CollectiveQueue, Exchange, Pending, Traffic};
pub(crate) use self::segment::{Segment, part, segments, zeros};
pub(crate) use self::shard_hooks::{Flow, GatheredBuckets, ShardHooks, Source, Windows};
