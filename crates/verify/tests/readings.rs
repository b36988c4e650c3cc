//! Texts that are not an answer earn nothing, kind by kind; and answers are read in the notations that people use.

use pacs_types::Outcome;
use pacs_verify::{Form, Mode, Rules, grade};

const ANY: Rules = Rules { mode: Mode::Lenient, form: Form::Any };
const EVALUATED: Rules = Rules { mode: Mode::Lenient, form: Form::Evaluated };

fn check(pairs: &[(&str, &str)], expected: bool) {
    let mut wrong = Vec::new();
    for (gold, answer) in pairs {
        let verdict = grade(&format!("Hence $\\boxed{{{answer}}}$."), gold, ANY);
        if (verdict.outcome == Outcome::Correct) != expected || verdict.outcome == Outcome::Failed {
            wrong.push(format!("{gold} <- {answer}: {:?} {}", verdict.outcome, verdict.rule));
        }
    }
    assert!(wrong.is_empty(), "expected correct = {expected}:\n{}", wrong.join("\n"));
}

#[test]
fn letters_are_variables_until_they_are_written_as_a_unit() {
    check(
        &[
            ("2mg", "2gm"),
            ("2mg", "2 m g"),
            (r"\frac{mg}{k}", r"\frac{gm}{k}"),
            (r"\sqrt{km}", r"\sqrt{mk}"),
            (r"\ln(am)", r"\ln(ma)"),
            ("4abcd", "4 d c b a"),
            ("abcd", r"ab \cdot cd"),
            ("54", "54 cm"),
            ("54", r"54\text{ cm}"),
            (r"54\text{ cm}", "54 cm"),
            ("12", "12 cm²"),
            ("120", "120m"),
            ("7", "7th"),
        ],
        true,
    );
    check(
        &[
            ("2mg", "2"),
            (r"\mu mg", r"\mu"),
            ("4abcd", "4"),
            ("3km", "3"),
            ("6", "6abcd"),
            ("10", "10t"),
            ("x^2+6cm", "x^2+6"),
            (r"\frac12 ft", r"\frac12"),
            ("5lb", "5"),
        ],
        false,
    );
}

#[test]
fn units_have_dimensions_and_scales() {
    check(
        &[
            (r"5\text{ km}", r"5000\text{ m}"),
            (r"5\text{ km}", "5"),
            ("5", r"5\text{ km}"),
            (r"2\text{ hours}", r"120 \text{ minutes}"),
            (r"36\text{ km/h}", r"10\text{ m/s}"),
            (r"10\text{ m/s}^2", r"10\,\mathrm{m}\cdot\mathrm{s}^{-2}"),
            (r"5\text{ ft }6\text{ in}", r"66\text{ inches}"),
            (r"\$18.90", r"18.90\text{ dollars}"),
            (r"\$0.25", r"25\text{ cents}"),
            (r"\$5", "5"),
            (r"12\text{ square feet}", r"12\text{ ft}^2"),
            (r"12\text{ square units}", r"12\text{ cm}^2"),
            (r"20^\circ\text{C}", r"20\text{ degrees Celsius}"),
            ("12", r"12\text{ apples}"),
            (r"12\text{ apples}", "12"),
            (r"65\text{ tickets}", r"65\text{ children tickets}"),
            ("12", "12 slices of pizza"),
            ("12", "12元"),
            ("5", "5 días"),
            ("3", "3米"),
            ("12000", "12 thousand"),
            ("144", "12 dozen"),
            ("3000000", r"3\text{ million}"),
            ("7, 4", r"7\text{ goats and }4\text{ helicopters}"),
            (r"\frac{\pi}{4}", r"45^\circ"),
            ("45", r"45^\circ"),
            (r"30^\circ", "30"),
            (r"30.5^\circ", r"30^\circ 30'"),
            (r"(45^\circ, 60^\circ)", "(45, 60)"),
        ],
        true,
    );
    check(
        &[
            (r"5\text{ km}", r"5\text{ m}"),
            (r"5\text{ km}", "5000"),
            (r"3\text{ hours}", r"3\text{ minutes}"),
            (r"\$5", r"5\text{ euros}"),
            (r"5\text{ cm}^2", r"5\text{ cm}^3"),
            (r"5\text{ square units}", r"5\text{ cm}^3"),
            (r"5\text{ cm}", r"5\text{ kg}"),
            ("12", "12 thousand"),
            ("12", "12 dozen"),
            ("95", r"95\text{ is wrong}"),
            ("95", r"95\text{ (or 96)}"),
            ("12", r"12\text{ less than }x"),
            ("5", r"5\text{ over }2"),
            ("2", r"2\text{ squared}"),
            ("2", r"2\text{ thirds}"),
            ("3", r"3\text{ tenths}"),
            ("5", r"\text{minus }5"),
            ("12", r"12\text{ if }n>3"),
            ("12", r"12\text{ incorrectly}"),
            ("3", r"3\text{ apples and 4 pears}"),
            (r"12\text{ apples}", r"12\text{ oranges}"),
            ("90", r"\frac{\pi}{2}"),
            (r"60^\circ", r"\frac{\pi}{4}"),
            (r"20^\circ\text{C}", r"20^\circ\text{F}"),
        ],
        false,
    );
}

#[test]
fn commas_of_the_reference_separate_or_group() {
    check(
        &[
            ("2.74", "2,74"),
            ("1,500", "1500"),
            (r"\$1,500", "1500"),
            ("1,500", "1, 500"),
            ("-2,1", "1, -2"),
            ("0.5", "0{,}5"),
        ],
        true,
    );
    check(
        &[
            ("-2,1", "-2.1"),
            (r"\$1,500", "1.5"),
            ("58,500", "58.500"),
            ("58.500", "58,500"),
            ("1,2", "1.2"),
            ("12,500", "12.5"),
        ],
        false,
    );
}

#[test]
fn relations_are_read_whole() {
    check(
        &[
            ("1<2x+1<5", "0<x<2"),
            ("(1,5)", "1<x<5"),
            ("(-5,-1)", "1<-x<5"),
            (r"1 \le |z| \le 2", r"[-2,-1] \cup [1,2]"),
            ("x > 3", "2x > 6"),
            ("x > 3", "-x < -3"),
            ("5", "3+2=5"),
            ("5", "x=5"),
            (r"x \ne 2", r"(-\infty,2)\cup(2,\infty)"),
            ("x<1 or x>2", r"(-\infty,1)\cup(2,\infty)"),
            (r"a \le -2 \text{ or } a = 1", r"(-\infty,-2]\cup\{1\}"),
            ("x>1", r"x>1 \text{ or } x>2"),
            ("y=2x+3", "2x+3"),
            ("xy=6", "y=6/x"),
            ("(2,3)", "]2,3["),
            ("[2,3)", "[2,3["),
            ("2n+1", r"2n+1\text{ for all }n \ge 1"),
            (r"k=2n, n\in\mathbb{Z}", r"k=2m, m\in\mathbb{Z}"),
            ("AB = 5", "5"),
            ("f(x)=x^2", "x^2"),
            ("f(x)=x^2", "f(t)=t^2"),
            ("f(x)=x^2", "y=x^2"),
            (r"k\pi", r"n\pi"),
            (r"x = k\pi, k \in \mathbb{Z}", r"n\pi"),
            ("x=3, y=4", "y=4, x=3"),
            ("(3,4)", "y=4, x=3"),
            ("x_1=1, x_2=2", "2, 1"),
            (r"\text{Area} = 5", "5"),
        ],
        true,
    );
    check(
        &[
            ("1<2x+1<5", "1<x<5"),
            ("1<x<5", "1<2x<5"),
            ("0<x^2<4", "0<x<4"),
            ("5", "3=4=5"),
            ("3", "3=4=5"),
            ("5", "4=5"),
            ("x>1", r"x>1 \text{ or } x>0"),
            ("1<x<5", r"x>1 \text{ or } x<5"),
            (r"x<-1 \text{ or } x>1", r"x<-1 \text{ and } x>1"),
            ("xy=6", "6"),
            ("7=11a+c", "11a+c"),
            ("x(y-1)=0", "0"),
            (r"\rho\sin\theta=\sqrt3", r"\sqrt3"),
            (r"\{1,2,3\}", r"5\in\{1,2,3\}"),
            ("[1,2]", r"x \notin [1,2]"),
            (r"\{x \mid x>3, x\in\mathbb{Z}\}", "x>3"),
            ("x=3, y=4", "x=4, y=3"),
            ("(3,4)", "x=4, y=3"),
            ("f(x)=x", "f(x)=y"),
            (r"k\pi", r"2n\pi"),
            ("f(2)<f(1)<f(4)", "f(2)<f(3)<f(4)"),
            ("b<a<c", "a<b<c"),
        ],
        false,
    );
}

#[test]
fn ratios_times_and_digits() {
    check(
        &[
            ("1:2:3", "2:4:6"),
            ("2:1", "2"),
            ("3:4", r"3\text{ to }4"),
            (r"1:\sqrt{2}", r"\sqrt{2}:2"),
            (r"12:41\text{ p.m.}", "12:41 PM"),
            (r"\text{1:03 PM}", r"1:03\text{ p.m.}"),
            (r"2:30\text{ p.m.}", "14:30"),
            (r"\text{5 PM}", r"5:00\text{ p.m.}"),
            (r"0.\dot{3}", r"\frac13"),
            (r"\frac13", r"0.\bar{3}"),
            (r"\frac{1}{7}", r"0.\dot{1}4285\dot{7}"),
            (r"\frac13", r"0.333\ldots"),
            ("A3_{16}", r"\text{A3}_{16}"),
            ("1011_2", "1011_{2}"),
        ],
        true,
    );
    check(
        &[
            ("1:2:3", "1:3:2"),
            ("1:2:3", "1/6"),
            ("2:1:1", "2:1"),
            ("1:1:1", "1"),
            ("12:00", "1:00"),
            (r"2:30\text{ p.m.}", r"2:30\text{ a.m.}"),
            (r"\text{1:03 PM}", r"\text{103 PM}"),
            (r"0.\dot{3}", "0"),
            (r"0.\bar{3}", "0.3"),
            ("A3_{16}", "A3_{12}"),
            ("40_9", "40_{10}"),
        ],
        false,
    );
}

#[test]
fn words_keep_their_marks() {
    check(
        &[
            (r"\text{x > 3}", "x>3"),
            (r"\text{12 apples}", r"12\text{ apples}"),
            (r"\text{13}", "13"),
            (r"\text{four}", "4"),
            (r"\text{no solution}", r"\emptyset"),
            (r"\textbf{(D)}\ 42", "D"),
            (r"\textbf{(D)}\ 42", "42"),
            ("12", "A) 12"),
            ("A", r"\textbf{(A)}\ 12"),
            (r"\text{June 20}", "June 20"),
            (r"\text{ellipse}", "ellipse"),
            ("<", "<"),
        ],
        true,
    );
    check(
        &[
            (r"\text{x > 3}", r"\text{x < 3}"),
            (r"\text{3.5 apples}", r"\text{35 apples}"),
            (r"\text{-5 degrees}", r"\text{5 degrees}"),
            (r"\text{June 20}", r"\text{June 2}"),
            (r"\text{Alice: 1, Bob: 23}", r"\text{Alice: 1, Bob: 2, 3}"),
            (r"\text{>}", r"\text{<}"),
            (r"\textbf{(D)}\ 42", "B"),
            (r"\text{(C)}", "c"),
            ("ABC", "CAB"),
            (r"\angle ABC", r"\angle CAB"),
            ("listen", "silent"),
        ],
        false,
    );
}

#[test]
fn characters_are_read_as_what_they_look_like() {
    check(
        &[
            ("12", "１２"),
            ("x \\le 3", "x ⩽ 3"),
            ("0.001", "10⁻³"),
            ("x_1 = 2", "x₁ = 2"),
            ("5000", "5\u{202f}000"),
            ("5000", "5\u{a0}000"),
            ("5", "5\u{200b}"),
            ("200000", "2.0 x 10^5"),
            (r"\log_{10} 2", r"\lg 2"),
            (r"2\cos 30^\circ + 2i\sin 30^\circ", r"2\operatorname{cis} 30^\circ"),
            (r"\sqrt[3]{x}", "x^{1/3}"),
            (r"a_k + a_{k-1} + \ldots + a_0", r"a_0 + a_1 + a_2 + \cdots + a_k"),
            (
                r"f(x)=\begin{cases} x & x\ge 0 \\ -x & x<0\end{cases}",
                r"\begin{cases} -x, & \text{if } x<0 \\ x, & \text{if } x\ge 0\end{cases}",
            ),
        ],
        true,
    );
}

#[test]
fn a_phrase_that_hedges_is_no_answer() {
    let outcome = |response: &str, gold: &str| grade(response, gold, ANY).outcome;
    for (response, gold) in [
        ("The answer is one of 3, 5 or 7.", "3"),
        ("The answer is one of 3, 5 or 7.", "7"),
        ("The answer is definitely not equal to 5.", "5"),
        ("The answer is not 5.", "5"),
        ("The answer isn't 5.", "5"),
        ("The answer is either 4 or 5.", "5"),
        ("The answer is somewhere between 1 and 100.", "100"),
        ("The answer is at least 5.", "5"),
        ("The answer is 10 or 11.", "11"),
        ("The answer is maybe 5.", "5"),
        ("The answer might be 5.", "5"),
        ("It is not clear, but the answer could be 5.", "5"),
        ("The answer is unknown, maybe 5, maybe 8.", "5"),
    ] {
        assert_ne!(outcome(response, gold), Outcome::Correct, "{response}");
    }
    for (response, gold) in [
        ("The answer is 5.", "5"),
        ("The answer is therefore 5.", "5"),
        ("The answer is 12 cm.", "12"),
        ("Final Answer: The largest $n$ is 34.", "34"),
        ("So the answer is equal to $\\frac{1}{2}$.", "0.5"),
        ("\\boxed{5}. The final answer is correct.", "5"),
        ("**Final Answer**\n\\boxed{5}\n\nThis answer is correct.", "5"),
        ("so $\\boxed5$", "5"),
        ("因此答案是 12。", "12"),
    ] {
        assert_eq!(outcome(response, gold), Outcome::Correct, "{response}");
    }
}

#[test]
fn what_is_left_to_calculate_is_no_answer() {
    let rule = |gold: &str, answer: &str| grade(&format!("\\boxed{{{answer}}}"), gold, EVALUATED).rule;
    for (gold, answer) in [
        ("95", "37+58"),
        ("12", r"\gcd(48,36)"),
        ("120", "5!"),
        ("5050", r"\sum_{k=1}^{100} k"),
        ("-2", r"\det\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
        (r"\begin{pmatrix}-2&1\\3/2&-1/2\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}^{-1}"),
        (r"\frac{\sqrt3}{2}", r"\sin 60^\circ"),
        ("3", r"\log_2 8"),
        ("24", r"4 \cdot 6"),
        (r"\frac{8}{21}", r"\frac15 \cdot \frac87 \div \frac{12}{20}"),
        ("6+9i", "6(1+2i)-3i"),
        ("2k+2", "(-k+4)+(-2+3k)"),
        ("(x-3)(x+3)", "x^2-9"),
        (r"11\sqrt2", r"\sqrt{242}"),
        ("0", "a+b=0"),
        ("x^2-4", "(x-2)(x+2)"),
        ("2x(x+1)", "2x^2+2x"),
        ("104", r"(\sqrt{105}-1)(\sqrt{105}+1)"),
        (r"3+4\sqrt2", r"\sqrt{41+24\sqrt2}"),
        (r"5\sqrt{21}", r"\sqrt{15}\cdot\sqrt{35}"),
        ("16", "144/9"),
        ("0.4", r"2.4 \div 6"),
        ("64a^6", "(4a^2)^3"),
        ("1", r"\binom{n}{0}"),
        ("-1", r"e^{i\pi}"),
        ("6", r"36^{10} \div 6^{19}"),
    ] {
        let rule = rule(gold, answer);
        assert!(rule.starts_with("unevaluated: "), "{gold} <- {answer}: {rule}");
        assert_eq!(grade(&format!("\\boxed{{{answer}}}"), gold, ANY).outcome, Outcome::Correct, "{gold} <- {answer}");
    }
    for (gold, answer) in [
        (r"\frac12", r"\frac{2}{4}"),
        ("0.5", r"\frac12"),
        ("1024", "2^{10}"),
        ("300000000", r"3 \times 10^8"),
        (r"2\sqrt{13}", r"\frac{26}{\sqrt{13}}"),
        (r"\frac{3\pi}{4}", r"\frac34\pi"),
        (r"1+\sqrt2", r"\sqrt2+1"),
        ("5!", "5!"),
        (r"\log_2 3", r"\frac{\ln 3}{\ln 2}"),
        ("5", "x = 5"),
        ("5", "2+3=5"),
        (r"\frac{m+n}{2}", r"\frac12(m+n)"),
        ("y = 2x+3", "y-3=2x"),
        (r"\frac73", r"2\frac13"),
        ("y_1 = -2x^2+4x+3", "-2(x-1)^2+5"),
        (r"\sqrt{2+\sqrt{3}}", r"\frac{\sqrt6+\sqrt2}{2}"),
        ("12^{10}", r"2^{20} \cdot 3^{10}"),
    ] {
        let verdict = grade(&format!("\\boxed{{{answer}}}"), gold, EVALUATED);
        assert_eq!(verdict.outcome, Outcome::Correct, "{gold} <- {answer}: {}", verdict.rule);
    }
}

#[test]
fn a_reason_says_how_both_sides_were_read() {
    let rule = |gold: &str, answer: &str| grade(&format!("\\boxed{{{answer}}}"), gold, ANY).rule;
    assert_eq!(rule(r"5\text{ km}", r"5\text{ m}"), "unit: quantity 5 km | quantity 5 m");
    assert_eq!(rule("1:2:3", r"\frac16"), "ratio: ratio 1:2:3 | expression 1/6");
    assert_eq!(rule("-2,1", "-2.1"), "set: list -2, 1 | number -21/10");
    assert_eq!(rule("5", r"\text{never}"), "text: number 5 | words \"never\"");
    assert!(rule("5", "((1").starts_with("unreadable: the answer has "), "{}", rule("5", "((1"));
}
