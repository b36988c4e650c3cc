//! The manifests of a job. The Kustomize base and the Helm chart in `deploy/` are the same text with other values, which
//! tests see to.

use anyhow::{Result, ensure};
use pacs_spec::{DeviceKind, JobSpec};

use crate::arguments::LaunchKubernetes;

/// The manifests, with `@key@` where a value goes.
const TEMPLATE: &str = include_str!("kubernetes/job.yaml");

/// Of no privilege, and of a group that can read the secrets.
const POD_SECURITY: &str = "{runAsNonRoot: true, runAsUser: 10001, runAsGroup: 10001, fsGroup: 10001, \
                            fsGroupChangePolicy: OnRootMismatch, seccompProfile: {type: RuntimeDefault}}";
const CONTAINER_SECURITY: &str =
    "{allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}";

/// Seconds of the grace period that are left for the end itself, after the last moment to save.
const LAST_WORDS: u32 = 10;

/// The manifests of a job whose spec is `text`.
pub(crate) fn manifests(spec: &JobSpec, text: &str, arguments: &LaunchKubernetes) -> Result<String> {
    let name = dns_label(&spec.name);
    // Longest name of a pod's parts: `<name>-coordinator-0`, within 63 characters.
    ensure!(name.len() <= 40, "job name `{}` is too long for names of Kubernetes; at most 40 characters", spec.name);
    for path in [Some(&spec.model.path), spec.data.train.path.as_ref()].into_iter().flatten() {
        ensure!(path.is_absolute(), "path `{}` of the spec is relative; pods see the data at /data", path.display());
    }
    let resources = &spec.resources;
    let gpu = resources.device == DeviceKind::Cuda;
    let threads = if resources.threads == 0 { arguments.cpu } else { resources.threads };
    let values = [
        ("name", name),
        ("job", indented(text)),
        ("image", arguments.image.clone()),
        ("worker_image", arguments.worker_image.clone()),
        ("data_claim", arguments.data_claim.clone()),
        ("run_size", arguments.run_size.clone()),
        ("learners", resources.learners.to_string()),
        ("rollouts", resources.rollouts.to_string()),
        ("verifiers", resources.verifiers.to_string()),
        ("cpu", arguments.cpu.to_string()),
        ("memory", arguments.memory.clone()),
        ("shm", arguments.shm.clone()),
        ("device", if gpu { "cuda" } else { "cpu" }.to_owned()),
        ("gpu", if gpu { ", nvidia.com/gpu: 1" } else { "" }.to_owned()),
        ("threads", threads.to_string()),
        ("grace_period", arguments.grace_period.to_string()),
        ("grace", (arguments.grace_period - LAST_WORDS).to_string()),
    ];
    Ok(fill(&values))
}

/// The template with these values, and what is always the same.
fn fill(values: &[(&str, String)]) -> String {
    let fixed = [("pod_security", POD_SECURITY), ("container_security", CONTAINER_SECURITY)];
    let fixed = fixed.map(|(key, value)| (key, value.to_owned()));
    // The job last: it is the user's text, and may hold anything.
    let (job, rest): (Vec<_>, Vec<_>) = values.iter().chain(&fixed).partition(|(key, _)| *key == "job");
    rest.into_iter().chain(job).fold(TEMPLATE.to_owned(), |text, (key, value)| text.replace(&format!("@{key}@"), value))
}

/// As the lines of a block below a key.
fn indented(text: &str) -> String {
    let lines: Vec<String> = text.lines().map(|line| format!("    {line}").trim_end().to_owned()).collect();
    lines.join("\n")
}

/// Lower-case letters, digits and dashes, none of them at an end.
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
        let value = |name: &str| format!("{{{{ .Values.{name} }}}}");
        let values = [
            ("name", "{{ .Release.Name }}".to_owned()),
            ("job", "{{ .Values.job | required \"job: the job spec (TOML)\" | indent 4 }}".to_owned()),
            ("image", value("image")),
            ("worker_image", value("workerImage")),
            ("data_claim", value("dataClaim")),
            ("run_size", value("runSize")),
            ("learners", value("learners")),
            ("rollouts", value("rollouts")),
            ("verifiers", value("verifiers")),
            ("cpu", value("cpu")),
            ("memory", value("memory")),
            ("shm", value("shm")),
            ("device", "{{ if .Values.gpu }}cuda{{ else }}cpu{{ end }}".to_owned()),
            ("gpu", "{{ if .Values.gpu }}, nvidia.com/gpu: 1{{ end }}".to_owned()),
            ("threads", value("cpu")),
            ("grace_period", value("gracePeriod")),
            ("grace", format!("{{{{ sub .Values.gracePeriod {LAST_WORDS} }}}}")),
        ];
        let text = fill(&values);
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
    fn values_in_the_job_are_left_alone() {
        let job = JOB.replace("[resources]\n", "# an @image@ of\n[resources]\n");
        assert!(launch(&job, &[]).expect("printed").contains("# an @image@ of"));
    }
}
