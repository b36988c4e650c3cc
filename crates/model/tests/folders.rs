//! Reading and writing model folders: what is refused, and that what was written reads back.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[path = "../../../tests/fuzz/src/mutate.rs"]
mod mutate;
#[path = "../../../tests/fuzz/src/safetensors.rs"]
mod safetensors;

use std::fs;
use std::path::{Path, PathBuf};

use pacs_model::{Export, ModelConfig, Parameters};
use pacs_torch::tch::{Device, Kind, Tensor};
use serde_json::Value;

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models").join(name)
}

fn copy(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(golden(name)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    dir
}

fn load(dir: &Path) -> Result<Parameters, String> {
    let config = ModelConfig::read(dir).map_err(|error| error.to_string())?;
    Parameters::load(dir, &config, Kind::Float, Device::Cpu).map_err(|error| error.to_string())
}

fn edit_tensors(path: &Path, edit: impl FnOnce(&mut Vec<(String, Tensor)>)) {
    let mut tensors = Tensor::read_safetensors(path).unwrap();
    edit(&mut tensors);
    Tensor::write_safetensors(&tensors, path).unwrap();
}

fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    edit(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

#[test]
fn missing_unexpected_and_misshapen_tensors() {
    let norm = "model.layers.1.input_layernorm.weight";
    type Edit = fn(&mut Vec<(String, Tensor)>);
    let cases: [(Edit, &str); 4] = [
        (|tensors| tensors.retain(|(name, _)| !name.contains("layers.1.input")), "lacks tensor"),
        (
            |tensors| tensors.push(("model.extra".to_owned(), Tensor::ones([3], (Kind::Float, Device::Cpu)))),
            "`model.extra`",
        ),
        (
            |tensors| {
                for (_, tensor) in tensors.iter_mut().filter(|(name, _)| name.contains("layers.1.input")) {
                    *tensor = Tensor::ones([63], (Kind::Float, Device::Cpu));
                }
            },
            "has shape [63], config.json asks for [64]",
        ),
        (
            |tensors| {
                for (_, tensor) in tensors.iter_mut().filter(|(name, _)| name.contains("layers.1.input")) {
                    let _ = tensor.get(5).fill_(f64::NAN);
                }
            },
            "not finite",
        ),
    ];
    for (edit, expected) in cases {
        let dir = copy("llama3");
        edit_tensors(&dir.path().join("model.safetensors"), edit);
        let error = load(dir.path()).unwrap_err();
        assert!(error.contains(expected) && error.contains("model.safetensors"), "{error}");
        assert!(error.contains(norm) || error.contains("model.extra"), "{error}");
    }
}

/// The tensors of a file, by name.
type Tensors = Vec<(String, Tensor)>;

/// Stacks the experts of a folder as transformers 5 computes with them.
fn stack_experts(tensors: &mut Tensors) {
    let of_expert =
        |name: &str| name.split_once(".mlp.experts.").map(|(layer, rest)| (layer.to_owned(), rest.to_owned()));
    let layers: std::collections::BTreeSet<String> =
        tensors.iter().filter_map(|(name, _)| Some(of_expert(name)?.0)).collect();
    for layer in layers {
        let get = |expert: usize, matrix: &str| {
            let wanted = format!("{layer}.mlp.experts.{expert}.{matrix}.weight");
            tensors.iter().find(|(name, _)| *name == wanted).unwrap().1.shallow_clone()
        };
        let both = |expert| Tensor::cat(&[get(expert, "gate_proj"), get(expert, "up_proj")], 0);
        let gate_up = Tensor::stack(&(0..8).map(both).collect::<Vec<_>>(), 0);
        let down = Tensor::stack(&(0..8).map(|expert| get(expert, "down_proj")).collect::<Vec<_>>(), 0);
        tensors.retain(|(name, _)| of_expert(name).is_none_or(|(of, _)| of != layer));
        tensors.push((format!("{layer}.mlp.experts.gate_up_proj"), gate_up));
        tensors.push((format!("{layer}.mlp.experts.down_proj"), down));
    }
}

#[test]
fn experts_are_read_stacked_or_one_by_one_and_written_one_by_one() {
    let weights = "model.safetensors";
    let single = load(&golden("qwen3_moe")).unwrap();
    let dir = copy("qwen3_moe");
    edit_tensors(&dir.path().join(weights), stack_experts);
    let stacked = load(dir.path()).unwrap();
    assert_eq!(stacked.flat, single.flat);

    let out = tempfile::tempdir().unwrap();
    stacked.save_hf(dir.path(), out.path(), Kind::Float).unwrap();
    let sorted = |dir: &Path| {
        let mut tensors = Tensor::read_safetensors(dir.join(weights)).unwrap();
        tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
        tensors
    };
    // The names and shapes that transformers read when the golden folder was made.
    let (written, expected) = (sorted(out.path()), sorted(&golden("qwen3_moe")));
    assert_eq!(written.len(), expected.len());
    for ((name, tensor), (wanted, values)) in written.iter().zip(&expected) {
        assert!(name == wanted && tensor == values, "{name} and {wanted}");
    }

    let refused = |edit: &dyn Fn(&mut Tensors), expected: &[&str]| {
        let dir = copy("qwen3_moe");
        edit_tensors(&dir.path().join(weights), |tensors| edit(tensors));
        let error = load(dir.path()).unwrap_err();
        assert!(expected.iter().all(|part| error.contains(part)), "{error}");
    };
    refused(
        &|tensors| tensors.retain(|(name, _)| !name.contains("2.mlp.experts.7.up")),
        &["lacks", "experts.7.up_proj"],
    );
    refused(
        &|tensors| tensors.retain(|(name, _)| !name.ends_with("2.mlp.gate.weight")),
        &["lacks", "2.mlp.gate.weight"],
    );
    let both = |tensors: &mut Tensors| {
        let single: Vec<_> = tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        stack_experts(tensors);
        tensors.extend(single.into_iter().filter(|(name, _)| name.contains(".mlp.experts.")));
    };
    refused(&both, &["holds tensor `model.layers.0.mlp.experts.", "the architecture does not have"]);
    let short = |tensors: &mut Tensors| {
        stack_experts(tensors);
        for (_, tensor) in tensors.iter_mut().filter(|(name, _)| name.ends_with("0.mlp.experts.gate_up_proj")) {
            *tensor = tensor.narrow(0, 0, 7).copy();
        }
    };
    refused(&short, &["0.mlp.experts.gate_up_proj", "has shape [7, 48, 32], config.json asks for [8, 48, 32]"]);
    let broken = |tensors: &mut Tensors| {
        stack_experts(tensors);
        for (_, tensor) in tensors.iter_mut().filter(|(name, _)| name.ends_with("0.mlp.experts.down_proj")) {
            let _ = tensor.get(7).get(31).fill_(f64::NAN);
        }
    };
    refused(&broken, &["not finite", "0.mlp.experts.down_proj"]);
}

#[test]
fn truncated_and_corrupt_files() {
    let dir = copy("llama3");
    let path = dir.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    let header = usize::try_from(u64::from_le_bytes(whole[..8].try_into().unwrap())).unwrap();
    let garbage = vec![0xa5; 4096];
    let mut overlapping = whole.clone();
    let text = String::from_utf8(whole[8..8 + header].to_vec()).unwrap();
    overlapping[8..8 + header].copy_from_slice(text.replacen("\"shape\":[64]", "\"shape\":[65]", 1).as_bytes());
    let cases: [(&[u8], &str); 7] = [
        (&whole[..whole.len() - 100], "is truncated: tensor `"),
        (&whole[..header / 2], "ends within the safetensors header"),
        (&whole[..3], "shorter than a safetensors header"),
        (&[], "shorter than a safetensors header"),
        (&garbage, "not the size of a safetensors header"),
        (&[&whole[..], b"x"].concat(), "bytes after its last tensor"),
        (&overlapping, "do not fit together"),
    ];
    for (content, expected) in cases {
        fs::write(&path, content).unwrap();
        let error = load(dir.path()).unwrap_err();
        assert!(error.contains(expected) && error.contains("model.safetensors"), "{error}");
    }
    fs::remove_file(&path).unwrap();
    assert!(load(dir.path()).unwrap_err().contains("no weights"));
}

#[test]
fn index_must_fit_its_shards() {
    let norm = "model.norm.weight";
    for (shard, expected) in [
        ("../model-00002-of-00002.safetensors", "outside the model folder"),
        ("/etc/passwd", "outside the model folder"),
        ("..", "outside the model folder"),
        ("model-00009.safetensors", "open `"),
        ("model-00001-of-00002.safetensors", "model-00001-of-00002.safetensors` lacks tensor `model.norm.weight`"),
    ] {
        let dir = copy("qwen2-untied");
        edit_json(&dir.path().join("model.safetensors.index.json"), |index| index["weight_map"][norm] = shard.into());
        let error = load(dir.path()).unwrap_err();
        assert!(error.contains(expected), "{shard}: {error}");
    }
    let dir = copy("qwen2-untied");
    edit_json(&dir.path().join("model.safetensors.index.json"), |index| {
        index["weight_map"].as_object_mut().unwrap().remove(norm);
    });
    let error = load(dir.path()).unwrap_err();
    assert!(error.contains("`model.norm.weight`, which the index does not place there"), "{error}");
}

#[test]
fn leftovers_of_published_checkpoints() {
    let dir = copy("qwen2-tied");
    let path = dir.path().join("model.safetensors");
    let embedding = load(dir.path()).unwrap().view("model.embed_tokens.weight");
    let add = |name: &str, tensor: &Tensor| {
        let entry = (name.to_owned(), tensor.copy());
        edit_tensors(&path, |tensors| {
            tensors.retain(|(other, _)| other != name);
            tensors.push(entry);
        });
    };
    add("lm_head.weight", &embedding);
    add("model.layers.0.self_attn.rotary_emb.inv_freq", &embedding.get(0));
    load(dir.path()).unwrap();
    add("lm_head.weight", &(embedding + 1.0));
    assert!(load(dir.path()).unwrap_err().contains("differs from the embedding"));
}

/// A whole file is the model, whatever an index that was left there says.
#[test]
fn the_case_of_a_stale_index_is_a_whole_model() {
    let dir = copy("qwen2-tied");
    let case = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/cases/stale-index");
    let index = "model.safetensors.index.json";
    fs::copy(case.join(index), dir.path().join(index)).unwrap();
    assert_eq!(load(dir.path()).unwrap().flat, load(&golden("qwen2-tied")).unwrap().flat);
}

/// A folder that is exported asks its model as it was trained, and ends where it was ended.
#[test]
fn an_export_has_the_template_and_the_end_tokens_of_training() {
    let source = copy("qwen2-tied");
    let parameters = load(source.path()).unwrap();
    fs::remove_file(source.path().join("generation_config.json")).unwrap();
    let json = |dir: &Path, name: &str| -> Value {
        serde_json::from_str(&fs::read_to_string(dir.join(name)).unwrap()).unwrap()
    };
    let variables = serde_json::json!({"brief": true});
    let variables = variables.as_object().unwrap();
    let template = "{% for m in messages %}[{{ m.content }}]{% endfor %}{{ brief }}";
    let export = Export::new(source.path(), Some(template), variables).unwrap();
    let out = tempfile::tempdir().unwrap();
    parameters.export(&export, out.path(), Kind::Float).unwrap();
    let rendered = |dir: &Path| {
        let messages = [pacs_text::Message::user("1+1?")];
        pacs_text::ChatTemplate::read(dir).unwrap().render(&messages, true, &serde_json::Map::new()).unwrap()
    };
    assert_eq!(rendered(out.path()), "[1+1?]True");
    // Older readers take it from here.
    let text = fs::read_to_string(out.path().join("chat_template.jinja")).unwrap();
    assert_eq!(json(out.path(), "tokenizer_config.json")["chat_template"], text);
    assert_eq!(json(out.path(), "generation_config.json")["eos_token_id"], 383);
    assert_eq!(ModelConfig::read(out.path()).unwrap().end_tokens, [383]);

    // Without another template all stays as it was.
    let out = tempfile::tempdir().unwrap();
    let plain = Export::new(source.path(), None, &serde_json::Map::new()).unwrap();
    parameters.export(&plain, out.path(), Kind::Float).unwrap();
    assert_eq!(rendered(out.path()), rendered(source.path()));
    let tokenizer = |dir: &Path| fs::read(dir.join("tokenizer_config.json")).unwrap();
    assert_eq!(tokenizer(out.path()), tokenizer(source.path()), "to the byte");
}

#[test]
fn what_is_written_reads_back() {
    for (name, kind) in [
        ("qwen2-untied", Kind::Float),
        ("qwen2-tied", Kind::Float),
        ("llama3", Kind::BFloat16),
        ("phi3", Kind::Float),
        ("gemma3", Kind::BFloat16),
    ] {
        let source = golden(name);
        let parameters = load(&source).unwrap();
        let out = tempfile::tempdir().unwrap();
        let dir = out.path().join("new/model");
        parameters.save_hf(&source, &dir, kind).unwrap();
        // Writing over it is fine, too.
        parameters.save_hf(&source, &dir, kind).unwrap();
        let again = load(&dir).unwrap();
        let rounded = parameters.flat.to_kind(kind).to_kind(Kind::Float);
        assert_eq!(again.flat, rounded);
        assert_eq!(ModelConfig::read(&dir).unwrap(), ModelConfig::read(&source).unwrap());
        let config: Value = serde_json::from_str(&fs::read_to_string(dir.join("config.json")).unwrap()).unwrap();
        let key = if name == "qwen2-untied" { "dtype" } else { "torch_dtype" };
        assert_eq!(config[key], if kind == Kind::Float { "float32" } else { "bfloat16" });
        let mut files: Vec<_> =
            fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        files.sort();
        let mut expected = vec![
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ];
        if name == "qwen2-untied" {
            expected.insert(0, "chat_template.jinja");
        }
        assert_eq!(files, expected);
    }
}

/// The inputs of `tests/fuzz`, a bounded number of them, and headers that only an attacker writes.
#[test]
fn any_safetensors_header_is_read_or_refused() {
    mutate::each(&safetensors::examples(), 1000, safetensors::check);
}
