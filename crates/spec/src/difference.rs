use std::fmt;

use serde::Serialize;
use toml::{Table, Value};

use crate::snapshot_of;

/// One value that two specs do not share.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// Dotted path of the value.
    pub path: String,
    /// The value in the old spec; absent when it has none.
    pub old: Option<Value>,
    /// The value in the new spec; absent when it has none.
    pub new: Option<Value>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let show = |value: &Option<Value>| value.as_ref().map_or("nothing".to_owned(), ToString::to_string);
        write!(f, "{}: was {}, is {}", self.path, show(&self.old), show(&self.new))
    }
}

/// The values in which two specs differ, by path.
///
/// Tables are compared key by key, everything else as a whole. Works for whatever serialises to a TOML table, resolved
/// specs as well as plain tables.
///
/// # Panics
/// When a value does not serialise to a TOML table; every [`JobSpec`](crate::JobSpec) does.
#[must_use]
pub fn differences<T: Serialize>(old: &T, new: &T) -> Vec<Difference> {
    let table = |value: &T| Table::try_from(value).expect("specs are TOML tables");
    let mut found = Vec::new();
    compare("", &table(old), &table(new), &mut found);
    found
}

fn compare(prefix: &str, old: &Table, new: &Table, found: &mut Vec<Difference>) {
    let added = new.keys().filter(|key| !old.contains_key(*key));
    for key in old.keys().chain(added) {
        let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        match (old.get(key), new.get(key)) {
            (Some(Value::Table(old)), Some(Value::Table(new))) => compare(&path, old, new, found),
            (old, new) if old == new || is_same_snapshot(old, new) => {}
            (old, new) => found.push(Difference { path, old: old.cloned(), new: new.cloned() }),
        }
    }
}

/// Whether two paths lead to the same commit of the hub, in whichever cache.
fn is_same_snapshot(old: Option<&Value>, new: Option<&Value>) -> bool {
    let snapshot = |value: Option<&Value>| value?.as_str().and_then(snapshot_of).map(str::to_owned);
    snapshot(old).is_some_and(|old| snapshot(new) == Some(old))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(text: &str) -> Table {
        toml::from_str(text).expect("test tables parse")
    }

    #[test]
    fn equal_tables_do_not_differ() {
        let a = table("a = 1\n[b]\nc = [1, 2]");
        assert_eq!(differences(&a, &a.clone()), []);
    }

    #[test]
    fn the_same_commit_in_another_cache_is_no_difference() {
        let at = |cache: &str, commit: &str| {
            table(&format!("[model]\npath = '{cache}/models--o--n/snapshots/{}'", commit.repeat(40)))
        };
        assert_eq!(differences(&at("/home/a/hub", "1"), &at("/shared/hub", "1")), []);
        assert_eq!(differences(&at("/home/a/hub", "1"), &at("/home/a/hub", "2")).len(), 1);
    }

    #[test]
    fn differences_carry_their_path() {
        let old = table("a = 1\n[b]\nc = [1, 2]\nd = 'x'");
        let new = table("a = 2\n[b]\nc = [1]\ne = true");
        let shown: Vec<String> = differences(&old, &new).iter().map(ToString::to_string).collect();
        assert_eq!(
            shown,
            ["a: was 1, is 2", "b.c: was [1, 2], is [1]", "b.d: was \"x\", is nothing", "b.e: was nothing, is true"]
        );
    }
}
