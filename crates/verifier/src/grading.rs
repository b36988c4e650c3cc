use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

use pacs_protocol::v1;
use pacs_spec::{Extraction, VerifierKind, VerifierSpec};
use pacs_types::{Outcome, Verdict};
use pacs_verify::Mode;
use tokio::sync::Semaphore;

/// Judges a response (first) by a reference answer (second).
type Judge = dyn Fn(&str, &str) -> Verdict + Send + Sync;

/// Runs verifications on a bounded number of threads, each with a time limit.
#[derive(Clone)]
pub(crate) struct Grading {
    judge: Arc<Judge>,
    limit: Duration,
    threads: Arc<Semaphore>,
}

impl Grading {
    /// The grading that a job spec asks for.
    pub(crate) fn new(spec: &VerifierSpec, threads: usize) -> Self {
        let judge: Arc<Judge> = match spec.kind {
            VerifierKind::Math => {
                let mode = match spec.extraction {
                    Extraction::Lenient => Mode::Lenient,
                    Extraction::Strict => Mode::Strict,
                    Extraction::Number => Mode::Number,
                };
                Arc::new(move |response, gold| pacs_verify::grade(response, gold, mode))
            }
        };
        // The spec bounds the seconds; what is beyond a `Duration` is no limit.
        let limit = Duration::try_from_secs_f64(spec.timeout_seconds).unwrap_or(Duration::MAX);
        Self { judge, limit, threads: Arc::new(Semaphore::new(threads)) }
    }

    /// Grades one task. Its time counts from when a thread is free.
    ///
    /// A verification that overruns keeps its thread until it ends: threads cannot be cancelled, and giving the permit
    /// back would let a hostile sample pile them up.
    pub(crate) async fn grade(&self, task: v1::VerifyTask) -> v1::TaskVerdict {
        let v1::VerifyTask { lease_id, group_id, sample_index, response, gold } = task;
        let permit = Arc::clone(&self.threads).acquire_owned().await.expect("the semaphore is never closed");
        let judge = Arc::clone(&self.judge);
        let verification = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            judge(&response, &gold)
        });
        let verdict = match tokio::time::timeout(self.limit, verification).await {
            Ok(Ok(verdict)) => verdict,
            Ok(Err(error)) => failure(Outcome::Failed, crash_text(error)),
            Err(_) => failure(Outcome::TimedOut, format!("no verdict within {} s", self.limit.as_secs_f64())),
        };
        if !verdict.outcome.is_conclusive() {
            let sample = format_args!("g{group_id}.{sample_index}");
            tracing::warn!(%sample, outcome = verdict.outcome.name(), rule = verdict.rule, "verification failed");
        }
        v1::TaskVerdict { lease_id, group_id, sample_index, verdict: Some(verdict.into()) }
    }
}

fn failure(outcome: Outcome, rule: String) -> Verdict {
    Verdict { outcome, label: 0.0, reward: 0.0, extracted: None, rule }
}

fn crash_text(error: tokio::task::JoinError) -> String {
    match error.try_into_panic() {
        Ok(panic) => format!("the verifier panicked: {}", panic_text(&*panic)),
        Err(error) => format!("the verification was lost: {error}"),
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a message")
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn grading(
        threads: usize,
        limit: Duration,
        judge: impl Fn(&str, &str) -> Verdict + Send + Sync + 'static,
    ) -> Grading {
        Grading { judge: Arc::new(judge), limit, threads: Arc::new(Semaphore::new(threads)) }
    }

    fn task(response: &str) -> v1::VerifyTask {
        v1::VerifyTask { lease_id: 7, group_id: 3, sample_index: 1, response: response.into(), gold: "5".into() }
    }

    async fn verdict(grading: &Grading, response: &str) -> Verdict {
        let graded = grading.grade(task(response)).await;
        assert_eq!((graded.lease_id, graded.group_id, graded.sample_index), (7, 3, 1));
        graded.verdict.expect("every task has a verdict").try_into().expect("well-formed")
    }

    #[tokio::test]
    async fn the_spec_chooses_the_extraction() {
        let outcome = async |extraction| {
            let spec = VerifierSpec { extraction, ..VerifierSpec::default() };
            verdict(&Grading::new(&spec, 1), "2 + 3 = 5").await.outcome
        };
        assert_eq!(outcome(Extraction::Lenient).await, Outcome::Correct);
        assert_eq!(outcome(Extraction::Strict).await, Outcome::Unparsable);
    }

    #[tokio::test]
    async fn a_panic_is_a_failed_verification() {
        let grading = grading(1, Duration::from_secs(60), |response, _| panic!("cannot read {response}"));
        let first = verdict(&grading, "it").await;
        assert_eq!(first.outcome, Outcome::Failed);
        assert_eq!(first.rule, "the verifier panicked: cannot read it");
        // The thread is free again.
        assert_eq!(verdict(&grading, "that").await.outcome, Outcome::Failed);
    }

    #[tokio::test]
    async fn an_overrun_is_reported_while_the_thread_goes_on() {
        let (release, held) = std::sync::mpsc::channel::<()>();
        let held = std::sync::Mutex::new(held);
        let grading = grading(1, Duration::from_millis(20), move |_, _| {
            // Ends when the test drops its end.
            let _ = held.lock().expect("one thread").recv();
            failure(Outcome::Wrong, "late".into())
        });
        let late = verdict(&grading, "slow").await;
        assert_eq!((late.outcome, late.label), (Outcome::TimedOut, 0.0));
        assert_eq!(late.rule, "no verdict within 0.02 s");
        assert_eq!(grading.threads.available_permits(), 0, "the thread still runs");
        drop(release);
        let again = tokio::time::timeout(Duration::from_secs(10), grading.threads.acquire()).await;
        assert!(again.is_ok(), "the thread ends and gives its permit back");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn no_more_threads_run_than_allowed() {
        let running = Arc::new(AtomicUsize::new(0));
        let most = Arc::new(AtomicUsize::new(0));
        let (counter, peak) = (Arc::clone(&running), Arc::clone(&most));
        let grading = grading(3, Duration::from_secs(60), move |_, _| {
            peak.fetch_max(counter.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            std::thread::yield_now();
            counter.fetch_sub(1, Ordering::SeqCst);
            failure(Outcome::Wrong, "done".into())
        });
        let mut all = tokio::task::JoinSet::new();
        for _ in 0..200 {
            let grading = grading.clone();
            all.spawn(async move { grading.grade(task("x")).await });
        }
        assert_eq!(all.join_all().await.len(), 200);
        assert!((1..=3).contains(&most.load(Ordering::SeqCst)));
    }
}
