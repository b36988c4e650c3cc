//! Complex values of two doubles per part, with bounds on their rounding errors.
//!
//! Every operation adds its own rounding to the error that it inherits. Two values differ if their distance exceeds
//! their bounds. Otherwise they count as equal if the bounds are a tiny part of the values. If the bounds are too wide
//! (cancellation, a pole nearby), this point gives no verdict.

use num_bigint::BigInt;
use num_rational::BigRational;
use num_traits::{ToPrimitive, Zero};

use super::double::{Double, EPSILON};
use super::naming::place;
use crate::answer::{Constant, Expr, Function};
use crate::exact::exact;
use crate::limits::Budget;

/// A complex number with a bound of its error.
#[derive(Clone, Copy, Debug)]
pub(super) struct Value {
    re: Double,
    im: Double,
    error: f64,
}

/// What two values show about their expressions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Agreement {
    Same,
    Different,
    Unknown,
}

/// Widest error bound, relative to the values, at which they can count as equal.
const NARROW: f64 = 1e-18;

/// Largest argument whose remainder modulo π is still accurate.
const MAX_ANGLE: f64 = 1e9;

impl Value {
    fn new(re: Double, im: Double, error: f64) -> Option<Self> {
        (re.is_finite() && im.is_finite() && error.is_finite()).then_some(Self { re, im, error })
    }

    fn real(re: Double, error: f64) -> Option<Self> {
        Self::new(re, Double::ZERO, error + EPSILON * re.high.abs())
    }

    /// Creates an exact value from a double.
    fn whole(value: f64) -> Self {
        Self { re: Double::new(value), im: Double::ZERO, error: 0.0 }
    }

    fn rational(value: &BigRational) -> Option<Self> {
        let high = value.to_f64().filter(|high| high.is_finite())?;
        let rest = value - BigRational::from_float(high)?;
        // Numbers with few digits are exact; for others the rest is rounded once more.
        if rest.is_zero() {
            return Some(Self::whole(high));
        }
        Self::real(Double::sum(high, rest.to_f64()?), 0.0)
    }

    pub(super) fn magnitude(self) -> f64 {
        self.re.high.hypot(self.im.high)
    }

    pub(super) fn is_real(self) -> bool {
        self.im.high.abs() <= self.error
    }

    /// Returns the position of a real value on the number line.
    pub(super) fn position(self) -> Option<f64> {
        self.is_real().then_some(self.re.high)
    }

    /// Whether a real value is certainly positive.
    pub(super) fn is_positive(self) -> bool {
        self.is_real() && self.re.high > self.error
    }

    /// Whether a real value is certainly negative.
    fn is_negative(self) -> bool {
        self.is_real() && self.re.high < -self.error
    }

    fn is_whole(self) -> bool {
        self.im == Double::ZERO && self.error == 0.0 && self.re.high.fract() == 0.0
    }

    /// Real power of a negative number, for exponents with an odd denominator.
    fn real_power(self, exponent: &BigRational, value: Self) -> Option<Self> {
        let is_odd = |n: &BigInt| (n % BigInt::from(2)) != BigInt::zero();
        if exponent.is_integer() || !is_odd(exponent.denom()) {
            return None;
        }
        let power = self.negated().pow(value)?;
        Some(if is_odd(exponent.numer()) { power.negated() } else { power })
    }

    /// Whether the value is certainly not zero.
    pub(super) fn is_nonzero(self) -> bool {
        self.magnitude() > 2.0 * self.error
    }

    fn plus(self, other: Self) -> Option<Self> {
        let rounding = EPSILON * (self.magnitude() + other.magnitude());
        Self::new(self.re.plus(other.re), self.im.plus(other.im), self.error + other.error + rounding)
    }

    pub(super) fn minus(self, other: Self) -> Option<Self> {
        self.plus(other.negated())
    }

    fn negated(self) -> Self {
        Self { re: self.re.negated(), im: self.im.negated(), error: self.error }
    }

    pub(super) fn times(self, other: Self) -> Option<Self> {
        let a = self.magnitude();
        let b = other.magnitude();
        let error = a * other.error + b * self.error + self.error * other.error + 4.0 * EPSILON * a * b;
        let re = self.re.times(other.re).minus(self.im.times(other.im));
        let im = self.re.times(other.im).plus(self.im.times(other.re));
        Self::new(re, im, error)
    }

    pub(super) fn inverted(self) -> Option<Self> {
        let size = self.magnitude();
        if size <= 2.0 * self.error || size == 0.0 {
            return None;
        }
        let error = self.error / size / (size - self.error) + 8.0 * EPSILON / size;
        if self.im == Double::ZERO {
            return Self::new(Double::ONE.over(self.re), Double::ZERO, error);
        }
        let square = self.re.times(self.re).plus(self.im.times(self.im));
        Self::new(self.re.over(square), self.im.negated().over(square), error)
    }

    fn exp(self) -> Option<Self> {
        if self.im.high.abs() > MAX_ANGLE {
            return None;
        }
        let size = self.re.exp();
        let error = size.high * (2.0 * self.error.min(1e300) + 4.0 * EPSILON * (1.0 + self.magnitude()));
        if self.im == Double::ZERO {
            return Self::new(size, Double::ZERO, error);
        }
        let (sine, cosine) = self.im.sin_cos();
        Self::new(size.times(cosine), size.times(sine), error)
    }

    fn ln(self) -> Option<Self> {
        if !self.is_nonzero() {
            return None;
        }
        let size = self.re.times(self.re).plus(self.im.times(self.im)).root();
        // An imaginary part that is pure rounding must not decide the side of the branch cut.
        let is_real = self.is_real();
        let angle = if is_real { Double::ZERO.angle(self.re) } else { self.im.angle(self.re) };
        let re = size.ln();
        let error = 2.0 * self.error / size.high + 4.0 * EPSILON * (1.0 + re.high.abs() + angle.high.abs());
        Self::new(re, angle, error)
    }

    fn pow(self, exponent: Self) -> Option<Self> {
        let whole = exponent.re.high;
        let is_whole = exponent.im == Double::ZERO && exponent.error == 0.0 && whole.fract() == 0.0;
        if is_whole && whole.abs() <= 1024.0 {
            return self.whole_power(whole as i32);
        }
        if self.magnitude() == 0.0 && self.error == 0.0 {
            return (exponent.re.high > exponent.error).then_some(Self::whole(0.0));
        }
        self.ln()?.times(exponent)?.exp()
    }

    fn whole_power(self, exponent: i32) -> Option<Self> {
        if exponent == 0 {
            // 0^0 is undefined.
            return self.is_nonzero().then_some(Self::whole(1.0));
        }
        let mut result = Self::whole(1.0);
        let mut square = self;
        let mut left = exponent.unsigned_abs();
        while left > 0 {
            if left & 1 == 1 {
                result = result.times(square)?;
            }
            left >>= 1;
            if left > 0 {
                square = square.times(square)?;
            }
        }
        if exponent < 0 { result.inverted() } else { Some(result) }
    }

    /// Cosine and sine, through the exponential function for arguments that are not real.
    fn sin_cos(self) -> Option<(Self, Self)> {
        if self.im == Double::ZERO {
            let angle = self.re.high.abs();
            let error = self.error + 4.0 * EPSILON * (1.0 + angle);
            let (sine, cosine) = if angle > MAX_ANGLE { return None } else { self.re.sin_cos() };
            return Some((Self::new(sine, Double::ZERO, error)?, Self::new(cosine, Double::ZERO, error)?));
        }
        let turned = Self { re: self.im.negated(), im: self.re, error: self.error };
        let forth = turned.exp()?;
        let back = turned.negated().exp()?;
        let cosine = forth.plus(back)?.times(Self::whole(0.5))?;
        let half_over_i = Self { re: Double::ZERO, im: Double::new(-0.5), error: 0.0 };
        Some((forth.minus(back)?.times(half_over_i)?, cosine))
    }

    /// Compares two values.
    pub(super) fn agreement(self, other: Self) -> Agreement {
        let size = self.magnitude().max(other.magnitude());
        let bound = self.error + other.error;
        let re = self.re.minus(other.re).high;
        let im = self.im.minus(other.im).high;
        if re.hypot(im) > 2.0 * bound {
            return Agreement::Different;
        }
        if bound <= NARROW * size.max(1e-6) { Agreement::Same } else { Agreement::Unknown }
    }

    /// Whether the value is within `distance` of a rational.
    pub(super) fn is_within(self, distance: f64, of: &BigRational) -> bool {
        let off = Self::rational(of).and_then(|of| self.minus(of));
        off.is_some_and(|off| self.is_real() && off.re.high.abs() + off.error <= distance)
    }
}

/// Values of the variables at one fixed point per index, the same in every process.
#[derive(Clone, Copy, Debug)]
pub(super) struct Probe {
    index: u64,
    /// Whether values are integers, for expressions that only make sense there (`n!`, `(-1)^n`).
    whole: bool,
    /// Whether variables are real, so that an expression without a real value has none.
    real: bool,
    /// Whether `x^{1/3}` of a negative number is the real root.
    real_roots: bool,
    /// Value of the first variable, where every integer is tried.
    first: Option<i64>,
}

/// Number of points at which two expressions are compared.
const POINTS: u64 = 8;

impl Probe {
    /// Probe for expressions without variables.
    pub(super) const NONE: Self = Self { index: 0, whole: false, real: false, real_roots: true, first: None };

    /// Yields the points at which two expressions are compared, of mixed size and sign.
    pub(super) fn all(whole: bool) -> impl Iterator<Item = Self> {
        (0..POINTS).map(move |index| Self { index, whole, ..Self::NONE })
    }

    /// Yields every integer of a range for the first variable, for functions that change at few of them.
    pub(super) fn grid() -> impl Iterator<Item = Self> {
        (1..=40).map(|first: i64| Self { index: first.unsigned_abs(), whole: true, first: Some(first), ..Self::NONE })
    }

    /// Returns the same point, restricted to real numbers unless the expressions have an `i`.
    pub(super) fn over(self, has_variables: bool, is_complex: bool) -> Self {
        Self { real: has_variables && !is_complex, real_roots: !is_complex, ..self }
    }

    /// Integer value of a variable. Variables that occur first are the larger ones, at every other point the smaller
    /// ones, so that `\binom{n}{k}` has a value at some points.
    pub(super) fn whole_value(self, name: &str) -> Option<i64> {
        let place = i64::try_from(place(name).unwrap_or(0).min(7)).unwrap_or(0);
        if let Some(first) = self.first.filter(|_| place == 0) {
            return Some(first);
        }
        let spread = i64::try_from(self.hash(name) % 3).unwrap_or(0);
        let descending = 14 - 4 * place.min(3) + spread;
        let ascending = 3 + 4 * place + spread;
        self.whole.then_some(if self.index.is_multiple_of(2) { descending } else { ascending })
    }

    pub(super) fn is_of_grid(self) -> bool {
        self.first.is_some()
    }

    fn hash(self, name: &str) -> u64 {
        name.bytes().fold(self.index + 1, |hash, byte| pacs_types::mix(hash ^ u64::from(byte)))
    }

    fn value(self, name: &str) -> f64 {
        if let Some(whole) = self.whole_value(name) {
            return whole as f64;
        }
        let unit = (self.hash(name) >> 11) as f64 / (1u64 << 53) as f64;
        let is_even = place(name).unwrap_or(0).is_multiple_of(2);
        match self.index {
            0 => 1.1 + 2.0 * unit,
            1 => -2.7 + 2.5 * unit,
            2 => 0.1 + 0.8 * unit,
            3 => -3.0 + 6.0 * unit,
            4 => 3.3 + 6.0 * unit,
            5 => -0.9 + 1.8 * unit,
            6 if is_even => 2.0 + 6.0 * unit,
            6 => 0.1 + 0.8 * unit,
            _ if is_even => 0.05 + 0.9 * unit,
            _ => 1.5 + 4.0 * unit,
        }
    }
}

/// Evaluates an expression at a probe; `None` without a value (a pole, an infinity, an undefined function, too
/// large a number).
pub(super) fn value(expr: &Expr, probe: Probe, budget: &mut Budget) -> Option<Value> {
    budget.step()?;
    match expr {
        Expr::Number(number) => {
            budget.spend(usize::try_from(number.value.numer().bits() / 64).ok()?)?;
            Value::rational(&number.value)
        }
        Expr::Constant(Constant::Pi) => Value::real(Double::PI, 0.0),
        Expr::Constant(Constant::Degree) => Value::real(Double::PI, 0.0)?.times(Value::whole(180.0).inverted()?),
        Expr::Constant(Constant::Euler) => Value::real(Double::E, 0.0),
        Expr::Constant(Constant::Imaginary) => Value::new(Double::ZERO, Double::ONE, 0.0),
        Expr::Constant(Constant::Infinity) | Expr::PlusMinus(_) | Expr::MinusPlus(_) | Expr::Matrix(_) => None,
        Expr::Symbol(name) => Some(Value::whole(probe.value(name))),
        Expr::Sum(terms) => {
            let mut sum = Value::whole(0.0);
            for term in terms {
                sum = sum.plus(value(term, probe, budget)?)?;
            }
            Some(sum)
        }
        Expr::Product(factors) => {
            let mut product = Value::whole(1.0);
            for factor in factors {
                product = product.times(value(factor, probe, budget)?)?;
            }
            Some(product)
        }
        Expr::Inverse(x) => value(x, probe, budget)?.inverted(),
        Expr::Negative(x) => Some(value(x, probe, budget)?.negated()),
        Expr::Percent(x) => value(x, probe, budget)?.times(Value::whole(100.0).inverted()?),
        Expr::Power(base, exponent) => {
            let power = value(exponent, probe, budget)?;
            budget.spend(FUNCTION_STEPS)?;
            if matches!(**base, Expr::Constant(Constant::Euler)) {
                return power.exp();
            }
            let base = value(base, probe, budget)?;
            if base.is_negative() && probe.real_roots {
                let exponent = exact(exponent, budget);
                if let Some(root) = exponent.as_ref().and_then(|exponent| base.real_power(exponent, power)) {
                    return Some(root);
                }
                if probe.real && !exponent.is_some_and(|exponent| exponent.is_integer()) && !power.is_whole() {
                    return None;
                }
            }
            base.pow(power)
        }
        Expr::Call(function, arguments) => {
            budget.spend(FUNCTION_STEPS)?;
            let mut values = Vec::with_capacity(arguments.len());
            for argument in arguments {
                values.push(value(argument, probe, budget)?);
            }
            let is_root = matches!(function, Function::Root | Function::Ln | Function::Log);
            let value = call(*function, &values)?;
            // Negative numbers have no real square root and no real logarithm.
            (!(probe.real && is_root) || value.is_real()).then_some(value)
        }
    }
}

/// Budget steps of a series.
const FUNCTION_STEPS: usize = 32;

fn call(function: Function, arguments: &[Value]) -> Option<Value> {
    match (function, arguments) {
        (Function::Root, [x, degree]) => root(*x, *degree),
        (Function::Log, [x, base]) => x.ln()?.times(base.ln()?.inverted()?),
        // Without an explicit base it is ten; see `scalar` for the other reading.
        (Function::Log, [x]) => x.ln()?.times(Value::whole(10.0).ln()?.inverted()?),
        (Function::Binomial, [n, k]) => {
            let ways = factorial(*n)?.times(factorial(*k)?.inverted()?)?;
            ways.times(factorial(n.minus(*k)?)?.inverted()?)
        }
        (Function::Max | Function::Min, [first, rest @ ..]) => {
            let mut best = *first;
            for other in rest {
                let is_better = other.minus(best)?.position()? > 0.0;
                best = if is_better == (function == Function::Max) { *other } else { best };
            }
            Some(best)
        }
        (_, [x]) => unary(function, *x),
        _ => None,
    }
}

fn root(x: Value, degree: Value) -> Option<Value> {
    let odd = degree.is_real() && (degree.re.high % 2.0).abs() == 1.0;
    if x.is_real() && x.re.high < 0.0 && odd {
        return Some(root(x.negated(), degree)?.negated());
    }
    if degree.re == Double::new(2.0) && x.im == Double::ZERO && x.is_positive() {
        let root = x.re.root();
        return Value::real(root, x.error / root.high);
    }
    x.pow(degree.inverted()?)
}

fn unary(function: Function, x: Value) -> Option<Value> {
    match function {
        Function::Ln => return x.ln(),
        Function::Exp => return x.exp(),
        Function::Abs if x.im == Double::ZERO => {
            return Some(if x.re.high < 0.0 { x.negated() } else { x });
        }
        Function::Abs => {
            let size = x.re.times(x.re).plus(x.im.times(x.im)).root();
            return Value::real(size, x.error + 4.0 * EPSILON * size.high);
        }
        Function::Sin => return x.sin_cos().map(|(sine, _)| sine),
        Function::Cos => return x.sin_cos().map(|(_, cosine)| cosine),
        Function::Tan => return x.sin_cos().and_then(|(sine, cosine)| sine.times(cosine.inverted()?)),
        Function::Cot => return x.sin_cos().and_then(|(sine, cosine)| cosine.times(sine.inverted()?)),
        Function::Sec => return x.sin_cos()?.1.inverted(),
        Function::Csc => return x.sin_cos()?.0.inverted(),
        Function::Factorial => return factorial(x),
        _ => {}
    }
    if !x.is_real() {
        return None;
    }
    let t = x.re;
    let error = x.error;
    let one = Value::whole(1.0);
    match function {
        Function::Arcsin | Function::Arccos => {
            let square = t.times(t);
            let rest = Double::ONE.minus(square);
            // Rounding may have pushed the argument out of the domain, at whose ends the slope is infinite.
            if rest.high < -4.0 * (error + EPSILON) {
                return None;
            }
            let other = rest.root();
            // At the ends of the domain, only an inexact argument has an error.
            let is_end = error == 0.0 && rest == Double::ZERO;
            let slope = if is_end { 1.0 } else { other.high.max((error + EPSILON).sqrt()) };
            let error = 2.0 * (error + 4.0 * EPSILON) / slope;
            let angle = if function == Function::Arcsin { t.angle(other) } else { other.angle(t) };
            Value::real(angle, error)
        }
        Function::Arctan => Value::real(t.angle(Double::ONE), error + 4.0 * EPSILON),
        Function::Sinh | Function::Cosh | Function::Tanh => {
            let up = x.exp()?;
            let down = x.negated().exp()?;
            let sinh = up.minus(down)?;
            let cosh = up.plus(down)?;
            match function {
                Function::Sinh => sinh.times(Value::whole(0.5)),
                Function::Cosh => cosh.times(Value::whole(0.5)),
                _ => sinh.times(cosh.inverted()?),
            }
        }
        Function::Floor | Function::Ceil => {
            let near = t.high.round();
            let off = t.minus(Double::new(near)).high;
            // A value that rounding may have moved across an integer is that integer.
            let floor = if off.abs() <= error || off >= 0.0 { near } else { near - 1.0 };
            let is_whole = off.abs() <= error;
            let rounded = if function == Function::Floor || is_whole { floor } else { floor + 1.0 };
            Value::whole(rounded).times(one)
        }
        _ => None,
    }
}

/// Factorial: exact for integers that doubles represent; otherwise the gamma function, which is less accurate.
fn factorial(x: Value) -> Option<Value> {
    let n = x.position()?;
    if x.error == 0.0 && n.fract() == 0.0 && (0.0..=170.0).contains(&n) {
        let factorial = (1..=n as u32).fold(BigInt::from(1), |product, k| product * k);
        return Value::rational(&BigRational::from_integer(factorial));
    }
    let factorial = gamma(n + 1.0)?;
    Value::real(Double::new(factorial), 1e-12 * factorial.abs() * (1.0 + x.error))
}

/// Gamma function, by the Lanczos approximation with `g = 7` and nine terms.
fn gamma(x: f64) -> Option<f64> {
    const TERMS: [f64; 9] = [
        0.999_999_999_999_809_9,
        676.520_368_121_885_1,
        -1_259.139_216_722_402_8,
        771.323_428_777_653_1,
        -176.615_029_162_140_6,
        12.507_343_278_686_905,
        -0.138_571_095_265_720_12,
        9.984_369_578_019_572e-6,
        1.505_632_735_149_311_6e-7,
    ];
    if x < 0.5 {
        let sine = (std::f64::consts::PI * x).sin();
        // Close to a pole, values are not worth comparing.
        return if sine.abs() > 1e-9 { Some(std::f64::consts::PI / (sine * gamma(1.0 - x)?)) } else { None };
    }
    let x = x - 1.0;
    let sum = TERMS.iter().enumerate().skip(1).fold(TERMS[0], |sum, (i, term)| sum + term / (x + i as f64));
    let t = x + 7.5;
    let value = (2.0 * std::f64::consts::PI).sqrt() * t.powf(x + 0.5) * (-t).exp() * sum;
    value.is_finite().then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answer::Answer;
    use crate::parse::{Notation, parse};

    fn of(text: &str) -> Value {
        let Ok(Answer::Scalar(expr)) = parse(text, Notation::PLAIN, &mut Budget::new()) else {
            panic!("{text} is no scalar")
        };
        value(&expr, Probe::NONE, &mut Budget::new()).unwrap_or_else(|| panic!("{text} has no value"))
    }

    #[test]
    fn gamma_extends_the_factorial() {
        let mut factorial = 1.0;
        for n in 1..30 {
            factorial *= f64::from(n);
            let got = gamma(f64::from(n) + 1.0).expect("defined");
            assert!((got / factorial - 1.0).abs() < 1e-12, "{n}!: {got}");
        }
        let half = gamma(0.5).expect("defined");
        assert!((half - std::f64::consts::PI.sqrt()).abs() < 1e-12);
        assert!((gamma(-0.5).expect("defined") + 2.0 * std::f64::consts::PI.sqrt()).abs() < 1e-11);
    }

    #[test]
    fn identities_hold_to_the_last_digits() {
        for (a, b) in [
            (r"\sqrt{2}\sqrt{3}", r"\sqrt{6}"),
            (r"\sqrt{3+2\sqrt{2}}", r"1+\sqrt{2}"),
            (r"e^{i\pi}+2", "1"),
            (r"\cos(\pi/7) - \cos(2\pi/7) + \cos(3\pi/7)", "1/2"),
            (r"4\arctan\frac15 - \arctan\frac1{239}", r"\frac{\pi}{4}"),
            (r"\log_2 10 \cdot \log 2", "1"),
            (r"\arcsin\frac{\sqrt{3}}{2}", r"\frac{\pi}{3}"),
            (r"\sqrt{-4}", "2i"),
            (r"\cosh(\ln 2)", r"\frac54"),
            (r"\cos(i)", r"\cosh(1)"),
            (r"\lfloor \pi \rfloor", "3"),
            (r"|3+4i|", "5"),
            (r"\sqrt[3]{-8}", "-2"),
        ] {
            assert_eq!(of(a).agreement(of(b)), Agreement::Same, "{a} and {b}");
        }
    }

    #[test]
    fn near_misses_are_told_apart() {
        for (a, b) in [
            // A whole number up to its 18th digit.
            (r"e^{\pi\sqrt{67}}", "147197952744"),
            (r"\sqrt{2}", "1.4142135623730950488016"),
            (r"\pi", r"\frac{355}{113}"),
            ("10^6 + 0.1 - 10^6", "0.2"),
            (r"\sqrt{10^{12}+1}", "10^6"),
        ] {
            assert_eq!(of(a).agreement(of(b)), Agreement::Different, "{a} and {b}");
        }
    }

    #[test]
    fn what_rounding_hides_is_not_decided() {
        // The difference of 10^20·√2 and its neighbour is known to no more than its last digits.
        let a = of(r"10^{40}\sqrt{2} - \sqrt{2 \cdot 10^{80}}");
        assert_eq!(a.agreement(Value::whole(0.0)), Agreement::Unknown);
    }
}
