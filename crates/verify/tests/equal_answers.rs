//! Pairs that count as the same answer, by notation, with the rule that decides.

use pacs_types::Outcome;
use pacs_verify::{GoldError, Mode, check_gold, grade};

fn outcome(gold: &str, answer: &str) -> (Outcome, String) {
    let verdict = grade(&format!("Hence $\\boxed{{{answer}}}$."), gold, Mode::Strict);
    // The rule without the readings of both sides.
    let rule = verdict.rule.split(": ").next().unwrap_or_default().to_owned();
    (verdict.outcome, rule)
}

#[test]
fn equal_answers_are_correct() {
    for (gold, answer, rule) in [
        // Numbers as they are written.
        ("023", "23", "integer"),
        ("15400", "15,400", "integer"),
        ("1,296,540", r"1{,}296{,}540", "integer"),
        ("76176", r"76{,}\!176", "integer"),
        ("19133", r"19\ 133", "integer"),
        ("1509", "1'509", "integer"),
        ("12000", "12 000", "integer"),
        ("2.74", "2,74", "rational"),
        ("0.006", "0{,}006", "rational"),
        (r"\frac{1}{2}", "0.5", "rational"),
        (r"\frac43", r"\dfrac{4}{3}", "rational"),
        (r"\frac{2}{3}", r"{2 \over 3}", "rational"),
        ("1 1/2", r"1\frac12", "rational"),
        ("3.46 \\times 10^3", "3460", "integer"),
        ("174", "174_{10}", "base"),
        ("4210_5", "4210_{5}", "base"),
        ("4210_5", "4210", "base"),
        (r"\frac{3}{4}", r"\text{3/4}", "rational"),
        // Decimals stand for what rounds to them.
        ("0.6666667", "2/3", "rounded"),
        ("1/3", "0.333333", "rounded"),
        (r"\frac{31}{90}", r"34.4444\%", "percent"),
        ("3.24", "3.240000001", "rounded"),
        (r"\frac{\sqrt3}{2}", "0.8660254037844386", "rounded"),
        (r"\pi", "3.141593", "rounded"),
        // Money, units, percent, degrees.
        (r"\$28.00", "28", "integer"),
        (r"28\%", "28", "percent"),
        (r"10\%", "0.1", "percent"),
        (r"60^\circ", r"60 \text{ degrees}", "identical"),
        (r"54\text{ cm}^2", "54", "integer"),
        ("135 square feet", "135", "integer"),
        ("35 miles/hour", "35", "integer"),
        ("120", "120m", "integer"),
        (r"65 \text{ tickets}", r"65 \mathrm{ children tickets }", "integer"),
        ("3", r"3~\mathrm{kg} \cdot \mathrm{m}^{-2}", "integer"),
        // Irrational numbers.
        (r"2\sqrt{13}", r"\frac{26}{\sqrt{13}}", "numeric"),
        (r"36\pi", r"\pi \cdot 6^2", "residues"),
        ("1+2i", "i(2-i)", "residues"),
        (r"\sin(30^\circ)", r"\frac{1}{2}", "numeric"),
        (r"2 \ln 3", r"\ln 9", "numeric"),
        (r"\log 100", "2", "integer"),
        (r"\ln 2", r"\log 2", "identical"),
        (r"\log_2 8", "3", "integer"),
        (r"\arcsin 1", r"\frac{\pi}{2}", "numeric"),
        (r"\cos^{-1}(1/2)", "pi/3", "numeric"),
        (r"e^{i\pi}", "-1", "numeric"),
        // Expressions with variables.
        ("(r+5)^2", "r^2+10r+25", "residues"),
        (r"\tan^2(y)+1", r"\sec^2(y)", "numeric"),
        (r"\frac{n!}{(n-2)!}", "n(n-1)", "whole_numbers"),
        (r"\binom{n}{2}", r"\frac{n(n-1)}{2}", "whole_numbers"),
        ("(-1)^{n+2}", "(-1)^n", "whole_numbers"),
        ("3e^{-2t}", r"3\exp(-2t)", "numeric"),
        (r"\frac{1}{N+1}", r"\frac{1}{n+1}", "identical"),
        (r"\sum_{k=1}^{4} k x", "10x", "residues"),
        // Equations: the value is on the right side.
        (r"x = 5", "5", "integer"),
        ("5", "x = 5", "integer"),
        ("5", "f(2) = 5", "integer"),
        ("5", "x^2 = 5", "integer"),
        ("60", "a+b+c = 57+1+2 = 60", "integer"),
        ("14", "9 + 5 = 14", "integer"),
        ("11", r"x \approx 11", "integer"),
        (r"\frac13", r"x = \frac13 \approx 0.33", "rational"),
        ("7", r"2x = 14 \implies x = 7", "integer"),
        ("y = 2x + 3", "2x - y + 3 = 0", "equation"),
        ("y = 2x + 3", "2x + 3 = y", "equation"),
        (r"y = \frac{1}{x}", "xy = 1", "equation"),
        ("f(x) = 7", "f(t) = 7", "equation"),
        ("y' + ry = 0", r"y^{\prime} + r y = 0", "equation"),
        // Intervals and sets of numbers.
        (r"x \geq 5", r"5 \leq x", "inequality"),
        (r"x \geq 5", r"[5, \infty)", "region"),
        (r"-2 \le x < 7", r"x \in [-2, 7)", "region"),
        (r"(-\infty, 1) \cup (2, 3]", r"(2,3] \cup (-\infty,1)", "region"),
        (r"x \ne 3", r"\mathbb{R} \setminus \{3\}", "region"),
        (r"(-\infty, \infty)", r"\mathbb{R}", "region"),
        (r"(-\infty, -1) \cup (1, \infty)", r"x < -1 \text{ or } x > 1", "region"),
        (r"(3, \infty)", r"\{x \mid x > 3\}", "region"),
        (r"\emptyset", r"\{\}", "set"),
        // Tuples, lists, sets.
        ("(1, 2)", r"(x, y) = \left(1, \frac{4}{2}\right)", "sequence"),
        ("(1, 2, 3)", "[1, 2, 3]", "sequence"),
        ("(15, -29)", "[15, -29]", "sequence"),
        ("(2, 12)", r"\{2, 12\}", "sequence"),
        ("1, 2, 3", r"\{3, 1, 2\}", "set"),
        ("1, 2", "(2, 1)", "set"),
        ("100,200,300", "200, 100, 300", "set"),
        (r"1 \pm \sqrt{19}", r"1 - \sqrt{19} \text{ or } 1 + \sqrt{19}", "set"),
        ("(3, 4)", "x = 3, y = 4", "sequence"),
        // Matrices and vectors.
        (r"\begin{pmatrix} 1 \\ -1/2 \end{pmatrix}", r"\begin{bmatrix} 1 \\ -0.5 \end{bmatrix}", "matrix"),
        (r"\begin{pmatrix} 2 \\ 4 \end{pmatrix}", r"2\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "matrix"),
        (
            r"\begin{pmatrix} 2 & 1 \\ 1 & 1 \end{pmatrix}",
            r"\left(\begin{array}{cc} 1 & 1 \\ 1 & 0 \end{array}\right)^2",
            "matrix",
        ),
        (
            r"\begin{pmatrix} -2 & 1 \\ 3/2 & -1/2 \end{pmatrix}",
            r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}^{-1}",
            "matrix",
        ),
        ("-2", r"\begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix}", "integer"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\langle 1, 2 \rangle", "matrix"),
        // Words and choices.
        ("7:32", "14:64", "ratio"),
        (r"\text{Evelyn}", "evelyn", "text"),
        (r"\text{(B)}", "B", "text"),
        (r"\text{C}", r"\mathrm{C}", "text"),
        ("no", r"\text{No.}", "text"),
        (r"\text{odd}", "odd", "text"),
        (r"\text{DNE}", r"\text{does not exist}", "text"),
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
        ("I(0)", "0"),
        ("I(0)", "I(0) e^{-t}"),
        ("10^{10^{10}}", "10^{10^{11}}"),
        ("1011_2", "1011_3"),
        ("0.0000012", "0.0000013"),
        ("5", "5x"),
        ("120", "120x"),
        (r"\frac{1}{R+r}", r"\frac{1}{r+r}"),
        (r"y = \frac{1}{x}", "x^2 y = 1"),
        (r"(-\infty, 3)", r"(-\infty, 3]"),
        (r"\mathbb{R}", r"x \ne 3"),
        (r"\emptyset", "0"),
        ("2.74", "2,75"),
        ("-\\infty", "\\infty"),
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
fn what_cannot_be_shown_is_undecided() {
    for (gold, answer) in
        [("9^{9^{9^9}}", "9^{9^{9^9}}+1"), ("5", "1/0"), ("0", r"10^{40}\sqrt{2} - \sqrt{2 \cdot 10^{80}}")]
    {
        let verdict = grade(&format!("\\boxed{{{answer}}}"), gold, Mode::Lenient);
        assert_eq!(verdict.outcome, Outcome::Unparsable, "{gold} and {answer}");
        assert!(verdict.rule.starts_with("undecided: "), "{gold} and {answer}: {}", verdict.rule);
    }
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
