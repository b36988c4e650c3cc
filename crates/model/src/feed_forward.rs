//! The feed-forward block of a layer: dense, or a mixture of experts.
// Legend: `T` tokens, `D` width, `F` width of a dense block.

use pacs_shape::{Activation, LinearModule};
use pacs_torch::tch::Tensor;

use crate::ModelConfig;
use crate::experts::{Experts, ExpertsTrace};
use crate::linear::Linear;
use crate::model::Weight;
use crate::ops::{gate, gate_backward};
use crate::routing::Routing;

/// What comes between the second norm of a layer and the residual stream.
#[derive(Debug)]
pub(crate) enum FeedForward {
    Dense(Dense),
    Experts(Experts),
}

/// What the backward of a block needs of its forward, besides the input.
#[derive(Debug)]
pub(crate) enum FeedForwardTrace {
    /// Gates and ups, `[T, 2 F]`.
    Dense(Tensor),
    Experts(ExpertsTrace),
}

impl FeedForward {
    /// The block of layer `index`; `find` knows parameters by their names within the layer.
    pub(crate) fn new(
        config: &ModelConfig,
        index: usize,
        modules: [&[LinearModule]; 2],
        find: impl Fn(&str) -> Option<Weight>,
    ) -> Self {
        let activation = config.architecture.activation;
        if let Some(experts) = config.experts_of(index) {
            let mixture = (0..index).filter(|layer| config.experts_of(*layer).is_some()).count();
            return Self::Experts(Experts::new(experts, mixture, activation, find));
        }
        let [gate_up, down] = modules.map(|modules| Linear::new(modules, config.lora.as_ref(), &find));
        Self::Dense(Dense { activation, gate_up, down })
    }

    /// `[T, D]` from the normed input, `[T, D]`; `routing` says who chooses experts.
    pub(crate) fn forward(&self, input: Tensor, routing: &mut Routing<'_>) -> Tensor {
        match self {
            Self::Dense(dense) => {
                let gate_up = dense.gate_up.apply(&input, None);
                drop(input);
                dense.down.apply(&gate(dense.activation, &gate_up), None)
            }
            Self::Experts(experts) => experts.forward(input, routing).0,
        }
    }

    /// The same, with what [`FeedForward::backward`] needs.
    pub(crate) fn forward_traced(&self, input: Tensor, routing: &mut Routing<'_>) -> (Tensor, FeedForwardTrace) {
        match self {
            Self::Dense(dense) => {
                let gate_up = dense.gate_up.apply(&input, None);
                drop(input);
                let output = dense.down.apply(&gate(dense.activation, &gate_up), None);
                (output, FeedForwardTrace::Dense(gate_up))
            }
            Self::Experts(experts) => {
                let (output, trace) = experts.forward(input, routing);
                (output, FeedForwardTrace::Experts(trace))
            }
        }
    }

    /// Gradient by the input, `[T, D]`, from that by the output, `[T, D]`; adds the gradients of the weights to `gradients`.
    ///
    /// `input` computes the input once more, when it is needed.
    pub(crate) fn backward(
        &self,
        trace: FeedForwardTrace,
        by_output: Tensor,
        input: impl FnOnce() -> Tensor,
        gradients: &Tensor,
    ) -> Tensor {
        match (self, trace) {
            (Self::Dense(dense), FeedForwardTrace::Dense(gate_up)) => {
                dense.backward(gate_up, by_output, input, gradients)
            }
            (Self::Experts(experts), FeedForwardTrace::Experts(trace)) => {
                experts.backward(trace, by_output, &input(), gradients)
            }
            _ => unreachable!("a block is given what it kept itself"),
        }
    }
}

/// One block that computes all tokens.
#[derive(Debug)]
pub(crate) struct Dense {
    activation: Activation,
    gate_up: Linear,
    down: Linear,
}

impl Dense {
    fn backward(
        &self,
        gate_up: Tensor,
        by_output: Tensor,
        input: impl FnOnce() -> Tensor,
        gradients: &Tensor,
    ) -> Tensor {
        let (by_activation, by_low) = self.down.backward_input(&by_output);
        let (by_gate_up, activation) = gate_backward(self.activation, gate_up, &by_activation);
        drop(by_activation);
        self.down.add(gradients, &by_output, &activation, by_low);
        drop((activation, by_output));
        let input = input();
        let (by_input, by_low) = self.gate_up.backward_input(&by_gate_up);
        self.gate_up.add(gradients, &by_gate_up, &input, by_low);
        by_input
    }
}
