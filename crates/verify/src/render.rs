//! One-line rendering of parsed answers, for the reason of a verdict.

use crate::answer::{Answer, Bracket, Constant, Expr, Function, Joint, Order};

/// Longest rendering of one side (characters).
const LONGEST: usize = 80;

/// Renders an answer: its kind and its content.
pub(crate) fn reading(answer: &Answer) -> String {
    let mut out = Writer { text: String::new() };
    out.kind(answer);
    out.answer(answer);
    if out.is_full() {
        let end = out.text.char_indices().nth(LONGEST).map_or(out.text.len(), |(at, _)| at);
        out.text.truncate(end);
        out.text.push('…');
    }
    out.text
}

struct Writer {
    text: String,
}

impl Writer {
    fn is_full(&self) -> bool {
        self.text.len() > LONGEST
    }

    fn push(&mut self, text: &str) {
        if !self.is_full() {
            self.text.push_str(text);
        }
    }

    fn kind(&mut self, answer: &Answer) {
        let kind = match answer {
            Answer::Scalar(Expr::Number(_)) => "number ",
            Answer::Scalar(Expr::Negative(inner)) if matches!(**inner, Expr::Number(_)) => "number ",
            Answer::Scalar(_) => "expression ",
            Answer::Text(_) => "words ",
            Answer::Sequence { open: Bracket::Round, close: Bracket::Round, items } if items.len() != 2 => "tuple ",
            Answer::Sequence { open: Bracket::Round, close: Bracket::Round, .. } => "pair ",
            Answer::Sequence { .. } => "interval ",
            Answer::Set(_) => "set ",
            Answer::List(_, Joint::Or) => "alternatives ",
            Answer::List(..) => "list ",
            Answer::Union(_) | Answer::Intersection(_) | Answer::Difference(..) => "set ",
            Answer::Reals | Answer::Domain(_) => "set ",
            Answer::Member(..) => "condition ",
            Answer::Matrix(_) => "matrix ",
            Answer::Equation { names: true, .. } => "value ",
            Answer::Equation { .. } | Answer::Equalities { .. } => "equation ",
            Answer::Inequality(..) | Answer::Chain(..) => "inequality ",
            Answer::Ratio(_) => "ratio ",
            Answer::Clock(_) => "time ",
            Answer::Quantity(..) => "quantity ",
            Answer::Choice(..) => "choice ",
            Answer::Cases(_) => "cases ",
            Answer::For(..) => "",
            Answer::Opaque(_) => "something unread ",
        };
        self.push(kind);
    }

    fn joined<T>(&mut self, items: &[T], between: &str, mut write: impl FnMut(&mut Self, &T)) {
        for (at, item) in items.iter().enumerate() {
            if self.is_full() {
                return;
            }
            if at > 0 {
                self.push(between);
            }
            write(self, item);
        }
    }

    fn answer(&mut self, answer: &Answer) {
        if self.is_full() {
            return;
        }
        match answer {
            Answer::Scalar(expr) => self.expr(expr, 0),
            Answer::Text(words) => self.push(&format!("{words:?}")),
            Answer::Sequence { open, close, items } => {
                self.push(if *open == Bracket::Round { "(" } else { "[" });
                self.joined(items, ", ", |out, item| out.answer(item));
                self.push(if *close == Bracket::Round { ")" } else { "]" });
            }
            Answer::Set(items) => {
                self.push("{");
                self.joined(items, ", ", |out, item| out.answer(item));
                self.push("}");
            }
            Answer::List(items, joint) => {
                let between = match joint {
                    Joint::Comma => ", ",
                    Joint::And => " and ",
                    Joint::Or => " or ",
                };
                self.joined(items, between, |out, item| out.answer(item));
            }
            Answer::Union(items) => self.joined(items, " ∪ ", |out, item| out.answer(item)),
            Answer::Intersection(items) => self.joined(items, " ∩ ", |out, item| out.answer(item)),
            Answer::Difference(set, without) => {
                self.answer(set);
                self.push(" \\ ");
                self.answer(without);
            }
            Answer::Reals => self.push("ℝ"),
            Answer::Domain(domain) => self.push(domain),
            Answer::Member(inner, domain) => {
                self.answer(inner);
                self.push(" ∈ ");
                self.push(domain);
            }
            Answer::Matrix(rows) => {
                self.joined(rows, "; ", |out, row| out.joined(row, ", ", |out, cell| out.expr(cell, 0)))
            }
            Answer::Equation { left, right, .. } => {
                self.answer(left);
                self.push(" = ");
                self.answer(right);
            }
            Answer::Equalities { sides, .. } => self.joined(sides, " = ", |out, side| out.answer(side)),
            Answer::Inequality(order, left, right) => {
                self.expr(left, 0);
                self.push(sign(*order));
                self.expr(right, 0);
            }
            Answer::Chain(sides, orders) => {
                for (at, side) in sides.iter().enumerate() {
                    self.expr(side, 0);
                    self.push(orders.get(at).map_or("", |order| sign(*order)));
                }
            }
            Answer::Ratio(parts) => self.joined(parts, ":", |out, part| out.expr(part, 1)),
            Answer::Clock(clock) => {
                let half = clock.after_noon.map_or("", |after_noon| if after_noon { " pm" } else { " am" });
                self.push(&format!("{}:{:02}:{:02}{half}", clock.hour, clock.minute, clock.second));
            }
            Answer::Quantity(inner, unit) => {
                self.answer(inner);
                self.push(" ");
                self.push(&unit.written);
            }
            Answer::Choice(letter, inner) => {
                self.push(&format!("{letter} with "));
                self.answer(inner);
            }
            Answer::Cases(cases) => self.joined(cases, "; ", |out, (value, condition)| {
                out.answer(value);
                out.push(" if ");
                out.answer(condition);
            }),
            Answer::For(inner, _) => self.answer(inner),
            Answer::Opaque(_) => self.push("…"),
        }
    }

    /// Renders an expression. `binding` is the precedence of its surroundings: 1 within a sum, 2 within a product, 3
    /// within a power.
    fn expr(&mut self, expr: &Expr, binding: u8) {
        if self.is_full() {
            return;
        }
        let own = match expr {
            Expr::Sum(_) | Expr::Negative(_) | Expr::PlusMinus(_) | Expr::MinusPlus(_) => 1,
            Expr::Product(_) | Expr::Inverse(_) => 2,
            Expr::Number(number) if !number.value.is_integer() => 2,
            _ => 4,
        };
        let brackets = own <= binding && binding > 1 || own < binding;
        self.push(if brackets { "(" } else { "" });
        match expr {
            Expr::Number(number) => {
                let long = number.value.numer().bits() + number.value.denom().bits() > 512;
                self.push(&if long { "a long number".to_owned() } else { number.value.to_string() });
            }
            Expr::Constant(constant) => self.push(match constant {
                Constant::Pi => "π",
                Constant::Euler => "e",
                Constant::Imaginary => "i",
                Constant::Infinity => "∞",
                Constant::Degree => "°",
            }),
            Expr::Symbol(name) => self.push(name),
            Expr::Sum(terms) => {
                for (at, term) in terms.iter().enumerate() {
                    match term {
                        Expr::Negative(inner) => {
                            self.push(if at > 0 { " - " } else { "-" });
                            self.expr(inner, 2);
                        }
                        _ => {
                            self.push(if at > 0 { " + " } else { "" });
                            self.expr(term, 1);
                        }
                    }
                }
            }
            Expr::Product(factors) => {
                for (at, factor) in factors.iter().enumerate() {
                    match factor {
                        Expr::Inverse(inner) => {
                            self.push(if at > 0 { "/" } else { "1/" });
                            self.expr(inner, 2);
                        }
                        _ => {
                            self.push(if at > 0 { "·" } else { "" });
                            self.expr(factor, 2);
                        }
                    }
                }
            }
            Expr::Inverse(inner) => {
                self.push("1/");
                self.expr(inner, 2);
            }
            Expr::Negative(inner) | Expr::PlusMinus(inner) | Expr::MinusPlus(inner) => {
                self.push(match expr {
                    Expr::Negative(_) => "-",
                    Expr::PlusMinus(_) => "±",
                    _ => "∓",
                });
                let is_number = matches!(**inner, Expr::Number(_));
                self.expr(inner, if is_number { 0 } else { 2 });
            }
            Expr::Power(base, exponent) => {
                self.expr(base, 3);
                self.push("^");
                self.expr(exponent, 3);
            }
            Expr::Percent(inner) => {
                self.expr(inner, 3);
                self.push("%");
            }
            Expr::Call(function, arguments) => {
                self.push(&name(*function));
                self.push("(");
                self.joined(arguments, ", ", |out, argument| out.expr(argument, 0));
                self.push(")");
            }
            Expr::Matrix(rows) => {
                self.push("[");
                self.joined(rows, "; ", |out, row| out.joined(row, ", ", |out, cell| out.expr(cell, 0)));
                self.push("]");
            }
        }
        self.push(if brackets { ")" } else { "" });
    }
}

fn sign(order: Order) -> &'static str {
    match order {
        Order::Less => " < ",
        Order::LessOrEqual => " ≤ ",
        Order::NotEqual => " ≠ ",
    }
}

fn name(function: Function) -> String {
    format!("{function:?}").to_lowercase()
}
