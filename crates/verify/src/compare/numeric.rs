//! Values in complex double precision, with an estimate of the error that rounding has left in them.

use num_traits::ToPrimitive;

use crate::answer::{Constant, Expr, Function};
use crate::limits::Budget;

/// A complex number and how far it may be off.
#[derive(Clone, Copy, Debug)]
pub(super) struct Value {
    pub(super) re: f64,
    pub(super) im: f64,
    pub(super) error: f64,
}

/// Rounding of one operation, with some room.
const EPSILON: f64 = 4.0 * f64::EPSILON;

/// Numbers that agree to this relative difference are taken for equal.
const TOLERANCE: f64 = 1e-10;

impl Value {
    fn new(re: f64, im: f64, error: f64) -> Option<Self> {
        let value = Self { re, im, error };
        (re.is_finite() && im.is_finite() && error.is_finite()).then_some(value)
    }

    fn real(re: f64) -> Option<Self> {
        Self::new(re, 0.0, EPSILON * re.abs())
    }

    /// The value of a real function whose relative error is `error / |f|`.
    fn with_error(re: f64, error: f64) -> Option<Self> {
        Self::new(re, 0.0, error + EPSILON * re.abs())
    }

    pub(super) fn magnitude(self) -> f64 {
        self.re.hypot(self.im)
    }

    pub(super) fn is_real(self) -> bool {
        self.im.abs() <= self.error.max(TOLERANCE * self.magnitude())
    }

    fn add(self, other: Self) -> Option<Self> {
        let rounding = EPSILON * (self.magnitude() + other.magnitude());
        Self::new(self.re + other.re, self.im + other.im, self.error + other.error + rounding)
    }

    pub(super) fn minus(self, other: Self) -> Option<Self> {
        self.add(other.negated())
    }

    fn negated(self) -> Self {
        Self { re: -self.re, im: -self.im, error: self.error }
    }

    pub(super) fn times(self, other: Self) -> Option<Self> {
        let (a, b) = (self.magnitude(), other.magnitude());
        let error = a * other.error + b * self.error + self.error * other.error + EPSILON * a * b;
        Self::new(self.re * other.re - self.im * other.im, self.re * other.im + self.im * other.re, error)
    }

    pub(super) fn inverted(self) -> Option<Self> {
        let size = self.magnitude();
        if size <= self.error {
            return None;
        }
        let error = self.error / size / (size - self.error) + EPSILON / size;
        Self::new(self.re / size / size, -self.im / size / size, error)
    }

    fn exp(self) -> Option<Self> {
        let size = self.re.exp();
        Self::new(size * self.im.cos(), size * self.im.sin(), size * (self.error + EPSILON * (1.0 + self.magnitude())))
    }

    fn ln(self) -> Option<Self> {
        let size = self.magnitude();
        if size <= self.error {
            return None;
        }
        let (re, im) = (size.ln(), self.im.atan2(self.re));
        Self::new(re, im, self.error / (size - self.error) + EPSILON * (re.abs() + im.abs()))
    }

    fn pow(self, exponent: Self) -> Option<Self> {
        let whole = exponent.re.round();
        if exponent.im == 0.0 && whole == exponent.re && whole.abs() <= 1024.0 {
            return self.whole_power(whole as i32);
        }
        if self.magnitude() == 0.0 {
            return if exponent.re > 0.0 { Self::real(0.0) } else { None };
        }
        let power = self.ln()?.times(exponent)?.exp()?;
        if self.im == 0.0 && exponent.im == 0.0 && self.re > 0.0 {
            return Self::new(self.re.powf(exponent.re), 0.0, power.error);
        }
        Some(power)
    }

    fn whole_power(self, exponent: i32) -> Option<Self> {
        let mut result = Self::real(1.0)?;
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

    /// Whether two values agree within the tolerance; `None` when rounding left too little to say.
    pub(super) fn agrees(self, other: Self) -> Option<bool> {
        let size = self.magnitude().max(other.magnitude());
        let error = self.error + other.error;
        let difference = (self.re - other.re).hypot(self.im - other.im);
        if difference <= TOLERANCE * size || (difference <= 4.0 * error && error <= 1e-6 * size.max(1e-6)) {
            return Some(true);
        }
        if difference > 4.0 * error { Some(false) } else { None }
    }
}

/// Values for the variables: one fixed point per `index`, the same in every process.
#[derive(Clone, Copy, Debug)]
pub(super) struct Probe {
    pub(super) index: u64,
}

impl Probe {
    /// The last probes are negative for some variables, the others positive throughout.
    pub(super) const ALL: [Self; 4] = [Self { index: 0 }, Self { index: 1 }, Self { index: 2 }, Self { index: 3 }];

    fn value(self, name: &str) -> f64 {
        let hash = name.bytes().fold(self.index + 1, |hash, byte| pacs_types::mix(hash ^ u64::from(byte)));
        let unit = (hash >> 11) as f64 / (1u64 << 53) as f64;
        match self.index {
            0 => 1.1 + 2.0 * unit,
            1 => 0.1 + 0.8 * unit,
            2 => 3.3 + 6.0 * unit,
            _ => -2.7 + 2.5 * unit,
        }
    }
}

/// The value at a probe; `None` where there is none (a pole, an infinity, an undefined function).
pub(super) fn value(expr: &Expr, probe: Probe, budget: &mut Budget) -> Option<Value> {
    budget.step()?;
    match expr {
        Expr::Number(number) => Value::real(number.value.to_f64()?),
        Expr::Constant(Constant::Pi) => Value::real(std::f64::consts::PI),
        Expr::Constant(Constant::Euler) => Value::real(std::f64::consts::E),
        Expr::Constant(Constant::Imaginary) => Value::new(0.0, 1.0, 0.0),
        Expr::Constant(Constant::Infinity) | Expr::PlusMinus(_) | Expr::MinusPlus(_) => None,
        Expr::Symbol(name) => Value::real(probe.value(name)),
        Expr::Sum(terms) => {
            let mut sum = Value::real(0.0)?;
            for term in terms {
                sum = sum.add(value(term, probe, budget)?)?;
            }
            Some(sum)
        }
        Expr::Product(factors) => {
            let mut product = Value::real(1.0)?;
            for factor in factors {
                product = product.times(value(factor, probe, budget)?)?;
            }
            Some(product)
        }
        Expr::Inverse(x) => value(x, probe, budget)?.inverted(),
        Expr::Negative(x) => Some(value(x, probe, budget)?.negated()),
        Expr::Percent(x) => value(x, probe, budget)?.times(Value::real(0.01)?),
        Expr::Power(base, exponent) => {
            let exponent = value(exponent, probe, budget)?;
            if matches!(**base, Expr::Constant(Constant::Euler)) {
                return exponent.exp();
            }
            value(base, probe, budget)?.pow(exponent)
        }
        Expr::Call(function, arguments) => {
            let x = value(arguments.first()?, probe, budget)?;
            match arguments.get(1) {
                Some(second) => binary(*function, x, value(second, probe, budget)?),
                None => unary(*function, x),
            }
        }
    }
}

fn binary(function: Function, x: Value, y: Value) -> Option<Value> {
    match function {
        Function::Root => {
            let odd = y.is_real() && (y.re % 2.0).abs() == 1.0;
            if x.im == 0.0 && x.re < 0.0 && odd {
                return Some(x.negated().pow(y.inverted()?)?.negated());
            }
            x.pow(y.inverted()?)
        }
        Function::Log => x.ln()?.times(y.ln()?.inverted()?),
        Function::Binomial => {
            let (n, k) = (real(x)?, real(y)?);
            let ways = gamma(n + 1.0)? / gamma(k + 1.0)? / gamma(n - k + 1.0)?;
            Value::with_error(ways, 1e-12 * ways.abs())
        }
        _ => None,
    }
}

fn real(x: Value) -> Option<f64> {
    x.is_real().then_some(x.re)
}

fn unary(function: Function, x: Value) -> Option<Value> {
    match function {
        Function::Ln | Function::Log => return x.ln(),
        Function::Exp => return x.exp(),
        Function::Abs => return Value::new(x.magnitude(), 0.0, x.error),
        _ => {}
    }
    let error = x.error;
    let t = real(x)?;
    match function {
        Function::Sin => Value::with_error(t.sin(), error + EPSILON * t.abs()),
        Function::Cos => Value::with_error(t.cos(), error + EPSILON * t.abs()),
        Function::Tan => unary(Function::Sin, x)?.times(unary(Function::Cos, x)?.inverted()?),
        Function::Cot => unary(Function::Cos, x)?.times(unary(Function::Sin, x)?.inverted()?),
        Function::Sec => unary(Function::Cos, x)?.inverted(),
        Function::Csc => unary(Function::Sin, x)?.inverted(),
        Function::Arcsin | Function::Arccos => {
            // Rounding may have pushed the argument out of the domain, at whose ends the slope is infinite.
            let inside = if t.abs() <= 1.0 + error { t.clamp(-1.0, 1.0) } else { return None };
            let slope = (1.0 - inside * inside).max(error).sqrt();
            let error = if error > 0.0 { error / slope } else { 0.0 };
            Value::with_error(if function == Function::Arcsin { inside.asin() } else { inside.acos() }, error)
        }
        Function::Arctan => Value::with_error(t.atan(), error),
        Function::Sinh => Value::with_error(t.sinh(), error * t.cosh()),
        Function::Cosh => Value::with_error(t.cosh(), error * t.cosh()),
        Function::Tanh => Value::with_error(t.tanh(), error),
        Function::Floor | Function::Ceil => {
            let near = t.round();
            let snapped = if (t - near).abs() <= 4.0 * error { near } else { t };
            Value::real(if function == Function::Floor { snapped.floor() } else { snapped.ceil() })
        }
        Function::Factorial => {
            let factorial = gamma(t + 1.0)?;
            Value::with_error(factorial, 1e-12 * factorial.abs())
        }
        _ => None,
    }
}

/// The gamma function, by Lanczos' approximation with `g = 7` and nine terms.
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
        // Close to a pole there is no value worth comparing.
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
    fn cancellation_is_not_taken_for_a_difference() {
        let big = Value::real(1e6).expect("finite");
        let sum = big.add(Value::real(0.1).expect("finite")).expect("finite").minus(big).expect("finite");
        assert_eq!(sum.agrees(Value::real(0.1).expect("finite")), Some(true));
        assert_eq!(sum.agrees(Value::real(0.2).expect("finite")), Some(false));
    }
}
