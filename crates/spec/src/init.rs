/// A commented job spec: every key with its meaning and default, those that must be set with an example.
#[must_use]
pub fn init_template() -> String {
    include_str!("init.toml").to_owned()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::fields::{TABLES, fields_at};
    use crate::*;

    #[test]
    fn the_template_is_a_valid_spec_of_defaults() {
        let spec = parse(&init_template(), Path::new("init.toml")).expect("the template is valid");
        let minimal = format!(
            "name = {:?}\nmodel.path = {:?}\ndata.train.path = {:?}\ndata.evaluation.path = {:?}\n",
            spec.name,
            spec.model.path,
            spec.data.train.path.as_ref().expect("the template trains on a file"),
            spec.data.evaluation.as_ref().and_then(|e| e.path.as_ref()).expect("the template evaluates with a file"),
        );
        let defaults = parse(&minimal, Path::new("minimal.toml")).expect("only these keys are required");
        assert_eq!(differences(&defaults, &spec), []);
        assert_eq!(defaults, spec);
    }

    #[test]
    fn every_key_of_every_table_is_in_the_template() {
        // Keys without a default stand in comments of the form `#key = example`; with those switched on, the text must
        // hold every key of every table (though not be valid: a source cannot have both a file and a generator).
        let all = init_template()
            .lines()
            .map(|line| line.strip_prefix('#').filter(|l| !l.starts_with(' ')).unwrap_or(line))
            .collect::<Vec<_>>()
            .join("\n");
        let table: toml::Table = toml::from_str(&all).expect("the template with all keys is TOML");
        for path in TABLES {
            let here = path.split('.').filter(|key| !key.is_empty()).try_fold(&table, |t, key| t.get(key)?.as_table());
            let here = here.unwrap_or_else(|| panic!("the template has no [{path}]"));
            // Held-out problems are all measured: a weight is refused there.
            let is_refused = |field: &str| (path, field) == ("data.evaluation", "weight");
            for field in fields_at(path).expect("a listed table").iter().filter(|field| !is_refused(field)) {
                assert!(here.contains_key(*field), "[{path}] lacks {field}");
            }
        }
    }
}
