use std::fmt::Write as _;

/// Size of the drawing (pixels); the legend is to its right.
const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 200.0;
const TOP: f64 = 36.0;
const BOTTOM: f64 = 48.0;
/// Colours of Okabe and Ito, which colour-blind readers can distinguish. Yellow is left out, because it is hard to
/// see on white.
const COLOURS: [&str; 7] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000"];
/// Dash patterns, one for each further round of colours.
const DASHES: [&str; 4] = ["", "6 3", "2 3", "8 3 2 3"];

/// A drawing and the margins around its axes, in pixels.
#[derive(Clone, Copy)]
struct Frame {
    width: f64,
    height: f64,
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
}

const FILE: Frame = Frame { width: WIDTH, height: HEIGHT, left: LEFT, right: RIGHT, top: TOP, bottom: BOTTOM };
/// As wide as a column of a page, because letters of a wider file are illegible when it is scaled down.
const INLINE: Frame = Frame { width: 440.0, height: 220.0, left: 52.0, right: 10.0, top: 8.0, bottom: 24.0 };

/// A line plot with shaded intervals, written as an SVG file. Text uses the reader's own sans-serif font, so that
/// none is embedded.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plot {
    /// Title, drawn above the plot.
    pub title: String,
    /// Label of the horizontal axis, with the unit.
    pub x_label: String,
    /// Label of the vertical axis, with the unit.
    pub y_label: String,
    /// Scale of the horizontal axis.
    pub x_scale: Scale,
    /// Range of the vertical axis; `None` fits it to the values.
    pub y_range: Option<(f64, f64)>,
    /// Lines, in the order of the legend.
    pub series: Vec<Series>,
}

/// Scale of an axis.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scale {
    /// Linear, the default.
    #[default]
    Linear,
    /// Logarithmic to base 2; points at 0 or below are left out.
    Log2,
}

/// One line of a plot.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Series {
    /// Name in the legend.
    pub name: String,
    /// Points from left to right. A point whose `y` is not finite interrupts the line.
    pub points: Vec<Point>,
}

/// One point of a line.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// Coordinate along the horizontal axis, in its unit.
    pub x: f64,
    /// Coordinate along the vertical axis, in its unit.
    pub y: f64,
    /// Ends of the interval, which is shaded; `None` for no shading.
    pub interval: Option<(f64, f64)>,
}

impl Plot {
    /// Renders the SVG file. Without drawable points it shows empty axes.
    #[must_use]
    pub fn to_svg(&self) -> String {
        let axes = self.axes(FILE);
        let mut svg = String::new();
        let mut put = |line: String| {
            svg.push_str(&line);
            svg.push('\n');
        };
        put(format!(
            r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">"#
        ));
        put(format!(r#"<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>"#));
        let middle = f64::midpoint(LEFT, WIDTH - RIGHT);
        put(format!(
            r#"<text x="{middle:.1}" y="20" text-anchor="middle" font-size="14">{}</text>"#,
            escaped(&self.title)
        ));
        for (value, text) in axes.x_ticks(self.x_scale) {
            let x = axes.x(value, self.x_scale);
            let (top, bottom) = (TOP, HEIGHT - BOTTOM);
            put(format!(r##"<line x1="{x:.1}" y1="{top}" x2="{x:.1}" y2="{bottom}" stroke="#e5e5e5"/>"##));
            put(format!(r#"<text x="{x:.1}" y="{:.1}" text-anchor="middle">{text}</text>"#, bottom + 16.0));
        }
        for (value, text) in ticks(axes.bottom, axes.top) {
            let y = axes.y(value);
            put(format!(r##"<line x1="{LEFT}" y1="{y:.1}" x2="{}" y2="{y:.1}" stroke="#e5e5e5"/>"##, WIDTH - RIGHT));
            put(format!(r#"<text x="{:.1}" y="{:.1}" text-anchor="end">{text}</text>"#, LEFT - 6.0, y + 4.0));
        }
        put(format!(r##"<path d="M{LEFT} {TOP}V{}H{}" fill="none" stroke="#444"/>"##, HEIGHT - BOTTOM, WIDTH - RIGHT));
        put(format!(
            r#"<text x="{middle:.1}" y="{}" text-anchor="middle">{}</text>"#,
            HEIGHT - 10.0,
            escaped(&self.x_label)
        ));
        let half = f64::midpoint(TOP, HEIGHT - BOTTOM);
        put(format!(
            r#"<text transform="translate(16 {half:.1}) rotate(-90)" text-anchor="middle">{}</text>"#,
            escaped(&self.y_label)
        ));
        for (index, series) in self.series.iter().enumerate() {
            let (colour, dash) = (COLOURS[index % COLOURS.len()], DASHES[index / COLOURS.len() % DASHES.len()]);
            let points: Vec<Point> =
                series.points.iter().copied().filter(|point| self.x_scale.holds(point.x)).collect();
            let band = axes.band(&points, self.x_scale);
            if !band.is_empty() {
                put(format!(r#"<path d="{band}" fill="{colour}" fill-opacity="0.15" stroke="none"/>"#));
            }
            let line = axes.line(&points, self.x_scale);
            let dashed = if dash.is_empty() { String::new() } else { format!(r#" stroke-dasharray="{dash}""#) };
            put(format!(r#"<path d="{line}" fill="none" stroke="{colour}" stroke-width="2"{dashed}/>"#));
            // An isolated point has no line, so few points also get a marker.
            if points.len() <= 32 {
                for point in points.iter().filter(|point| point.y.is_finite()) {
                    let (x, y) = (axes.x(point.x, self.x_scale), axes.y(point.y));
                    put(format!(r#"<circle cx="{x:.1}" cy="{y:.1}" r="2.5" fill="{colour}"/>"#));
                }
            }
            let (x, y) = (WIDTH - RIGHT + 12.0, TOP + 8.0 + 18.0 * index as f64);
            put(format!(
                r#"<path d="M{x} {y}h24" stroke="{colour}" stroke-width="2"{dashed}/><text x="{}" y="{}">{}</text>"#,
                x + 30.0,
                y + 4.0,
                escaped(&series.name)
            ));
        }
        put("</svg>".to_owned());
        svg
    }

    /// Renders the axes and lines alone, for a page that writes title, unit and legend itself. A series has the class
    /// `s0` to `s6`, whose CSS `color` it takes, and a dash as a second mark; all else has the colour of the text around.
    #[must_use]
    pub fn to_inline_svg(&self) -> String {
        let mut axes = self.axes(INLINE);
        let Frame { width, height, left, right, top, bottom } = INLINE;
        let (end, floor) = (width - right, height - bottom);
        let points = || self.series.iter().flat_map(|series| &series.points);
        // What counts failures is mostly 0, which has no room below it.
        if self.y_range.is_none() && points().all(|point| point.y == 0.0 || !point.y.is_finite()) {
            (axes.bottom, axes.top) = (0.0, 1.0);
        }
        let mut svg = format!(
            "<svg viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"12\" fill=\"currentColor\">\n"
        );
        let mut grid = |path: String, x: f64, y: f64, anchor: &str, text: &str| {
            let _ = writeln!(
                svg,
                r#"<path d="{path}" stroke="currentColor" stroke-opacity=".2"/><text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{text}</text>"#
            );
        };
        for (value, text) in axes.x_ticks(self.x_scale) {
            let x = axes.x(value, self.x_scale);
            let anchor = if x > end - 16.0 { "end" } else { "middle" };
            grid(format!("M{x:.1} {top}V{floor}"), x, floor + 16.0, anchor, &text);
        }
        for (value, text) in ticks(axes.bottom, axes.top) {
            let y = axes.y(value);
            grid(format!("M{left} {y:.1}H{end}"), left - 6.0, y + 4.0, "end", &text);
        }
        for (index, series) in self.series.iter().enumerate() {
            let points: Vec<Point> =
                series.points.iter().copied().filter(|point| self.x_scale.holds(point.x)).collect();
            let _ = writeln!(svg, r#"<g class="s{}">"#, index % COLOURS.len());
            let band = axes.band(&points, self.x_scale);
            if !band.is_empty() {
                let _ = writeln!(svg, r#"<path d="{band}" fill="currentColor" fill-opacity="0.15"/>"#);
            }
            let line = axes.line(&points, self.x_scale);
            let _ = writeln!(svg, r#"<path d="{line}" {}/>"#, inline_stroke(index));
            if points.len() <= 32 {
                for point in points.iter().filter(|point| point.y.is_finite()) {
                    let (x, y) = (axes.x(point.x, self.x_scale), axes.y(point.y));
                    let _ = writeln!(svg, r#"<circle cx="{x:.1}" cy="{y:.1}" r="2.5" fill="currentColor"/>"#);
                }
            }
            svg.push_str("</g>\n");
        }
        svg.push_str("</svg>\n");
        svg
    }

    fn axes(&self, frame: Frame) -> Axes {
        let points =
            || self.series.iter().flat_map(|series| &series.points).filter(|point| self.x_scale.holds(point.x));
        let across = points().filter(|point| point.y.is_finite()).map(|point| self.x_scale.place(point.x));
        let (left, right) = range(across).unwrap_or((0.0, 1.0));
        let heights = points().flat_map(|point| {
            let (low, high) = point.interval.unwrap_or((point.y, point.y));
            [point.y, low, high]
        });
        let (bottom, top) = match self.y_range {
            Some(ends) => ends,
            None => range(heights.filter(|y| y.is_finite())).map_or((0.0, 1.0), |(low, high)| {
                let room = 0.05 * (high - low);
                (low - room, high + room)
            }),
        };
        Axes { frame, left, right, bottom, top }
    }
}

impl Scale {
    fn holds(self, x: f64) -> bool {
        x.is_finite() && (self == Self::Linear || x > 0.0)
    }

    fn place(self, x: f64) -> f64 {
        match self {
            Self::Linear => x,
            Self::Log2 => x.log2(),
        }
    }
}

/// Ranges of both axes; the horizontal one is in scaled coordinates.
struct Axes {
    frame: Frame,
    left: f64,
    right: f64,
    bottom: f64,
    top: f64,
}

impl Axes {
    fn x(&self, x: f64, scale: Scale) -> f64 {
        let Frame { width, left, right, .. } = self.frame;
        left + (scale.place(x) - self.left) / (self.right - self.left) * (width - left - right)
    }

    fn y(&self, y: f64) -> f64 {
        // A given range may be narrower than the values, which are then drawn at its edge.
        let part = ((y - self.bottom) / (self.top - self.bottom)).clamp(0.0, 1.0);
        let Frame { height, top, bottom, .. } = self.frame;
        height - bottom - part * (height - top - bottom)
    }

    fn x_ticks(&self, scale: Scale) -> Vec<(f64, String)> {
        match scale {
            Scale::Linear => ticks(self.left, self.right),
            Scale::Log2 => {
                let (first, last) = (self.left.ceil() as i32, self.right.floor() as i32);
                let stride = (1 + (last - first) / 12).max(1);
                let powers = (first..=last).filter(|power| (power - first) % stride == 0);
                powers.map(|power| (f64::from(power).exp2(), plain(f64::from(power).exp2()))).collect()
            }
        }
    }

    fn line(&self, points: &[Point], scale: Scale) -> String {
        let mut path = String::new();
        let mut drawing = false;
        for point in points {
            if point.y.is_finite() {
                let verb = if drawing { 'L' } else { 'M' };
                let _ = write!(path, "{verb}{:.1} {:.1}", self.x(point.x, scale), self.y(point.y));
            }
            drawing = point.y.is_finite();
        }
        path
    }

    /// Draws one closed outline for each run of points with intervals.
    fn band(&self, points: &[Point], scale: Scale) -> String {
        let bounded = |point: &Point| {
            point.interval.filter(|(low, high)| low.is_finite() && high.is_finite() && point.y.is_finite())
        };
        let mut path = String::new();
        for run in points.chunk_by(|left, right| bounded(left).is_some() == bounded(right).is_some()) {
            let outline: Vec<(f64, (f64, f64))> =
                run.iter().filter_map(|point| Some((point.x, bounded(point)?))).collect();
            let upper = outline.iter().map(|(x, (_, high))| (*x, *high));
            let lower = outline.iter().rev().map(|(x, (low, _))| (*x, *low));
            for (index, (x, y)) in upper.chain(lower).enumerate() {
                let verb = if index == 0 { 'M' } else { 'L' };
                let _ = write!(path, "{verb}{:.1} {:.1}", self.x(x, scale), self.y(y));
            }
            if !outline.is_empty() {
                path.push('Z');
            }
        }
        path
    }
}

/// A piece of the line of the series at `index` in [`Plot::to_inline_svg`], for a legend.
#[must_use]
pub fn swatch(index: usize) -> String {
    let (class, stroke) = (index % COLOURS.len(), inline_stroke(index));
    format!(r#"<svg class="s{class}" viewBox="0 0 26 10" aria-hidden="true"><path d="M0 5H26" {stroke}/></svg>"#)
}

fn inline_stroke(index: usize) -> String {
    let dash = DASHES[index % DASHES.len()];
    let dash = if dash.is_empty() { String::new() } else { format!(r#" stroke-dasharray="{dash}""#) };
    format!(r#"fill="none" stroke="currentColor" stroke-width="2"{dash}"#)
}

/// Range of the values; a single value gets a margin on both sides.
fn range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let ends = |ends: Option<(f64, f64)>, value: f64| {
        ends.map_or(Some((value, value)), |(low, high)| Some((low.min(value), high.max(value))))
    };
    let (low, high) = values.fold(None, ends)?;
    Some(if high > low { (low, high) } else { (low - 0.5, high + 0.5) })
}

/// About five round numbers within the range, with their labels.
fn ticks(low: f64, high: f64) -> Vec<(f64, String)> {
    let rough = (high - low) / 5.0;
    if !(rough.is_finite() && rough > 0.0) {
        return Vec::new();
    }
    let magnitude = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|of| of * magnitude)
        .find(|step| *step >= rough)
        .unwrap_or(10.0 * magnitude);
    let (first, last) = ((low / step).ceil() as i64, (high / step + 1e-9).floor() as i64);
    (first..=last).map(|index| (index as f64 * step, plain(index as f64 * step))).collect()
}

/// Formats a round number without the digits of rounding errors.
fn plain(value: f64) -> String {
    if value != 0.0 && !(1e-4..1e7).contains(&value.abs()) {
        return format!("{value:.1e}");
    }
    let text = format!("{value:.6}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".to_owned() } else { text.to_owned() }
}

/// Escapes markup, and replaces control characters, which XML does not allow, by spaces.
fn escaped(text: &str) -> String {
    let text = text.replace(char::is_control, " ");
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
