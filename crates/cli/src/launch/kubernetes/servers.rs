//! The part of the manifests in which rollout workers have vLLM servers in their pods.

use anyhow::{Context, Result, ensure};
use pacs_spec::{DeviceKind, JobSpec, VllmServerSpec};

use super::{Value, part, quoted};
use crate::arguments::LaunchKubernetes;
use crate::servers::{HOST, endpoint, environment, words};

/// Template of the Deployment.
const ROLLOUT: &str = include_str!("rollout-vllm.yaml");

/// Template of one server.
const SERVER: &str = include_str!("server.yaml");

/// Port of the first server of a pod.
const FIRST_PORT: u16 = 8000;

/// Variables of a server in a pod, whose user has neither home nor name.
const VARIABLES: [(&str, &str); 2] = [("HOME", "/tmp"), ("USER", "pacs")];

/// Seconds between two questions to a server that starts, as the template has them.
const START_PERIOD: u32 = 10;

/// The template of rollout workers with these servers in their pods, and the values that it has besides those of every job.
///
/// # Errors
/// When the servers need what pods do not have.
pub(super) fn rollout(
    spec: &JobSpec,
    server: &VllmServerSpec,
    arguments: &LaunchKubernetes,
) -> Result<(String, Vec<(String, Value)>)> {
    let vllm_image = arguments.vllm_image.clone();
    let vllm_image =
        vllm_image.context("the job starts vLLM servers: give --vllm-image, an image with the program `vllm`")?;
    let model = server.model.as_ref().unwrap_or(&spec.model.path);
    ensure!(model.is_absolute(), "path `{}` of the spec is relative; pods see the data at /data", model.display());
    let own_folder = spec.rollout.vllm.as_ref().and_then(|vllm| vllm.weights_dir.as_ref());
    ensure!(
        own_folder.is_none(),
        "`rollout.vllm.weights_dir`: pods have a volume of their own for the weights of their servers; leave it out"
    );
    let ports = || (FIRST_PORT..).take(server.count as usize);
    let endpoints: Vec<String> = ports().map(endpoint).collect();
    let server_gpus = match spec.resources.device {
        DeviceKind::Cpu => String::new(),
        DeviceKind::Cuda => format!(", nvidia.com/gpu: {}", server.tensor_parallel),
    };
    let mut values = vec![
        part("vllm_image", vllm_image),
        part("endpoints", endpoints.join(",")),
        part("start_failures", server.start_seconds.div_ceil(START_PERIOD).to_string()),
        ("server_gpus".to_owned(), Value::Yaml(server_gpus)),
    ];
    let (mut servers, mut volumes) = (String::new(), String::new());
    let of_pods = VARIABLES.iter().filter(|(name, _)| !server.environment.contains_key(*name));
    let of_pods = of_pods.map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    let variables: Vec<(String, String)> = of_pods.chain(environment(server)).collect();
    let names: Vec<String> = variables.iter().enumerate().map(|(place, (name, _))| variable(place, name)).collect();
    values.extend(variables.into_iter().enumerate().map(|(place, (_, value))| any(format!("value_{place}"), value)));
    for (index, port) in ports().enumerate() {
        let words = words(spec, server, &model.display().to_string(), port);
        let keys: Vec<String> = (0..words.len()).map(|place| format!("word_{index}_{place}")).collect();
        let places: Vec<String> = keys.iter().map(|key| format!("@{key}@")).collect();
        let block = [
            ("@index@", index.to_string()),
            ("@words@", places.join(", ")),
            ("@variables@", names.join("\n")),
            ("@probe@", probe(port)),
        ];
        servers.push_str(&block.iter().fold(SERVER.to_owned(), |text, (key, value)| text.replace(key, value)));
        volumes.push_str(&format!("        - {{name: vllm-tmp-{index}, emptyDir: {{sizeLimit: 8Gi}}}}\n"));
        values.extend(keys.into_iter().zip(words).map(|(key, word)| any(key, word)));
    }
    let template = ROLLOUT.replace("@servers@", servers.trim_end()).replace("@server_volumes@", volumes.trim_end());
    Ok((template, values))
}

/// A variable of a server, with a place for its value. Its name was checked with the job.
fn variable(place: usize, name: &str) -> String {
    format!("            - {{name: {name}, value: @value_{place}@}}")
}

/// Any text of the job as one scalar. `$` is doubled: Kubernetes would replace `$(NAME)` by a variable.
fn any(key: String, text: String) -> (String, Value) {
    let meant = text.replace('$', "$$");
    let written = quoted(&meant);
    (key, Value::Scalar { meant, written })
}

/// Asks a server for its health; the image has Python, because vLLM is made of it.
fn probe(port: u16) -> String {
    format!(
        "import http.client as h; c = h.HTTPConnection('{HOST}', {port}, timeout=8); c.request('GET', '/health'); \
         exit(c.getresponse().status != 200)"
    )
}
