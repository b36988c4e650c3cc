//! The update is exact: it does not depend on ranks, passes, what is divided among ranks, or where a group's members sit,
//! and equals autograd.

mod bits;
mod device;
mod divisions;
mod support;
mod update;
