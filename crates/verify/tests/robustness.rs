//! For any strings, grading ends within its steps, does not panic, and is deterministic.

use std::sync::atomic::{AtomicU32, Ordering};

use pacs_types::Outcome;
use pacs_verify::{Form, MAX_GRADE_STEPS, Mode, Rules, check_gold, grade_counted};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

/// Largest number of steps in the tests of this file; every test prints it.
static WORST: AtomicU32 = AtomicU32::new(0);

fn check(response: &str, gold: &str) {
    let rules = |form: Form| move |mode| Rules { mode, form };
    let evaluated = [Mode::Lenient, Mode::Strict, Mode::Number].map(rules(Form::Evaluated));
    for mode in evaluated.into_iter().chain([rules(Form::Any)(Mode::Lenient)]) {
        let (verdict, steps) = grade_counted(response, gold, mode);
        assert!(steps <= MAX_GRADE_STEPS, "{steps} steps for {response:.200?} and {gold:.200?}");
        let worst = WORST.fetch_max(steps, Ordering::Relaxed);
        if steps > worst && steps > 20_000 {
            println!("{steps} steps ({}) for {response:.80?} and {gold:.80?}", verdict.rule);
        }
        assert_eq!(verdict.outcome == Outcome::Failed, check_gold(gold).is_err());
        assert_eq!(verdict.label, if verdict.outcome == Outcome::Correct { 1.0 } else { 0.0 });
        assert_eq!(verdict.reward, verdict.label);
        assert!(!verdict.rule.is_empty());
        assert_eq!(grade_counted(response, gold, mode), (verdict, steps), "a verdict is a function of its inputs");
    }
}

/// Commands and words that the lexer and the extraction know, and some that they do not.
const VOCABULARY: &[&str] = &[
    r"\frac",
    r"\dfrac{1}{",
    r"\boxed{",
    r"\fbox{",
    "{",
    "}",
    "(",
    ")",
    "[",
    "]",
    r"\left(",
    r"\right)",
    r"\left\{",
    r"\right.",
    r"\{",
    r"\}",
    "$",
    "$$",
    r"\(",
    r"\)",
    r"\[",
    r"\]",
    r"\sqrt",
    r"\sqrt[3]",
    "^",
    "_",
    "^{",
    "_{",
    "0",
    "1",
    "23",
    "4.5",
    "1,000",
    "1{,}000",
    r"1\,000",
    "2,74",
    "x",
    "y",
    "n",
    "e",
    "i",
    "A",
    r"\pi",
    r"\theta",
    r"\pm",
    r"\mp",
    "+",
    "-",
    "*",
    "/",
    "!",
    "%",
    r"\%",
    "=",
    "<",
    ">",
    r"\le",
    r"\geq",
    r"\neq",
    r"\approx",
    r"\in",
    r"\implies",
    ",",
    ";",
    r"\text{",
    r"\text{and}",
    r"\text{cm}^2",
    r"\mathrm{",
    r"\mathbb{R}",
    " and ",
    " or ",
    "|",
    r"\cup",
    r"\cap",
    r"\setminus",
    r"\emptyset",
    r"\infty",
    r"-\infty",
    r"\sin",
    r"\cos^{-1}",
    r"\tan",
    r"\log",
    r"\log_2",
    r"\ln",
    r"\exp",
    r"\arcsin",
    r"\gcd(",
    r"\max(",
    r"\binom",
    r"\sum_{k=1}^{10}",
    r"\prod_{i=1}^{3}",
    r"\begin{pmatrix}",
    r"\end{pmatrix}",
    r"\begin{vmatrix}",
    r"\end{vmatrix}",
    r"\begin{cases}",
    r"\end{cases}",
    r"\begin{array}{cc}",
    r"\end{array}",
    r"\det",
    "&",
    r"\\",
    ":",
    "'",
    "the answer is ",
    "Final Answer:",
    "####",
    "<answer>",
    "<think>",
    "</think>",
    ". ",
    "\n",
    "\n\n",
    r"\overline{3}",
    "0.1",
    "9e9",
    "1e-9",
    r"^\circ",
    "√",
    "²",
    "−",
    "é",
    r"\lfloor",
    r"\rfloor",
    r"\lceil",
    r"\rceil",
    "99^{99^{99}}",
    "999!",
    "9^9^9^9",
    "1011_2",
    r"\over",
    r"\choose",
    r"\",
    "½",
    "∞",
    "ℝ",
    "∅",
    r"\cdot",
    r"\div",
    "°",
    "dollars",
    "None",
    "TRUE",
    "\u{feff}",
    "١",
    "𝟙",
];

fn soup() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(VOCABULARY), 0..60).prop_map(|parts| parts.concat())
}

/// Answers as they occur in data sets.
const ANSWERS: &[&str] = &[
    "42",
    "-7",
    "3.75",
    "1,234,567",
    r"\frac{3}{8}",
    r"-\frac{17}{5}",
    r"2\sqrt{3}",
    r"\frac{1+\sqrt{5}}{2}",
    r"\left(3, \frac{\pi}{2}\right)",
    "(1,2),(3,4)",
    r"(-\infty,-2)\cup[1,\infty)",
    r"\{1,2,3\}",
    "x^2-5x+6",
    r"\begin{pmatrix} 1 & -2 \\ 0 & 5 \end{pmatrix}",
    "y = 2x+3",
    r"x \le 4",
    r"36\pi \text{ cm}^2",
    "60^\\circ",
    r"25\%",
    r"\$18.90",
    r"\text{(C)}",
    r"\text{even}",
    "4210_5",
    r"\log_2 3",
    r"\sin^2 x",
    "3+4i",
    r"\binom{10}{3}",
    r"2^{2023}-1",
    "7!",
    r"1\frac{2}{3}",
    r"\pm 3",
    "0.\\overline{36}",
    r"e^{-t}\cos(2t)",
    "10:30",
    "6 or 8",
];

fn mutated() -> impl Strategy<Value = String> {
    let edit = (any::<prop::sample::Index>(), 0..5u8, prop::sample::select(VOCABULARY));
    (prop::sample::select(ANSWERS), prop::collection::vec(edit, 0..8)).prop_map(|(answer, edits)| {
        let mut text: Vec<char> = answer.chars().collect();
        for (at, kind, token) in edits {
            let at = at.index(text.len() + 1);
            match kind {
                0 if at < text.len() => drop(text.remove(at)),
                1 => text.truncate(at.max(1)),
                2 => text.extend_from_within(..at),
                3 if at < text.len() => text.swap(at, 0),
                _ => drop(text.splice(at..at, token.chars())),
            }
        }
        text.into_iter().collect()
    })
}

/// A text that nests something repeatedly.
fn nested() -> impl Strategy<Value = String> {
    let wrapping = prop::sample::select(vec![
        ("(", ")"),
        ("{", "}"),
        ("[", "]"),
        ("|", "|"),
        (r"\frac{1}{", "}"),
        (r"\sqrt{", "}"),
        ("2^{", "}"),
        (r"1\frac{1}{", "}"),
        (r"\sin(", ")"),
        (r"\{1,", r"\}"),
        ("(1,", ")"),
        ("(x=", ")"),
        (r"(x\approx", ")"),
        ("9^", ""),
        ("(", ")!"),
        ("-", ""),
        (r"\text{", "}"),
        (r"\boxed{", "}"),
        (r"\lfloor ", r"\rfloor"),
        (r"\begin{pmatrix}", r"\end{pmatrix}"),
        (r"\sum_{k=1}^{99} ", ""),
        (r"\binom{99}{", "}"),
        ("x_{", "}"),
        (r"\log_{", "} 3"),
        ("1+", ""),
        ("", r" \cup (1,2)"),
        ("", "!"),
        ("", r"\%"),
        ("", "^2"),
    ]);
    (prop::collection::vec((wrapping, 1..30usize), 1..6), prop::sample::select(ANSWERS)).prop_map(|(layers, core)| {
        layers.into_iter().fold(core.to_owned(), |inside, ((open, close), times)| {
            format!("{}{inside}{}", open.repeat(times), close.repeat(times))
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, rng_seed: RngSeed::Fixed(1), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_strings(response in any::<String>(), gold in any::<String>()) {
        check(&response, &gold);
    }

    #[test]
    fn token_soup(response in soup(), gold in soup()) {
        check(&response, &gold);
        check(&format!("\\boxed{{{response}}}"), &gold);
    }

    #[test]
    fn mutated_answers(response in mutated(), gold in mutated()) {
        check(&format!("\\boxed{{{response}}}"), &gold);
        check(&format!("So the answer is {response}."), &gold);
    }

    #[test]
    fn deep_nesting(response in nested(), gold in nested()) {
        check(&format!("\\boxed{{{response}}}"), &gold);
        check(&format!("\\boxed{{{gold}}}"), &gold);
    }

    #[test]
    fn a_readable_answer_equals_itself(gold in prop_oneof![soup(), mutated(), nested()]) {
        // Marks of reasoning and of final answers have other meanings in a response than in a reference.
        prop_assume!(!["think>", "answer", "Answer", "####"].iter().any(|mark| gold.contains(mark)));
        let boxed = format!("\\boxed{{{gold}}}");
        let (verdict, _) = grade_counted(&boxed, &boxed, Mode::Strict);
        prop_assert!(matches!(verdict.outcome, Outcome::Correct | Outcome::Failed | Outcome::Unparsable), "{:?}", verdict);
    }
}

#[test]
fn huge_numbers_are_refused_or_decided_in_time() {
    let digits = "7".repeat(1900);
    let nines = "9".repeat(900);
    let huge = [
        "9^9^9^9".to_owned(),
        "9^{9^{9^9}}".to_owned(),
        "(9!)!".to_owned(),
        "((9!)!)!".to_owned(),
        "1000!/999!".to_owned(),
        "10000!".to_owned(),
        "20000!".to_owned(),
        r"\binom{1000000007}{2000}".to_owned(),
        r"\binom{2000}{1000}".to_owned(),
        "2^{16000}".to_owned(),
        "3^{-10000}".to_owned(),
        "(1+x)^{100000}".to_owned(),
        "1e4000".to_owned(),
        "1e-4000".to_owned(),
        "1e99999999999".to_owned(),
        digits.clone(),
        format!("0.{digits}"),
        format!(r"0.\overline{{{nines}}}"),
        format!(r"\frac{{{nines}}}{{{}}}", "8".repeat(900)),
        format!(r"\sqrt{{{digits}}}"),
        format!(r"\log_2 {digits}"),
        format!(r"\gcd({nines}, {})", "6".repeat(900)),
        r"\sum_{k=1}^{99} k!".to_owned(),
        r"\sum_{k=1}^{120} \sum_{i=1}^{120} \sum_{n=1}^{120} (k+i+n)".to_owned(),
        r"\prod_{k=1}^{99} k^{99}".to_owned(),
        r"\begin{pmatrix} 1 & 1 \\ 1 & 0 \end{pmatrix}^{64}".to_owned(),
        r"\begin{pmatrix} x & y \\ 1 & x \end{pmatrix}^{64}".to_owned(),
        r"e^{e^{e^{e^{e^e}}}}".to_owned(),
        r"\sin(10^{300})".to_owned(),
        r"\frac{1}{\sin(\pi)}".to_owned(),
        "0^0".to_owned(),
        "1/0".to_owned(),
        "0^{-1}".to_owned(),
        r"\ln 0".to_owned(),
        r"\tan\frac{\pi}{2}".to_owned(),
    ];
    for a in &huge {
        for b in &huge {
            check(&format!("\\boxed{{{a}}}"), b);
        }
    }
    println!("at most {} of {MAX_GRADE_STEPS} steps", WORST.load(Ordering::Relaxed));
}

#[test]
fn repetitions_stay_within_their_steps() {
    let parts = VOCABULARY.iter().copied().chain([
        "((1)",
        "$ 1 ",
        r"\frac{1",
        r"1\frac{1",
        "2^",
        "1+",
        "1/",
        "x!",
        "(x≈1",
        "x≈",
        "x=",
        "(x=",
        r"\pm 1",
        "9e4000,",
        r"\binom{999}{500}*",
        "|x",
        "1 1/2 ",
        r"$\",
        "1(",
        "1.5,",
        "(0,1),",
        r"(0,1)\cup",
        r"\sqrt{2}+",
        r"\sqrt2,",
        "999!+",
        r"\boxed{1}, ",
        "$1$, ",
        "answer is 1. ",
        r"\sin x+",
        "2^{x}*",
        "x^9+",
    ]);
    for part in parts {
        for bytes in [200, 1900, 200_000] {
            let text = part.repeat(bytes / part.len());
            check(&text, "5");
            check(&format!("\\boxed{{{text}}}"), &text);
            let closed = format!("{text}1{}", ")".repeat(20));
            check(&closed, &closed);
            check(&format!("\\boxed{{{closed}}}"), "x+1");
            check(&format!("\\boxed{{{text}1}}"), &format!("{text}2"));
        }
    }
    println!("at most {} of {MAX_GRADE_STEPS} steps", WORST.load(Ordering::Relaxed));
}
