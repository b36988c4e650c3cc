//! A tokenizer of single characters, plus the phrases of the built-in tasks' questions.

use serde_json::{Map, Value, json};

/// Token of every unknown character.
pub(super) const UNKNOWN: u32 = 0;
/// The token that ends an answer.
pub(super) const END: u32 = 1;

const SPECIAL: [&str; 2] = ["<unk>", "<end>"];

/// Phrases of the built-in tasks' questions, one token each: questions of three times as many tokens would take three
/// times as long and teach no more.
const PHRASES: [&str; 8] = ["What is ", " mod ", "Write ", " in base ", "Make ", " of ", "Sort ", "Reverse "];

/// Line end and the printable ASCII characters.
fn characters() -> impl Iterator<Item = char> {
    std::iter::once('\n').chain(' '..='~')
}

/// Size of the vocabulary.
pub(super) fn size() -> usize {
    SPECIAL.len() + PHRASES.len() + characters().count()
}

/// Content of `tokenizer.json`.
pub(super) fn file() -> Value {
    let words = SPECIAL.into_iter().chain(PHRASES).map(str::to_owned).chain(characters().map(String::from));
    let vocabulary: Map<String, Value> = words.enumerate().map(|(id, word)| (word, json!(id))).collect();
    let added = |(id, content): (usize, &str)| {
        json!({"id": id, "content": content, "special": true, "normalized": false, "single_word": false, "lstrip": false,
               "rstrip": false})
    };
    let pattern = format!("{}|[\\s\\S]", PHRASES.join("|"));
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": SPECIAL.into_iter().enumerate().map(added).collect::<Vec<_>>(),
        "normalizer": null,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
        "post_processor": null,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": SPECIAL[0]},
    })
}

#[cfg(test)]
mod tests {
    use pacs_text::Tokenizer;

    use super::*;

    #[test]
    fn questions_of_tasks_are_short_and_decode_unchanged() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(folder.path().join("tokenizer.json"), file().to_string()).expect("written");
        let tokenizer = Tokenizer::read(folder.path()).expect("a tokenizer");
        assert_eq!(tokenizer.vocabulary_size(), size());
        for (text, tokens) in [
            ("What is 37 * 58 mod 7?", 11),
            ("Write 37 in base 2.", 6),
            ("Make 44 of 3, 5, 19.", 13),
            ("Sort 58 3.", 6),
            ("Reverse crate.", 7),
            ("(5 * 5) + 19", 12),
        ] {
            let ids = tokenizer.encode(text, true).expect("encoded");
            assert_eq!(ids.len(), tokens, "{text}");
            assert_eq!(tokenizer.decode(&ids, true).expect("decoded"), text);
        }
        assert_eq!(tokenizer.encode("é", true).expect("encoded"), [UNKNOWN]);
        assert_eq!(tokenizer.token_id("<end>"), Some(END));
    }
}
