//! Formats numbers, durations, sizes and tables for people.

use std::time::Duration;

use pacs_runtime::harmless;

/// Formats a count with a space every three digits: `1 234 567`.
pub(crate) fn count(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::new();
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

/// Formats rows of equal length as aligned columns; the first row is the heading.
///
/// Cells may come from other processes: control characters are made harmless.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let harmless_row = |row: &Vec<String>| row.iter().map(|cell| harmless(cell).into_owned()).collect();
    let rows: Vec<Vec<String>> = rows.iter().map(harmless_row).collect();
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// Formats a duration in two units at most: `0.4 s`, `42 s`, `3 min 05 s`, `2 h 07 min`.
pub(crate) fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    let whole = seconds.round() as u64;
    match whole {
        0..10 => format!("{seconds:.1} s"),
        10..60 => format!("{whole} s"),
        60..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
    }
}

/// Formats seconds like [`duration`]; negative and non-finite values count as 0.
pub(crate) fn seconds(seconds: f64) -> String {
    duration(Duration::try_from_secs_f64(seconds).unwrap_or_default())
}

/// Formats a size in binary units: `512 B`, `1.5 KiB`, `14.2 GiB`.
pub(crate) fn bytes(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 || unit == "GiB" {
            let digits = if unit == "B" || value >= 99.95 { 0 } else { 1 };
            return format!("{value:.digits$} {unit}");
        }
        value /= 1024.0;
    }
    unreachable!("the last unit takes every number")
}

/// Formats a share of 1 as a percentage: `12.5 %`.
pub(crate) fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

/// Chooses singular or plural: `one thing` or `3 things`.
pub(crate) fn plural(count: u64, one: &str, many: &str) -> String {
    if count == 1 { format!("1 {one}") } else { format!("{} {many}", self::count(count)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_have_groups_of_three() {
        let shown: Vec<String> = [0, 999, 1000, 134_515_008].map(count).into();
        assert_eq!(shown, ["0", "999", "1 000", "134 515 008"]);
    }

    #[test]
    fn durations_have_two_units_at_most() {
        let shown: Vec<String> = [0.44, 9.4, 9.6, 59.4, 185.0, 7620.0, f64::NAN].map(seconds).into();
        assert_eq!(shown, ["0.4 s", "9.4 s", "10 s", "59 s", "3 min 05 s", "2 h 07 min", "0.0 s"]);
    }
}
