//! Parses rendered manifests and compares them with the template, so that no value can inject YAML.

use anyhow::{Context, Result, ensure};
use saphyr_parser::{Event, Parser, ScalarStyle};

use super::{Value, fill};

/// A parser event without what does not matter: its position, and how a text is quoted.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    /// A text, and whether it is unquoted and so may be read as a number or boolean.
    Text(String, bool),
    /// Any event without text, such as the start or end of a document, list or map.
    Mark(String),
}

/// Checks that `written`, rendered from these values, parses to the template with each value in its place: no other document or
/// key, and the user's texts exactly as they were written.
pub(super) fn check(written: &str, template: &str, values: &[(String, Value)]) -> Result<()> {
    let mark = |key: &str| format!("pacs-{key}-value");
    let marked = values.iter().map(|(key, value)| {
        let marked = match value {
            Value::Yaml(text) => text.clone(),
            Value::Part(_) | Value::Scalar { .. } => mark(key),
        };
        (key.clone(), Value::Yaml(marked))
    });
    let meant = parts(&fill(template, &marked.collect::<Vec<_>>())).context("read the template")?;
    // A scalar may be a block or quoted, and is never read as a number.
    let scalar = |text: &str| {
        values.iter().find_map(|(key, value)| match value {
            Value::Scalar { meant, .. } if text == mark(key) => Some(Part::Text(meant.clone(), false)),
            Value::Scalar { .. } | Value::Part(_) | Value::Yaml(_) => None,
        })
    };
    let meant = meant.into_iter().map(|part| match part {
        Part::Text(text, is_plain) => scalar(&text).unwrap_or_else(|| {
            let filled = values.iter().fold(text, |text, (key, value)| match value {
                Value::Part(value) => text.replace(&mark(key), value),
                Value::Scalar { .. } | Value::Yaml(_) => text,
            });
            Part::Text(filled, is_plain)
        }),
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
    use super::super::{ROLLOUT, part, template};
    use super::*;

    #[test]
    fn what_changes_the_structure_is_noticed() {
        let template = template(ROLLOUT);
        let values = |image: &str, job: &str| {
            ["name", "image", "worker_image", "data_claim", "run_size", "memory", "shm", "run_id", "device"]
                .map(|key| part(key, if key == "image" { image } else { "x" }))
                .into_iter()
                .chain(
                    ["learners", "rollouts", "verifiers", "cpu", "threads", "grace", "grace_period"]
                        .map(|key| part(key, "1")),
                )
                .chain([
                    ("gpu".to_owned(), Value::Yaml(String::new())),
                    ("job".to_owned(), Value::Scalar { meant: job.to_owned(), written: "|\n    a = 1".to_owned() }),
                ])
                .collect::<Vec<_>>()
        };
        let good = values("registry.example/pacs:1", "a = 1\n");
        check(&fill(&template, &good), &template, &good).expect("as meant");
        let other = values("registry.example/pacs:1", "a = 2\n");
        assert!(check(&fill(&template, &other), &template, &other).is_err(), "another job");
        for image in ["x\n---\nkind: Pod", "x, y: z", "{a: b}", "x # y", "&a x", "!!int 1", "[x]", "\"x", "- x", "? x"]
        {
            let values = values(image, "a = 1\n");
            assert!(check(&fill(&template, &values), &template, &values).is_err(), "{image:?}");
        }
    }
}
