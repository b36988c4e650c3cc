//! Models and data sets of the Hugging Face hub, through its cache on this machine.
//!
//! [`Hub`] speaks the hub's HTTP interface: which files a revision has, the files themselves, and, in [`push`], the way back. What it
//! brings lies in the cache that other programs of the hub use, in the same layout, so nothing is fetched twice. [`Resolver`] turns
//! the names of a job into paths of that cache, once, where a run is started; [`Pins`] remember in the run folder which commits those
//! were. Workers never come here for more than [`snapshot_here`], which looks at their own disk.
//!
//! Every wait has a deadline ([`Patience`]), every file is compared with the size and the digest that the hub gives for it, and a download
//! that breaks off is continued where it was. There is no background work, and no file of a repository is ever executed.
#![forbid(unsafe_code)]

mod api;
mod cache;
mod digest;
mod error;
mod fetch;
mod http;
mod meter;
mod pins;
mod push;
mod resolve;
mod select;
mod settings;

pub use api::{Entry, Listing};
pub use cache::snapshot_here;
pub use digest::Digest;
pub use error::{HubError, Missing};
pub use fetch::Progress;
pub use meter::Meter;
pub use pins::Pins;
pub use push::{PushOptions, Pushed, push};
pub use resolve::{Hub, Part, Resolver, Unresolved, resolve_job, resolve_sources};
pub use settings::{Patience, Settings, Token};
