use std::time::Duration;

use crate::Layer;

/// Why a sandbox has no result for a program. Never the program's fault.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// Layers do not hold, and the policy does not allow that.
    #[error("{}; to run without, list {} in `allow_missing`", reasons(.0), names(.0))]
    Missing(Vec<(Layer, String)>),
    /// The process that isolates itself cannot be started, or does not say that it is ready.
    #[error("start the sandbox: {0}")]
    Start(String),
    /// The sandbox ended in the middle of a job.
    #[error("the sandbox ended in the middle of a job: {0}")]
    Ended(String),
    /// The sandbox answered with something that is no answer, or says that it failed.
    #[error("the sandbox failed: {0}")]
    Failed(String),
    /// The sandbox does not answer, long after the program should have been killed.
    #[error("no answer from the sandbox within {} s", .0.as_secs_f64())]
    Late(Duration),
}

fn reasons(missing: &[(Layer, String)]) -> String {
    let reasons: Vec<String> =
        missing.iter().map(|(layer, why)| format!("the layer `{layer}` does not hold here ({why})")).collect();
    reasons.join(", ")
}

fn names(missing: &[(Layer, String)]) -> String {
    let names: Vec<String> = missing.iter().map(|(layer, _)| format!("\"{layer}\"")).collect();
    names.join(", ")
}
