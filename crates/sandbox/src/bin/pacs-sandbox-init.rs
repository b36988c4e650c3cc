//! What the tests and benchmarks of this crate start sandboxes with; `pacs sandbox-init` is the same in the shipped program.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    pacs_sandbox::run_init(&std::env::args().nth(1).unwrap_or_default())
}
