//! Run folders: journal, checkpoints, archive and records of a run that was killed, with one file changed. An input is the
//! number of the file and the seed of the change.
#![allow(unreachable_pub, reason = "the fuzzer's crate and tests include this file")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use pacs_types::mix;
use tokio::runtime::Runtime;

use crate::calls::{self, Any, Known};
use crate::mutate;
use crate::support::{Fleet, Job, until};

/// A run that was killed after two steps, with work in flight, and its files with their content. All starts are in its folder:
/// a journal belongs to its job spec, which names the folder.
struct Template {
    job: Job,
    files: Vec<(PathBuf, Vec<u8>)>,
}

pub fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime")
    })
}

fn template() -> &'static Template {
    static TEMPLATE: OnceLock<Template> = OnceLock::new();
    TEMPLATE.get_or_init(|| {
        let job = Job::new();
        runtime().block_on(async {
            let coordinator = job.start(4, "").await.unwrap();
            let mut events = coordinator.events();
            let fleet = Fleet::start(coordinator.address(), None);
            let is_saved =
                |event: &pacs_coordinator::Progress| matches!(event, pacs_coordinator::Progress::Saved { step: 2, .. });
            until(&mut events, is_saved).await;
            let services = coordinator.services();
            let (mut any, mut known) = (Any::Seed(mix(1)), Known::default());
            for _ in 0..100 {
                calls::call(&services, &mut any, &mut known).await;
            }
            drop(fleet);
        });
        let mut files = files_of(&job.run_dir());
        files.sort();
        // One that is gone by now belonged to the coordinator that ends.
        let files = files.into_iter().filter_map(|path| Some((path.clone(), fs::read(path).ok()?))).collect();
        Template { job, files }
    })
}

fn files_of(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(files_of(&path));
        } else {
            files.push(path);
        }
    }
    files
}

pub fn examples() -> Vec<Vec<u8>> {
    (0..template().files.len()).map(|file| vec![file as u8, 0, 0]).collect()
}

/// A start in the folder resumes the run, or says what is wrong with it.
pub fn check(bytes: &[u8]) {
    let [file, seed @ ..] = bytes else { return };
    let Template { job, files } = template();
    let (changed, _) = &files[usize::from(*file) % files.len()];
    // The coordinator of the last input may still be writing its last file.
    assert!((0..1000).any(|_| fs::remove_dir_all(job.run_dir()).is_ok() || !job.run_dir().exists()));
    for (path, content) in files {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let mut content = content.clone();
        if path == changed {
            let seed = seed.iter().fold(0, |seed, byte| mix(seed ^ u64::from(*byte)));
            let mut any = mutate::Any::new(seed);
            (0..=any.below(3)).for_each(|_| any.change(&mut content));
        }
        fs::write(path, content).unwrap();
    }
    runtime().block_on(async {
        let started = tokio::time::timeout(crate::support::PATIENCE, job.start(4, "")).await;
        match started.expect("a start ends in time") {
            Ok(coordinator) => drop(coordinator),
            Err(error) => assert!(!error.to_string().is_empty(), "{}", changed.display()),
        }
    });
}
