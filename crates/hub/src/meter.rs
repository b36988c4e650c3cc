use std::time::{Duration, Instant};

use crate::Progress;

/// Time between two lines about one file.
const SHOWN_EVERY: Duration = Duration::from_secs(5);

/// Says now and then how far a download or upload is, in lines that a log can keep.
#[derive(Debug)]
pub struct Meter {
    /// `fetching` or `uploading`.
    doing: &'static str,
    shown: Instant,
    /// When the first byte was seen, and how many there were already.
    began: Option<(Instant, u64)>,
}

impl Meter {
    /// A meter of what is being done.
    #[must_use]
    pub fn new(doing: &'static str) -> Self {
        Self { doing, shown: Instant::now(), began: None }
    }

    /// The line to show at this progress, if it is time for one.
    pub fn line(&mut self, progress: &Progress) -> Option<String> {
        self.line_at(progress, Instant::now())
    }

    fn line_at(&mut self, progress: &Progress, now: Instant) -> Option<String> {
        let (began, first) = *self.began.get_or_insert((now, progress.bytes));
        if now.saturating_duration_since(self.shown) < SHOWN_EVERY {
            return None;
        }
        self.shown = now;
        let megabytes = |bytes: u64| bytes as f64 / 1e6;
        let seconds = now.saturating_duration_since(began).as_secs_f64().max(1e-3);
        let rate = megabytes(progress.bytes.saturating_sub(first)) / seconds;
        Some(format!(
            "{} {}: {:.0} of {:.0} MB; {:.0} of {:.0} MB in all, {rate:.1} MB/s",
            self.doing,
            progress.file,
            megabytes(progress.file_bytes),
            megabytes(progress.file_total),
            megabytes(progress.bytes),
            megabytes(progress.total),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_every_few_seconds() {
        let mut meter = Meter::new("fetching");
        let start = meter.shown;
        let at = |bytes: u64| Progress {
            file: "model.safetensors".to_owned(),
            file_bytes: bytes,
            file_total: 500_000_000,
            bytes: bytes + 10_000_000,
            total: 510_000_000,
        };
        assert_eq!(meter.line_at(&at(0), start), None);
        assert_eq!(meter.line_at(&at(1), start + Duration::from_secs(4)), None);
        assert_eq!(
            meter.line_at(&at(100_000_000), start + Duration::from_secs(10)).as_deref(),
            Some("fetching model.safetensors: 100 of 500 MB; 110 of 510 MB in all, 10.0 MB/s")
        );
        assert_eq!(meter.line_at(&at(120_000_000), start + Duration::from_secs(11)), None);
    }
}
