use std::fmt;
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::{Error, ErrorKind};

/// A day of the calendar (UTC), as chat templates write it into a system message by `strftime_now`.
///
/// It has no time: prompts that hold one would differ from row to row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Day {
    /// Days since 1970-01-01, UTC.
    days: i64,
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];

impl Day {
    /// The present one.
    #[must_use]
    pub fn today() -> Self {
        // A clock before 1970 is not set, so the day is unknown.
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Self { days: i64::try_from(seconds / 86_400).unwrap_or(0) }
    }

    /// Year, month and day of month, by the algorithm of Howard Hinnant (`civil_from_days`).
    fn civil(self) -> (i64, usize, i64) {
        let days = self.days + 719_468;
        let era = days.div_euclid(146_097);
        let of_era = days.rem_euclid(146_097);
        let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year + year / 4 - year / 100);
        let month = (5 * of_year + 2) / 153;
        let day = of_year - (153 * month + 2) / 5 + 1;
        let month = if month < 10 { month + 3 } else { month - 9 };
        (year + era * 400 + i64::from(month <= 2), month as usize, day)
    }

    fn of_civil(year: i64, month: i64, day: i64) -> Self {
        let year = if month <= 2 { year - 1 } else { year };
        let era = year.div_euclid(400);
        let of_era = year.rem_euclid(400);
        let shifted = if month > 2 { month - 3 } else { month + 9 };
        let of_year = (153 * shifted + 2) / 5 + day - 1;
        Self { days: era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468 }
    }

    /// Writes the day as `strftime` of C does. Times of the day are those of its beginning.
    pub(crate) fn format(self, format: &str) -> Result<String, Error> {
        let (year, month, day) = self.civil();
        let weekday = WEEKDAYS[(self.days + 3).rem_euclid(7) as usize];
        let month_name = MONTHS[month - 1];
        let of_year = self.days - Self::of_civil(year, 1, 1).days + 1;
        let mut text = String::new();
        let mut letters = format.chars();
        while let Some(letter) = letters.next() {
            if letter != '%' {
                text.push(letter);
                continue;
            }
            let mut directive = letters.next();
            let bare = matches!(directive, Some('-' | '#'));
            if bare {
                directive = letters.next();
            }
            let number = |value: i64, width: usize| if bare { value.to_string() } else { format!("{value:0width$}") };
            let written = match directive {
                Some('Y') => year.to_string(),
                Some('y') => number(year.rem_euclid(100), 2),
                Some('m') => number(month as i64, 2),
                Some('d') => number(day, 2),
                Some('e') => format!("{day:2}"),
                Some('j') => number(of_year, 3),
                Some('B') => month_name.to_owned(),
                Some('b' | 'h') => month_name[..3].to_owned(),
                Some('A') => weekday.to_owned(),
                Some('a') => weekday[..3].to_owned(),
                Some('F') => self.to_string(),
                Some('D' | 'x') => format!("{month:02}/{day:02}/{:02}", year.rem_euclid(100)),
                Some('H' | 'M' | 'S') => number(0, 2),
                Some('I') => "12".to_owned(),
                Some('p') => "AM".to_owned(),
                Some('T' | 'X') => "00:00:00".to_owned(),
                Some('R') => "00:00".to_owned(),
                Some('Z') => "UTC".to_owned(),
                Some('z') => "+0000".to_owned(),
                Some('%') => "%".to_owned(),
                other => {
                    let shown = other.map(String::from).unwrap_or_default();
                    let message = format!("strftime_now: `%{shown}` of {format:?} is not supported");
                    return Err(Error::new(ErrorKind::InvalidOperation, message));
                }
            };
            text.push_str(&written);
        }
        Ok(text)
    }
}

impl fmt::Display for Day {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (year, month, day) = self.civil();
        write!(f, "{year:04}-{month:02}-{day:02}")
    }
}

impl FromStr for Day {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.splitn(3, '-').map(|part| part.parse::<i64>().ok());
        let mut next = || parts.next().flatten();
        if let (Some(year @ 1970..=9999), Some(month @ 1..=12), Some(day @ 1..=31)) = (next(), next(), next()) {
            let found = Self::of_civil(year, month, day);
            // The 31st of some months is none.
            if found.to_string() == text {
                return Ok(found);
            }
        }
        Err(format!("`{text}` is no day such as 2026-02-03"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_written_as_c_writes_them() {
        for (day, format, expected) in [
            ("2024-07-26", "%d %b %Y", "26 Jul 2024"),
            ("2026-02-03", "%B %d, %Y", "February 03, 2026"),
            ("2026-02-03", "%A %-d/%-m/%y %j", "Tuesday 3/2/26 034"),
            ("2024-12-31", "%Y-%m-%d %j %a", "2024-12-31 366 Tue"),
            ("2000-02-29", "%F %e %H:%M", "2000-02-29 29 00:00"),
            ("1970-01-01", "%a 100%%", "Thu 100%"),
        ] {
            let day: Day = day.parse().expect("a day");
            assert_eq!(day.format(format).expect("known directives"), expected);
        }
        assert!(Day::today().format("%Q").is_err_and(|error| error.to_string().contains("`%Q`")));
        assert!(Day::today() > "2025-01-01".parse().expect("a day"));
    }

    #[test]
    fn what_is_no_day_is_refused() {
        for text in ["2026-02-30", "2026-2-3", "today", "", "2026-13-01", "2026-02-03 "] {
            assert!(text.parse::<Day>().is_err(), "{text}");
        }
        for days in (0..40_000).step_by(7) {
            let day = Day { days };
            assert_eq!(day.to_string().parse::<Day>(), Ok(day));
        }
    }
}
