//! A report as one HTML file: no scripts, no other files, the data in it as JSON.

use pacs_report::{Plot, Series, swatch};
use serde_json::Value;

/// A part of the page, in reading order.
#[derive(Clone, Debug)]
pub(super) enum Part {
    Heading(String),
    Text(String),
    Plots(Vec<Plot>),
    /// Titles of the columns, and rows of as many cells.
    Table(Vec<String>, Vec<Vec<String>>),
    /// Text that is shown as it is, folded away under this name.
    Folded(String, String),
    Answers(Vec<Answer>),
    Findings(Vec<Finding>),
}

/// Something that goes wrong.
#[derive(Clone, Debug)]
pub(super) struct Finding {
    pub(super) stops_run: bool,
    pub(super) evidence: String,
    pub(super) advice: String,
}

/// A sampled answer.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    pub(super) title: String,
    pub(super) question: String,
    pub(super) response: String,
    pub(super) facts: String,
}

/// Bounds the page to what its own file holds, also when it is served by somebody.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'";

const STYLE: &str = "\
body{font:15px/1.5 system-ui,sans-serif;max-width:1500px;margin:0 auto;padding:1rem;color:#1b1f24;background:#fff}\
h1{font-size:1.5rem;overflow-wrap:anywhere}h2{font-size:1.15rem;margin-top:2rem;border-bottom:1px solid #d5dae0}\
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr));gap:.8rem}\
figure{margin:0;border:1px solid #d5dae0;border-radius:6px;padding:.5rem .7rem;min-width:0}\
figcaption{display:flex;justify-content:space-between;gap:.6rem;font-weight:600}figcaption span{font-weight:400;color:#57606a}\
figure>svg{display:block;width:100%;height:auto;color:#57606a}\
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:0 .9rem;margin:.1rem 0 .3rem;padding:0;font-size:.85rem}\
.legend svg{width:26px;height:10px;margin-right:.3rem}.legend b{font-variant-numeric:tabular-nums}\
.s0{color:#1f78c8}.s1{color:#d4700c}.s2{color:#07503c}.s3{color:#ad2485}.s4{color:#0a2a63}.s5{color:#8a6410}.s6{color:#858d94}\
.findings{list-style:none;padding:0}.findings li{border:1px solid #d5dae0;border-left:5px double #6b4e00;border-radius:4px;padding:.3rem .7rem;\
margin:.4rem 0;overflow-wrap:anywhere}.findings b{color:#6b4e00}.findings .stops{border-left:5px solid #b00020}.findings .stops b{color:#b00020}\
.scroll{overflow-x:auto}.scroll:focus-visible{outline:2px solid #0b5c94}table{border-collapse:collapse}td:last-child{overflow-wrap:anywhere;min-width:7rem}\
th,td{text-align:left;padding:.25rem .8rem .25rem 0;border-bottom:1px solid #e6e9ed;vertical-align:top}\
td{font-variant-numeric:tabular-nums}th{color:#57606a}\
pre,.response{white-space:pre-wrap;overflow-wrap:anywhere;background:#f7f8fa;border:1px solid #d5dae0;border-radius:6px;padding:.6rem}\
.facts{color:#57606a;font-size:.9rem}article{margin:0 0 1.4rem}summary{cursor:pointer;padding:.3rem 0}\
@media(prefers-color-scheme:dark){body{color:#e6e9ec;background:#14171a}pre,.response{background:#1d2125;border-color:#3a4149}\
th,.facts,figcaption span,figure>svg{color:#a4adb6}th,td{border-color:#2a2f35}h2,figure,.findings li{border-color:#3a4149}\
.findings li{border-left-color:#e6c35c}.findings b{color:#e6c35c}.findings .stops{border-left-color:#ff8a8a}.findings .stops b{color:#ff8a8a}\
.scroll:focus-visible{outline-color:#7cc0f0}\
.s0{color:#2898f0}.s1{color:#ef9a20}.s2{color:#4ce8a0}.s3{color:#cc4aa2}.s4{color:#c8ecff}.s5{color:#8e7a3e}.s6{color:#9db2cc}}\
@media print{details{display:none}}";

/// Renders the page. `data` is what was drawn and told, for other programs: the element `data` of the page.
pub(super) fn html(title: &str, parts: &[Part], data: &Value) -> String {
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"{POLICY}\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n\
         <body>\n<main>\n<h1>{title}</h1>\n",
        title = escaped(title)
    );
    parts.iter().for_each(|part| page.push_str(&part.html()));
    page.push_str("</main>\n<script type=\"application/json\" id=\"data\">\n");
    page.push_str(&in_script(&data.to_string()));
    page.push_str("\n</script>\n</body>\n</html>\n");
    page
}

impl Part {
    fn html(&self) -> String {
        match self {
            Self::Heading(text) => format!("<h2>{}</h2>\n", escaped(text)),
            Self::Text(text) => format!("<p>{}</p>\n", escaped(text)),
            Self::Plots(plots) => {
                let plots: Vec<String> = plots.iter().map(figure).collect();
                format!("<div class=\"plots\">\n{}</div>\n", plots.concat())
            }
            Self::Table(titles, rows) => {
                let head: String =
                    titles.iter().map(|title| format!("<th scope=\"col\">{}</th>", escaped(title))).collect();
                let row = |row: &Vec<String>| {
                    let cells: String = row.iter().map(|cell| format!("<td>{}</td>", escaped(cell))).collect();
                    format!("<tr>{cells}</tr>\n")
                };
                let body: String = rows.iter().map(row).collect();
                format!(
                    "<div class=\"scroll\" role=\"region\" aria-label=\"{}\" tabindex=\"0\"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n",
                    escaped(&titles.join(", "))
                )
            }
            Self::Folded(name, text) => {
                format!("<details><summary>{}</summary><pre>{}</pre></details>\n", escaped(name), escaped(text))
            }
            Self::Answers(answers) => answers.iter().map(Answer::html).collect(),
            Self::Findings(findings) => {
                let findings: String = findings.iter().map(Finding::html).collect();
                format!("<ul class=\"findings\">\n{findings}</ul>\n")
            }
        }
    }
}

impl Answer {
    fn html(&self) -> String {
        format!(
            "<article><h3>{}</h3>\n<p>{}</p>\n<div class=\"response\">{}</div>\n<p class=\"facts\">{}</p></article>\n",
            escaped(&self.title),
            escaped(&self.question),
            escaped(&self.response),
            escaped(&self.facts)
        )
    }
}

impl Finding {
    fn html(&self) -> String {
        let (class, label) = if self.stops_run { (" class=\"stops\"", "stops the run") } else { ("", "notice") };
        format!(
            "<li{class}><b>▲ {label}</b> {}.<br>What to do: {}.</li>\n",
            escaped(&self.evidence),
            commands(&self.advice)
        )
    }
}

/// A text with its commands (between backticks) as code.
fn commands(text: &str) -> String {
    let parts = text.split('`').map(escaped).enumerate();
    parts.map(|(place, part)| if place % 2 == 1 { format!("<code>{part}</code>") } else { part }).collect()
}

/// A plot with its title, its unit and the newest value of each line. Screen readers say both ends of the lines.
fn figure(plot: &Plot) -> String {
    let known =
        |series: &Series| -> Vec<f64> { series.points.iter().map(|point| point.y).filter(|y| y.is_finite()).collect() };
    let (mut legend, mut words) = (String::new(), Vec::new());
    for (index, series) in plot.series.iter().enumerate() {
        let values = known(series);
        let (first, last) = (values.first().copied().map(short), values.last().copied().map(short).unwrap_or_default());
        legend += &format!("<li>{}{} <b>{last}</b></li>", swatch(index), escaped(&series.name));
        words.extend(first.map(|first| format!("{} {first} to {last}", series.name)));
    }
    let said = format!(
        "{}, {}: {}",
        plot.title,
        plot.y_label,
        if words.is_empty() { "no data".into() } else { words.join(", ") }
    );
    let role = format!("<svg role=\"img\" aria-label=\"{}\" ", escaped(&said));
    format!(
        "<figure><figcaption>{} <span>{}</span></figcaption>\n<ul class=\"legend\">{legend}</ul>\n{}</figure>\n",
        escaped(&plot.title),
        escaped(&plot.y_label),
        plot.to_inline_svg().replacen("<svg ", &role, 1)
    )
}

/// A number with about three digits.
fn short(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        size if !(1e-3..1e6).contains(&size) => format!("{value:.1e}"),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.3}"),
    }
}

/// Text in elements and attributes. Control characters but line breaks and tabs are shown as escapes.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' | '\t' => out.push(c),
            c if c.is_control() => out.extend(c.escape_default()),
            c => out.push(c),
        }
    }
    out
}

/// JSON in a script element: without `<`, nothing in it can end the element or begin a comment.
fn in_script(json: &str) -> String {
    json.replace('<', "\\u003c").replace('>', "\\u003e").replace('\u{2028}', "\\u2028").replace('\u{2029}', "\\u2029")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn nothing_that_a_model_says_becomes_markup() {
        let hostile = "</script><script>alert(1)</script><!-- \" onload='x' & \u{1b}[2J";
        let answer =
            Answer { title: hostile.into(), question: hostile.into(), response: hostile.into(), facts: hostile.into() };
        let parts = [
            Part::Heading(hostile.into()),
            Part::Text(hostile.into()),
            Part::Table(vec![hostile.into()], vec![vec![hostile.into()]]),
            Part::Folded(hostile.into(), hostile.into()),
            Part::Plots(vec![Plot {
                title: hostile.into(),
                y_label: hostile.into(),
                series: vec![Series { name: hostile.into(), points: Vec::new() }],
                ..Plot::default()
            }]),
            Part::Answers(vec![answer]),
            Part::Findings(vec![Finding { stops_run: true, evidence: hostile.into(), advice: hostile.into() }]),
        ];
        let page = html(hostile, &parts, &json!({"text": hostile}));
        assert_eq!(page.matches("<script").count(), 1, "only the data");
        assert_eq!(page.matches("</script").count(), 1);
        assert!(!page.contains("alert(1)</") && !page.contains("<!--") && !page.contains('\u{1b}'));
        let data = page.split_once("id=\"data\">").and_then(|(_, rest)| rest.split_once("</script>"));
        let data: Value = serde_json::from_str(data.expect("the data").0).expect("JSON");
        assert_eq!(data["text"], hostile, "the data is what it was");
    }
}
