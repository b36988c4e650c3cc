/// Votes of the answers to one problem.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Votes {
    /// Size of each class of equivalent answers, and the share of its answers that are right. The share is 0 or 1 if
    /// the verifier agrees with the equivalence.
    pub classes: Vec<(usize, f64)>,
    /// Answers without a vote, since no result was found in them. They are drawn like the others, and never win.
    pub silent: usize,
}

impl Votes {
    /// Returns the number of answers, with or without a vote.
    #[must_use]
    pub fn samples(&self) -> usize {
        self.silent + self.classes.iter().map(|class| class.0).sum::<usize>()
    }
}

/// Returns the probability that the most frequent of `k` answers is right (maj@k), over all draws without replacement.
/// Tied classes win with equal probability. `None` if `k` is 0 or exceeds the number of answers.
///
/// For a class to win with `a` votes, each other class has fewer or ties with `a`. What each class contributes is a
/// polynomial in the number of drawn answers and in the number of winners, and their product is the distribution.
/// Coefficients are binomial probabilities with `p = k / n`, because binomial coefficients overflow; dividing by the
/// probability of `k` draws removes the factor.
#[must_use]
pub fn majority(votes: &Votes, k: usize) -> Option<f64> {
    let samples = votes.samples();
    if k == 0 || k > samples {
        return None;
    }
    // Both cases are exact without the rounding below: one answer is its own majority, and all answers have one.
    if k == 1 {
        return Some(votes.classes.iter().map(|(count, right)| *count as f64 * right).sum::<f64>() / samples as f64);
    }
    if k == samples {
        return Some(of_all(votes));
    }
    let table = Binomials::new(samples, k as f64 / samples as f64);
    let drawn = table.probability(samples, k);
    let mut chance = 0.0;
    for (index, &(count, right)) in votes.classes.iter().enumerate() {
        if right == 0.0 || count == 0 {
            continue;
        }
        for won_with in 1..=count.min(k) {
            chance += right * table.probability(count, won_with) * others(votes, index, won_with, k - won_with, &table)
                / drawn;
        }
    }
    Some(chance.clamp(0.0, 1.0))
}

/// Expected correctness of the majority of all answers.
fn of_all(votes: &Votes) -> f64 {
    let most = votes.classes.iter().map(|class| class.0).max().unwrap_or(0);
    if most == 0 {
        return 0.0;
    }
    let winners: Vec<f64> = votes.classes.iter().filter(|class| class.0 == most).map(|class| class.1).collect();
    winners.iter().sum::<f64>() / winners.len() as f64
}

/// Probability that the others have `left` answers together, and no class of them more than `won_with`; each outcome is
/// divided by the number of winners.
fn others(votes: &Votes, except: usize, won_with: usize, left: usize, table: &Binomials) -> f64 {
    // Classes too small to reach `won_with` cannot win, so they count as one pool.
    let mut free = votes.silent;
    let mut rivals = Vec::new();
    for (_, class) in votes.classes.iter().enumerate().filter(|(index, _)| *index != except) {
        if class.0 < won_with { free += class.0 } else { rivals.push(class.0) }
    }
    // Indexed by [ties][answers]; more ties than fit into `left` cannot occur.
    let most_ties = rivals.len().min(left / won_with);
    let mut chances = vec![vec![0.0; left + 1]; most_ties + 1];
    for (answers, chance) in chances[0].iter_mut().enumerate() {
        *chance = table.probability(free, answers);
    }
    for rival in rivals {
        let mut next = vec![vec![0.0; left + 1]; most_ties + 1];
        for (ties, row) in chances.iter().enumerate() {
            for (answers, chance) in row.iter().enumerate().filter(|(_, chance)| **chance > 0.0) {
                for more in 0..won_with.min(left - answers + 1) {
                    next[ties][answers + more] += chance * table.probability(rival, more);
                }
                if ties < most_ties && answers + won_with <= left {
                    next[ties + 1][answers + won_with] += chance * table.probability(rival, won_with);
                }
            }
        }
        chances = next;
    }
    chances.iter().enumerate().map(|(ties, row)| row[left] / (ties + 1) as f64).sum()
}

/// Table of binomial probabilities for one `p`.
struct Binomials {
    log_factorials: Vec<f64>,
    log_p: f64,
    log_rest: f64,
}

impl Binomials {
    fn new(most: usize, p: f64) -> Self {
        let mut log_factorials = vec![0.0];
        for n in 1..=most {
            log_factorials.push(log_factorials[n - 1] + (n as f64).ln());
        }
        Self { log_factorials, log_p: p.ln(), log_rest: (-p).ln_1p() }
    }

    fn probability(&self, of: usize, drawn: usize) -> f64 {
        if drawn > of {
            return 0.0;
        }
        let ways = self.log_factorials[of] - self.log_factorials[drawn] - self.log_factorials[of - drawn];
        (ways + drawn as f64 * self.log_p + (of - drawn) as f64 * self.log_rest).exp()
    }
}
