//! The referee by itself, without a sandbox around it.

use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::json;

use super::*;

/// What the referee answers to one entry.
fn referee(setup: &str, entry: &Value) -> Value {
    let mut process = Command::new("python3")
        .args(["-I", "-S", "-c", REFEREE])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3 starts");
    let order = json!({"setup": setup, "replay": REPLAY, "assertions": [entry]}).to_string();
    process.stdin.take().expect("piped").write_all(order.as_bytes()).expect("the referee reads");
    let output = process.wait_with_output().expect("the referee ends");
    assert!(output.status.success(), "{entry}");
    let mut answers: Vec<Value> = serde_json::from_slice(&output.stdout).expect("JSON");
    answers.pop().expect("an answer")
}

/// The first calls of a test that is replayed.
fn asked(setup: &str, text: &str) -> Value {
    let answer = referee(setup, &json!({"text": text}));
    answer.get("pending").cloned().unwrap_or_else(|| panic!("{text}: {answer}"))
}

#[test]
fn calls_leave_with_their_arguments_and_nothing_else() {
    for (text, calls) in [
        ("assert all(f(x) == y for x, y in [(1, 2), (3, 4)])", json!(["f(1)", "f(3)"])),
        ("assert not any(f(x) == 9 for x in [1, 2])", json!(["f(1)", "f(2)"])),
        ("assert all(math.isclose(f(x), 2.5) for x in [1, 2])", json!(["f(1)", "f(2)"])),
        // Of a case only what is passed.
        ("assert [f(c['in']) for c in [{'in': 2, 'out': 'secret'}]] == ['secret']", json!(["f(2)"])),
        ("assert all(f(*c[:-1], k=c[0]) == c[-1] for c in [(1, 2, 3)])", json!(["f(*(1, 2,), k=1)"])),
        ("assert all(f(sorted(c, key=lambda i: -i)) == c for c in [[1, 2]])", json!(["f([2, 1])"])),
        // The program's functions within arguments stay calls; a lambda leaves as text.
        ("assert all(f(g(x)) == x for x in [1])", json!(["f(g(1))"])),
        ("assert all(f(lambda y: y + c[0]) for c in [[1, 'secret']])", json!(["f(lambda y: y + 1)"])),
        // Functions that are passed on are looked up, and called with values.
        ("assert sorted(map(f, [3, 1])) == [1, 3]", json!(["f", "f(3)", "f(1)"])),
        ("assert sorted('ba', key=f) == ['a', 'b']", json!(["f", "f('b')", "f('a')"])),
        (
            "def check(candidate):\n    assert candidate(n=3) == 'secret'\ncheck(Solution().run)",
            json!(["Solution().run", "Solution().run(n=3)"]),
        ),
        ("try:\n    f(-1)\n    assert False\nexcept ValueError:\n    pass", json!(["f(-1)"])),
        ("with pytest.raises(ValueError):\n    f(-1)", json!(["f(-1)"])),
        ("xs = [(1, 'secret')]\nfor x, y in xs:\n    assert f(x) == y", json!(["f(1)"])),
        // Values arrive as what they are.
        (
            "assert all(f(x) for x in [1.5, -0.0, float('inf'), None, b'a', (), {1}, set(), {'a': (1,)}, 1 << 1100])",
            json!([
                "f(1.5)",
                "f(-0.0)",
                "f(1e999)",
                "f(None)",
                "f(b'a')",
                "f(())",
                "f({1})",
                "f({*()})",
                "f({'a': (1,)})",
                format!("f(0x{:x}{})", 1, "0".repeat(275)),
            ]),
        ),
    ] {
        assert_eq!(asked("", text), calls, "{text}");
    }
    let helper = "def check(cases):\n    return all(f(x) == y for x, y in cases)\n";
    assert_eq!(asked(helper, "assert check([(1, 'secret')])"), json!(["f(1)"]));
}

#[test]
fn what_plain_data_cannot_carry_is_refused() {
    for (text, expected) in [
        ("assert all(f(x) for x in range(1000))", "it makes more than 256 calls"),
        ("assert all(f('x' * 10000 * x) for x in range(100))", "its calls have more than 524288 bytes"),
        ("assert all(f(x) for x in [object()])", "it sends an object of the class `object` to the program"),
        ("assert all(f(lambda y: c[y]) for c in [[1]])", "`c[y]` is to be evaluated by the program"),
        ("s = Stack()\ns.push(1)\nassert s.pop() == 1", "it uses `.push` of an object of the program"),
        ("xs = [2, 1]\nf(xs)\nassert xs == [1, 2]", "the program has a copy"),
        ("while f(1) != 3:\n    pass\nassert True", "it makes more than 256 calls"),
        ("class A(B): pass\nassert f(1)", "it derives a class from one of the program"),
        ("import absent\nassert f(1)", "it does not call the program: ModuleNotFoundError"),
        ("x = f(1)", "it asserts nothing"),
        ("assert all([True])", "it does not call the program"),
    ] {
        let answer = referee("", &json!({"text": text}));
        assert!(answer["unsupported"].as_str().is_some_and(|why| why.contains(expected)), "{text}: {answer}");
    }
}

/// The answer to a test whose calls were answered by these.
fn judged(text: &str, answers: &Value) -> Value {
    referee("", &json!({"text": text, "answers": answers}))
}

#[test]
fn answers_decide_a_test() {
    let each = "assert [f(x) for x in (1, 2)] == [{1: (2,)}, float('inf')]";
    let right = json!([{"call": "f(1)", "value": {"dict": [[1, {"tuple": [2]}]]}}, {"call": "f(2)", "value": {"float": "inf"}}]);
    assert_eq!(judged(each, &right)["passed"], true);
    let wrong = json!([{"call": "f(1)", "value": 1}, {"call": "f(2)", "value": 2}]);
    assert_eq!(judged(each, &wrong), json!({"passed": false, "got": "[1, 2]", "expected": "[{1: (2,)}, inf]"}));
    // The second call is not known yet, and what the first one returned is the argument of the third.
    let reduced = "assert functools.reduce(add, [1, 2, 3]) == 6";
    let known = json!([{"call": "add", "value": {"other": "function"}}, {"call": "add(1, 2)", "value": 3}]);
    assert_eq!(judged(reduced, &known), json!({"pending": ["add(3, 3)"]}));
    // An exception that the test expects, and the same one where it does not.
    let raised = json!([{
        "call": "f(0)",
        "raised": {"classes": ["Odd", "ValueError", "Exception", "object"], "arguments": ["odd"], "text": "odd"},
    }]);
    let expecting = "with pytest.raises(ValueError, match='od'):\n    f(0)";
    assert_eq!(judged(expecting, &raised)["passed"], true);
    assert_eq!(judged("try:\n    f(0)\nexcept Odd as e:\n    assert str(e) == 'odd'", &raised)["passed"], true);
    assert_eq!(judged("assert all(f(x) for x in [0])", &raised), json!({"ended": 0}));
    assert_eq!(judged("with pytest.raises(TypeError):\n    f(0)", &raised), json!({"ended": 0}));
}

#[test]
fn no_answer_is_taken_for_more_than_data() {
    let all = "assert all(f(x) == 1 for x in [0])";
    let one = |said: Value| {
        let mut answer = json!({"call": "f(0)"});
        answer.as_object_mut().expect("an object").extend(said.as_object().expect("an object").clone());
        json!([answer])
    };
    for said in [
        json!({"value": {"other": "Equal"}}),
        json!({"value": [{"other": "Equal"}]}),
        json!({"value": {"unknown": 1}}),
        json!({"value": {"int": "not one"}}),
        json!({"value": {"int": "9".repeat(100_000)}}),
        json!({"value": {"set": [[1]]}}),
        json!({"value": {"tuple": 3}}),
        json!({"value": {"dict": [], "list": []}}),
        json!({"raised": 5}),
        json!({"raised": {"classes": [], "arguments": 3, "text": null}}),
        json!({"raised": {"classes": ["Stop", "Unsupported", "object"], "arguments": [], "text": ""}}),
        json!({"raised": {"classes": ["SystemExit", "BaseException"], "arguments": [0], "text": ""}}),
        json!({"ended": true}),
    ] {
        for text in [all, "assert list(map(f, [0])) == [1]", "assert max([0], key=f) == 1"] {
            let mut answers = one(said.clone());
            answers.as_array_mut().expect("a list").push(json!({"call": "f", "value": {"other": "function"}}));
            let answer = judged(text, &answers);
            assert!(answer["passed"] == false || answer.get("ended").is_some(), "{text}, {said}: {answer}");
        }
    }
    // It ends an iteration where it is raised, and `all` of no items holds.
    let stop = json!({"raised": {"classes": ["StopIteration", "Exception"], "arguments": [], "text": ""}});
    let mut answers = one(stop);
    answers.as_array_mut().expect("a list").push(json!({"call": "f", "value": {"other": "function"}}));
    assert_eq!(judged("assert all(map(f, [0]))", &answers), json!({"ended": 0}));
    // A test that catches everything does not catch a call that never returned.
    let ended = json!([{"call": "f(0)", "ended": true}]);
    assert_eq!(judged("try:\n    f(0)\n    assert False\nexcept:\n    pass", &ended), json!({"ended": 0}));
    // Calls that depend on what the program returned are bounded.
    let many = "assert [g(0) for i in range(f(0))] == []";
    let mut flood = vec![json!({"call": "f(0)", "value": {"int": "0xfffffffffffff"}})];
    assert_eq!(judged(many, &json!(flood))["pending"].as_array().map(Vec::len), Some(255));
    flood.resize(400, json!({"call": "g(0)", "value": 0}));
    assert_eq!(judged(many, &json!(flood)), json!({"unsupported": "it makes more than 256 calls"}));
}
