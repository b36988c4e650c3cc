//! Root-mean-square norms of the two kinds that families have.
// Legend: `T` tokens, `D` width of what is normed.

use pacs_torch::tch::{Kind, Tensor};

use crate::model::Weight;
use crate::ops::{add_rms_norm, rms_norm, rms_norm_backward};

/// A norm and its weight, `[D]`.
#[derive(Debug)]
pub(crate) struct Norm {
    weight: Weight,
    epsilon: f64,
    /// Multiplies by `1 + w` rather than by `w`.
    adds_one: bool,
}

impl Norm {
    pub(crate) fn new(weight: Weight, epsilon: f64, adds_one: bool) -> Self {
        Self { weight, epsilon, adds_one }
    }

    /// The weight and epsilon of a norm that multiplies by its weight.
    pub(crate) fn plain(&self) -> Option<(&Tensor, f64)> {
        (!self.adds_one).then_some((&self.weight.tensor, self.epsilon))
    }

    /// `x`: `[.., D]`.
    pub(crate) fn apply(&self, x: &Tensor) -> Tensor {
        if !self.adds_one {
            return rms_norm(x, &self.weight.tensor, self.epsilon);
        }
        rms_norm(&widened(x), &self.one_more(), self.epsilon).to_kind(x.kind())
    }

    /// `x + y` and its norm.
    pub(crate) fn apply_to_sum(&self, x: &Tensor, y: &Tensor) -> (Tensor, Tensor) {
        if !self.adds_one {
            return add_rms_norm(x, y, &self.weight.tensor, self.epsilon);
        }
        let sum = x + y;
        let normed = self.apply(&sum);
        (sum, normed)
    }

    /// Backward of [`Norm::apply`]: adds the gradient of the weight to `gradients`, returns that by `x` plus `past`, the gradient
    /// that flows past the norm.
    pub(crate) fn backward(&self, x: &Tensor, gradient: &Tensor, past: Option<&Tensor>, gradients: &Tensor) -> Tensor {
        let slot = &mut self.weight.slot_or_scratch(gradients);
        if !self.adds_one {
            return rms_norm_backward(x, &self.weight.tensor, self.epsilon, gradient, past, slot);
        }
        let past = past.map(widened);
        let (wide, gradient) = (widened(x), widened(gradient));
        rms_norm_backward(&wide, &self.one_more(), self.epsilon, &gradient, past.as_ref(), slot).to_kind(x.kind())
    }

    /// `1 + w`, not rounded to 16 bits: a `w` near 0 has digits there that the sum would lose.
    fn one_more(&self) -> Tensor {
        widened(&self.weight.tensor) + 1.0
    }
}

/// The same in float32, where it has fewer bits.
fn widened(x: &Tensor) -> Tensor {
    match x.kind() {
        Kind::Double => x.shallow_clone(),
        _ => x.to_kind(Kind::Float),
    }
}
