use std::sync::OnceLock;

use tracing::Level;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::reload::Handle;

use crate::HarmlessLines;

/// Format of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// One readable line per event.
    #[default]
    Human,
    /// One JSON object per event.
    Json,
}

/// Replaces the process's log filter; set once logging is initialized.
static RELOAD: OnceLock<Box<dyn Fn(EnvFilter) -> bool + Send + Sync>> = OnceLock::new();

/// Sends log events to standard error; `PACS_LOG` filters them (default `info`, syntax of `tracing`'s `EnvFilter`).
pub fn init_logging(format: LogFormat) {
    let filter = EnvFilter::try_from_env("PACS_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(HarmlessLines(std::io::stderr))
        .with_target(false)
        // An internal error is reported on standard error, which panics if that is a file on the same full disk.
        .log_internal_errors(false);
    // In tests, a second initialisation keeps the first.
    match format {
        LogFormat::Human => {
            let builder = builder.with_ansi(false).with_filter_reloading();
            let handle = builder.reload_handle();
            if builder.try_init().is_ok() {
                keep(handle);
            }
        }
        LogFormat::Json => {
            let builder = builder.json().with_filter_reloading();
            let handle = builder.reload_handle();
            if builder.try_init().is_ok() {
                keep(handle);
            }
        }
    }
}

fn keep<S: 'static>(handle: Handle<EnvFilter, S>) {
    let _ = RELOAD.set(Box::new(move |filter| handle.reload(filter).is_ok()));
}

/// Replaces the log filter by this level. Returns whether the process has a log whose filter can be replaced.
pub fn set_log_level(level: Level) -> bool {
    RELOAD.get().is_some_and(|reload| reload(EnvFilter::new(level.as_str().to_ascii_lowercase())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_level_of_a_running_process_can_be_changed() {
        init_logging(LogFormat::Human);
        for (level, debug) in [(Level::DEBUG, true), (Level::WARN, false), (Level::TRACE, true)] {
            assert!(set_log_level(level));
            assert_eq!(tracing::enabled!(Level::DEBUG), debug, "{level}");
        }
    }
}
