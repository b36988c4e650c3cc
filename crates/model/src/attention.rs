//! Which token sees which: the interface between the model and its users, and the packed rows of training.
// Legend: `T` tokens, `N` query heads, `K` key and value heads, `G = N / K`, `H` head.

mod blocks;
mod flash;

use std::ops::Range;

use pacs_shape::PassShape;
use pacs_torch::tch::{Device, Kind, Tensor, with_grad};
use pacs_torch::{fixed_units, has_flash_attention, one_thread_each};

use self::blocks::Blocks;
use self::flash::{Flash, FlashTrace};
use crate::Model;

/// Computes attention for the model, layer by layer; generation implements it over its KV cache.
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

/// Positions of packed rows: every answer continues from its prompt.
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
    /// Of layers that see everything before a token, or of those with one window: most models have one kind.
    methods: Vec<Method>,
    /// Which of the methods is a layer's; layer `i` has entry `i` modulo their number.
    of_layers: Vec<usize>,
    dims: Dims,
}

#[derive(Debug)]
enum Method {
    Blocks(Blocks),
    Flash(Flash),
    /// Every unit by itself, and in it every key head with its query heads.
    Units(Vec<UnitPlan>),
}

/// The attention of one unit, for one key head.
#[derive(Debug)]
struct UnitPlan {
    rows: Range<usize>,
    blocks: Blocks,
}

/// The heads of one unit that are computed by one thread.
#[derive(Debug)]
struct Part {
    rows: Range<usize>,
    /// Head of keys and values, which several query heads may share.
    head: i64,
    cap: Option<f64>,
    blocks: Blocks,
}

impl Packed {
    /// Plans the attention of `rows`, whose tokens lie one row after the other: a prompt, then its answers.
    #[must_use]
    pub fn new(rows: &[PackedRow], model: &Model) -> Self {
        let config = model.config();
        let dims = Dims { n: config.heads, k: config.kv_heads, h: config.head_dim, cap: config.score_cap };
        // A window that holds the longest sequence hides nothing.
        let longest = |row: &PackedRow| row.prompt_len + row.answer_lens.iter().max().unwrap_or(&0);
        let longest = rows.iter().map(longest).max().unwrap_or(0);
        let (mut windows, mut of_layers) = (Vec::new(), Vec::new());
        for kind in &config.layer_kinds {
            let window = kind.window.filter(|window| *window < longest);
            let place = windows.iter().position(|found| *found == window).unwrap_or_else(|| {
                windows.push(window);
                windows.len() - 1
            });
            of_layers.push(place);
        }
        let methods = windows.into_iter().map(|window| Method::new(rows, model, dims, window)).collect();
        Self { methods, of_layers, dims }
    }

    fn method(&self, layer: usize) -> &Method {
        &self.methods[self.of_layers[layer % self.of_layers.len()]]
    }

    /// What attention over the rows works on, for planning memory; the rest of the shape is 0.
    #[must_use]
    pub fn shape(&self) -> PassShape {
        // What hides keys changes neither rows nor scores.
        match &self.methods[0] {
            Method::Blocks(blocks) => blocks.shape(),
            Method::Flash(flash) => flash.shape(),
            Method::Units(plans) => plans.iter().fold(PassShape::default(), |mut all, plan| {
                let shape = plan.blocks.shape();
                for (all, own) in all.plain_rows.iter_mut().zip(shape.plain_rows) {
                    *all += own;
                }
                for (all, own) in all.fused_rows.iter_mut().zip(shape.fused_rows) {
                    *all += own;
                }
                all.plain_scores += shape.plain_scores;
                all
            }),
        }
    }

    /// Attends in one layer.
    fn all(&self, layer: usize, q: Tensor, k: Tensor, v: Tensor) -> Tensor {
        let tokens = q.size()[0];
        let output = match self.method(layer) {
            Method::Blocks(blocks) => blocks.attend(q, k, v, self.dims),
            Method::Flash(flash) => flash.attend(&q, k, v),
            Method::Units(plans) => {
                let parts = self.parts(plans, [&q, &k, &v]);
                let outputs = one_thread_each(parts, |(part, [q, k, v])| part.attend(q, k, v));
                self.join(plans, &outputs.iter().collect::<Vec<_>>())
            }
        };
        output.view([tokens, self.dims.n * self.dims.h])
    }

    /// The parts that are computed by one thread each, unit by unit, with their queries, keys and values.
    fn parts(&self, plans: &[UnitPlan], qkv: [&Tensor; 3]) -> Vec<(Part, [Tensor; 3])> {
        let (group, mut parts) = (self.dims.n / self.dims.k, Vec::new());
        for plan in plans {
            for head in 0..self.dims.k {
                let (rows, blocks) = (plan.rows.clone(), plan.blocks.shallow_clone());
                let part = Part { rows, head, cap: self.dims.cap, blocks };
                let own = qkv.map(|x| part.of(x, if x.size()[1] == self.dims.n { group } else { 1 }));
                parts.push((part, own));
            }
        }
        parts
    }

    /// Puts together what parts have computed, `[rows, heads, H]` each; returns `[T, heads, H]`.
    fn join(&self, plans: &[UnitPlan], parts: &[&Tensor]) -> Tensor {
        let heads = parts.chunks(self.dims.k as usize);
        let units: Vec<Tensor> = plans.iter().zip(heads).map(|(_, heads)| Tensor::cat(heads, 1)).collect();
        Tensor::cat(&units, 0)
    }
}

impl Method {
    /// For layers with a window, where it hides something.
    fn new(rows: &[PackedRow], model: &Model, dims: Dims, window: Option<usize>) -> Self {
        let (kind, device) = (model.kind(), model.device());
        let tokens: usize = rows.iter().map(PackedRow::tokens).sum();
        let sequences = sequences(rows);
        if let Some(units) = fixed_units() {
            let one = Dims { n: dims.n / dims.k, k: 1, ..dims };
            let mut rest = sequences.into_iter().peekable();
            let plan = |range: &Range<usize>| {
                let mut own = Vec::new();
                while let Some(sequence) = rest.next_if(|sequence| sequence.start < range.end) {
                    own.push(sequence.behind(range.start));
                }
                let blocks = Blocks::new(own, range.len(), one, Masking { kind, device, window });
                UnitPlan { rows: range.clone(), blocks }
            };
            assert_eq!(units.rows(), tokens, "units hold all rows");
            return Self::Units(units.ranges().iter().map(plan).collect());
        }
        if has_flash_attention(device, kind, dims.h) && dims.cap.is_none() && !sequences.is_empty() {
            Self::Flash(Flash::new(&sequences, tokens, device, window))
        } else {
            Self::Blocks(Blocks::new(sequences, tokens, dims, Masking { kind, device, window }))
        }
    }
}

impl Part {
    /// Its part of `[T, heads, H]`, of which `count` heads belong to a key head.
    fn of(&self, x: &Tensor, count: i64) -> Tensor {
        let rows = x.narrow(0, self.rows.start as i64, self.rows.len() as i64);
        // A tensor of its own, so that its place in memory depends on nothing.
        rows.narrow(1, self.head * count, count).copy()
    }

    /// Returns `[rows, query heads, H]`.
    fn attend(&self, q: Tensor, k: Tensor, v: Tensor) -> Tensor {
        let [rows, n, h] = [q.size()[0], q.size()[1], q.size()[2]];
        self.blocks.attend(q, k, v, Dims { n, k: 1, h, cap: self.cap }).view([rows, n, h])
    }
}

impl Attention for Packed {
    fn attend(&mut self, layer: usize, q: Tensor, k: Tensor, v: Tensor) -> Tensor {
        self.all(layer, q, k, v)
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
    /// Leaves and output of the graph of each part, and the output put together.
    Units {
        parts: Vec<([Tensor; 3], Tensor)>,
        output: Tensor,
        heads: usize,
        units: Vec<Range<usize>>,
    },
}

impl AttentionTrace {
    pub(crate) fn new(packed: &Packed, layer: usize, (q, k, v): (Tensor, Tensor, Tensor)) -> Self {
        if let Method::Flash(flash) = packed.method(layer) {
            return Self(Traced::Flash(flash.trace(q, k, v)));
        }
        if let Method::Units(plans) = packed.method(layer) {
            let parts = one_thread_each(packed.parts(plans, [&q, &k, &v]), |(part, own)| {
                let inputs = own.map(|x| x.set_requires_grad(true));
                let [q, k, v] = inputs.each_ref().map(Tensor::shallow_clone);
                let output = with_grad(|| part.attend(q, k, v));
                (inputs, output)
            });
            let outputs: Vec<Tensor> = parts.iter().map(|(_, output)| output.detach()).collect();
            let output = packed.join(plans, &outputs.iter().collect::<Vec<_>>()).flatten(1, 2);
            let units = plans.iter().map(|plan| plan.rows.clone()).collect();
            return Self(Traced::Units { parts, output, heads: packed.dims.k as usize, units });
        }
        let inputs = [q, k, v].map(|x| x.detach().set_requires_grad(true));
        let [q, k, v] = inputs.each_ref().map(Tensor::shallow_clone);
        let output = with_grad(|| packed.all(layer, q, k, v));
        Self(Traced::Graph { inputs, output })
    }

    /// `[T, N H]`.
    pub(crate) fn output(&self) -> Tensor {
        match &self.0 {
            Traced::Graph { output, .. } => output.detach(),
            Traced::Flash(trace) => trace.output().flatten(1, 2),
            Traced::Units { output, .. } => output.shallow_clone(),
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
            Traced::Units { parts, heads, units, .. } => units_backward(parts, heads, &units, gradient),
        }
    }
}

/// Gradients of all parts, put together as `[T, heads, H]` each.
fn units_backward(
    parts: Vec<([Tensor; 3], Tensor)>,
    heads: usize,
    units: &[Range<usize>],
    gradient: &Tensor,
) -> [Tensor; 3] {
    let mut items = Vec::with_capacity(parts.len());
    for (place, (inputs, output)) in parts.into_iter().enumerate() {
        let (rows, head) = (&units[place / heads], (place % heads) as i64);
        let width = output.size()[1] * output.size()[2];
        let own = gradient.narrow(0, rows.start as i64, rows.len() as i64).narrow(1, head * width, width);
        items.push((inputs, output, own));
    }
    let gradients = one_thread_each(items, |(inputs, output, gradient)| {
        let gradient = gradient.copy().view_as(&output);
        with_grad(|| (output * &gradient).sum(gradient.kind())).backward();
        inputs.map(|input| input.grad())
    });
    std::array::from_fn(|which| {
        let of_unit =
            |parts: &[[Tensor; 3]]| Tensor::cat(&parts.iter().map(|part| &part[which]).collect::<Vec<_>>(), 1);
        Tensor::cat(&gradients.chunks(heads).map(of_unit).collect::<Vec<_>>(), 0)
    })
}

/// A run of tokens with causal attention among themselves and full attention to a prefix elsewhere.
struct Sequence {
    prefix_start: usize,
    prefix: usize,
    start: usize,
    len: usize,
}

impl Sequence {
    /// The same where the first `tokens` tokens are not there.
    fn behind(self, tokens: usize) -> Self {
        Self { prefix_start: self.prefix_start - tokens, start: self.start - tokens, ..self }
    }
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

    fn shallow_clone(&self) -> Self {
        Self(self.0.as_ref().map(Tensor::shallow_clone))
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

/// Heads of queries, heads of keys and values, their width, and the cap of their scores.
#[derive(Clone, Copy, Debug)]
struct Dims {
    n: i64,
    k: i64,
    h: i64,
    cap: Option<f64>,
}

/// What masks are made for.
#[derive(Clone, Copy, Debug)]
struct Masking {
    kind: Kind,
    device: Device,
    /// Keys that a query sees, its own included; none: all before it.
    window: Option<usize>,
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
