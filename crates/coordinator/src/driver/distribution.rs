//! Weight distribution: announcements to rollout workers, and who fetches from whom.

use pacs_protocol::v1;
use pacs_types::{Role, WorkerId};
use pacs_weights::{VersionId, is_address};
use tonic::Status;

use super::Driver;

/// Most failed addresses that a worker may report.
const MOST_FAILED: usize = 64;

impl Driver {
    /// The announced weights, unless the worker knows them already.
    pub(crate) fn announced(&mut self, request: &v1::AwaitWeightsRequest) -> Result<Option<v1::WeightsRef>, Status> {
        let worker = WorkerId(request.worker_id);
        self.check_rollout(worker)?;
        let Some(weights) = &self.weights else { return Ok(None) };
        let known = (request.generation, request.version) == (weights.generation, weights.version);
        if !known || request.digest != weights.digest {
            return Ok(Some(weights.clone()));
        }
        if request.held && self.distribution.version() == Some(id(weights)) {
            self.distribution.holds(worker);
        }
        Ok(None)
    }

    /// Sources from which a worker may fetch the announced weights.
    pub(crate) fn sources(&mut self, request: &v1::FindSourcesRequest) -> Result<Vec<v1::WeightSource>, Status> {
        let worker = WorkerId(request.worker_id);
        self.check_rollout(worker)?;
        if !request.address.is_empty() && !is_address(&request.address) {
            return Err(Status::invalid_argument("field `address`: is not host:port"));
        }
        if request.failed.len() > MOST_FAILED {
            let problem = format!("field `failed`: has {} addresses, {MOST_FAILED} at most", request.failed.len());
            return Err(Status::invalid_argument(problem));
        }
        let wanted = VersionId::new(request.generation, request.version);
        let weights = self.weights.as_ref().filter(|weights| id(weights) == wanted);
        let Some(weights) = weights else {
            return Err(Status::failed_precondition(format!("{wanted} is not the one that is announced")));
        };
        self.distribution.announce(wanted, &weights.address);
        let machine = &self.machine;
        self.distribution.retain(|worker| machine.worker_role(worker) == Some(Role::Rollout));
        let found = self.distribution.find(worker, &request.address, &request.failed);
        let source = |source: pacs_weights::Source| v1::WeightSource {
            address: source.address,
            role: match source.role {
                pacs_runtime::net::PeerRole::Learner => v1::Role::Learner.into(),
                _ => v1::Role::Rollout.into(),
            },
        };
        Ok(found.into_iter().map(source).collect())
    }

    fn check_rollout(&self, worker: WorkerId) -> Result<(), Status> {
        match self.machine.worker_role(worker) {
            Some(Role::Rollout) => Ok(()),
            Some(_) => Err(Status::permission_denied(format!("worker {worker} generates no samples"))),
            None => Err(Status::not_found(format!("worker {worker} is not registered"))),
        }
    }
}

fn id(weights: &v1::WeightsRef) -> VersionId {
    VersionId::new(weights.generation, weights.version)
}
