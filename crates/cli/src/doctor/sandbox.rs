//! The sandbox of programs: which of its layers hold on this machine.

use anyhow::Context;
use pacs_sandbox::{Entry, Layer, Policy, Sandbox};
use pacs_spec::{CodeSpec, JobSpec, JudgeKind};
use pacs_verifier::SANDBOX_COMMAND;

use super::Finding;
use crate::failure::Failure;
use crate::format::plural;

const CHECK: &str = "sandbox";

/// Starts a sandbox and asks it what holds. Only a job that runs programs fails by what does not.
pub(super) fn look(spec: Option<&JobSpec>) -> Result<Finding, Failure> {
    let code = spec.and_then(needed);
    let python = code.as_ref().map_or_else(|| Policy::default().python, |code| code.python.clone());
    let policy = Policy { python, ..Policy::default() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("start the runtime").map_err(Failure::bug)?;
    let sandbox = runtime.block_on(Sandbox::probe(&Entry::own(&[SANDBOX_COMMAND]), &policy));
    let missing: Vec<(Layer, String)> = match sandbox {
        Ok(sandbox) => sandbox.layers().missing().map(|(layer, why)| (layer, why.to_owned())).collect(),
        Err(error) => {
            let advice = "programs (verifier `code`) cannot be run here";
            return Ok(if code.is_some() {
                Finding::failure(CHECK, error.to_string(), advice)
            } else {
                Finding::warning(CHECK, error.to_string(), advice)
            });
        }
    };
    Ok(finding(&missing, code.as_ref()))
}

/// What the job says of its sandbox, if it runs programs.
fn needed(spec: &JobSpec) -> Option<CodeSpec> {
    let named = spec.named_verifiers().into_iter().map(|(_, verifier)| verifier);
    let sets = spec.all_evaluation_sets().filter_map(|set| set.verifier);
    let verifiers = std::iter::once(spec.verifier.clone()).chain(named).chain(sets);
    verifiers.into_iter().find_map(|verifier| match verifier.judge().by {
        JudgeKind::Code(code) => Some(code),
        _ => None,
    })
}

fn finding(missing: &[(Layer, String)], code: Option<&CodeSpec>) -> Finding {
    if missing.is_empty() {
        let layers: Vec<&str> = Layer::ALL.iter().map(|layer| layer.name()).collect();
        return Finding::ok(CHECK, format!("all layers hold: {}", layers.join(", ")));
    }
    let held = plural((Layer::ALL.len() - missing.len()) as u64, "layer holds", "layers hold");
    let reasons: Vec<String> = missing.iter().map(|(layer, why)| format!("`{layer}` is missing ({why})")).collect();
    let found = format!("{held}; {}", reasons.join("; "));
    let names = |layers: &[&(Layer, String)]| {
        layers.iter().map(|(layer, _)| format!("\"{layer}\"")).collect::<Vec<_>>().join(", ")
    };
    let is_allowed =
        |layer: &Layer| code.is_some_and(|code| code.allow_missing.iter().any(|name| name == layer.name()));
    let refused: Vec<&(Layer, String)> = missing.iter().filter(|(layer, _)| !is_allowed(layer)).collect();
    let advice =
        format!("to run programs without, list {} in `allow_missing` of the verifier's table `code`", names(&refused));
    match (code, refused.is_empty()) {
        (Some(_), true) => {
            Finding::warning(CHECK, found, "the job allows that; docs/VERIFIERS.md says what each layer stops")
        }
        (Some(_), false) => Finding::failure(CHECK, found, advice),
        (None, _) => Finding::warning(CHECK, found, advice),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    #[test]
    fn a_job_fails_by_what_it_does_not_allow_to_miss() {
        let missing = [(Layer::Cgroup, "no controller".to_owned())];
        assert_eq!(finding(&[], None).level, Level::Ok);
        assert_eq!(finding(&missing, None).level, Level::Warning);
        let refused = finding(&missing, Some(&CodeSpec::default()));
        assert_eq!(refused.level, Level::Failure);
        assert!(refused.found.starts_with("11 layers hold; `cgroup` is missing (no controller)"), "{}", refused.found);
        assert!(refused.advice.contains("list \"cgroup\" in `allow_missing`"), "{}", refused.advice);
        let allowing = CodeSpec { allow_missing: vec!["cgroup".into()], ..CodeSpec::default() };
        assert_eq!(finding(&missing, Some(&allowing)).level, Level::Warning);
    }
}
