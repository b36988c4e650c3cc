//! Whether a server has started.

use std::time::Duration;

use pacs_vllm::{Client, Limits};
use tokio::time::{sleep, timeout};

use super::command::HOST;

/// How often a server that starts is asked.
const LOOK: Duration = Duration::from_secs(1);
/// How long an answer may take; a server that loads its model does not listen yet.
const ANSWER: Duration = Duration::from_secs(5);

/// How often a server that has started is asked, and how many answers in a row it may owe before it is killed: a process that hangs ends
/// in no other way.
const WATCH: Duration = Duration::from_secs(30);
const MOST_OWED: u32 = 10;

/// The answer to `/health` that a server has to give some time after its start, and from then on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Gate {
    pub(crate) port: u16,
    /// From the start of the process.
    pub(crate) limit: Duration,
}

impl Gate {
    /// Returns when the server answers.
    pub(crate) async fn passed(&self) {
        let client = self.client();
        while client.health().await.is_err() {
            sleep(LOOK).await;
        }
    }

    /// Returns when the server owes its answers for too long, with what it did.
    pub(crate) async fn missed(&self) -> String {
        if timeout(self.limit, self.passed()).await.is_err() {
            return format!("did not answer /health within {} s", self.limit.as_secs_f64());
        }
        self.silent(WATCH).await;
        format!("has not answered /health for {} s", WATCH.as_secs() * u64::from(MOST_OWED))
    }

    /// Asks at this interval, and returns when the server owes [`MOST_OWED`] answers in a row.
    async fn silent(&self, interval: Duration) {
        let (client, mut owed) = (self.client(), 0);
        while owed < MOST_OWED {
            sleep(interval).await;
            owed = if client.health().await.is_ok() { 0 } else { owed + 1 };
        }
    }

    fn client(&self) -> Client {
        let limits = Limits { question: ANSWER, ..Limits::default() };
        Client::new(&format!("{HOST}:{}", self.port), None, limits)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_server_that_stops_answering_is_noticed() {
        let listener = TcpListener::bind((HOST, 0)).await.expect("a free port");
        let port = listener.local_addr().expect("an address").port();
        let answering = tokio::spawn(async move {
            // Answers for a while, then closes.
            for _ in 0..5 {
                let (mut stream, _) = listener.accept().await.expect("a connection");
                let mut head = [0; 1024];
                let _ = stream.read(&mut head).await;
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").await;
            }
        });
        let gate = Gate { port, limit: Duration::from_secs(600) };
        let silent = timeout(Duration::from_secs(60), gate.silent(Duration::from_millis(10))).await;
        silent.expect("it is noticed");
        answering.await.expect("all answers were asked for");
    }
}
