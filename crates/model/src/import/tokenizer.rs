//! tokenizer.json and tokenizer_config.json from GGUF metadata.

use serde_json::{Map, Value, json};

use super::ImportError;
use super::gguf::{Gguf, boolean, integer, integers, string, strings};

/// Token types of GGUF: control tokens are hidden from text, user-defined ones are text that is never split.
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

/// Words with what stands before them, numbers in threes, punctuation with line ends, white space.
const LLAMA3_PATTERN: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// The same with every digit on its own.
const QWEN2_PATTERN: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// How text is split before byte pairs are merged.
#[derive(Clone, Copy)]
enum Splitting {
    /// GPT-2: words, numbers, punctuation, white space.
    Gpt2,
    /// SmolLM and StarCoder: as GPT-2, with every digit on its own.
    SingleDigits,
    /// Llama 3: numbers in threes, and words taken whole when the vocabulary has them.
    Llama3,
    /// Qwen2 and Qwen3: as Llama 3, with every digit on its own, of normalised text.
    Qwen2,
}

impl Splitting {
    const SUPPORTED: &str = "byte-level BPE with pre-tokenizer gpt-2, smollm, starcoder, refact, llama-bpe or qwen2";

    fn named(name: &str) -> Option<Self> {
        match name {
            "gpt-2" | "gpt2" => Some(Self::Gpt2),
            "smollm" | "starcoder" | "refact" => Some(Self::SingleDigits),
            "llama-bpe" | "llama3" | "llama-v3" => Some(Self::Llama3),
            "qwen2" | "deepseek-r1-qwen" => Some(Self::Qwen2),
            _ => None,
        }
    }

    fn pre_tokenizer(self) -> Value {
        let byte_level = |regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex });
        let first = match self {
            Self::Gpt2 => return byte_level(true),
            Self::SingleDigits => json!({ "type": "Digits", "individual_digits": true }),
            Self::Llama3 => split(LLAMA3_PATTERN),
            Self::Qwen2 => split(QWEN2_PATTERN),
        };
        let words = matches!(self, Self::SingleDigits);
        json!({ "type": "Sequence", "pretokenizers": [first, byte_level(words)] })
    }
}

fn split(pattern: &str) -> Value {
    json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false })
}

/// The tokenizer in the format of the `tokenizers` library.
pub(crate) fn tokenizer(gguf: &Gguf) -> Result<Value, ImportError> {
    let splitting = splitting(gguf)?;
    let tokens = tokens(gguf)?;
    let types = gguf.required("tokenizer.ggml.token_type", integers)?;
    if types.len() != tokens.len() {
        return Err(gguf.metadata_error("tokenizer.ggml.token_type", "is not as long as the list of tokens"));
    }
    let vocabulary: Map<String, Value> =
        tokens.iter().enumerate().map(|(id, &token)| (token.to_owned(), id.into())).collect();
    if vocabulary.len() != tokens.len() {
        return Err(gguf.metadata_error("tokenizer.ggml.tokens", "names a token twice"));
    }
    let added: Vec<Value> = tokens
        .iter()
        .zip(&types)
        .enumerate()
        .filter(|(_, (_, kind))| [CONTROL, USER_DEFINED].contains(kind))
        .map(|(id, (token, &kind))| added_token(id, token, kind == CONTROL))
        .collect();
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": if matches!(splitting, Splitting::Qwen2) { json!({ "type": "NFC" }) } else { Value::Null },
        "pre_tokenizer": splitting.pre_tokenizer(),
        "post_processor": post_processor(gguf, &tokens, splitting)?,
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": matches!(splitting, Splitting::Llama3),
            "vocab": vocabulary,
            "merges": merges(gguf)?,
        },
    }))
}

/// Special tokens and chat template.
pub(crate) fn tokenizer_config(gguf: &Gguf) -> Result<Value, ImportError> {
    let tokens = tokens(gguf)?;
    let mut config = json!({
        "add_prefix_space": false,
        "clean_up_tokenization_spaces": false,
        "model_max_length": gguf.required(&format!("{}.context_length", super::folder::architecture(gguf)?), integer)?,
        "tokenizer_class": "PreTrainedTokenizerFast",
    });
    for (name, key) in [("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown")]
    {
        if let Some(token) = special_token(gguf, &tokens, key)? {
            config[name] = token.into();
        }
    }
    if let Some(template) = gguf.optional("tokenizer.chat_template", string)? {
        config["chat_template"] = template.into();
    }
    Ok(config)
}

fn splitting(gguf: &Gguf) -> Result<Splitting, ImportError> {
    let unsupported =
        |feature| ImportError::UnsupportedTokenizer { file: gguf.path(), feature, supported: Splitting::SUPPORTED };
    let model = gguf.required("tokenizer.ggml.model", string)?;
    if model != "gpt2" {
        return Err(unsupported(format!("a tokenizer of model `{model}`")));
    }
    let name = gguf.required("tokenizer.ggml.pre", string)?;
    Splitting::named(name).ok_or_else(|| unsupported(format!("pre-tokenizer `{name}`")))
}

fn tokens(gguf: &Gguf) -> Result<Vec<&str>, ImportError> {
    gguf.required("tokenizer.ggml.tokens", strings)
}

fn merges(gguf: &Gguf) -> Result<Vec<[&str; 2]>, ImportError> {
    let key = "tokenizer.ggml.merges";
    let pair = |merge: &'_ str| merge.find(' ').is_some_and(|at| !merge[at + 1..].contains(' '));
    let merges = gguf.required(key, strings)?;
    if !merges.iter().all(|merge| pair(merge)) {
        return Err(gguf.metadata_error(key, "holds an entry that is not two tokens"));
    }
    Ok(merges.into_iter().filter_map(|merge| merge.split_once(' ')).map(|(left, right)| [left, right]).collect())
}

fn added_token(id: usize, token: &str, special: bool) -> Value {
    json!({
        "id": id,
        "content": token,
        "single_word": false,
        "lstrip": false,
        "rstrip": false,
        "normalized": false,
        "special": special,
    })
}

/// Puts the begin-of-text token in front where the file asks for it. One that says nothing means what llama.cpp takes it for, which
/// is yes for tokenizers of Llama 3.
fn post_processor(gguf: &Gguf, tokens: &[&str], splitting: Splitting) -> Result<Value, ImportError> {
    let said = gguf.optional("tokenizer.ggml.add_bos_token", boolean)?;
    let adds_bos = said.unwrap_or(matches!(splitting, Splitting::Llama3));
    let Some(bos) = special_token(gguf, tokens, "bos")?.filter(|_| adds_bos) else { return Ok(Value::Null) };
    let id = gguf.required("tokenizer.ggml.bos_token_id", integer)?;
    let (begin, first, second) = (
        json!({ "SpecialToken": { "id": bos, "type_id": 0 } }),
        json!({ "Sequence": { "id": "A", "type_id": 0 } }),
        json!({ "Sequence": { "id": "B", "type_id": 1 } }),
    );
    Ok(json!({
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, second],
        "special_tokens": { bos: { "id": bos, "ids": [id], "tokens": [bos] } },
    }))
}

fn special_token<'a>(gguf: &Gguf, tokens: &[&'a str], name: &str) -> Result<Option<&'a str>, ImportError> {
    let key = format!("tokenizer.ggml.{name}_token_id");
    let Some(id) = gguf.optional(&key, integer)? else { return Ok(None) };
    let token = usize::try_from(id).ok().and_then(|id| tokens.get(id));
    token.copied().map(Some).ok_or_else(|| gguf.metadata_error(&key, "lies outside the list of tokens"))
}
