//! Agreement with an established verifier on the shared equivalence cases.

use std::path::PathBuf;

use pacs_types::{Outcome, Verdict};
use pacs_verify::{Mode, check_gold, grade};
use serde_json::Value;

/// Share of the binding cases that must be graded as expected.
const FLOOR: f64 = 0.995;

fn shared(name: &str) -> Option<String> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared").join(name);
    let text = std::fs::read_to_string(&path).ok();
    if text.is_none() {
        println!("SKIPPED: {} is not there", path.display());
    }
    text
}

fn graded(case: &Value) -> Verdict {
    let text = |name: &str| case[name].as_str().expect("cases have strings");
    let (gold, pred) = (text("gold"), text("pred"));
    // A bare answer is graded like a response that consists of it alone.
    if text("kind") == "answer" {
        return grade(&format!("\\boxed{{{pred}}}"), gold, Mode::Lenient);
    }
    grade(pred, gold, Mode::Lenient)
}

#[test]
fn agrees_with_the_binding_cases() {
    let Some(cases) = shared("golden/math_equivalence_dev.jsonl") else { return };
    let cases: Vec<Value> = cases.lines().map(|line| serde_json::from_str(line).expect("valid JSON")).collect();
    let binding: Vec<&Value> = cases.iter().filter(|case| case["expected"] == case["math_verify"]).collect();
    let (mut agreeing, mut too_kind, mut too_strict) = (0, 0, 0);
    for case in &binding {
        let verdict = graded(case);
        let correct = verdict.outcome == Outcome::Correct;
        if correct == case["expected"] {
            agreeing += 1;
            continue;
        }
        if correct {
            too_kind += 1
        } else {
            too_strict += 1
        }
        let pred = case["pred"].as_str().expect("cases have strings");
        let tail: String = pred.chars().skip(pred.chars().count().saturating_sub(120)).collect();
        println!("{} gold {} found {:?} ({}) in {tail:?}", case["id"], case["gold"], verdict.extracted, verdict.rule);
    }
    let share = f64::from(agreeing) / binding.len() as f64;
    println!(
        "agreement {agreeing} of {} ({:.1} %), too kind {too_kind}, too strict {too_strict}",
        binding.len(),
        share * 100.0
    );
    assert!(share >= FLOOR, "agreement {share:.3} is below {FLOOR}");
}

#[test]
fn reads_the_reference_answers_of_the_data_sets() {
    for (name, floor) in [
        ("gsm8k_test", 1.0),
        ("math500", 0.98),
        ("math_test4500", 0.98),
        ("aime24", 1.0),
        ("olympiadbench_en", 0.9),
        ("deepscaler_sub1209", 0.97),
        ("minerva_math", 0.9),
    ] {
        let Some(rows) = shared(&format!("data/{name}.jsonl")) else { return };
        let (mut readable, mut equal, mut all) = (0, 0, 0);
        for row in rows.lines() {
            let row: Value = serde_json::from_str(row).expect("valid JSON");
            let answer = row["answer"].as_str().expect("answers are strings");
            all += 1;
            match check_gold(answer) {
                Ok(()) => readable += 1,
                Err(error) => println!("{name}: {error}"),
            }
            let verdict = grade(&format!("So \\boxed{{{answer}}}."), answer, Mode::Strict);
            equal += i32::from(verdict.outcome == Outcome::Correct);
        }
        println!("{name}: {readable} of {all} readable, {equal} equal to themselves");
        assert!(f64::from(readable) >= floor * f64::from(all), "{name}: {readable} of {all}");
        assert_eq!(equal, readable, "{name}: a readable answer must equal itself");
    }
}
