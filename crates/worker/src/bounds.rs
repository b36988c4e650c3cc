//! Bounds of numbers on the command line. Without them, a typo overflows a product or asks for more memory than there
//! is, and ends in a panic instead of a message with the option and its range.

use clap::builder::RangedU64ValueParser;

/// Parses a `usize` up to `most`.
pub(crate) fn usize_to(most: u64) -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(..=most)
}

/// Parses a `u64` up to `most`.
pub(crate) fn u64_to(most: u64) -> RangedU64ValueParser<u64> {
    RangedU64ValueParser::new().range(..=most)
}

/// Parses a `u32` up to `most`.
pub(crate) fn u32_to(most: u64) -> RangedU64ValueParser<u32> {
    RangedU64ValueParser::new().range(..=most)
}

/// Parses a finite number within a range, or says what was expected.
pub(crate) fn number_in(least: f64, most: f64) -> impl Fn(&str) -> Result<f64, String> + Clone + Send + Sync {
    move |text| {
        let number: f64 = text.parse().map_err(|_| "it is no number".to_owned())?;
        let fits = number.is_finite() && (least..=most).contains(&number);
        fits.then_some(number).ok_or_else(|| format!("expected {least} to {most}"))
    }
}

/// Most tokens, rows or samples of one call.
pub(crate) const MOST_ITEMS: u64 = 1 << 24;
/// Most threads of one process.
pub(crate) const MOST_THREADS: u64 = 4096;
/// Most repetitions, steps or updates.
pub(crate) const MOST_TIMES: u64 = 1_000_000_000;
/// Longest wait (seconds): one day.
pub(crate) const MOST_SECONDS: u64 = 86_400;
