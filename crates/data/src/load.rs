use std::collections::HashSet;
use std::sync::Arc;

use pacs_order::{DrawOrder, DrawPlan, SetShare};
use pacs_shape::EndToken;
use pacs_spec::{JobSpec, SourceSpec, VerifierKind};
use pacs_text::Day;

use crate::prompt::JobPrompter;
use crate::source::{Record, rows};
use crate::{DataError, Ends, LoadReport, MeasuredSet, Problem, Problems, SourceReport};

/// Says whether the verifier can read a reference answer, and if not, why.
pub type GoldCheck = fn(&str) -> Result<(), String>;

/// Loads the problems of a job.
///
/// # Errors
/// [`DataError`]: a file, row, tokenizer or template that cannot be used, or nothing left to train on.
pub fn load(spec: &JobSpec) -> Result<Problems, DataError> {
    load_on(spec, Day::today())
}

/// Loads the problems of a job as they were on a day, which some chat templates write into their prompts.
///
/// # Errors
/// See [`load`].
pub fn load_on(spec: &JobSpec, day: Day) -> Result<Problems, DataError> {
    load_all(spec, None, day)
}

/// What the verifier of a kind says of a reference answer. Only built-in ones can be asked; what a verifier of the
/// user's own can read is for it to say.
#[must_use]
pub fn gold_check(kind: VerifierKind) -> GoldCheck {
    match kind {
        VerifierKind::Math => |answer| pacs_verify::check_gold(answer).map_err(|error| error.to_string()),
        VerifierKind::Countdown => pacs_verify::check_countdown,
        VerifierKind::Code => pacs_verify::check_suite,
        // A source has no empty answer, and any other text is one.
        VerifierKind::Exact | VerifierKind::Exec | VerifierKind::Grpc => |_| Ok(()),
    }
}

/// Loads the problems of a job, asking `check` which reference answers can be read.
///
/// # Errors
/// See [`load`].
pub fn load_with(spec: &JobSpec, check: GoldCheck, day: Day) -> Result<Problems, DataError> {
    load_all(spec, Some(check), day)
}

fn load_all(spec: &JobSpec, check: Option<GoldCheck>, day: Day) -> Result<Problems, DataError> {
    let prompter = JobPrompter::new(spec, day)?;
    let ends = ends(spec, &prompter)?;
    let mut train = Loaded::default();
    let mut shares = Vec::new();
    // A job that only evaluates says what it trains on because every job does, and never reads it.
    for (path, source) in spec.data.train_sets().filter(|_| !spec.evaluation.only) {
        let before = train.problems.len();
        let grading = Grading { check, ..Grading::of(spec, source.verifier.as_deref(), spec.verifier_of(source).kind) };
        train.load(source, &prompter, (spec.suffix_of(source), &grading))?;
        let kept = train.problems.len() - before;
        train.refuse_empty(kept, &path)?;
        shares.push(SetShare { weight: source.weight.unwrap_or(1.0), problems: kept });
    }

    let mut report = LoadReport { train: train.report, ends, ..LoadReport::default() };
    let mut sets = Vec::new();
    for set in spec.evaluation_sets() {
        let mut loaded = Loaded::default();
        let kind = set.verifier.as_ref().map_or(spec.verifier.kind, |verifier| verifier.kind);
        // A set that has a verifier of its own is graded by it without a name.
        let check = check.filter(|_| set.verifier.is_none());
        let grading = Grading { check, ..Grading::of(spec, set.graded_by(spec).as_deref(), kind) };
        loaded.load(&set.source, &prompter, (&set.prompt_suffix, &grading))?;
        loaded.refuse_empty(loaded.problems.len(), &set.path)?;
        report.overlap += loaded.problems.iter().filter(|p| train.seen.contains(&normalised(&p.question))).count();
        report.sets.push((set.label().to_owned(), loaded.report));
        sets.push(MeasuredSet { set, problems: loaded.problems });
    }
    let order = DrawOrder::new(DrawPlan { seed: spec.seed, shuffle: spec.data.shuffle, sets: shares });
    Ok(Problems { train: train.problems, sets, report, order })
}

/// What ends an answer of the job's model.
fn ends(spec: &JobSpec, prompter: &JobPrompter) -> Result<Ends, DataError> {
    let model = &spec.model.path;
    let tokens = EndToken::of_folder(model)?;
    // Refused and not warned of: every answer would run to the token limit, at many times the cost, and count as truncated.
    if tokens.is_empty() && spec.rollout.stop.is_empty() {
        return Err(DataError::NoEnd { model: model.clone() });
    }
    let prompter = prompter.prompter();
    let turn_end = prompter.turn_end().filter(|end| {
        let id = prompter.tokenizer().token_id(end);
        let is_known = tokens.iter().any(|token| Some(token.id) == id);
        !(is_known || spec.rollout.stop.iter().any(|stop| end.contains(stop.as_str())))
    });
    let tokens = tokens.iter().map(ToString::to_string).collect();
    Ok(Ends { tokens, missed: turn_end })
}

/// Who grades the problems of a source.
pub(crate) struct Grading<'a> {
    spec: &'a JobSpec,
    /// The verifier that the source names.
    named: Option<Arc<str>>,
    /// Kind of that of rows that name none.
    pub(crate) kind: VerifierKind,
    /// What is asked in place of those of the kind.
    pub(crate) check: Option<GoldCheck>,
}

impl<'a> Grading<'a> {
    pub(crate) fn of(spec: &'a JobSpec, named: Option<&str>, kind: VerifierKind) -> Self {
        Self { spec, named: named.map(Arc::from), kind, check: None }
    }

    /// Name of the verifier of a row, where it or its source names one.
    pub(crate) fn name_of(&self, row: &Record) -> Option<String> {
        row.verifier.clone().or_else(|| self.named.as_deref().map(str::to_owned))
    }

    /// Kind of the verifier of a row.
    pub(crate) fn kind_of(&self, row: &Record) -> Result<VerifierKind, String> {
        let Some(name) = &row.verifier else { return Ok(self.kind) };
        let named = self.spec.named_verifiers().into_iter().find(|(known, _)| known == name);
        named.map(|(_, verifier)| verifier.kind).ok_or_else(|| {
            format!("it names the verifier `{}`, of which the job has no table in `[verifiers]`", name.escape_debug())
        })
    }

    /// Whether the reference answer of a row can be read.
    pub(crate) fn check(&self, row: &Record) -> Result<(), String> {
        let kind = self.kind_of(row)?;
        self.check.filter(|_| row.verifier.is_none()).unwrap_or_else(|| gold_check(kind))(&row.answer)
    }
}

#[derive(Default)]
struct Loaded {
    problems: Vec<Problem>,
    /// Normalised questions so far, to find repeated ones.
    seen: HashSet<String>,
    report: SourceReport,
}

impl Loaded {
    fn load(
        &mut self,
        source: &SourceSpec,
        prompter: &JobPrompter,
        with: (&str, &Grading<'_>),
    ) -> Result<(), DataError> {
        let fields = rows(source, &mut |row| self.take(row?, prompter, with))?;
        self.report.fields.extend(fields.filter(|fields| !self.report.fields.contains(fields)));
        Ok(())
    }

    fn take(
        &mut self,
        row: Record,
        prompter: &JobPrompter,
        (suffix, grading): (&str, &Grading<'_>),
    ) -> Result<(), DataError> {
        self.report.rows += 1;
        // Left out before a run and not in it: a reference that cannot be read would fail every verification of its group.
        if let Err(reason) = grading.check(&row) {
            self.report.unreadable_answers += 1;
            self.report.first_unreadable.get_or_insert_with(|| format!("{}: {reason}", row.place));
            return Ok(());
        }
        let prompt = prompter.prompt(&row.asked, suffix)?;
        // On the host, where it has a place: on a device the look-up would be an assertion of the kernel.
        if let Some(token) = prompt.tokens.iter().find(|token| **token >= prompter.rows()) {
            return Err(DataError::BeyondEmbedding { place: row.place, token: *token, rows: prompter.rows() });
        }
        // Left out and not cut: the end of a question is where it asks.
        if prompt.tokens.len() > prompter.max_tokens() {
            self.report.overlong += 1;
            return Ok(());
        }
        if self.problems.is_empty() {
            self.report.example_prompt = prompt.text;
        }
        self.report.kept += 1;
        self.report.with_control_tokens += usize::from(prompt.control_tokens > 0);
        let question = row.asked.question().to_owned();
        self.report.duplicates += usize::from(!self.seen.insert(normalised(&question)));
        self.report.longest_prompt_tokens = self.report.longest_prompt_tokens.max(prompt.tokens.len());
        let verifier = row.verifier.map(Arc::from).or_else(|| grading.named.clone());
        self.problems.push(Problem { question, answer: row.answer, verifier, prompt_tokens: prompt.tokens });
        Ok(())
    }

    /// Refuses a set of which nothing was kept.
    fn refuse_empty(&self, kept: usize, part: &str) -> Result<(), DataError> {
        if kept > 0 {
            return Ok(());
        }
        Err(DataError::Empty { part: part.to_owned(), report: Box::new(self.report.clone()) })
    }
}

/// A question without what does not change its meaning: case, white space, and punctuation that is not mathematics.
/// Operators stay, for `3 + 4` and `3 - 4` are two questions.
pub(crate) fn normalised(question: &str) -> String {
    let mut text = String::with_capacity(question.len());
    let mut gap = false;
    for c in question.chars().flat_map(char::to_lowercase) {
        if c.is_alphanumeric() || "+-*/^=<>()%!".contains(c) {
            if gap && !text.is_empty() {
                text.push(' ');
            }
            gap = false;
            text.push(c);
        } else {
            gap = true;
        }
    }
    text
}

#[cfg(test)]
mod tests;
