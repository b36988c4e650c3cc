//! From names of the hub to paths of this machine.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use pacs_spec::{HubData, HubRepo, JobSpec};

use crate::cache::RepoCache;
use crate::fetch::{Fetching, Report};
use crate::http::Http;
use crate::select::{INDEX, WHOLE, Weights, data_files, indexed, texts_of_model, weights_of_model};
use crate::{Entry, HubError, Listing, Pins, Progress, Settings};

/// The hub, and its cache on this machine.
pub struct Hub {
    pub(crate) http: Http,
}

/// How much of a model is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Configuration, tokenizer and template. Weights only where the cache has them.
    Texts,
    /// All that is needed to compute with it.
    Whole,
}

/// Where a repository's files are.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Snapshot {
    commit: String,
    /// `None` where another program has filled the cache and the hub cannot be asked.
    listing: Option<Listing>,
}

impl Hub {
    /// The hub of these settings.
    ///
    /// # Errors
    /// When certificates that the settings name cannot be read.
    pub fn new(settings: Settings) -> Result<Self, HubError> {
        Ok(Self { http: Http::new(settings)? })
    }

    fn cache(&self, repo: &HubRepo) -> RepoCache {
        RepoCache::new(&self.http.settings.cache, repo)
    }

    fn fetching<'a>(&'a self, repo: &'a HubRepo, commit: &'a str) -> Fetching<'a> {
        Fetching { http: &self.http, repo, commit, cache: self.cache(repo) }
    }

    /// The commit of a revision and its files: of the cache where that knows them for certain, else of the hub; what the cache has
    /// where the hub cannot be reached.
    async fn snapshot(&self, repo: &HubRepo, pin: Option<&str>, say: &mut Say<'_>) -> Result<Snapshot, HubError> {
        let cache = self.cache(repo);
        let pin = pin.or(repo.revision.as_deref().filter(|_| repo.is_pinned()));
        if let Some(listing) = pin.and_then(|commit| cache.listing(commit)) {
            return Ok(Snapshot { commit: listing.commit.clone(), listing: Some(listing) });
        }
        let cached = || {
            let commit = pin.map(str::to_owned).or_else(|| cache.commit_of(repo.revision()))?;
            let listing = cache.listing(&commit);
            (listing.is_some() || cache.snapshot(&commit).is_dir()).then_some(Snapshot { commit, listing })
        };
        let offline = |what: &str| HubError::Offline {
            repo: repo.clone(),
            what: what.to_owned(),
            cache: self.http.settings.cache.clone(),
        };
        if self.http.settings.offline {
            return cached().ok_or_else(|| offline("this revision"));
        }
        let listing = match self.http.listing(repo, pin.unwrap_or(repo.revision())).await {
            Ok(listing) => listing,
            Err(error @ (HubError::Unreachable { .. } | HubError::Busy { .. })) => {
                let Some(snapshot) = cached() else { return Err(error) };
                say(&format!("{error}; taking what the cache has of `{repo}`, commit {}", snapshot.commit));
                return Ok(snapshot);
            }
            Err(error) => return Err(error),
        };
        if let Some(pin) = pin.filter(|pin| *pin != listing.commit) {
            let host = self.http.settings.endpoint.clone();
            let message = format!("it answers with commit {} for commit {pin}", listing.commit);
            return Err(HubError::Answer { host, message });
        }
        cache.note_listing(&listing)?;
        if !repo.is_pinned() && pin.is_none() {
            cache.note_commit(repo.revision(), &listing.commit)?;
        }
        Ok(Snapshot { commit: listing.commit.clone(), listing: Some(listing) })
    }

    /// Puts these files of a commit into its snapshot.
    async fn bring(
        &self,
        repo: &HubRepo,
        snapshot: &Snapshot,
        paths: &[&str],
        report: &mut Report<'_>,
    ) -> Result<(), HubError> {
        let cache = self.cache(repo);
        let missing = paths.iter().find(|path| !cache.has(&snapshot.commit, path));
        let Some(first) = missing else { return Ok(()) };
        let offline = || HubError::Offline {
            repo: repo.clone(),
            what: format!("`{first}`"),
            cache: self.http.settings.cache.clone(),
        };
        let Some(listing) = &snapshot.listing else { return Err(offline()) };
        let entries: Vec<&Entry> = listing.files.iter().filter(|entry| paths.contains(&entry.path.as_str())).collect();
        if let Some(unknown) = paths.iter().find(|path| !entries.iter().any(|entry| entry.path == **path)) {
            let message = format!("it has no file `{unknown}`, which another of its files names");
            return Err(HubError::Unusable { repo: repo.clone(), message });
        }
        let has_bytes = |entry: &&Entry| cache.blob(&entry.digest).is_file();
        if self.http.settings.offline && !entries.iter().all(has_bytes) {
            return Err(offline());
        }
        self.fetching(repo, &snapshot.commit).files(&entries, report).await
    }

    /// Fetches a model, as far as the cache lacks it. Returns its folder and the commit.
    ///
    /// # Errors
    /// [`HubError`].
    pub async fn model(
        &self,
        repo: &HubRepo,
        pin: Option<&str>,
        part: Part,
        say: &mut Say<'_>,
        report: &mut Report<'_>,
    ) -> Result<(PathBuf, String), HubError> {
        let unusable = |message: String| HubError::Unusable { repo: repo.clone(), message };
        let snapshot = self.snapshot(repo, pin, say).await?;
        let cache = self.cache(repo);
        let commit = snapshot.commit.clone();
        let folder = cache.snapshot(&commit);
        let paths = self.paths(repo, &snapshot);
        let names = || paths.iter().map(String::as_str);
        let weights = weights_of_model(names()).map_err(unusable)?;
        let texts = texts_of_model(names());
        self.bring(repo, &snapshot, &texts, report).await?;
        if snapshot.listing.is_none() {
            say(&format!(
                "another program brought `{repo}` into the cache; whether it brought all of its files is not known while the hub \
                 cannot be asked"
            ));
        }
        let (listed, weights) = match weights {
            Weights::Whole => (Vec::new(), vec![WHOLE.to_owned()]),
            Weights::Indexed => {
                // The index alone would make the folder one whose weights are missing.
                let text = self.index(repo, &snapshot, report).await?;
                (vec![INDEX.to_owned()], indexed(&text).map_err(unusable)?)
            }
        };
        let mut wanted: Vec<&str> = weights.iter().map(String::as_str).collect();
        let is_there = || wanted.iter().all(|path| self.has(&snapshot, &cache, path));
        if part == Part::Texts && !is_there() {
            return Ok((folder, commit));
        }
        wanted.extend(listed.iter().map(String::as_str));
        self.bring(repo, &snapshot, &wanted, report).await?;
        Ok((folder, commit))
    }

    /// Fetches files of a data set, as far as the cache lacks them. Returns the path of a source and the commit.
    ///
    /// # Errors
    /// [`HubError`].
    pub async fn data(
        &self,
        data: &HubData,
        pin: Option<&str>,
        say: &mut Say<'_>,
        report: &mut Report<'_>,
    ) -> Result<(PathBuf, String), HubError> {
        let snapshot = self.snapshot(&data.repo, pin, say).await?;
        let paths = self.paths(&data.repo, &snapshot);
        let names: Vec<&str> = paths.iter().map(String::as_str).collect();
        let chosen = data_files(&names, &data.path)
            .map_err(|message| HubError::Unusable { repo: data.repo.clone(), message })?;
        let wanted: Vec<&str> = chosen.files.iter().map(String::as_str).collect();
        self.bring(&data.repo, &snapshot, &wanted, report).await?;
        Ok((self.cache(&data.repo).snapshot(&snapshot.commit).join(&chosen.source), snapshot.commit))
    }

    /// The files of a commit.
    fn paths(&self, repo: &HubRepo, snapshot: &Snapshot) -> Vec<String> {
        match &snapshot.listing {
            Some(listing) => listing.files.iter().map(|entry| entry.path.clone()).collect(),
            None => self.cache(repo).files(&snapshot.commit),
        }
    }

    /// Whether the bytes of a file are here.
    fn has(&self, snapshot: &Snapshot, cache: &RepoCache, path: &str) -> bool {
        let entry = snapshot.listing.iter().flat_map(|listing| &listing.files).find(|entry| entry.path == path);
        match entry {
            Some(entry) => fs::metadata(cache.blob(&entry.digest)).is_ok_and(|blob| blob.len() == entry.bytes),
            None => cache.has(&snapshot.commit, path),
        }
    }

    /// The text of the index of weights, which does not get into the snapshot yet.
    async fn index(&self, repo: &HubRepo, snapshot: &Snapshot, report: &mut Report<'_>) -> Result<String, HubError> {
        let cache = self.cache(repo);
        let entry = snapshot.listing.iter().flat_map(|listing| &listing.files).find(|entry| entry.path == INDEX);
        let path = match entry {
            Some(entry) => {
                if !self.has(snapshot, &cache, INDEX) {
                    self.fetching(repo, &snapshot.commit).bytes(&[entry], report).await?;
                }
                cache.blob(&entry.digest)
            }
            None => cache.snapshot(&snapshot.commit).join(INDEX),
        };
        fs::read_to_string(&path).map_err(HubError::file("read", &path))
    }
}

/// What is done with a sentence for people.
pub(crate) type Say<'a> = dyn FnMut(&str) + 'a;

/// Turns names of the hub into paths, with what was chosen said. Asks the environment for settings when the first name needs them.
pub struct Resolver<'a> {
    hub: Option<(Hub, tokio::runtime::Runtime)>,
    settings: Box<dyn Fn() -> Result<Settings, HubError> + 'a>,
    pins: Pins,
    say: &'a mut Say<'a>,
    report: &'a mut Report<'a>,
    said: BTreeSet<String>,
}

impl<'a> Resolver<'a> {
    /// A resolver with the settings of the environment. `pins` are the commits that a run has begun with; `say` gets sentences, and
    /// `report` the progress of downloads.
    pub fn new(pins: Pins, say: &'a mut dyn FnMut(&str), report: &'a mut dyn FnMut(&Progress)) -> Self {
        Self { hub: None, settings: Box::new(Settings::from_env), pins, say, report, said: BTreeSet::new() }
    }

    /// The commits that were used, those that were given included.
    #[must_use]
    pub fn into_pins(mut self) -> Pins {
        std::mem::take(&mut self.pins)
    }

    /// The folder of a model: the path itself where there is one or it can be no name of the hub, else what the hub has.
    ///
    /// # Errors
    /// [`HubError`].
    pub fn model(&mut self, path: &Path, part: Part) -> Result<PathBuf, HubError> {
        let Some(repo) = HubRepo::of_model(path) else { return Ok(path.to_owned()) };
        if path.exists() && !HubRepo::is_explicit(path) {
            self.say_once(format!(
                "model `{0}` is the folder of that name; hf://{0} would be the hub's",
                path.display()
            ));
            return Ok(path.to_owned());
        }
        let repo = repo.map_err(HubError::Name)?;
        let pin = self.pins.commit(&repo).map(str::to_owned);
        self.open()?;
        let Some((hub, runtime)) = &self.hub else { return Ok(path.to_owned()) };
        let (folder, commit) = runtime.block_on(hub.model(&repo, pin.as_deref(), part, self.say, self.report))?;
        self.pins.add(&repo, &commit);
        self.say_once(format!("model `{repo}` of the hub: commit {commit}, in {}", folder.display()));
        Ok(folder)
    }

    /// The path of a source: the path itself where it is none of the hub.
    ///
    /// # Errors
    /// [`HubError`].
    pub fn data(&mut self, path: &Path) -> Result<PathBuf, HubError> {
        let Some(data) = HubData::of_source(path) else { return Ok(path.to_owned()) };
        let data = data.map_err(HubError::Name)?;
        let pin = self.pins.commit(&data.repo).map(str::to_owned);
        self.open()?;
        let Some((hub, runtime)) = &self.hub else { return Ok(path.to_owned()) };
        let (source, commit) = runtime.block_on(hub.data(&data, pin.as_deref(), self.say, self.report))?;
        self.pins.add(&data.repo, &commit);
        self.say_once(format!("data `{data}` of the hub: commit {commit}, {}", source.display()));
        Ok(source)
    }

    fn open(&mut self) -> Result<(), HubError> {
        if self.hub.is_none() {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.map_err(|error| HubError::Setting {
                what: "start a runtime".to_owned(),
                message: error.to_string(),
            })?;
            self.hub = Some((Hub::new((self.settings)()?)?, runtime));
        }
        Ok(())
    }

    fn say_once(&mut self, text: String) {
        if self.said.insert(text.clone()) {
            (self.say)(&text);
        }
    }
}

impl Drop for Resolver<'_> {
    fn drop(&mut self) {
        if let Some((_, runtime)) = self.hub.take() {
            // The system may still resolve the name of an abandoned host.
            runtime.shutdown_background();
        }
    }
}

/// A name of the hub for which there is no path.
#[derive(Debug, thiserror::Error)]
#[error("{doing}: {error}")]
pub struct Unresolved {
    /// What was tried, for people: `find model ...`.
    pub doing: String,
    /// Why it failed.
    pub error: Box<HubError>,
}

impl Unresolved {
    /// `path` is the model's, as it was given.
    #[must_use]
    pub fn model(path: &Path, error: HubError) -> Self {
        let is_folder_or_explicit = HubRepo::is_explicit(path) || HubRepo::of_model(path).is_none();
        let but = if is_folder_or_explicit { "" } else { ", which is no folder here" };
        Self { doing: format!("find model `{}`{but}", path.display()), error: Box::new(error) }
    }

    /// A set of problems of a job.
    #[must_use]
    pub fn problems(error: HubError) -> Self {
        Self { doing: "find the job's problems".to_owned(), error: Box::new(error) }
    }
}

/// Turns all names of the hub in a job into paths of this machine: its model, and the sets of problems that it reads.
///
/// # Errors
/// [`Unresolved`], for the first name that cannot be had.
pub fn resolve_job(spec: &mut JobSpec, part: Part, resolver: &mut Resolver<'_>) -> Result<(), Unresolved> {
    let found = resolver.model(&spec.model.path, part);
    spec.model.path = found.map_err(|error| Unresolved::model(&spec.model.path, error))?;
    resolve_sources(spec, resolver).map_err(Unresolved::problems)
}

/// Turns the names of the hub in a job's sets of problems into paths of this machine, for those sets that it reads.
///
/// # Errors
/// [`HubError`], for the first name that cannot be had.
pub fn resolve_sources(spec: &mut JobSpec, resolver: &mut Resolver<'_>) -> Result<(), HubError> {
    let mut paths: Vec<&mut Option<PathBuf>> = Vec::new();
    // A job that only evaluates names what it would train on, and never reads it.
    if !spec.evaluation.only {
        paths.push(&mut spec.data.train.path);
        paths.extend(spec.data.mix.values_mut().map(|source| &mut source.path));
    }
    paths.extend(spec.data.evaluation.iter_mut().map(|source| &mut source.path));
    paths.extend(spec.evaluation.sets.values_mut().map(|set| &mut set.path));
    for path in paths.into_iter().flatten() {
        *path = resolver.data(path)?;
    }
    Ok(())
}
