//! The listener and the way of a request: checks, routes, a short cache.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::http::header::{self, HeaderValue};
use axum::http::{Method, Request, Response, StatusCode};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use pacs_text::Tokenizer;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinHandle;

use crate::answers::{self, Query, Refusal};
use crate::assets;
use crate::door::{authorised, is_local_host, is_of_other_origin, seal, set_cookie, text};
use crate::key::Key;
use crate::lanes::{self, Lanes};
use crate::pieces::pieces;
use crate::source::Source;

/// Concurrent connections; further ones are closed at once. A browser opens up to six.
const MOST_CONNECTIONS: usize = 128;
/// A connection is ended after this time, once its request is answered; browsers open another.
const CONNECTION_LIFE: Duration = Duration::from_secs(600);
/// Time for the headers of a request, and for the rest of a connection after its life.
const PATIENCE: Duration = Duration::from_secs(15);
/// Pause after an error of the listener, such as too many open files.
const PAUSE: Duration = Duration::from_millis(100);
/// Largest request body, in bytes: a token.
const MOST_BODY: usize = 1 << 10;
/// Longest path and query.
const MOST_TARGET: usize = 4096;
/// Age up to which an answer is given again, so that ten browsers cost little more than one.
const FRESH: Duration = Duration::from_millis(1500);
/// Answers that are kept.
const MOST_KEPT: usize = 64;

/// Why the dashboard cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The address is reachable from other machines.
    #[error(
        "{0} is reachable from other machines, and the dashboard speaks plain HTTP: listen on 127.0.0.1, and reach it by a tunnel \
         (`ssh -L`), or with `pacs dashboard HOST:PORT` from the other machine"
    )]
    NotLoopback(SocketAddr),
    /// The address cannot be listened on.
    #[error("listen on {address}: {error}")]
    Listen {
        /// Address from the options.
        address: SocketAddr,
        /// What the system says.
        error: std::io::Error,
    },
}

/// A run to serve.
pub struct Run {
    /// Name on the page.
    pub name: String,
    /// Whether its coordinator serves.
    pub live: bool,
    /// The job spec as TOML, shown as it is.
    pub settings: String,
    /// Folder of the model's `tokenizer.json`; without it tokens are shown by their ids.
    pub model: Option<PathBuf>,
    /// Facts to show with the settings: name and value.
    pub facts: Vec<(String, String)>,
    /// Where its data comes from.
    pub source: Box<dyn Source>,
}

impl std::fmt::Debug for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Run").field("name", &self.name).field("live", &self.live).finish_non_exhaustive()
    }
}

/// A run with what is kept of it between requests.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) run: Run,
    lanes: Mutex<Lanes>,
    /// Read with the first sample that is opened; `None` if that failed.
    tokenizer: Arc<OnceLock<Option<Tokenizer>>>,
}

impl Served {
    pub(crate) fn lanes(&self) -> MutexGuard<'_, Lanes> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Texts of the tokens; empty where no tokenizer is at hand. Reading one takes up to a second.
    pub(crate) async fn pieces(&self, ids: Vec<u32>) -> Vec<String> {
        let Some(model) = self.run.model.clone() else { return Vec::new() };
        let tokenizer = Arc::clone(&self.tokenizer);
        let read = tokio::task::spawn_blocking(move || {
            let tokenizer = tokenizer.get_or_init(|| {
                let read = Tokenizer::read(&model);
                read.inspect_err(|error| tracing::warn!("the dashboard shows tokens by their ids: {error}")).ok()
            });
            tokenizer.as_ref().map(|tokenizer| pieces(tokenizer, &ids)).unwrap_or_default()
        });
        read.await.unwrap_or_default()
    }
}

#[derive(Debug)]
struct Inner {
    key: Key,
    cookie: String,
    runs: Vec<Served>,
    /// Answers by path and query.
    kept: Mutex<BTreeMap<String, (Instant, Bytes)>>,
}

/// A dashboard that is served until this is dropped.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    key: Key,
    tasks: [JoinHandle<()>; 2],
    /// Dropped with the server, which ends its connections.
    _open: watch::Sender<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Server {
    /// Serves these runs at a loopback address. `name` distinguishes the cookie from those of other dashboards of
    /// this machine, because browsers do not keep cookies of different ports apart.
    ///
    /// # Errors
    /// When the address is not loopback, or cannot be listened on.
    pub async fn bind(address: SocketAddr, key: Key, name: &str, runs: Vec<Run>) -> Result<Self, ServerError> {
        if !address.ip().is_loopback() {
            return Err(ServerError::NotLoopback(address));
        }
        let failed = |error| ServerError::Listen { address, error };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let name: String = name.chars().filter(char::is_ascii_alphanumeric).take(8).collect();
        let serve = |run| Served { run, lanes: Mutex::new(Lanes::new()), tokenizer: Arc::default() };
        let inner = Arc::new(Inner {
            key: key.clone(),
            cookie: format!("pacs_{name}"),
            runs: runs.into_iter().map(serve).collect(),
            kept: Mutex::default(),
        });
        let (open, closed) = watch::channel(());
        let tasks = [tokio::spawn(accept(listener, Arc::clone(&inner), closed)), tokio::spawn(look(inner))];
        Ok(Self { address, key, tasks, _open: open })
    }

    /// The address that is listened on.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The address for a browser, with a new token. The token is a fragment, which browsers neither send nor log.
    #[must_use]
    pub fn link(&self) -> String {
        link(self.address, &self.key)
    }
}

/// Address of the page, with a new token as its fragment.
fn link(address: SocketAddr, key: &Key) -> String {
    let token = key.token(Duration::from_secs(crate::TOKEN_HOURS * 3600));
    format!("http://{address}/#token={token}")
}

impl Key {
    /// The address of a dashboard that is served elsewhere with this key, with a new token.
    #[must_use]
    pub fn link(&self, address: SocketAddr) -> String {
        link(address, self)
    }
}

/// Keeps the lanes of all live runs; ends with the server.
async fn look(inner: Arc<Inner>) {
    let mut ticker = tokio::time::interval(lanes::EVERY);
    ticker.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticker.tick().await;
        for served in inner.runs.iter().filter(|served| served.run.live) {
            // A run that does not answer leaves a gap in its lanes.
            let asked = tokio::time::timeout(PATIENCE, served.run.source.status()).await;
            if let Ok(Ok(Some(status))) = asked {
                served.lanes().look(&status);
            }
        }
    }
}

/// Accepts connections; ends with the server.
async fn accept(listener: TcpListener, inner: Arc<Inner>, closed: watch::Receiver<()>) {
    let places = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        // A full house closes the connection at once.
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
        // Ends with the connection, or some time after its life or the server.
        tokio::spawn(connection(stream, Arc::clone(&inner), closed.clone(), place));
    }
}

async fn connection(
    stream: TcpStream,
    inner: Arc<Inner>,
    mut closed: watch::Receiver<()>,
    _place: OwnedSemaphorePermit,
) {
    let service = service_fn(move |request: Request<hyper::body::Incoming>| {
        let inner = Arc::clone(&inner);
        async move { Ok::<_, std::convert::Infallible>(inner.respond(request.map(Body::new)).await) }
    });
    let mut http = http1::Builder::new();
    let http = http.timer(TokioTimer::new()).header_read_timeout(PATIENCE).max_buf_size(16 << 10);
    let mut served = pin!(http.serve_connection(TokioIo::new(stream), service));
    tokio::select! {
        _ = served.as_mut() => return,
        () = tokio::time::sleep(CONNECTION_LIFE) => {}
        // Nothing is ever sent: this is the end of the server.
        _ = closed.changed() => {}
    }
    served.as_mut().graceful_shutdown();
    let _ = tokio::time::timeout(PATIENCE, served).await;
}

impl Inner {
    async fn respond(&self, request: Request<Body>) -> Response<Body> {
        let mut response = self.route(request).await;
        seal(&mut response);
        response
    }

    async fn route(&self, request: Request<Body>) -> Response<Body> {
        let headers = request.headers();
        if !is_local_host(headers) {
            let why = "this dashboard answers to localhost only; reach it by a tunnel to the same name";
            return text(StatusCode::MISDIRECTED_REQUEST, why);
        }
        let (path, query) = (request.uri().path().to_owned(), request.uri().query().unwrap_or_default().to_owned());
        if path.len() + query.len() > MOST_TARGET {
            return text(StatusCode::URI_TOO_LONG, "the address is too long");
        }
        let Some(call) = path.strip_prefix("/api/") else {
            return self.file(&request, &path);
        };
        if is_of_other_origin(headers) {
            return text(StatusCode::FORBIDDEN, "pages of other origins may not read this run");
        }
        if call == "login" {
            return self.login(request).await;
        }
        if authorised(headers, &self.key, &self.cookie).is_none() {
            return text(StatusCode::UNAUTHORIZED, "no valid token: `pacs dashboard` prints an address with a new one");
        }
        if request.method() != Method::GET {
            return text(StatusCode::METHOD_NOT_ALLOWED, "this dashboard only reads");
        }
        match self.data(call, &query).await {
            Ok(bytes) => {
                let mut response = Response::new(Body::from(bytes));
                let headers = response.headers_mut();
                headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
                response
            }
            Err(Refusal(status, why)) => text(status, why),
        }
    }

    /// A file of the page. Files are the same for everybody and hold no data, so they need no token.
    fn file(&self, request: &Request<Body>, path: &str) -> Response<Body> {
        if request.method() != Method::GET && request.method() != Method::HEAD {
            return text(StatusCode::METHOD_NOT_ALLOWED, "this dashboard only reads");
        }
        let Some(asset) = assets::find(path) else { return text(StatusCode::NOT_FOUND, "there is no such file") };
        let mut response = Response::new(Body::from(asset.bytes));
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(asset.kind));
        // Another version of the program may serve at the same address next time.
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        response
    }

    /// Exchanges a token for a cookie of the same life. The token comes in the body, so that no log has it.
    async fn login(&self, request: Request<Body>) -> Response<Body> {
        if request.method() != Method::POST {
            return text(StatusCode::METHOD_NOT_ALLOWED, "POST a token");
        }
        let body = tokio::time::timeout(PATIENCE, axum::body::to_bytes(request.into_body(), MOST_BODY)).await;
        let Ok(Ok(body)) = body else { return text(StatusCode::BAD_REQUEST, "expected a token of up to 1 KiB") };
        let token = std::str::from_utf8(&body).unwrap_or_default().trim();
        let Some(seconds) = self.key.check(token) else {
            return text(
                StatusCode::UNAUTHORIZED,
                "the token is wrong or has expired: `pacs dashboard` prints a new one",
            );
        };
        let mut response = text(StatusCode::NO_CONTENT, "");
        // A valid token consists of digits and a dot.
        if let Ok(cookie) = HeaderValue::from_str(&set_cookie(&self.cookie, token, seconds)) {
            response.headers_mut().insert(header::SET_COOKIE, cookie);
        }
        response
    }

    /// The JSON of `/api/<call>`, at most [`FRESH`] old.
    async fn data(&self, call: &str, query: &str) -> Result<Bytes, Refusal> {
        let name = format!("{call}?{query}");
        if let Some((made, bytes)) = self.kept().get(&name)
            && made.elapsed() < FRESH
        {
            return Ok(bytes.clone());
        }
        let query = Query::parse(query)?;
        let value = match call.split_once('/') {
            None if call == "runs" => answers::runs(&self.runs),
            Some((index, call)) => {
                let served = index.parse().ok().and_then(|index: usize| self.runs.get(index));
                let served = served.ok_or_else(|| Refusal(StatusCode::NOT_FOUND, "there is no such run".into()))?;
                answers::answer(served, call, query).await?
            }
            None => return Err(Refusal(StatusCode::NOT_FOUND, "there is no such call".into())),
        };
        let bytes = Bytes::from(value.to_string());
        // Samples are large, and hardly anybody opens the same one at the same time.
        if !call.contains("sample") {
            let mut kept = self.kept();
            kept.retain(|_, (made, _)| made.elapsed() < FRESH);
            if kept.len() < MOST_KEPT {
                kept.insert(name, (Instant::now(), bytes.clone()));
            }
        }
        Ok(bytes)
    }

    fn kept(&self) -> MutexGuard<'_, BTreeMap<String, (Instant, Bytes)>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
