//! The dashboard: a web page over one or several runs, and the JSON that it reads.
//!
//! A [`Server`] listens on loopback, serves the files of `assets/` to everybody and data to holders of a
//! [token](Key::token). It reads runs through a [`Source`] only, whose calls are those of `ObserveService`: the
//! coordinator gives its own view, `pacs dashboard` a connection or a run folder. Nothing here changes a run.
//!
//! The page is written by hand, without a build step: `assets/*.js` are modules that the browser loads as they are.
//! Start with [`Server::bind`]; [`json`] has the form of each answer, which `pacs watch` and `pacs report` share.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a panic is how a test fails"))]

mod answers;
mod assets;
mod door;
pub mod json;
mod key;
mod lanes;
mod pieces;
mod server;
mod source;

pub use key::{Key, KeyError, TOKEN_HOURS};
pub use server::{Run, Server, ServerError};
pub use source::{Answer, Source, SourceError};
