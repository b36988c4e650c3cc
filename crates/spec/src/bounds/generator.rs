//! Bounds of `[data.*.generator]`.

use super::{Check, MOST_SEED};
use crate::{GeneratorPart, GeneratorSpec, GeneratorTask, Problem, SourceSpec};

/// Largest number of a problem, and most problems of a source: all of them are in memory.
const MOST: u32 = 1_000_000;

impl Check {
    pub(super) fn generator(&mut self, path: &str, generator: &GeneratorSpec) {
        let GeneratorSpec { task, low, high, held_out, .. } = *generator;
        let at = |key: &str| format!("{path}.{key}");
        self.range(&at("seed"), generator.seed, 0..=MOST_SEED);
        let found = self.found.len();
        self.sizes(path, generator);
        if let Some(problems) = generator.problems {
            self.range(&at("problems"), problems, 1..=MOST as usize);
        }
        let (most, what) = match task.has_pairs() {
            true => (low.saturating_add(999).min(9999), "at most 1000 operands, none above 9999".to_owned()),
            false => (MOST, format!("no number above {MOST}")),
        };
        if task != GeneratorTask::Reverse && !(low..=most).contains(&high) {
            return self.that(false, &at("high"), high, format!("expected `low` ({low}) to {most}: {what}"), &[]);
        }
        // With sizes out of bounds the number of problems says nothing.
        if self.found.len() > found {
            return;
        }
        let space = generator.space();
        let things = if task.has_pairs() { "pairs" } else { "problems" };
        let message = format!("expected fewer than the {space} {things}");
        self.that((held_out as u64) < space, &at("held_out"), held_out, message, &[]);
        self.that(held_out <= MOST as usize, &at("held_out"), held_out, format!("expected at most {MOST}"), &[]);
        let empty = generator.part == GeneratorPart::HeldOut && held_out == 0;
        let message = format!("expected 1 or more, for `part` asks for the held-out {things}");
        self.that(!empty, &at("held_out"), held_out, message, &[]);
    }

    /// Sizes of a problem, each of which only some tasks have.
    fn sizes(&mut self, path: &str, generator: &GeneratorSpec) {
        let at = |key: &str| format!("{path}.{key}");
        let task = generator.task;
        for (key, value, most) in [
            ("length", generator.length, task.length().map(|(_, most)| most)),
            ("base", generator.base, (task == GeneratorTask::BaseConversion).then_some(36)),
            ("modulus", generator.modulus, (task == GeneratorTask::Modular).then_some(MOST)),
        ] {
            match (value, most) {
                (None, _) => {}
                (Some(value), Some(most)) => self.range(&at(key), value, 2..=most),
                (Some(value), None) => {
                    let message = format!("has no effect on the task `{}`; leave it out", task.name());
                    self.that(false, &at(key), value, message, &[]);
                }
            }
        }
        let usual = GeneratorSpec::new(task);
        let has_numbers = task != GeneratorTask::Reverse;
        for (key, value, usual) in [("low", generator.low, usual.low), ("high", generator.high, usual.high)] {
            let message = "has no effect on the task `reverse`, which has letters; leave it out";
            self.that(has_numbers || value == usual, &at(key), value, message, &[]);
        }
    }

    /// Two generators of the same task must split the same problems, else problems that are trained on are evaluated with.
    pub(super) fn disjoint_from(&mut self, path: &str, train: &SourceSpec, held_out: &str, evaluation: &SourceSpec) {
        let (Some(train), Some(evaluation)) = (&train.generator, &evaluation.generator) else { return };
        let sizes = |g: &GeneratorSpec| (g.length(), g.base(), g.modulus());
        let apart = train.high < evaluation.low || evaluation.high < train.low || sizes(train) != sizes(evaluation);
        if train.task != evaluation.task || apart {
            return;
        }
        let split = |g: &GeneratorSpec| (g.low, g.high, g.held_out, g.seed);
        let message = if split(train) != split(evaluation) {
            format!(
                "expected the `low`, `high`, `held_out` and `seed` of `{path}.generator`, so that no problem is in both"
            )
        } else if train.part == evaluation.part {
            "gives the very problems that are trained on; expected the other `part` (`held_out` here, `train` there)"
                .to_owned()
        } else {
            return;
        };
        self.fail(Problem::new(format!("{held_out}.generator"), message), &["data.train.generator"]);
    }
}
