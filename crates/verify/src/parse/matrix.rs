//! Matrix calculations, carried out while reading, so that only plain matrices and scalars are compared.

use super::ParseError;
use crate::answer::{Answer, Expr, Function, Number};
use crate::exact::exact;
use crate::limits::{Budget, MAX_ORDER};

type Rows = Vec<Vec<Expr>>;

enum Value {
    Scalar(Expr),
    Matrix(Rows),
}

/// Evaluates an expression with matrices.
pub(super) fn reduce(expr: Expr, budget: &mut Budget) -> Result<Answer, ParseError> {
    match expr {
        // A plain matrix may be larger than those that are calculated with.
        Expr::Matrix(rows) => Ok(Answer::Matrix(rows)),
        expr => match value(&expr, budget)? {
            Value::Scalar(expr) => Ok(Answer::Scalar(expr)),
            Value::Matrix(rows) => Ok(Answer::Matrix(rows)),
        },
    }
}

/// Whether an expression contains a matrix.
pub(super) fn has_matrix(expr: &Expr) -> bool {
    expr.any(|node| matches!(node, Expr::Matrix(_)))
}

fn value(expr: &Expr, budget: &mut Budget) -> Result<Value, ParseError> {
    budget.step().ok_or(ParseError::TooComplex)?;
    if !has_matrix(expr) {
        return Ok(Value::Scalar(expr.clone()));
    }
    match expr {
        Expr::Matrix(rows) => {
            let columns = rows[0].len();
            let fits = rows.len() <= MAX_ORDER && columns <= MAX_ORDER && rows.iter().all(|row| row.len() == columns);
            if fits {
                Ok(Value::Matrix(rows.clone()))
            } else {
                Err(ParseError::Syntax("a matrix that is no rectangle"))
            }
        }
        Expr::Sum(terms) => fold(terms, add, budget),
        Expr::Product(factors) => fold(factors, multiply, budget),
        Expr::Negative(x) => multiply(Value::Scalar(Expr::integer(-1)), value(x, budget)?, budget),
        Expr::Power(base, exponent) => match value(base, budget)? {
            Value::Matrix(rows) => power(rows, exponent, budget),
            Value::Scalar(base) => Ok(Value::Scalar(Expr::Power(Box::new(base), exponent.clone()))),
        },
        Expr::Call(Function::Determinant | Function::Abs, arguments) => match value(&arguments[0], budget)? {
            Value::Matrix(rows) => determinant(&rows, budget).map(Value::Scalar),
            Value::Scalar(_) => Err(unsupported()),
        },
        Expr::Inverse(x) => match value(x, budget)? {
            Value::Scalar(x) => Ok(Value::Scalar(x.inverse())),
            Value::Matrix(_) => Err(unsupported()),
        },
        _ => Err(unsupported()),
    }
}

fn unsupported() -> ParseError {
    ParseError::Syntax("an operation that matrices do not have")
}

fn fold(
    items: &[Expr],
    join: fn(Value, Value, &mut Budget) -> Result<Value, ParseError>,
    budget: &mut Budget,
) -> Result<Value, ParseError> {
    let mut items = items.iter();
    let mut all = value(items.next().ok_or(ParseError::Empty)?, budget)?;
    for item in items {
        let item = value(item, budget)?;
        all = join(all, item, budget)?;
    }
    Ok(all)
}

fn add(left: Value, right: Value, budget: &mut Budget) -> Result<Value, ParseError> {
    match (left, right) {
        (Value::Matrix(a), Value::Matrix(b)) if a.len() == b.len() && a[0].len() == b[0].len() => {
            let mut add_cells = |(x, y): (Expr, Expr)| simplified(Expr::Sum(vec![x, y]), budget);
            let mut rows = Vec::with_capacity(a.len());
            for (a, b) in a.into_iter().zip(b) {
                rows.push(a.into_iter().zip(b).map(&mut add_cells).collect::<Result<_, _>>()?);
            }
            Ok(Value::Matrix(rows))
        }
        (Value::Scalar(a), Value::Scalar(b)) => Ok(Value::Scalar(Expr::Sum(vec![a, b]))),
        _ => Err(unsupported()),
    }
}

fn multiply(left: Value, right: Value, budget: &mut Budget) -> Result<Value, ParseError> {
    match (left, right) {
        (Value::Scalar(a), Value::Scalar(b)) => Ok(Value::Scalar(Expr::Product(vec![a, b]))),
        (Value::Scalar(factor), Value::Matrix(rows)) | (Value::Matrix(rows), Value::Scalar(factor)) => {
            let mut cell = |x: Expr| simplified(Expr::Product(vec![factor.clone(), x]), budget);
            let rows = rows.into_iter().map(|row| row.into_iter().map(&mut cell).collect::<Result<_, _>>());
            rows.collect::<Result<_, _>>().map(Value::Matrix)
        }
        (Value::Matrix(a), Value::Matrix(b)) => matrix_product(&a, &b, budget).map(Value::Matrix),
    }
}

fn matrix_product(a: &Rows, b: &Rows, budget: &mut Budget) -> Result<Rows, ParseError> {
    if a[0].len() != b.len() {
        return Err(unsupported());
    }
    let mut rows = Vec::with_capacity(a.len());
    for row in a {
        let mut cells = Vec::with_capacity(b[0].len());
        for column in 0..b[0].len() {
            let products = row.iter().zip(b).map(|(x, other)| Expr::Product(vec![x.clone(), other[column].clone()]));
            cells.push(simplified(Expr::sum(products.collect()), budget)?);
        }
        rows.push(cells);
    }
    Ok(rows)
}

fn power(rows: Rows, exponent: &Expr, budget: &mut Budget) -> Result<Value, ParseError> {
    /// Largest exponent of a matrix power.
    const MAX_POWER: i64 = 64;
    if matches!(exponent, Expr::Symbol(name) if matches!(name.as_str(), "T" | "top" | "intercal")) {
        let transposed = (0..rows[0].len()).map(|column| rows.iter().map(|row| row[column].clone()).collect());
        return Ok(Value::Matrix(transposed.collect()));
    }
    let whole =
        exact(exponent, budget).filter(|value| value.is_integer()).and_then(|value| value.numer().try_into().ok());
    match whole {
        Some(-1) => inverse(&rows, budget).map(Value::Matrix),
        Some(times @ 1..=MAX_POWER) => {
            let mut product = rows.clone();
            for _ in 1..times {
                product = matrix_product(&product, &rows, budget)?;
            }
            Ok(Value::Matrix(product))
        }
        _ => Err(unsupported()),
    }
}

/// Determinant by cofactors, up to order four.
fn determinant(rows: &Rows, budget: &mut Budget) -> Result<Expr, ParseError> {
    if rows.len() != rows[0].len() || rows.len() > 4 {
        return Err(unsupported());
    }
    if let [row] = rows.as_slice() {
        return Ok(row[0].clone());
    }
    let mut terms = Vec::with_capacity(rows.len());
    for column in 0..rows.len() {
        let cofactor = cofactor(rows, 0, column, budget)?;
        terms.push(Expr::Product(vec![rows[0][column].clone(), cofactor]));
    }
    simplified(Expr::Sum(terms), budget)
}

fn cofactor(rows: &Rows, row: usize, column: usize, budget: &mut Budget) -> Result<Expr, ParseError> {
    let without = |cells: &Vec<Expr>| {
        cells.iter().enumerate().filter(|(at, _)| *at != column).map(|(_, cell)| cell.clone()).collect::<Vec<_>>()
    };
    let minor: Rows = rows.iter().enumerate().filter(|(at, _)| *at != row).map(|(_, cells)| without(cells)).collect();
    let minor = determinant(&minor, budget)?;
    Ok(if (row + column).is_multiple_of(2) { minor } else { minor.negative() })
}

fn inverse(rows: &Rows, budget: &mut Budget) -> Result<Rows, ParseError> {
    let scale = determinant(rows, budget)?.inverse();
    if let [row] = rows.as_slice() {
        return Ok(vec![vec![row[0].clone().inverse()]]);
    }
    let mut inverted = Vec::with_capacity(rows.len());
    for row in 0..rows.len() {
        let mut cells = Vec::with_capacity(rows.len());
        for column in 0..rows.len() {
            // Transposed.
            let cofactor = cofactor(rows, column, row, budget)?;
            cells.push(simplified(Expr::Product(vec![scale.clone(), cofactor]), budget)?);
        }
        inverted.push(cells);
    }
    Ok(inverted)
}

/// Replaces a cell by its number if it is one; otherwise the cells of long products would grow without bound.
fn simplified(cell: Expr, budget: &mut Budget) -> Result<Expr, ParseError> {
    let cell = exact(&cell, budget).map_or(cell, |value| Expr::Number(Number::exact(value)));
    budget.spend(4 * cell.size()).ok_or(ParseError::TooComplex)?;
    Ok(cell)
}
