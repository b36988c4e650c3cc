//! `[data.*.generator]`: built-in tasks.

use serde::{Deserialize, Serialize};

/// Most problems of a source whose task has too many to list all.
const DRAWN_PROBLEMS: usize = 10_000;

/// Problems of a built-in task, no two of which are the same. Held-out problems are never among those trained on (same sizes,
/// `held_out` and `seed` on both sides).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GeneratorSpec {
    /// The task. Required.
    pub task: GeneratorTask,
    /// Smallest number. Default 10. Not for `reverse`.
    #[serde(default = "low")]
    pub low: u32,
    /// Largest number. Default 99; at least `low`. Of tasks of two numbers at most 9999 and at most `low` + 999, else at most
    /// 1,000,000. Not for `reverse`.
    #[serde(default = "high")]
    pub high: u32,
    /// How many numbers or letters a problem has. `countdown`: default 3, 2 to 5. `sorting`: default 4, 2 to 16. `reverse`: default
    /// 5, 2 to 64. `programs`: how many steps a program has, default 2, 2 to 6. Nothing else has it.
    #[serde(default)]
    pub length: Option<u32>,
    /// `base_conversion`: the base that a number is to be written in. Default 2, 2 to 36.
    #[serde(default)]
    pub base: Option<u32>,
    /// `modular`: what the product is divided by. Default 7, 2 to 1,000,000.
    #[serde(default)]
    pub modulus: Option<u32>,
    /// Most problems of the `train` part. Default: all that there are; 10,000 of `countdown`, `sorting`, `reverse` and `programs`. 1 to 1,000,000.
    #[serde(default)]
    pub problems: Option<usize>,
    /// How many problems are held out. Default 200; fewer than there are problems.
    #[serde(default = "held_out")]
    pub held_out: usize,
    /// Which part this source gives: `train` (default) or `held_out`.
    #[serde(default)]
    pub part: GeneratorPart,
    /// Seed of the split, and of the choice where not all problems are taken. Default 0, at most 2^63 - 1.
    #[serde(default)]
    pub seed: u64,
}

fn low() -> u32 {
    10
}

fn high() -> u32 {
    99
}

fn held_out() -> usize {
    200
}

impl GeneratorSpec {
    /// The defaults of a task.
    #[must_use]
    pub fn new(task: GeneratorTask) -> Self {
        Self {
            task,
            low: low(),
            high: high(),
            length: None,
            base: None,
            modulus: None,
            problems: None,
            held_out: held_out(),
            part: GeneratorPart::Train,
            seed: 0,
        }
    }

    /// How many different numbers there are to make problems of.
    #[must_use]
    pub fn operands(&self) -> u64 {
        u64::from(self.high.saturating_sub(self.low)) + 1
    }

    /// `length`, or what the task has without it.
    #[must_use]
    pub fn length(&self) -> u32 {
        self.length.or(self.task.length().map(|(usual, _)| usual)).unwrap_or(2)
    }

    /// `base`, or 2.
    #[must_use]
    pub fn base(&self) -> u32 {
        self.base.unwrap_or(2)
    }

    /// `modulus`, or 7.
    #[must_use]
    pub fn modulus(&self) -> u32 {
        self.modulus.unwrap_or(7)
    }

    /// Most problems of the part that is trained on.
    #[must_use]
    pub fn most_problems(&self) -> usize {
        self.problems.unwrap_or(if self.task.is_listed() { usize::MAX } else { DRAWN_PROBLEMS })
    }

    /// How many problems the task has at these sizes, or a bound of that where some numbers make none.
    #[must_use]
    pub fn space(&self) -> u64 {
        match self.task {
            GeneratorTask::Addition
            | GeneratorTask::Subtraction
            | GeneratorTask::Multiplication
            | GeneratorTask::Modular => self.operands().saturating_pow(2),
            GeneratorTask::BaseConversion => self.operands(),
            // Of the same numbers, few targets can be made: no more than the operators between them.
            GeneratorTask::Countdown => {
                self.operands().saturating_pow(self.length()).saturating_mul(4u64.saturating_pow(self.length() - 1))
            }
            GeneratorTask::Sorting => self.operands().saturating_pow(self.length()),
            // Of the kinds of steps, those with a number.
            GeneratorTask::Programs => self.operands().saturating_mul(4).saturating_pow(self.length()),
            GeneratorTask::Reverse => 26u64.saturating_pow(self.length()),
        }
    }
}

/// A built-in task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GeneratorTask {
    /// `What is 37 + 58?`
    Addition,
    /// `What is 37 - 58?`
    Subtraction,
    /// `What is 37 * 58?`
    Multiplication,
    /// `What is 37 * 58 mod 7?`
    Modular,
    /// `Write 37 in base 2.`; `verifier.kind` = `exact`.
    BaseConversion,
    /// `Make 44 of 3, 5, 19.`, each number once; `verifier.kind` = `countdown`.
    Countdown,
    /// `Sort 58 3 17 44.`; `verifier.kind` = `exact`.
    Sorting,
    /// `Reverse crate.`; `verifier.kind` = `exact`.
    Reverse,
    /// A Python program from a description, such as one that reads integers, drops those below 12, adds 7 to each and
    /// prints their sum; `verifier.kind` = `code`.
    Programs,
}

impl GeneratorTask {
    /// All tasks, in the order in which they are listed for people.
    pub const ALL: [Self; 9] = [
        Self::Addition,
        Self::Subtraction,
        Self::Multiplication,
        Self::Modular,
        Self::BaseConversion,
        Self::Countdown,
        Self::Sorting,
        Self::Reverse,
        Self::Programs,
    ];

    /// The name in a spec.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Addition => "addition",
            Self::Subtraction => "subtraction",
            Self::Multiplication => "multiplication",
            Self::Modular => "modular",
            Self::BaseConversion => "base_conversion",
            Self::Countdown => "countdown",
            Self::Sorting => "sorting",
            Self::Reverse => "reverse",
            Self::Programs => "programs",
        }
    }

    /// Whether a source has all problems that there are; else there are too many, and some are drawn.
    #[must_use]
    pub fn is_listed(self) -> bool {
        !matches!(self, Self::Countdown | Self::Sorting | Self::Reverse | Self::Programs)
    }

    /// Whether a problem is one of two numbers.
    #[must_use]
    pub fn has_pairs(self) -> bool {
        matches!(self, Self::Addition | Self::Subtraction | Self::Multiplication | Self::Modular)
    }

    /// The usual `length` of a problem and the largest; `None` where a task has no such choice.
    #[must_use]
    pub fn length(self) -> Option<(u32, u32)> {
        match self {
            Self::Countdown => Some((3, 5)),
            Self::Sorting => Some((4, 16)),
            Self::Reverse => Some((5, 64)),
            Self::Programs => Some((2, 6)),
            _ => None,
        }
    }
}

/// Part of the problems of a task.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GeneratorPart {
    /// Problems that are not held out.
    #[default]
    Train,
    /// The held-out problems.
    HeldOut,
}
