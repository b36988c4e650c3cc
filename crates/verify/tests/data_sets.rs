//! Measurements over whole data sets: references as their own answers, formulas copied from the question, changed
//! references, and equal pairs in other notations. Each test prints its numbers (`-- --nocapture`) and asserts a bound.

use std::collections::BTreeMap;
use std::path::PathBuf;

use pacs_types::Outcome;
use pacs_verify::{Form, Mode, Rules, check_gold, grade};
use serde_json::Value;

const EVALUATED: Rules = Rules { mode: Mode::Strict, form: Form::Evaluated };
const ANY: Rules = Rules { mode: Mode::Strict, form: Form::Any };

const SETS: &[&str] = &[
    "math500",
    "math_test4500",
    "math_train",
    "aime24",
    "aime25",
    "aime_1983_2023",
    "amc23",
    "amc22_23_83",
    "olympiadbench_en",
    "minerva_math",
    "gsm8k_test",
    "gsm8k_train",
    "deepscaler_sub1209",
];

struct Problem {
    question: String,
    answer: String,
}

fn shared(name: &str) -> Option<String> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared").join(name);
    let text = std::fs::read_to_string(&path).ok();
    if text.is_none() {
        println!("SKIPPED: {} is not there", path.display());
    }
    text
}

fn rows(text: &str) -> impl Iterator<Item = Value> {
    text.lines().map(|line| serde_json::from_str(line).expect("valid JSON"))
}

fn problems(set: &str) -> Option<Vec<Problem>> {
    let text = shared(&format!("data/{set}.jsonl"))?;
    let string = |row: &Value, name: &str| row[name].as_str().expect("a string").to_owned();
    Some(
        rows(&text).map(|row| Problem { question: string(&row, "question"), answer: string(&row, "answer") }).collect(),
    )
}

fn is_correct(answer: &str, gold: &str, rules: Rules) -> bool {
    grade(&format!("Hence \\boxed{{{answer}}}."), gold, rules).outcome == Outcome::Correct
}

#[test]
fn no_reference_is_refused_as_its_own_answer() {
    for set in SETS {
        let Some(problems) = problems(set) else { return };
        let readable: Vec<_> = problems.iter().filter(|problem| check_gold(&problem.answer).is_ok()).collect();
        let refused: Vec<_> = readable.iter().filter(|p| !is_correct(&p.answer, &p.answer, EVALUATED)).collect();
        println!("{set}: {} of {} readable, {} refused", readable.len(), problems.len(), refused.len());
        for problem in &problems {
            if let Err(error) = check_gold(&problem.answer) {
                println!("  {error}");
            }
        }
        for problem in &refused {
            println!(
                "  {} is refused: {}",
                problem.answer,
                grade(&format!("\\boxed{{{}}}", problem.answer), &problem.answer, EVALUATED).rule
            );
        }
        assert!(refused.is_empty(), "{set}: a readable reference must be its own answer");
    }
}

/// `$…$`, `$$…$$`, `\(…\)` and `\[…\]` of a text.
fn formulas(text: &str) -> Vec<&str> {
    const MARKS: [(&str, &str); 4] = [("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")];
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(start) = rest.find(['$', '\\']) {
        rest = &rest[start..];
        let mark = MARKS.iter().find(|(open, _)| rest.starts_with(open));
        let inside = mark.and_then(|(open, close)| rest[open.len()..].split_once(close));
        match inside {
            Some((formula, after)) => {
                found.push(formula.trim());
                rest = after;
            }
            None => rest = rest[1..].trim_start_matches(|c: char| !c.is_ascii()),
        }
    }
    found.retain(|formula| !formula.is_empty());
    found
}

/// Parts of a formula that could be taken for the answer alone: the sides of its relations.
fn is_written_as(formula: &str, answer: &str) -> bool {
    let key = |text: &str| {
        text.replace([' ', '$', '{', '}'], "")
            .replace("^\\mathrmth", "")
            .replace("\\dfrac", "\\frac")
            .replace("\\left", "")
            .replace("\\right", "")
    };
    let answer = key(answer);
    let formula = key(formula);
    formula == answer || formula.rsplit_once('=').is_some_and(|(_, right)| right == answer)
}

#[test]
fn copying_the_question_does_not_pay() {
    for (set, bound) in [("math500", 3), ("math_test4500", 45), ("math_train", 75)] {
        let Some(problems) = problems(set) else { return };
        let mut counts = [0; 4];
        for problem in &problems {
            let formulas = formulas(&problem.question);
            let pays = |formula: &&&str, rules: Rules| is_correct(formula, &problem.answer, rules);
            // A number that the question states is not copied work: `n = 2` where the answer is 2.
            let is_work = |formula: &&&str| !is_written_as(formula, &problem.answer);
            let any = formulas.iter().find(|formula| pays(formula, ANY));
            counts[0] += i32::from(any.is_some());
            counts[1] += i32::from(formulas.iter().filter(is_work).any(|formula| pays(&formula, ANY)));
            counts[2] += i32::from(formulas.iter().any(|formula| pays(&formula, EVALUATED)));
            if let Some(formula) = formulas.iter().find(|formula| !is_work(formula) && pays(formula, EVALUATED)) {
                println!("  {set}: {formula} is the reference {}", problem.answer);
            }
            let copied = formulas.iter().filter(is_work).find(|formula| pays(formula, EVALUATED));
            counts[3] += i32::from(copied.is_some());
            if let Some(formula) = copied {
                println!("  {set}: {formula} pays for {}", problem.answer);
            }
        }
        let all = problems.len();
        println!(
            "{set}: a formula of the question pays on {} of {all} with `any`, {} with `evaluated`",
            counts[0], counts[2]
        );
        println!(
            "{set}: one that is not the reference as written on {} with `any`, {} with `evaluated`",
            counts[1], counts[3]
        );
        assert!(counts[3] <= bound, "{set}: copying pays on {} problems", counts[3]);
    }
}

/// Answers other than the reference: each integer plus one, the sign reversed, members left out.
fn mutations(answer: &str) -> Vec<String> {
    let mut mutated = Vec::new();
    let bytes = answer.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        let digits = bytes[at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        if digits > 0 {
            if digits < 10 && answer != "0" {
                let number: u64 = answer[at..at + digits].parse().expect("digits");
                mutated.push(format!("{}{}{}", &answer[..at], number + 1, &answer[at + digits..]));
            }
            at += digits;
        } else {
            at += 1;
        }
    }
    if !answer.contains(['=', '<', '>', ',', '\\']) && answer != "0" {
        mutated.push(answer.strip_prefix('-').map_or_else(|| format!("-{answer}"), str::to_owned));
    }
    if let Some((first, _)) = answer.rsplit_once(',').filter(|_| !answer.contains(['(', '[', '{'])) {
        mutated.push(first.to_owned());
    }
    mutated
}

#[test]
fn a_changed_reference_is_wrong() {
    let (mut all, mut correct) = (0, 0);
    for set in SETS {
        let Some(problems) = problems(set) else { return };
        for problem in problems.iter().filter(|problem| check_gold(&problem.answer).is_ok()) {
            for mutated in mutations(&problem.answer) {
                all += 1;
                if is_correct(&mutated, &problem.answer, ANY) {
                    correct += 1;
                    println!("  {set}: {mutated} is accepted for {}", problem.answer);
                }
            }
        }
    }
    println!("{correct} of {all} changed references are accepted");
    // Some changes change nothing: 1^7 and 1^8, 0 and -0, a coefficient of zero.
    assert!(correct * 1000 <= all, "{correct} of {all} changed references are accepted");
}

/// The same answer in other notations.
fn rewritten(answer: &str) -> Vec<String> {
    let mut forms = vec![
        answer.replace("\\frac", "\\dfrac"),
        answer.replace('(', "\\left(").replace(')', "\\right)"),
        answer.replace('+', " + ").replace('=', " = ").replace('<', " < "),
        format!("\\displaystyle {answer}"),
        format!("{answer}."),
        format!("${answer}$"),
    ];
    if !answer.contains("\\text") && !answer.contains("\\left") && !answer.contains("\\{") {
        forms.push(answer.replace('{', "{ ").replace('}', " }").replace("{ ,  }", "{,}"));
    }
    // `x = 5` reversed, if there is one sign and no list.
    if let [left, right] = answer.split('=').collect::<Vec<_>>()[..]
        && !answer.contains([',', '&', '\\', '$'])
    {
        forms.push(format!("{right} = {left}"));
    }
    forms.retain(|form| form != answer && !answer.contains("$"));
    forms
}

#[test]
fn a_reference_written_otherwise_is_correct() {
    let (mut all, mut refused) = (0, 0);
    for set in SETS {
        let Some(problems) = problems(set) else { return };
        for problem in problems.iter().filter(|problem| check_gold(&problem.answer).is_ok()) {
            for form in rewritten(&problem.answer) {
                all += 1;
                if !is_correct(&form, &problem.answer, EVALUATED) {
                    refused += 1;
                    println!("  {set}: {form} is refused for {}", problem.answer);
                }
            }
        }
    }
    println!("{refused} of {all} rewritten references are refused");
    assert!(refused * 1000 <= all, "{refused} of {all} rewritten references are refused");
}

/// Letters that stand for variables and nothing else: not part of a word or command, no unit, no constant, no function.
const LETTERS: &str = "abckpqruvwxyzn";

/// Replaces letters by those `by` places further, in runs of at most three letters that are not a word.
fn renamed(text: &str, by: usize) -> String {
    const WORDS: &[&str] = &[
        "and", "or", "sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "abs", "gcd", "lcm", "max", "min",
        "det", "inf", "no", "yes", "pi", "oo", "lg",
    ];
    let letters: Vec<char> = LETTERS.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(next) = rest.chars().next() {
        let is_command = next == '\\';
        let start = usize::from(is_command);
        let length = rest[start..].find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(rest.len() - start);
        if length == 0 {
            let taken = if is_command { 1 } else { next.len_utf8() };
            out.push_str(&rest[..taken]);
            rest = &rest[taken..];
            continue;
        }
        let (run, following) = rest.split_at(start + length);
        let is_variables = !is_command && length <= 3 && !WORDS.contains(&run);
        out.extend(run.chars().map(
            |c| match letters.iter().position(|letter| *letter == c).filter(|_| is_variables) {
                Some(place) => letters[(place + by) % letters.len()],
                None => c,
            },
        ));
        rest = following;
    }
    out
}

#[test]
fn the_names_of_variables_decide_nothing() {
    let (mut all, mut other) = (0, 0);
    let mut by_file: BTreeMap<&str, i32> = BTreeMap::new();
    for file in ["math_equivalence_dev", "math_public_dev"] {
        let Some(text) = shared(&format!("golden/{file}.jsonl")) else { return };
        for row in rows(&text) {
            let string = |name: &str| row[name].as_str().expect("a string");
            let (gold, pred) = (string("gold"), string("pred"));
            // Responses in prose have articles (`a`), and `A x 10` a sign; answers have variables.
            let answer = if row["kind"] == "answer" { format!("\\boxed{{{pred}}}") } else { pred.to_owned() };
            let is_answer = answer.trim_start().starts_with("\\boxed")
                && !gold.contains("text")
                && !answer.contains("text")
                && !answer.contains(" x 10");
            if !is_answer || renamed(gold, 1) == gold {
                continue;
            }
            let label = grade(&answer, gold, ANY).label;
            for by in 1..LETTERS.len() {
                all += 1;
                let verdict = grade(&renamed(&answer, by), &renamed(gold, by), ANY);
                if verdict.label != label {
                    other += 1;
                    *by_file.entry(file).or_default() += 1;
                    println!("  {} with {} for {}: {}", renamed(gold, by), renamed(&answer, by), gold, verdict.rule);
                }
            }
        }
    }
    println!("{other} of {all} renamed pairs have another verdict {by_file:?}");
    assert_eq!(other, 0, "verdicts depend on the names of variables");
}

#[test]
fn identities_hold_whatever_the_letters_are() {
    let letters: Vec<char> = "abcdfghjklmnopqrstuvwxyz".chars().collect();
    let identities = [
        (r"\sqrt[3]{X}", "X^{1/3}", true),
        (r"\sqrt{\frac{X}{Y}}", r"\frac{\sqrt{X}}{\sqrt{Y}}", true),
        (r"\binom{X}{Y}", r"\binom{X}{X-Y}", true),
        (r"\frac{X!}{Y!(X-Y)!}", r"\binom{X}{Y}", true),
        (r"\ln(X Y)", r"\ln X + \ln Y", true),
        (r"(X+Y)^2", "X^2+2X Y+Y^2", true),
        (r"\frac{X}{Y}", r"\frac{Y}{X}", false),
        (r"\sqrt{X^2}", "X", false),
        (r"X Y", "X", false),
        (r"\sqrt{X^2+Y^2}", "X+Y", false),
    ];
    for (gold, answer, expected) in identities {
        for (at, first) in letters.iter().enumerate() {
            for second in [letters[(at + 1) % letters.len()], letters[(at + 7) % letters.len()]] {
                let with = |text: &str| text.replace('X', &format!("{first} ")).replace('Y', &format!("{second} "));
                let (gold, answer) = (with(gold), with(answer));
                assert_eq!(is_correct(&answer, &gold, ANY), expected, "{gold} and {answer}");
            }
        }
    }
}
