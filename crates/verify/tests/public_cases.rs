//! Agreement with public and adversarial cases whose correct verdict is known, each with its reason.

use std::collections::BTreeMap;
use std::path::PathBuf;

use pacs_types::Outcome;
use pacs_verify::{Form, Mode, Rules, grade};
use serde_json::Value;

/// Share of the certain rows that must be graded as expected, with either form. Uncertain rows are conventions and bind
/// nothing; no certain row depends on a convention of ours.
const FLOOR: f64 = 0.97;

#[test]
fn certain_cases_are_graded_as_expected() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/golden/math_public_dev.jsonl");
    let Ok(cases) = std::fs::read_to_string(&path) else {
        println!("SKIPPED: {} is not there", path.display());
        return;
    };
    let cases: Vec<Value> = cases.lines().map(|line| serde_json::from_str(line).expect("valid JSON")).collect();
    let text = |case: &Value, name: &str| case[name].as_str().expect("cases have strings").to_owned();
    let mut tally: BTreeMap<(bool, &str), u32> = BTreeMap::new();
    let mut unevaluated = 0;
    for case in &cases {
        let evaluated = Rules { mode: Mode::Lenient, form: Form::Evaluated };
        let strict = grade(&text(case, "pred"), &text(case, "gold"), evaluated);
        if case["certain"] == true && case["expected"] == true && strict.rule.starts_with("unevaluated") {
            unevaluated += 1;
            println!("with form `evaluated` {} is refused: {}", case["id"], strict.rule);
        }
        let verdict = grade(&text(case, "pred"), &text(case, "gold"), Mode::Lenient);
        let is_certain = case["certain"] == true;
        let expected = case["expected"] == true;
        let kind = match (verdict.outcome == Outcome::Correct, expected) {
            (true, false) => "false positive",
            (false, true) => "false negative",
            _ => "agrees",
        };
        *tally.entry((is_certain, kind)).or_default() += 1;
        if kind == "agrees" {
            continue;
        }
        let pred = text(case, "pred");
        let tail: String = pred.chars().skip(pred.chars().count().saturating_sub(120)).collect();
        let certain = if is_certain { "certain" } else { "convention" };
        println!(
            "{certain} {kind} {} [{}] {:?} <- {tail:?}: {} ({})",
            case["id"],
            text(case, "kind"),
            text(case, "gold").chars().take(120).collect::<String>(),
            verdict.rule,
            text(case, "why"),
        );
    }
    println!("{tally:?}");
    let count = |certain, kind| f64::from(tally.get(&(certain, kind)).copied().unwrap_or_default());
    let (right, kind, strict) = (count(true, "agrees"), count(true, "false positive"), count(true, "false negative"));
    let share = right / (right + kind + strict);
    println!("certain rows: {:.2} %, form `evaluated` refuses {unevaluated} more", share * 100.0);
    assert!(share >= FLOOR, "agreement {share:.4} is below {FLOOR}");
    assert!(kind == 0.0, "{kind} false positives");
    let share = (right - f64::from(unevaluated)) / (right + kind + strict);
    assert!(share >= FLOOR, "with form `evaluated`, agreement {share:.4} is below {FLOOR}");
}
