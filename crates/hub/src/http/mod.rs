//! Requests over HTTP/1.1, one connection each, with a deadline on every wait.

mod connect;
mod payload;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::{Body, Bytes, Incoming};
use hyper::header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue, LOCATION, RETRY_AFTER};
use hyper::{Method, Uri};
use rustls::ClientConfig;
use tokio::task::JoinHandle;
use tokio::time::timeout;

pub(crate) use self::payload::Payload;
use crate::{HubError, Settings};

/// Most redirections of one request.
const MOST_REDIRECTIONS: usize = 8;

/// Longest wait that a server can ask for.
const MOST_PAUSE: Duration = Duration::from_secs(60);

/// Longest of the waits that are ours.
const MOST_OWN_PAUSE: Duration = Duration::from_secs(30);

/// Bytes of an answer that say what is wrong.
const MOST_COMPLAINT: usize = 16 << 10;

/// A client of the hub and of the hosts that it sends to.
pub(crate) struct Http {
    pub(crate) settings: Settings,
    tls: Arc<ClientConfig>,
}

/// What is asked for.
pub(crate) struct Request {
    pub(crate) method: Method,
    pub(crate) url: String,
    pub(crate) headers: Vec<(HeaderName, String)>,
    pub(crate) payload: Payload,
    /// Whether other hosts than the hub get the request as it is. They never get the token.
    pub(crate) follows: bool,
}

impl Request {
    pub(crate) fn get(url: String) -> Self {
        Self { method: Method::GET, url, headers: Vec::new(), payload: Payload::None, follows: true }
    }

    pub(crate) fn post(url: String, body: String, kind: &str) -> Self {
        let headers = vec![(hyper::header::CONTENT_TYPE, kind.to_owned())];
        Self { method: Method::POST, url, headers, payload: Payload::text(body), follows: false }
    }

    pub(crate) fn with(mut self, name: HeaderName, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}

/// The head of an answer, and its body to come.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    /// Headers of the hub's own answer, where that sent us on to another host.
    pub(crate) first: Option<HeaderMap>,
    pub(crate) host: String,
    body: Incoming,
    silence: Duration,
    connection: JoinHandle<()>,
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Answer {
    /// A header of the hub, or else of the last server in a redirection.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let first = self.first.as_ref().and_then(|headers| headers.get(name));
        first.or_else(|| self.headers.get(name))?.to_str().ok()
    }

    /// The next piece of the body; `None` at its end.
    pub(crate) async fn chunk(&mut self) -> Result<Option<Bytes>, HubError> {
        let body = &mut self.body;
        let next = std::future::poll_fn(|context| Pin::new(&mut *body).poll_frame(context));
        let unreachable = |reason: String| HubError::Unreachable { host: self.host.clone(), reason };
        match timeout(self.silence, next).await {
            Err(_) => Err(unreachable(format!("nothing arrived for {} s", self.silence.as_secs_f32()))),
            Ok(None) => Ok(None),
            Ok(Some(Err(error))) => Err(unreachable(format!("the connection broke off: {}", causes(&error)))),
            Ok(Some(Ok(frame))) => Ok(Some(frame.into_data().unwrap_or_default())),
        }
    }

    /// The whole body, up to `most` bytes.
    pub(crate) async fn text(mut self, most: usize) -> Result<String, HubError> {
        let mut bytes = Vec::new();
        while let Some(chunk) = self.chunk().await? {
            if bytes.len() + chunk.len() > most {
                return Err(HubError::Answer {
                    host: self.host.clone(),
                    message: format!("its answer has more than {most} bytes"),
                });
            }
            bytes.extend_from_slice(&chunk);
        }
        String::from_utf8(bytes)
            .map_err(|_| HubError::Answer { host: self.host.clone(), message: "its answer is no text".to_owned() })
    }

    /// What a refusal says, as far as it can be had.
    pub(crate) async fn complaint(mut self) -> Complaint {
        let code = self.header("x-error-code").unwrap_or_default().to_owned();
        let said = self.header("x-error-message").unwrap_or_default().to_owned();
        let status = self.status;
        let host = self.host.clone();
        let mut bytes = Vec::new();
        while let Ok(Some(chunk)) = self.chunk().await {
            bytes.extend_from_slice(&chunk);
            if bytes.len() > MOST_COMPLAINT {
                break;
            }
        }
        let text = String::from_utf8_lossy(&bytes[..bytes.len().min(MOST_COMPLAINT)]).into_owned();
        let json: Option<serde_json::Value> = serde_json::from_str(&text).ok();
        let field = json.as_ref().and_then(|json| json.get("error").or_else(|| json.get("message"))?.as_str());
        let message = match (said.is_empty(), field) {
            (false, _) => said,
            (true, Some(field)) => field.to_owned(),
            (true, None) => "no reason given".to_owned(),
        };
        Complaint { status, code, message: message.chars().take(300).collect(), host }
    }
}

/// Why a server refuses.
#[derive(Debug)]
pub(crate) struct Complaint {
    pub(crate) status: u16,
    /// `RepoNotFound`, `GatedRepo`, …
    pub(crate) code: String,
    pub(crate) message: String,
    pub(crate) host: String,
}

/// How often something was tried in vain.
#[derive(Default)]
pub(crate) struct Tries(u32);

impl Tries {
    pub(crate) fn progressed(&mut self) {
        self.0 = 0;
    }
}

impl Http {
    pub(crate) fn new(settings: Settings) -> Result<Self, HubError> {
        let tls = connect::tls(settings.authorities.as_deref())?;
        Ok(Self { settings, tls: Arc::new(tls) })
    }

    /// Asks once; follows redirections of the hub to where a file is.
    pub(crate) async fn send(&self, request: Request) -> Result<Answer, HubError> {
        let Request { method, url, headers, mut payload, follows } = request;
        let mut target = parse(&url)?;
        let mut first = None;
        for _ in 0..=MOST_REDIRECTIONS {
            let own = self.is_hub(&target);
            let mut answer = self.exchange(&method, &target, &headers, payload.again()).await?;
            let moved = matches!(answer.status, 301 | 302 | 303 | 307 | 308);
            let Some(location) = answer.headers.get(LOCATION).filter(|_| moved) else {
                answer.first = first;
                return Ok(answer);
            };
            let next = location.to_str().ok().and_then(|location| join(&target, location)).ok_or_else(|| {
                HubError::Answer { host: answer.host.clone(), message: "it redirects to what is no address".to_owned() }
            })?;
            let is_downgrade = target.scheme_str() == Some("https") && next.scheme_str() != Some("https");
            if is_downgrade || !(follows || self.is_hub(&next)) {
                let message = format!("it redirects to `{}`", next.host().unwrap_or_default());
                return Err(HubError::Answer { host: answer.host.clone(), message });
            }
            if own {
                // What the hub says of a file is said in its last own answer.
                first = Some(std::mem::take(&mut answer.headers));
            }
            target = next;
        }
        let host = target.host().unwrap_or_default().to_owned();
        Err(HubError::Answer { host, message: format!("more than {MOST_REDIRECTIONS} redirections") })
    }

    /// Waits before the next try after `error`, or gives it back: when it is final, or there were enough.
    pub(crate) async fn pause(
        &self,
        tries: &mut Tries,
        error: HubError,
        asked: Option<Duration>,
    ) -> Result<(), HubError> {
        let patience = &self.settings.patience;
        tries.0 += 1;
        let may_pass = matches!(error, HubError::Unreachable { .. } | HubError::Busy { .. });
        if !may_pass || tries.0 >= patience.tries {
            return Err(error);
        }
        let own = patience.pause.saturating_mul(1 << (tries.0 - 1).min(16)).min(MOST_OWN_PAUSE);
        // Jitter: a thousand processes that met one refusal must not come back as one.
        let own = own.mul_f64(0.5 + fastrand::f64());
        tokio::time::sleep(asked.map_or(own, |asked| asked.clamp(own, MOST_PAUSE))).await;
        Ok(())
    }

    /// How long a server asks to wait.
    pub(crate) fn asked_pause(answer: &Answer) -> Option<Duration> {
        let seconds = answer.headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
        Some(Duration::from_secs(seconds))
    }

    fn is_hub(&self, target: &Uri) -> bool {
        let hub: Option<Uri> = self.settings.endpoint.parse().ok();
        hub.is_some_and(|hub| hub.scheme() == target.scheme() && hub.authority() == target.authority())
    }

    /// The token, for the hub only, and not in plain text to another machine.
    fn authorization(&self, target: &Uri) -> Option<String> {
        let is_private = target.scheme_str() == Some("https") || target.host().is_some_and(connect::is_loopback);
        let token = self.settings.token.as_ref().filter(|_| is_private && self.is_hub(target))?;
        Some(format!("Bearer {}", token.secret()))
    }

    async fn exchange(
        &self,
        method: &Method,
        target: &Uri,
        headers: &[(HeaderName, String)],
        payload: Payload,
    ) -> Result<Answer, HubError> {
        let patience = &self.settings.patience;
        let host = target.host().unwrap_or_default().to_owned();
        let unreachable = |reason: String| HubError::Unreachable { host: host.clone(), reason };
        let late = |seconds: Duration, what: &str| unreachable(format!("{what} within {} s", seconds.as_secs_f32()));
        let stream = timeout(patience.connect, connect::connect(&self.settings, &self.tls, target))
            .await
            .map_err(|_| late(patience.connect, "no connection"))?
            .map_err(|reason| unreachable(reason.to_string()))?;
        let handshake = hyper::client::conn::http1::handshake(stream);
        let (mut sender, connection) = timeout(patience.connect, handshake)
            .await
            .map_err(|_| late(patience.connect, "no connection"))?
            .map_err(|error| unreachable(causes(&error)))?;
        let connection = tokio::spawn(async move { drop(connection.await) });
        let progress = payload.progress();
        let request = self.request(method, target, headers, payload)?;
        let sent = answered(sender.send_request(request), patience.answer, &progress).await;
        let response = match sent {
            Some(Ok(response)) => response,
            other => {
                connection.abort();
                return Err(match other {
                    Some(Err(error)) => unreachable(causes(&error)),
                    _ => late(patience.answer, "no answer"),
                });
            }
        };
        let (head, body) = response.into_parts();
        let status = head.status.as_u16();
        let headers = head.headers;
        Ok(Answer { status, headers, first: None, host, body, silence: patience.silence, connection })
    }

    fn request(
        &self,
        method: &Method,
        target: &Uri,
        headers: &[(HeaderName, String)],
        payload: Payload,
    ) -> Result<hyper::Request<Payload>, HubError> {
        let path = target.path_and_query().map_or("/", |path| path.as_str());
        let authority = target.authority().map_or("", |authority| authority.as_str());
        let mut request = hyper::Request::builder()
            .method(method)
            .uri(path)
            .header(hyper::header::HOST, authority)
            .header(hyper::header::USER_AGENT, concat!("pacs/", env!("CARGO_PKG_VERSION")))
            // A packed body would have another length than the hub says.
            .header(hyper::header::ACCEPT_ENCODING, "identity");
        if let Some(length) = payload.length() {
            request = request.header(hyper::header::CONTENT_LENGTH, length);
        }
        for (name, value) in headers {
            request = request.header(name, value);
        }
        if let Some(authorization) = self.authorization(target)
            && let Ok(mut value) = HeaderValue::from_str(&authorization)
        {
            value.set_sensitive(true);
            request = request.header(AUTHORIZATION, value);
        }
        let invalid = |error: hyper::http::Error| HubError::Answer {
            host: target.host().unwrap_or_default().to_owned(),
            message: format!("no request can be made of it: {error}"),
        };
        request.body(payload).map_err(invalid)
    }
}

/// Waits for an answer: the deadline begins anew while the body is on its way.
async fn answered<T>(sending: impl Future<Output = T>, limit: Duration, progress: &payload::Sent) -> Option<T> {
    let mut sending = std::pin::pin!(sending);
    let mut seen = progress.bytes();
    loop {
        match timeout(limit, sending.as_mut()).await {
            Ok(answer) => return Some(answer),
            Err(_) if progress.bytes() > seen => seen = progress.bytes(),
            Err(_) => return None,
        }
    }
}

fn parse(url: &str) -> Result<Uri, HubError> {
    let found: Option<Uri> = url
        .parse()
        .ok()
        .filter(|uri: &Uri| matches!(uri.scheme_str(), Some("http" | "https")) && uri.authority().is_some());
    found.ok_or_else(|| HubError::Answer { host: url.chars().take(80).collect(), message: "no address".to_owned() })
}

/// Where a redirection leads: an address, or a path on the same host.
fn join(from: &Uri, location: &str) -> Option<Uri> {
    if let Some(path) = location.strip_prefix('/').filter(|path| !path.starts_with('/')) {
        return format!("{}://{}/{path}", from.scheme_str()?, from.authority()?).parse().ok();
    }
    parse(location).ok()
}

/// A part of an address's path as it has to be written.
pub(crate) fn escaped(text: &str, keeps_slashes: bool) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        let is_plain = byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) || (keeps_slashes && byte == b'/');
        if is_plain {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    escaped
}

/// An error with what it comes from.
pub(crate) fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let said = next.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        cause = next.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirections_lead_to_addresses_and_to_paths() {
        let from: Uri = "https://hub.example:8443/a/b?x=1".parse().expect("an address");
        for (location, to) in [
            ("/c/d?y=2", Some("https://hub.example:8443/c/d?y=2")),
            ("https://cdn.example/e", Some("https://cdn.example/e")),
            ("//cdn.example/e", None),
            ("e", None),
            ("file:///etc/passwd", None),
        ] {
            assert_eq!(join(&from, location).map(|uri| uri.to_string()).as_deref(), to, "{location}");
        }
    }

    #[test]
    fn paths_are_escaped() {
        assert_eq!(escaped("a b/ü?#%.json", true), "a%20b/%C3%BC%3F%23%25.json");
        assert_eq!(escaped("refs/pr/1", false), "refs%2Fpr%2F1");
    }
}
