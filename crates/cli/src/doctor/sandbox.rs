//! The sandbox of programs: which of its layers hold on this machine.

use std::path::PathBuf;

use anyhow::Context;
use pacs_sandbox::{Entry, Layer, Policy, Sandbox};
use pacs_spec::{JobSpec, JudgeKind, RewardVerifierSpec};
use pacs_verifier::SANDBOX_COMMAND;

use super::Finding;
use crate::failure::Failure;
use crate::format::plural;

const CHECK: &str = "sandbox";

/// What a job needs of a sandbox.
struct Needed {
    python: PathBuf,
    allow_missing: Vec<String>,
    /// Table of the verifier that says so.
    table: &'static str,
}

/// Starts a sandbox and asks it what holds. Only a job that runs something in one fails by what does not.
pub(super) fn look(spec: Option<&JobSpec>) -> Result<Finding, Failure> {
    let needed = spec.and_then(needed);
    let python = needed.as_ref().map_or_else(|| Policy::default().python, |needed| needed.python.clone());
    let policy = Policy { python, ..Policy::default() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("start the runtime").map_err(Failure::bug)?;
    let sandbox = runtime.block_on(Sandbox::probe(&Entry::own(&[SANDBOX_COMMAND]), &policy));
    let missing: Vec<(Layer, String)> = match sandbox {
        Ok(sandbox) => sandbox.layers().missing().map(|(layer, why)| (layer, why.to_owned())).collect(),
        Err(error) => {
            let advice = "programs (verifier `code`) cannot be run here";
            return Ok(if needed.is_some() {
                Finding::failure(CHECK, error.to_string(), advice)
            } else {
                Finding::warning(CHECK, error.to_string(), advice)
            });
        }
    };
    Ok(finding(&missing, needed.as_ref()))
}

/// What the job says of its sandbox, if it has one: that of programs, or else that of a verifier program.
fn needed(spec: &JobSpec) -> Option<Needed> {
    let named = spec.named_verifiers().into_iter().map(|(_, verifier)| verifier.judge());
    let sets = spec.all_evaluation_sets().filter_map(|set| Some(set.verifier?.judge()));
    let rewards = spec.reward.verifiers.values().map(RewardVerifierSpec::judge);
    let judges: Vec<_> = std::iter::once(spec.verifier.judge()).chain(named).chain(sets).chain(rewards).collect();
    let of_code = judges.iter().find_map(|judge| match &judge.by {
        JudgeKind::Code(code) => {
            Some(Needed { python: code.python.clone(), allow_missing: code.allow_missing.clone(), table: "code" })
        }
        _ => None,
    });
    let of_exec = || {
        judges.iter().find_map(|judge| match &judge.by {
            JudgeKind::Exec(exec) => exec.sandbox.as_ref(),
            _ => None,
        })
    };
    of_code.or_else(|| {
        of_exec().map(|sandbox| Needed {
            python: Policy::default().python,
            // It never has a control group.
            allow_missing: sandbox.allow_missing.iter().cloned().chain([Layer::Cgroup.name().to_owned()]).collect(),
            table: "sandbox",
        })
    })
}

fn finding(missing: &[(Layer, String)], needed: Option<&Needed>) -> Finding {
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
        |layer: &Layer| needed.is_some_and(|needed| needed.allow_missing.iter().any(|name| name == layer.name()));
    let refused: Vec<&(Layer, String)> = missing.iter().filter(|(layer, _)| !is_allowed(layer)).collect();
    let table = needed.map_or("code", |needed| needed.table);
    let advice = format!(
        "to run programs without, list {} in `allow_missing` of the verifier's table `{table}`",
        names(&refused)
    );
    match (needed, refused.is_empty()) {
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
        let needed = |allow_missing: &[String]| Needed {
            python: "python3".into(),
            allow_missing: allow_missing.to_vec(),
            table: "code",
        };
        let refused = finding(&missing, Some(&needed(&[])));
        assert_eq!(refused.level, Level::Failure);
        assert!(refused.found.starts_with("11 layers hold; `cgroup` is missing (no controller)"), "{}", refused.found);
        assert!(refused.advice.contains("list \"cgroup\" in `allow_missing`"), "{}", refused.advice);
        assert_eq!(finding(&missing, Some(&needed(&["cgroup".to_owned()]))).level, Level::Warning);
    }

    #[test]
    fn a_verifier_program_in_a_sandbox_needs_its_layers() {
        let job = |verifier: &str| {
            let text = format!(
                "name = 'a'\nmodel.path = 'm'\ndata.train.path = 't.jsonl'\ndata.evaluation.path = 'e.jsonl'\n\
                 verifier = {{ kind = 'exec', command = ['v'] {verifier} }}"
            );
            pacs_spec::parse(&text, std::path::Path::new("test")).map_err(|errors| errors.to_string()).unwrap()
        };
        assert!(needed(&job("")).is_none());
        let of_exec = needed(&job(", sandbox.allow_missing = ['landlock']")).unwrap();
        assert_eq!(
            (of_exec.table, of_exec.allow_missing.as_slice()),
            ("sandbox", ["landlock", "cgroup"].map(String::from).as_slice())
        );
    }
}
