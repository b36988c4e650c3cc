//! A linear layer, with or without an adapter: forward, and backward by hand.
//!
//! With an adapter the matrix is frozen, and the layer computes `y = W x + scale B (A x)`. Modules that are multiplied together,
//! such as the projections of queries, keys and values, are one layer: their `A` are stacked, since they have one input, and each
//! `B` adds to columns of its own. `W + scale B A` is never formed, so what a pass keeps is what it keeps without adapters.
// Legend: `T` tokens, `D` width of the input, `O` width of the output, `R` rank, `P` adapted modules.

use pacs_shape::{LinearModule, Lora};
use pacs_torch::tch::Tensor;

use crate::model::Weight;
use crate::ops::{add_weight_gradient, linear, matmul};

/// A matrix of a layer, `[O, D]`.
#[derive(Debug)]
pub(crate) struct Linear {
    weight: Weight,
    adapter: Option<Adapter>,
}

#[derive(Debug)]
struct Adapter {
    /// The stacked `A`, `[P R, D]`.
    down: Weight,
    ups: Vec<Up>,
    rank: i64,
    scale: f64,
}

/// The `B` of one module, `[rows, R]`.
#[derive(Debug)]
struct Up {
    weight: Weight,
    /// First column of the output that it adds to.
    first: i64,
    rows: i64,
}

/// Gradient by what an adapter multiplies its input with, `[T, P R]`; none without an adapter.
#[derive(Debug)]
pub(crate) struct ByLow(Option<Tensor>);

impl Linear {
    /// The layer of `modules`, which are multiplied together; `find` knows parameters by their names within a layer.
    pub(crate) fn new(modules: &[LinearModule], lora: Option<&Lora>, find: impl Fn(&str) -> Option<Weight>) -> Self {
        let get = |name: &str| find(name).expect("the layout has every parameter of its configuration");
        let weight = get(&format!("{}.weight", modules[0].path));
        let (mut ups, mut first) = (Vec::new(), 0);
        let adapts = |module: &LinearModule| lora.is_some_and(|lora| lora.adapts(module.name()));
        for module in modules {
            if adapts(module) {
                ups.push(Up { weight: get(&module.adapter('B')), first, rows: module.rows });
            }
            first += module.rows;
        }
        // The leaf of the stacked `A` is found by its first part.
        let down = modules.iter().find(|module| adapts(module)).map(|module| get(&module.adapter('A')));
        let adapter = down.zip(lora).map(|(down, lora)| Adapter { down, ups, rank: lora.rank, scale: lora.scale() });
        Self { weight, adapter }
    }

    /// `[T, O]` from `x`, `[T, D]`, and a bias, `[O]`.
    pub(crate) fn apply(&self, x: &Tensor, bias: Option<&Tensor>) -> Tensor {
        let y = linear(x, &self.weight.tensor, bias);
        if let Some(adapter) = &self.adapter {
            let low = adapter.low(x);
            for (place, up) in adapter.ups.iter().enumerate() {
                let added = linear(&adapter.of(&low, place), &up.weight.tensor, None);
                let _ = up.columns(&y).g_add_(&added);
            }
        }
        y
    }

    /// Gradient by the input of [`Linear::apply`], `[T, D]`, and what [`Linear::add`] needs of it.
    pub(crate) fn backward_input(&self, gradient: &Tensor) -> (Tensor, ByLow) {
        let by_input = matmul(gradient, &self.weight.tensor);
        let Some(adapter) = &self.adapter else { return (by_input, ByLow(None)) };
        let by_low = |up: &Up| matmul(&up.columns(gradient).contiguous(), &up.weight.tensor);
        let by_low = Tensor::cat(&adapter.ups.iter().map(by_low).collect::<Vec<_>>(), 1) * adapter.scale;
        let by_input = by_input + matmul(&by_low, &adapter.down.tensor);
        (by_input, ByLow(Some(by_low)))
    }

    /// Adds the gradient of what is trained: `gradient` by the output, `input` the layer was applied to.
    pub(crate) fn add(&self, gradients: &Tensor, gradient: &Tensor, input: &Tensor, by_low: ByLow) {
        let Some(adapter) = &self.adapter else {
            if let Some(mut slot) = self.weight.slot(gradients) {
                add_weight_gradient(&mut slot, gradient, input);
            }
            return;
        };
        let low = adapter.low(input);
        for (place, up) in adapter.ups.iter().enumerate() {
            let slot = &mut up.weight.slot_or_scratch(gradients);
            add_weight_gradient(slot, &up.columns(gradient).contiguous(), &adapter.of(&low, place));
        }
        if let ByLow(Some(by_low)) = by_low {
            add_weight_gradient(&mut adapter.down.slot_or_scratch(gradients), &by_low, input);
        }
    }
}

impl Adapter {
    /// `scale A x` of all modules, `[T, P R]`. The backward computes it again, which is cheap beside the matrix.
    fn low(&self, x: &Tensor) -> Tensor {
        linear(x, &self.down.tensor, None) * self.scale
    }

    /// The part of `low` that belongs to one module, `[T, R]`.
    fn of(&self, low: &Tensor, place: usize) -> Tensor {
        low.narrow(1, place as i64 * self.rank, self.rank).contiguous()
    }
}

impl Up {
    /// The columns that belong to the module, `[T, rows]`.
    fn columns(&self, all: &Tensor) -> Tensor {
        all.narrow(1, self.first, self.rows)
    }
}
