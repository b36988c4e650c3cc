use pacs_shape::head_chunk;
use pacs_torch::tch::{Device, Tensor, no_grad};

use crate::Model;
use crate::attention::{Packed, PackedRow, packed_positions};
use crate::logprob::answer_logprobs;

/// Why an item cannot be scored.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScoreError {
    /// Nothing predicts the first token.
    #[error("item {item} has an empty prompt; put the begin-of-text token there")]
    EmptyPrompt {
        /// Index of the item.
        item: usize,
    },
    /// A token is not one of the model's.
    #[error("item {item} holds token {token}; the model's vocabulary ends at {last}", last = vocab_size - 1)]
    UnknownToken {
        /// Index of the item.
        item: usize,
        /// Id of the token, which the vocabulary does not have.
        token: u32,
        /// Size of the vocabulary.
        vocab_size: i64,
    },
}

/// Log-probability of every token of every item, given its prompt and the tokens before.
///
/// An item is a prompt and its tokens. At most `token_budget` tokens go through the model at once (a longer item goes
/// alone); consecutive items with one prompt share its computation.
///
/// # Errors
/// When an item has an empty prompt or a token outside the vocabulary.
pub fn score(
    model: &Model,
    items: Vec<(Vec<u32>, Vec<u32>)>,
    temperature: f64,
    token_budget: usize,
) -> Result<Vec<Vec<f32>>, ScoreError> {
    check(&items, model.config().vocab_size)?;
    let mut scores = Vec::with_capacity(items.len());
    let mut batch = Batch::default();
    for (prompt, tokens) in &items {
        if batch.tokens_with(prompt, tokens) > token_budget && !batch.rows.is_empty() {
            scores.extend(std::mem::take(&mut batch).score(model, temperature));
        }
        batch.push(prompt, tokens);
    }
    scores.extend(batch.score(model, temperature));
    Ok(scores)
}

fn check(items: &[(Vec<u32>, Vec<u32>)], vocab_size: i64) -> Result<(), ScoreError> {
    for (item, (prompt, tokens)) in items.iter().enumerate() {
        if prompt.is_empty() {
            return Err(ScoreError::EmptyPrompt { item });
        }
        if let Some(&token) = prompt.iter().chain(tokens).find(|&&token| i64::from(token) >= vocab_size) {
            return Err(ScoreError::UnknownToken { item, token, vocab_size });
        }
    }
    Ok(())
}

/// Items that go through the model together.
#[derive(Default)]
struct Batch<'a> {
    rows: Vec<PackedRow>,
    /// Prompt of the last row.
    prompt: &'a [u32],
    tokens: Vec<i64>,
    /// For every scored token the row that predicts it, and the token.
    scored: Vec<(i64, i64)>,
    lengths: Vec<usize>,
}

impl<'a> Batch<'a> {
    fn tokens_with(&self, prompt: &[u32], tokens: &[u32]) -> usize {
        let shared = !self.rows.is_empty() && self.prompt == prompt;
        self.tokens.len() + tokens.len() + if shared { 0 } else { prompt.len() }
    }

    fn push(&mut self, prompt: &'a [u32], tokens: &[u32]) {
        if self.rows.is_empty() || self.prompt != prompt {
            self.rows.push(PackedRow { prompt_len: prompt.len(), answer_lens: Vec::new() });
            self.tokens.extend(prompt.iter().map(|&token| i64::from(token)));
            self.prompt = prompt;
        }
        let row = self.rows.last_mut().expect("a row was pushed");
        let prompt_end = self.tokens.len() - row.tokens() + prompt.len();
        row.answer_lens.push(tokens.len());
        let answer_start = self.tokens.len() as i64;
        for (i, &token) in tokens.iter().enumerate() {
            // The prompt's last token predicts the first one.
            let predictor = if i == 0 { prompt_end as i64 - 1 } else { answer_start + i as i64 - 1 };
            self.scored.push((predictor, i64::from(token)));
            self.tokens.push(i64::from(token));
        }
        self.lengths.push(tokens.len());
    }

    fn score(self, model: &Model, temperature: f64) -> Vec<Vec<f32>> {
        if self.rows.is_empty() {
            return Vec::new();
        }
        let logprobs: Vec<f32> = no_grad(|| {
            let place = |values: &[i64]| Tensor::from_slice(values).to_device(model.device());
            let (tokens, positions) = (place(&self.tokens), place(&packed_positions(&self.rows)));
            let chunk = head_chunk(model.device() == Device::Cpu);
            let hidden = model.hidden(&tokens, &positions, &mut Packed::new(&self.rows, model));
            let (logprobs, _) = answer_logprobs(model, &hidden, &self.scored, temperature, chunk);
            Vec::try_from(logprobs.to_kind(pacs_torch::tch::Kind::Float)).expect("a float32 vector")
        });
        let mut rest = logprobs.as_slice();
        self.lengths
            .iter()
            .map(|&length| {
                let (scores, behind) = rest.split_at(length);
                rest = behind;
                scores.to_vec()
            })
            .collect()
    }
}
