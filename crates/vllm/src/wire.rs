//! Messages of vLLM's HTTP interface, as they are in version 0.32 (`vllm/entrypoints`): only the fields that are used.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// `POST /inference/v1/generate`.
#[derive(Debug, Serialize)]
pub(crate) struct GenerateRequest<'a> {
    pub(crate) token_ids: &'a [u32],
    pub(crate) sampling_params: SamplingParams<'a>,
    /// Prefixes are shared among requests with one salt. Ours is the version, so that no request starts from keys and values of
    /// older weights.
    pub(crate) cache_salt: &'a str,
    /// The answer repeats the prompt.
    pub(crate) return_token_ids: bool,
}

/// `vllm.SamplingParams`. What is not named here keeps its default.
#[derive(Debug, Serialize)]
pub(crate) struct SamplingParams<'a> {
    pub(crate) n: u32,
    pub(crate) temperature: f64,
    pub(crate) top_p: f64,
    pub(crate) top_k: u32,
    pub(crate) min_p: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) seed: Option<u64>,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    pub(crate) stop: &'a [String],
    pub(crate) stop_token_ids: &'a [u32],
    /// The server's own idea of end tokens; ours are `stop_token_ids`.
    pub(crate) ignore_eos: bool,
    pub(crate) max_tokens: u32,
    /// Most probable tokens whose log-probs come with that of the drawn one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) logprobs: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_logprobs: Option<u32>,
    pub(crate) detokenize: bool,
    pub(crate) skip_special_tokens: bool,
}

/// Answer to a [`GenerateRequest`].
#[derive(Debug, Deserialize)]
pub(crate) struct GenerateResponse {
    pub(crate) choices: Vec<Choice>,
    #[serde(default)]
    pub(crate) prompt_token_ids: Option<Vec<u32>>,
    /// Of each token of the prompt but the first.
    #[serde(default)]
    pub(crate) prompt_logprobs: Option<Vec<Option<BTreeMap<u32, Logprob>>>>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Choice {
    pub(crate) index: u32,
    pub(crate) finish_reason: Option<String>,
    #[serde(default)]
    pub(crate) token_ids: Option<Vec<u32>>,
    #[serde(default)]
    pub(crate) logprobs: Option<Logprobs>,
    #[serde(default)]
    pub(crate) weight_versions: Option<Vec<WeightVersionSpan>>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Logprobs {
    pub(crate) content: Option<Vec<TokenLogprob>>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct TokenLogprob {
    pub(crate) token_id: u32,
    pub(crate) logprob: f32,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Logprob {
    pub(crate) logprob: f32,
}

/// Tokens `start..end` of an answer were sampled by weights with this label.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct WeightVersionSpan {
    pub(crate) version: String,
    pub(crate) start: usize,
    pub(crate) end: usize,
}

/// `GET /weight_info`.
#[derive(Debug, Deserialize)]
pub(crate) struct WeightInfo {
    pub(crate) weight_version: String,
}

/// `GET /is_paused`.
#[derive(Debug, Deserialize)]
pub(crate) struct IsPaused {
    pub(crate) is_paused: bool,
}

/// `GET /version`.
#[derive(Debug, Deserialize)]
pub(crate) struct Version {
    pub(crate) version: String,
}

/// `GET /v1/models`.
#[derive(Debug, Deserialize)]
pub(crate) struct Models {
    pub(crate) data: Vec<Model>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Model {
    pub(crate) max_model_len: Option<u64>,
}

/// `POST /collective_rpc`.
#[derive(Debug, Serialize)]
pub(crate) struct CollectiveRpc<'a, K> {
    pub(crate) method: &'a str,
    pub(crate) kwargs: K,
    /// Longest time for the call on every worker of the server (seconds).
    pub(crate) timeout: f64,
}

#[derive(Debug, Serialize)]
pub(crate) struct ReloadWeights<'a> {
    pub(crate) weights_path: &'a str,
}

/// `POST /update_weight_version`.
#[derive(Debug, Serialize)]
pub(crate) struct UpdateWeightVersion<'a> {
    pub(crate) new_version: &'a str,
}

/// `POST /weight_checker`.
#[derive(Debug, Serialize)]
pub(crate) struct WeightChecker {
    pub(crate) action: &'static str,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Checksums {
    /// `dp0:pp0:pcp0:tp0:NAME` to a digest.
    pub(crate) checksums: BTreeMap<String, String>,
}

/// What `GET /server_info?config_format=json` says of the log-probs that are reported.
pub(crate) fn logprobs_mode(info: &serde_json::Value) -> Option<&str> {
    info.get("vllm_config")?.get("model_config")?.get("logprobs_mode")?.as_str()
}

/// A gauge of the Prometheus text, summed over its labels (the engines of a data-parallel server).
pub(crate) fn gauge(text: &str, name: &str) -> Option<f64> {
    let mut sum = None;
    for line in text.lines() {
        let Some(rest) = line.strip_prefix(name) else { continue };
        let rest = match rest.strip_prefix('{') {
            // Label values may hold braces only between quotes; vLLM's are names and numbers.
            Some(labelled) => labelled.split_once('}').map_or("", |(_, value)| value),
            None if rest.starts_with(' ') => rest,
            None => continue,
        };
        let value = rest.split_whitespace().next().and_then(|value| value.parse::<f64>().ok());
        if let Some(value) = value.filter(|value| value.is_finite()) {
            sum = Some(sum.unwrap_or(0.0) + value);
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gauges_are_summed_over_engines() {
        let text = "# HELP vllm:num_requests_running x\n# TYPE vllm:num_requests_running gauge\n\
                    vllm:num_requests_running{engine=\"0\",model_name=\"m\"} 3.0\n\
                    vllm:num_requests_running{engine=\"1\",model_name=\"m\"} 4.0\n\
                    vllm:num_requests_waiting_by_reason{engine=\"0\"} 9.0\n\
                    vllm:num_requests_waiting 1\n";
        assert_eq!(gauge(text, "vllm:num_requests_running"), Some(7.0));
        assert_eq!(gauge(text, "vllm:num_requests_waiting"), Some(1.0));
        assert_eq!(gauge(text, "vllm:kv_cache_usage_perc"), None);
    }

    #[test]
    fn requests_are_what_the_server_reads() {
        let request = GenerateRequest {
            token_ids: &[1, 2],
            sampling_params: SamplingParams {
                n: 1,
                temperature: 1.0,
                top_p: 1.0,
                top_k: 0,
                min_p: 0.0,
                seed: Some(7),
                stop: &[],
                stop_token_ids: &[2],
                ignore_eos: true,
                max_tokens: 8,
                logprobs: Some(0),
                prompt_logprobs: None,
                detokenize: false,
                skip_special_tokens: false,
            },
            cache_salt: "s",
            return_token_ids: true,
        };
        let written = serde_json::to_string(&request).expect("it is JSON");
        let expected = "{\"token_ids\":[1,2],\"sampling_params\":{\"n\":1,\"temperature\":1.0,\"top_p\":1.0,\"top_k\":0,\
                        \"min_p\":0.0,\"seed\":7,\"stop_token_ids\":[2],\"ignore_eos\":true,\"max_tokens\":8,\"logprobs\":0,\
                        \"detokenize\":false,\"skip_special_tokens\":false},\"cache_salt\":\"s\",\"return_token_ids\":true}";
        assert_eq!(written, expected);
    }
}
