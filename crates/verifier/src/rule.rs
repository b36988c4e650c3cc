use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pacs_spec::{Extraction, Form, MathSpec};
use pacs_types::Verdict;
use pacs_verify::{Mode, Rules};
use tokio::sync::Semaphore;
use tokio::task::JoinError;

use crate::fault::Fault;
use crate::{Judgement, Task};

/// Says what a task is worth.
type Grade = dyn Fn(&Task) -> Verdict + Send + Sync;

/// A built-in verifier on a bounded number of threads, each verification with a time limit.
pub(crate) struct Rule {
    grade: Arc<Grade>,
    limit: Duration,
    threads: Arc<Semaphore>,
}

impl Rule {
    /// The rule for mathematical answers.
    pub(crate) fn math(math: MathSpec, limit: Duration, threads: usize) -> Self {
        let mode = match math.extraction {
            Extraction::Lenient => Mode::Lenient,
            Extraction::Strict => Mode::Strict,
            Extraction::Number => Mode::Number,
        };
        let form = match math.form {
            Form::Evaluated => pacs_verify::Form::Evaluated,
            Form::Any => pacs_verify::Form::Any,
        };
        let rules = Rules { mode, form };
        Self::new(move |task| pacs_verify::grade(&task.response, &task.gold, rules), limit, threads)
    }

    /// A rule that `grade` decides.
    pub(crate) fn new(
        grade: impl Fn(&Task) -> Verdict + Send + Sync + 'static,
        limit: Duration,
        threads: usize,
    ) -> Self {
        Self { grade: Arc::new(grade), limit, threads: Arc::new(Semaphore::new(threads)) }
    }

    /// Judges one task. Its time counts from when a thread is free.
    ///
    /// A verification that overruns keeps its thread until it ends: threads cannot be cancelled, and giving the permit
    /// back would let a hostile sample pile them up.
    pub(crate) async fn verify(&self, task: Arc<Task>) -> Judgement {
        let permit = Arc::clone(&self.threads).acquire_owned().await.expect("the semaphore is never closed");
        let grade = Arc::clone(&self.grade);
        let verification = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let started = Instant::now();
            let verdict = grade(&task);
            (verdict, started.elapsed())
        });
        let (verdict, elapsed) = match tokio::time::timeout(self.limit, verification).await {
            Ok(Ok(graded)) => graded,
            Ok(Err(error)) => (Fault::Panicked(crash_text(error)).into(), Duration::ZERO),
            Err(_) => (Fault::Late(self.limit).into(), self.limit),
        };
        Judgement { verdict, elapsed, cached: false }
    }
}

fn crash_text(error: JoinError) -> String {
    match error.try_into_panic() {
        Ok(panic) => panic_text(&*panic).to_owned(),
        Err(error) => format!("the verification was lost: {error}"),
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a message")
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc::channel;

    use pacs_types::Outcome;
    use tokio::task::JoinSet;

    use super::*;

    fn rule(threads: usize, limit: Duration, grade: impl Fn(&Task) -> Verdict + Send + Sync + 'static) -> Rule {
        Rule::new(grade, limit, threads)
    }

    async fn verdict(rule: &Rule, response: &str) -> Verdict {
        let task = Task { question: String::new(), response: response.into(), gold: "5".into() };
        rule.verify(Arc::new(task)).await.verdict
    }

    fn wrong() -> Verdict {
        Verdict { outcome: Outcome::Wrong, label: 0.0, reward: 0.0, extracted: None, rule: "test".into() }
    }

    #[tokio::test]
    async fn the_spec_chooses_extraction_and_form() {
        let outcome = async |response, extraction, form| {
            let rule = Rule::math(MathSpec { extraction, form }, Duration::from_secs(60), 1);
            verdict(&rule, response).await.outcome
        };
        assert_eq!(outcome("2 + 3 = 5", Extraction::Lenient, Form::Evaluated).await, Outcome::Correct);
        assert_eq!(outcome("2 + 3 = 5", Extraction::Strict, Form::Evaluated).await, Outcome::Unparsable);
        assert_eq!(outcome(r"\boxed{2 + 3}", Extraction::Strict, Form::Evaluated).await, Outcome::Unparsable);
        assert_eq!(outcome(r"\boxed{2 + 3}", Extraction::Strict, Form::Any).await, Outcome::Correct);
    }

    #[tokio::test]
    async fn a_panic_is_a_failed_verification() {
        let rule = rule(1, Duration::from_secs(60), |task| panic!("cannot read {}", task.response));
        let first = verdict(&rule, "it").await;
        assert_eq!(first.outcome, Outcome::Failed);
        assert_eq!(first.rule, "the verifier panicked: cannot read it");
        // The thread is free again.
        assert_eq!(verdict(&rule, "that").await.outcome, Outcome::Failed);
    }

    #[tokio::test]
    async fn an_overrun_is_reported_while_the_thread_runs() {
        let (release, held) = channel::<()>();
        let held = Mutex::new(held);
        let rule = rule(1, Duration::from_millis(20), move |_| {
            // Ends when the test drops its end.
            let _ = held.lock().expect("one thread").recv();
            wrong()
        });
        let late = verdict(&rule, "slow").await;
        assert_eq!((late.outcome, late.label), (Outcome::TimedOut, 0.0));
        assert_eq!(late.rule, "no verdict within 0.02 s");
        assert_eq!(rule.threads.available_permits(), 0, "the thread still runs");
        drop(release);
        let again = tokio::time::timeout(Duration::from_secs(10), rule.threads.acquire()).await;
        assert!(again.is_ok(), "the thread ends and gives its permit back");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn no_more_threads_run_than_allowed() {
        let running = Arc::new(AtomicUsize::new(0));
        let most = Arc::new(AtomicUsize::new(0));
        let (counter, peak) = (Arc::clone(&running), Arc::clone(&most));
        let rule = Arc::new(rule(3, Duration::from_secs(60), move |_| {
            peak.fetch_max(counter.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            std::thread::yield_now();
            counter.fetch_sub(1, Ordering::SeqCst);
            wrong()
        }));
        let mut all = JoinSet::new();
        for _ in 0..200 {
            let rule = Arc::clone(&rule);
            all.spawn(async move { verdict(&rule, "x").await });
        }
        assert_eq!(all.join_all().await.len(), 200);
        assert!((1..=3).contains(&most.load(Ordering::SeqCst)));
    }
}
