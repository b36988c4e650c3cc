//! Bounds of `[verifier]` and `[reward]`.

use super::Check;
use crate::{CodeSpec, ExecSandboxSpec, Extraction, Form, JobSpec, Problem, RewardSpec, VerifierKind, VerifierSpec};

/// Most reward verifiers of a job.
const MOST_VERIFIERS: usize = 8;

/// Most tables of `[verifiers]`.
const MOST_NAMED: usize = 16;

/// Limits of a program, and the most that each may be.
const LIMITS: [(&str, u64); 4] = [
    ("max_cpu_seconds", 31_536_000),
    ("max_file_mib", 1 << 30),
    ("max_open_files", 1 << 20),
    ("max_processes", 1 << 22),
];

/// What describes one verifier, in whichever table.
struct Described<'a> {
    kind: VerifierKind,
    extraction: Extraction,
    form: Form,
    command: &'a [String],
    environment: &'a [String],
    max_memory_gib: f64,
    /// `max_cpu_seconds`, `max_file_mib`, `max_open_files` and `max_processes`.
    limits: [u64; 4],
    address: Option<&'a str>,
    ca: Option<&'a str>,
    plain_text: bool,
    timeout_seconds: f64,
    code: Option<&'a CodeSpec>,
    sandbox: Option<&'a ExecSandboxSpec>,
}

impl Check {
    pub(super) fn verifiers(&mut self, spec: &JobSpec) {
        self.verifier_at("verifier", &spec.verifier);
        self.range("verifier.max_attempts", spec.verifier.max_attempts, 1..=100);
        self.range("verifier.max_replacements", spec.verifier.max_replacements, 0..=100);
        self.range("verifier.cache_entries", spec.verifier.cache_entries, 0..=100_000_000);
        self.reward(&spec.reward, spec.rollout.max_new_tokens);
        self.named_verifiers(spec);
        self.label_noise(spec);
    }

    /// Labels of verifiers that are not built in may be fractions, which have no opposite.
    fn label_noise(&mut self, spec: &JobSpec) {
        let noise = spec.reward.label_noise;
        self.range("reward.label_noise", noise, 0.0..=0.5);
        let can_be_inverted =
            std::iter::once(&spec.verifier).chain(spec.verifiers.values()).all(|v| v.kind.is_built_in());
        let message = "expected 0: only the labels of built-in verifiers, which are 0 or 1, can be inverted";
        self.that(noise == 0.0 || can_be_inverted, "reward.label_noise", noise, message, &["verifier.kind"]);
    }

    /// A table with the keys of `[verifier]`, as far as they describe who judges.
    pub(super) fn verifier_at(&mut self, path: &str, verifier: &VerifierSpec) {
        let described = Described {
            kind: verifier.kind,
            extraction: verifier.extraction,
            form: verifier.form,
            command: &verifier.command,
            environment: &verifier.environment,
            max_memory_gib: verifier.max_memory_gib,
            limits: [verifier.max_cpu_seconds, verifier.max_file_mib, verifier.max_open_files, verifier.max_processes],
            address: verifier.address.as_deref(),
            ca: verifier.ca.as_deref(),
            plain_text: verifier.plain_text,
            timeout_seconds: verifier.timeout_seconds,
            code: verifier.code.as_ref(),
            sandbox: verifier.sandbox.as_ref(),
        };
        self.judge(path, &described);
    }

    /// The tables of `[verifiers]`, and those who name them.
    fn named_verifiers(&mut self, spec: &JobSpec) {
        let message = format!("expected at most {MOST_NAMED} verifiers");
        self.that(spec.verifiers.len() <= MOST_NAMED, "verifiers", spec.verifiers.len(), message, &[]);
        for (name, verifier) in &spec.verifiers {
            let path = format!("verifiers.{name}");
            let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
            let is_free = name != VerifierSpec::LABEL && !spec.reward.verifiers.contains_key(name);
            if !plain || !(1..=32).contains(&name.len()) || !is_free {
                let message = "expected a name of 1 to 32 letters, digits, `-` and `_`, neither `label` (that is `[verifier]`) nor \
                               that of a table of `reward.verifiers`";
                self.fail(Problem::new(&path, message), &[]);
            }
            self.verifier_at(&path, verifier);
            self.of_the_job(&path, verifier);
        }
        for (path, verifier) in std::iter::once(("verifier".to_owned(), &spec.verifier))
            .chain(spec.verifiers.iter().map(|(name, verifier)| (format!("verifiers.{name}"), verifier)))
        {
            let message = "applies to evaluation sets only";
            self.that(verifier.named.is_none(), &format!("{path}.named"), "set", message, &[]);
        }
        let evaluation = spec.data.evaluation.iter().map(|source| ("data.evaluation".to_owned(), source));
        let sources = spec.data.train_sets().chain(evaluation);
        let of_sources = sources.filter_map(|(path, source)| Some((path, source.verifier.clone()?)));
        let sets = spec.evaluation.sets.iter();
        let of_sets = sets
            .filter_map(|(name, set)| Some((format!("evaluation.sets.{name}"), set.verifier.as_ref()?.named.clone()?)));
        for (path, name) in of_sources.chain(of_sets) {
            if spec.verifier_named(&name).is_none() {
                let message = "there is no such verifier; expected a table of `[verifiers]`, or `math`, `exact`, `countdown` or `code`";
                self.fail(Problem::new(format!("{path}.verifier"), message).with_value(format!("{name:?}")), &[]);
            }
        }
    }

    /// What holds for all verifications of a job is said in `[verifier]`.
    pub(super) fn of_the_job(&mut self, path: &str, verifier: &VerifierSpec) {
        let usual = VerifierSpec::default();
        for (key, given, usual) in [
            ("max_attempts", verifier.max_attempts, usual.max_attempts),
            ("max_replacements", verifier.max_replacements, usual.max_replacements),
            ("cache_entries", verifier.cache_entries, usual.cache_entries),
        ] {
            let message = format!("holds for all sets: expected in `[verifier]` (`verifier.{key}`)");
            self.that(given == usual, &format!("{path}.{key}"), given, message, &[]);
        }
    }

    fn reward(&mut self, reward: &RewardSpec, max_new_tokens: u32) {
        self.range("reward.weight", reward.weight, 0.0..=1000.0);
        self.range("reward.format_bonus", reward.format_bonus, -1000.0..=1000.0);
        let strings = &reward.format_strings;
        let shown = format!("{strings:?}");
        let path = "reward.format_strings";
        self.that(strings.len() <= 64, path, &shown, "expected at most 64 strings", &[]);
        self.that(!strings.iter().any(String::is_empty), path, &shown, "expected no empty string", &[]);
        let named = reward.format_bonus == 0.0 || !strings.is_empty();
        let message = "expected what a well-formed response holds, for there is a `reward.format_bonus`";
        self.that(named, path, &shown, message, &["reward.format_bonus"]);
        let message = format!("expected 0 to `rollout.max_new_tokens` ({max_new_tokens})");
        let fits = reward.overlong_tokens <= max_new_tokens;
        self.that(fits, "reward.overlong_tokens", reward.overlong_tokens, message, &["rollout.max_new_tokens"]);
        self.range("reward.overlong_penalty", reward.overlong_penalty, 0.0..=1000.0);

        let count = reward.verifiers.len();
        let message = format!("expected at most {MOST_VERIFIERS} verifiers");
        self.that(count <= MOST_VERIFIERS, "reward.verifiers", count, message, &[]);
        for (name, verifier) in &reward.verifiers {
            let path = format!("reward.verifiers.{name}");
            let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
            if !plain || !(1..=32).contains(&name.len()) || name == VerifierSpec::LABEL {
                let message =
                    "expected a name of 1 to 32 letters, digits, `-` and `_`, not `label`: that is `[verifier]`";
                self.fail(Problem::new(&path, message), &[]);
            }
            self.range(&format!("{path}.weight"), verifier.weight, -1000.0..=1000.0);
            let described = Described {
                kind: verifier.kind,
                extraction: verifier.extraction,
                form: verifier.form,
                command: &verifier.command,
                environment: &verifier.environment,
                max_memory_gib: verifier.max_memory_gib,
                limits: [
                    verifier.max_cpu_seconds,
                    verifier.max_file_mib,
                    verifier.max_open_files,
                    verifier.max_processes,
                ],
                address: verifier.address.as_deref(),
                ca: verifier.ca.as_deref(),
                plain_text: verifier.plain_text,
                timeout_seconds: verifier.timeout_seconds,
                code: verifier.code.as_ref(),
                sandbox: verifier.sandbox.as_ref(),
            };
            self.judge(&path, &described);
        }
    }

    /// What every verifier has, and what only some kinds have.
    fn judge(&mut self, path: &str, judge: &Described<'_>) {
        let at = |key: &str| format!("{path}.{key}");
        let is = |kind| judge.kind == kind;
        self.above_zero(&at("timeout_seconds"), judge.timeout_seconds, 3600.0);
        self.code(path, judge.kind, judge.code);
        self.exec_sandbox(path, judge.kind, judge.sandbox);
        let of_math =
            [("extraction", judge.extraction != Extraction::Lenient), ("form", judge.form != Form::Evaluated)];
        for (key, _) in of_math.into_iter().filter(|(_, given)| *given && !is(VerifierKind::Math)) {
            let message = format!("applies to kind `math` only, not to `{}`", judge.kind.name());
            self.fail(Problem::new(at(key), message), &[]);
        }
        let not_exec = format!("applies to kind `exec` only, not to `{}`", judge.kind.name());
        let message = match (is(VerifierKind::Exec), judge.command) {
            (true, command) if command.first().is_none_or(String::is_empty) => {
                Some("expected the program that verifies and its arguments, for kind `exec`")
            }
            (true, command) if command.len() > 256 => Some("expected at most 256 strings"),
            (false, [_, ..]) => Some(not_exec.as_str()),
            _ => None,
        };
        if let Some(message) = message {
            let command = format!("{:?}", judge.command);
            self.fail(Problem::new(at("command"), message).with_value(command), &[]);
        }
        self.program(path, judge, &not_exec);
        match (is(VerifierKind::Grpc), judge.address) {
            (true, None) => {
                let message = "is required for kind `grpc`: where the service listens, host:port";
                self.fail(Problem::new(at("address"), message), &[]);
            }
            (true, Some(address)) => self.text(&at("address"), address, is_address(address), "expected host:port"),
            (false, None) => {}
            (false, Some(address)) => {
                let message = format!("applies to kind `grpc` only, not to `{}`", judge.kind.name());
                self.text(&at("address"), address, false, &message);
            }
        }
        let not_grpc = format!("applies to kind `grpc` only, not to `{}`", judge.kind.name());
        if let Some(ca) = judge.ca {
            let (is_good, message) = match is(VerifierKind::Grpc) {
                true => (!ca.is_empty(), "expected a PEM file of certificates"),
                false => (false, not_grpc.as_str()),
            };
            self.text(&at("ca"), ca, is_good, message);
        }
        let message = match (judge.plain_text, is(VerifierKind::Grpc), judge.ca) {
            (true, false, _) => Some(not_grpc.as_str()),
            (true, true, Some(_)) => Some("with `ca` the connection is TLS; leave one of the two out"),
            _ => None,
        };
        if let Some(message) = message {
            self.fail(Problem::new(at("plain_text"), message).with_value("true"), &[]);
        }
    }
}

impl Check {
    /// What a program is told, and what it may take.
    fn program(&mut self, path: &str, judge: &Described<'_>, not_exec: &str) {
        let at = |key: &str| format!("{path}.{key}");
        let usual = VerifierSpec::default();
        let usual_limits = [usual.max_cpu_seconds, usual.max_file_mib, usual.max_open_files, usual.max_processes];
        let names = format!("{:?}", judge.environment);
        if judge.kind != VerifierKind::Exec {
            let given = [
                ("environment", names, !judge.environment.is_empty()),
                ("max_memory_gib", judge.max_memory_gib.to_string(), judge.max_memory_gib != usual.max_memory_gib),
            ];
            let limits = LIMITS.iter().zip(judge.limits).zip(usual_limits);
            let limits = limits.map(|(((key, _), value), usual)| (*key, value.to_string(), value != usual));
            for (key, value, _) in given.into_iter().chain(limits).filter(|(_, _, is_given)| *is_given) {
                self.fail(Problem::new(at(key), not_exec).with_value(value), &[]);
            }
            return;
        }
        let is_name = |name: &String| {
            let name = name.strip_suffix('*').unwrap_or(name);
            !name.is_empty() && name.len() <= 256 && !name.contains(['=', '*', '\0'])
        };
        let message = "expected at most 64 names of variables, without `=`; a name may end in `*`";
        let fits = judge.environment.len() <= 64 && judge.environment.iter().all(is_name);
        self.that(fits, &at("environment"), &names, message, &[]);
        self.range(&at("max_memory_gib"), judge.max_memory_gib, 0.0..=1_048_576.0);
        for ((key, most), value) in LIMITS.iter().zip(judge.limits) {
            self.range(&at(key), value, 0..=*most);
        }
    }
}

fn is_address(address: &str) -> bool {
    address.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
}
