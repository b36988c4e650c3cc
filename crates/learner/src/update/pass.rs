//! One pass through the model: log-probs and entropies, and the gradient for given coefficients.
//!
//! Shapes: `T` packed tokens, `M` answer tokens of the pass, `D` model width.

use std::ops::Range;
use std::rc::Rc;

use pacs_model::attention::{Packed, PackedRow, packed_positions};
use pacs_model::logprob::{Targets, answer_logprobs, head_backward};
use pacs_model::{Keep, LayerHooks, Model, RecordedRoutes, Replay, Routing, Trace, values, values_backward};
use pacs_shape::{PassShape, PassWork, RouteShape, head_chunk};
use pacs_torch::tch::{Device, Kind, Tensor, no_grad};
use pacs_torch::{Units, with_units};

use super::batch::{Pass, Text, TrainBatch};

/// A pass as tensors.
///
/// The last token of an answer predicts nothing, so it is not an input. An answer token is predicted by the token
/// before it, the first one by the last token of the prompt.
#[derive(Debug)]
pub(super) struct PassTensors {
    rows: Vec<PackedRow>,
    /// Input tokens, `[T]` int64.
    tokens: Tensor,
    /// Rotary position of each input within its prompt and answer, `[T]` int64.
    positions: Tensor,
    /// Row of the hidden states that predicts each answer token, `[M]` int64.
    predictors: Tensor,
    /// Answer tokens, `M` of them, in the order of `predictors`.
    targets: Vec<i64>,
    /// Place in the batch and number of tokens of each sequence, in the order of `targets`.
    pub(super) spans: Vec<(usize, usize)>,
    /// Units that are computed as if each were alone; `None` without `resources.deterministic`.
    units: Option<Rc<Units>>,
    /// Experts of the inputs; `None` where routers choose them.
    routes: Option<Rc<RecordedRoutes>>,
}

/// Log-probs and entropies of a pass, in the order of its targets.
#[derive(Clone, Debug, Default)]
pub(super) struct TokenScores {
    /// Log-prob of each answer token (nats).
    pub(super) logprobs: Vec<f32>,
    /// Entropy of the distribution at each answer token (nats).
    pub(super) entropies: Vec<f32>,
    /// Share of the layers with experts whose router would have chosen other ones than are replayed, at the input that predicts each
    /// answer token; empty where none are replayed.
    pub(super) rerouted: Vec<f32>,
}

/// What a pass says of the tokens of one answer.
#[derive(Clone, Copy, Debug)]
pub(super) struct AnswerScores<'a> {
    /// See [`TokenScores::logprobs`].
    pub(super) logprobs: &'a [f32],
    /// See [`TokenScores::rerouted`].
    pub(super) rerouted: &'a [f32],
}

impl TokenScores {
    /// The part of the answer whose tokens are `range`.
    pub(super) fn of(&self, range: Range<usize>) -> AnswerScores<'_> {
        let rerouted = self.rerouted.get(range.clone()).unwrap_or_default();
        AnswerScores { logprobs: &self.logprobs[range], rerouted }
    }
}

/// Derivatives of a loss with respect to a pass's scores, in the order of its targets.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct TokenCoefficients {
    /// With respect to the log-prob of each token.
    pub(super) by_logprob: Vec<f32>,
    /// With respect to each entropy; empty for losses without an entropy term.
    pub(super) by_entropy: Vec<f32>,
}

impl TokenCoefficients {
    /// Whether any coefficient is non-zero; without one there is no backward to run.
    pub(super) fn any(&self) -> bool {
        self.by_logprob.iter().chain(&self.by_entropy).any(|coefficient| *coefficient != 0.0)
    }

    /// Appends the coefficients of the next answer.
    pub(super) fn append(&mut self, next: &Self) {
        self.by_logprob.extend(&next.by_logprob);
        self.by_entropy.extend(&next.by_entropy);
    }
}

/// The parts of a [`PassTensors`] on the host, before they become tensors.
#[derive(Debug, Default)]
struct Parts {
    tokens: Vec<i64>,
    predictors: Vec<i64>,
    targets: Vec<i64>,
    rows: Vec<PackedRow>,
    spans: Vec<(usize, usize)>,
    routes: Vec<u8>,
}

impl Parts {
    fn on(self, device: Device) -> PassTensors {
        let tensor = |values: &[i64]| Tensor::from_slice(values).to_device(device);
        PassTensors {
            tokens: tensor(&self.tokens),
            positions: tensor(&packed_positions(&self.rows)),
            predictors: tensor(&self.predictors),
            targets: self.targets,
            rows: self.rows,
            spans: self.spans,
            units: None,
            routes: None,
        }
    }
}

impl PassTensors {
    /// Packs a pass. With `replay` its tokens are computed by the experts that the batch has for them, which must be in order
    /// ([`TrainBatch::check_routes`]).
    pub(super) fn new(batch: &TrainBatch, pass: &Pass, device: Device, replay: Option<RouteShape>) -> Self {
        let mut parts = Parts::default();
        let Parts { tokens, predictors, targets, rows, spans, routes } = &mut parts;
        for row in &pass.rows {
            let prompt = &batch.prompts[&row.group];
            tokens.extend(prompt.iter().map(|token| i64::from(*token)));
            if replay.is_some() {
                routes.extend(&batch.prompt_routes[&row.group]);
            }
            let prompt_end = tokens.len() as i64 - 1;
            let mut answer_lens = Vec::new();
            for &place in &row.answers {
                let answer = &batch.sequences[place].tokens;
                let inputs = &answer[..answer.len() - 1];
                predictors.push(prompt_end);
                predictors.extend((0..inputs.len()).map(|offset| (tokens.len() + offset) as i64));
                targets.extend(answer.iter().map(|token| i64::from(*token)));
                tokens.extend(inputs.iter().map(|token| i64::from(*token)));
                if replay.is_some() {
                    routes.extend(&batch.sequences[place].routes);
                }
                if !inputs.is_empty() {
                    answer_lens.push(inputs.len());
                }
                spans.push((place, answer.len()));
            }
            rows.push(PackedRow { prompt_len: prompt.len(), answer_lens });
        }
        let units = (!pass.units.is_empty()).then(|| Rc::new(units(batch, pass, rows)));
        let routes = replay.map(|shape| Rc::new(RecordedRoutes::new(shape, std::mem::take(routes))));
        Self { units, routes, ..parts.on(device) }
    }

    /// Runs `work` within the pass's units, if it has any.
    fn within<T>(&self, work: impl FnOnce() -> T) -> T {
        match &self.units {
            Some(units) => with_units(units, work),
            None => work(),
        }
    }

    /// Packs plain texts, each with at least one learnt token; the learnt tokens are the targets.
    pub(super) fn of_texts(texts: &[&Text], device: Device) -> Self {
        let mut parts = Parts::default();
        let Parts { tokens, predictors, targets, rows, spans, routes: _ } = &mut parts;
        for (place, text) in texts.iter().enumerate() {
            let start = tokens.len();
            let learnt = (1..text.tokens.len()).filter(|at| text.learnt[*at]);
            for at in learnt {
                predictors.push((start + at - 1) as i64);
                targets.push(i64::from(text.tokens[at]));
            }
            let inputs = &text.tokens[..text.tokens.len() - 1];
            tokens.extend(inputs.iter().map(|token| i64::from(*token)));
            rows.push(PackedRow { prompt_len: inputs.len(), answer_lens: Vec::new() });
            spans.push((place, text.targets()));
        }
        parts.on(device)
    }

    /// Amount of computation in a forward and backward of the pass.
    pub(super) fn work(&self) -> PassWork {
        let mut work = PassWork { targets: self.targets.len() as f64, ..PassWork::default() };
        self.rows.iter().for_each(|row| work.add_row(row.prompt_len, &row.answer_lens));
        work
    }

    /// Number of answer tokens.
    pub(super) fn targets(&self) -> usize {
        self.targets.len()
    }

    /// Value estimates of the return before each answer token.
    ///
    /// # Errors
    /// Those of `hooks`.
    pub(super) fn values<S: LayerHooks>(&self, critic: &Model, hooks: &mut S) -> Result<Vec<f32>, S::Error> {
        let compute = || {
            let (mut attention, mut routing) = (Packed::new(&self.rows, critic), Routing::Own);
            let hidden =
                critic.hidden_with_hooks(&self.tokens, &self.positions, &mut attention, &mut routing, hooks)?;
            Ok(values(critic, &hidden.index_select(0, &self.predictors)))
        };
        self.within(|| no_grad(compute))
    }

    /// Computes log-probs and entropies of the answer tokens, without gradient.
    ///
    /// # Errors
    /// Those of `hooks`.
    pub(super) fn score<S: LayerHooks>(
        &self,
        model: &Model,
        temperature: f64,
        hooks: &mut S,
    ) -> Result<TokenScores, S::Error> {
        let compute = || {
            let (mut attention, mut replay) = (Packed::new(&self.rows, model), self.replay());
            let mut routing = Routing::replaying(replay.as_mut());
            let hidden = model.hidden_with_hooks(&self.tokens, &self.positions, &mut attention, &mut routing, hooks)?;
            let scores = self.score_hidden(model, &hidden.index_select(0, &self.predictors), temperature);
            Ok(TokenScores { rerouted: self.rerouted(replay.as_ref()), ..scores })
        };
        self.within(|| no_grad(compute))
    }

    fn replay(&self) -> Option<Replay> {
        self.routes.clone().map(Replay::new)
    }

    /// See [`TokenScores::rerouted`].
    fn rerouted(&self, replay: Option<&Replay>) -> Vec<f32> {
        let (Some(routes), Some(layers)) = (&self.routes, replay.and_then(Replay::rerouted)) else {
            return Vec::new();
        };
        let share = layers.index_select(0, &self.predictors).to_kind(Kind::Float) / routes.mixtures() as f64;
        Vec::try_from(share).expect("a vector of numbers")
    }

    /// Log-probs and entropies alone.
    fn score_hidden(&self, model: &Model, hidden: &Tensor, temperature: f64) -> TokenScores {
        let rows: Vec<(i64, i64)> = (0..).zip(self.targets.iter().copied()).collect();
        let (logprobs, entropies) = answer_logprobs(model, hidden, &rows, temperature, chunk_of(model));
        let host = |x: Tensor| Vec::try_from(x.to_kind(Kind::Float)).expect("a vector of numbers");
        TokenScores { logprobs: host(logprobs), entropies: host(entropies), rerouted: Vec::new() }
    }

    /// Runs the trunk forward for a later backward; `keep` decides which activations are kept.
    ///
    /// # Errors
    /// Those of `hooks`.
    pub(super) fn open<'a, S: LayerHooks>(
        &'a self,
        model: &Model,
        keep: impl FnOnce(&PassShape) -> Keep,
        hooks: &mut S,
    ) -> Result<OpenPass<'a>, S::Error> {
        self.within(|| {
            let attention = Packed::new(&self.rows, model);
            let tokens = self.tokens.numel() as u64;
            let scored = self.targets.len() as u64;
            let keep = keep(&PassShape { tokens, scored, ..attention.shape() });
            let mut replay = self.replay();
            let mut routing = Routing::replaying(replay.as_mut());
            let (tokens, positions) = (&self.tokens, &self.positions);
            let trace = model.forward_with_hooks(tokens, positions, attention, keep, &mut routing, hooks)?;
            Ok(OpenPass { tensors: self, trace, replay })
        })
    }
}

/// A pass after its trunk's forward, waiting for the coefficients of its backward.
#[derive(Debug)]
pub(super) struct OpenPass<'a> {
    tensors: &'a PassTensors,
    trace: Trace,
    replay: Option<Replay>,
}

impl OpenPass<'_> {
    /// Hidden states that predict the answer tokens, `[M, D]`.
    fn predicting(&self) -> Tensor {
        self.trace.hidden().index_select(0, &self.tensors.predictors)
    }

    /// Computes log-probs and entropies of the answer tokens.
    pub(super) fn score(&self, model: &Model, temperature: f64) -> TokenScores {
        let scores = || no_grad(|| self.tensors.score_hidden(model, &self.predicting(), temperature));
        TokenScores { rerouted: self.tensors.rerouted(self.replay.as_ref()), ..self.tensors.within(scores) }
    }

    /// Adds the pass's gradient to `gradients` (flat, in the layout of the parameters).
    ///
    /// `coefficients` are the derivatives of the loss, in the order of the targets.
    ///
    /// # Errors
    /// Those of `hooks`.
    pub(super) fn backward<S: LayerHooks>(
        self,
        model: &Model,
        coefficients: &TokenCoefficients,
        temperature: f64,
        gradients: &Tensor,
        hooks: &mut S,
    ) -> Result<TokenScores, S::Error> {
        let TokenCoefficients { by_logprob, by_entropy } = coefficients;
        let targets = Targets {
            tokens: &self.tensors.targets,
            coefficients: by_logprob,
            entropy_coefficients: by_entropy,
            temperature,
        };
        let tensors = self.tensors;
        let rerouted = tensors.rerouted(self.replay.as_ref());
        tensors.within(|| {
            let head = head_backward(model, &self.predicting(), targets, chunk_of(model), gradients);
            self.trunk_backward(model, &head.by_hidden, gradients, hooks)?;
            Ok(TokenScores { logprobs: head.logprobs, entropies: head.entropies, rerouted })
        })
    }

    /// Value estimates, from the trunk that this pass has run through.
    pub(super) fn values(&self, critic: &Model) -> Vec<f32> {
        self.tensors.within(|| values(critic, &self.predicting()))
    }

    /// Adds the gradient of a value loss to `gradients`; `by_value` holds its derivative with respect to each value, in
    /// the order of the targets.
    ///
    /// # Errors
    /// Those of `hooks`.
    pub(super) fn values_backward<S: LayerHooks>(
        self,
        critic: &Model,
        by_value: &[f32],
        gradients: &Tensor,
        hooks: &mut S,
    ) -> Result<(), S::Error> {
        let tensors = self.tensors;
        tensors.within(|| {
            let by_hidden = values_backward(critic, &self.predicting(), by_value, gradients);
            self.trunk_backward(critic, &by_hidden, gradients, hooks)
        })
    }

    /// Adds the gradient of everything below the head, given the gradient of the predicting rows, `[M, D]`.
    fn trunk_backward<S: LayerHooks>(
        self,
        model: &Model,
        by_predicting: &Tensor,
        gradients: &Tensor,
        hooks: &mut S,
    ) -> Result<(), S::Error> {
        // The prompt's last token predicts the first token of every answer, so several gradients add up in its row.
        // They are summed in float32.
        let hidden = self.trace.hidden();
        let kind = if hidden.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let mut by_hidden = Tensor::zeros(hidden.size(), (kind, hidden.device()));
        let _ = by_hidden.index_add_(0, &self.tensors.predictors, &by_predicting.to_kind(kind));
        let by_hidden = by_hidden.to_kind(hidden.kind());
        model.backward_with_hooks(self.trace, &by_hidden, gradients, hooks)
    }
}

/// Yields each sequence's place with its range among the pass's answer tokens.
pub(super) fn spans(tensors: &PassTensors) -> impl Iterator<Item = (usize, Range<usize>)> + '_ {
    tensors.spans.iter().scan(0, |start, &(place, tokens)| {
        let range = *start..*start + tokens;
        *start = range.end;
        Some((place, range))
    })
}

/// Scored positions whose logits exist at once.
fn chunk_of(model: &Model) -> usize {
    head_chunk(model.device() == Device::Cpu)
}

/// Input tokens and answer tokens of each unit of a pass.
fn units(batch: &TrainBatch, pass: &Pass, packed: &[PackedRow]) -> Units {
    let mut rows = packed.iter().zip(&pass.rows);
    let of_units = pass.units.iter().map(|count| {
        rows.by_ref().take(*count).fold((0, 0), |(tokens, scored), (packed, row)| {
            let own: usize = row.answers.iter().map(|place| batch.sequences[*place].tokens.len()).sum();
            (tokens + packed.tokens(), scored + own)
        })
    });
    let (tokens, scored): (Vec<usize>, Vec<usize>) = of_units.unzip();
    Units::with_scored(&tokens, &scored)
}
