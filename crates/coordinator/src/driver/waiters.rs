//! Calls that wait for something, and whom a change wakes.
//!
//! Waking everybody at every change costs more than the work itself: with 4,000 workers that wait, each of them asks again
//! for each sample that one of them hands in. So those who wait for work stand in line, and `n` pieces of it wake `n` of them
//! at most. The rules that keep a piece of work from lying there while somebody waits for it:
//!
//! - A call asks, and takes its place in the line if there was nothing, under one lock of the driver: no change comes between.
//! - A call that was woken and did not take anything (there is no room for what is there, or it was refused) lets the next in
//!   line try, as long as there is something and somebody who has not tried since the newest change. It keeps its place.
//! - A call that was woken and is gone (its deadline, a closed connection) passes its turn on.
//! - Whatever else lets a call succeed that was in vain before (a preference that has run out, say) is found at the next tick,
//!   which offers again what is there.
//!
//! Learners and the rest are few and wait for the same thing: a change wakes all of them.

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
    /// A place in a generation of learners.
    Generation,
    /// A task of a rank.
    Task,
    /// New weights. Whoever publishes them notifies.
    Weights,
    /// That the last worker has left.
    Goodbye,
}

/// A line of calls.
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

/// All calls that wait. Locked after the driver where both are.
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
    /// Places that were given out.
    places: u64,
    /// Where workers that wait for work stand. One that asks twice at a time has its newest call here.
    of_worker: BTreeMap<WorkerId, (Line, u64)>,
}

/// Those who wait for one thing, by their place. A call is in one of these, or awake.
#[derive(Debug, Default)]
struct Queue {
    /// They have not tried since the newest change.
    ready: BTreeMap<u64, Arc<Notify>>,
    /// They have.
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
    /// Lets all try again.
    fn renew(&mut self) {
        // One by one: each has paid for it by the try that brought it here.
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

    /// Tries, and again whenever there may be what the call waits for, until there is something or the deadline is over.
    ///
    /// `enter` locks what is tried on; `has_more` says whether somebody else in line could take something.
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
                // Before the state is let go of, so that no change comes in between.
                place.get_or_insert_with(|| self.place(wait)).stand();
            }
            let Some(place) = &place else { return Ok(None) };
            if tokio::time::timeout_at(deadline, place.wake.notified()).await.is_err() {
                return Ok(None);
            }
        }
    }

    /// A place at the end of a line, for a call that is awake.
    fn place(&self, wait: Wait) -> Place {
        let mut lines = self.lock();
        lines.places += 1;
        let number = lines.places;
        if let Some(worker) = wait.worker() {
            lines.of_worker.insert(worker, (wait.line(), number));
        }
        Place { waiters: self.clone(), wait, number, wake: Arc::default(), is_standing: false }
    }

    /// There is something new in a line: `units` pieces of work, each for one call.
    pub(crate) fn offer(&self, line: Line, units: usize) {
        let mut lines = self.lock();
        let queue = lines.queue(line);
        queue.renew();
        queue.wake(units);
    }

    /// There is something new for all who stand in a line.
    pub(crate) fn notify(&self, line: Line) {
        self.offer(line, usize::MAX);
    }

    /// Lets the next in line try, if somebody has not since the newest change.
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

/// A call's place in a line. Dropping it leaves the line; a turn that it has not used passes on.
#[derive(Debug)]
struct Place {
    waiters: Waiters,
    wait: Wait,
    number: u64,
    wake: Arc<Notify>,
    /// It has taken its place, and is awake only when somebody has woken it.
    is_standing: bool,
}

impl Place {
    /// Takes the place after a try that was in vain.
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
