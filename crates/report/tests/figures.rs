//! Figures and tables as they are written.

use pacs_report::{Plot, Point, Scale, Series, Table, swatch};

fn plot(points: Vec<Point>) -> Plot {
    Plot {
        title: "pass@k <of> \"a\" & b".to_owned(),
        x_label: "k".to_owned(),
        y_label: "pass@k".to_owned(),
        x_scale: Scale::Log2,
        y_range: Some((0.0, 1.0)),
        series: vec![Series { name: "start".to_owned(), points }],
    }
}

fn point(x: f64, y: f64) -> Point {
    Point { x, y, interval: Some((y - 0.1, y + 0.1)) }
}

#[test]
fn a_plot_puts_values_where_they_belong() {
    let svg = plot(vec![point(1.0, 0.0), point(2.0, 0.5), point(4.0, 1.0)]).to_svg();
    // The drawing is from (64, 352) to (520, 36), and 2 is in the middle between 1 and 4.
    assert!(svg.contains(r#"d="M64.0 352.0L292.0 194.0L520.0 36.0" fill="none""#), "{svg}");
    assert!(svg.contains("pass@k &lt;of&gt; &quot;a&quot; &amp; b"), "{svg}");
    assert_eq!(svg.matches("fill-opacity").count(), 1);
    assert_eq!(svg, plot(vec![point(1.0, 0.0), point(2.0, 0.5), point(4.0, 1.0)]).to_svg());
}

#[test]
fn what_is_no_number_interrupts_a_line_and_is_nowhere_in_the_file() {
    let gap = Point { x: 2.0, y: f64::NAN, interval: Some((f64::NAN, 1.0)) };
    let svg = plot(vec![point(1.0, 0.5), gap, point(4.0, 0.5), point(0.0, 0.5), point(f64::INFINITY, 0.1)]).to_svg();
    assert!(svg.contains(r#"d="M64.0 194.0M520.0 194.0" fill="none""#), "{svg}");
    assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
}

#[test]
fn plots_of_nothing_and_of_one_point_are_files_too() {
    for points in [vec![], vec![point(1.0, 0.5)]] {
        for y_range in [None, Some((0.0, 1.0))] {
            let svg = Plot { y_range, ..plot(points.clone()) }.to_svg();
            assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n") && !svg.contains("NaN"), "{svg}");
        }
    }
}

#[test]
fn more_lines_than_colours_are_told_apart_by_dashes() {
    let series = (0..9).map(|at| Series { name: format!("s{at}"), points: vec![point(1.0, 0.1), point(2.0, 0.2)] });
    let svg = Plot { series: series.collect(), ..plot(vec![]) }.to_svg();
    // Two of nine lines, each once in the drawing and once in the legend.
    assert_eq!(svg.matches("stroke-dasharray").count(), 4);
}

#[test]
fn a_plot_of_a_page_takes_its_colours_from_it_and_has_a_dash_for_each_line() {
    let series = (0..9).map(|at| Series { name: format!("s{at}"), points: vec![point(1.0, 0.1), point(4.0, 0.9)] });
    let plot = Plot { series: series.collect(), ..plot(vec![]) };
    let svg = plot.to_inline_svg();
    // From (52, 196) to (430, 8), without title and legend.
    assert!(svg.contains(r#"d="M52.0 177.2L430.0 26.8" fill="none" stroke="currentColor""#), "{svg}");
    assert!(!svg.contains('#') && !svg.contains("pass@k") && !svg.contains("s8"), "{svg}");
    // Those of the patterns without a gap are three of nine.
    assert_eq!((svg.matches("stroke-dasharray").count(), svg.matches(r#"<g class="s0">"#).count()), (6, 2));
    assert!(
        swatch(7).contains(r#"class="s0""#) && swatch(7).contains("stroke-dasharray") && !swatch(8).contains("dash")
    );
    let zero = Plot {
        y_range: None,
        series: vec![Series { name: "z".to_owned(), points: vec![Point { x: 1.0, y: 0.0, interval: None }] }],
        ..plot
    };
    assert!(zero.to_inline_svg().contains(r#"cy="196.0""#), "0 is at the bottom");
}

#[test]
fn a_table_is_aligned_and_a_bar_does_not_end_a_cell() {
    let mut table = Table::new(["set", "pass@1"]);
    table.row(["a|b", "12.5"]);
    table.row(["longer\nname"]);
    assert_eq!(
        table.to_string(),
        "| set         | pass@1 |\n| ----------- | -----: |\n| a\\|b        |   12.5 |\n| longer name |        |\n"
    );
}
