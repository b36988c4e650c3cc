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
    /// `{1, 2}` with set braces: the order does not count. Empty for `∅`.
    Set(Vec<Answer>),
    /// Several answers without brackets: the order does not count, unless a tuple stands on the other side.
    List(Vec<Answer>),
    /// Pieces joined by `∪`.
    Union(Vec<Answer>),
    /// Pieces joined by `∩`.
    Intersection(Vec<Answer>),
    /// `A \ B`.
    Difference(Box<Answer>, Box<Answer>),
    /// The real numbers.
    Reals,
    /// Rows of a matrix or vector.
    Matrix(Vec<Vec<Expr>>),
    /// `left = right`.
    Equation(Box<Answer>, Box<Answer>),
    /// `left op right`.
    Inequality(Order, Expr, Expr),
    /// Tokens that could not be read; they only ever stand beside an `=`.
    Opaque(String),
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
    /// A variable or an unknown LaTeX command, subscript and primes included; also a number in another base (`1011_2`).
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
    /// Rows of a matrix within a calculation; resolved while reading.
    Matrix(Vec<Vec<Expr>>),
}

/// A literal.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Number {
    pub(crate) value: BigRational,
    /// Whether it was written with a decimal point and so may be a rounded value.
    pub(crate) is_decimal: bool,
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
    /// `Binomial(n, k)`.
    Binomial,
    Gcd,
    Lcm,
    Max,
    Min,
    /// Resolved while reading, like the matrix that it is applied to.
    Determinant,
}

impl Answer {
    /// Whether this is a number written with a decimal point.
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

    /// Whether it takes any number of arguments, with commas between them.
    pub(crate) fn takes_list(self) -> bool {
        matches!(self, Self::Gcd | Self::Lcm | Self::Max | Self::Min)
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

    /// The product, or the factor itself when there is but one.
    pub(crate) fn product(mut factors: Vec<Self>) -> Self {
        if factors.len() == 1 { factors.remove(0) } else { Self::Product(factors) }
    }

    /// The sum, or the term itself when there is but one.
    pub(crate) fn sum(mut terms: Vec<Self>) -> Self {
        if terms.len() == 1 { terms.remove(0) } else { Self::Sum(terms) }
    }

    /// Whether this stands before an `=` to name what follows: `x`, `f(2)`, `|AB|`, `\frac{m}{n}`.
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

    fn children(&self) -> Vec<&Self> {
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

    /// The same node over other children.
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

    /// Calls `visit` with every node.
    pub(crate) fn walk<'a>(&'a self, visit: &mut impl FnMut(&'a Self)) {
        visit(self);
        for child in self.children() {
            child.walk(visit);
        }
    }

    /// Whether a node fulfils the condition.
    pub(crate) fn any(&self, condition: impl Fn(&Self) -> bool) -> bool {
        let mut found = false;
        self.walk(&mut |node| found |= condition(node));
        found
    }

    /// Number of nodes.
    pub(crate) fn size(&self) -> usize {
        let mut size = 0;
        self.walk(&mut |_| size += 1);
        size
    }

    /// Names of the variables, repeated as often as they occur.
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

    /// One of the two values: every `±` as plus (and `∓` as minus), or the other way round.
    pub(crate) fn with_sign(&self, plus: bool) -> Self {
        match self {
            Self::PlusMinus(x) if plus => x.with_sign(plus),
            Self::MinusPlus(x) if !plus => x.with_sign(plus),
            Self::PlusMinus(x) | Self::MinusPlus(x) => x.with_sign(plus).negative(),
            _ => self.map(&mut |child| child.with_sign(plus)),
        }
    }

    /// The expression with every `target` replaced.
    pub(crate) fn replaced(&self, target: &Self, by: &Self) -> Self {
        if self == target { by.clone() } else { self.map(&mut |child| child.replaced(target, by)) }
    }

    /// The expression with its variables in lower case.
    pub(crate) fn lower_case(&self) -> Self {
        match self {
            Self::Symbol(name) => Self::Symbol(name.to_lowercase()),
            _ => self.map(&mut Self::lower_case),
        }
    }
}
