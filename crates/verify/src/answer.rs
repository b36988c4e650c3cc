//! Answers as trees, after parsing.

use num_bigint::BigInt;
use num_rational::BigRational;
use num_traits::One;

/// A parsed final answer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Answer {
    /// A number or an expression.
    Scalar(Expr),
    /// Words, such as `even` or a name.
    Text(String),
    /// An ordered tuple, point or interval.
    Sequence {
        /// Bracket on the left.
        open: Bracket,
        /// Bracket on the right.
        close: Bracket,
        /// Members in order.
        items: Vec<Answer>,
    },
    /// `{1, 2}` with set braces, without an order. Empty for `∅`.
    Set(Vec<Answer>),
    /// Several answers without brackets, unordered unless the other side is a tuple.
    List(Vec<Answer>, Joint),
    /// Pieces joined by `∪`.
    Union(Vec<Answer>),
    /// Pieces joined by `∩`.
    Intersection(Vec<Answer>),
    /// Set difference, `A \ B`.
    Difference(Box<Answer>, Box<Answer>),
    /// The set of real numbers.
    Reals,
    /// Another number set: `ℤ`, `ℕ`, `ℚ`, `ℂ`.
    Domain(&'static str),
    /// `x ∈ ℤ`: the domain of a variable.
    Member(Box<Answer>, &'static str),
    /// Rows of a matrix or vector.
    Matrix(Vec<Vec<Expr>>),
    /// `left = right`. `names` is true if the left side only names the right side (`x`, `f(x)`, `AB`), rather than
    /// being calculated with (`xy`, `x^2`).
    Equation { left: Box<Answer>, right: Box<Answer>, names: bool },
    /// `a = b = c`. Settled into an equation of the first and last side if the numbers among them agree.
    Equalities { sides: Vec<Answer>, names: bool },
    /// An inequality, `left op right`.
    Inequality(Order, Expr, Expr),
    /// A rising chain, `a < b ≤ c`; there is one order fewer than sides.
    Chain(Vec<Expr>, Vec<Order>),
    /// `1 : 2 : 3`.
    Ratio(Vec<Expr>),
    /// A time of day, `7:30 p.m.`.
    Clock(Clock),
    /// A value with a unit, or with the name of what is counted.
    Quantity(Box<Answer>, Unit),
    /// `(D) 42`: the letter of a choice, and its content.
    Choice(String, Box<Answer>),
    /// A function by cases, as pairs of value and condition.
    Cases(Vec<(Answer, Answer)>),
    /// An answer for all (or some) values of the named variables; settled into the inner answer.
    For(Box<Answer>, Vec<String>),
    /// Tokens that could not be read; only ever one side of an `=`.
    Opaque(String),
}

/// How the members of a list are joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Joint {
    /// By commas, semicolons or line breaks.
    Comma,
    And,
    Or,
}

/// A time as written, with the half of the day (true after noon) if given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Clock {
    pub(crate) hour: u32,
    pub(crate) minute: u32,
    pub(crate) second: u32,
    pub(crate) after_noon: Option<bool>,
}

impl Clock {
    /// Returns the time on a 24-hour clock.
    fn of_day(self) -> [u32; 3] {
        let hour = match self.after_noon {
            Some(true) if self.hour < 12 => self.hour + 12,
            Some(false) if self.hour == 12 => 0,
            _ => self.hour,
        };
        [hour, self.minute, self.second]
    }

    /// Whether two times are equal. A time without its half of the day equals that time in either half.
    pub(crate) fn same(self, other: Self) -> bool {
        let as_written = |clock: Self| [clock.hour, clock.minute, clock.second];
        let halves_agree =
            self.after_noon.is_none() || other.after_noon.is_none() || self.after_noon == other.after_noon;
        self.of_day() == other.of_day() || (halves_agree && as_written(self) == as_written(other))
    }
}

/// Number of dimensions: length, mass, time, temperature, money, current, data.
pub(crate) const DIMENSIONS: usize = 7;

/// Unit of a value, or the name of what is counted.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Unit {
    /// Exponent of each dimension.
    pub(crate) dimensions: [i8; DIMENSIONS],
    /// Size of the unit, in base units of its dimensions.
    pub(crate) scale: BigRational,
    /// Factor that belongs to the value: `12 thousand`.
    pub(crate) factor: BigInt,
    /// Currency, or temperature scale; different ones are not converted.
    pub(crate) currency: &'static str,
    /// Whether it is the degree of an angle, which belongs to the value.
    pub(crate) degrees: bool,
    /// Names of counted things, in the singular if the table has them.
    pub(crate) counted: Vec<String>,
    /// Whether all of its words are in the tables.
    pub(crate) is_known: bool,
    /// The text of the unit, for the reason of a verdict.
    pub(crate) written: String,
}

impl Unit {
    pub(crate) fn none() -> Self {
        Self {
            dimensions: [0; DIMENSIONS],
            scale: BigRational::one(),
            factor: BigInt::one(),
            currency: "",
            degrees: false,
            counted: Vec::new(),
            is_known: true,
            written: String::new(),
        }
    }

    /// Whether the unit measures nothing: no dimension, no counted thing.
    pub(crate) fn is_bare(&self) -> bool {
        self.dimensions == [0; DIMENSIONS] && self.currency.is_empty() && self.counted.is_empty()
    }

    pub(crate) fn is_some(&self) -> bool {
        !self.is_bare()
    }

    /// Multiplies by a power of another unit; `None` beyond exponents that occur in practice.
    pub(crate) fn times(
        &mut self,
        dimensions: [i8; DIMENSIONS],
        scale: &BigRational,
        currency: &'static str,
        exponent: i8,
    ) -> Option<()> {
        if !(-6..=6).contains(&exponent)
            || !(self.currency.is_empty() || currency.is_empty() || self.currency == currency)
        {
            return None;
        }
        for (own, other) in self.dimensions.iter_mut().zip(dimensions) {
            *own = own.checked_add(other.checked_mul(exponent)?).filter(|power| (-24..=24).contains(power))?;
        }
        self.scale = &self.scale * scale.pow(i32::from(exponent));
        if !currency.is_empty() {
            self.currency = currency;
        }
        Some(())
    }

    /// Raises the unit to a power: `feet squared`.
    pub(crate) fn again(&mut self, exponent: i8) -> Option<()> {
        *self = self.clone().powered(exponent)?;
        Some(())
    }

    pub(crate) fn powered(self, exponent: i8) -> Option<Self> {
        let mut all = Self { dimensions: [0; DIMENSIONS], scale: BigRational::one(), ..self.clone() };
        all.times(self.dimensions, &self.scale, self.currency, exponent)?;
        Some(all)
    }

    pub(crate) fn product(mut self, other: Self) -> Option<Self> {
        self.times(other.dimensions, &other.scale, other.currency, 1)?;
        self.factor *= other.factor;
        self.degrees |= other.degrees;
        self.counted.extend(other.counted);
        self.is_known &= other.is_known;
        Some(self)
    }

    /// Whether it is only a generic unit, square or not: `5 \text{ square units}`.
    pub(crate) fn is_generic(&self) -> bool {
        self.dimensions == [0; DIMENSIONS]
            && !self.counted.is_empty()
            && self.counted.iter().all(|noun| noun.starts_with("unit"))
    }

    /// Whether values in the two units are comparable: same dimensions, and same counted things.
    pub(crate) fn measures_the_same(&self, other: &Self) -> bool {
        /// Words that only say that something is counted.
        const ANY: &[&str] = &["unit", "way", "piece", "item", "thing", "people", "person", "number"];
        let is_any = |noun: &String| ANY.contains(&noun.as_str()) || noun.starts_with("unit^");
        let any = |unit: &Self| unit.counted.is_empty() || unit.counted.iter().any(is_any);
        let power = |unit: &Self| unit.counted.iter().find(|noun| noun.starts_with("unit")).cloned();
        if let (Some(own), Some(other)) = (power(self), power(other)) {
            return own == other;
        }
        // Generic square units may stand for square centimetres, or any other.
        if self.is_generic() || other.is_generic() {
            let power =
                |unit: &Self| unit.counted.first().and_then(|noun| noun.strip_prefix("unit^")?.parse::<i8>().ok());
            let power = power(self).or(power(other)).unwrap_or(1);
            let dimensions = if self.is_generic() { other.dimensions } else { self.dimensions };
            let length = dimensions[0];
            return length == 0 || length == power;
        }
        let counted = any(self) || any(other) || self.counted.iter().any(|noun| other.counted.contains(noun));
        self.dimensions == other.dimensions && self.currency == other.currency && counted
    }
}

/// Relation of an inequality; greater-than is reversed while reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    Less,
    LessOrEqual,
    NotEqual,
}

/// Bracket of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bracket {
    Round,
    Square,
}

/// A number or an expression. Division is a product with an inverse, so that long chains stay flat.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Expr {
    Number(Number),
    Constant(Constant),
    /// A variable or an unknown LaTeX command, with subscript and primes; also digits in another base (`1011_2`).
    Symbol(String),
    Sum(Vec<Expr>),
    Product(Vec<Expr>),
    Inverse(Box<Expr>),
    Negative(Box<Expr>),
    /// `±x`, which stands for two values; resolved while reading.
    PlusMinus(Box<Expr>),
    /// `∓x`: minus where a `±` of the same answer is plus.
    MinusPlus(Box<Expr>),
    Power(Box<Expr>, Box<Expr>),
    Percent(Box<Expr>),
    Call(Function, Vec<Expr>),
    /// Rows of a matrix within a calculation; resolved while reading.
    Matrix(Vec<Vec<Expr>>),
}

/// A numeric literal with its value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Number {
    pub(crate) value: BigRational,
    /// Whether it has a decimal point, and so may be rounded.
    pub(crate) is_decimal: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Constant {
    Pi,
    Euler,
    Imaginary,
    Infinity,
    /// The degree sign, π/180.
    Degree,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Function {
    /// `Root(x, n)`: the principal n-th root of x.
    Root,
    /// `Log(x, base)`, or `Log(x)` without a written base.
    Log,
    Ln,
    Exp,
    Sin,
    Cos,
    Tan,
    Cot,
    Sec,
    Csc,
    Arcsin,
    Arccos,
    Arctan,
    Sinh,
    Cosh,
    Tanh,
    Abs,
    Floor,
    Ceil,
    Factorial,
    /// `Binomial(n, k)`: the number of k-subsets of n things.
    Binomial,
    Gcd,
    Lcm,
    Max,
    Min,
    /// Evaluated before comparing, like the matrix that it is applied to.
    Determinant,
    /// The decimal logarithm; becomes `Log` to base ten when read.
    Lg,
    /// `cos + i sin`, into which it is expanded when read.
    Cis,
}

impl Answer {
    /// Whether this is a number with a decimal point.
    pub(crate) fn is_decimal(&self) -> bool {
        let mut expr = match self {
            Self::Scalar(expr) => expr,
            _ => return false,
        };
        while let Expr::Negative(inner) | Expr::Percent(inner) = expr {
            expr = inner;
        }
        matches!(expr, Expr::Number(number) if number.is_decimal)
    }
}

impl Function {
    /// Whether the argument is an angle, so that a degree sign in it matters.
    pub(crate) fn takes_angle(self) -> bool {
        matches!(self, Self::Sin | Self::Cos | Self::Tan | Self::Cot | Self::Sec | Self::Csc)
    }

    /// Whether it takes any number of arguments, separated by commas.
    pub(crate) fn takes_list(self) -> bool {
        matches!(self, Self::Gcd | Self::Lcm | Self::Max | Self::Min)
    }

    /// Returns the inverse function, for `\sin^{-1}`.
    pub(crate) fn inverse(self) -> Option<Self> {
        match self {
            Self::Sin => Some(Self::Arcsin),
            Self::Cos => Some(Self::Arccos),
            Self::Tan => Some(Self::Arctan),
            _ => None,
        }
    }
}

impl Number {
    pub(crate) fn exact(value: BigRational) -> Self {
        Self { value, is_decimal: false }
    }
}

impl Expr {
    pub(crate) fn integer(value: i64) -> Self {
        Self::Number(Number::exact(BigRational::from_integer(value.into())))
    }

    pub(crate) fn negative(self) -> Self {
        Self::Negative(Box::new(self))
    }

    pub(crate) fn inverse(self) -> Self {
        Self::Inverse(Box::new(self))
    }

    /// Builds the product, or returns the only factor.
    pub(crate) fn product(mut factors: Vec<Self>) -> Self {
        if factors.len() == 1 { factors.remove(0) } else { Self::Product(factors) }
    }

    /// Builds the sum, or returns the only term.
    pub(crate) fn sum(mut terms: Vec<Self>) -> Self {
        if terms.len() == 1 { terms.remove(0) } else { Self::Sum(terms) }
    }

    pub(crate) fn children(&self) -> Vec<&Self> {
        match self {
            Self::Number(_) | Self::Constant(_) | Self::Symbol(_) => Vec::new(),
            Self::Sum(items) | Self::Product(items) | Self::Call(_, items) => items.iter().collect(),
            Self::Inverse(x) | Self::Negative(x) | Self::PlusMinus(x) | Self::MinusPlus(x) | Self::Percent(x) => {
                vec![x]
            }
            Self::Power(base, exponent) => vec![base, exponent],
            Self::Matrix(rows) => rows.iter().flatten().collect(),
        }
    }

    /// Rebuilds the node with changed children.
    pub(crate) fn map(&self, change: &mut impl FnMut(&Self) -> Self) -> Self {
        let mut boxed = |x: &Self| Box::new(change(x));
        match self {
            Self::Number(_) | Self::Constant(_) | Self::Symbol(_) => self.clone(),
            Self::Inverse(x) => Self::Inverse(boxed(x)),
            Self::Negative(x) => Self::Negative(boxed(x)),
            Self::PlusMinus(x) => Self::PlusMinus(boxed(x)),
            Self::MinusPlus(x) => Self::MinusPlus(boxed(x)),
            Self::Percent(x) => Self::Percent(boxed(x)),
            Self::Power(base, exponent) => Self::Power(boxed(base), boxed(exponent)),
            Self::Sum(items) => Self::Sum(items.iter().map(change).collect()),
            Self::Product(items) => Self::Product(items.iter().map(change).collect()),
            Self::Call(function, items) => Self::Call(*function, items.iter().map(change).collect()),
            Self::Matrix(rows) => Self::Matrix(rows.iter().map(|row| row.iter().map(&mut *change).collect()).collect()),
        }
    }

    /// Calls `visit` with every node of the tree.
    pub(crate) fn walk<'a>(&'a self, visit: &mut impl FnMut(&'a Self)) {
        visit(self);
        for child in self.children() {
            child.walk(visit);
        }
    }

    /// Whether any node of the tree fulfils the condition.
    pub(crate) fn any(&self, condition: impl Fn(&Self) -> bool) -> bool {
        let mut found = false;
        self.walk(&mut |node| found |= condition(node));
        found
    }

    /// Counts the nodes of the tree.
    pub(crate) fn size(&self) -> usize {
        let mut size = 0;
        self.walk(&mut |_| size += 1);
        size
    }

    /// Returns the names of the variables, one for each occurrence.
    pub(crate) fn symbols(&self) -> Vec<&str> {
        let mut names = Vec::new();
        self.walk(&mut |node| {
            if let Self::Symbol(name) = node {
                names.push(name.as_str());
            }
        });
        names
    }

    pub(crate) fn has_symbols(&self) -> bool {
        self.any(|node| matches!(node, Self::Symbol(_)))
    }

    /// Whether the expression stands for two values.
    pub(crate) fn is_two_valued(&self) -> bool {
        self.any(|node| matches!(node, Self::PlusMinus(_) | Self::MinusPlus(_)))
    }

    /// Returns one of the two values: with `plus`, every `±` is plus and every `∓` minus; otherwise the reverse.
    pub(crate) fn with_sign(&self, plus: bool) -> Self {
        match self {
            Self::PlusMinus(x) if plus => x.with_sign(plus),
            Self::MinusPlus(x) if !plus => x.with_sign(plus),
            Self::PlusMinus(x) | Self::MinusPlus(x) => x.with_sign(plus).negative(),
            _ => self.map(&mut |child| child.with_sign(plus)),
        }
    }

    /// Replaces every occurrence of `target`.
    pub(crate) fn replaced(&self, target: &Self, by: &Self) -> Self {
        if self == target { by.clone() } else { self.map(&mut |child| child.replaced(target, by)) }
    }

    /// Changes the variables to lower case.
    pub(crate) fn lower_case(&self) -> Self {
        match self {
            Self::Symbol(name) => Self::Symbol(name.to_lowercase()),
            _ => self.map(&mut Self::lower_case),
        }
    }
}
