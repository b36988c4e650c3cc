//! The vocabulary-wide end of the model: log-probabilities, entropies and their backward, some positions at a time, so
//! that `[positions, vocabulary]` never exists as a whole.
// Legend: `T` tokens, `M` scored positions, `C` positions of one chunk, `D` width, `V` vocabulary.

use std::ops::Range;

use pacs_torch::tch::{Device, Kind, Tensor, no_grad};
use pacs_torch::{
    TargetScore, Units, add_product, add_weight_gradient, device_kernels, fixed_units, has_kernels, matmul,
    target_gradient,
};

use crate::Model;
use crate::layer::gradient_kind;
use crate::ops::launched;

/// Log-probability of each chosen token, and the entropy of the distribution it stands in.
///
/// `hidden`: `[T, D]`; `rows`: for each scored position the row of `hidden` that predicts, and the token. Log-softmax
/// of `logits / temperature` in float32. Returns two tensors `[M]` float32 (float64 for a float64 model), in nats.
///
/// # Panics
/// When a row lies outside `hidden` or a token outside the vocabulary.
pub fn answer_logprobs(
    model: &Model,
    hidden: &Tensor,
    rows: &[(i64, i64)],
    temperature: f64,
    chunk: usize,
) -> (Tensor, Tensor) {
    let kind = gradient_kind(model.kind());
    let (mut logprobs, mut entropies) = (Vec::new(), Vec::new());
    // Brought to the device once, for it is waited for then.
    let (index, tokens): (Vec<i64>, Vec<i64>) = rows.iter().copied().unzip();
    expect_within(model, &tokens);
    let host_tokens = tokens.clone();
    let [index, tokens] = [index, tokens].map(|values| Tensor::from_slice(&values).to_device(model.device()));
    for rows in chunks(rows.len(), chunk) {
        let (start, length) = (rows.start as i64, rows.len() as i64);
        let [index, tokens] = [&index, &tokens].map(|all| all.narrow(0, start, length));
        let mut logits = model.logits(&hidden.index_select(0, &index));
        if fixed_units().is_some() {
            // The sums of the kernel have one order, whatever the number of threads.
            let none = vec![0.0; rows.len()];
            let scores = target_gradient(&mut logits, &host_tokens[rows], &none, &[], temperature);
            let (of_chunk, entropies_of_chunk) = score_tensors(&scores.expect("logits are contiguous"));
            logprobs.push(of_chunk);
            entropies.push(entropies_of_chunk);
            continue;
        }
        if let Some(kernels) = device_kernels() {
            let scores = launched(kernels.target_scores(&logits, &tokens, None, temperature));
            logprobs.push(scores.logprobs);
            entropies.push(scores.entropies);
            continue;
        }
        let all = log_softmax(model, &logits, temperature);
        logprobs.push(all.gather(1, &tokens.unsqueeze(1), false).squeeze_dim(1));
        entropies.push(entropy(&all, &all.exp()));
    }
    if rows.is_empty() {
        let empty = || Tensor::zeros([0], (kind, model.device()));
        return (empty(), empty());
    }
    (Tensor::cat(&logprobs, 0), Tensor::cat(&entropies, 0))
}

/// Rows whose logits exist at once: at most `chunk`, and of one unit where the pass has units.
fn chunks(rows: usize, chunk: usize) -> Vec<Range<usize>> {
    let chunk = chunk.max(1);
    let cut = |unit: Range<usize>| {
        let end = unit.end;
        unit.step_by(chunk).map(move |start| start..(start + chunk).min(end))
    };
    match fixed_units() {
        Some(units) => {
            assert_eq!(units.scored().last().map_or(0, |last| last.end), rows, "units hold all scored rows");
            units.scored().iter().cloned().flat_map(cut).collect()
        }
        None => cut(0..rows).collect(),
    }
}

fn score_tensors(scores: &[TargetScore]) -> (Tensor, Tensor) {
    let (logprobs, entropies): (Vec<f32>, Vec<f32>) = scores.iter().map(|score| (score.logprob, score.entropy)).unzip();
    (Tensor::from_slice(&logprobs), Tensor::from_slice(&entropies))
}

/// The tokens that a loss depends on through their log-probabilities, one a row of hidden states, and through the
/// entropies of the distributions that they stand in.
#[derive(Clone, Copy, Debug)]
pub struct Targets<'a> {
    /// Index in the vocabulary.
    pub tokens: &'a [i64],
    /// Derivative of the loss by the token's log-probability. The loss may come from elsewhere.
    pub coefficients: &'a [f32],
    /// Derivative of the loss by the entropy of the token's distribution; empty where it depends on no entropy.
    pub entropy_coefficients: &'a [f32],
    /// Divides the logits.
    pub temperature: f64,
}

/// What [`head_backward`] computes.
#[derive(Debug)]
pub struct HeadGradient {
    /// Log-probability of each token (nats).
    pub logprobs: Vec<f32>,
    /// Entropy of each distribution (nats).
    pub entropies: Vec<f32>,
    /// Gradient by the hidden rows, `[M, D]` in the kind of the model.
    pub by_hidden: Tensor,
}

/// Forward and backward of the LM head for a loss that depends on the log-probabilities of chosen tokens and on the
/// entropies of the distributions that they stand in.
///
/// `hidden`: `[M, D]`, the rows that predict; `targets`: `M` of them; `chunk`: positions whose logits exist at once.
/// The gradient of the head's matrix, unless that is frozen, is added to `gradients`, as [`Model::zero_gradients`] makes it. Chunks whose
/// coefficients are all zero skip their backward.
///
/// # Panics
/// When the lengths differ or a token lies outside the vocabulary.
#[must_use]
pub fn head_backward(
    model: &Model,
    hidden: &Tensor,
    targets: Targets<'_>,
    chunk: usize,
    gradients: &Tensor,
) -> HeadGradient {
    let (m, _d) = hidden.size2().expect("hidden is a matrix");
    let count = targets.tokens.len();
    let fits = count == m as usize
        && targets.coefficients.len() == count
        && (targets.entropy_coefficients.is_empty() || targets.entropy_coefficients.len() == count);
    assert!(fits, "{m} rows need as many tokens and coefficients");
    expect_within(model, targets.tokens);
    no_grad(|| {
        let on_device = OnDevice::new(targets, model.device());
        let by_hidden = hidden.zeros_like();
        let mut scores = Scores::default();
        let mut by_weight = model.head_slot(gradients);
        for rows in chunks(count, chunk) {
            let (start, length) = (rows.start as i64, rows.len() as i64);
            let part = targets.part(rows.start, rows.len());
            let on_device = on_device.part(start, length);
            let narrow = |x: &Tensor| x.narrow(0, start, length);
            let hidden = narrow(hidden);
            let by_logits = part.by_logits(model, &on_device, &hidden, &mut scores);
            if part.coefficients.iter().chain(part.entropy_coefficients).any(|&coefficient| coefficient != 0.0) {
                if fixed_units().is_some() {
                    // The rows of a chunk are of one unit.
                    let unit = Units::new(&[rows.len()]);
                    narrow(&by_hidden).copy_(&matmul(&unit, &by_logits, model.head_weight()));
                    if let Some(by_weight) = &mut by_weight {
                        let added = add_weight_gradient(&unit, by_weight, &by_logits, &hidden);
                        added.expect("the slot is contiguous");
                    }
                    continue;
                }
                narrow(&by_hidden).copy_(&by_logits.matmul(model.head_weight()));
                if let Some(by_weight) = &mut by_weight {
                    add_product(by_weight, &by_logits, &hidden).expect("the slot is contiguous");
                }
            }
        }
        HeadGradient { logprobs: to_vec(&scores.logprobs), entropies: to_vec(&scores.entropies), by_hidden }
    })
}

/// The same on the device of the model, to which they are brought once: it is waited for then.
struct OnDevice {
    /// Chosen tokens, `[M]` int64.
    tokens: Tensor,
    /// Derivatives of the loss by the log-probs, `[M]` float32.
    coefficients: Tensor,
    /// `[M]` float32, where the loss depends on entropies.
    entropy_coefficients: Option<Tensor>,
}

impl OnDevice {
    fn new(targets: Targets<'_>, device: Device) -> Self {
        let Targets { tokens, coefficients, entropy_coefficients, .. } = targets;
        let numbers = |values: &[f32]| Tensor::from_slice(values).to_device(device);
        Self {
            tokens: Tensor::from_slice(tokens).to_device(device),
            coefficients: numbers(coefficients),
            entropy_coefficients: (!entropy_coefficients.is_empty()).then(|| numbers(entropy_coefficients)),
        }
    }

    fn part(&self, start: i64, length: i64) -> Self {
        let part = |all: &Tensor| all.narrow(0, start, length);
        Self {
            tokens: part(&self.tokens),
            coefficients: part(&self.coefficients),
            entropy_coefficients: self.entropy_coefficients.as_ref().map(part),
        }
    }
}

/// Refuses tokens that the vocabulary does not have.
fn expect_within(model: &Model, tokens: &[i64]) {
    let vocabulary = 0..model.config().vocab_size;
    assert!(tokens.iter().all(|token| vocabulary.contains(token)), "a token outside the vocabulary");
}

/// What the chunks so far say of their tokens. They stay on the device, so that it is not waited for after every chunk.
#[derive(Debug, Default)]
struct Scores {
    logprobs: Vec<Tensor>,
    entropies: Vec<Tensor>,
}

impl Scores {
    fn push(&mut self, logprobs: Tensor, entropies: Tensor) {
        self.logprobs.push(logprobs);
        self.entropies.push(entropies);
    }
}

impl Targets<'_> {
    /// Those of at most `length` rows from row `start` on.
    fn part(self, start: usize, length: usize) -> Self {
        let range = start..(start + length).min(self.tokens.len());
        let entropy_coefficients = self.entropy_coefficients.get(range.clone()).unwrap_or_default();
        let (tokens, coefficients) = (&self.tokens[range.clone()], &self.coefficients[range]);
        Self { tokens, coefficients, entropy_coefficients, ..self }
    }

    /// Gradient by the logits of one chunk, `[C, V]`; notes log-probabilities and entropies.
    fn by_logits(self, model: &Model, on_device: &OnDevice, hidden: &Tensor, noted: &mut Scores) -> Tensor {
        let logits = model.logits(hidden);
        let slope = model.cap_slope(&logits);
        let by_logits = self.by_capped(model, on_device, logits, noted);
        slope.map_or_else(|| by_logits.shallow_clone(), |slope| &by_logits * slope)
    }

    /// The same before what a cap does to logits.
    fn by_capped(self, model: &Model, on_device: &OnDevice, mut logits: Tensor, noted: &mut Scores) -> Tensor {
        let (by_logprob, by_entropy) = (self.coefficients, self.entropy_coefficients);
        // Written over the logits, row by row in the cache.
        if has_kernels(&logits) {
            let scores = target_gradient(&mut logits, self.tokens, by_logprob, by_entropy, self.temperature)
                .expect("logits are contiguous");
            let (logprobs, entropies) = score_tensors(&scores);
            noted.push(logprobs, entropies);
            return logits;
        }
        if let Some(kernels) = device_kernels() {
            let slopes = Some((&on_device.coefficients, on_device.entropy_coefficients.as_ref()));
            let scores = launched(kernels.target_scores(&logits, &on_device.tokens, slopes, self.temperature));
            noted.push(scores.logprobs, scores.entropies);
            return scores.by_logits.expect("slopes were given");
        }
        self.by_tensors(model, on_device, &logits, noted)
    }

    /// The same by tensor operations, for every device and kind.
    fn by_tensors(self, model: &Model, on_device: &OnDevice, logits: &Tensor, noted: &mut Scores) -> Tensor {
        let tokens = on_device.tokens.unsqueeze(1);
        let all = log_softmax(model, logits, self.temperature);
        let logprobs = all.gather(1, &tokens, false).squeeze_dim(1);
        let mut probabilities = all.exp();
        let entropies = entropy(&all, &probabilities);
        noted.push(logprobs, entropies.shallow_clone());
        let column = |coefficients: &Tensor| coefficients.to_kind(probabilities.kind()).unsqueeze(1) / self.temperature;
        let scale = column(&on_device.coefficients);
        // d logprob / d logits = (one-hot - softmax) / temperature,
        // d entropy / d logits = -softmax * (log-softmax + entropy) / temperature.
        if let Some(by_entropy) = &on_device.entropy_coefficients {
            let by_entropy = column(by_entropy);
            let factor = (all + entropies.unsqueeze(1)) * by_entropy + &scale;
            let _ = probabilities.g_mul_(&-factor);
        } else {
            drop(all);
            let _ = probabilities.g_mul_(&-&scale);
        }
        let _ = probabilities.scatter_add_(1, &tokens, &scale);
        probabilities.to_kind(model.kind())
    }
}

/// `[C, V]` float32 from logits `[C, V]`.
fn log_softmax(model: &Model, logits: &Tensor, temperature: f64) -> Tensor {
    let kind = gradient_kind(model.kind());
    // Float32 before anything is summed: bfloat16 loses the tail that ratios depend on.
    let logits = logits.to_kind(kind);
    if temperature == 1.0 {
        return logits.log_softmax(-1, kind);
    }
    (logits / temperature).log_softmax(-1, kind)
}

/// Row-wise `-sum p log p`, as a dot product, which needs no third `[C, V]`.
fn entropy(logprobs: &Tensor, probabilities: &Tensor) -> Tensor {
    -probabilities.unsqueeze(1).bmm(&logprobs.unsqueeze(2)).flatten(0, -1)
}

fn to_vec(parts: &[Tensor]) -> Vec<f32> {
    if parts.is_empty() {
        return Vec::new();
    }
    Vec::try_from(Tensor::cat(parts, 0).to_kind(Kind::Float)).expect("a float32 vector")
}
