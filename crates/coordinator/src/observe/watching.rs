//! The event stream of one watcher.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use pacs_protocol::v1;
use pacs_protocol::v1::watch_response::Event;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

use super::feed::{PAST, Subscription};
use super::{MOST_WATCHERS, ObserveError, Observer};
use crate::driver::unix_time;

/// Events queued for a watcher. When the queue is full, the watcher's task waits, and loses
/// what the feed drops meanwhile.
const QUEUE: usize = 16;
/// Interval at which a changed situation is detected.
const LOOK: Duration = Duration::from_secs(1);

impl Observer {
    /// Implements `ObserveService.Watch`. The stream ends with the run.
    ///
    /// # Errors
    /// When the request is out of bounds, or there are too many watchers.
    pub fn watch(&self, request: &v1::WatchRequest) -> Result<mpsc::Receiver<Arc<v1::WatchResponse>>, ObserveError> {
        if request.past as usize > PAST {
            return Err(ObserveError::invalid("past", format!("is {}, expected at most {PAST}", request.past)));
        }
        let place = Arc::clone(&self.0.watchers).try_acquire_owned();
        let place = place.map_err(|_| ObserveError::Busy(format!("there are {MOST_WATCHERS} watchers already")))?;
        let (sender, receiver) = mpsc::channel(QUEUE);
        let (subscription, observer) = (self.0.feed.subscribe(request.past as usize), self.clone());
        // Ends with the watcher, the run or the feed.
        tokio::spawn(async move {
            let _place = place;
            let _ = observer.pass_on(subscription, sender).await;
        });
        Ok(receiver)
    }

    /// Forwards events until the run ends; returns an error when the watcher is gone.
    async fn pass_on(
        self,
        subscription: Subscription,
        sender: mpsc::Sender<Arc<v1::WatchResponse>>,
    ) -> Result<(), mpsc::error::SendError<Arc<v1::WatchResponse>>> {
        let Subscription { past, mut events, mut closed } = subscription;
        let mut told: Option<v1::Situation> = None;
        for event in past {
            let is_last = matches!(event.event, Some(Event::RunOver(_)));
            sender.send(event).await?;
            if is_last {
                return Ok(());
            }
        }
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let event = tokio::select! {
                event = events.recv() => match event {
                    Ok(event) => event,
                    Err(RecvError::Lagged(lost)) => unnumbered(Event::Lost(v1::EventsLost { events: lost })),
                    Err(RecvError::Closed) => return Ok(()),
                },
                _ = look.tick() => {
                    let situation = situation(&self.status());
                    if told.as_ref() == Some(&situation) {
                        continue;
                    }
                    told = Some(situation.clone());
                    unnumbered(Event::Situation(situation))
                }
                _ = closed.wait_for(|closed| *closed) => return Ok(()),
                () = sender.closed() => return Ok(()),
            };
            let is_last = matches!(event.event, Some(Event::RunOver(_)));
            tokio::select! {
                sent = sender.send(event) => sent?,
                _ = closed.wait_for(|closed| *closed) => return Ok(()),
            }
            if is_last {
                return Ok(());
            }
        }
    }
}

fn unnumbered(event: Event) -> Arc<v1::WatchResponse> {
    Arc::new(v1::WatchResponse { number: 0, time: unix_time(), event: Some(event) })
}

/// The part of a status that changes rarely enough to be sent as an event.
fn situation(status: &v1::GetStatusResponse) -> v1::Situation {
    let mut workers: HashMap<String, u32> = HashMap::new();
    for worker in &status.workers {
        let role = match worker.role() {
            v1::Role::Rollout => "rollout",
            v1::Role::Learner => "learner",
            v1::Role::Verifier => "verifier",
            v1::Role::Unspecified => continue,
        };
        *workers.entry(role.to_owned()).or_default() += 1;
    }
    v1::Situation {
        phase: status.phase.clone(),
        step: status.step,
        total_steps: status.total_steps,
        weight_version: status.weight_version,
        generation: status.generation,
        paused: status.paused,
        queues: status.queues,
        groups_in_flight: status.groups_in_flight,
        workers,
    }
}
