//! Samples that wait for a server.

use std::collections::VecDeque;
use std::sync::Arc;

use pacs_engine::{GroupJob, SamplingOptions};
use pacs_types::NoiseKey;
use pacs_weights::VersionId;

/// What the samples of a group have in common.
#[derive(Debug)]
pub(crate) struct Group {
    pub(crate) ticket: u64,
    pub(crate) prompt: Vec<u32>,
    pub(crate) options: SamplingOptions,
    /// The oldest version that may generate it.
    pub(crate) oldest: VersionId,
}

/// A sample that is to be generated.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) group: Arc<Group>,
    pub(crate) index: u32,
    pub(crate) noise: NoiseKey,
    /// Servers that have tried it in vain.
    pub(crate) attempts: u32,
    /// The server that tried it last.
    pub(crate) tried: Option<usize>,
}

impl Wanted {
    /// The samples of a job.
    pub(crate) fn of(job: GroupJob, oldest: VersionId) -> impl Iterator<Item = Self> {
        let GroupJob { ticket, prompt, samples, options, records_routes: _ } = job;
        let group = Arc::new(Group { ticket, prompt, options, oldest });
        samples.into_iter().map(move |(index, noise)| Self {
            group: Arc::clone(&group),
            index,
            noise,
            attempts: 0,
            tried: None,
        })
    }

    /// Its name among all samples.
    pub(crate) fn key(&self) -> (u64, u32) {
        (self.group.ticket, self.index)
    }

    /// Seed of its requests: vLLM takes 64 bits with a sign, and -1 for none.
    pub(crate) fn seed(&self) -> u64 {
        self.noise.bits() >> 1
    }
}

/// Waiting samples, in the order in which they were asked for; bounded by the samples on lease.
#[derive(Debug, Default)]
pub(crate) struct Queue(VecDeque<Wanted>);

impl Queue {
    pub(crate) fn extend(&mut self, wanted: impl Iterator<Item = Wanted>) {
        self.0.extend(wanted);
    }

    /// Puts a sample back that a server has failed: it has waited longest.
    pub(crate) fn put_back(&mut self, wanted: Wanted) {
        self.0.push_front(wanted);
    }

    pub(crate) fn cancel(&mut self, ticket: u64) {
        self.0.retain(|wanted| wanted.group.ticket != ticket);
    }

    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    /// Takes the first sample that some server can take, with the number of that server.
    pub(crate) fn take(&mut self, mut seat_for: impl FnMut(&Wanted) -> Option<usize>) -> Option<(Wanted, usize)> {
        let (place, seat) = self.0.iter().enumerate().find_map(|(place, wanted)| Some((place, seat_for(wanted)?)))?;
        Some((self.0.remove(place)?, seat))
    }
}
