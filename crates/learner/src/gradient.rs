//! One pass through the model: scores, and the gradient for given coefficients.
//!
//! `T` packed tokens, `M` answer tokens of the pass, `D` width.

use pacs_model::attention::{Packed, PackedRow, packed_positions};
use pacs_model::logprob::{Targets, answer_logprobs, head_backward};
use pacs_model::{Keep, Model, Stages, Trace};
use pacs_shape::{HEAD_CHUNK, PassShape};
use pacs_torch::tch::{Device, Kind, Tensor, no_grad};

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

    /// Log-probs and entropies of the answer tokens, without gradient.
    ///
    /// # Errors
    /// As `stages`.
    pub(crate) fn score<S: Stages>(
        &self,
        model: &Model,
        temperature: f64,
        stages: &mut S,
    ) -> Result<TokenScores, S::Error> {
        no_grad(|| {
            let mut attention = Packed::new(&self.rows, model);
            let hidden = model.hidden_staged(&self.tokens, &self.positions, &mut attention, stages)?;
            Ok(self.score_hidden(model, &hidden.index_select(0, &self.predictors), temperature))
        })
    }

    fn score_hidden(&self, model: &Model, hidden: &Tensor, temperature: f64) -> TokenScores {
        let rows: Vec<(i64, i64)> = (0..).zip(self.targets.iter().copied()).collect();
        let (logprobs, entropies) = answer_logprobs(model, hidden, &rows, temperature, HEAD_CHUNK);
        let host = |x: Tensor| Vec::try_from(x.to_kind(Kind::Float)).expect("a vector of numbers");
        TokenScores { logprobs: host(logprobs), entropies: host(entropies) }
    }

    /// Runs the trunk for a backward whose coefficients are not known yet; `keep` decides what of it is kept.
    ///
    /// # Errors
    /// As `stages`.
    pub(crate) fn open<'a, S: Stages>(
        &'a self,
        model: &Model,
        keep: impl FnOnce(&PassShape) -> Keep,
        stages: &mut S,
    ) -> Result<OpenPass<'a>, S::Error> {
        let attention = Packed::new(&self.rows, model);
        let (tokens, scored) = (self.tokens.numel() as u64, self.targets.len() as u64);
        let keep = keep(&PassShape { tokens, scored, ..attention.shape() });
        let trace = model.forward_staged(&self.tokens, &self.positions, attention, keep, stages)?;
        Ok(OpenPass { tensors: self, trace })
    }
}

/// A pass whose trunk has run forward and waits for its coefficients.
#[derive(Debug)]
pub(crate) struct OpenPass<'a> {
    tensors: &'a PassTensors,
    trace: Trace,
}

impl OpenPass<'_> {
    /// Hidden states that predict the answer tokens, `[M, D]`.
    fn predicting(&self) -> Tensor {
        self.trace.hidden().index_select(0, &self.tensors.predictors)
    }

    /// Log-probs and entropies of the answer tokens.
    pub(crate) fn score(&self, model: &Model, temperature: f64) -> TokenScores {
        no_grad(|| self.tensors.score_hidden(model, &self.predicting(), temperature))
    }

    /// Adds the pass's gradient to `gradients` (flat float32, in the parameters' layout).
    ///
    /// `coefficients`: derivative of the loss by each answer token's log-prob, in the order of the targets.
    ///
    /// # Errors
    /// As `stages`.
    pub(crate) fn backward<S: Stages>(
        self,
        model: &Model,
        coefficients: &[f32],
        temperature: f64,
        gradients: &Tensor,
        stages: &mut S,
    ) -> Result<TokenScores, S::Error> {
        let targets = Targets { tokens: &self.tensors.targets, coefficients, temperature };
        let head = head_backward(model, &self.predicting(), targets, HEAD_CHUNK, gradients);
        // A prompt's last token predicts the first token of every answer: their gradients add up, in float32.
        let hidden = self.trace.hidden();
        let mut by_hidden = Tensor::zeros(hidden.size(), (gradients.kind(), hidden.device()));
        let _ = by_hidden.index_add_(0, &self.tensors.predictors, &head.by_hidden.to_kind(gradients.kind()));
        let by_hidden = by_hidden.to_kind(hidden.kind());
        model.backward_staged(self.trace, &by_hidden, gradients, stages)?;
        Ok(TokenScores { logprobs: head.logprobs, entropies: head.entropies })
    }
}
