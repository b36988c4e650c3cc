//! `pacs samples`: prints sampled answers with their verdicts, or one answer token by token.

use std::fmt::Write;

use anyhow::anyhow;
use clap::{Args, ValueEnum};
use pacs_dashboard::json::sample as as_json;
use pacs_protocol::v1;
use pacs_runtime::{Exit, harmless};
use serde_json::{Value, json};

use super::Looked;
use crate::client::block_on;
use crate::failure::Failure;
use crate::format::table;
use crate::output;

/// Narrowest column of `--side-by-side`, in characters.
const NARROWEST: usize = 24;
/// Assumed width of a screen that does not report its own, in characters.
const USUAL_WIDTH: usize = 100;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pacs samples                                  the newest answers of the run on this machine
  pacs samples runs/demo --step 12 --outcome wrong --full
  pacs samples runs/demo --text 'so the answer' --set evaluation
  pacs samples runs/demo --group 96 --side-by-side
  pacs samples runs/demo --sample 96.3          one answer, token by token
  pacs samples runs/demo --limit 500 --json | jq '.samples[].response'
  pacs samples runs/demo --step 12 --limit 500 --full --json | jq '.samples | sort_by(.coefficient)'

Samples in flight come first, then those of steps, then those of evaluations, each newest first. Runs that are over are named
by their folder.")]
pub(crate) struct Samples {
    /// The run: its folder, or for a live run also its coordinator (host:port), job, or the first digits of its id. Default: the live
    /// run of this machine.
    pub(crate) target: Option<String>,
    /// Only samples of training, or only samples of evaluations.
    #[arg(long, value_enum)]
    pub(crate) set: Option<Set>,
    /// Only samples of this training step, or of the evaluation after it.
    #[arg(long, value_name = "N")]
    pub(crate) step: Option<u64>,
    /// Only samples of this group.
    #[arg(long, value_name = "N")]
    pub(crate) group: Option<u64>,
    /// Only samples with this outcome; may be given several times.
    #[arg(long, value_enum)]
    pub(crate) outcome: Vec<Outcome>,
    /// Only samples with this text in question or answer, ignoring case.
    #[arg(long)]
    pub(crate) text: Option<String>,
    /// Show at most N samples.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) limit: u32,
    /// Show texts of up to 64 KiB, instead of their first 500 bytes.
    #[arg(long)]
    pub(crate) full: bool,
    /// Show the answers of each group next to each other.
    #[arg(long, conflicts_with = "json")]
    pub(crate) side_by_side: bool,
    /// Show one sample with its tokens, named by group and index, as in `96.3`.
    #[arg(long, value_name = "GROUP.INDEX", value_parser = sample_id, conflicts_with_all = ["set", "group", "outcome", "text", "side_by_side"])]
    pub(crate) sample: Option<(u64, u32)>,
    /// Print the samples and the notes on unreadable files as one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Set {
    /// Samples of training steps.
    Train,
    /// Samples of evaluations.
    Evaluation,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Outcome {
    /// The answer is right.
    Correct,
    /// The answer is wrong.
    Wrong,
    /// No answer was found in the response.
    Unparsable,
}

fn sample_id(text: &str) -> Result<(u64, u32), String> {
    let parts = text.trim_start_matches('g').split_once('.');
    let parse = |(group, index): (&str, &str)| Some((group.parse().ok()?, index.parse().ok()?));
    parts.and_then(parse).ok_or_else(|| "expected GROUP.INDEX, for example 96.3".to_owned())
}

pub(crate) fn run(arguments: &Samples) -> Result<Exit, Failure> {
    block_on(async {
        let mut run = Looked::find(arguments.target.as_deref()).await?;
        match arguments.sample {
            Some(id) => show_one(&mut run, arguments, id).await,
            None => show_list(&mut run, arguments).await,
        }
    })
}

async fn show_list(run: &mut Looked, arguments: &Samples) -> Result<Exit, Failure> {
    let (samples, notes) = list(run, arguments).await.map_err(|failure| failure.doing("list the samples"))?;
    if arguments.json {
        let samples: Vec<Value> = samples.iter().map(as_json).collect();
        output::json(format_args!("{:#}", json!({"samples": samples, "notes": notes})));
        return Ok(Exit::Done);
    }
    notes.iter().for_each(|note| output::error(format_args!("note: {}", harmless(note))));
    if samples.is_empty() {
        output::line("no sample fits");
    } else if arguments.side_by_side {
        let groups = samples.chunk_by(|a, b| (a.group_id, a.step) == (b.group_id, b.step));
        let width = screen_width();
        groups.for_each(|group| output::text(side_by_side(group, width)));
    } else {
        samples.iter().for_each(|sample| output::text(as_text(sample)));
    }
    Ok(Exit::Done)
}

/// Fetches matching samples page by page; also returns messages about files that could not be read.
async fn list(run: &mut Looked, arguments: &Samples) -> Result<(Vec<v1::ObservedSample>, Vec<String>), Failure> {
    let (mut samples, mut notes, mut page) = (Vec::new(), Vec::new(), String::new());
    loop {
        let left = arguments.limit as usize - samples.len();
        let request = v1::ListSamplesRequest {
            purpose: match arguments.set {
                None => v1::Purpose::Unspecified,
                Some(Set::Train) => v1::Purpose::Train,
                Some(Set::Evaluation) => v1::Purpose::Evaluate,
            }
            .into(),
            state: v1::SampleState::Unspecified.into(),
            step: arguments.step,
            group_id: arguments.group,
            outcomes: arguments.outcome.iter().map(|outcome| outcome.wire().into()).collect(),
            text: arguments.text.clone().unwrap_or_default(),
            limit: u32::try_from(left.min(500)).unwrap_or(500),
            page,
            text_bytes: if arguments.full { 65_536 } else { 500 },
        };
        let response = run.samples(request).await?;
        samples.extend(response.samples);
        notes.extend(response.notes);
        page = response.next_page;
        if page.is_empty() || samples.len() >= arguments.limit as usize {
            return Ok((samples, notes));
        }
    }
}

async fn show_one(run: &mut Looked, arguments: &Samples, (group_id, index): (u64, u32)) -> Result<Exit, Failure> {
    let request = v1::GetSampleRequest { group_id, index, step: arguments.step, first_token: 0, most_tokens: 0 };
    let response =
        run.sample(request).await.map_err(|failure| failure.doing(format!("show sample {group_id}.{index}")))?;
    let sample = response.sample.clone().unwrap_or_default();
    if arguments.json {
        let mut json = as_json(&sample);
        json["prompt_token_ids"] = json!(response.prompt_tokens);
        json["token_ids"] = json!(response.tokens);
        json["logprobs"] = json!(response.logprobs);
        json["sampled_logprobs"] = json!(response.sampled_logprobs);
        let span = |span: &v1::VersionSpan| json!({"version": span.version, "tokens": span.tokens});
        json["spans"] = response.spans.iter().map(span).collect();
        output::json(format_args!("{json:#}"));
        return Ok(Exit::Done);
    }
    if response.tokens.len() != response.logprobs.len() {
        let error = anyhow!("it has {} tokens and {} log-probs", response.tokens.len(), response.logprobs.len());
        return Err(Failure::bug(error).doing("show the tokens"));
    }
    output::text(as_text(&sample));
    output::text(tokens_table(&response));
    Ok(Exit::Done)
}

/// Formats every token with its log-prob and a bar for its surprise (negative log-prob), so that colour is not needed.
fn tokens_table(response: &v1::GetSampleResponse) -> String {
    let versions: Vec<u64> = response
        .spans
        .iter()
        .flat_map(|span| std::iter::repeat_n(span.version, (span.tokens as usize).min(response.tokens.len())))
        .collect();
    let mut rows = vec![["token", "id", "log-prob", "weights", "surprise"].map(str::to_owned).to_vec()];
    for (place, (token, logprob)) in response.tokens.iter().zip(&response.logprobs).enumerate() {
        let version = versions.get(place).map_or("-".to_owned(), |version| format!("v{version}"));
        let bar = "#".repeat(surprise(*logprob));
        rows.push(vec![place.to_string(), token.to_string(), format!("{logprob:.3}"), version, bar]);
    }
    let shown = response.tokens.len();
    let all = response.sample.as_ref().map_or(shown, |sample| sample.tokens as usize);
    let more = if shown < all { format!("and {} more tokens\n", all - shown) } else { String::new() };
    table(&rows) + &more
}

/// Returns the length of a token's bar: its surprise in nats, at most 20.
fn surprise(logprob: f32) -> usize {
    (-logprob).clamp(0.0, 20.0).round() as usize
}

impl Outcome {
    fn wire(self) -> v1::Outcome {
        match self {
            Self::Correct => v1::Outcome::Correct,
            Self::Wrong => v1::Outcome::Wrong,
            Self::Unparsable => v1::Outcome::Unparsable,
        }
    }
}

fn outcome(sample: &v1::ObservedSample) -> &'static str {
    match sample.verdict.as_ref().map(v1::Verdict::outcome) {
        None => "no verdict yet",
        Some(v1::Outcome::Correct) => "correct",
        Some(v1::Outcome::Wrong) => "wrong",
        Some(v1::Outcome::Unparsable) => "unparsable",
        Some(v1::Outcome::Failed) => "failed",
        Some(v1::Outcome::TimedOut) => "timed out",
        Some(v1::Outcome::Unspecified) => "unknown",
    }
}

fn set(sample: &v1::ObservedSample) -> &'static str {
    match sample.purpose() {
        v1::Purpose::Evaluate => "evaluation",
        v1::Purpose::Train | v1::Purpose::Unspecified => "train",
    }
}

fn finish(sample: &v1::ObservedSample) -> &'static str {
    match sample.finish() {
        v1::FinishReason::Stop => "stop",
        v1::FinishReason::Length => "length",
        v1::FinishReason::Unspecified => "unknown",
    }
}

/// What the last update made of a sample, in words: its score, and its coefficient with a sign, where positive pushes
/// the answer up.
pub(super) fn signal(sample: &v1::ObservedSample) -> Vec<String> {
    let score = sample.score.map(|score| format!("score {score:.3}"));
    let coefficient = sample.coefficient.map(|coefficient| match coefficient {
        0.0 => "coefficient 0".to_owned(),
        // A share of one in some hundred or thousand answers: few digits after the point would be zeros.
        other => format!("coefficient {other:+.2e}"),
    });
    score.into_iter().chain(coefficient).collect()
}

/// Formats the heading of a sample.
fn heading(sample: &v1::ObservedSample) -> String {
    let mut text = format!("g{}.{}  {}", sample.group_id, sample.index, set(sample));
    match sample.step {
        Some(step) => drop(write!(text, " step {step}")),
        None => text.push_str(", in flight"),
    }
    let _ = write!(text, "  {}", outcome(sample));
    if let Some(verdict) = &sample.verdict {
        let _ = write!(text, "  reward {:.3}  label {}", verdict.reward, verdict.label);
    }
    for of_training in signal(sample) {
        let _ = write!(text, "  {of_training}");
    }
    let _ = write!(text, "  {} tokens ({})", sample.tokens, finish(sample));
    let tokens = f64::from(sample.tokens.max(1));
    if let Some(sum) = sample.logprob_sum {
        let _ = write!(text, "  log-prob {:.3} a token", sum / tokens);
    }
    let _ = write!(text, "  entropy {:.3}", sample.entropy_sum / tokens);
    if let Some(version) = sample.version {
        let _ = write!(text, "  weights v{version}");
    }
    text
}

fn as_text(sample: &v1::ObservedSample) -> String {
    let mut text = heading(sample) + "\n";
    let mut say = |name: &str, said: &str| {
        // Line breaks of the model's text are kept; all other control characters are neutralised.
        for (place, line) in said.split('\n').enumerate() {
            let name = if place == 0 { name } else { "" };
            let _ = writeln!(text, "  {name:<10}{}", harmless(line));
        }
    };
    say("question", &sample.question);
    say("answer", &sample.response);
    if let Some(verdict) = &sample.verdict {
        say("extracted", verdict.extracted.as_deref().unwrap_or("(nothing)"));
        say("gold", &sample.gold);
        say("rule", &verdict.rule);
    }
    if sample.shortened {
        say("", "… (texts are cut off; --full shows more)");
    }
    text + "\n"
}

/// Lays out the answers of a group in columns, as many as fit the width.
fn side_by_side(group: &[v1::ObservedSample], width: usize) -> String {
    let Some(first) = group.first() else { return String::new() };
    let mut text = format!("g{}  {}", first.group_id, set(first));
    if let Some(step) = first.step {
        let _ = write!(text, " step {step}");
    }
    let _ = writeln!(text, "  gold {}", harmless(&first.gold));
    for line in first.question.split('\n') {
        let _ = writeln!(text, "  {}", harmless(line));
    }
    let columns = (width / (NARROWEST + 3)).clamp(1, group.len());
    let column = (width.saturating_sub(3 * (columns - 1)) / columns).max(NARROWEST);
    for row in group.chunks(columns) {
        let cells: Vec<Vec<String>> = row.iter().map(|sample| cell(sample, column)).collect();
        let height = cells.iter().map(Vec::len).max().unwrap_or(0);
        text.push('\n');
        for line in 0..height {
            let parts = cells.iter().map(|cell| format!("{:<column$}", cell.get(line).map_or("", String::as_str)));
            let _ = writeln!(text, "{}", parts.collect::<Vec<_>>().join(" | ").trim_end());
        }
    }
    text + "\n"
}

/// Wraps one answer into lines of `width` characters.
fn cell(sample: &v1::ObservedSample, width: usize) -> Vec<String> {
    let reward = sample.verdict.as_ref().map_or(String::new(), |verdict| format!(" {:.3}", verdict.reward));
    let title = format!(".{} {}{reward}, {} tokens", sample.index, outcome(sample), sample.tokens);
    let mut lines = wrapped(&title, width);
    let signal = signal(sample);
    if !signal.is_empty() {
        lines.extend(wrapped(&signal.join(", "), width));
    }
    lines.push("-".repeat(width));
    lines.extend(sample.response.split('\n').flat_map(|line| wrapped(&harmless(line), width)));
    if sample.shortened {
        lines.push("…".to_owned());
    }
    lines
}

/// Breaks a line after at most `width` characters, at a space where there is one.
fn wrapped(line: &str, width: usize) -> Vec<String> {
    let (mut lines, mut rest) = (Vec::new(), line.chars().collect::<Vec<_>>());
    while rest.len() > width {
        let space = rest[..width].iter().rposition(|c| *c == ' ').filter(|space| *space > width / 2);
        let at = space.map_or(width, |space| space + 1);
        let tail = rest.split_off(at);
        lines.push(rest.into_iter().collect::<String>().trim_end().to_owned());
        rest = tail;
    }
    lines.push(rest.into_iter().collect());
    lines
}

fn screen_width() -> usize {
    let said = std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
    let measured = || terminal_size::terminal_size().map(|(width, _)| usize::from(width.0));
    said.or_else(measured).unwrap_or(USUAL_WIDTH).clamp(40, 1000)
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    fn sample(index: u32, response: &str) -> v1::ObservedSample {
        let outcome = if index == 0 { v1::Outcome::Correct } else { v1::Outcome::Wrong };
        let verdict = v1::Verdict {
            outcome: outcome.into(),
            label: f64::from(u8::from(index == 0)),
            reward: 1.0 - f64::from(index),
            extracted: (index == 0).then(|| "42".to_owned()),
            rule: "boxed".into(),
        };
        v1::ObservedSample {
            purpose: v1::Purpose::Train.into(),
            state: v1::SampleState::Archived.into(),
            step: Some(12),
            group_id: 96,
            index,
            question: "What is 6 * 7?".into(),
            gold: "42".into(),
            response: response.into(),
            shortened: false,
            verdict: Some(verdict),
            tokens: 4,
            finish: v1::FinishReason::Stop.into(),
            version: Some(11),
            logprob_sum: Some(-2.0),
            entropy_sum: 1.0,
            score: Some(if index == 0 { 0.5 } else { -0.5 }),
            coefficient: Some(if index == 0 { 0.0125 } else { -0.0125 }),
        }
    }

    #[test]
    fn a_sample_says_all_that_it_was_judged_by() {
        expect![[r"
            g96.0  train step 12  correct  reward 1.000  label 1  score 0.500  coefficient +1.25e-2  4 tokens (stop)  log-prob -0.500 a token  entropy 0.250  weights v11
              question  What is 6 * 7?
              answer    It is
                        \boxed{42}
              extracted 42
              gold      42
              rule      boxed

        "]]
        .assert_eq(&as_text(&sample(0, "It is\n\\boxed{42}")));
        let unjudged = v1::ObservedSample {
            verdict: None,
            step: None,
            version: None,
            logprob_sum: None,
            score: None,
            coefficient: None,
            shortened: true,
            ..sample(1, "so")
        };
        expect![[r"
            g96.1  train, in flight  no verdict yet  4 tokens (stop)  entropy 0.250
              question  What is 6 * 7?
              answer    so
                        … (texts are cut off; --full shows more)

        "]]
        .assert_eq(&as_text(&unjudged));
        assert_eq!(as_json(&unjudged)["outcome"], Value::Null);
    }

    #[test]
    fn a_group_stands_side_by_side() {
        let group = [sample(0, "It is 42."), sample(1, "Six times seven is the same as seven times six, so 43.")];
        expect![[r"
            g96  train step 12  gold 42
              What is 6 * 7?

            .0 correct 1.000, 4 tokens   | .1 wrong 0.000, 4 tokens
            score 0.500, coefficient     | score -0.500, coefficient
            +1.25e-2                     | -1.25e-2
            ---------------------------- | ----------------------------
            It is 42.                    | Six times seven is the same
                                         | as seven times six, so 43.

        "]]
        .assert_eq(&side_by_side(&group, 60));
        assert!(side_by_side(&group, 30).lines().all(|line| line.chars().count() <= 30));
    }

    #[test]
    fn nothing_that_a_model_says_reaches_the_terminal_as_it_is() {
        let hostile = "\u{1b}]0;x\u{7}\u{9b}2J\r\u{202e}step";
        let mut bad = sample(0, hostile);
        for text in [&mut bad.question, &mut bad.gold] {
            text.push_str(hostile);
        }
        let verdict = bad.verdict.as_mut().expect("it has one");
        (verdict.rule, verdict.extracted) = (hostile.into(), Some(hostile.into()));
        for shown in [as_text(&bad), side_by_side(&[bad.clone(), bad.clone()], 80)] {
            assert!(!shown.chars().any(|c| c.is_control() && c != '\n') && !shown.contains('\u{202e}'), "{shown:?}");
        }
    }

    #[test]
    fn what_training_made_of_a_sample_is_shown_as_far_as_it_is_known() {
        let of = |score, coefficient| signal(&v1::ObservedSample { score, coefficient, ..sample(0, "") }).join(", ");
        assert_eq!(of(Some(-1.25), Some(-1.0 / 3072.0)), "score -1.250, coefficient -3.26e-4");
        assert_eq!(of(Some(0.0), Some(0.0)), "score 0.000, coefficient 0");
        assert_eq!(of(None, Some(0.5)), "coefficient +5.00e-1", "an external program names no score");
        assert_eq!(of(None, None), "");
        let json = as_json(&sample(1, ""));
        assert_eq!((json["score"].as_f64(), json["coefficient"].as_f64()), (Some(-0.5), Some(-0.0125)));
        assert_eq!(as_json(&v1::ObservedSample::default())["score"], Value::Null);
    }

    #[test]
    fn tokens_are_shown_with_their_weights() {
        let span = |version, tokens| v1::VersionSpan { version, tokens };
        let response = v1::GetSampleResponse {
            sample: Some(sample(0, "x")),
            tokens: vec![5, 7, 9],
            logprobs: vec![-0.25, -3.0, -100.0],
            spans: vec![span(10, 1), span(11, u32::MAX)],
            ..Default::default()
        };
        expect![[r"
            token  id  log-prob  weights  surprise
            0      5   -0.250    v10
            1      7   -3.000    v11      ###
            2      9   -100.000  v11      ####################
            and 1 more tokens
        "]]
        .assert_eq(&tokens_table(&response));
    }

    #[test]
    fn samples_are_named_as_they_are_shown() {
        assert_eq!((sample_id("96.3"), sample_id("g96.3")), (Ok((96, 3)), Ok((96, 3))));
        for other in ["96", "96.", "x.3", "96.3.1", "96.-1"] {
            assert!(sample_id(other).is_err(), "{other}");
        }
    }
}
