//! The trait of rollout engines.

use std::sync::Arc;

use pacs_weights::{Description, Probe, Received, VersionId};
use tokio::sync::watch;

use crate::GroupJob;

/// The engine ended; its last [`crate::Output`] says why.
#[derive(Debug, thiserror::Error)]
#[error("the engine ended")]
pub struct EngineGone;

/// Why a received version cannot be given to the engine.
#[derive(Debug)]
pub enum NotPrepared {
    /// Another try may succeed.
    Failed(String),
    /// It is not for this worker, and no version after it will be.
    Refused(String),
}

/// What generates samples, as seen by the worker that leases their groups.
///
/// Every engine promises the following; what is not promised here is its own business.
///
/// - **Exact tokens.** It is given token ids and returns token ids. Nothing is rendered or tokenized in between.
/// - **Log-probs** of every token under the policy at the temperature, and, where sampling cuts something off, under the
///   distribution that the token was drawn from ([`pacs_types::Sample`]).
/// - **Versions.** A sample names the version that generated each of its tokens. A sample whose versions are not known
///   for certain is generated again, never returned.
/// - **No stale weights.** A group is generated with the version that it was given for, or with newer ones.
/// - **Noise** is a function of each sample's [`pacs_types::NoiseKey`], as far as the engine's arithmetic is.
/// - **An end.** Every sample of a job ends in exactly one [`crate::Output`] that names it, unless its ticket is cancelled or
///   the engine ends.
pub trait RolloutEngine: Send + Sync {
    /// A version made ready for the engine.
    type Weights: Send + 'static;

    /// How many samples it generates at once; changes where servers come and go.
    fn capacity(&self) -> watch::Receiver<usize>;

    /// The version that groups are generated with which are given to it from now on, or a newer one. `None` before there is
    /// any.
    fn serves(&self) -> watch::Receiver<Option<VersionId>>;

    /// Generates a group with version `oldest` or newer ones.
    ///
    /// # Errors
    /// When the engine ended.
    fn generate(&self, job: GroupJob, oldest: VersionId) -> Result<(), EngineGone>;

    /// Forgets a group: nobody wants its other samples. What is finished already may still come.
    fn cancel(&self, ticket: u64);

    /// Whether it was given exactly these weights last, perhaps by an earlier registration of the process. If so, it serves them
    /// from now on as after [`Self::install`].
    fn holds(&self, wanted: &Description) -> bool;

    /// Makes a received version ready. Called on a thread that may block, while the engine generates. `probe` is what was announced
    /// with the version, by which an engine checks processes that it does not control.
    ///
    /// # Errors
    /// See [`NotPrepared`].
    fn prepare(&self, received: &Received, probe: Option<&Arc<Probe>>) -> Result<Self::Weights, NotPrepared>;

    /// Gives it weights, for everything that it generates from now on. Does not wait for them to be in use; that is what
    /// [`Self::serves`] says.
    fn install(&self, weights: Self::Weights);
}
