//! The engine of vLLM servers against servers that go wrong in every way: each fault is typed, the sample is generated elsewhere, and
//! nothing of it is ever returned.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use pacs_engine::{Finished, GroupJob, Output, RolloutEngine, SamplingOptions};
use pacs_protocol::v1::EngineServer;
use pacs_shape::{ModelConfig, ParameterLayout};
use pacs_spec::JobSpec;
use pacs_tests::{StubFault, StubStall, StubState, VllmStub, root, stub_logprob, stub_tokens};
use pacs_types::{FinishReason, GroupId, NoiseKey, SampleId, VersionSpan, WeightVersion};
use pacs_vllm::{Timing, VllmEngine, VllmOptions};
use pacs_weights::{Fetched, HostStore, Probe, Received, Transport, VersionId, WeightKind};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(60);
const RUN: &str = "0123456789abcdef0123456789abcdef";
const PROMPT: [u32; 3] = [5, 6, 7];

fn model() -> PathBuf {
    root().join("tests/golden/models/qwen2-tied")
}

/// Servers, an engine on top of them, and versions to give it.
struct Setup {
    stubs: Vec<VllmStub>,
    engine: VllmEngine,
    attached: pacs_vllm::Attached,
    outputs: mpsc::Receiver<Output>,
    store: HostStore,
    end: u32,
    layout: ParameterLayout,
    folder: tempfile::TempDir,
}

/// `more`: another key of `[rollout]`, or one of `[rollout.vllm]` that begins with `vllm.`.
fn spec(endpoints: &[String], folder: &Path, more: &str) -> Result<JobSpec> {
    let (of_rollout, of_vllm) = more.strip_prefix("vllm.").map_or((more, ""), |key| ("", key));
    let text = format!(
        "name = 'a'\nmodel.path = {:?}\ndata.train.path = 't.jsonl'\ndata.evaluation.path = 'e.jsonl'\ndata.max_prompt_tokens = 64\n\
         [rollout]\nengine = 'vllm'\nmax_new_tokens = 16\nmax_concurrent_samples = 1024\n{of_rollout}\n[rollout.vllm]\nendpoints = {endpoints:?}\n\
         weights_dir = {:?}\nrequest_seconds = 2\nmax_requests = 32\nmax_attempts = 4\n{of_vllm}\n",
        model().display().to_string(),
        folder.join("weights").display().to_string(),
    );
    pacs_spec::parse(&text, Path::new("a.toml")).map_err(|error| anyhow::anyhow!("{error}"))
}

fn store(place: &Path) -> Result<HostStore> {
    std::fs::create_dir(place)?;
    Ok(HostStore::open_in("run", &[place.to_owned()])?)
}

impl Setup {
    async fn new(states: Vec<StubState>, more: &str) -> Result<Self> {
        Self::with_timing(states, more, Timing::default()).await
    }

    async fn with_timing(states: Vec<StubState>, more: &str, timing: Timing) -> Result<Self> {
        let mut stubs = Vec::new();
        for state in states {
            stubs.push(VllmStub::start(state).await?);
        }
        let folder = tempfile::tempdir()?;
        let endpoints: Vec<String> = stubs.iter().map(VllmStub::url).collect();
        let spec = spec(&endpoints, folder.path(), more)?;
        let options = VllmOptions { timing, ..VllmOptions::default() };
        let engine = VllmEngine::start(&spec, RUN, "rollout-0", &options).map_err(anyhow::Error::msg)?;
        let (attached, outputs) = engine.attach();
        let store = store(&folder.path().join("store"))?;
        let config = ModelConfig::read(&model())?;
        let end = *config.end_tokens.first().context("the model has an end token")?;
        let layout = ParameterLayout::new(&config);
        Ok(Self { stubs, engine, attached, outputs, store, end, layout, folder })
    }

    /// Publishes a version whose first weight is `weight`, and gives it to the engine without a probe.
    fn install(&self, version: u64, weight: f32) -> Result<VersionId> {
        self.install_with(version, weight, None)
    }

    /// As [`Self::install`], with the probe of a step that has moved the first weight from `before` to `weight`.
    fn install_after(&self, version: u64, [before, weight]: [f32; 2]) -> Result<VersionId> {
        self.install_with(version, weight, Some(probe(version, [before, weight])?))
    }

    fn install_with(&self, version: u64, weight: f32, probe: Option<Probe>) -> Result<VersionId> {
        let id = VersionId::new(1, version);
        let mut content = vec![0u8; 4 * self.layout.total()];
        content[..4].copy_from_slice(&weight.to_le_bytes());
        let whole = self.store.publish(id, WeightKind::Float32, &content)?;
        let received = Received { whole, transport: Transport::Shared, fetched: Fetched::default() };
        let probe = probe.map(Arc::new);
        let prepared = self.attached.prepare(&received, probe.as_ref());
        let prepared = prepared.map_err(|problem| anyhow::anyhow!("{problem:?}"))?;
        self.attached.install(prepared);
        Ok(id)
    }

    /// Installs a version and waits until some server serves it.
    async fn serve(&self, version: u64, weight: f32) -> Result<VersionId> {
        let id = self.install(version, weight)?;
        self.until_served(id).await
    }

    /// As [`Self::serve`], with the probe of a step.
    async fn serve_after(&self, version: u64, weights: [f32; 2]) -> Result<VersionId> {
        let id = self.install_after(version, weights)?;
        self.until_served(id).await
    }

    async fn until_served(&self, id: VersionId) -> Result<VersionId> {
        let mut serves = self.attached.serves();
        let served = timeout(PATIENCE, serves.wait_for(|serves| *serves == Some(id))).await;
        served.with_context(|| format!("no server serves {id}: {:?}", *self.engine.servers().borrow()))??;
        Ok(id)
    }

    async fn servers_until(&self, what: &str, holds: impl Fn(&[EngineServer]) -> bool) -> Result<Vec<EngineServer>> {
        let mut servers = self.engine.servers();
        let found = timeout(PATIENCE, servers.wait_for(|servers| !servers.is_empty() && holds(servers))).await;
        match found {
            Ok(servers) => Ok(servers?.clone()),
            Err(_) => bail!("{what} did not happen: {:?}", *self.engine.servers().borrow()),
        }
    }

    /// Waits until a server computes so many requests.
    async fn running(&self, server: usize, requests: u32) -> Result<()> {
        let reached = async {
            while self.stubs[server].state().running < requests {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(PATIENCE, reached).await.with_context(|| format!("server {server} never has {requests} requests"))
    }

    fn ask(&self, ticket: u64, samples: u32, oldest: VersionId) -> Result<()> {
        self.attached.generate(job(ticket, samples, &options()), oldest)?;
        Ok(())
    }

    async fn output(&mut self) -> Result<Output> {
        timeout(PATIENCE, self.outputs.recv()).await.context("no output")?.context("the engine ended")
    }

    /// The next samples, by ticket and index.
    async fn samples(&mut self, count: usize) -> Result<BTreeMap<(u64, u32), Finished>> {
        let mut found = BTreeMap::new();
        while found.len() < count {
            match self.output().await? {
                Output::Finished(finished) => {
                    let key = (finished.ticket, finished.index);
                    assert!(found.insert(key, *finished).is_none(), "{key:?} came twice");
                }
                other => bail!("{other:?}"),
            }
        }
        Ok(found)
    }

    /// Checks a sample token by token: it is what its noise gives under a version with this weight.
    fn check(&self, finished: &Finished, version: u64, weight: f32) {
        let Finished { ticket, index, sample } = finished;
        let tokens = stub_tokens(noise(*ticket, *index).bits() >> 1, 16, self.end);
        assert_eq!(sample.tokens, tokens, "{ticket}.{index}");
        let logprobs: Vec<f32> = tokens.iter().map(|token| stub_logprob(*token, weight)).collect();
        assert_eq!(sample.logprobs, logprobs, "{ticket}.{index}");
        assert!(sample.sampled_logprobs.is_empty());
        let ends = tokens.last() == Some(&self.end);
        assert_eq!(sample.finish, if ends { FinishReason::Stop } else { FinishReason::Length });
        let (version, length) = (WeightVersion(version), tokens.len() as u32);
        assert_eq!((sample.version, &sample.spans), (version, &vec![VersionSpan { version, tokens: length }]));
        let surprise: f64 = logprobs.iter().map(|logprob| -f64::from(*logprob)).sum();
        assert!((sample.entropy_sum - surprise).abs() < 1e-6);
    }
}

/// Checks that each token's log-prob is that of the version which is said to have generated it; `weight` is that version's weight.
/// Returns the number of versions.
fn check_spans(finished: &Finished, weight: impl Fn(u64) -> f32) -> usize {
    let sample = &finished.sample;
    let mut place = 0;
    for span in &sample.spans {
        for _ in 0..span.tokens {
            assert_eq!(sample.logprobs[place], stub_logprob(sample.tokens[place], weight(span.version.0)));
            place += 1;
        }
    }
    assert_eq!(place, sample.tokens.len());
    assert_eq!(sample.version, sample.spans[0].version);
    sample.spans.len()
}

/// The probe of a version as a learner with the stub's arithmetic computes it.
fn probe(version: u64, weights: [f32; 2]) -> Result<Probe> {
    let answer = 20..44;
    let tokens = PROMPT.into_iter().chain(answer.clone()).collect();
    let scored = |weight| answer.clone().map(|token| stub_logprob(token, weight)).collect();
    let [before, now] = weights.map(scored);
    Ok(Probe::new(tokens, PROMPT.len(), now, before, WeightVersion(version - 1))?)
}

fn noise(ticket: u64, index: u32) -> NoiseKey {
    NoiseKey::new(1, 0, SampleId { group: GroupId(ticket), index })
}

fn options() -> SamplingOptions {
    SamplingOptions { temperature: 1.0, top_p: 1.0, top_k: 0, min_p: 0.0, max_new_tokens: 16, stop: Vec::new() }
}

fn job(ticket: u64, samples: u32, options: &SamplingOptions) -> GroupJob {
    let samples = (0..samples).map(|index| (index, noise(ticket, index))).collect();
    GroupJob { ticket, prompt: PROMPT.to_vec(), samples, options: options.clone(), records_routes: false }
}

fn stubs(count: usize) -> Vec<StubState> {
    vec![StubState::default(); count]
}

#[tokio::test]
async fn samples_are_what_their_noise_and_weights_make_them() -> Result<()> {
    let mut setup = Setup::new(stubs(2), "").await?;
    let version = setup.serve(0, 0.125).await?;
    setup
        .servers_until("two servers are ready", |servers| servers.iter().all(|server| server.state == "ready"))
        .await?;
    assert_eq!(*setup.attached.capacity().borrow(), 64);
    for ticket in 0..20 {
        setup.ask(ticket, 4, version)?;
    }
    let samples = setup.samples(80).await?;
    for finished in samples.values() {
        setup.check(finished, 0, 0.125);
    }
    let mut seeds = BTreeSet::new();
    for stub in &setup.stubs {
        let state = stub.state();
        assert!(!state.requests.is_empty(), "a server had nothing to do");
        for request in &state.requests {
            assert_eq!(request["token_ids"], serde_json::json!(PROMPT), "token ids, and nothing else");
            let params = &request["sampling_params"];
            assert_eq!(
                (&params["n"], &params["ignore_eos"], &params["logprobs"]),
                (&1.into(), &true.into(), &0.into())
            );
            assert_eq!(request["cache_salt"], state.label.as_str(), "prefixes are shared within one version only");
            seeds.insert(params["seed"].as_u64().context("a seed")?);
        }
    }
    assert_eq!(seeds.len(), 80, "every sample has a seed of its own");
    Ok(())
}

#[tokio::test]
async fn an_update_under_running_requests_names_the_version_of_every_token() -> Result<()> {
    let slow = StubState { token_ms: 40, ..StubState::default() };
    let mut setup = Setup::new(vec![slow], "").await?;
    let first = setup.serve(0, 0.125).await?;
    setup.ask(1, 24, first)?;
    // Some tokens of the first version, and most still to come.
    let begun = async {
        while setup.stubs[0].state().tokens < 48 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(PATIENCE, begun).await?;
    setup.serve(1, 0.25).await?;
    let samples = setup.samples(24).await?;
    let mut mixed = 0;
    for finished in samples.values() {
        let versions = check_spans(finished, |version| if version == 0 { 0.125 } else { 0.25 });
        mixed += usize::from(versions > 1);
    }
    assert!(mixed > 0, "no request met the update: {:?}", *setup.engine.servers().borrow());
    assert_eq!(setup.stubs[0].state().reloads, 2);
    // What is asked for from now on may not be older.
    let second = VersionId::new(1, 1);
    setup.ask(2, 8, second)?;
    for finished in setup.samples(8).await?.values() {
        setup.check(finished, 1, 0.25);
    }
    let folders = std::fs::read_dir(setup.folder.path().join("weights/pacs-vllm-0123456789abcdef-rollout-0"))?;
    assert!(folders.count() <= 2, "folders of old versions are removed");
    Ok(())
}

/// Every fault of an answer, with words of its message.
const FAULTS: [(StubFault, &str); 20] = [
    (StubFault::Status(503), "busy (status 503)"),
    (StubFault::Status(429), "busy (status 429)"),
    (StubFault::Status(500), "status 500: as the test wants it"),
    (StubFault::Status(400), "status 400"),
    (StubFault::Hang, "no answer to generate within 2 s"),
    (StubFault::Break, "the connection broke off"),
    (StubFault::Slow, "no answer to generate within 2 s"),
    (StubFault::Endless, "more than"),
    (StubFault::Garbage, "cannot be read"),
    (StubFault::NanLogprob, "wrong log-probs: -9999"),
    (StubFault::NullLogprob, "cannot be read"),
    (StubFault::FewLogprobs, "wrong log-probs"),
    (StubFault::OtherLogprob, "a log-prob of token 307"),
    (StubFault::FewTokens, "15 tokens without an end, where 16 were asked for"),
    (StubFault::NoTokens, "0 tokens without an end"),
    (StubFault::UnknownToken, "1000000 of a vocabulary"),
    (StubFault::ManyTokens, "17 tokens, where 16 were asked for"),
    (StubFault::FalseEnd, "ends no answer of this job"),
    (StubFault::Abort, "aborted by the server"),
    (StubFault::OtherPrompt, "another prompt"),
];

/// Faults that leave the weights of some token unknown.
const UNKNOWN_WEIGHTS: [(StubFault, &str); 3] = [
    (StubFault::NoVersions, "the answer names none"),
    (StubFault::OtherVersion, "weights named \"somebody's\""),
    (StubFault::VersionGap, "are said to be of one version"),
];

#[tokio::test]
async fn wrong_answers_are_typed_and_generated_elsewhere() -> Result<()> {
    for (fault, words) in FAULTS.into_iter().chain(UNKNOWN_WEIGHTS) {
        let mut states = stubs(2);
        states[0].always = Some(fault);
        let mut setup = Setup::new(states, "").await?;
        let version = setup.serve(0, 0.125).await?;
        setup.servers_until("ready", |servers| servers.iter().all(|server| server.state == "ready")).await?;
        for ticket in 0..3 {
            setup.ask(ticket, 2, version)?;
        }
        let samples = setup.samples(6).await.with_context(|| format!("{fault:?}"))?;
        for finished in samples.values() {
            setup.check(finished, 0, 0.125);
        }
        let servers = setup
            .servers_until("the fault shows", |servers| servers[0].discarded > 0 && servers[1].samples == 6)
            .await
            .with_context(|| format!("{fault:?}"))?;
        assert!(servers[0].error.contains(words), "{fault:?}: {:?}", servers[0]);
        assert_eq!((servers[0].samples, servers[1].discarded), (0, 0), "{fault:?}");
    }
    Ok(())
}

/// When a call of the engine is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    /// While a server that has other weights is taken into service.
    Start,
    /// While one is that has the weights already, and was left paused.
    Held,
    /// While it serves, is looked at, and is given the next version.
    Serving,
}

/// Every call that the engine makes, at each time at which it makes it.
const CALLS: [(&str, &[When]); 14] = [
    ("health", &[When::Start]),
    ("version", &[When::Start]),
    ("models", &[When::Start]),
    ("server_info", &[When::Start]),
    ("is_paused", &[When::Held]),
    ("resume", &[When::Start, When::Held, When::Serving]),
    ("weight_info", &[When::Start, When::Serving]),
    ("pause", &[When::Start, When::Serving]),
    ("update_weight_version", &[When::Start, When::Serving]),
    ("reload_weights", &[When::Start, When::Serving]),
    ("weight_checker", &[When::Start, When::Serving]),
    // The first version has no probe.
    ("score", &[When::Serving]),
    ("generate", &[When::Start, When::Serving]),
    ("metrics", &[When::Start, When::Serving]),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_hangs_in_any_call_is_down_until_it_answers_again() -> Result<()> {
    let mut cases = JoinSet::new();
    for (call, times) in CALLS {
        for when in times.iter().copied() {
            for how in [StubStall::Silent, StubStall::Half] {
                let case =
                    async move { hang(call, when, how).await.with_context(|| format!("{call}, {when:?}, {how:?}")) };
                cases.spawn(case);
            }
        }
    }
    let mut failed = Vec::new();
    while let Some(ended) = cases.join_next().await {
        failed.extend(ended?.err().map(|error| format!("{error:#}")));
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    Ok(())
}

/// Has the first of two servers hang in a call: it is noticed by the deadline of the call, its requests go to the other, and it serves
/// again when it answers.
async fn hang(call: &'static str, when: When, how: StubStall) -> Result<()> {
    const SAMPLES: usize = 16;
    let timing = Timing {
        question: Duration::from_secs(2),
        first_token: Duration::from_secs(2),
        look: Duration::from_millis(300),
        longest_wait: Duration::from_millis(300),
    };
    let mut states = vec![StubState { token_ms: 2, ..StubState::default() }; 2];
    match when {
        When::Start => states[0].stalls = Some((call, how)),
        // Until the other one shows how the weights are called.
        When::Held => states[0].stalls = Some(("health", StubStall::Silent)),
        When::Serving => {}
    }
    let mut setup = Setup::with_timing(states, "vllm.update_seconds = 2", timing).await?;
    let version = setup.serve(0, 0.125).await?;
    let weight = |version: u64| if version == 0 { 0.125 } else { 0.25 };
    let mut newest = 0;
    match when {
        When::Start => {}
        When::Held => {
            setup.servers_until("the other is ready", |servers| servers[1].state == "ready").await?;
            let held = setup.stubs[1].state().clone();
            let mut hung = setup.stubs[0].state();
            (hung.label, hung.weight, hung.computes_with, hung.paused) =
                (held.label, held.weight, held.computes_with, true);
            hung.stalls = Some((call, how));
        }
        When::Serving => {
            setup.servers_until("ready", |servers| servers.iter().all(|server| server.state == "ready")).await?;
            setup.stubs[0].state().stalls = Some((call, how));
            newest = 1;
        }
    }
    for ticket in 0..SAMPLES as u64 / 2 {
        setup.ask(ticket, 2, version)?;
    }
    if newest == 1 {
        setup.install_after(1, [0.125, 0.25])?;
    }
    let words = format!("no answer to {call} within 2 s");
    let is_down = |servers: &[EngineServer]| servers[0].state == "down" && servers[0].error.contains(&words);
    let servers = setup.servers_until(&words, is_down).await?;
    assert_eq!((servers[0].weight_version, servers[0].in_flight), (None, 0));
    for finished in setup.samples(SAMPLES).await?.values() {
        check_spans(finished, weight);
    }
    let reached = |servers: &[EngineServer]| servers[1].weight_version == Some(newest);
    setup.servers_until("the other serves", reached).await?;

    setup.stubs[0].state().stalls = None;
    let serves = |servers: &[EngineServer]| {
        servers.iter().all(|server| server.state == "ready" && server.weight_version == Some(newest))
    };
    setup.servers_until("it serves again", serves).await?;
    assert!(!setup.stubs[0].state().paused);
    let before = setup.stubs[0].state().requests.len();
    for ticket in 100..100 + SAMPLES as u64 / 2 {
        setup.ask(ticket, 2, VersionId::new(1, newest))?;
    }
    for finished in setup.samples(SAMPLES).await?.values() {
        setup.check(finished, newest, weight(newest));
    }
    assert!(setup.stubs[0].state().requests.len() > before, "it generates again");
    Ok(())
}

#[tokio::test]
async fn a_sample_that_no_server_can_generate_is_given_up() -> Result<()> {
    let mut states = stubs(1);
    states[0].always = Some(StubFault::NanLogprob);
    let mut setup = Setup::new(states, "").await?;
    let version = setup.serve(0, 0.125).await?;
    setup.ask(9, 1, version)?;
    let Output::GivenUp { ticket, index, reason } = setup.output().await? else { bail!("something came of it") };
    assert_eq!((ticket, index), (9, 0));
    assert!(reason.contains("4 servers tried in vain") && reason.contains("wrong log-probs"), "{reason}");
    assert_eq!(setup.stubs[0].state().requests.len(), 4);
    Ok(())
}

#[tokio::test]
async fn a_server_that_dies_and_comes_back_with_old_weights_gets_the_new_ones_first() -> Result<()> {
    let slow = StubState { token_ms: 20, ..StubState::default() };
    let mut setup = Setup::new(vec![slow.clone(), slow], "").await?;
    let version = setup.serve(3, 0.125).await?;
    setup.servers_until("ready", |servers| servers.iter().all(|server| server.state == "ready")).await?;
    for ticket in 0..8 {
        setup.ask(ticket, 4, version)?;
    }
    setup.running(0, 1).await?;
    setup.stubs[0].kill();
    let samples = setup.samples(32).await?;
    samples.values().for_each(|finished| setup.check(finished, 3, 0.125));
    let servers = setup.servers_until("it is down", |servers| servers[0].state == "down").await?;
    assert_eq!((servers[1].state.as_str(), servers[1].weight_version), ("ready", Some(3)));
    assert_eq!(*setup.attached.capacity().borrow(), 32, "one server is left");
    let before = setup.stubs[0].state().requests.len();

    setup.stubs[0].restart().await?;
    setup.servers_until("it is ready again", |servers| servers[0].state == "ready").await?;
    let restarted = setup.stubs[0].state().clone();
    assert_eq!((restarted.reloads, restarted.weight), (2, 0.125));
    for ticket in 10..26 {
        setup.ask(ticket, 4, version)?;
    }
    let samples = setup.samples(64).await?;
    samples.values().for_each(|finished| setup.check(finished, 3, 0.125));
    assert!(setup.stubs[0].state().requests.len() > before, "it generates again");
    Ok(())
}

#[tokio::test]
async fn servers_that_are_not_there_yet_join_when_they_are() -> Result<()> {
    let mut setup = Setup::new(stubs(1), "").await?;
    setup.stubs[0].kill();
    let version = setup.install(0, 0.125)?;
    setup.ask(1, 4, version)?;
    setup.servers_until("it is missed", |servers| servers[0].error.contains("cannot be reached")).await?;
    assert_eq!(*setup.attached.serves().borrow(), None);
    setup.stubs[0].restart().await?;
    let samples = setup.samples(4).await?;
    samples.values().for_each(|finished| setup.check(finished, 0, 0.125));
    Ok(())
}

/// The real fault: vLLM on a CPU kept its output head while every checksum changed.
#[tokio::test]
async fn a_server_that_keeps_its_weights_is_refused_though_its_checksums_change() -> Result<()> {
    let slow = StubState { token_ms: 20, ..StubState::default() };
    let mut setup = Setup::new(vec![slow.clone(), slow], "").await?;
    setup.serve(0, 0.125).await?;
    let all_at =
        |version| move |servers: &[EngineServer]| servers.iter().all(|server| server.weight_version == Some(version));
    setup.servers_until("both serve version 0", all_at(0)).await?;
    let first = setup.install_after(1, [0.125, 0.25])?;
    let servers = setup.servers_until("both serve version 1", all_at(1)).await?;
    assert!(servers.iter().all(|server| server.probe_error.is_some_and(|error| error < 1e-6)), "{servers:?}");

    // Requests of both servers meet the update.
    setup.stubs[0].state().keeps = 1.0;
    for ticket in 0..8 {
        setup.ask(ticket, 4, first)?;
    }
    setup.running(0, 1).await?;
    let second = setup.install_after(2, [0.25, 0.5])?;
    let refused = |servers: &[EngineServer]| servers[0].state == "down" && servers[1].weight_version == Some(2);
    let servers = setup.servers_until("one is refused", refused).await?;
    for words in [
        "it holds other weights than it was given",
        "2.5e-1 nats per token from the learner's under version 2 of generation 1",
        "0.0e0 from those under version 1 of generation 1",
        "2.5e-1 apart",
    ] {
        assert!(servers[0].error.contains(words), "{words}: {}", servers[0].error);
    }
    assert!((servers[0].probe_error.context("it was probed")? - 0.25).abs() < 1e-6, "{servers:?}");
    {
        let stub = setup.stubs[0].state();
        assert_eq!((stub.weight, stub.computes_with), (0.5, 0.25), "its checksums are those of the new weights");
    }

    // Nothing that it generated under the name of the new version gets out.
    let samples = setup.samples(32).await?;
    for finished in samples.values() {
        check_spans(finished, |version| if version == 1 { 0.25 } else { 0.5 });
    }
    let before = setup.stubs[0].state().requests.len();
    for ticket in 10..18 {
        setup.ask(ticket, 4, second)?;
    }
    setup.samples(32).await?.values().for_each(|finished| setup.check(finished, 2, 0.5));
    assert_eq!(setup.stubs[0].state().requests.len(), before, "it was given work");

    setup.stubs[0].state().keeps = 0.0;
    setup.servers_until("it is used again", all_at(2)).await?;
    Ok(())
}

#[tokio::test]
async fn a_server_that_is_stale_in_part_or_was_away_is_refused_until_it_computes_with_what_it_is_given() -> Result<()> {
    let mut setup = Setup::new(stubs(1), "").await?;
    setup.serve(0, 0.125).await?;
    // A new embedding and an old head.
    setup.stubs[0].state().keeps = 0.5;
    setup.install_after(1, [0.125, 0.1875])?;
    let refusal = "are further off than its noise explains";
    setup.servers_until("a refusal", |servers| servers[0].error.contains(refusal)).await?;
    assert_eq!(*setup.attached.serves().borrow(), Some(VersionId::new(1, 0)));
    setup.stubs[0].state().keeps = 0.0;
    setup.until_served(VersionId::new(1, 1)).await?;

    // It is away for four versions, and returns with the weights it was started with, which are neither version.
    setup.stubs[0].kill();
    let weight = |version: u64| 0.125 + 0.0625 * version as f32;
    for version in 2..=5 {
        setup.install_after(version, [weight(version - 1), weight(version)])?;
    }
    setup.stubs[0].state().keeps = 1.0;
    setup.stubs[0].restart().await?;
    let refusal = "from the learner's under version 5 of generation 1";
    setup.servers_until("a refusal", |servers| servers[0].error.contains(refusal)).await?;
    assert_eq!(*setup.attached.serves().borrow(), Some(VersionId::new(1, 1)));
    setup.stubs[0].state().keeps = 0.0;
    let version = setup.until_served(VersionId::new(1, 5)).await?;
    setup.ask(1, 4, version)?;
    setup.samples(4).await?.values().for_each(|finished| setup.check(finished, 5, weight(5)));

    // A good one that was away is taken as it is.
    setup.stubs[0].kill();
    for version in 6..=8 {
        setup.install_after(version, [weight(version - 1), weight(version)])?;
    }
    let reloads = setup.stubs[0].state().reloads;
    setup.stubs[0].restart().await?;
    setup.until_served(VersionId::new(1, 8)).await?;
    assert_eq!(setup.stubs[0].state().reloads, reloads + 1);
    Ok(())
}

#[tokio::test]
async fn a_noisy_server_serves_version_after_version() -> Result<()> {
    let noisy = StubState { noise: 0.02, ..StubState::default() };
    let mut setup = Setup::new(vec![noisy], "").await?;
    setup.serve(0, 0.125).await?;
    let mut before = 0.125;
    for (version, change) in (1..).zip([0.1, 1e-3, 1e-4, 0.05, 0.0, 1e-3, 0.02, 5e-3, 1e-3, 0.1]) {
        let weight = before + change;
        setup.serve_after(version, [before, weight]).await?;
        before = weight;
        let servers = setup.servers_until("its probe", |servers| servers[0].probe_error.is_some()).await?;
        let error = servers[0].probe_error.context("it was probed")?;
        assert!((2e-3..2e-2).contains(&error) && servers[0].error.is_empty(), "version {version}: {servers:?}");
    }
    assert_eq!(setup.stubs[0].state().reloads, 11);
    setup.ask(1, 4, VersionId::new(1, 10))?;
    setup.samples(4).await?;
    Ok(())
}

#[tokio::test]
async fn an_error_beyond_the_limit_ends_the_run_and_names_both_versions() -> Result<()> {
    let mut setup = Setup::new(stubs(1), "").await?;
    let version = setup.serve(4, 0.125).await?;
    setup.ask(1, 8, version)?;
    setup.samples(8).await?;
    // The learner computes with other weights than the folder has, under both versions.
    setup.install_with(5, 0.5, Some(probe(5, [30.001, 30.0])?))?;
    // Nothing that was generated with them gets out.
    setup.ask(2, 4, VersionId::new(1, 5))?;
    let Output::Refused(problem) = setup.output().await? else { bail!("it continues") };
    assert!(problem.contains("from version 4 of generation 1 to version 5 of generation 1"), "{problem}");
    assert!(problem.contains("29.500 nats per token") && problem.contains("`rollout.vllm.max_probe_error` is 0.5"));
    Ok(())
}

#[tokio::test]
async fn weights_that_a_server_did_not_load_are_noticed() -> Result<()> {
    let mut setup = Setup::new(stubs(1), "").await?;
    let version = setup.serve(0, 0.125).await?;
    setup.stubs[0].state().loads = false;
    setup.install(1, 0.25)?;
    let servers = setup.servers_until("it is down", |servers| servers[0].state == "down").await?;
    assert!(
        servers[0].error.contains("its checksums of version 1 of generation 1 are those of version 0"),
        "{servers:?}"
    );
    assert_eq!(*setup.attached.serves().borrow(), Some(version));
    setup.stubs[0].state().loads = true;
    setup.servers_until("it recovers", |servers| servers[0].weight_version == Some(1)).await?;
    setup.ask(1, 4, VersionId::new(1, 1))?;
    setup.samples(4).await?.values().for_each(|finished| setup.check(finished, 1, 0.25));

    // Two servers that should hold the same and do not.
    let mut states = stubs(2);
    states[1].loads = false;
    let setup = Setup::new(states, "").await?;
    setup.serve(0, 0.125).await?;
    let differ = |servers: &[EngineServer]| servers.iter().any(|server| server.error.contains("divided alike"));
    setup.servers_until("they differ", differ).await?;
    Ok(())
}

#[tokio::test]
async fn servers_that_do_not_fit_the_job_say_what_is_missing() -> Result<()> {
    let default = StubState::default;
    for (state, more, words) in [
        (StubState { dev_mode: false, ..default() }, "", "VLLM_SERVER_DEV_MODE=1"),
        (StubState { max_model_len: 80, ..default() }, "", "--max-model-len 81"),
        (default(), "temperature = 0.7", "--logprobs-mode processed_logprobs"),
        (StubState { logprobs_mode: "raw_logits", ..default() }, "", "raw_logits"),
        (StubState { device: "cpu", ..default() }, "", "pacs model untie"),
        (StubState { device: "cpu", ..default() }, "vllm.untied_head = true", "pacs model untie"),
        (StubState { has_head: true, ..default() }, "", "untied_head"),
        // The first request says so, before it has any of ours.
        (StubState { scale_out: false, ..default() }, "", "--enable-scale-out"),
    ] {
        let setup = Setup::new(vec![state], more).await?;
        setup.install(0, 0.125)?;
        let unfit = setup.servers_until(words, |servers| servers[0].error.contains(words)).await?;
        assert_eq!((unfit[0].state.as_str(), *setup.attached.capacity().borrow()), ("down", 0));
    }
    Ok(())
}

#[tokio::test]
async fn what_is_cut_off_has_both_log_probs() -> Result<()> {
    let state = StubState { logprobs_mode: "processed_logprobs", token_ms: 5, ..StubState::default() };
    let mut setup = Setup::new(vec![state], "top_p = 0.9").await?;
    let version = setup.serve(0, 0.125).await?;
    let cut = SamplingOptions { top_p: 0.9, ..options() };
    setup.attached.generate(job(1, 8, &cut), version)?;
    // The update waits for requests that run, since a sample is scored by the version that generated it.
    setup.install(1, 0.25)?;
    for Finished { sample, .. } in setup.samples(8).await?.values() {
        let weight = if sample.version.0 == 0 { 0.125 } else { 0.25 };
        let expected: Vec<f32> = sample.tokens.iter().map(|token| stub_logprob(*token, weight)).collect();
        assert_eq!((&sample.logprobs, &sample.sampled_logprobs), (&expected, &expected));
        assert_eq!(sample.spans.len(), 1);
    }
    Ok(())
}

#[tokio::test]
async fn a_worker_that_starts_again_uses_what_its_servers_hold() -> Result<()> {
    let setup = Setup::new(stubs(1), "").await?;
    setup.serve(7, 0.125).await?;
    let Setup { stubs, engine, attached, outputs, folder, .. } = setup;
    drop((attached, outputs, engine));
    // As if it had been killed in the middle of the next update.
    stubs[0].state().paused = true;
    let spec = spec(&[stubs[0].url()], folder.path(), "")?;
    let engine = VllmEngine::start(&spec, RUN, "rollout-0", &VllmOptions::default()).map_err(anyhow::Error::msg)?;
    let (attached, outputs) = engine.attach();
    let store = store(&folder.path().join("again"))?;
    let config = ModelConfig::read(&model())?;
    let (end, layout) = (config.end_tokens[0], ParameterLayout::new(&config));
    let mut setup = Setup { stubs, engine, attached, outputs, store, end, layout, folder };
    let version = setup.serve(7, 0.125).await?;
    assert_eq!(setup.stubs[0].state().reloads, 1, "the same content is not loaded twice");
    assert!(!setup.stubs[0].state().paused);
    setup.ask(1, 4, version)?;
    setup.samples(4).await?.values().for_each(|finished| setup.check(finished, 7, 0.125));
    Ok(())
}

#[tokio::test]
async fn a_cancelled_group_and_an_ended_registration_leave_no_request_behind() -> Result<()> {
    let slow = StubState { token_ms: 200, ..StubState::default() };
    let mut setup = Setup::new(vec![slow], "").await?;
    let version = setup.serve(0, 0.125).await?;
    let idle = async |setup: &Setup| {
        let ended = async {
            while setup.stubs[0].state().running > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(Duration::from_secs(2), ended).await.context("requests are left")
    };
    setup.ask(1, 30, version)?;
    setup.running(0, 30).await?;
    setup.attached.cancel(1);
    idle(&setup).await?;
    setup.ask(2, 30, version)?;
    setup.running(0, 30).await?;
    let (attached, outputs) = setup.engine.attach();
    // The old registration ends after the new one has begun.
    setup.attached = attached;
    setup.outputs = outputs;
    idle(&setup).await?;
    setup.stubs[0].state().token_ms = 0;
    setup.ask(3, 4, version)?;
    let samples = setup.samples(4).await?;
    assert!(samples.keys().all(|key| key.0 == 3), "nothing of before");
    Ok(())
}

#[tokio::test]
async fn a_server_that_queues_requests_gets_no_more() -> Result<()> {
    let mut states = stubs(2);
    states.iter_mut().for_each(|state| state.token_ms = 10);
    states[0].queued = 5;
    let mut setup = Setup::new(states, "").await?;
    let version = setup.serve(0, 0.125).await?;
    let known =
        |servers: &[EngineServer]| servers[0].queued == 5 && servers.iter().all(|server| server.state == "ready");
    setup.servers_until("its queue is known", known).await?;
    for ticket in 0..8 {
        setup.ask(ticket, 8, version)?;
    }
    setup.samples(64).await?;
    let (full, free) = (setup.stubs[0].state().requests.len(), setup.stubs[1].state().requests.len());
    assert!(full < free, "{full} requests to the full server, {free} to the other");
    Ok(())
}
