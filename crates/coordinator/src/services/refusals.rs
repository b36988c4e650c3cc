//! Limits the logging of refused registrations.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pacs_types::Role;

/// Interval of log lines per name. A process whose name is held asks about every second until
/// the holder's heartbeat timeout.
const EVERY: Duration = Duration::from_secs(60);
/// Bound on remembered names. A process that always uses new ones is logged each time, in
/// lines that `check_name` bounds.
const MOST_NAMES: usize = 256;

/// Refused names, and when a line was last logged for each. Clones share them.
#[derive(Clone, Debug, Default)]
pub(super) struct Refusals(Arc<Mutex<BTreeMap<(Role, String), Told>>>);

#[derive(Clone, Copy, Debug)]
struct Told {
    at: Instant,
    /// Refusals since that line.
    untold: u64,
}

impl Refusals {
    /// Counts a refusal. When a log line is due, returns the number of refusals since the last one, including this one.
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
