//! Distributes events to any number of watchers, without the run waiting for any of them.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use pacs_protocol::v1;
use pacs_protocol::v1::watch_response::Event;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, watch};

use crate::driver::unix_time;
use crate::progress::{Progress, RunEnd};

/// Number of past events that are kept, and that a new watcher is sent at most.
pub(super) const PAST: usize = 512;
/// How many events a watcher may lag; it loses older ones. All share one ring, so watchers take no memory.
const QUEUE: usize = 1024;
/// Bytes of a text in an event, some of which comes from workers and verifiers.
const MOST_TEXT: usize = 2048;

/// The events of this coordinator process.
#[derive(Clone, Debug)]
pub(super) struct Feed(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    past: Mutex<Past>,
    sender: broadcast::Sender<Arc<v1::WatchResponse>>,
    /// Ends the streams of watchers, because a server shuts down only after its streams.
    closed: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct Past {
    events: VecDeque<Arc<v1::WatchResponse>>,
    /// Numbers of the newest evaluation of each set, which may be older than the kept events.
    evaluations: BTreeMap<String, BTreeMap<String, f64>>,
    number: u64,
}

/// What a new watcher receives.
pub(super) struct Subscription {
    pub(super) past: Vec<Arc<v1::WatchResponse>>,
    pub(super) events: broadcast::Receiver<Arc<v1::WatchResponse>>,
    pub(super) closed: watch::Receiver<bool>,
}

impl Feed {
    pub(super) fn new() -> Self {
        let (past, sender, closed) = (Mutex::default(), broadcast::Sender::new(QUEUE), watch::Sender::new(false));
        Self(Arc::new(Inner { past, sender, closed }))
    }

    /// Forwards the run's events until it ends or the feed is closed.
    pub(super) async fn follow(
        self,
        mut events: broadcast::Receiver<Progress>,
        mut end: watch::Receiver<Option<RunEnd>>,
    ) {
        let mut closed = self.0.closed.subscribe();
        loop {
            tokio::select! {
                biased;
                progress = events.recv() => match progress {
                    Ok(progress) => {
                        if let Some(event) = event(&progress) {
                            self.tell(event);
                        }
                    }
                    Err(RecvError::Lagged(events)) => self.tell(Event::Lost(v1::EventsLost { events })),
                    Err(RecvError::Closed) => return,
                },
                ended = end.wait_for(Option::is_some) => {
                    let over = ended.ok().and_then(|end| end.as_ref().map(run_over));
                    while let Ok(progress) = events.try_recv() {
                        if let Some(event) = event(&progress) {
                            self.tell(event);
                        }
                    }
                    if let Some(over) = over {
                        self.tell(Event::RunOver(over));
                    }
                    return;
                }
                _ = closed.wait_for(|closed| *closed) => return,
            }
        }
    }

    fn tell(&self, event: Event) {
        let mut past = self.0.past.lock().unwrap_or_else(PoisonError::into_inner);
        past.number += 1;
        if let Event::Evaluation(evaluation) = &event {
            let numbers = evaluation.metrics.clone().into_iter().collect();
            past.evaluations.insert(evaluation.set.clone(), numbers);
        }
        let event = Arc::new(v1::WatchResponse { number: past.number, time: unix_time(), event: Some(event) });
        if past.events.len() == PAST {
            past.events.pop_front();
        }
        past.events.push_back(Arc::clone(&event));
        // An error means that nobody is watching. Sent under the lock, so that a new subscriber
        // gets each event exactly once.
        let _ = self.0.sender.send(event);
    }

    /// Subscribes: the newest past events, and those to come.
    pub(super) fn subscribe(&self, past: usize) -> Subscription {
        let kept = self.0.past.lock().unwrap_or_else(PoisonError::into_inner);
        let skipped = kept.events.len().saturating_sub(past);
        let past = kept.events.iter().skip(skipped).cloned().collect();
        Subscription { past, events: self.0.sender.subscribe(), closed: self.0.closed.subscribe() }
    }

    /// Numbers of the newest evaluation of each set in this process. The job spec bounds the number of sets.
    pub(super) fn newest_evaluations(&self) -> BTreeMap<String, BTreeMap<String, f64>> {
        self.0.past.lock().unwrap_or_else(PoisonError::into_inner).evaluations.clone()
    }

    /// Becomes true when the feed is closed.
    pub(super) fn closing(&self) -> watch::Receiver<bool> {
        self.0.closed.subscribe()
    }

    /// Ends all streams.
    pub(super) fn close(&self) {
        self.0.closed.send_replace(true);
    }
}

/// Converts an event for watchers. Progress of an evaluation is part of the status, not an event.
fn event(progress: &Progress) -> Option<Event> {
    Some(match progress {
        Progress::Measuring { .. } => return None,
        Progress::Waiting { sentence } => Event::Waiting(shown(sentence)),
        Progress::Prepared { step, learners, .. } => {
            let learners = learners.iter().take(PAST).map(|name| shown(name)).collect();
            Event::LearnersReady(v1::LearnersReady { step: *step, learners })
        }
        Progress::Evaluated(summary) => {
            let numbers = serde_json::to_value(summary).unwrap_or_default();
            let numbers = numbers.as_object().into_iter().flatten();
            let metrics = numbers.filter_map(|(name, value)| Some((name.clone(), value.as_f64()?))).collect();
            Event::Evaluation(v1::EvaluationDone { step: summary.step, metrics, set: shown(summary.label()) })
        }
        Progress::Step(summary) => Event::Step(v1::StepDone {
            step: summary.step,
            total_steps: summary.total_steps,
            metrics: step_metrics(summary.numbers()),
            remaining_seconds: summary.remaining_seconds,
        }),
        Progress::Saved { step, path, seconds } => Event::Saved(v1::CheckpointSaved {
            step: *step,
            path: shown(&path.display().to_string()),
            seconds: *seconds,
        }),
        Progress::WorkerLost { name, why } => {
            Event::WorkerGone(v1::WorkerGone { name: shown(name), reason: shown(why), drained: false })
        }
        Progress::Drained { name } => {
            Event::WorkerGone(v1::WorkerGone { name: shown(name), reason: String::new(), drained: true })
        }
        Progress::Operated { who, what } => {
            Event::Operator(v1::OperatorAction { operator: shown(who), time: unix_time() as u64, action: shown(what) })
        }
        Progress::Narrowed { text } | Progress::Note { text } => Event::Note(shown(text)),
    })
}

/// The numbers of a step, as many as fit into an event; workers name some of them.
fn step_metrics(numbers: serde_json::Map<String, serde_json::Value>) -> HashMap<String, f64> {
    const MOST: usize = 512;
    let numbers: BTreeMap<String, f64> =
        numbers.into_iter().filter_map(|(name, value)| Some((name, value.as_f64()?))).collect();
    numbers.into_iter().filter(|(name, _)| name.len() <= 128).take(MOST).collect()
}

fn run_over(end: &RunEnd) -> v1::RunOver {
    let (how, reason) = match end {
        RunEnd::Finished { .. } => ("finished", ""),
        RunEnd::Stopped { .. } => ("stopped", ""),
        RunEnd::Failed { reason } | RunEnd::Panicked { reason } => ("failed", reason.as_str()),
        RunEnd::Interrupted { reason } => ("interrupted", reason.as_str()),
    };
    v1::RunOver { how: how.to_owned(), reason: shown(reason) }
}

fn shown(text: &str) -> String {
    text[..text.floor_char_boundary(MOST_TEXT)].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(n: usize) -> Progress {
        Progress::Note { text: n.to_string() }
    }

    #[tokio::test]
    async fn late_subscribers_get_the_history_and_slow_ones_a_count_of_losses() {
        let (feed, progress, end) = (Feed::new(), broadcast::Sender::new(4 * QUEUE), watch::Sender::new(None));
        let following = tokio::spawn(feed.clone().follow(progress.subscribe(), end.subscribe()));
        let mut slow = feed.subscribe(0);
        let all = QUEUE + 100;
        (0..all).for_each(|n| drop(progress.send(note(n))));
        end.send_replace(Some(RunEnd::Failed { reason: "x".repeat(3 * MOST_TEXT) }));
        following.await.unwrap();

        let late = feed.subscribe(usize::MAX);
        assert_eq!(late.past.len(), PAST, "memory is bounded");
        let numbers: Vec<u64> = late.past.iter().map(|event| event.number).collect();
        assert_eq!(numbers, (all as u64 + 2 - PAST as u64..=all as u64 + 1).collect::<Vec<_>>());
        let Some(Event::RunOver(over)) = &late.past[PAST - 1].event else { panic!("{:?}", late.past[PAST - 1]) };
        assert_eq!((over.how.as_str(), over.reason.len()), ("failed", MOST_TEXT));
        assert_eq!(feed.subscribe(3).past.len(), 3);

        let lost = match slow.events.recv().await {
            Err(RecvError::Lagged(lost)) => lost,
            other => panic!("{other:?}"),
        };
        assert_eq!(slow.events.recv().await.unwrap().number, lost + 1);
    }

    #[tokio::test]
    async fn a_closed_feed_stops_following() {
        let (feed, progress, end) = (Feed::new(), broadcast::Sender::new(4), watch::Sender::new(None));
        let following = tokio::spawn(feed.clone().follow(progress.subscribe(), end.subscribe()));
        feed.close();
        following.await.unwrap();
        assert!(*feed.subscribe(0).closed.borrow());
    }
}
