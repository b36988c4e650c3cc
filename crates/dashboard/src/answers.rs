//! The data behind `/api/`: queries to requests of the source, and answers to JSON.

use std::collections::HashMap;

use axum::http::StatusCode;
use pacs_protocol::v1;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::json;
use crate::server::Served;
use crate::source::SourceError;

/// Tokens of a sample in one answer.
const MOST_TOKENS: u32 = 4096;
/// Past events in an answer; the source keeps no more.
const MOST_EVENTS: u32 = 512;
/// Bytes of a text in a list of samples, unless the query says otherwise.
const TEXT_BYTES: u32 = 4096;

/// A refusal: its status and a sentence for the reader.
#[derive(Debug)]
pub(crate) struct Refusal(pub(crate) StatusCode, pub(crate) String);

impl From<SourceError> for Refusal {
    fn from(error: SourceError) -> Self {
        let status = match &error {
            SourceError::Invalid(_) => StatusCode::BAD_REQUEST,
            SourceError::NotFound(_) => StatusCode::NOT_FOUND,
            SourceError::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
        };
        Self(status, error.to_string())
    }
}

/// Parameters of all calls; each takes those that it knows. Unknown ones are refused.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Query {
    set: String,
    /// Of evaluations: the name of the set of problems.
    problems: String,
    names: String,
    points: u32,
    first: Option<u64>,
    last: Option<u64>,
    step: Option<u64>,
    group: Option<u64>,
    index: u32,
    outcome: String,
    text: String,
    limit: u32,
    page: String,
    bytes: u32,
    seconds: Option<f64>,
    past: Option<u32>,
}

impl Query {
    pub(crate) fn parse(text: &str) -> Result<Self, Refusal> {
        let uri = format!("/?{text}").parse().map_err(|_| bad("the query is not percent-encoded"))?;
        let parsed = axum::extract::Query::try_from_uri(&uri);
        parsed.map(|axum::extract::Query(query)| query).map_err(|error| bad(error.body_text()))
    }

    fn purpose(&self) -> Result<i32, Refusal> {
        Ok(match self.set.as_str() {
            "" => v1::Purpose::Unspecified,
            "train" => v1::Purpose::Train,
            "evaluation" => v1::Purpose::Evaluate,
            other => return Err(bad(format!("`set` is `{other:.20}`, expected `train` or `evaluation`"))),
        }
        .into())
    }

    fn outcomes(&self) -> Result<Vec<i32>, Refusal> {
        let words = self.outcome.split(',').filter(|word| !word.is_empty());
        words
            .map(|word| match word {
                "correct" => Ok(v1::Outcome::Correct.into()),
                "wrong" => Ok(v1::Outcome::Wrong.into()),
                "unparsable" => Ok(v1::Outcome::Unparsable.into()),
                other => Err(bad(format!("`outcome` has `{other:.20}`, expected `correct`, `wrong` or `unparsable`"))),
            })
            .collect()
    }
}

fn bad(problem: impl Into<String>) -> Refusal {
    Refusal(StatusCode::BAD_REQUEST, problem.into())
}

/// The runs that are served.
pub(crate) fn runs(runs: &[Served]) -> Value {
    let one =
        |(index, served): (usize, &Served)| json!({"index": index, "name": served.run.name, "live": served.run.live});
    json!({"runs": runs.iter().enumerate().map(one).collect::<Vec<_>>()})
}

/// Answers one call about a run.
pub(crate) async fn answer(served: &Served, call: &str, query: Query) -> Result<Value, Refusal> {
    let source = &served.run.source;
    Ok(match call {
        "status" => match source.status().await? {
            Some(status) => json!({"status": json::status(&status)}),
            None => json!({"status": null}),
        },
        "metrics" => {
            let names = query.names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect();
            let request = v1::GetMetricsRequest {
                purpose: query.purpose()?,
                names,
                first_step: query.first,
                last_step: query.last,
                most_points: query.points,
                set: query.problems,
            };
            json::metrics(&source.metrics(request).await?)
        }
        "samples" => {
            let request = v1::ListSamplesRequest {
                purpose: query.purpose()?,
                state: v1::SampleState::Unspecified.into(),
                step: query.step,
                group_id: query.group,
                outcomes: query.outcomes()?,
                text: query.text,
                limit: query.limit,
                page: query.page,
                text_bytes: if query.bytes == 0 { TEXT_BYTES } else { query.bytes },
            };
            let response = source.samples(request).await?;
            let samples: Vec<Value> = response.samples.iter().map(json::sample).collect();
            json!({"samples": samples, "next_page": response.next_page, "notes": response.notes})
        }
        "sample" => {
            let group_id = query.group.ok_or_else(|| bad("`group` is missing"))?;
            let first_token = u32::try_from(query.first.unwrap_or(0)).map_err(|_| bad("`first` is too large"))?;
            let request = v1::GetSampleRequest {
                group_id,
                index: query.index,
                step: query.step,
                first_token,
                most_tokens: MOST_TOKENS,
            };
            let response = source.sample(request).await?;
            let pieces = served.pieces(response.tokens.clone()).await;
            json::whole_sample(&response, &pieces)
        }
        "events" => {
            let past = query.past.unwrap_or(200).min(MOST_EVENTS);
            let events: Vec<Value> = source.events(past).await?.iter().map(|event| json::event(event)).collect();
            json!({"events": events})
        }
        "lanes" => served.lanes().json(query.seconds.filter(|seconds| seconds.is_finite()).unwrap_or(600.0)),
        "settings" => {
            json!({"toml": served.run.settings, "facts": served.run.facts.iter().cloned().collect::<HashMap<_, _>>()})
        }
        _ => return Err(Refusal(StatusCode::NOT_FOUND, "there is no such call".into())),
    })
}
