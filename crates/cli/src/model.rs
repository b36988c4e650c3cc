//! `pacs model check`: reports what is understood of a Hugging Face folder, and what was assumed; and `pacs model untie`.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::anyhow;
use pacs_data::Prompter;
use pacs_hub::Part;
use pacs_runtime::Exit;
use pacs_shape::{Activation, EndToken, LayerRotation, ModelConfig, RopeScaling, Rotary, WeightFiles, Windows};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::arguments::{ModelCheck, ModelUntie};
use crate::failure::Failure;
use crate::format::count;
use crate::hub;
use crate::model_folder;
use crate::output;

/// The report of a model folder; `--json` prints it as it is.
#[derive(Debug, Serialize)]
struct Understood {
    path: String,
    architecture: String,
    /// Number of parameters; `None` where the folder has no weights yet.
    parameters: Option<u64>,
    stored_as: String,
    layers: usize,
    hidden: i64,
    heads: [i64; 3],
    max_positions: usize,
    rope: String,
    /// Which layers attend within a window, and caps; none where all see everything.
    attention: Option<String>,
    /// Sizes of a mixture of experts; none where all layers are dense.
    experts: Option<String>,
    /// What is computed by tensor operations rather than by fused kernels, and where.
    tensor_operations: Vec<String>,
    tied_embeddings: bool,
    embedding_rows: i64,
    tokenizer_rows: usize,
    end_tokens: Vec<String>,
    turn_end: Option<String>,
    has_chat_template: bool,
    sample_prompt: String,
    sample_tokens: usize,
    /// Defaults that were taken because no file of the folder sets the value.
    assumptions: Vec<String>,
    /// Defects for which a run would refuse the folder or train wrongly.
    problems: Vec<String>,
}

const QUESTION: &str = "What is 2 + 3?";

pub(crate) fn check(arguments: &ModelCheck) -> Result<Exit, Failure> {
    let (folder, _) = hub::session(None, |hub| hub.model(&arguments.folder, Part::Texts))?;
    let understood = understand(&folder)?;
    if arguments.json {
        output::json(format_args!("{:#}", serde_json::to_value(&understood).map_err(Failure::bug)?));
    } else {
        output::text(as_text(&understood));
    }
    if understood.problems.is_empty() {
        return Ok(Exit::Done);
    }
    Err(Failure::config(anyhow!("{}", understood.problems.join("; "))).doing("accept the model folder"))
}

/// `pacs model untie`.
pub(crate) fn untie(arguments: &ModelUntie) -> Result<Exit, Failure> {
    let (folder, _) = hub::session(None, |hub| hub.model(&arguments.folder, Part::Whole))?;
    let doing = format!("write model `{}` with an output head of its own", folder.display());
    pacs_vllm::untie(&folder, &arguments.out).map_err(|error| Failure::config(error).doing(doing))?;
    output::text(format_args!("written to {}\n", arguments.out.display()));
    Ok(Exit::Done)
}

fn understand(dir: &Path) -> Result<Understood, Failure> {
    let failed = |error: anyhow::Error| Failure::config(error).doing(format!("read model `{}`", dir.display()));
    let config = ModelConfig::read(dir).map_err(|error| failed(error.into()))?;
    let parameters = match WeightFiles::are_in(dir) {
        true => Some(model_folder::inspect(dir).map_err(failed)?.parameters),
        false => None,
    };
    let raw = raw_config(dir);
    let prompter = Prompter::read(dir, None, String::new()).map_err(|error| failed(error.into()))?;
    let prompt = prompter.question(QUESTION).map_err(|error| failed(error.into()))?;
    let end_tokens = EndToken::of_folder(dir).map_err(|error| failed(error.into()))?;
    let turn_end = prompter.turn_end();
    let tokenizer_rows = prompter.tokenizer().rows();
    let mut problems = Vec::new();
    if end_tokens.is_empty() {
        problems
            .push("no file names a token that ends an answer; set `eos_token_id` in generation_config.json".to_owned());
    }
    let turn_id = turn_end.as_ref().and_then(|end| prompter.tokenizer().token_id(end));
    if let Some(end) = turn_end.as_ref().filter(|_| !end_tokens.iter().any(|token| Some(token.id) == turn_id)) {
        problems.push(format!(
            "the chat template ends an answer with `{end}`, which no file names as an end token; add it to `eos_token_id` of \
             generation_config.json, or to `rollout.stop` of the job"
        ));
    }
    if let Some(token) = prompt.tokens.iter().find(|token| i64::from(**token) >= config.vocab_size) {
        problems.push(format!("a prompt has the token {token}, and the embedding {} rows", config.vocab_size));
    }
    let mut assumptions = assumptions(&raw, &config);
    if prompter.is_plain() {
        assumptions.push("no chat template: a prompt is the text of its question alone".to_owned());
    }
    if tokenizer_rows as i64 > config.vocab_size {
        let rows = config.vocab_size;
        assumptions
            .push(format!("the tokenizer has {tokenizer_rows} tokens for {rows} rows: the last ones are never used"));
    }
    if parameters.is_none() {
        assumptions.push("no weights yet".to_owned());
    }
    if config.most_positions() > config.max_positions {
        let end = config.max_positions;
        assumptions.push(format!(
            "a job whose sequences end at {end} tokens rotates them by `short_factor`, any other all of its sequences by `long_factor`"
        ));
    }
    let text = |key: &str| raw.get(key).and_then(Value::as_str);
    Ok(Understood {
        path: dir.display().to_string(),
        architecture: text("model_type").unwrap_or("unknown").to_owned(),
        parameters,
        stored_as: text("dtype").or_else(|| text("torch_dtype")).unwrap_or("not said").to_owned(),
        layers: config.layers,
        hidden: config.hidden,
        heads: [config.heads, config.kv_heads, config.head_dim],
        max_positions: config.most_positions(),
        rope: rope(&config),
        attention: attention(&config),
        experts: experts(&config),
        tensor_operations: tensor_operations(&config),
        tied_embeddings: config.tie_embeddings,
        embedding_rows: config.vocab_size,
        tokenizer_rows,
        end_tokens: end_tokens.iter().map(ToString::to_string).collect(),
        turn_end,
        has_chat_template: !prompter.is_plain(),
        sample_tokens: prompt.tokens.len(),
        sample_prompt: prompt.text,
        assumptions,
        problems,
    })
}

/// Reads `config.json` again as raw JSON, to see which keys it lacks.
fn raw_config(dir: &Path) -> Map<String, Value> {
    let text = fs::read_to_string(dir.join("config.json")).unwrap_or_default();
    serde_json::from_str(text.strip_prefix('\u{feff}').unwrap_or(&text)).unwrap_or_default()
}

fn assumptions(raw: &Map<String, Value>, config: &ModelConfig) -> Vec<String> {
    let is_said = |key: &str| raw.get(key).is_some_and(|value| !value.is_null());
    let rope_says = |key: &str| {
        let of = |table: &str| raw.get(table).is_some_and(|table| table.get(key).is_some());
        is_said(key) || of("rope_parameters") || of("rope_scaling")
    };
    let activation = match config.architecture.activation {
        Activation::Silu => ("hidden_act", "silu"),
        Activation::GeluTanh => ("hidden_activation", "gelu_pytorch_tanh"),
    };
    let taken = [
        (is_said("num_key_value_heads"), "num_key_value_heads", config.kv_heads.to_string()),
        (is_said("head_dim"), "head_dim", config.head_dim.to_string()),
        (is_said("rms_norm_eps"), "rms_norm_eps", config.rms_eps.to_string()),
        (rope_says("rope_theta"), "rope_theta", config.rotary[0].theta.to_string()),
        (is_said("tie_word_embeddings"), "tie_word_embeddings", config.tie_embeddings.to_string()),
        (is_said(activation.0), activation.0, activation.1.to_owned()),
    ];
    let mut taken = Vec::from(taken);
    let window = config.layer_kinds.iter().find_map(|kind| kind.window);
    if let Some(window) = window {
        taken.push((raw.contains_key("sliding_window"), "sliding_window", window.to_string()));
        if let Windows::Alternating(pattern) = config.architecture.windows {
            let value = format!("a window in all layers but every {pattern}-th");
            taken.push((is_said("layer_types") || is_said("sliding_window_pattern"), "layer_types", value));
        }
    }
    if config.architecture.rotation == LayerRotation::Skipping {
        let is_said = is_said("no_rope_layers") || is_said("no_rope_layer_interval");
        taken.push((is_said, "no_rope_layers", "every fourth layer".to_owned()));
    }
    if let Some(scalar) = config.query_scalar {
        taken.push((is_said("query_pre_attn_scalar"), "query_pre_attn_scalar", scalar.to_string()));
    }
    for (key, cap) in [("attn_logit_softcapping", config.score_cap), ("final_logit_softcapping", config.logit_cap)] {
        taken.extend(cap.map(|cap| (raw.contains_key(key), key, cap.to_string())));
    }
    if let Some(experts) = &config.experts {
        let is_counted = is_said("num_experts") || is_said("num_local_experts");
        taken.push((is_counted, "num_experts", experts.count.to_string()));
        for (key, value) in [
            ("num_experts_per_tok", experts.per_token.to_string()),
            ("moe_intermediate_size", experts.ffn.to_string()),
            ("norm_topk_prob", experts.renormalises.to_string()),
        ] {
            taken.push((is_said(key), key, value));
        }
    }
    let missing = taken.into_iter().filter(|(is_said, ..)| !is_said);
    missing.map(|(_, key, value)| format!("config.json does not say `{key}`: {value}")).collect()
}

/// The rotary embeddings, and the layers that have none.
fn rope(config: &ModelConfig) -> String {
    let of = |rotary: &Rotary| {
        let theta = rotary.theta;
        let base = match &rotary.scaling {
            RopeScaling::None => format!("base {theta}"),
            RopeScaling::Linear { factor } => format!("base {theta}, linear scaling by {factor}"),
            RopeScaling::Llama3 { factor, original_max_positions, .. } => {
                format!("base {theta}, llama3 scaling by {factor} from {original_max_positions} positions")
            }
            RopeScaling::LongRope { magnitude, .. } => format!("base {theta}, longrope with magnitude {magnitude:.4}"),
        };
        if rotary.share == 1.0 {
            return base;
        }
        format!("{base}, of {} of {} elements of a head", rotary.width(config.head_dim), config.head_dim)
    };
    let mut text = of(&config.rotary[0]);
    if let Some(apart) = config.rotary.get(1) {
        let _ = write!(text, "; {} in layers with a window", of(apart));
    }
    let still = (0..config.layers).filter(|layer| config.layer_kind(*layer).rotary.is_none()).count();
    if still > 0 {
        let _ = write!(text, "; none in {still} of {} layers", config.layers);
    }
    text
}

/// Windows and caps.
fn attention(config: &ModelConfig) -> Option<String> {
    let windows: Vec<usize> = (0..config.layers).filter_map(|layer| config.layer_kind(layer).window).collect();
    let window = windows.first().map(|window| {
        let (some, all) = (windows.len(), config.layers);
        format!("a window of {} tokens in {some} of {all} layers", count(*window as u64))
    });
    let score = config.score_cap.map(|cap| format!("scores capped at {cap}"));
    let logit = config.logit_cap.map(|cap| format!("logits capped at {cap}"));
    let parts: Vec<String> = [window, score, logit].into_iter().flatten().collect();
    (!parts.is_empty()).then(|| parts.join(", "))
}

/// Experts, and how much of the model computes a token.
fn experts(config: &ModelConfig) -> Option<String> {
    let experts = config.experts.as_ref()?;
    let sum = if experts.renormalises { "weights that sum to 1" } else { "weights that sum to less than 1" };
    let sparse = config.layers - experts.dense_layers.len();
    let [active, all] = [config.active_parameter_count(), config.parameter_count()].map(|n| count(n as u64));
    Some(format!(
        "{} of width {} in {sparse} of {} layers; a token has {}, with {sum}: {active} of {all} parameters compute it",
        experts.count, experts.ffn, config.layers, experts.per_token
    ))
}

fn tensor_operations(config: &ModelConfig) -> Vec<String> {
    let on_cpu = config.beyond_cpu_kernels().into_iter().map(|part| format!("on a CPU {part}, by tensor operations"));
    let on_gpu = config
        .beyond_gpu_kernels()
        .map(|part| format!("on a GPU everything, by tensor operations: there are no kernels for {part}"));
    // Where kernels compute nothing, this part is among the rest.
    let beside = config.beside_gpu_kernels().filter(|_| config.beyond_gpu_kernels().is_none());
    let beside =
        beside.map(|part| format!("on a GPU {part}, by tensor operations, and generation without CUDA graphs"));
    on_cpu.chain(on_gpu).chain(beside).collect()
}

fn as_text(found: &Understood) -> String {
    let mut text = String::new();
    let parameters = found.parameters.map_or("no weights yet".to_owned(), |n| format!("{} parameters", count(n)));
    let [heads, kv_heads, head_dim] = found.heads;
    let tied = if found.tied_embeddings { "tied" } else { "not tied" };
    let ends = if found.end_tokens.is_empty() { "none".to_owned() } else { found.end_tokens.join(", ") };
    let template = match (&found.turn_end, found.has_chat_template) {
        (Some(end), _) => format!("ends an answer with `{end}`"),
        (None, true) => "ends an answer with no control token".to_owned(),
        (None, false) => "none".to_owned(),
    };
    for (what, said) in [
        ("model", format!("{} ({}, {parameters}, stored as {})", found.path, found.architecture, found.stored_as)),
        (
            "layers",
            format!(
                "{} of width {}, {heads} heads and {kv_heads} for keys of width {head_dim}",
                found.layers, found.hidden
            ),
        ),
        ("positions", format!("{}, rotary embedding with {}", count(found.max_positions as u64), found.rope)),
        ("attention", found.attention.clone().unwrap_or_default()),
        ("experts", found.experts.clone().unwrap_or_default()),
        (
            "vocabulary",
            format!("{} rows of the embedding ({tied}), {} tokens", found.embedding_rows, found.tokenizer_rows),
        ),
        ("end tokens", ends),
        ("template", template),
        ("prompt", format!("{:?} ({} tokens)", found.sample_prompt, found.sample_tokens)),
    ] {
        if !said.is_empty() {
            let _ = writeln!(text, "{what:<11} {said}");
        }
    }
    for part in &found.tensor_operations {
        let _ = writeln!(text, "slower      {part}");
    }
    for assumption in &found.assumptions {
        let _ = writeln!(text, "assumed     {assumption}");
    }
    text
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use expect_test::expect;

    use super::*;

    fn golden(model: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models").join(model)
    }

    fn copy(model: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a temporary folder");
        for entry in fs::read_dir(golden(model)).expect("a folder") {
            let path = entry.expect("an entry").path();
            fs::copy(&path, dir.path().join(path.file_name().expect("a name"))).expect("copied");
        }
        dir
    }

    #[test]
    fn a_folder_is_described() {
        let found = understand(&golden("qwen2-tied")).unwrap_or_else(|failure| panic!("{failure}"));
        assert!(found.problems.is_empty(), "{:?}", found.problems);
        let root = golden("").display().to_string();
        let text = as_text(&found).replace(&root, "");
        let lines: Vec<&str> = text.lines().collect();
        let (prompt, assumed) = (lines[6], lines[7]);
        expect![[r#"
            model       qwen2-tied (qwen2, 154 432 parameters, stored as float32)
            layers      3 of width 64, 4 heads and 2 for keys of width 16
            positions   512, rotary embedding with base 1000000
            vocabulary  384 rows of the embedding (tied), 384 tokens
            end tokens  `<|im_end|>` (383, generation_config.json, config.json, tokenizer_config.json), `<|endoftext|>` (381, generation_config.json)
            template    ends an answer with `<|im_end|>`"#]]
        .assert_eq(&lines[..6].join("\n"));
        assert!(prompt.starts_with(r#"prompt      "<|im_start|>system\nYou are Qwen"#), "{prompt}");
        assert!(prompt.contains(r"user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n"), "{prompt}");
        assert_eq!(assumed, "assumed     config.json does not say `head_dim`: 16");
    }

    #[test]
    fn what_an_architecture_does_otherwise_is_said() {
        let of = |model: &str| {
            let found = understand(&golden(model)).unwrap_or_else(|failure| panic!("{failure}"));
            assert!(found.problems.is_empty(), "{model}: {:?}", found.problems);
            let text = as_text(&found);
            let wanted = ["positions", "attention", "experts", "slower", "assumed"];
            let lines = text.lines().filter(|line| wanted.iter().any(|what| line.starts_with(what)));
            lines.fold(String::new(), |text, line| format!("{text}{line}\n"))
        };
        expect![[r#"
            positions   512, rotary embedding with base 1000000, linear scaling by 8; base 10000 in layers with a window
            attention   a window of 6 tokens in 2 of 3 layers
            slower      on a CPU gates with another activation than SiLU, by tensor operations
            slower      on a GPU everything, by tensor operations: there are no kernels for attention within a window
        "#]]
        .assert_eq(&of("gemma3"));
        expect![[r#"
            positions   512, rotary embedding with base 10000, longrope with magnitude 1.0607, of 12 of 16 elements of a head
            attention   a window of 40 tokens in 2 of 2 layers
            slower      on a CPU a rotation of part of each head, by tensor operations
            slower      on a GPU everything, by tensor operations: there are no kernels for attention within a window
            assumed     config.json does not say `head_dim`: 16
            assumed     a job whose sequences end at 256 tokens rotates them by `short_factor`, any other all of its sequences by `long_factor`
        "#]]
        .assert_eq(&of("phi3"));
        expect![[r#"
            positions   512, rotary embedding with base 50000; none in 1 of 3 layers
            assumed     config.json does not say `head_dim`: 8
        "#]]
        .assert_eq(&of("smollm3"));
        expect![[r#"
            positions   512, rotary embedding with base 1000000
            experts     8 of width 24 in 2 of 3 layers; a token has 2, with weights that sum to 1: 52 288 of 79 936 parameters compute it
            slower      on a CPU routes to experts and the sums of their outputs, by tensor operations
            slower      on a GPU experts, by tensor operations, and generation without CUDA graphs
        "#]]
        .assert_eq(&of("qwen3_moe"));
    }

    #[test]
    fn what_will_go_wrong_is_a_problem_and_what_no_file_says_an_assumption() {
        let dir = copy("qwen2-tied");
        let change = |name: &str, change: &dyn Fn(&mut Map<String, Value>)| {
            let path = dir.path().join(name);
            let mut object: Map<String, Value> =
                serde_json::from_str(&fs::read_to_string(&path).expect("read")).expect("an object");
            change(&mut object);
            fs::write(&path, Value::Object(object).to_string()).expect("written");
        };
        fs::remove_file(dir.path().join("generation_config.json")).expect("removed");
        change("config.json", &|config| {
            config.insert("eos_token_id".into(), 0.into());
            config.remove("rms_norm_eps");
        });
        change("tokenizer_config.json", &|config| drop(config.remove("eos_token")));
        let found = understand(dir.path()).unwrap_or_else(|failure| panic!("{failure}"));
        assert!(found.problems.len() == 1 && found.problems[0].contains("`<|im_end|>`"), "{:?}", found.problems);
        assert!(
            found.assumptions.iter().any(|said| said.contains("`rms_norm_eps`: 0.000001")),
            "{:?}",
            found.assumptions
        );
        change("config.json", &|config| drop(config.remove("eos_token_id")));
        let found = understand(dir.path()).unwrap_or_else(|failure| panic!("{failure}"));
        assert!(found.problems[0].contains("no file names a token"), "{:?}", found.problems);
    }
}
