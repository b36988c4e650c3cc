//! Programs: the cases that a reference names, the program in a response, and whether an output is the expected one.
//!
//! Nothing is run here. Who runs programs gives them the inputs alone; what comes out is compared with what is expected where no
//! program can reach it.

mod compare;
mod extract;
mod suite;

pub use compare::{same_output, same_value};
pub use extract::{Program, extract_program};
pub use suite::{Suite, SuiteCase, check_suite};
