use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use clap::Parser;
use expect_test::expect_file;

use super::*;
use crate::arguments::{Arguments, Command, LaunchCommand};

fn place() -> Place {
    Place {
        job: "/home/me/jobs/my job.toml".into(),
        run_dir: "/shared/runs/tiny".into(),
        programs: "/opt/pacs/bin".into(),
        here: "/home/me".into(),
    }
}

fn script(resources: &str, options: &[&str]) -> Result<String> {
    script_of(&format!("resources = {{ {resources} }}"), options)
}

/// The script of a job with these lines at its end.
fn script_of(more: &str, options: &[&str]) -> Result<String> {
    let text = format!(
        "name = 'tiny'\nmodel.path = 'm'\ndata.train.path = 't.jsonl'\ndata.evaluation.path = 'e.jsonl'\n{more}"
    );
    let spec = pacs_spec::parse(&text, Path::new("job.toml")).expect("valid");
    let line = ["pacs", "launch", "slurm", "job.toml"].into_iter().chain(options.iter().copied());
    let Command::Launch { command: LaunchCommand::Slurm(arguments) } =
        Arguments::try_parse_from(line).expect("a command line").command
    else {
        panic!("not that command")
    };
    super::script(&spec, &arguments, &place())
}

/// Returns whether bash parses the script.
fn is_bash(script: &str) -> bool {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("script");
    std::fs::write(&path, script).expect("written");
    std::process::Command::new("bash").arg("-n").arg(&path).status().expect("bash").success()
}

#[test]
fn vllm_servers_are_driven_without_a_gpu_and_have_to_be_named() {
    let spec = |endpoints: &str| {
        let text = format!(
            "name = 'a'\nmodel.path = 'm'\ndata.train.path = 't.jsonl'\ndata.evaluation.path = 'e.jsonl'\n\
             resources = {{ learners = 4, device = 'cuda' }}\nrollout = {{ engine = 'vllm', vllm.endpoints = [{endpoints}] }}"
        );
        pacs_spec::parse(&text, Path::new("a.toml")).expect("valid")
    };
    let named = spec("'http://a:1'");
    let steps = steps(&named, None);
    let rollout = steps.iter().find(|step| step.role == "rollout").expect("a step");
    assert_eq!((rollout.start, rollout.gpus, rollout.tasks), (Start::Worker("pacs rollout"), 0, 1));
    assert!(check_servers(&named, &steps).is_ok());
    let error = check_servers(&spec(""), &steps).expect_err("none is named");
    assert!(error.to_string().contains("names no vLLM servers"), "{error}");
}

/// A job whose rollout workers have servers of their own, with these keys.
fn with_servers(server: &str, resources: &str, options: &[&str]) -> Result<String> {
    script_of(
        &format!("rollout = {{ engine = 'vllm', vllm.server = {{ {server} }} }}\nresources = {{ {resources} }}"),
        options,
    )
}

#[test]
fn servers_are_started_next_to_each_rollout_worker() {
    let resources = "learners = 6, rollouts = 5, verifiers = 4, device = 'cuda'";
    let script = with_servers("count = 2, tensor_parallel = 2", resources, &[]).expect("fits");
    assert!(is_bash(&script));
    expect_file!["vllm.sbatch"].assert_eq(&script);
    let cpu = "rollout = { engine = 'vllm', vllm.server = {} }\nmodel.precision = 'float32'\nresources.rollouts = 2";
    let script = script_of(cpu, &[]).expect("fits");
    assert!(is_bash(&script) && !script.contains("on_gpu"), "{script}");
    assert!(script.contains("step rollout 2 1 0 --overlap --kill-on-bad-exit=0 --wait=0 \\\n    bash -c \"$servers\""));
    // Workers that join have names and logs of their job.
    let script = with_servers("", "rollouts = 2, device = 'cuda'", &["--only", "rollouts"]).expect("fits");
    assert!(is_bash(&script));
    let step = "bash -c \"$on_gpu\" on_gpu 0 2 1 bash -c \"$servers\" servers \"$job\" \"${logs##*/}\" \"rollout-$SLURM_JOB_ID\" &";
    assert!(script.contains(step) && script.contains("job='/home/me/jobs/my job.toml'"), "{script}");
}

#[test]
fn a_task_of_several_gpus_is_on_one_node() {
    let error = with_servers("count = 3", "device = 'cuda'", &[]).expect_err("3 GPUs of 8");
    assert!(error.to_string().contains("product divides --gpus-per-node"), "{error}");
    let error = with_servers("count = 4", "device = 'cuda', learners = 5, rollouts = 2", &["--nodes", "1"]);
    let error = error.expect_err("the learners and two groups of four");
    assert!(error.to_string().contains("16 GPUs of learners and vLLM servers do not fit on 1 nodes"), "{error}");
}

#[test]
fn no_value_of_the_servers_is_in_the_script() {
    // `pacs servers` reads them from the job, so that no shell ever does.
    let hostile = r#"command = ['$(id)', '; reboot #'], extra_args = ['--a', "'\"`id`"], environment = { A = '#SBATCH --wrap=x' }"#;
    let plain = with_servers("", "device = 'cuda'", &[]).expect("fits");
    assert_eq!(with_servers(hostile, "device = 'cuda'", &[]).expect("fits"), plain);
}

#[test]
fn a_task_starts_the_servers_and_its_worker() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let pacs = dir.path().join("pacs");
    std::fs::write(&pacs, "#!/bin/sh\nprintf '%s\\n' \"$@\"\n").expect("written");
    std::fs::set_permissions(&pacs, std::fs::Permissions::from_mode(0o755)).expect("a program");
    let words = |more: &str| {
        let script = format!(
            "{SERVERS}logs=/r/logs/17.0 job='/my job.toml'\nbash -c \"$servers\" servers \"$job\" \"${{logs##*/}}\" {more}"
        );
        let mut bash = std::process::Command::new("bash");
        bash.arg("-c")
            .arg(script)
            .env("SLURM_PROCID", "3")
            .env("PACS_RUN_DIR", "/r")
            .env("PATH", path_with(dir.path()));
        let output = bash.output().expect("bash");
        String::from_utf8(output.stdout).expect("text").lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let expected = ["servers", "/my job.toml", "--logs", "/r/logs", "--name", "17.0-vllm-3", "--", "pacs", "rollout"];
    assert_eq!(words(""), expected);
    assert_eq!(words("\"rollout-17\""), [&expected[..], &["--name", "rollout-17-3"]].concat());
}

/// The search path with a folder in front.
fn path_with(folder: &Path) -> std::ffi::OsString {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::join_paths(std::iter::once(folder.to_owned()).chain(std::env::split_paths(&path))).expect("a path")
}

#[test]
fn a_job_on_cpus() {
    let script = script("learners = 2, rollouts = 3, verifiers = 2, threads = 2", &["--nodes", "3"]).expect("fits");
    assert!(is_bash(&script));
    expect_file!["cpu.sbatch"].assert_eq(&script);
}

#[test]
fn a_job_on_gpus() {
    let resources = "learners = 8, rollouts = 12, verifiers = 4, device = 'cuda'";
    let options = ["--partition", "gpu", "--sbatch=--account=lab", "--setup", "module load cuda", "--tls-dir", "certs"];
    let script = script(resources, &options).expect("fits");
    assert!(is_bash(&script));
    expect_file!["gpu.sbatch"].assert_eq(&script);
}

#[test]
fn a_task_sees_the_gpu_of_its_place() {
    // The steps of learners and of rollout workers fill the same nodes, the latter from the third place on.
    let seen_of = |place: &str, task: &str, visible: Option<&str>| {
        let script = format!("{ON_GPU}bash -c \"$on_gpu\" on_gpu {place} printenv CUDA_VISIBLE_DEVICES");
        let mut bash = std::process::Command::new("bash");
        bash.arg("-c").arg(script).env("SLURM_PROCID", task).env_remove("CUDA_VISIBLE_DEVICES");
        let output = bash.envs(visible.map(|visible| ("CUDA_VISIBLE_DEVICES", visible))).output().expect("bash");
        String::from_utf8(output.stdout).expect("text").trim().to_owned()
    };
    let seen = |task: &str, visible: Option<&str>| seen_of("2 4 1", task, visible);
    let every = ["0", "1", "2", "11"];
    assert_eq!(every.map(|task| seen(task, Some("4,5,6,7"))), ["6", "7", "4", "5"]);
    assert_eq!(every.map(|task| seen(task, None)), ["2", "3", "0", "1"]);
    // Tasks of two GPUs each, from the second on.
    let seen = |task: &str| seen_of("1 8 2", task, Some("8,9,10,11,12,13,14,15"));
    assert_eq!(every.map(seen), ["10,11", "12,13", "14,15", "8,9"]);
    assert_eq!(seen_of("0 4 4", "1", None), "0,1,2,3");
}

#[test]
fn workers_that_join() {
    let script = script("learners = 2, rollouts = 3", &["--only", "rollouts"]).expect("fits");
    assert!(is_bash(&script));
    expect_file!["rollouts.sbatch"].assert_eq(&script);
}

#[test]
fn time_limits_are_those_of_sbatch() {
    let times = ["90", "90:30", "1:30:00", "2-0", "1-12:30", "1-00:00:10", "unlimited"];
    let seconds = [Some(5400), Some(5430), Some(5400), Some(172_800), Some(131_400), Some(86_410), None];
    for (time, expected) in times.into_iter().zip(seconds) {
        assert_eq!(time_limit(time).expect("a time"), expected, "{time}");
    }
    for wrong in
        ["", "1h", "1:2:3:4", "1-", "x-1", "9999999999999999999", "18446744073709551615-0", "307445734561825861"]
    {
        assert!(time_limit(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn no_option_is_more_than_its_value() {
    let breaks = ["\n", "\r", "\u{85}", "\u{2028}", "\u{1b}[2K", "\u{202e}", "\0"];
    for (option, value) in
        [("--partition", "gpu"), ("--sbatch", "--account=lab"), ("--time", "1:00:00"), ("--setup", "true")]
    {
        for end in breaks.into_iter().filter(|end| (option, *end) != ("--setup", "\n")) {
            let given = format!("{option}={value}{end}#SBATCH --wrap=x");
            let error = script("learners = 1", &[given.as_str()]).expect_err(&given).to_string();
            assert!(error.starts_with(option), "{error}");
        }
    }
    for given in ["--partition=gpu --wrap=x", "--partition=", "--partition=a#b", "--sbatch=x", "--setup=cat <<X"] {
        assert!(script("learners = 1", &[given]).is_err(), "{given}");
    }
    // Setup commands may span lines: sbatch reads no options after the first command, so the second line is harmless.
    let script = script("learners = 1", &["--setup", "module load cuda\necho '#SBATCH --x'"]).expect("fits");
    assert!(is_bash(&script));
}

#[test]
fn paths_are_what_a_shell_makes_of_them() {
    use std::os::unix::ffi::OsStringExt;

    let spec = "name = 'tiny'\nmodel.path = 'm'\ndata.train.path = 't.jsonl'\ndata.evaluation.path = 'e.jsonl'";
    let spec = pacs_spec::parse(spec, Path::new("job.toml")).expect("valid");
    let line = ["pacs", "launch", "slurm", "job.toml"];
    let Command::Launch { command: LaunchCommand::Slurm(arguments) } =
        Arguments::try_parse_from(line).expect("a command line").command
    else {
        panic!("not that command")
    };
    let at = |run_dir: PathBuf| super::script(&spec, &arguments, &Place { run_dir, ..place() });
    for path in ["/a b", "/it's", "/$(id)", "/`id`", "/a\"b", "/a\\b", "/a;b", "/a#b", "/数", "/-x", "/a'\\''b"] {
        let script = at(path.into()).unwrap_or_else(|error| panic!("{path}: {error}"));
        assert!(is_bash(&script), "{path}");
    }
    for path in ["/a\nb", "/a\rb", "/a\u{85}b", "/a\u{2028}b", "/a\u{202e}b", "/a\u{1b}[2Kb"] {
        assert!(at(path.into()).is_err(), "{path:?}");
    }
    assert!(at(std::ffi::OsString::from_vec(b"/a\xff".to_vec()).into()).is_err(), "another path when it is printed");
}

#[test]
fn what_does_not_fit_is_refused() {
    let error = script("learners = 1", &["--time", "5"]).expect_err("saved before it begins");
    assert!(error.to_string().contains("saved 300 s before its end"), "{error}");
    let error = script("learners = 8, rollouts = 12, device = 'cuda'", &["--nodes", "2"]).expect_err("too many");
    assert!(error.to_string().contains("20 workers with a GPU each do not fit on 2 nodes with 8 GPUs"), "{error}");
    assert!(script("learners = 1, rollouts = 0", &["--only", "rollouts"]).is_err());
}
