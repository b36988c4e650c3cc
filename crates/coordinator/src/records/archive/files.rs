//! The files of the archive, by name: single rounds, and merged files of many.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{fs, io};

use pacs_types::Purpose;

/// Rounds up to which neighbouring files are merged…
pub(super) const MERGED_ROUNDS: usize = 64;
/// …unless they reach this many bytes. A single round of that size remains a file of its own.
pub(super) const MERGED_BYTES: u64 = 256 << 20;

/// A file of the archive, with the rounds from its first to its last step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rounds {
    pub(super) first: u64,
    pub(super) last: u64,
    pub(super) bytes: u64,
    /// Whether it cannot be merged with its neighbours.
    pub(super) alone: bool,
}

/// The files of one purpose, by first step. They never overlap.
#[derive(Clone, Debug, Default)]
pub(super) struct Files(BTreeMap<u64, Rounds>);

pub(super) fn name(purpose: Purpose, first: u64, last: u64) -> String {
    let (one, many) = match purpose {
        Purpose::Train => ("step", "steps"),
        Purpose::Evaluate => ("eval", "evals"),
    };
    match first == last {
        true => format!("{one}-{first:06}.parquet"),
        false => format!("{many}-{first:06}-{last:06}.parquet"),
    }
}

pub(super) fn parse(name: &str) -> Option<(Purpose, u64, u64)> {
    let (kind, steps) = name.strip_suffix(".parquet")?.split_once('-')?;
    let (purpose, is_one) = match kind {
        "step" => (Purpose::Train, true),
        "steps" => (Purpose::Train, false),
        "eval" => (Purpose::Evaluate, true),
        "evals" => (Purpose::Evaluate, false),
        _ => return None,
    };
    let (first, last) = if is_one { (steps, steps) } else { steps.split_once('-')? };
    let (first, last) = (first.parse().ok()?, last.parse().ok()?);
    (first <= last).then_some((purpose, first, last))
}

/// Lists a folder: files of training, then those of evaluations. An interrupted merge leaves files whose rounds are
/// also in a merged file; those are removed.
pub(super) fn list(folder: &Path) -> io::Result<(Files, Files)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        if let Some((purpose, first, last)) = parse(name) {
            let rounds = Rounds { first, last, bytes: entry.metadata()?.len(), alone: false };
            found.push((purpose, rounds, entry.path()));
        } else if name.starts_with('.') && name.ends_with(".tmp") {
            fs::remove_file(entry.path())?;
        }
    }
    // Longest first: a merged file is complete, because it is renamed only then.
    found.sort_by_key(|(_, rounds, _)| (std::cmp::Reverse(rounds.last - rounds.first), rounds.first));
    let (mut train, mut evaluate) = (Files::default(), Files::default());
    for (purpose, rounds, path) in found {
        let files = match purpose {
            Purpose::Train => &mut train,
            Purpose::Evaluate => &mut evaluate,
        };
        match files.covers(rounds.first) && files.covers(rounds.last) {
            true => fs::remove_file(path)?,
            false => files.insert(rounds),
        }
    }
    Ok((train, evaluate))
}

impl Files {
    pub(super) fn insert(&mut self, rounds: Rounds) {
        self.0.insert(rounds.first, rounds);
    }

    pub(super) fn remove(&mut self, rounds: &Rounds) {
        self.0.remove(&rounds.first);
    }

    pub(super) fn leave_alone(&mut self, first: u64) {
        if let Some(rounds) = self.0.get_mut(&first) {
            rounds.alone = true;
        }
    }

    /// Whether a file spans this step.
    pub(super) fn covers(&self, step: u64) -> bool {
        self.0.range(..=step).next_back().is_some_and(|(_, rounds)| rounds.last >= step)
    }

    /// Whether a merged file spans this step.
    pub(super) fn is_merged(&self, step: u64) -> bool {
        let before = self.0.range(..=step).next_back();
        before.is_some_and(|(_, rounds)| rounds.last >= step && rounds.last > rounds.first)
    }

    /// The files that contain rounds after `last`.
    pub(super) fn later_than(&self, last: Option<u64>) -> Vec<Rounds> {
        self.0.values().filter(|rounds| last.is_none_or(|last| rounds.last > last)).copied().collect()
    }

    /// Neighbouring files to be merged into one, if there are enough of them.
    pub(super) fn mergeable(&self) -> Option<Vec<Rounds>> {
        let (mut some, mut bytes) = (Vec::new(), 0);
        for rounds in self.0.values() {
            let is_whole = rounds.last > rounds.first || rounds.bytes >= MERGED_BYTES || rounds.alone;
            // A single file between two merged ones remains: there can be no more of these than of those.
            if is_whole {
                (some, bytes) = (Vec::new(), 0);
                continue;
            }
            some.push(*rounds);
            bytes += rounds.bytes;
            if some.len() == MERGED_ROUNDS || (bytes >= MERGED_BYTES && some.len() > 1) {
                return Some(some);
            }
        }
        None
    }
}

pub(super) fn path(folder: &Path, purpose: Purpose, rounds: &Rounds) -> PathBuf {
    folder.join(name(purpose, rounds.first, rounds.last))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(rounds: &[(u64, u64, u64)]) -> Files {
        let mut files = Files::default();
        rounds.iter().for_each(|(first, last, bytes)| {
            files.insert(Rounds { first: *first, last: *last, bytes: *bytes, alone: false });
        });
        files
    }

    #[test]
    fn names_are_read_back() {
        for (purpose, first, last) in [
            (Purpose::Train, 12, 12),
            (Purpose::Train, 1, 64),
            (Purpose::Evaluate, 0, 0),
            (Purpose::Evaluate, 0, 1_000_000),
        ] {
            assert_eq!(parse(&name(purpose, first, last)), Some((purpose, first, last)));
        }
        for other in ["step-1", "steps-000064-000001.parquet", "step-x.parquet", "notes.parquet", "steps-1.parquet"] {
            assert_eq!(parse(other), None, "{other}");
        }
    }

    #[test]
    fn enough_rounds_or_bytes_make_a_file() {
        let ones = |count: u64, bytes: u64| (1..=count).map(|step| (step, step, bytes)).collect::<Vec<_>>();
        let merged = |rounds: &[(u64, u64, u64)]| {
            files(rounds).mergeable().map(|some| (some[0].first, some[some.len() - 1].last))
        };
        assert_eq!(merged(&ones(63, 1)), None);
        assert_eq!(merged(&ones(64, 1)), Some((1, 64)));
        assert_eq!(merged(&ones(3, MERGED_BYTES / 2)), Some((1, 2)));
        assert_eq!(merged(&ones(100, MERGED_BYTES)), None, "each is a file of its own already");
        assert_eq!(merged(&[(1, 64, 9), (65, 65, 1)]), None);
        let mut more = vec![(1, 64, 9)];
        more.extend((65..130).map(|step| (step, step, 1)));
        assert_eq!(merged(&more), Some((65, 128)));
    }
}
