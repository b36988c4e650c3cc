use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io::{ErrorKind, Write};
use std::path::Path;

use pacs_data::{Day, Problem, Problems};
use serde::{Deserialize, Serialize};

use super::write_atomically;
use crate::FileError;

/// Digests of the problems that a run was started with: `problems.json` in the run folder.
///
/// Groups in flight, the draw order and the curriculum's history refer to problems by index. A data file, template or
/// filter that changes between two starts shifts the indexes, and old answers would be trained on with other prompts.
/// So a digest of every problem is stored here, and a changed set is refused. Storing digests in groups and remapping
/// the history was rejected, because a job whose data may change has no draw order to resume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProblemSet {
    format: u32,
    /// Day on which the run began, which chat templates may write into prompts; it is the same after every restart.
    day: String,
    /// Digests of the training problems, by index.
    train: Vec<String>,
    /// Digests of the held-out problems by set, as of the last start that evaluated on it.
    evaluation: BTreeMap<String, Vec<String>>,
}

const FORMAT: u32 = 1;
const FILE: &str = "problems.json";

impl ProblemSet {
    pub(crate) fn of(problems: &Problems, day: Day) -> Self {
        let digests = |problems: &[Problem]| problems.iter().map(Problem::digest).collect();
        Self {
            format: FORMAT,
            day: day.to_string(),
            train: digests(&problems.train),
            evaluation: (problems.sets.iter())
                .map(|measured| (measured.set.label().to_owned(), digests(&measured.problems)))
                .collect(),
        }
    }

    /// Reads the file of an earlier start; `None` in a new folder, and in one of a version that did not write it.
    pub(crate) fn read(run_dir: &Path) -> Result<Option<Self>, FileError> {
        let path = run_dir.join(FILE);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(FileError::file("read", &path)(error)),
        };
        let set: Self = serde_json::from_str(&text)
            .map_err(|error| FileError::damaged(&path, format!("no set of problems: {error}")))?;
        match set.format {
            FORMAT => Ok(Some(set)),
            other => Err(FileError::damaged(&path, format!("it has format {other}, this version reads {FORMAT}"))),
        }
    }

    /// Day on which the run began.
    pub(crate) fn day(&self) -> Option<Day> {
        self.day.parse().ok()
    }

    /// Writes the file. Sets of `earlier` that this start does not evaluate on are kept.
    pub(crate) fn write(mut self, run_dir: &Path, earlier: Option<Self>) -> Result<(), FileError> {
        for (label, digests) in earlier.into_iter().flat_map(|earlier| earlier.evaluation) {
            self.evaluation.entry(label).or_insert(digests);
        }
        let path = run_dir.join(FILE);
        let text = serde_json::to_string(&self).expect("a set of texts is JSON");
        write_atomically(&path, |file| file.write_all(text.as_bytes())).map_err(FileError::file("write", &path))
    }

    /// Differences from `earlier`, one line per set; empty if there are none.
    pub(crate) fn changes_since(&self, earlier: &Self, problems: &Problems) -> Vec<String> {
        let mut changes = Vec::new();
        changes.extend(change("to train on", &earlier.train, &self.train, &problems.train));
        // Whether a run evaluates, and on which sets, may change between starts.
        for measured in &problems.sets {
            let label = measured.set.label();
            if let (Some(before), Some(now)) = (earlier.evaluation.get(label), self.evaluation.get(label)) {
                changes.extend(change(&format!("of the set `{label}`"), before, now, &measured.problems));
            }
        }
        changes
    }
}

fn change(what: &str, before: &[String], now: &[String], problems: &[Problem]) -> Option<String> {
    if before == now {
        return None;
    }
    let (known, found): (HashSet<&String>, HashSet<&String>) = (before.iter().collect(), now.iter().collect());
    let gone = before.iter().filter(|digest| !found.contains(digest)).count();
    let is_new = |(place, digest): (usize, &String)| (!known.contains(digest)).then_some(place);
    let new: Vec<usize> = now.iter().enumerate().filter_map(is_new).collect();
    let Some(first) = new.first() else {
        let order = if gone == 0 { "the same problems in another order or number" } else { "some are missing" };
        return Some(format!(
            "problems {what}: {} before, {} now, {gone} of them gone: {order}",
            before.len(),
            now.len()
        ));
    };
    let question: String = problems[*first].question.chars().take(60).collect();
    Some(format!(
        "problems {what}: {} before, {} now, {gone} of them gone and {} new, such as number {} (`{}`)",
        before.len(),
        now.len(),
        new.len(),
        first + 1,
        question.escape_debug(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(train: &[&str], evaluation: &[&str]) -> ProblemSet {
        let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
        let evaluation = match evaluation.is_empty() {
            true => BTreeMap::new(),
            false => BTreeMap::from([("evaluation".to_owned(), texts(evaluation))]),
        };
        ProblemSet { format: FORMAT, day: "2026-02-03".into(), train: texts(train), evaluation }
    }

    #[test]
    fn a_set_that_is_damaged_or_of_another_version_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(ProblemSet::read(dir.path()).unwrap(), None);
        set(&["a", "b"], &["c"]).write(dir.path(), None).unwrap();
        let earlier = ProblemSet::read(dir.path()).unwrap();
        assert_eq!(earlier, Some(set(&["a", "b"], &["c"])));
        set(&["a", "b"], &[]).write(dir.path(), earlier).unwrap();
        assert_eq!(ProblemSet::read(dir.path()).unwrap(), Some(set(&["a", "b"], &["c"])), "it is kept for later");
        for (text, said) in [
            ("{\"format\":1", "no set of problems"),
            ("{\"format\":9,\"day\":\"\",\"train\":[],\"evaluation\":{}}", "format 9"),
        ] {
            fs::write(dir.path().join(FILE), text).unwrap();
            let error = ProblemSet::read(dir.path()).unwrap_err();
            assert!(error.is_damage() && error.to_string().contains(said), "{error}");
        }
    }

    #[test]
    fn the_order_counts_too() {
        let digests = |text: &str| text.chars().map(String::from).collect::<Vec<_>>();
        let question = |c: char| Problem {
            question: format!("what is {c}?"),
            answer: "1".into(),
            verifier: None,
            prompt_tokens: vec![1],
        };
        let said = |before: &str, now: &str| {
            let problems: Vec<Problem> = now.chars().map(question).collect();
            change("to train on", &digests(before), &digests(now), &problems)
        };
        assert_eq!(said("abc", "abc"), None);
        assert!(said("abc", "acb").unwrap().ends_with("0 of them gone: the same problems in another order or number"));
        assert!(said("abc", "ab").unwrap().contains("3 before, 2 now, 1 of them gone: some are missing"));
        let new = said("abc", "bcde").unwrap();
        assert!(new.ends_with("4 now, 1 of them gone and 2 new, such as number 3 (`what is d?`)"), "{new}");
    }
}
