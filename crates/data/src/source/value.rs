//! Values of rows, the same for every format. Numbers stay as they are written: a reference answer of twenty digits that went through
//! a float would be another answer.

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

/// Values within values, at most: a hostile file must not exhaust the stack.
const MOST_DEPTH: usize = 64;
/// Digits that an exponent may be written out to.
const MOST_DIGITS: i64 = 1000;

/// What a field of a row holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    Null,
    Bool(bool),
    /// Its exact decimal digits.
    Number(String),
    Text(String),
    List(Vec<Value>),
    Fields(Vec<(String, Value)>),
    /// What is there, where it is nothing that a row may hold: a date, or a float that is no number.
    Other(&'static str),
}

impl Value {
    /// The text of a question or an answer, or what stands in its place. A list of one value is that value; longer ones and fields
    /// are refused, for joining them would invent a text.
    pub(crate) fn into_text(self) -> Result<String, String> {
        match self {
            Self::Text(text) | Self::Number(text) => Ok(text),
            Self::List(mut list) if list.len() == 1 => list.remove(0).into_text(),
            other => Err(other.what()),
        }
    }

    /// Whether it is a list or an object of the cases of a program, which its verifier reads as JSON. In a list of texts one of
    /// them has to assert something; others may be statements such as `with pytest.raises(…)`.
    pub(crate) fn is_cases(&self) -> bool {
        let asserts =
            |line: &str| line.trim_start().strip_prefix("assert").is_some_and(|rest| rest.starts_with([' ', '(']));
        let is_test = |value: &Self| match value {
            Self::Text(text) => text.lines().any(asserts),
            case => case.at("input").is_some() && case.at("output").is_some(),
        };
        match self {
            Self::List(list) => {
                list.iter().any(is_test) && list.iter().all(|value| matches!(value, Self::Text(_)) || is_test(value))
            }
            Self::Fields(_) => ["cases", "tests", "test_list", "inputs"].into_iter().any(|key| self.at(key).is_some()),
            _ => false,
        }
    }

    /// The value as JSON, with numbers as they are written.
    pub(crate) fn into_json(self) -> String {
        let list = |items: Vec<String>, [open, close]: [char; 2]| format!("{open}{}{close}", items.join(","));
        let text = |text: &str| serde_json::Value::from(text).to_string();
        match self {
            Self::Null | Self::Other(_) => "null".to_owned(),
            Self::Bool(value) => value.to_string(),
            Self::Number(digits) => digits,
            Self::Text(value) => text(&value),
            Self::List(items) => list(items.into_iter().map(Self::into_json).collect(), ['[', ']']),
            Self::Fields(fields) => {
                let field = |(name, value): (String, Self)| format!("{}:{}", text(&name), value.into_json());
                list(fields.into_iter().map(field).collect(), ['{', '}'])
            }
        }
    }

    /// What it is, for messages.
    pub(crate) fn what(&self) -> String {
        match self {
            Self::Null => "null".to_owned(),
            Self::Bool(_) => "true or false".to_owned(),
            Self::Number(_) => "a number".to_owned(),
            Self::Text(_) => "a text".to_owned(),
            Self::List(list) => format!("a list of {} values (one value would be taken)", list.len()),
            Self::Fields(fields) => {
                let names: Vec<String> = fields.iter().map(|(name, _)| format!("`{name}`")).collect();
                format!("an object (its fields: {}; name one by a dot, as in `a.b`)", names.join(", "))
            }
            Self::Other(what) => (*what).to_owned(),
        }
    }

    /// What lies at a path of field names and places in lists, with dots between them.
    pub(crate) fn at(&self, path: &str) -> Option<&Self> {
        match self {
            Self::Fields(fields) => {
                let field = |name: &str| fields.iter().rev().find(|(known, _)| known == name).map(|(_, value)| value);
                // The whole path first: files do have names with dots. The last of repeated names, as other readers of JSON do.
                field(path).or_else(|| path.split_once('.').and_then(|(name, rest)| field(name)?.at(rest)))
            }
            Self::List(list) => {
                let (place, rest) = path.split_once('.').map_or((path, None), |(place, rest)| (place, Some(rest)));
                let value = list.get(place.parse::<usize>().ok()?)?;
                rest.map_or(Some(value), |rest| value.at(rest))
            }
            _ => None,
        }
    }

    /// Reads a value of JSON.
    pub(crate) fn of_json(raw: &RawValue) -> Result<Self, String> {
        Self::of_json_at(raw, 0)
    }

    fn of_json_at(raw: &RawValue, depth: usize) -> Result<Self, String> {
        if depth > MOST_DEPTH {
            return Err(format!("values within values, deeper than {MOST_DEPTH}"));
        }
        let text = raw.get();
        let wrong = |error: serde_json::Error| error.to_string();
        Ok(match text.as_bytes().first() {
            // By the first byte, because serde_json's own values would have parsed numbers to floats.
            Some(b'n') => Self::Null,
            Some(b't' | b'f') => Self::Bool(text == "true"),
            Some(b'"') => Self::Text(serde_json::from_str(text).map_err(wrong)?),
            Some(b'[') => {
                let list: Vec<&RawValue> = serde_json::from_str(text).map_err(wrong)?;
                Self::List(list.into_iter().map(|raw| Self::of_json_at(raw, depth + 1)).collect::<Result<_, _>>()?)
            }
            Some(b'{') => {
                let RawFields(fields) = serde_json::from_str(text).map_err(wrong)?;
                let field = |(name, raw): (String, &RawValue)| Ok((name, Self::of_json_at(raw, depth + 1)?));
                Self::Fields(fields.into_iter().map(field).collect::<Result<_, String>>()?)
            }
            _ => Self::Number(written_out(text)?),
        })
    }

    /// A float of a binary format, by the shortest digits that mean it.
    pub(crate) fn of_float(value: f64, digits: String) -> Self {
        match value {
            value if value.is_nan() => Self::Other("not a number (NaN)"),
            value if value.is_infinite() => Self::Other("infinite"),
            _ => Self::Number(digits),
        }
    }

    /// An integer in two's complement, the highest byte first, less so many decimal places.
    pub(crate) fn of_decimal(bytes: &[u8], places: i32) -> Self {
        let is_negative = bytes.first().is_some_and(|byte| byte & 0x80 != 0);
        let mut magnitude = bytes.to_vec();
        if is_negative {
            magnitude.iter_mut().for_each(|byte| *byte = !*byte);
            for byte in magnitude.iter_mut().rev() {
                *byte = byte.wrapping_add(1);
                if *byte != 0 {
                    break;
                }
            }
        }
        // Long division by ten: decimals of Parquet have up to 38 digits and more, which no machine integer holds.
        let mut digits = Vec::new();
        while magnitude.iter().any(|byte| *byte != 0) {
            let mut rest = 0u32;
            for byte in &mut magnitude {
                rest = (rest << 8) | u32::from(*byte);
                *byte = (rest / 10) as u8;
                rest %= 10;
            }
            digits.push(b'0' + rest as u8);
        }
        digits.reverse();
        let digits = String::from_utf8(digits).unwrap_or_default();
        let sign = if is_negative { "-" } else { "" };
        Self::Number(sign.to_owned() + &placed(&digits, -i64::from(places)))
    }
}

/// The number of a JSON text without an exponent: verifiers read `1e3` as a product.
fn written_out(number: &str) -> Result<String, String> {
    let Some((mantissa, exponent)) = number.split_once(['e', 'E']) else { return Ok(number.to_owned()) };
    let too_long =
        || format!("the number {number:.40}, which has more than {MOST_DIGITS} digits when it is written out");
    let exponent: i64 = exponent.parse().map_err(|_| too_long())?;
    let (sign, mantissa) = mantissa.strip_prefix('-').map_or(("", mantissa), |rest| ("-", rest));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let places = exponent.saturating_sub(fraction.len() as i64);
    // `1e999999999` is twelve bytes in a file and would be a gigabyte of zeros.
    if places.abs() > MOST_DIGITS {
        return Err(too_long());
    }
    Ok(sign.to_owned() + &placed(&format!("{whole}{fraction}"), places))
}

/// Digits with the point moved by so many places to the right.
fn placed(digits: &str, places: i64) -> String {
    let digits = digits.trim_start_matches('0');
    let zeros = usize::try_from(places.unsigned_abs()).unwrap_or(0);
    if digits.is_empty() {
        return "0".to_owned();
    }
    if places >= 0 {
        return format!("{digits}{}", "0".repeat(zeros));
    }
    let padded = format!("{}{digits}", "0".repeat((zeros + 1).saturating_sub(digits.len())));
    let (whole, fraction) = padded.split_at(padded.len() - zeros);
    let fraction = fraction.trim_end_matches('0');
    if fraction.is_empty() { whole.to_owned() } else { format!("{whole}.{fraction}") }
}

/// An object whose values are not read yet, in order.
pub(crate) struct RawFields<'a>(pub(crate) Vec<(String, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for RawFields<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = RawFields<'de>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields = Vec::new();
                while let Some(entry) = map.next_entry::<String, &RawValue>()? {
                    fields.push(entry);
                }
                Ok(RawFields(fields))
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

/// The text of a question or an answer that is a value of JSON, with numbers as they are written.
///
/// # Errors
/// What it is instead.
pub fn exact_text(raw: &RawValue) -> Result<String, String> {
    let value = Value::of_json(raw)?;
    if value.is_cases() { Ok(value.into_json()) } else { value.into_text() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(text: &str) -> Result<Value, String> {
        Value::of_json(serde_json::from_str::<&RawValue>(text).expect("JSON"))
    }

    fn text(value: &str) -> Result<String, String> {
        json(value)?.into_text()
    }

    #[test]
    fn a_list_with_an_assertion_is_one_of_tests() {
        for (value, expected) in [
            (r#"["assert f(1) == 2"]"#, true),
            (r#"["with pytest.raises(ValueError):\n    f('x')", "assert(f(1) == 2)"]"#, true),
            (r#"["s = Stack()\ns.push(1)\nassert s.top() == 1"]"#, true),
            (r#"[{"input": "1", "output": "2"}]"#, true),
            (r#"["assertive people", "asserting"]"#, false),
            (r#"["5"]"#, false),
            (r#"["assert f(1) == 2", 5]"#, false),
            ("[]", false),
        ] {
            assert_eq!(json(value).expect("a value").is_cases(), expected, "{value}");
        }
    }

    #[test]
    fn numbers_stay_as_they_are_written() {
        for (value, expected) in [
            ("12345678901234567890123", "12345678901234567890123"),
            ("-9007199254740993", "-9007199254740993"),
            ("0.1000000000000000055511151231257827", "0.1000000000000000055511151231257827"),
            ("72", "72"),
            ("2.50", "2.50"),
            ("1e3", "1000"),
            ("-1.25E-2", "-0.0125"),
            ("12.5e1", "125"),
            ("0e5", "0"),
            ("[\"7\"]", "7"),
            ("\"x\\n\"", "x\n"),
        ] {
            assert_eq!(text(value).as_deref(), Ok(expected), "{value}");
        }
        assert!(text("1e999999").is_err_and(|error| error.contains("more than 1000 digits")));
        assert!(text("1e99999999999999999999").is_err());
    }

    #[test]
    fn what_is_no_text_says_what_it_is() {
        for (value, expected) in [
            ("null", "null"),
            ("true", "true or false"),
            ("[]", "a list of 0 values"),
            ("[1, 2]", "a list of 2 values"),
            ("{\"a\": {\"b\": 1}}", "an object (its fields: `a`"),
        ] {
            let problem = text(value).expect_err(value);
            assert!(problem.starts_with(expected), "{problem}");
        }
        let deep = format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(text(&deep).is_err_and(|error| error.contains("deeper than 64")));
    }

    #[test]
    fn paths_lead_into_objects_and_lists() {
        let value = json(r#"{"a": {"b": [1, {"c": 2}]}, "a.b": 3, "x": 4, "x": 5}"#).expect("JSON");
        let at = |path: &str| value.at(path).cloned().map(Value::into_text);
        assert_eq!(at("a.b"), Some(Ok("3".into())), "a name that has a dot itself comes first");
        assert_eq!(value.at("a").and_then(|a| a.at("b.1.c")), Some(&Value::Number("2".into())));
        assert_eq!(at("x"), Some(Ok("5".into())), "the last of one name, as ever");
        assert!(at("a.c").is_none() && at("x.y").is_none());
    }

    #[test]
    fn decimals_of_binary_formats_are_exact() {
        let of = |value: i128, places| Value::of_decimal(&value.to_be_bytes(), places);
        for (value, places, expected) in [
            (12345, 2, "123.45"),
            (-12345, 2, "-123.45"),
            (5, 3, "0.005"),
            (7200, 2, "72"),
            (0, 4, "0"),
            (i128::MAX, 0, "170141183460469231731687303715884105727"),
            (-1, 0, "-1"),
        ] {
            assert_eq!(of(value, places), Value::Number(expected.into()));
        }
        assert_eq!(Value::of_float(f64::NAN, String::new()).into_text(), Err("not a number (NaN)".into()));
        assert_eq!(Value::of_float(0.1, 0.1f64.to_string()), Value::Number("0.1".into()));
    }
}
