//! Attention of all sequences in one call, for devices whose kernels take sequences of many lengths.

use pacs_shape::PassShape;
use pacs_torch::tch::{Device, Tensor};
use pacs_torch::{FlashSequences, flash_attention};

use super::{Gather, Sequence};

#[derive(Debug)]
pub(super) struct Flash {
    sequences: FlashSequences,
    /// The rows of keys and values that each sequence sees, one sequence behind the other: its prefix, then itself.
    keys: Gather,
}

impl Flash {
    /// The sequences lie one behind the other.
    pub(super) fn new(sequences: &[Sequence], tokens: usize, device: Device) -> Self {
        let mut keys = Vec::new();
        for sequence in sequences {
            let prefix = sequence.prefix_start..sequence.prefix_start + sequence.prefix;
            keys.extend(prefix.chain(sequence.start..sequence.start + sequence.len).map(|key| key as i64));
        }
        let lengths: Vec<_> = sequences.iter().map(|one| [one.len, one.prefix + one.len]).collect();
        Self { sequences: FlashSequences::new(&lengths, device), keys: Gather::new(keys, tokens, device) }
    }

    pub(super) fn shape(&self) -> PassShape {
        PassShape { fused_rows: self.sequences.rows().map(|rows| rows as u64), ..PassShape::default() }
    }

    /// Returns `[T, N, H]`.
    pub(super) fn attend(&self, q: &Tensor, k: Tensor, v: Tensor) -> Tensor {
        flash_attention(q, &self.keys.apply(k), &self.keys.apply(v), &self.sequences)
    }
}
