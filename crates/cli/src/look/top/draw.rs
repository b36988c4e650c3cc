//! Draws the screen of `pacs top`.

use pacs_protocol::v1;
use pacs_runtime::harmless;
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Modifier, Style, Stylize};
use ratatui::symbols::Marker;
use ratatui::text::Line;
use ratatui::widgets::{Axis, Block, Chart, Dataset, GraphType, Paragraph, Row, Sparkline, Table, Wrap};

use super::{Screen, View};
use crate::format::{percent, seconds};
use crate::look::samples::signal;

/// Metrics of steps and evaluations that the screen requests.
pub(super) const METRICS: [&str; 9] = [
    "reward_mean",
    "pass_rate",
    "pass_at_1",
    "mixed_share",
    "entropy",
    "tokens_per_second",
    "sampling_seconds",
    "training_seconds",
    "total_seconds",
];
/// Metrics of the phases of a step that are drawn as bars, with their labels.
const TIMES: [(&str, &str); 4] = [
    ("sampling_seconds", "sampling"),
    ("verifying_seconds", "  verifying"),
    ("training_seconds", "training"),
    ("checkpoint_stall_seconds", "checkpoints"),
];

pub(super) fn draw(frame: &mut Frame<'_>, screen: &Screen) {
    let header = header(screen);
    // The sentences are shown whole as long as half of the screen is left.
    let lines = header.iter().map(|line| rows_of(line, frame.area().width)).fold(0, u16::saturating_add);
    let lines = lines.clamp(3, (frame.area().height / 2).max(3));
    let [head, body, foot] =
        Layout::vertical([Constraint::Length(lines), Constraint::Min(1), Constraint::Length(1)]).areas(frame.area());
    frame.render_widget(Paragraph::new(header).wrap(Wrap { trim: true }), head);
    match screen.view {
        View::Overview => overview(frame, screen, body),
        View::Workers => workers(frame, screen, body),
        View::Samples => samples(frame, screen, body),
        View::Events => events(frame, screen, body),
    }
    frame.render_widget(Paragraph::new(footer(screen)), foot);
}

/// Rows that a line takes when it is wrapped between words.
fn rows_of(line: &Line<'_>, width: u16) -> u16 {
    let width = usize::from(width.max(1));
    let text: String = line.spans.iter().map(|span| span.content.as_ref()).collect();
    let (mut rows, mut used) = (1, 0);
    for word in text.split_whitespace().map(|word| Line::from(word).width()) {
        if used > 0 && used + 1 + word > width {
            (rows, used) = (rows + 1, 0);
        }
        used += word + usize::from(used > 0);
        rows += used.saturating_sub(1) / width;
        used = used.saturating_sub(1) % width + usize::from(used > 0);
    }
    u16::try_from(rows).unwrap_or(u16::MAX)
}

fn header(screen: &Screen) -> Vec<Line<'static>> {
    let status = &screen.status;
    let left = status.remaining_seconds.map(|left| format!(", {} left", seconds(left))).unwrap_or_default();
    let (of_run, of_phase) = if status.phase == "evaluating" { ("", left.as_str()) } else { (left.as_str(), "") };
    let paused = if status.paused { "PAUSED  " } else { "" };
    let first = format!(
        "{}  {paused}step {} of {}{of_run}  {} for {}{of_phase}  weights v{}",
        harmless(&status.job),
        status.step,
        status.total_steps,
        status.phase,
        seconds(status.phase_seconds),
        status.weight_version
    );
    let waits = match &screen.problem {
        Some(problem) => Line::from(format!("! {}", harmless(problem))).add_modifier(Modifier::BOLD),
        None => Line::from(harmless(&status.waiting_for).into_owned()),
    };
    let mut lines = vec![Line::from(first).add_modifier(Modifier::BOLD), waits];
    for finding in &status.findings {
        let mark = if finding.stops_run { "!! " } else { "! " };
        let sentence = format!("{mark}{}", harmless(&finding.sentence)).bold();
        lines.push(Line::from(vec![sentence, format!("; {}", harmless(&finding.advice)).into()]));
    }
    lines.push(Line::default());
    lines
}

fn footer(screen: &Screen) -> Line<'static> {
    let view = |view, text: &'static str| {
        let span = ratatui::text::Span::from(text);
        if screen.view == view { span.add_modifier(Modifier::REVERSED) } else { span }
    };
    Line::from(vec![
        view(View::Overview, " o overview "),
        view(View::Workers, " w workers "),
        view(View::Samples, " s samples "),
        view(View::Events, " e events "),
        " q leave  ".into(),
        harmless(&screen.address).into_owned().dim(),
    ])
}

fn overview(frame: &mut Frame<'_>, screen: &Screen, area: Rect) {
    let [curves, below] = Layout::vertical([Constraint::Percentage(60), Constraint::Min(8)]).areas(area);
    let [left, right] = Layout::horizontal([Constraint::Percentage(50); 2]).areas(curves);
    let series = |name: &str| points(screen.steps.get(name));
    let (reward, pass) = (series("reward_mean"), series("pass_rate"));
    let measured = points(screen.evaluations.get("pass_at_1"));
    chart(
        frame,
        left,
        "reward · (dots) and pass@1 held out ■",
        &[(&reward, Marker::Braille), (&measured, Marker::Block)],
    );
    let mixed = series("mixed_share");
    chart(frame, right, "pass rate · (dots) and mixed groups ■", &[(&pass, Marker::Braille), (&mixed, Marker::Block)]);

    let [times, queues, speed] =
        Layout::horizontal([Constraint::Percentage(34), Constraint::Percentage(33), Constraint::Percentage(33)])
            .areas(below);
    frame.render_widget(
        Paragraph::new(time_lines(screen, times.width)).block(Block::bordered().title("newest step")),
        times,
    );
    frame.render_widget(
        Paragraph::new(queue_lines(screen)).wrap(Wrap { trim: false }).block(Block::bordered().title("queues")),
        queues,
    );
    throughput(frame, screen, speed);
}

/// Returns the points of a series without those that are not finite.
fn points(series: Option<&v1::MetricSeries>) -> Vec<(f64, f64)> {
    let pairs = series.into_iter().flat_map(|series| series.steps.iter().zip(&series.means));
    pairs.map(|(step, value)| (*step as f64, *value)).filter(|(_, value)| value.is_finite()).collect()
}

fn chart(frame: &mut Frame<'_>, area: Rect, title: &str, curves: &[(&Vec<(f64, f64)>, Marker)]) {
    let all = || curves.iter().flat_map(|(points, _)| points.iter().copied());
    let bounds = |value: fn((f64, f64)) -> f64| {
        let (low, high) = all()
            .map(value)
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
        if low > high {
            [0.0, 1.0]
        } else if low == high {
            [low - 0.5, high + 0.5]
        } else {
            [low, high]
        }
    };
    let (x, y) = (bounds(|(step, _)| step), bounds(|(_, value)| value));
    let ends = |bounds: [f64; 2], digits: usize| bounds.map(|bound| format!("{bound:.digits$}")).to_vec();
    let datasets = curves.iter().map(|(points, marker)| {
        let kind = if *marker == Marker::Braille { GraphType::Line } else { GraphType::Scatter };
        Dataset::default().marker(*marker).graph_type(kind).data(points)
    });
    let chart = Chart::new(datasets.collect())
        .block(Block::bordered().title(title.to_owned()))
        .x_axis(Axis::default().bounds(x).labels(ends(x, 0)))
        .y_axis(Axis::default().bounds(y).labels(ends(y, 2)));
    frame.render_widget(chart, area);
}

/// Draws where the time of the newest step went, as bars of one scale.
fn time_lines(screen: &Screen, width: u16) -> Vec<Line<'static>> {
    let of = |name: &str| screen.status.metrics.get(name).copied().unwrap_or(0.0);
    let most = TIMES.map(|(name, _)| of(name)).into_iter().fold(f64::MIN_POSITIVE, f64::max);
    let room = usize::from(width).saturating_sub(26);
    let line = |(name, label): (&str, &str)| {
        let length = (of(name) / most * room as f64).clamp(0.0, room as f64) as usize;
        Line::from(format!("{label:<12}{:<10}{}", seconds(of(name)), "█".repeat(length)))
    };
    let mut lines: Vec<Line<'static>> = TIMES.map(line).to_vec();
    lines.push(Line::from(format!("{:<12}{}", "whole step", seconds(of("total_seconds")))));
    lines.push(Line::from(format!("{:<12}{:.2}", "entropy", of("entropy"))));
    lines
}

fn queue_lines(screen: &Screen) -> Vec<Line<'static>> {
    let (status, queues) = (&screen.status, screen.status.queues.unwrap_or_default());
    let workers = |role| status.workers.iter().filter(|worker| worker.role() == role).count();
    let mut lines = vec![
        Line::from(format!("groups   {} waiting, {} generating", queues.groups_waiting, queues.groups_generating)),
        Line::from(format!("         {} of {} complete", queues.groups_complete, queues.groups_wanted)),
        Line::from(format!("slots    {} of {} filled", status.groups_in_flight, status.slots)),
        Line::from(format!("verdicts {} waiting, {} verifying", queues.samples_waiting, queues.samples_verifying)),
        Line::from(format!(
            "workers  {} rollout, {} verifier, {} of {} learner",
            workers(v1::Role::Rollout),
            workers(v1::Role::Verifier),
            workers(v1::Role::Learner),
            status.learners_wanted
        )),
    ];
    if let Some(oldest) = &status.oldest_group {
        lines.push(Line::from(format!("oldest   {}", harmless(oldest))));
    }
    lines
}

fn throughput(frame: &mut Frame<'_>, screen: &Screen, area: Rect) {
    let values = points(screen.steps.get("tokens_per_second"));
    let newest = values.last().map_or(0.0, |(_, value)| *value);
    let shown = usize::from(area.width.saturating_sub(2));
    let tail = values[values.len().saturating_sub(shown)..].iter().map(|(_, value)| value.max(0.0) as u64);
    let data: Vec<u64> = tail.collect();
    let title = format!("{newest:.0} tokens/s");
    frame.render_widget(Sparkline::default().data(&data).block(Block::bordered().title(title)), area);
}

fn workers(frame: &mut Frame<'_>, screen: &Screen, area: Rect) {
    let verifiers = &screen.status.verifiers;
    // A heading, the borders, and as many rows as leave most of the screen to the workers.
    let rows = (verifiers.len() as u16).min(area.height / 4);
    let below = if verifiers.is_empty() { 0 } else { rows + 3 };
    let [area, below] = Layout::vertical([Constraint::Min(1), Constraint::Length(below)]).areas(area);
    let heading = Row::new(["worker", "rank", "host", "heard", "leases", "does"]).style(Style::new().bold());
    let rows = screen.status.workers.iter().skip(screen.scroll).map(|worker| {
        let draining = if worker.draining { " (draining)" } else { "" };
        let silent = if worker.seconds_since_heartbeat > 5.0 { "silent " } else { "" };
        Row::new([
            harmless(&worker.name).into_owned(),
            worker.rank.map_or("-".to_owned(), |rank| rank.to_string()),
            harmless(&worker.host).into_owned(),
            format!("{silent}{}", seconds(worker.seconds_since_heartbeat)),
            worker.leases.to_string(),
            format!("{}{draining} for {}", harmless(&worker.activity), seconds(worker.activity_seconds)),
        ])
    });
    let widths = [
        Constraint::Length(16),
        Constraint::Length(5),
        Constraint::Length(16),
        Constraint::Length(14),
        Constraint::Length(7),
        Constraint::Fill(1),
    ];
    let title = format!("{} workers", screen.status.workers.len());
    frame.render_widget(Table::new(rows, widths).header(heading).block(Block::bordered().title(title)), area);

    let heading = ["verifier", "gives", "correct", "wrong", "unparsable", "failed", "timed out", "p99", "last verdict"];
    let rows = verifiers.iter().map(|verifier| {
        let of = |outcome: &str| verifier.outcomes.get(outcome).copied().unwrap_or(0).to_string();
        Row::new([
            harmless(&verifier.worker).into_owned(),
            harmless(&verifier.verifier).into_owned(),
            of("correct"),
            of("wrong"),
            of("unparsable"),
            of("failed"),
            of("timed_out"),
            verifier.p99_seconds.map_or("-".to_owned(), |p99| format!("{:.1} ms", 1e3 * p99)),
            verifier.seconds_since_verdict.map_or("none".to_owned(), |ago| format!("{} ago", seconds(ago))),
        ])
    });
    let widths = [16, 12, 9, 9, 10, 8, 9, 12].map(Constraint::Length).into_iter().chain([Constraint::Fill(1)]);
    let table = Table::new(rows, widths).header(Row::new(heading).style(Style::new().bold()));
    frame.render_widget(table.block(Block::bordered().title("verifiers")), below);
}

fn samples(frame: &mut Frame<'_>, screen: &Screen, area: Rect) {
    let lines = screen.samples.iter().flat_map(|sample| {
        let verdict = sample.verdict.as_ref();
        let outcome = match verdict.map(v1::Verdict::outcome) {
            Some(v1::Outcome::Correct) => "✓ correct",
            Some(v1::Outcome::Wrong) => "✗ wrong",
            Some(v1::Outcome::Unparsable) => "? unparsable",
            Some(_) => "! no verdict",
            None => "… not judged",
        };
        let reward = verdict.map(|verdict| format!(" {:.3}", verdict.reward)).unwrap_or_default();
        let step = sample.step.map_or("in flight".to_owned(), |step| format!("step {step}"));
        let signal: String = signal(sample).iter().map(|word| format!("  {word}")).collect();
        [
            Line::from(format!(
                "g{}.{}  {step}  {outcome}{reward}{signal}  {} tokens",
                sample.group_id, sample.index, sample.tokens
            ))
            .bold(),
            Line::from(format!("  {}", harmless(&sample.question))),
            Line::from(format!("  → {}", harmless(&sample.response))),
        ]
    });
    let lines: Vec<Line<'static>> = lines.skip(screen.scroll).collect();
    frame.render_widget(
        Paragraph::new(lines).block(Block::bordered().title("newest samples; `pacs samples` shows all of a text")),
        area,
    );
}

fn events(frame: &mut Frame<'_>, screen: &Screen, area: Rect) {
    // The newest event is on top.
    let lines: Vec<Line<'static>> =
        screen.events.iter().rev().skip(screen.scroll).map(|event| Line::from(event.clone())).collect();
    let share = screen.status.metrics.get("pass_rate").copied().map(percent);
    let title =
        format!("events, newest first{}", share.map(|share| format!("; pass rate {share}")).unwrap_or_default());
    frame.render_widget(Paragraph::new(lines).block(Block::bordered().title(title)), area);
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use ratatui::crossterm::event::KeyCode;

    use super::*;

    fn series(name: &str, means: Vec<f64>) -> (String, v1::MetricSeries) {
        let steps = (1..=means.len() as u64).collect();
        (name.to_owned(), v1::MetricSeries { name: name.into(), steps, means, ..Default::default() })
    }

    fn screen() -> Screen {
        let hostile = "\u{1b}[2J\u{202e}";
        let worker = |name: &str| v1::WorkerStatus {
            name: format!("{name}{hostile}"),
            activity: format!("generates{hostile}"),
            ..Default::default()
        };
        let status = v1::GetStatusResponse {
            job: format!("demo{hostile}"),
            phase: "sampling".into(),
            step: 12,
            total_steps: 40,
            waiting_for: format!("step 13 waits for 1 rollout worker{hostile}"),
            findings: vec![v1::Finding {
                stops_run: true,
                sentence: format!("verifier-0 has given no verdict for 31 s{hostile}"),
                advice: "see its log".into(),
                ..Default::default()
            }],
            verifiers: vec![v1::VerifierStatus {
                worker: format!("verifier-0{hostile}"),
                outcomes: [("timed_out".to_owned(), 4711)].into(),
                ..Default::default()
            }],
            workers: vec![worker("rollout-0"), worker("rollout-1")],
            metrics: [("sampling_seconds".to_owned(), 3.0), ("training_seconds".to_owned(), 1.5)].into(),
            ..Default::default()
        };
        let sample = v1::ObservedSample {
            group_id: 96,
            question: format!("6 * 7?{hostile}"),
            response: format!("42{hostile}"),
            ..Default::default()
        };
        Screen {
            status,
            steps: [
                series("reward_mean", (0..50).map(|step| f64::from(step) / 50.0).collect()),
                series("tokens_per_second", vec![100.0, f64::NAN, 476.0]),
            ]
            .into(),
            evaluations: [series("pass_at_1", vec![0.5])].into(),
            samples: vec![sample],
            events: [format!("12:00:00  note {}", harmless(hostile))].into(),
            ..Screen::default()
        }
    }

    fn shown(screen: &Screen, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("a screen");
        terminal.draw(|frame| draw(frame, screen)).expect("drawn");
        let buffer = terminal.backend().buffer();
        let lines = buffer
            .content()
            .chunks(usize::from(width))
            .map(|line| line.iter().map(ratatui::buffer::Cell::symbol).collect::<String>());
        lines.collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn every_view_shows_what_it_is_for_on_screens_of_every_size() {
        let mut screen = screen();
        for (key, expected) in [
            (
                'o',
                &[
                    "step 12 of 40",
                    "step 13 waits for",
                    "!! verifier-0 has given no verdict for 31 s",
                    "sampling",
                    "476 tokens/s",
                    "queues",
                ][..],
            ),
            ('w', &["2 workers", "rollout-1", "generates", "timed out", "4711"]),
            ('s', &["g96.0", "in flight", "… not judged", "6 * 7?"]),
            ('e', &["events, newest first", "12:00:00  note"]),
        ] {
            assert!(screen.press(KeyCode::Char(key)));
            let text = shown(&screen, 120, 30);
            for part in expected {
                assert!(text.contains(part), "`{part}` is missing in {key}:\n{text}");
            }
            for (width, height) in [(1, 1), (10, 3), (40, 10), (80, 24), (300, 80)] {
                let text = shown(&screen, width, height);
                assert!(!text.chars().any(|c| (c.is_control() && c != '\n') || c == '\u{202e}'), "{text:?}");
            }
        }
        assert!(!screen.press(KeyCode::Char('q')) && !screen.press(KeyCode::Esc));
    }

    #[test]
    fn a_run_without_a_step_is_shown_and_scrolling_ends_at_the_last_line() {
        let mut empty = Screen::default();
        for _ in 0..4 {
            assert!(empty.press(KeyCode::PageDown) && empty.press(KeyCode::Tab));
            assert!(!shown(&empty, 80, 24).is_empty());
            assert_eq!(empty.scroll, 0);
        }
        let mut screen = screen();
        screen.press(KeyCode::Char('w'));
        screen.press(KeyCode::PageDown);
        assert_eq!(screen.scroll, 1);
        screen.press(KeyCode::Up);
        assert_eq!(screen.scroll, 0);
    }
}
