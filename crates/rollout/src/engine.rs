//! Generation: groups in, finished samples out, one decode step at a time.

use std::collections::VecDeque;
use std::sync::Arc;

use pacs_model::{Model, ModelConfig, Parameters};
use pacs_text::Tokenizer;
use pacs_torch::Filters;
use pacs_torch::tch::{Device, Kind, TchError, Tensor, no_grad};
use pacs_types::{FinishReason, NoiseKey, Sample, VersionSpan, WeightVersion};

use crate::cache::KvCache;
use crate::sampler::{RowSampling, Sampled, sample};
use crate::stop::{cut_at_stop, tail_has_stop};

/// How the samples of a group are drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingOptions {
    /// Divides the logits; above 0.
    pub temperature: f64,
    /// Nucleus, above 0 to 1; 1 is off.
    pub top_p: f64,
    /// Most probable tokens kept; 0 is off.
    pub top_k: u32,
    /// Least probability relative to the most probable token, 0 to below 1; 0 is off.
    pub min_p: f64,
    /// Most tokens of an answer, at least 1.
    pub max_new_tokens: u32,
    /// Strings that end an answer, besides the model's end tokens.
    pub stop: Vec<String>,
}

impl SamplingOptions {
    fn filters(&self) -> Filters {
        Filters { top_k: self.top_k, top_p: self.top_p, min_p: self.min_p }
    }
}

/// One prompt and the samples that are wanted of it.
#[derive(Clone, Debug)]
pub struct GroupJob {
    /// The caller's name for the group; comes back with every sample.
    pub ticket: u64,
    /// Rendered prompt, not empty.
    pub prompt: Vec<u32>,
    /// Index and noise of each sample.
    pub samples: Vec<(u32, NoiseKey)>,
    /// How they are drawn.
    pub options: SamplingOptions,
}

/// A sample that is complete.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// Ticket of its group.
    pub ticket: u64,
    /// Index within the group.
    pub index: u32,
    /// The sample.
    pub sample: Sample,
}

/// What the engine may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineLimits {
    /// Samples that are generated at once.
    pub rows: usize,
    /// Prompt tokens of one prefill pass (a longer prompt goes alone).
    pub prefill_tokens: usize,
}

/// Why generation cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A group that cannot be generated.
    #[error("group {ticket}: {problem}")]
    Refused {
        /// Its ticket.
        ticket: u64,
        /// What is wrong with it.
        problem: String,
    },
    /// libtorch failed.
    #[error("libtorch: {0}")]
    Torch(#[from] TchError),
    /// The text of an answer could not be made.
    #[error("decode answer: {0}")]
    Text(String),
}

/// Continuous batching over one model: samples leave when they end and waiting ones take their place.
#[derive(Debug)]
pub struct Engine {
    model: Model,
    parameters: Parameters,
    tokenizer: Arc<Tokenizer>,
    config: ModelConfig,
    limits: EngineLimits,
    device: Device,
    version: WeightVersion,
    cache: KvCache,
    waiting: VecDeque<GroupJob>,
    rows: Vec<Row>,
    generated_tokens: u64,
}

/// One sample in the making.
#[derive(Debug)]
struct Row {
    ticket: u64,
    index: u32,
    noise: NoiseKey,
    options: Arc<SamplingOptions>,
    prompt_tokens: usize,
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
    /// Empty unless the options cut something off.
    sampled_logprobs: Vec<f32>,
    spans: Vec<VersionSpan>,
    entropy_sum: f64,
}

impl Row {
    /// Notes that `version` of the weights generated one more token.
    fn extend_span(&mut self, version: WeightVersion) {
        match self.spans.last_mut() {
            Some(span) if span.version == version => span.tokens += 1,
            _ => self.spans.push(VersionSpan { version, tokens: 1 }),
        }
    }
}

impl Engine {
    /// An engine around `parameters`, which [`Self::parameters_mut`] may replace between steps.
    #[must_use]
    pub fn new(
        config: ModelConfig,
        parameters: Parameters,
        version: WeightVersion,
        tokenizer: Arc<Tokenizer>,
        limits: EngineLimits,
    ) -> Self {
        let (kind, device) = (parameters.flat.kind(), parameters.flat.device());
        let model = Model::new(&config, &parameters);
        let cache = KvCache::new(&config, limits.rows, kind, device);
        let (waiting, rows, generated_tokens) = (VecDeque::new(), Vec::new(), 0);
        Self { model, parameters, tokenizer, config, limits, device, version, cache, waiting, rows, generated_tokens }
    }

    /// The weights, to be overwritten in place between two steps; samples may be running. Later tokens come from the new
    /// ones and carry `version`; what the cache holds of earlier tokens stays.
    pub fn parameters_mut(&mut self, version: WeightVersion) -> &mut Parameters {
        self.version = version;
        &mut self.parameters
    }

    /// How many samples could start at once.
    #[must_use]
    pub fn free_samples(&self) -> usize {
        let waiting: usize = self.waiting.iter().map(|job| job.samples.len()).sum();
        self.limits.rows.saturating_sub(self.rows.len() + waiting)
    }

    /// Samples running or waiting.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.rows.is_empty() && self.waiting.is_empty()
    }

    /// Samples that are being generated now.
    #[must_use]
    pub fn running(&self) -> usize {
        self.rows.len()
    }

    /// Tokens of answers generated so far.
    #[must_use]
    pub fn generated_tokens(&self) -> u64 {
        self.generated_tokens
    }

    /// Puts a group in line.
    ///
    /// # Errors
    /// [`EngineError::Refused`] when its options make no sense for this model.
    pub fn submit(&mut self, job: GroupJob) -> Result<(), EngineError> {
        let refuse = |problem: String| Err(EngineError::Refused { ticket: job.ticket, problem });
        if job.prompt.is_empty() {
            return refuse("the prompt has no tokens".into());
        }
        if let Some(token) = job.prompt.iter().find(|token| i64::from(**token) >= self.config.vocab_size) {
            return refuse(format!("prompt token {token} is outside the vocabulary of {}", self.config.vocab_size));
        }
        if job.options.max_new_tokens == 0 {
            return refuse("max_new_tokens is 0".into());
        }
        let SamplingOptions { temperature, top_p, min_p, .. } = job.options;
        if !(temperature > 0.0 && top_p > 0.0 && (0.0..1.0).contains(&min_p)) {
            return refuse(format!(
                "temperature {temperature} and top_p {top_p} must be above 0, min_p {min_p} 0 to below 1"
            ));
        }
        let longest = job.prompt.len() + job.options.max_new_tokens as usize;
        if longest > self.config.max_positions {
            return refuse(format!(
                "prompt and answer may take {longest} tokens, the model has {} positions",
                self.config.max_positions
            ));
        }
        self.waiting.push_back(job);
        Ok(())
    }

    /// Forgets a group: its waiting and running samples never finish.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn cancel(&mut self, ticket: u64) -> Result<(), EngineError> {
        self.waiting.retain(|job| job.ticket != ticket);
        for position in (0..self.rows.len()).rev() {
            if self.rows[position].ticket == ticket {
                self.cache.swap_remove(position)?;
                self.rows.swap_remove(position);
            }
        }
        Ok(())
    }

    /// Starts what fits, generates one token for every running sample, and returns the samples that ended.
    ///
    /// # Errors
    /// When libtorch fails; the engine must not be used afterwards.
    pub fn step(&mut self) -> Result<Vec<Finished>, EngineError> {
        no_grad(|| {
            let mut finished = self.admit()?;
            if !self.rows.is_empty() {
                finished.extend(self.decode()?);
            }
            Ok(finished)
        })
    }

    /// Prefills waiting groups into free rows; each new row gets its first token.
    fn admit(&mut self) -> Result<Vec<Finished>, EngineError> {
        let mut finished = Vec::new();
        loop {
            let started = self.take_startable();
            if started.is_empty() {
                return Ok(finished);
            }
            finished.extend(self.prefill(started)?);
        }
    }

    /// The next groups, or parts of one, that fit into free rows and one prefill pass.
    fn take_startable(&mut self) -> Vec<GroupJob> {
        let mut free = self.limits.rows - self.rows.len();
        let mut tokens = 0;
        let mut started = Vec::new();
        while let Some(mut job) = self.waiting.pop_front() {
            let too_long = !started.is_empty() && tokens + job.prompt.len() > self.limits.prefill_tokens;
            if free == 0 || too_long {
                self.waiting.push_front(job);
                break;
            }
            if job.samples.len() > free {
                let rest = GroupJob { samples: job.samples.split_off(free), ..job.clone() };
                self.waiting.push_front(rest);
            }
            free -= job.samples.len();
            tokens += job.prompt.len();
            started.push(job);
        }
        started
    }

    fn prefill(&mut self, jobs: Vec<GroupJob>) -> Result<Vec<Finished>, EngineError> {
        let first_new = self.rows.len();
        let mut tokens: Vec<i64> = Vec::new();
        let mut positions: Vec<i64> = Vec::new();
        // The last token of each prompt, once for every sample that goes on from it.
        let mut last: Vec<i64> = Vec::new();
        let shapes: Vec<(usize, usize)> = jobs.iter().map(|job| (job.prompt.len(), job.samples.len())).collect();
        for job in jobs {
            tokens.extend(job.prompt.iter().map(|token| i64::from(*token)));
            positions.extend(0..job.prompt.len() as i64);
            let options = Arc::new(job.options);
            for (index, noise) in job.samples {
                last.push(tokens.len() as i64 - 1);
                self.rows.push(Row {
                    ticket: job.ticket,
                    index,
                    noise,
                    options: Arc::clone(&options),
                    prompt_tokens: job.prompt.len(),
                    tokens: Vec::new(),
                    logprobs: Vec::new(),
                    sampled_logprobs: Vec::new(),
                    spans: Vec::new(),
                    entropy_sum: 0.0,
                });
            }
        }
        let (tokens, positions) = (self.indices(&tokens), self.indices(&positions));
        let mut attention = self.cache.prefill(&shapes)?;
        let hidden = self.model.hidden(&tokens, &positions, &mut attention);
        let logits = self.model.logits(&hidden.f_index_select(0, &self.indices(&last))?);
        self.take_tokens(first_new, &logits)
    }

    fn decode(&mut self) -> Result<Vec<Finished>, EngineError> {
        let last = |row: &Row| i64::from(*row.tokens.last().expect("a running row has its first token"));
        let tokens: Vec<i64> = self.rows.iter().map(last).collect();
        let positions: Vec<i64> =
            self.rows.iter().map(|row| (row.prompt_tokens + row.tokens.len()) as i64 - 1).collect();
        let (tokens, positions) = (self.indices(&tokens), self.indices(&positions));
        let mut attention = self.cache.decode()?;
        let hidden = self.model.hidden(&tokens, &positions, &mut attention);
        let logits = self.model.logits(&hidden);
        self.take_tokens(0, &logits)
    }

    fn indices(&self, values: &[i64]) -> Tensor {
        Tensor::from_slice(values).to_kind(Kind::Int64).to_device(self.device)
    }

    /// Draws the next token of rows `first..` from their logits, and removes the rows that end with it.
    fn take_tokens(&mut self, first: usize, logits: &Tensor) -> Result<Vec<Finished>, EngineError> {
        let wanted: Vec<RowSampling> = self.rows[first..]
            .iter()
            .map(|row| RowSampling {
                temperature: row.options.temperature,
                filters: row.options.filters(),
                uniform: row.noise.uniform(row.tokens.len() as u64),
            })
            .collect();
        let Sampled { tokens, logprobs, sampled_logprobs, entropies } = sample(logits, &wanted)?;
        self.generated_tokens += tokens.len() as u64;
        let mut finished = Vec::new();
        // From the back, so that removing a row moves only rows that were looked at already.
        for (offset, token) in tokens.iter().enumerate().rev() {
            let position = first + offset;
            let row = &mut self.rows[position];
            row.tokens.push(u32::try_from(*token).expect("a token is a vocabulary index"));
            row.logprobs.push(logprobs[offset]);
            if row.options.filters().cut() {
                row.sampled_logprobs.push(sampled_logprobs[offset]);
            }
            row.extend_span(self.version);
            row.entropy_sum += f64::from(entropies[offset]);
            if let Some(reason) = self.finish_reason(position)? {
                self.cache.swap_remove(position)?;
                let row = self.rows.swap_remove(position);
                finished.push(self.finish(row, reason)?);
            }
        }
        Ok(finished)
    }

    fn finish_reason(&self, position: usize) -> Result<Option<FinishReason>, EngineError> {
        let row = &self.rows[position];
        let last = row.tokens.last().expect("a token was just pushed");
        let stops = tail_has_stop(&self.tokenizer, &row.tokens, &row.options.stop)
            .map_err(|error| EngineError::Text(error.to_string()))?;
        if stops || self.config.end_tokens.contains(last) {
            return Ok(Some(FinishReason::Stop));
        }
        let full = row.tokens.len() >= row.options.max_new_tokens as usize;
        Ok(full.then_some(FinishReason::Length))
    }

    fn finish(&self, row: Row, finish: FinishReason) -> Result<Finished, EngineError> {
        let mut text =
            self.tokenizer.decode(&row.tokens, true).map_err(|error| EngineError::Text(error.to_string()))?;
        if let Some(end) = cut_at_stop(&text, &row.options.stop).map(str::len) {
            text.truncate(end);
        }
        let sample = Sample {
            tokens: row.tokens,
            logprobs: row.logprobs,
            entropy_sum: row.entropy_sum,
            text,
            finish,
            version: row.spans.iter().map(|span| span.version).min().unwrap_or(self.version),
            sampled_logprobs: row.sampled_logprobs,
            spans: row.spans,
        };
        Ok(Finished { ticket: row.ticket, index: row.index, sample })
    }

    /// Rows that fit into `bytes` of cache when every one grows to `tokens` tokens.
    #[must_use]
    pub fn rows_within(config: &ModelConfig, kind: Kind, tokens: usize, bytes: usize) -> usize {
        bytes / (KvCache::bytes_per_token(config, kind) * tokens.max(1))
    }
}
