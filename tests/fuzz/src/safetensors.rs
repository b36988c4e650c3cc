//! Headers of safetensors files, as the weights of a golden model folder: what follows the header is that model's data.
#![allow(unreachable_pub, reason = "the fuzzer's crate and tests include this file")]

use std::fs;

use pacs_model::{ModelConfig, Parameters};
use pacs_torch::tch::{Device, Kind};

use crate::mutate::golden;

/// The length of the header with its size in front.
fn header_length(file: &[u8]) -> usize {
    8 + usize::try_from(u64::from_le_bytes(file[..8].try_into().unwrap())).unwrap()
}

pub fn examples() -> Vec<Vec<u8>> {
    let file = fs::read(golden("qwen2-tied").join("model.safetensors")).unwrap();
    let length = header_length(&file);
    // And one that says what it is only after eight bytes of size, as every attacker would write it.
    let claims = |size: u64, text: &str| [&size.to_le_bytes(), text.as_bytes()].concat();
    let one = |shape: &str, offsets: &str| {
        let text = format!(r#"{{"model.norm.weight":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#);
        claims(text.len() as u64, &text)
    };
    vec![
        file[..length].to_vec(),
        claims(u64::MAX, "{}"),
        claims(99_999_999, "{"),
        one("[18446744073709551615, 2]", "[0, 256]"),
        one("[64]", "[18446744073709551615, 0]"),
        one("[4611686018427387904]", "[0, 18446744073709551612]"),
        one("[0]", "[0, 0]"),
        one("[]", "[0, 4]"),
    ]
}

/// A folder with such weights is refused with a reason, or loaded.
pub fn check(bytes: &[u8]) {
    let model = golden("qwen2-tied");
    let whole = fs::read(model.join("model.safetensors")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    fs::copy(model.join("config.json"), folder.path().join("config.json")).unwrap();
    let file = [bytes, &whole[header_length(&whole)..]].concat();
    fs::write(folder.path().join("model.safetensors"), file).unwrap();
    let config = ModelConfig::read(folder.path()).unwrap();
    match Parameters::load(folder.path(), &config, Kind::Float, Device::Cpu) {
        Ok(_) => {}
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
