//! vLLM's HTTP interface, typed: what is asked, what is answered, and how long and how large that may be.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use hyper::Method;
use hyper::header::HeaderValue;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Fault;
use crate::http::{Call, exchange};
use crate::wire::{
    Checksums, CollectiveRpc, GenerateRequest, GenerateResponse, IsPaused, Models, ReloadWeights, SamplingParams,
    UpdateWeightVersion, Version, WeightChecker, WeightInfo, gauge, logprobs_mode,
};

/// Most bytes of an answer to a question that costs the server nothing; its configuration and metrics are the largest.
const QUESTION_BYTES: usize = 8 << 20;
/// Most bytes of checksums: a name and a digest for every tensor of every shard.
const CHECKSUM_BYTES: usize = 64 << 20;
/// Most bytes that an answer has for one token: its id, and its log-prob with a rank, twice.
const TOKEN_BYTES: usize = 512;
/// Most bytes that an answer has for one token of the prompt.
const PROMPT_TOKEN_BYTES: usize = 256;
/// Most bytes of what else is in an answer.
const ANSWER_BYTES: usize = 64 << 10;

/// Longest times of the calls.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// A question that costs the server nothing. Its engine answers some of them between two passes, and a pass of a large prompt takes a
    /// while.
    pub question: Duration,
    /// From a request for an answer to its end.
    pub request: Duration,
    /// Pausing, loading weights and computing checksums, each.
    pub update: Duration,
}

impl Default for Limits {
    /// Half a minute for a question; for the others the defaults of the job spec.
    fn default() -> Self {
        Self { question: Duration::from_secs(30), request: Duration::from_secs(1800), update: Duration::from_secs(600) }
    }
}

/// The key of servers that ask for one (`vllm serve --api-key`).
#[derive(Clone)]
pub struct ApiKey(HeaderValue);

impl ApiKey {
    /// A key; `None` when it cannot be sent.
    #[must_use]
    pub fn new(key: &str) -> Option<Self> {
        let mut value = HeaderValue::from_str(&format!("Bearer {key}")).ok()?;
        value.set_sensitive(true);
        Some(Self(value))
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey")
    }
}

/// How one answer is drawn.
#[derive(Clone, Copy, Debug)]
pub struct Drawing<'a> {
    /// Divides the logits.
    pub temperature: f64,
    /// Nucleus; 1 is off.
    pub top_p: f64,
    /// Most probable tokens; 0 is off.
    pub top_k: u32,
    /// Share of the most probable token's probability; 0 is off.
    pub min_p: f64,
    /// Of this answer alone.
    pub seed: u64,
    /// Length of the answer (tokens) at which the server stops.
    pub max_new_tokens: u32,
    /// Tokens that end an answer.
    pub end_tokens: &'a [u32],
    /// Strings that end an answer.
    pub stop: &'a [String],
}

/// What a server says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerFacts {
    /// Version of vLLM.
    pub version: String,
    /// Longest sequence, prompt and answer together; `None` where it does not say.
    pub max_model_len: Option<u64>,
    /// Which log-probs it reports: `raw_logprobs`, `processed_logprobs`, …; `None` where it does not say.
    pub logprobs_mode: Option<String>,
    /// Whether it computes on processors.
    pub is_on_cpu: bool,
}

/// A server's own metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Load {
    /// Requests that it computes.
    pub(crate) running: u32,
    /// Requests that wait for room.
    pub(crate) queued: u32,
}

/// A vLLM server.
#[derive(Clone, Debug)]
pub struct Client {
    authority: String,
    key: Option<ApiKey>,
    limits: Limits,
}

impl Client {
    /// The server at `host:port`.
    #[must_use]
    pub fn new(authority: &str, key: Option<ApiKey>, limits: Limits) -> Self {
        Self { authority: authority.to_owned(), key, limits }
    }

    /// Asks whether the server has started and its engine is alive.
    ///
    /// # Errors
    /// See [`Fault`].
    pub async fn health(&self) -> Result<(), Fault> {
        self.call("health", Method::GET, "/health", None, self.limits.question, QUESTION_BYTES).await.map(drop)
    }

    /// What the server says of itself.
    ///
    /// # Errors
    /// See [`Fault`]; [`Fault::Unfit`] when it is not in development mode.
    pub async fn facts(&self) -> Result<ServerFacts, Fault> {
        self.health().await?;
        let Version { version } = self.ask("version", "/version").await?;
        let models: Models = self.ask("models", "/v1/models").await?;
        let info: serde_json::Value = match self.ask("server_info", "/server_info?config_format=json").await {
            Err(Fault::Refused { status: 404, .. }) => {
                let problem = "it is not in development mode: start it with VLLM_SERVER_DEV_MODE=1 in its environment";
                return Err(Fault::Unfit(problem.to_owned()));
            }
            other => other?,
        };
        let max_model_len = models.data.first().and_then(|model| model.max_model_len);
        let is_on_cpu = info["vllm_config"]["device_config"]["device"] == "cpu";
        let logprobs_mode = logprobs_mode(&info).map(str::to_owned);
        Ok(ServerFacts { version, max_model_len, logprobs_mode, is_on_cpu })
    }

    /// The label of the server's weights.
    ///
    /// # Errors
    /// See [`Fault`].
    pub async fn weight_label(&self) -> Result<String, Fault> {
        let WeightInfo { weight_version } = self.ask("weight_info", "/weight_info").await?;
        Ok(weight_version)
    }

    pub(crate) async fn is_paused(&self) -> Result<bool, Fault> {
        let IsPaused { is_paused } = self.ask("is_paused", "/is_paused").await?;
        Ok(is_paused)
    }

    pub(crate) async fn load(&self) -> Result<Load, Fault> {
        let text = self.call("metrics", Method::GET, "/metrics", None, self.limits.question, QUESTION_BYTES).await?;
        let text = String::from_utf8_lossy(&text);
        let read = |name: &str| gauge(&text, name).unwrap_or(0.0).clamp(0.0, f64::from(u32::MAX)) as u32;
        Ok(Load { running: read("vllm:num_requests_running"), queued: read("vllm:num_requests_waiting") })
    }

    /// Freezes requests where they are; they continue after [`Self::resume`].
    pub(crate) async fn pause(&self) -> Result<(), Fault> {
        self.command("pause", "/pause?mode=keep", None, self.limits.update).await
    }

    pub(crate) async fn resume(&self) -> Result<(), Fault> {
        self.command("resume", "/resume", None, self.limits.update).await
    }

    /// Has the server load the weights of a folder, which lies under this path on its side.
    ///
    /// # Errors
    /// See [`Fault`]. The weights are in an unknown state then.
    pub async fn reload_weights(&self, folder: &str) -> Result<(), Fault> {
        let timeout = self.limits.update.as_secs_f64();
        let rpc = CollectiveRpc { method: "reload_weights", kwargs: ReloadWeights { weights_path: folder }, timeout };
        self.command("reload_weights", "/collective_rpc", Some(json(&rpc)), self.limits.update).await
    }

    /// Says what the server's weights are called from now on.
    ///
    /// # Errors
    /// See [`Fault`].
    pub async fn set_weight_label(&self, label: &str) -> Result<(), Fault> {
        let body = json(&UpdateWeightVersion { new_version: label });
        self.command("update_weight_version", "/update_weight_version", Some(body), self.limits.question).await
    }

    /// Digest of every tensor of every shard.
    pub(crate) async fn checksums(&self) -> Result<BTreeMap<String, String>, Fault> {
        let body = json(&WeightChecker { action: "checksum" });
        let name = "weight_checker";
        let answer =
            self.call(name, Method::POST, "/weight_checker", Some(body), self.limits.update, CHECKSUM_BYTES).await?;
        let Checksums { checksums } = parse(name, &answer)?;
        Ok(checksums)
    }

    /// Generates one answer to a prompt of token ids. `salt` keeps its prefix apart from those of other salts.
    pub(crate) async fn generate(
        &self,
        prompt: &[u32],
        drawing: &Drawing<'_>,
        salt: &str,
    ) -> Result<GenerateResponse, Fault> {
        let has_stops = !drawing.stop.is_empty();
        let sampling_params = SamplingParams {
            n: 1,
            temperature: drawing.temperature,
            top_p: drawing.top_p,
            top_k: drawing.top_k,
            min_p: drawing.min_p,
            seed: Some(drawing.seed),
            stop: drawing.stop,
            stop_token_ids: drawing.end_tokens,
            ignore_eos: true,
            max_tokens: drawing.max_new_tokens,
            logprobs: Some(0),
            prompt_logprobs: None,
            // Text is made here, from the tokens; the server needs it to find stop strings alone.
            detokenize: has_stops,
            skip_special_tokens: false,
        };
        let most = ANSWER_BYTES
            .saturating_add(TOKEN_BYTES.saturating_mul(drawing.max_new_tokens as usize))
            .saturating_add(PROMPT_TOKEN_BYTES.saturating_mul(prompt.len()));
        self.send("generate", prompt, sampling_params, salt, (self.limits.request, most)).await
    }

    /// Has the server generate one token within `limit`: a server that answers every question may generate nothing. `salt` keeps it
    /// apart from requests of other weights.
    pub(crate) async fn first_token(&self, salt: &str, limit: Duration) -> Result<(), Fault> {
        // Every vocabulary has this token.
        let answer = self.send("generate", &[0], of_one_token(), salt, (limit, ANSWER_BYTES)).await?;
        let tokens = answer.choices.first().and_then(|choice| choice.token_ids.as_ref()).map_or(0, Vec::len);
        match tokens {
            1 => Ok(()),
            _ => Err(Fault::Malformed {
                call: "generate",
                problem: format!("it has {tokens} tokens, where one was asked for"),
            }),
        }
    }

    /// Generates one answer and counts its tokens, for measurements: it is checked for nothing.
    ///
    /// # Errors
    /// See [`Fault`].
    pub async fn count_tokens(&self, prompt: &[u32], drawing: &Drawing<'_>, salt: &str) -> Result<usize, Fault> {
        let answer = self.generate(prompt, drawing, salt).await?;
        let tokens = answer.choices.iter().map(|choice| choice.token_ids.as_ref().map_or(0, Vec::len));
        Ok(tokens.sum())
    }

    /// Scores `tokens` as a prompt; the answer has their log-probs at temperature 1, and one more token.
    pub(crate) async fn score(&self, tokens: &[u32], salt: &str) -> Result<GenerateResponse, Fault> {
        let params = SamplingParams { prompt_logprobs: Some(0), ..of_one_token() };
        let most = ANSWER_BYTES.saturating_add(PROMPT_TOKEN_BYTES.saturating_mul(tokens.len()));
        self.send("score", tokens, params, salt, (self.limits.request, most)).await
    }

    async fn send(
        &self,
        name: &'static str,
        token_ids: &[u32],
        sampling_params: SamplingParams<'_>,
        cache_salt: &str,
        (deadline, most): (Duration, usize),
    ) -> Result<GenerateResponse, Fault> {
        let request = GenerateRequest { token_ids, sampling_params, cache_salt, return_token_ids: true };
        let (path, body) = ("/inference/v1/generate", Some(json(&request)));
        match self.call(name, Method::POST, path, body, deadline, most).await {
            Err(Fault::Refused { status: 403, message, .. }) => {
                Err(Fault::Unfit(format!("it does not take token ids: start it with --enable-scale-out ({message})")))
            }
            Err(Fault::Refused { status: 401, .. }) => Err(Fault::Unfit(
                "it asks for a key: set PACS_VLLM_API_KEY to that of `vllm serve --api-key`".to_owned(),
            )),
            answer => parse(name, &answer?),
        }
    }

    async fn ask<T: DeserializeOwned>(&self, name: &'static str, path: &str) -> Result<T, Fault> {
        let answer = self.call(name, Method::GET, path, None, self.limits.question, QUESTION_BYTES).await?;
        parse(name, &answer)
    }

    /// A call whose answer says nothing but that it was obeyed.
    async fn command(
        &self,
        name: &'static str,
        path: &str,
        body: Option<String>,
        deadline: Duration,
    ) -> Result<(), Fault> {
        self.call(name, Method::POST, path, body, deadline, QUESTION_BYTES).await.map(drop)
    }

    async fn call(
        &self,
        name: &'static str,
        method: Method,
        path: &str,
        body: Option<String>,
        deadline: Duration,
        most_bytes: usize,
    ) -> Result<Vec<u8>, Fault> {
        let key = self.key.as_ref().map(|ApiKey(value)| value);
        exchange(Call { name, authority: &self.authority, key, method, path, body, deadline, most_bytes }).await
    }
}

/// Parameters of a request whose answer is one token, which is not used.
fn of_one_token() -> SamplingParams<'static> {
    SamplingParams {
        n: 1,
        temperature: 0.0,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        seed: None,
        stop: &[],
        stop_token_ids: &[],
        ignore_eos: true,
        max_tokens: 1,
        logprobs: None,
        prompt_logprobs: None,
        detokenize: false,
        skip_special_tokens: false,
    }
}

fn json(message: &impl Serialize) -> String {
    serde_json::to_string(message).expect("numbers and texts are JSON")
}

fn parse<T: DeserializeOwned>(call: &'static str, body: &[u8]) -> Result<T, Fault> {
    serde_json::from_slice(body).map_err(|error| Fault::Malformed { call, problem: error.to_string() })
}
