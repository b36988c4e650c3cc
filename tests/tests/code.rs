//! The verifier of programs, as people use it: `pacs verify code`, `pacs data check`, and a run whose sandboxes are killed.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result};
// The machine may lack any layer; those that it does lack are announced.
use pacs_spec::SANDBOX_LAYERS as MAY_BE_MISSING;
use pacs_tests::program;
use serde_json::{Value, json};

fn pacs(arguments: &[&str], input: &str) -> Result<Output> {
    let mut process = Command::new(program("pacs")?)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut stdin = process.stdin.take().context("piped")?;
    let input = input.to_owned();
    let writing = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
    let output = process.wait_with_output()?;
    let _ = writing.join();
    Ok(output)
}

/// Grades programs on cases, and returns outcomes and rules.
fn grade(rows: &[(Value, String)], options: &[&str]) -> Result<Vec<(String, String)>> {
    let text: String = rows
        .iter()
        .enumerate()
        .map(|(id, (gold, pred))| format!("{}\n", json!({"id": id, "gold": gold, "pred": pred})))
        .collect();
    let missing = MAY_BE_MISSING.iter().flat_map(|&layer| ["--allow-missing", layer]);
    let arguments: Vec<&str> = ["verify", "code", "--input", "-", "--threads", "2"]
        .into_iter()
        .chain(missing)
        .chain(options.iter().copied())
        .collect();
    let output = pacs(&arguments, &text)?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    for line in stderr.lines().filter(|line| line.contains("missing=") && !line.contains("missing=\"\"")) {
        eprintln!("WARNING: layers of the sandbox do not hold on this machine: {line}");
    }
    let lines = std::str::from_utf8(&output.stdout)?.lines();
    let verdicts: Vec<(String, String)> = lines
        .map(|line| {
            let verdict: Value = serde_json::from_str(line)?;
            let text = |key: &str| verdict[key].as_str().unwrap_or_default().to_owned();
            let is_right = text("outcome") == "correct";
            assert_eq!(verdict["label"], if is_right { 1.0 } else { 0.0 }, "{verdict}");
            Ok((text("outcome"), text("rule")))
        })
        .collect::<Result<_>>()?;
    assert_eq!(verdicts.len(), rows.len());
    Ok(verdicts)
}

fn python(program: &str) -> String {
    format!("Here it is.\n```python\n{program}\n```\n")
}

fn sums() -> Value {
    json!([{"input": "1 2\n", "output": "3\n"}, {"input": "10 -4\n", "output": "6\n"}, {"input": "0 0\n", "output": "0\n"}])
}

#[test]
fn every_outcome_of_a_program_has_its_name() -> Result<()> {
    let doubles = json!({"fn_name": "double", "inputs": [[[1, 2]], ["[]"]], "outputs": [[2, 4], []]});
    let asserts = json!(["assert double(2) == 4", "assert double(-1) == -2"]);
    let close =
        json!({"tests": ["assert math.isclose(area(1), 3.14159, rel_tol=1e-3)"], "test_imports": ["import math"]});
    let each = json!([
        "assert all(double(x) == y for x, y in [(1, 2), (3, 6)])",
        "assert sorted(map(double, [2, 1])) == [2, 4]",
        "def opposite(f):\n    return -f(-1)\nassert opposite(double) == 2",
    ]);
    let raises = json!({"tests": [
        "assert [root(x) for x in (1, 4)] == [1, 2]",
        "try:\n    root(-1)\nexcept ValueError:\n    pass\nelse:\n    assert False",
    ]});
    let rows: Vec<(Value, String, &str, &str)> = vec![
        (sums(), python("print(sum(map(int, input().split())))"), "correct", "code: all 3 cases passed"),
        (
            sums(),
            python("a, b = map(int, input().split())\nprint(a * b + 1)"),
            "wrong",
            "code: wrong, case 2 of 3: expected \"6\\n\", got \"-39\\n\"",
        ),
        (sums(), python("print(("), "unparsable", "code: compile error: "),
        (
            sums(),
            python("print(1 / 0)"),
            "wrong",
            "code: runtime error, case 1 of 3: \"ZeroDivisionError: division by zero\"",
        ),
        (sums(), python("while True: pass"), "wrong", "code: timed out, case 1 of 3"),
        (sums(), python("x = bytearray(1 << 40)"), "wrong", "code: out of memory, case 1 of 3"),
        (sums(), python("while True: print('x' * 1000)"), "wrong", "code: too much output, case 1 of 3"),
        (sums(), python("import sys; sys.exit(3)"), "wrong", "code: runtime error, case 1 of 3: \"exit code 3\""),
        (
            sums(),
            python("import os; os.kill(os.getpid(), 11)"),
            "wrong",
            "code: runtime error, case 1 of 3: \"ended by signal 11\"",
        ),
        (sums(), "The answer is 3.".to_owned(), "unparsable", "code: no block of code"),
        (sums(), "```python\nprint(3)".to_owned(), "unparsable", "code: the last block of code has no end"),
        (
            doubles.clone(),
            python("def double(xs): return [2 * x for x in xs]"),
            "wrong",
            "code: wrong, case 2 of 2: expected \"[]\", got ",
        ),
        (
            json!({"fn_name": "double", "inputs": ["[1, 2]"], "outputs": ["[2, 4]"]}),
            python("class Solution:\n    def double(self, xs): return tuple(2 * x for x in xs)"),
            "correct",
            "code: the case passed",
        ),
        (asserts.clone(), python("def double(x): return 2 * x"), "correct", "code: all 2 cases passed"),
        (
            asserts.clone(),
            python("def double(x): return abs(2 * x)"),
            "wrong",
            "code: wrong, case 2 of 2: expected \"-2\", got \"2\"",
        ),
        (
            asserts.clone(),
            python("def triple(x): return 3 * x"),
            "wrong",
            "code: runtime error, case 1 of 2: \"NameError: ",
        ),
        (close.clone(), python("def area(r): return 3.1416 * r * r"), "correct", "code: the case passed"),
        (close, python("def area(r): return 3 * r * r"), "wrong", "code: wrong, case 1 of 1: "),
        (each.clone(), python("def double(x): return 2 * x"), "correct", "code: all 3 cases passed"),
        (
            each.clone(),
            python("def double(x): return 2 * max(x, 2)"),
            "wrong",
            "code: wrong, case 1 of 3: expected \"assert all(",
        ),
        (
            each.clone(),
            python("def double(x): return abs(2 * x)"),
            "wrong",
            "code: wrong, case 3 of 3: expected \"2\", got \"-2\"",
        ),
        (each, python("def triple(x): return 3 * x"), "wrong", "code: runtime error, case 1 of 3: \"NameError: "),
        (
            raises.clone(),
            python("class Bad(ValueError): pass\ndef root(x):\n    if x < 0: raise Bad(x)\n    return x ** 0.5"),
            "correct",
            "code: all 2 cases passed",
        ),
        (raises.clone(), python("def root(x): return abs(x) ** 0.5"), "wrong", "code: wrong, case 2 of 2: expected "),
        (
            raises,
            python("import math\ndef root(x): return math.sqrt(str(x))"),
            "wrong",
            "code: runtime error, case 1 of 2: \"TypeError: ",
        ),
    ];
    let given: Vec<_> = rows.iter().map(|(gold, pred, ..)| (gold.clone(), pred.clone())).collect();
    let verdicts = grade(&given, &["--case-seconds", "2"])?;
    for ((_, pred, outcome, rule), (found, said)) in rows.iter().zip(&verdicts) {
        assert_eq!(found, outcome, "{pred}: {said}");
        assert!(said.starts_with(rule), "{pred}: {said}, expected {rule}");
    }
    let counted = grade(&given[1..2], &["--count"])?;
    assert!(counted[0].1.starts_with("code: wrong, case 2 of 3; 1 passed"), "{counted:?}");
    Ok(())
}

/// Programs that want to be taken for right without being so. None of them knows what is expected.
#[test]
fn no_trick_earns_a_reward() -> Result<()> {
    let asserts = json!(["assert double(2) == 4", "assert double(5) == 10"]);
    let replayed = json!([
        "assert all(double(x) == y for x, y in [(2, 4), (5, 10)])",
        "assert list(map(double, [7])) == [14] and max([1, 2], key=double) == 2",
    ]);
    let raising = json!(["with pytest.raises(ValueError):\n    double('x')", "assert double(2) == 4"]);
    let equal = "class Equal:\n    def __eq__(self, other): return True\n    def __hash__(self): return 0\n    __ne__ = lambda s, o: False\n    def __repr__(self): return '4'\n";
    let rows: Vec<(Value, String)> = [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "quit()",
        "def double(x): raise SystemExit(0)",
        "import os\ndef double(x): os._exit(0)",
        &format!("{equal}def double(x): return Equal()"),
        &format!("{equal}class Int(int):\n    __eq__ = Equal.__eq__\ndef double(x): return Int(7)"),
        "class Text(str):\n    def __eq__(self, other): return True\ndef double(x): return Text('4')",
        "import builtins\nbuiltins.repr = lambda x: '4'\ndef double(x): return x",
        "import json\njson.dumps = lambda *a, **k: '{\"kind\": \"value\", \"text\": 4}'\ndef double(x): return x",
        "import os\nfor _ in range(3): os.write(3, b'{\"kind\": \"value\", \"text\": 4}\\n')\ndef double(x): os._exit(0)",
        "import os\nos.write(3, b'{\"kind\": \"fault\", \"text\": \"try again\"}\\n')\nos._exit(97)",
        "import os\nos.write(1, b'{\"bye\": true}')\nos.closerange(0, 64)\nos._exit(0)",
        "import sys\nsys.modules['__main__'].__dict__.clear()\n",
        "import gc\ndef double(x):\n    for o in gc.get_objects():\n        if isinstance(o, dict) and 'expected' in o: return o['expected']\n",
        "import sys\ndef double(x):\n    f = sys._getframe()\n    while f:\n        for v in f.f_locals.values():\n            if isinstance(v, str) and '==' in v: return eval(v.split('==')[1])\n        f = f.f_back\n",
        "import inspect\ndef double(x):\n    return [f.frame.f_locals for f in inspect.stack() if 'case' in f.frame.f_locals][0]['case']",
        "import sys\ndef double(x): return sys.argv, sys.stdin.read()",
        "def double(x): return double",
        "double = lambda *a: NotImplemented",
        "import atexit, os\natexit.register(os._exit, 0)\ndef double(x): return 0",
        "import sys\nsys.settrace(lambda *a: None)\nsys.setrecursionlimit(50)\ndef double(x): return double(x)",
        "import ctypes\nctypes.pythonapi.Py_Exit(0)",
        "import signal, os\nsignal.signal(signal.SIGTERM, lambda *a: os._exit(0))\ndef double(x): os.kill(1, 15); return None",
        // Those of calls that are answered one by one.
        &format!("{equal}    __lt__ = __gt__ = __call__ = __bool__ = lambda *a: True\ndef double(x): return Equal()"),
        &format!("{equal}class Function(Equal):\n    _text = 'double'\n    __call__ = lambda *a: Equal()\ndouble = Function()"),
        "class Text(str):\n    startswith = __contains__ = lambda *a: True\ndef double(x): return [Text('4')] * x",
        "def double(x): raise StopIteration",
        "def double(x): raise AssertionError(x)",
        "def double(x): raise KeyboardInterrupt",
        "raise ValueError('double')",
        "class E(BaseException):\n    args = property(lambda e: 1 / 0)\n    def __str__(e): raise e\ndef double(x): raise E()",
        "class M(type):\n    __mro__ = __name__ = property(lambda c: 1 / 0)\nclass E(Exception, metaclass=M): pass\ndef double(x): raise E()",
        "import os\ndef double(x):\n    os.write(3, b'{\"kind\": \"value\", \"text\": {\"other\": \"function\"}}\\n')\n    os._exit(0)",
        "import os\ndef double(x):\n    os.write(3, b'{\"kind\": \"raised\", \"text\": {\"classes\": [\"StopIteration\"], \"arguments\": [], \"text\": 4}}\\n')\n    os._exit(1)",
        "import os\ndef double(x):\n    os.write(3, b'{\"kind\": \"value\", \"text\": ' + b'[' * 9000 + b']' * 9000 + b'}\\n')\n    os._exit(0)",
        "def double(x): return 1 << 10 ** 8",
        "def double(x): return [0] * 200_000",
        "import pickle, copyreg\npickle.loads = copyreg.pickle = lambda *a: 4\nclass P:\n    def __reduce__(self): return (int, ('4',))\ndef double(x): return P()",
        "import os\ndef double(x):\n    if os.path.exists('/tmp/asked'): return 2 * x\n    open('/tmp/asked', 'w')",
    ]
    .iter()
    .flat_map(|program| [&asserts, &replayed, &raising].map(|gold| (gold.clone(), python(program))))
    .chain(
        [
            "print('passed')",
            "import sys; sys.stdout = None",
            "print('3\\n6\\n0')",
            "import os; os.close(1)",
            "import os\nfor f in range(64):\n    try: os.write(f, b'3\\n')\n    except OSError: pass",
            "import os\nfor f in list(range(3, 64)):\n    try: print(os.read(f, 4096).decode())\n    except OSError: pass",
            "print(open('/proc/self/cmdline').read())",
            "import os, glob\nfor p in glob.glob('/tmp/**', recursive=True) + glob.glob('/dev/shm/*'):\n    if os.path.isfile(p): print(open(p).read())",
        ]
        .iter()
        .map(|program| (sums(), python(program))),
    )
    .collect();
    let verdicts = grade(&rows, &["--case-seconds", "3"])?;
    for ((_, program), (outcome, rule)) in rows.iter().zip(&verdicts) {
        assert!(["wrong", "unparsable"].contains(&outcome.as_str()), "{program}: {outcome}, {rule}");
    }
    Ok(())
}

#[test]
fn an_invalid_reference_is_a_failure_of_the_verifier() -> Result<()> {
    let missing = MAY_BE_MISSING.iter().flat_map(|&layer| ["--allow-missing", layer]);
    let arguments: Vec<&str> = ["verify", "code", "--input", "-"].into_iter().chain(missing).collect();
    let rows = [
        json!({"gold": "5", "pred": python("print(5)")}),
        json!({"gold": ["assert all(f(x) for x in [object()])", "assert f(1)"], "pred": python("def f(x): return x")}),
        json!({"gold": ["s = Stack()\ns.push(1)\nassert s.top() == 1"], "pred": python("class Stack: pass")}),
        json!({"gold": ["assert 1 == 1", "assert f(1)"], "pred": python("def f(x): return x")}),
    ];
    let output = pacs(&arguments, &rows.map(|row| row.to_string() + "\n").concat())?;
    let lines: Vec<Value> =
        std::str::from_utf8(&output.stdout)?.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    for (verdict, expected) in lines.iter().zip([
        "the reference: the cases are no list",
        "the reference: assertion 1: it sends an object of the class `object` to the program",
        "the reference: assertion 1: it uses `.push` of an object of the program",
        "the reference: assertion 1: it does not call the program",
    ]) {
        assert_eq!((&verdict["outcome"], &verdict["label"]), (&json!("failed"), &Value::Null), "{verdict}");
        assert!(verdict["rule"].as_str().is_some_and(|rule| rule.contains(expected)), "{verdict}");
    }
    assert_eq!(lines.len(), 4);
    Ok(())
}

#[test]
fn reference_solutions_are_run_by_data_check() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("rows.jsonl");
    let row = |question: &str, solution: &str| {
        json!({"question": question, "answer": {"cases": sums(), "solution": solution}}).to_string() + "\n"
    };
    let right = row("add two numbers", "print(sum(map(int, input().split())))");
    std::fs::write(&path, format!("{right}{}", row("add them", "print(3)")))?;
    let missing = MAY_BE_MISSING.iter().flat_map(|&layer| ["--allow-missing", layer]);
    let target = path.to_str().context("a path of text")?;
    let arguments: Vec<&str> = ["data", "check", target, "--code", "--json"].into_iter().chain(missing).collect();
    let output = pacs(&arguments, "")?;
    assert_ne!(output.status.code(), Some(0));
    let found: Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!((&found["train"]["rows"], &found["train"]["solutions"]), (&json!(2), &json!(2)), "{found}");
    let failing = &found["train"]["failing_solutions"];
    assert_eq!(failing["count"], 1);
    assert!(
        failing["first"][0].as_str().is_some_and(|first| first.contains("rows.jsonl:2: code: wrong, case 2 of 3")),
        "{failing}"
    );
    assert_eq!(found["problems"], json!(["1 row whose reference solution fails in data.train"]));

    // The built-in problems are right, every one of them.
    let job = folder.path().join("job.toml");
    std::fs::write(
        &job,
        format!(
            "name = 'programs'\nmodel.path = 'absent'\n[data.train.generator]\ntask = 'programs'\nproblems = 150\nlength = 4\n\
             [data.evaluation.generator]\ntask = 'programs'\nproblems = 150\nlength = 4\nheld_out = 200\npart = 'held_out'\n\
             [verifier]\nkind = 'code'\ncode.allow_missing = {MAY_BE_MISSING:?}\n"
        ),
    )?;
    let output = pacs(&["data", "check", job.to_str().context("a path of text")?], "")?;
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("150 of 150 reference solutions pass their own cases"), "{text}");
    assert!(text.contains("200 of 200 reference solutions pass their own cases"), "{text}");
    Ok(())
}

#[test]
fn the_doctor_says_which_layers_hold() -> Result<()> {
    let output = pacs(&["doctor", "--json"], "")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let found: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    let findings = found.as_array().or_else(|| found["findings"].as_array()).context("a list of findings")?;
    let sandbox = findings.iter().find(|finding| finding["check"] == "sandbox").context("a finding of the sandbox")?;
    let said = sandbox["found"].as_str().context("a text")?;
    assert!(said.contains("all layers hold") || said.contains("is missing"), "{said}");
    Ok(())
}
