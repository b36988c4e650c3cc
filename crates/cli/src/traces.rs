//! Traces for OpenTelemetry, where its variables ask for them.

use pacs_coordinator::{Coordinator, TraceExport};

use crate::failure::Failure;

/// Begins to send traces of the run, if an endpoint is set.
pub(crate) fn export(coordinator: &Coordinator) -> Result<(), Failure> {
    let export = TraceExport::from_variables(|name| std::env::var(name).ok());
    let export = export.map_err(|error| Failure::config(error).doing("export traces"))?;
    if let Some(export) = export {
        tracing::info!(endpoint = export.endpoint(), "sending traces of steps and evaluations");
        coordinator.observer().export_traces(export);
    }
    Ok(())
}
