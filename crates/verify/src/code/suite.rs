//! The cases of a problem, in the shapes that data sets have.

use serde_json::{Map, Value};

/// Longest text of a reference that is read, in bytes.
const MOST_BYTES: usize = 16 << 20;

/// Digits of the longest integer that both sides hold exactly.
const MOST_DIGITS: usize = 18;

/// What a program is run on, and what is expected of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Suite {
    /// What stands before the program: imports and classes that the assertions use. Never what is expected.
    pub setup: String,
    /// The cases, at least one.
    pub cases: Vec<SuiteCase>,
    /// A program that is right, where the reference has one.
    pub solution: Option<String>,
}

/// A case of a suite: what the program gets, and what it is compared with.
#[derive(Clone, Debug, PartialEq)]
pub enum SuiteCase {
    /// A whole program.
    Stdin {
        /// What it reads.
        input: String,
        /// What it is to write.
        output: String,
    },
    /// A function of the program, or a method of its class `Solution`.
    Function {
        /// Name of the function to call.
        name: String,
        /// Values of its arguments.
        arguments: Vec<Value>,
        /// What it is to return.
        expected: Value,
    },
    /// An assertion of Python about functions of the program, or several statements that assert something.
    Assert(String),
}

/// Says whether a reference names cases.
///
/// # Errors
/// What is wrong with it.
pub fn check_suite(text: &str) -> Result<(), String> {
    Suite::parse(text).map(drop)
}

impl Suite {
    /// Reads the cases of a reference. Its shapes are in `docs/VERIFIERS.md`: a list of cases or of assertions, or an object with
    /// `cases`, with `inputs` and `outputs`, or with `tests`.
    ///
    /// ```
    /// use pacs_verify::{Suite, SuiteCase};
    ///
    /// let suite = Suite::parse(r#"{"test_list": ["assert f(1) == 2"], "test_imports": ["import math"]}"#)?;
    /// assert_eq!(suite.setup, "import math\n");
    /// assert_eq!(suite.cases, [SuiteCase::Assert("assert f(1) == 2".to_owned())]);
    /// # Ok::<(), String>(())
    /// ```
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.len() > MOST_BYTES {
            return Err(format!("the cases have {} bytes, expected at most {MOST_BYTES}", text.len()));
        }
        let value: Value = serde_json::from_str(text).map_err(|error| {
            format!("the reference is not JSON with cases ({error}); expected a list of cases or assertions, or an object with them")
        })?;
        let none = Map::new();
        let (fields, list) = match &value {
            Value::Object(fields) => (fields, fields.get("cases").or_else(|| tests_of(fields))),
            list => (&none, Some(list)),
        };
        let function = ["function", "fn_name", "func_name"].into_iter().find_map(|key| fields.get(key)?.as_str());
        let cases = match list {
            Some(list) => cases(list, function)?,
            None => pairs(fields, function)?,
        };
        if cases.is_empty() {
            return Err("there is no case".to_owned());
        }
        Ok(Self { setup: setup(fields)?, cases, solution: solution(fields) })
    }
}

fn tests_of(fields: &Map<String, Value>) -> Option<&Value> {
    ["tests", "test_list"].into_iter().find_map(|key| fields.get(key))
}

fn setup(fields: &Map<String, Value>) -> Result<String, String> {
    let mut setup = String::new();
    for key in ["setup", "test_imports", "test_setup_code"] {
        let lines: Vec<&str> = match fields.get(key) {
            None | Some(Value::Null) => continue,
            Some(Value::String(text)) => vec![text],
            Some(Value::Array(lines)) => lines.iter().filter_map(Value::as_str).collect(),
            Some(_) => return Err(format!("`{key}` is no text")),
        };
        for line in lines.into_iter().filter(|line| !line.trim().is_empty()) {
            setup.push_str(line);
            setup.push('\n');
        }
    }
    Ok(setup)
}

fn solution(fields: &Map<String, Value>) -> Option<String> {
    ["solution", "code"].into_iter().find_map(|key| fields.get(key)?.as_str().map(str::to_owned))
}

fn cases(list: &Value, function: Option<&str>) -> Result<Vec<SuiteCase>, String> {
    // Data sets have lists as texts of JSON, too.
    if let Value::String(text) = list {
        let within: Value =
            serde_json::from_str(text).map_err(|error| format!("the list of cases is no JSON: {error}"))?;
        return if within.is_string() {
            Err("the cases are a text, expected a list".to_owned())
        } else {
            cases(&within, function)
        };
    }
    let list = list.as_array().ok_or("the cases are no list")?;
    let numbered = |(number, case)| one(case, function).map_err(|problem| format!("case {}: {problem}", number + 1));
    list.iter().enumerate().map(numbered).collect()
}

fn one(case: &Value, function: Option<&str>) -> Result<SuiteCase, String> {
    let fields = match case {
        Value::String(text) if text.contains("assert") || text.contains("raises(") => {
            return Ok(SuiteCase::Assert(statements(text)));
        }
        Value::String(_) => return Err("is a text that is no assertion".to_owned()),
        Value::Object(fields) => fields,
        _ => return Err("is neither an assertion nor an object".to_owned()),
    };
    let field = |key: &str| fields.get(key).ok_or_else(|| format!("has no `{key}`"));
    let function = fields.get("fn_name").or_else(|| fields.get("function")).and_then(Value::as_str).or(function);
    let is_call = match fields.get("testtype").or_else(|| fields.get("type")).and_then(Value::as_str) {
        Some("functional" | "function_call") => true,
        Some("stdin" | "stdin_stdout") => false,
        Some(other) => return Err(format!("has the type `{other}`, expected `stdin` or `functional`")),
        None => function.is_some(),
    };
    pair(field("input")?, field("output")?, function.filter(|_| is_call), is_call)
}

/// A test without blank lines around it; the first of several lines keeps its indentation, which the others are relative to.
fn statements(text: &str) -> String {
    let text = text.trim_end().trim_start_matches(['\n', '\r']);
    if text.contains('\n') { text.to_owned() } else { text.trim_start().to_owned() }
}

fn pairs(fields: &Map<String, Value>, function: Option<&str>) -> Result<Vec<SuiteCase>, String> {
    let list = |key: &str| {
        let found = fields.get(key).ok_or("has neither `cases`, nor `tests`, nor `inputs` and `outputs`")?;
        found.as_array().ok_or("`inputs` and `outputs` are no lists")
    };
    let inputs = list("inputs")?;
    let outputs = list("outputs")?;
    if inputs.len() != outputs.len() {
        return Err(format!("has {} inputs and {} outputs", inputs.len(), outputs.len()));
    }
    let numbered = |(number, (input, output))| {
        // Some sets have each value of a function in a list of its own.
        pair(input, output, function, function.is_some()).map_err(|problem| format!("case {}: {problem}", number + 1))
    };
    inputs.iter().zip(outputs).enumerate().map(numbered).collect()
}

fn pair(input: &Value, output: &Value, function: Option<&str>, is_call: bool) -> Result<SuiteCase, String> {
    if !is_call {
        return Ok(SuiteCase::Stdin { input: lines(input)?, output: lines(output)? });
    }
    let name = function.ok_or("calls a function, and nothing names it (`function`)")?.to_owned();
    let arguments = match input {
        Value::Array(values) => values.clone(),
        // One argument a line.
        Value::String(text) => {
            text.lines().filter(|line| !line.trim().is_empty()).map(exact).collect::<Result<Vec<_>, _>>()?
        }
        _ => return Err("the input of a function is neither a list nor a text".to_owned()),
    };
    let expected = match output {
        Value::String(text) => exact(text)?,
        other => other.clone(),
    };
    Ok(SuiteCase::Function { name, arguments, expected })
}

/// A text, or its lines.
fn lines(value: &Value) -> Result<String, String> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Array(lines) => {
            let lines: Option<Vec<&str>> = lines.iter().map(Value::as_str).collect();
            lines.map(|lines| lines.join("\n")).ok_or_else(|| "an input or output is no text".to_owned())
        }
        _ => Err("an input or output is no text".to_owned()),
    }
}

/// A value of JSON whose integers are not rounded.
fn exact(text: &str) -> Result<Value, String> {
    let long = text
        .split(|c: char| !(c.is_ascii_digit() || c == '.'))
        .any(|digits| digits.len() > MOST_DIGITS && !digits.contains('.'));
    if long && !text.contains('"') {
        return Err(format!("an integer has more than {MOST_DIGITS} digits"));
    }
    serde_json::from_str(text)
        .map_err(|error| format!("`{}` is no value of JSON: {error}", text.chars().take(40).collect::<String>()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn stdin(input: &str, output: &str) -> SuiteCase {
        SuiteCase::Stdin { input: input.into(), output: output.into() }
    }

    #[test]
    fn the_shapes_of_data_sets_are_read() {
        let call = |arguments: Value, expected: Value| SuiteCase::Function {
            name: "f".into(),
            arguments: arguments.as_array().unwrap().clone(),
            expected,
        };
        let assertion = SuiteCase::Assert("assert f(1) == 2".into());
        for (text, expected) in [
            (r#"[{"input": "1\n", "output": "2"}]"#, vec![stdin("1\n", "2")]),
            (r#"[{"input": "1", "output": "2", "testtype": "stdin"}]"#, vec![stdin("1", "2")]),
            (r#"{"cases": "[{\"input\": \"1\", \"output\": \"2\"}]"}"#, vec![stdin("1", "2")]),
            (
                r#"{"func_name": "f", "cases": [{"input": "[1]\n\"a\"", "output": "[2]", "testtype": "functional"}]}"#,
                vec![call(json!([[1], "a"]), json!([2]))],
            ),
            (r#"{"inputs": ["1", ["2", "3"]], "outputs": ["a", "b"]}"#, vec![stdin("1", "a"), stdin("2\n3", "b")]),
            (r#"{"fn_name": "f", "inputs": [[1, 2]], "outputs": [3]}"#, vec![call(json!([1, 2]), json!(3))]),
            (r#"["assert f(1) == 2"]"#, vec![assertion.clone()]),
            (r#"["\n assert f(1) == 2 "]"#, vec![assertion.clone()]),
            (
                r#"["\n  x = f(1)\n  assert x == 2\n", "with pytest.raises(ValueError):\n  f(0)"]"#,
                vec![
                    SuiteCase::Assert("  x = f(1)\n  assert x == 2".into()),
                    SuiteCase::Assert("with pytest.raises(ValueError):\n  f(0)".into()),
                ],
            ),
            (r#"{"test_list": ["assert f(1) == 2"], "test_setup_code": ""}"#, vec![assertion]),
        ] {
            assert_eq!(Suite::parse(text).map(|suite| suite.cases), Ok(expected), "{text}");
        }
        let suite =
            Suite::parse(r#"{"tests": ["assert f()"], "test_imports": ["import math"], "code": "def f(): return 1"}"#)
                .unwrap();
        assert_eq!((suite.setup.as_str(), suite.solution.as_deref()), ("import math\n", Some("def f(): return 1")));
    }

    #[test]
    fn what_is_no_suite_says_why() {
        for (text, expected) in [
            ("5", "the cases are no list"),
            ("[]", "there is no case"),
            ("x", "the reference is not JSON with cases"),
            ("{}", "has neither `cases`, nor `tests`, nor `inputs` and `outputs`"),
            (r#"["f(1)"]"#, "case 1: is a text that is no assertion"),
            (r#"[{"input": "1"}]"#, "case 1: has no `output`"),
            (
                r#"[{"input": "1", "output": "1", "testtype": "functional"}]"#,
                "case 1: calls a function, and nothing names it",
            ),
            (r#"{"fn_name": "f", "inputs": ["x"], "outputs": ["1"]}"#, "case 1: `x` is no value of JSON"),
            (r#"{"inputs": ["1"], "outputs": []}"#, "has 1 inputs and 0 outputs"),
            (r#"{"fn_name": "f", "inputs": ["1"], "outputs": ["12345678901234567890123"]}"#, "more than 18 digits"),
            (r#"[{"input": "1", "output": 5}]"#, "case 1: an input or output is no text"),
        ] {
            let problem = Suite::parse(text).unwrap_err();
            assert!(problem.contains(expected), "{text}: {problem}");
        }
    }
}
