//! Bounds of one grading. They are counts and not times, so that a verdict does not depend on the machine.

/// Bytes of a response that are searched. The final answer is near the end, so the beginning is skipped.
pub(crate) const MAX_RESPONSE_BYTES: usize = 64 << 10;

/// Bytes of a reference answer in a data set, which may be a whole solution that ends in a box.
pub(crate) const MAX_GOLD_BYTES: usize = 16 << 10;

/// Bytes of one answer to be parsed.
pub(crate) const MAX_ANSWER_BYTES: usize = 2 << 10;

/// Nesting of brackets, fractions, roots and powers.
pub(crate) const MAX_DEPTH: usize = 48;

/// Bits of a numerator or denominator in exact arithmetic.
pub(crate) const MAX_BITS: u64 = 16 << 10;

/// Members of a list, set or matrix row to be matched.
pub(crate) const MAX_ITEMS: usize = 128;

/// Terms of a sum or product to be expanded (`\sum_{k=1}^{10}`).
pub(crate) const MAX_TERMS: i64 = 128;

/// Rows and columns of a matrix to be calculated with.
pub(crate) const MAX_ORDER: usize = 8;

/// Steps of reading one side, or of one comparison. A step costs about as much as looking at a token, visiting a node,
/// or multiplying two machine words.
pub(crate) const MAX_STEPS: u32 = 30_000;

/// Step budget of reading or comparing.
#[derive(Debug)]
pub(crate) struct Budget {
    left: u32,
}

impl Budget {
    pub(crate) fn new() -> Self {
        Self { left: MAX_STEPS }
    }

    /// Pays for one node; `None` when the budget is exhausted.
    pub(crate) fn step(&mut self) -> Option<()> {
        self.spend(1)
    }

    /// Pays for several steps at once. If they exceed the budget, nothing is left.
    pub(crate) fn spend(&mut self, steps: usize) -> Option<()> {
        let left = u32::try_from(steps).ok().and_then(|steps| self.left.checked_sub(steps));
        self.left = left.unwrap_or(0);
        left.map(|_| ())
    }

    pub(crate) fn is_spent(&self) -> bool {
        self.left == 0
    }

    /// Returns the number of steps taken so far.
    pub(crate) fn taken(&self) -> u32 {
        MAX_STEPS - self.left
    }
}
