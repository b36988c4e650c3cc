//! Estimates of one set (pass@k, maj@k, lengths) with intervals over its problems.

use pacs_report::{Bootstrap, Interval, MeasuredProblem, Votes, majority, pass_curve, powers_of_two};
use pacs_types::Outcome;
use pacs_verify::{Form, Mode, Rules, grade};

use super::read::SetResults;

/// Distinct answers to a problem beyond which only equal texts count as one vote. Comparing every pair of a thousand answers
/// would take minutes.
const MOST_COMPARED: usize = 64;

/// Estimates of one set of problems.
#[derive(Debug)]
pub(super) struct Estimates {
    /// Samples per problem; the smallest number where problems differ.
    pub(super) samples: usize,
    /// Values of `k` of the two lists below.
    pub(super) ks: Vec<usize>,
    pub(super) pass: Vec<Interval>,
    pub(super) majority: Vec<Interval>,
    /// Mean pass@k over problems, for every `k` from 1.
    pub(super) curve: Vec<f64>,
    pub(super) tokens: Interval,
    pub(super) truncated: Interval,
    pub(super) unparsable: Interval,
}

impl Estimates {
    /// Returns `None` for a set without problems or samples.
    pub(super) fn of(set: &SetResults) -> Option<Self> {
        let samples = set.problems.iter().map(|problem| problem.samples).min()? as usize;
        let bootstrap = Bootstrap::default();
        let ks = powers_of_two(samples);
        let curves: Vec<Vec<f64>> = set.problems.iter().map(curve).collect();
        let votes: Vec<Votes> = set.problems.iter().map(|problem| votes(problem, set.math)).collect();
        let over = |value: &dyn Fn(usize) -> f64| {
            let values: Vec<f64> = (0..set.problems.len()).map(value).collect();
            bootstrap.mean(&values)
        };
        let share = |part: fn(&MeasuredProblem) -> f64| {
            over(&|at| part(&set.problems[at]) / f64::from(set.problems[at].samples.max(1)))
        };
        let mean = |k: usize| curves.iter().map(|curve| curve[k]).sum::<f64>() / curves.len() as f64;
        Some(Self {
            samples,
            pass: ks.iter().map(|k| over(&|at| curves[at][k - 1])).collect::<Option<_>>()?,
            majority: ks.iter().map(|k| over(&|at| majority(&votes[at], *k).unwrap_or(0.0))).collect::<Option<_>>()?,
            curve: (0..samples).map(mean).collect(),
            tokens: share(|problem| problem.tokens as f64)?,
            truncated: share(|problem| f64::from(problem.truncated))?,
            unparsable: share(|problem| f64::from(problem.unparsable))?,
            ks,
        })
    }

    /// Returns the largest `k` with `n >= 4k` samples, the paper's rule for reporting pass@k.
    pub(super) fn well_estimated(&self) -> usize {
        (self.samples / 4).max(1)
    }
}

pub(super) fn curve(problem: &MeasuredProblem) -> Vec<f64> {
    pass_curve(problem.samples as usize, problem.right.min(problem.samples) as usize)
}

/// Groups the answers to a problem into votes. With `math`, answers that the built-in verifier finds equal are one vote; other
/// verifiers compare with the reference only, so there equal texts are.
pub(super) fn votes(problem: &MeasuredProblem, math: bool) -> Votes {
    let mut answers: Vec<(&str, u32, u32)> =
        problem.answers.iter().map(|(text, count, right)| (text.as_str(), *count, *right)).collect();
    answers.sort_by(|first, second| second.1.cmp(&first.1).then(first.0.cmp(second.0)));
    let compares = math && answers.len() <= MOST_COMPARED;
    // Text of each class, its size, and how many of it are right.
    let mut classes: Vec<(&str, u32, u32)> = Vec::new();
    for (text, count, right) in answers {
        let equal = |class: &&mut (&str, u32, u32)| {
            // The verifier judged one right and the other wrong, so they are not equal, whatever the comparison of texts says.
            let decided = (class.2 == 0) != (right == 0) && (class.2 == class.1) != (right == count);
            compares && !decided && is_equal(class.0, text)
        };
        match classes.iter_mut().find(equal) {
            Some(class) => (class.1, class.2) = (class.1 + count, class.2 + right),
            None => classes.push((text, count, right)),
        }
    }
    let voted: u32 = classes.iter().map(|class| class.1).sum();
    Votes {
        classes: classes
            .into_iter()
            .map(|(_, count, right)| (count as usize, f64::from(right) / f64::from(count.max(1))))
            .collect(),
        silent: problem.samples.saturating_sub(voted) as usize,
    }
}

fn is_equal(first: &str, second: &str) -> bool {
    // Fast path for most answers: plain integers without leading zeros are equal exactly when their texts are.
    let is_plain =
        |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) && !text.starts_with('0');
    if first == second {
        return true;
    }
    if is_plain(first) && is_plain(second) {
        return false;
    }
    let rules = Rules { mode: Mode::Lenient, form: Form::Any };
    grade(&format!("\\boxed{{{second}}}"), first, rules).outcome == Outcome::Correct
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(answers: &[(&str, u32, u32)], samples: u32) -> MeasuredProblem {
        let answers = answers.iter().map(|(text, count, right)| ((*text).to_owned(), *count, *right)).collect();
        MeasuredProblem { samples, answers, ..MeasuredProblem::default() }
    }

    #[test]
    fn equal_answers_vote_together() {
        let problem = problem(&[("0.5", 2, 2), ("\\frac{1}{2}", 3, 3), ("2", 4, 0), ("02", 1, 0)], 12);
        let together = votes(&problem, true);
        assert_eq!(together, Votes { classes: vec![(5, 0.0), (5, 1.0)], silent: 2 });
        let by_text = votes(&problem, false);
        assert_eq!(by_text.classes, [(4, 0.0), (3, 1.0), (2, 1.0), (1, 0.0)]);
        assert_eq!(majority(&together, 12), Some(0.5));
        assert_eq!(majority(&by_text, 12), Some(0.0));
    }

    #[test]
    fn estimates_are_means_over_problems() {
        let of = |right: u32| MeasuredProblem {
            right,
            tokens: 40,
            truncated: 1,
            ..problem(&[("7", right, right), ("8", 4 - right, 0)], 4)
        };
        let set = SetResults {
            name: "s".to_owned(),
            settings: None,
            math: true,
            excluded: 0,
            seconds: 1.0,
            problems: vec![of(1), of(4)],
        };
        let estimates = Estimates::of(&set).unwrap();
        assert_eq!(estimates.ks, [1, 2, 4]);
        let means: Vec<f64> = estimates.pass.iter().map(|interval| interval.mean).collect();
        assert_eq!(means, [0.625, 0.75, 1.0]);
        assert_eq!(estimates.curve, [0.625, 0.75, 0.875, 1.0]);
        assert_eq!((estimates.tokens.mean, estimates.truncated.mean), (10.0, 0.25));
        // One of four is right: half of the pairs contain it, and in those it ties with a wrong answer.
        let majorities = estimates.majority.iter().map(|interval| interval.mean);
        for (mean, expected) in majorities.zip([0.625, 0.625, 0.5]) {
            assert!((mean - expected).abs() < 1e-12, "{mean} is not {expected}");
        }
        assert!(estimates.pass[0].low < 0.625 && estimates.pass[0].high > 0.625);
    }
}
