//! `pacs launch`: renders a job for a cluster's scheduler, as an sbatch script or Kubernetes manifests.

mod kubernetes;
mod slurm;

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, anyhow};
use pacs_runtime::Exit;

use crate::arguments::{LaunchKubernetes, LaunchSlurm};
use crate::failure::Failure;
use crate::output;
use crate::plan::default_run_dir;

pub(crate) fn slurm(arguments: &LaunchSlurm) -> Result<Exit, Failure> {
    let spec = pacs_spec::read(&arguments.job).map_err(|errors| Failure::config(errors).doing("read the job"))?;
    let here = std::env::current_dir().context("find the working directory").map_err(Failure::bug)?;
    let programs = std::env::current_exe().context("find this program's own file").map_err(Failure::bug)?;
    let place = slurm::Place {
        job: here.join(&arguments.job),
        run_dir: here.join(arguments.run_dir.clone().unwrap_or_else(|| default_run_dir(&spec))),
        programs: programs.parent().unwrap_or(Path::new("/")).to_owned(),
        here,
    };
    let script =
        slurm::script(&spec, arguments, &place).map_err(|error| Failure::config(error).doing("write the script"))?;
    if !arguments.submit {
        output::raw(script);
        return Ok(Exit::Done);
    }
    submit(&script)
}

pub(crate) fn kubernetes(arguments: &LaunchKubernetes) -> Result<Exit, Failure> {
    let spec = pacs_spec::read(&arguments.job).map_err(|errors| Failure::config(errors).doing("read the job"))?;
    let text = std::fs::read_to_string(&arguments.job)
        .with_context(|| format!("read `{}`", arguments.job.display()))
        .map_err(Failure::config)?;
    output::raw(kubernetes::manifests(&spec, &text, arguments).map_err(Failure::config)?);
    Ok(Exit::Done)
}

/// Pipes the script to sbatch, which prints the job id.
fn submit(script: &str) -> Result<Exit, Failure> {
    let failed = |error: std::io::Error| {
        Failure::again(error).doing("run sbatch").hint("submit from a login node, or print the script without --submit")
    };
    let mut child = Command::new("sbatch").stdin(Stdio::piped()).spawn().map_err(failed)?;
    let mut input = child.stdin.take().expect("it was asked for");
    input.write_all(script.as_bytes()).map_err(failed)?;
    drop(input);
    let status = child.wait().map_err(failed)?;
    match status.success() {
        true => Ok(Exit::Done),
        false => Err(Failure::again(anyhow!("sbatch refused the script ({status})")).doing("submit the job")),
    }
}

/// Quotes a word for a POSIX shell.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@%+,".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

fn quoted_path(path: &Path) -> String {
    quoted(&path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_the_shell() {
        for word in ["plain/path-1.toml", "two words", "it's", "$HOME `x` \"y\"", ""] {
            let output =
                Command::new("sh").arg("-c").arg(format!("printf %s {}", quoted(word))).output().expect("runs");
            assert_eq!(String::from_utf8_lossy(&output.stdout), word);
        }
    }
}
