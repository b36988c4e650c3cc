//! Which refused registrations are logged.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pacs_types::Role;

/// A process whose name is taken asks about every second for as long as the holder may be silent: one line a minute says it.
const EVERY: Duration = Duration::from_secs(60);
/// Names that are remembered; whoever asks under a new name each time is logged each time, which `check_name` keeps short.
const MOST_NAMES: usize = 256;

/// Names that were refused, and when a line was logged for each. Clones share them.
#[derive(Clone, Debug, Default)]
pub(super) struct Refusals(Arc<Mutex<BTreeMap<(Role, String), Told>>>);

#[derive(Clone, Copy, Debug)]
struct Told {
    at: Instant,
    /// Refusals since then.
    untold: u64,
}

impl Refusals {
    /// Counts a refusal; how many there were since the last line, this one included, when it is time for the next.
    pub(super) fn count(&self, role: Role, name: &str, now: Instant) -> Option<u64> {
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (role, name.to_owned());
        if let Some(known) = told.get_mut(&key) {
            known.untold += 1;
            if now.saturating_duration_since(known.at) < EVERY {
                return None;
            }
            let count = known.untold;
            *known = Told { at: now, untold: 0 };
            return Some(count);
        }
        if told.len() >= MOST_NAMES
            && let Some(oldest) = told.iter().min_by_key(|(_, told)| told.at).map(|(key, _)| key.clone())
        {
            told.remove(&oldest);
        }
        told.insert(key, Told { at: now, untold: 0 });
        Some(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_a_line_a_minute_that_counts_the_refusals() {
        let (refusals, start) = (Refusals::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let count = |name: &str, seconds| refusals.count(Role::Rollout, name, at(seconds));
        assert_eq!(count("rollout-0", 0), Some(1));
        assert!((1..60).all(|second| count("rollout-0", second).is_none()));
        assert_eq!(count("rollout-1", 30), Some(1), "others are told of at once");
        assert_eq!(count("rollout-0", 60), Some(60));
        assert_eq!(refusals.count(Role::Learner, "rollout-0", at(61)), Some(1), "each role has names of its own");
    }

    #[test]
    fn memory_is_bounded() {
        let (refusals, start) = (Refusals::default(), Instant::now());
        for number in 0..2 * MOST_NAMES as u64 {
            let at = start + Duration::from_millis(number);
            assert_eq!(refusals.count(Role::Rollout, &format!("rollout-{number}"), at), Some(1));
        }
        assert_eq!(refusals.0.lock().unwrap().len(), MOST_NAMES);
    }
}
