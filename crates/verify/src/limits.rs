//! Bounds of one grading. They are counts, never times, so that a verdict does not depend on the machine.

/// Bytes of a response that are searched; a final answer stands at the end, so the beginning is left out.
pub(crate) const MAX_RESPONSE_BYTES: usize = 64 << 10;

/// Bytes of a reference answer as it stands in a data set (it may be a whole solution that ends in a box).
pub(crate) const MAX_GOLD_BYTES: usize = 16 << 10;

/// Bytes of one answer that is read.
pub(crate) const MAX_ANSWER_BYTES: usize = 2 << 10;

/// Nesting of brackets, fractions, roots and powers.
pub(crate) const MAX_DEPTH: usize = 48;

/// Bits of a numerator or denominator in exact arithmetic.
pub(crate) const MAX_BITS: u64 = 16 << 10;

/// Members of a list, set or matrix row that are matched.
pub(crate) const MAX_ITEMS: usize = 128;

/// Expression nodes that one comparison may visit.
const MAX_STEPS: u32 = 200_000;

/// Counts down the work of one comparison.
#[derive(Debug)]
pub(crate) struct Budget {
    steps: u32,
}

impl Budget {
    pub(crate) fn new() -> Self {
        Self { steps: MAX_STEPS }
    }

    /// Pays for one node; `None` when nothing is left.
    pub(crate) fn step(&mut self) -> Option<()> {
        self.spend(1)
    }

    /// Pays for exact arithmetic, which is the dearer the more bits a number has.
    pub(crate) fn bits(&mut self, bits: u64) -> Option<()> {
        self.spend(u32::try_from(bits / 32).ok()?)
    }

    fn spend(&mut self, steps: u32) -> Option<()> {
        let left = self.steps.checked_sub(steps);
        self.steps = left.unwrap_or(0);
        left.map(|_| ())
    }

    pub(crate) fn is_spent(&self) -> bool {
        self.steps == 0
    }
}
