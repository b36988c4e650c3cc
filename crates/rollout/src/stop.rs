use pacs_text::{Tokenizer, TokenizerError};

/// Where the text of an answer ends because of a stop string: the earliest of them.
pub(crate) fn cut_at_stop<'a>(text: &'a str, stop: &[String]) -> Option<&'a str> {
    stop.iter().filter_map(|stop| text.find(stop.as_str())).min().map(|end| &text[..end])
}

/// Whether the newest token completed a stop string. Looks at the tail of the answer only, so that the cost of a step
/// does not grow with the answer.
pub(crate) fn tail_has_stop(tokenizer: &Tokenizer, tokens: &[u32], stop: &[String]) -> Result<bool, TokenizerError> {
    let Some(longest) = stop.iter().map(String::len).max() else { return Ok(false) };
    // A token is at least one byte of text, but special ones may decode to nothing: look a little further back.
    let tail = &tokens[tokens.len().saturating_sub(longest + 8)..];
    Ok(cut_at_stop(&tokenizer.decode(tail, true)?, stop).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_earliest_stop_string_cuts() {
        let stop = ["\n\n".to_owned(), "Q:".to_owned()];
        assert_eq!(cut_at_stop("a = 3\nQ: next\n\n", &stop), Some("a = 3\n"));
        assert_eq!(cut_at_stop("a = 3", &stop), None);
    }
}
