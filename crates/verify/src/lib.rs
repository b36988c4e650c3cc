//! Grades mathematical answers: finds the final answer in a response, parses it, and compares it with the reference.
//!
//! Start at [`grade`]. The modules are in the order of a response's path:
//!
//! 1. `extract` finds the text of the answer (a box, a final-answer phrase, or the last expression);
//! 2. `parse` reads that text, LaTeX or plain, into an [`Answer`](answer::Answer) tree;
//! 3. `compare` decides whether two trees mean the same: by structure, in exact rationals, modulo a prime, then
//!    numerically with error bounds;
//! 4. `form` decides whether an equal answer has been worked out as far as the reference.
//!
//! This is not a computer algebra system. Expressions with variables are compared at fixed points, not proved
//! equal. Answers that are not mathematics have rules of their own: `text` (equal to the reference) and
//! `countdown` (an expression of given numbers). `code` reads the cases of programs and compares what they wrote; it runs none. Nothing here reads a clock or random numbers: work is bounded by
//! counted steps (see `limits`), so the same pair of strings gets the same verdict on every machine. The
//! conventions are in `docs/VERIFIERS.md`.
#![forbid(unsafe_code)]

mod answer;
mod code;
mod compare;
mod countdown;
mod exact;
mod extract;
mod form;
mod gold;
mod grade;
mod limits;
mod parse;
mod reading;
mod render;
mod text;

pub use code::{Program, Suite, SuiteCase, check_suite, extract_program, same_output, same_value};
pub use countdown::{check_countdown, grade_countdown, solve_countdown};
pub use gold::{GoldCheck, GoldError, Leniency, check_gold, inspect_gold};
pub use grade::{Form, MAX_GRADE_STEPS, Mode, Rules, grade, grade_counted};
pub use text::grade_text;
