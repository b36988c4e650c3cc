//! A server that speaks the part of vLLM's HTTP interface that `pacs rollout` uses, as version 0.32 does, with faults on demand.
//!
//! It has no model. Tokens are a function of the seed, and log-probs one of the token and of the first weight of the folder that was
//! loaded last, so a test knows what an answer has to be, and new weights are seen in it. Like the real one it freezes requests
//! while it is paused, names the label of the weights of every token, and is back at `default` after a restart. On demand it keeps
//! computing with old weights while its checksums change, as vLLM did on a CPU with the output head of tied embeddings.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// Vocabulary of the tokens that it draws; below that of every test model.
const VOCABULARY: u64 = 300;

/// What goes wrong with a request for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StubFault {
    /// It answers with this status.
    Status(u16),
    /// It never answers.
    Hang,
    /// It closes the connection in the middle of the answer.
    Break,
    /// It answers byte by byte, over many seconds.
    Slow,
    /// Its answer does not end.
    Endless,
    /// Its answer is not JSON.
    Garbage,
    /// A log-prob is what vLLM writes for NaN.
    NanLogprob,
    /// A log-prob is null.
    NullLogprob,
    /// A log-prob is missing.
    FewLogprobs,
    /// A log-prob is that of another token.
    OtherLogprob,
    /// It stops early without an end.
    FewTokens,
    /// There is no token.
    NoTokens,
    /// There is a token that the model does not have.
    UnknownToken,
    /// There are more tokens than were asked for.
    ManyTokens,
    /// It claims an end that is none.
    FalseEnd,
    /// It says that the request was aborted.
    Abort,
    /// It answers for another prompt.
    OtherPrompt,
    /// It does not say which weights generated the tokens.
    NoVersions,
    /// It names weights that nobody gave it.
    OtherVersion,
    /// Its versions leave a token out.
    VersionGap,
}

/// How a call stalls: the connection stays open, and no end of the answer comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StubStall {
    /// The call is accepted and never answered.
    Silent,
    /// Half of the answer is written.
    Half,
}

/// Settings and record of a stub.
#[derive(Clone, Debug)]
pub struct StubState {
    /// The call that stalls, by the name that the engine has for it, and how.
    pub stalls: Option<(&'static str, StubStall)>,
    /// The tensor whose first weight is the weight of a loaded folder.
    pub reads: &'static str,
    /// The weight of each folder that was loaded.
    pub loaded: Vec<f32>,
    /// `weight_version`.
    pub label: String,
    /// Whether requests are frozen.
    pub paused: bool,
    /// The folder that was loaded last.
    pub folder: Option<String>,
    /// The first weight of that folder, by which it makes checksums.
    pub weight: f32,
    /// The weight that it computes log-probs with.
    pub computes_with: f32,
    /// Share of the weight it computes with that a loaded folder does not change: 0 is right, 1 is stale.
    pub keeps: f32,
    /// Largest error of a log-prob; its sign and size are functions of token and weight.
    pub noise: f32,
    /// Whether loading a folder changes anything.
    pub loads: bool,
    /// Whether it is in development mode.
    pub dev_mode: bool,
    /// Whether it takes token ids.
    pub scale_out: bool,
    /// `--logprobs-mode`.
    pub logprobs_mode: &'static str,
    /// `--max-model-len`.
    pub max_model_len: u64,
    /// What it computes on.
    pub device: &'static str,
    /// Whether its output head is a tensor of its own.
    pub has_head: bool,
    /// Milliseconds per token.
    pub token_ms: u64,
    /// Faults of the next answers.
    pub faults: VecDeque<StubFault>,
    /// The fault of all answers.
    pub always: Option<StubFault>,
    /// Requests for answers so far, without scores.
    pub requests: Vec<Value>,
    /// How many folders were loaded.
    pub reloads: u32,
    /// Tokens that it has drawn.
    pub tokens: u64,
    /// Requests that it computes.
    pub running: u32,
    /// Requests that it says are queued.
    pub queued: u32,
}

impl Default for StubState {
    fn default() -> Self {
        Self {
            stalls: None,
            reads: "model.embed_tokens.weight",
            loaded: Vec::new(),
            label: "default".to_owned(),
            paused: false,
            folder: None,
            weight: 0.0,
            computes_with: 0.0,
            keeps: 0.0,
            noise: 0.0,
            loads: true,
            dev_mode: true,
            scale_out: true,
            logprobs_mode: "raw_logprobs",
            max_model_len: 4096,
            device: "cuda",
            has_head: false,
            token_ms: 0,
            faults: VecDeque::new(),
            always: None,
            requests: Vec::new(),
            reloads: 0,
            tokens: 0,
            running: 0,
            queued: 0,
        }
    }
}

impl StubState {
    /// The log-prob of a token as it computes it now.
    fn logprob(&self, token: u32) -> f32 {
        let unit = (mix(u64::from(token) ^ u64::from(self.computes_with.to_bits())) % 2001) as f32 / 1000.0 - 1.0;
        (stub_logprob(token, self.computes_with) + self.noise * unit).min(0.0)
    }
}

/// A running stub; dropping it closes its port and all connections.
#[derive(Debug)]
pub struct VllmStub {
    port: u16,
    state: Arc<Mutex<StubState>>,
    listening: Option<JoinHandle<()>>,
}

impl VllmStub {
    /// Starts a stub on a free port.
    ///
    /// # Errors
    /// When it cannot listen.
    pub async fn start(state: StubState) -> Result<Self> {
        Self::start_at(0, state).await
    }

    /// Starts a stub on this port; 0 is a free one.
    ///
    /// # Errors
    /// When it cannot listen.
    pub async fn start_at(port: u16, state: StubState) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", port)).await?;
        let port = listener.local_addr()?.port();
        let state = Arc::new(Mutex::new(state));
        let listening = Some(tokio::spawn(listen(listener, Arc::clone(&state))));
        Ok(Self { port, state, listening })
    }

    /// Its address, as a job names it.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Its state, to look at and to change.
    pub fn state(&self) -> MutexGuard<'_, StubState> {
        lock(&self.state)
    }

    /// Dies: nothing listens any more, and all connections are closed.
    pub fn kill(&mut self) {
        if let Some(listening) = self.listening.take() {
            listening.abort();
        }
    }

    /// Comes back on the same port, with the weights that it was started with.
    ///
    /// # Errors
    /// When the port was taken meanwhile.
    pub async fn restart(&mut self) -> Result<()> {
        self.kill();
        {
            let mut state = self.state();
            let fresh = StubState::default();
            (state.label, state.paused, state.folder) = (fresh.label, false, None);
            (state.weight, state.computes_with) = (fresh.weight, fresh.computes_with);
            state.running = 0;
        }
        let mut tries = 0;
        let listener = loop {
            match TcpListener::bind(("127.0.0.1", self.port)).await {
                Ok(listener) => break listener,
                Err(error) if tries == 200 => return Err(error).context("listen again"),
                // The task that held the port has not ended yet.
                Err(_) => tries += 1,
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        self.listening = Some(tokio::spawn(listen(listener, Arc::clone(&self.state))));
        Ok(())
    }
}

impl Drop for VllmStub {
    fn drop(&mut self) {
        self.kill();
    }
}

fn lock(state: &Mutex<StubState>) -> MutexGuard<'_, StubState> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn listen(listener: TcpListener, state: Arc<Mutex<StubState>>) {
    let mut connections = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                if let Ok((stream, _)) = accepted {
                    let state = Arc::clone(&state);
                    connections.spawn(async move { drop(serve(stream, state).await) });
                }
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn serve(mut stream: TcpStream, state: Arc<Mutex<StubState>>) -> Result<()> {
    let (method, path, body) = read_request(&mut stream).await?;
    let stalls = lock(&state).stalls.filter(|(call, _)| *call == call_of(&path, &body)).map(|(_, how)| how);
    let mut closed = [0];
    // A client that goes away takes its request with it, as vLLM's `with_cancellation` does.
    let answered = async {
        let (mut reader, mut writer) = stream.split();
        let answered = async {
            if stalls == Some(StubStall::Silent) {
                return std::future::pending().await;
            }
            let answer = answer(&method, &path, &body, &state).await?;
            if stalls.is_none() {
                return answer.write(&mut writer).await;
            }
            let whole = answer.bytes();
            writer.write_all(&whole[..whole.len() / 2]).await?;
            writer.flush().await?;
            std::future::pending().await
        };
        tokio::select! {
            answered = answered => answered,
            _ = reader.read(&mut closed) => bail!("the client is gone"),
        }
    };
    answered.await
}

/// What the engine calls a request.
fn call_of(path: &str, body: &Value) -> &'static str {
    let calls = [
        ("/health", "health"),
        ("/version", "version"),
        ("/v1/models", "models"),
        ("/server_info", "server_info"),
        ("/weight_info", "weight_info"),
        ("/is_paused", "is_paused"),
        ("/pause", "pause"),
        ("/resume", "resume"),
        ("/update_weight_version", "update_weight_version"),
        ("/collective_rpc", "reload_weights"),
        ("/weight_checker", "weight_checker"),
        ("/metrics", "metrics"),
    ];
    let path = path.split('?').next().unwrap_or_default();
    let known = calls.iter().find(|(known, _)| *known == path).map(|(_, call)| *call);
    let of_tokens = if body["sampling_params"]["prompt_logprobs"] == 0 { "score" } else { "generate" };
    known.unwrap_or(of_tokens)
}

async fn read_request(stream: &mut TcpStream) -> Result<(String, String, Value)> {
    let mut bytes = Vec::new();
    let head = loop {
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break end + 4;
        }
        if stream.read_buf(&mut bytes).await? == 0 {
            bail!("no request");
        }
    };
    let text = String::from_utf8_lossy(&bytes[..head]).into_owned();
    let length = text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    while bytes.len() < head + length.unwrap_or(0) {
        if stream.read_buf(&mut bytes).await? == 0 {
            bail!("half a request");
        }
    }
    let mut words = text.split(' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let body = serde_json::from_slice(&bytes[head..]).unwrap_or(Value::Null);
    Ok((method.to_owned(), path.to_owned(), body))
}

/// What is written back.
enum Answer {
    Json(u16, Value),
    Text(String),
    /// Half of it, and the connection is closed.
    Half(Value),
    Slow(Value),
    Endless,
}

fn head(status: u16, length: usize) -> String {
    format!(
        "HTTP/1.1 {status} OK\r\ncontent-type: application/json\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n"
    )
}

impl Answer {
    /// All of an answer.
    fn bytes(self) -> Vec<u8> {
        let (status, body) = match self {
            Self::Json(status, body) => (status, body.to_string()),
            Self::Text(body) => (200, body),
            Self::Half(body) | Self::Slow(body) => (200, body.to_string()),
            Self::Endless => (200, String::new()),
        };
        format!("{}{body}", head(status, body.len())).into_bytes()
    }

    async fn write(self, writer: &mut (impl AsyncWriteExt + Unpin)) -> Result<()> {
        match self {
            Self::Json(..) | Self::Text(_) => writer.write_all(&self.bytes()).await?,
            Self::Half(body) => {
                let body = body.to_string();
                writer.write_all(format!("{}{}", head(200, body.len()), &body[..body.len() / 2]).as_bytes()).await?;
            }
            Self::Slow(body) => {
                let body = body.to_string();
                writer.write_all(head(200, body.len()).as_bytes()).await?;
                for byte in body.as_bytes() {
                    writer.write_all(std::slice::from_ref(byte)).await?;
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
            Self::Endless => {
                writer.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await?;
                loop {
                    writer.write_all(format!("4000\r\n{}\r\n", " ".repeat(0x4000)).as_bytes()).await?;
                }
            }
        }
        writer.flush().await?;
        Ok(())
    }
}

fn good(body: Value) -> Result<Answer> {
    Ok(Answer::Json(200, body))
}

async fn answer(method: &str, path: &str, body: &Value, state: &Mutex<StubState>) -> Result<Answer> {
    let dev_mode = lock(state).dev_mode;
    match (method, path.split('?').next().unwrap_or_default()) {
        ("GET", "/health") => Ok(Answer::Text(String::new())),
        ("GET", "/version") => good(json!({"version": "0.32.0"})),
        ("GET", "/v1/models") => {
            let most = lock(state).max_model_len;
            good(json!({"object": "list", "data": [{"id": "m", "object": "model", "max_model_len": most}]}))
        }
        ("GET", "/metrics") => {
            let state = lock(state);
            let gauge = |name: &str, value: u32| {
                format!("# TYPE vllm:{name} gauge\nvllm:{name}{{engine=\"0\",model_name=\"m\"}} {value}.0\n")
            };
            let (running, queued) = (state.running, state.queued);
            Ok(Answer::Text(gauge("num_requests_running", running) + &gauge("num_requests_waiting", queued)))
        }
        ("POST", "/inference/v1/generate") => generate(body, state).await,
        _ if !dev_mode => Ok(Answer::Json(404, json!({"detail": "Not Found"}))),
        ("GET", "/server_info") => {
            let StubState { logprobs_mode: mode, device, .. } = *lock(state);
            let config = json!({"model_config": {"logprobs_mode": mode}, "device_config": {"device": device}});
            good(json!({"vllm_config": config, "vllm_env": {}}))
        }
        ("GET", "/weight_info") => good(json!({"weight_version": lock(state).label})),
        ("GET", "/is_paused") => good(json!({"is_paused": lock(state).paused})),
        ("POST", "/pause") => {
            assert!(path.contains("mode=keep"), "requests in flight would be lost: {path}");
            lock(state).paused = true;
            good(json!({"status": "paused"}))
        }
        ("POST", "/resume") => {
            lock(state).paused = false;
            good(json!({"status": "resumed"}))
        }
        ("POST", "/update_weight_version") => {
            let label = body["new_version"].as_str().context("a label")?.to_owned();
            lock(state).label.clone_from(&label);
            good(json!({"success": true, "new_version": label}))
        }
        ("POST", "/collective_rpc") => {
            assert_eq!(body["method"], "reload_weights");
            let folder = body["kwargs"]["weights_path"].as_str().context("a folder")?.to_owned();
            let reads = lock(state).reads;
            let weight = match first_weight(Path::new(&folder), reads) {
                Ok(weight) => weight,
                Err(error) => return Ok(Answer::Json(500, json!({"error": {"message": format!("{error:#}")}}))),
            };
            let mut state = lock(state);
            assert!(state.paused, "weights are replaced under running requests");
            state.reloads += 1;
            state.loaded.push(weight);
            if state.loads {
                state.computes_with = state.keeps * state.computes_with + (1.0 - state.keeps) * weight;
                (state.weight, state.folder) = (weight, Some(folder));
            }
            good(json!({"results": [null]}))
        }
        ("POST", "/weight_checker") => {
            assert_eq!(body["action"], "checksum");
            let bits = lock(state).weight.to_bits();
            let mut sums = json!({"dp0:pp0:pcp0:tp0:model.embed_tokens.weight": format!("{bits:08x}")});
            if lock(state).has_head {
                sums["dp0:pp0:pcp0:tp0:lm_head.weight"] = format!("{bits:08x}").into();
            }
            good(json!({"checksums": sums}))
        }
        _ => Ok(Answer::Json(404, json!({"detail": "Not Found"}))),
    }
}

/// The first weight of a tensor in a folder of one weight file.
///
/// # Errors
/// When the folder has no such tensor in float32 or bfloat16.
pub fn first_weight(folder: &Path, tensor: &str) -> Result<f32> {
    let file = std::fs::read(folder.join("model.safetensors")).context("read the weights")?;
    let (length, rest) = file.split_first_chunk::<8>().context("a header")?;
    let header = usize::try_from(u64::from_le_bytes(*length))?;
    let described: Value = serde_json::from_slice(rest.get(..header).context("a whole header")?)?;
    let tensor = &described[tensor];
    let start = usize::try_from(tensor["data_offsets"][0].as_u64().context("the tensor")?)?;
    let bytes = rest.get(header + start..).context("weights")?;
    match tensor["dtype"].as_str() {
        Some("F32") => Ok(f32::from_le_bytes(*bytes.first_chunk::<4>().context("a weight")?)),
        Some("BF16") => {
            let [low, high] = *bytes.first_chunk::<2>().context("a weight")?;
            Ok(f32::from_le_bytes([0, 0, low, high]))
        }
        other => bail!("weights of {other:?}"),
    }
}

/// The finaliser of SplitMix64.
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The answer for a seed: tokens, the last of which is `end` unless it is as long as allowed.
#[must_use]
pub fn stub_tokens(seed: u64, most: usize, end: u32) -> Vec<u32> {
    let length = 1 + usize::try_from(mix(seed) % (most as u64 + 2)).unwrap_or(0);
    let token = |place: usize| {
        let token = u32::try_from(1 + mix(seed ^ mix(place as u64)) % (VOCABULARY - 1)).unwrap_or(1);
        if token == end { token + 1 } else { token }
    };
    let mut tokens: Vec<u32> = (0..length.min(most)).map(token).collect();
    if length <= most
        && let Some(last) = tokens.last_mut()
    {
        *last = end;
    }
    tokens
}

/// The log-prob of a token under weights that begin with `weight`.
#[must_use]
pub fn stub_logprob(token: u32, weight: f32) -> f32 {
    let own = (mix(u64::from(token)) % 1000) as f32 / 1000.0;
    (-0.5 - own - weight.abs()).min(0.0)
}

async fn generate(body: &Value, state: &Mutex<StubState>) -> Result<Answer> {
    if !lock(state).scale_out {
        let message = "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them.";
        return Ok(Answer::Json(403, json!({"error": {"message": message, "code": 403}})));
    }
    let numbers = |value: &Value| -> Vec<u32> {
        value.as_array().into_iter().flatten().filter_map(|token| u32::try_from(token.as_u64()?).ok()).collect()
    };
    let (prompt, params) = (numbers(&body["token_ids"]), &body["sampling_params"]);
    anyhow::ensure!(!prompt.is_empty() && params["n"] == 1, "one answer to a prompt of tokens");
    wait_while_paused(state).await;
    if params["prompt_logprobs"] == 0 {
        let state = lock(state).clone();
        let label = &state.label;
        let scored = prompt.iter().enumerate().map(|(place, token)| match place {
            0 => Value::Null,
            _ => json!({token.to_string(): {"logprob": state.logprob(*token), "rank": 1, "decoded_token": null}}),
        });
        let choice = json!({
            "index": 0, "finish_reason": "length", "stop_reason": null, "token_ids": [1], "logprobs": null,
            "weight_versions": [{"version": label, "start": 0, "end": 1}],
        });
        let scored: Vec<Value> = scored.collect();
        return good(json!({"choices": [choice], "prompt_token_ids": prompt, "prompt_logprobs": scored}));
    }
    if params["seed"].is_null() {
        // The one token is not used.
        let label = lock(state).label.clone();
        let choice = json!({
            "index": 0, "finish_reason": "length", "stop_reason": null, "token_ids": [1], "logprobs": null,
            "weight_versions": [{"version": label, "start": 0, "end": 1}],
        });
        return good(json!({"choices": [choice], "prompt_token_ids": prompt, "prompt_logprobs": null}));
    }
    let fault = {
        let mut state = lock(state);
        state.requests.push(body.clone());
        state.running += 1;
        state.faults.pop_front().or(state.always)
    };
    let _running = Running(state);
    let most = usize::try_from(params["max_tokens"].as_u64().context("a limit")?)?;
    let ends = numbers(&params["stop_token_ids"]);
    let seed = params["seed"].as_u64().context("a seed")?;
    let mut tokens = stub_tokens(seed, most, ends.first().copied().unwrap_or(0));
    let (mut logprobs, mut spans) = (Vec::new(), Vec::<(String, usize, usize)>::new());
    let token_ms = lock(state).token_ms;
    for (place, token) in tokens.iter().enumerate() {
        if token_ms > 0 {
            tokio::time::sleep(Duration::from_millis(token_ms)).await;
        }
        wait_while_paused(state).await;
        let mut state = lock(state);
        state.tokens += 1;
        logprobs.push(state.logprob(*token));
        match spans.last_mut() {
            Some((label, _, end)) if *label == state.label => *end = place + 1,
            _ => spans.push((state.label.clone(), place, place + 1)),
        }
    }
    let mut finish = if tokens.last().is_some_and(|last| ends.contains(last)) { "stop" } else { "length" };
    let mut answer_prompt = prompt.clone();
    let mut content: Vec<Value> = tokens
        .iter()
        .zip(&logprobs)
        .map(|(token, logprob)| {
            let top = [json!({"token_id": token, "logprob": logprob, "rank": 1})];
            json!({"token_id": token, "logprob": logprob, "rank": 1, "top_logprobs": top})
        })
        .collect();
    let mut versions: Value =
        spans.iter().map(|(version, start, end)| json!({"version": version, "start": start, "end": end})).collect();
    let repeat = |tokens: &mut Vec<u32>, content: &mut Vec<Value>, token: u32, count: usize| {
        *tokens = vec![token; count];
        *content = vec![json!({"token_id": token, "logprob": -1.0, "rank": 1, "top_logprobs": []}); count];
    };
    let one_span = |label: &str, end: usize| json!([{"version": label, "start": 0, "end": end}]);
    let label = lock(state).label.clone();
    match fault {
        None | Some(StubFault::Break | StubFault::Slow) => {}
        Some(StubFault::Status(status)) => {
            return Ok(Answer::Json(status, json!({"error": {"message": "as the test wants it", "code": status}})));
        }
        Some(StubFault::Hang) => std::future::pending().await,
        Some(StubFault::Endless) => return Ok(Answer::Endless),
        Some(StubFault::Garbage) => return Ok(Answer::Text("<html>not what you wanted</html>".to_owned())),
        Some(StubFault::NanLogprob) => content[0]["logprob"] = json!(-9999.0),
        Some(StubFault::NullLogprob) => content[0]["logprob"] = Value::Null,
        Some(StubFault::FewLogprobs) => drop(content.pop()),
        Some(StubFault::OtherLogprob) => content[0]["token_id"] = json!(VOCABULARY + 7),
        Some(StubFault::FewTokens) => {
            repeat(&mut tokens, &mut content, 1, most - 1);
            (finish, versions) = ("length", one_span(&label, most - 1));
        }
        Some(StubFault::NoTokens) => {
            repeat(&mut tokens, &mut content, 1, 0);
            (finish, versions) = ("length", json!([]));
        }
        Some(StubFault::UnknownToken) => {
            repeat(&mut tokens, &mut content, 1_000_000, most);
            (finish, versions) = ("length", one_span(&label, most));
        }
        Some(StubFault::ManyTokens) => {
            repeat(&mut tokens, &mut content, 1, most + 1);
            (finish, versions) = ("length", one_span(&label, most + 1));
        }
        Some(StubFault::FalseEnd) => {
            repeat(&mut tokens, &mut content, 1, 2);
            (finish, versions) = ("stop", one_span(&label, 2));
        }
        Some(StubFault::Abort) => finish = "abort",
        Some(StubFault::OtherPrompt) => answer_prompt.push(1),
        Some(StubFault::NoVersions) => versions = Value::Null,
        Some(StubFault::OtherVersion) => versions = one_span("somebody's", tokens.len()),
        Some(StubFault::VersionGap) => {
            versions = json!([{"version": label, "start": 1, "end": tokens.len()}]);
        }
    }
    let choice = json!({
        "index": 0,
        "finish_reason": finish,
        "stop_reason": null,
        "token_ids": tokens,
        "logprobs": {"content": content},
        "routed_experts": null,
        "sampling_mask": null,
        "weight_versions": versions,
    });
    let whole = json!({
        "request_id": "generate-tokens-1",
        "model": "m",
        "created": 1,
        "usage": {"prompt_tokens": prompt.len(), "completion_tokens": tokens.len()},
        "prompt_logprobs": null,
        "prompt_token_ids": answer_prompt,
        "output_mode": "tokens",
        "choices": [choice],
    });
    match fault {
        Some(StubFault::Break) => Ok(Answer::Half(whole)),
        Some(StubFault::Slow) => Ok(Answer::Slow(whole)),
        _ => good(whole),
    }
}

/// Counts a request until it ends, in whatever way.
struct Running<'a>(&'a Mutex<StubState>);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let mut state = lock(self.0);
        state.running = state.running.saturating_sub(1);
    }
}

async fn wait_while_paused(state: &Mutex<StubState>) {
    while lock(state).paused {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
