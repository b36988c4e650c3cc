//! A small HTTP server for scrapers, with a bound on connections and on the duration of each.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::Observer;
use super::exporter::CONTENT_TYPE;

/// Concurrent connections; further ones are closed at once. A scraper needs one.
const MOST_CONNECTIONS: usize = 64;
/// Upper bound on the duration of a connection, so that a silent peer does not hold a place.
const CONNECTION_DEADLINE: Duration = Duration::from_secs(15);
/// Pause after an error of the listener, such as too many open files.
const PAUSE: Duration = Duration::from_millis(100);

impl Observer {
    /// Serves `GET /metrics` at `address` in the Prometheus text format until the run ends. In plain
    /// text, because scrapers have no certificate of the run; the page contains only numbers and the
    /// names of job, verifiers and metrics.
    ///
    /// # Errors
    /// When the address cannot be listened on.
    pub async fn serve_metrics(&self, address: SocketAddr) -> std::io::Result<SocketAddr> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let observer = self.clone();
        let metrics = move || {
            let observer = observer.clone();
            async move { ([("content-type", CONTENT_TYPE)], observer.exposition().await) }
        };
        let router = Router::new().route("/metrics", get(metrics));
        tokio::spawn(serve(listener, router, self.0.feed.closing(), CONNECTION_DEADLINE));
        Ok(address)
    }
}

/// Accepts connections until the run ends.
async fn serve(listener: TcpListener, router: Router, mut closed: watch::Receiver<bool>, deadline: Duration) {
    let places = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = closed.wait_for(|closed| *closed) => return,
        };
        let Ok((stream, _)) = accepted else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
        let service = router.clone();
        // Ends with the connection, or at its deadline.
        tokio::spawn(async move {
            let _ = tokio::time::timeout(deadline, connection(stream, service, place)).await;
        });
    }
}

async fn connection(stream: TcpStream, service: Router, _place: OwnedSemaphorePermit) {
    let mut http = http1::Builder::new();
    // Without keep-alive each connection serves one request, so its cost is bounded.
    let http = http.keep_alive(false).max_buf_size(16 << 10);
    if let Err(error) = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service)).await {
        tracing::debug!("a connection of a scraper ended: {error}");
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// What a connection is told until it is closed.
    async fn said(mut stream: TcpStream) -> String {
        let mut text = String::new();
        // One that is closed before it was read from may be reset.
        let _ = stream.read_to_string(&mut text).await;
        text
    }

    #[tokio::test]
    async fn scrapers_have_one_request_each_and_keep_no_place_for_long() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let router = Router::new().route("/metrics", get(|| async { "numbers" }));
        let (_open, closed) = watch::channel(false);
        let deadline = Duration::from_secs(2);
        tokio::spawn(serve(listener, router, closed, deadline));
        let request = b"GET /metrics HTTP/1.1\r\nhost: here\r\n\r\n";
        let ask = || async {
            let mut stream = TcpStream::connect(address).await.expect("connected");
            // One that is closed at once takes nothing.
            let _ = stream.write_all(&[&request[..], request].concat()).await;
            said(stream).await
        };
        let answer = ask().await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.matches("numbers").count() == 1, "{answer}");

        let began = Instant::now();
        let mut silent = Vec::new();
        for _ in 0..MOST_CONNECTIONS {
            silent.push(TcpStream::connect(address).await.expect("connected"));
        }
        let refused = ask().await;
        // A machine that took so long to connect has given the first places back.
        assert!(refused.is_empty() || began.elapsed() > deadline, "all places are taken: {refused}");
        for stream in silent {
            assert_eq!(said(stream).await, "");
        }
        assert!(began.elapsed() >= deadline);
        assert!(ask().await.ends_with("numbers"));
    }
}
