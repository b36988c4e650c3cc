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

/// Terms of a sum or product that is written out (`\sum_{k=1}^{10}`).
pub(crate) const MAX_TERMS: i64 = 128;

/// Rows and columns of a matrix that is calculated with.
pub(crate) const MAX_ORDER: usize = 8;

/// Steps of reading one side or of one comparison. A step is roughly what the cheapest of them costs: looking at a
/// token, visiting a node, multiplying two machine words.
pub(crate) const MAX_STEPS: u32 = 30_000;

/// Counts down the work of reading or of comparing.
#[derive(Debug)]
pub(crate) struct Budget {
    left: u32,
}

impl Budget {
    pub(crate) fn new() -> Self {
        Self { left: MAX_STEPS }
    }

    /// Pays for one node; `None` when nothing is left.
    pub(crate) fn step(&mut self) -> Option<()> {
        self.spend(1)
    }

    /// Pays for several steps at once, all or nothing left.
    pub(crate) fn spend(&mut self, steps: usize) -> Option<()> {
        let left = u32::try_from(steps).ok().and_then(|steps| self.left.checked_sub(steps));
        self.left = left.unwrap_or(0);
        left.map(|_| ())
    }

    pub(crate) fn is_spent(&self) -> bool {
        self.left == 0
    }

    /// Steps taken so far.
    pub(crate) fn taken(&self) -> u32 {
        MAX_STEPS - self.left
    }
}
