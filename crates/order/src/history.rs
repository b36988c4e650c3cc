use std::collections::BTreeMap;

use pacs_types::GroupId;
use serde::{Deserialize, Serialize};

/// A pass rate of 1 in the units of [`Seen::rate`].
const ALL: u16 = u16::MAX;

/// Outcomes of trained groups by problem. They are applied in the order of steps, and within a step in order of group
/// id, so that the history does not depend on which group was complete first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct History {
    /// Statistics by index of the problem; problems that were never drawn are absent.
    #[serde(with = "packed")]
    seen: BTreeMap<u32, Seen>,
    /// Outcomes that are applied at the end of the step.
    noted: BTreeMap<GroupId, Evidence>,
}

/// Statistics of one problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Number of trained groups.
    pub visits: u32,
    /// Smoothed pass rate in 65535ths: it starts at one half, and each group moves it halfway to its own pass rate.
    pub rate: u16,
    /// Number of groups in a row, up to the newest, with only right answers.
    pub solved: u32,
}

/// Outcome of one group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    /// Pass rate in 65535ths.
    rate: u16,
    /// Whether all answers were right.
    solved: bool,
}

impl Evidence {
    /// Outcome of a group with these labels, 1 for a right answer and 0 for a wrong one.
    #[must_use]
    pub fn of(labels: impl Iterator<Item = f64>) -> Self {
        let mut sum = 0.0;
        let mut count = 0.0f64;
        let mut solved = true;
        for label in labels {
            sum += label.clamp(0.0, 1.0);
            count += 1.0;
            solved &= label >= 1.0;
        }
        // At most `ALL`, so the cast does not truncate.
        let rate = (sum / count.max(1.0) * f64::from(ALL)).round() as u16;
        Self { rate, solved: solved && count > 0.0 }
    }
}

impl Default for Seen {
    fn default() -> Self {
        Self { visits: 0, rate: ALL / 2 + 1, solved: 0 }
    }
}

impl Seen {
    /// The smoothed pass rate, 0 to 1.
    #[must_use]
    pub fn pass_rate(&self) -> f64 {
        f64::from(self.rate) / f64::from(ALL)
    }

    fn take(&mut self, evidence: Evidence) {
        // Integers and not floats: the history is part of a checkpoint, and must be the same on every machine.
        self.visits = self.visits.saturating_add(1);
        // Rounded towards the group's pass rate.
        self.rate = match evidence.rate >= self.rate {
            true => self.rate + (evidence.rate - self.rate).div_ceil(2),
            false => self.rate - (self.rate - evidence.rate).div_ceil(2),
        };
        self.solved = if evidence.solved { self.solved.saturating_add(1) } else { 0 };
    }
}

impl History {
    /// Whether the history is empty, with nothing noted either.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.seen.is_empty() && self.noted.is_empty()
    }

    /// Statistics of a problem; `None` if it was never trained on.
    #[must_use]
    pub fn of(&self, problem: usize) -> Option<Seen> {
        self.seen.get(&key(problem)).copied()
    }

    /// Notes the outcome of a complete group, which counts from the end of the step.
    pub fn note(&mut self, group: GroupId, evidence: Evidence) {
        // Not applied yet: groups complete in an order that depends on timing, and draws would depend on it, too.
        self.noted.insert(group, evidence);
    }

    /// Applies what was noted, at the end of a step. `problem` maps a group to the index of its problem.
    pub fn settle(&mut self, problem: impl Fn(GroupId) -> usize) {
        for (group, evidence) in std::mem::take(&mut self.noted) {
            self.seen.entry(key(problem(group))).or_default().take(evidence);
        }
    }

    /// Number of problems whose last `after` groups had only right answers.
    #[must_use]
    pub fn retired(&self, after: u32) -> usize {
        self.seen.values().filter(|seen| seen.solved >= after).count()
    }

    /// Resets the retired problems, so that they are drawn until they are solved again. Returns how many there were.
    pub(crate) fn reopen(&mut self, after: u32) -> usize {
        let retired = self.seen.values_mut().filter(|seen| seen.solved >= after);
        retired.map(|seen| seen.solved = 0).count()
    }
}

fn key(problem: usize) -> u32 {
    u32::try_from(problem).expect("a plan has at most 31 sets more than one, each below 2^32 problems in memory")
}

/// Serializes the statistics as one short text instead of a table of tables: a hundred thousand problems take two
/// megabytes, and every number is exact. The text is hexadecimal `problem.visits.rate.solved`, separated by spaces.
mod packed {
    use std::collections::BTreeMap;
    use std::fmt::Write;

    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    use super::Seen;

    pub(super) fn serialize<S: Serializer>(seen: &BTreeMap<u32, Seen>, serializer: S) -> Result<S::Ok, S::Error> {
        let mut text = String::with_capacity(16 * seen.len());
        for (problem, Seen { visits, rate, solved }) in seen {
            let gap = if text.is_empty() { "" } else { " " };
            // Writing to a string cannot fail.
            let _ = write!(text, "{gap}{problem:x}.{visits:x}.{rate:x}.{solved:x}");
        }
        serializer.serialize_str(&text)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<u32, Seen>, D::Error> {
        let text = String::deserialize(deserializer)?;
        let read = |word| entry(word).ok_or_else(|| D::Error::custom(format!("`{word}` is no history of a problem")));
        text.split_ascii_whitespace().map(read).collect()
    }

    fn entry(word: &str) -> Option<(u32, Seen)> {
        let mut numbers = word.split('.').map(|number| u32::from_str_radix(number, 16).ok());
        let mut next = || numbers.next().flatten();
        let problem = next()?;
        let visits = next()?;
        let rate = u16::try_from(next()?).ok()?;
        let solved = next()?;
        numbers.next().is_none().then_some((problem, Seen { visits, rate, solved }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RIGHT: [f64; 2] = [1.0, 1.0];
    const WRONG: [f64; 2] = [0.0, 0.0];
    const MIXED: [f64; 2] = [1.0, 0.0];

    fn after(groups: &[[f64; 2]]) -> Seen {
        let mut history = History::default();
        for (id, labels) in (0..).zip(groups) {
            history.note(GroupId(id), Evidence::of(labels.iter().copied()));
            history.settle(|_| 7);
        }
        history.of(7).unwrap()
    }

    #[test]
    fn pass_rates_follow_the_newest_groups() {
        for (groups, rate, solved) in [
            (&[RIGHT][..], 0.75, 1),
            (&[RIGHT, RIGHT], 0.875, 2),
            (&[RIGHT, RIGHT, MIXED], 0.6875, 0),
            (&[WRONG], 0.25, 0),
            (&[WRONG, RIGHT], 0.625, 1),
            (&[MIXED], 0.5, 0),
        ] {
            let seen = after(groups);
            assert!((seen.pass_rate() - rate).abs() < 1e-4, "{groups:?}: {}", seen.pass_rate());
            assert_eq!((seen.visits as usize, seen.solved), (groups.len(), solved), "{groups:?}");
        }
        assert_eq!(after(&[RIGHT; 40]).pass_rate(), 1.0, "it gets to its ends");
        assert_eq!(after(&[WRONG; 40]).pass_rate(), 0.0);
    }

    #[test]
    fn what_was_noted_counts_in_the_order_of_groups_and_from_the_end_of_the_step_on() {
        let evidence = |labels: [f64; 2]| Evidence::of(labels.into_iter());
        let settled = |groups: &[(u64, [f64; 2])]| {
            let mut history = History::default();
            groups.iter().for_each(|(id, labels)| history.note(GroupId(*id), evidence(*labels)));
            assert_eq!(history.of(0), None, "not before the step has ended");
            history.settle(|_| 0);
            history
        };
        let in_order = settled(&[(1, RIGHT), (2, WRONG), (3, MIXED)]);
        assert_eq!(in_order, settled(&[(3, MIXED), (1, RIGHT), (2, WRONG)]));
        assert_ne!(in_order, settled(&[(1, MIXED), (2, WRONG), (3, RIGHT)]));
    }

    #[test]
    fn what_is_read_is_what_was_written() {
        let mut history = History::default();
        for id in 0..1000u64 {
            let labels = (0..3).map(|sample| f64::from(u8::from(pacs_types::mix(id * 3 + sample) & 1 == 0)));
            history.note(GroupId(id), Evidence::of(labels));
            if id % 7 == 0 {
                history.settle(|group| (group.0 % 300) as usize);
            }
        }
        assert!(!history.noted.is_empty());
        let text = serde_json::to_string(&history).unwrap();
        assert_eq!(serde_json::from_str::<History>(&text).unwrap(), history);
        assert_eq!(serde_json::from_str::<History>("{}").unwrap(), History::default());
        for damaged in ["1.2.3", "1.2.3.4.5", "1.2.10000.4", "x.1.1.1"] {
            let read = serde_json::from_str::<History>(&format!("{{\"seen\":\"{damaged}\"}}"));
            assert!(read.unwrap_err().to_string().contains(damaged), "{damaged}");
        }
    }

    #[test]
    fn labels_that_are_not_whole_count_as_far_as_they_go() {
        assert_eq!(Evidence::of([0.5, 1.0].into_iter()), Evidence { rate: 49151, solved: false });
        assert_eq!(Evidence::of([2.0, 1.0].into_iter()), Evidence { rate: ALL, solved: true });
        assert_eq!(Evidence::of(std::iter::empty()), Evidence { rate: 0, solved: false });
    }
}
