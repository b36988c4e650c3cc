use std::path::Path;

use serde_path_to_error::Segment;
use toml::de::DeTable;
use toml::{Table, Value};

use crate::bounds::{self, Broken};
use crate::fields::suggestion;
use crate::lines::{Lines, line_of};
use crate::{JobSpec, LORA_LEARNING_RATE, Problem, SpecErrors};

/// Reads and checks the job spec in the file at `path`.
///
/// # Errors
/// [`SpecErrors`] with everything that is wrong; one problem without a path when the file cannot be read.
pub fn read(path: &Path) -> Result<JobSpec, SpecErrors> {
    match std::fs::read_to_string(path) {
        Ok(text) => parse(&text, path),
        Err(error) => Err(SpecErrors::new(path, vec![Problem::new("", format!("cannot read the file: {error}"))])),
    }
}

/// Reads and checks a job spec; `origin` says in errors where the text came from.
///
/// # Errors
/// [`SpecErrors`] with everything that is wrong: values of a wrong type, unknown keys and broken bounds together. Only
/// text that is no TOML at all hides what else may be wrong with it.
pub fn parse(text: &str, origin: &Path) -> Result<JobSpec, SpecErrors> {
    let (document, syntax) = DeTable::parse_recoverable(text);
    let table =
        if syntax.is_empty() { toml::from_str::<Table>(text).map_err(|error| vec![error]) } else { Err(syntax) };
    let table = table.map_err(|errors| {
        let problems = errors.into_iter().map(|error| Problem {
            line: error.span().map(|span| line_of(text, &span)),
            ..Problem::new("", error.message())
        });
        SpecErrors::new(origin, problems.collect())
    })?;
    let has_rate = table.get("optimizer").and_then(Value::as_table).is_some_and(|t| t.contains_key("learning_rate"));
    let (mut spec, mut problems) = tolerant(table);
    if let Some(spec) = spec.as_mut().filter(|spec| spec.model.lora.is_some() && !has_rate) {
        spec.optimizer.learning_rate = LORA_LEARNING_RATE;
    }
    if let Some(spec) = &spec {
        let sound =
            |broken: &Broken| !broken.paths().any(|path| problems.iter().any(|known| covers(&known.path, path)));
        let broken: Vec<Problem> = bounds::check(spec).into_iter().filter(sound).map(|b| b.problem).collect();
        problems.extend(broken);
    }
    match spec {
        Some(spec) if problems.is_empty() => Ok(JobSpec { objective: spec.objective.filled(), ..spec }),
        _ => {
            let lines = Lines::new(text, document.get_ref());
            problems.iter_mut().for_each(|problem| problem.line = lines.of(&problem.path));
            Err(SpecErrors::new(origin, problems))
        }
    }
}

impl JobSpec {
    /// Checks every bound again, for a spec whose fields were changed after it was parsed.
    ///
    /// # Errors
    /// [`SpecErrors`] with every broken bound; `origin` says there where the spec came from.
    pub fn validate(&self, origin: &Path) -> Result<(), SpecErrors> {
        let problems: Vec<Problem> = bounds::check(self).into_iter().map(|broken| broken.problem).collect();
        if problems.is_empty() { Ok(()) } else { Err(SpecErrors::new(origin, problems)) }
    }

    /// The spec with every default written out, as TOML that [`parse`] reads back to the same spec.
    #[must_use]
    pub fn resolved_toml(&self) -> String {
        toml::to_string_pretty(self).expect("the fields of a valid spec are TOML values")
    }
}

/// Deserialises `table`, putting aside what does not fit, until the rest is a spec: serde stops at the first error,
/// an operator wants to see all. Returns no spec when the errors leave nothing to check further.
fn tolerant(mut table: Table) -> (Option<JobSpec>, Vec<Problem>) {
    let mut problems: Vec<Problem> = Vec::new();
    loop {
        let mut unknown = Vec::new();
        match attempt(&table, &mut unknown) {
            Ok(spec) => {
                problems.extend(unknown.into_iter().map(|(path, name)| unknown_key(&path, &name)));
                return (Some(spec), problems);
            }
            Err(Misfit { path, message }) => {
                let (problem, repaired) = match missing_field(&message) {
                    Some(field) => required(&mut table, &path, field),
                    None => wrong_type(&mut table, &path, &message),
                };
                if !problems.iter().any(|known| covers(&known.path, &problem.path)) {
                    problems.push(problem);
                }
                if !repaired {
                    return (None, problems);
                }
            }
        }
    }
}

struct Misfit {
    path: Vec<String>,
    message: String,
}

/// One try; adds unknown keys as (path of the table, name) to `unknown`.
fn attempt(table: &Table, unknown: &mut Vec<(String, String)>) -> Result<JobSpec, Misfit> {
    let mut note = |path: serde_ignored::Path<'_>| {
        let mut keys = Vec::new();
        collect_keys(&path, &mut keys);
        if let Some(name) = keys.pop() {
            unknown.push((keys.join("."), name));
        }
    };
    let inner = serde_ignored::Deserializer::new(Value::Table(table.clone()), &mut note);
    serde_path_to_error::deserialize(inner).map_err(|error| {
        let keys = error.path().iter().map_while(|segment| match segment {
            Segment::Map { key } => Some(key.clone()),
            // An array is put aside as a whole: without one element the others would have other indices.
            Segment::Seq { .. } | Segment::Enum { .. } | Segment::Unknown => None,
        });
        Misfit { path: keys.collect(), message: error.inner().message().to_owned() }
    })
}

fn collect_keys(path: &serde_ignored::Path<'_>, keys: &mut Vec<String>) {
    match path {
        serde_ignored::Path::Root => {}
        serde_ignored::Path::Map { parent, key } => {
            collect_keys(parent, keys);
            keys.push(key.clone());
        }
        serde_ignored::Path::Seq { parent, .. }
        | serde_ignored::Path::Some { parent }
        | serde_ignored::Path::NewtypeStruct { parent }
        | serde_ignored::Path::NewtypeVariant { parent } => collect_keys(parent, keys),
    }
}

fn unknown_key(table: &str, name: &str) -> Problem {
    let message = match suggestion(table, name) {
        Some(hint) => format!("unknown key; {hint}"),
        None => "unknown key".to_owned(),
    };
    Problem::new(join(table, name), message)
}

fn missing_field(message: &str) -> Option<&str> {
    message.strip_prefix("missing field `")?.strip_suffix('`')
}

/// Reports a required key that is not there and puts a stand-in in its place; false when there is none.
fn required(table: &mut Table, parent: &[String], field: &str) -> (Problem, bool) {
    let parent_path = parent.join(".");
    let problem = Problem::new(join(&parent_path, field), "is required");
    let stand_in = match (parent_path.as_str(), field) {
        ("", "name") => "name = 'unnamed'",
        ("", "model") => "model = { path = '.' }",
        ("", "data") => "data = { train = { path = 'train.jsonl' } }",
        ("model", "path") => "path = '.'",
        ("data", "train") => "train = { path = 'train.jsonl' }",
        ("data.train.generator" | "data.evaluation.generator", "task") => "task = 'addition'",
        _ => return (problem, false),
    };
    let stand_in: Table = toml::from_str(stand_in).expect("the stand-ins above are TOML");
    let Some(place) = descend(table, parent) else { return (problem, false) };
    place.extend(stand_in);
    (problem, true)
}

/// Reports a value of a wrong type and takes it out; false when it cannot be found.
fn wrong_type(table: &mut Table, path: &[String], message: &str) -> (Problem, bool) {
    let expected = match message.rsplit_once("expected ") {
        Some((_, expected)) => format!("expected {}", plain_type(expected)),
        None => message.to_owned(),
    };
    let mut problem = Problem::new(path.join("."), expected);
    let removed = path.split_last().and_then(|(name, parent)| descend(table, parent)?.remove(name));
    match removed {
        Some(value) => {
            if !value.is_table() {
                problem = problem.with_value(value);
            }
            (problem, true)
        }
        None => (problem, false),
    }
}

/// What serde calls a type, for people.
fn plain_type(expected: &str) -> &str {
    match expected {
        "u32" | "u64" | "usize" => "a whole number, 0 or more",
        "f64" => "a number",
        "a boolean" => "true or false",
        "path string" => "a string",
        "a sequence" => "an array",
        struct_name if struct_name.starts_with("struct ") || struct_name == "a map" => "a table",
        other => other,
    }
}

fn descend<'a>(table: &'a mut Table, path: &[String]) -> Option<&'a mut Table> {
    path.iter().try_fold(table, |table, key| table.get_mut(key)?.as_table_mut())
}

fn join(table: &str, name: &str) -> String {
    if table.is_empty() { name.to_owned() } else { format!("{table}.{name}") }
}

/// Whether a problem at `known` already speaks of the value at `path`.
fn covers(known: &str, path: &str) -> bool {
    path.strip_prefix(known).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

#[cfg(test)]
mod tests;
