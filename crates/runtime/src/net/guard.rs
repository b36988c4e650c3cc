use tonic::service::Interceptor;
use tonic::{Request, Status};

use super::{Peer, PeerRole};

/// Says who may call a service.
#[derive(Clone, Copy, Debug)]
pub struct Guard {
    service: &'static str,
    allowed: &'static [PeerRole],
}

impl Guard {
    /// Lets peers of these roles call `service`; in plain text, which stays within one machine, everybody.
    #[must_use]
    pub fn new(service: &'static str, allowed: &'static [PeerRole]) -> Self {
        Self { service, allowed }
    }
}

impl Interceptor for Guard {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        // Only connections of ours carry a peer; one that does not was let in by mistake.
        let peer = request.extensions().get::<Peer>();
        match peer.ok_or_else(|| Status::internal("the connection has no peer"))?.role {
            None => Ok(request),
            Some(role) if self.allowed.contains(&role) => Ok(request),
            Some(role) => {
                tracing::warn!(service = self.service, %role, peer = ?peer.and_then(|p| p.address), "a call was refused");
                Err(Status::permission_denied(format!("a {role} may not call the {} service", self.service)))
            }
        }
    }
}
