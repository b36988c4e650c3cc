use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pacs_machine::Snapshot;
use pacs_spec::JobSpec;
use serde::{Deserialize, Serialize};

use super::atomic::{sync_folder, write_atomically};
use super::{Coverage, Epoch};
use crate::FileError;

/// Version of the manifest format.
const FORMAT: u32 = 1;
const MANIFEST: &str = "manifest.json";
/// Prefix of folders that are not checkpoints yet; readers skip names that start with a dot.
const UNFINISHED: &str = ".unfinished-";
/// Prefix of folders that are to be removed, skipped likewise.
const DISCARDED: &str = ".discarded-";

/// Description of a checkpoint. It is written last, so a folder without it is no checkpoint.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) format: u32,
    /// Version of the program that wrote it.
    pub(crate) version: String,
    /// Training steps done.
    pub(crate) step: u64,
    /// Position of the job.
    pub(crate) snapshot: Snapshot,
    /// Whether the folder contains the exported model.
    pub(crate) model: bool,
    /// The resolved job spec, as TOML: JSON readers round floating-point numbers.
    pub(crate) spec: String,
    /// Files by the rank that wrote them.
    pub(crate) files: BTreeMap<u32, Vec<RankFile>>,
}

impl Manifest {
    pub(crate) fn new(snapshot: Snapshot, model: bool, spec: &JobSpec, files: BTreeMap<u32, Vec<RankFile>>) -> Self {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Self { format: FORMAT, version, step: snapshot.step, snapshot, model, spec: spec.resolved_toml(), files }
    }
}

/// A file as its rank reported it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RankFile {
    /// Path relative to the checkpoint's folder.
    pub(crate) path: String,
    pub(crate) bytes: u64,
    pub(crate) crc32: u32,
}

/// Which checkpoints are kept.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Retention {
    /// Number of newest checkpoints; at least one is kept.
    pub(crate) newest: usize,
    /// Number of best checkpoints that are kept in addition.
    pub(crate) best: usize,
    /// Evaluation scores by step; larger is better.
    pub(crate) scores: Vec<(u64, f64)>,
}

impl Retention {
    /// The steps that are kept, out of `steps` in ascending order.
    fn kept(&self, steps: &[u64]) -> Vec<u64> {
        let mut kept: Vec<u64> = steps.iter().rev().take(self.newest.max(1)).copied().collect();
        let mut best: Vec<(u64, f64)> = self.scores.iter().filter(|(step, _)| steps.contains(step)).copied().collect();
        // Of equal scores the later step wins, because it was trained for longer.
        best.sort_by(|a, b| b.1.total_cmp(&a.1).then(b.0.cmp(&a.0)));
        best.dedup_by_key(|(step, _)| *step);
        kept.extend(best.into_iter().take(self.best).map(|(step, _)| step));
        kept
    }
}

/// Size up to which a checkpoint is read back before it counts. A larger one counts once its headers do, and the
/// sweeper reads it back, perhaps for minutes; until then earlier checkpoints are kept.
const READ_AT_ONCE: u64 = 2 << 30;

/// The folder of a run's checkpoints.
#[derive(Clone, Debug)]
pub(crate) struct Checkpoints {
    folder: PathBuf,
    /// Required content of each checkpoint; `None` if the model is not known.
    coverage: Option<Coverage>,
    read_at_once: u64,
    unread: Arc<Mutex<Option<Unread>>>,
}

/// A checkpoint that has to be read back before older ones are discarded.
#[derive(Clone, Debug)]
struct Unread {
    step: u64,
    retention: Retention,
}

impl Checkpoints {
    pub(crate) fn open(run_dir: &Path) -> Result<Self, FileError> {
        let folder = run_dir.join("checkpoints");
        fs::create_dir_all(&folder).map_err(FileError::file("create folder", &folder))?;
        Ok(Self { folder, coverage: None, read_at_once: READ_AT_ONCE, unread: Arc::default() })
    }

    /// The same, with a required content for each checkpoint.
    pub(crate) fn holding(self, coverage: Option<Coverage>) -> Self {
        Self { coverage, ..self }
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Folder of the committed checkpoint of a step.
    pub(crate) fn path(&self, step: u64) -> PathBuf {
        self.folder.join(format!("step-{step:06}"))
    }

    /// Folder that ranks write into for a save. Each save has its own, so that a rank that returns from an earlier one
    /// cannot write into this one.
    pub(crate) fn unfinished(&self, step: u64, save: u64) -> PathBuf {
        self.folder.join(format!("{UNFINISHED}{step:06}-{save}"))
    }

    /// Creates an empty folder for the ranks' files, and discards what earlier saves have left. If it exists, an
    /// earlier coordinator created it for this same save, and ranks may have written into it, so it is kept.
    pub(crate) fn create(&self, step: u64, save: u64) -> Result<(), FileError> {
        let path = self.unfinished(step, save);
        let entries = fs::read_dir(&self.folder).map_err(FileError::file("list folder", &self.folder))?;
        for entry in entries.filter_map(Result::ok) {
            // A rank that still writes there gets an error, because its folder is gone.
            if entry.file_name().to_str().is_some_and(|name| name.starts_with(UNFINISHED))
                && entry.path() != path
                && let Err(error) = self.discard(&entry.path())
            {
                tracing::warn!("an unfinished checkpoint stays for now: {error}");
            }
        }
        match fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(FileError::file("create folder", &path)(error))
            }
            _ => Ok(()),
        }
    }

    /// Moves a folder out of the way: it is renamed at once, and removed later by the
    /// [`Sweeper`](super::sweep::Sweeper). A missing folder is no error.
    fn discard(&self, path: &Path) -> Result<(), FileError> {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let free = (0u32..).map(|n| self.folder.join(format!("{DISCARDED}{}-{n}", name.trim_start_matches('.'))));
        let Some(free) = free.into_iter().find(|path| !path.exists()) else { return Ok(()) };
        match fs::rename(path, free) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(FileError::file("rename", path)(error)),
            _ => Ok(()),
        }
    }

    /// Folders to be removed, including those that an earlier coordinator left.
    pub(crate) fn discarded(&self) -> io::Result<Vec<PathBuf>> {
        let mut discarded = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            if entry.file_name().to_str().is_some_and(|name| name.starts_with(DISCARDED)) {
                discarded.push(entry.path());
            }
        }
        Ok(discarded)
    }

    /// Turns the ranks' files into a checkpoint, and discards older ones that need not be kept. Nothing is renamed
    /// unless the run folder is still this coordinator's.
    pub(crate) fn commit(
        &self,
        manifest: &Manifest,
        save: u64,
        retention: &Retention,
        epoch: &Epoch,
    ) -> Result<PathBuf, FileError> {
        let unfinished = self.unfinished(manifest.step, save);
        // An earlier coordinator may have committed it and died before it could report that.
        if !unfinished.exists()
            && let Ok(found) = self.read(manifest.step)
            && found.model == manifest.model
            && found.files == manifest.files
        {
            return Ok(self.path(manifest.step));
        }
        for file in manifest.files.values().flatten() {
            let path = inside(&unfinished, &file.path)?;
            let open = File::open(&path).map_err(FileError::file("open", &path))?;
            let bytes = open.metadata().map_err(FileError::file("read size of", &path))?.len();
            if bytes != file.bytes {
                let problem = format!("has {bytes} bytes, its rank reported {}", file.bytes);
                return Err(FileError::damaged(&path, problem));
            }
            // Ranks report their files as durable, but that is a claim, so they are synced again.
            open.sync_all().map_err(FileError::file("sync", &path))?;
            let folder = path.parent().unwrap_or(&unfinished);
            sync_folder(folder).map_err(FileError::file("sync folder", folder))?;
        }
        if let Some(coverage) = &self.coverage {
            coverage.check(&unfinished, manifest)?;
        }
        let bytes: u64 = manifest.files.values().flatten().map(|file| file.bytes).sum();
        let is_small = bytes <= self.read_at_once;
        if is_small {
            check_content(&unfinished, manifest)?;
        }
        let text = serde_json::to_string_pretty(manifest).expect("a manifest is JSON");
        let path = unfinished.join(MANIFEST);
        write_atomically(&path, |file| file.write_all(text.as_bytes())).map_err(FileError::file("write", &path))?;

        // The last check before the renames: a fenced coordinator may have come this far.
        epoch.check()?;
        let committed = self.path(manifest.step);
        // The same step may be committed again with the exported model. Readers skip names that start with a dot.
        let replaced = self.replaced(manifest.step);
        // A leftover of an interrupted commit would block the rename below.
        self.discard(&replaced)?;
        if committed.exists() {
            fs::rename(&committed, &replaced).map_err(FileError::file("rename", &committed))?;
        }
        fs::rename(&unfinished, &committed).map_err(FileError::file("rename", &unfinished))?;
        sync_folder(&self.folder).map_err(FileError::file("sync folder", &self.folder))?;
        // From here on it is a checkpoint, even if pruning older ones fails.
        let pruned = match is_small {
            true => self.discard(&replaced).and_then(|()| self.prune(manifest.step, retention)),
            false => {
                let unread = Unread { step: manifest.step, retention: retention.clone() };
                *self.unread() = Some(unread);
                Ok(())
            }
        };
        if let Err(error) = pruned {
            tracing::warn!("older checkpoints were not removed: {error}");
        }
        Ok(committed)
    }

    /// Temporary folder of a checkpoint that is being replaced by another one of the same step.
    fn replaced(&self, step: u64) -> PathBuf {
        self.folder.join(format!(".replaced-{step:06}"))
    }

    fn unread(&self) -> MutexGuard<'_, Option<Unread>> {
        self.unread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads back the checkpoint that was committed unread, and then discards older ones. If it cannot be read back, no
    /// other checkpoint is discarded.
    pub(super) fn read_back(&self) {
        let Some(Unread { step, retention }) = self.unread().take() else { return };
        let pruned = match self.read(step) {
            Ok(_) => self.discard(&self.replaced(step)).and_then(|()| self.prune(step, &retention)),
            Err(damage) => {
                return tracing::error!("the checkpoint of step {step} is damaged, older ones stay: {damage}");
            }
        };
        if let Err(error) = pruned {
            tracing::warn!("older checkpoints were not removed: {error}");
        }
    }

    fn prune(&self, newest: u64, retention: &Retention) -> Result<(), FileError> {
        let mut steps = self.steps()?;
        // A newer checkpoint may have been committed while this one was read back.
        steps.retain(|step| *step <= newest);
        let kept = retention.kept(&steps);
        steps.iter().filter(|step| !kept.contains(step)).try_for_each(|step| self.discard(&self.path(*step)))
    }

    /// Steps of the committed checkpoints, ascending.
    pub(crate) fn steps(&self) -> Result<Vec<u64>, FileError> {
        let mut steps = Vec::new();
        let entries = fs::read_dir(&self.folder).map_err(FileError::file("list folder", &self.folder))?;
        for entry in entries {
            let entry = entry.map_err(FileError::file("list folder", &self.folder))?;
            let name = entry.file_name();
            steps.extend(name.to_str().and_then(|name| name.strip_prefix("step-")?.parse::<u64>().ok()));
        }
        steps.sort_unstable();
        Ok(steps)
    }

    /// The newest valid checkpoint, and the damage of newer ones. Those are renamed, so that they are neither found
    /// again nor counted among the checkpoints to keep.
    pub(crate) fn newest_valid(&self) -> Result<(Option<Manifest>, Vec<FileError>), FileError> {
        self.restore_interrupted_replacement()?;
        let mut damages = Vec::new();
        for step in self.steps()?.into_iter().rev() {
            match self.read(step) {
                Ok(manifest) => {
                    self.put_aside(step)?;
                    return Ok((Some(manifest), damages));
                }
                Err(damage) => damages.push(damage),
            }
        }
        Ok((None, damages))
    }

    /// Restores the old folder of a commit that was interrupted between its two renames.
    fn restore_interrupted_replacement(&self) -> Result<(), FileError> {
        let entries = fs::read_dir(&self.folder).map_err(FileError::file("list folder", &self.folder))?;
        for name in entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()) {
            let Some(step) = name.strip_prefix(".replaced-").and_then(|step| step.parse::<u64>().ok()) else {
                continue;
            };
            let (replaced, committed) = (self.folder.join(&name), self.path(step));
            match committed.exists() {
                true => self.discard(&replaced)?,
                false => fs::rename(&replaced, &committed).map_err(FileError::file("rename", &replaced))?,
            }
        }
        Ok(())
    }

    fn put_aside(&self, newest_valid: u64) -> Result<(), FileError> {
        for step in self.steps()?.into_iter().filter(|step| *step > newest_valid) {
            let path = self.path(step);
            let aside = self.folder.join(format!("damaged-{step:06}"));
            self.discard(&aside)?;
            fs::rename(&path, &aside).map_err(FileError::file("rename", &path))?;
        }
        Ok(())
    }

    /// Reads a manifest and verifies every file against it.
    fn read(&self, step: u64) -> Result<Manifest, FileError> {
        let folder = self.path(step);
        let path = folder.join(MANIFEST);
        let text = fs::read_to_string(&path).map_err(|error| FileError::damaged(&path, error.to_string()))?;
        let manifest: Manifest =
            serde_json::from_str(&text).map_err(|error| FileError::damaged(&path, error.to_string()))?;
        if manifest.format != FORMAT || manifest.step != step {
            let problem = format!("says format {} and step {}", manifest.format, manifest.step);
            return Err(FileError::damaged(&path, problem));
        }
        if let Some(coverage) = &self.coverage {
            coverage.check(&folder, &manifest)?;
        }
        check_content(&folder, &manifest)?;
        Ok(manifest)
    }
}

/// Reads every file of a checkpoint, and compares it with what its rank reported.
fn check_content(folder: &Path, manifest: &Manifest) -> Result<(), FileError> {
    for file in manifest.files.values().flatten() {
        let path = inside(folder, &file.path)?;
        let (bytes, crc32) = checksum(&path).map_err(|error| FileError::damaged(&path, error.to_string()))?;
        if (bytes, crc32) != (file.bytes, file.crc32) {
            let problem = format!(
                "has {bytes} bytes with CRC-32 {crc32:08x}, the manifest says {} bytes with {:08x}",
                file.bytes, file.crc32
            );
            return Err(FileError::damaged(&path, problem));
        }
    }
    Ok(())
}

/// A reported path below `folder`; an error if it points outside.
fn inside(folder: &Path, relative: &str) -> Result<PathBuf, FileError> {
    let is_inside = Path::new(relative).components().all(|part| matches!(part, Component::Normal(_)));
    if relative.is_empty() || !is_inside {
        let problem = format!("lists file `{relative}`, which is not a relative path");
        return Err(FileError::damaged(folder, problem));
    }
    Ok(folder.join(relative))
}

fn checksum(path: &Path) -> io::Result<(u64, u32)> {
    let mut file = File::open(path)?;
    let mut hasher = crc32fast::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    let mut bytes = 0;
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok((bytes, hasher.finalize())),
            read => {
                hasher.update(&buffer[..read]);
                bytes += read as u64;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> JobSpec {
        let text = "name = 'test'\n[model]\npath = 'm'\n[data.train]\npath = 'x.jsonl'\n[evaluation]\nbefore = false\n\
                    after = false\nevery_steps = 0\n";
        pacs_spec::parse(text, Path::new("test")).unwrap()
    }

    fn epoch(checkpoints: &Checkpoints) -> Epoch {
        Epoch::take(checkpoints.folder().parent().unwrap()).unwrap()
    }

    fn save(checkpoints: &Checkpoints, step: u64, keep: usize, model: bool) -> PathBuf {
        checkpoints.create(step, 1).unwrap();
        fs::create_dir(checkpoints.unfinished(step, 1).join("sub")).unwrap();
        let content = format!("state of {step}");
        fs::write(checkpoints.unfinished(step, 1).join("sub/rank-0"), &content).unwrap();
        let crc32 = crc32fast::hash(content.as_bytes());
        let file = RankFile { path: "sub/rank-0".into(), bytes: content.len() as u64, crc32 };
        let snapshot = Snapshot { step, cursor: 10 * step, ..Snapshot::default() };
        let manifest = Manifest::new(snapshot, model, &spec(), BTreeMap::from([(0, vec![file])]));
        let retention = Retention { newest: keep, ..Retention::default() };
        checkpoints.commit(&manifest, 1, &retention, &epoch(checkpoints)).unwrap()
    }

    #[test]
    fn the_best_are_kept_besides_the_newest() {
        let kept = |newest, best, scores: &[(u64, f64)]| {
            let mut kept = Retention { newest, best, scores: scores.to_vec() }.kept(&[2, 4, 6, 8]);
            kept.sort_unstable();
            kept.dedup();
            kept
        };
        let scores = [(0, 0.9), (2, 0.3), (4, 0.5), (6, 0.5), (8, 0.1)];
        assert_eq!(kept(0, 0, &scores), [8], "one always does");
        assert_eq!(kept(1, 1, &scores), [6, 8], "of equals the later; step 0 has no checkpoint");
        assert_eq!(kept(1, 2, &scores), [4, 6, 8]);
        assert_eq!(kept(2, 1, &scores), [6, 8], "the newest may be the best");
        assert_eq!(kept(1, 1, &[(2, 0.1), (4, f64::NEG_INFINITY)]), [2, 8]);
        assert_eq!(kept(1, 3, &[]), [8]);
    }

    #[test]
    fn a_commit_removes_what_need_not_stay() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(folder.path()).unwrap();
        (1..=3).for_each(|step| drop(save(&checkpoints, step, 3, false)));
        checkpoints.create(4, 1).unwrap();
        let snapshot = Snapshot { step: 4, ..Snapshot::default() };
        let retention = Retention { newest: 1, best: 1, scores: vec![(1, 0.2), (2, 0.4), (3, 0.3)] };
        let manifest = Manifest::new(snapshot, false, &spec(), BTreeMap::new());
        checkpoints.commit(&manifest, 1, &retention, &epoch(&checkpoints)).unwrap();
        assert_eq!(checkpoints.steps().unwrap(), [2, 4]);
        assert_eq!(checkpoints.discarded().unwrap().len(), 2, "they are out of the way, and removed later");
    }

    #[test]
    fn the_newest_are_kept_and_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(folder.path()).unwrap();
        assert!(checkpoints.newest_valid().unwrap().0.is_none());
        (1..=4).for_each(|step| drop(save(&checkpoints, step, 2, false)));
        assert_eq!(checkpoints.steps().unwrap(), [3, 4]);
        save(&checkpoints, 4, 2, true);
        assert_eq!(checkpoints.steps().unwrap(), [3, 4]);
        let (newest, damages) = checkpoints.newest_valid().unwrap();
        let newest = newest.unwrap();
        assert!(damages.is_empty());
        assert_eq!((newest.step, newest.snapshot.cursor, newest.model), (4, 40, true));
        assert_eq!(newest.spec, spec().resolved_toml());
    }

    #[test]
    fn damage_is_found_and_the_one_before_is_used() {
        type Damage = fn(&Path);
        let damages: [(&str, Damage); 4] = [
            ("CRC-32", |folder| fs::write(folder.join("sub/rank-0"), "state of 9").unwrap()),
            ("bytes", |folder| fs::write(folder.join("sub/rank-0"), "").unwrap()),
            ("sub/rank-0", |folder| fs::remove_file(folder.join("sub/rank-0")).unwrap()),
            ("manifest", |folder| fs::write(folder.join(MANIFEST), "{").unwrap()),
        ];
        for (named, damage) in damages {
            let folder = tempfile::tempdir().unwrap();
            let checkpoints = Checkpoints::open(folder.path()).unwrap();
            save(&checkpoints, 1, 2, false);
            damage(&save(&checkpoints, 2, 2, false));
            let (newest, damages) = checkpoints.newest_valid().unwrap();
            assert_eq!(newest.unwrap().step, 1);
            assert!(damages.len() == 1 && damages[0].to_string().contains(named), "{damages:?}");
            assert_eq!(checkpoints.steps().unwrap(), [1], "the damaged one is set aside");
        }
    }

    #[test]
    fn a_commit_refuses_what_is_not_there_or_not_inside() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(folder.path()).unwrap();
        for path in ["gone", "../outside", "/etc/hostname", ""] {
            checkpoints.create(1, 1).unwrap();
            let file = RankFile { path: path.into(), bytes: 1, crc32: 0 };
            let manifest = Manifest::new(Snapshot::default(), false, &spec(), BTreeMap::from([(0, vec![file])]));
            let manifest = Manifest { step: 1, ..manifest };
            let refused = checkpoints.commit(&manifest, 1, &Retention::default(), &epoch(&checkpoints));
            assert!(refused.is_err(), "{path}");
        }
        assert_eq!(checkpoints.steps().unwrap(), [0u64; 0]);
    }

    #[test]
    fn an_empty_save_replaces_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let config = pacs_shape::ModelConfig::read(
            &Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/qwen2-tied"),
        );
        let config = config.unwrap();
        let coverage = Coverage::new(&spec(), &config, &config);
        let checkpoints = Checkpoints::open(folder.path()).unwrap();
        save(&checkpoints, 1, 1, false);
        let checkpoints = checkpoints.holding(Some(coverage));
        let empty = RankFile { path: "training-state.safetensors".into(), bytes: 0, crc32: 0 };
        for files in [BTreeMap::new(), BTreeMap::from([(0, vec![empty.clone()])]), BTreeMap::from([(0, Vec::new())])] {
            checkpoints.create(2, 1).unwrap();
            fs::write(checkpoints.unfinished(2, 1).join(&empty.path), "").unwrap();
            let manifest = Manifest::new(Snapshot { step: 2, ..Snapshot::default() }, false, &spec(), files);
            let retention = Retention { newest: 1, ..Retention::default() };
            let refused = checkpoints.commit(&manifest, 1, &retention, &epoch(&checkpoints)).unwrap_err();
            assert!(refused.is_damage(), "{refused}");
            assert_eq!(checkpoints.steps().unwrap(), [1]);
            assert!(checkpoints.discarded().unwrap().is_empty(), "nor is any removed");
        }
    }

    #[test]
    fn a_checksum_that_was_made_up_is_found_before_anything_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(folder.path()).unwrap();
        save(&checkpoints, 1, 1, false);
        let lied = |checkpoints: &Checkpoints, step: u64| {
            checkpoints.create(step, 1).unwrap();
            fs::write(checkpoints.unfinished(step, 1).join("rank-0"), "state").unwrap();
            let file = RankFile { path: "rank-0".into(), bytes: 5, crc32: 1 };
            let snapshot = Snapshot { step, ..Snapshot::default() };
            let manifest = Manifest::new(snapshot, false, &spec(), BTreeMap::from([(0, vec![file])]));
            let retention = Retention { newest: 1, ..Retention::default() };
            checkpoints.commit(&manifest, 1, &retention, &epoch(checkpoints))
        };
        let refused = lied(&checkpoints, 2).unwrap_err();
        assert!(refused.to_string().contains("CRC-32"), "{refused}");
        // A checkpoint that is too large to be read at once counts at first, and the sweeper reads it.
        let large = Checkpoints { read_at_once: 4, ..checkpoints };
        lied(&large, 3).unwrap();
        large.read_back();
        assert_eq!(large.steps().unwrap(), [1, 3]);
        save(&large, 4, 1, false);
        assert_eq!(large.steps().unwrap(), [1, 3, 4], "not yet");
        large.read_back();
        assert_eq!(large.steps().unwrap(), [4]);
    }

    #[test]
    fn an_interrupted_replacement_is_restored() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(folder.path()).unwrap();
        let path = save(&checkpoints, 7, 1, false);
        fs::rename(path, checkpoints.folder().join(".replaced-000007")).unwrap();
        assert_eq!(checkpoints.newest_valid().unwrap().0.unwrap().step, 7);
    }

    #[test]
    fn a_folder_of_this_very_save_stays_and_others_are_discarded() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(folder.path()).unwrap();
        checkpoints.create(3, 7).unwrap();
        fs::write(checkpoints.unfinished(3, 7).join("rank-0"), "state").unwrap();
        checkpoints.create(3, 7).unwrap();
        assert!(checkpoints.unfinished(3, 7).join("rank-0").exists(), "a rank may have written it already");
        for save in 8..11 {
            checkpoints.create(3, save).unwrap();
            assert!(!checkpoints.unfinished(3, save - 1).exists());
        }
        assert_eq!(checkpoints.discarded().unwrap().len(), 3);
    }

    #[test]
    fn a_fenced_coordinator_commits_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(folder.path()).unwrap();
        save(&checkpoints, 1, 2, false);
        let ours = epoch(&checkpoints);
        checkpoints.create(2, 1).unwrap();
        let manifest = Manifest::new(Snapshot { step: 2, ..Snapshot::default() }, false, &spec(), BTreeMap::new());
        epoch(&checkpoints);
        let refused = checkpoints.commit(&manifest, 1, &Retention::default(), &ours).unwrap_err();
        assert!(matches!(refused, FileError::Taken { .. }), "{refused}");
        assert_eq!(checkpoints.steps().unwrap(), [1]);
        assert!(checkpoints.discarded().unwrap().is_empty(), "nor does it remove any");
    }
}
