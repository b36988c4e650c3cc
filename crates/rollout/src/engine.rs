//! Generation: groups in, finished samples out, one pass of the model at a time.

mod routes;

use std::sync::Arc;

use pacs_engine::{Finished, GroupJob, SamplingOptions};
use pacs_model::{Model, ModelConfig, NoHooks, Parameters, RouteShape, Routing, kernel_shape, load_kernels};
use pacs_spec::Kernels;
use pacs_text::{StopStrings, Tokenizer, TokenizerError};
use pacs_torch::tch::{Device, Kind, TchError, Tensor, no_grad};
use pacs_torch::{
    BLOCK_TOKENS, BlockRun, DecodeRow, DeviceKernels, Filters, Graphs, KernelError, RowDraw, device_kernels,
    with_device_kernels,
};
use pacs_types::{FinishReason, NoiseKey, Sample, VersionSpan, WeightVersion};

use crate::cache::{KvCache, Span};
use crate::graphs::DecodeGraphs;
use crate::sampler::{RowSampling, Sampled, sample, sample_on_device};
use crate::schedule::{BlockCounts, Bounds, Chunk, Computed, Plan, Scheduler, Source};

/// What the engine may use, and how it computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineOptions {
    /// Samples that are generated at once.
    pub rows: usize,
    /// Tokens of prompts, and of answers that are computed again, in one pass; longer ones take several.
    pub prefill_tokens: usize,
    /// Tokens that the cache holds. A prompt counts once for all samples of its group; prompts and answers take whole
    /// blocks.
    pub cache_tokens: usize,
    /// Which kernels compute.
    pub kernels: Kernels,
    /// Whether passes that only decode are recorded as CUDA graphs, where kernels of a GPU compute.
    pub cuda_graphs: bool,
}

/// What an engine did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineCounts {
    /// Tokens of answers generated.
    pub generated_tokens: u64,
    /// Tokens of prompts computed.
    pub prompt_tokens: u64,
    /// Times that a sample gave its blocks back because there were no more.
    pub preemptions: u64,
    /// Tokens of answers computed again for that reason.
    pub recomputed_tokens: u64,
}

/// Why generation cannot continue.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A group that cannot be generated.
    #[error("group {ticket}: {problem}")]
    Refused {
        /// The ticket that its submission returned.
        ticket: u64,
        /// What is wrong with it.
        problem: String,
    },
    /// An operation of libtorch failed; the engine cannot be used afterwards.
    #[error("libtorch: {0}")]
    Torch(#[from] TchError),
    /// The kernels of a GPU failed.
    #[error("kernels: {0}")]
    Kernels(#[from] KernelError),
    /// The text of an answer could not be made.
    #[error("decode answer: {0}")]
    Text(String),
}

/// Continuous batching over one model: samples leave when they end and waiting ones take their place; prompts are
/// prefilled in chunks, in the passes that decode the samples which run.
#[derive(Debug)]
pub struct Engine {
    model: Model,
    parameters: Parameters,
    tokenizer: Option<Arc<Tokenizer>>,
    config: ModelConfig,
    options: EngineOptions,
    device: Device,
    /// Those of a GPU.
    device_kernels: Option<Arc<DeviceKernels>>,
    graphs: Option<DecodeGraphs>,
    version: WeightVersion,
    cache: KvCache,
    /// How experts are recorded; none of a dense model.
    routes: Option<RouteShape>,
    scheduler: Scheduler<Row, Prefilled>,
    counts: EngineCounts,
}

/// What is kept of a prompt besides its keys and values.
#[derive(Debug, Default)]
struct Prefilled {
    /// Hidden state of its last token, `[1, D]`, once it is complete: samples that join later start from it.
    last: Option<Tensor>,
    /// The experts that computed its tokens so far; empty where they are not recorded.
    routes: Arc<Vec<u8>>,
}

/// One sample in the making.
#[derive(Debug)]
struct Row {
    ticket: u64,
    index: u32,
    noise: NoiseKey,
    options: Arc<SamplingOptions>,
    stop: Arc<StopStrings>,
    prompt: Arc<[u32]>,
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
    /// Empty unless the options cut something off.
    sampled_logprobs: Vec<f32>,
    spans: Vec<VersionSpan>,
    entropy_sum: f64,
    records_routes: bool,
    /// The experts of the prompt, once there is a token.
    prompt_routes: Arc<Vec<u8>>,
    /// Those of all tokens but the last.
    routes: Vec<u8>,
}

impl Row {
    /// What its next token is drawn with.
    fn draw(&self) -> RowDraw {
        RowDraw {
            temperature: self.options.temperature,
            filters: filters(&self.options),
            noise_key: self.noise.bits(),
            position: self.tokens.len() as u64,
        }
    }

    /// Notes that `version` of the weights generated one more token.
    fn extend_span(&mut self, version: WeightVersion) {
        match self.spans.last_mut() {
            Some(span) if span.version == version => span.tokens += 1,
            _ => self.spans.push(VersionSpan { version, tokens: 1 }),
        }
    }
}

/// A row that ended, and why.
type Ended = (usize, FinishReason);

impl Engine {
    /// An engine around `parameters`, which [`Self::parameters_mut`] may replace between steps. Without a tokenizer
    /// samples have no text, and groups with stop strings are refused.
    ///
    /// # Errors
    /// When there is no memory for the cache.
    pub fn new(
        config: ModelConfig,
        parameters: Parameters,
        version: WeightVersion,
        tokenizer: Option<Arc<Tokenizer>>,
        options: EngineOptions,
    ) -> Result<Self, EngineError> {
        let (kind, device) = (parameters.flat.kind(), parameters.flat.device());
        let model = Model::new(&config, &parameters);
        // One more: prompt and answer of a sample each end within a block.
        let blocks = options.cache_tokens.div_ceil(BLOCK_TOKENS) + 1;
        let cache = KvCache::new(&config, blocks, kind, device)?;
        let bounds = Bounds {
            rows: options.rows.max(1),
            chunk_tokens: options.prefill_tokens.max(1),
            blocks,
            one_chunk: options.kernels == Kernels::Reference,
        };
        let (scheduler, counts) = (Scheduler::new(bounds), EngineCounts::default());
        let device_kernels = of_device(&config, options.kernels, kind, device);
        let routes = RouteShape::of(&config);
        let mut engine = Self {
            model,
            parameters,
            tokenizer,
            config,
            options,
            device,
            device_kernels,
            graphs: None,
            version,
            cache,
            routes,
            scheduler,
            counts,
        };
        if let (true, Some(what)) = (options.cuda_graphs && engine.has_device_kernels(), engine.config.beyond_graphs())
        {
            tracing::info!("generation is slower, without CUDA graphs: they cannot record {what}");
        } else if options.cuda_graphs && engine.has_device_kernels() {
            let graphs = Graphs::new(device).map_err(|error| error.to_string());
            if let Err(error) = graphs.and_then(|graphs| engine.use_graphs(graphs).map_err(|error| error.to_string())) {
                tracing::warn!("generation is slower, without CUDA graphs: {error}");
            }
        }
        Ok(engine)
    }

    /// Computes with these kernels from now on, unless [`EngineOptions::kernels`] is `reference`. On a GPU the engine has
    /// its own already; this is for kernels on another machine.
    ///
    /// # Panics
    /// When they were compiled for another model.
    pub fn use_device_kernels(&mut self, kernels: Arc<DeviceKernels>) {
        assert_eq!(
            kernels.shape(),
            kernel_shape(&self.config, self.parameters.flat.kind()),
            "kernels of another model"
        );
        self.device_kernels = Some(kernels);
    }

    /// Records passes that only decode from now on, and does them again by one call. On a GPU the engine does so already;
    /// this is for another machine whose kernels it has ([`Self::use_device_kernels`]).
    ///
    /// # Errors
    /// When there is no memory for what such passes read.
    ///
    /// # Panics
    /// When the engine has no such kernels, or the model cannot be recorded ([`ModelConfig::beyond_graphs`]).
    pub fn use_graphs(&mut self, graphs: Graphs) -> Result<(), EngineError> {
        assert_eq!(self.config.beyond_graphs(), None, "graphs of a model that they cannot record");
        let kernels = self.device_kernels.clone().expect("graphs are of the kernels of a device");
        self.graphs = Some(DecodeGraphs::new(graphs, kernels, &self.config, self.options.rows.max(1), &self.cache)?);
        Ok(())
    }

    /// How many passes were recorded: one for each size that was needed so far.
    #[must_use]
    pub fn recorded_passes(&self) -> usize {
        self.graphs.as_ref().map_or(0, DecodeGraphs::count)
    }

    /// Whether the kernels of a GPU compute.
    #[must_use]
    pub fn has_device_kernels(&self) -> bool {
        self.device_kernels.is_some() && self.options.kernels == Kernels::Auto
    }

    /// The weights, to be overwritten in place between two steps; samples may be running. Later tokens come from the new
    /// ones and carry `version`. What the cache holds of the tokens before stays as it is; samples that start later have
    /// nothing of it.
    pub fn parameters_mut(&mut self, version: WeightVersion) -> &mut Parameters {
        self.version = version;
        self.scheduler.close_prompts();
        &mut self.parameters
    }

    /// Whether the weights may lie wherever they are: no recorded pass knows their place.
    #[must_use]
    pub fn shares_parameters(&self) -> bool {
        self.device == Device::Cpu && self.graphs.is_none()
    }

    /// The same as overwriting the weights ([`Self::parameters_mut`]), without a copy: the engine computes with `parameters`
    /// where they are, which may be a mapping that other processes share. Returns the old ones: to give so much memory back
    /// takes longer than a pass may wait.
    ///
    /// # Panics
    /// When they are those of another model, or the engine does not share ([`Self::shares_parameters`]).
    #[must_use]
    pub fn replace_parameters(&mut self, parameters: Parameters, version: WeightVersion) -> Parameters {
        assert!(self.shares_parameters(), "recorded passes know where the weights lie");
        let fits = |flat: &Tensor| (flat.kind(), flat.device(), flat.size());
        assert_eq!(fits(&parameters.flat), fits(&self.parameters.flat), "weights of another model");
        self.model = Model::new(&self.config, &parameters);
        std::mem::replace(self.parameters_mut(version), parameters)
    }

    /// How many samples could start at once.
    #[must_use]
    pub fn free_samples(&self) -> usize {
        self.options.rows.saturating_sub(self.running() + self.waiting())
    }

    /// Whether no sample runs or waits.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.running() == 0 && self.waiting() == 0
    }

    /// Samples that are being generated now.
    #[must_use]
    pub fn running(&self) -> usize {
        self.scheduler.running().len()
    }

    /// Samples that wait for a row or for blocks.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.scheduler.waiting()
    }

    /// What was done so far.
    #[must_use]
    pub fn counts(&self) -> EngineCounts {
        EngineCounts { preemptions: self.scheduler.preemptions(), ..self.counts }
    }

    /// Who has the blocks of the cache.
    #[must_use]
    pub fn blocks(&self) -> BlockCounts {
        self.scheduler.blocks()
    }

    /// Puts a group in line.
    ///
    /// # Errors
    /// [`EngineError::Refused`] when its options make no sense for this model, a sample of it can never fit into the cache, or
    /// its ticket is in use.
    pub fn submit(&mut self, job: GroupJob) -> Result<(), EngineError> {
        self.check(&job).map_err(|problem| EngineError::Refused { ticket: job.ticket, problem })?;
        let (prompt, options): (Arc<[u32]>, _) = (job.prompt.into(), Arc::new(job.options));
        let stop = Arc::new(StopStrings::new(self.tokenizer.as_deref(), &options.stop));
        let records_routes = job.records_routes;
        for (index, noise) in job.samples {
            let row = Row {
                ticket: job.ticket,
                index,
                noise,
                options: Arc::clone(&options),
                stop: Arc::clone(&stop),
                prompt: Arc::clone(&prompt),
                tokens: Vec::new(),
                logprobs: Vec::new(),
                sampled_logprobs: Vec::new(),
                spans: Vec::new(),
                entropy_sum: 0.0,
                records_routes,
                prompt_routes: Arc::default(),
                routes: Vec::new(),
            };
            self.scheduler.submit(job.ticket, prompt.len(), options.max_new_tokens as usize, row);
        }
        Ok(())
    }

    fn check(&self, job: &GroupJob) -> Result<(), String> {
        if job.prompt.is_empty() {
            return Err("the prompt has no tokens".into());
        }
        if let Some(token) = job.prompt.iter().find(|token| i64::from(**token) >= self.config.vocab_size) {
            return Err(format!("prompt token {token} is outside the vocabulary of {}", self.config.vocab_size));
        }
        let SamplingOptions { temperature, top_p, min_p, max_new_tokens, .. } = job.options;
        if max_new_tokens == 0 {
            return Err("max_new_tokens is 0".into());
        }
        if !(temperature > 0.0 && top_p > 0.0 && (0.0..1.0).contains(&min_p)) {
            return Err(format!(
                "temperature {temperature} and top_p {top_p} must be above 0, min_p {min_p} 0 to below 1"
            ));
        }
        if job.records_routes && self.routes.is_none() {
            return Err("its experts are to be recorded, and the model is no mixture of experts".into());
        }
        if self.tokenizer.is_none() && !job.options.stop.is_empty() {
            return Err("stop strings need a tokenizer".into());
        }
        let (prompt, new) = (job.prompt.len(), max_new_tokens as usize);
        if prompt + new > self.config.max_positions {
            return Err(format!(
                "prompt and answer may take {} tokens, the model has {} positions",
                prompt + new,
                self.config.max_positions
            ));
        }
        if !self.scheduler.could_hold(prompt, new) {
            return Err(format!(
                "prompt and answer may take {} tokens, the cache holds {}: raise rollout.cache_tokens",
                prompt + new,
                self.options.cache_tokens
            ));
        }
        if self.scheduler.has(job.ticket) {
            return Err("a group of this ticket is being generated".into());
        }
        Ok(())
    }

    /// Forgets a group: its waiting and running samples never finish.
    pub fn cancel(&mut self, ticket: u64) {
        self.scheduler.cancel(ticket);
    }

    /// Forgets all groups.
    pub fn cancel_all(&mut self) {
        self.scheduler.cancel_all();
    }

    /// Starts what fits, computes the next chunks of prompts and one token of every sample that runs, and returns the
    /// samples that ended.
    ///
    /// # Errors
    /// When libtorch fails; the engine must not be used afterwards.
    pub fn step(&mut self) -> Result<Vec<Finished>, EngineError> {
        let mut ended = no_grad(|| {
            let plan = self.scheduler.plan();
            match (self.options.kernels, self.device_kernels.clone()) {
                (Kernels::Auto, Some(kernels)) => with_device_kernels(&kernels, || self.compute(&plan)),
                (Kernels::Auto, None) => self.compute(&plan),
                (Kernels::Reference, _) => pacs_torch::plain(|| self.compute_apart(&plan)),
            }
        })?;
        // From the back, so that a row which is taken out moves none that is still to come.
        ended.sort_unstable_by_key(|(row, _)| std::cmp::Reverse(*row));
        ended.into_iter().map(|(row, reason)| self.finish(row, reason)).collect()
    }

    /// One sequence at a time: what is computed for it does not depend on what else runs, to the last bit.
    fn compute_apart(&mut self, plan: &Plan) -> Result<Vec<Ended>, EngineError> {
        let decode = plan.decode.iter().map(|row| Plan { decode: vec![*row], ..Plan::default() });
        let chunks = plan.chunks.iter().map(|chunk| Plan { chunks: vec![*chunk], ..Plan::default() });
        let joined = plan.joined.iter().map(|row| Plan { joined: vec![*row], ..Plan::default() });
        let mut ended = Vec::new();
        for part in decode.chain(chunks).chain(joined) {
            ended.extend(self.compute(&part)?);
        }
        Ok(ended)
    }

    /// One pass: the newest token of every row that decodes, then the tokens of the chunks.
    fn compute(&mut self, plan: &Plan) -> Result<Vec<Ended>, EngineError> {
        if plan.is_empty() {
            return Ok(Vec::new());
        }
        if plan.chunks.is_empty()
            && !plan.decode.is_empty()
            && let Some(sampled) = self.replay(&plan.decode)
        {
            self.scheduler.computed(plan);
            let mut ended = self.take_tokens(&plan.decode, &sampled)?;
            ended.extend(self.compute(&Plan { joined: plan.joined.clone(), ..Plan::default() })?);
            return Ok(ended);
        }
        let hidden = self.forward(plan)?;
        self.count(&plan.chunks);
        let Computed { completed, starts } = self.scheduler.computed(plan);
        let mut rows = plan.decode.clone();
        // Where in the pass the hidden state is that each row draws its next token from.
        let mut sources: Vec<i64> = (0..rows.len() as i64).collect();
        let ends = plan.chunks.iter().scan(rows.len() as i64, |end, chunk| {
            *end += chunk.tokens as i64;
            Some(*end)
        });
        let lasts: Vec<i64> = ends.map(|end| end - 1).collect();
        let mut states = Vec::with_capacity(1 + plan.joined.len());
        if let Some(hidden) = hidden {
            for (row, chunk) in completed {
                let last = hidden.f_narrow(0, lasts[chunk], 1)?.copy();
                self.scheduler.prompt_mut(row).kept.last = Some(last);
            }
            for (row, chunk) in starts {
                rows.push(row);
                sources.push(lasts[chunk]);
            }
            if plan.chunks.is_empty() {
                states.push(hidden);
            } else if !sources.is_empty() {
                states.push(hidden.f_index_select(0, &self.indices(&sources))?);
            }
        }
        for &row in &plan.joined {
            let kept = &self.scheduler.prompt(row).kept;
            states.push(kept.last.as_ref().expect("a complete prompt keeps its last hidden state").shallow_clone());
            rows.push(row);
        }
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let states = if states.len() == 1 { states.remove(0) } else { Tensor::f_cat(&states, 0)? };
        if self.options.kernels == Kernels::Auto {
            let sampled = self.sampled(&rows, &self.model.logits(&states))?;
            return self.take_tokens(&rows, &sampled);
        }
        let mut ended = Vec::new();
        for (place, row) in (0..).zip(rows) {
            let logits = self.model.logits(&states.f_narrow(0, place, 1)?);
            let sampled = self.sampled(&[row], &logits)?;
            ended.extend(self.take_tokens(&[row], &sampled)?);
        }
        Ok(ended)
    }

    /// Hidden states of the tokens of a pass, `[T, D]`; none for a pass without any.
    fn forward(&mut self, plan: &Plan) -> Result<Option<Tensor>, EngineError> {
        let (mut tokens, mut positions): (Vec<i64>, Vec<i64>) = (Vec::new(), Vec::new());
        let (mut decode, mut chunks) = (Vec::new(), Vec::new());
        for &row in &plan.decode {
            let (running, prompt) = (&self.scheduler.running()[row], self.scheduler.prompt(row));
            let generated = &running.sample.tokens;
            let last = generated.last().expect("a row that decodes has a token");
            tokens.push(i64::from(*last));
            positions.push((prompt.tokens + generated.len()) as i64 - 1);
            let answer = (running.blocks.clone(), generated.len());
            decode.push(Span { prompt: (Arc::clone(&prompt.blocks), prompt.tokens), answer, new: 1 });
        }
        for &Chunk { row, source, start, tokens: new } in &plan.chunks {
            let (running, prompt) = (&self.scheduler.running()[row], self.scheduler.prompt(row));
            let Row { prompt: prompt_tokens, tokens: generated, .. } = &running.sample;
            let end = start + new;
            let (part, first, held, answer) = match source {
                Source::Prompt => (&prompt_tokens[start..end], start, end, (Vec::new(), 0)),
                Source::Answer => {
                    (&generated[start..end], prompt.tokens + start, prompt.tokens, (running.blocks.clone(), end))
                }
            };
            tokens.extend(part.iter().map(|token| i64::from(*token)));
            positions.extend((first..first + new).map(|position| position as i64));
            chunks.push(Span { prompt: (Arc::clone(&prompt.blocks), held), answer, new });
        }
        if tokens.is_empty() {
            return Ok(None);
        }
        let (tokens, positions) = (self.indices(&tokens), self.indices(&positions));
        let mut log = self.route_log(plan);
        let hidden = {
            let mut routing = log.as_mut().map_or(Routing::Own, Routing::Record);
            let mut attention = self.cache.pass(decode, chunks)?;
            let Ok(hidden) =
                self.model.hidden_with_hooks(&tokens, &positions, &mut attention, &mut routing, &mut NoHooks);
            hidden
        };
        if let Some(log) = log {
            self.keep_routes(plan, &log);
        }
        Ok(Some(hidden))
    }

    fn count(&mut self, chunks: &[Chunk]) {
        for chunk in chunks {
            match chunk.source {
                Source::Prompt => self.counts.prompt_tokens += chunk.tokens as u64,
                Source::Answer => self.counts.recomputed_tokens += chunk.tokens as u64,
            }
        }
    }

    fn indices(&self, values: &[i64]) -> Tensor {
        Tensor::from_slice(values).to_kind(Kind::Int64).to_device(self.device)
    }

    /// The next tokens of rows that decode, by a recorded pass; none where there are no graphs, or the device refuses.
    fn replay(&mut self, rows: &[usize]) -> Option<Sampled> {
        let mut graphs = self.graphs.take()?;
        let row = |row: &usize| {
            let (running, prompt) = (&self.scheduler.running()[*row], self.scheduler.prompt(*row));
            let generated = &running.sample.tokens;
            let last = generated.len() - 1;
            let run = |blocks, tokens| BlockRun { blocks, tokens };
            DecodeRow {
                token: generated[last],
                position: prompt.tokens + last,
                slot: (running.blocks[last / BLOCK_TOKENS], (last % BLOCK_TOKENS) as u32),
                runs: [run(&prompt.blocks[..], prompt.tokens), run(&running.blocks[..], generated.len())],
                draw: running.sample.draw(),
            }
        };
        let rows: Vec<DecodeRow<'_>> = rows.iter().map(row).collect();
        match graphs.decode(&rows, &self.config, &self.parameters, &self.cache) {
            Ok(drawn) => {
                self.graphs = Some(graphs);
                Some(Sampled::from(drawn))
            }
            Err(error) => {
                tracing::warn!("generation continues without CUDA graphs, and slower: {error}");
                None
            }
        }
    }

    /// Gives `rows` their next tokens, and says which rows end with them.
    fn take_tokens(&mut self, rows: &[usize], sampled: &Sampled) -> Result<Vec<Ended>, EngineError> {
        let Sampled { tokens, logprobs, sampled_logprobs, entropies } = sampled;
        self.counts.generated_tokens += tokens.len() as u64;
        let mut ended = Vec::new();
        for (place, &index) in rows.iter().enumerate() {
            let version = self.version;
            self.take_prompt_routes(index);
            let row = self.scheduler.sample_mut(index);
            row.tokens.push(u32::try_from(tokens[place]).expect("a token is a vocabulary index"));
            row.logprobs.push(logprobs[place]);
            if filters(&row.options).cut() {
                row.sampled_logprobs.push(sampled_logprobs[place]);
            }
            row.extend_span(version);
            row.entropy_sum += f64::from(entropies[place]);
            self.scheduler.generated(index);
            if let Some(reason) = self.finish_reason(&self.scheduler.running()[index].sample)? {
                ended.push((index, reason));
            }
        }
        Ok(ended)
    }

    fn sampled(&self, rows: &[usize], logits: &Tensor) -> Result<Sampled, EngineError> {
        let of_rows = || rows.iter().map(|row| &self.scheduler.running()[*row].sample);
        if let Some(kernels) = device_kernels() {
            return Ok(sample_on_device(&kernels, logits, &of_rows().map(Row::draw).collect::<Vec<_>>())?);
        }
        let wanted = |row: &Row| RowSampling {
            temperature: row.options.temperature,
            filters: filters(&row.options),
            uniform: row.noise.uniform(row.tokens.len() as u64),
        };
        Ok(sample(logits, &of_rows().map(wanted).collect::<Vec<_>>())?)
    }

    fn finish_reason(&self, row: &Row) -> Result<Option<FinishReason>, EngineError> {
        let last = row.tokens.last().expect("a token was just pushed");
        let stops = match &self.tokenizer {
            Some(tokenizer) => row.stop.ends(tokenizer, &row.tokens).map_err(no_text)?,
            None => false,
        };
        if stops || self.config.end_tokens.contains(last) {
            return Ok(Some(FinishReason::Stop));
        }
        let full = row.tokens.len() >= row.options.max_new_tokens as usize;
        Ok(full.then_some(FinishReason::Length))
    }

    fn finish(&mut self, row: usize, finish: FinishReason) -> Result<Finished, EngineError> {
        let row = self.scheduler.finish(row);
        let text = self.tokenizer.as_ref().map(|tokenizer| row.stop.text(tokenizer, &row.tokens));
        let text = text.transpose().map_err(no_text)?.unwrap_or_default();
        let sample = Sample {
            tokens: row.tokens,
            logprobs: row.logprobs,
            entropy_sum: row.entropy_sum,
            text,
            finish,
            version: row.spans.iter().map(|span| span.version).min().unwrap_or(self.version),
            sampled_logprobs: row.sampled_logprobs,
            spans: row.spans,
            routes: [&row.prompt_routes[..], &row.routes].concat(),
        };
        Ok(Finished { ticket: row.ticket, index: row.index, sample })
    }

    /// Tokens of a cache of so many bytes.
    #[must_use]
    pub fn cache_tokens_within(config: &ModelConfig, kind: Kind, bytes: usize) -> usize {
        bytes / KvCache::bytes_per_token(config, kind)
    }
}

/// What a job's sampling cuts off.
fn filters(options: &SamplingOptions) -> Filters {
    Filters { top_k: options.top_k, top_p: options.top_p, min_p: options.min_p }
}

fn no_text(error: TokenizerError) -> EngineError {
    EngineError::Text(error.to_string())
}

/// The kernels of a GPU, where one computes and they are wanted. Without them generation continues, slowly.
fn of_device(config: &ModelConfig, kernels: Kernels, kind: Kind, device: Device) -> Option<Arc<DeviceKernels>> {
    if kernels == Kernels::Reference {
        return None;
    }
    load_kernels(config, kind, device).unwrap_or_else(|error| {
        tracing::warn!("generation is slow, without kernels of the GPU: {error}");
        None
    })
}
