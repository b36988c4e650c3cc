//! What an answer is once it has been read.

use num_rational::BigRational;

/// A final answer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Answer {
    /// A number or an expression.
    Scalar(Expr),
    /// Words, such as `even` or a name.
    Text(String),
    /// A tuple, a point or an interval: the order counts.
    Sequence {
        /// Left bracket.
        open: Bracket,
        /// Right bracket.
        close: Bracket,
        /// Members.
        items: Vec<Answer>,
    },
    /// `{1, 2}` with set braces: the order does not count.
    Set(Vec<Answer>),
    /// Several answers without brackets: the order does not count, unless a tuple stands on the other side.
    List(Vec<Answer>),
    /// Pieces joined by `∪`.
    Union(Vec<Answer>),
    /// Rows of a matrix or vector.
    Matrix(Vec<Vec<Expr>>),
    /// `left = right`.
    Equation(Box<Answer>, Box<Answer>),
    /// `left op right`.
    Inequality(Order, Expr, Expr),
    /// Something that could not be read; it only ever stands beside an `=`.
    Opaque,
}

/// Relation of an inequality; greater-than is turned around while reading.
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
    /// A variable or an unknown LaTeX command, subscript and primes included.
    Symbol(String),
    Sum(Vec<Expr>),
    Product(Vec<Expr>),
    Inverse(Box<Expr>),
    Negative(Box<Expr>),
    /// `±x`: stands for two values; resolved while reading.
    PlusMinus(Box<Expr>),
    /// `∓x`.
    MinusPlus(Box<Expr>),
    Power(Box<Expr>, Box<Expr>),
    Percent(Box<Expr>),
    Call(Function, Vec<Expr>),
}

/// A literal.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Number {
    pub(crate) value: BigRational,
    /// Digits after the point, when it was written with one.
    pub(crate) decimals: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Constant {
    Pi,
    Euler,
    Imaginary,
    Infinity,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Function {
    /// `Root(x, n)`.
    Root,
    /// `Log(x, base)`.
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
    /// `Binomial(n, k)`.
    Binomial,
}

impl Answer {
    /// Whether this is what stands before an `=` to name what follows: `x`, `f(2)`, `(x, y)`, `|AB|`, `S_1 : S`.
    pub(crate) fn is_name(&self) -> bool {
        match self {
            Self::Scalar(expr) => expr.is_name(),
            Self::Text(_) => true,
            Self::Sequence { items, .. } | Self::List(items) | Self::Set(items) => items.iter().all(Self::is_name),
            _ => false,
        }
    }
}

impl Function {
    /// Whether degree signs in the argument mean angles.
    pub(crate) fn takes_angle(self) -> bool {
        matches!(self, Self::Sin | Self::Cos | Self::Tan | Self::Cot | Self::Sec | Self::Csc)
    }

    /// The inverse function, for `\sin^{-1}`.
    pub(crate) fn inverse(self) -> Option<Self> {
        match self {
            Self::Sin => Some(Self::Arcsin),
            Self::Cos => Some(Self::Arccos),
            Self::Tan => Some(Self::Arctan),
            _ => None,
        }
    }
}

impl Expr {
    pub(crate) fn integer(value: i64) -> Self {
        Self::Number(Number { value: BigRational::from_integer(value.into()), decimals: None })
    }

    fn is_name(&self) -> bool {
        match self {
            Self::Symbol(_) | Self::Constant(Constant::Euler | Constant::Imaginary) => true,
            Self::Inverse(x) => x.is_name(),
            Self::Call(Function::Abs, arguments) => arguments.iter().all(Self::is_name),
            // A symbol before a bracket may be a function, so what follows it may be anything.
            Self::Product(factors) => factors.first().is_some_and(Self::is_name),
            _ => false,
        }
    }

    /// Calls `visit` with every node.
    pub(crate) fn walk<'a>(&'a self, visit: &mut impl FnMut(&'a Self)) {
        visit(self);
        match self {
            Self::Number(_) | Self::Constant(_) | Self::Symbol(_) => {}
            Self::Sum(items) | Self::Product(items) | Self::Call(_, items) => {
                items.iter().for_each(|item| item.walk(visit));
            }
            Self::Inverse(x) | Self::Negative(x) | Self::PlusMinus(x) | Self::MinusPlus(x) | Self::Percent(x) => {
                x.walk(visit);
            }
            Self::Power(base, exponent) => {
                base.walk(visit);
                exponent.walk(visit);
            }
        }
    }

    /// Names of the variables.
    pub(crate) fn symbols(&self) -> Vec<&str> {
        let mut names = Vec::new();
        self.walk(&mut |node| {
            if let Self::Symbol(name) = node {
                names.push(name.as_str());
            }
        });
        names
    }

    /// Whether the expression stands for two values.
    pub(crate) fn is_two_valued(&self) -> bool {
        let mut found = false;
        self.walk(&mut |node| found |= matches!(node, Self::PlusMinus(_) | Self::MinusPlus(_)));
        found
    }

    /// One of the two values: every `±` as plus (and `∓` as minus), or the other way round.
    pub(crate) fn with_sign(&self, plus: bool) -> Self {
        let each = |items: &[Self]| items.iter().map(|item| item.with_sign(plus)).collect();
        let signed = |x: &Self, plus_here: bool| {
            let x = x.with_sign(plus);
            if plus_here { x } else { Self::Negative(Box::new(x)) }
        };
        match self {
            Self::Number(_) | Self::Constant(_) | Self::Symbol(_) => self.clone(),
            Self::Sum(items) => Self::Sum(each(items)),
            Self::Product(items) => Self::Product(each(items)),
            Self::Call(function, items) => Self::Call(*function, each(items)),
            Self::Inverse(x) => Self::Inverse(Box::new(x.with_sign(plus))),
            Self::Negative(x) => Self::Negative(Box::new(x.with_sign(plus))),
            Self::Percent(x) => Self::Percent(Box::new(x.with_sign(plus))),
            Self::PlusMinus(x) => signed(x, plus),
            Self::MinusPlus(x) => signed(x, !plus),
            Self::Power(base, exponent) => {
                Self::Power(Box::new(base.with_sign(plus)), Box::new(exponent.with_sign(plus)))
            }
        }
    }
}
