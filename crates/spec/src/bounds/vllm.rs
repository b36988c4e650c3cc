use std::collections::BTreeSet;

use super::Check;
use crate::*;

/// Most servers of a rollout worker.
const MOST_ENDPOINTS: usize = 256;
/// Largest temperature that vLLM takes.
const MOST_TEMPERATURE: f64 = 2.0;
/// Most words of a server's command, of its further options, and most of its variables.
const MOST_WORDS: usize = 32;
const MOST_OPTIONS: usize = 128;
const MOST_VARIABLES: usize = 64;
/// Longest word or value (bytes).
const MOST_BYTES: usize = 4096;
/// Options of a server that follow from the job. `-tp` is a second name of one of them.
const DECIDED: [&str; 10] = [
    "--host",
    "--port",
    "--uds",
    "--model",
    "--enable-scale-out",
    "--max-model-len",
    "--max-num-seqs",
    "--logprobs-mode",
    "--dtype",
    "--tensor-parallel-size",
];
/// Variables of a server that follow from the job.
const DECIDED_VARIABLES: [&str; 2] = ["VLLM_SERVER_DEV_MODE", "CUDA_VISIBLE_DEVICES"];

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
        if let Some(server) = &vllm.server {
            self.server(spec, &vllm, server);
        }
        for (path, folder) in [
            ("rollout.vllm.weights_dir", &vllm.weights_dir),
            ("rollout.vllm.server_weights_dir", &vllm.server_weights_dir),
        ] {
            let Some(folder) = folder else { continue };
            let message = "expected an absolute path: worker and servers have working directories of their own";
            self.text(path, &folder.display().to_string(), folder.is_absolute(), message);
        }
        if let Some(folder) = vllm.server_weights_dir.as_ref().filter(|_| vllm.weights_dir.is_none()) {
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

    /// Servers that PACS starts itself.
    fn server(&mut self, spec: &JobSpec, vllm: &VllmSpec, server: &VllmServerSpec) {
        let also = &["rollout.vllm.server"];
        let message =
            "has no effect with `rollout.vllm.server`, whose servers get addresses of their own; leave one of them out";
        self.that(vllm.endpoints.is_empty(), "rollout.vllm.endpoints", vllm.endpoints.len(), message, also);
        let message = "has no effect with `rollout.vllm.server`, whose servers see the files of their rollout worker";
        let other_name = vllm.server_weights_dir.is_none();
        self.that(other_name, "rollout.vllm.server_weights_dir", "a folder", message, also);
        self.words("rollout.vllm.server.command", &server.command, 1, MOST_WORDS);
        self.words("rollout.vllm.server.extra_args", &server.extra_args, 0, MOST_OPTIONS);
        for word in &server.extra_args {
            let path = "rollout.vllm.server.extra_args";
            let message = "follows from the job, which decides where a server listens, its lengths and its kinds";
            self.text(path, word, !is_decided(word), message);
            self.text(path, word, word != "--", "ends the options: the job's own come after these");
        }
        self.range("rollout.vllm.server.count", server.count, 1..=64);
        self.range("rollout.vllm.server.tensor_parallel", server.tensor_parallel, 1..=64);
        self.range("rollout.vllm.server.start_seconds", server.start_seconds, 10..=86_400);
        let path = "rollout.vllm.server.environment";
        let message = format!("expected at most {MOST_VARIABLES} variables");
        self.that(server.environment.len() <= MOST_VARIABLES, path, server.environment.len(), message, &[]);
        for (name, value) in &server.environment {
            let is_first = |c: char| c.is_ascii_uppercase() || c == '_';
            let is_name = name.starts_with(is_first)
                && name.chars().all(|c| is_first(c) || c.is_ascii_digit())
                && name.len() <= 128;
            self.text(path, name, is_name, "expected a name of capital letters, digits and `_`");
            let is_free = !DECIDED_VARIABLES.contains(&name.as_str()) && !name.starts_with("PACS_");
            self.text(path, name, is_free, "is set by PACS");
            self.text(path, value, is_word(value), "expected a text of one line without control characters");
        }
        if vllm.untied_head && server.model.is_none() {
            let message = "expected with `rollout.vllm.untied_head`: servers of a tied model get a head of their own from the folder that \
                           `pacs model untie` writes";
            self.fail(Problem::new("rollout.vllm.server.model", message), &["rollout.vllm.untied_head"]);
        }
        let is_known = spec.resources.device == DeviceKind::Cuda || spec.model.precision != Precision::Auto;
        let message = "expected \"float32\" or \"bfloat16\" for servers on CPUs, which compute in the learner's precision: what \"auto\" \
                       means depends on the machine";
        let also = &["rollout.vllm.server", "resources.device"];
        self.that(is_known, "model.precision", "\"auto\"", message, also);
    }

    /// Words of a command line.
    fn words(&mut self, path: &str, words: &[String], least: usize, most: usize) {
        let message = format!("expected {least} to {most} words");
        self.that((least..=most).contains(&words.len()), path, words.len(), message, &[]);
        for word in words {
            let holds = is_word(word) && !word.is_empty();
            self.text(path, word, holds, "expected a text of one line without control characters");
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
        let message = "is not supported with `rollout.engine` = \"vllm\": no routes are read from its servers; the native engine \
                       records them";
        self.that(!rollout.router_replay, "rollout.router_replay", true, message, also);
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

/// Whether an option follows from the job. vLLM takes underscores for dashes, a value after `=`, and the beginning of a long name for the
/// name; the job's own options come last, so that a shorter beginning of one of them is overridden. Only `--uds` has none that overrides it.
fn is_decided(word: &str) -> bool {
    let name = word.split('=').next().unwrap_or(word).replace('_', "-");
    let is_start_of_uds = name.len() > "--".len() && "--uds".starts_with(&name);
    name == "-tp" || is_start_of_uds || DECIDED.contains(&name.as_str())
}

/// Whether a text can be a word of a command line or the value of a variable.
fn is_word(text: &str) -> bool {
    text.len() <= MOST_BYTES && !text.chars().any(char::is_control)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::{RolloutEngineKind, VllmServerSpec, VllmSpec, endpoint_authority, parse};

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
            ("rollout = { engine = 'vllm', router_replay = true }", "no routes are read from its servers"),
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
    fn servers_of_pacs_are_checked_key_by_key() {
        let of = |keys: &str| {
            format!("rollout.engine = 'vllm'\nmodel.precision = 'float32'\nrollout.vllm.server = {{ {keys} }}\n")
        };
        let job = parse(&format!("{JOB}{}", of("")), Path::new("a.toml")).expect("a job");
        assert_eq!(job.own_servers(), Some(&VllmServerSpec::default()));
        assert_eq!(parse(&job.resolved_toml(), Path::new("b.toml")).expect("a job"), job);
        for (keys, words) in [
            ("command = []", "expected 1 to 32 words"),
            ("command = ['']", "one line"),
            ("command = [\"vllm\\nserve\"]", "one line"),
            ("count = 0", "rollout.vllm.server.count"),
            ("tensor_parallel = 65", "expected 1 to 64"),
            ("start_seconds = 9", "expected 10 to 86400"),
            ("extra_args = ['--host', '0.0.0.0']", "follows from the job"),
            ("extra_args = ['--host=0.0.0.0']", "follows from the job"),
            ("extra_args = ['--max_model_len=9']", "follows from the job"),
            ("extra_args = ['-tp', '2']", "follows from the job"),
            ("extra_args = ['--ud', '/s/x']", "follows from the job"),
            ("extra_args = ['--u=/s/x']", "follows from the job"),
            ("extra_args = ['--']", "ends the options"),
            ("extra_args = [\"\\u0000\"]", "one line"),
            ("environment = { lower = 'x' }", "capital letters"),
            ("environment = { '1A' = 'x' }", "capital letters"),
            ("environment = { PACS_RUN_ID = 'x' }", "is set by PACS"),
            ("environment = { CUDA_VISIBLE_DEVICES = '0' }", "is set by PACS"),
            ("environment = { A = \"x\\ny\" }", "one line"),
            ("environment = { A = 1 }", "environment"),
            ("port = 8000", "unknown key"),
        ] {
            let found = problem(&of(keys));
            assert!(found.contains(words), "{keys}: {found}");
        }
        for (text, words) in [
            ("rollout.vllm = { server = {}, endpoints = ['http://a:1'] }", "leave one of them out"),
            (
                "rollout.vllm = { server = {}, weights_dir = '/a', server_weights_dir = '/b' }",
                "files of their rollout worker",
            ),
            ("rollout.vllm = { server = {}, untied_head = true }", "pacs model untie"),
            ("rollout.vllm = { server = {} }\nmodel.precision = 'auto'", "depends on the machine"),
        ] {
            let precision = if text.contains("precision") { "" } else { "model.precision = 'float32'\n" };
            let found = problem(&format!("rollout.engine = 'vllm'\n{precision}{text}\n"));
            assert!(found.contains(words), "{text}: {found}");
        }
        for keys in [
            "command = ['/opt/my vllm/bin/vllm', 'serve'], count = 4, tensor_parallel = 2",
            "extra_args = ['--hf-overrides', '{\"a\": \"$(id) @name@\"}', '-O3']",
            "environment = { VLLM_CPU_KVCACHE_SPACE = '4', _A1 = '' }",
        ] {
            assert_eq!(problem(&of(keys)), "", "{keys}");
        }
        let cuda = "rollout.engine = 'vllm'\nrollout.vllm.server.count = 2\nresources.device = 'cuda'\n";
        assert_eq!(problem(cuda), "");
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
