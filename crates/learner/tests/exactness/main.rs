//! The update is exact: it equals autograd, and does not depend on ranks, passes, sharding, or where a
//! group's members are.

mod bits;
mod device;
mod divisions;
mod lora;
mod probe;
mod routes;
mod signals;
mod support;
mod update;
