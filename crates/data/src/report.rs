use std::fmt;

/// What was read and what was left out, of everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadReport {
    /// The problems to train on.
    pub train: SourceReport,
    /// The sets of held-out problems by name; that of `data.evaluation`, which has none, is `evaluation`.
    pub sets: Vec<(String, SourceReport)>,
    /// Evaluation problems whose question is also trained on.
    pub overlap: usize,
    /// What ends an answer.
    pub ends: Ends,
}

/// What ends an answer of a model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ends {
    /// The end tokens, each with the files that name it.
    pub tokens: Vec<String>,
    /// The control token that the chat template writes after an answer, where nothing of the job ends an answer there.
    pub missed: Option<String>,
}

impl Ends {
    /// What is to be said of a template that ends answers otherwise than the model folder.
    #[must_use]
    pub fn warning(&self) -> Option<String> {
        let missed = self.missed.as_ref()?;
        Some(format!(
            "the chat template ends an answer with `{missed}`, which no file of the model folder names as an end token: answers will \
             not end there; add it to `rollout.stop`, or to `eos_token_id` of generation_config.json"
        ))
    }
}

/// What was read and what was left out, of one source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceReport {
    /// Rows read, after `skip` and `limit`.
    pub rows: usize,
    /// Problems that are used.
    pub kept: usize,
    /// Rows left out because their prompt has more tokens than the spec allows or than leave room for an answer.
    pub overlong: usize,
    /// Rows left out because the verifier cannot read their reference answer.
    pub unreadable_answers: usize,
    /// Where the first of them is, and what is wrong with it.
    pub first_unreadable: Option<String>,
    /// Problems whose question stood in the source before. They are used.
    pub duplicates: usize,
    /// Problems that ask with control tokens of the model, which are read as text. They are used.
    pub with_control_tokens: usize,
    /// Which fields were read, where the spec does not say it.
    pub fields: Vec<String>,
    /// Tokens of the longest prompt that is used.
    pub longest_prompt_tokens: usize,
    /// Text of the first prompt that is used, as the model sees it.
    pub example_prompt: String,
}

impl fmt::Display for SourceReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} rows used", self.kept, self.rows)?;
        let left_out = [(self.overlong, "overlong"), (self.unreadable_answers, "with an unreadable answer")];
        for (count, what) in left_out.into_iter().filter(|(count, _)| *count > 0) {
            write!(f, ", {count} {what} left out")?;
        }
        if let Some(first) = &self.first_unreadable {
            write!(f, " (first: {first})")?;
        }
        if self.duplicates > 0 {
            write!(f, ", {} repeated", self.duplicates)?;
        }
        if self.with_control_tokens > 0 {
            write!(f, ", {} with control tokens, which are read as text", self.with_control_tokens)?;
        }
        for fields in &self.fields {
            write!(f, ", {fields}")?;
        }
        Ok(())
    }
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Nothing is read for training by a job that only evaluates.
        let train = (self.train.rows > 0).then_some(("training", &self.train));
        let sets = self.sets.iter().map(|(name, report)| (name.as_str(), report));
        for (index, (name, report)) in train.into_iter().chain(sets).enumerate() {
            write!(f, "{}{name}: {report}", if index == 0 { "" } else { "; " })?;
        }
        if self.overlap > 0 {
            write!(f, "; {} evaluation problems are also trained on", self.overlap)?;
        }
        Ok(())
    }
}
