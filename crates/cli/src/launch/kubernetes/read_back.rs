//! Parses rendered manifests and compares them with the template, so that no value can inject YAML.

use anyhow::{Context, Result, ensure};
use saphyr_parser::{Event, Parser, ScalarStyle};

use super::fill;

/// A parser event without what does not matter: its position, and how a text is quoted.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    /// A text, and whether it is unquoted and so may be read as a number or boolean.
    Text(String, bool),
    /// Any event without text, such as the start or end of a document, list or map.
    Mark(String),
}

/// Checks that `written`, rendered from these values, parses to the template with each value in its place: no other document or
/// key, and the job exactly as the user wrote it.
pub(super) fn check(written: &str, values: &[(&str, String)], job: &str) -> Result<()> {
    // `gpu` is a fragment of a map, composed by this program, and is inserted unchanged.
    let is_text = |key: &str| key != "gpu";
    let mark = |key: &str| format!("pacs-{key}-value");
    let marked = values.iter().map(|(key, value)| (*key, if is_text(key) { mark(key) } else { value.clone() }));
    let meant = parts(&fill(&marked.collect::<Vec<_>>())).context("read the template")?;
    let meant = meant.into_iter().map(|part| match part {
        // The job may be a block or a quoted scalar, and is never read as a number.
        Part::Text(text, _) if text == mark("job") => Part::Text(job.to_owned(), false),
        Part::Text(text, is_plain) => {
            let filled = values.iter().filter(|(key, _)| is_text(key));
            Part::Text(filled.fold(text, |text, (key, value)| text.replace(&mark(key), value)), is_plain)
        }
        mark => mark,
    });
    let read = parts(written).context("read the manifests back")?;
    ensure!(read.into_iter().eq(meant), "the manifests do not say what they should; this is a bug");
    Ok(())
}

fn parts(text: &str) -> Result<Vec<Part>> {
    let events = Parser::new_from_str(text);
    events
        .map(|event| {
            let (event, _) = event?;
            Ok(match event {
                Event::Scalar(text, style, anchor, tag) => {
                    ensure!(anchor == 0 && tag.is_none(), "`{text}` has an anchor or a tag");
                    Part::Text(text.into_owned(), style == ScalarStyle::Plain)
                }
                other => Part::Mark(format!("{other:?}")),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_the_structure_is_noticed() {
        let values = |image: &str| {
            ["name", "image", "worker_image", "data_claim", "run_size", "memory", "shm", "run_id", "device"]
                .map(|key| (key, if key == "image" { image.to_owned() } else { "x".to_owned() }))
                .into_iter()
                .chain(
                    ["learners", "rollouts", "verifiers", "cpu", "threads", "grace", "grace_period"]
                        .map(|key| (key, "1".to_owned())),
                )
                .chain([("gpu", String::new()), ("job", "|\n    a = 1".to_owned())])
                .collect::<Vec<_>>()
        };
        let good = values("registry.example/pacs:1");
        check(&fill(&good), &good, "a = 1\n").expect("as meant");
        assert!(check(&fill(&good), &good, "a = 2\n").is_err(), "another job");
        for image in ["x\n---\nkind: Pod", "x, y: z", "{a: b}", "x # y", "&a x", "!!int 1", "[x]", "\"x", "- x", "? x"]
        {
            let values = values(image);
            assert!(check(&fill(&values), &values, "a = 1\n").is_err(), "{image:?}");
        }
    }
}
