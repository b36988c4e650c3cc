//! A slow disk, for tests and measurements. In a program it is nothing.

#[cfg(any(test, feature = "faults"))]
mod slow {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    static MILLISECONDS: AtomicU64 = AtomicU64::new(0);

    /// Makes every job of a run folder's thread take so much longer, in coordinators that start from now on.
    pub fn slow_disk(by: Duration) {
        MILLISECONDS.store(u64::try_from(by.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// How slow the disk is.
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
    /// No fault.
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
