//! The head of a value model: one number a position, and its backward.
// Legend: `M` positions, `D` width.

use std::ops::Range;
use std::rc::Rc;

use pacs_torch::tch::{Kind, Tensor, no_grad};
use pacs_torch::{Units, add_weight_gradient, fixed_units, linear};

use crate::Model;
use crate::layer::gradient_kind;

/// Estimate of a value model at each position, `M` of them.
///
/// `hidden`: `[M, D]`, rows of [`Model::hidden`] of a model over [`Parameters::of_values`](crate::Parameters::of_values).
/// Multiplied in float32: estimates differ by less than what bfloat16 holds.
///
/// # Panics
/// When the model has no value head, or `hidden` not its width.
#[must_use]
pub fn values(model: &Model, hidden: &Tensor) -> Vec<f32> {
    let (_m, _d) = hidden.size2().expect("hidden is a matrix");
    no_grad(|| {
        let kind = gradient_kind(model.kind());
        let hidden = hidden.to_kind(kind);
        let values = match scored_units() {
            Some(units) => linear(&units, &hidden, &row(model, kind), None),
            None => hidden.matmul(&row(model, kind).tr()),
        };
        let values = values.squeeze_dim(1);
        Vec::try_from(values.to_kind(Kind::Float)).expect("a vector of numbers")
    })
}

/// Backward of [`values`]: adds the gradient of the head to `gradients`, as [`Model::zero_gradients`] makes it, and
/// returns that by `hidden`, `[M, D]` in the kind of the model.
///
/// `by_value`: derivative of the loss by each value, `M` of them.
///
/// # Panics
/// As [`values`], and when there are not as many derivatives as rows.
pub fn values_backward(model: &Model, hidden: &Tensor, by_value: &[f32], gradients: &Tensor) -> Tensor {
    let (m, _d) = hidden.size2().expect("hidden is a matrix");
    assert_eq!(by_value.len(), m as usize, "every row has its derivative");
    no_grad(|| {
        let kind = gradient_kind(model.kind());
        let by_value = Tensor::from_slice(by_value).to_device(model.device()).to_kind(kind).unsqueeze(1);
        let wide = hidden.to_kind(kind);
        let mut slot = model.head_slot(gradients).expect("the head of a value model is trained");
        match scored_units() {
            Some(units) => add_weight_gradient(&units, &mut slot, &by_value, &wide).expect("the slot is contiguous"),
            None => drop(slot.g_add_(&by_value.tr().matmul(&wide))),
        }
        // Each element is one product.
        by_value.matmul(&row(model, kind)).to_kind(hidden.kind())
    })
}

/// The scored rows of each unit, where the pass has units.
fn scored_units() -> Option<Units> {
    let lengths = |units: Rc<Units>| Units::new(&units.scored().iter().map(Range::len).collect::<Vec<_>>());
    fixed_units().map(lengths)
}

/// The head, `[1, D]`.
fn row(model: &Model, kind: Kind) -> Tensor {
    let head = model.head_weight();
    assert_eq!(head.size2().expect("a head is a matrix").0, 1, "the head is that of a value model");
    head.to_kind(kind)
}
