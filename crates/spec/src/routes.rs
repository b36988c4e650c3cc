//! Whether the samples of a job record the routes of a mixture of experts, and what that takes.

use pacs_shape::{ModelConfig, RouteShape};
use pacs_types::MAX_SAMPLE_BYTES;

use crate::JobSpec;

impl JobSpec {
    /// How the samples that are trained on record their experts; `None` where they do not.
    ///
    /// # Errors
    /// When the model or the length of the job's sequences does not allow what `rollout.router_replay` asks for.
    pub fn route_shape(&self, config: &ModelConfig) -> Result<Option<RouteShape>, String> {
        if !self.rollout.router_replay || self.evaluation.only {
            return Ok(None);
        }
        let Some(shape) = RouteShape::of(config) else {
            return Err("`rollout.router_replay` is for mixtures of experts, and the model is dense".to_owned());
        };
        let token_bytes = shape.token_bytes() as u64;
        let bytes = self.step_weight(token_bytes).sample_bytes;
        if bytes > MAX_SAMPLE_BYTES as u64 {
            return Err(format!(
                "`rollout.router_replay` records {token_bytes} bytes a token, with which a sample may take {bytes} bytes, and a message \
                 holds {MAX_SAMPLE_BYTES}: lower `rollout.max_new_tokens` or `data.max_prompt_tokens`, which are {} and {}",
                self.rollout.max_new_tokens, self.data.max_prompt_tokens
            ));
        }
        Ok(Some(shape))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn routes_are_recorded_where_they_are_asked_for_and_fit() {
        let golden = |name: &str| {
            let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models");
            ModelConfig::read(&models.join(name)).expect("a golden model")
        };
        let job = |more: &str| {
            let text = format!(
                "name = 'a'\nmodel.path = 'm'\ndata.train.path = 't.jsonl'\ndata.evaluation.path = 'e.jsonl'\n\
                 data.max_prompt_tokens = 1000\n{more}"
            );
            crate::parse(&text, Path::new("a.toml")).expect("a valid job")
        };
        let mixture = golden("qwen3_moe");
        assert_eq!(job("").route_shape(&mixture), Ok(None), "off by default");
        let replays = job("rollout.router_replay = true");
        assert_eq!(replays.route_shape(&mixture), Ok(RouteShape::of(&mixture)));
        let problem = replays.route_shape(&golden("qwen3")).expect_err("a dense model");
        assert!(problem.contains("the model is dense"), "{problem}");
        let only = job("rollout.router_replay = true\nevaluation.only = true");
        assert_eq!(only.route_shape(&golden("qwen3")), Ok(None), "nothing is trained on");
        // Two layers of two experts in a byte each: 4 bytes a token besides the 15 of an answer's.
        let most = (MAX_SAMPLE_BYTES - 4000) / 19;
        let long = |tokens: usize| job(&format!("rollout.router_replay = true\nrollout.max_new_tokens = {tokens}"));
        assert!(long(most).route_shape(&mixture).is_ok());
        let problem = long(most + 1).route_shape(&mixture).expect_err("too long");
        assert!(problem.contains("4 bytes a token") && problem.contains("lower `rollout.max_new_tokens`"), "{problem}");
    }
}
