//! Which sequences are computed together wherever they are computed, so that a sum over them has one order.

/// Tokens that a unit has about: enough for products to be as fast as they get on a processor, few enough to be shared out
/// evenly.
const UNIT_TOKENS: usize = 1024;
/// A unit has so many times the tokens of its first prompt where that is more: a prompt stands once a unit.
const PROMPTS: usize = 3;

/// Tokens of a unit at most, of sequences with prompts of up to `prompt` tokens; a longer sequence is a unit of its own.
#[must_use]
pub fn unit_tokens(prompt: usize) -> usize {
    UNIT_TOKENS.max(PROMPTS * prompt)
}

/// The unit of each answer of the groups of a mini-batch, from 0, never falling: `groups` are the tokens of each group's
/// prompt and answers, in the order of the index.
///
/// It is a function of the lengths alone. Whatever the number of ranks and the size of passes, these sequences go through the
/// model together.
pub fn units<'a>(groups: impl IntoIterator<Item = (usize, &'a [usize])>) -> Vec<Vec<usize>> {
    let (mut unit, mut tokens, mut most) = (0, 0, 0);
    let of_group = |(prompt, answers): (usize, &[usize])| {
        let mut holds_prompt = false;
        let of_answer = |answer: &usize| {
            let cost = if holds_prompt { *answer } else { prompt + answer };
            if tokens > 0 && tokens + cost > most {
                (unit, tokens, holds_prompt) = (unit + 1, 0, false);
            }
            if tokens == 0 {
                most = unit_tokens(prompt);
            }
            tokens += if holds_prompt { *answer } else { prompt + answer };
            holds_prompt = true;
            unit
        };
        answers.iter().map(of_answer).collect()
    };
    groups.into_iter().map(of_group).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_hold_about_a_thousand_tokens_or_three_prompts() {
        let of = |groups: &[(usize, Vec<usize>)]| units(groups.iter().map(|(prompt, answers)| (*prompt, &answers[..])));
        // 100 + 8 * 100 tokens, and the next prompt and answer no longer fit.
        assert_eq!(of(&[(100, vec![100; 8]), (100, vec![100; 2])]), [vec![0; 8], vec![1; 2]]);
        assert_eq!(of(&[(10, vec![10; 4]), (10, vec![10; 4])]), [vec![0; 4], vec![0; 4]], "groups share a unit");
        assert_eq!(of(&[(100, vec![500; 4])]), [vec![0, 1, 2, 3]], "a second answer would be too much");
        assert_eq!(of(&[(1000, vec![500; 5])]), [vec![0, 0, 0, 0, 1]], "a long prompt is worth more company");
        assert_eq!(of(&[(10, vec![5000, 5000])]), [vec![0, 1]], "a long sequence is alone");
        assert_eq!(of(&[(10, vec![])]), [Vec::<usize>::new()]);
    }
}
