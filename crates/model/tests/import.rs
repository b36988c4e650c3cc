//! GGUF files: a small one made here, and SmolLM2-135M-Instruct where `PACS_TEST_GGUF` names its file.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[path = "../../../tests/fuzz/src/gguf.rs"]
mod gguf;
#[path = "../../../tests/fuzz/src/mutate.rs"]
mod mutate;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use pacs_model::attention::{Packed, PackedRow};
use pacs_model::import::{ImportError, import_gguf};
use pacs_model::{Model, ModelConfig, Parameters};
use pacs_torch::tch::{Device, Kind, Tensor, no_grad};

/// A GGUF file in the making: two layers, width 64, four heads of 16, two key heads, 40 tokens.
struct Draft {
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, QTensor>,
}

impl Draft {
    fn new() -> Self {
        let mut draft = Self { metadata: BTreeMap::new(), tensors: BTreeMap::new() };
        draft.describe();
        draft.add("token_embd.weight", &[40, 64], GgmlDType::Q8_0);
        draft.add("output_norm.weight", &[64], GgmlDType::F32);
        for layer in 0..2 {
            let mut add =
                |part: &str, shape: &[usize], dtype| draft.add(&format!("blk.{layer}.{part}.weight"), shape, dtype);
            add("attn_norm", &[64], GgmlDType::F32);
            add("attn_q", &[64, 64], GgmlDType::Q4_1);
            add("attn_k", &[32, 64], GgmlDType::Q4_0);
            add("attn_v", &[32, 64], GgmlDType::F16);
            add("attn_output", &[64, 64], GgmlDType::Q5_0);
            add("ffn_norm", &[64], GgmlDType::F32);
            add("ffn_gate", &[96, 64], GgmlDType::Q4_1);
            add("ffn_up", &[96, 64], GgmlDType::Q4_1);
            add("ffn_down", &[64, 96], GgmlDType::Q4_1);
        }
        draft
    }

    /// The same as a Qwen: its keys, its pre-tokenizer, and what its layers have in addition.
    fn qwen(family: &str) -> Self {
        let mut draft = Self::new();
        let metadata = std::mem::take(&mut draft.metadata);
        let renamed = |key: String| key.strip_prefix("llama.").map(|rest| format!("{family}.{rest}")).unwrap_or(key);
        draft.metadata = metadata.into_iter().map(|(key, value)| (renamed(key), value)).collect();
        let text = |text: &str| Value::String(text.to_owned());
        draft = draft.set("general.architecture", text(family)).set("tokenizer.ggml.pre", text("qwen2"));
        for layer in 0..2 {
            let parts: &[(&str, usize)] = match family {
                "qwen2" => &[("attn_q.bias", 64), ("attn_k.bias", 32), ("attn_v.bias", 32)],
                _ => &[("attn_q_norm.weight", 16), ("attn_k_norm.weight", 16)],
            };
            parts.iter().for_each(|(part, size)| draft.add(&format!("blk.{layer}.{part}"), &[*size], GgmlDType::F32));
        }
        draft.set(&format!("{family}.attention.key_length"), Value::U32(16))
    }

    fn describe(&mut self) {
        let text = |text: &str| Value::String(text.to_owned());
        let numbers = [
            ("block_count", 2),
            ("context_length", 256),
            ("embedding_length", 64),
            ("feed_forward_length", 96),
            ("attention.head_count", 4),
            ("attention.head_count_kv", 2),
            ("rope.dimension_count", 16),
        ];
        for (key, value) in numbers {
            self.metadata.insert(format!("llama.{key}"), Value::U32(value));
        }
        let tokens = (0..40).map(|i| match i {
            0 => text("<|end|>"),
            1 => text("ab"),
            _ => text(&char::from_u32(95 + i).unwrap().to_string()),
        });
        let types = (0..40).map(|i| Value::I32(if i == 0 { 3 } else { 1 }));
        for (key, value) in [
            ("general.architecture", text("llama")),
            ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
            ("llama.rope.freq_base", Value::F32(5000.0)),
            ("tokenizer.ggml.model", text("gpt2")),
            ("tokenizer.ggml.pre", text("smollm")),
            ("tokenizer.ggml.tokens", Value::Array(tokens.collect())),
            ("tokenizer.ggml.token_type", Value::Array(types.collect())),
            ("tokenizer.ggml.merges", Value::Array(vec![text("a b")])),
            ("tokenizer.ggml.eos_token_id", Value::U32(0)),
            ("tokenizer.chat_template", text("{{ messages }}")),
        ] {
            self.metadata.insert(key.to_owned(), value);
        }
    }

    fn add(&mut self, name: &str, shape: &[usize], dtype: GgmlDType) {
        let count: usize = shape.iter().product();
        let values: Vec<f32> = (0..count).map(|i| ((i * 7919 + name.len() * 31) % 1000) as f32 / 500.0 - 1.0).collect();
        let tensor = candle_core::Tensor::from_vec(values, shape, &candle_core::Device::Cpu).unwrap();
        self.tensors.insert(name.to_owned(), QTensor::quantize(&tensor, dtype).unwrap());
    }

    fn set(mut self, key: &str, value: Value) -> Self {
        self.metadata.insert(key.to_owned(), value);
        self
    }

    fn without(mut self, tensor: &str) -> Self {
        self.tensors.remove(tensor);
        self
    }

    fn write(&self, path: &Path) {
        let metadata: Vec<_> = self.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
        let tensors: Vec<_> = self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        gguf_file::write(&mut File::create(path).unwrap(), &metadata, &tensors).unwrap();
    }

    fn values(&self, name: &str) -> Tensor {
        let tensor = self.tensors[name].dequantize(&candle_core::Device::Cpu).unwrap();
        let shape: Vec<i64> = tensor.dims().iter().map(|&size| size as i64).collect();
        Tensor::from_slice(&tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap()).view(shape.as_slice())
    }

    fn import(&self) -> Result<tempfile::TempDir, ImportError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        self.write(&path);
        import_gguf(&path, &dir.path().join("hf"))?;
        Ok(dir)
    }
}

#[test]
fn a_small_file() {
    let draft = Draft::new();
    let dir = draft.import().unwrap();
    let folder = dir.path().join("hf");
    let config = ModelConfig::read(&folder).unwrap();
    assert_eq!((config.heads, config.kv_heads, config.head_dim, config.ffn), (4, 2, 16, 96));
    assert_eq!((config.rms_eps, config.rotary[0].theta, config.tie_embeddings), (1e-5, 5000.0, true));
    assert_eq!((config.end_tokens.as_slice(), config.max_positions), (&[0][..], 256));
    let parameters = Parameters::load(&folder, &config, Kind::Float, Device::Cpu).unwrap();
    let rounded = |name: &str| draft.values(name).to_kind(Kind::BFloat16).to_kind(Kind::Float);
    assert_eq!(parameters.view("model.layers.1.self_attn.o_proj.weight"), rounded("blk.1.attn_output.weight"));
    assert_eq!(parameters.view("model.layers.0.self_attn.v_proj.weight"), rounded("blk.0.attn_v.weight"));
    // Row 5 of head 1 is the first of pair 5; row 13 the second.
    let (found, stored) = (parameters.view("model.layers.1.self_attn.q_proj.weight"), rounded("blk.1.attn_q.weight"));
    assert_eq!(found.get(16 + 5), stored.get(16 + 10));
    assert_eq!(found.get(16 + 13), stored.get(16 + 11));
    let text = fs::read_to_string(folder.join("tokenizer.json")).unwrap();
    assert!(text.contains("\"individual_digits\":true") && text.contains("[\"a\",\"b\"]"));
}

#[test]
fn files_of_the_qwen_family() {
    for family in ["qwen2", "qwen3"] {
        let draft = Draft::qwen(family);
        let dir = draft.import().unwrap();
        let folder = dir.path().join("hf");
        let config = ModelConfig::read(&folder).unwrap();
        assert_eq!((config.architecture.model_type, config.head_dim), (family, 16));
        let parameters = Parameters::load(&folder, &config, Kind::Float, Device::Cpu).unwrap();
        let rounded = |name: &str| draft.values(name).to_kind(Kind::BFloat16).to_kind(Kind::Float);
        // Their files have the order of the rotate-half kind.
        let query = parameters.view("model.layers.1.self_attn.q_proj.weight");
        assert_eq!(query, rounded("blk.1.attn_q.weight"), "{family}");
        match family {
            "qwen2" => {
                assert_eq!(parameters.view("model.layers.0.self_attn.k_proj.bias"), rounded("blk.0.attn_k.bias"))
            }
            _ => {
                let norm = parameters.view("model.layers.1.self_attn.k_norm.weight");
                assert_eq!(norm, rounded("blk.1.attn_k_norm.weight"));
            }
        }
        let tokenizer = pacs_text::Tokenizer::read(&folder).unwrap();
        assert_eq!(tokenizer.encode("ab", true).unwrap(), [1], "no begin token");
    }
}

/// llama.cpp puts one in front for Llama 3, whether the file says so or not.
#[test]
fn a_begin_token_is_there_by_default_where_llama_cpp_has_one() {
    let text = |text: &str| Value::String(text.to_owned());
    let encoded = |draft: Draft| {
        let dir = draft.set("tokenizer.ggml.bos_token_id", Value::U32(0)).import().unwrap();
        pacs_text::Tokenizer::read(&dir.path().join("hf")).unwrap().encode("ab", true).unwrap()
    };
    let llama3 = || Draft::new().set("tokenizer.ggml.pre", text("llama-bpe"));
    assert_eq!(encoded(llama3()), [0, 1]);
    assert_eq!(encoded(llama3().set("tokenizer.ggml.add_bos_token", Value::Bool(false))), [1]);
    assert_eq!(encoded(Draft::new()), [1], "smollm has none");
}

#[test]
fn an_untied_file() {
    let mut draft = Draft::new();
    draft.add("output.weight", &[40, 64], GgmlDType::Q8_0);
    let dir = draft.import().unwrap();
    assert!(!ModelConfig::read(&dir.path().join("hf")).unwrap().tie_embeddings);
}

#[test]
fn refusals() {
    let text = |text: &str| Value::String(text.to_owned());
    let cases = [
        (Draft::new().set("general.architecture", text("mamba")), "a model of architecture `mamba`"),
        (Draft::new().set("llama.expert_count", Value::U32(8)), "a mixture of experts"),
        (Draft::new().set("llama.rope.scaling.type", text("yarn")), "rope scaling"),
        (Draft::new().set("tokenizer.ggml.model", text("llama")), "a tokenizer of model `llama`"),
        (Draft::new().set("tokenizer.ggml.pre", text("tekken")), "pre-tokenizer `tekken`"),
        (Draft::new().set("tokenizer.ggml.eos_token_id", Value::U32(99)), "lies outside the list of tokens"),
        (Draft::new().set("llama.block_count", text("two")), "metadata `llama.block_count` has an unexpected type"),
        (Draft::new().set("llama.block_count", Value::U32(3)), "tensor `blk.2.attn_norm.weight` is missing"),
        (Draft::new().set("llama.block_count", Value::U32(1)), "is not part of the llama architecture"),
        (Draft::new().set("llama.feed_forward_length", Value::U32(128)), "has shape [96, 64], not [128, 64]"),
        (Draft::new().without("token_embd.weight"), "tensor `token_embd.weight` is missing"),
    ];
    for (draft, expected) in cases {
        let error = draft.import().unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("model.gguf"), "{error}");
    }
}

#[test]
fn damaged_files() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    Draft::new().write(&path);
    let whole = fs::read(&path).unwrap();
    // The kind of a tensor follows its name, rank and sizes.
    let name = b"blk.0.attn_q.weight";
    let kind_at = whole.windows(name.len()).position(|window| window == name).unwrap() + name.len() + 4 + 16;
    let mut unknown = whole.clone();
    unknown[kind_at] = 99;
    let cases: [(&[u8], &str); 5] = [
        (b"", "is not a GGUF file"),
        (b"<html>not found</html>", "is not a GGUF file"),
        (&whole[..200], "is corrupt or truncated"),
        (&whole[..whole.len() - 500], "is corrupt or truncated: tensor `"),
        (&unknown, "is quantised in a way that is not supported"),
    ];
    for (content, expected) in cases {
        fs::write(&path, content).unwrap();
        let error = import_gguf(&path, &dir.path().join("hf")).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let error = import_gguf(&dir.path().join("nowhere.gguf"), &dir.path().join("hf")).unwrap_err().to_string();
    assert!(error.starts_with("open `") && error.contains("nowhere.gguf"), "{error}");
}

#[test]
fn smollm2() {
    let Some(gguf) = std::env::var_os("PACS_TEST_GGUF").map(PathBuf::from) else {
        println!("SKIPPED: PACS_TEST_GGUF does not name SmolLM2-135M-Instruct.Q4_1.gguf");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let report = import_gguf(&gguf, dir.path()).unwrap();
    assert_eq!(report.parameters, 134_515_008);
    let config = ModelConfig::read(dir.path()).unwrap();
    let parameters = Parameters::load(dir.path(), &config, Kind::Float, Device::Cpu).unwrap();
    let model = Model::new(&config, &parameters);
    // "The capital of France is", then " Paris" and ".".
    let mut tokens = vec![504i64, 3575, 282, 4649, 314];
    for _ in 0..2 {
        let rows = [PackedRow { prompt_len: tokens.len(), answer_lens: Vec::new() }];
        let positions = Tensor::arange(tokens.len() as i64, (Kind::Int64, Device::Cpu));
        let mut attention = Packed::new(&rows, &model);
        let hidden = no_grad(|| model.hidden(&Tensor::from_slice(&tokens), &positions, &mut attention));
        tokens.push(model.logits(&hidden).get(-1).argmax(0, false).int64_value(&[]));
    }
    assert_eq!(&tokens[5..], [7042, 30]);
}

/// The inputs of `tests/fuzz`, a bounded number of them.
#[test]
fn any_header_is_read_or_refused() {
    let example = &gguf::examples()[0];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    fs::write(&path, gguf::whole(example)).unwrap();
    import_gguf(&path, &dir.path().join("hf")).expect("what is changed is a valid file at first");
    mutate::each(&gguf::examples(), 2000, gguf::check);
}
