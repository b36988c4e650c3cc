//! Distributes a published weight version to every host once, and to the processes of a host as one copy.
//!
//! A version has a [`Description`]: its identity, and a digest of each of its pieces. The [`HostStore`] is a folder in
//! shared memory in which the processes of a run on one host keep versions; they map the files instead of copying them.
//! [`fetch`] brings a missing version from the [`DataServer`] of a learner or of another host that has it, piece by
//! piece, and each piece is relayed as soon as its digest is verified. [`Distribution`] assigns the sources. With a
//! [`GroupTransport`], hosts first take part in a broadcast, and fetch what it did not bring.
//!
//! Not here: tensors (callers map the file), and the calls that announce a version (`RolloutService`).
#![forbid(unsafe_code)]

mod broadcast;
mod data_protocol;
mod description;
mod distribution;
mod fetch;
mod probe;
mod receive;
mod rounds;
mod server;
mod shelf;
mod store;

pub use broadcast::{Channel, GROUP_TIMEOUT, Group, GroupTransport, Seat};
pub use description::{Adapted, Announcement, BaseDigest, Description, Digest, VersionId, WeightKind, is_address};
pub use distribution::{Distribution, FAN_OUT};
pub use fetch::{FetchError, FetchOptions, Fetched, Source, SourceFinder, fetch};
pub use probe::Probe;
pub use receive::{ReceiveError, Received, Receiver, Transport};
pub use server::{DataServer, ServerOptions};
pub use shelf::Shelf;
pub use store::{Claim, HostStore, Part, StoreError, Whole};
