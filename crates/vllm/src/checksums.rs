//! Checksums of what servers hold.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};

use ring::digest::{Context, SHA256};

/// Checksums of a whole server: which tensors it has, and what they hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sums {
    /// Digest of the tensors' names: equal for servers that are divided alike.
    pub(crate) names: String,
    /// Digest of everything.
    pub(crate) content: String,
}

impl Sums {
    pub(crate) fn of(checksums: &BTreeMap<String, String>) -> Self {
        let (mut names, mut content) = (Context::new(&SHA256), Context::new(&SHA256));
        for (name, digest) in checksums {
            for part in [name.as_bytes(), b"\0"] {
                names.update(part);
                content.update(part);
            }
            content.update(digest.as_bytes());
            content.update(b"\0");
        }
        let digits = |context: Context| context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        Self { names: digits(names), content: digits(content) }
    }
}

/// The newest checksums of servers that are divided alike, by the digest of their tensors' names.
#[derive(Debug, Default)]
pub(crate) struct FleetSums(Mutex<HashMap<String, (String, String)>>);

impl FleetSums {
    /// Compares a server's checksums for the version with `label` with those of others; false when they differ.
    pub(crate) fn agree(&self, label: &str, sums: &Sums) -> bool {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match known.get(&sums.names) {
            Some((version, content)) if version == label => *content == sums.content,
            _ => {
                known.insert(sums.names.clone(), (label.to_owned(), sums.content.clone()));
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_that_are_divided_alike_must_agree() {
        let sums = |content: &str| Sums { names: "n".into(), content: content.into() };
        let fleet = FleetSums::default();
        assert!(fleet.agree("v1", &sums("a")) && fleet.agree("v1", &sums("a")));
        assert!(!fleet.agree("v1", &sums("b")));
        assert!(fleet.agree("v2", &sums("b")));
        assert!(fleet.agree("v2", &Sums { names: "other".into(), content: "c".into() }));
        let of = |digest: &str| Sums::of(&[("w".to_owned(), digest.to_owned())].into());
        assert_eq!(of("1").names, of("2").names);
        assert_ne!(of("1").content, of("2").content);
    }
}
