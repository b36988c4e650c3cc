//! The Kubernetes manifests of a job. The Kustomize base and the Helm chart in `deploy/` are the same text with other values;
//! tests compare them.

mod read_back;
mod servers;

use std::borrow::Cow;

use anyhow::{Result, ensure};
use pacs_runtime::harmless;
use pacs_spec::{DeviceKind, JobSpec, RolloutEngineKind};
use ring::digest::{SHA256, digest};

use crate::arguments::LaunchKubernetes;

/// Template of the manifests, with `@key@` for each value, and `@rollout@` for the template of rollout workers.
const TEMPLATE: &str = include_str!("kubernetes/job.yaml");

/// Template of rollout workers that generate samples themselves.
const ROLLOUT: &str = include_str!("kubernetes/rollout.yaml");

/// Pod security context: no privileges, and a group that can read the mounted secrets.
const POD_SECURITY: &str = "{runAsNonRoot: true, runAsUser: 10001, runAsGroup: 10001, fsGroup: 10001, \
                            fsGroupChangePolicy: OnRootMismatch, seccompProfile: {type: RuntimeDefault}}";
const CONTAINER_SECURITY: &str =
    "{allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}";

/// Seconds of the pod's grace period reserved for exiting after the save.
const LAST_WORDS: u32 = 10;

/// Renders the manifests of a job whose spec file is `text`.
pub(crate) fn manifests(spec: &JobSpec, text: &str, arguments: &LaunchKubernetes) -> Result<String> {
    let name = dns_label(&spec.name);
    // Names derived from it, such as `<name>-coordinator-0`, must stay within 63 characters.
    ensure!(name.len() <= 40, "job name `{}` is too long for names of Kubernetes; at most 40 characters", spec.name);
    for path in [Some(&spec.model.path), spec.data.train.path.as_ref()].into_iter().flatten() {
        ensure!(path.is_absolute(), "path `{}` of the spec is relative; pods see the data at /data", path.display());
    }
    let (rollout, of_servers) = match spec.own_servers() {
        Some(server) => servers::rollout(spec, server, arguments)?,
        None => {
            ensure!(
                spec.rollout.engine == RolloutEngineKind::Native,
                "the job names vLLM servers of yours, which no manifest knows: have them started in the pods of its rollout workers \
                 with `rollout.vllm.server` (docs/ENGINES.md)"
            );
            ensure!(
                arguments.vllm_image.is_none(),
                "--vllm-image: the job starts no vLLM server (`rollout.vllm.server`)"
            );
            (ROLLOUT.to_owned(), Vec::new())
        }
    };
    let template = template(&rollout);
    let resources = &spec.resources;
    let gpu = resources.device == DeviceKind::Cuda;
    let threads = if resources.threads == 0 { arguments.cpu } else { resources.threads };
    let mut values = vec![
        ("job".to_owned(), Value::Scalar { meant: text.to_owned(), written: scalar(text) }),
        part("run_id", arguments.run_id.clone().unwrap_or_else(|| run_id(&arguments.namespace, &name))),
        part("name", name),
        part("image", arguments.image.clone()),
        part("worker_image", arguments.worker_image.clone()),
        part("data_claim", arguments.data_claim.clone()),
        part("run_size", arguments.run_size.clone()),
        part("learners", spec.learners().to_string()),
        part("rollouts", resources.rollouts.to_string()),
        part("verifiers", resources.verifiers.to_string()),
        part("cpu", arguments.cpu.to_string()),
        part("memory", arguments.memory.clone()),
        part("shm", arguments.shm.clone()),
        part("device", if gpu { "cuda" } else { "cpu" }),
        ("gpu".to_owned(), Value::Yaml(if gpu { ", nvidia.com/gpu: 1" } else { "" }.to_owned())),
        part("threads", threads.to_string()),
        part("grace_period", arguments.grace_period.to_string()),
        part("grace", (arguments.grace_period - LAST_WORDS).to_string()),
    ];
    values.extend(of_servers);
    for (option, value) in [
        ("--image", Some(&arguments.image)),
        ("--worker-image", Some(&arguments.worker_image)),
        ("--vllm-image", arguments.vllm_image.as_ref()),
        ("--data-claim", Some(&arguments.data_claim)),
        ("--run-size", Some(&arguments.run_size)),
        ("--memory", Some(&arguments.memory)),
        ("--shm", Some(&arguments.shm)),
    ] {
        let Some(value) = value else { continue };
        ensure!(is_plain(value), "{option} {value:?}: expected letters, digits, and `-`, `_`, `.`, `/`, `:`, `@`, `+`");
    }
    let written = fill(&template, &values);
    // The cluster may parse YAML with another library than this check, so characters that any YAML version treats as a line break
    // are refused.
    ensure!(!written.chars().any(is_special), "a character of the job is not one for YAML");
    read_back::check(&written, &template, &values)?;
    Ok(written)
}

/// What takes the place of a key in a template.
#[derive(Clone, Debug)]
enum Value {
    /// Part of a scalar of the template: a text that YAML reads as it is, quoted or not.
    Part(String),
    /// A scalar of its own: its text, and how YAML writes it.
    Scalar { meant: String, written: String },
    /// YAML that this program composes.
    Yaml(String),
}

impl Value {
    fn written(&self) -> &str {
        match self {
            Self::Part(text) | Self::Yaml(text) | Self::Scalar { written: text, .. } => text,
        }
    }
}

fn part(key: &str, text: impl Into<String>) -> (String, Value) {
    (key.to_owned(), Value::Part(text.into()))
}

/// The template of all manifests, with this one of rollout workers.
fn template(rollout: &str) -> String {
    TEMPLATE.replace("@rollout@", rollout.trim_end())
}

/// Returns whether a value (image, quantity, name) means the same text in YAML, quoted or not.
fn is_plain(value: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:@+".contains(c);
    let mut ends = value.chars().next().into_iter().chain(value.chars().next_back());
    value.chars().all(is_plain) && !value.is_empty() && ends.all(|c| c.is_ascii_alphanumeric()) && value.len() <= 512
}

/// Fills a template with these values and the fixed ones. What was filled in is not looked at again, because the user's texts may
/// themselves contain `@key@`.
fn fill(template: &str, values: &[(String, Value)]) -> String {
    let fixed = [("pod_security", POD_SECURITY), ("container_security", CONTAINER_SECURITY)];
    let find = |key: &str| {
        let given = values.iter().find(|(known, _)| known == key).map(|(_, value)| value.written());
        given.or_else(|| fixed.iter().find(|(known, _)| *known == key).map(|(_, value)| *value))
    };
    let (mut filled, mut rest) = (String::new(), template);
    while let Some((before, after)) = rest.split_once('@') {
        filled.push_str(before);
        match after.split_once('@').and_then(|(key, tail)| Some((find(key)?, tail))) {
            Some((value, tail)) => {
                filled.push_str(value);
                rest = tail;
            }
            None => {
                filled.push('@');
                rest = after;
            }
        }
    }
    filled.push_str(rest);
    filled
}

/// Derives the run id from namespace and name, so that rendering and applying again keeps it.
fn run_id(namespace: &str, name: &str) -> String {
    let digest = digest(&SHA256, format!("{namespace}/{name}").as_bytes());
    digest.as_ref().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// Renders text as a YAML value: a block scalar, or a quoted one where a block would not preserve the text.
fn scalar(text: &str) -> String {
    let ends_once = text.ends_with('\n') && !text.ends_with("\n\n") && text.len() > 1;
    // YAML takes the block's indentation from its first line, and trailing spaces would be lost.
    let has_first_line = text.starts_with(|c: char| !c.is_whitespace());
    let is_trimmed = !text.lines().any(|line| line.ends_with([' ', '\t']));
    if text.chars().any(is_special) || text.contains('\r') || !(ends_once && has_first_line && is_trimmed) {
        return quoted(text);
    }
    let lines: Vec<String> = text.lines().map(|line| format!("    {line}").trim_end().to_owned()).collect();
    format!("|\n{}", lines.join("\n"))
}

/// Returns whether YAML may treat the character as a line break (1.1 does for U+0085, U+2028 and U+2029, which would turn the rest
/// of a TOML comment into a manifest), refuses it, or a reviewer would not see it.
fn is_special(c: char) -> bool {
    let is_shown = |c: char| matches!(harmless(c.encode_utf8(&mut [0; 4])), Cow::Borrowed(_));
    !matches!(c, '\t' | '\n') && (!is_shown(c) || matches!(c, '\u{fffe}' | '\u{ffff}'))
}

/// Renders text as a double-quoted scalar on one line.
fn quoted(text: &str) -> String {
    let mut quoted = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            '\n' => quoted.push_str("\\n"),
            c if c == '\t' || is_special(c) => quoted.push_str(&match u32::from(c) {
                code @ 0x1_0000.. => format!("\\U{code:08x}"),
                code => format!("\\u{code:04x}"),
            }),
            c => quoted.push(c),
        }
    }
    quoted + "\""
}

/// Turns a name into a DNS label: lower-case letters, digits and inner dashes.
fn dns_label(name: &str) -> String {
    let label: String = name.chars().map(|c| if c == '_' { '-' } else { c.to_ascii_lowercase() }).collect();
    label.trim_matches('-').to_owned()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::Parser;
    use expect_test::expect_file;

    use super::*;
    use crate::arguments::{Arguments, Command, LaunchCommand};

    const JOB: &str = "\
name = \"demo\"

[model]
path = \"/data/models/smollm2-135m-instruct\"

[data.train]
generator = { task = \"addition\" }

[data.evaluation]
generator = { task = \"addition\", part = \"held_out\" }

[resources]
learners = 2
rollouts = 2
verifiers = 2
";

    /// The job in the Helm chart: JSON is a valid YAML scalar, but does not escape U+0085, a line break of YAML 1.1.
    const HELM_JOB: &str =
        "{{ .Values.job | required \"job: the job spec (TOML)\" | toJson | replace \"\\u0085\" \"\\\\u0085\" }}";

    /// The run id in the Helm chart, computed as by `run_id`.
    const HELM_RUN_ID: &str = "{{ .Values.runId | default (printf \"%s/%s\" .Release.Namespace .Release.Name | sha256sum | trunc 32) | regexFind \"^[0-9a-f]{32}$\" \
         | required \"runId: 32 lower-case hexadecimal digits\" }}";

    fn launch(job: &str, more: &[&str]) -> Result<String> {
        let images = ["--image", "registry.example/pacs:0.1.0", "--worker-image", "registry.example/pacs-worker:0.1.0"];
        let line = ["pacs", "launch", "kubernetes", "job.toml"].iter().chain(&images).chain(more);
        let Command::Launch { command: LaunchCommand::Kubernetes(arguments) } =
            Arguments::try_parse_from(line).expect("a command line").command
        else {
            panic!("not that command")
        };
        let spec = pacs_spec::parse(job, Path::new("job.toml")).expect("valid");
        manifests(&spec, job, &arguments)
    }

    #[test]
    fn the_kustomize_base_is_what_is_printed() {
        let text = launch(JOB, &[]).expect("printed");
        assert!(!text.contains('@'), "a value is missing");
        expect_file!["../../../../deploy/kubernetes/base/job.yaml"].assert_eq(&text);
    }

    #[test]
    fn the_helm_chart_is_the_same_text() {
        let value = |name: &str| format!("{{{{ .Values.{name} | toJson | replace \"\\u0085\" \"\\\\u0085\" }}}}");
        let number = |name: &str| format!("{{{{ .Values.{name} | int }}}}");
        let values = [
            ("name", "{{ .Release.Name }}".to_owned()),
            ("job", HELM_JOB.to_owned()),
            ("run_id", HELM_RUN_ID.to_owned()),
            ("image", value("image")),
            ("worker_image", value("workerImage")),
            ("data_claim", value("dataClaim")),
            ("run_size", value("runSize")),
            ("learners", number("learners")),
            ("rollouts", number("rollouts")),
            ("verifiers", number("verifiers")),
            ("cpu", number("cpu")),
            ("memory", value("memory")),
            ("shm", value("shm")),
            ("device", "{{ if .Values.gpu }}cuda{{ else }}cpu{{ end }}".to_owned()),
            ("gpu", "{{ if .Values.gpu }}, nvidia.com/gpu: 1{{ end }}".to_owned()),
            ("threads", number("cpu")),
            ("grace_period", number("gracePeriod")),
            ("grace", format!("{{{{ sub (.Values.gracePeriod | int) {LAST_WORDS} }}}}")),
        ];
        let text = fill(&template(ROLLOUT), &values.map(|(key, value)| part(key, value)));
        assert!(!text.contains('@'), "a value is missing");
        expect_file!["../../../../deploy/helm/pacs/templates/job.yaml"].assert_eq(&text);
    }

    #[test]
    fn gpus_are_asked_for_where_they_are_used() {
        let job = JOB.replace("[resources]\n", "[resources]\ndevice = \"cuda\"\n");
        let text = launch(&job, &[]).expect("printed");
        assert_eq!(text.matches("nvidia.com/gpu: 1").count(), 4, "requests and limits of two roles");
        assert_eq!(text.matches("value: \"cuda\"").count(), 2);
    }

    const VLLM: [&str; 2] = ["--vllm-image", "registry.example/vllm-openai:0.32.0"];

    /// The job with servers in the pods of its rollout workers, which have these keys.
    fn with_servers(keys: &str) -> String {
        let device = "[resources]\ndevice = \"cuda\"\n";
        let job = JOB.replace("[resources]\n", device);
        format!("{job}\n[rollout]\nengine = \"vllm\"\nvllm.server = {{ {keys} }}\n")
    }

    #[test]
    fn rollout_workers_have_their_servers_in_their_pods() {
        let job = with_servers(
            "count = 2, tensor_parallel = 4, start_seconds = 605, extra_args = [\"--gpu-memory-utilization\", \"0.95\"], \
             environment = { VLLM_BATCH_INVARIANT = \"1\" }",
        );
        let text = launch(&job, &VLLM).expect("printed");
        assert!(!text.contains('@'), "a value is missing");
        expect_file!["kubernetes/vllm.yaml"].assert_eq(&text);
        for (what, count) in [("nvidia.com/gpu: 4", 4), ("nvidia.com/gpu: 1", 2), ("startupProbe", 3)] {
            assert_eq!(text.matches(what).count(), count, "{what}");
        }
        // On processors there is nothing to ask for.
        let cpu =
            job.replace("device = \"cuda\"\n", "").replace("[data.train]", "precision = \"float32\"\n\n[data.train]");
        assert!(!launch(&cpu, &VLLM).expect("printed").contains("nvidia.com"));
    }

    #[test]
    fn any_words_for_the_servers_stay_one_word_each() {
        // `manifests` reads its result back and compares.
        let hostile = [
            "x: y",
            "x, y]",
            "{a: b}",
            "- x",
            "#x",
            " # x ",
            "&a *b !c",
            "\\\"'`|>%@",
            "@job@ @name@ @word_0_0@ @value_0@ pacs-name-value pacs-word_0_0-value",
            "{{ .Values.x }}",
            "\u{2028}---\u{2028}kind: Pod",
            "\u{202e}x",
            "1",
            "true",
            "~",
        ];
        for text in hostile {
            let text = serde_json::to_string(text).expect("a text");
            let keys = format!(
                "command = [{text}, {text}], extra_args = [{text}], environment = {{ A = {text}, B = {text} }}"
            );
            let written = launch(&with_servers(&keys), &VLLM).unwrap_or_else(|error| panic!("{text}: {error:#}"));
            assert!(!written.chars().any(is_special), "{written}");
        }
        // Kubernetes would put a variable of the container there.
        let written = launch(&with_servers("extra_args = [\"$(PACS_RUN_ID) $$\"]"), &VLLM).expect("printed");
        assert!(written.contains("\"$$(PACS_RUN_ID) $$$$\""), "{written}");
    }

    #[test]
    fn servers_that_pods_cannot_have_are_refused() {
        for (job, options, words) in [
            (with_servers(""), &[][..], "give --vllm-image"),
            (JOB.to_owned(), &VLLM[..], "the job starts no vLLM server"),
            (with_servers("model = \"untied\""), &VLLM, "`untied` of the spec is relative"),
            (
                with_servers("").replace("vllm.server = {  }", "vllm = { server = {}, weights_dir = \"/w\" }"),
                &VLLM,
                "pods have a volume of their own",
            ),
            (
                with_servers("")
                    .replace("vllm.server = {  }", "vllm.endpoints = [\"http://a:1\"]")
                    .replace("rollouts = 2", "rollouts = 1"),
                &[],
                "vLLM servers of yours",
            ),
        ] {
            let error = launch(&job, options).expect_err(words);
            assert!(format!("{error:#}").contains(words), "{error:#}");
        }
    }

    #[test]
    fn what_pods_cannot_have_is_refused() {
        let error = launch(&JOB.replace("/data/models", "models"), &[]).expect_err("relative");
        assert!(error.to_string().contains("is relative"), "{error}");
        let error = launch(&JOB.replace("\"demo\"", &format!("\"{}\"", "x".repeat(41))), &[]).expect_err("too long");
        assert!(error.to_string().contains("at most 40 characters"), "{error}");
        let text = launch(&JOB.replace("\"demo\"", "\"My_Job_\""), &[]).expect("printed");
        assert!(text.contains("name: my-job-coordinator\n"));
    }

    #[test]
    fn the_id_is_that_of_the_release() {
        // First 32 digits of `printf default/demo | sha256sum`.
        let id = "02c8c86b636ca99e50790fccaf6d8050";
        assert_eq!(run_id("default", "demo"), id);
        let text = launch(JOB, &[]).expect("printed");
        assert_eq!(text.matches(&format!("{{name: PACS_RUN_ID, value: \"{id}\"}}")).count(), 4, "all four roles");
        let given = "0123456789abcdef".repeat(2);
        assert_eq!(launch(JOB, &["--run-id", &given]).expect("printed").matches(&given).count(), 4);
        assert!(!launch(JOB, &["--namespace", "lab"]).expect("printed").contains(id));
    }

    #[test]
    fn no_character_of_the_job_ends_its_value() {
        for c in ['\u{85}', '\u{2028}', '\u{2029}', '\u{feff}', '\u{9b}'] {
            let job = JOB.replace("[resources]\n", &format!("# a \"comment\" \\ {c}---{c}kind: Pod\n[resources]\n"));
            let text = launch(&job, &[]).expect("printed");
            assert!(!text.contains(c), "{text}");
            let line = text.lines().find(|line| line.starts_with("  job.toml: ")).expect("the job");
            let value = line.strip_prefix("  job.toml: ").expect("a key");
            // The escapes are valid JSON, too.
            assert_eq!(serde_json::from_str::<String>(value).expect("quoted"), job);
        }
    }

    #[test]
    fn any_text_of_the_job_is_one_value() {
        // `manifests` reads its result back and compares. TOML allows these texts in comments, multi-line strings, or at its ends.
        let texts = [
            "# ends in blanks  \n",
            "# \ttabs\t\n",
            "# 🙂 \u{e0041} \u{202e}\n",
            "# --- \n# ...\n---",
            "# @name@ @job@ {{ .Values.x }}\n",
            "\r\n# a line of Windows\r\n",
            "\n\n# blank lines before\n\n\n",
            "# no line end",
            "# % & * ! | > ' \" `\n",
            "  # indented\n",
        ];
        for text in texts {
            let text = text.strip_suffix("---").unwrap_or(text);
            for job in [format!("{text}\n{JOB}"), format!("{JOB}{text}")] {
                launch(&job, &[]).unwrap_or_else(|error| panic!("{text:?}: {error:#}"));
            }
        }
    }

    #[test]
    fn no_option_is_more_than_its_value() {
        let options = ["--image", "--worker-image", "--vllm-image", "--data-claim", "--run-size", "--memory", "--shm"];
        let hostile = [
            "x\n---\nkind: Pod",
            "x\u{2028}---",
            "x\u{85}a: b",
            "x\ra: b",
            "x: y",
            "x #y",
            "{a: b}",
            "",
            " ",
            "\"x",
            "@name@",
            "x\u{202e}y",
            "{{ .Values.x }}",
            "x, hostPath: {path: /}",
            "-",
            "x:",
            "1Gi}",
            "*a",
            "&a",
            "!a",
            "\0",
        ];
        for option in options {
            for value in hostile {
                // Of a repeated option the last value wins.
                let fixed = ["--image=i", "--worker-image=w", "--vllm-image=v"];
                let line = ["pacs", "launch", "kubernetes", "job.toml"].into_iter().chain(fixed).map(str::to_owned);
                let line = line.filter(|word| !word.starts_with(&format!("{option}=")));
                let line = line.chain([format!("{option}={value}")]);
                let Ok(arguments) = Arguments::try_parse_from(line) else { continue };
                let Command::Launch { command: LaunchCommand::Kubernetes(arguments) } = arguments.command else {
                    panic!("not that command")
                };
                let job = with_servers("");
                let spec = pacs_spec::parse(&job, Path::new("job.toml")).expect("valid");
                let error = manifests(&spec, &job, &arguments).expect_err(value).to_string();
                assert!(error.starts_with(option), "{option} {value:?}: {error}");
            }
        }
    }

    #[test]
    fn values_in_the_job_are_left_alone() {
        let job = JOB.replace("[resources]\n", "# an @image@ of\n[resources]\n");
        assert!(launch(&job, &[]).expect("printed").contains("# an @image@ of"));
    }
}
