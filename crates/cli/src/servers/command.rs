//! What a server is started with.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::anyhow;
use pacs_shape::ModelConfig;
use pacs_spec::{DeviceKind, JobSpec, Precision, VllmServerSpec};

use super::Gate;
use crate::failure::Failure;
use crate::run::supervisor::WorkerCommand;

/// Address that servers listen on: who reaches their development endpoints changes their weights.
pub(crate) const HOST: &str = "127.0.0.1";

/// Variables of every server, in front of those of the job. Nothing is looked for on the network, and nothing is reported.
const VARIABLES: [(&str, &str); 3] =
    [("VLLM_SERVER_DEV_MODE", "1"), ("VLLM_NO_USAGE_STATS", "1"), ("HF_HUB_OFFLINE", "1")];

/// What distinguishes one server of a job from the others.
#[derive(Debug)]
pub(crate) struct Seat {
    /// Name of the process and its log.
    pub(crate) name: String,
    pub(crate) port: u16,
    /// GPUs that it sees, if it computes on any.
    pub(crate) gpu: Option<String>,
}

impl Seat {
    /// Its address, as rollout workers are told.
    pub(crate) fn endpoint(&self) -> String {
        endpoint(self.port)
    }

    /// The process of the server, which is started from the folder `model` for the run `run_id`.
    pub(crate) fn process(self, spec: &JobSpec, server: &VllmServerSpec, model: &Path, run_id: &str) -> WorkerCommand {
        let mut words = words(spec, server, &model.display().to_string(), self.port).into_iter();
        let program = words.next().map(PathBuf::from).unwrap_or_default();
        let gate = Gate { port: self.port, limit: Duration::from_secs(u64::from(server.start_seconds)) };
        WorkerCommand {
            name: self.name,
            program,
            arguments: words.collect(),
            run_id: run_id.to_owned(),
            gpu: self.gpu,
            environment: environment(server),
            gate: Some(gate),
            living: None,
        }
    }
}

/// The address of a server of this machine.
pub(crate) fn endpoint(port: u16) -> String {
    format!("http://{HOST}:{port}")
}

/// The command line of a server. What follows from the job comes last, where it overrides a shortened name of the same option.
pub(crate) fn words(spec: &JobSpec, server: &VllmServerSpec, model: &str, port: u16) -> Vec<String> {
    let max_requests = spec.rollout.vllm.clone().unwrap_or_default().max_requests;
    // A server takes one token more than the longest sequence.
    let most_tokens = spec.longest_sequence().saturating_add(1);
    let dtype = match spec.model.precision {
        Precision::Float32 => "float32",
        // On processors the job says which; on GPUs it is this one.
        Precision::Bfloat16 | Precision::Auto => "bfloat16",
    };
    let mut words = server.command.clone();
    words.push(model.to_owned());
    words.extend(server.extra_args.iter().cloned());
    for (option, value) in [
        ("--host", HOST.to_owned()),
        ("--port", port.to_string()),
        ("--max-model-len", most_tokens.to_string()),
        ("--max-num-seqs", max_requests.to_string()),
        ("--logprobs-mode", "processed_logprobs".to_owned()),
        ("--dtype", dtype.to_owned()),
        ("--tensor-parallel-size", server.tensor_parallel.to_string()),
    ] {
        words.extend([option.to_owned(), value]);
    }
    words.push("--enable-scale-out".to_owned());
    words
}

/// The variables of a server besides those that it inherits.
pub(crate) fn environment(server: &VllmServerSpec) -> Vec<(String, String)> {
    let fixed = VARIABLES.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    let further = server.environment.iter().map(|(name, value)| (name.clone(), value.clone()));
    fixed.filter(|(name, _)| !server.environment.contains_key(name)).chain(further).collect()
}

/// The folder that servers of this machine are started from; `trained` is that of the job's model.
pub(crate) fn model(spec: &JobSpec, server: &VllmServerSpec, trained: &Path) -> Result<PathBuf, Failure> {
    let folder = server.model.as_deref().unwrap_or(trained);
    let doing = format!("start vLLM servers from `{}`", folder.display());
    let read = |folder: &Path| ModelConfig::read(folder).map_err(Failure::config);
    let heads = read(trained).and_then(|trained| read(folder).map(|served| head_problem(spec, &trained, &served)));
    match heads {
        Ok(None) => {}
        Ok(Some(problem)) => return Err(Failure::config(anyhow!("{problem}")).doing(doing)),
        Err(failure) => return Err(failure.doing(doing)),
    }
    // Servers have the working directory of this process, and say in their logs what they were started from.
    std::path::absolute(folder).map_err(|error| Failure::config(error).doing(doing))
}

/// Why servers of a job could not follow its weights, as far as its folders are there to tell.
pub(crate) fn problem(spec: &JobSpec) -> Option<String> {
    let server = spec.own_servers()?;
    let trained = ModelConfig::read(&spec.model.path).ok()?;
    let served = match &server.model {
        Some(folder) => ModelConfig::read(folder).ok()?,
        None => trained.clone(),
    };
    head_problem(spec, &trained, &served)
}

/// The drivers of servers refuse them, too; here it is known before a server has loaded its model.
fn head_problem(spec: &JobSpec, trained: &ModelConfig, served: &ModelConfig) -> Option<String> {
    let untied_head = spec.rollout.vllm.as_ref().is_some_and(|vllm| vllm.untied_head);
    let is_on_cpu = spec.resources.device == DeviceKind::Cpu;
    let problem = match (trained.tie_embeddings, served.tie_embeddings, untied_head) {
        (false, ..) | (true, false, true) => return None,
        (true, true, false) if !is_on_cpu => return None,
        (true, true, false) => {
            "the model has tied embeddings, and vLLM on CPUs keeps the output head of such a model as it was at the start of a server: \
             write a folder for the servers with `pacs model untie`, and set `rollout.vllm.server.model` to it and \
             `rollout.vllm.untied_head` = true"
        }
        (true, true, true) => {
            "`rollout.vllm.server.model` has tied embeddings, and `rollout.vllm.untied_head` is for a folder that `pacs model untie` \
             has written"
        }
        (true, false, false) => {
            "`rollout.vllm.server.model` has an output head of its own, which versions of a model with tied embeddings do not bring: \
             set `rollout.vllm.untied_head` = true"
        }
    };
    Some(problem.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(more: &str) -> JobSpec {
        let text = format!(
            "name = 'a'\nmodel.path = 'm'\ndata.train.path = 't.jsonl'\ndata.evaluation.path = 'e.jsonl'\n\
             data.max_prompt_tokens = 1024\nrollout.engine = 'vllm'\nrollout.max_new_tokens = 4096\n{more}"
        );
        pacs_spec::parse(&text, Path::new("a.toml")).unwrap_or_else(|errors| panic!("{errors}"))
    }

    #[test]
    fn a_server_gets_its_flags_from_the_job() {
        let spec = job(
            "rollout.vllm.max_requests = 64\nresources.device = 'cuda'\nrollout.vllm.server = { tensor_parallel = 2, \
                        command = ['/opt/my vllm/vllm', 'serve'], extra_args = ['--hos', '0.0.0.0', '--seed', '$(id)'] }\n",
        );
        let server = spec.own_servers().expect("servers");
        let expected = [
            "/opt/my vllm/vllm",
            "serve",
            "/data/m",
            "--hos",
            "0.0.0.0",
            "--seed",
            "$(id)",
            "--host",
            "127.0.0.1",
            "--port",
            "8000",
            "--max-model-len",
            "5121",
            "--max-num-seqs",
            "64",
            "--logprobs-mode",
            "processed_logprobs",
            "--dtype",
            "bfloat16",
            "--tensor-parallel-size",
            "2",
            "--enable-scale-out",
        ];
        assert_eq!(words(&spec, server, "/data/m", 8000), expected);
        let seat = Seat { name: "vllm-0".into(), port: 8000, gpu: Some("2,3".into()) };
        assert_eq!(seat.endpoint(), "http://127.0.0.1:8000");
        let process = seat.process(&spec, server, Path::new("/data/m"), "0123");
        assert_eq!(process.program, Path::new("/opt/my vllm/vllm"));
        assert_eq!(process.arguments, expected[1..]);
        assert_eq!(process.gate.expect("a gate").limit, Duration::from_secs(900));
    }

    #[test]
    fn variables_of_the_job_come_on_top() {
        let spec =
            job("model.precision = 'float32'\nrollout.vllm.server.environment = { A = 'x', HF_HUB_OFFLINE = '0' }\n");
        let server = spec.own_servers().expect("servers");
        let found = environment(server);
        let expected =
            [("VLLM_SERVER_DEV_MODE", "1"), ("VLLM_NO_USAGE_STATS", "1"), ("A", "x"), ("HF_HUB_OFFLINE", "0")];
        assert_eq!(found, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
        let dtype = words(&spec, server, "m", 1).iter().skip_while(|word| *word != "--dtype").nth(1).cloned();
        assert_eq!(dtype.as_deref(), Some("float32"));
    }

    #[test]
    fn a_model_that_servers_could_not_follow_is_refused_before_they_start() {
        let golden = |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models").join(name);
        let (tied, untied) = (golden("qwen2-tied"), golden("qwen2-untied"));
        let at = |model: &Path, served: Option<&Path>, device: &str, untied_head: bool| {
            let served = served.map(|folder| format!("model = {:?}", folder.display().to_string())).unwrap_or_default();
            let spec = job(&format!(
                "model.precision = 'bfloat16'\nresources.device = '{device}'\nrollout.vllm.untied_head = {untied_head}\n\
                 rollout.vllm.server = {{ {served} }}\n"
            ));
            let spec = JobSpec { model: pacs_spec::ModelSpec { path: model.to_owned(), ..spec.model.clone() }, ..spec };
            let refused = super::model(&spec, spec.own_servers().expect("servers"), model).err().map(|f| f.to_string());
            let known = problem(&spec);
            assert_eq!(refused.is_some(), known.is_some(), "{refused:?} {known:?}");
            refused
        };
        assert_eq!(at(&untied, None, "cpu", false), None);
        assert_eq!(at(&tied, None, "cuda", false), None, "on GPUs a tied head is the embedding");
        let refused = at(&tied, None, "cpu", false).expect("a tied model on a CPU");
        assert!(refused.contains("pacs model untie"), "{refused}");
        let refused = at(&tied, Some(&untied), "cuda", false).expect("a head that no version brings");
        assert!(refused.contains("untied_head` = true"), "{refused}");
        let refused = at(&tied, Some(&tied), "cpu", true).expect("not written by that command");
        assert!(refused.contains("has written"), "{refused}");
        assert_eq!(at(&tied, Some(&untied), "cpu", true), None);
        let spec = job("model.precision = 'float32'\nrollout.vllm.server.model = '/not/there'\n");
        let refused = super::model(&spec, spec.own_servers().expect("servers"), &tied).expect_err("not there");
        assert!(refused.to_string().contains("/not/there"), "{refused}");
    }
}
