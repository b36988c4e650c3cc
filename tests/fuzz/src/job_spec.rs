//! Texts of job specs, refused or written down again as the same spec.
#![allow(unreachable_pub, reason = "the fuzzer's crate and tests include this file")]

use std::path::Path;

const SPECS: [&str; 2] =
    [include_str!("../../../deploy/jobs/demo.toml"), "name = 'x'\nmodel.path = 'm'\ndata.train.path = 'a.jsonl'\n"];

pub fn examples() -> Vec<Vec<u8>> {
    SPECS.map(|text| text.as_bytes().to_vec()).to_vec()
}

/// A text is refused with a reason, or is a spec that is written down as the same spec.
pub fn check(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    match pacs_spec::parse(&text, Path::new("job.toml")) {
        Ok(spec) => {
            let written = spec.resolved_toml();
            let again = pacs_spec::parse(&written, Path::new("resolved.toml"));
            let again = again.unwrap_or_else(|errors| panic!("a resolved spec is refused: {errors}\n{written}"));
            assert_eq!(again.resolved_toml(), written);
        }
        Err(errors) => assert!(!errors.to_string().is_empty()),
    }
}
