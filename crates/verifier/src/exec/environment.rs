//! What a verifier program knows of the environment of the worker that starts it.
//!
//! Workers hold tokens, addresses and places of keys in theirs, and a program that judges what a model wrote has no use for them. So
//! names are allowed, not forbidden: what must stay secret cannot be listed.

use std::ffi::{OsStr, OsString};

/// What programs, interpreters and their libraries need to run at all. `docs/VERIFIERS.md` repeats the list.
const ALLOWED: [&str; 22] = [
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "SHELL",
    "LANG",
    "LANGUAGE",
    "LC_*",
    "TZ",
    "TERM",
    "TMPDIR",
    "TMP",
    "TEMP",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "PYTHONHOME",
    "PYTHONUNBUFFERED",
    "VIRTUAL_ENV",
    "CONDA_PREFIX",
    "JAVA_HOME",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
];

/// Those variables that are always allowed, and those that `more` names: a name, or the beginning of names with `*` at its end.
pub(super) fn of(
    more: &[String],
    variables: impl Iterator<Item = (OsString, OsString)>,
) -> impl Iterator<Item = (OsString, OsString)> {
    variables.filter(move |(name, _)| {
        let fits = |allowed: &str| match allowed.strip_suffix('*') {
            Some(beginning) => name.as_encoded_bytes().starts_with(beginning.as_bytes()),
            None => name == OsStr::new(allowed),
        };
        ALLOWED.into_iter().any(fits) || more.iter().map(String::as_str).any(fits)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_allowed_is_told() {
        let variables =
            ["PATH", "LC_ALL", "LC", "PACS_TLS_DIR", "PACS_RUN_ID", "AWS_SECRET", "HF_TOKEN", "HF_HOME", "PATHS"];
        let told = |more: &[&str]| {
            let more: Vec<String> = more.iter().map(|name| (*name).to_owned()).collect();
            let variables = variables.iter().map(|name| (OsString::from(name), OsString::from("x")));
            of(&more, variables).map(|(name, _)| name.into_string().unwrap()).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(told(&[]), "PATH LC_ALL");
        assert_eq!(told(&["HF_*", "AWS_SECRET"]), "PATH LC_ALL AWS_SECRET HF_TOKEN HF_HOME");
    }

    #[test]
    fn the_documentation_has_the_list() {
        let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/VERIFIERS.md")).unwrap();
        for name in ALLOWED {
            assert!(page.contains(&format!("`{name}`")), "{name}");
        }
    }
}
