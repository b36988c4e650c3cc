//! `rollout.engine` and `[rollout.vllm]`: what generates the samples.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{JobSpec, RolloutSpec};

/// What generates samples (docs/ENGINES.md).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RolloutEngineKind {
    /// The project's own engine: `pacs-worker rollout`, for models that fit one GPU.
    #[default]
    Native,
    /// vLLM servers, driven over HTTP by `pacs rollout`.
    Vllm,
}

impl RolloutEngineKind {
    /// How it is written in a job spec.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Vllm => "vllm",
        }
    }
}

/// The vLLM servers that generate samples (docs/ENGINES.md). They run in development mode (`VLLM_SERVER_DEV_MODE=1`) with
/// `--enable-scale-out`; where `rollout.temperature` is not 1, or sampling cuts something off, also with
/// `--logprobs-mode processed_logprobs`. A resumed job may change all keys.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct VllmSpec {
    /// Addresses of the servers, as in `["http://node-1:8000"]`; at most 256. One rollout worker drives them all, so
    /// `resources.rollouts` is 0 or 1 with them. Default none: each rollout worker is told its own (`pacs rollout --endpoint`).
    pub endpoints: Vec<String>,
    /// Requests that one server is given at once, one a sample; its `--max-num-seqs` is the right number. Default 256, 1 to 65536.
    pub max_requests: u32,
    /// Longest time from a request to its answer, after which the sample is given to another server. Default 1800, 1 to 86,400.
    pub request_seconds: u32,
    /// Longest time for a server to pause, to load a version, or to compute its checksums. Default 600, 1 to 86,400.
    pub update_seconds: u32,
    /// How often a sample is given to some server before it is given up; its group is issued again after
    /// `groups.timeout_seconds`. Default 5, 1 to 100.
    pub max_attempts: u32,
    /// Folder in which the rollout worker writes each version as a Hugging Face folder, and from which the servers load it. A
    /// shared one where servers run on other machines. Default: one in the temporary folder of the worker's machine.
    pub weights_dir: Option<PathBuf>,
    /// The same folder under the name that the servers have for it, such as the mount point in their containers. Default:
    /// `weights_dir`.
    pub server_weights_dir: Option<PathBuf>,
    /// Whether a server's checksums of its weights have to change with a version, and to agree between servers that are divided
    /// alike. Default true.
    pub checksums: bool,
    /// Largest mean absolute difference between a server's log-probs of the probe and the learner's after an update (nats per token). A
    /// larger one ends the run, with both versions named. Rounding in bfloat16 is about 0.01; leave room for quantised weights. Default
    /// 0.5, above 0, at most 100.
    pub max_probe_error: f64,
    /// For servers of a model with tied embeddings that were started from a folder with an output head of its own (`pacs model
    /// untie`): each version brings them the head as well. Servers on CPUs need it, because vLLM keeps the head of a tied model there as
    /// it was at its start. Default false.
    pub untied_head: bool,
    /// Servers that PACS starts and ends itself, next to each rollout worker. Default: the servers are yours.
    pub server: Option<VllmServerSpec>,
}

/// The vLLM servers that PACS starts, restarts and ends next to each rollout worker, in place of `endpoints` (docs/ENGINES.md): `pacs run`
/// and the launchers for Slurm and Kubernetes. They listen on loopback addresses, and get their flags from the job: development mode,
/// `--enable-scale-out`, `--max-model-len`, `--max-num-seqs` (`max_requests`), `--logprobs-mode`, `--dtype` and
/// `--tensor-parallel-size`. An empty table takes the defaults. A resumed job may change all keys.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct VllmServerSpec {
    /// Program, and the words between it and the model. Default `["vllm", "serve"]`; at most 32 words.
    pub command: Vec<String>,
    /// Servers of each rollout worker, on its machine or in its pod. Default 1, 1 to 64.
    pub count: u32,
    /// GPUs among which each server divides the model (`--tensor-parallel-size`), its own alone. Default 1, 1 to 64.
    pub tensor_parallel: u32,
    /// Folder that the servers are started from. Required with `untied_head`: the one that `pacs model untie` has written. Default:
    /// `model.path`.
    pub model: Option<PathBuf>,
    /// Longest time from the start of a server until it answers `/health`; one that takes longer is killed and started again. Default 900,
    /// 10 to 86,400.
    pub start_seconds: u32,
    /// Further options of the servers, as in `["--gpu-memory-utilization", "0.95"]`; none that the job decides. Default none; at most 128
    /// words.
    pub extra_args: Vec<String>,
    /// Further environment variables of the servers, as in `{ VLLM_BATCH_INVARIANT = "1" }`. Default none; at most 64.
    pub environment: BTreeMap<String, String>,
}

impl Default for VllmServerSpec {
    fn default() -> Self {
        Self {
            command: ["vllm", "serve"].map(str::to_owned).to_vec(),
            count: 1,
            tensor_parallel: 1,
            model: None,
            start_seconds: 900,
            extra_args: Vec::new(),
            environment: BTreeMap::new(),
        }
    }
}

impl Default for VllmSpec {
    fn default() -> Self {
        Self {
            endpoints: Vec::new(),
            max_requests: 256,
            request_seconds: 1800,
            update_seconds: 600,
            max_attempts: 5,
            weights_dir: None,
            server_weights_dir: None,
            checksums: true,
            max_probe_error: 0.5,
            untied_head: false,
            server: None,
        }
    }
}

impl RolloutSpec {
    /// Whether training samples are drawn from less than the whole distribution, so that a token has two log-probs.
    #[must_use]
    pub fn cuts_off(&self) -> bool {
        self.top_p < 1.0 || self.top_k > 0 || self.min_p > 0.0
    }
}

impl JobSpec {
    /// Rollout workers that compute on a device of their machine.
    #[must_use]
    pub fn computing_rollouts(&self) -> u32 {
        match self.rollout.engine {
            RolloutEngineKind::Native => self.resources.rollouts,
            RolloutEngineKind::Vllm => 0,
        }
    }

    /// The vLLM servers that PACS starts next to each rollout worker; `None` where the engine is another one, or the servers are the
    /// operator's.
    #[must_use]
    pub fn own_servers(&self) -> Option<&VllmServerSpec> {
        let vllm = self.rollout.vllm.as_ref().filter(|_| self.rollout.engine == RolloutEngineKind::Vllm)?;
        vllm.server.as_ref()
    }
}

/// The host and port of an endpoint; `None` when it is not `http://HOST:PORT`.
#[must_use]
pub fn endpoint_authority(endpoint: &str) -> Option<&str> {
    let authority = endpoint.strip_prefix("http://")?;
    let authority = authority.strip_suffix('/').unwrap_or(authority);
    let (host, port) = authority.rsplit_once(':')?;
    let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let is_host = match bracketed {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => !host.is_empty() && host.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c)),
    };
    let is_port = port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port > 0);
    (is_host && is_port).then_some(authority)
}
