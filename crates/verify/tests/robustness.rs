//! Whatever the strings are, grading ends soon and without a panic.

use std::time::{Duration, Instant};

use pacs_types::Outcome;
use pacs_verify::{Mode, check_gold, grade};
use proptest::prelude::*;

/// Far above what the counted limits allow, so that only a runaway fails on a busy machine.
const SOON: Duration = Duration::from_secs(5);

fn check(response: &str, gold: &str) {
    let started = Instant::now();
    for mode in [Mode::Lenient, Mode::Strict] {
        let verdict = grade(response, gold, mode);
        assert_eq!(verdict.outcome == Outcome::Failed, check_gold(gold).is_err());
        assert_eq!(verdict.label, if verdict.outcome == Outcome::Correct { 1.0 } else { 0.0 });
        assert_eq!(verdict.reward, verdict.label);
        assert_eq!(grade(response, gold, mode), verdict, "a verdict is a function of its inputs");
    }
    let elapsed = started.elapsed();
    assert!(elapsed < SOON, "{elapsed:?} for {:.200?} and {:.200?}", response, gold);
}

fn fragments() -> impl Strategy<Value = String> {
    let fragment = prop::sample::select(vec![
        r"\frac",
        r"\boxed{",
        "{",
        "}",
        "(",
        ")",
        "[",
        "]",
        r"\left(",
        r"\right)",
        r"\{",
        r"\}",
        "$",
        r"\(",
        r"\)",
        r"\sqrt",
        r"\sqrt[3]",
        "^",
        "_",
        "1",
        "23",
        "4.5",
        "1,000",
        "x",
        "y",
        "e",
        "i",
        r"\pi",
        r"\pm",
        "+",
        "-",
        "*",
        "/",
        "!",
        "%",
        r"\%",
        "=",
        "<",
        r"\le",
        r"\approx",
        r"\in",
        ",",
        ";",
        r"\text{",
        r"\text{and}",
        " and ",
        "|",
        r"\cup",
        r"\infty",
        r"\sin",
        r"\log",
        r"\binom",
        r"\begin{pmatrix}",
        r"\end{pmatrix}",
        "&",
        r"\\",
        ":",
        "'",
        "the answer is ",
        "####",
        "<think>",
        "</think>",
        ". ",
        "\n",
        r"\overline{",
        "9e9",
        r"^\circ",
        "√",
        "²",
        "−",
        "é",
        r"\lfloor",
        r"\rfloor",
        "99^{99^{99}}",
        "999!",
        r"\",
        "½",
        "∞",
    ]);
    prop::collection::vec(fragment, 0..40).prop_map(|parts| parts.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_strings(response in any::<String>(), gold in any::<String>()) {
        check(&response, &gold);
    }

    #[test]
    fn mathematical_fragments(response in fragments(), gold in fragments()) {
        check(&response, &gold);
        check(&format!("\\boxed{{{response}}}"), &gold);
    }

    #[test]
    fn a_readable_answer_equals_itself(gold in fragments()) {
        // Marks of reasoning and of final answers mean something else in a response than in a reference.
        prop_assume!(!["think>", "answer is", "####"].iter().any(|mark| gold.contains(mark)));
        let verdict = grade(&format!("\\boxed{{{gold}}}"), &format!("\\boxed{{{gold}}}"), Mode::Strict);
        prop_assert!(matches!(verdict.outcome, Outcome::Correct | Outcome::Failed | Outcome::Unparsable), "{:?}", verdict);
    }

    #[test]
    fn integers_are_compared_exactly(a in any::<i64>(), b in any::<i64>()) {
        let outcome = |a: i64, b: i64| grade(&format!("\\boxed{{{a}}}"), &b.to_string(), Mode::Strict).outcome;
        prop_assert_eq!(outcome(a, a), Outcome::Correct);
        prop_assert_eq!(outcome(a, b) == Outcome::Correct, a == b);
        prop_assert_eq!(outcome(a, a.wrapping_add(1)), Outcome::Wrong);
    }

    #[test]
    fn fractions_are_equal_in_any_terms(top in -999i64..999, bottom in 1i64..999, factor in 1i64..99) {
        let gold = format!("\\frac{{{top}}}{{{bottom}}}");
        for answer in [
            format!("{}/{}", top * factor, bottom * factor),
            format!("\\dfrac{{{}}}{{{}}}", top * factor, bottom * factor),
            format!("\\left({top} \\cdot \\frac{{1}}{{{bottom}}}\\right)"),
        ] {
            let verdict = grade(&format!("\\boxed{{{answer}}}"), &gold, Mode::Strict);
            prop_assert_eq!(verdict.outcome, Outcome::Correct, "{} and {}", gold, answer);
        }
    }
}

#[test]
fn hostile_inputs_end_soon() {
    let repeated = |part: &str, bytes: usize| part.repeat(bytes / part.len());
    for part in [
        "(",
        "((1)",
        "{",
        "[",
        "\\boxed{",
        "$",
        "$ 1 ",
        "\\frac{1",
        "1\\frac{1",
        "-",
        "\\sqrt",
        "\\sin",
        "\\sqrt[",
        "^",
        "2^",
        "x_{",
        "1+",
        "1/",
        "x!",
        "1,",
        "(x≈1",
        "x≈",
        "x=",
        "(x=",
        "\\pm 1",
        "9e4000,",
        "\\binom{999}{500}*",
        "\\begin{pmatrix}",
        "|",
        "|x",
        "\\text{",
        "\\\\",
        "1 1/2 ",
        "$\\",
        "\\(",
        "#### ",
        "answer is ",
        "1(",
        "é",
        "\\{",
    ] {
        for bytes in [200, 2000, 200_000] {
            let text = repeated(part, bytes);
            check(&text, "5");
            check(&format!("\\boxed{{{text}}}"), &text);
            let closed = format!("{text}1{}", ")".repeat(20));
            check(&closed, &closed);
            check(&format!("\\boxed{{{closed}}}"), "x+1");
        }
    }
    for (open, close) in [
        ("(", ")"),
        ("{", "}"),
        ("\\frac{1}{", "}"),
        ("1\\frac{1}{", "}"),
        ("\\sqrt{", "}"),
        ("(x≈", ")"),
        ("(x=", ")"),
        ("|(", ")|"),
        ("2^{", "}"),
        ("\\sin(", ")"),
        ("\\{1,", "\\}"),
    ] {
        for depth in [5, 10, 20, 30, 60, 200] {
            let text = format!("{}1{}", open.repeat(depth), close.repeat(depth));
            check(&format!("\\boxed{{{text}}}"), &text);
            check(&format!("\\boxed{{{text}}}"), &text.replace('1', "2"));
        }
    }
}
