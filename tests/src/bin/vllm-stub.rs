//! Takes the command line of `vllm serve` and answers as the stub does: the servers that PACS starts in tests.
//!
//! `STUB_TOKEN_MS` in its environment is the time of a token.
#![forbid(unsafe_code)]

use anyhow::{Context, Result, ensure};
use pacs_tests::{StubState, VllmStub};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    println!("vllm-stub {} on GPUs {:?}", words.join(" "), variable("CUDA_VISIBLE_DEVICES"));
    let option = |name: &str| words.windows(2).find(|pair| pair[0] == name).map(|pair| pair[1].as_str());
    ensure!(option("--host") == Some("127.0.0.1"), "a server is for its own machine alone");
    let state = StubState {
        dev_mode: variable("VLLM_SERVER_DEV_MODE") == "1",
        scale_out: words.iter().any(|word| word == "--enable-scale-out"),
        max_model_len: option("--max-model-len").context("--max-model-len")?.parse()?,
        logprobs_mode: match option("--logprobs-mode") {
            Some("processed_logprobs") => "processed_logprobs",
            _ => "raw_logprobs",
        },
        token_ms: variable("STUB_TOKEN_MS").parse().unwrap_or(0),
        device: "cpu",
        ..StubState::default()
    };
    let _stub = VllmStub::start_at(option("--port").context("--port")?.parse()?, state).await?;
    std::future::pending().await
}
