//! Whether what a program gave is what was expected.

use serde_json::Value;

/// Whether two outputs are the same: line by line, where runs of white space count as one space, and white space at the end of lines
/// and empty lines at the end of the output do not count. Words are compared as texts; a pair of decimal numbers, at least one of which
/// has a point or an exponent, may differ by `tolerance`, absolutely or relative to the expected one.
#[must_use]
pub fn same_output(expected: &str, got: &str, tolerance: f64) -> bool {
    let lines = |text: &'_ str| -> Vec<String> {
        let mut lines: Vec<String> = text.lines().map(|line| line.trim_end().to_owned()).collect();
        while lines.last().is_some_and(String::is_empty) {
            lines.pop();
        }
        lines
    };
    let expected = lines(expected);
    let got = lines(got);
    expected.len() == got.len() && expected.iter().zip(&got).all(|(a, b)| same_line(a, b, tolerance))
}

fn same_line(expected: &str, got: &str, tolerance: f64) -> bool {
    let mut expected = expected.split_whitespace();
    let mut got = got.split_whitespace();
    loop {
        match (expected.next(), got.next()) {
            (None, None) => return true,
            (Some(a), Some(b)) if same_word(a, b, tolerance) => {}
            _ => return false,
        }
    }
}

fn same_word(expected: &str, got: &str, tolerance: f64) -> bool {
    if expected == got {
        return true;
    }
    let is_fraction = |word: &str| word.contains(['.', 'e', 'E']);
    let (Some(a), Some(b)) = (decimal(expected), decimal(got)) else { return false };
    (is_fraction(expected) || is_fraction(got)) && near(a, b, tolerance)
}

/// A number in decimal digits; words such as `nan` and `inf` are texts.
fn decimal(word: &str) -> Option<f64> {
    let plain = word.bytes().all(|byte| byte.is_ascii_digit() || b"+-.eE".contains(&byte));
    let number = word.parse::<f64>().ok().filter(|number| plain && number.is_finite())?;
    Some(number)
}

fn near(expected: f64, got: f64, tolerance: f64) -> bool {
    (expected - got).abs() <= tolerance * expected.abs().max(1.0)
}

/// Whether a value of Python, in the encoding of the sandbox, is the one that a case expects in JSON. Tuples are lists; keys of dictionaries
/// are texts, as in JSON; `True` is 1; a pair of numbers of which one is a float may differ by `tolerance`. A set or an object of any
/// other class is nothing that JSON has.
#[must_use]
pub fn same_value(expected: &Value, got: &Value, tolerance: f64) -> bool {
    match (expected, plain(got)) {
        (Value::Array(expected), Got::List(got)) => {
            expected.len() == got.len() && expected.iter().zip(got).all(|(a, b)| same_value(a, b, tolerance))
        }
        (Value::Object(expected), Got::Fields(got)) => {
            let field = |name: &str| got.iter().find(|(key, _)| key == name).map(|(_, value)| *value);
            expected.len() == got.len()
                && expected.iter().all(|(name, a)| field(name).is_some_and(|b| same_value(a, b, tolerance)))
        }
        (Value::Null, Got::None) => true,
        (Value::String(expected), Got::Text(got)) => expected == got,
        (Value::Bool(expected), Got::Whole(got)) => i128::from(*expected) == got,
        (Value::Number(expected), Got::Whole(got)) => match expected.as_i64().map(i128::from) {
            Some(expected) => expected == got,
            None => expected.as_f64().is_some_and(|expected| near(expected, got as f64, tolerance)),
        },
        (Value::Number(expected), Got::Float(got)) => {
            expected.as_f64().is_some_and(|expected| got.is_finite() && near(expected, got, tolerance))
        }
        _ => false,
    }
}

/// A value of Python, as far as JSON can mean it.
enum Got<'a> {
    None,
    Whole(i128),
    Float(f64),
    Text(&'a str),
    List(&'a [Value]),
    Fields(Vec<(String, &'a Value)>),
    Other,
}

fn plain<'a>(got: &'a Value) -> Got<'a> {
    match got {
        Value::Null => Got::None,
        Value::Bool(value) => Got::Whole(i128::from(*value)),
        Value::Number(number) => number.as_i64().map_or(Got::Other, |number| Got::Whole(i128::from(number))),
        Value::String(text) => Got::Text(text),
        Value::Array(items) => Got::List(items),
        Value::Object(tagged) => match tagged.iter().next() {
            Some((tag, Value::Array(items))) if tag == "tuple" => Got::List(items),
            Some((tag, Value::Array(pairs))) if tag == "dict" => {
                let pair = |pair: &'a Value| Some((key(pair.get(0)?)?, pair.get(1)?));
                let fields: Option<Vec<_>> = pairs.iter().map(pair).collect();
                fields.map_or(Got::Other, Got::Fields)
            }
            Some((tag, Value::String(text))) if tag == "float" => hexadecimal(text).map_or(Got::Other, Got::Float),
            Some((tag, Value::String(text))) if tag == "int" => {
                let (sign, digits) = text.strip_prefix('-').map_or((1, text.as_str()), |digits| (-1, digits));
                let whole = digits.strip_prefix("0x").and_then(|digits| i128::from_str_radix(digits, 16).ok());
                whole.map_or(Got::Other, |whole| Got::Whole(sign * whole))
            }
            _ => Got::Other,
        },
    }
}

/// A key as JSON has it.
fn key(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(value) => Some(value.to_string()),
        Value::Null => Some("null".to_owned()),
        _ => None,
    }
}

/// A float as Python's `float.hex` writes it: `-0x1.8p+3`.
fn hexadecimal(text: &str) -> Option<f64> {
    let (sign, digits) = text.strip_prefix('-').map_or((1.0, text), |digits| (-1.0, digits));
    let digits = digits.strip_prefix("0x")?;
    let (mantissa, exponent) = digits.split_once('p')?;
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    if fraction.len() > 13 || whole.len() > 1 {
        return None;
    }
    let bits = u64::from_str_radix(&format!("{whole}{fraction}"), 16).ok()?;
    let exponent: i32 = exponent.parse().ok().filter(|exponent: &i32| exponent.abs() < 1100)?;
    // Two steps, for the power alone may be below the smallest number. The mantissa has 53 bits at most.
    let shift = exponent - 4 * i32::try_from(fraction.len()).ok()?;
    Some(sign * (bits as f64) * 2f64.powi(shift / 2) * 2f64.powi(shift - shift / 2))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn white_space_and_the_last_digits_do_not_count() {
        for (expected, got, same) in [
            ("1 2\n3\n", "1  2 \r\n3", true),
            ("a", "a\n\n\n", true),
            ("a\n\nb", "a\nb", false),
            ("a b", "ab", false),
            ("0.333333", "0.3333333333", true),
            ("0.3333", "0.3343", false),
            ("1000000.0", "1000000.5", true),
            ("3", "3.0", true),
            ("3", "4", false),
            ("1000000000", "1000000001", false),
            ("Yes", "yes", false),
            ("nan", "nan", true),
            ("inf", "1e999", false),
            ("1.0", "1.0 1.0", false),
            ("1e3", "1000", true),
            ("", "", true),
            ("", "x", false),
        ] {
            assert_eq!(same_output(expected, got, 1e-6), same, "{expected:?} {got:?}");
        }
        assert!(!same_output("0.5", "0.5000001", 0.0));
    }

    #[test]
    fn values_are_compared_by_kind() {
        let float =
            |value: f64| json!({"float": if value == 1.5 { "0x1.8000000000000p+0" } else { "0x1.0000000000000p+1" }});
        for (expected, got, same) in [
            (json!([1, 2]), json!([1, 2]), true),
            (json!([1, 2]), json!({"tuple": [1, 2]}), true),
            (json!([1, 2]), json!({"set": [1, 2]}), false),
            (json!([[1], null]), json!([{"tuple": [1]}, null]), true),
            (json!(1.5), float(1.5), true),
            (json!(2), float(2.0), true),
            (json!(2.0), json!(2), true),
            (json!(2), json!(3), false),
            (json!(true), json!(true), true),
            (json!(true), json!(1), true),
            (json!(true), json!("true"), false),
            (json!("a"), json!("a"), true),
            (json!({"a": 1, "2": [3]}), json!({"dict": [["a", 1], [2, [3]]]}), true),
            (json!({"a": 1}), json!({"dict": [["a", 1], ["b", 2]]}), false),
            (json!(9_007_199_254_740_993_i64), json!({"int": "0x20000000000001"}), true),
            (json!(9_007_199_254_740_992_i64), json!({"int": "0x20000000000001"}), false),
            (json!(-9_007_199_254_740_993_i64), json!({"int": "-0x20000000000001"}), true),
            (json!(null), json!(false), false),
            (json!({"other": "Evil"}), json!({"other": "Evil"}), false),
            (json!(0.0), json!({"float": "nan"}), false),
        ] {
            assert_eq!(same_value(&expected, &got, 1e-6), same, "{expected} {got}");
        }
    }

    #[test]
    fn floats_of_python_are_read_exactly() {
        for (text, value) in [
            ("0x1.8000000000000p+0", 1.5),
            ("-0x1.999999999999ap-4", -0.1),
            ("0x0.0p+0", 0.0),
            ("0x1.fffffffffffffp+1023", f64::MAX),
            ("0x0.0000000000001p-1022", f64::from_bits(1)),
            ("0x1.921fb54442d18p+1", std::f64::consts::PI),
        ] {
            assert_eq!(hexadecimal(text), Some(value), "{text}");
        }
        assert_eq!(hexadecimal("inf"), None);
    }
}
