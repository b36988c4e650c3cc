//! Which keys each table of a spec may have, read off the types themselves so that the two cannot drift apart.

use std::fmt;

use serde::de::{self, Deserialize, Visitor};

use crate::*;

/// Names of the keys of the table at `path`; `None` where the spec has no table of fixed keys.
pub(crate) fn fields_at(path: &str) -> Option<&'static [&'static str]> {
    let fields = match path {
        _ if is_evaluation_set(path) => fields_of::<EvaluationSetSpec>(),
        _ if path.strip_suffix(".generator").is_some_and(is_evaluation_set) => fields_of::<GeneratorSpec>(),
        _ if path.strip_suffix(".verifier").is_some_and(is_evaluation_set) => fields_of::<VerifierSpec>(),
        _ if path.strip_suffix(".code").is_some_and(is_verifier) => fields_of::<CodeSpec>(),
        _ if path.strip_suffix(".sandbox").is_some_and(is_verifier) => fields_of::<ExecSandboxSpec>(),
        _ if is_named_verifier(path) => fields_of::<VerifierSpec>(),
        _ if is_reward_verifier(path) => fields_of::<RewardVerifierSpec>(),
        "" => fields_of::<JobSpec>(),
        "model" => fields_of::<ModelSpec>(),
        "model.lora" => fields_of::<LoraSpec>(),
        "data" => fields_of::<DataSpec>(),
        "data.train" | "data.evaluation" => fields_of::<SourceSpec>(),
        "data.train.generator" | "data.evaluation.generator" => fields_of::<GeneratorSpec>(),
        _ if is_mixed(path) => fields_of::<SourceSpec>(),
        _ if path.strip_suffix(".generator").is_some_and(is_mixed) => fields_of::<GeneratorSpec>(),
        "rollout" => fields_of::<RolloutSpec>(),
        "rollout.vllm" => fields_of::<VllmSpec>(),
        "rollout.vllm.server" => fields_of::<VllmServerSpec>(),
        "objective" => fields_of::<ObjectiveSpec>(),
        "optimizer" => fields_of::<OptimizerSpec>(),
        "batch" => fields_of::<BatchSpec>(),
        "asynchrony" => fields_of::<AsynchronySpec>(),
        "groups" => fields_of::<GroupsSpec>(),
        "watchdog" => fields_of::<WatchdogSpec>(),
        "verifier" => fields_of::<VerifierSpec>(),
        "reward" => fields_of::<RewardSpec>(),
        "evaluation" => fields_of::<EvaluationSpec>(),
        "checkpoint" => fields_of::<CheckpointSpec>(),
        "logging" => fields_of::<LoggingSpec>(),
        "resources" => fields_of::<ResourcesSpec>(),
        _ => return None,
    };
    Some(fields)
}

/// Every table path that [`fields_at`] knows.
/// Those of `reward.verifiers`, `data.mix` and `evaluation.sets` have names of the job's own.
pub(crate) const TABLES: [&str; 37] = [
    "",
    "model",
    "model.lora",
    "data",
    "data.train",
    "data.train.generator",
    "data.mix.NAME",
    "data.evaluation",
    "data.evaluation.generator",
    "rollout",
    "rollout.vllm",
    "rollout.vllm.server",
    "objective",
    "optimizer",
    "batch",
    "asynchrony",
    "groups",
    "watchdog",
    "verifier",
    "verifier.code",
    "verifier.sandbox",
    "verifiers.NAME",
    "verifiers.NAME.code",
    "verifiers.NAME.sandbox",
    "reward",
    "reward.verifiers.NAME",
    "reward.verifiers.NAME.code",
    "reward.verifiers.NAME.sandbox",
    "evaluation",
    "evaluation.sets.NAME",
    "evaluation.sets.NAME.generator",
    "evaluation.sets.NAME.verifier",
    "evaluation.sets.NAME.verifier.code",
    "evaluation.sets.NAME.verifier.sandbox",
    "checkpoint",
    "logging",
    "resources",
];

/// What was probably meant by the unknown key `name` in the table at `path`: a key of this table that is spelled
/// almost so, or a table that does have the key.
pub(crate) fn suggestion(path: &str, name: &str) -> Option<String> {
    let near = fields_at(path)
        .into_iter()
        .flatten()
        .map(|known| (edit_distance(known, name), *known))
        .filter(|(distance, known)| *distance <= 1 + known.len().min(name.len()) / 4)
        .min();
    if let Some((_, known)) = near {
        return Some(format!("did you mean `{known}`?"));
    }
    let elsewhere = TABLES.iter().find(|table| fields_at(table).is_some_and(|fields| fields.contains(&name)))?;
    match *elsewhere {
        "" => Some(format!("`{name}` belongs to the top of the file, above the first table")),
        table => Some(format!("`{name}` belongs to `[{table}]`")),
    }
}

fn is_evaluation_set(path: &str) -> bool {
    path.strip_prefix("evaluation.sets.").is_some_and(|name| !name.contains('.'))
}

fn is_mixed(path: &str) -> bool {
    path.strip_prefix("data.mix.").is_some_and(|name| !name.contains('.'))
}

fn is_reward_verifier(path: &str) -> bool {
    path.strip_prefix("reward.verifiers.").is_some_and(|name| !name.contains('.'))
}

fn is_named_verifier(path: &str) -> bool {
    path.strip_prefix("verifiers.").is_some_and(|name| !name.contains('.'))
}

/// Any table that describes a verifier.
fn is_verifier(path: &str) -> bool {
    let of_set = path.strip_suffix(".verifier").is_some_and(is_evaluation_set);
    path == "verifier" || of_set || is_named_verifier(path) || is_reward_verifier(path)
}

/// Field names of a struct, from its `Deserialize` implementation.
fn fields_of<'de, T: Deserialize<'de>>() -> &'static [&'static str] {
    let mut names: &'static [&'static str] = &[];
    // The probe gives no value, so this always fails; the names are what it was called for.
    let _ = T::deserialize(Probe(&mut names));
    names
}

struct Probe<'a>(&'a mut &'static [&'static str]);

impl<'de> de::Deserializer<'de> for Probe<'_> {
    type Error = NoValue;

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        _visitor: V,
    ) -> Result<V::Value, NoValue> {
        *self.0 = fields;
        Err(NoValue)
    }

    fn deserialize_any<V: Visitor<'de>>(self, _visitor: V) -> Result<V::Value, NoValue> {
        Err(NoValue)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

#[derive(Debug)]
struct NoValue;

impl fmt::Display for NoValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the probe holds no value")
    }
}

impl std::error::Error for NoValue {}

impl de::Error for NoValue {
    fn custom<T: fmt::Display>(_message: T) -> Self {
        Self
    }
}

/// Insertions, deletions, substitutions and swaps of neighbours that make one name of the other.
fn edit_distance(a: &str, b: &str) -> usize {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    for i in 0..=a.len() {
        for j in 0..=b.len() {
            rows[i][j] = if i == 0 || j == 0 {
                i + j
            } else {
                let swap = i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1];
                let substituted = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
                let edited = substituted.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
                if swap { edited.min(rows[i - 2][j - 2] + 1) } else { edited }
            };
        }
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_table_knows_its_keys() {
        for table in TABLES {
            assert!(fields_at(table).is_some_and(|fields| !fields.is_empty()), "{table}");
        }
        assert!(fields_at("batch").is_some_and(|fields| fields.contains(&"mini_batches")));
    }

    #[test]
    fn every_nested_table_is_listed() {
        // A table of the spec shows itself as a struct; each must be reachable through `fields_at`.
        let spec: toml::Table = toml::from_str(crate::init_template().as_str()).expect("the template is TOML");
        fn tables(prefix: &str, table: &toml::Table, found: &mut Vec<String>) {
            for (key, value) in table {
                let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                if let toml::Value::Table(inner) = value {
                    found.push(path.clone());
                    tables(&path, inner, found);
                }
            }
        }
        let mut found = Vec::new();
        tables("", &spec, &mut found);
        let named = ["reward.verifiers", "data.mix", "evaluation.sets"];
        found.retain(|path| path != "model.template_variables" && !named.contains(&path.as_str()));
        assert!(found.len() > 10);
        for path in found {
            let listed = TABLES.contains(&path.as_str()) || is_reward_verifier(&path);
            assert!(listed, "{path} is not listed");
        }
    }

    #[test]
    fn distance_counts_edits() {
        for (a, b, distance) in
            [("steps", "steps", 0), ("steps", "step", 1), ("beta", "bate", 2), ("top_k", "tpo_k", 1)]
        {
            assert_eq!(edit_distance(a, b), distance, "{a} {b}");
        }
    }

    #[test]
    fn suggestions_name_the_key_or_its_table() {
        assert_eq!(suggestion("batch", "mini_batchs"), Some("did you mean `mini_batches`?".into()));
        assert_eq!(suggestion("batch", "learning_rate"), Some("`learning_rate` belongs to `[optimizer]`".into()));
        assert_eq!(suggestion("optimizer", "zzz"), None);
    }
}
