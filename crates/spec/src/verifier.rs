//! `[verifier]` and `[reward]`: who says what a sample is worth.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::{CodeSpec, ExecSandboxSpec, JobSpec, SourceSpec};

/// How answers are graded. This verifier gives the label; `[reward]` says what the reward is made of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct VerifierSpec {
    /// In place of all other keys: the verifier of `verifiers.NAME`, or a built-in kind with its defaults. Of evaluation sets only, where
    /// `verifier = "NAME"` says the same. Default none.
    pub named: Option<String>,
    /// The verifier. Default `math`.
    pub kind: VerifierKind,
    /// Where the answer may stand. Default `lenient`. `math` only.
    pub extraction: Extraction,
    /// How far an answer has to be worked out. Default `evaluated`. `math` only.
    pub form: Form,
    /// Program and arguments of the child process, as it is started on the verifiers' machines; at most 256 strings.
    /// Required for `exec`, nothing else has it.
    pub command: Vec<String>,
    /// Environment variables of the verifier worker that the program gets besides the usual ones (docs/VERIFIERS.md):
    /// names, or beginnings of names with `*` at their end; at most 64. `exec` only. Default none.
    pub environment: Vec<String>,
    /// Address space that the program, and each process that it starts, may have, in GiB; 0: no limit. `exec` only. Default 16.0, at
    /// most 1,048,576.
    pub max_memory_gib: f64,
    /// Seconds of processor time after which the program is ended, and the next one takes its place; 0: no limit. `exec` only.
    /// Default 86,400 (a day), at most 31,536,000.
    pub max_cpu_seconds: u64,
    /// Largest file that the program may write, in MiB; 0: no limit. `exec` only. Default 1024, at most 1,073,741,824.
    pub max_file_mib: u64,
    /// Files and connections that the program may have open; 0: no limit of its own. `exec` only. Default 1024, at most 1,048,576.
    pub max_open_files: u64,
    /// Processes and threads that its user may have on the machine while the program starts others; 0: no limit of its own. The system
    /// counts those of the workers, too. `exec` only. Default 0, at most 4,194,304.
    pub max_processes: u64,
    /// The sandbox around the program. `exec` only. Default none: the program has the rights of the verifier worker.
    pub sandbox: Option<ExecSandboxSpec>,
    /// How programs are run and compared. `code` only. Default: the defaults of its keys.
    pub code: Option<CodeSpec>,
    /// Where the service listens, host:port. Required for `grpc`, nothing else has it.
    pub address: Option<String>,
    /// PEM file, on the verifiers' machines, with the authorities that sign the service's certificate, which has to be one for
    /// the host of `address`: the connection is TLS then. `grpc` only. Default none.
    pub ca: Option<String>,
    /// Speak plain text to a service on another machine. Without this and without `ca` the service has to be on the loopback
    /// interface of every verifier. `grpc` only. Default false.
    pub plain_text: bool,
    /// Seconds that one verification may take. Default 10, above 0, at most 3600.
    pub timeout_seconds: f64,
    /// Tries of a verification that failed or timed out, by different verifier workers where there are several. Then
    /// the sample is replaced. Default 3, 1 to 100.
    pub max_attempts: u32,
    /// Samples with new noise that may replace one without a verdict, one after the other. Then the group is dropped
    /// and the next prompt takes its place. Default 2, 0 (drop at once) to 100. Evaluations have none.
    pub max_replacements: u32,
    /// Verdicts that a verifier worker remembers, for each verifier. Default 100,000, 0 (a verifier that does not always
    /// say the same of the same answer) to 100,000,000.
    pub cache_entries: u32,
}

impl Default for VerifierSpec {
    fn default() -> Self {
        Self {
            named: None,
            kind: VerifierKind::Math,
            extraction: Extraction::Lenient,
            form: Form::Evaluated,
            command: Vec::new(),
            environment: Vec::new(),
            max_memory_gib: 16.0,
            max_cpu_seconds: 86_400,
            max_file_mib: 1024,
            max_open_files: 1024,
            max_processes: 0,
            sandbox: None,
            code: None,
            address: None,
            ca: None,
            plain_text: false,
            timeout_seconds: 10.0,
            max_attempts: 3,
            max_replacements: 2,
            cache_entries: 100_000,
        }
    }
}

/// Kind of verifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VerifierKind {
    /// The built-in verifier of mathematical answers: equal in value, whatever the notation.
    Math,
    /// Texts: the last box, or else the last line, has to equal the reference.
    Exact,
    /// Expressions that make a target of given numbers; references read `44 from all of 3, 5, 19`.
    Countdown,
    /// Programs, which are run on the cases of their problem in a sandbox.
    Code,
    /// A program of one's own that reads and writes JSON lines.
    Exec,
    /// A service of one's own, of `proto/pacs/v1/custom_verifier.proto`.
    Grpc,
}

impl VerifierKind {
    /// Whether it is a rule of this program, whose labels and rewards are 0 or 1; all others are the user's own.
    #[must_use]
    pub fn is_built_in(self) -> bool {
        matches!(self, Self::Math | Self::Exact | Self::Countdown | Self::Code)
    }

    /// Name as in the spec.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Math => "math",
            Self::Exact => "exact",
            Self::Countdown => "countdown",
            Self::Code => "code",
            Self::Exec => "exec",
            Self::Grpc => "grpc",
        }
    }
}

/// Where in a response the final answer may stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Extraction {
    /// A box, a final-answer phrase, or else the last expression of the text.
    Lenient,
    /// A box or a final-answer phrase.
    Strict,
    /// A box, or else the last number; a plain number either way. For arithmetic, where repeating the question's
    /// expression would equal the answer.
    Number,
}

/// How far an answer has to be worked out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// As far as the reference: no arithmetic left to do between explicit numbers, and no function of explicit numbers
    /// that the reference does not have. A question that is copied into the box earns nothing.
    Evaluated,
    /// Not at all: whatever has the value of the reference is correct, the rule of the PACS paper.
    Any,
}

/// What the reward of a sample is made of: the weighted rewards of the verifiers, a bonus for the format, and a penalty
/// for running into the limit. The label is that of `[verifier]` whatever the reward is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RewardSpec {
    /// Weight of the reward of `[verifier]`. Default 1.0, 0 to 1000.
    pub weight: f64,
    /// Added for a response that holds all `format_strings`, in this order. Default 0.0, -1000 to 1000.
    pub format_bonus: f64,
    /// What a well-formed response holds, for example `["</think>", "\\boxed{"]`; at most 64, none empty. Default none;
    /// required with a `format_bonus`.
    pub format_strings: Vec<String>,
    /// Tokens before `rollout.max_new_tokens` over which an answer loses reward: nothing at their start, all of
    /// `overlong_penalty` at the limit, in proportion between (DAPO's soft overlong punishment, arXiv 2503.14476).
    /// Default 0 (off), at most `rollout.max_new_tokens`.
    pub overlong_tokens: u32,
    /// Reward that an answer at the limit loses. Default 1.0, 0 to 1000.
    pub overlong_penalty: f64,
    /// Share of training samples whose label is inverted, drawn by sample: a control for studies, to see what wrong verdicts do. At 0.5
    /// labels are random. Evaluations are not affected; the archived rule of an inverted verdict ends in ` (inverted)`. Default 0.0, at
    /// most 0.5. Built-in verifiers only.
    pub label_noise: f64,
    /// Further verifiers, whose rewards are added. Names are 1 to 32 letters, digits, `-` and `_`; at most 8.
    pub verifiers: BTreeMap<String, RewardVerifierSpec>,
}

impl Default for RewardSpec {
    fn default() -> Self {
        Self {
            weight: 1.0,
            format_bonus: 0.0,
            format_strings: Vec::new(),
            overlong_tokens: 0,
            overlong_penalty: 1.0,
            label_noise: 0.0,
            verifiers: BTreeMap::new(),
        }
    }
}

/// A verifier whose reward is added; it has no say in the label. When it fails, the verification has failed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RewardVerifierSpec {
    /// Weight of its reward. Default 1.0, -1000 to 1000.
    pub weight: f64,
    /// As `verifier.kind`.
    pub kind: VerifierKind,
    /// As `verifier.extraction`.
    pub extraction: Extraction,
    /// As `verifier.form`.
    pub form: Form,
    /// As `verifier.command`.
    pub command: Vec<String>,
    /// As `verifier.environment`.
    pub environment: Vec<String>,
    /// As `verifier.max_memory_gib`.
    pub max_memory_gib: f64,
    /// As `verifier.max_cpu_seconds`.
    pub max_cpu_seconds: u64,
    /// As `verifier.max_file_mib`.
    pub max_file_mib: u64,
    /// As `verifier.max_open_files`.
    pub max_open_files: u64,
    /// As `verifier.max_processes`.
    pub max_processes: u64,
    /// As `verifier.sandbox`.
    pub sandbox: Option<ExecSandboxSpec>,
    /// As `verifier.code`.
    pub code: Option<CodeSpec>,
    /// As `verifier.address`.
    pub address: Option<String>,
    /// As `verifier.ca`.
    pub ca: Option<String>,
    /// As `verifier.plain_text`.
    pub plain_text: bool,
    /// As `verifier.timeout_seconds`.
    pub timeout_seconds: f64,
}

impl Default for RewardVerifierSpec {
    fn default() -> Self {
        let VerifierSpec {
            kind,
            extraction,
            form,
            command,
            environment,
            max_memory_gib,
            max_cpu_seconds,
            max_file_mib,
            max_open_files,
            max_processes,
            sandbox,
            code,
            address,
            ca,
            plain_text,
            timeout_seconds,
            ..
        } = VerifierSpec::default();
        Self {
            weight: 1.0,
            kind,
            extraction,
            form,
            command,
            environment,
            max_memory_gib,
            max_cpu_seconds,
            max_file_mib,
            max_open_files,
            max_processes,
            sandbox,
            code,
            address,
            ca,
            plain_text,
            timeout_seconds,
        }
    }
}

/// One verifier, whichever table describes it.
#[derive(Clone, Debug, PartialEq)]
pub struct JudgeSpec {
    /// The verifier, with its settings.
    pub by: JudgeKind,
    /// How long one verification may take.
    pub timeout: Duration,
}

impl JudgeSpec {
    /// Longest time that a verification may take: programs are stopped when `timeout` is over and a case ends, and a sandbox has to start
    /// and decide assertions.
    #[must_use]
    pub fn longest(&self) -> Duration {
        let more = match &self.by {
            JudgeKind::Code(code) => Duration::try_from_secs_f64(code.case_seconds)
                .unwrap_or_default()
                .saturating_add(Duration::from_secs(60)),
            _ => Duration::ZERO,
        };
        self.timeout.saturating_add(more)
    }
}

/// Who judges, with what only that kind of verifier has.
#[derive(Clone, Debug, PartialEq)]
pub enum JudgeKind {
    /// The built-in verifier of mathematical answers.
    Math(MathSpec),
    /// The built-in verifier of texts.
    Exact,
    /// The built-in verifier of countdown.
    Countdown,
    /// Programs in a sandbox.
    Code(CodeSpec),
    /// A child process.
    Exec(ExecSpec),
    /// A gRPC service of the user's.
    Grpc(ServiceAddress),
}

/// What the built-in verifier takes for a correct answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MathSpec {
    /// Where the answer may stand.
    pub extraction: Extraction,
    /// How far it has to be worked out.
    pub form: Form,
}

/// A program that judges, and what it may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecSpec {
    /// The program and its arguments.
    pub command: Vec<String>,
    /// Variables that it is told besides the usual ones; a `*` at the end of a name stands for any end.
    pub environment: Vec<String>,
    /// What its processes may take of the machine.
    pub limits: ExecLimits,
    /// What surrounds it.
    pub sandbox: Option<ExecSandboxSpec>,
}

impl ExecSpec {
    /// The program with the limits that hold when a spec says nothing.
    #[must_use]
    pub fn new(command: Vec<String>) -> Self {
        let usual = VerifierSpec::default();
        Self { command, environment: Vec::new(), limits: usual.exec().limits, sandbox: None }
    }
}

/// What a process may take of the machine; `None` where it has no limit of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecLimits {
    /// Address space of each process in bytes; `None` without a limit.
    pub memory_bytes: Option<u64>,
    /// Processor time, over the life of the process.
    pub cpu_seconds: Option<u64>,
    /// Size of a file that it writes.
    pub file_bytes: Option<u64>,
    /// Open descriptors of each process; `None` without a limit.
    pub open_files: Option<u64>,
    /// Processes and threads of the user, all of the machine's counted.
    pub processes: Option<u64>,
}

/// Where a service is, and what protects the way there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceAddress {
    /// Where the service listens, as `host:port`.
    pub address: String,
    /// PEM file with the authorities for TLS.
    pub ca: Option<String>,
    /// Without TLS the service may be elsewhere than on the loopback interface.
    pub plain_text: bool,
}

impl VerifierSpec {
    /// Name under which measurements speak of the verifier that gives the label.
    pub const LABEL: &'static str = "label";

    /// The verifier that gives the label.
    #[must_use]
    pub fn judge(&self) -> JudgeSpec {
        let service = service(self.address.as_ref(), self.ca.as_ref(), self.plain_text);
        let math = MathSpec { extraction: self.extraction, form: self.form };
        judge(self.kind, math, self.exec(), (service, self.code.as_ref()), self.timeout_seconds)
    }

    fn exec(&self) -> ExecSpec {
        let limits = limits(
            self.max_memory_gib,
            [self.max_cpu_seconds, self.max_file_mib, self.max_open_files, self.max_processes],
        );
        let sandbox = self.sandbox.clone();
        ExecSpec { command: self.command.clone(), environment: self.environment.clone(), limits, sandbox }
    }
}

impl RewardVerifierSpec {
    /// The verifier itself.
    #[must_use]
    pub fn judge(&self) -> JudgeSpec {
        let service = service(self.address.as_ref(), self.ca.as_ref(), self.plain_text);
        let math = MathSpec { extraction: self.extraction, form: self.form };
        judge(self.kind, math, self.exec(), (service, self.code.as_ref()), self.timeout_seconds)
    }

    fn exec(&self) -> ExecSpec {
        let limits = limits(
            self.max_memory_gib,
            [self.max_cpu_seconds, self.max_file_mib, self.max_open_files, self.max_processes],
        );
        let sandbox = self.sandbox.clone();
        ExecSpec { command: self.command.clone(), environment: self.environment.clone(), limits, sandbox }
    }
}

impl JobSpec {
    /// The verifier of a name: that of `[verifiers.NAME]`, or else the built-in kind of this name with its defaults.
    #[must_use]
    pub fn verifier_named(&self, name: &str) -> Option<VerifierSpec> {
        const KINDS: [VerifierKind; 4] =
            [VerifierKind::Math, VerifierKind::Exact, VerifierKind::Countdown, VerifierKind::Code];
        self.verifiers.get(name).cloned().or_else(|| {
            let kind = KINDS.into_iter().find(|kind| kind.name() == name)?;
            Some(VerifierSpec { kind, ..VerifierSpec::default() })
        })
    }

    /// Every verifier that a set or a row may name, with its name: those of `[verifiers]`, and the built-in ones that a set names.
    #[must_use]
    pub fn named_verifiers(&self) -> Vec<(String, VerifierSpec)> {
        let mut named: BTreeMap<String, VerifierSpec> = self.verifiers.clone();
        let of_sets = self.evaluation.sets.values().filter_map(|set| set.verifier.as_ref()?.named.clone());
        let of_sources = self.data.sources().filter_map(|source| source.verifier.clone());
        for name in of_sets.chain(of_sources) {
            if let Some(verifier) = self.verifier_named(&name) {
                named.entry(name).or_insert(verifier);
            }
        }
        named.into_iter().collect()
    }

    /// The verifier of the problems of a source: the one that it names, or else `[verifier]`.
    #[must_use]
    pub fn verifier_of(&self, source: &SourceSpec) -> VerifierSpec {
        let named = source.verifier.as_deref().and_then(|name| self.verifier_named(name));
        named.unwrap_or_else(|| self.verifier.clone())
    }
}

impl JobSpec {
    /// Text after every question of a source.
    #[must_use]
    pub fn suffix_of<'a>(&'a self, source: &'a SourceSpec) -> &'a str {
        source.prompt_suffix.as_deref().unwrap_or(&self.data.prompt_suffix)
    }
}

/// Reads a verifier of an evaluation set: its name alone, or a table of its own.
pub(crate) fn named_or_own<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<VerifierSpec>, D::Error> {
    struct Either;
    impl<'de> Visitor<'de> for Either {
        type Value = Option<VerifierSpec>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("the name of a verifier or a table")
        }

        fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<Self::Value, E> {
            Ok(Some(VerifierSpec { named: Some(name.to_owned()), ..VerifierSpec::default() }))
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
            VerifierSpec::deserialize(MapAccessDeserializer::new(map)).map(Some)
        }
    }
    deserializer.deserialize_any(Either)
}

fn service(address: Option<&String>, ca: Option<&String>, plain_text: bool) -> ServiceAddress {
    ServiceAddress { address: address.cloned().unwrap_or_default(), ca: ca.cloned(), plain_text }
}

/// Limits as the spec has them, of which 0 is none; it bounds them.
fn limits(memory_gib: f64, [cpu_seconds, file_mib, open_files, processes]: [u64; 4]) -> ExecLimits {
    let limit = |value: u64| (value > 0).then_some(value);
    ExecLimits {
        memory_bytes: (memory_gib > 0.0).then_some((memory_gib * f64::from(1 << 30)) as u64),
        cpu_seconds: limit(cpu_seconds),
        file_bytes: limit(file_mib.saturating_mul(1 << 20)),
        open_files: limit(open_files),
        processes: limit(processes),
    }
}

fn judge(
    kind: VerifierKind,
    math: MathSpec,
    exec: ExecSpec,
    (service, code): (ServiceAddress, Option<&CodeSpec>),
    timeout_seconds: f64,
) -> JudgeSpec {
    let by = match kind {
        VerifierKind::Math => JudgeKind::Math(math),
        VerifierKind::Exact => JudgeKind::Exact,
        VerifierKind::Countdown => JudgeKind::Countdown,
        VerifierKind::Code => JudgeKind::Code(code.cloned().unwrap_or_default()),
        VerifierKind::Exec => JudgeKind::Exec(exec),
        VerifierKind::Grpc => JudgeKind::Grpc(service),
    };
    // The spec bounds the seconds.
    JudgeSpec { by, timeout: Duration::try_from_secs_f64(timeout_seconds).unwrap_or(Duration::MAX) }
}
