use std::collections::BTreeSet;

use super::Check;
use crate::*;

/// Most servers of a rollout worker.
const MOST_ENDPOINTS: usize = 256;
/// Largest temperature that vLLM takes.
const MOST_TEMPERATURE: f64 = 2.0;

impl Check {
    pub(super) fn engine(&mut self, spec: &JobSpec) {
        let rollout = &spec.rollout;
        if rollout.engine != RolloutEngineKind::Vllm {
            if rollout.vllm.is_some() {
                let message = "has no effect without `rollout.engine` = \"vllm\"; leave it out";
                self.fail(Problem::new("rollout.vllm", message), &["rollout.engine"]);
            }
            return;
        }
        self.without_vllm(spec);
        self.sampled_by_vllm(spec);
        let vllm = rollout.vllm.clone().unwrap_or_default();
        self.endpoints(spec, &vllm.endpoints);
        self.range("rollout.vllm.max_requests", vllm.max_requests, 1..=65536);
        self.range("rollout.vllm.request_seconds", vllm.request_seconds, 1..=86_400);
        self.range("rollout.vllm.update_seconds", vllm.update_seconds, 1..=86_400);
        self.range("rollout.vllm.max_attempts", vllm.max_attempts, 1..=100);
        self.above_zero("rollout.vllm.max_probe_error", vllm.max_probe_error, 100.0);
        for (path, folder) in [
            ("rollout.vllm.weights_dir", &vllm.weights_dir),
            ("rollout.vllm.server_weights_dir", &vllm.server_weights_dir),
        ] {
            let Some(folder) = folder else { continue };
            let message = "expected an absolute path: worker and servers have working directories of their own";
            self.text(path, &folder.display().to_string(), folder.is_absolute(), message);
        }
        if let Some(folder) = vllm.server_weights_dir.filter(|_| vllm.weights_dir.is_none()) {
            let message = "expected `rollout.vllm.weights_dir` as well: this is another name of that folder";
            let also = &["rollout.vllm.weights_dir"];
            self.that(
                false,
                "rollout.vllm.server_weights_dir",
                format!("{:?}", folder.display().to_string()),
                message,
                also,
            );
        }
    }

    /// What vLLM cannot do here, and what it would ignore.
    fn without_vllm(&mut self, spec: &JobSpec) {
        let also = &["rollout.engine"];
        if spec.evaluation.only {
            let message =
                "expected false with `rollout.engine` = \"vllm\": nothing is published that its servers could load";
            self.that(false, "evaluation.only", true, message, also);
        }
        let (rollout, defaults) = (&spec.rollout, RolloutSpec::default());
        let message = "has no effect with `rollout.engine` = \"vllm\", whose servers have settings of their own";
        self.that(
            rollout.cache_tokens == defaults.cache_tokens,
            "rollout.cache_tokens",
            rollout.cache_tokens,
            message,
            also,
        );
        let kernels = rollout.kernels == defaults.kernels;
        self.that(kernels, "rollout.kernels", "\"reference\"", message, also);
        self.that(
            rollout.cuda_graphs == defaults.cuda_graphs,
            "rollout.cuda_graphs",
            rollout.cuda_graphs,
            message,
            also,
        );
    }

    fn sampled_by_vllm(&mut self, spec: &JobSpec) {
        let rollout = &spec.rollout;
        let also = &["rollout.engine", "rollout.top_p", "rollout.top_k", "rollout.min_p"];
        let message = format!("expected at most {MOST_TEMPERATURE}, the largest that vLLM takes");
        let holds = rollout.temperature <= MOST_TEMPERATURE;
        self.that(holds, "rollout.temperature", rollout.temperature, message.clone(), also);
        let message_of_cut = "expected 1 where `rollout.top_p`, `top_k` or `min_p` cuts something off: a vLLM server reports the \
                              log-probs after the cut, and scores those before it at temperature 1 only";
        let holds = !rollout.cuts_off() || rollout.temperature == 1.0 || rollout.temperature > MOST_TEMPERATURE;
        self.that(holds, "rollout.temperature", rollout.temperature, message_of_cut, also);
        for set in spec.evaluation_sets() {
            let holds = set.temperature <= MOST_TEMPERATURE;
            let of_job = set.temperature == rollout.temperature;
            let path = match set.name {
                None => "evaluation.temperature".to_owned(),
                Some(_) => format!("{}.temperature", set.path),
            };
            self.that(holds || of_job, &path, set.temperature, message.clone(), also);
        }
    }

    fn endpoints(&mut self, spec: &JobSpec, endpoints: &[String]) {
        let path = "rollout.vllm.endpoints";
        let message = format!("expected at most {MOST_ENDPOINTS} servers");
        self.that(endpoints.len() <= MOST_ENDPOINTS, path, endpoints.len(), message, &[]);
        let mut seen = BTreeSet::new();
        for endpoint in endpoints {
            let authority = endpoint_authority(endpoint);
            let message = "expected http://HOST:PORT; TLS is not spoken, so servers belong into a private network";
            self.text(path, endpoint, authority.is_some(), message);
            self.text(path, endpoint, authority.is_none_or(|authority| seen.insert(authority)), "is named twice");
        }
        let workers = spec.resources.rollouts;
        let message = "expected 0 or 1 with `rollout.vllm.endpoints`: two workers would change the weights of the same servers; \
                       leave those out to give each worker servers of its own (`pacs rollout --endpoint`)";
        self.that(
            endpoints.is_empty() || workers <= 1,
            "resources.rollouts",
            workers,
            message,
            &["rollout.vllm.endpoints"],
        );
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::{RolloutEngineKind, VllmSpec, endpoint_authority, parse};

    const JOB: &str = "name = 'a'\nmodel.path = 'm'\ndata.train.path = 't.jsonl'\ndata.evaluation.path = 'e.jsonl'\n";

    fn problem(text: &str) -> String {
        parse(&format!("{JOB}{text}"), Path::new("a.toml")).map_or_else(|errors| errors.to_string(), |_| String::new())
    }

    #[test]
    fn defaults_and_what_is_written_down() {
        let job = |text: &str| parse(&format!("{JOB}{text}"), Path::new("a.toml")).expect("a job");
        assert_eq!((job("").rollout.engine, job("").rollout.vllm), (RolloutEngineKind::Native, None));
        let vllm =
            job("rollout.engine = 'vllm'\nrollout.vllm.endpoints = ['http://[::1]:8000', 'http://n-1.c:8001/']\n");
        let endpoints = vllm.rollout.vllm.clone().expect("a table");
        assert_eq!(VllmSpec { endpoints: Vec::new(), ..endpoints }, VllmSpec::default());
        assert_eq!((vllm.resources.rollouts, vllm.computing_rollouts()), (1, 0));
        // What a run writes down is read back as the same.
        assert_eq!(parse(&vllm.resolved_toml(), Path::new("b.toml")).expect("a job"), vllm);
    }

    #[test]
    fn bounds_and_what_is_not_supported() {
        for (text, words) in [
            ("max_requests = 0", "rollout.vllm.max_requests"),
            ("request_seconds = 0", "expected 1 to 86400"),
            ("update_seconds = 86401", "expected 1 to 86400"),
            ("max_attempts = 0", "expected 1 to 100"),
            ("max_probe_error = 0.0", "above 0"),
            ("max_probe_error = inf", "rollout.vllm.max_probe_error"),
            ("weights_dir = 'here'", "absolute"),
            ("server_weights_dir = '/there'", "weights_dir` as well"),
            ("endpoints = ['https://a:1']", "expected http://HOST:PORT"),
            ("endpoints = ['http://a:1', 'http://a:1/']", "named twice"),
            ("weight_dir = '/x'", "did you mean `weights_dir`"),
        ] {
            let found = problem(&format!("rollout.engine = 'vllm'\nrollout.vllm.{text}\n"));
            assert!(found.contains(words), "{text}: {found}");
        }
        for (text, words) in [
            ("rollout.vllm.max_requests = 8", "without `rollout.engine` = \"vllm\""),
            ("rollout.engine = 'sglang'", "rollout.engine"),
            ("rollout = { engine = 'vllm', temperature = 2.5 }", "at most 2"),
            ("rollout = { engine = 'vllm', temperature = 0.8, top_k = 20 }", "at temperature 1 only"),
            ("rollout = { engine = 'vllm', kernels = 'reference' }", "rollout.kernels"),
            ("rollout = { engine = 'vllm', cache_tokens = 100000 }", "rollout.cache_tokens"),
            ("rollout = { engine = 'vllm', cuda_graphs = false }", "rollout.cuda_graphs"),
            ("rollout.engine = 'vllm'\nevaluation.only = true", "nothing is published"),
            ("rollout.engine = 'vllm'\nevaluation.temperature = 3.0", "at most 2"),
            (
                "rollout.engine = 'vllm'\nrollout.vllm.endpoints = ['http://a:1']\nresources.rollouts = 2",
                "two workers would change",
            ),
        ] {
            let found = problem(&format!("{text}\n"));
            assert!(found.contains(words), "{text}: {found}");
        }
        for text in [
            "rollout.engine = 'vllm'\nresources.rollouts = 4",
            "rollout = { engine = 'vllm', temperature = 0.7 }",
            "rollout = { engine = 'vllm', top_p = 0.9 }",
            "rollout.engine = 'vllm'\nmodel.lora.rank = 8",
            "rollout.engine = 'vllm'\nrollout.vllm = { weights_dir = '/a', server_weights_dir = '/b' }",
        ] {
            assert_eq!(problem(&format!("{text}\n")), "", "{text}");
        }
    }

    #[test]
    fn endpoints_are_addresses_without_a_path() {
        for (endpoint, authority) in [
            ("http://127.0.0.1:8000", Some("127.0.0.1:8000")),
            ("http://vllm-0.vllm:8000/", Some("vllm-0.vllm:8000")),
            ("http://[fe80::1]:80", Some("[fe80::1]:80")),
            ("http://a", None),
            ("http://a:0", None),
            ("http://a:70000", None),
            ("http://a:+1", None),
            ("http://u@a:1", None),
            ("http://a:1/v1", None),
            ("http://[a]:1", None),
            ("http://:1", None),
            ("a:1", None),
        ] {
            assert_eq!(endpoint_authority(endpoint), authority, "{endpoint}");
        }
    }
}
