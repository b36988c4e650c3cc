//! Simulates a slow disk in tests and measurements; does nothing in a program.

#[cfg(any(test, feature = "faults"))]
mod slow {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    static MILLISECONDS: AtomicU64 = AtomicU64::new(0);

    /// Delays every job of the run folder's thread in coordinators that start from now on.
    pub fn slow_disk(by: Duration) {
        MILLISECONDS.store(u64::try_from(by.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Delay of each job.
    #[derive(Clone, Copy, Debug, Default)]
    pub(crate) struct Fault(pub(crate) Duration);

    impl Fault {
        pub(crate) fn current() -> Self {
            Self(Duration::from_millis(MILLISECONDS.load(Ordering::Relaxed)))
        }

        pub(crate) fn strike(self) {
            if !self.0.is_zero() {
                std::thread::sleep(self.0);
            }
        }
    }
}

#[cfg(not(any(test, feature = "faults")))]
mod slow {
    /// Stand-in without a delay.
    #[derive(Clone, Copy, Debug, Default)]
    pub(crate) struct Fault;

    impl Fault {
        pub(crate) fn current() -> Self {
            Self
        }

        pub(crate) fn strike(self) {}
    }
}

pub(crate) use slow::Fault;
#[cfg(any(test, feature = "faults"))]
pub use slow::slow_disk;
