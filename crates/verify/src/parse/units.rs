//! Units of measurement and counted things: a closed table.
//!
//! Words after a value are in this table, or the answer is not read. A unit has dimensions and a scale, so 5 km equal
//! 5,000 m and not 5 m. A counted thing (`apples`) has neither; the last word of its name must be in `nouns.txt`, the
//! nouns that questions of GSM8K, MATH and similar sets count, or another plural. Plurals that change a number
//! (`thirds`, `dozens`) are a closed class with a table of their own.

use std::collections::HashMap;
use std::sync::OnceLock;

use num_bigint::BigInt;
use num_rational::BigRational;
use num_traits::One;

use crate::answer::{DIMENSIONS, Unit};

/// Nouns in the singular, sorted, one per line.
const NOUNS: &str = include_str!("nouns.txt");

/// Meaning of a word after a value.
enum Word {
    Unit {
        dimensions: [i8; DIMENSIONS],
        scale: BigRational,
        currency: &'static str,
    },
    /// Multiplies the value, as in `12 thousand`.
    Factor(u64),
}

const NONE: [i8; DIMENSIONS] = [0; DIMENSIONS];

/// Exponents with one non-zero dimension: length, mass, time, temperature, money, current or data.
const fn of(dimension: usize, power: i8) -> [i8; DIMENSIONS] {
    let mut dimensions = NONE;
    dimensions[dimension] = power;
    dimensions
}

const LENGTH: [i8; DIMENSIONS] = of(0, 1);
const VOLUME: [i8; DIMENSIONS] = of(0, 3);
const AREA: [i8; DIMENSIONS] = of(0, 2);
const MASS: [i8; DIMENSIONS] = of(1, 1);
const TIME: [i8; DIMENSIONS] = of(2, 1);
const FREQUENCY: [i8; DIMENSIONS] = of(2, -1);
const SPEED: [i8; DIMENSIONS] = [1, 0, -1, 0, 0, 0, 0];
const FORCE: [i8; DIMENSIONS] = [1, 1, -2, 0, 0, 0, 0];
const ENERGY: [i8; DIMENSIONS] = [2, 1, -2, 0, 0, 0, 0];
const POWER: [i8; DIMENSIONS] = [2, 1, -3, 0, 0, 0, 0];
const PRESSURE: [i8; DIMENSIONS] = [-1, 1, -2, 0, 0, 0, 0];
const KELVIN: [i8; DIMENSIONS] = of(3, 1);
const MONEY: [i8; DIMENSIONS] = of(4, 1);
const CURRENT: [i8; DIMENSIONS] = of(5, 1);
const CHARGE: [i8; DIMENSIONS] = [0, 0, 1, 0, 0, 1, 0];
const VOLTAGE: [i8; DIMENSIONS] = [2, 1, -3, 0, 0, -1, 0];
const RESISTANCE: [i8; DIMENSIONS] = [2, 1, -3, 0, 0, -2, 0];
const DATA: [i8; DIMENSIONS] = of(6, 1);

/// A unit: its names in lower case, its dimensions, and its scale as a fraction of base units.
struct Entry(&'static str, [i8; DIMENSIONS], u64, u64);

/// Metres, kilograms, seconds, kelvins, amperes and bytes are the base units, with scale 1.
const TABLE: &[Entry] = &[
    Entry("m meter meters metre metres mètre mètres metro metros м метр метра метров 米", LENGTH, 1, 1),
    Entry("km kilometer kilometers kilometre kilometres kms kilómetros kilomètres км 千米 公里", LENGTH, 1000, 1),
    Entry("dm decimeter decimeters decimetre decimetres 分米", LENGTH, 1, 10),
    Entry("cm centimeter centimeters centimetre centimetres cms centímetros centimètres см 厘米", LENGTH, 1, 100),
    Entry("mm millimeter millimeters millimetre millimetres 毫米", LENGTH, 1, 1000),
    Entry("µm μm micron microns micrometer micrometers", LENGTH, 1, 1_000_000),
    Entry("nm nanometer nanometers nanometre nanometres", LENGTH, 1, 1_000_000_000),
    Entry("in inch inches", LENGTH, 254, 10_000),
    Entry("ft foot feet", LENGTH, 3048, 10_000),
    Entry("yd yds yard yards", LENGTH, 9144, 10_000),
    Entry("mi mile miles", LENGTH, 1_609_344, 1000),
    Entry("ly lightyear lightyears", LENGTH, 9_460_730_472_580_800, 1),
    Entry("acre acres", AREA, 40_468_564_224, 10_000_000),
    Entry("hectare hectares ha 公顷", AREA, 10_000, 1),
    Entry("l liter liters litre litres 升", VOLUME, 1, 1000),
    Entry("ml milliliter milliliters millilitre millilitres 毫升", VOLUME, 1, 1_000_000),
    Entry("gal gallon gallons", VOLUME, 3_785_411_784, 1_000_000_000_000),
    Entry("qt quart quarts", VOLUME, 946_352_946, 1_000_000_000_000),
    Entry("pt pint pints", VOLUME, 473_176_473, 1_000_000_000_000),
    Entry("cup cups", VOLUME, 473_176_473, 2_000_000_000_000),
    Entry("tbsp tablespoon tablespoons", VOLUME, 473_176_473, 32_000_000_000_000),
    Entry("tsp teaspoon teaspoons", VOLUME, 473_176_473, 96_000_000_000_000),
    Entry("kg kgs kilogram kilograms kilo kilos кг 千克 公斤", MASS, 1, 1),
    Entry("g gm gms gram grams gramme grammes gramos г 克", MASS, 1, 1000),
    Entry("mg milligram milligrams", MASS, 1, 1_000_000),
    Entry("lb lbs pound pounds", MASS, 45_359_237, 100_000_000),
    Entry("oz ounce ounces", MASS, 45_359_237, 1_600_000_000),
    Entry("ton tons", MASS, 90_718_474, 100_000),
    Entry("tonne tonnes 吨", MASS, 1000, 1),
    Entry("s sec secs second seconds segundo segundos secondes sekunden секунд 秒", TIME, 1, 1),
    Entry("ms millisecond milliseconds", TIME, 1, 1000),
    Entry("min mins minute minutes minuto minutos minuten минут 分钟 分", TIME, 60, 1),
    Entry("h hr hrs hour hours hora horas heure heures stunde stunden час часа часов 小时", TIME, 3600, 1),
    Entry("d day days día días dia dias jour jours tag tage день дня дней 天 日", TIME, 86_400, 1),
    Entry("wk week weeks semana semanas semaine semaines woche wochen 周", TIME, 604_800, 1),
    Entry("month months mes meses mois monat monate 个月 月", TIME, 31_556_952, 12),
    Entry("yr yrs year years año años ans jahr jahre год года лет 年 岁", TIME, 31_556_952, 1),
    Entry("decade decades", TIME, 315_569_520, 1),
    Entry("century centuries", TIME, 3_155_695_200, 1),
    Entry("hz hertz", FREQUENCY, 1, 1),
    Entry("khz kilohertz", FREQUENCY, 1000, 1),
    Entry("mhz megahertz", FREQUENCY, 1_000_000, 1),
    Entry("mph", SPEED, 1_609_344, 3_600_000),
    Entry("kph kmh kmph", SPEED, 10, 36),
    Entry("n newton newtons", FORCE, 1, 1),
    Entry("kn kilonewton kilonewtons", FORCE, 1000, 1),
    Entry("dyne dynes dyn", FORCE, 1, 100_000),
    Entry("j joule joules", ENERGY, 1, 1),
    Entry("kj kilojoule kilojoules", ENERGY, 1000, 1),
    Entry("cal calorie calories", ENERGY, 4184, 1000),
    Entry("kcal kilocalorie kilocalories", ENERGY, 4184, 1),
    Entry("erg ergs", ENERGY, 1, 10_000_000),
    Entry("ev electronvolt electronvolts", ENERGY, 1_602_176_634, 10_000_000_000_000_000_000),
    Entry("kwh", ENERGY, 3_600_000, 1),
    Entry("w watt watts", POWER, 1, 1),
    Entry("kw kilowatt kilowatts", POWER, 1000, 1),
    Entry("pa pascal pascals", PRESSURE, 1, 1),
    Entry("kpa kilopascal kilopascals", PRESSURE, 1000, 1),
    Entry("atm atmosphere atmospheres", PRESSURE, 101_325, 1),
    Entry("k kelvin kelvins", KELVIN, 1, 1),
    Entry("a amp amps ampere amperes", CURRENT, 1, 1),
    Entry("c coulomb coulombs", CHARGE, 1, 1),
    Entry("v volt volts", VOLTAGE, 1, 1),
    Entry("ω Ω ohm ohms", RESISTANCE, 1, 1),
    Entry("byte bytes", DATA, 1, 1),
    Entry("kb kilobyte kilobytes", DATA, 1000, 1),
    Entry("mb megabyte megabytes", DATA, 1_000_000, 1),
    Entry("gb gigabyte gigabytes", DATA, 1_000_000_000, 1),
    Entry("bit bits", DATA, 1, 8),
];

/// Each currency counts in itself; there is no conversion.
const CURRENCIES: &[(&str, &str, u64)] = &[
    ("$ dollar dollars usd buck bucks dólar dólares 美元", "USD", 1),
    ("cent cents ¢", "USD", 100),
    ("penny pennies", "USD", 100),
    ("€ euro euros eur", "EUR", 1),
    ("£ gbp", "GBP", 1),
    ("¥ yen jpy 日元", "JPY", 1),
    ("元 yuan rmb cny 人民币", "CNY", 1),
    ("角", "CNY", 10),
    ("rupee rupees ₹ inr rs", "INR", 1),
    ("ruble rubles rouble roubles rub руб рублей", "RUB", 1),
    ("peso pesos", "MXN", 1),
    ("franc francs", "CHF", 1),
    ("won krw ₩", "KRW", 1),
    ("peseta pesetas", "ESP", 1),
    ("shekel shekels", "ILS", 1),
    ("kopeck kopecks kopek kopeks", "RUB", 100),
];

const FACTORS: &[(&str, u64)] = &[
    ("hundred hundreds", 100),
    ("thousand thousands", 1000),
    ("million millions", 1_000_000),
    ("billion billions", 1_000_000_000),
    ("trillion trillions", 1_000_000_000_000),
    ("dozen dozens", 12),
];

/// Short unit names that may as well be a product of variables when they have no font. `e`, `i`, `d` and `t` are left
/// out: they are variables far more often than units.
const ABBREVIATIONS: &str = " m s g h l L N J W V K A cm mm km dm nm kg mg lb lbs oz ft yd mi in hr hrs min mins sec secs \
     mph kph kmh sq cu gal ml mL pt qt pts rad deg usd USD eur EUR gm gms th am pm AM PM Hz kHz kJ kW kN Pa kPa mol ms \
     eV kWh kcal cal atm KB MB GB ";

/// Units without dimensions, for what a pure number counts, and measures of figures.
const PLAIN: &[&str] = &[
    "rad", "radian", "radians", "pts", "ways", "mol", "mole", "moles", "th", "st", "nd", "rd", "个", "人", "次", "种",
];

/// Words that change the number next to them, or that make it no number. None may be part of the name of
/// a counted thing.
const OPERATIVE: &[&str] = &[
    "not",
    "no",
    "non",
    "never",
    "or",
    "and",
    "is",
    "are",
    "was",
    "were",
    "be",
    "isn't",
    "if",
    "else",
    "then",
    "than",
    "less",
    "fewer",
    "under",
    "over",
    "below",
    "above",
    "about",
    "around",
    "plus",
    "minus",
    "times",
    "half",
    "halves",
    "third",
    "thirds",
    "quarter",
    "quarters",
    "fourth",
    "fourths",
    "fifth",
    "fifths",
    "twice",
    "double",
    "triple",
    "squared",
    "cubed",
    "square",
    "cube",
    "root",
    "negative",
    "wrong",
    "incorrect",
    "false",
    "except",
    "but",
    "between",
    "to",
    "from",
    "at",
    "most",
    "least",
    "up",
    "by",
    "divided",
    "without",
    "maybe",
];

/// Remarks after a counted thing that do not change its number.
const REMARKS: [&str; 10] =
    [" in total", " in all", " total", " altogether", " each", " left", " remaining", " exactly", " long", " old"];

fn word(word: &str) -> Option<&'static Word> {
    static WORDS: OnceLock<HashMap<&'static str, Word>> = OnceLock::new();
    let words = WORDS.get_or_init(|| {
        let ratio = |above: u64, below: u64| BigRational::new(BigInt::from(above), BigInt::from(below));
        let mut words = HashMap::new();
        for Entry(names, dimensions, above, below) in TABLE {
            let unit = |_| Word::Unit { dimensions: *dimensions, scale: ratio(*above, *below), currency: "" };
            words.extend(names.split(' ').map(|name| (name, unit(name))));
        }
        for &(names, currency, parts) in CURRENCIES {
            let unit = |_| Word::Unit { dimensions: MONEY, scale: ratio(1, parts), currency };
            words.extend(names.split(' ').map(|name| (name, unit(name))));
        }
        for &(names, by) in FACTORS {
            words.extend(names.split(' ').map(|name| (name, Word::Factor(by))));
        }
        words
    });
    words.get(word)
}

/// Whether a word names a counted thing, in the singular or plural.
pub(super) fn is_noun(word: &str) -> bool {
    singular(word).is_some()
}

/// Returns the singular of a noun in the list.
fn singular(word: &str) -> Option<&'static str> {
    let found = |stem: &str| {
        let at = nouns().binary_search(&stem).ok()?;
        Some(nouns()[at])
    };
    found(word)
        .or_else(|| found(word.strip_suffix('s')?))
        .or_else(|| found(word.strip_suffix("es")?))
        .or_else(|| found(&format!("{}y", word.strip_suffix("ies")?)))
        .or_else(|| found(&format!("{}f", word.strip_suffix("ves")?)))
        .or_else(|| found(&format!("{}fe", word.strip_suffix("ves")?)))
}

fn nouns() -> &'static [&'static str] {
    static SORTED: OnceLock<Vec<&'static str>> = OnceLock::new();
    SORTED.get_or_init(|| {
        let mut nouns: Vec<&str> = NOUNS.lines().collect();
        nouns.sort_unstable();
        nouns
    })
}

/// Whether an unknown word has the form of a plural, and so names a counted thing.
fn is_plural(word: &str) -> bool {
    const OTHERS: &[&str] =
        &["unless", "always", "perhaps", "besides", "towards", "versus", "across", "yours", "folds", "wrongs", "means"];
    let is_plain = word.chars().all(|c| c.is_ascii_lowercase() || c == '-');
    is_plain
        && word.len() >= 4
        && word.ends_with('s')
        && !word.ends_with("ss")
        && !word.ends_with("us")
        && !word.ends_with("is")
        && !OTHERS.contains(&word)
}

/// Whether a word names parts of a whole: `tenths`, `hundredths`.
fn is_fraction(word: &str) -> bool {
    word.len() > 4 && (word.ends_with("ths") || word.ends_with("th")) && !is_noun(word)
}

/// Whether letters without a font abbreviate a unit, but could also be a product of variables.
pub(super) fn is_abbreviation(word: &str) -> bool {
    word.len() <= 4 && ABBREVIATIONS.contains(&format!(" {word} "))
}

/// Whether a single word is in the tables, abbreviations excluded, and therefore not a product.
pub(super) fn is_word(word: &str) -> bool {
    let lower = word.to_lowercase();
    let in_table = || {
        matches!(lower.as_str(), "square" | "cubic")
            || self::word(&lower).is_some()
            || PLAIN.contains(&lower.as_str())
            || is_noun(&lower)
    };
    !is_abbreviation(word) && (in_table() || is_degree(&lower)) && (lower.chars().count() > 1 || !lower.is_ascii())
}

fn is_degree(word: &str) -> bool {
    matches!(word, "degree" | "degrees" | "deg")
}

/// Parses the half of the day of a time: `p.m.`.
pub(super) fn half_day(words: &str) -> Option<bool> {
    let letters: String = words.chars().filter(|c| c.is_alphabetic()).flat_map(char::to_lowercase).collect();
    match letters.as_str() {
        "am" => Some(false),
        "pm" => Some(true),
        _ => None,
    }
}

/// Reads the words after a value; `None` if one of them is in no table.
pub(super) fn phrase(words: &str) -> Option<Unit> {
    let mut lower = words.to_lowercase().replace(['(', ')'], "");
    lower = lower.trim().trim_end_matches(['.', ',']).to_owned();
    for remark in REMARKS {
        lower = lower.strip_suffix(remark).unwrap_or(&lower).to_owned();
    }
    let words: Vec<&str> = lower.split_whitespace().map(|word| word.trim_end_matches(['.', ','])).collect();
    let mut unit = Unit::none();
    let mut power = 1;
    let mut next_power = None;
    let mut label: Vec<&str> = Vec::new();
    let mut label_power = 1;
    for (at, name) in words.iter().enumerate() {
        let exponent = power * next_power.take().unwrap_or(1);
        match *name {
            "per" | "/" if at > 0 => {
                unit.close(&label, label_power, singular)?;
                label.clear();
                power = -power;
            }
            "square" | "sq" if at + 1 < words.len() => next_power = Some(2),
            "cubic" | "cu" if at + 1 < words.len() => next_power = Some(3),
            "squared" if at > 0 && label.is_empty() => unit.again(2)?,
            "cubed" if at > 0 && label.is_empty() => unit.again(3)?,
            name if is_degree(name) => unit.degrees = true,
            "celsius" | "fahrenheit" => {
                unit.times(KELVIN, &BigRational::one(), if *name == "celsius" { "°C" } else { "°F" }, exponent)?;
                unit.degrees = false;
            }
            "th" | "st" | "nd" | "rd" if at == 0 => {}
            // Between a counted thing and its material: `slices of pizza`.
            "of" if label.last().is_some_and(|noun| is_noun(noun)) || unit.is_some() => label.clear(),
            _ => match word(name).filter(|_| label.is_empty()) {
                Some(Word::Unit { dimensions, scale, currency }) => {
                    unit.times(*dimensions, scale, currency, exponent)?
                }
                Some(Word::Factor(by)) if unit.is_bare() => unit.factor *= BigInt::from(*by),
                Some(Word::Factor(_)) => return None,
                None if OPERATIVE.contains(name) || is_fraction(name) => return None,
                None => {
                    label.push(name);
                    label_power = exponent;
                }
            },
        }
    }
    if next_power.is_some() {
        return None;
    }
    unit.close(&label, label_power, singular)?;
    unit.written = words.join(" ");
    Some(unit)
}

impl Unit {
    /// Takes the words of a counted thing, whose last word must be a noun of the table.
    fn close(&mut self, label: &[&str], power: i8, singular: fn(&str) -> Option<&'static str>) -> Option<()> {
        let Some(last) = label.last() else { return Some(()) };
        if label.len() > 4 {
            return None;
        }
        match singular(last) {
            Some("unit") if power != 1 => self.counted.push(format!("unit^{power}")),
            Some(noun) => self.counted.push(noun.to_owned()),
            None if PLAIN.contains(last) => {}
            None => {
                self.counted.push(last.trim_end_matches('s').to_owned());
                self.is_known &= is_plural(last);
            }
        }
        Some(())
    }
}

/// Multiplies several phrases, as in `\mathrm{kg} \cdot \mathrm{m}^{-2}`.
pub(super) fn joined(parts: &[(String, i8)]) -> Option<Unit> {
    let mut all = Unit::none();
    for (words, exponent) in parts {
        let mut unit = phrase(words)?;
        if *exponent != 1 {
            // `units^2` are square units; apples have no square.
            let is_unit = unit.dimensions != NONE || unit.counted.iter().all(|noun| noun == "unit");
            if !is_unit && *exponent != -1 {
                return None;
            }
            unit = unit.powered(*exponent)?;
            for noun in unit.counted.iter_mut().filter(|noun| *noun == "unit") {
                *noun = format!("unit^{exponent}");
            }
        }
        let written =
            if all.written.is_empty() { unit.written.clone() } else { format!("{} {}", all.written, unit.written) };
        all = all.product(unit)?;
        all.written = written;
    }
    Some(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_have_dimensions_and_a_scale() {
        let unit = |words| phrase(words).unwrap_or_else(|| panic!("{words} is a unit"));
        assert_eq!(unit("km").dimensions, unit("miles").dimensions);
        assert_eq!(unit("km").scale, unit("meters").scale * BigInt::from(1000));
        assert_eq!(unit("square feet").dimensions, AREA);
        assert_eq!(unit("miles per hour").scale, unit("mph").scale);
        assert_ne!(unit("square units").counted, unit("units").counted);
        assert_eq!(unit("hours").scale, unit("minutes").scale * BigInt::from(60));
        assert_ne!(unit("dollars").currency, unit("euros").currency);
        assert_eq!(unit("children tickets").counted, ["ticket"]);
        assert_eq!(unit("thousand apples").factor, BigInt::from(1000));
        assert!(unit("grommets").is_known && !unit("grommets").measures_the_same(&unit("apples")));
        assert!(!unit("incorrectly").is_known);
    }

    #[test]
    fn what_changes_a_number_is_no_unit() {
        for words in ["is wrong", "less than x", "if n", "or apples", "fewer apples", "half apples", "square", "tenths"]
        {
            assert!(phrase(words).is_none(), "{words}");
        }
    }

    #[test]
    fn the_nouns_are_sorted_words() {
        assert!(nouns().windows(2).all(|pair| pair[0] < pair[1]));
        let odd: Vec<_> =
            nouns().iter().filter(|n| n.len() < 3 || OPERATIVE.contains(n) || word(n).is_some()).collect();
        assert!(odd.is_empty(), "{odd:?}");
    }
}
