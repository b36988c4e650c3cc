//! Double-double arithmetic: numbers of about 31 decimal digits, from additions and products whose rounding errors are
//! known exactly (T. J. Dekker, "A floating-point technique for extending the available precision", 1971).

/// The unevaluated sum of two doubles, the second at most half a unit in the last place of the first.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Double {
    pub(super) high: f64,
    low: f64,
}

/// Bound of the relative error of each operation below. The arithmetic is good to 2^-102; the margin is for functions,
/// which sum a series and square or correct the result.
pub(super) const EPSILON: f64 = 1.0 / (1u128 << 94) as f64;

impl Double {
    pub(super) const ZERO: Self = Self { high: 0.0, low: 0.0 };
    pub(super) const ONE: Self = Self { high: 1.0, low: 0.0 };
    pub(super) const PI: Self = Self { high: std::f64::consts::PI, low: 1.224_646_799_147_353_2e-16 };
    pub(super) const E: Self = Self { high: std::f64::consts::E, low: 1.445_646_891_729_250_2e-16 };
    const LN_2: Self = Self { high: std::f64::consts::LN_2, low: 2.319_046_813_846_299_6e-17 };

    pub(super) fn new(value: f64) -> Self {
        Self { high: value, low: 0.0 }
    }

    /// Adds two doubles in any order.
    pub(super) fn sum(a: f64, b: f64) -> Self {
        let high = a + b;
        let part = high - a;
        Self { high, low: (a - (high - part)) + (b - part) }
    }

    /// Adds two doubles, the larger one first.
    fn quick_sum(a: f64, b: f64) -> Self {
        let high = a + b;
        Self { high, low: b - (high - a) }
    }

    fn product(a: f64, b: f64) -> Self {
        let ((a_high, a_low), (b_high, b_low)) = (halves(a), halves(b));
        let high = a * b;
        let low = ((a_high * b_high - high) + a_high * b_low + a_low * b_high) + a_low * b_low;
        Self { high, low }
    }

    pub(super) fn is_finite(self) -> bool {
        self.high.is_finite() && self.low.is_finite()
    }

    pub(super) fn negated(self) -> Self {
        Self { high: -self.high, low: -self.low }
    }

    pub(super) fn plus(self, other: Self) -> Self {
        let high = Self::sum(self.high, other.high);
        let low = Self::sum(self.low, other.low);
        let joined = Self::quick_sum(high.high, high.low + low.high);
        Self::quick_sum(joined.high, joined.low + low.low)
    }

    pub(super) fn minus(self, other: Self) -> Self {
        self.plus(other.negated())
    }

    pub(super) fn times(self, other: Self) -> Self {
        let product = Self::product(self.high, other.high);
        Self::quick_sum(product.high, product.low + (self.high * other.low + self.low * other.high))
    }

    /// Divides; not finite for a divisor of zero.
    pub(super) fn over(self, divisor: Self) -> Self {
        let first = self.high / divisor.high;
        let rest = self.minus(divisor.times(Self::new(first)));
        let second = rest.high / divisor.high;
        let rest = rest.minus(divisor.times(Self::new(second)));
        Self::quick_sum(first, second).plus(Self::new(rest.high / divisor.high))
    }

    /// Square root of a number that is not negative.
    pub(super) fn root(self) -> Self {
        if self.high <= 0.0 {
            return Self::ZERO;
        }
        let near = self.high.sqrt();
        let rest = self.minus(Self::product(near, near));
        Self::quick_sum(near, rest.high / (2.0 * near))
    }

    /// Exponential, by `exp(x) = 2^k · exp(r / 256)^256` and a series for the last; not finite for absolute
    /// values above 700.
    pub(super) fn exp(self) -> Self {
        const SQUARINGS: u32 = 8;
        // Beyond this the scale leaves the range of a double.
        if self.high.abs() > 700.0 {
            return Self::new(f64::INFINITY);
        }
        let doublings = (self.high / std::f64::consts::LN_2).round();
        let rest = self.minus(Self::LN_2.times(Self::new(doublings)));
        let small = rest.times(Self::new(1.0 / f64::from(1 << SQUARINGS)));
        // exp − 1 keeps its digits: (1 + s)² − 1 = 2s + s².
        let mut sum = small;
        let mut term = small;
        for n in 2..12 {
            term = term.times(small).over(Self::new(f64::from(n)));
            sum = sum.plus(term);
        }
        for _ in 0..SQUARINGS {
            sum = sum.plus(sum).plus(sum.times(sum));
        }
        let scale = 2.0f64.powi(doublings as i32);
        sum.plus(Self::ONE).times(Self::new(scale))
    }

    /// Logarithm of a positive number, by one Newton step on `exp`.
    pub(super) fn ln(self) -> Self {
        let near = Self::new(self.high.ln());
        near.plus(self.times(near.negated().exp()).minus(Self::ONE))
    }

    /// Sine and cosine.
    pub(super) fn sin_cos(self) -> (Self, Self) {
        let quarter = Self::PI.times(Self::new(0.5));
        let turns = (self.high / quarter.high).round();
        let rest = self.minus(quarter.times(Self::new(turns)));
        let square = rest.times(rest).negated();
        // Terms of both series alternate; |rest| is at most π/4, so 1/28! is far below the last digit.
        let mut sine = rest;
        let mut cosine = Self::ONE;
        let mut term = Self::ONE;
        for n in 1..14 {
            let even = f64::from(2 * n * (2 * n - 1));
            term = term.times(square).over(Self::new(even));
            cosine = cosine.plus(term);
            sine = sine.plus(term.times(rest).over(Self::new(f64::from(2 * n + 1))));
        }
        match turns.rem_euclid(4.0) {
            0.0 => (sine, cosine),
            1.0 => (cosine, sine.negated()),
            2.0 => (sine.negated(), cosine.negated()),
            _ => (cosine.negated(), sine),
        }
    }

    /// Angle of the point (`x`, `self`), by one Newton step.
    pub(super) fn angle(self, x: Self) -> Self {
        if self.high == 0.0 && x.high == 0.0 {
            return Self::ZERO;
        }
        if self.high == 0.0 {
            return if x.high < 0.0 { Self::PI } else { Self::ZERO };
        }
        let radius = x.times(x).plus(self.times(self)).root();
        let near = Self::new(self.high.atan2(x.high));
        let (sine, cosine) = near.sin_cos();
        // sin(angle − near)
        let off = self.over(radius).times(cosine).minus(x.over(radius).times(sine));
        near.plus(off)
    }
}

/// Splits a double into the upper and lower half of its digits.
fn halves(a: f64) -> (f64, f64) {
    let scaled = a * 134_217_729.0;
    let high = scaled - (scaled - a);
    (high, a - high)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: Double, b: Double) {
        let off = a.minus(b).high.abs();
        assert!(off <= 64.0 * EPSILON * b.high.abs().max(1.0), "{a:?} and {b:?} are {off:e} apart");
    }

    fn samples() -> impl Iterator<Item = Double> {
        (1..200).map(|n| Double::new(f64::from(n)).over(Double::new(7.0)))
    }

    #[test]
    fn inverse_functions_undo_each_other() {
        for x in samples() {
            close(x.over(Double::new(3.0)).times(Double::new(3.0)), x);
            close(x.root().times(x.root()), x);
            close(x.ln().exp(), x);
            let (sine, cosine) = x.sin_cos();
            close(sine.times(sine).plus(cosine.times(cosine)), Double::ONE);
            let (y_sine, y_cosine) = sine.angle(cosine).sin_cos();
            close(y_sine, sine);
            close(y_cosine, cosine);
        }
    }

    #[test]
    fn sums_of_angles_and_exponents() {
        for (x, y) in samples().zip(samples().skip(13)) {
            let ((sx, cx), (sy, cy)) = (x.sin_cos(), y.sin_cos());
            close(x.plus(y).sin_cos().0, sx.times(cy).plus(cx.times(sy)));
            let (product, sum) = (x.exp().times(y.exp()), x.plus(y).exp());
            close(product.over(sum), Double::ONE);
        }
    }

    #[test]
    fn known_values() {
        close(Double::ONE.exp(), Double::E);
        close(Double::new(2.0).ln(), Double::LN_2);
        close(Double::ONE.angle(Double::ONE).times(Double::new(4.0)), Double::PI);
        close(Double::PI.over(Double::new(6.0)).sin_cos().0, Double::new(0.5));
    }
}
