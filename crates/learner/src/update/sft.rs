//! Supervised fine-tuning: cross entropy of chosen tokens, averaged over the tokens of an update.

use std::convert::Infallible;

use pacs_algo::LearningRate;
use pacs_model::{Keep, Model, ModelConfig, NoHooks, Parameters};
use pacs_shape::{Division, Sharding};
use pacs_spec::{OptimizerSpec, WeightDecayOn};
use pacs_torch::tch::Tensor;

use super::batch::Text;
use super::pass::{PassTensors, TokenCoefficients};
use crate::comm::{Segment, segments};
use crate::error::TrainError;
use crate::weights::{Clipped, Optimizer, UpdateStep, sum_of_squares};

/// Settings of a [`FineTuner`].
#[derive(Clone, Debug, PartialEq)]
pub struct FineTunerSettings {
    /// AdamW hyperparameters, learning-rate schedule and gradient clipping.
    pub optimizer: OptimizerSpec,
    /// Number of updates, the length of the learning-rate schedule.
    pub updates: u64,
    /// Token budget of one forward and backward pass; a longer text gets a pass of its own.
    pub micro_batch_tokens: usize,
}

/// Cross entropy over a set of texts.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct FineTuneLoss {
    /// Sum over the learnt tokens (nats).
    pub sum: f64,
    /// Number of learnt tokens.
    pub targets: usize,
    /// Number of tokens that went through the model, context included.
    pub tokens: usize,
    /// Number of texts with at least one learnt token.
    pub texts: usize,
    /// Sum over those texts of the probability of sampling all their learnt tokens at temperature 1.
    pub probability_sum: f64,
}

impl FineTuneLoss {
    /// Returns the mean over the learnt tokens (nats), NaN without any.
    #[must_use]
    pub fn mean(&self) -> f64 {
        self.sum / self.targets as f64
    }

    /// Returns the mean probability of a whole answer: the pass rate at temperature 1 if every problem has
    /// one right answer.
    #[must_use]
    pub fn answer_probability(&self) -> f64 {
        self.probability_sum / self.texts as f64
    }
}

/// Outcome of one update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FineTuneReport {
    /// Loss of the weights before the update.
    pub loss: FineTuneLoss,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate that the schedule gave this update.
    pub learning_rate: f64,
    /// Whether the update was skipped because the gradient was not finite; the weights are unchanged then.
    pub skipped: bool,
}

/// Supervised fine-tuning of one model in one process. Uses the same model, backward and
/// optimizer as [`Trainer`](crate::Trainer).
#[derive(Debug)]
pub struct FineTuner {
    settings: FineTunerSettings,
    parameters: Parameters,
    optimizer: Optimizer,
    segments: Vec<Segment>,
    model: Model,
    /// Flat float32 gradient, in the layout of the parameters.
    gradients: Tensor,
}

impl FineTuner {
    /// Creates a fine-tuner at update 0.
    #[must_use]
    pub fn new(config: &ModelConfig, parameters: Parameters, settings: FineTunerSettings) -> Self {
        Self::over(config, Model::new(config, &parameters), parameters, settings)
    }

    /// Creates a fine-tuner of `adapters` over the frozen weights `base`; `config` is that of the adapters.
    #[must_use]
    pub fn adapted(config: &ModelConfig, base: &Parameters, adapters: Parameters, settings: FineTunerSettings) -> Self {
        Self::over(config, Model::adapted(config, base, &adapters), adapters, settings)
    }

    fn over(config: &ModelConfig, model: Model, parameters: Parameters, settings: FineTunerSettings) -> Self {
        let gradients = model.zero_gradients();
        let flat = &parameters.flat;
        let optimizer = Optimizer::new(flat.numel(), flat.kind(), flat.device());
        if let Some(master) = &optimizer.master {
            master.shallow_clone().copy_(flat);
        }
        let matrices_apart = settings.optimizer.weight_decay_on == WeightDecayOn::Matrices;
        let segments = segments(config, Division::alone(Sharding::Replicated), matrices_apart);
        Self { settings, parameters, optimizer, segments, model, gradients }
    }

    /// Returns the current weights: all of them, or the adapters.
    #[must_use]
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// Returns the gradient of the last [`accumulate`](Self::accumulate) or update, flat and in the layout
    /// of the parameters.
    pub fn gradients(&self) -> &Tensor {
        &self.gradients
    }

    /// Makes one optimizer update with `texts`.
    ///
    /// # Errors
    /// When a buffer cannot be updated in place.
    ///
    /// # Panics
    /// When a token lies outside the vocabulary.
    pub fn update(&mut self, texts: &[&Text]) -> Result<FineTuneReport, TrainError> {
        let loss = self.accumulate(texts);
        let spec = &self.settings.optimizer;
        let grad_norm = sum_of_squares(&self.gradients)?.sqrt();
        let rate = LearningRate {
            base: spec.learning_rate,
            warmup_updates: spec.warmup_updates,
            schedule: spec.schedule,
            final_ratio: spec.final_learning_rate_ratio,
            updates: self.settings.updates,
        };
        let learning_rate = rate.at(self.optimizer.total_updates + 1);
        let clipped = Clipped::new(grad_norm, spec);
        if let Some(clipped) = clipped {
            let grad_scale = clipped.scale;
            let weights = &self.parameters.flat;
            let gradients = &self.gradients;
            let of = |segment: &Segment| (segment.of(None, weights), segment.of(None, gradients));
            self.optimizer.update(&UpdateStep { spec, learning_rate, grad_scale }, &self.segments, of)?;
        }
        Ok(FineTuneReport { loss, grad_norm, learning_rate, skipped: clipped.is_none() })
    }

    /// Computes the gradient of the mean loss over the learnt tokens of `texts`, without an update.
    ///
    /// # Panics
    /// When a token lies outside the vocabulary.
    pub fn accumulate(&mut self, texts: &[&Text]) -> FineTuneLoss {
        let _ = self.gradients.zero_();
        let targets: usize = texts.iter().map(|text| text.targets()).sum();
        let coefficient = -1.0 / targets.max(1) as f32;
        let mut loss = FineTuneLoss { targets, ..FineTuneLoss::default() };
        let texts = with_targets(texts);
        for pass in self.passes(&texts) {
            let tensors = PassTensors::of_texts(pass, self.parameters.flat.device());
            let by_logprob = vec![coefficient; tensors.targets()];
            let coefficients = TokenCoefficients { by_logprob, by_entropy: Vec::new() };
            let open = in_place(tensors.open(&self.model, |_| Keep::All, &mut NoHooks));
            let scores = open.backward(&self.model, &coefficients, 1.0, &self.gradients, &mut NoHooks);
            loss.add(pass, &in_place(scores).logprobs);
        }
        loss
    }

    /// Computes the cross entropy of the learnt tokens of `texts` under the current weights.
    ///
    /// # Panics
    /// When a token lies outside the vocabulary.
    #[must_use]
    pub fn evaluate(&self, texts: &[&Text]) -> FineTuneLoss {
        let targets = texts.iter().map(|text| text.targets()).sum();
        let mut loss = FineTuneLoss { targets, ..FineTuneLoss::default() };
        let texts = with_targets(texts);
        for pass in self.passes(&texts) {
            let tensors = PassTensors::of_texts(pass, self.parameters.flat.device());
            loss.add(pass, &in_place(tensors.score(&self.model, 1.0, &mut NoHooks)).logprobs);
        }
        loss
    }

    /// Splits texts into consecutive passes within the token budget.
    fn passes<'t>(&self, texts: &'t [&'t Text]) -> Vec<&'t [&'t Text]> {
        let mut passes = Vec::new();
        let mut start = 0;
        let mut tokens = 0;
        for (end, text) in texts.iter().enumerate() {
            if end > start && tokens + text.tokens.len() > self.settings.micro_batch_tokens {
                passes.push(&texts[start..end]);
                (start, tokens) = (end, 0);
            }
            tokens += text.tokens.len();
        }
        if start < texts.len() {
            passes.push(&texts[start..]);
        }
        passes
    }
}

/// Unwraps the result of a pass without hooks, which cannot fail.
fn in_place<T>(result: Result<T, Infallible>) -> T {
    match result {
        Ok(value) => value,
        Err(never) => match never {},
    }
}

/// Selects the texts with at least one learnt token.
fn with_targets<'t>(texts: &[&'t Text]) -> Vec<&'t Text> {
    texts.iter().copied().filter(|text| text.targets() > 0).collect()
}

impl FineTuneLoss {
    fn add(&mut self, pass: &[&Text], logprobs: &[f32]) {
        self.sum -= logprobs.iter().map(|logprob| f64::from(*logprob)).sum::<f64>();
        self.texts += pass.len();
        let mut rest = logprobs;
        for text in pass {
            let (of_text, others) = rest.split_at(text.targets());
            self.probability_sum += of_text.iter().map(|logprob| f64::from(*logprob)).sum::<f64>().exp();
            rest = others;
        }
        self.tokens += pass.iter().map(|text| text.tokens.len()).sum::<usize>();
    }
}
