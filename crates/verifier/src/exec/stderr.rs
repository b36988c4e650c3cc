use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::ChildStderr;
use tokio::task::JoinHandle;

/// Lines of all children of a pool that are logged in `WINDOW`; more are counted and left out.
const MOST_LINES: u32 = 200;
const WINDOW: Duration = Duration::from_secs(60);

/// Longest line that is logged, in bytes; the rest of it counts as further lines.
const MOST_LINE: u64 = 1024;

/// Lines that are kept to explain how a child ended.
const KEPT_LINES: usize = 3;

/// Bounds what a pool writes to the log, however much its children write.
#[derive(Default)]
pub(super) struct LineBudget(Mutex<Spent>);

#[derive(Default)]
struct Spent {
    since: Option<Instant>,
    lines: u32,
}

impl LineBudget {
    /// Whether one more line may be logged; how many were left out before it, when a new window begins.
    fn take(&self, now: Instant) -> (bool, u32) {
        let mut spent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut left_out = 0;
        if spent.since.is_none_or(|since| now.duration_since(since) >= WINDOW) {
            left_out = spent.lines.saturating_sub(MOST_LINES);
            *spent = Spent { since: Some(now), lines: 0 };
        }
        spent.lines = spent.lines.saturating_add(1);
        (spent.lines <= MOST_LINES, left_out)
    }
}

/// The standard error of one child, read to its end whether or not anybody looks: a full pipe would stop the child.
pub(super) struct Stderr {
    last: Arc<Mutex<VecDeque<String>>>,
    reader: JoinHandle<()>,
}

impl Stderr {
    pub(super) fn read(stderr: ChildStderr, program: String, budget: Arc<LineBudget>) -> Self {
        let last = Arc::new(Mutex::new(VecDeque::with_capacity(KEPT_LINES)));
        let kept = Arc::clone(&last);
        // Ends when the child and whoever it gave its standard error to have ended, or with the child's handle.
        let reader = tokio::spawn(async move {
            let mut stderr = BufReader::new(stderr);
            let mut line = Vec::new();
            while let Ok(1..) = (&mut stderr).take(MOST_LINE).read_until(b'\n', &mut line).await {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                line.clear();
                if text.is_empty() {
                    continue;
                }
                note(&budget, &program, &text);
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                if kept.len() == KEPT_LINES {
                    kept.pop_front();
                }
                kept.push_back(text);
            }
        });
        Self { last, reader }
    }

    /// The last lines, once the child has ended; not waited for longer than `patience`.
    pub(super) async fn last_lines(&mut self, patience: Duration) -> String {
        let _ = tokio::time::timeout(patience, &mut self.reader).await;
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.iter().map(String::as_str).collect::<Vec<_>>().join(" / ")
    }
}

impl Drop for Stderr {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

fn note(budget: &LineBudget, program: &str, text: &str) {
    let (may, left_out) = budget.take(Instant::now());
    if left_out > 0 {
        tracing::warn!(program, left_out, "lines of the verifier's standard error were left out");
    }
    if may {
        tracing::info!(program, "verifier: {text}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_has_so_many_lines() {
        let budget = LineBudget::default();
        let start = Instant::now();
        let logged = (0..MOST_LINES + 50).filter(|_| budget.take(start).0).count();
        assert_eq!(logged, MOST_LINES as usize);
        assert_eq!(budget.take(start + WINDOW), (true, 50));
        assert_eq!(budget.take(start + WINDOW), (true, 0));
    }
}
