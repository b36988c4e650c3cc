//! Recorded groups, and the training batches made of them.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use pacs_learner::{IndexEntry, SequenceTokens, TrainBatch};
use serde::Deserialize;

/// A prompt with its recorded samples.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct RecordedGroup {
    pub(super) group: u64,
    pub(super) prompt_tokens: Vec<u32>,
    pub(super) samples: Vec<RecordedSample>,
}

/// One recorded answer.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct RecordedSample {
    pub(super) tokens: Vec<u32>,
    /// Log-prob of each token by the rollout engine (nats).
    pub(super) logprobs: Vec<f32>,
    /// Log-probs under the distribution that the tokens were drawn from, if top-k, top-p or min-p cut something
    /// off; else empty.
    pub(super) sampled_logprobs: Vec<f32>,
    pub(super) label: f64,
    pub(super) reward: f64,
    /// Whether the answer ended at the length limit; `None` if that was not recorded.
    pub(super) truncated: Option<bool>,
    /// Version of the weights that generated the oldest token; `None` if that was not recorded.
    pub(super) version: Option<u64>,
}

/// The groups of a training step.
#[derive(Debug)]
pub(super) struct RecordedStep {
    /// Number of the step, from 1.
    pub(super) number: u64,
    pub(super) groups: Vec<RecordedGroup>,
}

impl RecordedStep {
    /// Fails if the groups cannot be trained on.
    pub(super) fn check(&self, vocabulary: i64) -> Result<()> {
        let mut seen = HashSet::new();
        for RecordedGroup { group, prompt_tokens, samples } in &self.groups {
            let place = format!("step {}, group {group}", self.number);
            ensure!(seen.insert(group), "{place}: its rows are not consecutive");
            ensure!(!prompt_tokens.is_empty(), "{place}: the prompt has no tokens");
            for sample in samples {
                let (tokens, logprobs) = (sample.tokens.len(), sample.logprobs.len());
                ensure!(tokens > 0, "{place}: a sample has no tokens");
                ensure!(tokens == logprobs, "{place}: a sample of {tokens} tokens has {logprobs} log-probs");
                let sampled = sample.sampled_logprobs.len();
                let fits = sampled == 0 || sampled == tokens;
                ensure!(fits, "{place}: a sample of {tokens} tokens has {sampled} log-probs of what was drawn from");
                let known = |token: &u32| i64::from(*token) < vocabulary;
                let unknown = prompt_tokens.iter().chain(&sample.tokens).find(|token| !known(token));
                if let Some(token) = unknown {
                    bail!("{place}: token {token} lies beyond the model's {vocabulary}");
                }
            }
        }
        Ok(())
    }

    /// Builds the batch of a single rank. Groups are split into mini-batches in order, as the coordinator does.
    ///
    /// A sample without a record of truncation counts as truncated if it has `max_new_tokens` tokens.
    pub(super) fn batch(self, mini_batches: usize, max_new_tokens: u32, deterministic: bool) -> TrainBatch {
        let count = self.groups.len();
        let mut batch = TrainBatch {
            step: self.number,
            index: Vec::new(),
            prompts: HashMap::new(),
            prompt_routes: HashMap::new(),
            sequences: Vec::new(),
        };
        for (i, group) in self.groups.into_iter().enumerate() {
            // Group ids matter within a step only; these keep the order.
            let id = i as u64;
            batch.prompts.insert(id, group.prompt_tokens);
            for (member, sample) in (0u32..).zip(group.samples) {
                let answer_tokens = u32::try_from(sample.tokens.len()).unwrap_or(u32::MAX);
                batch.sequences.push(SequenceTokens {
                    position: batch.index.len(),
                    tokens: sample.tokens,
                    rollout_logprobs: sample.logprobs,
                    sampled_logprobs: sample.sampled_logprobs,
                    // Samples without a record count as those of the weights that the step trains.
                    version: sample.version.unwrap_or(self.number.saturating_sub(1)),
                    routes: Vec::new(),
                });
                batch.index.push(IndexEntry {
                    group: id,
                    sample: member,
                    mini_batch: i * mini_batches / count,
                    rank: 0,
                    label: sample.label,
                    reward: sample.reward,
                    answer_tokens,
                    truncated: sample.truncated.unwrap_or(answer_tokens >= max_new_tokens),
                    unit: None,
                });
            }
        }
        if deterministic {
            batch.cut_into_units();
        }
        batch
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    group: u64,
    prompt_tokens: Vec<u32>,
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
    #[serde(default)]
    sampled_logprobs: Vec<f32>,
    label: f64,
    reward: f64,
    truncated: Option<bool>,
}

/// Reads the groups of the file at `path` in order; consecutive rows with one group number form a group.
pub(super) fn read(path: &Path) -> Result<impl Iterator<Item = Result<RecordedGroup>> + use<>> {
    let file = File::open(path).with_context(|| format!("read `{}`", path.display()))?;
    let name = path.display().to_string();
    let mut rows = BufReader::new(file).lines().enumerate().filter_map(move |(number, line)| {
        let parsed = || -> Result<Option<Row>> {
            let line = line?;
            if line.trim().is_empty() {
                return Ok(None);
            }
            Ok(Some(serde_json::from_str(&line)?))
        };
        parsed().with_context(|| format!("read `{name}` line {}", number + 1)).transpose()
    });
    let mut next: Option<Row> = None;
    Ok(std::iter::from_fn(move || {
        let mut group: Option<RecordedGroup> = None;
        loop {
            let row = match next.take().map(Ok).or_else(|| rows.next()) {
                None => return group.map(Ok),
                Some(Err(error)) => return Some(Err(error)),
                Some(Ok(row)) => row,
            };
            match &mut group {
                Some(group) if group.group != row.group => {
                    next = Some(row);
                    return Some(Ok(std::mem::take(group)));
                }
                Some(group) if group.prompt_tokens != row.prompt_tokens => {
                    return Some(Err(anyhow::anyhow!("the rows of group {} have different prompts", group.group)));
                }
                _ => {}
            }
            let group = group.get_or_insert_with(|| RecordedGroup { group: row.group, ..RecordedGroup::default() });
            group.prompt_tokens = row.prompt_tokens;
            let Row { tokens, logprobs, sampled_logprobs, label, reward, truncated, .. } = row;
            group.samples.push(RecordedSample {
                tokens,
                logprobs,
                sampled_logprobs,
                label,
                reward,
                truncated,
                version: None,
            });
        }
    }))
}
