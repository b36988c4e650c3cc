use expect_test::{Expect, expect};

use super::*;
use crate::{ExecSpec, JudgeKind, JudgeSpec, ServiceAddress};

const MINIMAL: &str = "
name = 'job'
model.path = 'm'
data.train.path = 'train.jsonl'
data.evaluation.path = 'test.parquet'
";

fn parsed(text: &str) -> Result<JobSpec, SpecErrors> {
    parse(text, Path::new("job.toml"))
}

fn refused(text: &str, expected: Expect) {
    let errors = parsed(text).expect_err("the spec is wrong");
    expected.assert_eq(&errors.to_string());
}

#[test]
fn a_minimal_spec_has_the_defaults() {
    let spec = parsed(MINIMAL).expect("valid");
    assert_eq!((spec.seed, spec.batch.steps, spec.rollout.samples_per_prompt), (1, 300, 8));
    assert_eq!(spec.data.prompt_suffix, crate::PAPER_SUFFIX);
}

#[test]
fn the_resolved_text_reads_back() {
    let text = format!(
        "{MINIMAL}model.template_variables = {{ enable_thinking = false }}\nmodel.chat_template = \"a\\nb\"\n\
         optimizer.learning_rate = 1e-5\nseed = 9223372036854775807\ndata.train.limit = 7"
    );
    let spec = parsed(&text).expect("valid");
    assert_eq!(parsed(&spec.resolved_toml()).expect("resolved specs are valid"), spec);
}

#[test]
fn all_problems_come_together_with_lines() {
    refused(
        "name = 'has spaces'
sed = 3
[model]
path = 'm'
precision = 'float16'
[data]
max_prompt_tokens = 0
[data.train]
path = 'train.csv'
generator = { task = 'addition', low = 5, high = 2, colour = 1 }
[batch]
prompts_per_step = 10
mini_batchs = 3
mini_batches = 4
learning_rate = 1e-5
steps = 'many'
[rollout]
samples_per_prompt = 1
stop = ['x', 3]
temperature = nan
top_p = 0.0
min_p = 1.0
[optimizer]
max_skipped_updates = -1
[objective]
score = 'best'
",
        expect![[r#"
            17 problems in job spec `job.toml`
              line 1: name = "has spaces": expected 1 to 64 letters, digits, `-` and `_`
              line 2: sed: unknown key; did you mean `seed`?
              line 5: model.precision = "float16": expected one of `auto`, `float32`, `bfloat16`
              line 6: data.evaluation: is required, for `evaluation.before`, `after` or `every_steps` asks for evaluations; name held-out problems here or in `evaluation.sets`, or turn all three off
              line 7: data.max_prompt_tokens = 0: expected 1 to 1000000
              line 8: data.train: has both `path` and `generator`; expected one
              line 10: data.train.generator.colour: unknown key
              line 13: batch.mini_batchs: unknown key; did you mean `mini_batches`?
              line 14: batch.mini_batches = 4: expected a divisor of `batch.prompts_per_step` (10)
              line 15: batch.learning_rate: unknown key; `learning_rate` belongs to `[optimizer]`
              line 16: batch.steps = "many": expected a whole number, 0 or more
              line 19: rollout.stop = ["x", 3]: expected a string
              line 20: rollout.temperature = NaN: expected 0.01 to 10
              line 21: rollout.top_p = 0: expected above 0, at most 1
              line 22: rollout.min_p = 1: expected 0 to below 1
              line 24: optimizer.max_skipped_updates = -1: expected a whole number, 0 or more
              line 26: objective.score = "best": expected one of `rloo`, `grpo`, `dr_grpo`, `naive`"#]],
    );
}

#[test]
fn what_is_missing_is_named_once() {
    refused(
        "[data]\nshuffle = true",
        expect![[r#"
            4 problems in job spec `job.toml`
              line 1: data.train: is required
              line 1: data.evaluation: is required, for `evaluation.before`, `after` or `every_steps` asks for evaluations; name held-out problems here or in `evaluation.sets`, or turn all three off
              name: is required
              model: is required"#]],
    );
    refused(
        "name = 3\nmodel = 'm'\ndata.train = 'x'\n[evaluation]\nbefore = false",
        expect![[r#"
            4 problems in job spec `job.toml`
              line 1: name = 3: expected a string
              line 2: model = "m": expected a table
              line 3: data.train = "x": expected a table
              line 3: data.evaluation: is required, for `evaluation.before`, `after` or `every_steps` asks for evaluations; name held-out problems here or in `evaluation.sets`, or turn all three off"#]],
    );
    refused(
        "name = 'a'\nmodel.path = 'm'\n[data.train.generator]\nlow = 1",
        expect![[r#"
            2 problems in job spec `job.toml`
              line 3: data.train.generator.task: is required
              line 3: data.evaluation: is required, for `evaluation.before`, `after` or `every_steps` asks for evaluations; name held-out problems here or in `evaluation.sets`, or turn all three off"#]],
    );
}

#[test]
fn text_that_is_no_toml_is_refused_by_line() {
    refused(
        "name = 'a'\n[batch\nsteps = = 3\n",
        expect![[r#"
        3 problems in job spec `job.toml`
          line 2: unclosed table, expected `]`
          line 3: extra `=`, expected nothing
          line 3: unexpected key or value, expected newline, `#`"#]],
    );
    refused(
        "name = 'a'\nname = 'b'\n",
        expect![[r#"
        1 problem in job spec `job.toml`
          line 2: duplicate key"#]],
    );
    refused(
        "seed = 9223372036854775808",
        expect![[r#"
        1 problem in job spec `job.toml`
          line 1: u64 value was too large"#]],
    );
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let errors = read(Path::new("no/such/job.toml")).expect_err("there is no such file");
    assert!(errors.to_string().starts_with("1 problem in job spec `no/such/job.toml`\n  cannot read the file: "));
}

#[test]
fn combinations_that_cannot_work_are_refused() {
    let with = |lines: &str| format!("{MINIMAL}{lines}");
    refused(
        &with("batch.prompts_per_step = 10\nbatch.mini_batches = 0"),
        expect![[r#"
        1 problem in job spec `job.toml`
          line 7: batch.mini_batches = 0: expected a divisor of `batch.prompts_per_step` (10)"#]],
    );
    refused(
        &with("rollout.samples_per_prompt = 1"),
        expect![[r#"
        1 problem in job spec `job.toml`
          line 6: rollout.samples_per_prompt = 1: expected 2 or more: this `objective.score` compares the samples of a prompt with each other"#]],
    );
    assert!(parsed(&with("rollout.samples_per_prompt = 1\nobjective.score = 'naive'")).is_ok());
    refused(
        &with("rollout.max_concurrent_samples = 4"),
        expect![[r#"
        1 problem in job spec `job.toml`
          line 6: rollout.max_concurrent_samples = 4: expected 8 or more: a worker takes a group of samples as a whole"#]],
    );
    refused(
        &with("batch.prompts_per_step = 2\nbatch.mini_batches = 2\nresources.learners = 9"),
        expect![[r#"
            1 problem in job spec `job.toml`
              line 8: resources.learners = 9: expected no more than the 8 sequences of a mini-batch"#]],
    );
    refused(
        &with("rollout.min_p = 0.1\nrollout.top_k = 1"),
        expect![[r#"
        1 problem in job spec `job.toml`
          line 6: rollout.min_p = 0.1: has no effect while `rollout.top_k` is 1: one token is left"#]],
    );
    refused(
        &with("rollout.cache_tokens = 9215"),
        expect![[r#"
        1 problem in job spec `job.toml`
          line 6: rollout.cache_tokens = 9215: expected 9216 (the longest prompt and answer) to 1000000000, or 0"#]],
    );
    assert!(parsed(&with("rollout.cache_tokens = 9216")).is_ok());
    refused(
        &with("data.train.generator = { task = 'addition' }"),
        expect![[r#"
        1 problem in job spec `job.toml`
          line 4: data.train: has both `path` and `generator`; expected one"#]],
    );
}

#[test]
fn gpus_that_cannot_be_assigned_are_refused() {
    let with = |lines: &str| format!("{MINIMAL}{lines}");
    for without_effect in ["gpus = 1", "share_gpus = true", "require_gpu_kernels = false"] {
        let error = parsed(&with(&format!("resources.{without_effect}"))).expect_err("on a processor").to_string();
        assert!(error.contains("has no effect without `resources.device = \"cuda\"`"), "{error}");
        let on_gpu = with(&format!("resources.device = 'cuda'\nresources.rollouts = 0\nresources.{without_effect}"));
        assert!(parsed(&on_gpu).is_ok(), "{without_effect}");
    }
    let of = |more: &str| parsed(&with(&format!("resources.device = 'cuda'\nresources.gpus = 2\n{more}")));
    assert!(of("").is_ok());
    let error = of("resources.rollouts = 2").expect_err("three workers of two GPUs").to_string();
    assert!(
        error.contains("resources.gpus = 2: expected at least 3, a GPU for each learner and rollout worker"),
        "{error}"
    );
    assert!(of("resources.rollouts = 2\nresources.share_gpus = true").is_ok());
    let error = of("resources.learners = 3\nresources.share_gpus = true").expect_err("ranks never share").to_string();
    assert!(error.contains("resources.gpus = 2: expected at least 3: learner ranks never share a GPU"), "{error}");
}

#[test]
fn settings_that_an_objective_would_ignore_are_refused() {
    let with = |lines: &str| format!("{MINIMAL}{lines}");
    refused(
        &with("[objective]\nkind = 'grpo'\nbeta = 2.0\nclip_low = 1.5\ngamma = 0.9\ndual_clip = 0.5"),
        expect![[r#"
            4 problems in job spec `job.toml`
              line 8: objective.beta = 2.0: `grpo` would ignore it; it is for `pacs`
              line 9: objective.clip_low = 1.5: expected 0 to 1
              line 10: objective.gamma = 0.9: `grpo` would ignore it; it is for `reinforce_pp`, `ppo`
              line 11: objective.dual_clip = 0.5: expected above 1, at most 1000, or 0 for no bound"#]],
    );
    refused(
        &with("objective.clip_high = 0.28"),
        expect![[r#"
            1 problem in job spec `job.toml`
              line 6: objective.clip_high = 0.28: `pacs` would ignore it; it is for `grpo`, `dr_grpo`, `dapo`, `gspo`, `rloo`, `reinforce_pp`, `reinforce_pp_baseline`, `ppo`, `weighted_rloo`, `maxrl`, `cispo`, `dppo`"#]],
    );
    refused(
        &with("[objective]\nkind = 'gspo'\nkl_kind = 'k2'\nreference_reset_steps = 5\nimportance_cap = 3"),
        expect![[r#"
            3 problems in job spec `job.toml`
              line 8: objective.kl_kind: has no effect while `objective.kl_coefficient` is 0
              line 9: objective.reference_reset_steps: has no effect while `objective.kl_coefficient` is 0
              line 10: objective.importance_cap: has no effect while `objective.importance` is "off""#]],
    );
    refused(
        &with("[objective]\nreward_method = 'mean_logprob'\nreference_reset_steps = 5"),
        expect![[r#"
        1 problem in job spec `job.toml`
          line 8: objective.reference_reset_steps: has no effect: `objective.reward_method` = "mean_logprob" compares with no reference"#]],
    );
    refused(
        &with("objective.entropy_coefficient = 0.01"),
        expect![[r#"
            1 problem in job spec `job.toml`
              line 6: objective.entropy_coefficient = 0.01: `pacs` would ignore it; it is for `grpo`, `dr_grpo`, `dapo`, `gspo`, `rloo`, `reinforce_pp`, `reinforce_pp_baseline`, `ppo`, `weighted_rloo`, `maxrl`, `cispo`, `dppo`"#]],
    );
    refused(
        &with("[objective]\nkind = 'grpo'\nlambda = 0.9\nvalue_clip = 0.2\ncritic_warmup_steps = 1"),
        expect![[r#"
            3 problems in job spec `job.toml`
              line 8: objective.lambda = 0.9: `grpo` would ignore it; it is for `ppo`
              line 9: objective.value_clip = 0.2: `grpo` would ignore it; it is for `ppo`
              line 10: objective.critic_warmup_steps = 1: `grpo` would ignore it; it is for `ppo`"#]],
    );
    refused(
        &with(
            "[objective]\nkind = 'ppo'\nlambda = 1.5\nvalue_clip = 0.0\ncritic_learning_rate = 2.0\n\
             critic_warmup_steps = 300\nentropy_coefficient = -1.0",
        ),
        expect![[r#"
            5 problems in job spec `job.toml`
              line 8: objective.lambda = 1.5: expected 0 to 1
              line 9: objective.value_clip = 0: expected above 0, at most 1000
              line 10: objective.critic_learning_rate = 2: expected above 0, at most 1
              line 11: objective.critic_warmup_steps = 300: expected fewer than `batch.steps` (300), else the policy is never trained
              line 12: objective.entropy_coefficient = -1: expected 0 to 10"#]],
    );
    refused(
        &with("objective.kind = 'rloo'\nrollout.samples_per_prompt = 1"),
        expect![[r#"
            1 problem in job spec `job.toml`
              line 7: rollout.samples_per_prompt = 1: expected 2 or more: `rloo` compares the samples of a prompt with each other"#]],
    );
    assert!(parsed(&with("objective.kind = 'reinforce_pp'\nrollout.samples_per_prompt = 1")).is_ok());
}

#[test]
fn defaults_are_those_of_the_kind() {
    let spec = parsed(&format!("{MINIMAL}objective.kind = 'dapo'")).expect("valid");
    let objective = spec.objective;
    assert_eq!((objective.clip_high, objective.mask_truncated, objective.beta), (Some(0.28), Some(true), None));
}

#[test]
fn evaluation_needs_problems() {
    let text = "name = 'a'\nmodel.path = 'm'\ndata.train.path = 't.jsonl'\n";
    refused(
        text,
        expect![[r#"
            1 problem in job spec `job.toml`
              line 3: data.evaluation: is required, for `evaluation.before`, `after` or `every_steps` asks for evaluations; name held-out problems here or in `evaluation.sets`, or turn all three off"#]],
    );
    let off = format!("{text}evaluation = {{ before = false, after = false, every_steps = 0 }}");
    assert!(parsed(&off).is_ok());
}

#[test]
fn generators_that_overlap_are_refused() {
    let sources = |train: &str, evaluation: &str| {
        format!(
            "name = 'a'\nmodel.path = 'm'\ndata.train.generator = {{ task = 'addition', {train} }}\n\
             data.evaluation.generator = {{ task = 'addition', {evaluation} }}"
        )
    };
    assert!(parsed(&sources("seed = 3", "seed = 3, part = 'held_out'")).is_ok());
    assert!(parsed(&sources("low = 1, high = 99", "low = 100, high = 200")).is_ok());
    refused(
        &sources("seed = 3", "seed = 4, part = 'held_out'"),
        expect![[r#"
        1 problem in job spec `job.toml`
          line 4: data.evaluation.generator: expected the `low`, `high`, `held_out` and `seed` of `data.train.generator`, so that no problem is in both"#]],
    );
    refused(
        &sources("seed = 3", "seed = 3"),
        expect![[r#"
        1 problem in job spec `job.toml`
          line 4: data.evaluation.generator: gives the very problems that are trained on; expected the other `part` (`held_out` here, `train` there)"#]],
    );
    refused(
        &sources("low = 0, high = 1000", "low = 1, high = 1, held_out = 1, part = 'held_out'"),
        expect![[r#"
        3 problems in job spec `job.toml`
          line 3: data.train.generator.high = 1000: expected `low` (0) to 999: at most 1000 operands, none above 9999
          line 4: data.evaluation.generator.held_out = 1: expected fewer than the 1 pairs
          line 4: data.evaluation.generator: expected the `low`, `high`, `held_out` and `seed` of `data.train.generator`, so that no problem is in both"#]],
    );
}

#[test]
fn sizes_of_a_task_are_those_it_has() {
    let source = |keys: &str| {
        format!(
            "name = 'a'\nmodel.path = 'm'\ndata.train.generator = {{ {keys} }}\n\
             evaluation = {{ before = false, after = false, every_steps = 0 }}"
        )
    };
    for keys in [
        "task = 'countdown', low = 1, high = 9, length = 5",
        "task = 'sorting', length = 16, high = 1000000",
        "task = 'reverse', length = 64, problems = 100",
        "task = 'base_conversion', base = 36, high = 1000000",
        "task = 'modular', modulus = 97",
    ] {
        assert!(parsed(&source(keys)).is_ok(), "{keys}");
    }
    refused(
        &source("task = 'reverse', high = 9, length = 65, base = 2, problems = 0"),
        expect![[r#"
            4 problems in job spec `job.toml`
              line 3: data.train.generator.length = 65: expected 2 to 64
              line 3: data.train.generator.base = 2: has no effect on the task `reverse`; leave it out
              line 3: data.train.generator.high = 9: has no effect on the task `reverse`, which has letters; leave it out
              line 3: data.train.generator.problems = 0: expected 1 to 1000000"#]],
    );
    refused(
        &source("task = 'base_conversion', base = 1, length = 2, high = 1000001"),
        expect![[r#"
            3 problems in job spec `job.toml`
              line 3: data.train.generator.length = 2: has no effect on the task `base_conversion`; leave it out
              line 3: data.train.generator.base = 1: expected 2 to 36
              line 3: data.train.generator.high = 1000001: expected `low` (10) to 1000000: no number above 1000000"#]],
    );
    refused(
        &source("task = 'sorting', low = 1, high = 2, length = 2"),
        expect![[r#"
            1 problem in job spec `job.toml`
              line 3: data.train.generator.held_out = 200: expected fewer than the 4 problems"#]],
    );
    let evaluation = "data.evaluation.generator = { task = 'modular', modulus = 5, part = 'held_out' }\n";
    let other = source("task = 'modular', modulus = 7, seed = 3");
    assert!(parsed(&other.replace("evaluation =", &format!("{evaluation}evaluation ="))).is_ok(), "other questions");
    refused(
        &other.replace("modulus = 7", "modulus = 5").replace("evaluation =", &format!("{evaluation}evaluation =")),
        expect![[r#"
            1 problem in job spec `job.toml`
              line 4: data.evaluation.generator: expected the `low`, `high`, `held_out` and `seed` of `data.train.generator`, so that no problem is in both"#]],
    );
}

#[test]
fn changed_fields_are_checked_again() {
    let mut spec = parsed(MINIMAL).expect("valid");
    assert_eq!(spec.validate(Path::new("x")), Ok(()));
    spec.batch.steps = 0;
    let errors = spec.validate(Path::new("the command line")).expect_err("0 steps");
    expect![[r#"
        1 problem in job spec `the command line`
          batch.steps = 0: expected 1 to 1000000000"#]]
    .assert_eq(&errors.to_string());
}

#[test]
fn verifiers_and_rewards_are_checked_together() {
    let text = format!(
        "{MINIMAL}
[verifier]
kind = 'exec'
extraction = 'strict'
address = 'here'
ca = 'ca.crt'
plain_text = true
max_attempts = 0
[reward]
format_bonus = 0.5
overlong_tokens = 9000
label_noise = 0.1
[reward.verifiers.style]
kind = 'grpc'
comand = ['x']
command = ['x']
weight = nan
[reward.verifiers.label]
kind = 'grpc'
address = 'nohost'
ca = ''
plain_text = true
[reward.verifiers.judge]
kind = 'llm'
"
    );
    refused(
        &text,
        expect![[r#"
            18 problems in job spec `job.toml`
              line 7: verifier.command = []: expected the program that verifies and its arguments, for kind `exec`
              line 9: verifier.extraction: applies to kind `math` only, not to `exec`
              line 10: verifier.address = "here": applies to kind `grpc` only, not to `exec`
              line 11: verifier.ca = "ca.crt": applies to kind `grpc` only, not to `exec`
              line 12: verifier.plain_text = true: applies to kind `grpc` only, not to `exec`
              line 13: verifier.max_attempts = 0: expected 1 to 100
              line 14: reward.format_strings = []: expected what a well-formed response holds, for there is a `reward.format_bonus`
              line 16: reward.overlong_tokens = 9000: expected 0 to `rollout.max_new_tokens` (8192)
              line 17: reward.label_noise = 0.1: expected 0: only the labels of built-in verifiers, which are 0 or 1, can be inverted
              line 18: reward.verifiers.style.address: is required for kind `grpc`: where the service listens, host:port
              line 20: reward.verifiers.style.comand: unknown key; did you mean `command`?
              line 21: reward.verifiers.style.command = ["x"]: applies to kind `exec` only, not to `grpc`
              line 22: reward.verifiers.style.weight = NaN: expected -1000 to 1000
              line 23: reward.verifiers.label: expected a name of 1 to 32 letters, digits, `-` and `_`, not `label`: that is `[verifier]`
              line 25: reward.verifiers.label.address = "nohost": expected host:port
              line 26: reward.verifiers.label.ca = "": expected a PEM file of certificates
              line 27: reward.verifiers.label.plain_text = true: with `ca` the connection is TLS; leave one of the two out
              line 29: reward.verifiers.judge.kind = "llm": expected one of `math`, `exact`, `countdown`, `code`, `exec`, `grpc`"#]],
    );
}

#[test]
fn programs_that_judge_have_limits() {
    let exec = |keys: &str| {
        let text = format!("{MINIMAL}verifier = {{ kind = 'exec', command = ['v'], {keys} }}\n");
        let spec = parsed(&text).expect("valid");
        let JudgeKind::Exec(exec) = spec.verifier.judge().by else { panic!("no program") };
        exec
    };
    let usual = exec("");
    assert_eq!(usual, ExecSpec::new(vec!["v".into()]));
    let (gib, some) = (1 << 30, |value: u64| Some(value));
    let limits = usual.limits;
    assert_eq!((limits.memory_bytes, limits.file_bytes, limits.processes), (some(16 * gib), some(gib), None));
    let given = exec("environment = ['HF_*', 'TOKEN'], max_memory_gib = 0.5, max_cpu_seconds = 0, max_processes = 9");
    assert_eq!(given.environment, ["HF_*", "TOKEN"]);
    let limits = given.limits;
    assert_eq!((limits.memory_bytes, limits.cpu_seconds, limits.processes), (some(gib / 2), None, some(9)));
    refused(
        &format!(
            "{MINIMAL}[verifier]\nkind = 'exec'\ncommand = ['v']\nenvironment = ['A=b', '*', '']\nmax_memory_gib = nan\n\
             max_open_files = 9999999\n[reward.verifiers.style]\nkind = 'math'\nenvironment = ['A']\nmax_file_mib = 1\n"
        ),
        expect![[r#"
            5 problems in job spec `job.toml`
              line 9: verifier.environment = ["A=b", "*", ""]: expected at most 64 names of variables, without `=`; a name may end in `*`
              line 10: verifier.max_memory_gib = NaN: expected 0 to 1048576
              line 11: verifier.max_open_files = 9999999: expected 0 to 1048576
              line 14: reward.verifiers.style.environment = ["A"]: applies to kind `exec` only, not to `math`
              line 15: reward.verifiers.style.max_file_mib = 1: applies to kind `exec` only, not to `math`"#]],
    );
}

#[test]
fn verifiers_of_ones_own_are_read() {
    let text = format!(
        "{MINIMAL}verifier = {{ kind = 'exec', command = ['python3', 'v.py'], timeout_seconds = 2.5 }}
[reward]
weight = 0.5
format_bonus = 0.1
format_strings = ['</think>', '\\boxed{{']
[reward.verifiers.style]
kind = 'grpc'
address = 'node-3:9000'
ca = 'ca.crt'
weight = -0.25
"
    );
    let spec = parsed(&text).expect("valid");
    assert_eq!(parsed(&spec.resolved_toml()).expect("resolved specs are valid"), spec);
    let command = vec!["python3".to_owned(), "v.py".to_owned()];
    let timeout = std::time::Duration::from_millis(2500);
    assert_eq!(spec.verifier.judge(), JudgeSpec { by: JudgeKind::Exec(ExecSpec::new(command)), timeout });
    let style = &spec.reward.verifiers["style"];
    let service = ServiceAddress { address: "node-3:9000".into(), ca: Some("ca.crt".into()), plain_text: false };
    assert_eq!((style.weight, style.judge().by), (-0.25, JudgeKind::Grpc(service)));
    assert_eq!(spec.reward.format_strings, ["</think>", "\\boxed{"]);
}
