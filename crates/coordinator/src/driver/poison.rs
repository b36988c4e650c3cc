//! Handles panics under the driver's lock.

use std::sync::{Mutex, MutexGuard};

use tonic::Status;

/// The driver's state is unusable because of a panic under its lock.
///
/// A panic within a step of the machine leaves an event that is half applied and was never recorded: memory and journal
/// differ from then on, and what is acknowledged after that may be lost. So no call may read the state, and the run of
/// this process ends ([`RunEnd::Panicked`](crate::RunEnd)). The next process resumes from the journal, which does not
/// contain that event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the coordinator panicked in the middle of an event and ends; started again, it resumes from its journal")]
pub(crate) struct Poisoned;

impl From<Poisoned> for Status {
    /// `UNAVAILABLE`, so that callers retry and reach the next coordinator.
    fn from(poisoned: Poisoned) -> Self {
        Self::unavailable(poisoned.to_string())
    }
}

/// Locks a mutex whose content is valid only as long as nobody has panicked while holding it.
pub(super) fn enter<T>(mutex: &Mutex<T>) -> Result<MutexGuard<'_, T>, Poisoned> {
    mutex.lock().map_err(|_| Poisoned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_poisoned_mutex_is_never_entered() {
        let mutex = Mutex::new(1);
        assert_eq!(enter(&mutex).map(|guard| *guard), Ok(1));
        std::thread::scope(|scope| {
            let poisoned = scope.spawn(|| {
                let _guard = enter(&mutex).unwrap();
                panic!("in the middle of an event");
            });
            assert!(poisoned.join().is_err());
        });
        let refused = enter(&mutex).map(|guard| *guard).unwrap_err();
        let status = Status::from(refused);
        assert_eq!(status.code(), tonic::Code::Unavailable);
        assert!(status.message().contains("resumes from its journal"), "{status}");
    }
}
