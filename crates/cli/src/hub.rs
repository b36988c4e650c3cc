//! The Hugging Face hub on the command line: names in jobs and options become paths here, once; `pacs fetch` and `pacs push`.

use std::path::{Path, PathBuf};

use anyhow::Context;
use pacs_hub::{Hub, HubError, Meter, Part, Pins, Progress, PushOptions, Resolver, Settings, Unresolved};
use pacs_runtime::Exit;
use pacs_spec::{HubRepo, JobSpec, snapshot_of};
use serde_json::json;

use crate::arguments::{Fetch, Push};
use crate::failure::Failure;
use crate::format::{bytes, plural};
use crate::{model_folder, output};

/// The hub as one command uses it, with the commits that a run has begun with.
pub(crate) struct Session<'a> {
    resolver: Resolver<'a>,
}

/// Calls `work` with the hub. Returns also which commits were used, for the run's folder.
pub(crate) fn session<T>(
    run_dir: Option<&Path>,
    work: impl FnOnce(&mut Session<'_>) -> Result<T, Failure>,
) -> Result<(T, Pins), Failure> {
    let pins = run_dir.map(Pins::read).transpose().map_err(failure)?.unwrap_or_default();
    let mut meter = Meter::new("fetching");
    let mut say = |text: &str| output::error(text);
    let mut report = |progress: &Progress| {
        if let Some(line) = meter.line(progress) {
            output::error(line);
        }
    };
    let mut session = Session { resolver: Resolver::new(pins, &mut say, &mut report) };
    let done = work(&mut session)?;
    Ok((done, session.resolver.into_pins()))
}

impl Session<'_> {
    /// The folder of a model.
    pub(crate) fn model(&mut self, path: &Path, part: Part) -> Result<PathBuf, Failure> {
        self.resolver.model(path, part).map_err(|error| unresolved(Unresolved::model(path, error)))
    }

    /// The file of a source.
    pub(crate) fn data(&mut self, path: &Path) -> Result<PathBuf, Failure> {
        self.resolver.data(path).map_err(|error| failure(error).doing(format!("find data `{}`", path.display())))
    }

    /// Turns the names of a job into paths.
    pub(crate) fn job(&mut self, spec: &mut JobSpec, part: Part) -> Result<(), Failure> {
        pacs_hub::resolve_job(spec, part, &mut self.resolver).map_err(unresolved)
    }

    /// The same for a command that looks at as much of a job as is there: a hub that cannot be reached is said, and is no failure.
    pub(crate) fn job_if_reachable(&mut self, spec: &mut JobSpec, part: Part) -> Result<(), Failure> {
        let is_out_of_reach = |error: &HubError| {
            matches!(error, HubError::Unreachable { .. } | HubError::Busy { .. } | HubError::Offline { .. })
        };
        let not_looked_at = |what: &str, error: HubError| output::error(format_args!("{what} not looked at: {error}"));
        match self.resolver.model(&spec.model.path, part) {
            Ok(folder) => spec.model.path = folder,
            Err(error) if is_out_of_reach(&error) => not_looked_at("the model is", error),
            Err(error) => return Err(unresolved(Unresolved::model(&spec.model.path, error))),
        }
        match pacs_hub::resolve_sources(spec, &mut self.resolver) {
            Ok(()) => {}
            Err(error) if is_out_of_reach(&error) => not_looked_at("the problems are", error),
            Err(error) => return Err(unresolved(Unresolved::problems(error))),
        }
        Ok(())
    }
}

/// What a command ends with when the hub does not have what it needs.
fn failure(error: HubError) -> Failure {
    let exit = if error.is_transient() { Exit::Again } else { Exit::Config };
    let hint = error.hint();
    let failure = Failure::with_exit(exit, error);
    match hint {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}

fn unresolved(Unresolved { doing, error }: Unresolved) -> Failure {
    failure(*error).doing(doing)
}

/// A model's path as it is shown: one of the cache by its name and commit.
pub(crate) fn shown(path: &Path) -> String {
    let named = path.to_str().and_then(snapshot_of).and_then(|snapshot| {
        let (folder, commit) = snapshot.split_once("/snapshots/")?;
        let name = folder.split_once("--")?.1.replacen("--", "/", 1);
        Some(format!("{name} of the hub, commit {}", &commit[..12]))
    });
    named.unwrap_or_else(|| path.display().to_string())
}

pub(crate) fn fetch(arguments: &Fetch) -> Result<Exit, Failure> {
    let (found, _) = session(None, |hub| {
        let mut found: Vec<(String, PathBuf)> = Vec::new();
        for name in &arguments.names {
            let path = Path::new(name);
            if path.extension().is_some_and(|extension| extension == "toml") {
                let mut spec = pacs_spec::read(path).map_err(|errors| Failure::config(errors).doing("read the job"))?;
                let before = names(&spec);
                hub.job(&mut spec, Part::Whole)?;
                let named = before.into_iter().zip(names(&spec)).filter(|(before, after)| before != after);
                found.extend(named.map(|(before, after)| (before.display().to_string(), after)));
            } else if name.starts_with("hf://datasets/") {
                found.push((name.clone(), hub.data(path)?));
            } else if HubRepo::of_model(path).is_some() {
                found.push((name.clone(), hub.model(path, Part::Whole)?));
            } else {
                let error =
                    anyhow::anyhow!("expected OWNER/NAME[@REVISION], hf://datasets/OWNER/NAME/…, or a job (.toml)");
                return Err(Failure::config(error).doing(format!("fetch `{name}`")));
            }
        }
        Ok(found)
    })?;
    for (name, path) in &found {
        match arguments.json {
            true => output::json(json!({"name": name, "path": path})),
            false => output::line(path.display()),
        }
    }
    if found.is_empty() && !arguments.json {
        output::error("nothing of the hub is named there");
    }
    Ok(Exit::Done)
}

/// All that a job names, in one order.
fn names(spec: &JobSpec) -> Vec<PathBuf> {
    let sources = spec.data.train_sets().map(|(_, source)| source.path.clone());
    let evaluation = spec.all_evaluation_sets().map(|set| set.source.path);
    std::iter::once(Some(spec.model.path.clone())).chain(sources).chain(evaluation).flatten().collect()
}

pub(crate) fn push(arguments: &Push) -> Result<Exit, Failure> {
    let folder = model_of(&arguments.folder);
    let described = |what: &str| format!("{what} `{}`", folder.display());
    model_folder::inspect(&folder).map_err(|error| {
        let hint = "the exported model of a checkpoint is runs/NAME/checkpoints/step-N/model";
        Failure::config(error).doing(described("read model")).hint(hint)
    })?;
    let repo = Hub::target(&arguments.repo, arguments.revision.as_deref()).map_err(failure)?;
    let message = arguments.message.clone().unwrap_or_else(|| {
        let name = folder.components().rev().map(|part| part.as_os_str().to_string_lossy().into_owned());
        let name = name.into_iter().find(|part| part != "model").unwrap_or_default();
        format!("Upload {name}")
    });
    let (private, dry_run) = (arguments.private, arguments.dry_run);
    let options = PushOptions { folder: folder.clone(), repo, private, message, dry_run };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the runtime")
        .map_err(Failure::bug)?;
    let mut meter = Meter::new("uploading");
    let mut report = |progress: &Progress| {
        if let Some(line) = meter.line(progress) {
            output::error(line);
        }
    };
    let pushed = Settings::from_env()
        .and_then(Hub::new)
        .and_then(|hub| runtime.block_on(pacs_hub::push(&hub, &options, &mut report)));
    runtime.shutdown_background();
    let pushed = pushed.map_err(|error| failure(error).doing(described("push")))?;
    let total: u64 = pushed.files.iter().map(|(_, bytes)| bytes).sum();
    if arguments.json {
        let files: Vec<_> = pushed.files.iter().map(|(path, bytes)| json!({"path": path, "bytes": bytes})).collect();
        let (commit, url) = pushed.commit.clone().unzip();
        output::json(json!({
            "repo": options.repo.id, "revision": options.repo.revision(), "dry_run": dry_run, "files": files, "bytes": total,
            "uploaded_bytes": pushed.uploaded, "commit": commit, "url": url,
        }));
        return Ok(Exit::Done);
    }
    if let Some((commit, url)) = &pushed.commit {
        output::line(format_args!("pushed {} to {}: commit {commit}, {url}", bytes(total), options.repo));
        return Ok(Exit::Done);
    }
    for (path, length) in &pushed.files {
        output::line(format_args!("{:>10}  {path}", bytes(*length)));
    }
    let files = plural(pushed.files.len() as u64, "file", "files");
    output::line(format_args!("would push {files}, {}, to {}", bytes(total), options.repo));
    Ok(Exit::Done)
}

/// The model in a folder: itself, or that of a checkpoint.
fn model_of(folder: &Path) -> PathBuf {
    let within = folder.join("model");
    let is_checkpoint = !folder.join("config.json").exists() && within.join("config.json").exists();
    if is_checkpoint { within } else { folder.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_of_the_cache_are_shown_by_name() {
        let path = format!("/home/a/.cache/huggingface/hub/models--o--n-1/snapshots/{}", "ab".repeat(20));
        assert_eq!(shown(Path::new(&path)), "o/n-1 of the hub, commit abababababab");
        assert_eq!(shown(Path::new("models/x")), "models/x");
    }
}
