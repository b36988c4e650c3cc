//! The archive of samples and verdicts in Parquet: one file per round at first, merged into files of many rounds later.

mod files;
mod merge;
mod read;
mod rows;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pacs_data::{Problem, Problems};
use pacs_types::{GroupId, Purpose, Verdict};

use self::files::{Files, Rounds, list, path};
use self::merge::{Source, write_merged};
pub(crate) use self::read::{ArchiveFile, ArchiveReader, Columns, archive_files, is_gone};
use self::rows::write_rows;
use super::atomic::sync_folder;
use super::write_atomically;
use crate::driver::{KeptSample, Signal, problem_of};

/// The samples of one step or evaluation.
#[derive(Debug)]
pub(crate) struct Round {
    /// Training: the step itself; evaluation: the number of steps that the policy has seen.
    pub(crate) step: u64,
    pub(crate) purpose: Purpose,
    /// All samples; those of a group are adjacent.
    pub(crate) samples: Vec<ArchivedSample>,
    pub(crate) problems: Arc<dyn Questions>,
}

/// Source of the questions, which are looked up when rows are written.
pub(crate) trait Questions: std::fmt::Debug + Send + Sync {
    /// The problem of a group.
    fn problem(&self, group: GroupId) -> &Problem;
}

impl Questions for Problems {
    fn problem(&self, group: GroupId) -> &Problem {
        problem_of(self, group)
    }
}

/// One row, whose content is read from the journal when it is written.
#[derive(Debug)]
pub(crate) struct ArchivedSample {
    pub(crate) group: GroupId,
    pub(crate) index: u32,
    pub(crate) sample: KeptSample,
    pub(crate) verdict: Verdict,
    /// What training made of it; `None` for samples of evaluations and of groups that were left out.
    pub(crate) signal: Option<Signal>,
}

/// The folder `samples/`. One thread writes rounds, another one merges them.
///
/// Each round is first a file of its own, so that a crash leaves only whole files. Single rounds are merged once there
/// are enough: a run of 20,000 steps leaves a few hundred files, and a merge that a crash interrupts is repeated.
/// Appending row groups to one open file was rejected, because surviving a crash would need a separate spool.
#[derive(Debug)]
pub(crate) struct Archive {
    folder: PathBuf,
    files: Mutex<Index>,
    /// Held while files are merged or truncated, so that both never run at once.
    surgery: Mutex<()>,
}

#[derive(Debug, Default)]
struct Index {
    train: Files,
    evaluate: Files,
}

impl Index {
    fn of(&mut self, purpose: Purpose) -> &mut Files {
        match purpose {
            Purpose::Train => &mut self.train,
            Purpose::Evaluate => &mut self.evaluate,
        }
    }
}

impl Archive {
    pub(crate) fn open(run_dir: &Path) -> io::Result<Self> {
        let folder = run_dir.join("samples");
        fs::create_dir_all(&folder)?;
        let (train, evaluate) = list(&folder)?;
        Ok(Self { folder, files: Mutex::new(Index { train, evaluate }), surgery: Mutex::new(()) })
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Writes a round as a durable file.
    pub(crate) fn write(&self, round: &Round) -> io::Result<()> {
        let Round { step, purpose, .. } = *round;
        // A coordinator that was killed before it could report the write has written it already.
        if self.files().of(purpose).is_merged(step) {
            return Ok(());
        }
        let mut rounds = Rounds { first: step, last: step, bytes: 0, alone: false };
        let path = path(&self.folder, purpose, &rounds);
        write_atomically(&path, |file| write_rows(file, round).map_err(io::Error::other))?;
        rounds.bytes = fs::metadata(&path)?.len();
        self.files().of(purpose).insert(rounds);
        Ok(())
    }

    /// Removes the rounds of later steps than `last`; all rounds if that is `None`.
    pub(crate) fn truncate(&self, purpose: Purpose, last: Option<u64>) -> io::Result<()> {
        let _surgery = self.surgery.lock().unwrap_or_else(PoisonError::into_inner);
        let later = self.files().of(purpose).later_than(last);
        for rounds in &later {
            let whole = path(&self.folder, purpose, rounds);
            // The shorter file is durable before the longer one is removed.
            let shorter = match last.filter(|last| rounds.first <= *last) {
                Some(last) => self.shorten(purpose, rounds, last)?,
                None => None,
            };
            remove(&whole)?;
            let mut files = self.files();
            files.of(purpose).remove(rounds);
            shorter.into_iter().for_each(|shorter| files.of(purpose).insert(shorter));
        }
        if later.is_empty() { Ok(()) } else { sync_folder(&self.folder) }
    }

    /// Writes the beginning of a merged file as a new one.
    fn shorten(&self, purpose: Purpose, rounds: &Rounds, last: u64) -> io::Result<Option<Rounds>> {
        let source = Source::open(&path(&self.folder, purpose, rounds), None).map_err(io::Error::other)?;
        let Some(last) = source.newest(last) else { return Ok(None) };
        let mut shorter = Rounds { last, ..*rounds };
        let path = path(&self.folder, purpose, &shorter);
        write_merged(&path, &[source], last)?;
        shorter.bytes = fs::metadata(&path)?.len();
        Ok(Some(shorter))
    }

    /// Merges one set of files, if there are enough; returns whether it did.
    pub(crate) fn merge_some(&self) -> io::Result<bool> {
        let _surgery = self.surgery.lock().unwrap_or_else(PoisonError::into_inner);
        for purpose in [Purpose::Train, Purpose::Evaluate] {
            let some = self.files().of(purpose).mergeable();
            if let Some(some) = some {
                self.merge(purpose, &some)?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn merge(&self, purpose: Purpose, some: &[Rounds]) -> io::Result<()> {
        let mut sources: Vec<Source> = Vec::with_capacity(some.len());
        for rounds in some {
            match Source::open(&path(&self.folder, purpose, rounds), Some(rounds.first)) {
                Ok(source) if sources.first().is_none_or(|first| source.fits(first)) => sources.push(source),
                // An earlier version of the program wrote the files before it.
                Ok(_) => break,
                // Left as it is: an unreadable file must not keep the others from being merged.
                Err(error) => {
                    tracing::warn!(step = rounds.first, "a file of the archive is not merged: {error}");
                    self.files().of(purpose).leave_alone(rounds.first);
                    return Ok(());
                }
            }
        }
        let some = &some[..sources.len()];
        let [first, .., last] = some else {
            some.iter().for_each(|rounds| self.files().of(purpose).leave_alone(rounds.first));
            return Ok(());
        };
        let mut merged = Rounds { last: last.last, ..*first };
        let whole = path(&self.folder, purpose, &merged);
        write_merged(&whole, &sources, last.last)?;
        merged.bytes = fs::metadata(&whole)?.len();
        {
            let mut files = self.files();
            some.iter().for_each(|rounds| files.of(purpose).remove(rounds));
            files.of(purpose).insert(merged);
        }
        some.iter().try_for_each(|rounds| remove(&path(&self.folder, purpose, rounds)))
    }

    fn files(&self) -> MutexGuard<'_, Index> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Removes a file; it is no error if it is gone already.
fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    #[derive(Debug)]
    struct OneQuestion(Problem);

    impl Questions for OneQuestion {
        fn problem(&self, _: GroupId) -> &Problem {
            &self.0
        }
    }

    /// A source that returns one question for all groups.
    pub(crate) fn one_question() -> Arc<dyn Questions> {
        let (question, answer) = ("1 + 1?".to_owned(), "2".to_owned());
        Arc::new(OneQuestion(Problem { question, answer, verifier: None, prompt_tokens: vec![9, 8] }))
    }
}

#[cfg(test)]
mod tests {
    use super::testing::one_question;
    use super::*;
    use crate::journal::{Frame, FrameKey, write_frames};
    use crate::observe::Recorded;
    use pacs_protocol::v1;
    use pacs_types::{FinishReason, LeaseId, Outcome, Sample, SampleId, VersionSpan, WeightVersion};
    use parquet::column::writer::ColumnCloseResult;
    use parquet::file::reader::{FileReader, SerializedFileReader};
    use parquet::file::writer::SerializedFileWriter;
    use parquet::record::RowAccessor;
    use parquet::schema::types::Type;
    use prost::Message;

    /// A row whose sample is in a segment of `folder`.
    fn row(folder: &Path, group: u64, tokens: Vec<u32>, extracted: Option<&str>) -> ArchivedSample {
        let logprobs = tokens.iter().map(|token| -(*token as f32) / 8.0).collect();
        let spans = vec![VersionSpan { version: WeightVersion(3), tokens: tokens.len() as u32 }];
        let sample = Sample {
            tokens,
            logprobs,
            entropy_sum: 0.75,
            text: "ä 2".into(),
            finish: FinishReason::Length,
            version: WeightVersion(3),
            sampled_logprobs: Vec::new(),
            spans,
            routes: Vec::new(),
        };
        let key = FrameKey::Sample(SampleId { group: GroupId(group), index: 1 }, LeaseId(1));
        let frame = Frame::new(key, v1::Sample::from(sample.clone()).encode_to_vec());
        let kept = KeptSample::new(&sample, frame.stored());
        write_frames(folder, &[(1, frame)]).unwrap();
        ArchivedSample {
            group: GroupId(group),
            index: 1,
            sample: kept,
            verdict: Verdict {
                outcome: Outcome::Wrong,
                label: 0.25,
                reward: -1.0,
                extracted: extracted.map(str::to_owned),
                rule: "number".into(),
            },
            signal: (group != 9).then(|| Signal { score: extracted.map(|_| -1.5), coefficient: 0.25 }),
        }
    }

    /// Flips a bit in the last byte that was written to a segment of `folder`.
    fn damage_newest(folder: &Path) {
        let segments = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let newest =
            segments.filter(|path| path.extension().is_some_and(|extension| extension == "seg")).max().unwrap();
        let mut bytes = fs::read(&newest).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(newest, bytes).unwrap();
    }

    #[test]
    fn rows_are_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let row = |group, tokens, extracted| row(folder.path(), group, tokens, extracted);
        let samples = vec![row(7, vec![4, 2], None), row(7, vec![16], Some("3")), row(9, vec![8], Some(""))];
        let archive = Archive::open(folder.path()).unwrap();
        archive.write(&Round { step: 12, purpose: Purpose::Train, samples, problems: one_question() }).unwrap();
        let file = fs::File::open(folder.path().join("samples/step-000012.parquet")).unwrap();
        let reader = SerializedFileReader::new(file).unwrap();
        let rows: Vec<String> =
            reader.get_row_iter(None).unwrap().map(|row| row.unwrap().to_string().replace('"', "")).collect();
        let expected = |group, extracted, tokens, sum, signal: [&str; 2], ids, logprobs, prompt| {
            let [score, coefficient] = signal;
            format!(
                "{{step: 12, group: {group}, sample: 1, purpose: train, question: 1 + 1?, gold: 2, response: ä 2, \
                 extracted: {extracted}, outcome: wrong, rule: number, label: 0.25, reward: -1E0, tokens: {tokens}, \
                 finish: length, logprob_sum: {sum}, entropy_sum: 0.75, score: {score}, \
                 coefficient: {coefficient}, version: 3, token_ids: {ids}, \
                 logprobs: {logprobs}, sampled_logprobs: [], span_versions: [3], span_tokens: [{tokens}], prompt_ids: {prompt}}}"
            )
        };
        let signals = [["null", "0.25"], ["-1.5E0", "0.25"], ["null", "null"]];
        assert_eq!(rows[0], expected(7, "null", 2, "-7.5E-1", signals[0], "[4, 2]", "[-5E-1, -2.5E-1]", "[9, 8]"));
        assert_eq!(rows[1], expected(7, "3", 1, "-2E0", signals[1], "[16]", "[-2E0]", "[]"));
        assert_eq!(rows[2], expected(9, "", 1, "-1E0", signals[2], "[8]", "[-1E0]", "[9, 8]"));
    }

    #[test]
    fn a_large_round_is_written_in_parts_and_what_is_lost_costs_its_row() {
        let folder = tempfile::tempdir().unwrap();
        let long = |group| row(folder.path(), group, vec![1; 300_000], None);
        let mut samples = vec![long(1), long(2), row(folder.path(), 3, vec![1], None)];
        let lost = row(folder.path(), 4, vec![1], None);
        damage_newest(folder.path());
        samples.push(lost);
        let archive = Archive::open(folder.path()).unwrap();
        archive.write(&Round { step: 1, purpose: Purpose::Train, samples, problems: one_question() }).unwrap();
        let file = fs::File::open(folder.path().join("samples/step-000001.parquet")).unwrap();
        let reader = SerializedFileReader::new(file).unwrap();
        let parts = reader.metadata().row_groups().iter().map(|part| part.num_rows()).collect::<Vec<_>>();
        assert_eq!(parts, [1, 2]);
    }

    fn round(folder: &Path, step: u64, purpose: Purpose) -> Round {
        let samples = vec![row(folder, step, vec![1, 2], None), row(folder, step + 1, vec![8], Some("x"))];
        Round { step, purpose, samples, problems: one_question() }
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder.join("samples")).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Step and group of every row of a file.
    fn rows(folder: &Path, name: &str) -> Vec<(u64, u64)> {
        let reader = SerializedFileReader::new(fs::File::open(folder.join("samples").join(name)).unwrap()).unwrap();
        let rows = reader.get_row_iter(None).unwrap().map(|row| {
            let row = row.unwrap();
            (row.get_long(0).unwrap() as u64, row.get_long(1).unwrap() as u64)
        });
        rows.collect()
    }

    fn expected(steps: std::ops::RangeInclusive<u64>) -> Vec<(u64, u64)> {
        steps.flat_map(|step| [(step, step), (step, step + 1)]).collect()
    }

    #[test]
    fn later_rounds_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let archive = Archive::open(folder.path()).unwrap();
        for step in 1..=3 {
            archive.write(&round(folder.path(), step, Purpose::Train)).unwrap();
            archive.write(&round(folder.path(), step, Purpose::Evaluate)).unwrap();
        }
        archive.truncate(Purpose::Train, Some(2)).unwrap();
        archive.truncate(Purpose::Evaluate, Some(1)).unwrap();
        assert_eq!(names(folder.path()), ["eval-000001.parquet", "step-000001.parquet", "step-000002.parquet"]);
        archive.truncate(Purpose::Train, None).unwrap();
        assert_eq!(names(folder.path()), ["eval-000001.parquet"]);
    }

    /// An archive with `steps` rounds, merged as far as possible.
    fn merged(folder: &Path, steps: u64) -> Archive {
        let archive = Archive::open(folder).unwrap();
        (1..=steps).for_each(|step| archive.write(&round(folder, step, Purpose::Train)).unwrap());
        while archive.merge_some().unwrap() {}
        archive
    }

    #[test]
    fn many_rounds_become_few_files_with_the_same_rows() {
        let folder = tempfile::tempdir().unwrap();
        let archive = merged(folder.path(), 130);
        let merged = [
            "step-000129.parquet",
            "step-000130.parquet",
            "steps-000001-000064.parquet",
            "steps-000065-000128.parquet",
        ];
        assert_eq!(names(folder.path()), merged);
        assert_eq!(rows(folder.path(), merged[2]), expected(1..=64));
        assert_eq!(rows(folder.path(), merged[3]), expected(65..=128));
        // A killed coordinator writes again what it had not reported as done.
        archive.write(&round(folder.path(), 128, Purpose::Train)).unwrap();
        assert_eq!(names(folder.path()), merged);
        let source = Source::open(&folder.path().join("samples").join(merged[3]), None).unwrap();
        assert_eq!((source.newest(99), source.newest(64)), (Some(99), None), "the footer says which round is where");

        // A reader finds every round once, newest first, and recognizes a file that vanished meanwhile.
        let files = archive_files(&folder.path().join("samples")).unwrap();
        let mut steps = Vec::new();
        for file in &files {
            let reader = ArchiveReader::open(file).unwrap();
            for step in reader.steps() {
                let mut of_step = Vec::new();
                let visited = reader.visit(step, &["step", "absent"], |columns| {
                    of_step.extend(columns.into_values().map(|field| field.to_string()));
                    std::ops::ControlFlow::Continue(())
                });
                assert!(visited.unwrap().is_continue());
                assert!(!of_step.is_empty() && of_step.iter().all(|found| *found == step.to_string()), "{of_step:?}");
                steps.push(step);
            }
        }
        assert_eq!(steps, (1..=130).rev().collect::<Vec<_>>());
        archive.truncate(Purpose::Train, Some(100)).unwrap();
        let gone = ArchiveReader::open(&files[0]).map(drop).unwrap_err();
        assert!(is_gone(&gone), "{gone}");
    }

    /// Rewrites a file without two of its columns, as versions before them wrote it.
    fn forget_signals(folder: &Path, step: u64) {
        let path = folder.join("samples").join(files::name(Purpose::Train, step, step));
        let file = fs::File::open(&path).unwrap();
        let reader = SerializedFileReader::new(fs::File::open(&path).unwrap()).unwrap();
        let is_old = |name: &str| !["score", "coefficient"].contains(&name);
        let root = reader.metadata().file_metadata().schema_descr().root_schema();
        let fields = root.get_fields().iter().filter(|field| is_old(field.name())).cloned().collect();
        let schema = Type::group_type_builder(root.name()).with_fields(fields).build().unwrap();
        let mut bytes = Vec::new();
        let mut writer = SerializedFileWriter::new(&mut bytes, Arc::new(schema), rows::properties()).unwrap();
        for group in reader.metadata().row_groups() {
            let mut to = writer.next_row_group().unwrap();
            for column in group.columns().iter().filter(|column| is_old(&column.column_path().parts()[0])) {
                let close = ColumnCloseResult {
                    bytes_written: column.compressed_size() as u64,
                    rows_written: group.num_rows() as u64,
                    metadata: column.clone(),
                    bloom_filter: None,
                    column_index: None,
                    offset_index: None,
                };
                to.append_column(&file, close).unwrap();
            }
            to.close().unwrap();
        }
        writer.close().unwrap();
        fs::write(path, bytes).unwrap();
    }

    #[test]
    fn files_of_versions_without_scores_are_read_next_to_new_ones() {
        let folder = tempfile::tempdir().unwrap();
        let archive = Archive::open(folder.path()).unwrap();
        (1..=64).for_each(|step| archive.write(&round(folder.path(), step, Purpose::Train)).unwrap());
        [1, 2].into_iter().for_each(|step| forget_signals(folder.path(), step));
        let read = || {
            let request = v1::ListSamplesRequest { limit: 500, ..Default::default() };
            let answer = Recorded::new(folder.path()).samples(request).unwrap();
            assert_eq!((answer.samples.len(), answer.notes), (128, Vec::new()));
            for sample in &answer.samples {
                let has_one = sample.step() > 2 && sample.group_id != 9;
                assert_eq!(sample.coefficient, has_one.then_some(0.25), "{sample:?}");
                assert_eq!(sample.score.is_some(), has_one && sample.verdict.as_ref().unwrap().extracted.is_some());
                assert!(sample.tokens > 0 && sample.version == Some(3), "{sample:?}");
            }
        };
        read();
        while archive.merge_some().unwrap() {}
        // Columns of a file are the same in all of its parts.
        assert!(names(folder.path()).contains(&"steps-000001-000002.parquet".to_owned()), "{:?}", names(folder.path()));
        read();
    }

    #[test]
    fn a_cut_goes_across_the_borders_of_files() {
        let folder = tempfile::tempdir().unwrap();
        let archive = merged(folder.path(), 130);
        archive.truncate(Purpose::Train, Some(70)).unwrap();
        assert_eq!(names(folder.path()), ["steps-000001-000064.parquet", "steps-000065-000070.parquet"]);
        assert_eq!(rows(folder.path(), "steps-000065-000070.parquet"), expected(65..=70));
        archive.truncate(Purpose::Train, Some(65)).unwrap();
        assert_eq!(names(folder.path()), ["step-000065.parquet", "steps-000001-000064.parquet"]);
        (66..=70).for_each(|step| archive.write(&round(folder.path(), step, Purpose::Train)).unwrap());
        archive.truncate(Purpose::Train, Some(63)).unwrap();
        assert_eq!(names(folder.path()), ["steps-000001-000063.parquet"]);
        assert_eq!(rows(folder.path(), "steps-000001-000063.parquet"), expected(1..=63));
        // The same with a fresh listing of the folder.
        let archive = Archive::open(folder.path()).unwrap();
        archive.truncate(Purpose::Train, Some(2)).unwrap();
        assert_eq!(rows(folder.path(), "steps-000001-000002.parquet"), expected(1..=2));
        archive.truncate(Purpose::Train, None).unwrap();
        assert_eq!(names(folder.path()), [""; 0]);
    }

    #[test]
    fn what_a_crash_leaves_of_a_merge_or_a_cut_is_cleared_up() {
        let folder = tempfile::tempdir().unwrap();
        let samples = folder.path().join("samples");
        drop(merged(folder.path(), 64));
        // A crash between the rename of the merged file and the removal of the old ones, and one in
        // the middle of the next merge.
        for step in [1, 30, 64] {
            fs::copy(
                samples.join("steps-000001-000064.parquet"),
                samples.join(files::name(Purpose::Train, step, step)),
            )
            .unwrap();
        }
        fs::write(samples.join(".steps-000065-000128.parquet.tmp"), "half").unwrap();
        let archive = Archive::open(folder.path()).unwrap();
        assert_eq!(names(folder.path()), ["steps-000001-000064.parquet"]);
        // A truncation that wrote the shorter file but did not remove the longer one is repeated from its record.
        fs::copy(samples.join("steps-000001-000064.parquet"), samples.join("steps-000001-000040.parquet")).unwrap();
        drop(archive);
        let archive = Archive::open(folder.path()).unwrap();
        assert_eq!(names(folder.path()), ["steps-000001-000064.parquet"]);
        archive.truncate(Purpose::Train, Some(40)).unwrap();
        assert_eq!(rows(folder.path(), "steps-000001-000040.parquet"), expected(1..=40));
    }

    #[test]
    fn a_file_that_does_not_fit_stays_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let archive = Archive::open(folder.path()).unwrap();
        (1..=140).for_each(|step| archive.write(&round(folder.path(), step, Purpose::Train)).unwrap());
        fs::write(folder.path().join("samples/step-000003.parquet"), "something else").unwrap();
        while archive.merge_some().unwrap() {}
        let names = names(folder.path());
        assert!(names.contains(&"step-000003.parquet".to_owned()), "{names:?}");
        assert!(names.contains(&"steps-000004-000067.parquet".to_owned()), "{names:?}");
    }
}
