//! `pacs data check`: reads every problem of a job or of files and reports rows that a run could not or should not use.

mod solutions;

use std::fmt::Write;
use std::path::Path;

use anyhow::anyhow;
use pacs_data::{Findings, SourceCheck};
use pacs_hub::Part;
use pacs_runtime::Exit;
use pacs_spec::{CodeSpec, JobSpec, SourceSpec, VerifierKind};
use serde_json::{Value, json};

use crate::arguments::DataCheck;
use crate::failure::Failure;
use crate::format::{count, plural};
use crate::hub;
use crate::output;

pub(crate) fn check(arguments: &DataCheck) -> Result<Exit, Failure> {
    let (mut spec, wants_prompts) = if arguments.target.extension().is_some_and(|extension| extension == "toml") {
        of_job(arguments)?
    } else {
        of_files(arguments)?
    };
    hub::session(None, |hub| match wants_prompts {
        // A job's model may be somewhere else; one of the command line is there.
        false => hub.job_if_reachable(&mut spec, Part::Texts),
        true => hub.job(&mut spec, Part::Texts),
    })?;
    let with_prompts = wants_prompts || (spec.model.path != Path::new(".") && spec.model.path.exists());
    let mut found =
        pacs_data::check(&spec, with_prompts).map_err(|error| Failure::config(error).doing("check the problems"))?;
    solutions::run_all(&spec, &mut found)?;
    if arguments.json {
        output::json(format_args!("{:#}", as_json(&found)));
    } else {
        output::text(as_text(&spec, &found));
    }
    let problems = problems(&found);
    if problems.is_empty() {
        return Ok(Exit::Done);
    }
    Err(Failure::config(anyhow!("{}", problems.join("; "))).doing("accept the problems"))
}

/// Reads a job spec; the flag says whether prompts have to be tokenized and counted. They are when the spec's model exists.
fn of_job(arguments: &DataCheck) -> Result<(JobSpec, bool), Failure> {
    let of_files = [
        ("--evaluation", arguments.evaluation.is_some()),
        ("--question-field", arguments.question_field.is_some()),
        ("--answer-field", arguments.answer_field.is_some()),
        ("--any-answer", arguments.any_answer),
        ("--code", arguments.code),
    ];
    if let Some((option, _)) = of_files.iter().find(|(_, given)| *given) {
        let error = anyhow!("{option} is for a file of problems; a job spec has a key for it");
        return Err(Failure::with_exit(Exit::Usage, error).doing("read the command line"));
    }
    let mut spec =
        pacs_spec::read(&arguments.target).map_err(|errors| Failure::config(errors).doing("read the job"))?;
    if let Some(model) = &arguments.model {
        spec.model.path.clone_from(model);
    }
    Ok((spec, arguments.model.is_some()))
}

/// Makes a job spec from the files of the command line.
fn of_files(arguments: &DataCheck) -> Result<(JobSpec, bool), Failure> {
    let source = |path: &Path| SourceSpec {
        path: Some(path.to_owned()),
        question_field: arguments.question_field.clone().unwrap_or_else(|| SourceSpec::default().question_field),
        answer_field: arguments.answer_field.clone().unwrap_or_else(|| SourceSpec::default().answer_field),
        ..SourceSpec::default()
    };
    const OTHERWISE: &str = "name = 'check'\nmodel.path = '.'\ndata.train.path = 'x.jsonl'\n\
                             evaluation = { before = false, after = false, every_steps = 0 }\n";
    let mut spec = pacs_spec::parse(OTHERWISE, Path::new("")).expect("a valid job");
    spec.data.train = source(&arguments.target);
    spec.data.evaluation = arguments.evaluation.as_deref().map(source);
    // A bare file has no token limits, so prompts are measured without a suffix and without room for answers.
    spec.data.prompt_suffix = String::new();
    spec.data.max_prompt_tokens = 1_000_000;
    spec.rollout.max_new_tokens = 1;
    if let Some(model) = &arguments.model {
        spec.model.path.clone_from(model);
    }
    let origin = Path::new("the command line");
    spec.validate(origin).map_err(|errors| Failure::config(errors).doing("read the command line"))?;
    if arguments.any_answer {
        // `--any-answer`: references are opaque, so pick a verifier that is not `math` and does not parse them.
        spec.verifier.kind = VerifierKind::Exec;
    }
    if arguments.code {
        spec.verifier.kind = VerifierKind::Code;
        spec.verifier.code = Some(CodeSpec { allow_missing: arguments.allow_missing.clone(), ..CodeSpec::default() });
    }
    Ok((spec, arguments.model.is_some()))
}

/// Lists the findings for which a run should not be started.
fn problems(found: &pacs_data::DataCheck) -> Vec<String> {
    let mut problems = Vec::new();
    for (name, source) in sources(found) {
        let kinds = [
            (&source.bad_rows, "that cannot be read"),
            (&source.unreadable_answers, "with an unreadable answer"),
            (&source.failing_solutions, "whose reference solution fails"),
        ];
        if source.rows == 0 {
            problems.push(format!("no row in {name}"));
        }
        for (findings, what) in kinds.into_iter().filter(|(findings, _)| findings.count > 0) {
            problems.push(format!("{} {what} in {name}", plural(findings.count as u64, "row", "rows")));
        }
    }
    if found.overlap.count > 0 {
        let questions = plural(found.overlap.count as u64, "question is", "questions are");
        problems.push(format!("{questions} both trained on and evaluated with"));
    }
    problems
}

fn sources(found: &pacs_data::DataCheck) -> impl Iterator<Item = (String, &SourceCheck)> {
    let evaluation = found.evaluation.as_ref().map(|source| ("data.evaluation".to_owned(), source));
    let sets = found.sets.iter().map(|(name, source)| (format!("evaluation.sets.{name}"), source));
    std::iter::once(("data.train".to_owned(), &found.train)).chain(evaluation).chain(sets)
}

fn as_text(job: &JobSpec, found: &pacs_data::DataCheck) -> String {
    let mut text = String::new();
    let specs = std::iter::once(job.data.train.clone()).chain(job.all_evaluation_sets().map(|set| set.source));
    for ((name, source), spec) in sources(found).zip(specs) {
        let from = match (&spec.path, &spec.generator) {
            (Some(path), _) => path.display().to_string(),
            (None, _) => "generated".to_owned(),
        };
        let mixed = if name == "data.train" { job.data.mix.len() as u64 } else { 0 };
        let more = if mixed > 0 { format!(" and {} of data.mix", plural(mixed, "set", "sets")) } else { String::new() };
        let _ = writeln!(text, "{name}  {from}{more}: {}", plural(source.rows as u64, "row", "rows"));
        for fields in &source.fields {
            let _ = writeln!(text, "  {fields}");
        }
        findings(&mut text, "rows that cannot be read", &source.bad_rows);
        findings(&mut text, "answers that the verifier cannot read", &source.unreadable_answers);
        findings(&mut text, "answers that may be read otherwise than they were meant", &source.lenient_answers);
        for proposal in &source.proposals {
            let _ = writeln!(text, "    {proposal}");
        }
        if !source.solutions.is_empty() {
            let passed = source.solutions.len() - source.failing_solutions.count;
            let solutions = plural(source.solutions.len() as u64, "reference solution", "reference solutions");
            let _ = writeln!(text, "  {} of {solutions} pass their own cases", count(passed as u64));
        }
        findings(&mut text, "reference solutions that fail", &source.failing_solutions);
        findings(&mut text, "questions that stood there before", &source.duplicates);
        findings(&mut text, "rows with control tokens of the model, which are read as text", &source.control_tokens);
        if let Some(prompts) = source.prompts {
            let _ = writeln!(
                text,
                "  prompts: {} to {} tokens, median {}, 99 % up to {}; {} of more than {} tokens",
                count(prompts.shortest as u64),
                count(prompts.longest as u64),
                count(prompts.median as u64),
                count(prompts.p99 as u64),
                count(prompts.overlong as u64),
                count(prompts.limit as u64),
            );
        }
    }
    findings(&mut text, "questions of the evaluation that are trained on", &found.overlap);
    text
}

fn findings(text: &mut String, what: &str, findings: &Findings) {
    if findings.count == 0 {
        return;
    }
    let _ = writeln!(text, "  {}: {}", what, count(findings.count as u64));
    for finding in &findings.first {
        let _ = writeln!(text, "    {finding}");
    }
    if findings.count > findings.first.len() {
        let _ = writeln!(text, "    and {} more", count((findings.count - findings.first.len()) as u64));
    }
}

fn as_json(found: &pacs_data::DataCheck) -> Value {
    let findings = |findings: &Findings| json!({ "count": findings.count, "first": findings.first });
    let source = |source: &SourceCheck| {
        json!({
            "rows": source.rows,
            "fields": source.fields,
            "control_tokens": findings(&source.control_tokens),
            "bad_rows": findings(&source.bad_rows),
            "unreadable_answers": findings(&source.unreadable_answers),
            "lenient_answers": findings(&source.lenient_answers),
            "proposals": source.proposals,
            "solutions": source.solutions.len(),
            "failing_solutions": findings(&source.failing_solutions),
            "duplicates": findings(&source.duplicates),
            "prompt_tokens": source.prompts.map(|prompts| json!({
                "shortest": prompts.shortest,
                "median": prompts.median,
                "p99": prompts.p99,
                "longest": prompts.longest,
                "limit": prompts.limit,
                "overlong": prompts.overlong,
            })),
        })
    };
    json!({
        "train": source(&found.train),
        "evaluation": found.evaluation.as_ref().map(source),
        "sets": found.sets.iter().map(|(name, found)| (name.clone(), source(found))).collect::<serde_json::Map<_, _>>(),
        "overlap": findings(&found.overlap),
        "problems": problems(found),
    })
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    fn found() -> pacs_data::DataCheck {
        let findings = |count, first: &[&str]| Findings { count, first: first.iter().map(|s| s.to_string()).collect() };
        pacs_data::DataCheck {
            train: SourceCheck {
                rows: 7473,
                bad_rows: findings(1, &["t.jsonl:17: not a JSON object"]),
                lenient_answers: findings(2, &["t.jsonl:9: `5 km` has letters that are a unit or variables"]),
                proposals: vec!["letters that are a unit or variables (2): write the unit as `\\text{…}`".into()],
                duplicates: findings(3, &["t.jsonl:5: the question of t.jsonl:2"]),
                prompts: Some(pacs_data::PromptLengths {
                    shortest: 20,
                    median: 60,
                    p99: 170,
                    longest: 1300,
                    limit: 1024,
                    overlong: 1,
                }),
                ..SourceCheck::default()
            },
            evaluation: Some(SourceCheck { rows: 200, ..SourceCheck::default() }),
            sets: Vec::new(),
            overlap: findings(1, &["e.jsonl:4: the question of t.jsonl:9"]),
        }
    }

    #[test]
    fn the_text_names_what_was_found() {
        let text = "name = 'a'\nmodel.path = 'm'\ndata.train.path = 't.jsonl'\ndata.evaluation.path = 'e.jsonl'";
        let spec = pacs_spec::parse(text, Path::new("job.toml")).expect("valid");
        expect![[r#"
            data.train  t.jsonl: 7 473 rows
              rows that cannot be read: 1
                t.jsonl:17: not a JSON object
              answers that may be read otherwise than they were meant: 2
                t.jsonl:9: `5 km` has letters that are a unit or variables
                and 1 more
                letters that are a unit or variables (2): write the unit as `\text{…}`
              questions that stood there before: 3
                t.jsonl:5: the question of t.jsonl:2
                and 2 more
              prompts: 20 to 1 300 tokens, median 60, 99 % up to 170; 1 of more than 1 024 tokens
            data.evaluation  e.jsonl: 200 rows
              questions of the evaluation that are trained on: 1
                e.jsonl:4: the question of t.jsonl:9
        "#]]
        .assert_eq(&as_text(&spec, &found()));
        let json = as_json(&found());
        assert_eq!((&json["train"]["prompt_tokens"]["p99"], &json["overlap"]["count"]), (&json!(170), &json!(1)));
        assert_eq!(json["evaluation"]["prompt_tokens"], Value::Null);
    }

    #[test]
    fn what_a_run_should_not_be_started_with_is_a_problem() {
        expect![[r#"
            1 row that cannot be read in data.train
            1 question is both trained on and evaluated with"#]]
        .assert_eq(&problems(&found()).join("\n"));
        let mut clean = found();
        (clean.train.bad_rows, clean.overlap) = (Findings::default(), Findings::default());
        assert!(problems(&clean).is_empty(), "repeated questions, lenient readings and long prompts are no error");
        clean.train = SourceCheck::default();
        assert_eq!(problems(&clean), ["no row in data.train"], "a run refuses it, too");
    }
}
