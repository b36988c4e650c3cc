//! Traces for OpenTelemetry: each step as the spans `rl.loop`, `rl.sample`, `rl.reward`, `rl.train` and `rl.sync`, each
//! evaluation as `rl.evaluate`, sent to a collector by OTLP over HTTP, in JSON.
//!
//! Written by hand: the official crates bring a second gRPC or HTTP client, and what is sent is five objects a step.
//! The spans are made of the step's metrics when it has ended, so a run does nothing for them while it works. A trace
//! has the id that log lines of the step carry ([`TraceContext::of_step`]).

use std::collections::HashMap;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::header::{CONTENT_TYPE, HOST, HeaderName, HeaderValue};
use axum::http::{Request, Uri};
use hyper_util::rt::TokioIo;
use pacs_protocol::v1;
use pacs_protocol::v1::watch_response::Event;
use pacs_runtime::trace::TraceContext;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::sync::broadcast::error::RecvError;

use super::Observer;

/// Deadline of one try to send.
const DEADLINE: Duration = Duration::from_secs(10);
/// Tries for one step; after them its spans are lost, and the next step is sent.
const TRIES: u32 = 3;
/// Largest answer of a collector that is read.
const MOST_ANSWER: usize = 64 << 10;
/// Pause before another try.
const PAUSE: Duration = Duration::from_secs(2);

/// Where traces are sent, from the variables that OpenTelemetry defines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceExport {
    endpoint: Uri,
    headers: Vec<(HeaderName, HeaderValue)>,
    service: String,
}

/// A variable that asks for what this program does not do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{variable} {problem}")]
pub struct TraceExportError {
    variable: &'static str,
    problem: String,
}

impl TraceExport {
    /// Reads `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT` (a whole address), or else `OTEL_EXPORTER_OTLP_ENDPOINT` (to which
    /// `/v1/traces` is added), `OTEL_EXPORTER_OTLP_HEADERS` and `OTEL_SERVICE_NAME`; `None` where no endpoint is set, or
    /// `OTEL_SDK_DISABLED` is `true`.
    ///
    /// # Errors
    /// When the endpoint is no `http://` address, the protocol is another one, or a header is malformed.
    pub fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, TraceExportError> {
        const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
        const TRACES: &str = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";
        const PROTOCOL: &str = "OTEL_EXPORTER_OTLP_PROTOCOL";
        const HEADERS: &str = "OTEL_EXPORTER_OTLP_HEADERS";
        let set = |name| variable(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
        if set("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
            return Ok(None);
        }
        let (name, address) = match (set(TRACES), set(ENDPOINT)) {
            (Some(address), _) => (TRACES, address),
            (None, Some(address)) => (ENDPOINT, format!("{}/v1/traces", address.trim_end_matches('/'))),
            (None, None) => return Ok(None),
        };
        let wrong = |variable, problem: &str| TraceExportError { variable, problem: problem.to_owned() };
        if set(PROTOCOL).is_some_and(|protocol| protocol != "http/json") {
            return Err(wrong(
                PROTOCOL,
                "must be `http/json` or unset: collectors take it at the port of `http/protobuf`, 4318",
            ));
        }
        let endpoint: Uri = address.parse().map_err(|_| wrong(name, "is no address"))?;
        if endpoint.scheme_str() != Some("http") || endpoint.host().is_none() {
            return Err(wrong(name, "must begin with http://; for TLS, run a collector on this machine that forwards"));
        }
        let pairs = set(HEADERS).unwrap_or_default();
        let pairs = pairs.split(',').filter(|pair| !pair.trim().is_empty());
        let headers = pairs.map(|pair| {
            let (name, value) = pair.split_once('=')?;
            Some((name.trim().parse().ok()?, HeaderValue::from_str(value.trim()).ok()?))
        });
        let headers = headers.collect::<Option<Vec<_>>>();
        let headers = headers.ok_or_else(|| wrong(HEADERS, "must be name=value, separated by commas"))?;
        Ok(Some(Self { endpoint, headers, service: set("OTEL_SERVICE_NAME").unwrap_or_else(|| "pacs".into()) }))
    }

    /// The address that spans are sent to.
    #[must_use]
    pub fn endpoint(&self) -> String {
        self.endpoint.to_string()
    }

    async fn send(&self, body: String) -> Result<(), String> {
        let (host, port) = (self.endpoint.host().unwrap_or_default(), self.endpoint.port_u16().unwrap_or(80));
        let stream = TcpStream::connect((host.trim_matches(['[', ']']), port)).await;
        let stream = stream.map_err(|error| error.to_string())?;
        let handshake = hyper::client::conn::http1::handshake::<_, Body>(TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.map_err(|error| error.to_string())?;
        let mut request = Request::post(self.endpoint.path_and_query().map_or("/", |path| path.as_str()));
        if let Some(authority) = self.endpoint.authority() {
            request = request.header(HOST, authority.as_str());
        }
        request = request.header(CONTENT_TYPE, "application/json");
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        let request = request.body(Body::from(body)).map_err(|error| error.to_string())?;
        let exchange = async {
            let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
            let status = response.status();
            let body = axum::body::to_bytes(Body::new(response.into_body()), MOST_ANSWER).await;
            if status.is_success() {
                return Ok(());
            }
            let body: Bytes = body.unwrap_or_default();
            Err(format!("{status}: {}", String::from_utf8_lossy(&body[..body.len().min(300)])))
        };
        // Ends with the exchange.
        let connection = tokio::spawn(connection);
        let sent = exchange.await;
        connection.abort();
        sent
    }
}

impl Observer {
    /// Sends traces of steps and evaluations from now on, until the run ends. A collector that is gone costs its spans and
    /// a warning, and the run nothing.
    pub fn export_traces(&self, export: TraceExport) {
        let subscription = self.0.feed.subscribe(0);
        let (mut events, mut closed) = (subscription.events, subscription.closed);
        let run = self.0.run_id.clone();
        // Ends with the run, after its last step was sent or given up.
        tokio::spawn(async move {
            let (mut lost, mut is_warned) = (0_u64, false);
            loop {
                let event = tokio::select! {
                    biased;
                    event = events.recv() => event,
                    _ = closed.wait_for(|closed| *closed) => return,
                };
                let event = match event {
                    Ok(event) => event,
                    Err(RecvError::Lagged(_)) => continue,
                    Err(RecvError::Closed) => return,
                };
                let spans = spans(&run, &event);
                if !spans.is_empty() && deliver(&export, &run, &spans, &mut is_warned).await.is_err() {
                    lost += spans.len() as u64;
                    tracing::debug!(lost, "spans were not delivered");
                }
                if matches!(event.event, Some(Event::RunOver(_))) {
                    return;
                }
            }
        });
    }
}

async fn deliver(export: &TraceExport, run: &str, spans: &[Value], is_warned: &mut bool) -> Result<(), ()> {
    let body = body(&export.service, run, spans).to_string();
    for turn in 1..=TRIES {
        let sent = tokio::time::timeout(DEADLINE, export.send(body.clone())).await;
        match sent.unwrap_or_else(|_| Err(format!("no answer within {} s", DEADLINE.as_secs()))) {
            Ok(()) => {
                *is_warned = false;
                return Ok(());
            }
            // Once until it works again, because the next steps would say the same.
            Err(error) if turn == TRIES && !*is_warned => {
                *is_warned = true;
                tracing::warn!("traces are not delivered to {}: {error}", export.endpoint);
            }
            Err(_) => {}
        }
        if turn < TRIES {
            tokio::time::sleep(PAUSE).await;
        }
    }
    Err(())
}

/// The message of OTLP around spans.
fn body(service: &str, run: &str, spans: &[Value]) -> Value {
    let resource = [("service.name", service), ("service.version", env!("CARGO_PKG_VERSION")), ("pacs.run_id", run)];
    let attributes: Vec<Value> =
        resource.iter().map(|(key, value)| json!({"key": key, "value": {"stringValue": value}})).collect();
    json!({"resourceSpans": [{
        "resource": {"attributes": attributes},
        "scopeSpans": [{"scope": {"name": "pacs.coordinator"}, "spans": spans}],
    }]})
}

/// The spans of an event; none for events other than steps and evaluations.
fn spans(run: &str, event: &v1::WatchResponse) -> Vec<Value> {
    match &event.event {
        Some(Event::Step(step)) => step_spans(run, step.step, &step.metrics, event.time),
        Some(Event::Evaluation(evaluation)) => {
            let metrics = &evaluation.metrics;
            let end = metrics.get("time").copied().unwrap_or(event.time);
            let begin = end - metrics.get("seconds").copied().unwrap_or(0.0);
            let attributes = ["pass_at_1", "pass_at_k", "k", "problems", "samples"];
            let trace = Trace { run, step: evaluation.step, metrics };
            vec![trace.span(6, None, "rl.evaluate", (begin, end), &attributes)]
        }
        _ => Vec::new(),
    }
}

fn step_spans(run: &str, step: u64, metrics: &HashMap<String, f64>, now: f64) -> Vec<Value> {
    let seconds = |name: &str| metrics.get(name).copied().filter(|value| value.is_finite()).unwrap_or(0.0).max(0.0);
    let end = metrics.get("time").copied().unwrap_or(now);
    let begin = end - seconds("total_seconds");
    let sampled = (begin + seconds("sampling_seconds")).min(end);
    let trained = (sampled + seconds("training_seconds")).min(end);
    let judged = (sampled - seconds("verifying_seconds")).max(begin);
    let published = (trained - seconds("seconds_publish")).max(sampled);
    let trace = Trace { run, step, metrics };
    vec![
        trace.span(
            1,
            None,
            "rl.loop",
            (begin, end),
            &["reward_mean", "pass_rate", "mixed_share", "entropy", "lag", "version"],
        ),
        trace.span(
            2,
            Some(1),
            "rl.sample",
            (begin, sampled),
            &["generated_tokens", "tokens_per_second", "answer_tokens_mean", "truncated_share"],
        ),
        trace.span(3, Some(2), "rl.reward", (judged, sampled), &["failed_verdicts", "replaced_samples"]),
        trace.span(
            4,
            Some(1),
            "rl.train",
            (sampled, trained),
            &["loss", "grad_norm", "trained_tokens", "skipped_updates", "logprob_mismatch_mean"],
        ),
        trace.span(5, Some(4), "rl.sync", (published, trained), &["communication_bytes"]),
    ]
}

/// What the spans of one trace share.
struct Trace<'a> {
    run: &'a str,
    step: u64,
    metrics: &'a HashMap<String, f64>,
}

impl Trace<'_> {
    /// A span from begin to end, in seconds since 1970. Its id is unique within its trace.
    fn span(&self, id: u64, parent: Option<u64>, name: &str, (begin, end): (f64, f64), attributes: &[&str]) -> Value {
        let span_id = |id: u64| format!("{:016x}", self.step << 8 | id);
        // Integers of 64 bits are strings in JSON of OTLP.
        let nanoseconds = |seconds: f64| format!("{:.0}", (seconds * 1e6).round() * 1e3);
        let named = |name: &&str| {
            let value = self.metrics.get(*name).filter(|value| value.is_finite())?;
            Some(json!({"key": format!("rl.{name}"), "value": {"doubleValue": value}}))
        };
        let step = json!({"key": "rl.step", "value": {"intValue": self.step.to_string()}});
        let attributes: Vec<Value> = [step].into_iter().chain(attributes.iter().filter_map(named)).collect();
        json!({
            "traceId": TraceContext::of_step(self.run, self.step).trace_id().to_string(),
            "spanId": span_id(id),
            "parentSpanId": parent.map(span_id).unwrap_or_default(),
            "name": name,
            "kind": 1,
            "startTimeUnixNano": nanoseconds(begin),
            "endTimeUnixNano": nanoseconds(end),
            "attributes": attributes,
        })
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    fn variables<'a>(set: &'a [(&'a str, &'a str)]) -> impl Fn(&str) -> Option<String> + 'a {
        |name| set.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
    }

    #[test]
    fn the_usual_variables_say_where_traces_go() {
        let of = |set: &[(&str, &str)]| TraceExport::from_variables(variables(set));
        assert_eq!(of(&[]), Ok(None), "off unless asked");
        let base = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318/");
        assert_eq!(of(&[base]).unwrap().unwrap().endpoint(), "http://collector:4318/v1/traces");
        assert_eq!(of(&[base, ("OTEL_SDK_DISABLED", "TRUE")]), Ok(None));
        let whole = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://[::1]:9/in");
        assert_eq!(of(&[base, whole]).unwrap().unwrap().endpoint(), "http://[::1]:9/in");
        let headers = of(&[base, ("OTEL_EXPORTER_OTLP_HEADERS", "api-key=a=b, x=1")]).unwrap().unwrap().headers;
        assert_eq!((headers.len(), headers[0].1.to_str().unwrap()), (2, "a=b"));
        for (wrong, said) in [
            ([base, ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")], "must be `http/json`"),
            ([base, ("OTEL_EXPORTER_OTLP_HEADERS", "api-key")], "name=value"),
            ([base, ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://x/v1/traces")], "http://"),
            ([base, ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "no address")], "is no address"),
        ] {
            assert!(of(&wrong).unwrap_err().to_string().contains(said), "{wrong:?}");
        }
    }

    fn step() -> v1::WatchResponse {
        let metrics = [
            ("time", 1000.0),
            ("total_seconds", 10.0),
            ("sampling_seconds", 6.0),
            ("verifying_seconds", 2.0),
            ("training_seconds", 4.0),
            ("seconds_publish", 0.5),
            ("reward_mean", 0.25),
            ("loss", f64::NAN),
        ];
        let metrics = metrics.map(|(name, value)| (name.to_owned(), value)).into();
        let done = v1::StepDone { step: 7, total_steps: 9, metrics, remaining_seconds: 1.0 };
        v1::WatchResponse { number: 1, time: 1000.5, event: Some(Event::Step(done)) }
    }

    #[test]
    fn a_step_is_five_spans_that_lie_within_each_other() {
        let spans = spans("ab", &step());
        let named = |name: &str| spans.iter().find(|span| span["name"] == name).unwrap();
        let times = |name: &str| {
            let of = |key: &str| named(name)[key].as_str().unwrap().parse::<f64>().unwrap() / 1e9;
            (of("startTimeUnixNano"), of("endTimeUnixNano"))
        };
        assert_eq!(times("rl.loop"), (990.0, 1000.0));
        assert_eq!(times("rl.sample"), (990.0, 996.0));
        assert_eq!(times("rl.reward"), (994.0, 996.0));
        assert_eq!(times("rl.train"), (996.0, 1000.0));
        assert_eq!(times("rl.sync"), (999.5, 1000.0));
        for span in &spans {
            assert_eq!(span["traceId"], TraceContext::of_step("ab", 7).trace_id().to_string());
            let parent = span["parentSpanId"].as_str().unwrap();
            assert!(parent.is_empty() || spans.iter().any(|other| other["spanId"] == parent), "{span}");
        }
        let ids: std::collections::BTreeSet<_> = spans.iter().map(|span| span["spanId"].to_string()).collect();
        assert_eq!(ids.len(), 5);
        let text = body("pacs", "ab", &spans).to_string();
        assert!(text.contains(r#""key":"rl.reward_mean","value":{"doubleValue":0.25}"#) && !text.contains("rl.loss"));
    }

    #[tokio::test]
    async fn a_collector_receives_them_and_one_that_fails_is_tried_again() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let collector = tokio::spawn(async move {
            let mut received = Vec::new();
            for answer in ["503 Service Unavailable", "200 OK"] {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = Vec::new();
                let mut part = [0; 4096];
                // The body is one JSON object, so the request ends with its last brace.
                while serde_json::from_slice::<Value>(after_head(&request)).is_err() {
                    let count = stream.read(&mut part).await.unwrap();
                    assert!(count > 0, "the request ends early");
                    request.extend_from_slice(&part[..count]);
                }
                let answer = format!("HTTP/1.1 {answer}\r\ncontent-length: 2\r\n\r\n{{}}");
                stream.write_all(answer.as_bytes()).await.unwrap();
                received.push(request);
            }
            received
        });
        let set = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://{address}")),
            ("OTEL_EXPORTER_OTLP_HEADERS", "api-key=k".into()),
        ];
        let set: Vec<(&str, &str)> = set.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let export = TraceExport::from_variables(variables(&set)).unwrap().unwrap();
        deliver(&export, "ab", &spans("ab", &step()), &mut false).await.unwrap();
        let received = collector.await.unwrap();
        assert_eq!(received[0], received[1], "the same spans again");
        let head = String::from_utf8_lossy(&received[1]).to_ascii_lowercase();
        assert!(head.starts_with("post /v1/traces http/1.1\r\n"), "{head}");
        assert!(
            head.contains("\r\ncontent-type: application/json\r\n") && head.contains("\r\napi-key: k\r\n"),
            "{head}"
        );
        let json: Value = serde_json::from_slice(after_head(&received[1])).unwrap();
        assert_eq!(json["resourceSpans"][0]["scopeSpans"][0]["spans"].as_array().unwrap().len(), 5);
    }

    fn after_head(request: &[u8]) -> &[u8] {
        let end = request.windows(4).position(|window| window == b"\r\n\r\n");
        end.map_or(&[], |end| &request[end + 4..])
    }
}
