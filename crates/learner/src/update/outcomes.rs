//! Batch statistics from labels, rewards and lengths, which every rank knows of every sequence.

use std::collections::BTreeMap;

use super::batch::IndexEntry;

/// Histogram bins of groups by pass rate: the metric's name, and the largest rate in the bin.
const BINS: [(&str, f64); 6] = [
    ("pass_rate_share_0", 0.0),
    ("pass_rate_share_1_to_25", 0.25),
    ("pass_rate_share_26_to_50", 0.5),
    ("pass_rate_share_51_to_75", 0.75),
    // Every rate below 1: only a group without a failure belongs to the last bin.
    ("pass_rate_share_76_to_99", 1.0 - f64::EPSILON),
    ("pass_rate_share_100", f64::INFINITY),
];

/// Computes the metrics of a batch from its index, by name.
pub(super) fn outcomes(index: &[IndexEntry]) -> BTreeMap<&'static str, f64> {
    let mut named = BTreeMap::new();
    let mut groups: BTreeMap<u64, (f64, f64)> = BTreeMap::new();
    for entry in index {
        let (passed, samples) = groups.entry(entry.group).or_default();
        *passed += entry.label;
        *samples += 1.0;
    }
    named.extend(BINS.map(|(name, _)| (name, 0.0)));
    for (passed, samples) in groups.values() {
        let (name, _) = BINS.iter().find(|(_, most)| passed / samples <= *most).expect("the last bin takes every rate");
        *named.entry(name).or_default() += 1.0 / groups.len() as f64;
    }
    named.extend(mean(index.iter().map(|entry| f64::from(u8::from(entry.truncated)))).map(|x| ("truncated_share", x)));
    let lengths = |correct: bool| {
        let of_kind = index.iter().filter(move |entry| (entry.label > 0.5) == correct);
        mean(of_kind.map(|entry| f64::from(entry.answer_tokens)))
    };
    named.extend(lengths(true).map(|length| ("answer_tokens_correct_mean", length)));
    named.extend(lengths(false).map(|length| ("answer_tokens_wrong_mean", length)));
    let rewards = || index.iter().map(|entry| entry.reward);
    if let Some(mean_reward) = mean(rewards()) {
        let variance = mean(rewards().map(|reward| (reward - mean_reward).powi(2))).unwrap_or_default();
        named.insert("reward_std", variance.sqrt());
        named.insert("reward_min", rewards().fold(f64::INFINITY, f64::min));
        named.insert("reward_max", rewards().fold(f64::NEG_INFINITY, f64::max));
    }
    named
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0.0), |(sum, count), value| (sum + value, count + 1.0));
    (count > 0.0).then(|| sum / count)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(group: u64, label: f64, answer_tokens: u32) -> IndexEntry {
        IndexEntry {
            group,
            sample: 0,
            mini_batch: 0,
            rank: 0,
            label,
            reward: 2.0 * label,
            answer_tokens,
            truncated: false,
            unit: None,
        }
    }

    #[test]
    fn groups_fall_into_bins_by_pass_rate() {
        let rates = [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (5, 0)];
        let sample = |&(group, passed): &(u64, u64)| {
            (0..4).map(move |i| entry(group, if i < passed { 1.0 } else { 0.0 }, 10 + 2 * u32::from(i < passed)))
        };
        let index: Vec<IndexEntry> = rates.iter().flat_map(sample).collect();
        let named = outcomes(&index);
        let shares = BINS.map(|(name, _)| (named[name] * 6.0).round());
        assert_eq!(shares, [2.0, 1.0, 1.0, 1.0, 0.0, 1.0], "{named:?}");
        assert_eq!((named["answer_tokens_correct_mean"], named["answer_tokens_wrong_mean"]), (12.0, 10.0));
        assert_eq!((named["reward_min"], named["reward_max"]), (0.0, 2.0));
        let (passed, all) = (10.0f64, 24.0);
        let share = passed / all;
        assert!((named["reward_std"] - 2.0 * (share * (1.0 - share)).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn missing_values_are_left_out() {
        let named = outcomes(&[entry(3, 1.0, 7)]);
        assert_eq!(named.get("answer_tokens_wrong_mean"), None);
        assert_eq!(named["pass_rate_share_100"], 1.0);
        let seven_of_eight: Vec<IndexEntry> = (0..8).map(|i| entry(0, f64::from(u8::from(i > 0)), 1)).collect();
        assert_eq!(outcomes(&seven_of_eight)["pass_rate_share_76_to_99"], 1.0);
    }
}
