//! Calls that wait for something, and which of them a change wakes.
//!
//! Waking all callers at every change costs more than the work itself: with 4,000 waiting workers, each would ask again
//! for each sample that one of them hands in. So calls for work wait in lines, and `n` pieces of work wake at most `n`
//! of them. These rules ensure that no work stays idle while a call waits for it:
//!
//! - A call asks, and enters the line if there was nothing, under one lock of the driver: no change comes between.
//! - A woken call that takes nothing (the work does not fit, or the call is refused) wakes the next in line, as long as
//!   there is work and a call that has not tried since the newest change. It keeps its place.
//! - A woken call that is gone (its deadline, a closed connection) passes its turn on.
//! - Other conditions that let a call succeed later (an expired preference, for example) are found by the next tick,
//!   which offers the existing work again.
//!
//! Learners and other callers are few and wait for the same thing, so a change wakes all of them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pacs_types::WorkerId;
use tokio::sync::Notify;
use tokio::time::Instant;

/// What a call waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Groups for this rollout worker.
    Groups(WorkerId),
    /// Samples for this verifier.
    Samples(WorkerId),
    /// A learner generation.
    Generation,
    /// A task for a rank.
    Task,
    /// Newly announced weights.
    Weights,
    /// The departure of the last worker.
    Goodbye,
}

/// A queue of waiting calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Line {
    Groups,
    Samples,
    Generation,
    Task,
    Weights,
    Goodbye,
}

impl Wait {
    pub(crate) fn line(self) -> Line {
        match self {
            Self::Groups(_) => Line::Groups,
            Self::Samples(_) => Line::Samples,
            Self::Generation => Line::Generation,
            Self::Task => Line::Task,
            Self::Weights => Line::Weights,
            Self::Goodbye => Line::Goodbye,
        }
    }

    fn worker(self) -> Option<WorkerId> {
        match self {
            Self::Groups(worker) | Self::Samples(worker) => Some(worker),
            Self::Generation | Self::Task | Self::Weights | Self::Goodbye => None,
        }
    }
}

/// All waiting calls. Lock order: the driver first.
#[derive(Clone, Debug, Default)]
pub(crate) struct Waiters(Arc<Mutex<Lines>>);

#[derive(Debug, Default)]
struct Lines {
    groups: Queue,
    samples: Queue,
    generation: Queue,
    task: Queue,
    weights: Queue,
    goodbye: Queue,
    /// Number of places handed out, which makes them unique and ordered.
    places: u64,
    /// Place of each worker's waiting call. If a worker has two calls, the newest is here.
    of_worker: BTreeMap<WorkerId, (Line, u64)>,
}

/// The waiting calls of a line by place. A call is in one of the maps, or awake.
#[derive(Debug, Default)]
struct Queue {
    /// Calls that have not tried since the newest change.
    ready: BTreeMap<u64, Arc<Notify>>,
    /// Calls that have.
    tried: BTreeMap<u64, Arc<Notify>>,
}

impl Lines {
    fn queue(&mut self, line: Line) -> &mut Queue {
        match line {
            Line::Groups => &mut self.groups,
            Line::Samples => &mut self.samples,
            Line::Generation => &mut self.generation,
            Line::Task => &mut self.task,
            Line::Weights => &mut self.weights,
            Line::Goodbye => &mut self.goodbye,
        }
    }
}

impl Queue {
    /// Makes all calls ready to try again.
    fn renew(&mut self) {
        // Amortized: each call was moved to `tried` by a try of its own.
        while let Some((place, wake)) = self.tried.pop_first() {
            self.ready.insert(place, wake);
        }
    }

    fn wake(&mut self, most: usize) {
        for _ in 0..most {
            let Some((_, wake)) = self.ready.pop_first() else { return };
            wake.notify_one();
        }
    }
}

impl Waiters {
    fn lock(&self) -> MutexGuard<'_, Lines> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tries now, and again whenever what the call waits for may have arrived, until there is a
    /// result or the deadline passes.
    ///
    /// `enter` locks the state that `attempt` works on; `has_more` says whether another call
    /// in line could take something.
    pub(super) async fn poll<'s, S: 's, T, E>(
        &self,
        wait: Wait,
        deadline: Instant,
        enter: impl Fn() -> Result<MutexGuard<'s, S>, E>,
        has_more: impl Fn(&S) -> bool,
        mut attempt: impl FnMut(&mut S) -> Result<Option<T>, E>,
    ) -> Result<Option<T>, E> {
        let mut place: Option<Place> = None;
        loop {
            {
                let mut state = enter()?;
                let was_woken = place.as_mut().map(|place| place.is_standing = false).is_some();
                let found = attempt(&mut state);
                if matches!(found, Ok(Some(_))) {
                    return found;
                }
                if was_woken && has_more(&state) {
                    self.pass_on(wait.line());
                }
                found?;
                // Before the state is unlocked, so that no change comes in between.
                place.get_or_insert_with(|| self.place(wait)).stand();
            }
            let Some(place) = &place else { return Ok(None) };
            if tokio::time::timeout_at(deadline, place.wake.notified()).await.is_err() {
                return Ok(None);
            }
        }
    }

    /// A new place at the end of a line, for a call that is awake.
    fn place(&self, wait: Wait) -> Place {
        let mut lines = self.lock();
        lines.places += 1;
        let number = lines.places;
        if let Some(worker) = wait.worker() {
            lines.of_worker.insert(worker, (wait.line(), number));
        }
        Place { waiters: self.clone(), wait, number, wake: Arc::default(), is_standing: false }
    }

    /// Announces new work in a line: `units` pieces, each for one call.
    pub(crate) fn offer(&self, line: Line, units: usize) {
        let mut lines = self.lock();
        let queue = lines.queue(line);
        queue.renew();
        queue.wake(units);
    }

    /// Announces a change that concerns all calls in a line.
    pub(crate) fn notify(&self, line: Line) {
        self.offer(line, usize::MAX);
    }

    /// Wakes the next call in line that has not tried since the newest change.
    fn pass_on(&self, line: Line) {
        self.lock().queue(line).wake(1);
    }

    /// Wakes the call of one worker, whose own state has changed.
    pub(crate) fn wake_worker(&self, worker: WorkerId) {
        let mut lines = self.lock();
        let Some((line, place)) = lines.of_worker.get(&worker).copied() else { return };
        let queue = lines.queue(line);
        if let Some(wake) = queue.ready.remove(&place).or_else(|| queue.tried.remove(&place)) {
            wake.notify_one();
        }
    }
}

/// A call's place in a line. Dropping it leaves the line, and passes an unused turn on.
#[derive(Debug)]
struct Place {
    waiters: Waiters,
    wait: Wait,
    number: u64,
    wake: Arc<Notify>,
    /// Whether the call has entered the line, so that it is awake only if it was woken.
    is_standing: bool,
}

impl Place {
    /// Enters the line after a try without result.
    fn stand(&mut self) {
        self.is_standing = true;
        let mut lines = self.waiters.lock();
        lines.queue(self.wait.line()).tried.insert(self.number, Arc::clone(&self.wake));
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut lines = self.waiters.lock();
        if let Some(worker) = self.wait.worker()
            && lines.of_worker.get(&worker).is_some_and(|(_, number)| *number == self.number)
        {
            lines.of_worker.remove(&worker);
        }
        let queue = lines.queue(self.wait.line());
        let was_asleep = queue.ready.remove(&self.number).or_else(|| queue.tried.remove(&self.number)).is_some();
        if self.is_standing && !was_asleep {
            queue.wake(1);
        }
    }
}

#[cfg(test)]
mod tests;
