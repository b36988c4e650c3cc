use std::fmt;

/// Factor over the median from which a rank or link is reported.
const SLOW: f64 = 1.5;

/// A rank or link that slows the others down.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Finding {
    /// A rank whose memory is slow: throttled, or shared with another process.
    Memory { rank: usize, times_median: f64 },
    /// A rank whose links to both neighbours are slow.
    Rank { rank: usize, times_median: f64 },
    /// A slow link between two ranks whose other links are fast.
    Link { ranks: [usize; 2], times_median: f64 },
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory { rank, times_median } => {
                write!(
                    f,
                    "rank {rank} is slow by itself: its memory takes {times_median:.1} times as long as the median"
                )
            }
            Self::Rank { rank, times_median } => write!(
                f,
                "rank {rank} is slow to reach: its better link takes {times_median:.1} times as long as the median rank's"
            ),
            Self::Link { ranks: [first, second], times_median } => {
                write!(f, "the link of ranks {first} and {second} takes {times_median:.1} times as long as the median")
            }
        }
    }
}

/// Finds slow ranks and links. `memory` holds seconds by rank, `links` seconds of the link between rank `i` and the
/// next, by `i`.
///
/// A rank is judged by its better link, because a slow neighbour makes the other link slow. With two ranks there is one
/// link, and nothing to compare it with.
pub(crate) fn judge(memory: &[f64], links: &[f64]) -> Vec<Finding> {
    let mut findings: Vec<Finding> = slower_than_median(memory)
        .into_iter()
        .map(|(rank, times_median)| Finding::Memory { rank, times_median })
        .collect();
    let world_size = links.len();
    if world_size < 3 {
        return findings;
    }
    let better: Vec<f64> =
        (0..world_size).map(|rank| links[rank].min(links[(rank + world_size - 1) % world_size])).collect();
    let slow_ranks = slower_than_median(&better);
    let is_slow = |rank: usize| slow_ranks.iter().any(|(slow, _)| *slow == rank);
    for (first, times_median) in slower_than_median(links) {
        let ranks = [first, (first + 1) % world_size];
        if !ranks.into_iter().any(is_slow) {
            findings.push(Finding::Link { ranks, times_median });
        }
    }
    findings.extend(slow_ranks.iter().map(|&(rank, times_median)| Finding::Rank { rank, times_median }));
    findings
}

/// Indices and factors of times that are [`SLOW`]; of an even number, the median is the lower of the middle two.
fn slower_than_median(times: &[f64]) -> Vec<(usize, f64)> {
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(median) = sorted.get(sorted.len().saturating_sub(1) / 2).copied().filter(|median| *median > 0.0) else {
        return Vec::new();
    };
    let factors = times.iter().map(|time| time / median).enumerate();
    factors.filter(|(_, factor)| *factor >= SLOW).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_are_not_accused() {
        assert_eq!(judge(&[1.0, 1.1, 0.9, 1.2], &[2.0, 2.5, 2.2, 2.1]), []);
        assert_eq!(judge(&[1.0], &[]), []);
        assert_eq!(judge(&[], &[]), []);
        assert_eq!(judge(&[0.0, 0.0], &[0.0]), []);
    }

    #[test]
    fn a_rank_with_two_slow_links_is_named() {
        for (world_size, slow) in [(3, 0), (3, 1), (4, 2), (8, 7)] {
            let mut links = vec![1.0; world_size];
            links[slow] = 4.0;
            links[(slow + world_size - 1) % world_size] = 3.0;
            let expected = [Finding::Rank { rank: slow, times_median: 3.0 }];
            assert_eq!(judge(&vec![1.0; world_size], &links), expected, "{world_size} ranks");
        }
    }

    #[test]
    fn a_single_slow_link_is_not_blamed_on_a_rank() {
        let expected = [Finding::Link { ranks: [3, 0], times_median: 5.0 }];
        assert_eq!(judge(&[1.0; 4], &[1.0, 1.0, 1.0, 5.0]), expected);
    }

    #[test]
    fn slow_memory_is_named_among_two() {
        let findings = judge(&[1.0, 3.0], &[7.0]);
        assert_eq!(findings, [Finding::Memory { rank: 1, times_median: 3.0 }]);
        let text = "rank 1 is slow by itself: its memory takes 3.0 times as long as the median";
        assert_eq!(findings[0].to_string(), text);
    }
}
