//! Broadcasts a weight version over a communicator of learner and rollout workers.
//!
//! [`CollectiveTransport`] implements the [`GroupTransport`] of `pacs-weights`, which gathers the members, verifies
//! every piece, and fetches what a broadcast has not brought. A group is a communicator of [`pacs_collective`] that
//! lives for one version: over its TCP ring, or over NCCL, where pieces pass through device memory on their way from
//! host to host.
//!
//! The choice of the transport is not here: it is an argument of both roles.
#![forbid(unsafe_code)]

use std::fmt::Display;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use pacs_collective::{
    AbortHandle, Collective, Credentials, CudaDevice, DeviceError, DeviceMemory, GroupConfig, HostCollective,
    HostListener, NcclCollective,
};
use pacs_runtime::net::{PeerRole, Security, check_role};
use pacs_types::Generation;
use pacs_weights::{Channel, GROUP_TIMEOUT, Group, GroupTransport, Seat};
use rustls::pki_types::{CertificateDer, ServerName};

/// Transport of the pieces.
#[derive(Clone, Debug)]
enum Backend {
    Host,
    Nccl(CudaDevice),
    /// The ring through a device that is emulated in host memory, for tests.
    Emulated,
}

/// Broadcasts weights over a communicator.
#[derive(Clone, Debug)]
pub struct CollectiveTransport {
    backend: Backend,
    /// Address of this machine for its peers; ports are chosen freely.
    bind: String,
    security: Security,
}

impl CollectiveTransport {
    /// Broadcasts over a ring of TCP connections, which are mutual TLS where `security` has certificates.
    #[must_use]
    pub fn host(bind: impl Into<String>, security: Security) -> Self {
        Self { backend: Backend::Host, bind: bind.into(), security }
    }

    /// Like [`CollectiveTransport::nccl`], with the ring in place of NCCL and an emulated
    /// device, for tests of that path.
    #[must_use]
    pub fn emulated(bind: impl Into<String>) -> Self {
        Self { backend: Backend::Emulated, bind: bind.into(), security: Security::Plain }
    }

    /// Broadcasts over NCCL through the memory of the visible device `index`. NCCL's own connections are not protected.
    ///
    /// # Errors
    /// When CUDA or NCCL is missing; the error names it and the remedy.
    pub fn nccl(bind: impl Into<String>, security: Security, index: usize) -> Result<Self, DeviceError> {
        Ok(Self { backend: Backend::Nccl(CudaDevice::open(index)?), bind: bind.into(), security })
    }
}

impl GroupTransport for CollectiveTransport {
    fn name(&self) -> &'static str {
        match self.backend {
            Backend::Host => "host",
            Backend::Nccl(_) => "nccl",
            Backend::Emulated => "emulated",
        }
    }

    fn listen(&self) -> io::Result<Box<dyn Seat>> {
        // A free port, because the groups of two versions may overlap.
        let listener = HostListener::bind(&format!("{}:0", self.bind))
            .map_err(|error| io::Error::other(format!("{error}: {}", error.source)))?;
        self.security.check_listen(listener.address()).map_err(io::Error::other)?;
        Ok(Box::new(Listening { transport: self.clone(), listener }))
    }
}

struct Listening {
    transport: CollectiveTransport,
    listener: HostListener,
}

impl Seat for Listening {
    fn address(&self) -> String {
        self.listener.address().to_string()
    }

    fn enter(self: Box<Self>, group: &Group) -> Result<Box<dyn Channel>, String> {
        let Self { transport, listener } = *self;
        // Checked by every member and not by the learner alone: the addresses are what other members report.
        check_addresses(&transport.security, &group.addresses)?;
        let listener = secured(listener, &transport.security, group.rank, group.addresses.len());
        let config = GroupConfig {
            job: group.name.clone(),
            // The group's name identifies a single version already, so no generation is needed as a fence.
            generation: Generation(0),
            rank: group.rank,
            addresses: group.addresses.clone(),
            timeout: GROUP_TIMEOUT,
        };
        match transport.backend {
            Backend::Host => Ok(Box::new(OverHost(HostCollective::connect(&listener, config).map_err(text)?))),
            Backend::Nccl(device) => {
                let formed = NcclCollective::connect(&listener, config, AbortHandle::new(), &device);
                Ok(Box::new(OverDevice { collective: formed.map_err(text)?, memory: None }))
            }
            Backend::Emulated => {
                let collective = HostCollective::connect(&listener, config).map_err(text)?.with_emulated_device();
                Ok(Box::new(OverDevice { collective, memory: None }))
            }
        }
    }
}

/// Refuses a group in which plain text would leave the machine, because members report their own addresses.
fn check_addresses(security: &Security, addresses: &[String]) -> Result<(), String> {
    for address in addresses {
        let parsed: SocketAddr = address.parse().map_err(|error| format!("address `{address}`: {error}"))?;
        security.check_listen(parsed).map_err(text)?;
    }
    Ok(())
}

/// Verifies the roles in a ring: rank 0 is a learner, the others are rollout workers.
fn secured(listener: HostListener, security: &Security, rank: usize, members: usize) -> HostListener {
    if matches!(security, Security::Plain) {
        return listener;
    }
    let role = |rank: usize| if rank == 0 { PeerRole::Learner } else { PeerRole::Rollout };
    let next = role((rank + 1) % members);
    let judge: fn(&CertificateDer<'_>) -> Result<(), String> = match role((rank + members - 1) % members) {
        PeerRole::Learner => |certificate| check_role(certificate, PeerRole::Learner),
        _ => |certificate| check_role(certificate, PeerRole::Rollout),
    };
    let security = security.clone();
    listener.with_credentials(Arc::new(move || {
        let (client, server) = security.rustls().expect("it is not plain");
        let name = ServerName::try_from(next.dns_name()).expect("the names of roles are DNS names");
        Credentials { client, server, name, judge }
    }))
}

struct OverHost(HostCollective);

impl Channel for OverHost {
    fn broadcast(&mut self, bytes: &mut [u8]) -> Result<(), String> {
        self.0.broadcast(0, bytes).map_err(|error| error.to_string())
    }

    fn finish(mut self: Box<Self>) -> Result<(), String> {
        self.0.barrier().map_err(|error| error.to_string())
    }
}

/// Stages pieces in device memory. Copies between host and device do not overlap with the broadcast: a piece is at most
/// 64 MiB, and the receiver's verification and writing overlap with the next piece.
struct OverDevice<C> {
    collective: C,
    memory: Option<(usize, DeviceMemory)>,
}

impl<C: Collective> OverDevice<C> {
    fn stage(&mut self, bytes: &mut [u8]) -> Result<(), String> {
        // Two lengths occur: that of the last piece, and that of all others.
        let memory = match &mut self.memory {
            Some((length, memory)) if *length == bytes.len() => memory,
            stale => {
                // Freed before the new buffer is allocated.
                *stale = None;
                let device = self.collective.device().ok_or("the communicator has no device")?;
                &mut stale.insert((bytes.len(), device.allocate(bytes.len()).map_err(text)?)).1
            }
        };
        if self.collective.rank() == 0 {
            memory.upload(bytes).map_err(text)?;
        }
        let collective = &mut self.collective;
        memory.lend(|buffer| collective.broadcast_device(0, buffer)).map_err(text)?.map_err(text)?;
        if self.collective.rank() != 0 {
            memory.download(bytes).map_err(text)?;
        }
        Ok(())
    }
}

impl<C: Collective> Channel for OverDevice<C> {
    fn broadcast(&mut self, bytes: &mut [u8]) -> Result<(), String> {
        // A member whose copy failed leaves the others in the middle of a broadcast; the abort ends it for them now, not at the deadline.
        self.stage(bytes).inspect_err(|problem| self.collective.abort_handle().abort(problem.clone()))
    }

    fn finish(mut self: Box<Self>) -> Result<(), String> {
        self.collective.barrier().map_err(text)
    }
}

fn text(error: impl Display) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_text_does_not_leave_the_machine() {
        let refused = CollectiveTransport::host("0.0.0.0", Security::Plain).listen().err().expect("refused");
        assert!(refused.to_string().contains("plain text never leaves the machine"), "{refused}");
        let transport = CollectiveTransport::host("127.0.0.1", Security::Plain);
        let seat = transport.listen().expect("a seat");
        let addresses = vec!["127.0.0.1:1".to_owned(), seat.address(), "192.0.2.1:7".to_owned()];
        let refused = seat.enter(&Group { name: "group".into(), rank: 1, addresses }).err().expect("refused");
        assert!(refused.contains("192.0.2.1:7"), "{refused}");
    }
}
