//! Metrics over the steps from a JSON Lines file, in bounded memory however long the run is.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::ops::RangeInclusive;
use std::path::PathBuf;

use pacs_protocol::v1;
use serde::Deserialize;
use serde_json::{Map, Value};

/// Points kept per series; beyond this, each point covers twice as many steps as before.
pub(super) const MOST_POINTS: usize = 2000;
/// Number of names that are kept, some of which come from learners and verifiers.
const MOST_NAMES: usize = 512;
const MOST_NAME: usize = 128;
/// Number of evaluation sets that are known.
const MOST_SETS: usize = 64;
/// Set of lines that name none: that of `data.evaluation`.
pub(super) const UNNAMED_SET: &str = "evaluation";
/// Longest line that is read; the coordinator writes none longer.
const MOST_LINE: u64 = 1 << 20;
/// Bytes before a range that are read rather than searched.
const NEAR: u64 = 64 << 10;
/// Space for series in one answer, in bytes.
const ANSWER_BYTES: usize = pacs_protocol::ANSWER_BYTES - (64 << 10);

/// One point of a series, which covers the steps from one multiple of the width to the next.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Point {
    /// The last covered step that has a value.
    step: u64,
    steps: u64,
    sum: f64,
    low: f64,
    high: f64,
}

impl Point {
    fn new(step: u64, value: f64) -> Self {
        Self { step, steps: 1, sum: value, low: value, high: value }
    }

    fn add(&mut self, later: &Self) {
        self.step = later.step;
        self.steps += later.steps;
        self.sum += later.sum;
        self.low = self.low.min(later.low);
        self.high = self.high.max(later.high);
    }
}

/// The part of a file read so far. The file only grows at its end, unless a lost generation rewinds the run: then its
/// end is replaced, and the file is read from the start.
#[derive(Debug)]
pub(super) struct History {
    path: PathBuf,
    range: RangeInclusive<u64>,
    /// Bytes of the complete lines that were read.
    read: u64,
    /// Length and checksum of the last of these lines, to detect that the file was truncated and grew again.
    last_line: (u64, u32),
    last_step: Option<u64>,
    /// Number of steps that a point covers.
    width: u64,
    series: BTreeMap<String, Vec<Point>>,
    /// The evaluation set whose lines are taken; `None` for a file of steps, whose lines belong to no set.
    set: Option<String>,
    /// Names of all sets in the file.
    sets: BTreeSet<String>,
}

impl History {
    pub(super) fn new(path: PathBuf, range: RangeInclusive<u64>) -> Self {
        let (series, sets) = (BTreeMap::new(), BTreeSet::new());
        Self { path, range, read: 0, last_line: (0, 0), last_step: None, width: 1, series, set: None, sets }
    }

    /// Takes only the lines of one evaluation set.
    pub(super) fn of_set(self, set: &str) -> Self {
        Self { set: Some(set.to_owned()), ..self }
    }

    /// Names of the sets in a file of evaluations, in order.
    pub(super) fn sets(&self) -> &BTreeSet<String> {
        &self.sets
    }

    /// Reads the lines that were added since the last call. A missing file has no lines.
    pub(super) fn update(&mut self) -> io::Result<()> {
        let mut file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.forget();
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        if !self.goes_on(&mut file)? {
            self.forget();
        }
        // The dashboard asks for the newest steps every two seconds: reading all lines of 10,000 steps takes a second.
        if self.read == 0 && self.set.is_none() && *self.range.start() > 0 {
            self.read = first_line(&file, *self.range.start())?;
        }
        file.seek(SeekFrom::Start(self.read))?;
        let mut lines = BufReader::new(file);
        loop {
            let mut line = Vec::new();
            let bytes = lines.by_ref().take(MOST_LINE).read_until(b'\n', &mut line)? as u64;
            // The last line is still being written.
            if line.last() != Some(&b'\n') {
                return Ok(());
            }
            (self.read, self.last_line) = (self.read + bytes, (bytes, crc32fast::hash(&line)));
            if let Ok(Value::Object(numbers)) = serde_json::from_slice(&line) {
                let step = numbers.get("step").and_then(Value::as_u64);
                // Steps ascend, so nothing that is wanted follows.
                if self.set.is_none() && step.is_some_and(|step| step > *self.range.end()) {
                    return Ok(());
                }
                self.take(&numbers);
            }
        }
    }

    /// Whether the file still starts with what was read of it.
    fn goes_on(&self, file: &mut File) -> io::Result<bool> {
        let (bytes, checksum) = self.last_line;
        if file.metadata()?.len() < self.read {
            return Ok(false);
        }
        file.seek(SeekFrom::Start(self.read - bytes))?;
        let mut line = Vec::new();
        file.take(bytes).read_to_end(&mut line)?;
        Ok(crc32fast::hash(&line) == checksum)
    }

    fn forget(&mut self) {
        let set = self.set.take();
        *self = Self { set, ..Self::new(std::mem::take(&mut self.path), self.range.clone()) };
    }

    fn take(&mut self, numbers: &Map<String, Value>) {
        let Some(step) = numbers.get("step").and_then(Value::as_u64) else { return };
        if let Some(wanted) = &self.set {
            let set = numbers.get("set").and_then(Value::as_str).unwrap_or(UNNAMED_SET);
            if self.sets.len() < MOST_SETS && !self.sets.contains(set) && set.len() <= MOST_NAME {
                self.sets.insert(set.to_owned());
            }
            if wanted != set {
                return;
            }
        }
        // Steps ascend; a line that breaks the order cannot be drawn.
        if !self.range.contains(&step) || self.last_step.is_some_and(|last| step <= last) {
            return;
        }
        self.last_step = Some(step);
        for (name, value) in numbers {
            let Some(value) = value.as_f64().filter(|_| name != "step" && name.len() <= MOST_NAME) else { continue };
            if !self.series.contains_key(name) {
                if self.series.len() == MOST_NAMES {
                    continue;
                }
                self.series.insert(name.clone(), Vec::new());
            }
            if let Some(points) = self.series.get_mut(name) {
                add(points, Point::new(step, value), self.width);
            }
        }
        while self.series.values().any(|points| points.len() > MOST_POINTS) {
            self.width *= 2;
            let width = self.width;
            self.series.values_mut().for_each(|points| *points = thinned(points, width));
        }
    }

    /// The series with these names, or all, with at most `most_points` points each.
    pub(super) fn answer(&self, names: &[String], most_points: usize) -> v1::GetMetricsResponse {
        let most_points = most_points.clamp(1, MOST_POINTS);
        let wanted = |name: &str| names.is_empty() || names.iter().any(|wanted| wanted == name);
        let chosen: Vec<_> = self.series.iter().filter(|(name, _)| wanted(name)).collect();
        // All series use the same width, so that they can be compared.
        let mut width = self.width;
        let points_at = |width: u64| {
            let count = |points: &Vec<Point>| places(points, width);
            chosen.iter().map(|(_, points)| count(points)).max().unwrap_or(0)
        };
        while points_at(width) > most_points {
            width *= 2;
        }
        let (mut room, mut response) =
            (ANSWER_BYTES, v1::GetMetricsResponse { steps_per_point: width, ..Default::default() });
        for (name, points) in chosen {
            let points = thinned(points, width);
            // A point takes three numbers and a step of up to ten bytes.
            let Some(left) = room.checked_sub(points.len() * 34 + name.len() + 32) else {
                response.left_out += 1;
                continue;
            };
            room = left;
            response.series.push(series(name, &points, width > 1));
        }
        response
    }
}

#[derive(Deserialize)]
struct StepOfLine {
    step: u64,
}

/// Offset of a line at most about [`NEAR`] before the first one whose step is at least `step`. Steps ascend in the
/// file, so it is found by bisection.
fn first_line(mut file: &File, step: u64) -> io::Result<u64> {
    // `low` is the beginning of a line, and every line before it is of an earlier step.
    let (mut low, mut high) = (0_u64, file.metadata()?.len());
    while low + NEAR < high {
        let middle = low.midpoint(high);
        file.seek(SeekFrom::Start(middle))?;
        let mut lines = BufReader::new(file);
        let mut line = Vec::new();
        // The rest of the line that holds `middle`.
        let rest = lines.by_ref().take(MOST_LINE).read_until(b'\n', &mut line)? as u64;
        line.clear();
        let bytes = lines.take(MOST_LINE).read_until(b'\n', &mut line)? as u64;
        match serde_json::from_slice::<StepOfLine>(&line) {
            Ok(found) if found.step < step => low = middle + rest + bytes,
            // A line that is damaged or still being written says nothing: the search goes on before it.
            _ => high = middle,
        }
    }
    Ok(low)
}

/// Merges a point into the last one if both fall into the same place of this width.
fn add(points: &mut Vec<Point>, point: Point, width: u64) {
    match points.last_mut() {
        Some(last) if last.step / width == point.step / width => last.add(&point),
        _ => points.push(point),
    }
}

fn thinned(points: &[Point], width: u64) -> Vec<Point> {
    let mut thinned = Vec::with_capacity(points.len().min(MOST_POINTS));
    points.iter().for_each(|point| add(&mut thinned, *point, width));
    thinned
}

fn places(points: &[Point], width: u64) -> usize {
    let of = |point: &Point| point.step / width;
    points.chunk_by(|a, b| of(a) == of(b)).count()
}

fn series(name: &str, points: &[Point], has_range: bool) -> v1::MetricSeries {
    let all = |value: fn(&Point) -> f64| points.iter().map(value).collect();
    let range = |value: fn(&Point) -> f64| if has_range { points.iter().map(value).collect() } else { Vec::new() };
    v1::MetricSeries {
        name: name.to_owned(),
        steps: points.iter().map(|point| point.step).collect(),
        means: all(|point| point.sum / point.steps as f64),
        lows: range(|point| point.low),
        highs: range(|point| point.high),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;
    use std::path::Path;

    use super::*;

    fn line(step: u64, value: f64) -> String {
        format!("{{\"step\":{step},\"loss\":{value},\"bad\":null,\"odd\":\"text\"}}\n")
    }

    fn append(path: &Path, text: &str) {
        fs::File::options().create(true).append(true).open(path).unwrap().write_all(text.as_bytes()).unwrap();
    }

    fn loss(history: &History, most: usize) -> v1::MetricSeries {
        let answer = history.answer(&["loss".into(), "absent".into()], most);
        assert_eq!((answer.series.len(), answer.left_out), (1, 0));
        answer.series[0].clone()
    }

    #[test]
    fn lines_are_taken_in_as_they_come_and_again_when_the_run_goes_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut history = History::new(path.clone(), 0..=u64::MAX);
        history.update().unwrap();
        assert!(history.answer(&[], 10).series.is_empty());
        append(&path, &(line(1, 1.0) + &line(2, 2.0) + "{\"step\":3,"));
        history.update().unwrap();
        assert_eq!((loss(&history, 10).steps, loss(&history, 10).lows), (vec![1, 2], vec![]));
        append(&path, "\"loss\":3}\n");
        history.update().unwrap();
        assert_eq!(loss(&history, 10).means, [1.0, 2.0, 3.0]);
        assert_eq!(history.answer(&[], 10).series.len(), 1, "what is no number is no series");

        // Cut off after step 1, and longer than before by the next read.
        fs::write(&path, line(1, 1.0) + &line(2, 7.0) + &line(3, 8.0) + &line(4, 9.0)).unwrap();
        history.update().unwrap();
        assert_eq!(loss(&history, 10).means, [1.0, 7.0, 8.0, 9.0]);
        fs::write(&path, line(1, 5.0)).unwrap();
        history.update().unwrap();
        assert_eq!(loss(&history, 10).means, [5.0]);
        fs::remove_file(&path).unwrap();
        history.update().unwrap();
        assert!(history.answer(&[], 10).series.is_empty());
    }

    #[test]
    fn memory_is_bounded_and_no_extreme_is_lost() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let steps = 10_000;
        let value = |step: u64| if step == 7777 { 50.0 } else { step as f64 / steps as f64 };
        let text: String = (1..=steps).map(|step| line(step, value(step))).collect();
        fs::write(&path, text).unwrap();
        let mut history = History::new(path.clone(), 0..=u64::MAX);
        history.update().unwrap();
        assert!(history.series["loss"].len() <= MOST_POINTS && history.width == 8);
        for most in [1, 2, 100, 500, MOST_POINTS] {
            let series = loss(&history, most);
            assert!(
                series.steps.len() <= most && 2 * series.steps.len() + 2 >= most.min(1250),
                "{most}: {}",
                series.steps.len()
            );
            assert_eq!(series.steps.last(), Some(&steps));
            assert!(series.steps.is_sorted() && series.highs.contains(&50.0));
            assert_eq!(series.lows[0], value(1));
        }
        let mut part = History::new(path, 7770..=7780);
        part.update().unwrap();
        assert_eq!(loss(&part, 100).steps, (7770..=7780).collect::<Vec<_>>(), "a short range has every step");
    }

    #[test]
    fn a_range_is_found_without_reading_what_comes_before_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        // Lines of different lengths, one that is damaged, and one that is still being written.
        let long = |step: u64| "0".repeat(step as usize % 97);
        let text: String = (1..=20_000)
            .map(|step| match step {
                13_000 => "{\"step\":13000,\n".to_owned(),
                step => format!("{{\"step\":{step},\"loss\":1.5{}}}\n", long(step)),
            })
            .collect();
        fs::write(&path, text.clone() + "{\"step\":20001,\"lo").unwrap();
        let file = File::open(&path).unwrap();
        let count =
            |part: &History| -> u64 { part.series.get("loss").into_iter().flatten().map(|point| point.steps).sum() };
        for first in [1, 2, 777, 10_000, 12_999, 13_000, 13_001, 19_971, 20_000, 20_001, u64::MAX] {
            let at = first_line(&file, first).unwrap() as usize;
            assert!(at == 0 || text.as_bytes()[at - 1] == b'\n', "{first}: {at} is within a line");
            let wanted = text.find(&format!("{{\"step\":{first},")).unwrap_or(text.len());
            assert!(at <= wanted && wanted - at <= NEAR as usize + 256, "{first}: {at} for {wanted}");
            let mut part = History::new(path.clone(), first..=u64::MAX);
            part.update().unwrap();
            let expected = (first..=20_000).filter(|step| *step != 13_000).count() as u64;
            assert_eq!(count(&part), expected, "from step {first} on");
            part.update().unwrap();
            assert_eq!(count(&part), expected, "no line is taken twice");
        }
    }

    #[test]
    fn names_are_bounded_and_an_answer_fits_into_a_message() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let names = (0..600).map(|n| format!("\"m{n}\":1")).collect::<Vec<_>>().join(",");
        let long = "x".repeat(MOST_NAME + 1);
        let text: String = (1..=1000).map(|step| format!("{{\"step\":{step},\"{long}\":1,{names}}}\n")).collect();
        fs::write(&path, text).unwrap();
        let mut history = History::new(path, 0..=u64::MAX);
        history.update().unwrap();
        assert_eq!(history.series.len(), MOST_NAMES);
        let answer = history.answer(&[], MOST_POINTS);
        assert!(prost::Message::encoded_len(&answer) <= pacs_protocol::ANSWER_BYTES);
        assert_eq!(answer.left_out as usize + answer.series.len(), MOST_NAMES);
        assert!(answer.left_out > 0 && answer.series.len() > 100);
    }
}
