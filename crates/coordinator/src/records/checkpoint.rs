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

/// Format of the manifest.
const FORMAT: u32 = 1;
const MANIFEST: &str = "manifest.json";
/// What names of folders that are no checkpoints yet begin with; readers skip names that start with a dot.
const UNFINISHED: &str = ".unfinished-";
/// Likewise for folders that are to be removed.
const DISCARDED: &str = ".discarded-";

/// What a checkpoint is: written last, so that a folder without it is none.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) format: u32,
    /// Version of the program that wrote it.
    pub(crate) version: String,
    /// Training steps done.
    pub(crate) step: u64,
    /// Where the job stands.
    pub(crate) snapshot: Snapshot,
    /// The folder holds the exported model.
    pub(crate) model: bool,
    /// The resolved job spec, as TOML: JSON readers round floating-point numbers.
    pub(crate) spec: String,
    /// What each rank wrote.
    pub(crate) files: BTreeMap<u32, Vec<RankFile>>,
}

impl Manifest {
    pub(crate) fn new(snapshot: Snapshot, model: bool, spec: &JobSpec, files: BTreeMap<u32, Vec<RankFile>>) -> Self {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Self { format: FORMAT, version, step: snapshot.step, snapshot, model, spec: spec.resolved_toml(), files }
    }
}

/// A file that a rank wrote.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RankFile {
    /// Relative to the checkpoint's folder.
    pub(crate) path: String,
    pub(crate) bytes: u64,
    pub(crate) crc32: u32,
}

/// Which checkpoints stay.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Retention {
    /// So many of the newest; at least one does.
    pub(crate) newest: usize,
    /// And so many of the best.
    pub(crate) best: usize,
    /// What evaluations said of steps; the larger the better.
    pub(crate) scores: Vec<(u64, f64)>,
}

impl Retention {
    /// Those of `steps`, ascending, that stay.
    fn kept(&self, steps: &[u64]) -> Vec<u64> {
        let mut kept: Vec<u64> = steps.iter().rev().take(self.newest.max(1)).copied().collect();
        let mut best: Vec<(u64, f64)> = self.scores.iter().filter(|(step, _)| steps.contains(step)).copied().collect();
        // Of equals the later one, which has seen more.
        best.sort_by(|a, b| b.1.total_cmp(&a.1).then(b.0.cmp(&a.0)));
        best.dedup_by_key(|(step, _)| *step);
        kept.extend(best.into_iter().take(self.best).map(|(step, _)| step));
        kept
    }
}

/// Bytes of a checkpoint that are read back before it counts. A larger one counts when its headers do, and is read back by the
/// sweeper, for minutes perhaps; until then the ones before it stay.
const READ_AT_ONCE: u64 = 2 << 30;

/// The checkpoints of a run.
#[derive(Clone, Debug)]
pub(crate) struct Checkpoints {
    folder: PathBuf,
    /// What each of them has to hold; none where the model is not known.
    coverage: Option<Coverage>,
    read_at_once: u64,
    unread: Arc<Mutex<Option<Unread>>>,
}

/// A checkpoint that is to be read back before those are discarded that need not stay beside it.
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

    /// The same, where each has to hold this.
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

    /// Folder that ranks write into for a save. Each save has its own: a rank that comes back from the dead in the middle of
    /// an earlier one cannot write into this one.
    pub(crate) fn unfinished(&self, step: u64, save: u64) -> PathBuf {
        self.folder.join(format!("{UNFINISHED}{step:06}-{save}"))
    }

    /// Makes an empty folder for the ranks' files, and discards what earlier saves have left unfinished. One that is there
    /// already is this very save's: an earlier coordinator made it, and ranks may have written into it.
    pub(crate) fn create(&self, step: u64, save: u64) -> Result<(), FileError> {
        let path = self.unfinished(step, save);
        let entries = fs::read_dir(&self.folder).map_err(FileError::file("list folder", &self.folder))?;
        for entry in entries.filter_map(Result::ok) {
            // Somebody may still write there: then it ends in an error, for its folder is gone.
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

    /// Takes a folder out of the way: it is renamed at once, and removed when there is time
    /// ([`Sweeper`](super::sweep::Sweeper)). One that is not there is none.
    fn discard(&self, path: &Path) -> Result<(), FileError> {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let free = (0u32..).map(|n| self.folder.join(format!("{DISCARDED}{}-{n}", name.trim_start_matches('.'))));
        let Some(free) = free.into_iter().find(|path| !path.exists()) else { return Ok(()) };
        match fs::rename(path, free) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(FileError::file("rename", path)(error)),
            _ => Ok(()),
        }
    }

    /// Folders that are to be removed, those that an earlier coordinator has left included.
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

    /// Makes what the ranks have written a checkpoint, and discards those that need not stay. Nothing is renamed unless the
    /// run folder is still this coordinator's.
    pub(crate) fn commit(
        &self,
        manifest: &Manifest,
        save: u64,
        retention: &Retention,
        epoch: &Epoch,
    ) -> Result<PathBuf, FileError> {
        let unfinished = self.unfinished(manifest.step, save);
        // An earlier coordinator may have come this far and not lived to say so.
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

        epoch.check()?;
        let committed = self.path(manifest.step);
        // The same step again, now with the exported model. Readers skip names that start with a dot.
        let replaced = self.replaced(manifest.step);
        self.discard(&replaced)?;
        if committed.exists() {
            fs::rename(&committed, &replaced).map_err(FileError::file("rename", &committed))?;
        }
        fs::rename(&unfinished, &committed).map_err(FileError::file("rename", &unfinished))?;
        sync_folder(&self.folder).map_err(FileError::file("sync folder", &self.folder))?;
        // It is a checkpoint now, whatever becomes of the ones before it.
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

    /// Where the checkpoint of a step lies that another one of it takes the place of.
    fn replaced(&self, step: u64) -> PathBuf {
        self.folder.join(format!(".replaced-{step:06}"))
    }

    fn unread(&self) -> MutexGuard<'_, Option<Unread>> {
        self.unread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads back what was committed and is not read yet, and discards those that need not stay beside it. One that cannot be
    /// read back takes nobody's place.
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

    /// The newest checkpoint that is whole, and what is wrong with newer ones. Those are put aside under another
    /// name, so that they neither come up again nor count among those that are kept.
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

    /// A commit that was interrupted between its two renames has left the old folder under its dotted name.
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

    /// Reads a manifest and checks every file against it.
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

/// Reads every file of a checkpoint and compares it with what its rank has said.
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

/// A path that a rank reported, as long as it stays in the folder.
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
    fn the_best_stay_beside_the_newest() {
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
            assert_eq!(checkpoints.steps().unwrap(), [1], "the damaged one is put aside");
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
    fn a_save_that_holds_nothing_takes_nobodys_place() {
        let folder = tempfile::tempdir().unwrap();
        let config = pacs_shape::ModelConfig::read(
            &Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/qwen2-tied"),
        );
        let coverage = Coverage::new(&spec(), &config.unwrap());
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
        // One that is too large to be read at once counts, and is read by the sweeper.
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
