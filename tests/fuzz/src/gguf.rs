//! GGUF files: the header, which is followed by as many zeros as the example's tensors take.
#![allow(unreachable_pub, reason = "the fuzzer's crate and tests include this file")]

use std::fs;

use pacs_model::import::import_gguf;

const WIDTH: u64 = 32;
const TOKENS: u64 = 8;
/// Tensors by name with their shape, innermost dimension first.
const TENSORS: [(&str, &[u64]); 11] = [
    ("token_embd", &[WIDTH, TOKENS]),
    ("output_norm", &[WIDTH]),
    ("blk.0.attn_norm", &[WIDTH]),
    ("blk.0.attn_q", &[WIDTH, 32]),
    ("blk.0.attn_k", &[WIDTH, 16]),
    ("blk.0.attn_v", &[WIDTH, 16]),
    ("blk.0.attn_output", &[32, WIDTH]),
    ("blk.0.ffn_norm", &[WIDTH]),
    ("blk.0.ffn_gate", &[WIDTH, 32]),
    ("blk.0.ffn_up", &[WIDTH, 32]),
    ("blk.0.ffn_down", &[32, WIDTH]),
];
/// Of values in the header.
const U32: u32 = 4;
const I32: u32 = 5;
const F32: u32 = 6;
const TEXT: u32 = 8;
const ARRAY: u32 = 9;

/// A header in the making.
#[derive(Default)]
struct Header(Vec<u8>);

impl Header {
    fn number(&mut self, value: u64) {
        self.0.extend(value.to_le_bytes());
    }

    fn kind(&mut self, kind: u32) {
        self.0.extend(kind.to_le_bytes());
    }

    fn text(&mut self, text: &str) {
        self.number(text.len() as u64);
        self.0.extend(text.as_bytes());
    }

    fn key(&mut self, key: &str, kind: u32) {
        self.text(key);
        self.kind(kind);
    }
}

pub fn examples() -> Vec<Vec<u8>> {
    let numbers = [
        ("block_count", 1),
        ("context_length", 64),
        ("embedding_length", 32),
        ("feed_forward_length", 32),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
        ("rope.dimension_count", 16),
    ];
    let mut header = Header::default();
    header.0.extend(b"GGUF\x03\x00\x00\x00");
    header.number(TENSORS.len() as u64);
    header.number(numbers.len() as u64 + 10);
    for (key, value) in numbers {
        header.key(&format!("llama.{key}"), U32);
        header.kind(value);
    }
    for (key, value) in [("llama.attention.layer_norm_rms_epsilon", 1e-5f32), ("llama.rope.freq_base", 5000.0)] {
        header.key(key, F32);
        header.0.extend(value.to_le_bytes());
    }
    let texts = [
        ("general.architecture", "llama"),
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.pre", "smollm"),
        ("tokenizer.chat_template", "{{ messages }}"),
    ];
    for (key, value) in texts {
        header.key(key, TEXT);
        header.text(value);
    }
    header.key("tokenizer.ggml.eos_token_id", U32);
    header.kind(0);
    for (key, items) in [
        ("tokenizer.ggml.tokens", &["<|end|>", "ab", "a", "b", "c", "d", "e", "f"][..]),
        ("tokenizer.ggml.merges", &["a b"]),
    ] {
        header.key(key, ARRAY);
        header.kind(TEXT);
        header.number(items.len() as u64);
        items.iter().for_each(|item| header.text(item));
    }
    header.key("tokenizer.ggml.token_type", ARRAY);
    header.kind(I32);
    header.number(TOKENS);
    (0..TOKENS).for_each(|token| header.kind(if token == 0 { 3 } else { 1 }));
    let mut offset = 0;
    for (name, shape) in TENSORS {
        header.text(&format!("{name}.weight"));
        header.kind(shape.len() as u32);
        shape.iter().for_each(|size| header.number(*size));
        header.kind(0);
        header.number(offset);
        offset += shape.iter().product::<u64>() * 4;
    }
    vec![header.0]
}

/// The file of a header.
pub fn whole(header: &[u8]) -> Vec<u8> {
    let values: u64 = TENSORS.iter().map(|(_, shape)| shape.iter().product::<u64>()).sum();
    let mut file = header.to_vec();
    file.resize(file.len().next_multiple_of(32) + values as usize * 4, 0);
    file
}

/// A file is refused with a reason, or becomes a model folder.
pub fn check(bytes: &[u8]) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    fs::write(&path, whole(bytes)).unwrap();
    if let Err(error) = import_gguf(&path, &folder.path().join("hf")) {
        assert!(!error.to_string().is_empty());
    }
}
