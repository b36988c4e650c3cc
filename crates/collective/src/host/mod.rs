//! The TCP backend, a ring: rank `r` sends to `r + 1` and receives from `r - 1`.

mod communicator;
mod group;
mod hello;
mod join;
mod link;
mod listener;
mod meeting;
mod ring;
mod socket;
mod wait;

pub use communicator::HostCollective;
pub use group::GroupConfig;
pub use listener::HostListener;
pub use meeting::{Meeting, meet};
pub use socket::{CredentialSource, Credentials};
