//! What counts as the same answer, form by form.

use pacs_types::Outcome;
use pacs_verify::{GoldError, Mode, check_gold, grade};

fn outcome(gold: &str, answer: &str) -> (Outcome, String) {
    let verdict = grade(&format!("Hence $\\boxed{{{answer}}}$."), gold, Mode::Strict);
    (verdict.outcome, verdict.rule)
}

#[test]
fn equal_answers_are_correct() {
    for (gold, answer, rule) in [
        ("023", "23", "integer"),
        ("15400", "15,400", "integer"),
        ("1,296,540", r"1{,}296{,}540", "integer"),
        ("100,200,300", "200, 100, 300", "set"),
        (r"\frac{1}{2}", "0.5", "rational"),
        (r"\frac43", r"\dfrac{4}{3}", "rational"),
        ("1 1/2", r"1\frac12", "rational"),
        ("0.6666667", "2/3", "rational"),
        (r"\$28.00", "28", "integer"),
        (r"28\%", "28", "percent"),
        (r"10\%", "0.1", "percent"),
        (r"60^\circ", r"60 \text{ degrees}", "integer"),
        (r"54\text{ cm}^2", "54", "integer"),
        ("135 square feet", "135", "integer"),
        ("35 miles/hour", "35", "integer"),
        (r"2\sqrt{13}", r"\frac{26}{\sqrt{13}}", "numeric"),
        (r"\frac{\sqrt3}{2}", "0.8660254037844386", "numeric"),
        (r"36\pi", r"\pi \cdot 6^2", "numeric"),
        ("1+2i", "i(2-i)", "numeric"),
        (r"\sin(30^\circ)", r"\frac{1}{2}", "numeric"),
        (r"2 \ln 3", r"\ln 9", "numeric"),
        (r"\log_2 8", "3", "numeric"),
        (r"\arcsin 1", r"\frac{\pi}{2}", "numeric"),
        (r"\cos^{-1}(1/2)", "pi/3", "numeric"),
        ("(r+5)^2", "r^2+10r+25", "symbolic"),
        (r"\tan^2(y)+1", r"\sec^2(y)", "symbolic"),
        (r"\frac{n!}{(n-2)!}", "n(n-1)", "symbolic"),
        ("3e^{-2t}", r"3\exp(-2t)", "symbolic"),
        (r"x = 5", "5", "integer"),
        ("5", "x = 5", "integer"),
        ("14", "9 + 5 = 14", "integer"),
        ("11", r"x \approx 11", "integer"),
        (r"\frac13", r"x = \frac13 \approx 0.33", "rational"),
        ("y = 2x + 3", "2x - y + 3 = 0", "equation"),
        ("f(x) = 7", "f(t) = 7", "equation"),
        (r"x \geq 5", r"5 \leq x", "inequality"),
        (r"x \geq 5", r"[5, \infty)", "sequence"),
        (r"-2 \le x < 7", r"x \in [-2, 7)", "sequence"),
        ("(1, 2)", r"(x, y) = \left(1, \frac{4}{2}\right)", "sequence"),
        ("1, 2, 3", r"\{3, 1, 2\}", "set"),
        (r"1 \pm \sqrt{19}", r"1 - \sqrt{19} \text{ or } 1 + \sqrt{19}", "set"),
        (r"(-\infty, 1) \cup (2, 3]", r"(2,3] \cup (-\infty,1)", "union"),
        (r"\begin{pmatrix} 1 \\ -1/2 \end{pmatrix}", r"\begin{bmatrix} 1 \\ -0.5 \end{bmatrix}", "matrix"),
        ("7:32", "14:64", "rational"),
        (r"\text{Evelyn}", "evelyn", "text"),
        (r"\text{(B)}", "B", "text"),
        ("no", r"\text{No.}", "text"),
        ("4210_5", "4210_{5}", "symbolic"),
        ("5", "f(2) = 5", "integer"),
    ] {
        assert_eq!(outcome(gold, answer), (Outcome::Correct, rule.to_owned()), "{gold} and {answer}");
    }
}

#[test]
fn different_answers_are_wrong() {
    for (gold, answer) in [
        ("5", "5.001"),
        ("0.067", "0.066793"),
        ("1/3", "0.33"),
        ("1/3", "0.33333"),
        ("28", "0.28"),
        (r"8\pi", "25.12"),
        (r"2\sqrt{3}", "3.464"),
        ("5", "-5"),
        ("x+6", "x+7"),
        ("2x-1", "4x-2"),
        ("x", "|x|"),
        (r"\sqrt{x^2}", "x"),
        ("y = x", "y = 2x"),
        ("2x + z = 1", "1"),
        ("x < 1", "x > 1"),
        ("x < 1", r"x \le 1"),
        ("(1, 2)", "(2, 1)"),
        ("(0, 9)", "[0, 9)"),
        ("(1, 2)", "(1, 2, 0)"),
        ("1, 2", "1"),
        ("1, 2", "1, 2, 3"),
        (r"\pm 3", "3"),
        (r"(-\infty, 1) \cup (2, 3)", "(2, 3)"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \end{pmatrix}"),
        (r"\text{even}", r"\text{odd}"),
        (r"\text{(A)}", r"\text{(B)}"),
        ("7", r"\text{No solution}"),
        ("1200_7", "1200"),
        ("I(0)", "0"),
        ("I(0)", "I(0) e^{-t}"),
        ("10^{10^{10}}", "10^{10^{11}}"),
    ] {
        assert_eq!(outcome(gold, answer).0, Outcome::Wrong, "{gold} and {answer}");
    }
}

#[test]
fn strict_mode_wants_a_mark() {
    let lenient = |response| grade(response, "74", Mode::Lenient);
    let strict = |response| grade(response, "74", Mode::Strict);
    assert_eq!(lenient("63 + 11 = 74").outcome, Outcome::Correct);
    assert_eq!(strict("63 + 11 = 74").outcome, Outcome::Unparsable);
    assert_eq!(strict("63 + 11 = 74").rule, "no_answer");
    for marked in [r"\boxed{74}", "The answer is 74.", "#### 74", "Final Answer: 74", "<answer>74</answer>"] {
        let verdict = strict(marked);
        assert_eq!((verdict.outcome, verdict.label, verdict.reward), (Outcome::Correct, 1.0, 1.0), "{marked}");
        assert_eq!(verdict.extracted.as_deref(), Some("74"), "{marked}");
    }
}

#[test]
fn an_answer_that_cannot_be_read_is_unparsable() {
    assert_eq!(grade(r"\boxed{1 2}", "12", Mode::Lenient).outcome, Outcome::Unparsable);
    for response in ["", "   ", "I do not know.", r"\boxed{}", r"\boxed{((1}", r"\boxed{1 2 +}"] {
        let verdict = grade(response, "5", Mode::Lenient);
        assert_eq!((verdict.outcome, verdict.label), (Outcome::Unparsable, 0.0), "{response}");
    }
    let long = format!(r"\boxed{{{}}}", "1+".repeat(2000));
    assert_eq!(grade(&long, "5", Mode::Lenient).rule, "too_long");
}

#[test]
fn an_unreadable_reference_is_the_verifiers_failure() {
    assert_eq!(check_gold(" "), Err(GoldError::Empty));
    assert!(matches!(check_gold(&"1".repeat(5000)), Err(GoldError::TooLong { bytes: 5000 })));
    assert!(matches!(check_gold("(1, 2"), Err(GoldError::Unreadable { .. })));
    let verdict = grade(r"\boxed{5}", "(1, 2", Mode::Lenient);
    assert_eq!(verdict.outcome, Outcome::Failed);
    assert!(verdict.rule.contains("cannot be read"), "{}", verdict.rule);
    for gold in ["18", r"\frac{1}{2}", r"\text{Evelyn}", "so it is #### 18", r"Hence \boxed{3}."] {
        assert_eq!(check_gold(gold), Ok(()), "{gold}");
    }
}
