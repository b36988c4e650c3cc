//! One pass through the model: scores, and the gradient for given coefficients.
//!
//! `T` packed tokens, `M` answer tokens of the pass, `D` width.

use pacs_model::Model;
use pacs_model::attention::{Packed, PackedRow, packed_positions};
use pacs_model::logprob::{DEFAULT_CHUNK, answer_logprobs, head_backward};
use pacs_torch::tch::{Device, Kind, Tensor, no_grad};
use pacs_torch::{ViewError, accumulate};

use crate::batch::{Pass, TrainBatch};

/// A pass as tensors.
///
/// The last token of an answer predicts nothing, so it is not among the inputs; an answer token is predicted by the
/// token before it, the first one by the last token of the prompt.
#[derive(Debug)]
pub(crate) struct PassTensors {
    rows: Vec<PackedRow>,
    /// `[T]` int64.
    tokens: Tensor,
    /// `[T]` int64.
    positions: Tensor,
    /// `[M]` int64: which hidden state predicts each answer token.
    predictors: Tensor,
    /// The answer tokens, `M` of them.
    targets: Vec<i64>,
    /// Place in the batch and number of tokens of each sequence, in the order of `targets`.
    pub(crate) spans: Vec<(usize, usize)>,
}

/// What a pass says of the answer tokens, in the order of its targets.
#[derive(Clone, Debug, Default)]
pub(crate) struct TokenScores {
    /// Log-prob of each (nats).
    pub(crate) logprobs: Vec<f32>,
    /// Entropy of each distribution (nats).
    pub(crate) entropies: Vec<f32>,
}

impl PassTensors {
    pub(crate) fn new(batch: &TrainBatch, pass: &Pass, device: Device) -> Self {
        let (mut tokens, mut predictors, mut targets) = (Vec::<i64>::new(), Vec::<i64>::new(), Vec::<i64>::new());
        let (mut rows, mut spans) = (Vec::new(), Vec::new());
        for row in &pass.rows {
            let prompt = &batch.prompts[&row.group];
            tokens.extend(prompt.iter().map(|token| i64::from(*token)));
            let prompt_end = tokens.len() as i64 - 1;
            let mut answer_lens = Vec::new();
            for &place in &row.answers {
                let answer = &batch.sequences[place].tokens;
                let inputs = &answer[..answer.len() - 1];
                predictors.push(prompt_end);
                predictors.extend((0..inputs.len()).map(|offset| (tokens.len() + offset) as i64));
                targets.extend(answer.iter().map(|token| i64::from(*token)));
                tokens.extend(inputs.iter().map(|token| i64::from(*token)));
                if !inputs.is_empty() {
                    answer_lens.push(inputs.len());
                }
                spans.push((place, answer.len()));
            }
            rows.push(PackedRow { prompt_len: prompt.len(), answer_lens });
        }
        let positions = packed_positions(&rows);
        let tensor = |values: &[i64]| Tensor::from_slice(values).to_device(device);
        Self {
            tokens: tensor(&tokens),
            positions: tensor(&positions),
            predictors: tensor(&predictors),
            targets,
            rows,
            spans,
        }
    }

    fn predicting(&self, model: &Model) -> Tensor {
        let mut attention = Packed::new(&self.rows, model);
        model.hidden(&self.tokens, &self.positions, &mut attention).index_select(0, &self.predictors)
    }

    /// Log-probs and entropies of the answer tokens, without gradient.
    pub(crate) fn score(&self, model: &Model, temperature: f64) -> TokenScores {
        no_grad(|| self.score_hidden(model, &self.predicting(model), temperature))
    }

    fn score_hidden(&self, model: &Model, hidden: &Tensor, temperature: f64) -> TokenScores {
        let rows: Vec<(i64, i64)> = (0..).zip(self.targets.iter().copied()).collect();
        let (logprobs, entropies) = answer_logprobs(model, hidden, &rows, temperature, DEFAULT_CHUNK);
        let host = |x: Tensor| Vec::try_from(x.to_kind(Kind::Float)).expect("a vector of numbers");
        TokenScores { logprobs: host(logprobs), entropies: host(entropies) }
    }

    /// Runs the trunk with its graph kept, for a backward whose coefficients are not known yet.
    pub(crate) fn open<'a>(&'a self, model: &Model) -> OpenPass<'a> {
        OpenPass { tensors: self, hidden: self.predicting(model) }
    }
}

/// A pass whose trunk has run forward and waits for its coefficients.
#[derive(Debug)]
pub(crate) struct OpenPass<'a> {
    tensors: &'a PassTensors,
    /// `[M, D]`, with its graph.
    hidden: Tensor,
}

impl OpenPass<'_> {
    /// Log-probs and entropies of the answer tokens.
    pub(crate) fn score(&self, model: &Model, temperature: f64) -> TokenScores {
        no_grad(|| self.tensors.score_hidden(model, &self.hidden.detach(), temperature))
    }

    /// Adds the pass's gradient to `gradients` (flat float32, in the parameters' layout).
    ///
    /// `coefficients`: derivative of the loss by each answer token's log-prob, in the order of the targets.
    pub(crate) fn backward(
        self,
        model: &mut Model,
        coefficients: &[f32],
        temperature: f64,
        gradients: &Tensor,
    ) -> Result<TokenScores, ViewError> {
        let head = head_backward(model, &self.hidden, &self.tensors.targets, coefficients, temperature, DEFAULT_CHUNK);
        // A scalar whose derivative by the hidden states is exactly what the head hands down.
        (&self.hidden * &head.dhidden).sum(self.hidden.kind()).backward();
        let add = |offset: usize, gradient: &Tensor| {
            let mut sum = gradients.narrow(0, offset as i64, gradient.numel() as i64);
            accumulate(&mut sum, gradient)
        };
        for leaf in model.leaves() {
            let gradient = leaf.tensor.grad();
            if gradient.defined() {
                add(leaf.offset, &gradient.contiguous())?;
            }
        }
        add(model.layout().head().offset, &head.dweight)?;
        model.zero_grad();
        Ok(TokenScores { logprobs: head.logprobs, entropies: head.entropies })
    }
}
