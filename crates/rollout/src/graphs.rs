//! Passes that only decode, recorded for a ladder of batch sizes.

use std::collections::HashMap;
use std::sync::Arc;

use pacs_model::{Model, ModelConfig, Parameters};
use pacs_torch::tch::{TchError, Tensor};
use pacs_torch::{
    DecodeInputs, DecodePass, DecodeRow, DeviceKernels, Drawn, Graph, GraphError, Graphs, KernelError,
    with_device_kernels,
};

use crate::cache::KvCache;

/// Sizes below this are powers of two; above, there are [`STEPS`] between one power of two and the next, but none closer than
/// this.
const FINE: usize = 8;
const STEPS: usize = 8;

/// Why a pass was not done by a graph.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PassError {
    #[error(transparent)]
    Graph(#[from] GraphError),
    #[error(transparent)]
    Kernels(#[from] KernelError),
    #[error("libtorch: {0}")]
    Torch(#[from] TchError),
}

/// The recorded passes of one engine.
#[derive(Debug)]
pub(crate) struct DecodeGraphs {
    graphs: Graphs,
    kernels: Arc<DeviceKernels>,
    inputs: DecodeInputs,
    /// By rows, and parts that each is divided into: all else that a pass is shaped by.
    recorded: HashMap<[usize; 2], Graph>,
}

impl DecodeGraphs {
    /// For passes of up to `rows` rows over a cache whose last block is nobody's.
    pub(crate) fn new(
        graphs: Graphs,
        kernels: Arc<DeviceKernels>,
        config: &ModelConfig,
        rows: usize,
        cache: &KvCache,
    ) -> Result<Self, TchError> {
        let inputs = DecodeInputs::new(rows, config.max_positions, cache.blocks(), cache.device())?;
        Ok(Self { graphs, kernels, inputs, recorded: HashMap::new() })
    }

    /// Computes the newest token of every row and draws the next one.
    pub(crate) fn decode(
        &mut self,
        rows: &[DecodeRow<'_>],
        config: &ModelConfig,
        parameters: &Parameters,
        cache: &KvCache,
    ) -> Result<Vec<Drawn>, PassError> {
        let size = padded(rows.len()).min(self.inputs.rows());
        let longest = self.inputs.fill(rows, size)?;
        let key = [size, self.kernels.decode_splits(size, longest)];
        if !self.recorded.contains_key(&key) {
            let work = pass(&self.kernels, self.inputs.pass(size, longest), config, parameters, cache);
            self.recorded.insert(key, self.graphs.record(work)?);
            tracing::debug!(rows = size, splits = key[1], graphs = self.recorded.len(), "recorded a pass that decodes");
        }
        let graph = self.recorded.get_mut(&key).expect("it was recorded at the latest just now");
        let mut drawn = DeviceKernels::drawn(graph.replay()?)?;
        drawn.truncate(rows.len());
        Ok(drawn)
    }

    /// Passes recorded so far.
    pub(crate) fn count(&self) -> usize {
        self.recorded.len()
    }
}

/// What is recorded: it holds views of weights and cache, whose places do not change.
fn pass(
    kernels: &Arc<DeviceKernels>,
    inputs: DecodePass,
    config: &ModelConfig,
    parameters: &Parameters,
    cache: &KvCache,
) -> impl Fn() -> Tensor + Send + 'static {
    let (model, cache, kernels) = (Model::new(config, parameters), cache.shared(), Arc::clone(kernels));
    let DecodePass { tokens, positions, slots, table, draws } = inputs;
    move || {
        with_device_kernels(&kernels, || {
            let mut cache = cache.shared();
            let mut attention = cache.recorded_pass(Arc::clone(&kernels), slots.shared(), table.shared());
            let hidden = model.hidden(&tokens, &positions, &mut attention);
            let drawn = kernels.draw_on_device(&model.logits(&hidden), &draws);
            drawn.expect("the kernels are those of this model")
        })
    }
}

/// The size of the pass that so many rows are computed in: at most an eighth more, or seven rows.
fn padded(rows: usize) -> usize {
    if rows <= FINE {
        return rows.next_power_of_two();
    }
    // The largest power of two below.
    let below = rows.next_power_of_two() / 2;
    rows.next_multiple_of((below / STEPS).max(FINE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_few_and_close() {
        let sizes: Vec<usize> = (1..=1024).map(padded).collect();
        assert!(sizes.iter().zip(1usize..).all(|(size, rows)| (rows..rows + rows.div_ceil(8).max(8)).contains(size)));
        assert!(sizes.is_sorted());
        let mut distinct = sizes;
        distinct.dedup();
        assert_eq!(distinct[..6], [1, 2, 4, 8, 16, 24]);
        assert_eq!((distinct.len(), distinct[distinct.len() - 1]), (43, 1024));
    }
}
