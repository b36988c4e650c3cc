//! The time limit of a run: `--stop-before`.

use std::str::FromStr;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use pacs_coordinator::Progress;

/// Smallest margin before the limit, used until steps and checkpoints are measured.
const LEAST_MARGIN: Duration = Duration::from_secs(30);

/// The limit at which a run has to be over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StopBefore {
    /// A duration after the start.
    After(Duration),
    /// A point in time, as the duration since 1970.
    At(Duration),
}

impl FromStr for StopBefore {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("`{text}` is neither a duration (90s, 45m, 3h, 2d) nor a time of UTC (2026-03-01T18:30:00Z)");
        if let Some(at) = utc(text) {
            return Ok(Self::At(at));
        }
        let unit = text.chars().last().ok_or_else(wrong)?;
        let seconds = match unit {
            's' => 1.0,
            'm' => 60.0,
            'h' => 3600.0,
            'd' => 86400.0,
            _ => return Err(wrong()),
        };
        let count: f64 = text[..text.len() - 1].parse().map_err(|_| wrong())?;
        let duration = Duration::try_from_secs_f64(count * seconds).map_err(|_| wrong())?;
        // A longer duration would overflow the process clock.
        const LONGEST: Duration = Duration::from_secs(100 * 365 * 86_400);
        if duration.is_zero() || duration > LONGEST { Err(wrong()) } else { Ok(Self::After(duration)) }
    }
}

/// Parses `YYYY-MM-DDTHH:MM:SSZ`, or without seconds, into the duration since 1970.
fn utc(text: &str) -> Option<Duration> {
    let (date, time) = text.strip_suffix('Z')?.split_once('T')?;
    let numbers = |text: &str, separator| -> Option<Vec<i64>> {
        text.split(separator).map(|part| part.parse().ok().filter(|n| *n >= 0)).collect()
    };
    let [year, month, day] = numbers(date, '-')?[..] else { return None };
    let (hour, minute, second) = match numbers(time, ':')?[..] {
        [hour, minute] => (hour, minute, 0),
        [hour, minute, second] => (hour, minute, second),
        _ => return None,
    };
    if !((1970..=9999).contains(&year) && (1..=12).contains(&month) && (1..=31).contains(&day)) {
        return None;
    }
    if hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    // Years that begin in March put the leap day last, so that days since 1970 have a closed form.
    let (year, month) = if month <= 2 { (year - 1, month + 9) } else { (year, month - 3) };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1 - 719_468;
    u64::try_from(((days * 24 + hour) * 60 + minute) * 60 + second).ok().map(Duration::from_secs)
}

/// Decides when to stop, from the limit and from measured steps and checkpoints.
#[derive(Debug)]
pub(crate) struct WallTime {
    end: Option<Instant>,
    longest_step: Duration,
    longest_save: Duration,
}

impl WallTime {
    pub(crate) fn new(limit: Option<StopBefore>) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let left = limit.map(|limit| match limit {
            StopBefore::After(duration) => duration,
            StopBefore::At(time) => time.saturating_sub(now),
        });
        let end = left.map(|left| Instant::now() + left);
        Self { end, longest_step: Duration::ZERO, longest_save: Duration::ZERO }
    }

    /// Records the longest step and checkpoint so far.
    pub(crate) fn note(&mut self, progress: &Progress) {
        let duration = |seconds: f64| Duration::try_from_secs_f64(seconds).unwrap_or_default();
        match progress {
            Progress::Step(step) => self.longest_step = self.longest_step.max(duration(step.seconds.training_seconds)),
            Progress::Saved { seconds, .. } => self.longest_save = self.longest_save.max(duration(*seconds)),
            _ => {}
        }
    }

    /// Returns how long before the limit to stop: twice the longest step and checkpoint, so a stop has a safety factor of two.
    fn margin(&self) -> Duration {
        LEAST_MARGIN.max(2 * (self.longest_step + self.longest_save))
    }

    /// Resolves when the run has to be stopped; never without a limit.
    pub(crate) async fn is_up(&self) {
        match self.end {
            None => std::future::pending().await,
            Some(end) => {
                let stop = end.checked_sub(self.margin()).unwrap_or_else(Instant::now);
                tokio::time::sleep_until(stop.into()).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use pacs_coordinator::StepSummary;

    use super::*;

    #[test]
    fn durations_and_times_are_read() {
        let after = |seconds| Ok(StopBefore::After(Duration::from_secs(seconds)));
        for (text, seconds) in [("90s", 90), ("45m", 2700), ("1.5h", 5400), ("2d", 172_800)] {
            assert_eq!(text.parse(), after(seconds), "{text}");
        }
        for (text, seconds) in
            [("1970-01-01T00:00:00Z", 0), ("2000-02-29T12:30Z", 951_827_400), ("2026-03-01T18:30:05Z", 1_772_389_805)]
        {
            assert_eq!(text.parse(), Ok(StopBefore::At(Duration::from_secs(seconds))), "{text}");
        }
        for text in ["", "h", "0s", "-1h", "3", "3 weeks", "2026-13-01T00:00Z", "2026-01-01 00:00", "nanh"] {
            assert!(text.parse::<StopBefore>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_margin_grows_with_what_steps_and_saves_take() {
        let mut wall = WallTime::new(Some(StopBefore::After(Duration::from_secs(3600))));
        assert_eq!(wall.margin(), LEAST_MARGIN);
        let mut step = StepSummary::default();
        step.seconds.training_seconds = 100.0;
        wall.note(&Progress::Step(Box::new(step)));
        wall.note(&Progress::Saved { step: 1, path: "x".into(), seconds: 20.0 });
        assert_eq!(wall.margin(), Duration::from_secs(240));
    }
}
