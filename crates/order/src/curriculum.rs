use pacs_types::{GroupId, NoiseKey, SampleId};
use serde::{Deserialize, Serialize};

use crate::{DrawOrder, DrawPlan, History};

/// Least number of draws that are examined for one to take, however few problems there are.
const LEAST_LOOKED_AT: u64 = 1000;
/// Random stream of the draw decisions; the streams of sampling noise are small numbers.
const DRAWS: u64 = 1 << 32;

/// Decides which draws are worth a group of samples.
///
/// Whether a draw is skipped is a function of the seed, its number and the history of its problem alone. So a job that
/// resumes from a checkpoint, with the history stored there, makes the same draws.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Curriculum {
    /// Sets of problems and the order of their draws.
    pub plan: DrawPlan,
    /// A problem is retired after this many groups in a row with only right answers, at least 1. `None`: never.
    pub retire_after: Option<u32>,
    /// Lower bound on the probability of a draw, above 0: a problem with the smoothed pass rate `p` is drawn with the
    /// probability `max(floor, 4 p (1 - p))`, a new problem always. `None`: every draw is taken.
    #[serde(with = "pacs_types::bits::option")]
    pub difficulty_floor: Option<f64>,
    /// Problems that a step takes. Where fewer than that remain, retired ones are reopened, because steps over the same
    /// few problems would overfit to them.
    #[serde(default)]
    pub least_left: usize,
}

/// Decision on a draw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// Its group is sampled.
    Take,
    /// It is skipped at random, because its problem is nearly always or nearly never solved.
    Pass,
    /// It is skipped, because its problem is retired.
    Retired,
}

/// The next draw, and what was skipped on the way to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draw {
    /// Id of the drawn group, which is its position in the order.
    pub group: GroupId,
    /// Position after it, from which the next draw is sought.
    pub cursor: u64,
    /// Draws before it that were skipped.
    pub skipped: u64,
    /// Retired problems that were reopened, because no other was left to draw.
    pub reopened: usize,
}

impl Curriculum {
    /// Decides on the draw of `group`, whose problem has the index `problem`.
    #[must_use]
    pub fn choice(&self, history: &History, group: GroupId, problem: usize) -> Choice {
        // A new problem is always drawn: its difficulty is unknown until it has been sampled.
        let Some(seen) = history.of(problem) else { return Choice::Take };
        if self.retire_after.is_some_and(|after| seen.solved >= after) {
            return Choice::Retired;
        }
        let Some(floor) = self.difficulty_floor else { return Choice::Take };
        let rate = seen.pass_rate();
        let share = (4.0 * rate * (1.0 - rate)).max(floor);
        // Keyed by the draw and not by a generator that advances: a draw that is decided again after a restart gets the same answer.
        let noise = NoiseKey::new(self.plan.seed, DRAWS, SampleId { group, index: 0 }).uniform(0);
        if noise < share { Choice::Take } else { Choice::Pass }
    }

    /// Returns the next draw at or after `cursor`, without positions that are `taken`.
    ///
    /// Examines two epochs of draws, at least 1000. If none of them is to be taken, the first one whose problem is not
    /// retired is; if all are retired, all are reopened and the first draw is taken. So a job never runs out of
    /// problems, and solved problems are measured again from time to time.
    pub fn next(&self, order: &DrawOrder, history: &mut History, cursor: u64, taken: impl Fn(GroupId) -> bool) -> Draw {
        // Two epochs, because the search may begin in the middle of one, and each problem should be considered at least once.
        let most = (2 * self.plan.problems() as u64).max(LEAST_LOOKED_AT);
        let draws = (cursor..).map(GroupId).filter(|group| !taken(*group));
        let mut fallback = None;
        for (skipped, group) in (0..most).zip(draws.clone()) {
            let draw = Draw { group, cursor: group.0 + 1, skipped, reopened: 0 };
            match self.choice(history, group, order.index_at(group.0)) {
                Choice::Take => return draw,
                // Rather a problem of little signal than a retired one, which has none.
                Choice::Pass => fallback = fallback.or(Some(draw)),
                Choice::Retired => {}
            }
        }
        fallback.unwrap_or_else(|| {
            let reopened = self.retire_after.map_or(0, |after| history.reopen(after));
            let group = draws.into_iter().next().expect("there are more draws than can be taken");
            Draw { group, cursor: group.0 + 1, skipped: 0, reopened }
        })
    }

    /// Reopens the retired problems if too few others remain, and returns how many. To be called after each step.
    pub fn reopen_if_few_are_left(&self, history: &mut History) -> usize {
        let (Some(after), problems) = (self.retire_after, self.plan.problems()) else { return 0 };
        let retired = history.retired(after);
        if retired > 0 && problems.saturating_sub(retired) < self.least_left.min(problems) {
            history.reopen(after)
        } else {
            0
        }
    }

    /// Number of retired problems.
    #[must_use]
    pub fn retired(&self, history: &History) -> usize {
        self.retire_after.map_or(0, |after| history.retired(after))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::test_runner::{Config, RngSeed};

    use super::*;
    use crate::{Evidence, SetShare};

    fn curriculum(problems: &[usize], retire_after: Option<u32>, difficulty_floor: Option<f64>) -> Curriculum {
        let sets = problems.iter().map(|problems| SetShare { weight: 1.0, problems: *problems }).collect();
        Curriculum { plan: DrawPlan { seed: 5, shuffle: true, sets }, retire_after, difficulty_floor, least_left: 0 }
    }

    /// Makes draws whose groups get the `labels` of their problems. Returns the drawn problems, and
    /// counts of skips and reopenings.
    fn run(curriculum: &Curriculum, draws: usize, labels: impl Fn(usize) -> Vec<f64>) -> (Vec<usize>, u64, usize) {
        let order = DrawOrder::new(curriculum.plan.clone());
        let (mut history, mut cursor) = (History::default(), 0);
        let (mut drawn, mut skipped, mut reopened) = (Vec::new(), 0, 0);
        for _ in 0..draws {
            let draw = curriculum.next(&order, &mut history, cursor, |_| false);
            let problem = order.index_at(draw.group.0);
            history.note(draw.group, Evidence::of(labels(problem).into_iter()));
            history.settle(|_| problem);
            drawn.push(problem);
            cursor = draw.cursor;
            skipped += draw.skipped;
            reopened += draw.reopened;
        }
        assert_eq!(cursor, draws as u64 + skipped, "every draw was taken or skipped");
        (drawn, skipped, reopened)
    }

    #[test]
    fn solved_problems_are_retired_and_the_others_are_still_drawn() {
        let (drawn, skipped, reopened) =
            run(&curriculum(&[10], Some(2), None), 100, |problem| vec![1.0, f64::from(u8::from(problem < 6))]);
        let count = |problem| drawn.iter().filter(|drawn| **drawn == problem).count();
        assert!((0..6).all(|problem| count(problem) == 2), "{drawn:?}");
        assert!((6..10).all(|problem| count(problem) >= 20), "{drawn:?}");
        assert!(skipped > 100 && reopened == 0, "{skipped} {reopened}");
    }

    #[test]
    fn problems_are_reopened_before_a_step_has_too_few_of_them() {
        let mut curriculum = curriculum(&[10], Some(1), None);
        curriculum.least_left = 4;
        let mut history = History::default();
        for (solved, reopened) in [(6, 0), (1, 7), (0, 0)] {
            for problem in 0..solved {
                history.note(GroupId(problem), Evidence::of([1.0].into_iter()));
            }
            // The seventh problem differs from the first six.
            history.settle(|group| if solved == 1 { 6 } else { group.0 as usize });
            assert_eq!(curriculum.reopen_if_few_are_left(&mut history), reopened);
        }
        assert_eq!(curriculum.retired(&history), 0);
        curriculum.retire_after = None;
        assert_eq!(curriculum.reopen_if_few_are_left(&mut history), 0);
    }

    #[test]
    fn when_all_are_retired_they_are_reopened() {
        let (drawn, _, reopened) = run(&curriculum(&[3, 2], Some(1), None), 50, |_| vec![1.0]);
        assert_eq!(reopened, 45, "nine times all five");
        for round in drawn.chunks_exact(5) {
            let mut round = round.to_vec();
            round.sort_unstable();
            assert_eq!(round, [0, 1, 2, 3, 4]);
        }
    }

    #[test]
    fn problems_are_drawn_by_their_signal() {
        // A third of the problems is always wrong, a third always right, and a third in between.
        let labels = |problem: usize| match problem % 3 {
            0 => vec![0.0, 0.0],
            1 => vec![1.0, 1.0],
            _ => vec![1.0, 0.0],
        };
        let (drawn, ..) = run(&curriculum(&[300], None, Some(0.1)), 9000, labels);
        // After the first epochs, in which every problem is drawn.
        let late = &drawn[3000..];
        let share = |kind| late.iter().filter(|problem| **problem % 3 == kind).count() as f64 / late.len() as f64;
        // The expected share is 1 / (1 + 0.1 + 0.1) of the draws.
        assert!((share(2) - 1.0 / 1.2).abs() < 0.02, "{}", share(2));
        assert!((share(0) - share(1)).abs() < 0.02 && share(0) > 0.06, "{} {}", share(0), share(1));
    }

    #[test]
    fn a_set_of_one_problem_never_stalls() {
        for (after, floor) in [(Some(1), None), (None, Some(0.01)), (Some(3), Some(0.01))] {
            for label in [0.0, 1.0] {
                let (drawn, ..) = run(&curriculum(&[1], after, floor), 300, |_| vec![label]);
                assert_eq!(drawn, [0; 300]);
            }
        }
    }

    #[test]
    fn without_options_nothing_is_skipped() {
        let (drawn, skipped, _) = run(&curriculum(&[4, 9], None, None), 100, |_| vec![1.0]);
        let order = DrawOrder::new(curriculum(&[4, 9], None, None).plan);
        assert_eq!(skipped, 0);
        assert!((0..100).all(|draw| drawn[draw as usize] == order.index_at(draw)));
    }

    proptest! {
        #![proptest_config(Config { cases: 200, rng_seed: RngSeed::Fixed(1), ..Config::default() })]

        /// A draw is a function of position and history alone, and skips positions that are taken.
        #[test]
        fn a_draw_is_a_function_of_its_arguments(
            sets in prop::collection::vec(1usize..12, 1..4),
            after in prop::option::of(1u32..4),
            floor in prop::option::of(0.01f64..0.9),
            groups in prop::collection::vec((0u64..40, any::<bool>()), 0..60),
            cursor in 0u64..500,
            taken in prop::collection::btree_set(0u64..520, 0..40),
        ) {
            let curriculum = curriculum(&sets, after, floor);
            let order = DrawOrder::new(curriculum.plan.clone());
            let mut history = History::default();
            for (group, right) in groups {
                history.note(GroupId(group), Evidence::of([f64::from(u8::from(right))].into_iter()));
                history.settle(|group| order.index_at(group.0));
            }
            let text = serde_json::to_string(&(&curriculum, &history)).unwrap();
            let (read, mut same): (Curriculum, History) = serde_json::from_str(&text).unwrap();
            let is_taken = |group: GroupId| taken.contains(&group.0);
            let again = read.next(&DrawOrder::new(read.plan.clone()), &mut same, cursor, is_taken);
            let draw = curriculum.next(&order, &mut history, cursor, is_taken);
            prop_assert_eq!(draw, again);
            prop_assert_eq!(&history, &same);
            prop_assert!(draw.group.0 >= cursor && !is_taken(draw.group));
            let before = (cursor..draw.group.0).filter(|draw| !taken.contains(draw)).count() as u64;
            prop_assert_eq!(draw.skipped, before);
            prop_assert_eq!(draw.cursor, draw.group.0 + 1);
        }
    }
}
