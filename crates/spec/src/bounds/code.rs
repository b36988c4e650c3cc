//! Bounds of the tables `code` of verifiers.

use std::path::PathBuf;

use super::Check;
use crate::code::SANDBOX_LAYERS;
use crate::{CodeSpec, ExecSandboxSpec, Problem, VerifierKind};

impl Check {
    /// The table `code` of the verifier at `path`.
    pub(super) fn code(&mut self, path: &str, kind: VerifierKind, code: Option<&CodeSpec>) {
        let Some(code) = code else { return };
        let path = format!("{path}.code");
        let at = |key: &str| format!("{path}.{key}");
        if kind != VerifierKind::Code {
            let message = format!("applies to kind `code` only, not to `{}`", kind.name());
            return self.fail(Problem::new(&path, message), &[]);
        }
        let python = code.python.display().to_string();
        self.text(&at("python"), &python, !python.is_empty(), "expected the name or path of an interpreter");
        for (key, paths, most) in [("libraries", &code.libraries, 16), ("paths", &code.paths, 64)] {
            let fits = paths.len() <= most && paths.iter().all(|path: &PathBuf| path.is_absolute());
            self.that(fits, &at(key), format!("{paths:?}"), format!("expected at most {most} absolute paths"), &[]);
        }
        for (key, command) in [("command", &code.command), ("compile", &code.compile)] {
            let fits = command.len() <= 64 && command.first().is_none_or(|program| program.starts_with('/'));
            let message = "expected at most 64 strings, of which the first is an absolute path";
            self.that(fits, &at(key), format!("{command:?}"), message, &[]);
        }
        let is_name = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
        let plain = !code.file.is_empty() && !code.file.starts_with('.') && code.file.chars().all(is_name);
        self.text(&at("file"), &code.file, plain, "expected a name of letters, digits, `.`, `-` and `_`");
        if code.command.is_empty() {
            let usual = CodeSpec::default();
            for (key, given) in [("compile", !code.compile.is_empty()), ("file", code.file != usual.file)] {
                let message = "has no effect: without `command` programs are Python";
                self.that(!given, &at(key), "set", message, &[]);
            }
        }
        self.range(&at("float_tolerance"), code.float_tolerance, 0.0..=1.0);
        self.above_zero(&at("case_seconds"), code.case_seconds, 3600.0);
        self.range(&at("memory_mib"), code.memory_mib, 64..=1 << 20);
        self.range(&at("output_kib"), code.output_kib, 1..=65_536);
        self.range(&at("scratch_mib"), code.scratch_mib, 1..=65_536);
        self.range(&at("processes"), code.processes, 1..=1024);
        self.range(&at("max_cases"), code.max_cases, 1..=10_000);
        self.layers(&at("allow_missing"), &code.allow_missing, &SANDBOX_LAYERS);
    }

    /// The table `sandbox` of the verifier at `path`.
    pub(super) fn exec_sandbox(&mut self, path: &str, kind: VerifierKind, sandbox: Option<&ExecSandboxSpec>) {
        let Some(sandbox) = sandbox else { return };
        let path = format!("{path}.sandbox");
        let at = |key: &str| format!("{path}.{key}");
        if kind != VerifierKind::Exec {
            let message = format!("applies to kind `exec` only, not to `{}`", kind.name());
            return self.fail(Problem::new(&path, message), &[]);
        }
        let ExecSandboxSpec { paths, scratch_mib, allow_missing } = sandbox;
        let fits = paths.len() <= 64 && paths.iter().all(|path| path.is_absolute());
        self.that(fits, &at("paths"), format!("{paths:?}"), "expected at most 64 absolute paths", &[]);
        self.range(&at("scratch_mib"), *scratch_mib, 1..=65_536);
        let [layers @ .., "cgroup"] = &SANDBOX_LAYERS else { unreachable!("the control group is the last layer") };
        self.layers(&at("allow_missing"), allow_missing, layers);
    }

    fn layers(&mut self, path: &str, named: &[String], layers: &[&str]) {
        for name in named.iter().filter(|name| !layers.contains(&name.as_str())) {
            let message = format!("is no layer of this sandbox; expected {}", layers.join(", "));
            self.fail(Problem::new(path, message).with_value(format!("{name:?}")), &[]);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::{JobSpec, JudgeKind, VerifierKind, VerifierSpec, parse};

    fn job(more: &str) -> Result<JobSpec, String> {
        let text = format!("name = 'a'\nmodel.path = 'm'\ndata.evaluation.path = 'e.jsonl'\n{more}");
        parse(&text, Path::new("test")).map_err(|errors| errors.to_string())
    }

    #[test]
    fn sets_name_their_verifiers() {
        let job = job("[data.train]\npath = 't.jsonl'\nverifier = 'programs'\n[data.mix.sums]\npath = 's.jsonl'\nverifier_field = 'by'\n\
             [verifiers.programs]\nkind = 'code'\ncode.case_seconds = 2.0\ncode.allow_missing = ['cgroup']\n\
             [evaluation.sets.held]\npath = 'h.jsonl'\nverifier = 'exact'\n\
             [evaluation.sets.own]\npath = 'o.jsonl'\nverifier.kind = 'code'")
        .unwrap();
        let JudgeKind::Code(code) = job.verifier_of(&job.data.train).judge().by else { panic!("no programs") };
        assert_eq!((code.case_seconds, code.allow_missing.as_slice()), (2.0, ["cgroup".to_owned()].as_slice()));
        assert_eq!(job.verifier_of(&job.data.mix["sums"]).kind, VerifierKind::Math);
        let sets =
            job.all_evaluation_sets().map(|set| (set.graded_by(&job), set.verifier.map(|verifier| verifier.kind)));
        let expected =
            [(None, None), (Some("exact".to_owned()), Some(VerifierKind::Exact)), (None, Some(VerifierKind::Code))];
        assert_eq!(sets.collect::<Vec<_>>(), expected);
        let named: Vec<_> = job.named_verifiers().into_iter().map(|(name, verifier)| (name, verifier.kind)).collect();
        assert_eq!(named, [("exact".to_owned(), VerifierKind::Exact), ("programs".to_owned(), VerifierKind::Code)]);
        // What is written out is read back.
        assert_eq!(parse(&job.resolved_toml(), Path::new("resolved")).unwrap(), job);
        assert_eq!(job.verifier, VerifierSpec::default());
    }

    #[test]
    fn what_cannot_be_is_refused_by_its_path() {
        for (more, path) in [
            (
                "data.train = { path = 't.jsonl', verifier = 'absent' }",
                "data.train.verifier = \"absent\": there is no such verifier",
            ),
            ("data.train.path = 't.jsonl'\nverifiers.label.kind = 'code'", "verifiers.label: expected a name"),
            (
                "data.train.path = 't.jsonl'\nverifiers.x.max_attempts = 9",
                "verifiers.x.max_attempts = 9: holds for all sets",
            ),
            ("data.train.path = 't.jsonl'\nverifier.named = 'x'", "verifier.named"),
            (
                "data.train.path = 't.jsonl'\nverifier.code.processes = 2",
                "verifier.code: applies to kind `code` only, not to `math`",
            ),
            (
                "data.train.path = 't.jsonl'\nverifier = { kind = 'code', code.allow_missing = ['network'] }",
                "verifier.code.allow_missing = \"network\": is no layer of this sandbox",
            ),
            (
                "data.train.path = 't.jsonl'\nverifier = { kind = 'code', code.memory_mib = 1 }",
                "verifier.code.memory_mib = 1",
            ),
            (
                "data.train.path = 't.jsonl'\nverifier = { kind = 'code', code.memory = 1 }",
                "verifier.code.memory: unknown key",
            ),
            (
                "data.train.path = 't.jsonl'\nverifier = { kind = 'code', code.command = ['node'] }",
                "verifier.code.command",
            ),
            ("data.train.path = 't.jsonl'\nverifier = { kind = 'code', code.file = 'a.c' }", "verifier.code.file"),
            (
                "data.train.path = 't.jsonl'\nevaluation.sets.x = { path = 'x.jsonl', verifier = 'absent' }",
                "evaluation.sets.x.verifier = \"absent\": there is no such verifier",
            ),
        ] {
            let problem = job(more).unwrap_err();
            assert!(problem.contains(path), "{more}: {problem}");
        }
    }
}
