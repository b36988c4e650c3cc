//! How much longer a tokenizer may make a text. Its file holds rules that replace one text by another, one after the other: forty that
//! double every letter would make a terabyte of one.

use serde_json::Value;

/// A text may become so many times as long. Real ones make three bytes of a space, and eighteen letters of one Arabic ligature.
const MOST_GROWTH: f64 = 256.0;

/// Letters that normal forms make of one (U+FDFA).
const NORMAL_FORM: f64 = 18.0;

/// Bytes that a rule may put before or after every text.
const MOST_ADDED: usize = 1 << 16;

/// Rules may be within rules as deep as this.
const MOST_DEPTH: u32 = 16;

/// Checks the rules of a `tokenizer.json`. Whether it is one at all is for its reader to say.
pub(super) fn check(file: &[u8]) -> Result<(), String> {
    let file: Value = serde_json::from_slice(file).map_err(|error| error.to_string())?;
    for part in ["normalizer", "pre_tokenizer", "decoder"] {
        let growth = growth(&file[part], 0).map_err(|problem| format!("its {part} {problem}"))?;
        if growth > MOST_GROWTH {
            return Err(format!(
                "its {part} makes texts up to {growth:.0} times as long; at most {MOST_GROWTH} is supported"
            ));
        }
    }
    Ok(())
}

/// By what a rule, with those within it, multiplies the length of a text at most.
fn growth(rule: &Value, depth: u32) -> Result<f64, String> {
    if depth > MOST_DEPTH {
        return Err(format!("has rules within rules, deeper than {MOST_DEPTH}"));
    }
    let mut product = match rule["type"].as_str() {
        Some("Replace") => replaced(rule)?,
        Some("NFD" | "NFKD" | "NFC" | "NFKC" | "Precompiled" | "BertNormalizer" | "Nmt") => NORMAL_FORM,
        // Each byte becomes a letter of two.
        Some("ByteLevel") => 2.0,
        Some("Lowercase") => 3.0,
        // A space becomes the letter that is given.
        Some("Metaspace") => 4.0,
        Some("Prepend") if length(&rule["prepend"]) > MOST_ADDED => {
            return Err(format!("adds more than {MOST_ADDED} bytes to every text"));
        }
        _ => 1.0,
    };
    for list in ["normalizers", "pretokenizers", "decoders"] {
        for rule in rule[list].as_array().into_iter().flatten() {
            product *= growth(rule, depth + 1)?;
        }
    }
    Ok(product)
}

/// A text for a text, or for what a pattern finds, which may be nothing: between any two letters, then.
fn replaced(rule: &Value) -> Result<f64, String> {
    let by = length(&rule["content"]) as f64;
    match rule["pattern"]["String"].as_str() {
        Some("") => Err("replaces the empty text".to_owned()),
        Some(text) => Ok((by / text.len() as f64).max(1.0)),
        None => Ok(by + 1.0),
    }
}

fn length(text: &Value) -> usize {
    text.as_str().map_or(0, str::len)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::super::Tokenizer;
    use super::*;

    fn checked(file: Value) -> Result<(), String> {
        check(file.to_string().as_bytes())
    }

    #[test]
    fn rules_that_blow_texts_up_are_refused() {
        let double = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"});
        let doubles = |count: usize| vec![double.clone(); count];
        checked(json!({"normalizer": {"type": "Sequence", "normalizers": doubles(8)}})).expect("256 times");
        for part in ["normalizer", "decoder"] {
            for (list, count) in [("normalizers", 9), ("decoders", 40)] {
                let error = checked(json!({part: {"type": "Sequence", list: doubles(count)}})).expect_err("too long");
                assert!(error.starts_with(&format!("its {part} makes texts up to")), "{error}");
            }
        }
        let mut nested = json!({"type": "Sequence", "normalizers": doubles(40)});
        for _ in 0..8 {
            nested = json!({"type": "Sequence", "normalizers": [nested]});
        }
        assert!(checked(json!({"normalizer": nested.clone()})).is_err());
        for _ in 0..20 {
            nested = json!({"type": "Sequence", "normalizers": [nested]});
        }
        assert!(checked(json!({"normalizer": nested})).expect_err("deep").contains("deeper than"));
        for rule in [
            json!({"type": "Replace", "pattern": {"Regex": "."}, "content": "x".repeat(10_000)}),
            json!({"type": "Replace", "pattern": {"Regex": ""}, "content": "x".repeat(300)}),
            json!({"type": "Replace", "pattern": {"String": ""}, "content": "x"}),
            json!({"type": "Replace", "pattern": {"String": "a"}, "content": "b".repeat(1000)}),
            json!({"type": "Prepend", "prepend": "x".repeat(1 << 20)}),
        ] {
            assert!(checked(json!({"normalizer": rule})).is_err(), "{rule}");
        }
    }

    #[test]
    fn a_file_with_such_rules_is_not_read() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let double = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"});
        let file = json!({
            "version": "1.0", "added_tokens": [], "truncation": null, "padding": null, "pre_tokenizer": null, "decoder": null,
            "post_processor": null, "normalizer": {"type": "Sequence", "normalizers": vec![double; 40]},
            "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
        });
        std::fs::write(dir.path().join("tokenizer.json"), file.to_string()).expect("written");
        let error = Tokenizer::read(dir.path()).expect_err("a bomb").to_string();
        assert!(error.contains("tokenizer.json") && error.contains("its normalizer makes texts"), "{error}");
    }

    #[test]
    fn rules_of_real_tokenizers_are_kept() {
        let llama = json!({"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]});
        let decoder = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]});
        checked(json!({"normalizer": llama, "decoder": decoder})).expect("Llama");
        let bert = json!({"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]});
        checked(json!({"normalizer": bert, "pre_tokenizer": {"type": "ByteLevel"}})).expect("BERT");
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/qwen2-tied");
        Tokenizer::read(&golden).expect("Qwen");
    }
}
