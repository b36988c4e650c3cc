//! Attention of all sequences in one call, for devices whose kernels take sequences of many lengths.
// Legend: `T` tokens, `R` rows of keys, `N` query heads, `K` key and value heads, `H` head.

use std::rc::Rc;

use pacs_shape::PassShape;
use pacs_torch::tch::{Device, Kind, Tensor};
use pacs_torch::{
    FlashOutput, FlashSequences, RowCopies, device_kernels, flash_attention, flash_backward, flash_forward,
};

use super::{Gather, Sequence};
use crate::ops::launched;

#[derive(Debug)]
pub(super) struct Flash(Rc<Plan>);

#[derive(Debug)]
struct Plan {
    sequences: FlashSequences,
    /// The rows of keys and values that each sequence sees, one sequence after the other: its prefix, then itself.
    keys: Gather,
    /// Where among them each token is.
    copies: RowCopies,
    /// Keys that a query sees; none: all before it.
    window: Option<usize>,
}

/// What the backward of one layer's attention needs.
#[derive(Debug)]
pub(super) struct FlashTrace {
    plan: Rc<Plan>,
    /// Queries `[T, N, H]`, keys and values `[R, K, H]`.
    inputs: [Tensor; 3],
    output: FlashOutput,
}

impl Flash {
    /// The sequences lie one after the other.
    pub(super) fn new(sequences: &[Sequence], tokens: usize, device: Device, window: Option<usize>) -> Self {
        let mut keys = Vec::new();
        for sequence in sequences {
            let prefix = sequence.prefix_start..sequence.prefix_start + sequence.prefix;
            keys.extend(prefix.chain(sequence.start..sequence.start + sequence.len).map(|key| key as i64));
        }
        let lengths: Vec<_> = sequences.iter().map(|one| [one.len, one.prefix + one.len]).collect();
        let (sequences, copies) = (FlashSequences::new(&lengths, device), RowCopies::new(&keys, tokens, device));
        Self(Rc::new(Plan { sequences, keys: Gather::new(keys, tokens, device), copies, window }))
    }

    pub(super) fn shape(&self) -> PassShape {
        PassShape { fused_rows: self.0.sequences.rows().map(|rows| rows as u64), ..PassShape::default() }
    }

    /// Returns `[T, N, H]`.
    pub(super) fn attend(&self, q: &Tensor, k: Tensor, v: Tensor) -> Tensor {
        let Plan { sequences, keys, window, .. } = &*self.0;
        flash_attention(q, &keys.apply(k), &keys.apply(v), sequences, *window)
    }

    /// The same, with what the backward needs.
    pub(super) fn trace(&self, q: Tensor, k: Tensor, v: Tensor) -> FlashTrace {
        let Plan { sequences, keys, window, .. } = &*self.0;
        let inputs = [q, keys.apply(k), keys.apply(v)];
        let output = flash_forward(&inputs[0], &inputs[1], &inputs[2], sequences, *window);
        FlashTrace { plan: Rc::clone(&self.0), inputs, output }
    }
}

impl FlashTrace {
    /// `[T, N, H]`.
    pub(super) fn output(&self) -> &Tensor {
        &self.output.output
    }

    /// Gradients by queries `[T, N, H]`, keys and values `[T, K, H]`, from that by the output.
    pub(super) fn backward(self, gradient: &Tensor) -> [Tensor; 3] {
        let Plan { sequences, keys, copies, .. } = &*self.plan;
        let gradient = gradient.view_as(self.output());
        let [by_q, by_k, by_v] = flash_backward(&gradient, self.inputs.each_ref(), &self.output, sequences);
        let Some(index) = keys.index() else { return [by_q, by_k, by_v] };
        // A prompt's key has a gradient from every answer.
        let [by_k, by_v] = [by_k.contiguous(), by_v.contiguous()];
        let [by_k, by_v] = match device_kernels() {
            Some(kernels) => launched(kernels.sum_copies([&by_k, &by_v], copies)),
            None => [by_k, by_v].map(|by| {
                let mut size = by.size();
                size[0] = by_q.size()[0];
                let mut sums = Tensor::zeros(size, (Kind::Float, by.device()));
                sums.index_add_(0, index, &by.to_kind(Kind::Float)).to_kind(by.kind())
            }),
        };
        [by_q, by_k, by_v]
    }
}
