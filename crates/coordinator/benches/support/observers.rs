//! Those who watch a run: browsers on its dashboard, a scraper of `/metrics`, and streams of `Watch`.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pacs_coordinator::DashboardRecord;
use pacs_protocol::v1;
use pacs_protocol::v1::observe_service_client::ObserveServiceClient;
use pacs_runtime::net::RunChannel;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::support::quantiles;

/// As the page asks.
const EVERY: Duration = Duration::from_secs(2);
/// As Prometheus asks by default, or more often.
const SCRAPED: Duration = Duration::from_secs(15);

/// Watch until they are dropped.
pub(crate) struct Observers {
    tasks: JoinSet<()>,
    counted: Arc<Counted>,
}

#[derive(Default)]
struct Counted {
    bytes: AtomicU64,
    events: AtomicU64,
    failed: AtomicU64,
    /// Of the browsers' requests, in microseconds.
    times: Mutex<Vec<u64>>,
}

impl Observers {
    /// Starts browsers that have the timeline and the curves open in turn, one scraper, and streams of events.
    pub(crate) fn start(browsers: u32, run_dir: &Path, metrics: SocketAddr, streams: Vec<RunChannel>) -> Result<Self> {
        let (record, key) = DashboardRecord::read(run_dir).context("the run serves no dashboard")?;
        let token = key.token(Duration::from_secs(3600));
        let (mut tasks, counted) = (JoinSet::new(), Arc::new(Counted::default()));
        for browser in 0..browsers {
            // Browsers do not ask at the same moment.
            let (counted, token) = (Arc::clone(&counted), token.clone());
            let offset = EVERY.mul_f64(f64::from(browser) / f64::from(browsers));
            tasks.spawn(async move {
                tokio::time::sleep(offset).await;
                let calls = ["/api/0/lanes?seconds=600", "/api/0/metrics?set=train&points=300"];
                let calls = ["/api/0/status", calls[browser as usize % calls.len()]];
                poll(record.address, &calls, &format!("authorization: Bearer {token}\r\n"), EVERY, &counted).await;
            });
        }
        let of_scraper = Arc::clone(&counted);
        tasks.spawn(async move { poll(metrics, &["/metrics"], "", SCRAPED, &of_scraper).await });
        for channel in streams {
            let counted = Arc::clone(&counted);
            tasks.spawn(async move {
                let mut client = ObserveServiceClient::new(channel).max_decoding_message_size(16 << 20);
                let Ok(stream) = client.watch(v1::WatchRequest { past: 0 }).await else {
                    counted.failed.fetch_add(1, Ordering::Relaxed);
                    return;
                };
                let mut stream = stream.into_inner();
                while let Ok(Some(_)) = stream.message().await {
                    counted.events.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        Ok(Self { tasks, counted })
    }

    /// What they have seen.
    pub(crate) fn told(&self) -> Result<Value> {
        let failed = self.counted.failed.load(Ordering::Relaxed);
        ensure!(failed == 0, "{failed} requests of observers have failed");
        let mut times = std::mem::take(&mut *self.counted.times.lock().expect("nobody panics with it"));
        Ok(json!({"observers": self.tasks.len(), "requests": times.len(),
            "bytes": self.counted.bytes.load(Ordering::Relaxed), "events": self.counted.events.load(Ordering::Relaxed),
            "request_ms": quantiles(&mut times)}))
    }
}

/// Asks again and again over one connection.
async fn poll(address: SocketAddr, paths: &[&str], header: &str, every: Duration, counted: &Counted) {
    let mut connection = None;
    loop {
        for path in paths {
            let began = Instant::now();
            match ask(&mut connection, address, path, header).await {
                Ok(bytes) => {
                    counted.bytes.fetch_add(bytes, Ordering::Relaxed);
                    let micros = began.elapsed().as_micros() as u64;
                    counted.times.lock().expect("nobody panics with it").push(micros);
                }
                Err(error) => {
                    eprintln!("an observer's request of {path} failed: {error:#}");
                    counted.failed.fetch_add(1, Ordering::Relaxed);
                    connection = None;
                }
            }
        }
        tokio::time::sleep(every).await;
    }
}

/// Sends a request; returns the length of the answer.
async fn ask(open: &mut Option<BufReader<TcpStream>>, address: SocketAddr, path: &str, header: &str) -> Result<u64> {
    let stream = match open {
        Some(stream) => stream,
        None => open.insert(BufReader::new(TcpStream::connect(address).await?)),
    };
    let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n{header}\r\n");
    stream.get_mut().write_all(request.as_bytes()).await?;
    let (mut length, mut is_closed, mut status) = (0, false, String::new());
    loop {
        let mut line = String::new();
        ensure!(stream.read_line(&mut line).await? > 0, "the connection was closed");
        let line = line.trim_end().to_ascii_lowercase();
        if status.is_empty() {
            status.clone_from(&line);
        }
        if let Some(value) = line.strip_prefix("content-length:") {
            length = value.trim().parse()?;
        }
        is_closed |= line == "connection: close";
        if line.is_empty() {
            break;
        }
    }
    ensure!(status.contains(" 200 "), "{status}");
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    if is_closed {
        *open = None;
    }
    Ok(length as u64)
}
