//! Laws of equality, on random expressions.

use pacs_types::Outcome;
use pacs_verify::{Mode, grade};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

/// A random expression that can be written in more than one way.
#[derive(Clone, Debug)]
enum Tree {
    Whole(i32),
    Decimal(i32),
    Variable(&'static str),
    Sum(Box<Tree>, Box<Tree>),
    Difference(Box<Tree>, Box<Tree>),
    Product(Box<Tree>, Box<Tree>),
    Fraction(Box<Tree>, Box<Tree>),
    Square(Box<Tree>),
    Root(Box<Tree>),
    Sine(Box<Tree>),
}

fn tree() -> impl Strategy<Value = Tree> {
    let leaf = prop_oneof![
        (-99..99).prop_map(Tree::Whole),
        (-999..999).prop_map(Tree::Decimal),
        prop::sample::select(vec!["x", "y", r"\pi"]).prop_map(Tree::Variable),
    ];
    leaf.prop_recursive(4, 24, 2, |inner| {
        let two = || (inner.clone().prop_map(Box::new), inner.clone().prop_map(Box::new));
        prop_oneof![
            two().prop_map(|(a, b)| Tree::Sum(a, b)),
            two().prop_map(|(a, b)| Tree::Difference(a, b)),
            two().prop_map(|(a, b)| Tree::Product(a, b)),
            two().prop_map(|(a, b)| Tree::Fraction(a, b)),
            inner.clone().prop_map(|a| Tree::Square(Box::new(a))),
            inner.clone().prop_map(|a| Tree::Root(Box::new(a))),
            inner.prop_map(|a| Tree::Sine(Box::new(a))),
        ]
    })
}

impl Tree {
    /// As LaTeX, in order.
    fn latex(&self) -> String {
        match self {
            Self::Whole(value) => format!("({value})"),
            Self::Decimal(value) => format!("({:.2})", f64::from(*value) / 100.0),
            Self::Variable(name) => format!("{name} "),
            Self::Sum(a, b) => format!(r"\left({} + {}\right)", a.latex(), b.latex()),
            Self::Difference(a, b) => format!(r"\left({} - {}\right)", a.latex(), b.latex()),
            Self::Product(a, b) => format!(r"{} \cdot {}", a.latex(), b.latex()),
            Self::Fraction(a, b) => format!(r"\frac{{{}}}{{{}}}", a.latex(), b.latex()),
            Self::Square(a) => format!(r"\left({}\right)^2", a.latex()),
            Self::Root(a) => format!(r"\sqrt{{{}}}", a.latex()),
            Self::Sine(a) => format!(r"\sin\left({}\right)", a.latex()),
        }
    }

    /// As plain text, with every operation reversed or expanded.
    fn otherwise(&self) -> String {
        match self {
            Self::Whole(value) => format!("({}-1)", value + 1),
            Self::Decimal(value) => format!("({value}/100)"),
            Self::Variable(name) => format!("({})", name.trim_start_matches('\\')),
            Self::Sum(a, b) => format!("({} + {})", b.otherwise(), a.otherwise()),
            Self::Difference(a, b) => format!("(-{} + {})", b.otherwise(), a.otherwise()),
            Self::Product(a, b) => format!("{}*{}", b.otherwise(), a.otherwise()),
            Self::Fraction(a, b) => format!("(({})/({}))", a.otherwise(), b.otherwise()),
            Self::Square(a) => format!("(({0})*({0}))", a.otherwise()),
            Self::Root(a) => format!("({})^(1/2)", a.otherwise()),
            Self::Sine(a) => format!("sin({})", a.otherwise()),
        }
    }
}

impl Tree {
    /// A bound on the size of the value.
    fn size(&self) -> f64 {
        match self {
            Self::Whole(value) => f64::from(value.abs()),
            Self::Decimal(value) => f64::from(value.abs()) / 100.0,
            Self::Variable(_) => 10.0,
            Self::Sum(a, b) | Self::Difference(a, b) => a.size() + b.size(),
            Self::Product(a, b) => a.size() * b.size(),
            // A quotient by a sum may have any size.
            Self::Fraction(a, b) => match **b {
                Self::Whole(_) | Self::Decimal(_) => a.size() / b.size(),
                _ => f64::INFINITY,
            },
            Self::Square(a) => a.size() * a.size(),
            Self::Root(a) => a.size().max(1.0),
            Self::Sine(a) => a.size().exp().max(1.0),
        }
    }
}

fn outcome(answer: &str, gold: &str) -> Outcome {
    grade(&format!("\\boxed{{{answer}}}"), gold, Mode::Strict).outcome
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, rng_seed: RngSeed::Fixed(1), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn equality_is_reflexive_and_survives_rewriting(tree in tree()) {
        let (latex, otherwise) = (tree.latex(), tree.otherwise());
        prop_assume!(latex.len() < 1500 && otherwise.len() < 1500);
        prop_assert_eq!(outcome(&latex, &latex), Outcome::Correct, "{}", latex);
        // Without a value (division by zero) an expression is not equal to itself, but not different either.
        prop_assert_ne!(outcome(&otherwise, &latex), Outcome::Wrong, "{} and {}", latex, otherwise);
    }

    #[test]
    fn equality_is_symmetric(a in tree(), b in tree()) {
        let (a, b) = (a.latex(), b.latex());
        prop_assume!(a.len() < 1500 && b.len() < 1500);
        prop_assert_eq!(outcome(&a, &b) == Outcome::Correct, outcome(&b, &a) == Outcome::Correct, "{} and {}", a, b);
    }

    #[test]
    fn one_more_is_another_number(tree in tree()) {
        let latex = tree.latex();
        prop_assume!(latex.len() < 1500);
        // Numbers that agree in more than 24 digits cannot be distinguished if they contain a root or a sine.
        let is_alike = outcome(&format!("{latex} + 1"), &latex) == Outcome::Correct;
        prop_assert!(!is_alike || tree.size() > 1e20, "{}", latex);
    }

    #[test]
    fn integers_are_compared_exactly(a in any::<i64>(), b in any::<i64>()) {
        prop_assert_eq!(outcome(&a.to_string(), &a.to_string()), Outcome::Correct);
        prop_assert_eq!(outcome(&a.to_string(), &b.to_string()) == Outcome::Correct, a == b);
        prop_assert_eq!(outcome(&a.to_string(), &a.wrapping_add(1).to_string()), Outcome::Wrong);
    }

    #[test]
    fn fractions_are_equal_in_any_terms(top in -999i64..999, bottom in 1i64..999, factor in 1i64..99) {
        let gold = format!("\\frac{{{top}}}{{{bottom}}}");
        for answer in [
            format!("{}/{}", top * factor, bottom * factor),
            format!("\\dfrac{{{}}}{{{}}}", top * factor, bottom * factor),
            format!("\\left({top} \\cdot \\frac{{1}}{{{bottom}}}\\right)"),
        ] {
            prop_assert_eq!(outcome(&answer, &gold), Outcome::Correct, "{} and {}", gold, answer);
        }
    }

    #[test]
    fn order_counts_in_tuples_and_not_in_sets(mut items in prop::collection::vec(-99i32..99, 2..6), turn in 1..5usize) {
        items.sort_unstable();
        items.dedup();
        prop_assume!(items.len() > 2);
        let join = |items: &[i32]| items.iter().map(i32::to_string).collect::<Vec<_>>().join(", ");
        let gold = join(&items);
        let by = turn % (items.len() - 1) + 1;
        items.rotate_left(by);
        let turned = join(&items);
        prop_assert_eq!(outcome(&format!("\\{{{turned}\\}}"), &format!("\\{{{gold}\\}}")), Outcome::Correct);
        prop_assert_eq!(outcome(&turned, &gold), Outcome::Correct);
        prop_assert_eq!(outcome(&format!("({turned})"), &format!("({gold})")), Outcome::Wrong);
    }
}
