//! Models of the Hugging Face hub for the commands that compute with one. Workers of a run never come here: they use what their
//! coordinator has fetched.

use std::io::Write;
use std::path::{Path, PathBuf};

use pacs_hub::{Meter, Part, Pins, Progress, Resolver};
use pacs_runtime::{Exit, harmless_lines};

use crate::Failure;

/// The folder of a model: the path itself, or what the hub has by that name.
pub(crate) fn model(path: &Path) -> Result<PathBuf, Failure> {
    let mut meter = Meter::new("fetching");
    // A standard error that cannot be written to is no reason to end.
    let tell = |text: &str| drop(writeln!(std::io::stderr(), "{}", harmless_lines(text)));
    let mut say = |text: &str| tell(text);
    let mut report = |progress: &Progress| {
        if let Some(line) = meter.line(progress) {
            tell(&line);
        }
    };
    let found = Resolver::new(Pins::default(), &mut say, &mut report).model(path, Part::Whole);
    found.map_err(|error| {
        let exit = if error.is_transient() { Exit::Again } else { Exit::Config };
        let hint = error.hint().map(|hint| format!("\nhint: {hint}")).unwrap_or_default();
        Failure { exit, error: anyhow::anyhow!("find model `{}`: {error}{hint}", path.display()) }
    })
}
