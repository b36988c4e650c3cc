//! The vocabulary-wide end of the model: log-probabilities, entropies and their backward, some positions at a time, so
//! that `[positions, vocabulary]` never exists as a whole.
// Legend: `T` tokens, `M` scored positions, `C` positions of one chunk, `D` width, `V` vocabulary.

use pacs_torch::tch::{Device, Kind, Tensor, no_grad};
use pacs_torch::{accumulate, target_gradient};

use crate::Model;

/// Positions per chunk that keep a vocabulary of 150,000 below a gigabyte.
pub const DEFAULT_CHUNK: usize = 512;

/// Log-probability of each chosen token, and the entropy of the distribution it stands in.
///
/// `hidden`: `[T, D]`; `rows`: for each scored position the row of `hidden` that predicts, and the token. Log-softmax
/// of `logits / temperature` in float32. Returns two tensors `[M]` float32 (float64 for a float64 model), in nats.
///
/// Autograd sees through both, at the price of keeping the distributions; scoring runs it within
/// [`no_grad`], training uses [`head_backward`].
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
    let kind = softmax_kind(model);
    let (mut logprobs, mut entropies) = (Vec::new(), Vec::new());
    for rows in rows.chunks(chunk.max(1)) {
        let (index, tokens): (Vec<i64>, Vec<i64>) = rows.iter().copied().unzip();
        let index = Tensor::from_slice(&index).to_device(model.device());
        let tokens = Tensor::from_slice(&tokens).to_device(model.device());
        let all = log_softmax(model, &hidden.index_select(0, &index), temperature);
        logprobs.push(all.gather(1, &tokens.unsqueeze(1), false).squeeze_dim(1));
        entropies.push(entropy(&all, &all.exp()));
    }
    if rows.is_empty() {
        let empty = || Tensor::zeros([0], (kind, model.device()));
        return (empty(), empty());
    }
    (Tensor::cat(&logprobs, 0), Tensor::cat(&entropies, 0))
}

/// What [`head_backward`] computes.
#[derive(Debug)]
pub struct HeadGradient {
    /// Log-probability of each token (nats).
    pub logprobs: Vec<f32>,
    /// Entropy of each distribution (nats).
    pub entropies: Vec<f32>,
    /// Gradient with respect to the hidden rows, `[M, D]` in the kind of the model. Goes on through the trunk as
    /// `(hidden * dhidden).sum().backward()`.
    pub dhidden: Tensor,
    /// Gradient of the head's matrix, `[V, D]` float32 (float64 for a float64 model), to be added at
    /// [`ParameterLayout::head`](crate::ParameterLayout::head); autograd does not see it, tied or not.
    pub dweight: Tensor,
}

/// Forward and backward of the LM head for a loss that depends on the log-probabilities of chosen tokens.
///
/// `hidden`: `[M, D]`, the rows that predict; `tokens` and `coefficients` (d loss / d logprob): `M` each. The loss may
/// come from elsewhere: only its coefficients are needed. Chunks whose coefficients are all zero skip their backward.
///
/// # Panics
/// When the lengths differ or a token lies outside the vocabulary.
#[must_use]
pub fn head_backward(
    model: &Model,
    hidden: &Tensor,
    tokens: &[i64],
    coefficients: &[f32],
    temperature: f64,
    chunk: usize,
) -> HeadGradient {
    let (m, _d) = hidden.size2().expect("hidden is a matrix");
    assert!(tokens.len() == m as usize && coefficients.len() == tokens.len(), "{m} rows need as many tokens");
    no_grad(|| {
        let hidden = hidden.detach();
        let mut gradient = HeadGradient {
            logprobs: Vec::with_capacity(tokens.len()),
            entropies: Vec::with_capacity(tokens.len()),
            dhidden: hidden.zeros_like(),
            dweight: Tensor::default(),
        };
        let chunk = chunk.max(1);
        for (i, (tokens, coefficients)) in tokens.chunks(chunk).zip(coefficients.chunks(chunk)).enumerate() {
            let narrow = |x: &Tensor| x.narrow(0, (i * chunk) as i64, tokens.len() as i64);
            let dhidden = narrow(&gradient.dhidden);
            backward_chunk(model, &narrow(&hidden), tokens, coefficients, temperature, dhidden, &mut gradient);
        }
        if !gradient.dweight.defined() {
            gradient.dweight = model.head_weight().zeros_like().to_kind(softmax_kind(model));
        }
        gradient
    })
}

fn backward_chunk(
    model: &Model,
    hidden: &Tensor,
    tokens: &[i64],
    coefficients: &[f32],
    temperature: f64,
    mut dhidden: Tensor,
    gradient: &mut HeadGradient,
) {
    let dlogits = if model.device() == Device::Cpu && model.kind() != Kind::Double {
        dlogits_in_place(model, hidden, tokens, coefficients, temperature, gradient)
    } else {
        dlogits_by_tensors(model, hidden, tokens, coefficients, temperature, gradient)
    };
    if coefficients.iter().all(|&coefficient| coefficient == 0.0) {
        return;
    }
    dhidden.copy_(&dlogits.matmul(model.head_weight()));
    let products = dlogits.tr().matmul(hidden);
    if gradient.dweight.defined() {
        accumulate(&mut gradient.dweight, &products).expect("both were just made");
    } else {
        gradient.dweight = products.to_kind(softmax_kind(model));
    }
}

/// Gradient of the logits `[C, V]`, written over them, row by row in the cache.
fn dlogits_in_place(
    model: &Model,
    hidden: &Tensor,
    tokens: &[i64],
    coefficients: &[f32],
    temperature: f64,
    gradient: &mut HeadGradient,
) -> Tensor {
    let mut logits = model.logits(hidden);
    let scores = target_gradient(&mut logits, tokens, coefficients, temperature).expect("logits are contiguous");
    gradient.logprobs.extend(scores.iter().map(|score| score.logprob));
    gradient.entropies.extend(scores.iter().map(|score| score.entropy));
    logits
}

/// The same by tensor operations, for every device and kind.
fn dlogits_by_tensors(
    model: &Model,
    hidden: &Tensor,
    tokens: &[i64],
    coefficients: &[f32],
    temperature: f64,
    gradient: &mut HeadGradient,
) -> Tensor {
    let device = model.device();
    let tokens = Tensor::from_slice(tokens).to_device(device).unsqueeze(1);
    let all = log_softmax(model, hidden, temperature);
    gradient.logprobs.extend(to_vec(&all.gather(1, &tokens, false).squeeze_dim(1)));
    let mut probabilities = all.exp();
    gradient.entropies.extend(to_vec(&entropy(&all, &probabilities)));
    drop(all);
    let scale =
        Tensor::from_slice(coefficients).to_device(device).to_kind(probabilities.kind()).unsqueeze(1) / temperature;
    // d logprob / d logits = (one-hot - softmax) / temperature.
    let _ = probabilities.g_mul_(&-&scale);
    let _ = probabilities.scatter_add_(1, &tokens, &scale);
    probabilities.to_kind(model.kind())
}

/// `[C, V]` float32 from hidden rows `[C, D]`.
fn log_softmax(model: &Model, hidden: &Tensor, temperature: f64) -> Tensor {
    let kind = softmax_kind(model);
    // Float32 before anything is summed: bfloat16 loses the tail that ratios depend on.
    let logits = model.logits(hidden).to_kind(kind);
    if temperature == 1.0 {
        return logits.log_softmax(-1, kind);
    }
    (logits / temperature).log_softmax(-1, kind)
}

/// Row-wise `-sum p log p`, as a dot product, which needs no third `[C, V]`.
fn entropy(logprobs: &Tensor, probabilities: &Tensor) -> Tensor {
    -probabilities.unsqueeze(1).bmm(&logprobs.unsqueeze(2)).flatten(0, -1)
}

fn softmax_kind(model: &Model) -> Kind {
    if model.kind() == Kind::Double { Kind::Double } else { Kind::Float }
}

fn to_vec(x: &Tensor) -> Vec<f32> {
    Vec::try_from(x.to_kind(Kind::Float)).expect("a float32 vector")
}
