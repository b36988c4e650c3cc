use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::{Mutex, PoisonError};

use pacs_types::Verdict;

use crate::Task;

/// Longest texts of a verdict that is remembered, in bytes: they bound the memory as the entries do.
const MOST_TEXT: usize = 1024;

/// Verdicts that one verifier gave, by its version and the task: at most so many.
///
/// Two halves: what is asked for moves to the young one, and when that is full the old one is forgotten. So a verdict
/// that is in use stays, as with a list by age, at the price of two look-ups.
pub(crate) struct Cache {
    half: usize,
    keys: [RandomState; 2],
    halves: Mutex<Halves>,
}

#[derive(Default)]
struct Halves {
    young: HashMap<Key, Verdict>,
    old: HashMap<Key, Verdict>,
}

/// 128 bits under two secret keys stand for version and task: answers are long, and no two of them will ever meet.
pub(crate) type Key = [u64; 2];

impl Cache {
    /// A cache of `entries` verdicts; 0 remembers nothing.
    pub(crate) fn new(entries: usize) -> Self {
        Self { half: entries.div_ceil(2), keys: [RandomState::new(), RandomState::new()], halves: Mutex::default() }
    }

    pub(crate) fn key(&self, version: &str, task: &Task) -> Key {
        let identity = (version, &task.question, &task.gold, &task.response);
        [self.keys[0].hash_one(identity), self.keys[1].hash_one(identity)]
    }

    pub(crate) fn get(&self, key: Key) -> Option<Verdict> {
        let mut halves = self.lock();
        if let Some(verdict) = halves.young.get(&key) {
            return Some(verdict.clone());
        }
        let verdict = halves.old.remove(&key)?;
        self.put(&mut halves, key, verdict.clone());
        Some(verdict)
    }

    /// Remembers a verdict, unless it is inconclusive or too long.
    pub(crate) fn insert(&self, key: Key, verdict: &Verdict) {
        let text = verdict.rule.len() + verdict.extracted.as_ref().map_or(0, String::len);
        // A failure is not remembered: the next try may succeed.
        if self.half > 0 && verdict.outcome.is_conclusive() && text <= MOST_TEXT {
            self.put(&mut self.lock(), key, verdict.clone());
        }
    }

    fn put(&self, halves: &mut Halves, key: Key, verdict: Verdict) {
        if halves.young.len() >= self.half {
            halves.old = std::mem::take(&mut halves.young);
        }
        halves.young.insert(key, verdict);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Halves> {
        // The maps are changed by single calls: a panic elsewhere leaves them whole.
        self.halves.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pacs_types::Outcome;

    fn task(response: &str) -> Task {
        Task { question: "q".into(), response: response.into(), gold: "1".into() }
    }

    fn verdict(outcome: Outcome, rule: &str) -> Verdict {
        Verdict { outcome, label: 0.0, reward: 0.0, extracted: None, rule: rule.into() }
    }

    #[test]
    fn verdicts_are_found_by_version_and_task() {
        let cache = Cache::new(10);
        let key = cache.key("1", &task("a"));
        cache.insert(key, &verdict(Outcome::Wrong, "first"));
        assert_eq!(cache.get(cache.key("1", &task("a"))).expect("remembered").rule, "first");
        for (version, other) in [("2", task("a")), ("1", task("b")), ("1", Task { gold: "2".into(), ..task("a") })] {
            assert_eq!(cache.get(cache.key(version, &other)), None);
        }
        // The parts do not run into one another.
        let shifted = Task { question: "q1".into(), gold: String::new(), ..task("a") };
        assert_ne!(cache.key("1", &shifted), key);
    }

    #[test]
    fn failures_and_long_texts_are_not_remembered() {
        let cache = Cache::new(10);
        for outcome in [Outcome::Failed, Outcome::TimedOut] {
            let key = cache.key("1", &task(outcome.name()));
            cache.insert(key, &verdict(outcome, ""));
            assert_eq!(cache.get(key), None);
        }
        let key = cache.key("1", &task("long"));
        cache.insert(key, &verdict(Outcome::Wrong, &"x".repeat(MOST_TEXT + 1)));
        assert_eq!(cache.get(key), None);
    }

    #[test]
    fn it_is_bounded_and_keeps_what_is_in_use() {
        let cache = Cache::new(100);
        let key = |i: usize| cache.key("1", &task(&i.to_string()));
        cache.insert(key(0), &verdict(Outcome::Wrong, "in use"));
        for i in 1..10_000 {
            cache.insert(key(i), &verdict(Outcome::Wrong, ""));
            assert!(cache.get(key(0)).is_some(), "forgotten after {i}");
        }
        let halves = cache.lock();
        assert!(halves.young.len() + halves.old.len() <= 100);
        drop(halves);
        assert_eq!(cache.get(key(5000)), None);
        let none = Cache::new(0);
        none.insert(key(1), &verdict(Outcome::Wrong, ""));
        assert_eq!(none.get(key(1)), None);
    }
}
