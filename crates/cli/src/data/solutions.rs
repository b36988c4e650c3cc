//! Runs the reference solutions of programs on their own cases: a row whose solution fails teaches that right programs are wrong.

use std::sync::Arc;

use anyhow::Context;
use pacs_data::{DataCheck, Solution, SourceCheck};
use pacs_spec::{JobSpec, VerifierSpec};
use pacs_types::Outcome;
use pacs_verifier::{Judge, Task};
use tokio::task::JoinSet;

use crate::failure::Failure;
use crate::verifier::{guard, threads};

/// Fills in which solutions fail.
pub(super) fn run_all(spec: &JobSpec, found: &mut DataCheck) -> Result<(), Failure> {
    let none = |source: &SourceCheck| source.solutions.is_empty();
    if none(&found.train) && found.evaluation.iter().chain(found.sets.iter().map(|(_, set)| set)).all(none) {
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.context("start the runtime").map_err(Failure::bug)?;
    runtime.block_on(async {
        run(spec, &spec.verifier_of(&spec.data.train), &mut found.train).await?;
        let own: Vec<_> = spec.all_evaluation_sets().map(|set| (set.name, set.verifier)).collect();
        let of = |name: Option<&str>| {
            let set = own.iter().find(|(known, _)| known.as_deref() == name);
            set.and_then(|(_, verifier)| verifier.clone()).unwrap_or_else(|| spec.verifier.clone())
        };
        if let Some(evaluation) = &mut found.evaluation {
            run(spec, &of(None), evaluation).await?;
        }
        for (name, source) in &mut found.sets {
            run(spec, &of(Some(name)), source).await?;
        }
        Ok(())
    })
}

/// Runs the solutions of one source, each by the verifier that its row names, or else by that of the source.
async fn run(spec: &JobSpec, verifier: &VerifierSpec, source: &mut SourceCheck) -> Result<(), Failure> {
    let mut judges: Vec<(Option<String>, Arc<Judge>)> = Vec::new();
    let most = threads(0);
    // Bounded by the threads; the results keep the order of the rows.
    let mut running: JoinSet<(usize, Result<(), String>)> = JoinSet::new();
    let mut failed: Vec<(usize, String)> = Vec::new();
    let mut take = |done: (usize, Result<(), String>)| failed.extend(done.1.err().map(|why| (done.0, why)));
    for (index, solution) in source.solutions.iter().enumerate() {
        let Solution { verifier: name, answer, response, .. } = solution;
        let known = judges.iter().find(|(known, _)| known == name);
        let judge = match known {
            Some((_, judge)) => Arc::clone(judge),
            None => {
                let named = name.as_deref().and_then(|name| spec.verifier_named(name));
                let judge = judge(&named.unwrap_or_else(|| verifier.clone()), most).await?;
                judges.push((name.clone(), Arc::clone(&judge)));
                judge
            }
        };
        let task = Arc::new(Task { question: String::new(), response: response.clone(), gold: answer.clone() });
        running.spawn(async move {
            let verdict = judge.verify(task).await.verdict;
            let right = verdict.outcome == Outcome::Correct;
            (index, if right { Ok(()) } else { Err(verdict.rule) })
        });
        while running.len() >= most
            && let Some(done) = running.join_next().await
        {
            take(done.context("run a reference solution").map_err(Failure::bug)?);
        }
    }
    while let Some(done) = running.join_next().await {
        take(done.context("run a reference solution").map_err(Failure::bug)?);
    }
    failed.sort_unstable();
    for (index, why) in failed {
        let place = source.solutions[index].place.clone();
        source.failing_solutions.add(|| format!("{place}: {why}"));
    }
    Ok(())
}

async fn judge(verifier: &VerifierSpec, most: usize) -> Result<Arc<Judge>, Failure> {
    let failure =
        |error: pacs_verifier::VerifierError| Failure::with_exit(error.exit(), error).doing("run reference solutions");
    let judge = Judge::new(&verifier.judge(), Some(&guard()), most, 0).map_err(failure)?;
    judge.prepare().await.map_err(failure)?;
    Ok(Arc::new(judge))
}
