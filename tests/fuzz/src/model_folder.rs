//! Model folders but for their weights: configuration, tokenizer, special tokens, chat template.
#![allow(unreachable_pub, reason = "the fuzzer's crate and tests include this file")]

use std::fs;

use pacs_shape::ModelConfig;
use pacs_text::{ChatTemplate, Message, Tokenizer};

use crate::mutate::{golden, pack, unpack};

const FILES: [&str; 4] = ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];

pub fn examples() -> Vec<Vec<u8>> {
    ["qwen3", "llama3", "qwen2-tied"]
        .map(|model| pack(&FILES.map(|file| fs::read(golden(model).join(file)).unwrap_or_default())))
        .to_vec()
}

/// A folder is refused with a reason, or its text goes both ways.
pub fn check(bytes: &[u8]) {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    for (name, content) in FILES.iter().zip(unpack::<4>(bytes)).filter(|(_, content)| !content.is_empty()) {
        fs::write(dir.join(name), content).unwrap();
    }
    if let Ok(config) = ModelConfig::read(dir) {
        assert!(config.parameter_count() > 0);
    }
    if let Ok(tokenizer) = Tokenizer::read(dir)
        && let Ok(ids) = tokenizer.encode("What is 1 + 1? äöü \u{1f600} <|im_end|>", true)
    {
        drop(tokenizer.decode(&ids, false));
        drop(tokenizer.decode(&[0, 1, u32::MAX], true));
    }
    if let Ok(template) = ChatTemplate::read(dir) {
        let messages = [Message::system("Be brief."), Message::user("Hi \u{0} {{ x }}")];
        drop(template.render(&messages, true, &serde_json::Map::new()));
    }
}
