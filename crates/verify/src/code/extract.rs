//! The program in a response: its last block of code.

/// What a response holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Program {
    /// The text of the last block.
    Found(String),
    /// The last block has no end, so the answer was cut off.
    CutOff,
    /// There is no block.
    None,
}

/// Finds the last block of code, between two lines that begin with the same three or more backticks or tildes; what a response says up
/// to `</think>` is left out.
#[must_use]
pub fn extract_program(response: &str) -> Program {
    let answer = response.rsplit_once("</think>").map_or(response, |(_, answer)| answer);
    let mut found = Program::None;
    let mut open: Option<(char, usize, String)> = None;
    for line in answer.lines() {
        let text = line.trim_start();
        let fence = fence_of(text);
        match (&mut open, fence) {
            (Some((mark, length, block)), Some((other, count)))
                if other == *mark && count >= *length && is_end(text, other) =>
            {
                found = Program::Found(std::mem::take(block));
                open = None;
            }
            (Some((.., block)), _) => {
                block.push_str(line);
                block.push('\n');
            }
            (None, Some((mark, length))) => open = Some((mark, length, String::new())),
            (None, None) => {}
        }
    }
    if open.is_some() { Program::CutOff } else { found }
}

fn fence_of(text: &str) -> Option<(char, usize)> {
    let mark = text.chars().next().filter(|mark| matches!(mark, '`' | '~'))?;
    let count = text.chars().take_while(|c| *c == mark).count();
    // A fence in the middle of a line, such as ```x```, is none.
    (count >= 3 && !text[count..].contains(mark)).then_some((mark, count))
}

fn is_end(text: &str, mark: char) -> bool {
    text.trim_end().chars().all(|c| c == mark)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_block_is_the_program() {
        let found = |text: &str| Program::Found(text.to_owned());
        for (response, expected) in [
            ("```python\nprint(1)\n```", found("print(1)\n")),
            ("First\n```\na\n```\nthen\n```py\nb\n\n  c\n```\ndone", found("b\n\n  c\n")),
            ("~~~\nx = '```'\n```\n~~~", found("x = '```'\n```\n")),
            ("````\n```\ninner\n```\n````", found("```\ninner\n```\n")),
            ("  ```python\n  x\n  ```", found("  x\n")),
            ("<think>```\nold\n```</think>\n```\nnew\n```", found("new\n")),
            ("<think>\n```\nold\n```\n</think>\nno program", Program::None),
            ("```python\nprint(1)", Program::CutOff),
            ("```\na\n```\n```\nb", Program::CutOff),
            ("print(1)", Program::None),
            ("inline ```x``` only", Program::None),
            ("```x``` at the start", Program::None),
            ("", Program::None),
        ] {
            assert_eq!(extract_program(response), expected, "{response:?}");
        }
    }
}
