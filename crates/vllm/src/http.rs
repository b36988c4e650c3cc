//! Requests over HTTP/1.1, one connection each, with a deadline on the whole exchange and a bound on the answer.
//!
//! A connection for each request, because a request is a whole generation: what a kept connection would save is nothing
//! beside it, and a dropped one tells the server that nobody waits any more.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::body::{Body, Bytes, Frame, SizeHint};
use hyper::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderValue};
use hyper::{Method, StatusCode};
use hyper_util::rt::TokioIo;
use pacs_runtime::chain;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::Fault;

/// Longest wait for a connection.
const CONNECT: Duration = Duration::from_secs(10);

/// Bytes of a refusal that are read.
const MOST_COMPLAINT: usize = 16 << 10;

/// Characters of a refusal that are told.
const TOLD: usize = 300;

/// A request body in memory.
pub(crate) struct Whole(Option<Bytes>);

impl Body for Whole {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        Poll::Ready(self.0.take().filter(|bytes| !bytes.is_empty()).map(|bytes| Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.as_ref().is_none_or(Bytes::is_empty)
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.0.as_ref().map_or(0, |bytes| bytes.len() as u64))
    }
}

/// One exchange with a server.
pub(crate) struct Call<'a> {
    /// What it is called in messages.
    pub(crate) name: &'static str,
    /// `host:port`.
    pub(crate) authority: &'a str,
    pub(crate) key: Option<&'a HeaderValue>,
    pub(crate) method: Method,
    pub(crate) path: &'a str,
    /// JSON text of the request; `None` for a request without a body.
    pub(crate) body: Option<String>,
    /// For everything together.
    pub(crate) deadline: Duration,
    /// Most bytes of a good answer.
    pub(crate) most_bytes: usize,
}

/// Makes a call; returns the body of a good answer.
pub(crate) async fn exchange(call: Call<'_>) -> Result<Vec<u8>, Fault> {
    let (name, deadline) = (call.name, call.deadline);
    let late = Fault::Late { call: name, seconds: deadline.as_secs() };
    timeout(deadline, exchange_unbounded(call)).await.unwrap_or(Err(late))
}

async fn exchange_unbounded(call: Call<'_>) -> Result<Vec<u8>, Fault> {
    let connected = timeout(CONNECT, TcpStream::connect(call.authority)).await;
    let stream = connected
        .map_err(|_| Fault::Unreachable(format!("no connection within {} s", CONNECT.as_secs())))?
        .map_err(|error| Fault::Unreachable(error.to_string()))?;
    let broken = |error: hyper::Error| Fault::Broken { call: call.name, problem: chain(&error) };
    // Best effort: without it an answer arrives a little later.
    let _ = stream.set_nodelay(true);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
    // Ends with the sender and the body, which this future owns; so a dropped call closes its connection.
    let connection = Connection(tokio::spawn(async move { drop(connection.await) }));
    let response = sender.send_request(request(&call)).await.map_err(broken)?;
    let (head, mut body) = response.into_parts();
    let most = if head.status == StatusCode::OK { call.most_bytes } else { MOST_COMPLAINT };
    let mut bytes = Vec::new();
    while let Some(frame) = std::future::poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
        let data = frame.map_err(broken)?.into_data().unwrap_or_default();
        if bytes.len() + data.len() > most {
            if head.status == StatusCode::OK {
                return Err(Fault::TooLong { call: call.name, most });
            }
            break;
        }
        bytes.extend_from_slice(&data);
    }
    drop(connection);
    match head.status {
        StatusCode::OK => Ok(bytes),
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => Err(Fault::Busy(head.status.as_u16())),
        status => Err(Fault::Refused { call: call.name, status: status.as_u16(), message: complaint(&bytes) }),
    }
}

/// Ends the task of a connection.
struct Connection(tokio::task::JoinHandle<()>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn request(call: &Call<'_>) -> hyper::Request<Whole> {
    let body = call.body.clone().map(Bytes::from);
    let mut request = hyper::Request::new(Whole(body));
    *request.method_mut() = call.method.clone();
    *request.uri_mut() = call.path.parse().expect("paths are ours");
    let length = call.body.as_ref().map_or(0, String::len);
    let headers = request.headers_mut();
    // The authority was checked when the job was read.
    if let Ok(host) = HeaderValue::from_str(call.authority) {
        headers.insert(HOST, host);
    }
    headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    if call.body.is_some() {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    }
    if let Some(key) = call.key {
        headers.insert(AUTHORIZATION, key.clone());
    }
    request
}

/// What a refusal says: the message within vLLM's JSON, or the text.
fn complaint(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let json: Option<serde_json::Value> = serde_json::from_str(&text).ok();
    let found = json.as_ref().and_then(|json| {
        let error = json.get("error").unwrap_or(json);
        let said = error.get("message").or_else(|| error.get("detail")).unwrap_or(error);
        said.as_str().map(str::to_owned)
    });
    let said = found.unwrap_or_else(|| text.into_owned());
    pacs_runtime::harmless(said.trim()).chars().take(TOLD).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_read_out_and_cut() {
        for (body, said) in [
            (r#"{"error": {"message": "no such model", "code": 404}}"#, "no such model"),
            (r#"{"error": "Failed to pause generation: x"}"#, "Failed to pause generation: x"),
            (r#"{"detail": "Not Found"}"#, "Not Found"),
            ("Bad Gateway\n", "Bad Gateway"),
        ] {
            assert_eq!(complaint(body.as_bytes()), said);
        }
        assert_eq!(complaint("x".repeat(1000).as_bytes()).len(), TOLD);
        assert!(!complaint(b"\x1b[2Jx").contains('\u{1b}'));
    }
}
