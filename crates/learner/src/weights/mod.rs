//! What a rank holds of a model: weights, gradients, optimizer state, and the memory that they take.

mod memory_plan;
mod optimizer;
mod sharded_model;

pub(crate) use self::memory_plan::{MemoryPlan, Trained};
pub(crate) use self::optimizer::{Clipped, Optimizer, UpdateStep, sum_of_squares};
pub(crate) use self::sharded_model::{ShardedModel, Storage, weight_kind};
