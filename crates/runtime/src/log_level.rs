use pacs_protocol::v1;

use crate::set_log_level;

/// Applies the log level that an operator has set, as received with a heartbeat; unspecified changes nothing.
pub(crate) fn apply_log_level(level: v1::LogLevel) {
    let level = match level {
        v1::LogLevel::Unspecified => return,
        v1::LogLevel::Error => tracing::Level::ERROR,
        v1::LogLevel::Warn => tracing::Level::WARN,
        v1::LogLevel::Info => tracing::Level::INFO,
        v1::LogLevel::Debug => tracing::Level::DEBUG,
        v1::LogLevel::Trace => tracing::Level::TRACE,
    };
    tracing::info!(%level, "an operator has set the log level");
    set_log_level(level);
}
