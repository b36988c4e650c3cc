//! Which token sees which: the interface between the model and its users, and the packed rows of training.
// Legend: `T` tokens, `N` query heads, `K` key and value heads, `G = N / K`, `H` head.

mod blocks;
mod flash;

use pacs_shape::PassShape;
use pacs_torch::has_flash_attention;
use pacs_torch::tch::{Device, Tensor, with_grad};

use self::blocks::Blocks;
use self::flash::{Flash, FlashTrace};
use crate::Model;

/// Computes attention for the model, layer by layer; generation keeps its KV cache behind it.
pub trait Attention {
    /// Attends in one layer.
    ///
    /// `q`: `[T, N, H]`, `k` and `v`: `[T, K, H]`; queries and keys are rotated. Returns `[T, N H]`.
    fn attend(&mut self, layer: usize, q: Tensor, k: Tensor, v: Tensor) -> Tensor;

    /// The same from projections whose heads are neither normed nor rotated, where that is faster; `None` leaves both to
    /// the layer, which then calls [`Attention::attend`].
    ///
    /// `projected`: `[T, N + 2 K, H]`, queries, keys and values; `norms`: weights of queries and keys, `[H]` each, and
    /// their epsilon, where heads are normed; `rotation`: cosines and sines, `[T, H / 2]` float32 each.
    fn attend_projected(
        &mut self,
        _layer: usize,
        _projected: &Tensor,
        _norms: Option<(&Tensor, &Tensor, f64)>,
        _rotation: (&Tensor, &Tensor),
    ) -> Option<Tensor> {
        None
    }
}

/// A prompt followed by its answers, each of which sees the prompt and itself, not the other answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedRow {
    /// Tokens of the prompt that the answers share.
    pub prompt_len: usize,
    /// Tokens of each answer. None: the row is the prompt alone. One: it is a plain sequence.
    pub answer_lens: Vec<usize>,
}

impl PackedRow {
    /// Tokens of the row.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.prompt_len + self.answer_lens.iter().sum::<usize>()
    }
}

/// Positions of packed rows: every answer goes on from its prompt.
#[must_use]
pub fn packed_positions(rows: &[PackedRow]) -> Vec<i64> {
    let mut positions = Vec::with_capacity(rows.iter().map(PackedRow::tokens).sum());
    for row in rows {
        positions.extend(0..row.prompt_len as i64);
        for &answer in &row.answer_lens {
            positions.extend((row.prompt_len..row.prompt_len + answer).map(|position| position as i64));
        }
    }
    positions
}

/// Attention of packed rows; equals running each prompt with each answer alone.
///
/// Every prompt and every answer is one sequence of queries; an answer sees its prompt, too. Where there are flash kernels,
/// one call does them all; elsewhere they are padded to blocks.
#[derive(Debug)]
pub struct Packed {
    method: Method,
    dims: Dims,
}

#[derive(Debug)]
enum Method {
    Blocks(Blocks),
    Flash(Flash),
}

impl Packed {
    /// Plans the attention of `rows`, whose tokens lie one row behind the other: a prompt, then its answers.
    #[must_use]
    pub fn new(rows: &[PackedRow], model: &Model) -> Self {
        let (config, kind, device) = (model.config(), model.kind(), model.device());
        let dims = Dims { n: config.heads, k: config.kv_heads, h: config.head_dim };
        let tokens: usize = rows.iter().map(PackedRow::tokens).sum();
        let sequences = sequences(rows);
        let method = if has_flash_attention(device, kind, dims.h) && !sequences.is_empty() {
            Method::Flash(Flash::new(&sequences, tokens, device))
        } else {
            Method::Blocks(Blocks::new(sequences, tokens, dims, kind, device))
        };
        Self { method, dims }
    }

    /// What attention over the rows works on, for planning memory; the rest of the shape is 0.
    #[must_use]
    pub fn shape(&self) -> PassShape {
        match &self.method {
            Method::Blocks(blocks) => blocks.shape(),
            Method::Flash(flash) => flash.shape(),
        }
    }

    /// Attends; every layer in the same way.
    fn all(&self, q: Tensor, k: Tensor, v: Tensor) -> Tensor {
        let tokens = q.size()[0];
        let output = match &self.method {
            Method::Blocks(blocks) => blocks.attend(q, k, v, self.dims),
            Method::Flash(flash) => flash.attend(&q, k, v),
        };
        output.view([tokens, self.dims.n * self.dims.h])
    }
}

impl Attention for Packed {
    fn attend(&mut self, _layer: usize, q: Tensor, k: Tensor, v: Tensor) -> Tensor {
        self.all(q, k, v)
    }
}

/// The attention of one layer, with what its backward needs.
#[derive(Debug)]
pub(crate) struct AttentionTrace(Traced);

#[derive(Debug)]
enum Traced {
    Graph {
        /// Leaves of the graph: rotated queries `[T, N, H]`, rotated keys and values `[T, K, H]`.
        inputs: [Tensor; 3],
        /// `[T, N H]`, with its graph.
        output: Tensor,
    },
    Flash(FlashTrace),
}

impl AttentionTrace {
    pub(crate) fn new(packed: &Packed, (q, k, v): (Tensor, Tensor, Tensor)) -> Self {
        if let Method::Flash(flash) = &packed.method {
            return Self(Traced::Flash(flash.trace(q, k, v)));
        }
        let inputs = [q, k, v].map(|x| x.detach().set_requires_grad(true));
        let [q, k, v] = inputs.each_ref().map(Tensor::shallow_clone);
        let output = with_grad(|| packed.all(q, k, v));
        Self(Traced::Graph { inputs, output })
    }

    /// `[T, N H]`.
    pub(crate) fn output(&self) -> Tensor {
        match &self.0 {
            Traced::Graph { output, .. } => output.detach(),
            Traced::Flash(trace) => trace.output().flatten(1, 2),
        }
    }

    /// Gradients by queries, keys and values, from that by the output.
    pub(crate) fn backward(self, gradient: &Tensor) -> [Tensor; 3] {
        match self.0 {
            Traced::Graph { inputs, output } => {
                // A scalar whose derivative by the output is the gradient.
                with_grad(|| (output * gradient).sum(gradient.kind())).backward();
                inputs.map(|input| input.grad())
            }
            Traced::Flash(trace) => trace.backward(gradient),
        }
    }
}

/// A run of tokens with causal attention among themselves and full attention to a prefix elsewhere.
struct Sequence {
    prefix_start: usize,
    prefix: usize,
    start: usize,
    len: usize,
}

/// The sequences of rows, in the order of their tokens; none is empty.
fn sequences(rows: &[PackedRow]) -> Vec<Sequence> {
    let mut sequences = Vec::new();
    let mut row_start = 0;
    for row in rows {
        let mut start = row_start;
        let mut push = |prefix, len| {
            if len > 0 {
                sequences.push(Sequence { prefix_start: row_start, prefix, start, len });
                start += len;
            }
        };
        if row.answer_lens.len() < 2 {
            push(0, row.tokens());
        } else {
            push(0, row.prompt_len);
            row.answer_lens.iter().for_each(|&len| push(row.prompt_len, len));
        }
        row_start += row.tokens();
    }
    sequences
}

/// Rows picked by index, or all of them in order.
#[derive(Debug)]
struct Gather(Option<Tensor>);

impl Gather {
    fn new(index: Vec<i64>, source: usize, device: Device) -> Self {
        let identity = index.len() == source && index.iter().enumerate().all(|(i, &row)| row == i as i64);
        Self((!identity).then(|| Tensor::from_slice(&index).to_device(device)))
    }

    /// None: all in order.
    fn index(&self) -> Option<&Tensor> {
        self.0.as_ref()
    }

    fn apply(&self, x: Tensor) -> Tensor {
        match &self.0 {
            Some(index) => x.index_select(0, index),
            None => x,
        }
    }
}

/// Heads of queries, heads of keys and values, and their width.
#[derive(Clone, Copy, Debug)]
struct Dims {
    n: i64,
    k: i64,
    h: i64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_restart_at_every_answer() {
        let rows =
            [PackedRow { prompt_len: 2, answer_lens: vec![3, 1] }, PackedRow { prompt_len: 1, answer_lens: vec![] }];
        assert_eq!(packed_positions(&rows), [0, 1, 2, 3, 4, 2, 0]);
    }
}
