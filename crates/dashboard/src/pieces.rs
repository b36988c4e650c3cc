//! The text of each token of an answer.

use pacs_text::Tokenizer;

/// Tokens that may form one character together; a longer run of bytes is shown as it is.
const MOST_JOINED: usize = 8;

/// The texts of the tokens, as many as there are ids. Tokens that only together form a character give their text to
/// the last of them, so that all texts in a row are the answer. Empty if the tokenizer fails.
pub(crate) fn pieces(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
    split(ids, |ids| tokenizer.decode(ids, false).ok())
}

/// Decodes a short window around each token: decoders join tokens differently at the beginning of a text, so a token
/// is decoded with the one before it, whose text is then cut off.
fn split(ids: &[u32], decode: impl Fn(&[u32]) -> Option<String>) -> Vec<String> {
    let (mut pieces, mut begin, mut done) = (Vec::with_capacity(ids.len()), 0, 0);
    for end in 1..=ids.len() {
        let (Some(before), Some(text)) = (decode(&ids[begin..done]), decode(&ids[begin..end])) else {
            return Vec::new();
        };
        let is_torn = text.ends_with('\u{fffd}') && end - done < MOST_JOINED && end < ids.len();
        if is_torn {
            pieces.push(String::new());
            continue;
        }
        let piece = text.strip_prefix(&before).unwrap_or(&text);
        pieces.push(piece.to_owned());
        (begin, done) = (done, end);
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each id is a byte.
    fn bytes(ids: &[u32]) -> Option<String> {
        let bytes: Option<Vec<u8>> = ids.iter().map(|id| u8::try_from(*id).ok()).collect();
        Some(String::from_utf8_lossy(&bytes?).into_owned())
    }

    fn of(text: &[u8]) -> Vec<String> {
        split(&text.iter().map(|byte| u32::from(*byte)).collect::<Vec<_>>(), bytes)
    }

    #[test]
    fn pieces_in_a_row_are_the_text() {
        assert_eq!(of("aé→b".as_bytes()), ["a", "", "é", "", "", "→", "b"]);
        assert_eq!(of("🙂".as_bytes()).concat(), "🙂");
        assert_eq!(of(b"a\xff\xffb").concat(), "a\u{fffd}\u{fffd}b");
        assert!(of(&[0xff; 100]).iter().all(|piece| piece.len() <= 3 * MOST_JOINED));
        assert!(split(&[300], bytes).is_empty());
    }
}
